"""Sorting and ranking by Numba's kernels, as operations of JAX.

There is no kernel for tangents. In reverse mode that does not matter: a `push` is transposed to a `pull` before either
is compiled.

An operand has a slice for each one of the batch, or is one number for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from softk._reference.plan.ranking import soft_rank
from softk._reference.plan.sorting import soft_sort, sorted_plan
from softk.backend import Array, Backend, Kernel, Primitive

from .kernels import Inputs, adapter, all_of, called, define, differentiate, form, refuses, summed, there

__all__ = ["KERNELS"]

#: How many operands there are of each kind. The first are the inputs of the primitive without the weights, which the
#: kernels do not take: scores, temperature, mass of a row and `where`. Those of a derivative continue with the offset
#: and the reference, and then the tangents of the first two inputs, or the cotangents of the results and the offset.
PROBLEM, STATE, TANGENTS = 4, 2, 2
FIXED = PROBLEM + STATE


# --- what the operations compute, by the reference


def _climbed(*operands: Any, of: Primitive, present: Any, rows: int, ranks: Any) -> list[Array]:
    inputs = all_of(present, operands)
    with adapter().quiet(inputs[0]):
        return list(of.forward(adapter(), (*inputs, None), rows=rows, ranks=ranks))


@partial(jax.checkpoint, static_argnums=(0,))
def _push_once(static: tuple[Any, ...], *operands: Any) -> list[Array]:
    of, present = static
    given = all_of(present, operands)
    inputs, state, tangents = given[:PROBLEM], given[PROBLEM:FIXED], given[FIXED:]
    with adapter().quiet(inputs[0]):
        outputs = (*(None for _ in of.results), *state)
        return list(of.jvp(adapter(), (*inputs, None), outputs, (*tangents, None, None, None)))


def _pushed(*operands: Any, of: Primitive, present: Any) -> list[Array]:
    found: list[Array] = _push_once((of, present), *operands)
    return found


def _pulled(*operands: Any, of: Primitive, present: Any, needed: tuple[bool, ...]) -> list[Array]:
    """The transpose of `push`."""
    given = all_of(present, operands)
    problem, cotangents = given[:FIXED], given[FIXED:]
    moved = _moved_avals(of, problem)
    of_tangents = (*present[:FIXED], *needed)

    def push(*tangents: Array) -> list[Array]:
        return _pushed(*there(problem), *tangents, of=of, present=of_tangents)

    whole = [jnp.zeros(aval.shape, aval.dtype) if u is None else u for u, aval in zip(cotangents, moved, strict=True)]
    found: list[Array] = list(jax.linear_transpose(push, *_tangent_avals(problem[0], needed))(whole))
    return found


# --- the types of their results


def _tangent_avals(x: Any, needed: tuple[bool, ...]) -> list[Any]:
    """Of the tangents of the first two inputs, for the whole batch."""
    avals = form(x.shape, x.dtype), form((*x.shape[:-1], 1), x.dtype)
    return [aval for aval, is_needed in zip(avals, needed, strict=True) if is_needed]


def _avals(of: Primitive, inputs: Sequence[Any], rows: int) -> list[Any]:
    return [form(*found) for found in of.forms(jnp, tuple(inputs), rows=rows, ranks=None)]


def _moved_avals(of: Primitive, problem: Sequence[Any]) -> list[Any]:
    """Of the tangents of the results and the offset."""
    return _avals(of, problem[:PROBLEM], problem[PROBLEM].shape[-2])[: of.moving]


def _climb_avals(*operands: Any, of: Primitive, present: Any, rows: int, ranks: Any) -> list[Any]:
    return _avals(of, all_of(present, operands), rows)


def _push_avals(*operands: Any, of: Primitive, present: Any) -> list[Any]:
    return _moved_avals(of, all_of(present, operands))


def _pull_avals(*operands: Any, of: Primitive, present: Any, needed: tuple[bool, ...]) -> list[Any]:
    return _tangent_avals(operands[0], needed)


# --- what they compute, by the kernels


def _climb_by_kernel(*operands: Any, of: Primitive, present: Any, rows: int, ranks: Any) -> list[Array]:
    x, tau, unit, where = all_of(present, operands)
    *batch, n = x.shape
    avals = _climb_avals(*operands, of=of, present=present, rows=rows, ranks=ranks)
    empty = {"values": (0, rows), "assignment": (0, rows, n), "rank": (0, n)}
    results = {name: form(shape, x.dtype) for name, shape in empty.items()}
    results |= dict(zip(of.results, avals, strict=False))
    state = [form((*batch, rows), x.dtype)] * STATE
    given = [x, tau, unit, _or_nothing(where, (0, n), jnp.bool_)]
    found = called("ladder", x, False, [*results.values(), *state, form(batch, jnp.bool_)], given)
    by_name = dict(zip(results, found, strict=False))
    offset, reference, left = found[len(results) :]
    outputs = [*(by_name[name] for name in of.results), offset[..., None], reference[..., None]]
    # The window, which the ranks are for, only makes a program that is seldom run longer.
    rest = partial(_climbed, *operands, of=of, present=present, rows=rows, ranks=None)
    return _completed(outputs, left, rest)


def _pull_by_kernel(*operands: Any, of: Primitive, present: Any, needed: tuple[bool, ...]) -> list[Array]:
    x, tau, unit, where, offset, reference, *cotangents = all_of(present, operands)
    *batch, n = x.shape
    rows = offset.shape[-2]
    by_name = dict(zip((*of.results, *of.state), cotangents, strict=True))
    c = by_name["offset"]
    results = [*_tangent_avals(x, (True, True)), form(batch, jnp.bool_)]
    given = [
        x,
        tau,
        unit,
        _or_nothing(where, (0, n), jnp.bool_),
        offset[..., 0],
        reference[..., 0],
        _or_nothing(by_name.get("values"), (0, rows), x.dtype),
        _or_nothing(by_name.get("assignment"), (0, rows, n), x.dtype),
        _or_nothing(by_name.get("rank"), (0, n), x.dtype),
        _or_nothing(None if c is None else c[..., 0], (0, rows), x.dtype),
    ]
    found = called("pull_ladder", x, False, results, given)
    outputs = [value for value, is_needed in zip(found[:TANGENTS], needed, strict=True) if is_needed]
    rest = partial(_pulled, *operands, of=of, present=present, needed=needed)
    return _completed(outputs, found[-1], rest)


def _or_nothing(value: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    return jnp.zeros(shape, dtype) if value is None else value


def _completed(found: list[Array], left: Array, by_reference: Callable[[], list[Array]]) -> list[Array]:
    """What a kernel has found, with what the reference finds for the slices that are left to it.

    The kernels leave no slice of float32, and a program of float32 does without the reference, which takes seconds to
    compile. A loop of at most one turn serves as the condition, since XLA copies what a branch of a condition returns
    unchanged.
    """
    if found[0].dtype == jnp.float32:
        return found

    def turn(state: tuple[Any, ...]) -> tuple[Any, ...]:
        _, *found = state
        both = zip(found, by_reference(), strict=True)
        return jnp.asarray(False), *(
            jnp.where(left.reshape(left.shape + (1,) * (mine.ndim - left.ndim)), theirs, mine) for mine, theirs in both
        )

    return list(jax.lax.while_loop(lambda state: state[0], turn, (jnp.any(left), *found))[1:])


# --- transposes


def _push_transposed(cotangents: Any, *operands: Any, of: Primitive, present: Any) -> list[Any]:
    count = sum(present[:FIXED])
    linear = all_of(present[FIXED:], operands[count:])
    needed = tuple(ad.is_undefined_primal(value) for value in linear)
    given = [None if isinstance(value, ad.Zero) else value for value in cotangents]
    are_there = (*present[:FIXED], *(value is not None for value in given))
    found = iter(pull.bind(*operands[:count], *there(given), of=of, present=are_there, needed=needed))
    return [None] * count + [
        summed(next(found), value.aval) if is_needed else None
        for value, is_needed in zip(linear, needed, strict=True)
        if value is not None
    ]


def _pull_transposed(
    cotangents: Any, *operands: Any, of: Primitive, present: Any, needed: tuple[bool, ...]
) -> list[Any]:
    count = sum(present[:FIXED])
    given = iter(cotangents)
    tangents = [next(given) if is_needed else None for is_needed in needed]
    tangents = [None if isinstance(value, ad.Zero) else value for value in tangents]
    are_there = (*present[:FIXED], *(value is not None for value in tangents))
    found = push.bind(*operands[:count], *there(tangents), of=of, present=are_there)
    moved = [value for value, is_there in zip(found, present[FIXED:], strict=True) if is_there]
    return [None] * count + [
        value if ad.is_undefined_primal(operand) else None
        for operand, value in zip(operands[count:], moved, strict=True)
    ]


# --- batching


def _batch(operation: Any, operands: Any, axes: Any, **params: Any) -> Any:
    """Add an axis in front of the batch. One number for the whole batch stays one number."""
    size = next(value.shape[axis] for value, axis in zip(operands, axes, strict=True) if axis is not None)
    shape = [length for i, length in enumerate(operands[0].shape) if i != axes[0]]
    batch = (size, *shape[:-1])
    moved = []
    for value, axis in zip(operands, axes, strict=True):
        if axis is not None:
            value = jnp.moveaxis(value, axis, 0)
            if value.ndim == 1:  # one number for all slices of an element
                value = jnp.broadcast_to(value.reshape(size, *(1 for _ in shape)), (*batch, 1))
        elif value.ndim:
            value = jnp.broadcast_to(value, (size, *value.shape))
        moved.append(value)
    found = operation.bind(*moved, **params)
    return found, [0] * len(found)


# --- the operations

climb = define("ladder", _climb_avals, _climbed, _climb_by_kernel, _batch)
push = define("push_ladder", _push_avals, _pushed, None, _batch)
pull = define("pull_ladder", _pull_avals, _pulled, _pull_by_kernel, _batch)
ad.primitive_jvps[push] = partial(differentiate, push, _pushed, FIXED, False)
ad.primitive_jvps[pull] = partial(differentiate, pull, _pulled, FIXED, False)
ad.primitive_transposes[push] = _push_transposed
ad.primitive_transposes[pull] = _pull_transposed


# --- when they serve


def _refuses(backend: Backend, inputs: Inputs, *groups: Any, **options: Any) -> str | None:
    if str(inputs[0].dtype) not in ("float32", "float64"):
        return f"the scores must be of float32 or float64, got {inputs[0].dtype}"
    if inputs[PROBLEM] is not None:
        return "the kernels for sorting take no weights"
    return refuses(backend, inputs, *groups)


def _refuses_rule(backend: Backend, inputs: Inputs, outputs: Inputs, tangents: Inputs) -> str | None:
    if not any(value is not None for value in tangents[:TANGENTS]):
        return "there is no tangent"
    return _refuses(backend, inputs, outputs[-STATE:], tangents)


def _bind(operation: Any, given: Sequence[Any], **params: Any) -> tuple[Array, ...]:
    return tuple(operation.bind(*there(given), present=tuple(value is not None for value in given), **params))


def _climb(
    primitive: Primitive, backend: Backend, inputs: Inputs, *, rows: int, ranks: tuple[int, ...] | None
) -> tuple[Array, ...]:
    return _bind(climb, inputs[:PROBLEM], of=primitive, rows=rows, ranks=ranks)


def _push(
    primitive: Primitive, backend: Backend, inputs: Inputs, outputs: Inputs, tangents: Inputs
) -> tuple[Array, ...]:
    return _bind(push, (*inputs[:PROBLEM], *outputs[-STATE:], *tangents[:TANGENTS]), of=primitive)


KERNELS = tuple(
    kernel
    for primitive in (sorted_plan, soft_sort, soft_rank)
    for kernel in (
        Kernel("numba", primitive, "forward", _refuses, partial(_climb, primitive)),
        Kernel("numba", primitive, "jvp", _refuses_rule, partial(_push, primitive)),
    )
)
