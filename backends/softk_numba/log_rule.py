"""The derivative of the logarithm of the mask, of one row: 1 - m in the place of v = m (1 - m).

What is never selected has the logarithm -inf and no derivative.
"""

from __future__ import annotations

import math

import numpy as np

from softk._reference.threshold.limits import DOMINANT

from .cache import compiled
from .operations import EXACT, FAST, WITHOUT_SUMS, clipped_of, exponential, larger
from .rule import (
    LEAST_GAIN,
    clipped_odds,
    gains_of,
    linearize,
    origin_of,
    over_slope,
    rate_of,
    sigmoid,
    tangents_of,
    weighted_value,
)
from .solve import BLOCK


@compiled(WITHOUT_SUMS)
def write_log_gains(x, u, reference, inverse, offset, lowest, gains, direct):
    """v and (1 - m) u of every item, 0 for z up to `lowest`."""
    number = x.dtype.type
    one, none, flushed = number(1.0), number(0.0), clipped_of(number)
    for i in range(x.shape[0]):
        z = (x[i] - reference) * inverse - offset
        decay = exponential(-math.fabs(z))
        decay = decay if decay > flushed else none
        larger_one = one / (one + decay)
        smaller_one = decay * larger_one
        gains[i] = smaller_one * larger_one
        direct[i] = (smaller_one if z > none else larger_one) * u[i] if z > lowest else none


@compiled(FAST)
def sum_log_gains(gains, direct):
    """The sums of both, and the largest v."""
    number = gains.dtype.type
    total = product = most = number(0.0)
    for i in range(gains.shape[0]):
        total += gains[i]
        product += direct[i]
        most = larger(most, gains[i])
    return total, product, most


@compiled(FAST)
def write_log_product(direct, factor, inverse, gains):
    """((1 - m) u + v factor) / tau, in the place of v."""
    for i in range(gains.shape[0]):
        gains[i] = (direct[i] + gains[i] * factor) * inverse


@compiled(FAST)
def write_log_tangent(x, dx, mean, reference, inverse, offset, lowest, out):
    """(1 - m) (dx - mean) / tau, and 0 for z up to `lowest`."""
    number = x.dtype.type
    one, none = number(1.0), number(0.0)
    for i in range(x.shape[0]):
        z = (x[i] - reference) * inverse - offset
        out[i] = (dx[i] - mean) * inverse / (one + exponential(z)) if z > lowest else none


@compiled(EXACT)
def complement_at(z, scaled, nearest, k, bound, weights):
    """1 - m: the derivative of the logarithm in z. Without weights it is rounded as p is, from which it is taken."""
    if z <= -0.5 * bound.farthest or k <= 0.0:
        return 0.0
    if weights is None and z > 0.0:
        return math.exp(-nearest) * scaled * (1.0 + math.exp(-z))
    return sigmoid(-z)


@compiled(EXACT)
def pull_log_row(x, weights, u, c, k, tau, reference, offset, bound, plain, of_tau, xbar, abar):
    """Cotangents of scores and weights, from those of the log mask and the offset; returns those of k and tau."""
    n = x.shape[0]
    number = x.dtype.type
    if plain and not of_tau and abar.shape[0] == 0 and weights is None:
        inverse = number(1.0 / tau)
        direct = np.empty(n, x.dtype)
        total = product = most = 0.0
        for start in range(0, n, BLOCK):
            stop = start + BLOCK
            write_log_gains(
                x[start:stop],
                u[start:stop],
                number(reference),
                inverse,
                number(offset),
                number(-0.5 * bound.farthest),
                xbar[start:stop],
                direct[start:stop],
            )
            sums = sum_log_gains(xbar[start:stop], direct[start:stop])
            total, product, most = total + sums[0], product + sums[1], max(most, np.float64(sums[2]))
        if most > LEAST_GAIN and most < DOMINANT * total:
            write_log_product(direct, number((c - product) / total), inverse, xbar)
            return (product - c) / total, 0.0
    z, scaled = np.empty(n), np.empty(n)
    nearest, normal, held = linearize(x, weights, k, tau, reference, offset, bound, z, scaled)
    rate = rate_of(normal, bound.farthest)
    # Above the threshold (1 - m) / V has no bound, and is formed from v' / V'; below it 1 - m is formed first.
    near, by_slope, total, at_most, share_at_most = 0.0, -np.float64(c), 0.0, 0.0, 1.0
    for i in range(n):
        rest = complement_at(z[i], scaled[i], nearest, k, bound, weights)
        value = rest * u[i] if rest != 0.0 else 0.0
        if z[i] > 0.0:
            near += scaled[i] * (1.0 + math.exp(-z[i])) * rate * u[i] if scaled[i] != 0.0 else 0.0
        else:
            by_slope += value
        total += value
        if i == held:
            at_most = value
            share_at_most = scaled[i] if weights is None else weighted_value(weights[i], scaled[i], bound)
            share_at_most /= normal
    hbar = near + over_slope(1.0, nearest, rate, bound) * by_slope
    # (1 - m) u + p (c - <1 - m, u>), measured from the item that dominates p.
    level = at_most / share_at_most if held >= 0 else total
    rest_total = 0.0
    for i in range(n):
        rest = complement_at(z[i], scaled[i], nearest, k, bound, weights)
        value = rest * u[i] if rest != 0.0 else 0.0
        share = (scaled[i] if weights is None else weighted_value(weights[i], scaled[i], bound)) / normal
        rest_total += 0.0 if i == held else value - share * level
    origin = origin_of(x, weights, scaled, bound)
    taubar = -c * clipped_odds(origin, reference, tau, bound.farthest) / tau
    for i in range(n):
        rest = complement_at(z[i], scaled[i], nearest, k, bound, weights)
        value = rest * u[i] if rest != 0.0 else 0.0
        share = (scaled[i] if weights is None else weighted_value(weights[i], scaled[i], bound)) / normal
        found = (0.0 if i == held else value - share * level) + share * (c - rest_total)
        found = found / tau if -math.inf < x[i] < math.inf else 0.0
        if found != 0.0:
            taubar -= clipped_odds(np.float64(x[i]), origin, tau, bound.farthest) * found
        xbar[i] = found
    if abar.shape[0] > 0:
        for i in range(n):
            mask = sigmoid(z[i])
            if z[i] > 0.0:
                abar[i] = -mask * hbar
            else:
                abar[i] = -(mask * near + scaled[i] * (1.0 + math.exp(-math.fabs(z[i]))) * rate * by_slope)
    return hbar, taubar


@compiled(EXACT)
def push_log_row(x, weights, dx, dk, dtau, da, k, tau, reference, offset, bound, plain, moved):
    """The tangent of the log mask, from those of the inputs; returns those of the offset and the threshold."""
    n = x.shape[0]
    number = x.dtype.type
    if plain and dtau == 0.0 and da.shape[0] == 0 and weights is None:
        inverse = number(1.0 / tau)
        total, product, ordinary, _ = gains_of(x, weights, dx, True, number(reference), inverse, number(offset), moved)
        if ordinary:
            mean = product / total - dk * tau / total
            lowest = number(-0.5 * bound.farthest)
            write_log_tangent(x, dx, number(mean), number(reference), inverse, number(offset), lowest, moved)
            return mean / tau, mean
    z, scaled = np.empty(n), np.empty(n)
    nearest, normal, held = linearize(x, weights, k, tau, reference, offset, bound, z, scaled)
    rate = rate_of(normal, bound.farthest)
    origin = origin_of(x, weights, scaled, bound)
    mean, dh, by_slope, doffset = tangents_of(
        x, weights, dx, dk, dtau, da, tau, reference, bound, nearest, normal, held, rate, origin, z, scaled
    )
    for i in range(n):
        found = 0.0
        rest = complement_at(z[i], scaled[i], nearest, k, bound, weights)
        if x[i] > -math.inf:
            if i != held and rest != 0.0:
                y = dx[i] if x[i] < math.inf else 0.0
                found = rest * (
                    y - clipped_odds(np.float64(x[i]), origin, tau, bound.farthest) * dtau - mean[0] - mean[1]
                )
            elif rest != 0.0:
                found = -rest * mean[1]
            found /= tau
            if z[i] > 0.0:
                found += scaled[i] * (1.0 + math.exp(-z[i])) * rate * dh
            elif rest != 0.0:
                found += rest * by_slope
        moved[i] = found
    return doffset, mean[0] + mean[1] - (mean[2] - offset) * dtau - mean[3]
