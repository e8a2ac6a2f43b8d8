"""Rows of an array as a kernel computes with them, and the way back: strides, `where`, float16 and bfloat16.

NumPy has no bfloat16, and Numba computes with neither of the two. Their bits come as integers of 16 bits: unsigned ones
are float16, signed ones bfloat16.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

from .cache import compiled, declared
from .operations import EXACT

# --- one number


@declared
def widened(value):
    """A number as the dtype that is computed in has it."""


@overload(widened, jit_options=EXACT)
def _widened(value):
    def from_float16(value):
        bits = np.int32(value)
        sign = (bits & np.int32(0x8000)) << np.int32(16)
        # The exponents differ by 112, which is multiplied in: so subnormal numbers become normal ones.
        size = np.int32((bits & np.int32(0x7FFF)) << np.int32(13)).view(np.float32) * np.float32(2.0**112)
        size = np.float32(size).view(np.int32)
        size = size | (np.int32(0x7F800000) if (bits & np.int32(0x7C00)) == np.int32(0x7C00) else np.int32(0))
        return np.int32(sign | size).view(np.float32)

    def from_bfloat16(value):
        return np.int32(np.int32(value) << np.int32(16)).view(np.float32)

    def same(value):
        return value

    return {types.uint16: from_float16, types.int16: from_bfloat16}.get(value, same)


@compiled(EXACT)
def to_float16(value):
    """The bits of a float32 as float16, rounded to nearest, ties to even."""
    bits = np.float32(value).view(np.int32)
    sign = (bits >> np.int32(16)) & np.int32(0x8000)
    size = bits & np.int32(0x7FFFFFFF)
    if size >= np.int32(0x7F800000):  # infinity, or NaN
        found = np.int32(0x7C00) | (np.int32(0x0200) if size > np.int32(0x7F800000) else np.int32(0))
    elif size >= np.int32(0x477FF000):  # rounds to infinity
        found = np.int32(0x7C00)
    elif size < np.int32(0x38800000):  # subnormal: adding 1/2 leaves the bits at the low end, rounded
        found = np.float32(np.int32(size).view(np.float32) + np.float32(0.5)).view(np.int32) - np.int32(0x3F000000)
    else:
        odd = (size >> np.int32(13)) & np.int32(1)
        found = (size - np.int32(0x38000000) + np.int32(0x0FFF) + odd) >> np.int32(13)
    return np.uint16(sign | found)


@compiled(EXACT)
def to_bfloat16(value):
    """The bits of a float32 as bfloat16, rounded to nearest, ties to even."""
    bits = np.float32(value).view(np.int32)
    rounded = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
    return np.int16(rounded if value == value else np.int32(0x7FC0))


# --- one row


@declared
def row_of(x, row, room):
    """A row as a contiguous array of the dtype that is computed in: the row itself, or a copy in `room`."""


@overload(row_of, jit_options=EXACT)
def _row_of(x, row, room):
    def view(x, row, room):
        return x[row if x.shape[0] > 1 else 0]

    def copy(x, row, room):
        return copy_row(x[row if x.shape[0] > 1 else 0], room)

    return view if x.layout == "C" and x.dtype == room.dtype else copy


@declared
def is_read_in_place(x, like):
    """Whether rows are views: contiguous, and of the dtype that is computed in, which is that of `like`."""


@overload(is_read_in_place, jit_options=EXACT)
def _is_read_in_place(x, like):
    found = x.ndim == 2 and x.layout == "C" and x.dtype == like.dtype
    return lambda x, like: found


@compiled(EXACT)
def room_for(n, is_needed, like):
    """Room for a row, where it is needed."""
    return np.empty(n if is_needed else 0, like.dtype)


@compiled(EXACT)
def copy_row(x, room):
    n = x.shape[0]
    for i in range(n):
        room[i] = widened(x[i])
    return room[:n]


@compiled(EXACT)
def masked_row(x, where, row, other, room):
    """A row, with another number where `where` is False; `where` has no rows where nothing is removed."""
    if where.shape[0] == 0:
        return row_of(x, row, room)
    values, kept = x[row if x.shape[0] > 1 else 0], where[row if where.shape[0] > 1 else 0]
    n = values.shape[0]
    for i in range(n):
        room[i] = widened(values[i]) if kept[i] else other
    return room[:n]


@declared
def target_of(out, row, room):
    """Where a row of the result is computed: in its place, or in `room` where it is to be rounded, or is no result."""


@overload(target_of, jit_options=EXACT)
def _target_of(out, row, room):
    def place(out, row, room):
        return out[row]

    def elsewhere(out, row, room):
        return room

    return place if out.ndim == 2 and out.dtype == room.dtype else elsewhere


@declared
def store_row(values, out, row):
    """Round a row into its place; nothing is to be done for one that was computed there."""


@overload(store_row, jit_options=EXACT)
def _store_row(values, out, row):
    def nothing(values, out, row):
        pass

    def as_float16(values, out, row):
        place = out[row]
        for i in range(place.shape[0]):
            place[i] = to_float16(values[i])

    def as_bfloat16(values, out, row):
        place = out[row]
        for i in range(place.shape[0]):
            place[i] = to_bfloat16(values[i])

    return {types.uint16: as_float16, types.int16: as_bfloat16}.get(out.dtype, nothing)


@declared
def store_number(number, out, row):
    """Write a result that is one number per row; nothing is to be done for one that is a row."""


@overload(store_number, jit_options=EXACT)
def _store_number(number, out, row):
    def nothing(number, out, row):
        pass

    def store(number, out, row):
        out[row] = number

    return store if out.ndim == 1 else nothing


@compiled(EXACT)
def number_of(values, row):
    """One number per row, or one for all of them."""
    return np.float64(values[row if values.shape[0] > 1 else 0])


@compiled(EXACT)
def fill(values, number):
    for i in range(values.shape[0]):
        values[i] = number


@compiled(EXACT)
def fill_invalid(values, where, row):
    """NaN for the items of a row without an answer, but 0 for those that are removed."""
    fill(values, math.nan)
    if where.shape[0] > 0 and values.shape[0] > 0:
        kept = where[row if where.shape[0] > 1 else 0]
        for i in range(kept.shape[0]):
            if not kept[i]:
                values[i] = 0.0


# --- what can be selected


@compiled(EXACT)
def compact(x, largest, into):
    """Copy what can be selected, with a finite score in the place of +inf.

    Returns how many can be selected, how many of them are +inf, and whether there is a NaN.
    """
    count = infinite = 0
    broken = False
    for i in range(x.shape[0]):
        value = x[i]
        if value > largest:
            infinite += 1
            value = x.dtype.type(largest)
        broken |= value != value
        if value > -math.inf:
            into[count] = value
            count += 1
    return count, infinite, broken


@compiled(EXACT)
def survey_weighted(x, weights, largest):
    """The same counts for weighted items, with the weight of all items and of those that can be selected.

    An item that cannot be selected may have any weight. Returns how many can be selected and have weight, how many can
    be selected, how many of them are +inf, whether there is a NaN or a bad weight, the two sums of weights, and the
    extremes of all that can be selected.
    """
    count = able = infinite = 0
    broken = False
    total = held = 0.0
    highest, lowest = -math.inf, math.inf
    for i in range(x.shape[0]):
        value, weight = np.float64(x[i]), np.float64(weights[i])
        usable = (weight >= 0.0) & (weight < math.inf)
        total += weight if usable else 0.0
        broken |= value != value
        if value > -math.inf:
            if value > largest:
                infinite += 1
                value = largest
            broken |= not usable
            able += 1
            highest, lowest = max(highest, value), min(lowest, value)
            if weight > 0.0:
                held += weight
                count += 1
    return count, able, infinite, broken, total, held, highest, lowest


@compiled(EXACT)
def compact_weighted(x, weights, largest, into, weights_into):
    """Copy what can be selected and has weight, with a finite score in the place of +inf."""
    count = 0
    for i in range(x.shape[0]):
        if x[i] > -math.inf and weights[i] > 0.0:
            into[count] = min(x[i], x.dtype.type(largest))
            weights_into[count] = weights[i]
            count += 1
