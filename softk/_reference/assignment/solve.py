r"""The potentials of a balanced assignment, by Newton's method or by Sinkhorn's.

**Newton.** The dual sum_j c_j s_j - sum_i a_i log sum_j exp((S_ij + r_j) / epsilon + s_j) is concave. If |d| is the
range of a Newton step d, the step times log(1 + |d|) / |d| always ascends, as for the boundaries of a plan. The
temperature starts at the spread of the scores, where one step of Sinkhorn's is near the solution, and falls by a factor
of 4 as soon as Newton's step is below 1, until it is epsilon. The potentials of one temperature are then near those of
the next.

**The end.** Newton's error is squared by each step, so a step below eps^(1/4) is the last but for the corrections. If
the column sums are right to rounding and the steps no longer shrink, the rest of the step is noise: the groups are
joined by shares far below eps.

**Sinkhorn.** One iteration adds log(c_j / sum_i a_i P_ij) to the offset s_j. It has no matrix of the groups.
"""

from __future__ import annotations

import math
from typing import Any

from softk._reference.threshold.limits import CORRECTIONS, limits, safe_denominator
from softk._reference.threshold.problem import mean_weight
from softk.backend import Array, Backend, Form, Primitive

from .system import Problem, at, column, shares, step, two_sum

#: The largest number of Newton steps, over all temperatures. In measurements down to an epsilon of 1e-6 of the spread
#: of the scores, 140 sufficed; each factor of 4 between the spread and epsilon needs at least one.
STEPS = 300
#: How much the temperature falls at a time.
FALL = 4.0
#: How many steps may fail to shrink, once the column sums are right to rounding.
PATIENCE = 3.0


def potentials(
    backend: Backend, problem: Problem, *, method: str, tolerance: float, limit: int
) -> tuple[Array, Array, Array]:
    """Find the reference and the offset (..., 1, K), and the number of iterations (..., 1, 1)."""
    constants = tuple(backend.constant(value) for value in problem)
    options = {"method": method, "tolerance": tolerance, "limit": limit}
    reference, offset, count = backend.run(solver, "forward", constants, **options)
    if backend.differentiates_operations:
        # The solver's result is a constant; these corrections give it the derivative of the solution.
        for _ in range(CORRECTIONS):
            offset = offset + step(backend, shares(backend, problem, reference, offset), problem)[0]
    return reference, offset, count


def _approach(
    backend: Backend, inputs: tuple[Any, ...], *, method: str, tolerance: float, limit: int
) -> tuple[Array, ...]:
    problem = Problem(*inputs)
    if method == "newton":
        return _newton(backend, problem, limit)
    return _sinkhorn(backend, problem, tolerance, limit)


def _ratio(backend: Backend, problem: Problem, share: Array) -> Array:
    """log(c_j / sum_i a_i P_ij), and 0 for a group that takes nothing."""
    xp = backend.xp
    taken, least = problem.masses > 0.0, float(xp.finfo(share.dtype).smallest_normal)
    found = xp.maximum(column(xp, problem.weights * share), least)
    return xp.where(taken, xp.log(xp.where(taken, problem.masses, 1.0)) - xp.log(found), 0.0)


def _range(xp: Any, values: Array) -> Array:
    return xp.max(values, axis=-1, keepdims=True) - xp.min(values, axis=-1, keepdims=True)


def _damped(xp: Any, size: Array, whole: Array) -> Array:
    """The part of a Newton step of this range with which the dual ascends, and all of it where `whole` is true."""
    return xp.where(whole | (size == 0.0), 1.0, xp.log1p(size) / safe_denominator(xp, size))


def _in_two_parts(xp: Any, problem: Problem, reference: Array, rest: Array) -> tuple[Array, Array]:
    """The rounded sum of reference and rest, and its rounding error. The sum is 0 for the first group that takes mass.

    The references of huge scores are then differences of scores, in which a smaller number would be lost.
    """
    total, rest = two_sum(reference, rest)
    first = xp.argmax(xp.astype(problem.masses > 0.0, total.dtype), axis=-1, keepdims=True)
    total, lost = two_sum(total, -at(xp, total, first))
    return total, lost + (rest - at(xp, rest, first))


def _newton(backend: Backend, problem: Problem, limit: int) -> tuple[Array, ...]:
    xp = backend.xp
    bound = limits(xp, problem.scores.dtype)
    epsilon = xp.broadcast_to(problem.epsilon, (*problem.masses.shape[:-1], 1))
    least, most = (xp.where(problem.allowed, problem.scores, end) for end in (math.inf, -math.inf))
    spread = xp.max(most, axis=-1, keepdims=True) - xp.min(least, axis=-1, keepdims=True)
    spread = xp.max(xp.minimum(xp.where(spread > 0.0, spread, 0.0), 0.5 * bound.largest), axis=-2, keepdims=True)
    temperature = xp.maximum(epsilon, spread)
    reference = xp.zeros_like(problem.masses)
    first = shares(backend, problem._replace(epsilon=temperature), reference, reference)
    offset = _ratio(backend, problem, first.share)

    def move(state: tuple[Array, ...]) -> tuple[Any, Array]:
        reference, offset, temperature, previous, stalled, count, done = state
        found = shares(backend, problem._replace(epsilon=temperature), reference, offset)
        change, surplus = step(backend, found, problem)
        size = _range(xp, change)
        settled = xp.all(xp.abs(surplus) <= 16.0 * bound.eps * problem.masses, axis=-1, keepdims=True)
        final = temperature <= epsilon
        falls = ~final & ((size < 1.0) | settled)
        cooler = xp.where(falls, xp.maximum(epsilon, temperature / FALL), temperature)
        sum_, rest = _in_two_parts(xp, problem, reference, temperature * (offset + _damped(xp, size, falls) * change))
        stalled = xp.where(final & settled & (size > 0.5 * previous), stalled + 1.0, stalled)
        state = (
            xp.where(done, reference, sum_),
            xp.where(done, offset, rest / cooler),
            xp.where(done, temperature, cooler),
            size,
            stalled,
            xp.where(done, count, count + 1.0),
            done | (final & (~(size > bound.eps**0.25) | (stalled >= PATIENCE))),
        )
        return state, state[-1]

    none = xp.zeros_like(temperature)
    invalid = xp.any(problem.masses != problem.masses, axis=-1, keepdims=True)  # a NaN
    start = (reference, offset, temperature, none + math.inf, none, none, invalid)
    reference, offset, temperature, _, _, count, _ = backend.repeat(move, start, limit)
    offset = offset * (temperature / epsilon)  # epsilon itself, unless the limit came first
    for _ in range(CORRECTIONS):
        change, _ = step(backend, shares(backend, problem, reference, offset), problem)
        size = _range(xp, change)
        offset = offset + change * _damped(xp, size, size < 1.0)
    return reference, offset, count


def _sinkhorn(backend: Backend, problem: Problem, tolerance: float, limit: int) -> tuple[Array, ...]:
    xp = backend.xp
    reference = xp.zeros_like(problem.masses)
    least = tolerance * mean_weight(xp, problem.weights, -2)

    def move(state: tuple[Array, ...]) -> tuple[Any, Array]:
        reference, offset, count, done = state
        share = shares(backend, problem, reference, offset).share
        error = xp.abs(column(xp, problem.weights * share) - problem.masses)
        done = done | ~(xp.max(error, axis=-1, keepdims=True) > least)
        sum_, rest = _in_two_parts(xp, problem, reference, problem.epsilon * (offset + _ratio(backend, problem, share)))
        state = (
            xp.where(done, reference, sum_),
            xp.where(done, offset, rest / problem.epsilon),
            xp.where(done, count, count + 1.0),
            done,
        )
        return state, done

    none = xp.zeros_like(reference[..., :1])
    reference, offset, count, _ = backend.repeat(move, (reference, reference, none, none > 0.0), limit)
    return reference, offset, count


def _forms(xp: Any, inputs: tuple[Any, ...], **options: Any) -> tuple[Form, ...]:
    masses, dtype = inputs[2], inputs[0].dtype
    shape = tuple(masses.shape)
    return Form(shape, dtype), Form(shape, dtype), Form((*shape[:-1], 1), dtype)


#: The iteration, as one operation in a framework's graph.
solver = Primitive("solve_assignment", _approach, _forms, constants=("reference", "offset", "iterations"), axes=2)
