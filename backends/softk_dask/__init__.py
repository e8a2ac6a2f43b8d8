"""Dask for softk: every primitive and its rule block by block, by the backend of the blocks. Values stay lazy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat.dask.array as xp
import dask.array as da
import numpy as np

from softk.backend import Array, Backend, Inputs, Primitive, Words, backend_of

__all__ = ["DaskBackend", "backend"]


class DaskBackend(Backend):
    """Chunked arrays. The axes of one problem are gathered into one chunk; the others stay as they are chunked."""

    words = Words('{}.astype("float32")', "da.asarray({})", measure="{}.compute_chunk_sizes() finds it")

    def bind(self, primitive: Primitive, **options: Any) -> Callable[..., tuple[Array, ...]]:
        def bound(*inputs: Array | None) -> tuple[Array, ...]:
            found = _blockwise(primitive, lambda inner, given: inner.bind(primitive, **options)(*given[0]), inputs)
            return tuple(found)

        return bound

    def push(self, primitive: Primitive, inputs: Inputs, outputs: tuple[Array, ...], tangents: Inputs) -> Any:
        return _blockwise(primitive, lambda inner, given: inner.push(primitive, *given), inputs, outputs, tangents)

    def pull(
        self,
        primitive: Primitive,
        inputs: Inputs,
        outputs: tuple[Array, ...],
        cotangents: Inputs,
        needed: tuple[bool, ...],
    ) -> Any:
        return _blockwise(
            primitive,
            lambda inner, given: inner.pull(primitive, given[0], given[1], given[2], needed),
            inputs,
            outputs,
            cotangents,
        )

    def densely(self, x: Array) -> str | None:
        block = backend_of(x._meta).densely(x._meta)
        return None if block is None else "{}.map_blocks(lambda block: " + block.format("block") + ")"

    def device(self, x: Array) -> Any:
        return None  # Dask has none of its own

    def share_device(self, x: Array, other: Array) -> bool:
        return True


def _blockwise(
    primitive: Primitive, function: Callable[[Backend, list[Any]], Any], *groups: Inputs
) -> tuple[Array | None, ...]:
    """Apply ``function(backend of the blocks, groups of blocks)``, whose result is a tuple of arrays or None."""
    x: Array = groups[0][0]
    if x.shape[-1] == 0:
        return tuple(function(Backend(xp), list(groups)))  # nothing to cut into blocks
    arrays = [value for group in groups for value in group if value is not None]
    # All arrays have the axes of the slices, which can be cut, and behind them their own; or they are numbers.
    chunks = x.chunks[: x.ndim - primitive.axes]
    own = [max(value.ndim - len(chunks), 0) for value in arrays]
    arrays = [
        value.rechunk((*chunks, *(-1,) * axes)) if axes else value for value, axes in zip(arrays, own, strict=True)
    ]
    cores = [value.shape[value.ndim - axes :] for value, axes in zip(arrays, own, strict=True)]

    def apply(*blocks: Array) -> tuple[Any, ...]:
        inner = backend_of(blocks[0])
        values = iter(blocks)
        with inner.quiet():
            return tuple(function(inner, [tuple(None if v is None else next(values) for v in g) for g in groups]))

    found = _shapes(apply, [value._meta for value in arrays], cores, x.shape[-1])
    present = [value for value in found if value is not None]
    known = {size for core in cores for size in core}

    def results(*blocks: Array) -> Any:
        values = [value for value in apply(*blocks) if value is not None]
        return tuple(values) if len(values) > 1 else values[0]

    outputs = da.apply_gufunc(
        results,
        ",".join(map(_signature, cores)) + "->" + ",".join(_signature(core) for core, _ in present),
        *arrays,
        output_dtypes=[dtype for _, dtype in present],
        output_sizes={f"d{size}": size for core, _ in present for size in core if size not in known},
    )
    outputs = iter(outputs if len(present) > 1 else (outputs,))
    return tuple(None if value is None else next(outputs) for value in found)


def _signature(core: tuple[int, ...]) -> str:
    """An array's own axes, named by their sizes, as a generalised ufunc has them."""
    return "(" + ",".join(f"d{size}" for size in core) + ")"


def _shapes(
    apply: Callable[..., tuple[Any, ...]], metas: list[Any], cores: list[tuple[int, ...]], n: int
) -> list[tuple[tuple[int, ...], Any] | None]:
    """The shape and dtype of every result on one slice, None for one that there is not.

    Seen by trying. Where nothing but the number of scores can be an axis, two scores and three say which of the axes
    follow it; elsewhere a slice of its real size is tried.
    """

    def attempt(size: int) -> list[Any]:
        shapes = [tuple(size if length == n else length for length in core) for core in cores]
        return list(apply(*(np.ones_like(meta, shape=shape) for meta, shape in zip(metas, shapes, strict=True))))

    if n == 1 or any(core not in ((), (1,), (n,)) for core in cores):
        return [None if value is None else (value.shape, value.dtype) for value in attempt(n)]
    return [
        None
        if one is None
        else (tuple(n if i != j else i for i, j in zip(one.shape, two.shape, strict=True)), one.dtype)
        for one, two in zip(attempt(2), attempt(3), strict=True)
    ]


backend = DaskBackend(xp, "dask")
