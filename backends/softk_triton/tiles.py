r"""The soft top-k mask and its derivative as fused kernels, in Triton, for float16, bfloat16 and float32.

They are the solver and the rule of `softk._reference.threshold` over again, for a processor that computes faster than
it reads: a tile of rows is loaded once, solved in registers and written once. The mathematics stands there, and names
here are the names there. What differs is how things are found, not what is found:

- **The scores at the gap** are selected by counting. Floats ordered as integers are bracketed; the pivot is where the
  log-odds of the mass above it would be right were they linear in between, or the middle of the bracket where the last
  one did not halve it. It ends where the count is right, or the bracket is narrow beside the temperature.
- **Counts** are integers, and so is the whole part of k: a float32 does not count beyond 2^24.
- **The logarithm** of `operations` is a series near 1.

A sum over a row is a tree that depends on the row's length alone: the same input gives the same bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from softk._reference.threshold import formulas
from softk._reference.threshold.limits import ROUNDINGS, STEPS, limits, negligible, widest_gap

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
TOLERANCE = tl.constexpr(_BOUND.eps**0.25)
SMALLEST = tl.constexpr(torch.finfo(torch.float32).smallest_normal)
ROUNDING = tl.constexpr(ROUNDINGS * _BOUND.eps)
LIMIT = tl.constexpr(STEPS)
LOG2_E = tl.constexpr(math.log2(math.e))
INFINITY = tl.constexpr(math.inf)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_FORMULAS = formulas.load(operations, triton.jit, tl=tl)  # the interpreter looks for its name
step_size, midpoint, excess_of = _FORMULAS.step_size, _FORMULAS.midpoint, _FORMULAS.excess_of
rate_of = _FORMULAS.rate_of
rounded_deficit, is_rounding = _FORMULAS.deficit, _FORMULAS.is_rounding
share_of, is_beside = _FORMULAS.balance, _FORMULAS.is_beside
#: Temperatures whose inverse is a number, with room for products.
COLDEST, HOTTEST = tl.constexpr(2.0**-60), tl.constexpr(2.0**60)


@triton.jit
def probe(place):
    """The least that a kernel can do, to see whether kernels run at all."""
    tl.store(place, 1.0)


# --- tiles: (rows, chunks of a row, columns of a chunk)


@triton.jit
def columns(start, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """The columns of a tile.

    The threads of a warp lie along the last axis, then along the first: few columns in a chunk give it several rows.
    """
    return start + tl.arange(0, CHUNKS)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def across(values):
    """One value a row, for a tile."""
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
    """An integer that is ordered as the float is; its own inverse but for the type. -0 must have been made 0."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def score_of(key):
    bits = tl.where(key >= 0, key, key ^ 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def inverse(tau):
    """1 / tau in two factors, neither of which over- or underflows."""
    scale = tl.where(tau < COLDEST, 2.0**60, tl.where(tau > HOTTEST, 2.0**-60, 1.0))
    return 1.0 / (tau * scale), scale


@triton.jit
def logits(x, reference, tau):
    """(x - reference) / tau, not clipped: what is far away is as good as infinite, in either direction."""
    factor, scale = inverse(tau)
    small = tl.minimum(scale, 1.0)  # beside a large tau scores are made smaller before their difference overflows
    return (tl.minimum(x, LARGEST) * small - reference * small) * factor * tl.maximum(scale, 1.0)


@triton.jit
def sigmoid(z):
    decay = tl.exp(-tl.abs(z))
    return tl.where(z > 0.0, 1.0, decay) / (1.0 + decay)


@triton.jit
def inverse_of(b):
    """1 / b for b well within the range of the numbers: one instruction, within 1 rounding."""
    if INTERPRETED:
        return 1.0 / b
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [b], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def power_of_two(exponent):
    """2 to a power: one instruction, within 2 roundings, and 0 below the normal numbers."""
    if INTERPRETED:
        return tl.exp2(exponent)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [exponent], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def exponential(exponent):
    """exp, and 0 below the normal numbers."""
    return power_of_two(exponent * LOG2_E)


@triton.jit
def safe_denominator(values):
    return tl.where(values == 0.0, 1.0, values)


# --- the scores at the gap


@triton.jit
def rarity(mass, total, little):
    """The log-odds of a mass, finite at both ends: nearly linear in the score where scores are bell-shaped."""
    return tl.log2((mass + little) / (total - mass + little))


@triton.jit
def going_on(low, high, mass, bar, lower_bar, near, weights):
    """Whether the bracket is too wide yet.

    Not so if `low` is the key; if it has the least count that will do; or if its score is so near that of `high` that
    the threshold is next to both, and the next score, across a gap, is not wanted.
    """
    going = low < high
    if weights is None:
        going = going & (mass > bar + 1)
    return going & ~((mass > lower_bar) & (score_of(high) - score_of(low) < near))


@triton.jit
def mass_of(chosen, weights):
    """The mass of the chosen items of a tile: their number, which floats add up exactly in a tile, or their weight."""
    if weights is None:
        mass = sum_of(tl.where(chosen, 1.0, 0.0)).to(tl.int32)
    else:
        mass = sum_of(tl.where(chosen, weights, 0.0))
    return mass


@triton.jit
def select(x, weights, low, high, mass, bar, lower_bar, near, total, little):
    """A lower bound of the largest key at or above which there is more mass than `bar`, and that mass.

    Nothing lies between the bound and the key, unless it is nearer than `near`. There is `mass` > bar at or above
    `low`, and less, or none, beyond `high`. Without weights a mass is a count. Keys bracket, and scores are compared.
    """
    going = going_on(low, high, mass, bar, lower_bar, near, weights)
    first, last = rarity(total, total, little), rarity(0.0 * total, total, little)
    aim = rarity(bar + little, total, little)
    halve = going != going
    while tl.max(going.to(tl.int32), axis=0) > 0:
        middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)  # the mean, rounded up; nothing overflows
        share = tl.minimum(tl.maximum((aim - first) / tl.minimum(last - first, -LEAST), 0.0), 1.0)
        x_low, x_high = tl.maximum(score_of(low), -LARGEST), tl.minimum(score_of(high), LARGEST)
        pivot = tl.where(halve, middle, key_of(x_low * (1.0 - share) + x_high * share + 0.0))
        pivot = tl.minimum(tl.maximum(pivot, low + 1), high)
        found = mass_of(x >= across(score_of(pivot)), weights)
        rare = rarity(found.to(tl.float32), total, little)
        enough, width = found > bar, high.to(tl.int64) - low.to(tl.int64)
        raised, lowered = going & enough, going & ~enough
        low, mass, first = tl.where(raised, pivot, low), tl.where(raised, found, mass), tl.where(raised, rare, first)
        high, last = tl.where(lowered, pivot - 1, high), tl.where(lowered, rare, last)
        halve = 2 * (high.to(tl.int64) - low.to(tl.int64)) > width
        going = going_on(low, high, mass, bar, lower_bar, near, weights)
    return low, mass


@triton.jit
def beside(x, low):
    """The scores on either side of a lower bound, which is a key; infinite where there is none."""
    above = x >= across(score_of(low))
    return min_of(tl.where(above, x, INFINITY)), max_of(tl.where(above, -INFINITY, x))


@triton.jit
def bars(k, weights):
    """What the mass at and above the two sides of the gap exceeds, and the mass above them does not."""
    if weights is None:
        upper, lower = tl.ceil(k).to(tl.int32) - 1, tl.floor(k).to(tl.int32)
    else:
        # A user's sum of weights is rounded in another way, so k is a short interval, with its lower end.
        upper, lower = score_of(key_of(k * (1.0 - ROUNDING)) - 1), k * (1.0 + ROUNDING)
    return upper, lower


@triton.jit
def extent(k, total, of_all, n, weights):
    """Whether everything is selected, and whether there is as much: of what can be selected, and of all items."""
    if weights is None:
        everything, valid = tl.floor(k).to(tl.int32) >= total, (k >= 0.0) & (k <= n)
    else:
        # Two sums of n weights, each added up in an order of its own, are apart by at most a rounding an item.
        everything = k >= total * (1.0 - ROUNDING)
        valid = (k >= of_all * -ROUNDING) & (k - of_all <= of_all * (ROUNDING + n * EPS))
    return (k > 0.0) & everything, valid


@triton.jit
def census(raw, x, inside, n, weights):
    """Of a tile: the lowest score that can be selected, what mass can be, and whether all scores are sound.

    Usually all scores are finite, and need not be looked at again.
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
    """The scores on either side of the gap; whether nothing is selected, everything, and there is an answer.

    What cannot be selected has the score -inf; `of_all` is the weight of all items. Where both sides are nearer than
    `near`, any score next to them will do.
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
    lowest = tl.where(bar < total, lowest, -INFINITY)
    everything, enough = extent(k, total, of_all, n, weights)
    valid = valid & enough
    start = tl.where(valid & ~nothing & ~everything, first, last)
    mass = total.to(tl.float32)
    low, reached = select(counted, weights, start, last, total, bar, lower_bar, near, mass, little)
    upper, lower = beside(counted, low)
    apart = reached <= lower_bar
    if weights is not None:
        below = key_of(lower + 0.0)
        start = tl.where(apart & (first < below), first, below)
        below, _ = select(counted, weights, start, below, total, lower_bar, lower_bar, 0.0 * near, mass, little)
        lower = score_of(below)
    high = tl.where(nothing, highest, tl.where(everything, lowest, upper))
    return high, tl.where(nothing | everything | ~apart | (lower == -INFINITY), high, lower), nothing, everything, valid


# --- the threshold


@triton.jit
def reference_of(high, low, tau):
    """Both sides of the gap as finite scores, the reference, and z of the two."""
    high = tl.minimum(tl.maximum(high, -LARGEST), LARGEST)
    low = tl.minimum(tl.maximum(low, -LARGEST), LARGEST)
    reference = midpoint(high, low)
    # As far apart as a derivative still sees.
    z_high = tl.minimum(logits(high, reference, tau), FARTHEST)
    return high, low, reference, z_high, tl.maximum(logits(low, reference, tau), -FARTHEST)


@triton.jit
def narrowed(z_high, z_low):
    """Half a gap that is not too wide, and what either side of it came closer by."""
    half = 0.5 * (z_high - z_low)
    return tl.minimum(half, NARROW), excess_of(half, NARROW)


@triton.jit
def narrow_gap(x, high, low, reference, z_high, z_low, tau):
    """exp(z) from the middle of the gap, narrowed.

    On either side of a gap that is narrowed z is measured from its score, for in a wide one the narrowing itself would
    be rounded away.
    """
    half, excess = narrowed(z_high, z_low)
    wide, middle = excess > 0.0, 0.5 * (z_high + z_low)
    above, upper = across(tl.where(wide, high, reference)), across(tl.where(wide, half, -middle))
    below, lower = across(tl.where(wide, low, reference)), across(tl.where(wide, -half, -middle))
    side = x > across(reference)
    z = logits(x, tl.where(side, above, below), across(tau)) + tl.where(side, upper, lower)
    return tl.where(x > -INFINITY, exponential(tl.minimum(tl.maximum(z, -REACH), REACH)), 0.0)


@triton.jit
def is_ordinary(excess, tau, fixed):
    """Whether no row of a tile needs more care than `odds_of` takes: for a gap, for the temperature, or altogether."""
    extreme = (excess > 0.0) | (tau < COLDEST) | (tau > HOTTEST) | fixed
    return tl.max(extreme.to(tl.int32), axis=0) == 0


@triton.jit
def odds_of(x, reference, z_high, z_low, tau):
    """What `narrow_gap` finds, but for far scores, where a gap is not narrowed: 0 for a score of -inf."""
    factor, shift = 1.0 / tau * LOG2_E, (z_high + z_low) * 0.5 * LOG2_E
    exponent = (tl.minimum(x, LARGEST) - across(reference)) * across(factor) - across(shift)
    return power_of_two(tl.minimum(exponent, REACH * LOG2_E))


@triton.jit
def sweep(odds, weights, level):
    """Above the threshold: how many, or how much; the tails below and above it, and the slope of the mass."""
    side = odds > across(level)
    tail = tl.minimum(odds, across(level)) * inverse_of(odds + across(level))
    weighted = tail
    if weights is not None:
        weighted = weights * tail
    above, both = mass_of(side, weights), sum_of(weighted)
    upper = sum_of(tl.where(side, 1.0, 0.0) * weighted)
    # At the root neither tail is lost in their sum, or what it lacks is nothing beside k. A maximum would hide a NaN.
    lower = both - upper
    return above, tl.where(lower < 0.0, 0.0, lower), upper, both - sum_of(weighted * tail)


@triton.jit
def deficit(above, k, offset, half, weights):
    """delta: what the mass above the threshold lacks of k."""
    if weights is None:
        whole = tl.floor(k)
        delta = (whole.to(tl.int32) - above).to(tl.float32) + (k - whole)
    else:
        delta = rounded_deficit(k - above, offset, half, k, ROUNDING)
    return delta


@triton.jit
def newton(offset, least, most, done, last, steps, above, lower, upper, slope, half, k, weights):
    """One step, within the middle of a bracket; after a small one a last one, as exact as the numbers are."""
    size = step_size(lower, upper, slope, deficit(above, k, offset, half, weights), EPS, SMALLEST)
    least, most = tl.where(size > 0.0, offset, least), tl.where(size < 0.0, offset, most)
    reach = tl.where(last, INFINITY, 0.5 * (most - least))
    # Beyond it on either side all tails are exponentials, of which the last step is exact.
    ceiling = tl.where(last, INFINITY, LOG_FARTHEST)
    moved = offset + tl.minimum(tl.maximum(size, -reach), reach)
    moved = tl.minimum(tl.maximum(moved, -ceiling), ceiling)
    offset = tl.where(done, offset, tl.where(size == size, moved, float("nan")))
    return offset, least, most, done | last, last | ~(tl.abs(size) > TOLERANCE) | (steps + 1 >= LIMIT)


@triton.jit
def search(odds, weights, half, k, fixed):
    """The offset from the middle of the gap, NaN where there is none."""
    offset = half - half
    least, most, done, last = offset - INFINITY, offset + INFINITY, fixed, fixed
    steps = 0
    while tl.min(done.to(tl.int32), axis=0) == 0:
        above, lower, upper, slope = sweep(odds, weights, tl.exp(offset))
        offset, least, most, done, last = newton(
            offset, least, most, done, last, steps, above, lower, upper, slope, half, k, weights
        )
        steps += 1
    return offset


@triton.jit
def mask_of(odds, level, excess):
    """The mask from the odds, on either side of a gap that was narrowed; nothing lies within it. Never more than 1."""
    side, shrunk, level = odds > across(level), across(tl.exp(-excess)), across(level)
    smaller = tl.where(side, level, odds) * shrunk
    tail = smaller * inverse_of(smaller + tl.where(side, odds, level))
    return tl.where(side, 1.0 - tail, tail)


# --- tiles of rows


@triton.jit
def places(present, column, n, FULL: tl.constexpr):
    """Which places of a tile are scores: all of a row that is there if the tile is FULL."""
    inside = across(present)
    if not FULL:
        inside = inside & (column < n)
    return inside


@triton.jit
def load_tile(values, row, column, inside, step, other):
    """A tile of a matrix whose rows are `step` apart: 0 where one row serves all."""
    return tl.load(values + across(row.to(tl.int64)) * step + column, mask=inside, other=other)


@triton.jit
def load_per_row(values, row, rows, step, other):
    """One value a row, or, with a step of 0, the same for all."""
    return tl.load(values + row.to(tl.int64) * step, mask=row < rows, other=other)


@triton.jit
def load_kept(where, row, column, inside, step):
    """The items that are not removed, of a tile."""
    kept = inside
    if where is not None:
        kept = kept & (load_tile(where, row, column, inside, step, 0) != 0)
    return kept


@triton.jit
def load_cotangent(u, row, column, kept, n):
    """That of the mask, zero for the items that are removed, whatever stands there."""
    return load_tile(u, row, column, kept, n, 0.0).to(tl.float32)


@triton.jit
def load_raw(x_given, where, row, column, inside, n, where_step):
    """Scores as they are, -inf for what is removed."""
    raw = load_tile(x_given, row, column, inside, n, -INFINITY).to(tl.float32)
    if where is not None:
        raw = tl.where(load_kept(where, row, column, inside, where_step), raw, -INFINITY)
    return raw


@triton.jit
def load_scores(x_given, where, row, column, inside, n, where_step):
    """Scores, -inf for what is removed or no number; the items that can be selected; and which are sound."""
    raw = load_raw(x_given, where, row, column, inside, n, where_step)
    x = tl.where(raw > -INFINITY, raw, -INFINITY)  # of a NaN too
    return x, x > -INFINITY, raw == raw


@triton.jit
def load_weights(weights_given, row, column, inside, able, step):
    """Weights, 0 for what cannot be selected; those of all items; and which are sound: in range, or of no matter."""
    weights = load_tile(weights_given, row, column, inside, step, 0.0)
    usable = (weights >= 0.0) & (weights < INFINITY)
    weights = tl.where(usable, weights, 0.0)
    return tl.where(able, weights, 0.0), weights, usable | ~able


@triton.jit
def load_numbers(k_given, tau_given, row, rows, k_step, tau_step):
    """k and tau, harmless where they are out of their ranges, and whether they are within."""
    k = load_per_row(k_given, row, rows, k_step, 0.0)
    tau = load_per_row(tau_given, row, rows, tau_step, 1.0)
    valid = (tau > 0.0) & (tau <= LARGEST) & (k >= -LARGEST) & (k <= LARGEST)
    return tl.where(valid, k, 0.0), tl.where(valid, tau, 1.0), valid


@triton.jit
def store_settled(found, flags, row, rows, present, reference, offset, z_high, z_low, nothing, everything, valid, most):
    """What `softk._reference.threshold.solve` settles to."""
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
    """The mask."""
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
    """The threshold of each row and its mask; or, with `found` and `flags`, what the solver settles to."""
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
    near = tau  # a score that near is as good a reference as the one at the gap, but not for the hard mask
    if mask is None:
        near = 0.0 * tau
    high, low, nothing, everything, valid = find_ends(x, weights, lowest, total, of_all, k, n, near, valid)
    most = high > LARGEST
    high, low, reference, z_high, z_low = reference_of(high, low, tau)
    half, excess = narrowed(z_high, z_low)
    fixed = nothing | everything | ~valid
    ordinary = is_ordinary(excess, tau, fixed & present)
    if ordinary:
        odds = odds_of(x, reference, z_high, z_low, tau)
    else:
        odds = narrow_gap(x, high, low, reference, z_high, z_low, tau)
    offset = search(odds, weights, half, k, fixed)
    valid = valid & (offset == offset)
    level = tl.exp(offset)
    offset += 0.5 * (z_high + z_low)
    if mask is None:
        store_settled(
            found, flags, row, rows, present, reference, offset, z_high, z_low, nothing, everything, valid, most
        )
    else:
        offset = final_offset(offset, nothing, everything, valid)
        tl.store(reference_found + row, reference, mask=present)
        tl.store(offset_found + row, offset, mask=present)
        if weights is None and ordinary:
            soft = tl.minimum(odds * inverse_of(odds + across(level)), 1.0)
        else:
            soft = finish(x, odds, level, excess, weights, reference, tau, offset, nothing, everything, valid)
        tl.store(mask + across(row.to(tl.int64)) * n + column, soft, mask=inside)


# --- the rule in reverse


@triton.jit
def weigh(weights, values):
    """weights * values, where the weight of an item with next to no value may be anything."""
    found = values
    if weights is not None:
        found = tl.where(values > 2.0 * LEAST, weights, 0.0) * values
    return found


@triton.jit
def log_odds(x, reference, tau, offset):
    """z, clipped to the farthest distance that a derivative still sees."""
    z = logits(x, across(reference), across(tau)) - across(offset)
    return tl.minimum(tl.maximum(z, -FARTHEST), FARTHEST)


@triton.jit
def nearest_of(z, inside, weights):
    """The least |z| of the items that have weight."""
    distance = tl.where(inside, tl.abs(z), INFINITY)
    if weights is not None:
        distance = tl.where(weights == 0.0, INFINITY, distance)
    # A score at the farthest distance has no part in the derivative, though it be the nearest.
    return tl.minimum(min_of(distance), 0.5 * FARTHEST)


@triton.jit
def from_nearest(z, inside, weights, nearest):
    """|z| less that of the nearest item; only one without weight comes closer."""
    distance = tl.where(inside, tl.abs(z), INFINITY) - across(nearest)
    if weights is not None:
        distance = tl.maximum(distance, -LOG_FARTHEST)
    return distance


@triton.jit
def edges_of(x, z, inside, weights):
    """The scores, with weight, that are nearest to the threshold on either side; infinite where there is none."""
    upper, x = z > 0.0, tl.minimum(x, LARGEST)
    counted = inside
    if weights is not None:
        counted = counted & (weights != 0.0)
    high = min_of(tl.where(counted & upper, x, INFINITY))
    return high, max_of(tl.where(counted & ~upper, x, -INFINITY))


@triton.jit
def sides_of(high, low, reference, tau, offset):
    """What either side is measured from: its nearest score with weight, |z| of that one, and what is across from it.

    Where there is none, weightless items are measured from the nearest on the other side.
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
    """|z| less that of the nearest item with weight on the same side, and exp(-|z|) of that one."""
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
    """The smaller of the mask and its complement, in units of `height`, and the larger one's inverse."""
    decay = tl.where(-distance > LOG_LEAST, tl.exp(-distance), 0.0)
    larger = height * decay + 1.0
    return decay / larger, larger


@triton.jit
def balance_of(mass, low, high, k, above, below, weights):
    """|z| of the nearest item, and what the tails below and above are to be multiplied with, each in its own units."""
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
    share = share_of(delta, high, low, middle, FARTHEST, LOG_FARTHEST)
    # In a wider gap what k is off a count is a mass beside one of its sides, of which z is known well.
    # So it is with weights, if k is off by more than a rounding. The other side may be at any distance.
    beside = is_beside(exact, delta, middle, LOG_FARTHEST)
    share = tl.where(beside, 0.5 * (above - below), share)
    less, more = tl.exp(share - tl.abs(share)), tl.exp(-share - tl.abs(share))
    # A score at the farthest distance has no part in the derivative, though it be the nearest.
    less, more = tl.where(below < 0.5 * FARTHEST, less, 0.0), tl.where(above < 0.5 * FARTHEST, more, 0.0)
    return tl.where(beside, tl.minimum(above, below), middle - tl.abs(share)), less, more


@triton.jit
def balance(z, tail, weights, k, above, below):
    """The same of a tile."""
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
    """v: the derivative of the mask in z. With weights v' may be held back, and v is not in proportion to it."""
    if weights is None:
        gain = across(height) * scaled
    else:
        gain = sigmoid(tl.abs(z)) * sigmoid(-tl.abs(z))
    return gain


@triton.jit
def spaced(x, origin, tau):
    """(x - x_ref) / tau, as far as a derivative still sees: x_ref is a score that has much of p."""
    z = logits(x, across(origin), across(tau))
    return tl.minimum(tl.maximum(z, -FARTHEST), FARTHEST)


@triton.jit
def level_of(origin, reference, tau):
    """The same of the reference."""
    return tl.minimum(tl.maximum(logits(origin, reference, tau), -FARTHEST), FARTHEST)


@triton.jit
def cotangent_of(x, u, gain, scaled, weights, normal, g, tau):
    """That of the scores, u being measured from its level and g from what that leaves; +inf does not move."""
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
    AGAIN: tl.constexpr,
):
    """The cotangents that are asked for, from u of the mask and c of the offset.

    AGAIN says to load u where it is needed, and not to hold it.
    """
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
    most = weighted > across(0.75 * normal)
    held = max_of(most.to(tl.int32)) > 0
    rate, inverse_slope = rates(nearest, normal)

    # u is measured from a multiple of the weights: that which is u at the item that dominates p, or their mean.
    u = load_cotangent(u_given, row, column, kept, n)
    pulled, at_most = sum_of(scaled * u), sum_of(tl.where(most, u, 0.0))
    hbar = rate * pulled - inverse_slope * c
    if AGAIN:
        u = load_cotangent(u_given, row, column, kept, n)
    if weights is None:
        level = across(tl.where(held, at_most, pulled / normal))
    else:
        share = tl.where(scaled > 0.0, weights, 0.0)
        unit = tl.where(held, sum_of(tl.where(most, share, 0.0)), max_of(share))
        share /= across(safe_denominator(unit))  # weights may be of any size
        level = share * across(tl.where(held, at_most, pulled / safe_denominator(sum_of(scaled * share))))
        level = tl.where(most, u, level)  # exactly, which a quotient of equal numbers need not be
    gain = gain_of(z, scaled, height, weights)
    g = c - sum_of((u - level) * gain)
    if AGAIN:
        u = load_cotangent(u_given, row, column, kept, n)
    xbar = cotangent_of(x, u - level, gain, scaled, weights, normal, g, tau)
    bad = offset != offset
    place = across(row.to(tl.int64)) * n + column
    if of_x is not None:
        tl.store(of_x + place, tl.where(across(bad), float("nan"), xbar), mask=inside)
    if of_k is not None:
        tl.store(of_k + row, tl.where(bad, float("nan"), hbar), mask=present)
    if of_tau is not None:
        origin = min_of(tl.where(inside & (weighted >= across(max_of(weighted))), x, INFINITY))
        origin = tl.minimum(tl.maximum(origin, -LARGEST), LARGEST)
        taubar = -sum_of(spaced(x, origin, tau) * xbar) - c * level_of(origin, reference, tau) / tau
        tl.store(of_tau + row, tl.where(bad, float("nan"), taubar), mask=present)
    if of_weights is not None:
        abar = -sigmoid(z) * across(hbar)
        tl.store(of_weights + place, tl.where(across(bad), float("nan"), abar), mask=inside)
