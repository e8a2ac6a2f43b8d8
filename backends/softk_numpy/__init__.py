"""NumPy for softk: selection by partition, in O(n)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal

import array_api_compat.numpy as compat
import numpy as np

import softk_numba
from softk.backend import Array, Backend, Words, pick

__all__ = ["NumpyBackend", "backend"]


class NumpyBackend(Backend):
    """Arrays in memory: values can be looked at, and NumPy partitions in O(n)."""

    kernels = softk_numba.KERNELS
    words = Words("{}.astype(np.float32)", "np.asarray({})")

    def densely(self, x: Array) -> str | None:
        return None

    def memory(self, x: Any) -> Any:
        return x

    def cache_key(self, x: Array) -> Hashable | None:
        return (x.shape, x.dtype) if type(x) is np.ndarray else None

    def select(self, x: Array, ranks: Array | tuple[int, ...]) -> Array:
        n = x.shape[-1]
        if isinstance(ranks, tuple):
            if x.size == 0:
                return np.empty((*x.shape[:-1], len(ranks)), x.dtype)
            places = [n - rank for rank in ranks]
            if len(places) == 2 and places[0] == places[1] + 1:
                # One partition is vectorized, of two ranks at once it is not; the next is the largest of the rest.
                ordered = np.partition(x, places[0], axis=-1)
                after = ordered[..., : places[0]].max(axis=-1, keepdims=True)
                return np.concatenate([ordered[..., places[0] : places[0] + 1], after], axis=-1)
            return pick(self.xp, np.partition(x, np.unique(places), axis=-1), places)
        if x.size == 0:
            return np.empty((*x.shape[:-1], ranks.shape[-1]), x.dtype)
        index = n - ranks
        ordered = np.partition(x, np.unique(index), axis=-1)
        return np.take_along_axis(ordered, np.broadcast_to(index, (*x.shape[:-1], ranks.shape[-1])), axis=-1)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        n = x.shape[-1]
        chosen = np.argpartition(x, n - k, axis=-1)[..., n - k :]
        order = np.argsort(np.take_along_axis(x, chosen, axis=-1), axis=-1)[..., ::-1]
        indices = np.take_along_axis(chosen, order, axis=-1)
        return np.take_along_axis(x, indices, axis=-1), indices

    def scatter(self, values: Array, indices: Array, size: int) -> Array:
        found = np.zeros((*values.shape[:-1], size), values.dtype)
        np.put_along_axis(found, indices, values, axis=-1)
        return found

    def reduce_segments(self, values: Array, operation: Literal["sum", "max"], segments: Array, count: int) -> Array:
        # The segments are the same for the whole batch, unless a caller repeats them.
        order = segments.reshape(-1, segments.shape[-1])[0]
        starts = np.searchsorted(order, np.arange(count + 1))
        full = starts[1:] > starts[:-1]
        shape = (*values.shape[:-1], count)
        found = np.zeros(shape, values.dtype) if operation == "sum" else np.full(shape, -np.inf, values.dtype)
        if full.any():
            # Of an empty segment reduceat returns the next value, so those are left out. Its sums are not pairwise.
            reduce, wide = (np.add, np.float64) if operation == "sum" else (np.maximum, values.dtype)
            wide = values.dtype if values.dtype.kind != "f" else wide
            found[..., full] = reduce.reduceat(values, starts[:-1][full], axis=-1, dtype=wide)
        return found


backend = NumpyBackend(compat, "numpy")
