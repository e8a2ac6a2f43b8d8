"""The log likelihood of each query's label among its nearest keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from softk._reference.threshold.limits import exponential, limits, safe_denominator
from softk.backend import Array, Backend, Form, Inputs, Primitive

from .block import Block, Keys, block_rows, blocks_of, pull_blocks, transpose

Arrays = tuple[Array, ...]


class Shares:
    """The shares s_j of the keys in the likelihood of each query, scaled by the largest term so as not to underflow."""

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
            votes = ~(agreement == 0.0)  # a NaN is a vote, so that it reaches the result
        z = block.z(offset, reference)
        votes = votes & ~((block.scores == -math.inf) | (block.k <= 0.0))
        self.log_mask = xp.where(z < 0.0, z, 0.0) - xp.log1p(exponential(xp, -xp.abs(z)))
        found = self.log_mask
        if not self.integers:
            found = found + xp.log(xp.where(votes, agreement, 1.0))
        # The floor f k is another term of the sum. The largest term is the shift of the log-sum-exp.
        bottom = xp.log(floor) + xp.log(block.k)
        peak = xp.max(xp.where(votes, found, -math.inf), axis=-1, keepdims=True)
        peak = xp.maximum(peak, bottom)
        self.peak = block.backend.constant(xp.where(peak == -math.inf, 0.0, peak))
        self.parts = xp.where(votes, exponential(xp, xp.where(votes, found - self.peak, 0.0)), 0.0)
        # Comparisons drop a NaN, so the offset propagates it: a query with a NaN has no votes.
        total = xp.sum(self.parts, axis=-1, keepdims=True) + xp.exp(bottom - self.peak) + 0.0 * offset
        self.total = safe_denominator(xp, total)
        self.likelihood = xp.where(total == 0.0, -math.inf, self.peak + xp.log(self.total)) - xp.log(block.k)

    def shares(self) -> Array:
        return self.parts / self.total

    def per_agreement(self) -> Array:
        """s / a, which is the mask over the likelihood, clipped to the largest value that a derivative may have."""
        xp = self.xp
        ceiling = math.log(limits(xp, self.log_mask.dtype).farthest)
        return xp.exp(xp.minimum(self.log_mask - self.peak, ceiling)) / self.total


def _likelihood_forward(backend: Backend, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> Arrays:
    queries, keys, targets, values, floor, k, tau, where, exclude = inputs
    cache = Keys(backend, keys)

    def block(queries: Any, targets: Any, *given: Any) -> Arrays:
        here = Block(backend, cache, queries, *given)
        solved = here.solve(ranks)
        return Shares(here, targets, values, floor, *solved).likelihood, *solved

    return backend.map_rows(block, block_rows(queries, keys), queries, targets, k, tau, where, exclude)


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
    return backend.map_rows(block, block_rows(queries, keys), *arrays)


def _likelihood_vjp(
    backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: tuple[bool, ...]
) -> Inputs:
    queries, keys, targets, values, floor, *others = inputs
    of_tau = needed[6]
    wanted = (True, True, of_tau, False)
    cache, xp = Keys(backend, keys), backend.xp

    def found() -> Iterator[tuple[Any, ...]]:
        arrays = (targets, *outputs[-2:], *cotangents, *others)
        for asked, own, offset, reference, u, c, *given in blocks_of(queries, keys, *arrays):
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

    by_queries, kbar, taubar, by_targets, by_keys, by_values = pull_blocks(backend, found(), 4)
    return by_queries, by_keys, by_targets, by_values, None, kbar, taubar, None, None


def _likelihood_forms(xp: Any, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> tuple[Form, ...]:
    queries = inputs[0]
    one = Form((*queries.shape[:-1], 1), queries.dtype)
    return Form((*queries.shape[:-1], 1), queries.dtype), one, one


likelihood = Primitive(
    "neighbor_likelihood",
    _likelihood_forward,
    _likelihood_forms,
    _likelihood_jvp,
    _likelihood_vjp,
    results=("log_likelihood",),
    state=("offset",),
    constants=("reference",),
    axes=2,
)
