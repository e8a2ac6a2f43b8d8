r"""Newton's method for the offset of a threshold, a pass over the scores each step.

With z_i = (x_i - r) / tau, `search` looks for the s at which sum_i a_i sigmoid(z_i - s) = k.

**Tails, not totals.** sum mask - k is formed without cancellation from the number of scores above the threshold,
which is exact, and the two tails:

    sum mask - k = L - U - delta,   L = sum_{z <= s} sigmoid(z - s),   U = sum_{z > s} sigmoid(s - z),
    delta = k - #{z > s}.

**One exponential a score.** With E_i = exp(z_i), taken once, and c = exp(s) every tail is min(E_i, c) / (E_i + c): a
sweep is a dozen cheap operations.

**The step.** At the root A = L + max(-delta, 0) and B = U + max(delta, 0) are equal. `step_size` is Newton's for
log A = log B. A falls with s and B rises, each at most as fast as an exponential and the one that is a tail alone at
least half as fast, so that the step is right by a factor of two or so wherever it starts; near the root it is
Newton's step for the mass. From the middle of the gap at the k-th score three such steps are usual. A bracket guards
it: a tail whose slope grows from a half to a whole may be overshot, past a score and back again, so no step goes beyond
the middle of the bracket.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from softk.backend import Array, Backend

from .formulas import formulas_of
from .limits import ROUNDINGS, STEPS, clip, limits, safe_denominator


class Tails(NamedTuple):
    """One pass over the scores, summed up per slice."""

    above: Array  # weight of the scores above the threshold
    lower: Array  # L
    upper: Array  # U
    slope: Array  # sum of sigmoid' over all scores


def sweep(backend: Backend, odds: Array, level: Array, weights: Array | None, smaller: Array | None = None) -> Tails:
    """The one pass over the scores that every step of the solver is made of: E = exp(z) beside c = exp(s).

    `smaller` is min(E, c), where its derivative matters.
    """
    xp, over = backend.xp, backend.overwriting
    side = backend.indicator(odds, level)  # products split a sum faster than choices, which processors must guess
    tail = xp.minimum(odds, level) if smaller is None else smaller
    tail = over.divide(tail, odds + level)
    weighted = tail if weights is None else weights * tail
    curved = backend.dot(weighted, tail)
    del tail
    count = xp.sum(side, axis=-1, keepdims=True) if weights is None else backend.dot(weights, side)
    upper, lower = backend.dot(weighted, side), backend.dot(weighted, 1.0 - side)
    return Tails(count, lower, upper, lower + upper - curved)


def deficit(backend: Backend, tails: Tails, offset: Array, half: Array, k: Array, weights: Array | None) -> Array:
    """delta: what the scores above the threshold lack of k. Sums of weights are rounded: within the gap it is 0."""
    delta = k - tails.above
    if weights is None:
        return delta
    return formulas_of(backend).deficit(delta, offset, half, k, ROUNDINGS * limits(backend.xp, k.dtype).eps)


def search(
    backend: Backend, odds: Array, half: Array, k: Array, weights: Array | None, fixed: Array
) -> tuple[Array, Tails]:
    """The offset from the middle of the gap, and the tails at it but for a last correction.

    Parameters
    ----------
    backend : Backend
        The framework of the arrays.
    odds, half : array
        exp(z) and half the gap, as `narrow_gap` returns them.
    k, weights : array
        Mass (..., 1) and item weights (..., n), None for all 1.
    fixed : array
        The slices that are left as they are.
    """
    xp = backend.xp
    bound = limits(xp, odds.dtype)
    smallest = float(xp.finfo(odds.dtype).smallest_normal)
    tolerance = bound.eps**0.25  # two steps of second order away from eps: the last, and one more
    # Beyond it on either side all tails are exponentials, of which the last step is exact, and they are numbers still.
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
        half_width = 0.5 * (most - least)  # the offset is at one end, and goes as far as the middle
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
    """Newton's step for the mass, in operations whose own derivative is that of the solution."""
    xp = backend.xp
    level = xp.exp(offset)
    smaller = xp.where(odds > level, level, odds)  # a minimum's derivative at a tie is half of each
    tails = sweep(backend, odds, level, weights, smaller)
    delta = k - tails.above
    value = backend.constant(deficit(backend, tails, offset, half, k, weights))
    # delta less its value is zero and carries the derivative, which the narrowing of a gap made too small.
    change = wider * (delta - backend.constant(delta))
    return (tails.lower - tails.upper - (value + change)) / safe_denominator(xp, tails.slope)
