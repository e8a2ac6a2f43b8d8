"""The scores of a block of queries beside all keys, and the blocks of a problem."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from softk._reference.threshold.problem import logits
from softk._reference.threshold.rule import Linearisation, LogLinearisation
from softk._reference.threshold.solve import solve
from softk.backend import Array, Backend, rows_of

#: How many distances a block has, unless a single query has more.
CELLS = 2**20
#: Up to this many dimensions differences are formed; beyond them a matrix product is much cheaper.
FEW_DIMENSIONS = 8


class Keys:
    """The keys around their own mean."""

    def __init__(self, backend: Backend, keys: Array) -> None:
        self.xp = xp = backend.xp
        # A key that is not a number may be removed by `where`, and must not reach the others through a product.
        finite = xp.isfinite(keys)
        clean = xp.where(finite, keys, 0.0)
        self.origin = backend.constant(xp.mean(clean, axis=-2, keepdims=True))
        self.points = xp.where(finite, clean - self.origin, 0.0)
        self.few = keys.shape[-1] <= FEW_DIMENSIONS
        # An infinite key is infinitely far away.
        zero = xp.zeros_like(keys[..., 0])
        strange = xp.where(xp.any(xp.isnan(keys), axis=-1), math.nan, zero - math.inf)
        penalty = xp.where(xp.all(finite, axis=-1), zero, strange)
        if not self.few:
            penalty = penalty - xp.sum(self.points * self.points, axis=-1)
        self.own = xp.expand_dims(penalty, axis=-2)  # the part of the score that is the key's alone

    def centre(self, queries: Array) -> Array:
        """A query that is not finite has no neighbours: it is NaN."""
        return self.xp.where(self.xp.isfinite(queries), queries - self.origin, math.nan)

    def scores(self, queries: Array) -> Array:
        """Of centred queries (..., q, d): (..., q, n)."""
        xp, points = self.xp, self.points
        if not self.few:
            return self.own + 2.0 * (queries @ transpose(xp, points))
        total = self.own
        for i in range(points.shape[-1]):
            difference = queries[..., i : i + 1] - transpose(xp, points[..., i : i + 1])
            total = total - difference * difference
        return total

    def push(self, queries: Array, dqueries: Array | None, dkeys: Array | None) -> Array | None:
        """The tangent of the scores."""
        xp = self.xp
        tangent = None
        if dqueries is not None:
            tangent = 2.0 * (dqueries @ transpose(xp, self.points))
            if self.few:
                tangent = tangent - 2.0 * xp.sum(dqueries * queries, axis=-1, keepdims=True)
        if dkeys is not None:
            own = xp.expand_dims(xp.sum(dkeys * self.points, axis=-1), axis=-2)
            moved = 2.0 * (queries @ transpose(xp, dkeys) - own)
            tangent = moved if tangent is None else tangent + moved
        return tangent

    def pull(self, queries: Array, cotangent: Array) -> tuple[Array, Array]:
        """The cotangents of the queries and of the keys."""
        xp = self.xp
        by_queries = cotangent @ self.points
        if self.few:
            by_queries = by_queries - xp.sum(cotangent, axis=-1, keepdims=True) * queries
        across = transpose(xp, cotangent)
        by_keys = across @ queries - xp.sum(across, axis=-1, keepdims=True) * self.points
        return 2.0 * by_queries, 2.0 * by_keys


class Block:
    """Some queries beside all keys."""

    def __init__(
        self,
        backend: Backend,
        keys: Keys,
        queries: Array,
        k: Array,
        tau: Array,
        where: Array | None,
        exclude: Array | None,
    ) -> None:
        self.backend, self.xp, self.keys, self.k, self.tau = backend, backend.xp, keys, k, tau
        self.queries = keys.centre(queries)
        scores = keys.scores(self.queries)
        allowed = self._allowed(where, exclude, scores.shape)
        # Whatever is not a choice is infinitely far away: said once here, and not by each of the rules again.
        self.scores = scores if allowed is None else self.xp.where(allowed, scores, -math.inf)

    def _allowed(self, where: Array | None, exclude: Array | None, shape: tuple[int, ...]) -> Array | None:
        xp = self.xp
        if where is not None:
            where = xp.broadcast_to(where, shape)
        if exclude is None:
            return where
        index = xp.arange(shape[-1], dtype=exclude.dtype, device=self.backend.device(exclude))
        others = exclude != xp.reshape(index, (*(1,) * (len(shape) - 1), -1))
        return others if where is None else others & where

    def solve(self, ranks: tuple[int, ...] | None) -> tuple[Array, Array]:
        reference, offset, _ = solve(self.backend, self.scores, self.k, self.tau, None, None, ranks)
        return offset, reference

    def z(self, offset: Array, reference: Array) -> Array:
        return logits(self.backend, self.scores, reference, self.tau, offset)

    def mask(self, offset: Array, reference: Array) -> Array:
        return self.backend.sigmoid(self.z(offset, reference))

    @property
    def inputs(self) -> tuple[Any, ...]:
        return self.scores, self.k, self.tau, None, None

    def rule(self, offset: Array, reference: Array, *, balanced: bool) -> Linearisation:
        """The mask's, which needs no balance where only the derivative in the points is asked for."""
        return Linearisation(self.backend, self.inputs, reference, offset, balanced=balanced)

    def log_rule(self, offset: Array, reference: Array) -> LogLinearisation:
        return LogLinearisation(self.backend, self.inputs, reference, offset)


def transpose(xp: Any, values: Array) -> Array:
    """The last two axes exchanged, in a way that every library can batch."""
    axes = range(values.ndim - 2)
    return xp.permute_dims(values, (*axes, values.ndim - 1, values.ndim - 2))


# --- blocks of queries


def block_rows(queries: Array, keys: Array) -> int:
    """How many queries a block has. All of them where a trace has no numbers for the shapes."""
    batch = queries.shape[:-2]
    count: int = queries.shape[-2]
    n: int = keys.shape[-2]
    if not all(isinstance(size, int) for size in (*batch, count, n)):
        return count
    blocks: int = max(1, -(-count // max(1, CELLS // max(1, math.prod(batch) * n))))
    return max(1, -(-count // blocks))


def blocks_of(queries: Array, keys: Array, *arrays: Array | None) -> Iterator[tuple[Any, ...]]:
    """The queries, and the arrays that have a row for each of them, block by block."""
    count, rows = queries.shape[-2], block_rows(queries, keys)
    if rows == count:
        yield queries, *arrays
        return
    yield from (rows_of(count, start, start + rows, queries, *arrays) for start in range(0, count, rows))


def pull_blocks(backend: Backend, found: Iterator[tuple[Any, ...]], rows: int) -> list[Array]:
    """Cotangents block by block: the first `rows` of them belong to the block, the others add up."""
    parts: list[tuple[Any, ...]] = []
    totals: tuple[Any, ...] = ()
    for block in found:
        parts.append(block[:rows])
        own = block[rows:]
        totals = own if not totals else tuple(a if a is None else a + b for a, b in zip(totals, own, strict=True))
    joined = [_join(backend, column) for column in zip(*parts, strict=True)]
    return [*joined, *totals]


def _join(backend: Backend, column: tuple[Any, ...]) -> Array | None:
    if column[0] is None or len(column) == 1:
        return column[0]
    return backend.xp.concat(list(column), axis=-2)
