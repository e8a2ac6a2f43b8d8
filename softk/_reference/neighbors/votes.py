"""The mean value of the nearest keys of each query."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from softk.backend import Array, Backend, Form, Inputs, Primitive

from .block import Block, Keys, block_rows, blocks_of, pull_blocks, transpose

Arrays = tuple[Array, ...]


def _votes_forward(backend: Backend, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> Arrays:
    queries, keys, values, k, tau, where, exclude = inputs
    cache = Keys(backend, keys)

    def block(queries: Any, k: Any, *given: Any) -> Arrays:
        here = Block(backend, cache, queries, k, *given)
        solved = here.solve(ranks)
        return here.mask(*solved) @ values / k, *solved

    return backend.map_rows(block, block_rows(queries, keys), queries, k, tau, where, exclude)


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
    return backend.map_rows(block, block_rows(queries, keys), *arrays)


def _votes_vjp(
    backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: tuple[bool, ...]
) -> Inputs:
    queries, keys, values, *others = inputs
    of_tau, balanced = needed[4], needed[3] or needed[4]
    wanted = (True, True, of_tau, False)
    cache, xp = Keys(backend, keys), backend.xp
    columns = transpose(xp, values)

    def found() -> Iterator[tuple[Any, ...]]:
        for *given, offset, reference, u, c in blocks_of(queries, keys, *others, *outputs[-2:], *cotangents):
            here = Block(backend, cache, *given)
            share = xp.zeros_like(here.scores) @ values if u is None else u / here.k
            rule = here.rule(offset, reference, balanced=balanced)
            xbar, kbar, taubar, _ = rule.pull(share @ columns, c, None, wanted)
            by_queries, by_keys = cache.pull(here.queries, xbar)
            mask = here.mask(offset, reference)
            kbar = kbar - xp.sum(share * (mask @ values), axis=-1, keepdims=True) / here.k
            yield by_queries, kbar, taubar, by_keys, transpose(xp, mask) @ share

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
