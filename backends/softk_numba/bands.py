r"""The plan of one slice on evenly spaced anchors, within the windows where it is not negligible.

This is the mathematics of `softk._reference.plan`, and names here are the names there. Scores are sorted, the highest
first, and all numbers are float64. Three things differ:

- **Windows.** A score sends mass to the anchor where its share is largest, its peak, and to the anchors beside it until
  the share falls below `cut`, relative to the peak. Because the scores are sorted, the scores that share a boundary j
  are contiguous: from `low[j]` to `first[j]` with their peak above the boundary, and from there to `high[j]` below it.
  The score nearest to a boundary is always kept, so that a boundary in a wide gap has a derivative.
- **Products.** The share at the next anchor is the share at this one times exp(-z). For evenly spaced anchors exp(z) is
  a product of a number of the score and a number of the boundary, so that a share costs no exponential of its own.
- **The system.** Few boundaries, or a narrow band, are solved by Cholesky's factorization, others by conjugate
  gradients. The matrix J acts like a smoothing along the boundaries. For a slow right-hand side it is its row sums, for
  a fast one the mass of the anchors limits it. The preconditioner is the sum of both inverses; six to twenty steps
  reach the rounding.
"""

from __future__ import annotations

import math

import numpy as np

from .cache import compiled
from .operations import EXACT, FAST, WITHOUT_SUMS, exponential

#: A system is factorized if it has at most so many boundaries, or if its matrix is a band of at most that width.
DENSE, BAND = 40, 12
#: A rounding of the scaled diagonal.
ROUNDING = 2.0**-52
#: The largest number of Newton steps, and of steps of the conjugate gradients in one of them.
STEPS, TURNS = 40, 200
#: A step whose range is smaller is the last but one.
TOLERANCE = 1e-4
#: The largest range of the scores, in temperatures, for which exp(z) is formed as a product.
REACH = 300.0
#: The part of the anchors in the preconditioner.
OF_ANCHORS = 0.75


# --- loops over the scores of a boundary


@compiled(EXACT)
def reset(values, count, number):
    """A loop, because Numba compiles an assignment to a slice anew for every type."""
    for i in range(count):
        values[i] = number


@compiled(EXACT)
def copy(values, into, count):
    """Copy so many numbers, by a loop for the same reason."""
    for i in range(count):
        into[i] = values[i]


# Numba checks a signed index for wrapping around, and a slice costs more than a short window. So the loops take whole
# arrays, and unsigned places in them.


@compiled(FAST)
def scale_by_product(values, factors, factor, start, stop):
    """values *= factors times a factor."""
    place = np.uint64(start)
    for i in range(np.uint64(stop - start)):
        values[place + i] *= factors[place + i] * factor


@compiled(FAST)
def scale_by_odds(values, x, reference, inverse, offset, start, stop):
    """values *= exp(z). A z that is clipped gives a share that is negligible."""
    place = np.uint64(start)
    for i in range(np.uint64(stop - start)):
        values[place + i] *= exponential((x[place + i] - reference) * inverse - offset)


@compiled(FAST)
def keep(values, into, at, sums, start, stop):
    """Store the values, and add them to the sums."""
    place, to = np.uint64(start), np.uint64(at)
    for i in range(np.uint64(stop - start)):
        value = values[place + i]
        into[to + i] = value
        sums[place + i] += value


@compiled(FAST)
def add_tail(shares, at, sums, inverse, tails, start, stop):
    """Add the shares to the sums, and store these relative to the whole."""
    place, to = np.uint64(start), np.uint64(at)
    for i in range(np.uint64(stop - start)):
        total = sums[place + i] + shares[to + i]
        sums[place + i] = total
        tails[to + i] = total * inverse[place + i]


@compiled(FAST)
def tail_sums(tails, at, weights, start, stop):
    """sum a t and sum a t (1 - t) of the shares t beyond a boundary."""
    found = edge = 0.0
    place, begin = np.uint64(start), np.uint64(at)
    for i in range(np.uint64(stop - start)):
        tail = tails[begin + i]
        value = weights[place + i] * tail
        found += value
        edge += value * (1.0 - tail)
    return found, edge


@compiled(FAST)
def dot(one, at, other, begin, count):
    """The sum of the products of so many numbers from two places on."""
    found = 0.0
    place, to = np.uint64(at), np.uint64(begin)
    for i in range(np.uint64(count)):
        found += one[place + i] * other[to + i]
    return found


# A loop that writes has no sum, for the reason of `rule.write_gains`.


@compiled(FAST)
def tail_product(tails, begin, values, start, stop, of_tail):
    """The sum of the values times the tails, or times their complements."""
    found = 0.0
    at, place = np.uint64(begin), np.uint64(start)
    if of_tail:
        for i in range(np.uint64(stop - start)):
            found += tails[at + i] * values[place + i]
    else:
        for i in range(np.uint64(stop - start)):
            found += (1.0 - tails[at + i]) * values[place + i]
    return found


@compiled(WITHOUT_SUMS)
def add_tail_product(tails, begin, weights, number, sums, start, stop, of_tail):
    """sums += the tails, or their complements, times the weights times a number."""
    at, place = np.uint64(begin), np.uint64(start)
    if of_tail:
        for i in range(np.uint64(stop - start)):
            sums[place + i] += tails[at + i] * (weights[place + i] * number)
    else:
        for i in range(np.uint64(stop - start)):
            sums[place + i] += (1.0 - tails[at + i]) * (weights[place + i] * number)


@compiled(EXACT)
def descend(tails, begin, weights, number, sums, start, stop, is_above):
    """A step towards lower anchors: sums += Q d, and the sum of R sums. d are the weights times a number.

    The tail is R of the scores whose peak is above the boundary, and Q of the others.
    """
    add_tail_product(tails, begin, weights, number, sums, start, stop, not is_above)
    return tail_product(tails, begin, sums, start, stop, is_above)


@compiled(EXACT)
def ascend(tails, begin, weights, number, sums, start, stop, is_above):
    """A step towards higher anchors: the sum of Q sums, and then sums += R d."""
    found = tail_product(tails, begin, sums, start, stop, not is_above)
    add_tail_product(tails, begin, weights, number, sums, start, stop, is_above)
    return found


@compiled(FAST)
def sum_and_moment(values, x, reference, count):
    """The sum of the first numbers, and that of them times x - r."""
    found = moment = 0.0
    for i in range(count):
        found += values[i]
        moment += values[i] * (x[i] - reference)
    return found, moment


@compiled(WITHOUT_SUMS)
def write_tail_product(tails, begin, values, start, stop, of_tail, out, changes):
    """The values times the tails, or times their complements; they are added to `changes`, too."""
    at, place = np.uint64(begin), np.uint64(start)
    for i in range(np.uint64(stop - start)):
        tail = tails[at + i]
        change = (tail if of_tail else 1.0 - tail) * values[place + i]
        out[i] = change
        changes[place + i] += change


@compiled(WITHOUT_SUMS)
def add_moved(tails, begin, moved, from_, weights, number, sums, start, stop, of_tail):
    """`add_tail_product`, of the weights times a number plus given numbers."""
    at, place, given = np.uint64(begin), np.uint64(start), np.uint64(from_)
    for i in range(np.uint64(stop - start)):
        tail = tails[at + i]
        share = tail if of_tail else 1.0 - tail
        sums[place + i] += share * (moved[given + i] + weights[place + i] * number)


@compiled(EXACT)
def descend_with(tails, begin, moved, from_, weights, number, sums, changes, x, reference, start, stop, is_above, some):
    """The same for d plus given numbers `moved`; R sums is added to `changes` and also summed up times x - r.

    `some` is room for the numbers of one boundary.
    """
    add_moved(tails, begin, moved, from_, weights, number, sums, start, stop, not is_above)
    write_tail_product(tails, begin, sums, start, stop, is_above, some, changes)
    return sum_and_moment(some, x[start:stop], reference, stop - start)


@compiled(EXACT)
def ascend_with(tails, begin, moved, from_, weights, number, sums, changes, x, reference, start, stop, is_above, some):
    """`ascend`, likewise."""
    write_tail_product(tails, begin, sums, start, stop, not is_above, some, changes)
    found = sum_and_moment(some, x[start:stop], reference, stop - start)
    add_moved(tails, begin, moved, from_, weights, number, sums, start, stop, is_above)
    return found


# --- the plan


@compiled(EXACT)
def grown(values, size):
    """The same numbers with room for at least `size`."""
    if values.shape[0] >= size:
        return values
    found = np.empty(max(size, 2 * values.shape[0]))
    copy(values, found, values.shape[0])
    return found


@compiled(EXACT)
def find_peaks(x, reference, offset, tau, first, pooled, sizes):
    """first[j]: how many scores have their largest share above boundary j.

    The thresholds need not descend: an anchor that takes little may be the peak of no score. The boundaries around it
    are pooled to their mean threshold, until the thresholds descend.
    """
    count = 0
    for j in range(reference.shape[0]):
        threshold, size = reference[j] + tau * offset[j], 1
        while count > 0 and pooled[count - 1] <= threshold:
            count -= 1
            threshold = (threshold * size + pooled[count] * sizes[count]) / (size + sizes[count])
            size += sizes[count]
        pooled[count], sizes[count] = threshold, size
        count += 1
    j = above = 0
    for block in range(count):
        while above < x.shape[0] and x[above] > pooled[block]:
            above += 1
        for _ in range(sizes[block]):
            first[j] = above
            j += 1


@compiled(EXACT)
def spread(x, reference, offset, tau, odds, origin, cut, first, low, high, at, shares, tails, sums, whole):
    """The shares on both sides of every peak, relative to the peak, the tails, and 1 / the sum of the shares.

    `at[0, j]` is where the scores with their peak above boundary j begin: their shares of anchor j + 1 and R.
    `at[1, j]` is where those below begin: their shares of anchor j and Q. Returns the shares and the tails, which may
    have moved to a larger array.
    """
    n, b = x.shape[0], reference.shape[0]
    inverse = 1.0 / tau
    is_product = odds.shape[1] > 0
    reset(whole, n, 1.0)
    reset(sums, n, 1.0)
    place = start = 0
    for j in range(b):
        stop = first[j]
        if is_product:
            factor = math.exp((reference[j] - origin) * inverse + offset[j])
            scale_by_product(sums, odds[1], factor, start, stop)
        else:
            # exp(-z)
            scale_by_odds(sums, x, reference[j], -inverse, -offset[j], start, stop)
        if stop > start:
            level = cut * min(1.0, sums[stop - 1])
            while start < stop - 1 and sums[start] < level:
                start += 1
        low[j], at[0, j] = start, place
        shares = grown(shares, place + stop - start)
        keep(sums, shares, place, whole, start, stop)
        place += stop - start
    reset(sums, n, 1.0)
    stop = n
    for j in range(b - 1, -1, -1):
        start = first[j]
        if is_product:
            factor = math.exp((origin - reference[j]) * inverse - offset[j])
            scale_by_product(sums, odds[0], factor, start, stop)
        else:
            scale_by_odds(sums, x, reference[j], inverse, offset[j], start, stop)
        if stop > start:
            level = cut * min(1.0, sums[start])
            while stop > start + 1 and sums[stop - 1] < level:
                stop -= 1
        high[j], at[1, j] = stop, place
        shares = grown(shares, place + stop - start)
        keep(sums, shares, place, whole, start, stop)
        place += stop - start
    for i in range(n):
        whole[i] = 1.0 / whole[i]
    tails = grown(tails, place)
    reset(sums, n, 0.0)
    for j in range(b - 1, -1, -1):
        add_tail(shares, at[0, j], sums, whole, tails, low[j], first[j])
    reset(sums, n, 0.0)
    for j in range(b):
        add_tail(shares, at[1, j], sums, whole, tails, first[j], high[j])
    return shares, tails


@compiled(EXACT)
def excesses(weights, above, mass, rounding, first, low, high, at, tails, excess, edges):
    """sum a Q - C at every boundary, from the tails, and sum a Q R; `above[i]` is the weight of the first i scores."""
    for j in range(mass.shape[0]):
        f = first[j]
        upper, edge = tail_sums(tails, at[0, j], weights, low[j], f)
        lower, other = tail_sums(tails, at[1, j], weights, f, high[j])
        delta = above[f] - mass[j]
        if math.fabs(delta) <= rounding * mass[j]:
            delta = 0.0
        excess[j] = (lower - upper) + delta
        edges[j] = edge + other


# --- systems with J


@compiled(EXACT)
def multiply(v, weights, first, low, high, at, tails, sums, found):
    """J v."""
    b = v.shape[0]
    reset(sums, weights.shape[0], 0.0)
    for j in range(b):
        begin, start, f, stop = at[0, j], low[j], first[j], high[j]
        total = descend(tails, begin, weights, v[j], sums, start, f, True)
        begin = at[1, j]
        total += descend(tails, begin, weights, v[j], sums, f, stop, False)
        found[j] = total
    reset(sums, weights.shape[0], 0.0)
    for j in range(b - 1, -1, -1):
        begin, start, f, stop = at[0, j], low[j], first[j], high[j]
        total = ascend(tails, begin, weights, v[j], sums, start, f, True)
        begin = at[1, j]
        total += ascend(tails, begin, weights, v[j], sums, f, stop, False)
        found[j] += total


@compiled(EXACT)
def width_of(low, high):
    """How far apart two boundaries may be that share a score: J is a band of so many rows on both sides."""
    found = other = 0
    for j in range(low.shape[0]):
        while other < j and high[other] <= low[j]:
            other += 1
        found = max(found, j - other)
    return found


@compiled(EXACT)
def factorize(weights, width, first, low, high, at, tails, edges, smallest, room, matrix, scale):
    """Cholesky's factor of J, of which the diagonal is scaled to 1; the scale is 0 where a row of J vanishes.

    Row j of `matrix` has the entries of the columns j - width to j.
    """
    b = edges.shape[0]
    own, other_ = room[0], room[1]
    begin = 0
    for j in range(b):
        start, f, stop = low[j], first[j], high[j]
        upper, lower = at[0, j] - start, at[1, j] - f
        for i in range(start, f):
            tail = tails[upper + i]
            own[begin + i - start], other_[begin + i - start] = weights[i] * (1.0 - tail), tail
        for i in range(f, stop):
            tail = tails[lower + i]
            own[begin + i - start], other_[begin + i - start] = weights[i] * tail, 1.0 - tail
        scale[j] = 1.0 / math.sqrt(edges[j]) if edges[j] > smallest else 0.0
        # The sum of Q of the boundaries above and R of this one, over the scores that they share.
        place = begin
        for i in range(1, width + 1):
            other, entry = j - i, 0.0
            if other >= 0:
                place -= high[other] - low[other]
                if high[other] > start:
                    entry = dot(own, place + start - low[other], other_, begin, high[other] - start)
                    entry *= scale[j] * scale[other]
            matrix[j, width - i] = entry
        matrix[j, width] = 1.0 + b * ROUNDING
        begin += stop - start
    for j in range(b):
        for other in range(max(0, j - width), j + 1):
            entry = matrix[j, other - j + width]
            for i in range(max(0, j - width), other):
                entry -= matrix[j, i - j + width] * matrix[other, i - other + width]
            if other == j:
                matrix[j, width] = math.sqrt(max(entry, ROUNDING))
            else:
                matrix[j, other - j + width] = entry / matrix[other, width]


@compiled(EXACT)
def substitute(matrix, width, scale, right, found):
    """Solve J found = right by the factor."""
    b = right.shape[0]
    for j in range(b):
        value = right[j] * scale[j]
        for i in range(max(0, j - width), j):
            value -= matrix[j, i - j + width] * found[i]
        found[j] = value / matrix[j, width]
    for j in range(b - 1, -1, -1):
        value = found[j]
        for i in range(j + 1, min(b, j + width + 1)):
            value -= matrix[i, j - i + width] * found[i]
        found[j] = value / matrix[j, width]
    for j in range(b):
        found[j] *= scale[j]


@compiled(EXACT)
def precondition(residual, rows, masses, found):
    """An approximate solution of J found = residual."""
    b = residual.shape[0]
    before = OF_ANCHORS * residual[0] / masses[0]
    for j in range(b):
        after = OF_ANCHORS * ((residual[j + 1] if j + 1 < b else 0.0) - residual[j]) / masses[j + 1]
        found[j] = (residual[j] / rows[j] if rows[j] > 0.0 else 0.0) + before - after
        before = after


@compiled(EXACT)
def conjugate_gradients(right, tolerance, weights, masses, rows, first, low, high, at, tails, sums, four, found):
    """The solution of J v = right, up to a relative change; `rows` are the sums of the rows of J."""
    b = right.shape[0]
    residual, direction, image, ahead = four[0, :b], four[1, :b], four[2, :b], four[3, :b]
    copy(right, residual, b)
    reset(found, b, 0.0)
    precondition(residual, rows, masses, ahead)
    copy(ahead, direction, b)
    product = dot(residual, 0, ahead, 0, b)
    for _ in range(TURNS):
        if not product > 0.0:
            break
        multiply(direction, weights, first, low, high, at, tails, sums, image)
        curvature = dot(direction, 0, image, 0, b)
        if not curvature > 0.0:
            break
        length = product / curvature
        # In a wide gap v may be huge where J is tiny, so that J v is looked at too.
        size = change = flow = change_of_flow = 0.0
        for j in range(b):
            moved = length * direction[j]
            found[j] += moved
            residual[j] -= length * image[j]
            now, moved = math.fabs(found[j]), math.fabs(moved)
            size, change = max(size, now), max(change, moved)
            flow, change_of_flow = max(flow, now * rows[j]), max(change_of_flow, moved * rows[j])
        if change <= tolerance * size and change_of_flow <= tolerance * flow:
            break
        precondition(residual, rows, masses, ahead)
        following = dot(residual, 0, ahead, 0, b)
        share = following / product
        for j in range(b):
            direction[j] = ahead[j] + share * direction[j]
        product = following


# --- Newton's method


@compiled(EXACT)
def room_of(n, b):
    """Arrays for slices of at most n scores and b boundaries: integers, numbers of scores, and of boundaries."""
    few = max(min(b, DENSE), BAND + 2)
    return (
        np.empty((4, b), np.int64),
        np.empty((2, b), np.int64),
        np.empty((5, n)),
        np.empty((12, b)),
        np.empty((2, few * n + b)),
        np.empty((b, few)),
    )


@compiled(FAST)
def write_odds(x, inverse, origin, odds, reciprocals):
    """exp(z) and exp(-z), z measured from the origin."""
    for i in range(x.shape[0]):
        found = exponential((x[i] - origin) * inverse)
        odds[i], reciprocals[i] = found, 1.0 / found


@compiled(EXACT)
def fill_odds(x, tau, room):
    """exp(z) and exp(-z) of the scores, from the middle of their range, where both are normal numbers."""
    n = x.shape[0]
    inverse, origin = 1.0 / tau, 0.5 * (x[0] + x[n - 1])
    if not ((x[0] - x[n - 1]) * inverse <= REACH):
        return room[:, :0], origin
    write_odds(x, inverse, origin, room[0], room[1])
    return room[:, :n], origin


@compiled(EXACT)
def prepare(weights, masses, first, low, high, at, tails, edges, smallest, sums, rows, spare, room, matrix, scale):
    """What `solve` needs of J: its factor and the width of it, or its row sums and a width of -1."""
    b = edges.shape[0]
    width = width_of(low, high)
    if b <= DENSE or width <= BAND:
        factorize(weights, width, first, low, high, at, tails, edges, smallest, room, matrix, scale)
        return width
    reset(spare, b, 1.0)
    multiply(spare, weights, first, low, high, at, tails, sums, rows)
    return -1


@compiled(EXACT)
def solve(
    right, tolerance, width, weights, masses, rows, first, low, high, at, tails, sums, four, matrix, scale, found
):
    """The solution of J v = right, after `prepare`."""
    if width >= 0:
        substitute(matrix, width, scale, right, found)
    else:
        conjugate_gradients(right, tolerance, weights, masses, rows, first, low, high, at, tails, sums, four, found)


@compiled(EXACT)
def newton(
    x,
    weights,
    above,
    masses,
    mass,
    reference,
    offset,
    tau,
    cut,
    rounding,
    smallest,
    odds,
    origin,
    rooms,
    bands,
    is_single,
):
    """Newton's method for the offsets, which are overwritten.

    Returns whether it has converged, and the shares and the tails of the last plan but one.
    """
    whole_numbers, at, scores, numbers, room, matrix = rooms
    b = mass.shape[0]
    first, low, high, sizes = whole_numbers[0, :b], whole_numbers[1, :b], whole_numbers[2, :b], whole_numbers[3, :b]
    at = at[:, :b]
    sums, whole = scores[0], scores[1]
    excess, edges, size, rows, scale, spare = (
        numbers[0, :b],
        numbers[1, :b],
        numbers[2, :b],
        numbers[3, :b],
        numbers[4, :b],
        numbers[5, :b],
    )
    four = numbers[6:10]
    shares, tails = bands
    careful, last, previous, before = False, False, math.inf, 1.0
    for _ in range(STEPS):
        find_peaks(x, reference, offset, tau, first, spare, sizes)
        shares, tails = spread(
            x, reference, offset, tau, odds, origin, cut, first, low, high, at, shares, tails, sums, whole
        )
        excesses(weights, above, mass, rounding, first, low, high, at, tails, excess, edges)
        width = prepare(
            weights, masses, first, low, high, at, tails, edges, smallest, sums, rows, spare, room, matrix, scale
        )
        tolerance = 1e-9 if last else max(1e-3 * min(before, 1.0), 1e-6)
        solve(
            excess,
            tolerance,
            width,
            weights,
            masses,
            rows,
            first,
            low,
            high,
            at,
            tails,
            sums,
            four,
            matrix,
            scale,
            size,
        )
        decrement = potential = highest = lowest = widest = 0.0
        for j in range(b):
            decrement += size[j] * excess[j]
            potential += size[j]
            highest, lowest = max(highest, potential), min(lowest, potential)
            widest = max(widest, math.fabs(size[j]))
        span = highest - lowest
        if not span < math.inf:
            return False, (shares, tails)
        if last:
            for j in range(b):
                offset[j] += size[j]
            return True, (shares, tails)
        careful = careful or decrement > previous
        previous = decrement
        length = span if careful else widest
        short = math.log1p(length) / length if length > 0.0 else 1.0
        for j in range(b):
            offset[j] += short * size[j]
        before = widest
        # The error is squared by each step: the next step takes it from the rounding of float32 to that of float64.
        last = span <= TOLERANCE
        if last and is_single:
            return True, (shares, tails)
    return False, (shares, tails)
