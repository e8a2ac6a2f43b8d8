"""The mask and its logarithm by Numba's kernels, as operations of JAX."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad

from softk._reference.threshold.masks import hard_mask, log_mask, mask
from softk._reference.threshold.solve import solver
from softk.backend import Array, Backend, Kernel, Primitive

from .kernels import Inputs, adapter, all_of, called, define, differentiate, form, refuses, summed, there

__all__ = ["KERNELS"]

#: How many operands there are of each kind. The first are the inputs of the primitive. Those of a derivative continue
#: with the state, and then the tangents of the first four inputs, or the cotangents of the mask and the offset.
PROBLEM, STATE, TANGENTS = 5, 2, 4
#: Whether an operand has one number per item, or one per row.
OF_ITEMS = (True, False, False, True, True)
ITEMS = {
    "solve": OF_ITEMS,
    "mask": OF_ITEMS,
    "push": (*OF_ITEMS, False, False, True, False, False, True),
    "pull": (*OF_ITEMS, False, False, True, False),
}


#: The operands of which a kernel needs one number for each row: the state, and the cotangent of the offset.
WHOLE = {"push": (5, 6), "pull": (5, 6, 8)}


# --- operands: only those that are given; each is one row for the whole batch, or a row for each of its rows


def _full(value: Array, batch: tuple[int, ...], of_items: bool) -> Array:
    """An operand with a row for each row of the batch."""
    last = value.shape[-1] if of_items else 1
    if value.shape == (*batch, last):
        return value
    if value.ndim == 0:
        value = value[None]
    return jnp.broadcast_to(value.reshape((1,) * (len(batch) + 1 - value.ndim) + value.shape), (*batch, last))


def _canonical(part: str, batch: tuple[int, ...], operands: Sequence[Any]) -> tuple[Any, ...]:
    """The operands in the form that the reference expects."""
    return tuple(
        value if value is None or (not of_items and value.ndim == 0) else _full(value, batch, of_items)
        for value, of_items in zip(operands, ITEMS[part], strict=True)
    )


# --- what the operations compute, by the reference


def _solved(*operands: Any, present: Any, batch: Any, ranks: Any) -> list[Array]:
    inputs = _canonical("solve", batch, all_of(present, operands))
    with adapter().quiet(inputs[0]):
        return list(solver.forward(adapter(), inputs, ranks=ranks))


def _masked(primitive: Primitive, *operands: Any, present: Any, batch: Any) -> list[Array]:
    inputs = _canonical("mask", batch, all_of(present, operands))
    with adapter().quiet(inputs[0]):
        return list(primitive.forward(adapter(), inputs, ranks=None))


@partial(jax.checkpoint, static_argnums=(0,))
def _push_once(static: tuple[Any, ...], *operands: Any) -> list[Array]:
    primitive, present, batch = static
    given = _canonical("push", batch, all_of(present, operands))
    inputs, state, tangents = given[:PROBLEM], given[PROBLEM : PROBLEM + STATE], given[PROBLEM + STATE :]
    with adapter().quiet(inputs[0]):
        assert primitive.jvp is not None
        moved, doffset = primitive.jvp(adapter(), inputs, (None, *state), tangents)
    return [jnp.asarray(moved), _full(jnp.asarray(doffset), batch, False)]


def _pushed(primitive: Primitive, *operands: Any, present: Any, batch: Any) -> list[Array]:
    found: list[Array] = _push_once((primitive, present, batch), *operands)
    return found


def _pulled(primitive: Primitive, *operands: Any, present: Any, batch: Any, needed: tuple[bool, ...]) -> list[Array]:
    """The transpose of `_pushed`."""
    given = all_of(present, operands)
    problem, (u, c) = given[: PROBLEM + STATE], given[PROBLEM + STATE :]
    avals = _tangent_avals(problem, batch)
    of_tangents = (*(value is not None for value in problem), *needed)

    def push(*tangents: Array) -> list[Array]:
        return _pushed(primitive, *there(problem), *tangents, present=of_tangents, batch=batch)

    example = [aval for aval, is_needed in zip(avals, needed, strict=True) if is_needed]
    cotangents = [_full(u, batch, True), jnp.zeros(avals[1].shape, avals[1].dtype) if c is None else c]
    found: list[Array] = list(jax.linear_transpose(push, *example)(cotangents))
    return found


def _tangent_avals(problem: Sequence[Any], batch: tuple[int, ...]) -> list[Any]:
    """Of the tangents of the first four inputs, for the whole batch."""
    x, k = problem[:2]
    of_rows = form((*batch, 1), k.dtype)
    return [form((*batch, x.shape[-1]), x.dtype), of_rows, of_rows, form((*batch, x.shape[-1]), k.dtype)]


# --- what they compute, by the kernels


def _operands(part: str, present: Any, operands: Sequence[Any]) -> list[Array]:
    """All operands. Those that are not given have no rows."""
    given = list(all_of(present, operands))
    x, k = given[:2]
    for i, value in enumerate(given):
        if value is None:
            dtype = x.dtype if i == PROBLEM + STATE else jnp.bool_ if i == 4 else k.dtype
            given[i] = jnp.zeros((0, x.shape[-1]) if ITEMS[part][i] else (0,), dtype)
    return given


def _solve_by_kernel(*operands: Any, present: Any, batch: Any, ranks: Any) -> list[Array]:
    given = _operands("solve", present, operands)
    ends = jnp.asarray(np.asarray((0, 0) if ranks is None else ranks[:2], np.int32))
    results = [form((4, *batch, 1), given[1].dtype), form((4, *batch, 1), jnp.bool_)]
    numbers, flags = called("solve", given[0], present[3], results, [*given, ends])
    return [*(numbers[i] for i in range(4)), *(flags[i] for i in range(4))]


def _mask_by_kernel(name: str, *operands: Any, present: Any, batch: Any) -> list[Array]:
    given = _operands("mask", present, operands)
    return called(name, given[0], present[3], _mask_avals(*operands, present=present, batch=batch), given)


def _push_by_kernel(name: str, *operands: Any, present: Any, batch: Any) -> list[Array]:
    given = _operands("push", present, operands)
    return called(name, given[0], present[3], _push_avals(*operands, present=present, batch=batch), given)


def _pull_by_kernel(name: str, *operands: Any, present: Any, batch: Any, needed: tuple[bool, ...]) -> list[Array]:
    given = _operands("pull", present, operands)
    results = _tangent_avals(given, batch)
    for i, is_needed in enumerate(needed):
        if not is_needed:
            shape = (0, given[0].shape[-1]) if i in (0, 3) else (0,)
            results[i] = form(shape, results[i].dtype)
    found = called(name, given[0], present[3], results, given)
    return [value for value, is_needed in zip(found, needed, strict=True) if is_needed]


# --- the shapes and dtypes of their results


def _solve_avals(*operands: Any, present: Any, batch: Any, ranks: Any) -> list[Any]:
    dtype = operands[1].dtype
    return [form((*batch, 1), dtype)] * 4 + [form((*batch, 1), jnp.bool_)] * 4


def _mask_avals(*operands: Any, present: Any, batch: Any) -> list[Any]:
    x, k = operands[:2]
    return [form((*batch, x.shape[-1]), x.dtype), form((*batch, 1), k.dtype), form((*batch, 1), k.dtype)]


def _push_avals(*operands: Any, present: Any, batch: Any) -> list[Any]:
    return _mask_avals(*operands, present=present, batch=batch)[:2]


def _pull_avals(*operands: Any, present: Any, batch: Any, needed: tuple[bool, ...]) -> list[Any]:
    avals = _tangent_avals(all_of(present, operands), batch)
    return [aval for aval, is_needed in zip(avals, needed, strict=True) if is_needed]


# --- transposes


def _push_transposed(pull: Any, cotangents: Any, *operands: Any, present: Any, batch: Any) -> list[Any]:
    count = sum(present[: PROBLEM + STATE])
    u, c = cotangents
    linear = all_of(present[PROBLEM + STATE :], operands[count:])
    needed = tuple(ad.is_undefined_primal(value) for value in linear)
    u = ad.instantiate_zeros(u)
    given = (*present[: PROBLEM + STATE], True, not isinstance(c, ad.Zero))
    found = iter(pull.bind(*operands[:count], u, *[c] * given[-1], present=given, batch=batch, needed=needed))
    return [None] * count + [
        summed(next(found), value.aval) if is_needed else None
        for value, is_needed in zip(linear, needed, strict=True)
        if value is not None
    ]


def _pull_transposed(push: Any, cotangents: Any, *operands: Any, present: Any, batch: Any, needed: Any) -> list[Any]:
    count = sum(present[: PROBLEM + STATE])
    given = iter(cotangents)
    tangents = [next(given) if is_needed else None for is_needed in needed]
    tangents = [None if isinstance(value, ad.Zero) else value for value in tangents]
    are_there = (*present[: PROBLEM + STATE], *(value is not None for value in tangents))
    found = push.bind(*operands[:count], *there(tangents), present=are_there, batch=batch)
    return [None] * count + [
        summed(moved, value.aval) if ad.is_undefined_primal(value) else None
        for value, moved in zip(operands[count:], found, strict=False)
    ]


# --- batching


def _batch(part: str, operation: Any, operands: Any, axes: Any, **params: Any) -> Any:
    """Add an axis in front of the batch. An operand that is one row for the whole batch stays one row."""
    size = next(value.shape[axis] for value, axis in zip(operands, axes, strict=True) if axis is not None)
    batch = (size, *params["batch"])
    places = [i for i, is_there in enumerate(params["present"]) if is_there]
    moved = []
    for place, value, axis in zip(places, operands, axes, strict=True):
        of_items = ITEMS[part][place]
        if axis is not None:
            value = jnp.moveaxis(value, axis, 0)
            ones = (1,) * (len(batch) + 1 - value.ndim)
            value = value.reshape((size, *ones, *value.shape[1:]))
            value = jnp.broadcast_to(value, (*batch, value.shape[-1]))
        elif place not in WHOLE.get(part, ()) and value.size == (value.shape[-1] if of_items else 1):
            value = value.reshape(value.shape[-1:] if of_items else ())
        else:
            value = _full(value, batch, of_items)
        moved.append(value)
    found = operation.bind(*moved, **{**params, "batch": batch})
    return found, [0] * len(found)


# --- the operations


class Operations(NamedTuple):
    """The operations of the mask, or of its logarithm: forward, for tangents and for cotangents."""

    forward: Any
    push: Any
    pull: Any


def _define(primitive: Primitive, name: str, push_name: str, pull_name: str) -> Operations:
    by_push, by_pull = partial(_pushed, primitive), partial(_pulled, primitive)
    forward = define(
        name,
        _mask_avals,
        partial(_masked, primitive),
        partial(_mask_by_kernel, name),
        partial(_batch, "mask"),
        weights=3,
    )
    push = define(
        push_name, _push_avals, by_push, partial(_push_by_kernel, push_name), partial(_batch, "push"), weights=3
    )
    pull = define(
        pull_name, _pull_avals, by_pull, partial(_pull_by_kernel, pull_name), partial(_batch, "pull"), weights=3
    )
    ad.primitive_jvps[push] = partial(differentiate, push, by_push, PROBLEM + STATE, False)
    # Always of the result's cotangent.
    ad.primitive_jvps[pull] = partial(differentiate, pull, by_pull, PROBLEM + STATE, True)
    ad.primitive_transposes[push] = partial(_push_transposed, pull)
    ad.primitive_transposes[pull] = partial(_pull_transposed, push)
    return Operations(forward, push, pull)


solve = define("solve", _solve_avals, _solved, _solve_by_kernel, partial(_batch, "solve"), weights=3)
of_mask = _define(mask, "mask", "push", "pull")
of_log_mask = _define(log_mask, "log_mask", "push_log", "pull_log")


# --- when they serve


def _refuses_rule(backend: Backend, inputs: Inputs, outputs: Inputs, tangents: Inputs) -> str | None:
    if not any(value is not None for value in tangents[:TANGENTS]):
        return "there is no tangent"
    return refuses(backend, inputs, outputs[1:], tangents)


def _bind(operation: Any, given: Sequence[Any], **params: Any) -> tuple[Array, ...]:
    present = tuple(value is not None for value in given)
    found = operation.bind(*there(given), present=present, batch=tuple(given[0].shape[:-1]), **params)
    return tuple(found)


def _solve(backend: Backend, inputs: Inputs, *, ranks: tuple[int, ...] | None) -> tuple[Array, ...]:
    return _bind(solve, inputs, ranks=ranks)


def _forward(
    operations: Operations, backend: Backend, inputs: Inputs, *, ranks: tuple[int, ...] | None
) -> tuple[Array, ...]:
    return _bind(operations.forward, inputs)


def _push(
    operations: Operations, backend: Backend, inputs: Inputs, outputs: Inputs, tangents: Inputs
) -> tuple[Array, ...]:
    return _bind(operations.push, (*inputs[:PROBLEM], *outputs[1:], *tangents[:TANGENTS]))


KERNELS = (
    Kernel("numba", solver, "forward", refuses, _solve),
    Kernel("numba", mask, "forward", refuses, partial(_forward, of_mask)),
    Kernel("numba", mask, "jvp", _refuses_rule, partial(_push, of_mask)),
    Kernel("numba", hard_mask, "jvp", _refuses_rule, partial(_push, of_mask)),
    Kernel("numba", log_mask, "forward", refuses, partial(_forward, of_log_mask)),
    Kernel("numba", log_mask, "jvp", _refuses_rule, partial(_push, of_log_mask)),
)
