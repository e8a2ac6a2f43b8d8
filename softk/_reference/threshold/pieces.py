"""Slices in pieces: the items of a slice lie in several arrays, of this process or of several.

There is one solver and one derivative rule. What they need of the items are elementwise operations and a few reductions
along the selected axis. `Pieces` is an array of one value per item whose pieces are arrays of the framework. A
`PieceBackend` has a namespace in which elementwise operations work piece by piece, and reductions run over all pieces.
A piece may be a shard: every member of a group holds a different one. Then the results of the reductions, a few numbers
per slice, are reduced over the group, by `Backend.reduce_shards`. The scores are neither joined nor sent.

Values of one per slice, such as k, the temperature and all sums, stay plain arrays. Every member has the same ones.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

from softk.backend import Array, Backend, index_dtype

__all__ = ["PieceBackend", "Pieces"]


class Pieces:
    """An array of one value per item, in pieces along the last axis. No operation tells how many items there are."""

    #: NumPy leaves its binary operations to this class.
    __array_ufunc__ = None

    def __init__(self, arrays: tuple[Array, ...]) -> None:
        self.arrays = arrays

    @property
    def shape(self) -> tuple[Any, ...]:
        return (*self.arrays[0].shape[:-1], None)

    @property
    def ndim(self) -> int:
        found: int = self.arrays[0].ndim
        return found

    @property
    def dtype(self) -> Any:
        return self.arrays[0].dtype

    def part(self, i: int, value: Any) -> Any:
        """What the piece i is combined with: the same piece of another value, or a value that holds for every piece."""
        return value.arrays[i] if isinstance(value, Pieces) else value

    def like(self, arrays: tuple[Array, ...]) -> Pieces:
        """Other values of the same items."""
        return Pieces(arrays)

    def chosen(self, places: list[int]) -> Pieces:
        """Some of the pieces."""
        return self.like(tuple(self.arrays[i] for i in places))

    def map(self, function: Callable[..., Array], *others: Any) -> Pieces:
        """The function applied to every piece, with the same piece of the others. Other values go to every piece."""
        return self.like(
            tuple(function(array, *(self.part(i, other) for other in others)) for i, array in enumerate(self.arrays))
        )

    def __neg__(self) -> Pieces:
        return self.map(operator.neg)

    def __invert__(self) -> Pieces:
        return self.map(operator.invert)


def _binary(function: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    def forward(self: Pieces, other: Any) -> Pieces:
        return self.map(function, other)

    def reflected(self: Pieces, other: Any) -> Pieces:
        return self.map(lambda own, given: function(given, own), other)

    return forward, reflected


for _name in ("add", "sub", "mul", "truediv", "and_", "or_"):
    _plain = _name.removesuffix("_")
    _forward, _reflected = _binary(getattr(operator, _name))
    setattr(Pieces, f"__{_plain}__", _forward)
    setattr(Pieces, f"__r{_plain}__", _reflected)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Pieces, f"__{_name}__", _binary(getattr(operator, _name))[0])


class PieceNamespace:
    """The functions of the standard that the reference uses, on plain arrays and on `Pieces`."""

    def __init__(self, backend: PieceBackend, xp: Any) -> None:
        self._backend, self._xp = backend, xp

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._xp, name)
        if not callable(found) or isinstance(found, type):
            return found

        def apply(*args: Any, **kwargs: Any) -> Any:
            first = next((value for value in args if isinstance(value, Pieces)), None)
            if first is None:
                return found(*args, **kwargs)
            return first.like(
                tuple(found(*(first.part(i, value) for value in args), **kwargs) for i in range(len(first.arrays)))
            )

        setattr(self, name, apply)
        return apply

    # -- reductions along the last axis, which keep it with size 1

    def sum(self, x: Any, *, axis: Any, keepdims: bool) -> Array:
        if not isinstance(x, Pieces):
            return self._xp.sum(x, axis=axis, keepdims=keepdims)
        return self._backend.totals(x)

    def count_nonzero(self, x: Any, *, axis: Any, keepdims: bool) -> Array:
        if not isinstance(x, Pieces):
            return self._xp.count_nonzero(x, axis=axis, keepdims=keepdims)
        return self._backend.counts(x)

    def max(self, x: Any, *, axis: Any, keepdims: bool) -> Array:
        if not isinstance(x, Pieces):
            return self._xp.max(x, axis=axis, keepdims=keepdims)
        return self._backend.largest(x)

    def min(self, x: Any, *, axis: Any, keepdims: bool) -> Array:
        if not isinstance(x, Pieces):
            return self._xp.min(x, axis=axis, keepdims=keepdims)
        return -self._backend.largest(-x)

    def any(self, x: Any, *, axis: Any = None, keepdims: bool = False) -> Array:
        if not isinstance(x, Pieces):
            return self._xp.any(x, axis=axis, keepdims=keepdims)
        return self._backend.counts(x) > 0

    def all(self, x: Any, *, axis: Any = None, keepdims: bool = False) -> Array:
        if not isinstance(x, Pieces):
            return self._xp.all(x, axis=axis, keepdims=keepdims)
        return self._backend.counts(~x) == 0

    def cumulative_sum(self, x: Pieces, *, axis: Any) -> Pieces:
        return self._backend.running_sum(x)


class PieceBackend(Backend):
    """The backend of a framework, for slices in pieces.

    Parameters
    ----------
    inner : Backend
        The backend of the pieces.
    groups : tuple of str or None
        For each piece the group whose members hold the other shards of it. None for a piece that is whole, and is the
        same for every member.
    """

    is_split = True

    def __init__(self, inner: Backend, groups: tuple[str | None, ...]) -> None:
        super().__init__(PieceNamespace(self, inner.xp), inner.name)
        self.inner, self.groups = inner, groups
        self.has_shards = any(group is not None for group in groups)

    # -- reductions, of several values at a time

    def totals(self, *values: Pieces) -> Array:
        """The sums over all items, shape (..., m). Booleans are counted, in the dtype of the other values."""
        xp = self.inner.xp
        dtype = next((value.dtype for value in values if not xp.isdtype(value.dtype, "bool")), None)

        def reduced(array: Array) -> Array:
            if not xp.isdtype(array.dtype, "bool"):
                return xp.sum(array, axis=-1, keepdims=True)
            found = xp.count_nonzero(array, axis=-1, keepdims=True)
            return found if dtype is None else xp.astype(found, dtype)

        return self._combine("sum", reduced, operator.add, values)

    def counts(self, *values: Pieces) -> Array:
        """How many items are true, shape (..., m)."""
        index = index_dtype(self.inner.xp)
        return self._combine("sum", lambda array: self._count(array, index), operator.add, values)

    def largest(self, *values: Pieces) -> Array:
        """The largest value of the items, shape (..., m)."""
        xp = self.inner.xp

        def reduced(array: Array) -> Array:
            if array.shape[-1] == 0:  # the shard of a member that has none of the items
                shape = (*array.shape[:-1], 1)
                return xp.full(shape, -math.inf, dtype=array.dtype, device=self.inner.device(array))
            return xp.max(array, axis=-1, keepdims=True)

        return self._combine("max", reduced, xp.maximum, values)

    def extremes(self, high: Pieces, low: Pieces) -> tuple[Array, Array]:
        """The smallest value of the first and the largest of the second."""
        both = self.largest(-high, low)
        return -both[..., :1], both[..., 1:]

    def masses(self, x: Pieces, pivots: Array, weights: Pieces | None) -> Array:
        """The number, or the weight, of the items that are at least as large as each of m pivots: both (..., m)."""
        xp = self.xp
        if self.memory(x) is None:  # a compiler fuses the comparison with the sum, and never has its result whole
            chosen = x.map(lambda array: xp.expand_dims(array, axis=-2) >= xp.expand_dims(pivots, axis=-1))
            if weights is None:
                return self.counts(chosen)[..., 0]
            rows = weights.map(lambda array: xp.expand_dims(array, axis=-2))
            return self.totals(xp.where(chosen, rows, 0.0))[..., 0]
        return self.masses_one_by_one(x, pivots, weights)

    def masses_one_by_one(self, x: Pieces, pivots: Array, weights: Pieces | None) -> Array:
        """`masses`, with a comparison per pivot."""
        each = (x >= pivots[..., i : i + 1] for i in range(pivots.shape[-1]))
        if weights is None:
            return self.counts(*each)
        return self.totals(*(self.xp.where(one, weights, 0.0) for one in each))

    def _count(self, array: Array, index: Any) -> Array:
        xp = self.inner.xp
        return xp.astype(xp.count_nonzero(array, axis=-1, keepdims=True), index)

    def _combine(
        self,
        operation: Literal["sum", "max"],
        reduced: Callable[[Array], Array],
        joined: Callable[[Any, Any], Any],
        values: Any,
    ) -> Array:
        """Reduce every piece, then the pieces of one group, then over the members of the groups."""
        xp = self.inner.xp
        by_group: dict[str | None, Array] = {}
        for i, group in enumerate(self.groups):
            parts = [reduced(value.arrays[i]) for value in values]
            part = xp.concat(parts, axis=-1) if len(parts) > 1 else parts[0]
            by_group[group] = joined(by_group[group], part) if group in by_group else part
        found: Array = None
        for group, part in by_group.items():
            whole = part if group is None else self.inner.reduce_shards(part, operation, group)
            found = whole if found is None else joined(found, whole)
        return found

    def gathered(
        self, summarize: Callable[..., tuple[dict[Any, Array], dict[Any, Any]]], *values: Pieces | Array | None
    ) -> tuple[dict[Any, Array], dict[Any, Pieces]]:
        """What every member finds in its own pieces, of shape (..., 1), from all members: (..., members).

        It is one exchange for each group of shards. ``summarize(backend, *values)`` gets the pieces of one group, and
        `backend` reduces over these alone. It also returns values per item, or per slice, that are not sent: the second
        result has them for every piece.
        """
        xp, own = self.inner.xp, []
        kept: dict[Any, dict[int, Array]] = {}
        for group in dict.fromkeys(self.groups):
            places = [i for i, other in enumerate(self.groups) if other == group]
            found, more = summarize(
                PieceBackend(self.inner, (None,) * len(places)),
                *(value.chosen(places) if isinstance(value, Pieces) else value for value in values),
            )
            for name, value in more.items():
                arrays = value.arrays if isinstance(value, Pieces) else (value,) * len(places)
                kept.setdefault(name, {}).update(zip(places, arrays, strict=True))
            whole = xp.concat(list(found.values()), axis=-1)
            if group is not None:
                whole = self.inner.gather_shards(whole, group)
            own.append(xp.reshape(whole, (*whole.shape[:-1], -1, len(found))))
        whole = xp.concat(own, axis=-2) if len(own) > 1 else own[0]
        mine = {name: Pieces(tuple(arrays[i] for i in range(len(arrays)))) for name, arrays in kept.items()}
        return {name: whole[..., i] for i, name in enumerate(found)}, mine

    def running_sum(self, x: Pieces) -> Pieces:
        """The running sum of integers over all items: piece after piece, and member after member in a piece."""
        xp = self.inner.xp
        found, before = [], None
        for array, group in zip(x.arrays, self.groups, strict=True):
            own = xp.cumulative_sum(array, axis=-1)
            count = xp.sum(array, axis=-1, keepdims=True)
            if group is not None:
                place, members = self.inner.shards(group)
                each = self.inner.gather_shards(count, group)
                count = xp.sum(each, axis=-1, keepdims=True)
                places = xp.arange(members, dtype=count.dtype, device=self.inner.device(count))
                own = own + xp.sum(xp.where(places < place, each, 0), axis=-1, keepdims=True)
            found.append(own if before is None else own + before)
            before = count if before is None else before + count
        return x.like(tuple(found))

    # -- what the framework does differently

    @property
    def differentiates_operations(self) -> bool:
        return self.inner.differentiates_operations

    @property
    def detaches(self) -> bool:
        return self.inner.detaches

    def quiet(self, x: Array | None = None) -> AbstractContextManager[Any]:
        return self.inner.quiet(x.arrays[0] if isinstance(x, Pieces) else x)

    def device(self, x: Any) -> Any:
        return self.inner.device(x.arrays[0] if isinstance(x, Pieces) else x)

    def memory(self, x: Any) -> Any:
        if not isinstance(x, Pieces):
            return self.inner.memory(x)
        return x if all(self.inner.memory(array) is not None for array in x.arrays) else None

    def clip(self, values: Any, least: Array, most: Array) -> Any:
        return (
            values.map(self.inner.clip, least, most)
            if isinstance(values, Pieces)
            else super().clip(values, least, most)
        )

    def constant(self, x: Any) -> Any:
        return x.map(self.inner.constant) if isinstance(x, Pieces) else self.inner.constant(x)

    def repeat(self, step: Callable[[Any], tuple[Any, Array]], state: Any, limit: int) -> Any:
        return self.inner.repeat(step, state, limit)
