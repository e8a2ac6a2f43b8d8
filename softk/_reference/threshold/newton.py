r"""Newton's method for the offset of a threshold, with one pass over the scores per step.

With z_i = (x_i - r) / tau, `search` finds the s with sum_i a_i sigmoid(z_i - s) = k.

**Tails, not totals.** sum mask - k is formed without cancellation, from the two tails and the number of scores above
the threshold, which is exact:

    sum mask - k = L - U - delta,   L = sum_{z <= s} sigmoid(z - s),   U = sum_{z > s} sigmoid(s - z),
    delta = k - #{z > s}.

**One exponential per score.** E_i = exp(z_i) is computed once. With c = exp(s) every tail is min(E_i, c) / (E_i + c).
A pass needs no further exponentials of scores.

**The step.** At the root A = L + max(-delta, 0) and B = U + max(delta, 0) are equal. `step_size` is Newton's step for
log A = log B. A falls with s and B rises. Neither changes faster than an exponential, and the one that is only a tail
changes at least half as fast. Therefore the step is right within a factor of about two wherever it starts. Near the
root it is Newton's step for the mass. From the middle of the gap three steps are usual. A bracket safeguards them: the
slope of a tail grows from a half to a whole as the threshold passes a score, so a step may overshoot and the next one
go back. No step goes beyond the middle of the bracket.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from softk.backend import Array, Backend

from .formulas import formulas_of
from .limits import ROUNDINGS, STEPS, clip, limits, safe_denominator, small_step
from .problem import dot, total, totals


class Tails(NamedTuple):
    """One pass over the scores, summed up per slice."""

    above: Array  # weight of the scores above the threshold
    lower: Array  # L
    upper: Array  # U
    slope: Array  # the weighted sum of sigmoid' over all scores


def sweep(backend: Backend, odds: Array, level: Array, weights: Array | None, smaller: Array | None = None) -> Tails:
    """One pass over the scores, as every step of the solver makes it.

    `odds` is E = exp(z) and `level` is c = exp(s). `smaller` is min(E, c), where its derivative matters.
    """
    xp = backend.xp
    is_above = odds > level
    if backend.is_split:
        return _sweep_in_pieces(backend, is_above, odds, level, weights, smaller)
    if weights is None:
        weight_above = xp.astype(xp.count_nonzero(is_above, axis=-1, keepdims=True), odds.dtype)
    else:
        weight_above = total(xp, xp.where(is_above, weights, 0.0))
    tail, square = _tail_and_square(xp, odds, level, weights, smaller)
    upper_tail = xp.where(is_above, tail, 0.0)
    upper, lower = total(xp, upper_tail), total(xp, tail - upper_tail)  # the difference of an item is exact
    return Tails(weight_above, lower, upper, lower + upper - square)


def _tail(xp: Any, odds: Array, level: Array, smaller: Array | None) -> Array:
    return (xp.minimum(odds, level) if smaller is None else smaller) / (odds + level)


def _tail_and_square(
    xp: Any, odds: Array, level: Array, weights: Array | None, smaller: Array | None
) -> tuple[Array, Array]:
    """The weighted tail of every item, and the weighted sum of the squares of the tails."""
    tail = _tail(xp, odds, level, smaller)
    if weights is None:
        return tail, dot(xp, tail, tail)
    weighted_tail = weights * tail
    return weighted_tail, dot(xp, weighted_tail, tail)


def _sweep_in_pieces(
    backend: Backend, is_above: Array, odds: Array, level: Array, weights: Array | None, smaller: Array | None
) -> Tails:
    """The same sums by one reduction, which holds more arrays at a time."""
    xp = backend.xp
    tail = _tail(xp, odds, level, smaller)
    weighted_tail = tail if weights is None else weights * tail
    upper_tail = xp.where(is_above, weighted_tail, 0.0)
    weight_above, upper, lower, square = totals(
        backend,
        lambda: is_above if weights is None else xp.where(is_above, weights, 0.0),
        lambda: upper_tail,
        lambda: weighted_tail - upper_tail,
        lambda: weighted_tail * tail,
    )
    return Tails(weight_above, lower, upper, lower + upper - square)


def deficit(backend: Backend, tails: Tails, offset: Array, half: Array, k: Array, weights: Array | None) -> Array:
    """delta = k less the weight above the threshold. Within the gap, a rounding of a sum of weights counts as 0."""
    delta = k - tails.above
    if weights is None:
        return delta
    return formulas_of(backend).deficit(delta, offset, half, k, ROUNDINGS * limits(backend.xp, k.dtype).eps)


def search(
    backend: Backend, odds: Array, half: Array, k: Array, weights: Array | None, fixed: Array
) -> tuple[Array, Tails]:
    """The offset from the middle of the gap, and the tails before its last step.

    Parameters
    ----------
    backend : Backend
        The framework of the arrays.
    odds, half : array
        exp(z) and half the gap, as `narrow_gap` returns them.
    k, weights : array
        Mass (..., 1) and item weights (..., n), None for all 1.
    fixed : array
        The slices whose offset stays 0.
    """
    xp = backend.xp
    bound = limits(xp, odds.dtype)
    smallest = float(xp.finfo(odds.dtype).smallest_normal)
    tolerance = small_step(bound)
    # Offsets are clipped to the ceiling. All tails are exponentials there: one step is exact, and none underflows.
    ceiling = math.log(bound.farthest)

    def measure(offset: Array) -> tuple[Tails, Array]:
        tails = sweep(backend, odds, xp.exp(offset), weights)
        delta = deficit(backend, tails, offset, half, k, weights)
        return tails, formulas_of(backend).step_size(tails.lower, tails.upper, tails.slope, delta, bound.eps, smallest)

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[tuple[Array, Array, Array, Array], Array]:
        offset, least, most, done = state
        _, size = measure(offset)
        least, most = xp.where(size > 0.0, offset, least), xp.where(size < 0.0, offset, most)
        small = ~(xp.abs(size) > tolerance)
        # The offset has just become an end of the bracket. A step goes at most to the middle.
        half_width = 0.5 * (most - least)
        size = clip(xp, size, -half_width, half_width)
        offset = xp.where(done, offset, clip(xp, offset + size, -ceiling, ceiling))
        done = done | small
        return (offset, least, most, done), done

    start = xp.zeros_like(half)
    state = (start, start - math.inf, start + math.inf, fixed | xp.isnan(half))
    offset, *_ = backend.repeat(step, state, STEPS)
    tails, size = measure(offset)
    return xp.where(fixed, offset, offset + size), tails


def correction(
    backend: Backend, odds: Array, offset: Array, half: Array, wider: Array, k: Array, weights: Array | None
) -> Array:
    """Newton's step for the mass, in operations whose derivative is the derivative of the solution."""
    xp = backend.xp
    level = xp.exp(offset)
    smaller = xp.where(odds > level, level, odds)  # not a minimum, whose derivative at a tie is halved
    tails = sweep(backend, odds, level, weights, smaller)
    delta = k - tails.above
    value = backend.constant(deficit(backend, tails, offset, half, k, weights))
    # `delta - constant(delta)` is 0 and has the derivative of delta. In a narrowed gap the threshold moves `wider`
    # times as far for the same change of the mass.
    change = wider * (delta - backend.constant(delta))
    return (tails.lower - tails.upper - (value + change)) / safe_denominator(xp, tails.slope)
