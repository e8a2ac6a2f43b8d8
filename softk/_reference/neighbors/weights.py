"""The soft indicator of the nearest keys of each query."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from softk._reference.threshold.masks import mask
from softk.backend import Array, Backend, Form, Inputs, Primitive

from .block import Block, Keys, block_rows, blocks_of, pull_blocks

Arrays = tuple[Array, ...]


def _weights_forward(backend: Backend, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> Arrays:
    queries, keys, k, tau, where, exclude = inputs
    cache = Keys(backend, keys)

    def block(*given: Any) -> Arrays:
        return Block(backend, cache, *given).run(mask, "forward", ranks=ranks)

    return backend.map_rows(block, block_rows(queries, keys), queries, k, tau, where, exclude)


def _weights_jvp(backend: Backend, inputs: Inputs, outputs: Arrays, tangents: Inputs) -> Arrays:
    queries, keys, k, tau, where, exclude = inputs
    dqueries, dkeys, dk, dtau, _, _ = tangents
    cache = Keys(backend, keys)

    def block(queries: Any, offset: Any, reference: Any, dqueries: Any, dk: Any, dtau: Any, *given: Any) -> Arrays:
        here = Block(backend, cache, queries, *given)
        tangents = cache.push(here.queries, dqueries, dkeys), dk, dtau, None, None
        return here.run(mask, "jvp", (None, offset, reference), tangents)

    arrays = (queries, *outputs[-2:], dqueries, dk, dtau, k, tau, where, exclude)
    return backend.map_rows(block, block_rows(queries, keys), *arrays)


def _weights_vjp(
    backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: tuple[bool, ...]
) -> Inputs:
    queries, keys, k, tau, where, exclude = inputs
    wanted = (True, *needed[2:4], False, False)
    cache = Keys(backend, keys)

    def found() -> Iterator[tuple[Any, ...]]:
        arrays = (k, tau, where, exclude, *outputs[-2:], *cotangents)
        for *given, offset, reference, u, c in blocks_of(queries, keys, *arrays):
            here = Block(backend, cache, *given)
            xbar, kbar, taubar, *_ = here.run(mask, "vjp", (None, offset, reference), (u, c), wanted)
            by_queries, by_keys = cache.pull(here.queries, xbar)
            yield by_queries, kbar, taubar, by_keys

    by_queries, kbar, taubar, by_keys = pull_blocks(backend, found(), 3)
    return by_queries, by_keys, kbar, taubar, None, None


def _weights_forms(xp: Any, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> tuple[Form, ...]:
    queries, keys, *_ = inputs
    one = Form((*queries.shape[:-1], 1), queries.dtype)
    return Form((*queries.shape[:-1], keys.shape[-2]), queries.dtype), one, one


weights = Primitive(
    "neighbor_weights",
    _weights_forward,
    _weights_forms,
    _weights_jvp,
    _weights_vjp,
    results=("weights",),
    state=("offset",),
    constants=("reference",),
    axes=2,
)
