"""Sorting and ranking as kernels over rows: anchors of equal mass at equal distances.

`bands` has what is done in a slice. This file reads the slices, chooses the scores that matter, and writes the results.
All arithmetic is in float64, whose range is far beyond that of float32: every slice of float32 is solved here. A slice
of float64 that is out of the ordinary is left to the reference: one with a score of +inf, without a score that can be
selected, with a temperature near the ends of the range, or in which Newton's method does not converge.
"""

from __future__ import annotations

import math

import numpy as np

from . import bands, ranking
from .cache import compiled, kernel
from .operations import EXACT
from .rows import masked_row, number_of, room_for

#: What becomes of a slice.
SOLVED, INVALID, LEFT = 0, 1, 2
#: Scores farther from all boundaries than log(n / eps) and this margin, in temperatures, are left out.
MARGIN = 10.0
#: Shares below exp(-log(n / eps) - this) of the peak are left out.
DEPTH = 6.0
#: How far below the lowest boundary's score the boundary may lie before all scores are taken.
BELOW = 4.0
#: A conjugate gradient stops when it changes the solution of a derivative by less than this.
PRECISE = 1e-14


@compiled(EXACT)
def is_single(bound):
    """Whether the dtype is float32."""
    return bound.largest < 1e300


@compiled(EXACT)
def is_usual(x, tau, bound):
    """What becomes of the slice; how many scores can be selected, how many of these are infinite, and the lowest."""
    count = infinite = 0
    lowest, size = bound.largest, 0.0
    broken = not (0.0 < tau <= bound.largest)
    for i in range(x.shape[0]):
        value = np.float64(x[i])
        if value > -math.inf:
            count += 1
            infinite += 1 if value == math.inf else 0
            lowest, size = min(lowest, value), max(size, math.fabs(value))
        elif value != value:
            broken = True
    if broken:
        return INVALID, count, infinite, lowest
    usual = is_single(bound) or (count > 0 and size < 1e150 and bound.coldest < tau < bound.hottest)
    return (SOLVED if usual else LEFT), count, infinite, lowest


@compiled(EXACT)
def beneath(score, reach):
    """A number that lies below a score by at least `reach`, or by a few roundings if these are more."""
    return score - max(reach, 2.0**-50 * math.fabs(score))


@compiled(EXACT)
def level_of(x, rank, reach, most, largest):
    """A level below which no score matters: `reach` below a lower bound of the score of a rank; -inf for all scores.

    The largest scores of blocks are a sample: the one of that rank among them is not above the one among all. `most` is
    room for so many numbers.
    """
    n = x.shape[0]
    size = n // (8 * rank)
    if size < 2:
        return -math.inf
    bands.reset(most, rank, -math.inf)
    for start in range(0, n - size + 1, size):
        found = x[start]
        for j in range(start + 1, start + size):
            found = max(found, x[j])
        if found > most[rank - 1]:
            place = rank - 1
            while place > 0 and most[place - 1] < found:
                most[place] = most[place - 1]
                place -= 1
            most[place] = found
    return beneath(min(most[rank - 1], largest), reach)


@compiled(EXACT)
def gather(x, level, infinite, largest, into, index, room, index_room):
    """The scores above a level in descending order, in float64, and where they come from.

    +inf counts as the largest number of the dtype. `infinite` is how many of them there are; they come first.
    """
    count = 0
    for i in range(x.shape[0]):
        into[count], index[count] = x[i], i
        count += 1 if x[i] > level else 0
    # Runs of 16 are sorted by insertion, and then merged.
    for start in range(0, count, 16):
        for i in range(start + 1, min(start + 16, count)):
            value, place, j = into[i], index[i], i
            while j > start and into[j - 1] < value:
                into[j], index[j] = into[j - 1], index[j - 1]
                j -= 1
            into[j], index[j] = value, place
    width = 16
    while width < count:
        for start in range(0, count, 2 * width):
            middle, stop = min(start + width, count), min(start + 2 * width, count)
            one, other = start, middle
            for i in range(start, stop):
                if one < middle and (other >= stop or into[one] >= into[other]):
                    room[i], index_room[i] = into[one], index[one]
                    one += 1
                else:
                    room[i], index_room[i] = into[other], index[other]
                    other += 1
        for i in range(count):
            into[i], index[i] = room[i], index_room[i]
        width *= 2
    for i in range(infinite):
        into[i] = largest
    return count


@compiled(EXACT)
def nearest_level(x, threshold, reach, largest):
    """The level for a boundary that is known: `reach` below it, or below the score next to it in a wide gap."""
    nearest = -math.inf
    for i in range(x.shape[0]):
        value = min(np.float64(x[i]), largest)
        if value <= threshold:
            nearest = max(nearest, value)
    return beneath(min(threshold, nearest), reach)


@compiled(EXACT)
def mass_of(rows, unit, bound):
    """The mass of so many rows. One that misses a whole number by its rounding is set to it."""
    value = unit * rows
    nearest = np.round(value)
    return nearest if math.fabs(nearest - value) <= 4.0 * bound.eps * value else value


@compiled(EXACT)
def masses_of(unit, count, bound, mass):
    """The mass above each boundary. Returns how many boundaries have scores below them."""
    active = 0
    for j in range(mass.shape[0]):
        mass[j] = mass_of(j + 1, unit, bound)
        if math.floor(mass[j]) < count:
            active = j + 1
    return active


@compiled(EXACT)
def solve_slice(x, unit, tau, bound, rooms, spare, index, shares, tails, reference, offset):
    """The boundaries of a slice.

    Returns its state, how many boundaries are active, how many scores were taken, of how many, and how many of them are
    infinite. The last plan is that of the offsets.
    """
    n, b = x.shape[0], reference.shape[0]
    eps = bound.eps
    state, count, infinite, lowest = is_usual(x, tau, bound)
    if state != SOLVED:
        return state, 0, 0, 0, 0, shares, tails
    _, _, scores, numbers, _, _ = rooms
    mass, masses = numbers[10], spare[0]
    active = masses_of(unit, count, bound, mass)
    farthest = math.log(n / eps)
    level = -math.inf
    if 2 * b <= n and active == b:
        level = level_of(x, math.floor(mass[b - 1]) + 1, (farthest + MARGIN) * tau, spare[1], bound.largest)
    for j in range(active, b):
        offset[j] = -bound.saturated
        reference[j] = lowest if math.ceil(mass[j]) <= count else -bound.largest
    values, above, weights = scores[4], spare[1], spare[2]
    cut = math.exp(-farthest - DEPTH)
    taken = 0
    for _ in range(2):
        taken = gather(x, level, infinite, bound.largest, values, index[0], spare[1], index[1])
        for j in range(active):
            high, low = values[math.ceil(mass[j]) - 1], values[math.floor(mass[j])]
            reference[j] = x.dtype.type(high - 0.5 * (high - low))
            offset[j] = 0.0
        if active == 0:
            return SOLVED, active, taken, count, infinite, shares, tails
        bands.reset(masses, active, unit)
        masses[active] = count - mass[active - 1]
        for i in range(taken):
            above[i], weights[i] = i, 1.0
        above[taken] = taken
        odds, origin = bands.fill_odds(values[:taken], tau, scores[2:4])
        done, band = bands.newton(
            values[:taken],
            weights[:taken],
            above,
            masses,
            mass[:active],
            reference[:active],
            offset[:active],
            tau,
            cut,
            4.0 * eps,
            bound.smallest * bound.smallest,
            odds,
            origin,
            rooms,
            (shares, tails),
            is_single(bound),
        )
        shares, tails = band
        # Where Newton's method does not converge, the reference ends at its last step, too.
        if not (done or is_single(bound)):
            return LEFT, active, taken, count, infinite, shares, tails
        threshold = reference[active - 1] + tau * offset[active - 1]
        if level == -math.inf or level <= threshold - (farthest + MARGIN - BELOW) * tau:
            break
        level = -math.inf
    shares, tails = plan_again(
        values[:taken], reference[:active], offset[:active], tau, cut, odds, origin, rooms, shares, tails
    )
    return SOLVED, active, taken, count, infinite, shares, tails


@compiled(EXACT)
def plan_again(x, reference, offset, tau, cut, odds, origin, rooms, shares, tails):
    """The plan of given offsets."""
    whole_numbers, at, scores, numbers, _, _ = rooms
    b = reference.shape[0]
    first, low, high, sizes = whole_numbers[0, :b], whole_numbers[1, :b], whole_numbers[2, :b], whole_numbers[3, :b]
    bands.find_peaks(x, reference, offset, tau, first, numbers[5, :b], sizes)
    return bands.spread(
        x, reference, offset, tau, odds, origin, cut, first, low, high, at[:, :b], shares, tails, scores[0], scores[1]
    )


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
def anchor_shares(j, active, taken, first, low, high, at, shares, whole, found):
    """The shares of the scores of one anchor, and from which score to which they are."""
    begin = 0 if j == 0 else first[j - 1] if j <= active else taken
    end = first[j] if j < active else taken
    for i in range(begin, end):
        found[i] = whole[i]
    start, stop = begin, end
    if 0 < j <= active:
        start, shift = low[j - 1], at[0, j - 1] - low[j - 1]
        for i in range(start, begin):
            found[i] = shares[shift + i] * whole[i]
    if j < active:
        stop, shift = high[j], at[1, j] - first[j]
        for i in range(end, stop):
            found[i] = shares[shift + i] * whole[i]
    return start, stop


@compiled(EXACT)
def mean_of_row(j, begin, end, share, x, unit, count, infinite, bound):
    """The mean of the scores from `begin` to `end`, of which the anchor has these shares."""
    found = end_of_row(j, unit, count, infinite, bound)
    if found != 0.0:
        return found
    begin, total = max(begin, infinite), 0.0
    near = x[min(begin, x.shape[0] - 1)]
    for i in range(begin, end):
        total += share[i] * (x[i] - near)
    return near + total / mass_of_row(j, unit, count, infinite, bound)


@compiled(EXACT)
def fill_nodes(x, unit, count, infinite, bound, plan, room, means, nodes):
    """The means of the anchors, and the nodes between which ranks are interpolated."""
    active, first, low, high, at, shares, whole = plan
    for j in range(means.shape[0]):
        begin, end = anchor_shares(j, active, x.shape[0], first, low, high, at, shares, whole, room)
        means[j] = mean_of_row(j, begin, end, room, x, unit, count, infinite, bound)
    ranking.fill_nodes(x, infinite, means, nodes)


@kernel(EXACT)
def ladder_rows(x, where, tau, unit, values, assignment, ranks, offsets, references, left, bound, start, stop):
    """The state, which slices are left to the reference, and what has rows: values and assignment, or ranks."""
    n, b = x.shape[1], offsets.shape[1]
    rooms, spare, index = bands.room_of(n, b), np.empty((3, max(n, b) + 1)), np.empty((2, n + 1), np.int64)
    raw, found = room_for(n, where.shape[0] > 0, offsets), np.empty(n)
    shares, tails = np.empty(4 * n), np.empty(4 * n)
    reference, offset = np.empty(b), np.empty(b)
    first, low, high, at = rooms[0][0], rooms[0][1], rooms[0][2], rooms[1]
    sorted_, whole = rooms[2][4], rooms[2][1]
    means, share = np.empty(b), np.empty(b + 1)
    nodes, node_ranks, slopes = np.empty(b + 2), np.empty(b + 2), np.empty(b + 2)
    for row in range(start, stop):
        slice_ = masked_row(x, where, row, -math.inf, raw)
        mass = number_of(unit, row)
        state, active, taken, count, infinite, shares, tails = solve_slice(
            slice_, mass, number_of(tau, row), bound, rooms, spare, index, shares, tails, reference, offset
        )
        left[row] = state == LEFT
        if state != SOLVED:
            bands.reset(offset, b, math.nan)
            bands.reset(reference, b, math.nan)
        bands.copy(offset, offsets[row], b)
        bands.copy(reference, references[row], b)
        if active == 0:
            bands.reset(whole, taken, 1.0)
        if ranks.shape[0] > 0:
            # Scores of -inf are not transported. They share the last places.
            bands.reset(ranks[row], n, 0.5 * (count + (n - 1.0)) if state == SOLVED else math.nan)
            if state == SOLVED:
                q, r, s = sorted_[:taken], reference[:active], offset[:active]
                if b == n:
                    ranking.write_ranks(active, taken, first, low, high, at, tails, found)
                else:
                    plan = (active, first, low, high, at, shares, whole)
                    fill_nodes(q, mass, count, infinite, bound, plan, found, means, nodes)
                    of_anchors = (mass, count, infinite, ranking.ties_of(q, infinite))
                    boundaries = (number_of(tau, row), r, s, math.exp(-math.log(n / bound.eps) - DEPTH))
                    ranking.rank_nodes(nodes, means, of_anchors, boundaries, share, node_ranks, slopes)
                    ranking.interpolate(q, infinite, nodes, node_ranks, slopes, found)
                for i in range(taken):
                    ranks[row, index[0, i]] = found[i]
            continue
        bands.reset(values[row], b, math.nan)
        has_assignment = assignment.shape[0] > 0
        if has_assignment:
            for j in range(b):
                bands.reset(assignment[row, j], n, 0.0 if state == SOLVED else math.nan)
        if state != SOLVED:
            continue
        for j in range(b):
            begin, end = anchor_shares(j, active, taken, first, low, high, at, shares, whole, found)
            if has_assignment:
                for i in range(begin, end):
                    assignment[row, j, index[0, i]] = found[i]
            values[row, j] = mean_of_row(j, begin, end, found, sorted_[:taken], mass, count, infinite, bound)


@compiled(EXACT)
def measure_from_peaks(weights, first, low, high, at, tails, moved):
    """Measure the given numbers of each boundary from that of the score with the largest a Q R.

    If one score dominates a boundary, the derivative is of what differs from it, and 0 there. Returns nothing; the
    multiple of the weights that is subtracted has no part in the derivative of the scores.
    """
    for j in range(first.shape[0]):
        most, ties, level, peak = 0.0, 0, 0.0, -1
        for part in range(2):
            start, stop = (low[j], first[j]) if part == 0 else (first[j], high[j])
            shift = at[part, j] - start
            for i in range(start, stop):
                tail = tails[shift + i]
                weight = weights[i] * (tail * (1.0 - tail))
                if weight > most:
                    most, ties, level, peak = weight, 1, moved[shift + i], shift + i
                elif weight == most and weight > 0.0:
                    ties += 1
                    level += moved[shift + i]
        if ties == 0:
            continue
        level /= ties
        for part in range(2):
            start, stop = (low[j], first[j]) if part == 0 else (first[j], high[j])
            shift = at[part, j]
            for i in range(stop - start):
                moved[shift + i] -= level
        if ties == 1:
            moved[peak] = 0.0


@compiled(EXACT)
def across(x, weights, reference, first, low, high, at, tails, moved, v, sums, changes, found):
    """M (moved + a v) of every score, summed over the boundaries into `changes` and over the scores into `found`.

    Returns its sum times x - r over both.
    """
    n, b = x.shape[0], v.shape[0]
    bands.reset(changes, n, 0.0)
    bands.reset(sums, n, 0.0)
    moment, some = 0.0, np.empty(n)
    for j in range(b):
        place = at[0, j]
        one = bands.descend_with(
            tails, place, moved, place, weights, v[j], sums, changes, x, reference[j], low[j], first[j], True, some
        )
        place = at[1, j]
        other = bands.descend_with(
            tails, place, moved, place, weights, v[j], sums, changes, x, reference[j], first[j], high[j], False, some
        )
        found[j] = one[0] + other[0]
        moment += one[1] + other[1]
    bands.reset(sums, n, 0.0)
    for j in range(b - 1, -1, -1):
        place = at[0, j]
        one = bands.ascend_with(
            tails, place, moved, place, weights, v[j], sums, changes, x, reference[j], low[j], first[j], True, some
        )
        place = at[1, j]
        other = bands.ascend_with(
            tails, place, moved, place, weights, v[j], sums, changes, x, reference[j], first[j], high[j], False, some
        )
        found[j] += one[0] + other[0]
        moment += one[1] + other[1]
    return moment


@compiled(EXACT)
def differences(row, b, rates, infinite, reference, x, index, first, low, high, at, ubar, rbar, moved):
    """What the cotangent of a score's share above a boundary has beyond that of its share below.

    `rates` are the cotangents of the sums whose quotients by the masses are the means; infinite scores have no part.
    """
    for j in range(reference.shape[0]):
        has_next = j + 1 < b
        above, below = rates[j], rates[j + 1] if has_next else 0.0
        r = reference[j]
        next_ = reference[j + 1] if j + 1 < reference.shape[0] else r
        for part in range(2):
            start, stop = (low[j], first[j]) if part == 0 else (first[j], high[j])
            shift = at[part, j] - start
            for i in range(start, stop):
                value = 0.0
                if rbar.shape[0] > 0:
                    value = -rbar[row, index[i]] if has_next else 0.0
                if i >= infinite:
                    value += above * (x[i] - r) - below * (x[i] - next_)
                if ubar.shape[0] > 0:
                    value += ubar[row, j, index[i]]
                    if has_next:
                        value -= ubar[row, j + 1, index[i]]
                moved[shift + i] = value


@kernel(EXACT)
def pull_ladder_rows(
    x, where, tau, unit, offsets, references, vbar, ubar, rbar, c, xbar, taubar, left, bound, start, stop
):
    """The cotangents of the scores and of the temperature, from those of the results and the offsets.

    A cotangent that has no rows is 0.
    """
    n, b = x.shape[1], offsets.shape[1]
    rooms, spare, index = bands.room_of(n, b), np.empty((3, max(n, b) + 1)), np.empty((2, n + 1), np.int64)
    raw = room_for(n, where.shape[0] > 0, offsets)
    shares, tails, moved = np.empty(4 * n), np.empty(4 * n), np.empty(4 * n)
    reference, offset, rates = np.empty(b), np.empty(b), np.empty(b)
    direct = np.empty(n)
    whole_numbers, places, scores, numbers, room, matrix = rooms
    values, changes, sums, whole = scores[4], spare[1], scores[0], scores[1]
    is_few = rbar.shape[0] > 0 and b < n
    means, share, by_offset = np.empty(b), np.empty(b + 1), np.empty(b)
    of_nodes, node_room = np.empty((5, b + 2)), np.empty((2, b + 1))
    nodes, node_ranks, by_node, by_rank, slopes = of_nodes[0], of_nodes[1], of_nodes[2], of_nodes[3], of_nodes[4]
    for row in range(start, stop):
        temperature, mass = number_of(tau, row), number_of(unit, row)
        out = xbar[row]
        slice_ = masked_row(x, where, row, -math.inf, raw)
        left[row] = False
        if offsets[row, 0] != offsets[row, 0]:
            for i in range(n):  # only finite scores have a derivative
                out[i] = math.nan if math.fabs(slice_[i]) <= bound.largest else 0.0
            taubar[row] = math.nan
            continue
        state, count, infinite, _ = is_usual(slice_, temperature, bound)
        left[row] = state == LEFT
        bands.reset(out, n, 0.0)
        taubar[row] = 0.0
        if state != SOLVED:
            continue
        active = 0
        for j in range(b):
            reference[j], offset[j] = references[row, j], offsets[row, j]
            if offset[j] > -bound.saturated:
                active = j + 1
        farthest = math.log(n / bound.eps)
        level = -math.inf
        if 2 * b <= n and active == b:  # the lowest anchor takes the rest, whose scores have no part
            threshold = reference[active - 1] + temperature * offset[active - 1]
            level = nearest_level(slice_, threshold, (farthest + MARGIN) * temperature, bound.largest)
        taken = gather(slice_, level, infinite, bound.largest, values, index[0], spare[1], index[1])
        bands.reset(rates, b, 0.0)
        bands.reset(direct, taken, 0.0)
        if vbar.shape[0] > 0:
            for j in range(b):
                rates[j] = vbar[row, j] / mass_of_row(j, mass, count, infinite, bound)
        r, s = reference[:active], offset[:active]
        first, low, high = whole_numbers[0, :active], whole_numbers[1, :active], whole_numbers[2, :active]
        at, q = places[:, :active], values[:taken]
        cut = math.exp(-farthest - DEPTH)
        if active == 0:
            bands.reset(whole, taken, 1.0)
        else:
            odds, origin = bands.fill_odds(q, temperature, scores[2:4])
            shares, tails = plan_again(q, r, s, temperature, cut, odds, origin, rooms, shares, tails)
        if is_few:
            # The cotangents of the ranks become those of the means, of the offsets and of the temperature.
            plan = (active, first, low, high, at, shares, whole)
            fill_nodes(q, mass, count, infinite, bound, plan, sums, means, nodes)
            ties = ranking.ties_of(q, infinite)
            of_anchors, boundaries = (mass, count, infinite, ties), (temperature, r, s, cut)
            ranking.rank_nodes(nodes, means, of_anchors, boundaries, share, node_ranks, slopes)
            ranking.pull_scores(row, q, infinite, nodes, node_ranks, slopes, index[0], rbar, direct, by_node, by_rank)
            taubar[row] = ranking.pull_nodes(
                nodes, means, of_anchors, boundaries, share, node_room, by_rank, by_node, by_offset
            )
            ranking.pull_means(q, infinite, ties, means, by_node, rates, direct)
            for j in range(b):
                rates[j] /= mass_of_row(j, mass, count, infinite, bound)
        if active > 0:
            moved = bands.grown(moved, tails.shape[0])
            weights, masses, smallest = spare[2], spare[0], bound.smallest * bound.smallest
            bands.reset(weights, taken, 1.0)
            bands.reset(masses, active, mass)
            masses[active] = max(count - mass * active, 0.1 * mass)
            excess, edges, lam = numbers[0, :active], numbers[1, :active], numbers[2, :active]
            rows, scale, spared = numbers[3, :active], numbers[4, :active], numbers[5, :active]
            found = numbers[10, :active]
            for i in range(taken + 1):
                changes[i] = i
            bands.excesses(
                weights[:taken], changes, masses[:active], bound.eps, first, low, high, at, tails, excess, edges
            )
            width = bands.prepare(
                weights[:taken],
                masses,
                first,
                low,
                high,
                at,
                tails,
                edges,
                smallest,
                sums,
                rows,
                spared,
                room,
                matrix,
                scale,
            )
            of_ranks = rbar[:0] if is_few else rbar
            differences(row, b, rates, infinite, r, q, index[0], first, low, high, at, ubar, of_ranks, moved)
            measure_from_peaks(weights, first, low, high, at, tails, moved)
            bands.reset(lam, active, 0.0)
            across(q, weights, r, first, low, high, at, tails, moved, lam, sums, changes, found)
            for j in range(active):
                found[j] = (np.float64(c[row, j]) if c.shape[0] > 0 else 0.0) - found[j]
                if is_few:
                    found[j] += by_offset[j]
            bands.solve(
                found,
                PRECISE,
                width,
                weights[:taken],
                masses,
                rows,
                first,
                low,
                high,
                at,
                tails,
                sums,
                numbers[6:10],
                matrix,
                scale,
                lam,
            )
            moment = across(q, weights, r, first, low, high, at, tails, moved, lam, sums, changes, found)
            for i in range(taken):
                direct[i] += changes[i] / temperature
            taubar[row] -= moment / temperature / temperature
        if vbar.shape[0] > 0 or is_few:
            for j in range(b):
                begin, end = anchor_shares(j, active, taken, first, low, high, at, shares, whole, sums)
                for i in range(begin, end):
                    direct[i] += rates[j] * sums[i]
        for i in range(taken):
            out[index[0, i]] = direct[i]
        for i in range(infinite):  # only finite scores have a derivative
            out[index[0, i]] = 0.0
