r"""The derivative of the soft top-k, once, for every operator and every framework.

With z = (x - r) / tau - s and the mask m = sigmoid(z), differentiate sum_i a_i m_i = k (the implicit function theorem;
Xie et al., NeurIPS 2020, section 3.2, reduced to its one unknown). Write v = m (1 - m), V = sum_i a_i v_i,
p = a v / V, w = (dx - z dtau) / tau and dh = dk - <m, da>, the mass that the threshold has to find. Then

    dm = v (w - <p, w>) + (v / V) dh
    ds = <p, w> - s dtau / tau - dh / V          (r is a constant)
    dt = tau (<p, w> - dh / V)                   t = r + tau s

and, for cotangents u of m, c of s and b of t, with g = c + tau b,

    wbar = v u + p (g - <v, u>),   xbar = wbar / tau,   taubar = -<z, xbar> - c s / tau,
    hbar = <v, u> / V - g / V,     kbar = hbar,         abar = -m hbar.

v underflows far from the threshold, but v / V and p do not: with the distance d = min |z| of the items that have
weight, v = exp(-d) v' and V = exp(-d) V', and both are quotients of primed quantities. 1 / V = exp(d) / V' is the one
quantity that is truly unbounded; it is held at the square root of half the largest float, so that 0 times it is 0.
What is in proportion to it is formed first, and held then: tau / V, and below the threshold m / V = v' / V' / (1 - m).

**The second derivative of the mask in k** is v times 1 / V, which is no larger than 1 where 1 / V is held: far from the
threshold v' has the derivative v' above it and -v' below it. What the held offset lacks of that is added, as a
derivative of zero: k less its own value. That is right for second derivatives, and not for third ones.

**Units.** The threshold's derivative in the scores has none: neither tau nor 1 / tau is multiplied in and out again. A
tangent is divided by tau when its mean is subtracted, for before that it may be no number.

**The temperature.** The sum of xbar is 0 but for g, and w is measured from its mean. So z may be measured from any
score: (x - x_ref) / tau, where x_ref has the most of p. Far from the threshold, and where the scores that have p nearly
tie, the differences of z itself are lost in its rounding.

z is held to eps |z| only, and so is a p that is read off it. In a gap that is not enough: not for the derivatives in k,
the weights and the temperature, nor for those of the threshold and of the log mask, which are all in proportion to p.
But the distance of a score from the nearest one on its side of the threshold is known to a rounding of its own, which
determines p but for one number: how much of it lies on either side. That number follows from the mass. With the tails
A = exp(-h) U and B = exp(-l) L of both sides, whose nearest scores are h above and l below the threshold,

    B - A = delta,   A B = U L exp(-2 N),   N = (h + l) / 2,   so   B / A = exp(2 asinh(delta exp(N) / (2 sqrt(U L)))).

delta is exact without weights. With them it is known to a rounding of their sum. What is more than that is a mass
beside one side, which is near, and of which the offset says the distance; the other side may be at any distance. The
width of the gap, 2 N, does not depend on the offset, and matters only if delta is next to nothing. So p is exact to
rounding until |z| is the square root of the largest number, which is the farthest that a derivative sees.

**Either direction is accurate as the other's transpose.** A framework may transpose these operations: JAX makes its
reverse mode of `push`, and a framework that differentiates `pull` in the cotangents makes a forward mode of it. An item
j with nearly all of p has a derivative that is minus the sum of the others', and is lost in rounding as a difference of
its own terms. So it is chosen out and not subtracted, in both directions: w - w_j and u - a u_j / a_j are zero there by
a choice, of which the transpose sums up the others; and its tangent is -sum_{i != j} a_i dm_i / a_j.
"""

from __future__ import annotations

import math
from typing import Any

from softk.backend import Array, Backend

from .formulas import formulas_of
from .limits import ROUNDINGS, clip, exponential, limits, negligible, safe_denominator
from .problem import logits, selectable, weigh


class Linearisation:
    """The derivative at one point. Sums run along the last axis and keep it.

    Parameters
    ----------
    backend : Backend
        The framework of the arrays.
    inputs : tuple of array or None
        Scores (..., n), mass, temperature, item weights (..., n) and where (..., n).
    reference, offset : array
        The solution, as `solve.solve` returns it.
    balanced : bool
        Whether p must be exact in a gap too, where the mask has no derivative in the scores that is a number.
    """

    def __init__(
        self, backend: Backend, inputs: tuple[Any, ...], reference: Array, offset: Array, *, balanced: bool = True
    ) -> None:
        self.backend, self.xp, self.over = backend, backend.xp, backend.overwriting
        xp, over = self.xp, self.over
        self.x, self.k, self.tau, self.weights, self.where = inputs
        self.reference, self.offset = reference, offset
        distance, height = self.from_sides() if balanced else self.from_nearest()
        # What is negligible beside 1 is set to 0.
        distance = over.negative(distance)
        some = backend.indicator(distance, math.log(negligible(xp, self.x.dtype)))
        decay = over.multiply(exponential(xp, distance, over), some)
        del distance, some
        # v' = v exp(nearest), which is the tail times the mask or its complement, whichever is large
        total = height * decay
        del height
        total = over.add(total, 1.0)
        self.scaled = over.divide(decay, total)
        del decay
        if balanced:
            self.scaled = over.multiply(self.scaled, self.balance(self.scaled))
            del self.upper
        self.scaled = over.divide(self.scaled, total)
        del total
        self.height = xp.exp(-self.nearest)
        self.normal = self.total(self.weigh(self.scaled))  # V' = V exp(nearest)
        self.normal = safe_denominator(xp, self.normal)

    def from_nearest(self) -> tuple[Array, Array]:
        """|z| less that of the nearest item with weight, and exp(-|z|) of that one."""
        xp, over = self.xp, self.over
        bound = limits(xp, self.x.dtype)
        distance = over.abs(self.z())
        weighty = distance if self.weights is None else xp.where(self.weights == 0.0, math.inf, distance)
        # A score at the farthest distance has no part in the derivative, though it be the nearest.
        self.nearest = xp.minimum(xp.min(weighty, axis=-1, keepdims=True), 0.5 * bound.farthest)
        del weighty
        distance = over.subtract(distance, self.nearest)
        if self.weights is not None:  # an item without weight can come closer
            distance = over.maximum(distance, -math.log(bound.farthest))
        return distance, xp.exp(-self.nearest)

    def from_sides(self) -> tuple[Array, Array]:
        """|z| less that of the nearest item with weight on the same side, and exp(-|z|) of that one."""
        xp, over, constant = self.xp, self.over, self.backend.constant
        bound = limits(xp, self.x.dtype)
        self.upper = upper = self.z() > 0.0
        x = xp.minimum(selectable(xp, self.x, self.where), bound.largest)
        weightless = None if self.weights is None else self.weights == 0.0
        above = xp.where(upper if weightless is None else upper & ~weightless, x, math.inf)
        below = xp.where(upper if weightless is None else upper | weightless, -math.inf, x)
        high, low = xp.min(above, axis=-1, keepdims=True), xp.max(below, axis=-1, keepdims=True)
        del above, below, x, weightless
        no_high, no_low = high == math.inf, low == -math.inf
        both = constant(clip(xp, xp.concat([high, low], axis=-1), -bound.largest, bound.largest))
        near = xp.abs(logits(self.backend, both, self.reference, self.tau, self.offset))
        near = xp.minimum(near, 0.5 * bound.farthest)
        (high, low), (above, below) = ((values[..., :1], values[..., 1:]) for values in (both, near))
        # Where there is none, weightless items are measured from the nearest on the other side.
        self.above, self.below = xp.where(no_high, below, above), xp.where(no_low, above, below)
        side = xp.where(upper, xp.where(no_high, low, high), xp.where(no_low, high, low))
        distance = logits(self.backend, selectable(xp, self.x, self.where), side, self.tau)
        del side
        # An absolute value has no derivative at the nearest itself.
        distance = xp.where(upper, distance, -distance)
        if self.weights is not None:
            across = xp.where(upper, xp.where(no_high, 2.0 * below, 0.0), xp.where(no_low, 2.0 * above, 0.0))
            distance = over.maximum(over.subtract(distance, across), -math.log(bound.farthest))
            del across
        return distance, xp.where(upper, xp.exp(-self.above), xp.exp(-self.below))

    def balance(self, tail: Array) -> Array:
        """What the tails of either side, each in units of its own, are to be multiplied with."""
        xp, constant, upper = self.xp, self.backend.constant, self.upper
        formulas = formulas_of(self.backend)
        bound = limits(xp, tail.dtype)
        if self.weights is None:
            mass = xp.astype(xp.count_nonzero(upper, axis=-1, keepdims=True), tail.dtype)
        else:
            mass = self.total(xp.where(upper, self.weights, 0.0))
            tail = self.weigh(tail)
        delta = self.k - mass
        high, low = self.total(xp.where(upper, tail, 0.0)), self.total(xp.where(upper, 0.0, tail))
        del tail
        # No offset supplies k where nothing or everything is selected: there one side is empty.
        exact = (high > 0.0) & (low > 0.0)
        if self.weights is not None:  # of which sums are rounded: more than a rounding is in the offset already
            exact = exact & formulas.is_rounding(delta, self.k, ROUNDINGS * bound.eps)
            delta = xp.zeros_like(delta)
        high, low = xp.where(exact, high, 1.0), xp.where(exact, low, 1.0)
        middle = 0.5 * (self.above + self.below)
        log_farthest = math.log(bound.farthest)
        share = formulas.balance(delta, high, low, middle, bound.farthest, log_farthest)
        # In a gap wider than that, what k is off a count is a mass beside one of its sides, of which z is known well.
        # So it is with weights, if k is off by more than a rounding. The other side may be at any distance.
        beside = formulas.is_beside(exact, delta, middle, log_farthest)
        share = constant(xp.where(beside, 0.5 * (self.above - self.below), share))
        nearest = xp.where(beside, xp.minimum(self.above, self.below), middle - xp.abs(share))
        self.nearest = constant(nearest)
        # Constants leave it to these zeros to carry the derivative.
        above, below = constant(self.above) - self.above, constant(self.below) - self.below
        above, below = xp.exp(above - share - xp.abs(share)), xp.exp(below + share - xp.abs(share))
        # A score at the farthest distance has no part in the derivative, though it be the nearest.
        above = xp.where(self.above < 0.5 * bound.farthest, above, 0.0)
        return xp.where(upper, above, xp.where(self.below < 0.5 * bound.farthest, below, 0.0))

    def z(self) -> Array:
        """Log-odds of the mask. Computed where it is asked for: it is cheaper than to hold on to it."""
        return logits(self.backend, selectable(self.xp, self.x, self.where), self.reference, self.tau, self.offset)

    def dmask_dz(self) -> Array:
        """v, the derivative of the mask in z. Without weights v' is never held back, and v is in proportion to it."""
        if self.weights is None:
            return self.height * self.scaled
        over = self.over
        tail = over.exp(over.negative(over.abs(self.z())))
        tail = over.divide(tail, 1.0 + tail)
        return over.multiply(1.0 - tail, tail)

    def beyond(self) -> Array | None:
        """Zero, of which the derivative is exp(-nearest) times what the offset's own is held back of.

        None where nobody differentiates the operations.
        """
        if self.over is not self.xp or type(self.backend).constant is Backend.constant:
            return None
        xp, constant = self.xp, self.backend.constant
        farthest = limits(xp, self.x.dtype).farthest
        dh = self.k - constant(self.k)
        if self.weights is not None:
            upper = constant(self.z()) > 0.0  # below it m / V is not held
            dh = dh - self.total(xp.where(upper, constant(self.mask()) * (self.weights - constant(self.weights)), 0.0))
        rate, nearest = constant(self.rate()), constant(self.nearest)
        held = nearest + xp.log(rate) > math.log(farthest)
        return -dh * xp.where(held, rate - xp.exp(-nearest) * farthest, 0.0)

    def side(self) -> Array:
        """1 above the threshold and -1 below it: far from it v' times that is the derivative of v' in the offset."""
        return self.xp.where(self.z() > 0.0, 1.0, -self.xp.ones_like(self.x))

    def rate(self) -> Array:
        """1 / V'."""
        return formulas_of(self.backend).rate_of(self.normal, limits(self.xp, self.x.dtype).farthest)

    def inverse(self, factor: Array | None = None) -> Array:
        """A factor over V, 1 unless it is given. The quotient is what is held, and neither of the two by itself."""
        xp, farthest = self.xp, limits(self.xp, self.x.dtype).farthest
        scale, most = self.rate(), farthest + xp.zeros_like(self.offset)
        if factor is not None:
            scale, most = factor * scale, most * clip(xp, self.backend.constant(factor), 1.0, farthest)
        held = self.backend.constant(self.nearest + xp.log(scale)) > xp.log(most)
        half = 0.5 * xp.where(held, 0.0, self.nearest)  # whose exponential is a number where that of the whole is none
        half = xp.exp(xp.minimum(half, 1.9 * math.log(farthest)))
        return xp.where(held, most, half * xp.where(held, 1.0, scale) * half)

    def beneath(self) -> Array:
        """m / V below the threshold, where it is v' / V' / (1 - m)."""
        return self.scaled * (1.0 + self.xp.exp(-self.xp.abs(self.z()))) * self.rate()

    def dmask_dk(self) -> Array:
        """v / V, the derivative of the mask in k."""
        return self.scaled * self.rate()

    def raised(self, dh: Array, found: Array) -> Array:
        """The result's tangent by dh; `found` is dh / V."""
        return self.dmask_dk() * dh

    def collected(self, u: Array) -> tuple[Array, Array | None]:
        """The sum of the result's derivatives in dh by u, in two parts, the second times V; None is zero."""
        return self.total(self.dmask_dk() * u), None

    def dominating(self) -> tuple[Array, Array]:
        """1 for the item that has more than three quarters of p, else 0; and whether there is such an item."""
        most = self.backend.indicator(self.weigh(self.scaled), 0.75 * self.normal)
        return most, self.total(most) > 0.0

    def pulled(self, u: Array, g: Array) -> Array:
        """`spread`, with the derivative that the offset is held back of."""
        found, beyond = self.spread(u, g), self.beyond()
        if beyond is None:
            return found
        xp, dot, constant = self.xp, self.backend.dot, self.backend.constant
        u, scaled = self.zero_removed(u), constant(self.scaled)
        share = xp.ones_like(scaled) if self.weights is None else xp.where(scaled > 0.0, constant(self.weights), 0.0)
        share = share / safe_denominator(xp, xp.max(share, axis=-1, keepdims=True))
        u = u - share * (dot(scaled, u) / safe_denominator(xp, dot(scaled, share)))
        turned = scaled * constant(self.side()) * u
        return found + beyond * (turned - constant(self.shares(xp.ones_like(beyond))) * self.total(turned))

    def pushed(self, w: Array, most: Array, held: Array) -> Array:
        """`response`, likewise."""
        found, beyond = self.response(w, most, held), self.beyond()
        if beyond is None:
            return found
        constant = self.backend.constant
        w, p = constant(self.side()) * w, constant(self.shares(self.xp.ones_like(beyond)))
        return found + beyond * constant(self.scaled) * (w - self.backend.dot(p, w))

    def spread(self, u: Array, g: Array) -> Array:
        """v u + p (g - <v, u>), where J^T a = 0.

        From u less a multiple of the weights: that which is zero at the item that dominates p, where there is one, for
        u less its mean is lost in rounding there; elsewhere its mean.
        """
        xp, over, dot = self.xp, self.over, self.backend.dot
        most, held = self.dominating()
        u = self.zero_removed(u)
        if self.weights is None:
            u = self.others(most, u - xp.where(held, dot(most, u), dot(self.scaled, u) / self.normal))
            del most
            g = g - self.height * dot(self.scaled, u)
            return over.multiply(over.add(over.multiply(u, self.height), g / self.normal), self.scaled)
        share = self.relative(most, held)
        level = xp.where(held, dot(most, u), dot(self.scaled, u) / safe_denominator(xp, dot(self.scaled, share)))
        if over is not self.xp:
            most = None  # `others` reads it only where operations are differentiated
        share = share * level
        fresh = over if self.where is not None else self.xp  # without `where` u is the caller's
        u = self.others(most, fresh.subtract(u, share))
        del most, share
        found = over.multiply(u, self.dmask_dz())
        return over.add(found, self.shares(g - self.total(found)))

    def others(self, most: Array | None, values: Array) -> Array:
        """Zero at the item that dominates p, where the values are zero: a choice, if they are differentiated."""
        return values if most is None or self.over is not self.xp else self.xp.where(most > 0.0, 0.0, values)

    def relative(self, most: Array, held: Array) -> Array:
        """The weights, which may be of any size, in units of that of the item that dominates p, or of the largest."""
        xp = self.xp
        share = xp.where(self.scaled > 0.0, self.weights, 0.0)
        unit = xp.where(held, self.backend.dot(most, share), xp.max(share, axis=-1, keepdims=True))
        return self.over.divide(share, safe_denominator(xp, unit))

    def response(self, w: Array, most: Array, held: Array) -> Array:
        """v w, for a w whose mean by p is 0. Its weighted sum is 0, which gives the value where p dominates."""
        xp, dot = self.xp, self.backend.dot
        moved = xp.where(most > 0.0, 0.0, self.dmask_dz() * w)
        if self.weights is None:
            return moved - self.total(moved) * xp.where(held, most, self.scaled / self.normal)
        share = self.relative(most, held)
        rest = dot(share, moved)
        return moved - rest * xp.where(held, most, self.scaled / safe_denominator(xp, dot(self.scaled, share)))

    def zero_fixed(self, values: Array) -> Array:
        """The tangents of the scores, 0 for those that do not move: +inf, and the scores that are removed."""
        moves = ~(self.x > limits(self.xp, self.x.dtype).largest)
        return self.xp.where(moves if self.where is None else moves & self.where, values, 0.0)

    def zero_removed(self, values: Array) -> Array:
        """The values, 0 for the items that are removed, even where they are NaN."""
        return values if self.where is None else self.xp.where(self.where, values, 0.0)

    def weigh(self, values: Array) -> Array:
        return values if self.weights is None else weigh(self.xp, self.weights, values)

    def shares(self, factor: Array) -> Array:
        """p times a number a slice. The inverse of the sum of tiny weights is not a number that exists."""
        if self.weights is None:
            return self.scaled * (factor / self.normal)
        return self.over.divide(self.weigh(self.scaled), self.normal) * factor

    def total(self, values: Array) -> Array:
        return self.xp.sum(values, axis=-1, keepdims=True)

    def mask(self) -> Array:
        return self.backend.sigmoid(self.z())

    def push(
        self, dx: Array | None, dk: Array | None, dtau: Array | None, da: Array | None
    ) -> tuple[Array, Array, Array]:
        """Tangents (dm, ds, dt) of the mask, the offset and the threshold. None is zero."""
        xp, dot = self.xp, self.backend.dot
        # dx - (x - x_ref) dtau / tau, of which a difference less the mean is tau w less the mean.
        y = xp.zeros_like(self.x) if dx is None else self.zero_fixed(dx)
        level = xp.zeros_like(self.offset)  # what that is less than tau w
        if dtau is not None:
            origin = self.origin()
            y = y - self.apart(origin) * dtau
            level = logits(self.backend, origin, self.reference, self.tau)
        # J 1 = 0: y is measured from the item that dominates p, where it would be lost in rounding beside its mean, and
        # is zero there whatever a compiler makes of a product and a difference.
        share = self.weigh(self.scaled)
        most, held = self.dominating()
        at_most = xp.where(held, dot(most, y), dot(share, y) / self.normal)
        y = xp.where(most > 0.0, 0.0, y - at_most)
        shifted = dot(share, y) / self.normal
        del share
        mean = shifted + at_most
        moved = self.pushed(y - shifted, most, held) / self.tau
        ds, dt = mean, mean
        if dtau is not None:
            ds, dt = ds - level * dtau, dt - (level - self.offset) * dtau
        ds = ds / self.tau
        if dk is not None or da is not None:
            dh, by_v, by_slope = self.mass_tangents(dk, da)
            moved, ds, dt = moved + self.raised(dh, by_v), ds - by_v, dt - by_slope
        return moved, ds, dt

    def mass_tangents(self, dk: Array | None, da: Array | None) -> tuple[Array, Array, Array]:
        """dh, dh / V and tau dh / V. Where m is small, so may V be, and only m / V is a number."""
        dh = self.xp.zeros_like(self.offset) if dk is None else dk + self.xp.zeros_like(self.offset)
        if da is None:
            return dh, self.inverse() * dh, self.inverse(self.tau) * dh
        da = self.zero_removed(da)
        upper = self.z() > 0.0
        held = dh - self.total(self.xp.where(upper, self.mask() * da, 0.0))
        below = self.total(self.xp.where(upper, 0.0, self.mask() * da))
        beneath = self.total(self.xp.where(upper, 0.0, self.beneath() * da))
        by_v, by_slope = self.inverse() * held - beneath, self.inverse(self.tau) * held - self.tau * beneath
        return held - below, by_v, by_slope

    def origin(self) -> Array:
        """x_ref: the score that has the most of p, of which the distances are exact that have a say in the mean."""
        xp, largest = self.xp, limits(self.xp, self.x.dtype).largest
        share = self.weigh(self.scaled)
        most = share >= xp.max(share, axis=-1, keepdims=True)
        found = xp.min(xp.where(most, selectable(xp, self.x, self.where), math.inf), axis=-1, keepdims=True)
        return self.backend.constant(clip(xp, found, -largest, largest))

    def apart(self, origin: Array) -> Array:
        """(x - x_ref) / tau."""
        return logits(self.backend, selectable(self.xp, self.x, self.where), origin, self.tau)

    def pull(
        self,
        u: Array | None,
        c: Array | None,
        b: Array | None,
        needed: tuple[bool, ...],
    ) -> tuple[Array | None, Array | None, Array | None, Array | None]:
        """Cotangents of (x, k, tau, a), from those of the mask, the offset and the threshold. None is zero.

        None for those that nobody needs.
        """
        xp = self.xp
        of_x, of_k, of_tau, of_a, *_ = needed
        of_a = of_a and self.weights is not None
        hbar, abar = self.mass_cotangents(u, c, b, of_a) if of_k or of_a else (None, None)
        xbar = taubar = None
        if of_x or of_tau:
            origin = self.origin() if of_tau else None
            if u is not None:
                xbar = self.pulled(u, xp.zeros_like(self.offset) if c is None else c)
            elif c is not None:
                xbar = self.shares(c)
            xbar = None if xbar is None else self.over.divide(xbar, self.tau)
            if b is not None:  # in the units of the scores already
                xbar = self.shares(b) if xbar is None else xbar + self.shares(b)
            if xbar is None:
                xbar = xp.zeros_like(self.x)
            # The rest needs memory of its size. Without this NumPy takes half as long again, for pages from the system.
            del self.scaled
            # +inf does not move; for the other scores that do not, v' is 0.
            xbar = self.over.multiply(xbar, self.backend.indicator(-self.x, -math.inf))
        if of_tau:
            taubar = -self.total(self.apart(origin) * xbar)
            level = logits(self.backend, origin, self.reference, self.tau)
            if c is not None:
                taubar = taubar - level * c / self.tau
            if b is not None:
                taubar = taubar - (level - self.offset) * b
        if of_a and abar is None:
            abar = -self.mask() * hbar
        return xbar, hbar, taubar, abar

    def mass_cotangents(
        self, u: Array | None, c: Array | None, b: Array | None, of_a: bool
    ) -> tuple[Array, Array | None]:
        """Those of the mass and, if asked for, of the weights. Where m is small, so may V be."""
        xp = self.xp
        near, by_v = (xp.zeros_like(self.offset), None) if u is None else self.collected(self.zero_removed(u))
        if by_v is None and c is None and b is None:
            return near, None  # -m times it: formed when there is room for it
        by_v = xp.zeros_like(near) if by_v is None else by_v
        by_v = by_v if c is None else by_v - c
        hbar = near + self.inverse() * by_v
        if b is not None:
            hbar = hbar - self.inverse(self.tau) * b
            by_v = by_v - self.tau * b
        if not of_a:
            return hbar, None
        mask = self.mask()
        below = mask * near + self.beneath() * by_v
        return hbar, -xp.where(self.z() > 0.0, mask * hbar, below)


class LogLinearisation(Linearisation):
    """The derivative of the logarithm of the mask, log m = min(z, 0) - log1p(exp(-|z|)): with 1 - m in the place of v.

    What is never selected has the logarithm -inf and no derivative.
    """

    def dmask_dz(self) -> Array:
        z = self.z()
        never = (z <= -0.5 * limits(self.xp, z.dtype).farthest) | (self.k <= 0.0)
        found = self.backend.sigmoid(-z)
        if self.weights is None:  # rounded as p is, of which `spread` takes it
            found = self.xp.where(z > 0.0, self.height * self.scaled * (1.0 + self.xp.exp(-self.xp.abs(z))), found)
        return self.xp.where(never, 0.0, found)

    def response(self, w: Array, most: Array, held: Array) -> Array:
        return self.dmask_dz() * w

    def beyond(self) -> None:
        """This derivative has no factor v, and is held back where that of the offset is."""

    def raised(self, dh: Array, found: Array) -> Array:
        """(1 - m) / V dh, of which v' / V' is the part that has no bound only below the threshold."""
        return self.xp.where(self.z() > 0.0, self.dmask_dk() * dh, self.dmask_dz() * found)

    def dmask_dk(self) -> Array:
        """(1 - m) / V above the threshold."""
        return self.scaled * (1.0 + self.xp.exp(-self.xp.abs(self.z()))) * self.rate()

    def collected(self, u: Array) -> tuple[Array, Array]:
        upper = self.z() > 0.0
        above = self.xp.where(upper, self.dmask_dk() * u, 0.0)
        return self.total(above), self.total(self.xp.where(upper, 0.0, self.dmask_dz() * u))

    def spread(self, u: Array, g: Array) -> Array:
        """(1 - m) u + p (g - <1 - m, u>), likewise."""
        direct = self.dmask_dz()
        direct = self.xp.where(direct == 0.0, 0.0, u) * direct
        most, held = self.dominating()
        share = self.shares(self.xp.ones_like(self.offset))
        share = share / self.xp.where(held, self.backend.dot(most, share), 1.0)
        found = direct - share * self.xp.where(held, self.backend.dot(most, direct), self.total(direct))
        found = self.others(most, found)
        return self.shares(g - self.total(found)) + found
