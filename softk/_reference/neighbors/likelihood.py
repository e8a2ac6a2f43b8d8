"""The log likelihood of each query's label among its nearest keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from softk._reference.threshold.limits import exponential, limits
from softk._reference.threshold.masks import log_mask
from softk.backend import Array, Backend, Form, Inputs, Primitive

from .block import Block, Keys, block_rows, blocks_of, pull_blocks, transpose

Arrays = tuple[Array, ...]


class Shares:
    """The shares s_j of the keys in the likelihood of each query, scaled by the largest term so as not to underflow."""

    def __init__(self, block: Block, targets: Array, values: Array, floor: Array, offset: Array, logs: Array) -> None:
        self.xp = xp = block.xp
        self.logs = logs
        if xp.isdtype(targets.dtype, "integral"):
            votes, terms = targets == transpose(xp, values), logs
        else:
            agreement = targets @ transpose(xp, values)
            votes = ~(agreement == 0.0)  # a NaN is a vote, so that it reaches the result
            terms = logs + xp.log(xp.where(votes, agreement, 1.0))
        # The floor f k is another term of the sum. The largest term is the shift of the log-sum-exp.
        bottom = xp.log(floor) + xp.log(block.k)
        terms = xp.where(votes, terms, -math.inf)
        # A NaN of the offset reaches the result by itself, where no key votes.
        peak = xp.maximum(xp.max(terms, axis=-1, keepdims=True), bottom) + 0.0 * offset
        none = peak == -math.inf
        self.peak = block.backend.constant(xp.where(none, 0.0, peak))
        # A product with the votes, not a choice: that is a faster pass over all keys.
        self.parts = exponential(xp, terms - self.peak) * xp.astype(votes, logs.dtype)
        total = xp.sum(self.parts, axis=-1, keepdims=True) + xp.exp(bottom - self.peak)
        self.total = xp.where(none, 1.0, total)
        self.likelihood = xp.where(none, -math.inf, self.peak + xp.log(self.total)) - xp.log(block.k)
        self.scale = xp.where(none, 0.0, 1.0 / self.total)

    def shares(self, u: Any = 1.0) -> Array:
        """The shares, times a number per query."""
        return self.parts * (u * self.scale)

    def per_agreement(self) -> Array:
        """s / a, which is the mask over the likelihood, clipped to the largest value that a derivative may have."""
        xp = self.xp
        ceiling = math.log(limits(xp, self.logs.dtype).farthest)
        return xp.exp(xp.minimum(self.logs - self.peak, ceiling)) / self.total


def _likelihood_forward(backend: Backend, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> Arrays:
    queries, keys, targets, values, floor, k, tau, where, exclude = inputs
    cache = Keys(backend, keys)

    def block(queries: Any, targets: Any, *given: Any) -> Arrays:
        here = Block(backend, cache, queries, *given)
        logs, offset, reference = here.run(log_mask, "forward", ranks=ranks)
        return Shares(here, targets, values, floor, offset, logs).likelihood, offset, reference

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
        part = Shares(here, targets, values, floor, offset, here.log_mask(offset, reference))
        moved = cache.push(here.queries, dqueries, dkeys), dk, dtau, None, None
        dlogs, ds = here.run(log_mask, "jvp", (None, offset, reference), moved)
        shares = part.shares()
        tangent = xp.sum(shares * dlogs, axis=-1, keepdims=True)
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
    _, _, of_targets, of_values, _, of_k, of_tau, *_ = needed
    wanted = (True, of_k, of_tau, False, False)
    cache, xp = Keys(backend, keys), backend.xp

    def found() -> Iterator[tuple[Any, ...]]:
        arrays = (targets, *outputs[-2:], *cotangents, *others)
        for asked, own, offset, reference, u, c, *given in blocks_of(queries, keys, *arrays):
            here = Block(backend, cache, asked, *given)
            part = Shares(here, own, values, floor, offset, here.log_mask(offset, reference))
            if u is None:
                u = xp.zeros_like(offset)
            upon = part.shares(u)
            xbar, kbar, taubar, *_ = here.run(log_mask, "vjp", (None, offset, reference), (upon, c), wanted)
            by_queries, by_keys = cache.pull(here.queries, xbar)
            if of_k:
                kbar = kbar - xp.sum(upon, axis=-1, keepdims=True) / here.k
            by_targets = by_values = None
            if of_targets or of_values:
                weight = u * part.per_agreement()
                by_targets, by_values = weight @ values, transpose(xp, weight) @ own
            yield by_queries, kbar, taubar, by_targets, by_keys, by_values

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
