"""The derivative of one row, in both directions: the rule of `softk._reference.threshold.rule`, of the same names.

Where the nearest item is within `ORDINARY` units of the threshold, and no item dominates p, the products v = m (1 - m)
are numbers and their rounding does not matter: two passes that vectorize are enough. Every other row is computed with
care, in float64 and item by item: in a gap, beside an item that dominates, and with infinite scores.
"""

from __future__ import annotations

import math

import numpy as np

from softk._reference.threshold.limits import DOMINANT

from .cache import compiled
from .operations import EXACT, FAST, FORMULAS, WITHOUT_SUMS, clipped_of, exponential, larger
from .solve import BLOCK, log_odds

is_rounding, balance, is_beside, rate_of = FORMULAS.is_rounding, FORMULAS.balance, FORMULAS.is_beside, FORMULAS.rate_of

#: The least v = m (1 - m) of the nearest item that an ordinary row has: that of |z| = 16.
LEAST_GAIN = 1.1e-7


# --- ordinary rows


@compiled(WITHOUT_SUMS)
def write_gains(x, reference, inverse, offset, gains):
    """v of every item.

    A loop that writes has no sum. The compiler reads and writes one item at a time where arrays lie close together, and
    a sum is then added up in another order: its last digits would depend on where the arrays lie.
    """
    number = x.dtype.type
    one, flushed = number(1.0), clipped_of(number)
    for i in range(x.shape[0]):
        z = (x[i] - reference) * inverse - offset
        decay = exponential(-math.fabs(z))
        decay = decay if decay > flushed else number(0.0)  # `exponential` is clipped, and far items have no part
        larger_one = one / (one + decay)
        gains[i] = decay * larger_one * larger_one


@compiled(FAST)
def sum_gains(values, gains):
    """The sum of v, that of v times the values, and the largest v, once more as the largest a v."""
    number = gains.dtype.type
    total = product = most = number(0.0)
    for i in range(gains.shape[0]):
        total += gains[i]
        product += gains[i] * values[i]
        most = larger(most, gains[i])
    return total, product, most, most


@compiled(FAST)
def sum_weighted_gains(weights, values, by_weight, gains):
    """The sum of a v, that of v or a v times the values, the largest v with a > 0, the largest a v."""
    none = gains.dtype.type(0.0)
    total = product = most = heaviest = none
    for i in range(gains.shape[0]):
        gain = gains[i]
        weight = weights[i] if gain > none else none
        weighted = weight * gain
        total += weighted
        product += (weighted if by_weight else gain) * values[i]
        most = larger(most, gain if weight > none else none)
        heaviest = larger(heaviest, weighted)
    return total, product, most, heaviest


@compiled(EXACT)
def gains_of(x, weights, values, by_weight, reference, inverse, offset, gains):
    """v of every item, V, the product with the values, whether the row is ordinary, and the largest a v."""
    total = product = most = heaviest = 0.0
    for start in range(0, x.shape[0], BLOCK):
        stop = start + BLOCK
        some = gains[start:stop]
        write_gains(x[start:stop], reference, inverse, offset, some)
        if weights is None:
            found = sum_gains(values[start:stop], some)
        else:
            found = sum_weighted_gains(weights[start:stop], values[start:stop], by_weight, some)
        total += found[0]
        product += found[1]
        most, heaviest = max(most, np.float64(found[2])), max(heaviest, np.float64(found[3]))
    ordinary = (most > LEAST_GAIN) & (heaviest < DOMINANT * total) & (total > 1e-30) & (total < 1e30)
    return total, product, ordinary, heaviest


@compiled(EXACT)
def heaviest_score(x, weights, gains, heaviest, reference):
    """The first score with the largest a v."""
    number = gains.dtype.type
    for i in range(x.shape[0]):
        if (gains[i] if weights is None else number(weights[i] * gains[i])) >= heaviest:
            return np.float64(x[i])
    return reference


@compiled(FAST)
def moment_of(x, origin, xbar):
    """The sum of (x - origin) xbar. An infinite score has no cotangent."""
    none = xbar.dtype.type(0.0)
    total = 0.0
    for i in range(x.shape[0]):
        value = np.float64(x[i]) if xbar[i] != none else origin
        total += (value - origin) * np.float64(xbar[i])
    return total


@compiled(FAST)
def rest_block(values, mean, gains):
    """The sum of v (u - mean)."""
    total = gains.dtype.type(0.0)
    for i in range(gains.shape[0]):
        total += gains[i] * (values[i] - mean)
    return total


@compiled(FAST)
def weighted_rest_block(values, weights, by_weight, mean, gains):
    """The sum of v (u - a mean), or of a v (u - mean). An item without v may have any weight."""
    none = gains.dtype.type(0.0)
    total = none
    for i in range(gains.shape[0]):
        weight = weights[i] if gains[i] > none else none
        total += (weight * (values[i] - mean)) * gains[i] if by_weight else gains[i] * (values[i] - weight * mean)
    return total


@compiled(EXACT)
def rest_of(values, weights, by_weight, mean, gains):
    """What the rounding of a mean has left: u - mean cancels where the values of all items near the threshold agree."""
    total = 0.0
    for start in range(0, gains.shape[0], BLOCK):
        stop = start + BLOCK
        if weights is None:
            total += rest_block(values[start:stop], mean, gains[start:stop])
        else:
            total += weighted_rest_block(values[start:stop], weights[start:stop], by_weight, mean, gains[start:stop])
    return total


@compiled(WITHOUT_SUMS)  # the two differences must stay two
def write_product(values, mean, more, inverse, gains):
    """v (u - mean) / tau, in the place of v, from the mean in two parts."""
    for i in range(gains.shape[0]):
        gains[i] = gains[i] * ((values[i] - mean) - more) * inverse


@compiled(WITHOUT_SUMS)
def write_weighted_product(values, weights, mean, more, inverse, gains):
    """v (u - a mean) / tau, in the place of v, likewise. An item without v may have any weight."""
    none = gains.dtype.type(0.0)
    for i in range(gains.shape[0]):
        weight = weights[i] if gains[i] > none else none
        gains[i] = gains[i] * ((values[i] - weight * mean) - weight * more) * inverse


# --- rows with care


@compiled(EXACT)
def sigmoid(z):
    decay = math.exp(-math.fabs(z))
    return (1.0 if z > 0.0 else decay) / (1.0 + decay)


@compiled(EXACT)
def clipped_odds(value, reference, tau, farthest):
    return min(max(log_odds(value, reference, tau), -farthest), farthest)


@compiled(EXACT)
def linearize(x, weights, k, tau, reference, offset, bound, z, scaled):
    """z and v' of every item; |z| of the nearest, V', and the item that dominates p, -1 where there is none.

    Sums of the derivative are formed from v' = v exp(nearest), which is a number in every gap. p, in proportion to it,
    is made exact by the mass. Scores of -inf have no part.
    """
    n = x.shape[0]
    unit, largest, farthest, log_farthest = bound.unit, bound.largest, bound.farthest, bound.log_farthest
    high, low = math.inf, -math.inf
    for i in range(n):
        value = min(np.float64(x[i]), largest)
        if value == -math.inf:
            z[i] = -math.inf
            continue
        z[i] = min(max(log_odds(value, reference, tau) - offset, -farthest), farthest)
        if weights is None or weights[i] != 0.0:
            if z[i] > 0.0:
                high = min(high, value)
            else:
                low = max(low, value)
    no_high, no_low = high == math.inf, low == -math.inf
    above = below = 0.5 * farthest
    if not no_high:
        above = min(math.fabs(clipped_odds(high, reference, tau, farthest) - offset), above)
    if not no_low:
        below = min(math.fabs(clipped_odds(low, reference, tau, farthest) - offset), below)
    # Where one side is empty, its items without weight are measured from the nearest on the other side.
    across_high, across_low = (2.0 * below if no_high else 0.0), (2.0 * above if no_low else 0.0)
    if no_high:
        high, above = low, below
    elif no_low:
        low, below = high, above
    upper_height, lower_height = math.exp(-above), math.exp(-below)
    count = upper = lower = 0.0
    for i in range(n):
        if z[i] == -math.inf or (no_high and no_low):
            scaled[i] = 0.0
            continue
        value = min(np.float64(x[i]), largest)
        if z[i] > 0.0:
            distance, height = log_odds(value, high, tau) - across_high, upper_height
            count += 1.0 if weights is None else weights[i]
        else:
            distance, height = -log_odds(value, low, tau) - across_low, lower_height
        distance = max(distance, -log_farthest)
        decay = math.exp(-distance) if distance < -bound.log_negligible else 0.0
        scaled[i] = decay / (1.0 + height * decay)
        weighted = scaled[i] if weights is None else weighted_value(weights[i], scaled[i], bound)
        if z[i] > 0.0:
            upper += weighted
        else:
            lower += weighted
    delta = k - count
    exact = (upper > 0.0) & (lower > 0.0)
    if weights is not None:
        exact = exact & is_rounding(delta, k, unit)
        delta = 0.0
    half_gap = 0.5 * (above + below)
    share = 0.0
    if is_beside(exact, delta, half_gap, log_farthest):
        share = 0.5 * (above - below)
        nearest = min(above, below)
    else:
        share = balance(delta, upper, lower, half_gap, log_farthest)
        nearest = half_gap - math.fabs(share)
    # An item at the farthest distance has no derivative, even if no other item is nearer.
    more = math.exp(-share - math.fabs(share)) if above < 0.5 * farthest else 0.0
    less = math.exp(share - math.fabs(share)) if below < 0.5 * farthest else 0.0
    normal = heaviest = 0.0
    held = -1
    for i in range(n):
        if scaled[i] == 0.0:
            continue
        in_upper = z[i] > 0.0
        # The tail is to be multiplied with the larger one of the mask and its complement, which has an own rounding.
        value = min(np.float64(x[i]), largest)
        if in_upper:
            distance, height = log_odds(value, high, tau) - across_high, upper_height
        else:
            distance, height = -log_odds(value, low, tau) - across_low, lower_height
        decay = math.exp(-max(distance, -log_farthest))
        scaled[i] *= (more if in_upper else less) / (1.0 + height * decay)
        weighted = scaled[i] if weights is None else weighted_value(weights[i], scaled[i], bound)
        normal += weighted
        if weighted > heaviest:
            heaviest, held = weighted, i
    if not heaviest > DOMINANT * normal:
        held = -1
    return nearest, (normal if normal != 0.0 else 1.0), held


@compiled(EXACT)
def weighted_value(weight, value, bound):
    """weight * value; the weight of an item with next to no value may be anything."""
    return weight * value if value > 2.0 * bound.negligible else 0.0


@compiled(EXACT)
def gain_at(z, scaled, nearest, weights):
    """v. With weights v' may be clipped, and v is not in proportion to it."""
    if weights is None:
        return math.exp(-nearest) * scaled
    return sigmoid(z) * sigmoid(-z)


@compiled(EXACT)
def over_slope(factor, nearest, rate, bound):
    """A factor over V, clipped: the quotient is what is held at the largest derivative, and neither of the two."""
    farthest, log_farthest = bound.farthest, bound.log_farthest
    most = farthest * min(max(factor, 1.0), farthest)
    if not math.isfinite(most):
        most = bound.largest
    scale = factor * rate
    if nearest + math.log(scale) > math.log(most):
        return most
    half = math.exp(min(0.5 * nearest, 1.9 * log_farthest))  # a number where the square is none
    return min(half * scale * half, most)


@compiled(EXACT)
def origin_of(x, weights, scaled, bound):
    """The score that has the most of p: temperatures are differentiated by distances from it."""
    most, found = -1.0, math.inf
    for i in range(x.shape[0]):
        weighted = scaled[i] if weights is None else weighted_value(weights[i], scaled[i], bound)
        if x[i] > -math.inf:
            if weighted > most:
                most, found = weighted, np.float64(x[i])
            elif weighted == most:
                found = min(found, np.float64(x[i]))
    return min(max(found, -bound.largest), bound.largest)


@compiled(EXACT)
def pull_row(x, weights, u, c, k, tau, reference, offset, bound, plain, of_tau, xbar, abar):
    """Cotangents of the scores and the weights, from those of the mask and the offset; returns those of k and tau.

    `abar` has no items where nobody asks for it.
    """
    number = x.dtype.type
    n = x.shape[0]
    if plain:
        inverse = number(1.0 / tau)
        total, product, ordinary, heaviest = gains_of(
            x, weights, u, False, number(reference), inverse, number(offset), xbar
        )
        if ordinary:
            mean = number((product - c) / total)
            more = (rest_of(u, weights, False, mean, xbar) - c) / total
            hbar = mean + more
            origin = heaviest_score(x, weights, xbar, heaviest, reference) if of_tau else reference
            if abar.shape[0] > 0:
                for i in range(n):
                    abar[i] = (
                        -hbar * sigmoid((np.float64(x[i]) - reference) / tau - offset) if x[i] > -math.inf else 0.0
                    )
            if weights is None:
                write_product(u, mean, number(more), inverse, xbar)
            else:
                write_weighted_product(u, weights, mean, number(more), inverse, xbar)
            taubar = 0.0
            if of_tau:
                taubar = -moment_of(x, origin, xbar) / tau - c * ((origin - reference) / tau) / tau
            return hbar, taubar
    z, scaled = np.empty(n), np.empty(n)
    nearest, normal, held = linearize(x, weights, k, tau, reference, offset, bound, z, scaled)
    rate = rate_of(normal, bound.farthest)
    slope = over_slope(1.0, nearest, rate, bound)
    pulled = 0.0
    for i in range(n):
        if scaled[i] != 0.0:
            pulled += scaled[i] * u[i]
    hbar = rate * pulled - slope * c
    # u is measured from a multiple of the weights: that which is u at the item that dominates p, or their mean.
    heaviest, shares = 1.0, 0.0
    if weights is None:
        level = u[held] if held >= 0 else pulled / normal
    else:
        heaviest = 0.0
        for i in range(n):
            if scaled[i] > 0.0:
                heaviest = max(heaviest, np.float64(weights[i]))
        heaviest = np.float64(weights[held]) if held >= 0 else heaviest
        heaviest = heaviest if heaviest != 0.0 else 1.0
        for i in range(n):
            if scaled[i] > 0.0:
                shares += scaled[i] * (weights[i] / heaviest)
        level = u[held] if held >= 0 else pulled / (shares if shares != 0.0 else 1.0)
    g = np.float64(c)
    for i in range(n):
        gain = gain_at(z[i], scaled[i], nearest, weights)
        if gain != 0.0:
            share = 1.0
            if weights is not None:
                share = weights[i] / heaviest if scaled[i] > 0.0 else 0.0
            moved = 0.0 if i == held else u[i] - share * level
            g -= moved * gain
    origin = origin_of(x, weights, scaled, bound)
    taubar = 0.0
    for i in range(n):
        gain = gain_at(z[i], scaled[i], nearest, weights)
        found = 0.0
        if (gain != 0.0 or scaled[i] != 0.0) and x[i] < math.inf:
            share, weighted = 1.0, scaled[i]
            if weights is not None:
                share = weights[i] / heaviest if scaled[i] > 0.0 else 0.0
                weighted = weighted_value(weights[i], scaled[i], bound)
            moved = 0.0 if i == held or gain == 0.0 else u[i] - share * level
            found = (moved * gain + weighted / normal * g) / tau
            taubar -= clipped_odds(np.float64(x[i]), origin, tau, bound.farthest) * found
        xbar[i] = found
    taubar -= c * clipped_odds(origin, reference, tau, bound.farthest) / tau
    if abar.shape[0] > 0:
        near = rate * pulled
        for i in range(n):
            mask = sigmoid(z[i])
            if z[i] > 0.0 or c == 0.0:
                abar[i] = -mask * hbar
            else:
                below = scaled[i] * (1.0 + math.exp(-math.fabs(z[i]))) * rate
                abar[i] = -(mask * near - below * c)
    return hbar, taubar


@compiled(EXACT)
def tangents_of(x, weights, dx, dk, dtau, da, tau, reference, bound, nearest, normal, held, rate, origin, z, scaled):
    """What the tangents of all items have in common.

    Returns the mean by p of y = dx - (x - x_ref) dtau / tau in two parts, of which the first is y of the item that
    dominates p; dh; dh / V; and the tangents of the offset, less what is due to r, and of the threshold less that.
    """
    n = x.shape[0]
    farthest = bound.farthest
    at_most = mean = 0.0
    for turn in range(2):
        found = 0.0
        for i in range(n):
            weighted = scaled[i] if weights is None else weighted_value(weights[i], scaled[i], bound)
            if weighted != 0.0 and (turn == 0 or i != held):
                y = (dx[i] if x[i] < math.inf else 0.0) - clipped_odds(np.float64(x[i]), origin, tau, farthest) * dtau
                found += weighted * (y - at_most)
        if turn == 0:
            at_most = found / normal
            if held >= 0:
                at_most = dx[held] if x[held] < math.inf else 0.0
                at_most -= clipped_odds(np.float64(x[held]), origin, tau, farthest) * dtau
        else:
            mean = found / normal
    above = below = by_rate = 0.0  # <m, da> over either side of the threshold, and <m / V, da> below it
    if da.shape[0] > 0:
        for i in range(n):
            if x[i] > -math.inf:
                part = sigmoid(z[i]) * da[i]
                if z[i] > 0.0:
                    above += part
                else:
                    below += part
                    by_rate += scaled[i] * (1.0 + math.exp(-math.fabs(z[i]))) * rate * da[i]
    by_slope = over_slope(1.0, nearest, rate, bound) * (dk - above) - by_rate
    by_unit = over_slope(tau, nearest, rate, bound) * (dk - above) - tau * by_rate
    level = clipped_odds(origin, reference, tau, farthest)
    doffset = (at_most + mean - level * dtau) / tau - by_slope
    return (at_most, mean, level, by_unit), dk - above - below, by_slope, doffset


@compiled(EXACT)
def push_row(x, weights, dx, dk, dtau, da, k, tau, reference, offset, bound, plain, moved):
    """The tangent of the mask, from those of the scores, k, tau and the weights; returns those of offset and threshold.

    `da` has no items where there is none.
    """
    number = x.dtype.type
    n = x.shape[0]
    if plain and dtau == 0.0 and da.shape[0] == 0:
        inverse = number(1.0 / tau)
        total, product, ordinary, _ = gains_of(x, weights, dx, True, number(reference), inverse, number(offset), moved)
        if ordinary:
            # v (w - <p, w>) + v / V dk, w = dx / tau
            mean = number(product / total)
            more = rest_of(dx, weights, True, mean, moved) / total - dk * tau / total
            write_product(dx, mean, number(more), inverse, moved)
            return (mean + more) / tau, mean + more
    z, scaled = np.empty(n), np.empty(n)
    nearest, normal, held = linearize(x, weights, k, tau, reference, offset, bound, z, scaled)
    rate = rate_of(normal, bound.farthest)
    origin = origin_of(x, weights, scaled, bound)
    mean, dh, _, doffset = tangents_of(
        x, weights, dx, dk, dtau, da, tau, reference, bound, nearest, normal, held, rate, origin, z, scaled
    )
    heaviest, rest, shares = 1.0, 0.0, 0.0
    if weights is not None:
        heaviest = 0.0
        for i in range(n):
            if scaled[i] > 0.0:
                heaviest = max(heaviest, np.float64(weights[i]))
        heaviest = np.float64(weights[held]) if held >= 0 else heaviest
        heaviest = heaviest if heaviest != 0.0 else 1.0
    for i in range(n):
        gain = gain_at(z[i], scaled[i], nearest, weights)
        found = 0.0
        if gain != 0.0 and i != held and x[i] > -math.inf:
            y = dx[i] if x[i] < math.inf else 0.0
            found = gain * (y - clipped_odds(np.float64(x[i]), origin, tau, bound.farthest) * dtau - mean[0] - mean[1])
        share = 1.0
        if weights is not None:
            share = weights[i] / heaviest if scaled[i] > 0.0 else 0.0
        rest += share * found if found != 0.0 else 0.0
        shares += share * scaled[i] if scaled[i] != 0.0 else 0.0
        z[i] = found  # z is not read again
    shares = shares if shares != 0.0 else 1.0
    for i in range(n):
        part = (1.0 if i == held else 0.0) if held >= 0 else scaled[i] / shares
        moved[i] = (z[i] - rest * part) / tau + scaled[i] * rate * dh
    return doffset, mean[0] + mean[1] - (mean[2] - offset) * dtau - mean[3]


# --- the threshold


@compiled(FAST)
def scale(values, factor):
    for i in range(values.shape[0]):
        values[i] *= factor


@compiled(EXACT)
def pull_threshold_row(x, weights, b, c, k, tau, reference, offset, bound, plain, of_tau, xbar, abar):
    """Cotangents of scores and weights, from those of the threshold and the offset; returns those of k and tau."""
    number = x.dtype.type
    n = x.shape[0]
    if plain and not of_tau and abar.shape[0] == 0 and weights is None:
        inverse = number(1.0 / tau)
        total, _, ordinary, _ = gains_of(x, weights, x, False, number(reference), inverse, number(offset), xbar)
        if ordinary:
            scale(xbar, number((b + c / tau) / total))
            return -(tau * b + c) / total, 0.0
    z, scaled = np.empty(n), np.empty(n)
    nearest, normal, _ = linearize(x, weights, k, tau, reference, offset, bound, z, scaled)
    rate = rate_of(normal, bound.farthest)
    hbar = -over_slope(1.0, nearest, rate, bound) * c - over_slope(tau, nearest, rate, bound) * b
    origin = origin_of(x, weights, scaled, bound)
    level = clipped_odds(origin, reference, tau, bound.farthest)
    taubar = -level * c / tau - (level - offset) * b
    for i in range(n):
        weighted = scaled[i] if weights is None else weighted_value(weights[i], scaled[i], bound)
        found = 0.0
        if weighted != 0.0 and x[i] < math.inf:
            found = weighted / normal * (c / tau) + weighted / normal * b
            taubar -= clipped_odds(np.float64(x[i]), origin, tau, bound.farthest) * found
        xbar[i] = found
    if abar.shape[0] > 0:
        for i in range(n):
            if z[i] > 0.0:
                abar[i] = -sigmoid(z[i]) * hbar
            else:
                abar[i] = scaled[i] * (1.0 + math.exp(-math.fabs(z[i]))) * rate * (c + tau * b)
    return hbar, taubar
