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
quantity that is truly unbounded; it is held at the square root of the largest float, so that 0 times it is 0.

z - s is held to eps |z| only, and so is p, which is not enough in a wide gap for the derivative in tau, where <p, z> is
the difference of two large numbers. But the mass is known to be k, so the tails of the rounded z say how much s is off:
(L - U - delta) / V, in units of exp(-d). p is corrected by it, with the sign of z, which balances its two sides.

**Either direction is accurate as the other's transpose.** A framework may transpose these operations: JAX makes its
reverse mode of `push`, and a framework that differentiates `pull` in the cotangents makes a forward mode of it. An item
j with nearly all of p has a derivative that is minus the sum of the others', and is lost in rounding as a difference of
its own terms. So it is chosen out and not subtracted, in both directions: w - w_j and u - a u_j / a_j are zero there by
a choice, of which the transpose sums up the others; and its tangent is -sum_{i != j} a_i dm_i / a_j.
"""

from __future__ import annotations

import math
from typing import Any

from ._solver import exponential, least, limits, logits, nonzero, selectable, weigh
from .backend import Array, Backend


class Linearisation:
    """The derivative at one point. Sums run along the last axis and keep it.

    Parameters
    ----------
    backend : Backend
        The framework of the arrays.
    inputs : tuple of array or None
        Scores (..., n), mass, temperature, item weights (..., n) and where (..., n).
    reference, offset : array
        The solution, as `softk._solver.solve` returns it.
    balanced : bool
        Whether p is corrected by the slip, which only the derivative in the temperature can see.
    """

    def __init__(
        self, backend: Backend, inputs: tuple[Any, ...], reference: Array, offset: Array, *, balanced: bool = True
    ) -> None:
        self.backend, self.xp, self.over = backend, backend.xp, backend.overwriting
        xp, over = self.xp, self.over
        self.x, self.k, self.tau, self.weights, self.where = inputs
        self.reference, self.offset = reference, offset
        bound = limits(xp, self.x.dtype)
        distance = self.z()
        upper = distance > 0.0 if balanced else None
        distance = over.abs(distance)
        weighty = distance if self.weights is None else xp.where(self.weights == 0.0, math.inf, distance)
        nearest = xp.min(weighty, axis=-1, keepdims=True)
        del weighty
        # A score at the farthest distance has no part in the derivative, though it be the nearest.
        nearest = xp.minimum(nearest, 0.5 * bound.farthest)
        self.height = height = xp.exp(-nearest)
        # Everything in units of exp(-nearest); only an item without weight can come closer. What is nothing beside 1 is
        # exactly 0.
        distance = over.subtract(distance, nearest)
        if self.weights is not None:
            distance = over.maximum(distance, -math.log(bound.farthest))
        distance = over.negative(distance)
        some = backend.indicator(distance, math.log(least(xp, self.x.dtype)))
        decay = over.multiply(exponential(xp, distance, over), some)
        del distance, some
        # v' = v exp(nearest), which is the tail times the mask or its complement, whichever is large
        total = over.add(height * decay, 1.0)
        self.scaled = over.divide(decay, total)
        del decay
        if upper is not None:
            slip = backend.constant(self.slip(nearest, upper, self.scaled))
            balance = xp.where(upper, xp.exp(slip), xp.exp(-slip))
            self.scaled = over.multiply(self.scaled, balance)
            del upper, balance
        self.scaled = over.divide(self.scaled, total)
        del total
        self.normal = self.total(self.weigh(self.scaled))  # V' = V exp(nearest)
        self.normal = nonzero(xp, self.normal)
        self.nearest = nearest

    def slip(self, nearest: Array, upper: Array, tail: Array) -> Array:
        """What the offset is off by. Zero where no offset supplies k: where nothing or everything is selected."""
        xp = self.xp
        if self.weights is None:
            above = xp.astype(xp.count_nonzero(upper, axis=-1, keepdims=True), tail.dtype)
        else:
            above = self.total(xp.where(upper, self.weights, 0.0))
            tail = self.weigh(tail)
        delta = self.k - above
        delta = xp.where(xp.abs(delta) <= 4.0 * limits(xp, tail.dtype).eps * self.k, 0.0, delta * xp.exp(nearest))
        lower = self.total(xp.where(upper, 0.0, tail))
        upper = self.total(xp.where(upper, tail, 0.0))
        slip = (lower - upper - delta) / nonzero(xp, lower + upper)
        return xp.where(xp.abs(slip) < 0.5, slip, 0.0)

    def z(self) -> Array:
        """Log-odds of the mask. Computed where it is asked for: it is cheaper than to hold on to it."""
        return logits(self.backend, selectable(self.xp, self.x, self.where), self.reference, self.tau, self.offset)

    def gain(self) -> Array:
        """v, the derivative of the mask in z. Without weights v' is never held back, and v is in proportion to it."""
        if self.weights is None:
            return self.height * self.scaled
        over = self.over
        tail = over.exp(over.negative(over.abs(self.z())))
        tail = over.divide(tail, 1.0 + tail)
        return over.multiply(1.0 - tail, tail)

    def rate(self) -> Array:
        """1 / V'."""
        return self.xp.minimum(1.0 / self.normal, limits(self.xp, self.x.dtype).farthest)

    def inverse(self) -> Array:
        """1 / V."""
        xp, farthest = self.xp, limits(self.xp, self.x.dtype).farthest
        return xp.minimum(xp.exp(xp.minimum(self.nearest, math.log(farthest))) * self.rate(), farthest)

    def lift(self) -> Array:
        """v / V, the derivative of the mask in k."""
        return self.scaled * self.rate()

    def dominating(self) -> tuple[Array, Array]:
        """1 for the item that has more than three quarters of p, else 0; and whether there is such an item."""
        most = self.backend.indicator(self.weigh(self.scaled), 0.75 * self.normal)
        return most, self.total(most) > 0.0

    def spread(self, u: Array, g: Array) -> Array:
        """v u + p (g - <v, u>), where J^T a = 0.

        From u less a multiple of the weights: that which is zero at the item that dominates p, where there is one, for
        u less its mean is lost in rounding there; elsewhere its mean.
        """
        xp, over, dot = self.xp, self.over, self.backend.dot
        most, held = self.dominating()
        u = self.kept(u)
        if self.weights is None:
            u = self.others(most, u - xp.where(held, dot(most, u), dot(self.scaled, u) / self.normal))
            del most
            g = g - self.height * dot(self.scaled, u)
            return over.multiply(over.add(over.multiply(u, self.height), g / self.normal), self.scaled)
        share = self.relative(most, held)
        level = xp.where(held, dot(most, u), dot(self.scaled, u) / nonzero(xp, dot(self.scaled, share)))
        share = share * level
        u = self.others(most, u - share)
        del most, share
        found = over.multiply(u, self.gain())
        return over.add(found, self.shares(g - self.total(found)))

    def others(self, most: Array, values: Array) -> Array:
        """Zero at the item that dominates p, where the values are zero: a choice, if they are differentiated."""
        return self.xp.where(most > 0.0, 0.0, values) if self.over is self.xp else values

    def relative(self, most: Array, held: Array) -> Array:
        """The weights, which may be of any size, in units of that of the item that dominates p, or of the largest."""
        xp = self.xp
        share = xp.where(self.scaled > 0.0, self.weights, 0.0)
        unit = xp.where(held, self.backend.dot(most, share), xp.max(share, axis=-1, keepdims=True))
        return self.over.divide(share, nonzero(xp, unit))

    def response(self, w: Array, most: Array, held: Array) -> Array:
        """v w, for a w of the mean 0 by p. Its sum with the weights is zero, which says what it is where p dominates."""
        xp, dot = self.xp, self.backend.dot
        moved = xp.where(most > 0.0, 0.0, self.gain() * w)
        if self.weights is None:
            return moved - self.total(moved) * xp.where(held, most, self.scaled / self.normal)
        share = self.relative(most, held)
        rest = dot(share, moved)
        return moved - rest * xp.where(held, most, self.scaled / nonzero(xp, dot(self.scaled, share)))

    def still(self, values: Array) -> Array:
        """Zero for the scores that do not move: +inf, and those that are removed."""
        moves = ~(self.x > limits(self.xp, self.x.dtype).largest)
        return self.xp.where(moves if self.where is None else moves & self.where, values, 0.0)

    def kept(self, values: Array) -> Array:
        """Zero for the items that are removed, whatever stands there."""
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
        xp = self.xp
        zero = xp.zeros_like(self.offset)
        w = xp.zeros_like(self.x) if dx is None else self.still(dx) / self.tau
        if dtau is not None:
            w = w - self.z() * (dtau / self.tau)
        dh = zero if dk is None else dk + zero
        if da is not None:
            dh = dh - self.total(self.mask() * self.kept(da))
        # J 1 = 0: w is measured from the item that dominates p, where it would be lost in rounding beside its mean, and
        # is zero there whatever a compiler makes of a product and a difference.
        share = self.weigh(self.scaled)
        most, held = self.dominating()
        origin = xp.where(held, self.backend.dot(most, w), self.backend.dot(share, w) / self.normal)
        w = xp.where(most > 0.0, 0.0, w - origin)
        shifted = self.backend.dot(share, w) / self.normal
        del share
        mean = shifted + origin
        found = self.inverse() * dh
        ds = mean - found
        if dtau is not None:
            ds = ds - self.offset * (dtau / self.tau)
        moved = self.response(w - shifted, most, held)
        if dk is not None or da is not None:
            moved = moved + self.lift() * dh
        return moved, ds, self.tau * (mean - found)

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
        g = xp.zeros_like(self.offset)
        if c is not None:
            g = g + c
        if b is not None:
            g = g + self.tau * b
        hbar = None
        if of_k or of_a:
            hbar = -self.inverse() * g
            if u is not None:
                hbar = hbar + self.total(self.lift() * self.kept(u))
        xbar = taubar = None
        if of_x or of_tau:
            xbar = self.shares(g / self.tau) if u is None else self.over.divide(self.spread(u, g), self.tau)
            del self.scaled  # an array of the scores' size, of which the rest needs some
            # +inf does not move; for the other scores that do not, v' is 0.
            xbar = self.over.multiply(xbar, self.backend.indicator(-self.x, -math.inf))
        if of_tau:
            taubar = -self.total(self.z() * xbar)
            if c is not None:
                taubar = taubar - c * self.offset / self.tau
        return xbar, hbar, taubar, -self.mask() * hbar if of_a else None


class LogLinearisation(Linearisation):
    """The derivative of the logarithm of the mask, log m = min(z, 0) - log1p(exp(-|z|)): with 1 - m in the place of v.

    What is never selected has the logarithm -inf and no derivative.
    """

    def gain(self) -> Array:
        z = self.z()
        never = (z <= -0.5 * limits(self.xp, z.dtype).farthest) | (self.k <= 0.0)
        return self.xp.where(never, 0.0, self.backend.sigmoid(-z))

    def response(self, w: Array, most: Array, held: Array) -> Array:
        return self.gain() * w

    def lift(self) -> Array:
        """(1 - m) / V, of which v' / V' is the part that has no bound only below the threshold."""
        z = self.z()
        above = self.scaled * (1.0 + self.xp.exp(-self.xp.abs(z))) * self.rate()
        return self.xp.where(z > 0.0, above, self.gain() * self.inverse())

    def spread(self, u: Array, g: Array) -> Array:
        """(1 - m) u + p (g - <1 - m, u>), likewise."""
        direct = self.gain()
        direct = self.xp.where(direct == 0.0, 0.0, u) * direct
        most, held = self.dominating()
        share = self.shares(self.xp.ones_like(self.offset))
        share = share / self.xp.where(held, self.backend.dot(most, share), 1.0)
        found = direct - share * self.xp.where(held, self.backend.dot(most, direct), self.total(direct))
        found = self.others(most, found)
        return self.shares(g - self.total(found)) + found
