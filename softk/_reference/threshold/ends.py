"""The gap in which the threshold lies: the scores on either side of it, before anything is solved.

**In a gap** (whole k, the k-th and the next score many tau apart) both tails may lie far below the smallest float, but
their ratio determines t. There the tails are pure exponentials, whose ratio does not change when both sides come
closer by the same amount: `narrow_gap` narrows the gap to one in which they are numbers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from softk.backend import Array, Backend, index_dtype

from .formulas import formulas_of
from .limits import ROUNDINGS, clip, limits, widest_gap
from .problem import logits, selectable


class Ends(NamedTuple):
    """Where the threshold of every slice lies, before anything is solved."""

    high: Array  # the last score that is selected as epsilon vanishes
    low: Array  # the next one; the same if k is not whole, -inf if there is none
    nothing: Array  # whether k = 0
    everything: Array  # whether all that can be selected is
    valid: Array  # whether k and the weights are in their ranges; NaN is in none


def find_ends(
    backend: Backend,
    x: Array,
    where: Array | None,
    k: Array,
    weights: Array | None,
    ranks: tuple[int, ...] | None,
    n: int,
) -> Ends:
    """Where the thresholds of the masses k (..., b) lie among the n scores of a slice, of which x has the largest."""
    xp = backend.xp
    bound = limits(xp, x.dtype)
    if k.ndim == 0:
        k = xp.reshape(k, (1,) * x.ndim)
    nothing = k <= 0.0
    if weights is None:
        high, low = _edges(backend, selectable(xp, x, where), k, ranks)
        return Ends(high, low, nothing, ~nothing & (low < -bound.largest), (k >= 0.0) & (k <= n))
    rounding = ROUNDINGS * bound.eps  # a user's sum of weights is rounded in another way
    high, low = _weighted_edges(xp, x, where, k * (1.0 - rounding), k * (1.0 + rounding), weights)
    x = selectable(xp, x, where)
    usable = (weights >= 0.0) & (weights < math.inf)
    never = x == -math.inf
    total = _total(xp, xp.where(usable, weights, 0.0))
    held = _total(xp, xp.where(usable & ~never, weights, 0.0))
    valid = xp.all(usable | never, axis=-1, keepdims=True)  # what is never selected may weigh anything
    everything = ~nothing & (k >= held * (1.0 - rounding))
    # Beyond the last score there is no gap, unless everything is selected: the running sums are rounded by themselves.
    low = xp.where((low < -bound.largest) & ~everything, high, low)
    # Items without weight must be on the right side too where nothing or everything is selected.
    lowest = xp.min(xp.where(x >= -bound.largest, x, math.inf), axis=-1, keepdims=True)
    high = xp.where(everything & (high >= -bound.largest), lowest, high)
    high = xp.where(nothing, xp.max(x, axis=-1, keepdims=True), high)
    # Two sums of n weights, each added up in an order of its own, are apart by at most a rounding an item.
    valid = valid & (k >= -rounding * total) & (k - total <= (rounding + n * bound.eps) * total)
    return Ends(high, low, nothing, everything, valid)


def _edges(backend: Backend, x: Array, k: Array, ranks: tuple[int, ...] | None) -> tuple[Array, Array]:
    """The scores of rank ceil(k) and floor(k) + 1, or -inf; between them lies the gap of a whole k."""
    xp, n = backend.xp, x.shape[-1]
    if ranks is None:
        k = xp.where((k >= 0.0) & (k <= n), k, 0.0)  # a bad k is answered with NaN in the end
        index = index_dtype(xp)
        first, second = xp.astype(xp.ceil(k), index), xp.astype(xp.floor(k), index) + 1
        both = xp.maximum(xp.concat([first, second], axis=-1), 1)
        both = xp.where(both > n, n, both)  # n may be symbolic under a trace, which minimum does not take
        found = backend.select(x, both)
        return found[..., : k.shape[-1]], xp.where(second > n, -math.inf, found[..., k.shape[-1] :])
    # Chosen, for the minimum of a number and a symbolic n would be a symbol too.
    found = backend.select(x, tuple(n if rank > n else max(rank, 1) for rank in ranks))
    boundaries = len(ranks) // 2
    high, low = found[..., :boundaries], found[..., boundaries:]
    if max(ranks) > n:  # of the last boundary alone
        low = xp.concat([low[..., :-1], xp.full_like(low[..., -1:], -math.inf)], axis=-1)
    return high, low


def _weighted_edges(
    xp: Any, x: Array, where: Array | None, least: Array, most: Array, weights: Array
) -> tuple[Array, Array]:
    """The same with weights: the first scores, from the largest, at which the weight reaches k and exceeds it.

    Running sums of weights are rounded, so k is a short interval, from `least` to `most`.
    """
    n = x.shape[-1]
    counts = (weights > 0.0) | xp.isnan(x)
    x = xp.where(counts if where is None else counts & where, x, -math.inf)
    del counts
    order = xp.argsort(x, axis=-1, descending=True, stable=False)
    x = xp.take_along_axis(x, order, axis=-1)
    mass = xp.take_along_axis(weights, order, axis=-1)
    del order  # two arrays of the scores' size, in float32
    mass = xp.cumulative_sum(xp.where(x > -math.inf, mass, 0.0), axis=-1)
    mass = xp.expand_dims(mass, axis=-2)
    first = xp.count_nonzero(mass < xp.expand_dims(least, axis=-1), axis=-1)
    second = xp.count_nonzero(mass <= xp.expand_dims(most, axis=-1), axis=-1)
    low = xp.take_along_axis(x, xp.minimum(second, n - 1), axis=-1)
    return (
        xp.take_along_axis(x, xp.minimum(first, n - 1), axis=-1),
        xp.where(second >= n, -math.inf, low),
    )


class Gap(NamedTuple):
    """z of the scores on either side of the reference; both 0 where k is not whole."""

    high: Array
    low: Array


def reference_of(backend: Backend, ends: Ends, tau: Array) -> tuple[Array, Gap]:
    """The reference, and where the scores on either side of it are."""
    xp = backend.xp
    largest = limits(xp, ends.high.dtype).largest
    low = xp.where(ends.nothing | ends.everything, ends.high, ends.low)
    both = clip(xp, xp.concat([ends.high, low], axis=-1), -largest, largest)
    high, low = both[..., :1], both[..., 1:]
    reference = formulas_of(backend).midpoint(high, low)
    both = logits(backend, both, reference, tau)
    return reference, Gap(both[..., :1], both[..., 1:])


def middle(gap: Gap) -> Array:
    """z of the middle of the gap: zero, unless the scores are too close for their middle to be a number."""
    return 0.5 * (gap.high + gap.low)


def narrow_gap(backend: Backend, z: Array, gap: Gap) -> tuple[Array, Array]:
    """exp(z), from the middle of the gap, and half the gap, with a wide gap narrowed.

    Half a gap of log(1 / eps) is left: within eps its tails are exponentials. Neither what is returned nor its inverse
    overflows.
    """
    xp, over = backend.xp, backend.overwriting
    bound = limits(xp, z.dtype)
    half = 0.5 * (gap.high - gap.low)
    excess = formulas_of(backend).excess_of(half, widest_gap(bound))
    z = z - middle(gap)
    # A constant of every score that matters; frameworks halve the derivative at a bound.
    inner = backend.constant(clip(xp, z, -excess, excess))
    z = over.subtract(z, inner)
    del inner
    return over.exp(clip(over, z, -bound.reach, bound.reach)), half - excess


def _total(xp: Any, values: Array) -> Array:
    return xp.sum(values, axis=-1, keepdims=True)
