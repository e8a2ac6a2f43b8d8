"""Dask for softk: every primitive block by block, by the backend of the blocks themselves. Values stay lazy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat.dask.array as xp
import dask.array as da
import numpy as np

from softk._registry import backend_of
from softk.backend import Array, Backend, Primitive

__all__ = ["DaskBackend", "backend"]


class DaskBackend(Backend):
    """Chunked arrays. The selected axis is gathered into one chunk; the other axes stay as they are chunked."""

    def bind(self, primitive: Primitive, **options: Any) -> Callable[..., tuple[Array, ...]]:
        def bound(*inputs: Array) -> tuple[Array, ...]:
            chunks = inputs[0].chunks[:-1]  # of the slices; every input has one value, or n, a slice, or is a number
            given = [value.rechunk((*chunks, -1)) if value.ndim else value for value in inputs if value is not None]
            names = [_core(value, inputs[0]) for value in inputs if value is not None]

            def block(*blocks: Array) -> tuple[Array, ...]:
                values = iter(blocks)
                filled = [None if value is None else next(values) for value in inputs]
                return backend_of(blocks[0]).bind(primitive, **options)(*filled)

            # What comes out, and of which shape, is seen on two items of one slice; the ranks are those of n items.
            probe = block(*(np.ones_like(v._meta, shape=_PROBE[name]) for v, name in zip(given, names, strict=True)))
            found: tuple[Array, ...] = da.apply_gufunc(
                block,
                ",".join(names) + "->" + ",".join("(n)" if value.shape == (2,) else "(one)" for value in probe),
                *given,
                output_dtypes=[value.dtype for value in probe],
                output_sizes=None if "(one)" in names else {"one": 1},
            )
            return found

        return bound

    def device(self, x: Array) -> Any:
        return None  # Dask has none of its own

    def share_device(self, x: Array, other: Array) -> bool:
        return True


_PROBE = {"(n)": (2,), "(one)": (1,), "()": ()}


def _core(value: Array, x: Array) -> str:
    """The last axis of an input: that of the scores, of one value a slice, or none."""
    if value.ndim == 0:
        return "()"
    return "(n)" if value is x or value.shape[-1] == x.shape[-1] != 1 else "(one)"


backend = DaskBackend(xp, "dask")
