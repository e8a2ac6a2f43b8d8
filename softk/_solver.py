r"""The threshold of the soft top-k, solved exactly in a few passes over the scores.

Entropic optimal transport between n scores and the two anchors 0 and 1 has one unknown, the threshold t
(Xie et al., NeurIPS 2020, section 3, in the limit of their iteration):

    mask_i = sigmoid(z_i),   z_i = (x_i - t) / tau,   tau = epsilon / 2,   sum_i a_i mask_i = k.

**Two parts.** One floating-point number cannot resolve t to a fraction of tau when the scores are large beside
tau. So t = r + tau s: the reference r is the k-th largest *score*, or for a whole k the middle between it and the next,
and x_i - r is exact or nearly so for the scores that matter; the offset s, in units of tau, is the unknown. With
z_i = (x_i - r) / tau, `search` looks for the s at which sum_i a_i sigmoid(z_i - s) = k.

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

**In a gap** (whole k, the k-th and the next score many tau apart) both tails may lie far below the smallest float, but
their ratio determines t. There the tails are pure exponentials, whose ratio does not change when both sides come
closer by the same amount: `closer` narrows the gap to one in which they are numbers.

**A window.** Scores far below the k-th add next to nothing. Where a framework can gather the others into a shorter
array, `window` says which these are, and `approach` checks from the result that what was left out had no say.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .backend import Array, Backend, broadcast_like

#: Steps before the correction, at most.
STEPS = 11
#: Newton corrections where a framework differentiates the operations themselves: two make that exact to second order.
CORRECTIONS = 2
#: How far below the lower side of a gap, about and in units of tau, a threshold may come until a window is too short.
MARGIN = 4.0
#: A mass is rounded by as many units of its last digit: that close to 0, n or a sum of weights, it counts as that.
ROUNDINGS = 8.0


class Limits(NamedTuple):
    """What a dtype can hold, as Python numbers."""

    eps: float
    largest: float  # finite score; +inf counts as this one
    farthest: float  # |z| beyond which a score has no part in any derivative
    saturated: float  # offset at which a sigmoid is exactly 0 or 1
    reach: float  # |z| of which exp(z) and exp(-z) are numbers, with room for products


def limits(xp: Any, dtype: Any) -> Limits:
    info = xp.finfo(dtype)
    largest = float(info.max)
    saturated, reach = (128.0, 80.0) if info.bits <= 32 else (1024.0, 700.0)
    return Limits(float(info.eps), largest, (0.5 * largest) ** 0.5, saturated, reach)


def counted(xp: Any, k: Array, n: Any) -> Array:
    """What to add to a mass k of n items, so that it is the end, 0 or n, that it misses by its rounding.

    `n` may be a symbol of a trace, which is only compared. Above 0 there is nothing to add, however small k is.
    """
    unit = ROUNDINGS * limits(xp, k.dtype).eps  # of numbers of the size of n; a power of 2
    over = k - n
    found = xp.where((k < 0.0) & (-k / unit <= n), -k, 0.0)
    return xp.where(xp.abs(over) / unit <= n, -over, found)


def logits(backend: Backend, x: Array, reference: Array, tau: Array, offset: Array | None = None) -> Array:
    """(x - reference) / tau, clipped to the farthest distance that a derivative still sees, less the offset.

    +inf counts as the largest score: many of them tie, and share k when they are more than k. Beside a tau so large
    that what clips them would overflow, scores are made smaller first, by a power of two.
    """
    xp, over = backend.xp, backend.overwriting
    bound = limits(xp, x.dtype)
    # Only there: the second derivative of a quotient has the square of its denominator.
    large = bound.largest / bound.farthest
    part = xp.where(tau > large, 2.0 ** -math.ceil(math.log2(bound.farthest)), xp.ones_like(tau))
    tau = tau * part
    reach = bound.farthest * tau
    x = xp.minimum(x, bound.largest)  # one step at a time: each lets go of the array before it
    x = x * part
    x = x - reference * part
    z = over.divide(between(over, x, -reach, reach), tau)
    return z if offset is None else over.subtract(z, offset)


def selectable(xp: Any, x: Array, where: Array | None) -> Array:
    """The scores, with -inf for the items that are removed. Formed where it is asked for: nobody holds on to a copy."""
    return x if where is None else xp.where(where, x, -math.inf)


def between(xp: Any, values: Array, least: Any, most: Any) -> Array:
    """Clip; the namespaces' own clip is slow or restricted where the bounds are arrays."""
    values = xp.maximum(values, least)
    return xp.minimum(values, most)


def exponential(xp: Any, exponent: Array, over: Any = None) -> Array:
    """exp of numbers of at most 0, beside 1: not below the least, for processors are slow with subnormal numbers.

    `over` is the namespace that overwrites, for an exponent that nobody reads again.
    """
    over = over or xp
    return over.exp(over.maximum(exponent, math.log(least(xp, exponent.dtype))))


def least(xp: Any, dtype: Any) -> float:
    """What is nothing beside 1, and far enough from the smallest number that its products are numbers."""
    return math.exp(0.9 * math.log(float(xp.finfo(dtype).smallest_normal)))


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
    count = _total(xp, side) if weights is None else backend.dot(weights, side)
    upper, lower = backend.part(weighted, side)
    return Tails(count, lower, upper, lower + upper - curved)


def step_size(xp: Any, tails: Tails, delta: Array) -> Array:
    """Newton's step for log A = log B, with the share of both tails that is slope in the place of each one's."""
    both = tails.lower + tails.upper
    # A tail may be nothing at all beside the other; and weights may be as small as numbers are. A mass, however small,
    # is not below the floor.
    info = xp.finfo(delta.dtype)
    floor = xp.minimum(float(info.eps) * both, float(info.smallest_normal))
    more = xp.maximum(delta, 0.0)
    rising = xp.maximum(tails.upper + more, floor)
    falling = xp.maximum(tails.lower + (more - delta), floor)
    rate = (tails.lower / falling + tails.upper / rising) * tails.slope
    return xp.log(falling / rising) * (both / nonzero(xp, rate))


class Solution(NamedTuple):
    """The threshold reference + tau * offset + extreme of every slice."""

    reference: Array  # a score or the middle of a gap, a constant to every derivative
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
        ceil(k) and floor(k) + 1 where k is a Python number and there are no weights.

    Returns
    -------
    Solution
        Three arrays of shape (..., 1). A slice that the contract answers with NaN has a NaN offset. Where nothing
        (everything) is selected the offset saturates every sigmoid at 0 (at 1).
    """
    xp = backend.xp
    bound = limits(xp, x.dtype)
    valid = (tau > 0.0) & (tau <= bound.largest) & (k >= -bound.largest) & (k <= bound.largest)
    tau, k = xp.where(valid, tau, 1.0), xp.where(valid, k, 0.0)  # a bad value is answered with NaN in the end
    given = {"x": x, "k": k, "tau": tau, "weights": weights, "where": where}
    names = tuple(name for name, value in given.items() if value is not None)
    constants = (backend.constant(given[name]) for name in names)
    if ranks is not None and not all(isinstance(rank, int) for rank in ranks):
        ranks = None  # symbols of a trace
    options = {"names": names, "ranks": ranks, "limit": STEPS}
    found = backend.settle(approach, options, *constants)
    reference, offset, high, low, nothing, everything, settled, infinite = found

    if backend.differentiates_operations:
        gap = Gap(high, low)
        x = selectable(xp, x, where)
        held = None if weights is None else hold(xp, x, weights)
        odds, half = closer(backend, logits(backend, x, reference, tau), gap)
        wider = xp.exp(xp.minimum(0.5 * (high - low) - half, math.log(bound.farthest)))
        offset = offset - middle(gap)
        for _ in range(CORRECTIONS):
            offset = offset + _correction(backend, odds, offset, half, wider, k, held)
        offset = offset + middle(gap)
    offset = xp.where(everything, -bound.saturated, offset)
    offset = xp.where(nothing, bound.saturated, offset)
    extreme = xp.where(everything, -math.inf, xp.zeros_like(offset))
    extreme = xp.where(nothing | infinite, math.inf, extreme)
    return Solution(reference, xp.where(valid & settled, offset, math.nan), extreme)


class Gap(NamedTuple):
    """z of the scores on either side of the reference; both 0 where k is not whole."""

    high: Array
    low: Array


def frame(backend: Backend, ends: Ends, tau: Array) -> tuple[Array, Gap]:
    """The reference, and where the scores on either side of it are."""
    xp = backend.xp
    largest = limits(xp, ends.high.dtype).largest
    low = xp.where(ends.nothing | ends.everything, ends.high, ends.low)
    both = between(xp, xp.concat([ends.high, low], axis=-1), -largest, largest)
    high, low = both[..., :1], both[..., 1:]
    # The middle, of which no part overflows, however a compiler rearranges it.
    together = (high > 0.0) == (low > 0.0)
    reference = xp.where(together, high - 0.5 * (high - low), 0.5 * (high + low))
    both = logits(backend, both, reference, tau)
    return reference, Gap(both[..., :1], both[..., 1:])


def approach(
    backend: Backend, *arrays: Array, names: tuple[str, ...], ranks: tuple[int, ...] | None, limit: int
) -> tuple[Array, ...]:
    """Reference, offset, both sides of the gap; whether nothing is selected, everything, there is an answer, and
    whether the last that is selected is +inf.
    """
    given = dict(zip(names, arrays, strict=True))
    x, k, tau = given["x"], given["k"], given["tau"]
    weights, where = given.get("weights"), given.get("where")
    xp = backend.xp
    if weights is None:
        x, where = selectable(xp, x, where), None
    near = None if ranks is None else window(backend, x, tau, ranks)
    if near is not None:
        found, sure = _approach_within(backend, near, k, tau, None, None, ranks, limit, x.shape[-1])
        if backend.known(xp.all(sure)):
            return found
    return _approach_within(backend, x, k, tau, weights, where, ranks, limit, x.shape[-1])[0]


def _approach_within(
    backend: Backend,
    x: Array,
    k: Array,
    tau: Array,
    weights: Array | None,
    where: Array | None,
    ranks: tuple[int, ...] | None,
    limit: int,
    n: int,
) -> tuple[tuple[Array, ...], Array]:
    """What `approach` returns, from all n scores or those of a window; and whether a window was wide enough."""
    xp = backend.xp
    bound = limits(xp, x.dtype)
    ends = find_ends(backend, x, where, k, weights, ranks, n)
    reference, gap = frame(backend, ends, tau)
    if weights is not None:
        weights = hold(xp, selectable(xp, x, where), weights)
    fixed = ends.nothing | ends.everything
    odds, half = closer(backend, logits(backend, selectable(xp, x, where), reference, tau), gap)
    offset, tails = search(backend, odds, half, k, weights, fixed, limit)
    settled = ends.valid & ~xp.isnan(tails.lower)
    # What a window leaves out is log(n / eps) and the margin below the lower side of the gap.
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


def window(backend: Backend, x: Array, tau: Array, ranks: tuple[int, ...]) -> Array | None:
    """The scores that can have a say in the threshold, in a shorter array that ends in -inf; None for all of them.

    Of the maxima of blocks, the one of a rank is a lower bound of the score of that rank: that many scores are at least
    as large. Everything that is log(n / eps) and a margin, in units of tau, below the bound has, all together, no part
    in a tail.
    """
    xp, n, rank = backend.xp, x.shape[-1], max(ranks)
    if not isinstance(n, int) or not backend.gathers(x):
        return None
    size = n // (8 * rank)
    if size < 4:
        return None
    blocks = n // size
    maxima = xp.max(xp.reshape(x[..., : size * blocks], (*x.shape[:-1], size, blocks)), axis=-2)
    level = backend.order_statistics(maxima, (rank,))
    bound = limits(xp, x.dtype)
    level = xp.minimum(level, bound.largest) - (math.log(n / bound.eps) + MARGIN) * tau  # of finite scores beside +inf
    return backend.gather_above(x, level)


def search(
    backend: Backend, odds: Array, half: Array, k: Array, weights: Array | None, fixed: Array, limit: int = STEPS
) -> tuple[Array, Tails]:
    """The offset from the middle of the gap, and the tails at it but for a last correction.

    Parameters
    ----------
    backend : Backend
        The framework of the arrays.
    odds, half : array
        exp(z) and half the gap, as `closer` returns them.
    k, weights : array
        Mass (..., 1) and item weights (..., n), None for all 1.
    fixed : array
        The slices that are left as they are.
    limit : int
        Steps at most.
    """
    xp = backend.xp
    bound = limits(xp, odds.dtype)
    tolerance = bound.eps**0.25  # two steps of second order away from eps: the last, and one more
    # Beyond it on either side all tails are exponentials, of which the last step is exact, and they are numbers still.
    ceiling = math.log(bound.farthest)

    def measure(offset: Array) -> tuple[Tails, Array]:
        tails = sweep(backend, odds, xp.exp(offset), weights)
        return tails, step_size(xp, tails, lacking(xp, tails, offset, half, k, weights))

    def step(state: tuple[Array, Array, Array, Array]) -> tuple[tuple[Array, Array, Array, Array], Array]:
        offset, least, most, done = state
        _, size = measure(offset)
        least, most = xp.where(size > 0.0, offset, least), xp.where(size < 0.0, offset, most)
        small = ~(xp.abs(size) > tolerance)
        half_width = 0.5 * (most - least)  # the offset is at one end, and goes as far as the middle
        size = between(xp, size, -half_width, half_width)
        offset = xp.where(done, offset, between(xp, offset + size, -ceiling, ceiling))
        done = done | small
        return (offset, least, most, done), done

    start = xp.zeros_like(half)
    state = (start, start - math.inf, start + math.inf, fixed | xp.isnan(half))
    offset, *_ = backend.repeat(step, state, limit)
    tails, size = measure(offset)
    return xp.where(fixed, offset, offset + size), tails


def middle(gap: Gap) -> Array:
    """z of the middle of the gap: zero, unless the scores are too close for their middle to be a number."""
    return 0.5 * (gap.high + gap.low)


def closer(backend: Backend, z: Array, gap: Gap) -> tuple[Array, Array]:
    """exp(z), from the middle of the gap, and half the gap, with a wide gap narrowed.

    Half a gap of log(1 / eps) is left: within eps its tails are exponentials. Neither what is returned nor its inverse
    overflows.
    """
    xp, over = backend.xp, backend.overwriting
    bound = limits(xp, z.dtype)
    half = 0.5 * (gap.high - gap.low)
    excess = xp.maximum(half - narrow(bound), 0.0)
    z = z - middle(gap)
    # A constant of every score that matters; frameworks halve the derivative at a bound.
    inner = backend.constant(between(xp, z, -excess, excess))
    z = over.subtract(z, inner)
    del inner
    return over.exp(between(over, z, -bound.reach, bound.reach)), half - excess


def narrow(bound: Limits) -> float:
    return 2.0 - math.log(bound.eps)


def lacking(xp: Any, tails: Tails, offset: Array, half: Array, k: Array, weights: Array | None) -> Array:
    """delta: what the scores above the threshold lack of k. Sums of weights are rounded: within the gap it is 0."""
    delta = k - tails.above
    if weights is None:
        return delta
    return xp.where((xp.abs(offset) < half) & is_rounding(xp, delta, k), 0.0, delta)


def is_rounding(xp: Any, delta: Array, k: Array) -> Array:
    """Whether what a sum of weights lacks of k is no more than the rounding of a sum."""
    return xp.abs(delta) <= ROUNDINGS * limits(xp, k.dtype).eps * k


def _correction(
    backend: Backend, odds: Array, offset: Array, half: Array, wider: Array, k: Array, weights: Array | None
) -> Array:
    """Newton's step for the mass, in operations whose own derivative is that of the solution."""
    xp = backend.xp
    level = xp.exp(offset)
    smaller = xp.where(odds > level, level, odds)  # a minimum's derivative at a tie is half of each
    tails = sweep(backend, odds, level, weights, smaller)
    delta = k - tails.above
    value = backend.constant(lacking(xp, tails, offset, half, k, weights))
    # delta less its value is zero and carries the derivative, which the narrowing of a gap made too small.
    change = wider * (delta - backend.constant(delta))
    return (tails.lower - tails.upper - (value + change)) / nonzero(xp, tails.slope)


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
        first, second = xp.astype(xp.ceil(k), backend.index), xp.astype(xp.floor(k), backend.index) + 1
        both = xp.maximum(xp.concat([first, second], axis=-1), 1)
        both = xp.where(both > n, n, both)  # n may be symbolic under a trace, which minimum does not take
        found = backend.order_statistics(x, both)
        return found[..., : k.shape[-1]], xp.where(second > n, -math.inf, found[..., k.shape[-1] :])
    # Chosen, for the minimum of a number and a symbolic n would be a symbol too.
    found = backend.order_statistics(x, tuple(n if rank > n else max(rank, 1) for rank in ranks))
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


def _total(xp: Any, values: Array) -> Array:
    return xp.sum(values, axis=-1, keepdims=True)


def hold(xp: Any, x: Array, weights: Array | None) -> Array:
    """The weights, all 1 unless given, but 0 for the scores that cannot be selected, which may weigh anything."""
    if weights is None:
        return xp.astype(~(x == -math.inf), x.dtype)
    return xp.where(x == -math.inf, 0.0, weights)


def weigh(xp: Any, weights: Array, values: Array) -> Array:
    """weights * values, where the weight of an item with next to no value may be anything: an item that was removed."""
    return xp.where(values > 2.0 * least(xp, values.dtype), weights, 0.0) * values


def nonzero(xp: Any, values: Array) -> Array:
    """A denominator: 1 in the place of 0."""
    return xp.where(values == 0.0, 1.0, values)
