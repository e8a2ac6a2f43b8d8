"""NumPy for softk: selection by partition, and a `where` that does not branch."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import array_api_compat.numpy as compat
import numpy as np

from softk.backend import Array, Backend, Words, pick

__all__ = ["NumpyBackend", "backend"]


class _Namespace:
    """NumPy, with what it is slow at done in another way."""

    __name__ = compat.__name__

    def __getattr__(self, name: str) -> Any:
        found = getattr(compat, name)
        setattr(self, name, found)  # looked up once
        return found

    @staticmethod
    def where(condition: Array, values: Any, other: Any) -> Array:
        """``numpy.where``, by bits where it pays: NumPy's own branches, which takes 4 ms instead of 0.6 for a million
        numbers and a random condition.
        """
        like = values if isinstance(values, np.ndarray) else other
        if (
            not isinstance(like, np.ndarray)
            or like.size < _SMALL
            or like.dtype not in _BITS
            or condition.shape != like.shape
            or not condition.flags.c_contiguous
            or not all(_fits(value, like) for value in (values, other))
        ):
            return np.where(condition, values, other)
        found = np.empty(like.shape, like.dtype)
        bits: Any = _BITS[like.dtype]
        target, chosen = found.reshape(-1).view(bits), condition.reshape(-1)
        one, two = (
            value.reshape(-1).view(bits)
            if isinstance(value, np.ndarray)
            else np.asarray([value], like.dtype).view(bits)
            for value in (values, other)
        )
        for start in range(0, like.size, _BLOCK):  # what stands in between stays in the cache
            part = slice(start, start + _BLOCK)
            first, second = (side[part] if side.size > 1 else side for side in (one, two))
            block = np.negative(chosen[part], dtype=bits)  # all bits where the condition holds
            block &= first ^ second
            np.bitwise_xor(block, second, out=target[part])
        return found

    @staticmethod
    def cumulative_sum(x: Array, *, axis: int) -> Array:
        """``numpy.cumulative_sum``; over short columns row by row, for NumPy goes along each column by itself."""
        if axis != -2 or x.size < _SMALL or x.shape[-2] > x.shape[-1]:
            return compat.cumulative_sum(x, axis=axis)
        found = np.empty_like(x)
        found[..., 0, :] = x[..., 0, :]
        for j in range(1, x.shape[-2]):
            np.add(found[..., j - 1, :], x[..., j, :], out=found[..., j, :])
        return found

    @staticmethod
    def maximum(x: Array, other: Any, out: Array | None = None) -> Array:
        """``numpy.maximum``; beside a number the clip takes a third of its time."""
        beside = _is_number_beside(x, other)
        return np.clip(x, other, np.inf, out=out) if beside else np.maximum(x, other, out=out)

    @staticmethod
    def minimum(x: Array, other: Any, out: Array | None = None) -> Array:
        """``numpy.minimum``, likewise."""
        beside = _is_number_beside(x, other)
        return np.clip(x, -np.inf, other, out=out) if beside else np.minimum(x, other, out=out)


class _Overwriting:
    """The elementwise functions of a namespace, writing over their first argument."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(_NAMESPACE, name)

        def overwrite(x: Array, *others: Any) -> Array:
            return function(x, *others, out=x)

        setattr(self, name, overwrite)
        return overwrite


_BITS = {np.dtype("float32"): np.dtype("int32"), np.dtype("float64"): np.dtype("int64")}
_SMALL = 4096  # items; below, a call costs more than the branches
_BLOCK = 32768  # items
_TERMS = 1024  # of a sum of products


def _is_number_beside(x: Array, other: Any) -> bool:
    return x.size >= _SMALL and x.dtype in _BITS and np.size(other) == 1 and np.ndim(other) <= x.ndim


def _in_blocks(x: Array) -> Array:
    """(..., n) as (..., n // _TERMS, _TERMS), without a copy and without the rest."""
    count = x.shape[-1] // _TERMS
    strides = (*x.strides[:-1], _TERMS * x.strides[-1], x.strides[-1])
    return np.lib.stride_tricks.as_strided(x, (*x.shape[:-1], count, _TERMS), strides, writeable=False)


def _fits(value: Any, like: Array) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype == like.dtype and value.shape == like.shape and value.flags.c_contiguous
    return isinstance(value, (int, float))


class NumpyBackend(Backend):
    """Arrays in memory: values can be looked at, and NumPy partitions in O(n)."""

    words = Words("{}.astype(np.float32)", "np.asarray({})")

    def densely(self, x: Array) -> str | None:
        return None

    def memory(self, x: Any) -> Any:
        return x

    def cache_key(self, x: Array) -> Hashable | None:
        return (x.shape, x.dtype) if type(x) is np.ndarray else None

    @property
    def overwriting(self) -> Any:
        return _OVERWRITING

    def sigmoid(self, z: Array) -> Array:
        z = np.negative(z)
        z = np.exp(z, out=z)  # which may overflow: nobody differentiates it
        z += 1.0
        return np.reciprocal(z, out=z)

    def dot(self, x: Array, y: Array) -> Array:
        """Each product of a block is added to one of a few sums, by BLAS; those of the blocks are added in pairs."""
        x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)  # by the same loop, whatever the order in memory
        rest = x.shape[-1] % _TERMS
        found = np.vecdot(x[..., x.shape[-1] - rest :], y[..., y.shape[-1] - rest :])[..., None]
        if rest == x.shape[-1]:
            return found
        blocks = np.vecdot(_in_blocks(x), _in_blocks(y))
        return found + blocks.sum(axis=-1, keepdims=True)

    def gather_above(self, x: Array, level: Array) -> Array | None:
        flat = x.reshape(-1, x.shape[-1])
        found = np.flatnonzero(~(flat < level.reshape(-1, 1)))
        if found.size > flat.size // 2:
            return None
        ends = np.searchsorted(found, np.arange(1, len(flat) + 1) * flat.shape[-1])
        counts = np.diff(ends, prepend=0)[:, None]
        width = int(counts.max(initial=1))
        if width > flat.shape[-1] // 2:
            return None
        gathered = np.full((len(flat), width), -np.inf, x.dtype)
        gathered[np.arange(width) < counts] = flat.reshape(-1).take(found)
        return gathered.reshape(*x.shape[:-1], width)

    def select(self, x: Array, ranks: Array | tuple[int, ...]) -> Array:
        n = x.shape[-1]
        if isinstance(ranks, tuple):
            if x.size == 0:
                return np.empty((*x.shape[:-1], len(ranks)), x.dtype)
            places = [n - rank for rank in ranks]
            if len(places) == 2 and places[0] == places[1] + 1:
                # One partition is vectorised, of two ranks at once it is not; the next is the largest of the rest.
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


_NAMESPACE = _Namespace()
_OVERWRITING = _Overwriting()

backend = NumpyBackend(_NAMESPACE, "numpy")
