r"""The plan of one slice on evenly spaced anchors, within the windows where it is not negligible.

This is the mathematics of `softk._reference.plan`, and names here are the names there. Scores are sorted, the highest
first, and all numbers are float64, but for some systems of scores of float32. Three things differ:

- **Windows.** A score sends mass to the anchor where its share is largest, its peak, and to the anchors beside it until
  the share falls below `cut`, relative to the peak. Because the scores are sorted, the scores that share a boundary j
  are contiguous: those before `first[j]` have their peak above the boundary, the others below it. The score nearest to
  a boundary is always kept, so that a boundary in a wide gap has a derivative.
- **Blocks.** Windows are made of whole blocks: as many scores as a vector has places, from a multiple of that number
  on. So no loop has a rest of single scores. The block with `first[j]` has scores of both kinds; it is always kept. The
  last block is filled up with copies of the last score, which have no share of any anchor but their peak.
- **Products.** The share at the next anchor is the share at this one times exp(-z). For evenly spaced anchors exp(z) is
  a product of a number of the score and a number of the boundary, so that a share costs no exponential of its own.

`systems` solves the systems with the Jacobian.

Newton's method starts at the middles between the sorted scores. If epsilon is large and the anchors take few of the
scores, the mass M_j above a boundary is then far more than the wanted C_j, and falls like exp(-offset): a step for
M_j = C_j raises the offset by about 1. A step for log M_j = log C_j has no such limit. So the first steps have one of
two other right-hand sides, which equal M - C up to its square:

    write_logs_of_sides      M log(M / C) of the smaller side of each boundary
    write_logs_of_anchors    sum_l m_l log(m_l / c_l) of the masses of the anchors above each boundary

The second one takes fewer steps, but only if many scores are shared at all boundaries. Neither is sure to ascend. A
step that does not, that is not much shorter than the one before, or that is longer than the range of the scores is not
taken: the method starts again, by damped steps for M = C. The array operations damp them alike.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from . import systems
from .cache import compiled
from .operations import EXACT, WITHOUT_SUMS, exponential
from .pointers import BLOCK, aligned, behind, filled, first_places, pointer_to, put, single, sum_of, take
from .vectors import INLINED, exp, where

#: What Newton's method ends with: the boundaries, no convergence, or windows that do not fit into the room for them.
FOUND, ENDLESS, CROWDED = 0, 1, 2
#: The largest number of Newton steps.
STEPS = 40
#: A step whose range is smaller is the last one in float32, and the last but one in float64: half the square of the
#: range is what it leaves. In float64 it is the last one, too, if it leaves less than a rounding.
OF_SINGLE, OF_DOUBLE, ENOUGH = 5e-4, 1e-4, 1e-8
#: Boundaries are soft if so much of an anchor's mass is shared at each of them.
SOFT = 0.1
#: A step for the logarithms must be shorter than the one before by this factor.
SHORTER = 0.7
#: A step for the logarithms may change a threshold by the range of the scores and so many temperatures.
BEYOND = 20.0
#: At the start and after a step above the first number, the next step may be rough: windows of many boundaries then end
#: where the shares are below the second number, over the number of scores.
SMALL, ROUGH = 0.05, 1e-3
#: A change of an offset that is a rounding of float32.
LEAST = 2.0**-24
#: The largest range of a step for M = C that is taken as it is.
FULL = 1.0
#: The largest range of the scores, in temperatures, for which exp(z) is formed as a product.
REACH = 300.0
#: The largest one for which no tail is below the normal numbers of float32.
SINGLE_REACH = 150.0


class Band(NamedTuple):
    """The windows of n scores at b boundaries, and what they hold."""

    n: int
    b: int
    capacity: int  # how many shares there is room for, and how many tails
    first: Any  # how many scores have their peak above each boundary
    low: Any  # the first block of each window
    high: Any  # the block after its last one
    at: Any  # where the tails of each window begin, less the first score of it
    up: Any  # where the shares of anchor j + 1 begin, of the scores whose peak is above boundary j
    down: Any  # where the shares of anchor j begin, of the scores whose peak is below boundary j
    counts: Any  # how many boundaries are pooled
    shares: Any  # relative to the peak
    tails: Any  # R of the scores whose peak is above the boundary, Q of the others
    singles: Any  # the tails in float32


class Room(NamedTuple):
    """Room for slices of at most n scores and b boundaries."""

    x: Any  # the scores, the highest first
    rises: Any  # exp(z) of the scores, from an origin
    falls: Any  # exp(-z)
    sums: Any
    whole: Any  # 1 / the sum of the shares, relative to the peak
    factors: Any  # exp(-z) of the origin at the boundaries
    excess: Any  # sum a Q - C
    edges: Any  # sum a Q R
    size: Any  # the step
    pooled: Any
    parts: Any  # a vector of each boundary
    others: Any
    single_sums: Any  # the same in float32
    single_parts: Any
    system: systems.Room


#: There is room for so many boundaries whose windows have all scores.
WHOLE = 16
#: How many rows of scores, of boundaries and of integers for each boundary there are.
ROWS, NUMBERS, INTEGERS = 5, 5, 7


@compiled(EXACT)
def padded(n):
    """Room for so many numbers and the rest of their last block, of which there is one in any case."""
    return (n // BLOCK + 2) * BLOCK


@compiled(EXACT)
def size_of(n, b):
    """How many numbers `room_of` needs."""
    return (
        ROWS * padded(n)
        + NUMBERS * padded(b)
        + 2 * BLOCK * b
        + systems.size_of(b, padded(b))
        + padded(n)
        + BLOCK * b
        + BLOCK
    )


@compiled(EXACT)
def room_of(numbers, n, b):
    """Room for slices of at most n scores and b boundaries, from the numbers of an array."""
    start = aligned(pointer_to(numbers))
    more, wide = padded(n), padded(b)
    few = behind(start, ROWS * more)
    parts = behind(few, NUMBERS * wide)
    singles = behind(parts, 2 * BLOCK * b)
    return Room(
        start,
        behind(start, more),
        behind(start, 2 * more),
        behind(start, 3 * more),
        behind(start, 4 * more),
        few,
        behind(few, wide),
        behind(few, 2 * wide),
        behind(few, 3 * wide),
        behind(few, 4 * wide),
        parts,
        behind(parts, BLOCK * b),
        single(singles),
        single(behind(singles, more)),
        systems.room_of(behind(singles, more + BLOCK * b), b, wide),
    )


@compiled(EXACT)
def storage_for(capacity):
    """An array with room for so many shares and tails."""
    return np.empty(2 * capacity + capacity // 2 + BLOCK)


@compiled(EXACT)
def least_capacity(n, b):
    """How much room for shares to begin with: for all scores at a few boundaries, or for a few blocks at all of them.

    Room that is not used costs nothing, as long as nothing is written there.
    """
    return min(max(b, 4), WHOLE) * padded(n) + 4 * BLOCK * b


@compiled(EXACT)
def band_of(n, b, capacity, integers, storage):
    """The windows of n scores and b boundaries, which are still to be found."""
    first, shares = pointer_to(integers), aligned(pointer_to(storage))
    return Band(
        n,
        b,
        capacity,
        first,
        behind(first, b),
        behind(first, 2 * b),
        behind(first, 3 * b),
        behind(first, 4 * b),
        behind(first, 5 * b),
        behind(first, 6 * b),
        shares,
        behind(shares, capacity),
        single(behind(shares, 2 * capacity)),
    )


@compiled(INLINED)
def part_of(band, n, b):
    """The room of the windows, for fewer scores and boundaries."""
    return Band(
        n,
        b,
        band.capacity,
        band.first,
        band.low,
        band.high,
        band.at,
        band.up,
        band.down,
        band.counts,
        band.shares,
        band.tails,
        band.singles,
    )


@compiled(EXACT)
def reset(values, count, number):
    """Write a number to the first places. An array is not sliced, which takes longer."""
    for i in range(count):
        values[i] = number


# --- the plan


@compiled(WITHOUT_SUMS)
def write_powers(x, count, inverse, origin, rises, falls):
    """exp(z) and exp(-z), z measured from the origin."""
    for i in range(count):
        found = exponential((x[i] - origin) * inverse)
        rises[i], falls[i] = found, 1.0 / found


@compiled(EXACT)
def fill_block(n, x):
    """Fill up the last block with copies of the last score."""
    for i in range(n, (n // BLOCK + 1) * BLOCK):
        x[i] = x[n - 1] if n > 0 else 0.0


@compiled(EXACT)
def fill_powers(n, tau, room):
    """Write exp(z) and exp(-z) of the scores, from the middle of their range.

    Returns whether they are written: only where both are normal numbers.
    """
    x, inverse = room.x, 1.0 / tau
    origin = 0.5 * (x[0] + x[n - 1])
    if not ((x[0] - x[n - 1]) * inverse <= REACH):
        return False, origin
    write_powers(x, (n // BLOCK + 1) * BLOCK, inverse, origin, room.rises, room.falls)
    return True, origin


@compiled(INLINED)
def find_peaks(x, reference, offset, tau, band, pooled):
    """first[j]: how many scores have their largest share above boundary j.

    The thresholds need not descend: an anchor that takes little may be the peak of no score. The boundaries around it
    are pooled to their mean threshold, until the thresholds descend.
    """
    count, sizes = 0, band.counts
    for j in range(band.b):
        threshold, size = reference[j] + tau * offset[j], 1
        while count > 0 and pooled[count - 1] <= threshold:
            count -= 1
            threshold = (threshold * size + pooled[count] * sizes[count]) / (size + sizes[count])
            size += sizes[count]
        pooled[count], sizes[count] = threshold, size
        count += 1
    j = above = 0
    for block in range(count):
        while above < band.n and x[above] > pooled[block]:
            above += 1
        for _ in range(sizes[block]):
            band.first[j] = above
            j += 1


@compiled(EXACT)
def powers(x, from_origin, i, is_product, factor, reference, inverse, offset):
    """exp(z) of the scores of a block, or exp(-z): by a product, or with -1 / tau and the negative offset."""
    if is_product:
        return take(from_origin, i) * factor
    return exp((take(x, i) - reference) * inverse - offset)


@compiled(WITHOUT_SUMS)
def write_factors(reference, offset, inverse, origin, factors, b):
    for j in range(b):
        factors[j] = exponential((reference[j] - origin) * inverse + offset[j])


@compiled(INLINED)
def leave_out(level, i, place, sums, shares):
    """Leave out the shares of a block that are below a level. Equal scores may lie in two blocks, and share alike."""
    share, nothing = take(sums, i), filled(sums, 0.0)
    put(where(share < level, nothing, share), sums, i)
    share = take(shares, place + i)
    put(where(share < level, nothing, share), shares, place + i)


@compiled(INLINED)
def spread(reference, offset, tau, cut, is_product, origin, room, band):
    """The shares on both sides of every peak, relative to the peak, and 1 / the sum of the shares.

    Returns whether there was room for them.
    """
    x, sums, whole, factors = room.x, room.sums, room.whole, room.factors
    n, b, first, shares = band.n, band.b, band.first, band.shares
    inverse = 1.0 / tau
    blocks = n // BLOCK + 1
    one, nothing = filled(x, 1.0), filled(x, 0.0)
    for block in range(blocks):
        put(one, whole, block * BLOCK)
        put(one, sums, block * BLOCK)
    if is_product:
        write_factors(reference, offset, inverse, origin, factors, b)
    place = start = 0
    for j in range(b):
        stop, factor = first[j], factors[j]
        last = stop // BLOCK
        if place + (last - start + 1) * BLOCK > band.capacity:
            return False
        band.up[j] = place - start * BLOCK
        for block in range(start, last):
            i = block * BLOCK
            share = take(sums, i) * powers(x, room.falls, i, is_product, factor, reference[j], -inverse, -offset[j])
            put(share, sums, i)
            put(share, shares, place)
            put(take(whole, i) + share, whole, i)
            place += BLOCK
        if stop > last * BLOCK:
            i = last * BLOCK
            mask, some = first_places(x, stop - i), take(sums, i)
            share = some * powers(x, room.falls, i, is_product, factor, reference[j], -inverse, -offset[j])
            put(where(mask, share, some), sums, i)
            share = where(mask, share, nothing)
            put(share, shares, place)
            put(take(whole, i) + share, whole, i)
            place += BLOCK
        if stop > 0:
            level = cut * min(1.0, sums[stop - 1])
            while start < (stop - 1) // BLOCK and sums[start * BLOCK + BLOCK - 1] < level:
                start += 1
            leave_out(level, start * BLOCK, band.up[j], sums, shares)
        band.low[j] = start
    for block in range(blocks):
        put(one, sums, block * BLOCK)
    for i in range(n, blocks * BLOCK):
        sums[i] = 0.0
    end = blocks
    for j in range(b - 1, -1, -1):
        begin, factor = first[j] // BLOCK, 1.0 / factors[j]
        if place + (end - begin) * BLOCK > band.capacity:
            return False
        band.down[j] = place - begin * BLOCK
        i = begin * BLOCK
        mask, some = first_places(x, first[j] - i), take(sums, i)
        share = some * powers(x, room.rises, i, is_product, factor, reference[j], inverse, offset[j])
        put(where(mask, some, share), sums, i)
        share = where(mask, nothing, share)
        put(share, shares, place)
        put(take(whole, i) + share, whole, i)
        place += BLOCK
        for block in range(begin + 1, end):
            i = block * BLOCK
            share = take(sums, i) * powers(x, room.rises, i, is_product, factor, reference[j], inverse, offset[j])
            put(share, sums, i)
            put(share, shares, place)
            put(take(whole, i) + share, whole, i)
            place += BLOCK
        if first[j] < n:
            level = cut * min(1.0, sums[first[j]])
            while end > begin + 1 and sums[(end - 1) * BLOCK] < level:
                end -= 1
                place -= BLOCK
            leave_out(level, (end - 1) * BLOCK, band.down[j], sums, shares)
        band.high[j] = end
    # The shares of the blocks behind the last window are below the rounding of 1.
    for block in range(band.high[b - 1] if b > 0 else 0):
        put(one / take(whole, block * BLOCK), whole, block * BLOCK)
    return True


@compiled(INLINED)
def add_tails(room, band, mass, rounding):
    """The tails: the shares beyond each boundary, relative to the whole. Also sum a Q - C, and sum a Q R.

    Returns whether there was room for them.
    """
    sums, whole, parts, others = room.sums, room.whole, room.parts, room.others
    first, low, high, at, up, down, shares, tails = (
        band.first,
        band.low,
        band.high,
        band.at,
        band.up,
        band.down,
        band.shares,
        band.tails,
    )
    b = band.b
    nothing = filled(sums, 0.0)
    place = 0
    for j in range(b):
        at[j] = place - low[j] * BLOCK
        place += (high[j] - low[j]) * BLOCK
    if place > band.capacity:
        return False
    blocks = band.n // BLOCK + 1
    for block in range(blocks):
        put(nothing, sums, block * BLOCK)
    for j in range(b - 1, -1, -1):
        balance, edge = nothing, nothing
        last = first[j] // BLOCK
        for i in range(low[j] * BLOCK, last * BLOCK, BLOCK):
            total = take(sums, i) + take(shares, up[j] + i)
            put(total, sums, i)
            tail = total * take(whole, i)
            put(tail, tails, at[j] + i)
            balance = balance - tail
            edge = edge + (tail - tail * tail)
        i = last * BLOCK
        tail = nothing
        if first[j] > i:
            total = take(sums, i) + take(shares, up[j] + i)
            put(total, sums, i)
            tail = where(first_places(sums, first[j] - i), total * take(whole, i), nothing)
        put(tail, tails, at[j] + i)
        put(balance - tail, parts, j * BLOCK)
        put(edge, others, j * BLOCK)
    for block in range(blocks):
        put(nothing, sums, block * BLOCK)
    for j in range(b):
        balance, edge = take(parts, j * BLOCK), take(others, j * BLOCK)
        i = first[j] // BLOCK * BLOCK
        total = take(sums, i) + take(shares, down[j] + i)
        put(total, sums, i)
        tail = where(first_places(sums, first[j] - i), nothing, total * take(whole, i))
        balance = balance + tail
        tail = tail + take(tails, at[j] + i)
        put(tail, tails, at[j] + i)
        edge = edge + (tail - tail * tail)
        for i in range((first[j] // BLOCK + 1) * BLOCK, high[j] * BLOCK, BLOCK):
            total = take(sums, i) + take(shares, down[j] + i)
            put(total, sums, i)
            tail = total * take(whole, i)
            put(tail, tails, at[j] + i)
            balance = balance + tail
            edge = edge + (tail - tail * tail)
        delta = first[j] - mass[j]
        if math.fabs(delta) <= rounding * mass[j]:
            delta = 0.0
        room.excess[j] = sum_of(balance) + delta
        room.edges[j] = sum_of(edge)
    return True


@compiled(INLINED)
def plan(reference, offset, mass, tau, cut, rounding, is_product, origin, room, band):
    """The plan of given offsets. Returns whether there was room for it."""
    find_peaks(room.x, reference, offset, tau, band, room.pooled)
    fits = spread(reference, offset, tau, cut, is_product, origin, room, band)
    return fits and add_tails(room, band, mass, rounding)


# --- Newton's method


@compiled(WITHOUT_SUMS)
def write_singles(tails, count, singles):
    """The tails in float32."""
    for i in range(count):
        singles[i] = tails[i]


@compiled(EXACT)
def is_soft(masses, band, edges):
    """Whether many scores are shared at every boundary, for few boundaries."""
    least = math.inf
    for j in range(band.b):
        least = min(least, edges[j])
    return band.b <= systems.DENSE and least >= SOFT * masses[0]


@compiled(EXACT)
def times_log(excess, wanted):
    """m log(m / c) for the mass m = c + excess, about the excess near c. The excess where there is no logarithm."""
    found = wanted + excess
    return found * math.log1p(excess / wanted) if found > 0.0 else excess


@compiled(EXACT)
def write_logs_of_anchors(masses, mass, excess, b, found):
    """The sums above each boundary of m log(m / c), for the masses m of the anchors, which should be c.

    The same part of every mass is subtracted, so that the sum over all anchors is 0, as that of m - c is.
    """
    before = total = 0.0
    for j in range(b):
        total += times_log(excess[j] - before, masses[j])
        found[j], before = total, excess[j]
    total += times_log(-before, masses[b])
    part = total / (mass[b - 1] + masses[b])
    for j in range(b):
        found[j] -= (mass[j] + excess[j]) * part


@compiled(EXACT)
def write_logs_of_sides(masses, mass, excess, b, found):
    """m log(m / c) for the mass m of the smaller side of each boundary, with the sign of the excess above it."""
    whole = mass[b - 1] + masses[b]
    for j in range(b):
        if 2.0 * mass[j] < whole:
            found[j] = times_log(excess[j], mass[j])
        else:
            found[j] = -times_log(-excess[j], whole - mass[j])


@compiled(INLINED)
def newton(masses, mass, reference, offset, tau, cut, rounding, smallest, is_product, origin, room, band, is_single):
    """Newton's method for the offsets, which are overwritten.

    The first steps are for the logarithms of masses; see the head of this file. The windows are those of the plan of
    the final offsets. Returns how it has ended.
    """
    b, size, excess, right = band.b, room.size, room.excess, room.pooled
    least = LEAST if is_single else 0.0
    careful, last, done, is_plain, previous, before, range_before = False, False, False, False, math.inf, 1.0, math.inf
    # The steps need not be exact.
    coarse = is_single and is_product and room.x[0] - room.x[band.n - 1] <= SINGLE_REACH * tau
    # The windows of few boundaries are cheap.
    roughly = max(cut, ROUGH / band.n) if b > systems.DENSE else cut
    farthest = BEYOND + (room.x[0] - room.x[band.n - 1]) / tau
    width = 0
    for turn in range(STEPS + 1):
        is_far = before > SMALL
        here = roughly if is_far else cut
        if not plan(reference, offset, mass, tau, here, rounding, is_product, origin, room, band):
            return CROWDED
        if done or turn == STEPS:
            break
        width = systems.prepare(masses, band, room.edges, smallest, width < 0, room.sums, room.parts, room.system)
        precise = 1e-9 if last else max(5e-2 * min(before, 1.0), 1e-6)
        is_of_logs = is_far and not is_plain
        if not is_of_logs:
            for j in range(b):
                right[j] = excess[j]
        elif is_soft(masses, band, room.edges):
            write_logs_of_anchors(masses, mass, excess, b, right)
        else:
            write_logs_of_sides(masses, mass, excess, b, right)
        if width < 0 and coarse:
            write_singles(band.tails, band.at[b - 1] + band.high[b - 1] * BLOCK, band.singles)
            systems.conjugate_gradients(
                right, precise, least, band, band.singles, room.single_sums, room.single_parts, room.system, size
            )
        else:
            systems.solve(right, precise, least, width, band, band.tails, room.sums, room.parts, room.system, size)
        decrement = potential = highest = lowest = widest = 0.0
        for j in range(b):
            decrement += size[j] * excess[j]
            potential += size[j]
            highest, lowest = max(highest, potential), min(lowest, potential)
            widest = max(widest, math.fabs(size[j]))
        span = highest - lowest
        short = 1.0
        if is_of_logs:
            # A step that does not ascend, that is no shorter than the last one, or that goes beyond all scores.
            if not (decrement > 0.0 and span <= SHORTER * range_before and widest <= farthest):
                reset(offset, b, 0.0)
                is_plain, before = True, 1.0
                continue
            range_before = span
        else:
            if not (span < math.inf and decrement == decrement):  # an infinity, or a NaN
                break
            careful = careful or decrement > previous
            previous = decrement
            length = span if careful else widest
            # The second derivative along a step changes by a factor of at most exp(span): a short step ascends.
            if span > FULL:
                short = math.log1p(length) / length
        for j in range(b):
            offset[j] += short * size[j]
        before = widest
        # After a rough plan, no step is the last one.
        is_sure = here == cut
        done = is_sure and (last or span <= (OF_SINGLE if is_single else ENOUGH))
        last = is_sure and span <= OF_DOUBLE
    return FOUND if done else ENDLESS
