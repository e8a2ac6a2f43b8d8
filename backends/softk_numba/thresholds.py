"""The derivative of the threshold as kernels over rows."""

from __future__ import annotations

import math

import numpy as np

from .cache import kernel
from .operations import EXACT
from .rows import fill, fill_invalid, masked_row, number_of, row_of, store_row, target_of
from .rule import pull_threshold_row, push_row


@kernel(EXACT)
def pull_threshold_rows(
    x, weights, where, k, tau, offsets, references, b, c, xbar, kbar, taubar, abar, bound, start, stop
):
    """The cotangents of the inputs, from those of the threshold and the offset. Those without rows are not wanted."""
    n = x.shape[1]
    dtype = offsets.dtype
    raw, room, target = np.empty(n, dtype), np.empty(n, dtype), np.empty(n, dtype)
    nobody = np.empty(0, dtype)
    for row in range(start, stop):
        temperature, offset, reference = number_of(tau, row), float(offsets[row]), float(references[row])
        out = target_of(xbar, row, target) if xbar.shape[0] > 0 else target
        asked = abar[row] if abar.shape[0] > 0 else nobody
        if offset != offset:
            fill_invalid(out, where, row)
            fill(asked, math.nan)
            hbar = tbar = math.nan
        else:
            values = masked_row(x, where, row, -math.inf, raw)
            item_weights = None if weights is None else row_of(weights, row, room)
            hbar, tbar = pull_threshold_row(
                values,
                item_weights,
                float(b[row]) if b.shape[0] > 0 else 0.0,
                float(c[row]) if c.shape[0] > 0 else 0.0,
                number_of(k, row),
                temperature,
                reference,
                offset,
                bound,
                bound[9] < temperature < bound[10],
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


@kernel(EXACT)
def push_threshold_rows(
    x, weights, where, k, tau, offsets, references, dx, dk, dtau, da, dt, doffset, bound, start, stop
):
    """The tangents of the threshold and the offset, from those of the inputs. A tangent that has no rows is zero."""
    n = x.shape[1]
    dtype = offsets.dtype
    raw, room, clean, target = np.empty(n, dtype), np.empty(n, dtype), np.empty(n, dtype), np.empty(n, dtype)
    by_weight = np.empty(n, dtype)
    nobody = np.empty(0, dtype)
    for row in range(start, stop):
        temperature, offset, reference = number_of(tau, row), float(offsets[row]), float(references[row])
        found = moved = math.nan
        if offset == offset:
            values = masked_row(x, where, row, -math.inf, raw)
            tangents = clean
            if dx.shape[0] > 0:
                tangents = masked_row(dx, where, row, 0.0, clean)
            else:
                fill(clean, 0.0)
            item_weights = None if weights is None else row_of(weights, row, room)
            by = masked_row(da, where, row, 0.0, by_weight) if da.shape[0] > 0 else nobody
            found, moved = push_row(
                values,
                item_weights,
                tangents,
                number_of(dk, row) if dk.shape[0] > 0 else 0.0,
                number_of(dtau, row) if dtau.shape[0] > 0 else 0.0,
                by,
                number_of(k, row),
                temperature,
                reference,
                offset,
                bound,
                bound[9] < temperature < bound[10],
                target,
            )
        doffset[row], dt[row] = found, moved
