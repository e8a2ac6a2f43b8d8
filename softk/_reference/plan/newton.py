r"""The boundaries of a plan by Newton's method.

**The start.** Each boundary, taken by itself, is the threshold of a top-k with the mass C_j. The differences of the
masks of neighboring boundaries form a plan with the right masses. The offset starts at the mean of (x - r) / tau minus
the log-odds of this plan. That is exact for epsilon -> 0 and close for a large epsilon. Scores in groups that are far
apart, many boundaries and a large epsilon together may make this start useless: the errors of all boundaries add up in
the potentials. If a step is very long, or Newton's decrement grows, the method starts again, once, at the middles
between the sorted scores. These are the solution for epsilon = 0, whose dual misses the optimum by no more than epsilon
times the entropy of a plan.

**The step.** The dual is a sum of logarithms of sums of exponentials. If |d| is the range of a Newton step d in the
potentials, the step times log(1 + |d|) / |d| always ascends. With the largest change of a threshold instead of the
range, the steps are longer and nearly always better. If Newton's decrement grows after a second start, the range is
used from then on.
"""

from __future__ import annotations

import math
from typing import Any

from softk._reference.threshold.ends import Ends, find_ends, middle, narrow_gap, reference_of
from softk._reference.threshold.limits import CORRECTIONS, MARGIN, limits, safe_denominator
from softk._reference.threshold.newton import search
from softk._reference.threshold.problem import effective_weights
from softk._reference.threshold.window import window
from softk.backend import Array, Backend, Form, Primitive, peek

from .system import Boundaries, System, Task, excess, log_odds, plan, running, sides

#: The largest number of Newton steps. In measurements over the supported range, 30 always sufficed, 10 nearly always.
STEPS = 40
#: A step that changes a threshold by more temperatures than this is very long: it shows that the start is useless.
LONG = 10.0


def newton(
    backend: Backend, task: Task, *, weighted: bool, ranks: tuple[int, ...] | None = None, limit: int = STEPS
) -> Boundaries:
    """Find the boundaries by Newton's method.

    `weighted` says whether the user gave the weights of the task. `ranks` are ceil(C) of all boundaries, followed by
    floor(C) + 1 of all, if they are known as Python numbers. `limit` is the largest number of steps.
    """
    xp = backend.xp
    constants = tuple(backend.constant(value) for value in task)
    found = backend.run(solver, "forward", constants, weighted=weighted, ranks=ranks, limit=limit)
    reference, offset, count, valid = found
    if backend.differentiates_operations:
        # The solver's result is a constant; these corrections give it the derivative of the solution.
        z = log_odds(backend, task, reference)
        for _ in range(CORRECTIONS):
            offset = offset + _step(backend, z - offset, task.mass, task.masses, task.weights)[0]
    return Boundaries(reference, xp.where(valid, offset, math.nan), count)


def _approach(
    backend: Backend, inputs: tuple[Any, ...], *, weighted: bool, ranks: tuple[int, ...] | None, limit: int
) -> tuple[Array, ...]:
    """The result of Newton's method, without a derivative."""
    xp, task = backend.xp, Task(*inputs)
    near = None if weighted or ranks is None else window(backend, task.x, xp.max(task.tau, axis=-2), ranks)
    # Try the few scores near the boundaries first; use all scores if the result does not confirm that these suffice.
    if near is not None:
        within = task._replace(x=near, weights=xp.expand_dims(effective_weights(xp, near, None), axis=-2))
        found, sure = _approach_within(backend, within, weighted, ranks, limit, task.x.shape[-1])
        if peek(backend, xp.all(sure)):
            return found
    return _approach_within(backend, task, weighted, ranks, limit, task.x.shape[-1])[0]


def _approach_within(
    backend: Backend, task: Task, weighted: bool, ranks: tuple[int, ...] | None, limit: int, n: int
) -> tuple[tuple[Array, ...], Array]:
    """The result of Newton's method from all n scores or a window of them, and whether the window was wide enough."""
    xp = backend.xp
    bound = limits(xp, task.x.dtype)
    mass = task.mass[..., 0]
    if not weighted:
        # A mass that misses a whole number by its rounding is set to it, because the edges depend on that. It is a sum
        # of up to as many masses as there are boundaries, with a rounding of each.
        nearest, rounding = xp.round(mass), (4.0 + mass.shape[-1]) * bound.eps
        mass = xp.where(xp.abs(nearest - mass) <= rounding * mass, nearest, mass)
    weights = task.weights[..., 0, :] if weighted else None
    ends = find_ends(backend, task.x, None, mass, weights, ranks, n)
    ends = Ends(*(xp.expand_dims(value, axis=-1) for value in ends))
    reference, gap = reference_of(backend, ends, task.tau)
    z = log_odds(backend, task, reference)
    mass = xp.expand_dims(mass, axis=-1)
    odds, half = narrow_gap(backend, z, gap)
    alone, _ = search(backend, odds, half, mass, task.weights, ends.nothing | ends.everything)
    del odds
    start = _together(xp, z, alone + middle(gap), task.weights)

    def saturated(offset: Array) -> Array:
        # A saturated offset makes the shares above or below the boundary exactly 0.
        return xp.where(ends.everything, -bound.saturated, xp.where(ends.nothing, bound.saturated, offset))

    start, second_start = saturated(start), saturated(middle(gap))

    def step(state: tuple[Array, ...]) -> tuple[Any, Array]:
        # When a slice has converged, the last steps, the corrections, are whole ones. They are turns of the same loop,
        # because a compiler takes long for each copy of a step.
        offset, count, corrections, previous, careful, again, converged = state
        size, wanted = _step(backend, z - offset, mass, task.masses, task.weights)
        decrement = xp.sum(size * wanted, axis=-2, keepdims=True)
        largest = xp.max(xp.abs(size), axis=-2, keepdims=True)
        useless = ~(again | converged | ((largest <= LONG) & (decrement <= previous)))
        careful = careful | (decrement > previous)
        potentials = running(xp, size, reverse=True)
        span = xp.max(potentials, axis=-2, keepdims=True) - xp.min(potentials, axis=-2, keepdims=True)
        length = xp.where(careful, span, largest)
        whole = converged | (length == 0.0)
        short = xp.where(whole, 1.0, xp.log1p(length) / safe_denominator(xp, length))
        offset = xp.where(corrections < CORRECTIONS, offset + short * size, offset)
        offset = xp.where(useless, second_start, offset)
        corrections = xp.where(converged, corrections + 1.0, corrections)
        count = xp.where(converged, count, count + 1.0)
        # Newton's error is squared by each step: the two corrections take eps^(1/4) to eps. A NaN also ends the loop.
        converged = converged | ~(useless | (span > bound.eps**0.25)) | (count >= limit)
        decrement, careful, again = xp.where(useless, math.inf, decrement), careful & ~useless, again | useless
        return (offset, count, corrections, decrement, careful, again, converged), corrections >= CORRECTIONS

    none = xp.zeros_like(start[..., :1, :])
    state = (start, none, none, none + math.inf, none > 0.0, none > 0.0, none >= limit)
    offset, count, *_ = backend.repeat(step, state, limit + CORRECTIONS)
    valid = xp.all(ends.valid, axis=-2, keepdims=True) & (task.tau > 0.0) & (task.tau <= bound.largest)
    valid = valid & ~xp.expand_dims(xp.any(xp.isnan(task.x), axis=-1, keepdims=True), axis=-1)
    # A window omits scores more than log(n / eps) plus the margin below the lower side of every gap. They are
    # negligible if the boundary is above that side; otherwise their tail is compared with what the boundary shares.
    above, below = sides(xp, plan(xp, z - offset))
    shared = xp.sum(task.weights * (above * below), axis=-1, keepdims=True)
    sure = ends.nothing | ends.everything | (offset >= gap.low) | (xp.exp(gap.low - offset - MARGIN) <= shared)
    return (reference, offset, count, valid), sure | ~valid


def _forms(xp: Any, inputs: tuple[Any, ...], **options: Any) -> tuple[Form, ...]:
    x, _, mass, *_ = inputs
    *batch, boundaries, _ = mass.shape
    number = Form((*batch, boundaries, 1), x.dtype)
    return number, number, Form((*batch, 1, 1), x.dtype), Form((*batch, boundaries, 1), xp.bool)


#: The iteration, as one operation in a framework's graph.
solver = Primitive("solve_plan", _approach, _forms, constants=("reference", "offset", "steps", "valid"))


def _step(backend: Backend, z: Array, mass: Array, masses: Array, weights: Array) -> tuple[Array, Array]:
    """Newton's step of the offsets, and the excess of the boundaries that it removes."""
    xp = backend.xp
    share = plan(xp, z)
    above, below = sides(xp, share)
    system = System(backend, share, above, below, weights)
    wanted = excess(xp, above, below, mass, weights)
    column = xp.sum(weights * share[..., :-1, :], axis=-1, keepdims=True) - masses[..., :-1, :]
    return system.solve(system.choose(wanted, column)), wanted


def _together(xp: Any, z: Array, alone: Array, weights: Array) -> Array:
    """The initial offsets: the mean of z minus the log-odds of the plan that the separate boundaries form.

    `alone` has the offsets of the separate boundaries. They are kept where that plan has no finite log-odds.
    """
    y = z - alone
    positive = y > 0.0
    decay = xp.exp(-xp.abs(y))
    tail = decay / (1.0 + decay)
    above, below = xp.where(positive, 1.0 - tail, tail), xp.where(positive, tail, 1.0 - tail)
    all_of_it, none = xp.ones_like(above[..., :1, :]), xp.zeros_like(above[..., :1, :])
    # Two masks and their complements have the same differences, up to sign. Subtract the smaller numbers.
    by_mask = xp.concat([above, all_of_it], axis=-2) - xp.concat([none, above], axis=-2)
    by_rest = xp.concat([all_of_it, below], axis=-2) - xp.concat([below, none], axis=-2)
    share = xp.where(xp.concat([positive, all_of_it > 0.0], axis=-2), by_rest, by_mask)
    upper, lower = share[..., :-1, :], share[..., 1:, :]
    both = (upper > 0.0) & (lower > 0.0)
    upper, lower = xp.where(both, upper, 1.0), xp.where(both, lower, 1.0)
    weight = xp.where(both, weights * (upper * lower / (upper + lower)), 0.0)
    total = xp.sum(weight, axis=-1, keepdims=True)
    mean = xp.sum(weight * (z - (xp.log(upper) - xp.log(lower))), axis=-1, keepdims=True) / safe_denominator(xp, total)
    return xp.where(total > float(xp.finfo(z.dtype).smallest_normal), mean, alone)
