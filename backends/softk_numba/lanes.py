"""Short rows, several at once: one row in each place of a vector.

For a short row, the work that is done once per row and the ends of its loops take longer than its scores. So as many
rows as a vector has places are transposed, and every operation is one of vectors. The steps are those of `solve` and
`rule`, with two differences:

- **The scores at the gap** are always searched for, by counting. Each pass also finds the nearest scores on both sides
  of the pivot. So it ends the search where the pivot is in the gap, and narrows it by a score at least elsewhere.
- **The rule** measures the cotangent from that of the item with the largest v. So no item needs care that dominates p.

The result for a row does not depend on the other rows of its block. A row that is done stays as it is until all are.
Missing rows of the last block are copies. Which rows come here is decided by n alone, and by what is given, so that
threads and batches may cut the rows anywhere.

A row is left to `solve` and `rule` where a score is not finite, where k is 0 or n, where k or tau is extreme, where the
search finds no end, and where V is too small. Numbers of a row are of the scores' dtype here: sums have few items, and
those are added up in parts.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

from softk._reference.threshold import formulas
from softk._reference.threshold.limits import STEPS

from . import vectors
from .cache import compiled, declared
from .operations import EXACT, clipped_of
from .rows import copy_row, store_row
from .rule import LEAST_GAIN
from .solve import LEAST_SLOPE, NEAR
from .vectors import (
    any_of,
    exp,
    lanes_of,
    load,
    load_columns,
    log,
    maximum,
    minimum,
    store,
    store_columns,
    where,
)

#: Rows of so many scores are computed here.
SHORTEST, LONGEST = 4, 256
#: The rule has one exponential per score and no steps: rows longer than so many vectors are no faster here.
VECTORS = 4
#: How many sums are formed one after the other, before they are added up.
PART = 16
#: How many passes search for the scores at the gap.
PASSES = 20

_FORMULAS = formulas.load(vectors, compiled(EXACT))
step_size, midpoint, excess_of = _FORMULAS.step_size, _FORMULAS.midpoint, _FORMULAS.excess_of


# --- blocks of rows


@declared
def width_of(values):
    """How many rows are computed at once, for arrays of a dtype."""


@overload(width_of, jit_options=EXACT)
def _width_of(values):
    lanes = lanes_of(values.dtype)
    return lambda values: lanes


@compiled(EXACT)
def transpose(rows, first, columns):
    """Rows from the first one as columns. The last four may overlap with those before."""
    n = columns.shape[0]
    for start in range(0, n, 4):
        j = min(start, n - 4)
        found = load_columns(rows, first, j)
        store(found[0], columns, j)
        store(found[1], columns, j + 1)
        store(found[2], columns, j + 2)
        store(found[3], columns, j + 3)


@declared
def take(x, first, count, room, columns):
    """Some rows of an array as columns; the last one stands also in the place of those that are missing."""


@overload(take, jit_options=EXACT)
def _take(x, first, count, room, columns):
    in_place = x.layout == "C" and x.dtype == room.dtype

    def direct(x, first, count, room, columns):
        rows, row = x, first
        if count < room.shape[0] or x.shape[0] == 1:
            rows, row = copied_rows(x, first, count, room), 0
        transpose(rows, row, columns)

    def by_copy(x, first, count, room, columns):
        transpose(copied_rows(x, first, count, room), first - first, columns)

    return direct if in_place else by_copy


@compiled(EXACT)
def copied_rows(x, first, count, room):
    last = x.shape[0] - 1
    for i in range(room.shape[0]):
        copy_row(x[min(first + min(i, count - 1), last)], room[i])
    return room


@declared
def place_of(out, first, count, room):
    """Where the rows of a block are computed: in their place, or in `room`; and the first row there."""


@overload(place_of, jit_options=EXACT)
def _place_of(out, first, count, room):
    def direct(out, first, count, room):
        if count == room.shape[0]:
            return out, first
        return room, first - first

    def elsewhere(out, first, count, room):
        return room, first - first

    return direct if out.dtype == room.dtype else elsewhere


@declared
def give(out, first, count, room):
    """Copy or round the rows of a block that were computed in `room`."""


@overload(give, jit_options=EXACT)
def _give(out, first, count, room):
    def copied(out, first, count, room):
        if count < room.shape[0]:
            for i in range(count):
                copy_row(room[i], out[first + i])

    def rounded(out, first, count, room):
        for i in range(count):
            store_row(room[i], out, first + i)

    return copied if out.dtype == room.dtype else rounded


@compiled(EXACT)
def parameters(k, tau, first, count, n, bound, numbers):
    """k, tau, and the least and the most number of scores above the gap, as rows of `numbers`.

    tau is 0 where the row is not for lanes.
    """
    for i in range(numbers.shape[1]):
        row = first + min(i, count - 1)
        mass, temperature = k[row if k.shape[0] > 1 else 0], tau[row if tau.shape[0] > 1 else 0]
        usual = (temperature > bound.coldest) & (temperature < bound.hottest) & (mass > 0.0) & (mass < n)
        whole = math.floor(mass) if usual else 0
        numbers[0, i] = mass
        numbers[1, i] = temperature if usual else 0.0
        numbers[2, i] = whole + (1 if mass > whole else 0)
        numbers[3, i] = whole


# --- the mask


@compiled(EXACT)
def survey(scores):
    """The extremes, the mean, the deviation, and whether all scores are finite."""
    n = scores.shape[0]
    origin = load(scores, 0)
    highest, lowest = origin, origin
    total, squares = origin - origin, origin - origin
    for i in range(n):
        value = load(scores, i)
        highest, lowest = maximum(highest, value), minimum(lowest, value)
        value = value - origin
        total += value
        squares += value * value
    mean = total / n
    deviation = maximum(squares / n - mean * mean, 0.0)
    return highest, lowest, origin + mean, deviation, squares < math.inf


@compiled(EXACT)
def rarity(count, n):
    """The log-odds of a count, finite at both ends."""
    return log((count + 0.5) / (n - count + 0.5))


@compiled(EXACT)
def search(scores, facts, k, least, most, usable, bound):
    """The scores on both sides of the gap; the pivot twice where they are not found, which the third result says."""
    n = scores.shape[0]
    highest, lowest, center, deviation, _ = facts
    eps, smallest = bound.eps, bound.smallest
    none = k - k
    aim = rarity(k, n)
    at_low = none + math.log(2.0 * n + 1.0)
    at_high = -at_low
    # Both are in [low, high], the ends of which are scores.
    low, high = lowest, highest
    pivot = minimum(maximum(center - deviation * aim / 1.702, lowest), highest)
    upper, lower = pivot, pivot
    open_ = usable
    for turn in range(PASSES):
        count, above, below = none, none + math.inf, none - math.inf
        for i in range(n):
            value = load(scores, i)
            is_above = value > pivot
            count += where(is_above, none + 1.0, none)
            above = minimum(above, where(is_above, value, above))
            below = maximum(below, where(is_above, below, value))
        many, few = open_ & (count > most), open_ & (count < least)
        few = few & ~many
        found = rarity(count, n)
        low, at_low = where(many, above, low), where(many, found, at_low)
        high, at_high = where(few, below, high), where(few, found, at_high)
        met = (many | few) & (low >= high)
        between = open_ & ~(many | few)
        upper = where(between, above, where(met, low, upper))
        lower = where(between, below, where(met, low, lower))
        open_ = open_ & ~(met | between)
        if not any_of(open_):
            break
        if turn == 0:
            aimed = pivot + deviation * (found - aim) / 2.2
        elif turn % 4 == 3:
            aimed = low * 0.5 + high * 0.5
        else:
            aimed = low + (high - low) * ((at_low - aim) / (at_low - at_high))
        beneath = high - (maximum(high, -high) * eps + smallest)
        aimed = where(many & (count == most + 1.0), low, aimed)
        aimed = where(few & (count == least - 1.0), beneath, aimed)
        pivot = where(open_, maximum(minimum(aimed, beneath), low), pivot)
    return where(open_, pivot, upper), where(open_, pivot, lower), usable & ~open_


@compiled(EXACT)
def sweep(odds, level):
    """The number of scores above the threshold, both tails and the slope of the mass."""
    n = odds.shape[0]
    none = level - level
    one = none + 1.0
    above, lower, upper, curved = none, none, none, none
    for start in range(0, n, PART):
        part_lower, part_upper, part_curved = none, none, none
        for i in range(start, min(start + PART, n)):
            value = load(odds, i)
            tail = minimum(value, level) / (value + level)
            side = value > level
            above += where(side, one, none)
            part_upper += where(side, tail, none)
            part_lower += where(side, none, tail)
            part_curved += tail * tail
        lower += part_lower
        upper += part_upper
        curved += part_curved
    return above, lower, upper, lower + upper - curved


@compiled(EXACT)
def solve(odds, k, usable, bound):
    """The offset and the slope of the mass there: `solve.search`, of which every row ends by itself."""
    eps, smallest, ceiling, tolerance = bound.eps, bound.smallest, bound.log_farthest, 3.0 * bound.tolerance
    offset = k - k
    slope, least, most = offset, offset - math.inf, offset + math.inf
    running = usable
    last = running & ~running
    for _ in range(STEPS + 1):
        above, lower, upper, found = sweep(odds, exp(offset))
        size = step_size(lower, upper, found, k - above, eps, smallest)
        slope = where(running, found, slope)
        least = where(size > 0.0, offset, least)
        most = where(size < 0.0, offset, most)
        reach = most * 0.5 - least * 0.5
        clipped = minimum(maximum(size, -reach), reach)
        clipped = minimum(maximum(offset + clipped, -ceiling), ceiling)
        offset = where(running, where(last, offset + size, clipped), offset)
        running = running & ~last
        last = running & (maximum(size, -size) <= tolerance)
        if not any_of(running):
            break
    return offset, slope, usable & ~running


@compiled(EXACT)
def fill_odds(scores, upper, lower, inverse, half, odds):
    """exp(z), z measured from the score on the same side of the gap."""
    reference = midpoint(upper, lower)
    for i in range(scores.shape[0]):
        value = load(scores, i)
        side = (value > reference) | (value >= upper)  # the midpoint of neighboring floats is one of them
        z = (value - where(side, upper, lower)) * inverse + where(side, half, -half)
        store(exp(z), odds, i)


@compiled(EXACT)
def refill_odds(scores, narrowed, reference, inverse, middle, odds):
    """The same without narrowing, for the mask of rows with a wide gap."""
    for i in range(scores.shape[0]):
        z = (load(scores, i) - reference) * inverse - middle
        store(where(narrowed, exp(z), load(odds, i)), odds, i)


@compiled(EXACT)
def write_ratio(odds, level, rows, first):
    """E / (E + level), as rows; 0 for a score so far below the threshold that E was clipped."""
    n, clipped = odds.shape[0], clipped_of(odds.dtype.type)
    for start in range(0, n, 4):
        j = min(start, n - 4)
        a, b, c, d = load(odds, j), load(odds, j + 1), load(odds, j + 2), load(odds, j + 3)
        a, b = where(a > clipped, a / (a + level), 0.0), where(b > clipped, b / (b + level), 0.0)
        c, d = where(c > clipped, c / (c + level), 0.0), where(d > clipped, d / (d + level), 0.0)
        store_columns((a, b, c, d), rows, first, j)


@compiled(EXACT)
def solve_block(scores, odds, numbers, bound):
    """The thresholds of a block: exp(offset) beside `odds`.

    The offsets, the references, and whether they are good become rows of `numbers`.
    """
    k, tau, least, most = load(numbers, 0), load(numbers, 1), load(numbers, 2), load(numbers, 3)
    facts = survey(scores)
    usable = facts[4] & (tau > 0.0)
    level = k - k
    if not any_of(usable):
        store(level, numbers, 6)
        return level
    inverse = 1.0 / where(usable, tau, 1.0)
    k = where(usable, k, 0.5)
    upper, lower, found = search(scores, facts, k, least, most, usable, bound)
    reference = midpoint(upper, lower)
    high, low = (upper - reference) * inverse, (lower - reference) * inverse
    half, middle = high * 0.5 - low * 0.5, high * 0.5 + low * 0.5
    excess = excess_of(half, bound.widest_gap)
    fill_odds(scores, upper, lower, inverse, half - excess, odds)
    offset, slope, solved = solve(odds, k, usable, bound)
    narrowed = usable & (excess > 0.0)
    if any_of(narrowed):
        refill_odds(scores, narrowed, reference, inverse, middle, odds)
    trusted = (slope > LEAST_SLOPE) & (maximum(offset, -offset) < NEAR)
    good = solved & (found | trusted) & (offset == offset)
    store(offset + middle, numbers, 4)
    store(reference, numbers, 5)
    store(where(good, level + 1.0, level), numbers, 6)
    return exp(offset)


@declared
def mask_lanes(x, weights, where, k, tau, mask, offsets, references, bound, start, stop):
    """Masks of the short rows from `start` to `stop`; returns which of them are done."""


@overload(mask_lanes, jit_options=EXACT)
def _mask_lanes(x, weights, where, k, tau, mask, offsets, references, bound, start, stop):
    if not isinstance(weights, types.NoneType):

        def nothing(x, weights, where, k, tau, mask, offsets, references, bound, start, stop):
            return np.zeros(stop - start, np.bool_)

        return nothing

    def compute(x, weights, where, k, tau, mask, offsets, references, bound, start, stop):
        n, lanes = x.shape[1], width_of(offsets)
        done = np.zeros(stop - start, np.bool_)
        if not (SHORTEST <= n <= LONGEST) or where.shape[0] > 0:
            return done
        scores, odds = np.empty((n, lanes), offsets.dtype), np.empty((n, lanes), offsets.dtype)
        room, numbers = np.empty((lanes, n), offsets.dtype), np.empty((7, lanes), offsets.dtype)
        for first in range(start, stop, lanes):
            count = min(lanes, stop - first)
            take(x, first, count, room, scores)
            parameters(k, tau, first, count, n, bound, numbers)
            level = solve_block(scores, odds, numbers, bound)
            rows, row = place_of(mask, first, count, room)
            write_ratio(odds, level, rows, row)
            give(mask, first, count, room)
            for i in range(count):
                done[first + i - start] = numbers[6, i] > 0.0
                offsets[first + i], references[first + i] = numbers[4, i], numbers[5, i]
        return done

    return compute


# --- the rule


@compiled(EXACT)
def gains_of(scores, values, numbers, gains):
    """v of every item; of the item with the largest v its value and its score; the second largest v; V; <v, u>.

    u, the values, are measured from that of the item with the largest v.
    """
    n = scores.shape[0]
    reference, offset, inverse = load(numbers, 0), load(numbers, 1), load(numbers, 2)
    none = inverse - inverse
    most, second, level, origin = none - 1.0, none, none, none
    clipped = clipped_of(numbers.dtype.type)
    for i in range(n):
        score, value = load(scores, i), load(values, i)
        z = (score - reference) * inverse - offset
        decay = exp(minimum(z, -z))
        decay = where(decay > clipped, decay, 0.0)  # far items have no part
        larger = 1.0 / (decay + 1.0)
        gain = decay * larger * larger
        store(gain, gains, i)
        second = maximum(second, minimum(most, gain))
        better = gain > most
        most, level, origin = where(better, gain, most), where(better, value, level), where(better, score, origin)
    total, product = none, none
    for start in range(0, n, PART):
        part_total, part_product = none, none
        for i in range(start, min(start + PART, n)):
            gain = load(gains, i)
            part_total += gain
            part_product += gain * (load(values, i) - level)
        total += part_total
        product += part_product
    return level, origin, second, total, product


@compiled(EXACT)
def moment(scores, values, gains, level, mean, origin, inverse):
    """The sum of the scores' distances from `origin` times their cotangents."""
    none = mean - mean
    found = none
    for i in range(scores.shape[0]):
        pulled = load(gains, i) * (load(values, i) - level - mean)
        found += where(pulled == 0.0, none, (load(scores, i) - origin) * inverse * pulled)
    return found * inverse


@compiled(EXACT)
def write_product(values, gains, level, mean, inverse, rows, first):
    """v (u - mean) / tau, as rows."""
    n = gains.shape[0]
    for start in range(0, n, 4):
        j = min(start, n - 4)
        a = load(gains, j) * (load(values, j) - level - mean) * inverse
        b = load(gains, j + 1) * (load(values, j + 1) - level - mean) * inverse
        c = load(gains, j + 2) * (load(values, j + 2) - level - mean) * inverse
        d = load(gains, j + 3) * (load(values, j + 3) - level - mean) * inverse
        store_columns((a, b, c, d), rows, first, j)


@compiled(EXACT)
def state(tau, offsets, references, c, first, count, bound, numbers):
    """The reference, the offset, 1 / tau and the cotangent of the offset, as rows of `numbers`; 1 / tau may be 0."""
    for i in range(numbers.shape[1]):
        row = first + min(i, count - 1)
        temperature = tau[row if tau.shape[0] > 1 else 0]
        usual = (temperature > bound.coldest) & (temperature < bound.hottest) & (offsets[row] == offsets[row])
        numbers[0, i] = references[row]
        numbers[1, i] = offsets[row] if usual else 0.0
        numbers[2, i] = 1.0 / temperature if usual else 0.0
        numbers[3, i] = c[row] if c.shape[0] > 0 else 0.0


@declared
def pull_lanes(x, weights, where, tau, offsets, references, u, c, xbar, kbar, taubar, bound, start, stop):
    """Cotangents of the short rows from `start` to `stop`; returns which of them are done."""


@overload(pull_lanes, jit_options=EXACT)
def _pull_lanes(x, weights, where, tau, offsets, references, u, c, xbar, kbar, taubar, bound, start, stop):
    if not isinstance(weights, types.NoneType):

        def nothing(x, weights, where, tau, offsets, references, u, c, xbar, kbar, taubar, bound, start, stop):
            return np.zeros(stop - start, np.bool_)

        return nothing

    def compute(x, weights, where, tau, offsets, references, u, c, xbar, kbar, taubar, bound, start, stop):
        n, lanes, dtype = x.shape[1], width_of(offsets), offsets.dtype
        done = np.zeros(stop - start, np.bool_)
        if not (SHORTEST <= n <= VECTORS * lanes) or where.shape[0] > 0:
            return done
        scores, values, gains = np.empty((n, lanes), dtype), np.empty((n, lanes), dtype), np.empty((n, lanes), dtype)
        room, numbers = np.empty((lanes, n), dtype), np.empty((7, lanes), dtype)
        for first in range(start, stop, lanes):
            count = min(lanes, stop - first)
            take(x, first, count, room, scores)
            take(u, first, count, room, values)
            state(tau, offsets, references, c, first, count, bound, numbers)
            inverse, cotangent = load(numbers, 2), load(numbers, 3)
            level, origin, second, total, product = gains_of(scores, values, numbers, gains)
            mean = (product - cotangent) / total
            if xbar.shape[0] > 0:
                rows, row = place_of(xbar, first, count, room)
                write_product(values, gains, level, mean, inverse, rows, row)
                give(xbar, first, count, room)
            if taubar.shape[0] > 0:
                found = moment(scores, values, gains, level, mean, origin, inverse)
                found = found + cotangent * ((origin - load(numbers, 0)) * inverse) * inverse
                store(-found, numbers, 4)
            store(level + mean, numbers, 5)
            finite = (product - product == 0.0) & (level - level == 0.0)
            good = finite & (inverse > 0.0) & (second > LEAST_GAIN)
            store(vectors.where(good, mean - mean + 1.0, 0.0), numbers, 6)
            for i in range(count):
                row = first + i
                done[row - start] = numbers[6, i] > 0.0
                if kbar.shape[0] > 0:
                    kbar[row] = numbers[5, i]
                if taubar.shape[0] > 0:
                    taubar[row] = numbers[4, i]
        return done

    return compute
