"""The scores of a block of queries against all keys, and the division of a problem into blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from softk._reference.threshold.masks import log_mask_at
from softk._reference.threshold.problem import logits, sigmoid
from softk.backend import Array, Backend, Part, Primitive, rows_of

#: The largest number of distances in a block, except that a block has at least one query.
CELLS = 2**20
#: Distances are computed from differences up to this dimension; above it a matrix product is much cheaper.
FEW_DIMENSIONS = 8


class Keys:
    """The keys, centered at their mean."""

    def __init__(self, backend: Backend, keys: Array) -> None:
        self.xp = xp = backend.xp
        # `where` may remove a key with a NaN, which must not reach the other keys through the mean or a product.
        finite = xp.isfinite(keys)
        clean = xp.where(finite, keys, 0.0)
        self.origin = backend.constant(xp.mean(clean, axis=-2, keepdims=True))
        self.points = xp.where(finite, clean - self.origin, 0.0)
        self.few = keys.shape[-1] <= FEW_DIMENSIONS
        # A key with an infinity gets the score -inf, a key with a NaN the score NaN.
        zero = xp.zeros_like(keys[..., 0])
        strange = xp.where(xp.any(xp.isnan(keys), axis=-1), math.nan, zero - math.inf)
        penalty = xp.where(xp.all(finite, axis=-1), zero, strange)
        if not self.few:
            penalty = penalty - xp.sum(self.points * self.points, axis=-1)
        self.own = xp.expand_dims(penalty, axis=-2)  # the term of the score that depends only on the key

    def center(self, queries: Array) -> Array:
        """The queries, relative to the mean of the keys. A coordinate that is not finite becomes NaN."""
        return self.xp.where(self.xp.isfinite(queries), queries - self.origin, math.nan)

    def scores(self, queries: Array) -> Array:
        """The scores (..., q, n) of centered queries (..., q, d)."""
        xp, points = self.xp, self.points
        if not self.few:
            return self.own + (2.0 * queries) @ transpose(xp, points)
        total = self.own
        # One coordinate at a time, so that no array (..., q, n, d) is formed.
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
    """A block of queries with all keys: its scores and the operations of the top-k on them."""

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
        self.queries = keys.center(queries)
        scores = keys.scores(self.queries)
        allowed = self._allowed(where, exclude, scores.shape)
        # Keys that may not be selected get the score -inf here, so that the top-k needs no `where`.
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

    def run(self, primitive: Primitive, part: Part, *groups: Any, **options: Any) -> tuple[Any, ...]:
        """A part of the mask or of its logarithm, for the scores of this block."""
        return self.backend.run(primitive, part, (self.scores, self.k, self.tau, None, None), *groups, **options)

    def log_mask(self, offset: Array, reference: Array) -> Array:
        """The logarithm of the mask at the threshold."""
        inputs = self.scores, self.k, self.tau, offset, reference
        found: Array = self.backend.run(log_mask_at, "forward", inputs)[0]
        return found

    def mask(self, offset: Array, reference: Array) -> Array:
        """The mask at the threshold."""
        return sigmoid(self.xp, logits(self.backend, self.scores, reference, self.tau, offset))


def transpose(xp: Any, values: Array) -> Array:
    """Swap the last two axes, by an operation that every library can batch."""
    axes = range(values.ndim - 2)
    return xp.permute_dims(values, (*axes, values.ndim - 1, values.ndim - 2))


# --- blocks of queries


def block_rows(queries: Array, keys: Array) -> int:
    """The number of queries per block. All of them if a trace has symbolic shapes."""
    batch = queries.shape[:-2]
    count: int = queries.shape[-2]
    n: int = keys.shape[-2]
    if not all(isinstance(size, int) for size in (*batch, count, n)):
        return count
    # The smallest number of blocks within the limit, with the queries divided evenly.
    blocks: int = max(1, -(-count // max(1, CELLS // max(1, math.prod(batch) * n))))
    return max(1, -(-count // blocks))


def blocks_of(queries: Array, keys: Array, *arrays: Array | None) -> Iterator[tuple[Any, ...]]:
    """Iterate over the blocks of the queries and of the arrays that have one row per query."""
    count, rows = queries.shape[-2], block_rows(queries, keys)
    if rows == count:
        yield queries, *arrays
        return
    yield from (rows_of(count, start, start + rows, queries, *arrays) for start in range(0, count, rows))


def pull_blocks(backend: Backend, found: Iterator[tuple[Any, ...]], rows: int) -> list[Array]:
    """Combine the cotangents of all blocks: concatenate the first `rows` of them, sum the others over the blocks."""
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
