"""The mean value of the nearest keys of each query."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from softk._reference.threshold.masks import mask
from softk.backend import Array, Backend, Form, Inputs, Primitive

from .block import Block, Keys, block_rows, blocks_of, pull_blocks, transpose

Arrays = tuple[Array, ...]


def _votes_forward(backend: Backend, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> Arrays:
    queries, keys, values, k, tau, where, exclude = inputs
    cache = Keys(backend, keys)

    def block(queries: Any, k: Any, *given: Any) -> Arrays:
        here = Block(backend, cache, queries, k, *given)
        found, *state = here.run(mask, "forward", ranks=ranks)
        return found @ values / k, *state

    return backend.map_rows(block, block_rows(queries, keys), queries, k, tau, where, exclude)


def _votes_jvp(backend: Backend, inputs: Inputs, outputs: Arrays, tangents: Inputs) -> Arrays:
    queries, keys, values, k, tau, where, exclude = inputs
    dqueries, dkeys, dvalues, dk, dtau, _, _ = tangents
    cache = Keys(backend, keys)

    def block(
        queries: Any, offset: Any, reference: Any, dqueries: Any, dk: Any, dtau: Any, k: Any, *given: Any
    ) -> Arrays:
        here = Block(backend, cache, queries, k, *given)
        tangents = cache.push(here.queries, dqueries, dkeys), dk, dtau, None, None
        dmask, ds = here.run(mask, "jvp", (None, offset, reference), tangents)
        tangent = dmask @ values
        if dvalues is not None or dk is not None:
            weights = here.mask(offset, reference)
            if dvalues is not None:
                tangent = tangent + weights @ dvalues
            if dk is not None:
                tangent = tangent - weights @ values * (dk / k)
        return tangent / k, ds

    arrays = (queries, *outputs[-2:], dqueries, dk, dtau, k, tau, where, exclude)
    return backend.map_rows(block, block_rows(queries, keys), *arrays)


def _votes_vjp(
    backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: tuple[bool, ...]
) -> Inputs:
    queries, keys, values, *others = inputs
    _, _, of_values, of_k, of_tau, *_ = needed
    wanted = (True, of_k, of_tau, False, False)
    cache, xp = Keys(backend, keys), backend.xp
    columns = transpose(xp, values)

    def found() -> Iterator[tuple[Any, ...]]:
        for *given, offset, reference, u, c in blocks_of(queries, keys, *others, *outputs[-2:], *cotangents):
            here = Block(backend, cache, *given)
            share = xp.zeros_like(here.scores) @ values if u is None else u / here.k
            xbar, kbar, taubar, *_ = here.run(mask, "vjp", (None, offset, reference), (share @ columns, c), wanted)
            by_queries, by_keys = cache.pull(here.queries, xbar)
            by_values = None
            if of_values or of_k:
                weights = here.mask(offset, reference)
                if of_k:
                    kbar = kbar - xp.sum(share * (weights @ values), axis=-1, keepdims=True) / here.k
                if of_values:
                    by_values = transpose(xp, weights) @ share
            yield by_queries, kbar, taubar, by_keys, by_values

    by_queries, kbar, taubar, by_keys, by_values = pull_blocks(backend, found(), 3)
    return by_queries, by_keys, by_values, kbar, taubar, None, None


def _votes_forms(xp: Any, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> tuple[Form, ...]:
    queries = inputs[0]
    one = Form((*queries.shape[:-1], 1), queries.dtype)
    return Form((*queries.shape[:-1], inputs[2].shape[-1]), queries.dtype), one, one


votes = Primitive(
    "neighbor_votes",
    _votes_forward,
    _votes_forms,
    _votes_jvp,
    _votes_vjp,
    results=("votes",),
    state=("offset",),
    constants=("reference",),
    axes=2,
)
