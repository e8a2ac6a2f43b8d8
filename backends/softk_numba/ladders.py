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
from .pointers import BLOCK, aligned, behind, filled, first_places, hold, largest_of, pointer_to, put, sum_of, take
from .rows import masked_row, number_of, room_for
from .vectors import INLINED, maximum, where

#: What becomes of a slice.
SOLVED, INVALID, LEFT, CROWDED = 0, 1, 2, 3
#: Scores farther from all boundaries than log(n / eps) and this margin, in temperatures, are left out.
MARGIN = 10.0
#: Shares below exp(-log(n / eps) - this) of the peak are left out.
DEPTH = 6.0
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
def mean_of(found, start, stop, x, infinite, mass):
    """The mean of the finite scores in the given blocks."""
    near = x[max(start * BLOCK, infinite)]
    total = nothing = filled(found, 0.0)
    for i in range(start * BLOCK, stop * BLOCK, BLOCK):
        part = take(found, i) * (take(x, i) - near)
        total = total + where(first_places(found, infinite - i), nothing, part)
    return near + sum_of(total) / mass


@compiled(EXACT)
def fill_nodes(unit, count, infinite, bound, band, room, found, means, nodes):
    """The means of the anchors, and the nodes between which ranks are interpolated."""
    for j in range(means.shape[0]):
        begin, end = anchor_shares(j, band, room.whole, found)
        means[j] = end_of_row(j, unit, count, infinite, bound)
        if means[j] == 0.0:
            means[j] = mean_of(found, begin, end, room.x, infinite, mass_of_row(j, unit, count, infinite, bound))
    ranking.fill_nodes((room.x, band.n, infinite), means, nodes)


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
                    fill_nodes(unit_, count, infinite, bound, windows, room, found, means, nodes)
                    scores = (room.x, windows.n, infinite)
                    anchors = (unit_, count, infinite, ranking.ties_of(scores))
                    given = (tau_, reference, offset, windows.b, math.exp(-math.log(n / bound.eps) - DEPTH))
                    ranking.rank_nodes(nodes, means, anchors, given, share, node_ranks, slopes)
                    ranking.interpolate(scores, nodes, node_ranks, slopes, found)
                for i in range(windows.n):
                    ranks[row, index[i]] = found[i]
            continue
        if has_assignment:
            for j in range(b):
                for i in range(n):
                    assignment[row, j, i] = 0.0 if state == SOLVED else math.nan
        if state != SOLVED:
            for j in range(b):
                values[row, j] = math.nan
            continue
        for j in range(b):
            begin, end = anchor_shares(j, windows, room.whole, found)
            if has_assignment:
                for i in range(begin * BLOCK, min(end * BLOCK, windows.n)):
                    assignment[row, j, index[i]] = found[i]
            values[row, j] = end_of_row(j, unit_, count, infinite, bound)
            if values[row, j] == 0.0:
                mass = mass_of_row(j, unit_, count, infinite, bound)
                values[row, j] = mean_of(found, begin, end, room.x, infinite, mass)
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
    found: Any  # the shares of an anchor
    moved: Any  # numbers of the scores at each boundary, in the order of the tails
    rates: Any  # the cotangents of the sums whose quotients by the masses are the means
    wanted: Any
    slack: Any


@compiled(EXACT)
def rule_of(few, scores, b, stride, moved):
    """Room for the rule, from the numbers of two arrays."""
    changes, rates = aligned(pointer_to(scores)), behind(pointer_to(few), 5 * b)
    return Rule(
        changes,
        behind(changes, stride),
        behind(changes, 2 * stride),
        moved,
        rates,
        behind(rates, b),
        behind(rates, 2 * b),
    )


@compiled(INLINED)
def plan_again(temperature, bound, n, is_product, origin, room, band, boundaries):
    """The plan of the offsets that are given. Returns whether there was room for it."""
    cut = math.exp(-math.log(n / bound.eps) - DEPTH)
    _, mass, reference, offset = boundaries
    return bands.plan(reference, offset, mass, temperature, cut, bound.eps, is_product, origin, room, band)


@compiled(EXACT)
def measure_from_peaks(band, moved):
    """Measure the given numbers of each boundary from that of the score with the largest Q R.

    If one score dominates a boundary, the derivative is of what differs from it, and 0 there. Returns nothing; the
    multiple of the weights that is subtracted has no part in the derivative of the scores.
    """
    nothing = filled(moved, 0.0)
    for j in range(band.b):
        place, start, stop = band.at[j], band.low[j] * BLOCK, band.high[j] * BLOCK
        most = nothing
        for i in range(start, stop, BLOCK):
            tail = take(band.tails, place + i)
            most = maximum(most, tail - tail * tail)
        largest = largest_of(most)
        if not largest > 0.0:
            continue
        ties, levels = nothing, nothing
        for i in range(start, stop, BLOCK):
            tail = take(band.tails, place + i)
            is_peak = tail - tail * tail == largest
            ties = ties + where(is_peak, filled(moved, 1.0), nothing)
            levels = levels + where(is_peak, take(moved, place + i), nothing)
        count = sum_of(ties)
        level = sum_of(levels) / count
        for i in range(start, stop, BLOCK):
            change = take(moved, place + i) - level
            if count == 1.0:
                tail = take(band.tails, place + i)
                change = where(tail - tail * tail == largest, nothing, change)
            put(change, moved, place + i)


@compiled(EXACT)
def across(reference, band, room, rule, found):
    """M (moved + slack) of every score, summed over the boundaries into `changes` and over the scores into `found`.

    Returns its sum times x - r over both.
    """
    b, tails, sums, parts = band.b, band.tails, room.sums, room.parts
    v, moved, changes = rule.slack, rule.moved, rule.changes
    nothing = filled(sums, 0.0)
    for block in range(band.n // BLOCK + 1):
        put(nothing, changes, block * BLOCK)
        put(nothing, sums, block * BLOCK)
    moment = nothing
    for j in range(b):
        place, total = band.at[j], nothing
        for i in range(band.low[j] * BLOCK, band.high[j] * BLOCK, BLOCK):
            tail, is_above = take(tails, place + i), first_places(tails, band.first[j] - i)
            rest = 1.0 - tail
            some = take(sums, i) + where(is_above, rest, tail) * (take(moved, place + i) + v[j])
            put(some, sums, i)
            change = where(is_above, tail, rest) * some
            put(take(changes, i) + change, changes, i)
            total = total + change
            moment = moment + change * (take(room.x, i) - reference[j])
        put(total, parts, j * BLOCK)
    for block in range(band.n // BLOCK + 1):
        put(nothing, sums, block * BLOCK)
    for j in range(b - 1, -1, -1):
        place, total = band.at[j], take(parts, j * BLOCK)
        for i in range(band.low[j] * BLOCK, band.high[j] * BLOCK, BLOCK):
            tail, is_above = take(tails, place + i), first_places(tails, band.first[j] - i)
            rest, some = 1.0 - tail, take(sums, i)
            change = where(is_above, rest, tail) * some
            put(take(changes, i) + change, changes, i)
            total = total + change
            moment = moment + change * (take(room.x, i) - reference[j])
            put(some + where(is_above, tail, rest) * (take(moved, place + i) + v[j]), sums, i)
        found[j] = sum_of(total)
    return sum_of(moment)


@compiled(INLINED)
def add_shares(b, band, whole, rule):
    """Add the shares of the anchors times their rates."""
    changes, found = rule.changes, rule.found
    for j in range(b):
        begin, end = anchor_shares(j, band, whole, found)
        for i in range(begin * BLOCK, end * BLOCK, BLOCK):
            put(take(changes, i) + take(found, i) * rule.rates[j], changes, i)


@compiled(EXACT)
def differences(row, b, infinite, reference, band, x, index, ubar, rule):
    """What the cotangent of a score's share above a boundary has beyond that of its share below.

    Infinite scores have no part in the means.
    """
    rates, places, moved = rule.rates, rule.places, rule.moved
    n, nothing = band.n, filled(moved, 0.0)
    for j in range(band.b):
        has_next = j + 1 < b
        above, below = rates[j], rates[j + 1] if has_next else 0.0
        r = reference[j]
        next_ = reference[j + 1] if j + 1 < band.b else r
        place, start, stop = band.at[j], band.low[j] * BLOCK, band.high[j] * BLOCK
        for i in range(start, stop, BLOCK):
            score = take(x, i)
            value = (score - r) * above - (score - next_) * below
            value = where(first_places(moved, infinite - i), nothing, value)
            put(value + take(places, i) if has_next else value, moved, place + i)
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
    measure_from_peaks(band, rule.moved)
    bands.reset(slack, b, 0.0)
    across(boundaries.reference, band, room, rule, room.size)
    for j in range(b):
        wanted[j] -= room.size[j]
    systems.solve(wanted, PRECISE * bound.eps, 0.0, width, band, band.tails, room.sums, room.parts, room.system, slack)
    return across(boundaries.reference, band, room, rule, room.size)


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
    few, scores = np.empty(8 * b), np.empty(3 * more + BLOCK)
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
            fill_nodes(mass, count, infinite, bound, windows, room, rule.found, means, nodes)
            sorted_ = (room.x, taken, infinite)
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
            if rbar.shape[0] > 0 and not is_few:
                for i in range(taken):
                    rule.places[i] = -rbar[row, index[i]]
            differences(row, b, infinite, boundaries.reference, windows, room.x, index, ubar, rule)
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
            add_shares(b, windows, room.whole, rule)
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
