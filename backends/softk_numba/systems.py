r"""Systems with the Jacobian J of the masses above the boundaries, within the windows of `bands`.

Few boundaries, or a narrow band, are solved by Cholesky's factorization, others by conjugate gradients. The matrix J
acts like a smoothing along the boundaries. If v changes slowly from boundary to boundary, J v is about v times the row
sums of J. If v alternates, J v is about as large as the masses of the anchors. The preconditioner is the sum of both
inverses; six to twenty steps reach the rounding.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .cache import compiled
from .operations import EXACT, FAST, WITHOUT_SUMS, larger
from .pointers import BLOCK, behind, filled, first_places, put, sum_of, take
from .vectors import INLINED, where

#: A system is factorized if it has at most so many boundaries, or if its matrix is a band of at most that width.
DENSE, BAND = 40, 12
#: A rounding of the scaled diagonal.
ROUNDING = 2.0**-52
#: The largest number of steps of the conjugate gradients.
TURNS = 200
#: The part of the anchors in the preconditioner.
OF_ANCHORS = 0.75


class Room(NamedTuple):
    """Room for the systems of b boundaries."""

    rows: Any  # the sums of the rows of J
    of_rows: Any  # their inverses
    of_anchors: Any  # the inverses of the masses, and their part
    residual: Any
    direction: Any
    image: Any
    ahead: Any
    scale: Any
    matrix: Any


#: How many rows of numbers of boundaries there are.
NUMBERS = 8


@compiled(EXACT)
def columns_of(b):
    """How long the rows of a factor are, at most."""
    return max(min(b, DENSE), BAND + 1)


@compiled(EXACT)
def size_of(b, wide):
    """How many numbers `room_of` needs, for rows of that length."""
    return NUMBERS * wide + b * columns_of(b)


@compiled(EXACT)
def room_of(start, b, wide):
    """Room for the systems of at most b boundaries, from there on, in rows of that length."""
    return Room(
        start,
        behind(start, wide),
        behind(start, 2 * wide),
        behind(start, 3 * wide),
        behind(start, 4 * wide),
        behind(start, 5 * wide),
        behind(start, 6 * wide),
        behind(start, 7 * wide),
        behind(start, 8 * wide),
    )


@compiled(EXACT)
def multiply(v, band, tails, sums, parts, found):
    """J v."""
    b, first, low, high, at = band.b, band.first, band.low, band.high, band.at
    nothing = filled(sums, 0.0)
    blocks = band.n // BLOCK + 1
    for block in range(blocks):
        put(nothing, sums, block * BLOCK)
    # Towards lower anchors: sums += Q v, and the sum of R sums.
    for j in range(b):
        number, place, total, other = filled(sums, v[j]), at[j], nothing, nothing
        middle = first[j] // BLOCK * BLOCK
        for i in range(low[j] * BLOCK, middle, BLOCK):
            tail = take(tails, place + i)
            some = take(sums, i) + (1.0 - tail) * number
            put(some, sums, i)
            total = total + tail * some
        tail, is_above = take(tails, place + middle), first_places(sums, first[j] - middle)
        rest = 1.0 - tail
        some = take(sums, middle) + where(is_above, rest, tail) * number
        put(some, sums, middle)
        total = total + where(is_above, tail, rest) * some
        for i in range(middle + BLOCK, high[j] * BLOCK, BLOCK):
            tail = take(tails, place + i)
            some = take(sums, i) + tail * number
            put(some, sums, i)
            other = other + (1.0 - tail) * some
        put(total + other, parts, j * BLOCK)
    for block in range(blocks):
        put(nothing, sums, block * BLOCK)
    # Towards higher ones: the sum of Q sums, and then sums += R v.
    for j in range(b - 1, -1, -1):
        number, place, total, other = filled(sums, v[j]), at[j], take(parts, j * BLOCK), nothing
        middle = first[j] // BLOCK * BLOCK
        for i in range(low[j] * BLOCK, middle, BLOCK):
            tail, some = take(tails, place + i), take(sums, i)
            total = total + (1.0 - tail) * some
            put(some + tail * number, sums, i)
        tail, is_above, some = take(tails, place + middle), first_places(sums, first[j] - middle), take(sums, middle)
        rest = 1.0 - tail
        total = total + where(is_above, rest, tail) * some
        put(some + where(is_above, tail, rest) * number, sums, middle)
        for i in range(middle + BLOCK, high[j] * BLOCK, BLOCK):
            tail, some = take(tails, place + i), take(sums, i)
            other = other + tail * some
            put(some + (1.0 - tail) * number, sums, i)
        found[j] = sum_of(total + other)


# --- factorization


@compiled(INLINED)
def width_of(band):
    """How far apart two boundaries may be that share a block: J is a band of so many rows on both sides."""
    found = other = 0
    for j in range(band.b):
        while other < j and band.high[other] <= band.low[j]:
            other += 1
        found = max(found, j - other)
    return found


@compiled(INLINED)
def factorize(width, band, edges, smallest, sums, room):
    """Cholesky's factor of J, of which the diagonal is scaled to 1; the scale is 0 where a row of J vanishes.

    Row j of the matrix has the entries of the columns j - width to j; the rows follow each other.
    """
    b, first, low, high, at, tails = band.b, band.first, band.low, band.high, band.at, band.tails
    matrix, scale = room.matrix, room.scale
    for j in range(b):
        row = j * (width + 1) + width  # the place of the diagonal
        scale[j] = 1.0 / math.sqrt(edges[j]) if edges[j] > smallest else 0.0
        # R of this boundary, and its sums with Q of those above it, over the scores that they share.
        start = low[j] * BLOCK
        for i in range(start, high[max(j - 1, 0)] * BLOCK, BLOCK):
            tail = take(tails, at[j] + i)
            put(where(first_places(tails, first[j] - i), tail, 1.0 - tail), sums, i)
        for other in range(j - width, j):
            entry = 0.0
            if other >= 0:
                place = at[other]
                middle, stop = first[other] // BLOCK * BLOCK, high[other] * BLOCK
                total, more = filled(tails, 0.0), filled(tails, 0.0)
                for i in range(start, middle, BLOCK):
                    total = total + (1.0 - take(tails, place + i)) * take(sums, i)
                if start <= middle:
                    tail = take(tails, place + middle)
                    more = where(first_places(tails, first[other] - middle), 1.0 - tail, tail) * take(sums, middle)
                for i in range(max(start, middle + BLOCK), stop, BLOCK):
                    more = more + take(tails, place + i) * take(sums, i)
                entry = sum_of(total + more) * (scale[j] * scale[other])
            matrix[row + other - j] = entry
        matrix[row] = 1.0 + b * ROUNDING
    for j in range(b):
        row = j * (width + 1) + width - j  # the place of column 0, were it there
        for other in range(max(0, j - width), j + 1):
            entry, above = matrix[row + other], other * (width + 1) + width - other
            for i in range(max(0, j - width), other):
                entry -= matrix[row + i] * matrix[above + i]
            matrix[row + other] = math.sqrt(max(entry, ROUNDING)) if other == j else entry / matrix[above + other]


@compiled(INLINED)
def substitute(width, right, b, room, found):
    """Solve J found = right by the factor."""
    matrix, scale = room.matrix, room.scale
    for j in range(b):
        value, row = right[j] * scale[j], j * width + width
        for i in range(max(0, j - width), j):
            value -= matrix[row + i] * found[i]
        found[j] = value / matrix[row + j]
    for j in range(b - 1, -1, -1):
        row = j * width + width
        value = found[j] / matrix[row + j]
        found[j] = value
        for i in range(max(0, j - width), j):
            found[i] -= matrix[row + i] * value
    for j in range(b):
        found[j] *= scale[j]


# --- conjugate gradients


@compiled(FAST)
def dot(one, other, count):
    """The sum of the products of the first numbers."""
    found = 0.0
    for i in range(count):
        found += one[i] * other[i]
    return found


@compiled(WITHOUT_SUMS)
def precondition(residual, of_rows, of_anchors, b, found):
    """An approximate solution of J found = residual."""
    for j in range(b):
        found[j] = residual[j] * (of_rows[j] + of_anchors[j] + of_anchors[j + 1])
    for j in range(1, b):
        found[j] -= residual[j - 1] * of_anchors[j]
    for j in range(b - 1):
        found[j] -= residual[j + 1] * of_anchors[j + 1]


@compiled(WITHOUT_SUMS)
def advance(direction, image, length, b, found, residual):
    """A step of the solution, and of the residual."""
    for j in range(b):
        found[j] += length * direction[j]
        residual[j] -= length * image[j]


@compiled(FAST)
def sizes_of(values, rows, b):
    """The largest size of a number, and of one times its row."""
    size = flow = 0.0
    for j in range(b):
        value = math.fabs(values[j])
        size, flow = larger(size, value), larger(flow, value * rows[j])
    return size, flow


@compiled(WITHOUT_SUMS)
def turn(ahead, share, b, direction):
    """The next direction."""
    for j in range(b):
        direction[j] = ahead[j] + share * direction[j]


@compiled(INLINED)
def conjugate_gradients(right, tolerance, least, band, tails, sums, parts, room, found):
    """The solution of J v = right, up to a relative change, or to one that is below the least."""
    b, residual, direction, image, ahead = band.b, room.residual, room.direction, room.image, room.ahead
    for j in range(b):
        residual[j], found[j] = right[j], 0.0
    precondition(residual, room.of_rows, room.of_anchors, b, ahead)
    for j in range(b):
        direction[j] = ahead[j]
    product = dot(residual, ahead, b)
    for _ in range(TURNS):
        if not product > 0.0:
            break
        multiply(direction, band, tails, sums, parts, image)
        curvature = dot(direction, image, b)
        if not curvature > 0.0:
            break
        length = product / curvature
        advance(direction, image, length, b, found, residual)
        # In a wide gap v may be huge where J is tiny, so that J v is looked at too.
        change, change_of_flow = sizes_of(direction, room.rows, b)
        size, flow = sizes_of(found, room.rows, b)
        if length * change <= least:
            break
        if length * change <= tolerance * size and length * change_of_flow <= tolerance * flow:
            break
        precondition(residual, room.of_rows, room.of_anchors, b, ahead)
        following = dot(residual, ahead, b)
        turn(ahead, following / product, b, direction)
        product = following


@compiled(INLINED)
def prepare(masses, band, edges, smallest, keeps_rows, sums, parts, room):
    """What `solve` needs of J: its factor and the width of it, or its row sums and a width of -1.

    With `keeps_rows`, the row sums of an earlier J are kept: the preconditioner need not be exact.
    """
    b = band.b
    width = width_of(band)
    if b <= DENSE or width <= BAND:
        factorize(width, band, edges, smallest, sums, room)
        return width
    if keeps_rows:
        return -1
    for j in range(b):
        room.ahead[j] = 1.0
    multiply(room.ahead, band, band.tails, sums, parts, room.rows)
    for j in range(b):
        room.of_rows[j] = 1.0 / room.rows[j] if room.rows[j] > 0.0 else 0.0
    for j in range(b + 1):
        room.of_anchors[j] = OF_ANCHORS / masses[j]
    return -1


@compiled(INLINED)
def solve(right, tolerance, least, width, band, tails, sums, parts, room, found):
    """The solution of J v = right, after `prepare`."""
    if width >= 0:
        substitute(width, right, band.b, room, found)
    else:
        conjugate_gradients(right, tolerance, least, band, tails, sums, parts, room, found)
