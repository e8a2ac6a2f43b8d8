"""The loops over rows that all derivatives share: reading a row, writing its results, and rows without an answer.

A kernel is made of a loop and of a rule for one row, which `rule` and `log_rule` have.
"""

from __future__ import annotations

import math

import numpy as np

from .cache import compiled, kernel
from .operations import EXACT
from .rows import (
    fill,
    fill_invalid,
    is_read_in_place,
    masked_row,
    number_of,
    room_for,
    row_of,
    store_number,
    store_row,
    target_of,
)


@compiled(EXACT)
def item_cotangents(u, where, row, room):
    """The cotangents of a result of one number per item: 0 for the items that are removed."""
    return masked_row(u, where, row, 0.0, room)


@compiled(EXACT)
def row_cotangent(b, where, row, room):
    """The cotangent of a result of one number per row; 0 where there is none."""
    return np.float64(b[row]) if b.shape[0] > 0 else 0.0


@compiled(EXACT)
def no_lanes(x, weights, where, tau, offsets, references, u, c, xbar, kbar, taubar, bound, start, stop):
    """Which rows are done already: none."""
    return np.zeros(stop - start, np.bool_)


def pull_loop(name, pull_row, cotangent_of, pull_lanes):
    """The kernel for the cotangents of the inputs, from those of the result and the offset.

    Nobody asks for those that have no rows. `pull_lanes` takes the rows that it can, and says which.
    """

    def loop(x, weights, where, k, tau, offsets, references, u, c, xbar, kbar, taubar, abar, bound, start, stop):
        n = x.shape[1]
        raw = room_for(n, where.shape[0] > 0 or not is_read_in_place(x, offsets), offsets)
        room = room_for(n, weights is not None, offsets)
        clean = room_for(n, where.shape[0] > 0 or not is_read_in_place(u, offsets), offsets)
        target = room_for(n, xbar.shape[0] == 0 or not is_read_in_place(xbar, offsets), offsets)
        unused = np.empty(0, offsets.dtype)
        done = pull_lanes(x, weights, where, tau, offsets, references, u, c, xbar, kbar, taubar, bound, start, stop)
        for row in range(start, stop):
            if done[row - start]:
                continue
            temperature, offset, reference = number_of(tau, row), np.float64(offsets[row]), np.float64(references[row])
            out = target_of(xbar, row, target) if xbar.shape[0] > 0 else target
            asked = abar[row] if abar.shape[0] > 0 else unused
            if offset != offset:
                fill_invalid(out, where, row)
                fill(asked, math.nan)
                hbar = tbar = math.nan
            else:
                hbar, tbar = pull_row(
                    masked_row(x, where, row, -math.inf, raw),
                    None if weights is None else row_of(weights, row, room),
                    cotangent_of(u, where, row, clean),
                    np.float64(c[row]) if c.shape[0] > 0 else 0.0,
                    number_of(k, row),
                    temperature,
                    reference,
                    offset,
                    bound,
                    bound.coldest < temperature < bound.hottest,
                    taubar.shape[0] > 0,
                    out,
                    asked,
                )
            if xbar.shape[0] > 0:
                store_row(out, xbar, row)
            if kbar.shape[0] > 0:
                kbar[row] = hbar
            if taubar.shape[0] > 0:
                taubar[row] = tbar

    return kernel(EXACT, name)(loop)


def push_loop(name, push_row):
    """The kernel for the tangents of the result and the offset, from those of the inputs.

    A tangent that has no rows is zero. The result is one number per item, or, where `moved` is a vector, per row.
    """

    def loop(x, weights, where, k, tau, offsets, references, dx, dk, dtau, da, moved, doffset, bound, start, stop):
        n = x.shape[1]
        raw = room_for(n, where.shape[0] > 0 or not is_read_in_place(x, offsets), offsets)
        room = room_for(n, weights is not None, offsets)
        clean = room_for(n, True, offsets)
        target = room_for(n, not is_read_in_place(moved, offsets), offsets)
        by_weight = room_for(n, da.shape[0] > 0, offsets)
        unused = np.empty(0, offsets.dtype)
        for row in range(start, stop):
            temperature, offset, reference = number_of(tau, row), np.float64(offsets[row]), np.float64(references[row])
            out = target_of(moved, row, target)
            if offset != offset:
                fill(out, math.nan)
                of_offset = of_row = math.nan
            else:
                tangents = clean
                if dx.shape[0] > 0:
                    tangents = masked_row(dx, where, row, 0.0, clean)
                else:
                    fill(clean, 0.0)
                of_offset, of_row = push_row(
                    masked_row(x, where, row, -math.inf, raw),
                    None if weights is None else row_of(weights, row, room),
                    tangents,
                    number_of(dk, row) if dk.shape[0] > 0 else 0.0,
                    number_of(dtau, row) if dtau.shape[0] > 0 else 0.0,
                    masked_row(da, where, row, 0.0, by_weight) if da.shape[0] > 0 else unused,
                    number_of(k, row),
                    temperature,
                    reference,
                    offset,
                    bound,
                    bound.coldest < temperature < bound.hottest,
                    out,
                )
            store_row(out, moved, row)
            store_number(of_row, moved, row)
            doffset[row] = of_offset

    return kernel(EXACT, name)(loop)
