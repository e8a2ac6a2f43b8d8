r"""Nearest neighbours as primitives: queries beside keys, a block of queries at a time.

The scores of a query are minus its squared distances to the keys, up to a shift, and the mask m is that of
`softk.topk`. Three things are read off it, each with its derivative in both directions:

    weights          m                                           (q, n)
    votes            o = m V / k                                 (q, c)
    log likelihood   l = log(sum_j m_j a_j + f k) - log k        (q, 1)

with the keys' values V (n, c), the floor f, and a_j the agreement of a query's label with that of key j: whether two
integers are equal, or the inner product of two rows. The likelihood is formed from log m, which does not underflow, so
that a query among strangers has a gradient that leads it home. For cotangents u,

    votes            mbar = u V^T / k,   Vbar = m^T u / k,   kbar = -<u, o> / k
    log likelihood   (log m)bar_j = u s_j,   abar_j = u s_j / a_j,   kbar = -u sum_j s_j / k,
                     s_j = m_j a_j / (sum m a + f k)

and `softk._rule` says what the mask passes on. With the cotangent X of the scores x_ij = -|q_i - y_j|^2,

    qbar = 2 (X Y - diag(X 1) Q),   ybar = 2 (X^T Q - diag(X^T 1) Y).

**Memory.** Every query is a slice of its own, so nothing is shared between blocks but the keys, whose cotangents add
up. The rules compute each block anew from the points and from the two numbers that solve it, which is all that is
kept.

**Accuracy.** In few dimensions the distances are sums of squared differences, right to a few eps of themselves. In
more they are one matrix product, 2 <q, y> - |y|^2, with an error of a few eps (|q| + |y|) |y|; there the term |q|^2,
the same for all keys, is left out. The origin is the mean of the keys, so that an offset which all points share costs
nothing. It is a constant: no distance depends on it.

Inputs: queries (..., q, d), keys (..., n, d), then what the primitive reads, then k and temperature (..., q, 1) or (),
where (..., 1 or q, 1 or n) or None, and exclude (..., q, 1) or None: the index of one key that the query may not have.
The outputs end as in `softk._primitives`, with the offset and the reference of every query.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ._rule import Linearisation, LogLinearisation
from ._solver import exponential, limits, logits, nonzero, solve
from .backend import Array, Backend, Inputs, Primitive, rows_of

Arrays = tuple[Array, ...]

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


class Shares:
    """The parts that the keys have in the likelihood of each query."""

    def __init__(
        self, block: Block, targets: Array, values: Array, floor: Array, offset: Array, reference: Array
    ) -> None:
        self.xp = xp = block.xp
        self.targets, self.values = targets, values
        self.integers = xp.isdtype(targets.dtype, "integral")
        if self.integers:
            votes = targets == transpose(xp, values)
        else:
            agreement = targets @ transpose(xp, values)
            votes = ~(agreement == 0.0)
        z = block.z(offset, reference)
        votes = votes & ~((block.scores == -math.inf) | (block.k <= 0.0))
        self.log_mask = xp.where(z < 0.0, z, 0.0) - xp.log1p(exponential(xp, -xp.abs(z)))
        found = self.log_mask
        if not self.integers:
            found = found + xp.log(xp.where(votes, agreement, 1.0))
        bottom = xp.log(floor) + xp.log(block.k)
        peak = xp.max(xp.where(votes, found, -math.inf), axis=-1, keepdims=True)
        peak = xp.maximum(peak, bottom)
        self.peak = block.backend.constant(xp.where(peak == -math.inf, 0.0, peak))
        self.parts = xp.where(votes, exponential(xp, xp.where(votes, found - self.peak, 0.0)), 0.0)
        # NaN stays NaN: a query that is none has no votes to say so.
        total = xp.sum(self.parts, axis=-1, keepdims=True) + xp.exp(bottom - self.peak) + 0.0 * offset
        self.total = nonzero(xp, total)
        self.likelihood = xp.where(total == 0.0, -math.inf, self.peak + xp.log(self.total)) - xp.log(block.k)

    def shares(self) -> Array:
        return self.parts / self.total

    def per_agreement(self) -> Array:
        """s / a, which is the mask over the likelihood; not larger than what a derivative can be."""
        xp = self.xp
        ceiling = math.log(limits(xp, self.log_mask.dtype).farthest)
        return xp.exp(xp.minimum(self.log_mask - self.peak, ceiling)) / self.total


def transpose(xp: Any, values: Array) -> Array:
    """The last two axes exchanged, in a way that every library can batch."""
    axes = range(values.ndim - 2)
    return xp.permute_dims(values, (*axes, values.ndim - 1, values.ndim - 2))


# --- blocks of queries


def _rows(queries: Array, keys: Array) -> int:
    """How many queries a block has. All of them where a trace has no numbers for the shapes."""
    batch = queries.shape[:-2]
    count: int = queries.shape[-2]
    n: int = keys.shape[-2]
    if not all(isinstance(size, int) for size in (*batch, count, n)):
        return count
    blocks: int = max(1, -(-count // max(1, CELLS // max(1, math.prod(batch) * n))))
    return max(1, -(-count // blocks))


def _blocks(queries: Array, keys: Array, *arrays: Array | None) -> Iterator[tuple[Any, ...]]:
    """The queries, and the arrays that have a row for each of them, block by block."""
    count, rows = queries.shape[-2], _rows(queries, keys)
    if rows == count:
        yield queries, *arrays
        return
    yield from (rows_of(count, start, start + rows, queries, *arrays) for start in range(0, count, rows))


def _pull_blocks(backend: Backend, found: Iterator[tuple[Any, ...]], rows: int) -> list[Array]:
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


# --- the weights


def _weights_forward(
    backend: Backend,
    queries: Array,
    keys: Array,
    k: Array,
    tau: Array,
    where: Array | None,
    exclude: Array | None,
    *,
    ranks: tuple[int, ...] | None,
) -> Arrays:
    cache = Keys(backend, keys)

    def block(*given: Any) -> Arrays:
        here = Block(backend, cache, *given)
        solved = here.solve(ranks)
        return here.mask(*solved), *solved

    return backend.by_rows(block, _rows(queries, keys), queries, k, tau, where, exclude)


def _weights_jvp(backend: Backend, inputs: Inputs, outputs: Arrays, tangents: Inputs) -> Arrays:
    queries, keys, k, tau, where, exclude = inputs
    dqueries, dkeys, dk, dtau, _, _ = tangents
    cache = Keys(backend, keys)

    def block(queries: Any, offset: Any, reference: Any, dqueries: Any, dk: Any, dtau: Any, *given: Any) -> Arrays:
        here = Block(backend, cache, queries, *given)
        dx = cache.push(here.queries, dqueries, dkeys)
        balanced = dk is not None or dtau is not None
        return here.rule(offset, reference, balanced=balanced).push(dx, dk, dtau, None)[:2]

    arrays = (queries, *outputs[-2:], dqueries, dk, dtau, k, tau, where, exclude)
    return backend.by_rows(block, _rows(queries, keys), *arrays)


def _weights_vjp(
    backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: tuple[bool, ...]
) -> Inputs:
    queries, keys, k, tau, where, exclude = inputs
    of_tau, balanced = needed[3], needed[2] or needed[3]
    wanted = (True, True, of_tau, False)
    cache = Keys(backend, keys)

    def found() -> Iterator[tuple[Any, ...]]:
        arrays = (k, tau, where, exclude, *outputs[-2:], *cotangents)
        for *given, offset, reference, u, c in _blocks(queries, keys, *arrays):
            here = Block(backend, cache, *given)
            xbar, kbar, taubar, _ = here.rule(offset, reference, balanced=balanced).pull(u, c, None, wanted)
            by_queries, by_keys = cache.pull(here.queries, xbar)
            yield by_queries, kbar, taubar, by_keys

    by_queries, kbar, taubar, by_keys = _pull_blocks(backend, found(), 3)
    return by_queries, by_keys, kbar, taubar, None, None


weights = Primitive("neighbor_weights", _weights_forward, _weights_jvp, _weights_vjp, constants=1, axes=2)


# --- the votes


def _votes_forward(
    backend: Backend,
    queries: Array,
    keys: Array,
    values: Array,
    k: Array,
    tau: Array,
    where: Array | None,
    exclude: Array | None,
    *,
    ranks: tuple[int, ...] | None,
) -> Arrays:
    cache = Keys(backend, keys)

    def block(queries: Any, k: Any, *given: Any) -> Arrays:
        here = Block(backend, cache, queries, k, *given)
        solved = here.solve(ranks)
        return here.mask(*solved) @ values / k, *solved

    return backend.by_rows(block, _rows(queries, keys), queries, k, tau, where, exclude)


def _votes_jvp(backend: Backend, inputs: Inputs, outputs: Arrays, tangents: Inputs) -> Arrays:
    queries, keys, values, k, tau, where, exclude = inputs
    dqueries, dkeys, dvalues, dk, dtau, _, _ = tangents
    cache = Keys(backend, keys)

    def block(
        queries: Any, offset: Any, reference: Any, dqueries: Any, dk: Any, dtau: Any, k: Any, *given: Any
    ) -> Arrays:
        here = Block(backend, cache, queries, k, *given)
        dx = cache.push(here.queries, dqueries, dkeys)
        balanced = dk is not None or dtau is not None
        dmask, ds, _ = here.rule(offset, reference, balanced=balanced).push(dx, dk, dtau, None)
        tangent = dmask @ values
        if dvalues is not None or dk is not None:
            mask = here.mask(offset, reference)
            if dvalues is not None:
                tangent = tangent + mask @ dvalues
            if dk is not None:
                tangent = tangent - mask @ values * (dk / k)
        return tangent / k, ds

    arrays = (queries, *outputs[-2:], dqueries, dk, dtau, k, tau, where, exclude)
    return backend.by_rows(block, _rows(queries, keys), *arrays)


def _votes_vjp(
    backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: tuple[bool, ...]
) -> Inputs:
    queries, keys, values, *others = inputs
    of_tau, balanced = needed[4], needed[3] or needed[4]
    wanted = (True, True, of_tau, False)
    cache, xp = Keys(backend, keys), backend.xp
    columns = transpose(xp, values)

    def found() -> Iterator[tuple[Any, ...]]:
        for *given, offset, reference, u, c in _blocks(queries, keys, *others, *outputs[-2:], *cotangents):
            here = Block(backend, cache, *given)
            share = xp.zeros_like(here.scores) @ values if u is None else u / here.k
            rule = here.rule(offset, reference, balanced=balanced)
            xbar, kbar, taubar, _ = rule.pull(share @ columns, c, None, wanted)
            by_queries, by_keys = cache.pull(here.queries, xbar)
            mask = here.mask(offset, reference)
            kbar = kbar - xp.sum(share * (mask @ values), axis=-1, keepdims=True) / here.k
            yield by_queries, kbar, taubar, by_keys, transpose(xp, mask) @ share

    by_queries, kbar, taubar, by_keys, by_values = _pull_blocks(backend, found(), 3)
    return by_queries, by_keys, by_values, kbar, taubar, None, None


votes = Primitive("neighbor_votes", _votes_forward, _votes_jvp, _votes_vjp, constants=1, axes=2)


# --- the log likelihood


def _likelihood_forward(
    backend: Backend,
    queries: Array,
    keys: Array,
    targets: Array,
    values: Array,
    floor: Array,
    k: Array,
    tau: Array,
    where: Array | None,
    exclude: Array | None,
    *,
    ranks: tuple[int, ...] | None,
) -> Arrays:
    cache = Keys(backend, keys)

    def block(queries: Any, targets: Any, *given: Any) -> Arrays:
        here = Block(backend, cache, queries, *given)
        solved = here.solve(ranks)
        return Shares(here, targets, values, floor, *solved).likelihood, *solved

    return backend.by_rows(block, _rows(queries, keys), queries, targets, k, tau, where, exclude)


def _likelihood_jvp(backend: Backend, inputs: Inputs, outputs: Arrays, tangents: Inputs) -> Arrays:
    queries, keys, targets, values, floor, *others = inputs
    dqueries, dkeys, dtargets, dvalues, _, dk, dtau, _, _ = tangents
    cache, xp = Keys(backend, keys), backend.xp

    def block(
        queries: Any,
        targets: Any,
        offset: Any,
        reference: Any,
        dqueries: Any,
        dtargets: Any,
        dk: Any,
        dtau: Any,
        *given: Any,
    ) -> Arrays:
        here = Block(backend, cache, queries, *given)
        part = Shares(here, targets, values, floor, offset, reference)
        dx = cache.push(here.queries, dqueries, dkeys)
        dlog, ds, _ = here.log_rule(offset, reference).push(dx, dk, dtau, None)
        shares = part.shares()
        tangent = xp.sum(shares * dlog, axis=-1, keepdims=True)
        if dk is not None:
            tangent = tangent - xp.sum(shares, axis=-1, keepdims=True) * (dk / here.k)
        if dtargets is not None or dvalues is not None:
            weight = part.per_agreement()
            if dtargets is not None:
                tangent = tangent + xp.sum(weight @ values * dtargets, axis=-1, keepdims=True)
            if dvalues is not None:
                tangent = tangent + xp.sum(weight @ dvalues * targets, axis=-1, keepdims=True)
        return tangent, ds

    arrays = (queries, targets, *outputs[-2:], dqueries, dtargets, dk, dtau, *others)
    return backend.by_rows(block, _rows(queries, keys), *arrays)


def _likelihood_vjp(
    backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: tuple[bool, ...]
) -> Inputs:
    queries, keys, targets, values, floor, *others = inputs
    of_tau = needed[6]
    wanted = (True, True, of_tau, False)
    cache, xp = Keys(backend, keys), backend.xp

    def found() -> Iterator[tuple[Any, ...]]:
        arrays = (targets, *outputs[-2:], *cotangents, *others)
        for asked, own, offset, reference, u, c, *given in _blocks(queries, keys, *arrays):
            here = Block(backend, cache, asked, *given)
            part = Shares(here, own, values, floor, offset, reference)
            if u is None:
                u = xp.zeros_like(offset)
            upon = u * part.shares()
            xbar, kbar, taubar, _ = here.log_rule(offset, reference).pull(upon, c, None, wanted)
            by_queries, by_keys = cache.pull(here.queries, xbar)
            kbar = kbar - xp.sum(upon, axis=-1, keepdims=True) / here.k
            if part.integers:
                yield by_queries, kbar, taubar, None, by_keys, None
            else:
                weight = u * part.per_agreement()
                yield by_queries, kbar, taubar, weight @ values, by_keys, transpose(xp, weight) @ own

    by_queries, kbar, taubar, by_targets, by_keys, by_values = _pull_blocks(backend, found(), 4)
    return by_queries, by_keys, by_targets, by_values, None, kbar, taubar, None, None


likelihood = Primitive(
    "neighbor_likelihood", _likelihood_forward, _likelihood_jvp, _likelihood_vjp, constants=1, axes=2
)
