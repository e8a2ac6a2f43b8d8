r"""The soft top-k mask and its derivative as fused kernels, in Triton, for float16, bfloat16 and float32.

They implement the solver and the rule of `softk._reference.threshold`, under the same names. The mathematics is
explained there. On a GPU arithmetic is cheaper than memory access, so a tile of rows is loaded once, solved in
registers and written once. The results are the same, but some of the methods differ:

- **The scores at the gap** are found by counting. The kernel brackets them as integer keys of the same order as the
  floats. The pivot comes from linear interpolation of the log-odds of the mass above it, or is the midpoint of the
  bracket if the previous pivot did not halve it. The search ends once the count is right, or the bracket is narrower
  than the temperature.
- **Counts** are integers, and so is the integer part of k, because float32 does not represent all integers above 2^24.
- **The logarithm** of `operations` is a series near 1.

A sum over a row is a tree that depends only on the length of the row, so the same input gives the same bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from softk._reference.threshold import formulas
from softk._reference.threshold.limits import (
    DOMINANT,
    ROUNDINGS,
    STEPS,
    coldest,
    limits,
    negligible,
    small_step,
    widest_gap,
)

from . import operations

_BOUND = limits(torch, torch.float32)
EPS = tl.constexpr(_BOUND.eps)
LARGEST = tl.constexpr(_BOUND.largest)
FARTHEST = tl.constexpr(_BOUND.farthest)
LOG_FARTHEST = tl.constexpr(math.log(_BOUND.farthest))
SATURATED = tl.constexpr(_BOUND.saturated)
REACH = tl.constexpr(_BOUND.reach)
NARROW = tl.constexpr(widest_gap(_BOUND))
LEAST = tl.constexpr(negligible(torch, torch.float32))
LOG_LEAST = tl.constexpr(math.log(negligible(torch, torch.float32)))
TOLERANCE = tl.constexpr(small_step(_BOUND))
DOMINANCE = tl.constexpr(DOMINANT)
SMALLEST = tl.constexpr(torch.finfo(torch.float32).smallest_normal)
ROUNDING = tl.constexpr(ROUNDINGS * _BOUND.eps)
LIMIT = tl.constexpr(STEPS)
LOG2_E = tl.constexpr(math.log2(math.e))
INFINITY = tl.constexpr(math.inf)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# The compiler reads the annotation Number, and the interpreter looks for the name tl.
_FORMULAS = formulas.load(operations, triton.jit, tl=tl, Number=tl.tensor)
step_size, midpoint, excess_of = _FORMULAS.step_size, _FORMULAS.midpoint, _FORMULAS.excess_of
rate_of = _FORMULAS.rate_of
rounded_deficit, is_rounding = _FORMULAS.deficit, _FORMULAS.is_rounding
share_of, is_beside = _FORMULAS.balance, _FORMULAS.is_beside
#: The least slope of the sum of the mask, as a share of that sum, and the longest step, for which `approach` continues.
FLATTEST, LONGEST_STEP = tl.constexpr(2.0**-8), tl.constexpr(2.0)
#: Between these temperatures 1 / tau neither overflows nor underflows, nor do its products.
COLDEST, HOTTEST = tl.constexpr(coldest(_BOUND)), tl.constexpr(1.0 / coldest(_BOUND))


@triton.jit
def probe(place):
    """A minimal kernel, which tests whether kernels run at all."""
    tl.store(place, 1.0)


# --- tiles: (rows, chunks of a row, columns of a chunk)


@triton.jit
def columns(start, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """The column indices of a tile.

    The threads of a warp are laid out along the last axis first, then along the rows. With narrow chunks a warp
    therefore has several rows.
    """
    return start + tl.arange(0, CHUNKS)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def across(values):
    """Broadcast one value per row against a tile."""
    return values[:, None, None]


@triton.jit
def sum_of(tile):
    """The sum of each row."""
    return tl.sum(tl.sum(tile, axis=1), axis=1)


@triton.jit
def max_of(tile):
    """The maximum of each row."""
    return tl.max(tl.max(tile, axis=1), axis=1)


@triton.jit
def min_of(tile):
    """The minimum of each row."""
    return tl.min(tl.min(tile, axis=1), axis=1)


# --- numbers


@triton.jit
def key_of(x):
    """Map a float to an integer key of the same order. `score_of` is the inverse. -0 must have been replaced by 0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def score_of(key):
    bits = tl.where(key >= 0, key, key ^ 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def inverse(tau):
    """1 / tau as a product of two factors that neither overflow nor underflow."""
    scale = tl.where(tau < COLDEST, HOTTEST, tl.where(tau > HOTTEST, COLDEST, 1.0))
    return 1.0 / (tau * scale), scale


@triton.jit
def logits(x, reference, tau):
    """(x - reference) / tau, not clipped: a distant score may be infinite."""
    factor, scale = inverse(tau)
    small = tl.minimum(scale, 1.0)  # for a large tau, scale the scores first, so that their difference cannot overflow
    return (tl.minimum(x, LARGEST) * small - reference * small) * factor * tl.maximum(scale, 1.0)


@triton.jit
def sigmoid(z):
    decay = tl.exp(-tl.abs(z))
    return tl.where(z > 0.0, 1.0, decay) / (1.0 + decay)


@triton.jit
def inverse_of(b):
    """1 / b for b far from overflow and underflow: one instruction, with an error of 1 rounding."""
    if INTERPRETED:
        return 1.0 / b
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [b], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def power_of_two(exponent):
    """2**exponent: one instruction, with an error of 2 roundings. Subnormal results are 0."""
    if INTERPRETED:
        return tl.exp2(exponent)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [exponent], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def binary_logarithm(values):
    """log2 of a normal number: one instruction, with an absolute error of 2 roundings."""
    if INTERPRETED:
        return tl.log2(values)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [values], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def exponential(exponent):
    """exp, by `power_of_two`. Subnormal results are 0."""
    return power_of_two(exponent * LOG2_E)


@triton.jit
def safe_denominator(values):
    return tl.where(values == 0.0, 1.0, values)


# --- the scores at the gap


@triton.jit
def rarity(mass, total, little):
    """The log-odds of a mass, made finite at both ends by `little`.

    For bell-shaped distributions the log-odds of the mass above a score are nearly linear in the score.
    """
    return binary_logarithm((mass + little) * inverse_of(total - mass + little))


@triton.jit
def is_close(low, high, mass, lower_bar, near):
    """Whether both sides of the gap lie in a bracket that is narrower than `near`."""
    return (mass > lower_bar) & (score_of(high) - score_of(low) < near)


@triton.jit
def going_on(low, high, mass, bar, lower_bar, near, weights):
    """Whether the bracket must still be narrowed.

    The search ends if `low` is the key, or if it has the smallest count that suffices. It also ends if the bracket
    `is_close`: any score in it is then near the threshold.
    """
    going = low < high
    if weights is None:
        going = going & (mass > bar + 1)
    return going & ~is_close(low, high, mass, lower_bar, near)


@triton.jit
def masses_of(chosen, weights):
    """The weights of the chosen items of a tile, 0 for the others; without weights 1."""
    if weights is None:
        masses = tl.where(chosen, 1.0, 0.0)
    else:
        masses = tl.where(chosen, weights, 0.0)
    return masses


@triton.jit
def total_of(masses, weights):
    """The sum of the masses of a tile; without weights a number, which fits into an integer."""
    if weights is None:
        total = sum_of(masses).to(tl.int32)
    else:
        total = sum_of(masses)
    return total


@triton.jit
def mass_of(chosen, weights):
    """The total weight of the chosen items of a tile; without weights their number, which is exact in float32."""
    return total_of(masses_of(chosen, weights), weights)


@triton.jit
def width_of(low, high):
    """The width of a bracket of integer keys. It needs all 32 bits, without a sign."""
    return (high - low).to(tl.uint32, bitcast=True)


@triton.jit
def select(x, weights, low, high, mass, bar, lower_bar, near, total, little):
    """Find the largest key at or above which the mass exceeds `bar`: bounds of the key, and the mass at the lower one.

    No score lies between the lower bound and the key, except within `near`. Throughout, the mass at or above `low` is
    `mass`, which exceeds `bar`, and the mass beyond `high` does not exceed it. Without weights a mass is a count. The
    bracket is of integer keys, but scores are compared as floats.
    """
    going = going_on(low, high, mass, bar, lower_bar, near, weights)
    first, last = rarity(total, total, little), rarity(0.0 * total, total, little)
    aim = rarity(bar + little, total, little)
    halve = going != going
    while tl.max(going.to(tl.int32), axis=0) > 0:
        middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)  # the mean, rounded up, without overflow
        # Interpolate linearly between the log-odds at both ends of the bracket. They fall as the score rises.
        share = (aim - first) * inverse_of(tl.minimum(last - first, -LEAST))
        share = tl.minimum(tl.maximum(share, 0.0), 1.0)
        x_low, x_high = tl.maximum(score_of(low), -LARGEST), tl.minimum(score_of(high), LARGEST)
        pivot = tl.where(halve, middle, key_of(x_low * (1.0 - share) + x_high * share + 0.0))
        # A pivot above `low` makes the bracket smaller in either case.
        pivot = tl.minimum(tl.maximum(pivot, low + 1), high)
        found = mass_of(x >= across(score_of(pivot)), weights)
        rare = rarity(found.to(tl.float32), total, little)
        enough, width = found > bar, width_of(low, high)
        raised, lowered = going & enough, going & ~enough
        low, mass, first = tl.where(raised, pivot, low), tl.where(raised, found, mass), tl.where(raised, rare, first)
        high, last = tl.where(lowered, pivot - 1, high), tl.where(lowered, rare, last)
        halve = width_of(low, high) > width >> 1  # bisect next if this pivot has not halved the bracket
        going = going_on(low, high, mass, bar, lower_bar, near, weights)
    return low, high, mass


@triton.jit
def beside(x, low):
    """The nearest scores at or above the key `low`, and below it; infinite if there are none."""
    above = x >= across(score_of(low))
    return min_of(tl.where(above, x, INFINITY)), max_of(tl.where(above, -INFINITY, x))


@triton.jit
def bars(k, weights):
    """The bars of the two sides of the gap.

    A side of the gap is the largest score at or above which the mass exceeds its bar.
    """
    if weights is None:
        upper, lower = tl.ceil(k).to(tl.int32) - 1, tl.floor(k).to(tl.int32)
    else:
        # The user's sum of weights has other rounding errors, so k is a short interval that includes its lower end.
        upper, lower = score_of(key_of(k * (1.0 - ROUNDING)) - 1), k * (1.0 + ROUNDING)
    return upper, lower


@triton.jit
def extent(k, total, of_all, n, weights):
    """Whether k selects everything, and whether k is in its range.

    `total` is the mass of the items that can be selected, `of_all` that of all items.
    """
    if weights is None:
        everything, valid = tl.floor(k).to(tl.int32) >= total, (k >= 0.0) & (k <= n)
    else:
        # Two sums of n weights in different orders differ by at most one rounding per item.
        everything = k >= total * (1.0 - ROUNDING)
        valid = (k >= of_all * -ROUNDING) & (k - of_all <= of_all * (ROUNDING + n * EPS))
    return (k > 0.0) & everything, valid


@triton.jit
def census(raw, x, inside, n, weights):
    """The lowest score of a tile that can be selected, the mass that can be selected, and whether no score is NaN.

    If the lowest score is finite, as usual, all scores can be selected, and no further pass is needed.
    """
    lowest = min_of(tl.where(inside, x, INFINITY))
    if weights is None:
        total = tl.zeros_like(lowest).to(tl.int32) + n
    else:
        total = sum_of(weights)
    sound = lowest == lowest
    if tl.min(lowest, axis=0) == -INFINITY:
        able = x > -INFINITY
        lowest = min_of(tl.where(able, x, INFINITY))
        sound = max_of(tl.where(raw == raw, 0.0, 1.0)) == 0.0
        if weights is None:
            total = mass_of(able, None)
    return lowest, total, sound


@triton.jit
def find_ends(x, weights, lowest, total, of_all, k, n, near, valid):
    """The scores on either side of the gap, and whether nothing is selected, everything is, and the problem is valid.

    Items that cannot be selected have the score -inf. `of_all` is the weight of all items. If both sides are closer to
    each other than `near`, any score next to them will do, and both results are that score.
    """
    nothing, highest = k <= 0.0, max_of(x)
    bar, lower_bar = bars(k, weights)
    if weights is None:
        counted = x
        first, last = key_of(lowest + 0.0), key_of(highest + 0.0)
        little = 0.5 + 0.0 * k
    else:
        heavy = (x > -INFINITY) & (weights > 0.0)
        counted = tl.where(heavy, x, -INFINITY)
        first = key_of(min_of(tl.where(heavy, x, INFINITY)) + 0.0)
        last = key_of(max_of(counted) + 0.0)
        little = 0.5 * total / n
    # If k exceeds the mass that can be selected, the upper side of the gap is -inf.
    lowest = tl.where(bar < total, lowest, -INFINITY)
    everything, enough = extent(k, total, of_all, n, weights)
    valid = valid & enough
    searched = valid & ~nothing & ~everything
    start = tl.where(searched, first, last)
    mass = total.to(tl.float32)
    low, most, reached = select(counted, weights, start, last, total, bar, lower_bar, near, mass, little)
    close = is_close(low, most, reached, lower_bar, near) | ~searched
    if tl.min(close.to(tl.int32), axis=0) > 0:
        upper, lower = score_of(low), score_of(low)
    else:
        upper, lower = beside(counted, low)
    apart = reached <= lower_bar  # otherwise k lies within the mass of the upper score, and there is no gap
    if weights is not None:
        # Scores whose weights are within the rounding of k may lie between both sides: search the lower one separately.
        below = key_of(lower + 0.0)
        start = tl.where(apart & (first < below), first, below)
        below, _, _ = select(counted, weights, start, below, total, lower_bar, lower_bar, 0.0 * near, mass, little)
        lower = score_of(below)
    high = tl.where(nothing, highest, tl.where(everything, lowest, upper))
    return high, tl.where(nothing | everything | ~apart | (lower == -INFINITY), high, lower), nothing, everything, valid


# --- the threshold


@triton.jit
def reference_of(high, low, tau):
    """Both sides of the gap as finite scores, the reference, and z of both sides."""
    high = tl.minimum(tl.maximum(high, -LARGEST), LARGEST)
    low = tl.minimum(tl.maximum(low, -LARGEST), LARGEST)
    reference = midpoint(high, low)
    # Clip z to the largest distance that still contributes to a derivative.
    z_high = tl.minimum(logits(high, reference, tau), FARTHEST)
    return high, low, reference, z_high, tl.maximum(logits(low, reference, tau), -FARTHEST)


@triton.jit
def narrowed(z_high, z_low):
    """Half the narrowed gap, and the distance by which either side of the gap was moved."""
    half = 0.5 * (z_high - z_low)
    return tl.minimum(half, NARROW), excess_of(half, NARROW)


@triton.jit
def narrow_gap(x, high, low, reference, z_high, z_low, tau):
    """exp(z), with z measured from the middle of the narrowed gap.

    On either side of a narrowed gap, z is measured from the score at that side. In a wide gap the rounding of z would
    otherwise be too coarse.
    """
    half, excess = narrowed(z_high, z_low)
    wide, middle = excess > 0.0, 0.5 * (z_high + z_low)
    above, upper = across(tl.where(wide, high, reference)), across(tl.where(wide, half, -middle))
    below, lower = across(tl.where(wide, low, reference)), across(tl.where(wide, -half, -middle))
    side = (x > across(reference)) | (x >= across(high))  # the midpoint of neighboring floats is one of them
    z = logits(x, tl.where(side, above, below), across(tau)) + tl.where(side, upper, lower)
    return tl.where(x > -INFINITY, exponential(tl.minimum(tl.maximum(z, -REACH), REACH)), 0.0)


@triton.jit
def is_ordinary(excess, tau, fixed):
    """Whether `odds_of` suffices for all rows of a tile: no narrowed gap, no extreme temperature, no fixed offset."""
    extreme = (excess > 0.0) | (tau < COLDEST) | (tau > HOTTEST) | fixed
    return tl.max(extreme.to(tl.int32), axis=0) == 0


@triton.jit
def odds_of(x, reference, z_high, z_low, tau):
    """A cheaper `narrow_gap` for ordinary rows. Very low scores may underflow; a score of -inf gives 0."""
    factor, shift = 1.0 / tau * LOG2_E, (z_high + z_low) * 0.5 * LOG2_E
    exponent = (tl.minimum(x, LARGEST) - across(reference)) * across(factor) - across(shift)
    return power_of_two(tl.minimum(exponent, REACH * LOG2_E))


@triton.jit
def tails_of(odds, weights, level):
    """Which items of a tile are above the threshold, their tails, those above it alone, and the slopes."""
    side = odds > across(level)
    tail = tl.minimum(odds, across(level)) * inverse_of(odds + across(level))
    weighted = tail
    if weights is not None:
        weighted = weights * tail
    return side, weighted, tl.where(side, 1.0, 0.0) * weighted, weighted - weighted * tail


@triton.jit
def sweep(odds, weights, level):
    """One pass over a tile: the mass above the threshold, the tails below and above it, and the slope of the mass."""
    side, both, upper, slope = tails_of(odds, weights, level)
    upper = sum_of(upper)
    # At the root neither tail is lost in their sum, or its error is negligible beside k. A maximum would hide a NaN.
    lower = sum_of(both) - upper
    return mass_of(side, weights), tl.where(lower < 0.0, 0.0, lower), upper, sum_of(slope)


@triton.jit
def deficit(above, k, offset, half, weights):
    """delta: k minus the mass above the threshold."""
    if weights is None:
        whole = tl.floor(k)
        delta = (whole.to(tl.int32) - above).to(tl.float32) + (k - whole)
    else:
        delta = rounded_deficit(k - above, offset, half, k, ROUNDING)
    return delta


@triton.jit
def newton(offset, least, most, done, last, steps, above, lower, upper, slope, half, k, weights):
    """One safeguarded Newton step, clipped to the midpoint of the bracket.

    After a small step, or at the limit, `last` is set. The next step is then the final one, and is not clipped.
    """
    size = step_size(lower, upper, slope, deficit(above, k, offset, half, weights), EPS, SMALLEST)
    least, most = tl.where(size > 0.0, offset, least), tl.where(size < 0.0, offset, most)
    reach = tl.where(last, INFINITY, 0.5 * (most - least))
    # Beyond the ceiling all tails are exponentials, for which the final step is exact.
    ceiling = tl.where(last, INFINITY, LOG_FARTHEST)
    moved = offset + tl.minimum(tl.maximum(size, -reach), reach)
    moved = tl.minimum(tl.maximum(moved, -ceiling), ceiling)
    offset = tl.where(done, offset, tl.where(size == size, moved, float("nan")))
    return offset, least, most, done | last, last | ~(tl.abs(size) > TOLERANCE) | (steps + 1 >= LIMIT)


@triton.jit
def approach(odds, k, fixed):
    """An offset near that of the search, and whether one step of `newton` suffices from there.

    These are Newton steps on the sum of the mask. They need half the instructions of `sweep`, and are used where k is
    not much larger than the slope of that sum. Otherwise the rounding of the sum would determine the step.
    """
    offset = 0.0 * k
    going, ready = ~fixed, fixed
    steps = 0
    while tl.max(going.to(tl.int32), axis=0) > 0:
        soft = odds * inverse_of(odds + across(exponential(offset)))
        mass = sum_of(soft)
        slope = mass - sum_of(soft * soft)
        size = (mass - k) * inverse_of(slope)
        going = going & (slope > mass * FLATTEST) & (tl.abs(size) < LONGEST_STEP)
        offset = tl.where(going, offset + size, offset)
        ready = ready | (going & (tl.abs(size) < TOLERANCE))
        steps += 1
        going = going & ~ready & (steps < LIMIT)
    return offset, ready


@triton.jit
def search(odds, weights, half, k, fixed, offset, last):
    """The offset from the middle of the gap, from a first guess; NaN if there is no solution."""
    least, most, done = offset - INFINITY, offset + INFINITY, fixed
    steps = 0
    while tl.min(done.to(tl.int32), axis=0) == 0:
        above, lower, upper, slope = sweep(odds, weights, tl.exp(offset))
        offset, least, most, done, last = newton(
            offset, least, most, done, last, steps, above, lower, upper, slope, half, k, weights
        )
        steps += 1
    return offset


@triton.jit
def ordinary_mask(odds, level):
    """The mask of ordinary rows, from the odds. It never exceeds 1."""
    return tl.minimum(odds * inverse_of(odds + across(level)), 1.0)


@triton.jit
def mask_of(odds, level, excess):
    """The mask from the odds, with the narrowing of the gap undone. No score lies in the gap. It never exceeds 1."""
    side, shrunk, level = odds > across(level), across(tl.exp(-excess)), across(level)
    smaller = tl.where(side, level, odds) * shrunk
    tail = smaller * inverse_of(smaller + tl.where(side, odds, level))
    return tl.where(side, 1.0 - tail, tail)


# --- tiles of rows


@triton.jit
def places(present, column, n, FULL: tl.constexpr):
    """Which elements of a tile are scores. If the tile is FULL, its columns are exactly those of a row."""
    inside = across(present)
    if not FULL:
        inside = inside & (column < n)
    return inside


@triton.jit
def load_tile(values, row, column, inside, step, other):
    """Load a tile of a matrix with the row stride `step`, which is 0 if all rows are the same."""
    return tl.load(values + across(row.to(tl.int64)) * step + column, mask=inside, other=other)


@triton.jit
def load_per_row(values, row, rows, step, other):
    """Load one value per row, or, with a stride of 0, the same for all rows."""
    return tl.load(values + row.to(tl.int64) * step, mask=row < rows, other=other)


@triton.jit
def load_kept(where, row, column, inside, step):
    """Whether the items of a tile are not removed by `where`."""
    kept = inside
    if where is not None:
        kept = kept & (load_tile(where, row, column, inside, step, 0) != 0)
    return kept


@triton.jit
def load_cotangent(u, row, column, kept, n):
    """The cotangent of the mask, 0 for the items that are removed, even if it is NaN there."""
    return load_tile(u, row, column, kept, n, 0.0).to(tl.float32)


@triton.jit
def load_raw(x_given, where, row, column, inside, n, where_step):
    """Load scores in float32, with -inf for removed items."""
    raw = load_tile(x_given, row, column, inside, n, -INFINITY).to(tl.float32)
    if where is not None:
        raw = tl.where(load_kept(where, row, column, inside, where_step), raw, -INFINITY)
    return raw


@triton.jit
def load_scores(x_given, where, row, column, inside, n, where_step):
    """Scores, with -inf for removed items and NaN; which items can be selected; and which are not NaN."""
    raw = load_raw(x_given, where, row, column, inside, n, where_step)
    x = tl.where(raw > -INFINITY, raw, -INFINITY)  # of a NaN too
    return x, x > -INFINITY, raw == raw


@triton.jit
def load_weights(weights_given, row, column, inside, able, step):
    """Weights, 0 for items that cannot be selected; the weights of all items; and which are valid or irrelevant."""
    weights = load_tile(weights_given, row, column, inside, step, 0.0)
    usable = (weights >= 0.0) & (weights < INFINITY)
    weights = tl.where(usable, weights, 0.0)
    return tl.where(able, weights, 0.0), weights, usable | ~able


@triton.jit
def load_numbers(k_given, tau_given, row, rows, k_step, tau_step):
    """k and tau, replaced by 0 and 1 if either is out of its range, and whether both are in range."""
    k = load_per_row(k_given, row, rows, k_step, 0.0)
    tau = load_per_row(tau_given, row, rows, tau_step, 1.0)
    valid = (tau > 0.0) & (tau <= LARGEST) & (k >= -LARGEST) & (k <= LARGEST)
    return tl.where(valid, k, 0.0), tl.where(valid, tau, 1.0), valid


@triton.jit
def store_settled(found, flags, row, rows, present, reference, offset, z_high, z_low, nothing, everything, valid, most):
    """Store the outputs of the solver primitive of `softk._reference.threshold.solve`."""
    tl.store(found + row, reference, mask=present)
    tl.store(found + rows + row, offset, mask=present)
    tl.store(found + 2 * rows + row, z_high, mask=present)
    tl.store(found + 3 * rows + row, z_low, mask=present)
    tl.store(flags + row, nothing, mask=present)
    tl.store(flags + rows + row, everything, mask=present)
    tl.store(flags + 2 * rows + row, valid, mask=present)
    tl.store(flags + 3 * rows + row, most, mask=present)


@triton.jit
def final_offset(offset, nothing, everything, valid):
    offset = tl.where(nothing, SATURATED, tl.where(everything, -SATURATED, offset))
    return tl.where(valid, offset, float("nan"))


@triton.jit
def finish(x, odds, level, excess, weights, reference, tau, offset, nothing, everything, valid):
    """The mask of a tile that may have narrowed gaps, fixed offsets or weights."""
    if weights is None:
        soft = mask_of(odds, level, excess)
        soft = tl.where(across(nothing) | (odds == 0.0), 0.0, tl.where(across(everything), 1.0, soft))
        soft = tl.where(across(valid), soft, float("nan"))
    else:
        # An item without weight may lie within a gap.
        soft = sigmoid(logits(x, across(reference), across(tau)) - across(offset))
    return soft


@triton.jit(do_not_specialize=["rows"])
def solve_tile(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    mask,
    offset_found,
    reference_found,
    found,
    flags,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
):
    """Solve a tile of rows: write the mask and the threshold, or, without `mask`, the outputs of the solver."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), columns(0, CHUNKS, WIDTH)
    present = row < rows
    inside = places(present, column, n, FULL)
    raw = load_raw(x_given, where, row, column, inside, n, where_step)
    x = tl.where(raw > -INFINITY, raw, -INFINITY)  # of a NaN too
    k, tau, valid = load_numbers(k_given, tau_given, row, rows, k_step, tau_step)
    weights, of_all = None, 0.0 * row
    if weights_given is not None:
        weights, all_weights, usable = load_weights(weights_given, row, column, inside, x > -INFINITY, weights_step)
        of_all, valid = sum_of(all_weights), valid & (max_of(tl.where(usable, 0.0, 1.0)) == 0.0)
    lowest, total, sound = census(raw, x, inside, n, weights)
    valid = valid & sound
    k = tl.where(valid, k, 0.0)
    near = tau  # a score within tau of the gap is as good a reference, except for the hard mask, which needs the gap
    if mask is None:
        near = 0.0 * tau
    high, low, nothing, everything, valid = find_ends(x, weights, lowest, total, of_all, k, n, near, valid)
    most = high > LARGEST
    high, low, reference, z_high, z_low = reference_of(high, low, tau)
    half, excess = narrowed(z_high, z_low)
    fixed = nothing | everything | ~valid  # these rows need no search
    ordinary = is_ordinary(excess, tau, fixed & present)
    if ordinary:
        odds = odds_of(x, reference, z_high, z_low, tau)
    else:
        odds = narrow_gap(x, high, low, reference, z_high, z_low, tau)
    guess, ready = half - half, fixed
    if weights is None and ordinary:
        guess, ready = approach(odds, k, fixed)
    offset = search(odds, weights, half, k, fixed, guess, ready)
    valid = valid & (offset == offset)
    level = tl.exp(offset)
    offset += 0.5 * (z_high + z_low)  # the search measures it from the middle of the gap
    if mask is None:
        store_settled(
            found, flags, row, rows, present, reference, offset, z_high, z_low, nothing, everything, valid, most
        )
    else:
        offset = final_offset(offset, nothing, everything, valid)
        tl.store(reference_found + row, reference, mask=present)
        tl.store(offset_found + row, offset, mask=present)
        if weights is None and ordinary:
            soft = ordinary_mask(odds, level)
        else:
            soft = finish(x, odds, level, excess, weights, reference, tau, offset, nothing, everything, valid)
        tl.store(mask + across(row.to(tl.int64)) * n + column, soft, mask=inside)


# --- the rule in reverse


@triton.jit
def weigh(weights, values):
    """weights * values. The weight is ignored where the value is negligible, as of a removed item."""
    found = values
    if weights is not None:
        found = tl.where(values > 2.0 * LEAST, weights, 0.0) * values
    return found


@triton.jit
def log_odds(x, reference, tau, offset):
    """z, clipped to the largest distance that still contributes to a derivative."""
    z = logits(x, across(reference), across(tau)) - across(offset)
    return tl.minimum(tl.maximum(z, -FARTHEST), FARTHEST)


@triton.jit
def distance_of(z, inside, weights):
    """|z| of the items of positive weight, infinite for the others."""
    distance = tl.where(inside, tl.abs(z), INFINITY)
    if weights is not None:
        distance = tl.where(weights == 0.0, INFINITY, distance)
    return distance


@triton.jit
def nearest_of(z, inside, weights):
    """The smallest |z| of the items of positive weight."""
    # A score at the largest distance does not contribute to a derivative, even if it is the nearest.
    return tl.minimum(min_of(distance_of(z, inside, weights)), 0.5 * FARTHEST)


@triton.jit
def from_nearest(z, inside, weights, nearest):
    """|z| minus that of the nearest item of positive weight. Only an item of weight 0 can be nearer."""
    distance = tl.where(inside, tl.abs(z), INFINITY) - across(nearest)
    if weights is not None:
        distance = tl.maximum(distance, -LOG_FARTHEST)
    return distance


@triton.jit
def edge_of(x, z, inside, weights):
    """The scores of positive weight above the threshold, else inf; and those below it, else -inf."""
    upper, x = z > 0.0, tl.minimum(x, LARGEST)
    counted = inside
    if weights is not None:
        counted = counted & (weights != 0.0)
    return tl.where(counted & upper, x, INFINITY), tl.where(counted & ~upper, x, -INFINITY)


@triton.jit
def edges_of(x, z, inside, weights):
    """The scores of positive weight nearest to the threshold above and below it; infinite if there are none."""
    above, below = edge_of(x, z, inside, weights)
    return min_of(above), max_of(below)


@triton.jit
def sides_of(high, low, reference, tau, offset):
    """The origin of each side: its nearest score of positive weight, |z| of that score, and a correction.

    If a side has no such score, its items of weight 0 are measured from the nearest score on the other side, with the
    correction.
    """
    no_high, no_low = high == INFINITY, low == -INFINITY
    high, low = tl.minimum(high, LARGEST), tl.maximum(low, -LARGEST)
    above = tl.minimum(tl.abs(logits(high, reference, tau) - offset), 0.5 * FARTHEST)
    below = tl.minimum(tl.abs(logits(low, reference, tau) - offset), 0.5 * FARTHEST)
    across_high, across_low = tl.where(no_high, 2.0 * below, 0.0), tl.where(no_low, 2.0 * above, 0.0)
    above, below = tl.where(no_high, below, above), tl.where(no_low, above, below)
    return tl.where(no_high, low, high), tl.where(no_low, high, low), above, below, across_high, across_low


@triton.jit
def from_sides(x, z, inside, weights, high, low, above, below, across_high, across_low, tau):
    """|z| minus that of the nearest item of positive weight on the same side, and exp(-|z|) of that item."""
    upper = z > 0.0
    distance = logits(x, tl.where(upper, across(high), across(low)), across(tau))
    distance = tl.where(upper, distance, -distance)
    if weights is not None:
        distance -= tl.where(upper, across(across_high), across(across_low))
        distance = tl.maximum(distance, -LOG_FARTHEST)
    height = tl.where(upper, across(tl.exp(-above)), across(tl.exp(-below)))
    return tl.where(inside, distance, INFINITY), height


@triton.jit
def tail_of(distance, height):
    """The smaller of the mask and its complement, in units of `height`, and the inverse of the larger."""
    decay = tl.where(-distance > LOG_LEAST, tl.exp(-distance), 0.0)
    larger = height * decay + 1.0
    return decay / larger, larger


@triton.jit
def balance_of(mass, low, high, k, above, below, weights):
    """|z| of the nearest item, and the factors that bring the tails below and above to common units."""
    if weights is None:
        whole = tl.floor(k)
        delta = (whole.to(tl.int32) - mass).to(tl.float32) + (k - whole)
    else:
        delta = k - mass
    exact = (high > 0.0) & (low > 0.0)
    if weights is not None:
        exact, delta = exact & is_rounding(delta, k, ROUNDING), 0.0 * delta
    high, low = tl.where(exact, high, 1.0), tl.where(exact, low, 1.0)
    middle = 0.5 * (above + below)
    share = share_of(delta, high, low, middle, LOG_FARTHEST)
    # In a wider gap, a k that differs from the count above puts the threshold beside one side, whose z is accurate.
    # The same holds with weights if the mass above misses k by more than a rounding. The other side may be far away.
    beside = is_beside(exact, delta, middle, LOG_FARTHEST)
    share = tl.where(beside, 0.5 * (above - below), share)
    less, more = tl.exp(share - tl.abs(share)), tl.exp(-share - tl.abs(share))
    # A score at the largest distance does not contribute to a derivative, even if it is the nearest.
    less, more = tl.where(below < 0.5 * FARTHEST, less, 0.0), tl.where(above < 0.5 * FARTHEST, more, 0.0)
    return tl.where(beside, tl.minimum(above, below), middle - tl.abs(share)), less, more


@triton.jit
def balance(z, tail, weights, k, above, below):
    """`balance_of`, from the tails of a tile."""
    upper, weighted = z > 0.0, weigh(weights, tail)
    if weights is None:
        mass = sum_of(upper.to(tl.int32))
    else:
        mass = sum_of(tl.where(upper, weights, 0.0))
    low, high = sum_of(tl.where(upper, 0.0, weighted)), sum_of(tl.where(upper, weighted, 0.0))
    return balance_of(mass, low, high, k, above, below, weights)


@triton.jit
def rates(nearest, normal):
    """1 / V' and 1 / V."""
    rate = rate_of(normal, FARTHEST)
    return rate, tl.minimum(tl.exp(tl.minimum(nearest, LOG_FARTHEST)) * rate, FARTHEST)


@triton.jit
def gain_of(z, scaled, height, weights):
    """v: the derivative of the mask in z. With weights v' may be clipped, so v is computed from z."""
    if weights is None:
        gain = across(height) * scaled
    else:
        gain = sigmoid(tl.abs(z)) * sigmoid(-tl.abs(z))
    return gain


@triton.jit
def spaced(x, origin, tau):
    """(x - x_ref) / tau, clipped to the largest distance of a derivative. x_ref is a score that has much of p."""
    z = logits(x, across(origin), across(tau))
    return tl.minimum(tl.maximum(z, -FARTHEST), FARTHEST)


@triton.jit
def level_of(origin, reference, tau):
    """(x_ref - reference) / tau, clipped in the same way."""
    return tl.minimum(tl.maximum(logits(origin, reference, tau), -FARTHEST), FARTHEST)


@triton.jit
def cotangent_of(x, u, gain, scaled, weights, normal, g, tau):
    """The cotangent of the scores, from u and g measured relative to the level of u. A score of +inf has none."""
    xbar = u * gain + weigh(weights, scaled) / across(normal) * across(g)
    return tl.where(x < INFINITY, xbar / across(tau), 0.0)


@triton.jit(do_not_specialize=["rows"])
def pull_tile(
    x_given,
    k_given,
    tau_given,
    weights_given,
    where,
    offset_given,
    reference_given,
    u_given,
    c_given,
    of_x,
    of_k,
    of_tau,
    of_weights,
    n,
    rows,
    k_step,
    tau_step,
    weights_step,
    where_step,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
):
    """Compute the requested cotangents from u, the cotangent of the mask, and c, that of the offset."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), columns(0, CHUNKS, WIDTH)
    present = row < rows
    inside = places(present, column, n, FULL)
    kept = load_kept(where, row, column, inside, where_step)
    x = load_tile(x_given, row, column, kept, n, -INFINITY).to(tl.float32)
    k = load_per_row(k_given, row, rows, k_step, 0.0)
    tau = load_per_row(tau_given, row, rows, tau_step, 1.0)
    offset = load_per_row(offset_given, row, rows, 1, 0.0)
    reference = load_per_row(reference_given, row, rows, 1, 0.0)
    weights = None
    if weights_given is not None:
        weights = load_tile(weights_given, row, column, inside, weights_step, 0.0)
    c = tl.zeros([ROWS], tl.float32)
    if c_given is not None:
        c = load_per_row(c_given, row, rows, 1, 0.0)

    z = log_odds(x, reference, tau, offset)
    # The derivatives in k, tau and the weights need p exactly in a gap. The derivative in the scores underflows there.
    if (of_k is not None) | (of_tau is not None) | (of_weights is not None):
        high, low = edges_of(x, z, inside, weights)
        high, low, above, below, across_high, across_low = sides_of(high, low, reference, tau, offset)
        distance, side = from_sides(x, z, inside, weights, high, low, above, below, across_high, across_low, tau)
        scaled, larger = tail_of(distance, side)
        nearest, less, more = balance(z, scaled, weights, k, above, below)
        scaled *= tl.where(z > 0.0, across(more), across(less))
    else:
        nearest = nearest_of(z, inside, weights)
        scaled, larger = tail_of(from_nearest(z, inside, weights, nearest), across(tl.exp(-nearest)))
    height = tl.exp(-nearest)
    scaled /= larger
    weighted = weigh(weights, scaled)
    normal = safe_denominator(sum_of(weighted))
    most = weighted > across(normal * DOMINANCE)  # the item that dominates p, if there is one
    held = max_of(most.to(tl.int32)) > 0
    rate, inverse_slope = rates(nearest, normal)

    # Subtract a multiple of the weights from u: the one that equals u at the item that dominates p, or their mean.
    u = load_cotangent(u_given, row, column, kept, n)
    pulled, at_most = sum_of(scaled * u), sum_of(tl.where(most, u, 0.0))
    hbar = rate * pulled - inverse_slope * c
    if weights is None:
        level = across(tl.where(held, at_most, pulled / normal))
    else:
        share = tl.where(scaled > 0.0, weights, 0.0)
        unit = tl.where(held, sum_of(tl.where(most, share, 0.0)), max_of(share))
        share /= across(safe_denominator(unit))  # weights may be of any size
        level = share * across(tl.where(held, at_most, pulled / safe_denominator(sum_of(scaled * share))))
        level = tl.where(most, u, level)  # exactly u, which the rounded product need not be
    gain = gain_of(z, scaled, height, weights)
    # p g cancels the rest of the weighted mean of u, and adds the cotangent c of the offset.
    g = c - sum_of((u - level) * gain)
    xbar = cotangent_of(x, u - level, gain, scaled, weights, normal, g, tau)
    # An invalid row has a NaN offset, which its cotangents must show. A removed score has the cotangent 0.
    bad = offset != offset
    invalid = tl.where(kept, float("nan"), 0.0)
    place = across(row.to(tl.int64)) * n + column
    if of_x is not None:
        tl.store(of_x + place, tl.where(across(bad), invalid, xbar), mask=inside)
    if of_k is not None:
        tl.store(of_k + row, tl.where(bad, float("nan"), hbar), mask=present)
    if of_tau is not None:
        # Measure z from a score that has much of p, since differences of z itself are lost in its rounding.
        origin = min_of(tl.where(inside & (weighted >= across(max_of(weighted))), x, INFINITY))
        origin = tl.minimum(tl.maximum(origin, -LARGEST), LARGEST)
        taubar = -sum_of(spaced(x, origin, tau) * xbar) - c * level_of(origin, reference, tau) / tau
        tl.store(of_tau + row, tl.where(bad, float("nan"), taubar), mask=present)
    if of_weights is not None:
        abar = -sigmoid(z) * across(hbar)
        tl.store(of_weights + place, tl.where(across(bad), float("nan"), abar), mask=inside)
