"""The Dask backend: it computes primitives and their rules lazily, block by block, with the backend of the blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import array_api_compat.dask.array as xp
import dask.array as da

from softk._reference.threshold.replay import PER_ITEM
from softk.backend import PRIMITIVES, Array, Backend, Form, Inputs, Part, Primitive, Words, backend_of

from .chunks import in_passes

__all__ = ["DaskBackend", "backend"]


class DaskBackend(Backend):
    """Dask arrays. The batch axes keep their chunks.

    Masks and thresholds are computed in passes over the chunks of the selected axis. For other operators, and with
    weights, the axes of one problem are merged into one chunk.
    """

    words = Words('{}.astype("float32")', "da.asarray({})", measure="{}.compute_chunk_sizes() finds it")

    def run(self, primitive: Primitive, part: Part, *groups: Any, **options: Any) -> tuple[Any, ...]:
        arrays, needed = (groups[:-1], groups[-1]) if part == "vjp" else (groups, None)
        x = arrays[0][0]
        if x.shape[-1] == 0:  # an empty axis has no blocks
            return Backend(xp).run(primitive, part, *groups, **options)
        if primitive.name in PER_ITEM and arrays[0][3] is None and len(x.chunks[-1]) > 1:
            return in_passes(primitive, part, arrays, needed, options)
        return _blockwise(primitive, part, arrays, needed, options)

    def densely(self, x: Array) -> str | None:
        block = backend_of(x._meta).densely(x._meta)
        return None if block is None else "{}.map_blocks(lambda block: " + block.format("block") + ")"

    def device(self, x: Array) -> Any:
        return None  # a Dask array has no device; its blocks have


def _blockwise(
    primitive: Primitive, part: Part, groups: tuple[Inputs, ...], needed: tuple[bool, ...] | None, options: Any
) -> tuple[Array | None, ...]:
    """Compute a part of a primitive block by block, with the backend of the blocks."""
    x: Array = groups[0][0]
    arrays = [value for group in groups for value in group if value is not None]
    # An array has the batch axes, which keep their chunks, and then axes of its own. A number has neither.
    chunks = x.chunks[: x.ndim - primitive.axes]
    shared = {id(value) for value in groups[0][len(groups[0]) - primitive.shared :]}
    own = [value.ndim if id(value) in shared else max(value.ndim - len(chunks), 0) for value in arrays]
    arrays = [
        value.rechunk((*chunks, *(-1,) * axes)[-value.ndim :]) if axes else value
        for value, axes in zip(arrays, own, strict=True)
    ]
    cores = [Form(value.shape[value.ndim - axes :], value.dtype) for value, axes in zip(arrays, own, strict=True)]

    def regroup(values: Iterable[Any]) -> list[tuple[Any, ...]]:
        """Put a flat list of values, without the Nones, back into the groups."""
        found = iter(values)
        return [tuple(None if value is None else next(found) for value in group) for group in groups]

    def results(*blocks: Array) -> Any:
        inner, given = backend_of(blocks[0]), regroup(blocks)
        with inner.quiet(blocks[0]):
            found = inner.run(_registered(primitive), part, *given, *(() if needed is None else (needed,)), **options)
        present = [value for value in found if value is not None]
        return tuple(present) if len(present) > 1 else present[0]

    forms = _forms(primitive, part, regroup(cores), needed, options)
    present = [form for form in forms if form is not None]
    # apply_gufunc must be told the sizes of result axes that no input has.
    known = {size for core in cores for size in core.shape}
    found = da.apply_gufunc(
        results,
        ",".join(_signature(core) for core in cores) + "->" + ",".join(_signature(form) for form in present),
        *arrays,
        output_dtypes=[form.dtype for form in present],
        output_sizes={f"d{size}": size for form in present for size in form.shape if size not in known},
    )
    outputs = iter(found if len(present) > 1 else (found,))
    return tuple(None if form is None else next(outputs) for form in forms)


def _registered(primitive: Primitive) -> Primitive:
    """The primitive itself, in the place of the copy that another process gets of it: kernels know no copies."""
    return PRIMITIVES.get(primitive.name, primitive)


def _signature(core: Form) -> str:
    """The signature of an array's own axes, as in a generalized ufunc. Axes are named by their sizes."""
    return "(" + ",".join(f"d{size}" for size in core.shape) + ")"


def _forms(
    primitive: Primitive, part: Part, groups: list[tuple[Any, ...]], needed: tuple[bool, ...] | None, options: Any
) -> tuple[Form | None, ...]:
    """The shape and dtype of every result for one problem, None for a cotangent that is not needed."""
    if part == "forward":
        return primitive.forms(xp, groups[0], **options)
    if needed is None:
        return tuple(groups[1][: primitive.moving])
    return tuple(form if need else None for form, need in zip(groups[0], needed, strict=True))


backend = DaskBackend(xp, "dask")
