"""The logarithm of the mask as kernels over rows."""

from __future__ import annotations

import math

import numpy as np

from .cache import compiled, kernel
from .log_rule import pull_log_row, push_log_row
from .loops import item_cotangents, no_lanes, pull_loop, push_loop
from .masks import CAREFUL, solve_row
from .operations import EXACT, WITHOUT_SUMS, exponential, reach_of
from .rows import fill, is_read_in_place, masked_row, number_of, room_for, row_of, store_row, target_of
from .solve import log_odds


@compiled(WITHOUT_SUMS)
def log_sigmoid(z, number):
    """min(z, 0) - log1p(exp(-|z|)), in the dtype `number`.

    log1p(e) = 2 artanh(s), s = e / (2 + e) <= 1/3, is a series that vectorizes: 16 terms leave 2^-56.
    """
    one, two, none = number(1.0), number(2.0), number(0.0)
    decay = exponential(-math.fabs(z))
    decay = decay if math.fabs(z) < reach_of(number) else none
    s = decay / (two + decay)
    t = s * s
    series = number(1.0 / 33.0)
    series = series * t + number(1.0 / 31.0)
    series = series * t + number(1.0 / 29.0)
    series = series * t + number(1.0 / 27.0)
    series = series * t + number(1.0 / 25.0)
    series = series * t + number(1.0 / 23.0)
    series = series * t + number(1.0 / 21.0)
    series = series * t + number(1.0 / 19.0)
    series = series * t + number(1.0 / 17.0)
    series = series * t + number(1.0 / 15.0)
    series = series * t + number(1.0 / 13.0)
    series = series * t + number(1.0 / 11.0)
    series = series * t + number(1.0 / 9.0)
    series = series * t + number(1.0 / 7.0)
    series = series * t + number(1.0 / 5.0)
    series = series * t + number(1.0 / 3.0)
    series = series * t + one
    return (z if z < none else none) - two * s * series


@compiled(WITHOUT_SUMS)
def write_log_mask(x, reference, inverse, offset, out):
    """The logarithms, for scores that are not +inf."""
    number = x.dtype.type
    for i in range(x.shape[0]):
        out[i] = log_sigmoid((x[i] - reference) * inverse - offset, number)


@compiled(WITHOUT_SUMS)
def write_log_mask_at(x, reference, inverse, offset, largest, farthest, out):
    """The logarithms, as a rule sees them: +inf is the largest score, and no score is farther than `farthest`."""
    number = x.dtype.type
    for i in range(x.shape[0]):
        value = x[i] if x[i] < largest else largest
        z = (value - reference) * inverse
        z = z if z < farthest else farthest
        z = z if z > -farthest else -farthest
        found = log_sigmoid(z - offset, number)
        out[i] = found if value >= -largest else number(-math.inf)


@kernel(EXACT)
def log_rows(x, weights, where, k, tau, found, offsets, references, bound, start, stop):
    """Logarithms of the masks of the rows from `start` to `stop`, with the offset and the reference of each."""
    n = x.shape[1]
    number = offsets.dtype.type
    largest = bound.largest
    shared = where.shape[0] > 0
    some, odds = room_for(n, True, offsets), room_for(n, True, offsets)
    raw = some if shared else room_for(n, not is_read_in_place(x, offsets), offsets)
    clean = room_for(n, shared or not is_read_in_place(found, offsets), offsets)
    kept, room = room_for(n, shared and weights is not None, offsets), room_for(n, weights is not None, offsets)
    for row in range(start, stop):
        values = masked_row(x, where, row, -math.inf, raw)
        mass, temperature = number_of(k, row), number_of(tau, row)
        item_weights = None if weights is None else row_of(weights, row, room)
        numbers, flags, way = solve_row(
            values, item_weights, mass, temperature, (0, 0), False, bound, shared, clean, some, odds, kept, room
        )
        if shared:
            values = masked_row(x, where, row, -math.inf, raw)
        reference, offset = numbers[0], numbers[1]
        nothing, everything, valid, infinite = flags
        out = target_of(found, row, clean)
        if not valid:
            reference = offset = math.nan
            fill(out, math.nan)
        elif way != CAREFUL:
            write_log_mask(values, number(reference), number(1.0 / temperature), number(offset), out)
        else:
            if nothing or everything:
                offset = bound.saturated if nothing else -bound.saturated
            for i in range(n):
                value = np.float64(values[i])
                if value == -math.inf or nothing or (infinite and not everything and value < math.inf):
                    out[i] = -math.inf
                else:
                    z = log_odds(min(value, largest), reference, temperature) - offset
                    out[i] = min(z, 0.0) - math.log1p(math.exp(-math.fabs(z)))
        store_row(out, found, row)
        offsets[row], references[row] = offset, reference


@kernel(EXACT)
def log_at_rows(x, weights, where, k, tau, offsets, references, found, bound, start, stop):
    """The same at thresholds that are known. Nothing is weighted or removed."""
    n = x.shape[1]
    number = offsets.dtype.type
    largest, farthest = bound.largest, bound.farthest
    raw = room_for(n, not is_read_in_place(x, offsets), offsets)
    clean = room_for(n, not is_read_in_place(found, offsets), offsets)
    for row in range(start, stop):
        values, out = row_of(x, row, raw), target_of(found, row, clean)
        temperature, offset, reference = number_of(tau, row), np.float64(offsets[row]), np.float64(references[row])
        if offset != offset:
            fill(out, math.nan)
        elif number_of(k, row) <= 0.0:
            fill(out, -math.inf)
        elif bound.coldest < temperature < bound.hottest:
            inverse = number(1.0 / temperature)
            write_log_mask_at(
                values, number(reference), inverse, number(offset), number(largest), number(farthest), out
            )
        else:
            for i in range(n):
                z = log_odds(min(np.float64(values[i]), largest), reference, temperature)
                z = min(max(z, -farthest), farthest) - offset
                out[i] = min(z, 0.0) - math.log1p(math.exp(-math.fabs(z))) if values[i] > -math.inf else -math.inf
        store_row(out, found, row)


pull_log_rows = pull_loop("pull_log_rows", pull_log_row, item_cotangents, no_lanes)
push_log_rows = push_loop("push_log_rows", push_log_row)
