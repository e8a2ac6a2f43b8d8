"""Dask for softk: every primitive and its rule block by block, by the backend of the blocks. Values stay lazy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import array_api_compat.dask.array as xp
import dask.array as da

from softk.backend import Array, Backend, Form, Inputs, Part, Primitive, Words, backend_of

__all__ = ["DaskBackend", "backend"]


class DaskBackend(Backend):
    """Chunked arrays. The axes of one problem are gathered into one chunk; the others stay as they are chunked."""

    words = Words('{}.astype("float32")', "da.asarray({})", measure="{}.compute_chunk_sizes() finds it")

    def run(self, primitive: Primitive, part: Part, *groups: Any, **options: Any) -> tuple[Any, ...]:
        arrays, needed = (groups[:-1], groups[-1]) if part == "vjp" else (groups, None)
        if arrays[0][0].shape[-1] == 0:  # nothing to cut into blocks
            return Backend(xp).run(primitive, part, *groups, **options)
        return _blockwise(primitive, part, arrays, needed, options)

    def densely(self, x: Array) -> str | None:
        block = backend_of(x._meta).densely(x._meta)
        return None if block is None else "{}.map_blocks(lambda block: " + block.format("block") + ")"

    def device(self, x: Array) -> Any:
        return None  # Dask has none of its own


def _blockwise(
    primitive: Primitive, part: Part, groups: tuple[Inputs, ...], needed: tuple[bool, ...] | None, options: Any
) -> tuple[Array | None, ...]:
    """A part of a primitive, by the backend of the blocks."""
    x: Array = groups[0][0]
    arrays = [value for group in groups for value in group if value is not None]
    # All arrays have the axes of the slices, which can be cut, and behind them their own; or they are numbers.
    chunks = x.chunks[: x.ndim - primitive.axes]
    own = [max(value.ndim - len(chunks), 0) for value in arrays]
    arrays = [
        value.rechunk((*chunks, *(-1,) * axes)) if axes else value for value, axes in zip(arrays, own, strict=True)
    ]
    cores = [Form(value.shape[value.ndim - axes :], value.dtype) for value, axes in zip(arrays, own, strict=True)]

    def regroup(values: Iterable[Any]) -> list[tuple[Any, ...]]:
        found = iter(values)
        return [tuple(None if value is None else next(found) for value in group) for group in groups]

    def results(*blocks: Array) -> Any:
        inner, given = backend_of(blocks[0]), regroup(blocks)
        with inner.quiet(blocks[0]):
            found = inner.run(primitive, part, *given, *(() if needed is None else (needed,)), **options)
        present = [value for value in found if value is not None]
        return tuple(present) if len(present) > 1 else present[0]

    forms = _forms(primitive, part, regroup(cores), needed, options)
    present = [form for form in forms if form is not None]
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


def _signature(core: Form) -> str:
    """An array's own axes, named by their sizes, as a generalised ufunc has them."""
    return "(" + ",".join(f"d{size}" for size in core.shape) + ")"


def _forms(
    primitive: Primitive, part: Part, groups: list[tuple[Any, ...]], needed: tuple[bool, ...] | None, options: Any
) -> tuple[Form | None, ...]:
    """The shape and dtype of every result on one slice, None for one that there is not."""
    if part == "forward":
        return primitive.forms(xp, groups[0], **options)
    if needed is None:
        return tuple(groups[1][: primitive.moving])
    return tuple(form if need else None for form, need in zip(groups[0], needed, strict=True))


backend = DaskBackend(xp, "dask")
