"""The threshold in its two parts: the gap, then Newton's steps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from softk.backend import Array, Backend, Form, Primitive, broadcast_like, peek

from .ends import Gap, find_ends, middle, narrow_gap, reference_of
from .limits import CORRECTIONS, MARGIN, limits
from .newton import correction, search
from .problem import effective_weights, logits, selectable
from .window import window


class Solution(NamedTuple):
    """The threshold reference + tau * offset + extreme of every slice."""

    reference: Array  # a score or the middle of a gap; a constant for every derivative
    offset: Array
    extreme: Array  # +inf where nothing is selected, -inf where everything is, else 0


def solve(
    backend: Backend,
    x: Array,
    k: Array,
    tau: Array,
    weights: Array | None,
    where: Array | None,
    ranks: tuple[int, ...] | None,
) -> Solution:
    """The threshold r + tau s, in its two parts.

    Parameters
    ----------
    backend : Backend
        The framework of the arrays.
    x : array
        Scores, shape (..., n), n >= 1.
    k, tau : array
        Mass and temperature, of one shape with `x` but for the last axis, which is 1, or of no axes at all.
    weights, where : array or None
        Item weights and the items that are not removed, the shape of `x`.
    ranks : tuple of int or None
        ceil(k) and floor(k) + 1 where k is a Python number. Weights are not counted by ranks, which are ignored then.

    Returns
    -------
    Solution
        Three arrays of shape (..., 1). A slice without an answer has a NaN offset. Where nothing is selected the offset
        is so large that every sigmoid is 0; where everything is selected, every sigmoid is 1.
    """
    xp = backend.xp
    bound = limits(xp, x.dtype)
    valid, tau, k = usable(xp, tau, k)
    if weights is not None or (ranks is not None and not all(isinstance(rank, int) for rank in ranks)):
        ranks = None  # they count scores, not weights; or they are symbols of a trace
    constants = tuple(None if value is None else backend.constant(value) for value in (x, k, tau, weights, where))
    found = backend.run(solver, "forward", constants, ranks=ranks)
    reference, offset, high, low, nothing, everything, settled, infinite = found

    if backend.differentiates_operations:
        gap = Gap(high, low)
        x = selectable(xp, x, where)
        weights = None if weights is None else effective_weights(xp, x, weights)
        odds, half = narrow_gap(backend, logits(backend, x, reference, tau), gap)
        wider = xp.exp(xp.minimum(0.5 * (high - low) - half, math.log(bound.farthest)))
        offset = offset - middle(gap)
        for _ in range(CORRECTIONS):
            offset = offset + correction(backend, odds, offset, half, wider, k, weights)
        offset = offset + middle(gap)
    offset = xp.where(everything, -bound.saturated, offset)
    offset = xp.where(nothing, bound.saturated, offset)
    extreme = xp.where(everything, -math.inf, xp.zeros_like(offset))
    extreme = xp.where(nothing | infinite, math.inf, extreme)
    return Solution(reference, xp.where(valid & settled, offset, math.nan), extreme)


def usable(xp: Any, tau: Array, k: Array) -> tuple[Array, Array, Array]:
    """Whether both numbers are in their ranges; and numbers in their place that are. The result is then set to NaN."""
    largest = limits(xp, tau.dtype).largest
    valid = (tau > 0.0) & (tau <= largest) & (k >= -largest) & (k <= largest)
    return valid, xp.where(valid, tau, 1.0), xp.where(valid, k, 0.0)


def _approach(backend: Backend, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> tuple[Array, ...]:
    """What the solver converges to, without a derivative."""
    x, k, tau, weights, where = inputs
    xp = backend.xp
    if weights is None:
        x, where = selectable(xp, x, where), None
    near = None if ranks is None else window(backend, x, tau, ranks)
    if near is not None:
        found, sure = _approach_within(backend, near, k, tau, None, None, ranks, x.shape[-1])
        if peek(backend, xp.all(sure)):
            return found
    return _approach_within(backend, x, k, tau, weights, where, ranks, x.shape[-1])[0]


def _approach_within(
    backend: Backend,
    x: Array,
    k: Array,
    tau: Array,
    weights: Array | None,
    where: Array | None,
    ranks: tuple[int, ...] | None,
    n: int,
) -> tuple[tuple[Array, ...], Array]:
    """What the solver converges to, from all n scores or from a window; and whether the window was wide enough."""
    xp = backend.xp
    bound = limits(xp, x.dtype)
    ends = find_ends(backend, x, where, k, weights, ranks, n)
    reference, gap = reference_of(backend, ends, tau)
    if weights is not None:
        weights = effective_weights(xp, selectable(xp, x, where), weights)
    fixed = ends.nothing | ends.everything
    odds, half = narrow_gap(backend, logits(backend, selectable(xp, x, where), reference, tau), gap)
    offset, tails = search(backend, odds, half, k, weights, fixed)
    settled = ends.valid & ~xp.isnan(tails.lower)
    # The scores outside a window are at least log(n / eps) and the margin below the lower side of the gap. Together
    # they add less than eps exp(-half - offset - margin) to the lower tail.
    sure = fixed | ~settled | (xp.exp(-half - offset - MARGIN) <= tails.lower + tails.upper)
    return (
        reference,
        offset + middle(gap),
        *gap,
        broadcast_like(xp, ends.nothing, offset.shape, offset),
        ends.everything,
        settled,
        ends.high > bound.largest,
    ), sure


def _forms(xp: Any, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> tuple[Form, ...]:
    x, k, *_ = inputs
    number, flag = Form((*x.shape[:-1], 1), k.dtype), Form((*x.shape[:-1], 1), xp.bool)
    return (number,) * 4 + (flag,) * 4


#: The iteration, as one operation of a graph. Its outputs are the threshold in its two parts, both sides of the gap,
#: and flags: nothing is selected, everything is selected, there is an answer, the last score that is selected is +inf.
solver = Primitive(
    "solve_threshold",
    _approach,
    _forms,
    constants=("reference", "offset", "high", "low", "nothing", "everything", "settled", "infinite"),
)
