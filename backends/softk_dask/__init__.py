"""Dask for softk: every primitive and its rule block by block, by the backend of the blocks. Values stay lazy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat.dask.array as xp
import dask.array as da
import numpy as np

from softk._registry import backend_of
from softk.backend import Array, Backend, Inputs, Primitive

__all__ = ["DaskBackend", "backend"]


class DaskBackend(Backend):
    """Chunked arrays. The selected axis is gathered into one chunk; the other axes stay as they are chunked."""

    def bind(self, primitive: Primitive, **options: Any) -> Callable[..., tuple[Array, ...]]:
        def bound(*inputs: Array | None) -> tuple[Array, ...]:
            found = _blockwise(lambda inner, given: inner.bind(primitive, **options)(*given[0]), inputs)
            return tuple(found)

        return bound

    def push(self, primitive: Primitive, inputs: Inputs, outputs: tuple[Array, ...], tangents: Inputs) -> Any:
        return _blockwise(lambda inner, given: inner.push(primitive, *given), inputs, outputs, tangents)

    def pull(self, primitive: Primitive, inputs: Inputs, outputs: tuple[Array, ...], cotangents: Inputs) -> Any:
        return _blockwise(lambda inner, given: inner.pull(primitive, *given), inputs, outputs, cotangents)

    def device(self, x: Array) -> Any:
        return None  # Dask has none of its own

    def share_device(self, x: Array, other: Array) -> bool:
        return True


def _blockwise(function: Callable[[Backend, list[Any]], Any], *groups: Inputs) -> tuple[Array | None, ...]:
    """Apply ``function(backend of the blocks, groups of blocks)``, whose result is a tuple of arrays or None."""
    x: Array = groups[0][0]
    if x.shape[-1] == 0:
        return tuple(function(Backend(xp), list(groups)))  # nothing to cut into blocks
    arrays = [value for group in groups for value in group if value is not None]
    names = [_core(value, x) for value in arrays]
    # All arrays have one value, or n, a slice, or are numbers: they can be cut into the same slices.
    chunks = x.chunks[:-1]
    arrays = [value.rechunk((*chunks, -1)) if value.ndim else value for value in arrays]

    def apply(*blocks: Array) -> tuple[Any, ...]:
        inner = backend_of(blocks[0])
        values = iter(blocks)
        with inner.quiet():
            return tuple(function(inner, [tuple(None if v is None else next(values) for v in g) for g in groups]))

    # Which results there are, and of which shape, is seen on two items of one slice.
    probe = apply(*(np.ones_like(value._meta, shape=_PROBE[name]) for value, name in zip(arrays, names, strict=True)))
    present = [value for value in probe if value is not None]
    found = da.apply_gufunc(
        lambda *blocks: tuple(value for value in apply(*blocks) if value is not None),
        ",".join(names) + "->" + ",".join("(n)" if value.shape == (2,) else "(one)" for value in present),
        *arrays,
        output_dtypes=[value.dtype for value in present],
        output_sizes=None if "(one)" in names else {"one": 1},
    )
    results = iter(found)
    return tuple(None if value is None else next(results) for value in probe)


_PROBE = {"(n)": (2,), "(one)": (1,), "()": ()}


def _core(value: Array, x: Array) -> str:
    """The last axis of an array: that of the scores, of one value a slice, or none."""
    if value.ndim == 0:
        return "()"
    return "(n)" if value.shape[-1] == x.shape[-1] != 1 else "(one)"


backend = DaskBackend(xp, "dask")
