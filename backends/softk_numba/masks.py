"""The mask and the solver as kernels over rows, forward."""

from __future__ import annotations

import math

import numpy as np

from .cache import compiled, kernel
from .lanes import mask_lanes, pull_lanes
from .loops import item_cotangents, pull_loop, push_loop
from .operations import EXACT, FAST, WITHOUT_SUMS, clipped_of, exponential, larger, reach_of, smaller
from .rows import (
    compact,
    compact_weighted,
    fill,
    is_read_in_place,
    masked_row,
    number_of,
    room_for,
    row_of,
    store_row,
    survey_weighted,
    target_of,
)
from .rule import pull_row, push_row
from .solve import BLOCK, log_odds, solve_exactly, solve_guessed, survey_block

#: How a mask is written. The first three are for rows without +inf: from the odds of all scores, from a guessed
#: reference, from the reference at the gap. The last is for every row.
WHOLE, GUESSED, PLAIN, CAREFUL = 0, 1, 2, 3
#: How many roundings the mass of a mask from a guessed reference may be off.
ROUNDED = 12.0


@compiled(EXACT)
def facts_of(x):
    """The extremes, the mean, the deviation and the number; the mean is not finite where a score is not."""
    n = x.shape[0]
    highest, lowest, total, squares = -math.inf, math.inf, 0.0, 0.0
    first = x[0]
    for start in range(0, n, BLOCK):
        found = survey_block(x[start : start + BLOCK], first)
        highest, lowest = max(highest, np.float64(found[0])), min(lowest, np.float64(found[1]))
        total += found[2]
        squares += found[3]
    mean = total / n
    return highest, lowest, first + mean, math.sqrt(max(squares / n - mean * mean, 0.0)), np.float64(n)


@compiled(EXACT)
def are_finite(facts):
    """Whether all scores are finite, and so close together that the sums are."""
    return math.isfinite(facts[2] - facts[2] + facts[3])


@compiled(FAST)
def weighted_survey_block(x, weights, origin):
    """The extremes of the scores, the least weight, the sum of the weights, and weighted sums of x - origin and its
    square.

    The sum of the weights is formed in float64: a k that misses it by its rounding counts as that sum.
    """
    number = x.dtype.type
    most = least = x[0]
    lightest, total = weights[0], 0.0
    moment = squares = number(0.0)
    for i in range(x.shape[0]):
        most, least, lightest = larger(most, x[i]), smaller(least, x[i]), smaller(lightest, weights[i])
        total += np.float64(weights[i])
        value = x[i] - origin
        moment += weights[i] * value
        squares += weights[i] * value * value
    return most, least, lightest, total, moment, squares


@compiled(EXACT)
def weighted_facts_of(x, weights):
    """The extremes, the mean, the deviation and the sum of the weights; and the least weight."""
    highest, lowest, lightest = -math.inf, math.inf, math.inf
    total = moment = squares = 0.0
    first = x[0]
    for start in range(0, x.shape[0], BLOCK):
        found = weighted_survey_block(x[start : start + BLOCK], weights[start : start + BLOCK], first)
        highest, lowest = max(highest, np.float64(found[0])), min(lowest, np.float64(found[1]))
        lightest = min(lightest, np.float64(found[2]))
        total += found[3]
        moment += found[4]
        squares += found[5]
    mean = moment / total
    return (highest, lowest, first + mean, math.sqrt(max(squares / total - mean * mean, 0.0)), total), lightest


@compiled(WITHOUT_SUMS)
def write_block(x, reference, inverse, offset, out):
    """sigmoid((x - reference) / tau - offset), for scores that are not +inf.

    It is 0 where the exponential would be clipped: a score far below the threshold is not selected at all.
    """
    number = x.dtype.type
    one, none, farthest = number(1.0), number(0.0), reach_of(number)
    for i in range(x.shape[0]):
        z = offset - (x[i] - reference) * inverse
        found = one / (one + exponential(z))
        out[i] = found if z < farthest else none


@compiled(WITHOUT_SUMS)
def write_ratio_block(odds, level, out):
    """The same, from exp((x - reference) / tau) and exp(offset)."""
    number = odds.dtype.type
    none, clipped = number(0.0), clipped_of(number)
    for i in range(out.shape[0]):
        found = odds[i] / (odds[i] + level)
        out[i] = found if odds[i] > clipped else none


@compiled(FAST)
def sum_block(values):
    """The sum. It is not formed while they are written, for the reason of `rule.write_gains`."""
    total = values.dtype.type(0.0)
    for i in range(values.shape[0]):
        total += values[i]
    return total


@compiled(EXACT)
def write_mask(x, reference, tau, offset, way, odds, out):
    """The mask of a row without +inf and NaN, in the way that `solve_row` names; the sum of it."""
    number = x.dtype.type
    r, inverse, s, level = number(reference), number(1.0 / tau), number(offset), number(math.exp(offset))
    total = 0.0
    for start in range(0, x.shape[0], BLOCK):
        stop = start + BLOCK
        if way == WHOLE:
            write_ratio_block(odds[start:stop], level, out[start:stop])
        else:
            write_block(x[start:stop], r, inverse, s, out[start:stop])
        total += sum_block(out[start:stop])
    return total


@compiled(EXACT)
def write_far_mask(x, reference, tau, offset, largest, out):
    """The same, for infinite scores and any temperature: 0 for a score of -inf."""
    for i in range(x.shape[0]):
        value = np.float64(x[i])
        found = 0.0
        if value > -math.inf:
            z = log_odds(min(value, largest), reference, tau) - offset
            decay = math.exp(-math.fabs(z))
            found = (1.0 if z > 0.0 else decay) / (1.0 + decay)
        out[i] = found


@compiled(EXACT)
def solve_row(x, weights, k, tau, ranks, exact, bound, shared, clean, some, odds, kept, room):
    """The threshold of a row. A score of -inf marks an item that cannot be selected.

    `clean` and `kept` are room for copies of what can be selected, which are made only if some items cannot, or if the
    row lies in `some`, which is overwritten; `shared` says so.
    Returns the numbers (reference, offset, z of both sides of the gap), the flags (nothing, everything, valid, whether
    the last selected score is +inf) and the way in which the mask is to be written: by `odds`, plainly, or with care.
    """
    n = x.shape[0]
    largest, unit = bound.largest, bound.unit
    valid = (tau > 0.0) & (tau <= largest) & (k >= -largest) & (k <= largest)
    careful = not (bound.coldest < tau < bound.hottest)
    infinite, copied = 0, False
    nothing = k <= 0.0
    able = n
    if weights is None:
        held = of_all = np.float64(n)
        facts = facts_of(x)
        scores = x
        copied = shared or not are_finite(facts)
        if copied:
            clean = clean if clean.shape[0] >= n else np.empty(n, clean.dtype)
            able, infinite, broken = compact(x, largest, clean)
            valid &= not broken
            scores = clean[:able]
            held = np.float64(able)
            if able > 0:
                facts = facts_of(scores)
            careful |= infinite > 0 or not are_finite(facts)
        highest, lowest = facts[0], facts[1]
        everything = (not nothing) & (math.floor(k) >= able)
        valid &= (k >= 0.0) & (k <= n)
        item_weights = None
    else:
        facts, lightest = weighted_facts_of(x, weights)
        highest, lowest, _, _, held = facts
        of_all = held
        scores, item_weights = x, weights
        if shared or not (lightest > 0.0 and held < math.inf and are_finite(facts)):
            count, able, infinite, broken, of_all, held, highest, lowest = survey_weighted(x, weights, largest)
            valid &= not broken
            if shared or count < n or infinite > 0:
                clean = clean if clean.shape[0] >= n else np.empty(n, clean.dtype)
                kept = kept if kept.shape[0] >= n else np.empty(n, kept.dtype)
                compact_weighted(x, weights, largest, clean, kept)
                scores, item_weights = clean[:count], kept[:count]
            if count > 0:
                facts, _ = weighted_facts_of(scores, item_weights)
            facts = (facts[0], facts[1], facts[2], facts[3], held)
            careful |= infinite > 0
        everything = (not nothing) & (k >= held * (1.0 - unit))
        valid &= (k >= -unit * of_all) & (k - of_all <= (unit + n * bound.eps) * of_all)
    if not valid:
        return (math.nan, math.nan, math.nan, math.nan), (nothing, everything, False, False), CAREFUL
    if able == 0:
        return (-largest, 0.0, 0.0, 0.0), (nothing, everything, True, False), CAREFUL
    if nothing or everything:
        if weights is None:
            unbounded, reached = infinite >= max(math.ceil(k), 1.0), math.ceil(k) <= able
        else:
            unbounded, reached = infinite > 0 if nothing else infinite == able, held >= k * (1.0 - unit)
        # Where the mass cannot be reached, nothing depends on it: no score is near the reference.
        reference = highest if nothing else lowest if reached else -largest
        return (reference, 0.0, 0.0, 0.0), (nothing, everything, True, unbounded), CAREFUL
    if weights is None and not exact and not careful:
        reference, offset, whole, good = solve_guessed(scores, facts, k, tau, bound, some, odds)
        if good:
            # Only odds of the whole row are in the places of its items.
            way = WHOLE if whole and not copied else GUESSED
            return (reference, offset, 0.0, 0.0), (False, False, True, False), way
    if weights is None:
        least, most = math.ceil(k) * 1.0, math.floor(k) * 1.0
        if ranks[0] > 0:
            least, most = np.float64(ranks[0]), np.float64(ranks[1] - 1)
    else:
        least, most = k * (1.0 - unit), k * (1.0 + unit)
    reference, offset, high, low, upper = solve_exactly(
        scores, item_weights, facts, k, least, most, tau, bound, not careful, some, odds, room
    )
    valid = offset == offset
    careful |= not valid
    return (
        (reference, offset, high, low),
        (False, False, valid, (infinite > 0) & (upper >= largest)),
        (CAREFUL if careful else PLAIN),
    )


@kernel(EXACT)
def mask_rows(x, weights, where, k, tau, mask, offsets, references, bound, start, stop):
    """Masks of the rows from `start` to `stop`, with the offset and the reference of each."""
    n = x.shape[1]
    shared = where.shape[0] > 0
    some, odds = room_for(n, True, offsets), room_for(n, True, offsets)
    raw = some if shared else room_for(n, not is_read_in_place(x, offsets), offsets)
    clean = room_for(n, shared or not is_read_in_place(mask, offsets), offsets)
    kept, room = room_for(n, shared and weights is not None, offsets), room_for(n, weights is not None, offsets)
    done = mask_lanes(x, weights, where, k, tau, mask, offsets, references, bound, start, stop)
    for row in range(start, stop):
        if done[row - start]:
            continue
        mass, temperature = number_of(k, row), number_of(tau, row)
        item_weights = None if weights is None else row_of(weights, row, room)
        out = target_of(mask, row, clean)
        for exact in (False, True):
            values = masked_row(x, where, row, -math.inf, raw)
            numbers, flags, way = solve_row(
                values, item_weights, mass, temperature, (0, 0), exact, bound, shared, clean, some, odds, kept, room
            )
            if shared:
                values = masked_row(x, where, row, -math.inf, raw)
            reference, offset = numbers[0], numbers[1]
            nothing, everything, valid = flags[0], flags[1], flags[2]
            if way == CAREFUL:
                break
            total = write_mask(values, reference, temperature, offset, way, odds, out)
            # Ties far from a guessed reference are all rounded in the same direction.
            if way == PLAIN or math.fabs(total - mass) <= ROUNDED * bound.eps * max(1.0, mass):
                break
        if not valid:
            reference = offset = math.nan
            fill(out, math.nan)
        elif nothing or everything:
            offset = bound.saturated if nothing else -bound.saturated
            for i in range(n):
                out[i] = 1.0 if everything and values[i] > -math.inf else 0.0
        elif way == CAREFUL:
            write_far_mask(values, reference, temperature, offset, bound.largest, out)
        store_row(out, mask, row)
        offsets[row], references[row] = offset, reference


pull_rows = pull_loop("pull_rows", pull_row, item_cotangents, pull_lanes)
push_rows = push_loop("push_rows", push_row)


@kernel(EXACT)
def solve_rows(x, weights, where, k, tau, ranks, numbers, flags, bound, start, stop):
    """What the solver settles to: four numbers and four flags a row."""
    n = x.shape[1]
    shared = where.shape[0] > 0
    some, odds = room_for(n, True, numbers), room_for(n, True, numbers)
    raw = some if shared else room_for(n, not is_read_in_place(x, numbers), numbers)
    clean = room_for(n, shared, numbers)
    kept, room = room_for(n, shared and weights is not None, numbers), room_for(n, weights is not None, numbers)
    for row in range(start, stop):
        values = masked_row(x, where, row, -math.inf, raw)
        item_weights = None if weights is None else row_of(weights, row, room)
        found, facts, _ = solve_row(
            values,
            item_weights,
            number_of(k, row),
            number_of(tau, row),
            ranks,
            True,
            bound,
            shared,
            clean,
            some,
            odds,
            kept,
            room,
        )
        for i in range(4):
            numbers[i, row] = found[i]
            flags[i, row] = facts[i]
