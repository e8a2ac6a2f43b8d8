"""The threshold of one row: the scores at the gap, then Newton's steps.

This is the solver of `softk._reference.threshold` for a processor that reads a row into its cache once. The mathematics
stands there, and names here are the names there. Three things are found in another way:

- **The scores at the gap** are selected by counting. A pivot is guessed from the mean and the deviation of the row,
  then interpolated in the log-odds of the mass above it. What lies between two pivots is gathered and partitioned.
- **A window.** Scores farther from the gap than log(n / eps) and a margin, in units of tau, together have a tail that
  is negligible. Those above are counted, those below are dropped, and Newton's steps read the others.
- **A guess for the reference.** For a mask, any reference within a few tau of the threshold will do. Where a pivot with
  about the right count is followed by a solution near to it, the scores at the gap are not selected at all.

Numbers of a row are float64 for every dtype. Sums over a row are formed in blocks of the scores' dtype, which are added
up in float64.
"""

from __future__ import annotations

import math

import numpy as np

from softk._reference.threshold.limits import MARGIN, STEPS

from .cache import compiled
from .operations import EXACT, FAST, FORMULAS, exponential, larger, smaller
from .packing import gather

step_size, rounded_deficit = FORMULAS.step_size, FORMULAS.deficit
midpoint, excess_of = FORMULAS.midpoint, FORMULAS.excess_of

#: How many numbers are added up in the scores' dtype: few enough for an exact count, and for ties, whose sums are all
#: rounded the same way.
BLOCK = 512
#: How often a pivot is guessed before the scores between two pivots are gathered.
GUESSES = 6
#: A guessed reference may be that far from the threshold, in units of tau.
NEAR = 8.0
#: The least slope of the mass that a guessed reference is trusted with: less is a gap.
LEAST_SLOPE = 0.01
#: A part as short as that is sorted.
SHORT = 24


# --- passes over a row


@compiled(FAST)
def survey_block(x, origin):
    """The largest and the smallest number, the sum of what they are above `origin`, and the sum of its squares."""
    number = x.dtype.type
    most = least = x[0]
    total = squares = number(0.0)
    for i in range(x.shape[0]):
        most, least = larger(most, x[i]), smaller(least, x[i])
        value = x[i] - origin
        total += value
        squares += value * value
    return most, least, total, squares


@compiled(FAST)
def count_block(x, level):
    number = x.dtype.type
    found = number(0.0)
    for i in range(x.shape[0]):
        found += number(1.0) if x[i] > level else number(0.0)
    return found


@compiled(FAST)
def weigh_block(x, weights, level):
    number = x.dtype.type
    found = number(0.0)
    for i in range(x.shape[0]):
        found += weights[i] if x[i] > level else number(0.0)
    return found


@compiled(EXACT)
def mass_above(x, weights, level):
    """The number of the scores above a level, or their weight."""
    found = 0.0
    for start in range(0, x.shape[0], BLOCK):
        if weights is None:
            found += count_block(x[start : start + BLOCK], level)
        else:
            found += weigh_block(x[start : start + BLOCK], weights[start : start + BLOCK], level)
    return found


@compiled(FAST)
def sweep_block(odds, level):
    number = odds.dtype.type
    above = both = upper = curved = number(0.0)
    for i in range(odds.shape[0]):
        value = odds[i]
        tail = (value if value < level else level) / (value + level)
        side = number(1.0) if value > level else number(0.0)
        above += side
        both += tail
        upper += tail * side
        curved += tail * tail
    return above, both, upper, curved


@compiled(FAST)
def weighted_sweep_block(odds, weights, level):
    number = odds.dtype.type
    above = both = upper = curved = number(0.0)
    for i in range(odds.shape[0]):
        value = odds[i]
        tail = (value if value < level else level) / (value + level)
        weighted = weights[i] * tail
        side = number(1.0) if value > level else number(0.0)
        above += side * weights[i]
        both += weighted
        upper += weighted * side
        curved += weighted * tail
    return above, both, upper, curved


@compiled(EXACT)
def sweep(odds, weights, level):
    """The mass above the threshold, both tails and the slope of the mass, from exp(z) beside exp(offset)."""
    above = both = upper = curved = 0.0
    for start in range(0, odds.shape[0], BLOCK):
        if weights is None:
            found = sweep_block(odds[start : start + BLOCK], level)
        else:
            found = weighted_sweep_block(odds[start : start + BLOCK], weights[start : start + BLOCK], level)
        above += found[0]
        both += found[1]
        upper += found[2]
        curved += found[3]
    # At the root, whatever a lower tail loses here is negligible beside the deficit.
    return above, max(both - upper, 0.0), upper, both - curved


# --- the scores at the gap


@compiled(EXACT)
def rarity(mass, total, little):
    """The log-odds of a mass, finite at both ends: nearly linear in the score where scores are bell-shaped."""
    return math.log((mass + little) / (total - mass + little))


@compiled(EXACT)
def sort_descending(x, weights, n):
    for i in range(1, n):
        value, j = x[i], i
        weight = value if weights is None else weights[i]
        while j > 0 and x[j - 1] < value:
            x[j] = x[j - 1]
            if weights is not None:
                weights[j] = weights[j - 1]
            j -= 1
        x[j] = value
        if weights is not None:
            weights[j] = weight


@compiled(EXACT)
def ends_beside(x, weights, n, level, mass, least, most):
    """The scores next to a level that separates them: the mass above it is at least `least` and at most `most`."""
    high, low = math.inf, -math.inf
    for i in range(n):
        if x[i] > level:
            high = min(high, x[i])
        else:
            low = max(low, x[i])
    if weights is not None:
        # A weight may be so small that the mass stays within the rounding of k: then the gap is wider.
        above = mass
        while high < math.inf:
            further, weight = math.inf, 0.0
            for i in range(n):
                if x[i] == high:
                    weight += weights[i]
                elif x[i] > high:
                    further = min(further, x[i])
            above -= weight
            if above < least or further == math.inf:
                break
            high = further
        while low > -math.inf:
            further = -math.inf
            for i in range(n):
                if x[i] == low:
                    mass += weights[i]
                elif x[i] < low:
                    further = max(further, x[i])
            if mass > most:
                break
            low = further
    return high, low


@compiled(EXACT)
def ends_among(x, weights, n, mass, least, most):
    """The scores at which the mass, from the largest, reaches `least` and exceeds `most`.

    The n scores are moved about. The mass above all of them is `mass`, which neither reaches `least`.

    Parts that cannot hold the two scores are dropped, until one that is short is sorted. Of two pivots the second is
    the middle of the extremes, which ends also for scores that were chosen to mislead the first.
    """
    turn = 0
    dropped = -math.inf  # the largest score that was dropped below
    while n > SHORT:
        if turn % 2 == 0:
            first, second, third = x[0], x[n // 2], x[n - 1]
            pivot = max(min(first, second), min(max(first, second), third))
        else:
            low = high = x[0]
            for i in range(n):
                low, high = min(low, x[i]), max(high, x[i])
            if low == high:
                break
            pivot = low + 0.5 * (high - low) if (low > 0.0) == (high > 0.0) else 0.5 * low + 0.5 * high
            pivot = x.dtype.type(pivot)
            if pivot >= high:
                pivot = low
        turn += 1
        above = mass
        highest_below = -math.inf
        for i in range(n):
            if x[i] > pivot:
                above += 1.0 if weights is None else weights[i]
            else:
                highest_below = max(highest_below, x[i])
        kept = 0
        if above > most:  # both are above the pivot
            for i in range(n):
                if x[i] > pivot:
                    x[kept] = x[i]
                    if weights is not None:
                        weights[kept] = weights[i]
                    kept += 1
            dropped = max(dropped, highest_below)
        elif above < least:  # both are at the pivot or below it
            for i in range(n):
                if x[i] <= pivot:
                    x[kept] = x[i]
                    if weights is not None:
                        weights[kept] = weights[i]
                    kept += 1
            mass = above
            if kept == n:
                # The pivot is the largest score. Those equal to it are counted at once, which ends a row of ties.
                equal = 0.0
                for i in range(n):
                    if x[i] == pivot:
                        equal += 1.0 if weights is None else weights[i]
                if mass + equal > most:
                    return pivot, pivot
                if mass + equal < least:
                    kept = 0
                    for i in range(n):
                        if x[i] < pivot:
                            x[kept] = x[i]
                            if weights is not None:
                                weights[kept] = weights[i]
                            kept += 1
                    mass += equal
        else:  # the pivot separates them
            return ends_beside(x, weights, n, pivot, above, least, most)
        n = kept
    if n <= SHORT:
        sort_descending(x, weights, n)
    high = low = math.nan
    for i in range(n):
        mass += 1.0 if weights is None else weights[i]
        if mass >= least and high != high:
            high = x[i]
        if mass > most:
            low = x[i]
            break
    if low != low:
        low = dropped
    return high, low


@compiled(EXACT)
def find_ends(x, weights, extremes, center, spread, total, k, least, most, some_x, some_weights):
    """The scores on either side of the gap: at which the mass, from the largest, reaches `least` and exceeds `most`.

    -inf for the second where all the mass does not exceed `most`. `some_x` and `some_weights` are room for a row.
    """
    highest, lowest = extremes
    # In (low, high] are both scores; the mass above `high` is `mass`.
    low, high, mass, reached = -math.inf, highest, 0.0, total
    little = 0.5 if weights is None else 0.5 * total / x.shape[0]
    aim = rarity(min(k, total), total, little)
    at_low, at_high = rarity(total, total, little), rarity(0.0, total, little)
    pivot = center - spread * aim / 1.702
    for turn in range(GUESSES):
        start = max(low, lowest)
        if not (start < pivot < high):
            pivot = 0.5 * start + 0.5 * high
        level = x.dtype.type(pivot)
        if not (start <= level < high):
            break
        found = mass_above(x, weights, level)
        if found > most:
            low, reached, at_low = level, found, rarity(found, total, little)
        elif found < least:
            high, mass, at_high = level, found, rarity(found, total, little)
        else:
            return ends_beside(x, weights, x.shape[0], level, found, least, most)
        if reached - mass <= total * 0.03125:
            break
        start = max(low, lowest)
        # Aimed beside the mass, so that the other end of the bracket comes near too.
        beside = aim + (0.1 if found > most else -0.1)
        share = (at_low - beside) / max(at_low - at_high, 1e-9)
        pivot = start + (high - start) * share if turn < 3 else 0.5 * start + 0.5 * high
    count = gather(x, weights, low, high, some_x, some_weights)
    return ends_among(some_x, None if weights is None else some_weights, count, mass, least, most)


# --- Newton's steps


@compiled(EXACT)
def search(odds, weights, above, k, half, bound):
    """The offset from the middle of the gap, the slope of the mass there, and both tails.

    `above` is the mass of the scores beyond the window, and `half` half the gap. NaN where there is no answer.
    """
    eps, smallest, ceiling, tolerance, unit = bound.eps, bound.smallest, bound.log_farthest, bound.tolerance, bound.unit
    number = odds.dtype.type
    offset, least, most = 0.0, -math.inf, math.inf
    last = False
    slope = tails = 0.0
    for step in range(STEPS + 1):
        found, lower, upper, slope = sweep(odds, weights, number(math.exp(offset)))
        delta = k - (above + found)
        if weights is not None:
            delta = rounded_deficit(delta, offset, half, k, unit)
        size = step_size(lower, upper, slope, delta, eps, smallest)
        tails = lower + upper
        if last or step == STEPS:
            offset += size
            break
        if size > 0.0:
            least = offset
        elif size < 0.0:
            most = offset
        last = not (math.fabs(size) > tolerance)
        reach = 0.5 * (most - least)
        size = min(max(size, -reach), reach)
        offset = min(max(offset + size, -ceiling), ceiling)
    return offset, slope, tails


@compiled(FAST)
def fill_odds(x, reference, inverse, odds):
    """exp((x - reference) / tau), clipped to what `exponential` can hold."""
    for i in range(x.shape[0]):
        odds[i] = exponential((x[i] - reference) * inverse)


@compiled(FAST)
def shift_odds(odds, factor):
    for i in range(odds.shape[0]):
        odds[i] *= factor


@compiled(EXACT)
def log_odds(value, reference, tau):
    """(value - reference) / tau in float64, for any temperature: neither the difference nor its quotient overflows."""
    if math.fabs(value) > 1e300 or math.fabs(reference) > 1e300:
        return (
            (value * 0.25 - reference * 0.25) / tau * 4.0
            if tau < 1e300
            else (value * 0.25 - reference * 0.25) / (tau * 0.25)
        )
    return (value - reference) / tau


@compiled(EXACT)
def fill_far_odds(x, ends, middle, half, tau, odds):
    """exp(z) for a gap that is narrowed to `half` on either side, and for any temperature.

    Each side is measured from its own score, for the narrowing itself would be rounded away in a wide gap.
    """
    high, low, reference, narrowed = ends
    for i in range(x.shape[0]):
        value = np.float64(x[i])
        if not narrowed:
            z = log_odds(value, reference, tau) - middle
        elif value > low:  # not the reference, which is rounded, and may be the upper score itself
            z = log_odds(value, high, tau) + half
        else:
            z = log_odds(value, low, tau) - half
        odds[i] = exponential(x.dtype.type(z))


@compiled(EXACT)
def solve_guessed(x, facts, k, tau, bound, some, odds):
    """The threshold from a guessed reference: it, the offset, whether `odds` are of all scores, whether it is good."""
    highest, lowest, center, spread, total = facts
    n = x.shape[0]
    number = x.dtype.type
    aim = rarity(k, total, 0.5)
    share = k / total
    # About the slope of the mass. Where it is small, the threshold is in a gap as a rule.
    if not (share * (1.0 - share) * 1.7 * total * tau > 0.25 * spread):
        return 0.0, 0.0, False, False
    pivot = number(min(max(center - spread * aim / 1.702, lowest), highest))
    for _ in range(3):
        found = mass_above(x, None, pivot)
        if math.fabs(found - k) <= 0.25 * min(k, total - k) + 1.0:
            break
        pivot = number(min(max(pivot + spread * (rarity(found, total, 0.5) - aim) / 2.2, lowest), highest))
    width = tau * (math.log(n / bound.eps) + MARGIN + NEAR)
    low, high = min(pivot - width, np.float64(np.nextafter(pivot, -number(math.inf)))), pivot + width
    whole = (low < lowest) & (high >= highest)
    above = 0.0
    if whole:
        fill_odds(x, pivot, number(1.0 / tau), odds)
        offset, slope, _ = search(odds[:n], None, 0.0, k, 0.0, bound)
    else:
        if high < highest:
            above = mass_above(x, None, number(high))
        count = gather(x, None, low, high, some, some)
        fill_odds(some[:count], pivot, number(1.0 / tau), odds)
        offset, slope, _ = search(odds[:count], None, above, k, 0.0, bound)
    # Within the window the tails of what is left out are negligible beside those that a slope like that has.
    return np.float64(pivot), offset, whole, (slope > LEAST_SLOPE) & (math.fabs(offset) < NEAR)


@compiled(EXACT)
def solve_exactly(x, weights, facts, k, least, most, tau, bound, plain, some, odds, room):
    """The threshold from the scores at the gap: reference, offset, both sides of the gap in z, and the upper score."""
    highest, lowest, center, spread, total = facts
    n = x.shape[0]
    number = x.dtype.type
    high, low = find_ends(x, weights, (highest, lowest), center, spread, total, k, least, most, some, room)
    if low == -math.inf:
        low = high
    high, low = np.float64(high), np.float64(low)
    reference = np.float64(number(midpoint(high, low)))
    farthest = bound.farthest
    z_high, z_low = min(log_odds(high, reference, tau), farthest), max(log_odds(low, reference, tau), -farthest)
    half, middle = 0.5 * (z_high - z_low), 0.5 * (z_high + z_low)
    excess = excess_of(half, bound.widest_gap)
    half -= excess
    width = tau * (math.log(n / bound.eps) + MARGIN)
    ordinary = plain & (excess == 0.0)
    above, count = 0.0, n
    for attempt in range(2):
        lowest_kept, highest_kept = low - width, high + width
        # A window may be narrower than the spacing of floats: the lower score must be inside.
        lowest_kept = min(lowest_kept, np.float64(np.nextafter(number(low), -number(math.inf))))
        if attempt == 0 and (lowest_kept >= lowest or highest_kept < highest):
            if highest_kept < highest:
                above = mass_above(x, weights, number(highest_kept))
            count = gather(x, weights, lowest_kept, highest_kept, some, room)
            kept, kept_weights = some[:count], (None if weights is None else room[:count])
        else:
            above, count = 0.0, n
            kept, kept_weights = x, weights
        if ordinary:
            fill_odds(kept, number(reference), number(1.0 / tau), odds)
            if middle != 0.0:
                shift_odds(odds[:count], number(math.exp(-middle)))
        else:
            fill_far_odds(kept, (high, low, reference, excess > 0.0), middle, half, tau, odds)
        offset, _, tails = search(odds[:count], kept_weights, above, k, half, bound)
        # What a window leaves out on either side is at most a rounding of both tails.
        sure = math.exp(min(math.fabs(offset) - half - MARGIN, 80.0)) * (total / n) <= tails
        if count == n or sure:
            break
    return reference, offset + middle, z_high, z_low, high
