"""Sorting and ranking as kernels over rows: anchors of equal mass at equal distances.

`bands` has what is done in a slice. This file reads the slices, chooses the scores that matter, and writes the results.
All arithmetic is in float64, whose range is far beyond that of float32: every slice of float32 is solved here. A slice
of float64 that is out of the ordinary is left to the reference: one with a score of +inf or of 1e150, without a score
that can be selected, with a temperature near the ends of the range, or in which Newton's method does not converge.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from . import bands, ranking, sorting, systems
from .cache import compiled, kernel
from .operations import EXACT
from .pointers import BLOCK, aligned, behind, filled, first_places, hold, pointer_to, put, sum_of, take
from .rows import masked_row, number_of, room_for
from .vectors import INLINED, where

#: What becomes of a slice.
SOLVED, INVALID, LEFT, CROWDED = 0, 1, 2, 3
#: Scores farther from all boundaries than log(n / eps) and this margin, in temperatures, are left out.
MARGIN = 10.0
#: Shares below exp(-log(n / eps) - this) of the peak are left out.
DEPTH = 2.0
#: How far below the lowest boundary's score the boundary may lie before all scores are taken.
BELOW = 4.0
#: A conjugate gradient stops when it changes the solution of a derivative by less than this, in units of eps.
PRECISE = 50.0


@compiled(EXACT)
def is_single(bound):
    """Whether the dtype is float32."""
    return bound.largest < 1e300


@compiled(EXACT)
def is_usual(x, tau, bound):
    """What becomes of the slice; how many scores can be selected, how many of these are infinite, and the lowest."""
    count, infinite, lowest, size, is_whole = sorting.survey(x)
    if not (is_whole and 0.0 < tau <= bound.largest):
        return INVALID, count, infinite, lowest
    usual = is_single(bound) or (count > 0 and size < 1e150 and bound.coldest < tau < bound.hottest)
    return (SOLVED if usual else LEFT), count, infinite, min(lowest, bound.largest)


@compiled(EXACT)
def mass_of(rows, unit, bound):
    """The mass of so many rows. One that misses a whole number by its rounding is set to it."""
    value = unit * rows
    nearest = np.round(value)
    return nearest if math.fabs(nearest - value) <= 4.0 * bound.eps * value else value


@compiled(EXACT)
def masses_of(unit, count, b, bound, mass):
    """The mass above each boundary. Returns how many boundaries have scores below them."""
    active = 0
    for j in range(b):
        mass[j] = mass_of(j + 1, unit, bound)
        if math.floor(mass[j]) < count:
            active = j + 1
    return active


class Boundaries(NamedTuple):
    """The boundaries of a slice."""

    masses: Any  # of the anchors
    mass: Any  # above each boundary
    reference: Any
    offset: Any


@compiled(EXACT)
def boundaries_of(numbers, b):
    """Room for b boundaries, from the numbers of an array of 5 b."""
    start = pointer_to(numbers)
    return Boundaries(behind(start, 3 * b), start, behind(start, b), behind(start, 2 * b))


@compiled(INLINED)
def solve_slice(x, unit, tau, bound, room, whole_band, order, boundaries):
    """The boundaries of a slice, and the plan.

    Returns its state, how many scores can be selected, how many of them are infinite, and the windows.
    """
    masses, mass, reference, offset = boundaries
    n, b, eps, values = x.shape[0], whole_band.b, bound.eps, room.x
    state, count, infinite, lowest = is_usual(x, tau, bound)
    band = bands.part_of(whole_band, 0, 0)
    if state != SOLVED:
        return state, count, infinite, band
    active = masses_of(unit, count, b, bound, mass)
    farthest = math.log(n / eps)
    level = -math.inf
    if 2 * b <= n and active == b:
        rank = math.floor(mass[b - 1]) + 1
        level = sorting.level_of(x, rank, (farthest + MARGIN) * tau, bound.largest, order)
    for j in range(active, b):
        offset[j] = -bound.saturated
        reference[j] = lowest if math.ceil(mass[j]) <= count else -bound.largest
    cut, rounding, smallest = math.exp(-farthest - DEPTH), 4.0 * eps, bound.smallest * bound.smallest
    while True:
        taken = sorting.gather(x, level, infinite, bound.largest, values, order)
        bands.fill_block(taken, values)
        for j in range(active):
            high, low = values[math.ceil(mass[j]) - 1], values[math.floor(mass[j])]
            reference[j] = x.dtype.type(high - 0.5 * (high - low))
            offset[j] = 0.0
        band = bands.part_of(whole_band, taken, active)
        if active == 0:
            return SOLVED, count, infinite, band
        bands.reset(masses, active, unit)
        masses[active] = count - mass[active - 1]
        is_product, origin = bands.fill_powers(taken, tau, room)
        end = bands.newton(
            masses,
            mass,
            reference,
            offset,
            tau,
            cut,
            rounding,
            smallest,
            is_product,
            origin,
            room,
            band,
            is_single(bound),
        )
        if end == bands.CROWDED:
            return CROWDED, count, infinite, band
        # Where Newton's method does not converge, the reference ends at its last step, too.
        if end == bands.ENDLESS and not is_single(bound):
            return LEFT, count, infinite, band
        threshold = reference[active - 1] + tau * offset[active - 1]
        if level == -math.inf or level <= threshold - (farthest + MARGIN - BELOW) * tau:
            return SOLVED, count, infinite, band
        level = -math.inf


@compiled(EXACT)
def end_of_row(j, unit, count, infinite, bound):
    """The infinite part of the mean of an anchor, else 0: +inf if it gets some of a +inf, -inf if it lacks scores."""
    first = math.inf if mass_of(j, unit, bound) < infinite else 0.0
    return first + (-math.inf if count - unit * j < 0.999 * unit else 0.0)


@compiled(EXACT)
def mass_of_row(j, unit, count, infinite, bound):
    """What is left for an anchor, at most its mass; infinite where its mean is, which has no derivative."""
    if end_of_row(j, unit, count, infinite, bound) != 0.0:
        return math.inf
    return min(max(count - unit * j, 0.0), unit)


@compiled(EXACT)
def write_ranks(band, found):
    """The mean anchor of every score: that of its peak, and the tails on both sides."""
    n, b = band.n, band.b
    begin = 0
    for j in range(b + 1):
        end = band.first[j] if j < b else n
        for i in range(begin, end):
            found[i] = j
        begin = end
    for i in range(n, (n // BLOCK + 1) * BLOCK):
        found[i] = 0.0
    for j in range(b):
        for i in range(band.low[j] * BLOCK, band.high[j] * BLOCK, BLOCK):
            tail = take(band.tails, band.at[j] + i)
            put(take(found, i) + where(first_places(found, band.first[j] - i), tail, -tail), found, i)


@compiled(EXACT)
def anchor_shares(j, band, whole, found):
    """The shares of the scores of one anchor, and from which block to which they are."""
    n, b = band.n, band.b
    begin = 0 if j == 0 else band.first[j - 1] if j <= b else n
    end = band.first[j] if j < b else n
    start = band.low[j - 1] if 0 < j <= b else begin // BLOCK
    stop = band.high[j] if j < b else n // BLOCK + 1
    nothing = filled(found, 0.0)
    for block in range(start, stop):
        put(nothing, found, block * BLOCK)
    if 0 < j <= b:
        for i in range(start * BLOCK, begin, BLOCK):
            put(take(band.shares, band.up[j - 1] + i) * take(whole, i), found, i)
    if j < b:
        for i in range(end // BLOCK * BLOCK, stop * BLOCK, BLOCK):
            put(take(found, i) + take(band.shares, band.down[j] + i) * take(whole, i), found, i)
    for i in range(begin, end):
        found[i] += whole[i]
    return start, stop


@compiled(EXACT)
def write_shares(start, stop, found, index, out):
    """Write the shares of the sorted scores from `start` to `stop` at their own places, and 0 at all others."""
    if stop - start < out.shape[0]:
        for i in range(out.shape[0]):
            out[i] = 0.0
    for i in range(start, stop):
        out[index[i]] = found[i]


@compiled(EXACT)
def mean_of(j, begin, band, whole, x, near, mass):
    """The mean of the scores of anchor j, at which the scores from `begin` to `first[j]` have their peak."""
    n, b = band.n, band.b
    end = band.first[j] if j < b else n
    total = more = filled(x, 0.0)
    if 0 < j <= b:
        up = band.up[j - 1]
        for i in range(band.low[j - 1] * BLOCK, begin, BLOCK):
            total = total + take(band.shares, up + i) * take(whole, i) * (take(x, i) - near)
    if j < b:
        down = band.down[j]
        for i in range(end // BLOCK * BLOCK, band.high[j] * BLOCK, BLOCK):
            more = more + take(band.shares, down + i) * take(whole, i) * (take(x, i) - near)
    own = 0.0
    for i in range(begin, end):
        own += whole[i] * (x[i] - near)
    return near + (sum_of(total + more) + own) / mass


@compiled(EXACT)
def write_means(unit, count, infinite, bound, band, room, means):
    """The means of the anchors. Infinite scores have no part in the finite ones."""
    x, whole = room.x, room.whole
    if infinite > 0:
        whole = room.sums
        for i in range((band.n // BLOCK + 1) * BLOCK):
            whole[i] = 0.0 if i < infinite else room.whole[i]
    begin = 0
    for j in range(means.shape[0]):
        means[j] = end_of_row(j, unit, count, infinite, bound)
        if means[j] == 0.0:
            near = x[max(min(begin, band.n - 1), infinite)]
            means[j] = mean_of(j, begin, band, whole, x, near, mass_of_row(j, unit, count, infinite, bound))
        begin = band.first[j] if j < band.b else band.n


@kernel(EXACT)
def ladder_rows(x, where, tau, unit, values, assignment, ranks, offsets, references, left, bound, start, stop):
    """Write the state, flag slices for the reference in `left`, and write the results that have rows.

    The results are values and assignment, or values alone, or ranks.
    """
    n, b = x.shape[1], offsets.shape[1]
    raw = room_for(n, where.shape[0] > 0, offsets)
    numbers, integers = np.empty(bands.size_of(n, b)), np.empty(bands.INTEGERS * b, np.int64)
    order_sizes = sorting.sizes_of(n, b)
    places, samples = np.empty(order_sizes[0], np.int64), np.empty(order_sizes[1])
    few, row_of_scores = np.empty(5 * b), np.empty(bands.padded(n) + BLOCK)
    capacity = bands.least_capacity(n, b)
    storage = bands.storage_for(capacity)
    room, order, boundaries = bands.room_of(numbers, n, b), sorting.room_of(places, samples, n), boundaries_of(few, b)
    band, found = bands.band_of(n, b, capacity, integers, storage), aligned(pointer_to(row_of_scores))
    index, reference, offset = order.index, boundaries.reference, boundaries.offset
    has_assignment, has_ranks = assignment.shape[0] > 0, ranks.shape[0] > 0
    means, share = np.empty(b), np.empty(b + 1)
    nodes, node_ranks, slopes = np.empty(b + 2), np.empty(b + 2), np.empty(b + 2)
    for row in range(start, stop):
        slice_ = masked_row(x, where, row, -math.inf, raw)
        unit_, tau_ = number_of(unit, row), number_of(tau, row)
        state, count, infinite, windows = solve_slice(slice_, unit_, tau_, bound, room, band, order, boundaries)
        while state == CROWDED:
            capacity *= 4
            storage = bands.storage_for(capacity)
            band = bands.band_of(n, b, capacity, integers, storage)
            state, count, infinite, windows = solve_slice(slice_, unit_, tau_, bound, room, band, order, boundaries)
        left[row] = state == LEFT
        for j in range(b):
            offsets[row, j] = offset[j] if state == SOLVED else math.nan
            references[row, j] = reference[j] if state == SOLVED else math.nan
        if windows.b == 0:
            bands.reset(room.whole, windows.n, 1.0)
        if has_ranks:
            # Scores of -inf are not transported. They share the last places.
            last = 0.5 * (count + (n - 1.0)) if state == SOLVED else math.nan
            for i in range(n):
                ranks[row, i] = last
            if state == SOLVED:
                if b == n:
                    write_ranks(windows, found)
                else:
                    write_means(unit_, count, infinite, bound, windows, room, means)
                    ranking.fill_nodes((room.x, windows.n, infinite), means, nodes)
                    scores = (room.x, windows.n, infinite)
                    anchors = (unit_, count, infinite, ranking.ties_of(scores))
                    given = (tau_, reference, offset, windows.b, math.exp(-math.log(n / bound.eps) - DEPTH))
                    ranking.rank_nodes(nodes, means, anchors, given, share, node_ranks, slopes)
                    ranking.interpolate(scores, nodes, node_ranks, slopes, found)
                for i in range(windows.n):
                    ranks[row, index[i]] = found[i]
            continue
        if state != SOLVED:
            for j in range(b):
                values[row, j] = math.nan
                for i in range(n if has_assignment else 0):
                    assignment[row, j, i] = math.nan
            continue
        write_means(unit_, count, infinite, bound, windows, room, means)
        for j in range(b):
            values[row, j] = means[j]
            if has_assignment:
                begin, end = anchor_shares(j, windows, room.whole, found)
                write_shares(begin * BLOCK, min(end * BLOCK, windows.n), found, index, assignment[row, j])
    hold(numbers)
    hold(integers)
    hold(places)
    hold(samples)
    hold(few)
    hold(row_of_scores)
    hold(storage)


# --- the rule


class Rule(NamedTuple):
    """What the rule computes with."""

    changes: Any  # of the scores
    places: Any  # the differences of the cotangents of the ranks
    moved: Any  # numbers of the scores at each boundary, in the order of the tails
    rates: Any  # the cotangents of the sums whose quotients by the masses are the means
    wanted: Any
    slack: Any
    levels: Any  # what the numbers of each boundary are measured from


@compiled(EXACT)
def rule_of(few, scores, b, stride, moved):
    """Room for the rule, from the numbers of two arrays."""
    changes, rates = aligned(pointer_to(scores)), behind(pointer_to(few), 5 * b)
    return Rule(
        changes,
        behind(changes, stride),
        moved,
        rates,
        behind(rates, b),
        behind(rates, 2 * b),
        behind(rates, 3 * b),
    )


@compiled(INLINED)
def plan_again(temperature, bound, n, is_product, origin, room, band, boundaries):
    """The plan of the offsets that are given. Returns whether there was room for it."""
    cut = math.exp(-math.log(n / bound.eps) - DEPTH)
    _, mass, reference, offset = boundaries
    return bands.plan(reference, offset, mass, temperature, cut, bound.eps, is_product, origin, room, band)


@compiled(EXACT)
def write_levels(band, moved, levels):
    """The level of each boundary, from which its numbers are measured: that of the score beside it with the larger Q R.

    A score that dominates a boundary lies beside it. The derivative is then of what differs from it, and 0 there. The
    level that is subtracted has no part in the derivative of the scores.
    """
    tails = band.tails
    for j in range(band.b):
        above, below = band.at[j] + band.first[j] - 1, band.at[j] + band.first[j]
        has_above, has_below = band.first[j] > 0, band.first[j] < band.n
        tail, other = tails[above] if has_above else 0.0, tails[below] if has_below else 0.0
        of_above, of_below = tail - tail * tail, other - other * other
        if has_above and has_below and of_above == of_below:
            levels[j] = 0.5 * (moved[above] + moved[below]) if of_above > 0.0 else 0.0
        else:
            place, largest = (above, of_above) if of_above > of_below else (below, of_below)
            levels[j] = moved[place] if largest > 0.0 else 0.0


@compiled(INLINED)
def sides(tail, is_above):
    """The shares Q above a boundary and R below it, of which the tail is the one on the other side of the peak."""
    rest = 1.0 - tail
    return where(is_above, rest, tail), where(is_above, tail, rest)


@compiled(INLINED)
def numbers_at(i, j, band, rule):
    """The numbers of a block at a boundary, measured from the level, and the slack."""
    return take(rule.moved, band.at[j] + i) - rule.levels[j] + rule.slack[j]


@compiled(INLINED)
def descend(i, j, q, r, band, sums, rule):
    """R times the sum of the Q times numbers of the boundaries down to j, for a block of scores."""
    some = take(sums, i) + q * numbers_at(i, j, band, rule)
    put(some, sums, i)
    return r * some


@compiled(INLINED)
def ascend(i, j, q, r, band, sums, rule):
    """Q times the sum of the R times numbers of the boundaries below j, for a block of scores."""
    some = take(sums, i)
    put(some + r * numbers_at(i, j, band, rule), sums, i)
    return q * some


@compiled(EXACT)
def clear(found, n):
    """Write 0 for all scores."""
    nothing = filled(found, 0.0)
    for block in range(n // BLOCK + 1):
        put(nothing, found, block * BLOCK)


@compiled(EXACT)
def sum_across(band, room, rule, found):
    """M (moved + slack), summed over the scores."""
    tails, sums, parts = band.tails, room.sums, room.parts
    nothing = filled(sums, 0.0)
    clear(sums, band.n)
    for j in range(band.b):
        total, more, place, first = nothing, nothing, band.at[j], band.first[j]
        middle = first // BLOCK * BLOCK
        for i in range(band.low[j] * BLOCK, middle, BLOCK):
            tail = take(tails, place + i)
            total = total + descend(i, j, 1.0 - tail, tail, band, sums, rule)
        q, r = sides(take(tails, place + middle), first_places(tails, first - middle))
        total = total + descend(middle, j, q, r, band, sums, rule)
        for i in range(middle + BLOCK, band.high[j] * BLOCK, BLOCK):
            tail = take(tails, place + i)
            more = more + descend(i, j, tail, 1.0 - tail, band, sums, rule)
        put(total + more, parts, j * BLOCK)
    clear(sums, band.n)
    for j in range(band.b - 1, -1, -1):
        total, more, place, first = take(parts, j * BLOCK), nothing, band.at[j], band.first[j]
        middle = first // BLOCK * BLOCK
        for i in range(band.low[j] * BLOCK, middle, BLOCK):
            tail = take(tails, place + i)
            total = total + ascend(i, j, 1.0 - tail, tail, band, sums, rule)
        q, r = sides(take(tails, place + middle), first_places(tails, first - middle))
        total = total + ascend(middle, j, q, r, band, sums, rule)
        for i in range(middle + BLOCK, band.high[j] * BLOCK, BLOCK):
            tail = take(tails, place + i)
            more = more + ascend(i, j, tail, 1.0 - tail, band, sums, rule)
        found[j] = sum_of(total + more)


@compiled(INLINED)
def change_at(i, change, near, x, changes):
    """Add the change of a block of scores. Returns it times x - near."""
    put(take(changes, i) + change, changes, i)
    return change * (take(x, i) - near)


@compiled(EXACT)
def write_changes(reference, band, room, rule):
    """M (moved + slack), summed over the boundaries into `changes`. Returns its sum times x - r over both."""
    tails, sums, x, changes = band.tails, room.sums, room.x, rule.changes
    clear(changes, band.n)
    clear(sums, band.n)
    moment = more = filled(sums, 0.0)
    for j in range(band.b):
        place, first, near = band.at[j], band.first[j], reference[j]
        middle = first // BLOCK * BLOCK
        for i in range(band.low[j] * BLOCK, middle, BLOCK):
            tail = take(tails, place + i)
            moment = moment + change_at(i, descend(i, j, 1.0 - tail, tail, band, sums, rule), near, x, changes)
        q, r = sides(take(tails, place + middle), first_places(tails, first - middle))
        moment = moment + change_at(middle, descend(middle, j, q, r, band, sums, rule), near, x, changes)
        for i in range(middle + BLOCK, band.high[j] * BLOCK, BLOCK):
            tail = take(tails, place + i)
            more = more + change_at(i, descend(i, j, tail, 1.0 - tail, band, sums, rule), near, x, changes)
    clear(sums, band.n)
    for j in range(band.b - 1, -1, -1):
        place, first, near = band.at[j], band.first[j], reference[j]
        middle = first // BLOCK * BLOCK
        for i in range(band.low[j] * BLOCK, middle, BLOCK):
            tail = take(tails, place + i)
            moment = moment + change_at(i, ascend(i, j, 1.0 - tail, tail, band, sums, rule), near, x, changes)
        q, r = sides(take(tails, place + middle), first_places(tails, first - middle))
        moment = moment + change_at(middle, ascend(middle, j, q, r, band, sums, rule), near, x, changes)
        for i in range(middle + BLOCK, band.high[j] * BLOCK, BLOCK):
            tail = take(tails, place + i)
            more = more + change_at(i, ascend(i, j, tail, 1.0 - tail, band, sums, rule), near, x, changes)
    return sum_of(moment + more)


@compiled(EXACT)
def add_shares(b, band, room, rule):
    """Add the shares of the anchors times their rates."""
    changes, sums, rates, shares = rule.changes, room.sums, rule.rates, band.shares
    begin = 0
    for j in range(b + 1):
        end = band.first[j] if j < band.b else band.n
        for i in range(begin, end):
            sums[i] = rates[j] if j < b else 0.0
        begin = end
        if begin == band.n:
            break
    for i in range(band.n, (band.n // BLOCK + 1) * BLOCK):
        sums[i] = 0.0
    for j in range(band.b):
        first, rate = band.first[j], rates[j]
        for i in range(first // BLOCK * BLOCK, band.high[j] * BLOCK, BLOCK):
            put(take(sums, i) + take(shares, band.down[j] + i) * rate, sums, i)
        if j + 1 < b:
            rate = rates[j + 1]
            for i in range(band.low[j] * BLOCK, first, BLOCK):
                put(take(sums, i) + take(shares, band.up[j] + i) * rate, sums, i)
    for i in range(0, (band.n // BLOCK + 1) * BLOCK, BLOCK):
        put(take(changes, i) + take(sums, i) * take(room.whole, i), changes, i)


@compiled(EXACT)
def differences(row, b, infinite, reference, band, x, index, ubar, has_places, rule):
    """What the cotangent of a score's share above a boundary has beyond that of its share below.

    Infinite scores have no part in the means.
    """
    rates, places, moved = rule.rates, rule.places, rule.moved
    n = band.n
    for j in range(band.b):
        has_next = j + 1 < b
        above, below = rates[j], rates[j + 1] if has_next else 0.0
        r = reference[j]
        next_ = reference[j + 1] if j + 1 < band.b else r
        place, start, stop = band.at[j], band.low[j] * BLOCK, band.high[j] * BLOCK
        for i in range(start, stop, BLOCK):
            score = take(x, i)
            put((score - r) * above - (score - next_) * below, moved, place + i)
        for i in range(start, min(stop, infinite)):
            moved[place + i] = 0.0
        if has_next and has_places:
            for i in range(start, stop, BLOCK):
                put(take(moved, place + i) + take(places, i), moved, place + i)
        if ubar.shape[0] > 0:
            for i in range(start, min(stop, n)):
                moved[place + i] += ubar[row, j, index[i]]
                if has_next:
                    moved[place + i] -= ubar[row, j + 1, index[i]]
        for i in range(n, stop):
            moved[place + i] = 0.0


@compiled(INLINED)
def pull(bound, room, band, boundaries, rule):
    """The cotangents of the scores times the temperature, into `changes`, and the sum of them times x - r.

    `rule.wanted` has the cotangents of the offsets.
    """
    b, wanted, slack = band.b, rule.wanted, rule.slack
    smallest = bound.smallest * bound.smallest
    width = systems.prepare(boundaries.masses, band, room.edges, smallest, False, room.sums, room.parts, room.system)
    write_levels(band, rule.moved, rule.levels)
    bands.reset(slack, b, 0.0)
    sum_across(band, room, rule, room.size)
    for j in range(b):
        wanted[j] -= room.size[j]
    systems.solve(wanted, PRECISE * bound.eps, 0.0, width, band, band.tails, room.sums, room.parts, room.system, slack)
    return write_changes(boundaries.reference, band, room, rule)


@kernel(EXACT)
def pull_ladder_rows(
    x, where, tau, unit, offsets, references, vbar, ubar, rbar, c, xbar, taubar, left, bound, start, stop
):
    """The cotangents of the scores and of the temperature, from those of the results and the offsets.

    A cotangent that has no rows is 0.
    """
    n, b = x.shape[1], offsets.shape[1]
    raw = room_for(n, where.shape[0] > 0, offsets)
    numbers, integers = np.empty(bands.size_of(n, b)), np.empty(bands.INTEGERS * b, np.int64)
    order_sizes = sorting.sizes_of(n, b)
    places, samples = np.empty(order_sizes[0], np.int64), np.empty(order_sizes[1])
    more = bands.padded(n)
    few, scores = np.empty(9 * b), np.empty(2 * more + BLOCK)
    capacity = bands.least_capacity(n, b)
    storage, cotangents = bands.storage_for(capacity), np.empty(capacity + BLOCK)
    room, order, boundaries = bands.room_of(numbers, n, b), sorting.room_of(places, samples, n), boundaries_of(few, b)
    band = bands.band_of(n, b, capacity, integers, storage)
    rule = rule_of(few, scores, b, more, aligned(pointer_to(cotangents)))
    changes = rule.changes
    index = order.index
    bands.reset(rule.places, more, 0.0)
    is_few = rbar.shape[0] > 0 and b < n
    means, share, by_offset = np.empty(b), np.empty(b + 1), np.empty(b)
    of_nodes, node_room, direct = np.empty((5, b + 2)), np.empty((2, b + 1)), np.empty(n)
    nodes, node_ranks, slopes, by_node, by_rank = of_nodes[0], of_nodes[1], of_nodes[2], of_nodes[3], of_nodes[4]
    for row in range(start, stop):
        out, slice_ = xbar[row], masked_row(x, where, row, -math.inf, raw)
        left[row] = False
        temperature, mass = number_of(tau, row), number_of(unit, row)
        state, count, infinite, _ = is_usual(slice_, temperature, bound)
        if state == INVALID or offsets[row, 0] != offsets[row, 0]:
            for i in range(n):  # only finite scores have a derivative
                out[i] = math.nan if math.fabs(slice_[i]) <= bound.largest else 0.0
            taubar[row] = math.nan
            continue
        left[row] = state == LEFT
        for i in range(n):
            out[i] = 0.0
        taubar[row] = 0.0
        if state != SOLVED:
            continue
        active = 0
        for j in range(b):
            boundaries.reference[j], boundaries.offset[j] = references[row, j], offsets[row, j]
            if offsets[row, j] > -bound.saturated:
                active = j + 1
            rate = vbar[row, j] if vbar.shape[0] > 0 else 0.0
            rule.rates[j] = rate / mass_of_row(j, mass, count, infinite, bound)
        level = -math.inf
        if 2 * b <= n and active == b:  # the lowest anchor takes the rest, whose scores have no part
            threshold = references[row, b - 1] + temperature * offsets[row, b - 1]
            reach = (math.log(n / bound.eps) + DEPTH) * temperature
            level = sorting.nearest_level(slice_, threshold, reach, bound.largest)
        taken = sorting.gather(slice_, level, infinite, bound.largest, room.x, order)
        bands.fill_block(taken, room.x)
        windows = bands.part_of(band, taken, active)
        if active > 0:
            bands.reset(boundaries.masses, active, mass)
            bands.reset(boundaries.mass, active, 0.0)
            is_product, origin = bands.fill_powers(taken, temperature, room)
            while not plan_again(temperature, bound, n, is_product, origin, room, windows, boundaries):
                capacity *= 4
                storage, cotangents = bands.storage_for(capacity), np.empty(capacity + BLOCK)
                band = bands.band_of(n, b, capacity, integers, storage)
                windows = bands.part_of(band, taken, active)
                rule = rule_of(few, scores, b, more, aligned(pointer_to(cotangents)))
        else:
            bands.reset(room.whole, taken, 1.0)
        if is_few:
            # The cotangents of the ranks become those of the means, of the offsets and of the temperature.
            sorted_ = (room.x, taken, infinite)
            write_means(mass, count, infinite, bound, windows, room, means)
            ranking.fill_nodes(sorted_, means, nodes)
            anchors = (mass, count, infinite, ranking.ties_of(sorted_))
            cut = math.exp(-math.log(n / bound.eps) - DEPTH)
            given = (temperature, boundaries.reference, boundaries.offset, active, cut)
            ranking.rank_nodes(nodes, means, anchors, given, share, node_ranks, slopes)
            ranking.pull_scores(row, sorted_, nodes, node_ranks, slopes, index, rbar, direct, by_node, by_rank)
            taubar[row] = ranking.pull_nodes(
                nodes, means, anchors, given, share, node_room, by_rank, by_node, by_offset
            )
            ranking.pull_means(sorted_, anchors[3], means, by_node, rule.rates, direct)
            for j in range(b):
                rule.rates[j] /= mass_of_row(j, mass, count, infinite, bound)
        if active > 0:
            boundaries.masses[active] = max(count - mass * active, 0.1 * mass)
            has_places = rbar.shape[0] > 0 and not is_few
            if has_places:
                for i in range(taken):
                    rule.places[i] = -rbar[row, index[i]]
            differences(row, b, infinite, boundaries.reference, windows, room.x, index, ubar, has_places, rule)
            for j in range(active):
                rule.wanted[j] = c[row, j] if c.shape[0] > 0 else 0.0
                if is_few:
                    rule.wanted[j] += by_offset[j]
            moment = pull(bound, room, windows, boundaries, rule)
            taubar[row] -= moment / temperature / temperature
            for i in range(taken):
                changes[i] /= temperature
        else:
            bands.reset(changes, more, 0.0)
        if vbar.shape[0] > 0 or is_few:
            add_shares(b, windows, room, rule)
        if is_few:
            for i in range(infinite, taken):
                changes[i] += direct[i]
        for i in range(infinite, taken):  # only finite scores have a derivative
            out[index[i]] = changes[i]
    hold(numbers)
    hold(integers)
    hold(places)
    hold(samples)
    hold(few)
    hold(scores)
    hold(storage)
    hold(cotangents)
