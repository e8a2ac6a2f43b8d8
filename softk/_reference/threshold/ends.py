"""The gap in which the threshold lies: the scores on either side of it, before anything is solved.

**Wide gaps.** For a whole k, the k-th score and the next may be many tau apart. Then both tails underflow, but their
ratio determines t. The tails are exponentials there, and their ratio does not change if both sides move closer by the
same amount. `narrow_gap` narrows the gap until the tails do not underflow.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from softk.backend import Array, Backend, index_dtype

from .counting import edges_by_counting
from .formulas import formulas_of
from .limits import ROUNDINGS, clip, limits, widest_gap
from .problem import logits, selectable, totals


class Ends(NamedTuple):
    """Where the threshold of every slice lies, before anything is solved."""

    high: Array  # the k-th largest score: the last one that is selected for epsilon -> 0
    low: Array  # the next score; the same score if k is not whole, -inf if there is none
    nothing: Array  # whether nothing is selected, because k = 0
    everything: Array  # whether every item that can be selected is selected
    valid: Array  # whether k and the weights are in their ranges; a NaN is not


def find_ends(
    backend: Backend,
    x: Array,
    where: Array | None,
    k: Array,
    weights: Array | None,
    ranks: tuple[int, ...] | None,
    n: Any,
) -> Ends:
    """Where the thresholds of the masses k (..., b) lie among n scores. `x` may be a window: the largest of them."""
    xp = backend.xp
    bound = limits(xp, x.dtype)
    if k.ndim == 0:
        k = xp.reshape(k, (1,) * x.ndim)
    nothing = k <= 0.0
    if weights is None:
        if backend.is_split:
            high, low, n = _counted_edges(backend, selectable(xp, x, where), k, ranks)
        else:
            high, low = _edges(backend, selectable(xp, x, where), k, ranks)
        return Ends(high, low, nothing, ~nothing & (low < -bound.largest), (k >= 0.0) & (k <= n))
    rounding = ROUNDINGS * bound.eps  # k may be a sum of weights that the user computed, with other roundings
    high, low = _weighted_edges(backend, x, where, k * (1.0 - rounding), k * (1.0 + rounding), weights)
    x = selectable(xp, x, where)
    usable = (weights >= 0.0) & (weights < math.inf)
    never = x == -math.inf
    unusable, sum_of_all, sum_of_selectable, *items = totals(
        backend,
        lambda: ~(usable | never),  # an item that is never selected may have any weight
        lambda: xp.where(usable, weights, 0.0),
        lambda: xp.where(usable & ~never, weights, 0.0),
        *((lambda: xp.ones_like(x),) if backend.is_split else ()),
    )
    n = items[0] if backend.is_split else n
    valid = unusable == 0
    everything = ~nothing & (k >= sum_of_selectable * (1.0 - rounding))
    # Below the last score there is no gap unless everything is selected: only roundings of the running sums differ.
    low = xp.where((low < -bound.largest) & ~everything, high, low)
    # If nothing or everything is selected, items without weight must lie on the right side of the threshold too.
    lowest = xp.min(xp.where(x >= -bound.largest, x, math.inf), axis=-1, keepdims=True)
    high = xp.where(everything & (high >= -bound.largest), lowest, high)
    high = xp.where(nothing, xp.max(x, axis=-1, keepdims=True), high)
    # Two sums of n weights in different orders differ by at most one rounding per item.
    valid = valid & (k >= -rounding * sum_of_all) & (k - sum_of_all <= (rounding + n * bound.eps) * sum_of_all)
    return Ends(high, low, nothing, everything, valid)


def _edges(backend: Backend, x: Array, k: Array, ranks: tuple[int, ...] | None) -> tuple[Array, Array]:
    """The scores of rank ceil(k) and floor(k) + 1, or -inf; between them lies the gap of a whole k."""
    xp, n = backend.xp, x.shape[-1]
    if ranks is None:
        k = xp.where((k >= 0.0) & (k <= n), k, 0.0)  # the result of an invalid k is NaN, set at the end
        index = index_dtype(xp)
        first, second = xp.astype(xp.ceil(k), index), xp.astype(xp.floor(k), index) + 1
        both = xp.maximum(xp.concat([first, second], axis=-1), 1)
        both = xp.where(both > n, n, both)  # n may be symbolic under a trace, which minimum does not take
        found = backend.select(x, both)
        return found[..., : k.shape[-1]], xp.where(second > n, -math.inf, found[..., k.shape[-1] :])
    # Not by `min`: the minimum of a number and a symbolic n would be a symbol.
    found = backend.select(x, tuple(n if rank > n else max(rank, 1) for rank in ranks))
    boundaries = len(ranks) // 2
    high, low = found[..., :boundaries], found[..., boundaries:]
    if max(ranks) > n:  # only the last boundary can have no score below it
        low = xp.concat([low[..., :-1], xp.full_like(low[..., -1:], -math.inf)], axis=-1)
    return high, low


def _counted_edges(backend: Backend, x: Array, k: Array, ranks: tuple[int, ...] | None) -> tuple[Array, Array, Array]:
    """`_edges` of slices in pieces, and the number of their items."""
    xp, index = backend.xp, index_dtype(backend.xp)
    if ranks is None:
        most = float(xp.iinfo(index).max // 2)
        k = xp.where((k >= 0.0) & (k <= most), k, 0.0)
        first, last = xp.astype(xp.ceil(k), index), xp.astype(xp.floor(k), index)
    else:
        none = xp.zeros(k.shape, dtype=index, device=backend.device(k))
        first, last = none + ranks[0], none + (ranks[1] - 1)
    high, low, n = edges_by_counting(backend, x, None, xp.maximum(first, 1), last)
    return high, low, xp.astype(n, k.dtype)


def _weighted_edges(
    backend: Backend, x: Array, where: Array | None, least: Array, most: Array, weights: Array
) -> tuple[Array, Array]:
    """With weights: the first score at which the running sum of the weights, from the largest score on, reaches k; and
    the first one at which it exceeds k.

    Running sums are rounded, so k is a short interval, from `least` to `most`.
    """
    xp, n = backend.xp, x.shape[-1]
    counts = (weights > 0.0) | xp.isnan(x)
    x = xp.where(counts if where is None else counts & where, x, -math.inf)
    if backend.is_split:
        high, low, _ = edges_by_counting(backend, x, xp.where(x > -math.inf, weights, 0.0), least, most)
        return high, low
    x, mass = _descending(xp, x, weights)
    mass = xp.expand_dims(xp.cumulative_sum(mass, axis=-1), axis=-2)
    first = xp.count_nonzero(mass < xp.expand_dims(least, axis=-1), axis=-1)
    second = xp.count_nonzero(mass <= xp.expand_dims(most, axis=-1), axis=-1)
    low = xp.take_along_axis(x, xp.minimum(second, n - 1), axis=-1)
    return (
        xp.take_along_axis(x, xp.minimum(first, n - 1), axis=-1),
        xp.where(second >= n, -math.inf, low),
    )


def _descending(xp: Any, x: Array, weights: Array) -> tuple[Array, Array]:
    """The scores in descending order, and their weights, 0 for those of -inf."""
    order = xp.argsort(x, axis=-1, descending=True, stable=False)
    x = xp.take_along_axis(x, order, axis=-1)
    return x, xp.where(x > -math.inf, xp.take_along_axis(weights, order, axis=-1), 0.0)


class Gap(NamedTuple):
    """z of the scores on either side of the reference; both are 0 if k is not whole."""

    high: Array
    low: Array


def reference_of(backend: Backend, ends: Ends, tau: Array) -> tuple[Array, Gap]:
    """The reference, and the scores on either side of it."""
    xp = backend.xp
    largest = limits(xp, ends.high.dtype).largest
    low = xp.where(ends.nothing | ends.everything, ends.high, ends.low)
    both = clip(xp, xp.concat([ends.high, low], axis=-1), -largest, largest)
    high, low = both[..., :1], both[..., 1:]
    reference = formulas_of(backend).midpoint(high, low)
    both = logits(backend, both, reference, tau)
    return reference, Gap(both[..., :1], both[..., 1:])


def middle(gap: Gap) -> Array:
    """z of the middle of the gap: 0, unless there is no floating-point number between the two scores."""
    return 0.5 * (gap.high + gap.low)


def narrow_gap(backend: Backend, z: Array, gap: Gap) -> tuple[Array, Array]:
    """exp(z) with z measured from the middle of the gap, and half the width of the gap, after a wide gap was narrowed.

    Half a gap is narrowed to log(1 / eps), where the tails are exponentials within eps. exp(z) neither overflows nor
    underflows.
    """
    xp = backend.xp
    bound = limits(xp, z.dtype)
    half = 0.5 * (gap.high - gap.low)
    excess = formulas_of(backend).excess_of(half, widest_gap(bound))
    z = z - middle(gap)
    # By how much a score moves inwards: `excess`, for every score at a side of the gap or beyond it. It is a constant,
    # because frameworks halve the derivative of a clip at its bounds.
    inner = backend.constant(clip(xp, z, -excess, excess))
    return xp.exp(clip(xp, z - inner, -bound.reach, bound.reach)), half - excess
