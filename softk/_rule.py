r"""The derivative of the soft top-k, once, for every operator and every framework.

With z = (x - r) / tau - s and the mask m = sigmoid(z), differentiate sum_i a_i m_i = k (DESIGN: implicit function
theorem; Xie et al., NeurIPS 2020, section 3.2, reduced to its one unknown). Write v = m (1 - m), V = sum_i a_i v_i,
p = a v / V, w = (dx - z dtau) / tau and dh = dk - <m, da>, the mass that the threshold has to find. Then

    dm = v (w - <p, w>) + (v / V) dh
    ds = <p, w> - s dtau / tau - dh / V          (r is a constant)
    dt = tau (<p, w> - dh / V)                   t = r + tau s

and, for cotangents u of m, c of s and b of t, with g = c + tau b,

    wbar = v u + p (g - <v, u>),   xbar = wbar / tau,   taubar = -<z, xbar> - c s / tau,
    hbar = <v, u> / V - g / V,     kbar = hbar,         abar = -m hbar.

v underflows far from the threshold, but v / V and p do not: with the peak d = max (-|z|) over the items that have
weight, v = exp(d) v' and V = exp(d) V', and both are quotients of primed quantities. 1 / V = exp(-d) / V' is the one
quantity that is truly unbounded; it is held at the square root of the largest float, so that 0 times it is 0.

z - s is held to eps |z| only, and so is p, which is not enough in a wide gap, where <p, z> is the difference of two
large numbers. But the mass is known to be k, so the tails of the rounded z say how much s is off: (L - U - delta) / V,
in units of exp(d). p is corrected by it, with the sign of z, which balances its two sides.
"""

from __future__ import annotations

import math
from typing import Any

from ._solver import limits, logits, nonzero, selectable, weigh
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
    """

    def __init__(self, backend: Backend, inputs: tuple[Any, ...], reference: Array, offset: Array) -> None:
        self.xp = xp = backend.xp
        self.x, k, self.tau, self.weights, self.where = inputs
        self.reference, self.offset = reference, offset
        bound = limits(xp, self.x.dtype)
        near = self.z()
        upper = near > 0.0
        near = -xp.abs(near)
        far = near <= -bound.farthest  # an infinite score has no part in the derivative
        apart = far if self.weights is None else far | (self.weights == 0.0)
        peak = xp.max(xp.where(apart, -math.inf, near), axis=-1, keepdims=True)
        peak = xp.maximum(peak, -bound.farthest)
        ceiling = math.log(bound.farthest)
        self.height = height = xp.exp(peak)
        # Everything in units of exp(peak); only an item without weight can come closer than the peak.
        decay = near - peak if self.weights is None else xp.minimum(near - peak, ceiling)
        del near, apart
        decay = xp.where(far, 0.0, xp.exp(decay))
        del far
        tail = decay / (1.0 + height * decay)
        del decay
        slip = backend.constant(self.slip(k, peak, upper, tail))
        # v' = v exp(-peak), which is the tail times the mask or its complement, whichever is large
        self.scaled = (1.0 - height * tail) * tail
        del tail
        self.scaled = xp.where(upper, xp.exp(slip), xp.exp(-slip)) * self.scaled
        del upper
        self.normal = self.total(self.weigh(self.scaled))  # V' = V exp(-peak)
        self.normal = xp.where(self.normal == 0.0, 1.0, self.normal)
        self.rate = xp.minimum(1.0 / self.normal, bound.farthest)
        self.inverse = xp.minimum(xp.exp(xp.minimum(-peak, ceiling)) * self.rate, bound.farthest)  # 1 / V

    def slip(self, k: Array, peak: Array, upper: Array, tail: Array) -> Array:
        """What the offset is off by. Zero where no offset supplies k: where nothing or everything is selected."""
        xp = self.xp
        if self.weights is None:
            above = xp.astype(xp.count_nonzero(upper, axis=-1, keepdims=True), tail.dtype)
        else:
            above = self.total(xp.where(upper, self.weights, 0.0))
            tail = self.weigh(tail)
        delta = k - above
        delta = xp.where(xp.abs(delta) <= 4.0 * limits(xp, tail.dtype).eps * k, 0.0, delta * xp.exp(-peak))
        lower = self.total(xp.where(upper, 0.0, tail))
        upper = self.total(xp.where(upper, tail, 0.0))
        slip = (lower - upper - delta) / nonzero(xp, lower + upper)
        return xp.where(xp.abs(slip) < 0.5, slip, 0.0)

    def z(self) -> Array:
        """Log-odds of the mask. Computed where it is asked for: it is cheaper than to hold on to it."""
        return logits(self.xp, selectable(self.xp, self.x, self.where), self.reference, self.tau) - self.offset

    def spread(self) -> Array:
        """v. Without weights v' is never held back, and v is in proportion to it."""
        if self.weights is None:
            return self.height * self.scaled
        decay = self.xp.exp(-self.xp.abs(self.z()))
        tail = decay / (1.0 + decay)
        del decay
        return (1.0 - tail) * tail

    def at_peak(self, values: Array) -> Array:
        """The value at the item that has the largest share of p; the mean of several, zero where none has any.

        It is linear in the values, as a rule must be.
        """
        share = self.weigh(self.scaled)
        peak = (share >= self.xp.max(share, axis=-1, keepdims=True)) & (share > 0.0)
        del share
        count = self.xp.astype(self.xp.count_nonzero(peak, axis=-1, keepdims=True), values.dtype)
        return self.total(self.xp.where(peak, values, 0.0)) / nonzero(self.xp, count)

    def still(self, values: Array) -> Array:
        """Zero for the scores that do not move: +inf, and those that are removed."""
        moves = self.x <= limits(self.xp, self.x.dtype).largest
        return self.xp.where(moves if self.where is None else moves & self.where, values, 0.0)

    def weigh(self, values: Array) -> Array:
        return values if self.weights is None else weigh(self.xp, self.weights, values)

    def shares(self, factor: Array) -> Array:
        """p times a number a slice. The inverse of the sum of tiny weights is not a number that exists."""
        if self.weights is None:
            return self.scaled * (factor / self.normal)
        return self.weigh(self.scaled) / self.normal * factor

    def total(self, values: Array) -> Array:
        return self.xp.sum(values, axis=-1, keepdims=True)

    def mask(self) -> Array:
        return sigmoid(self.xp, self.z())

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
            dh = dh - self.total(self.mask() * da)
        # J 1 = 0: measured from the item that dominates p, w - <p, w> does not cancel where p is nearly 1.
        origin = self.at_peak(w)
        w = w - origin
        shifted = self.total(self.weigh(self.scaled) * w) / self.normal
        mean = shifted + origin
        found = self.inverse * dh
        ds = mean - found
        if dtau is not None:
            ds = ds - self.offset * (dtau / self.tau)
        return self.spread() * (w - shifted) + self.scaled * (dh * self.rate), ds, self.tau * (mean - found)

    def pull(self, u: Array | None, c: Array | None, b: Array | None) -> tuple[Array, Array, Array, Array | None]:
        """Cotangents of (x, k, tau, a), from those of the mask, the offset and the threshold. None is zero."""
        xp = self.xp
        g = xp.zeros_like(self.offset)
        if c is not None:
            g = g + c
        if b is not None:
            g = g + self.tau * b
        hbar = -self.inverse * g
        if u is None:
            xbar = self.shares(g / self.tau)
        else:
            hbar = hbar + self.total(self.scaled * u) * self.rate
            # J^T a = 0: the same for the transpose.
            origin = self.at_peak(u)
            if self.weights is None:
                xbar = self.spread()
                xbar = (u - origin) * xbar
            else:
                heaviest = nonzero(xp, self.at_peak(self.weights))
                xbar = self.spread()
                xbar = (xp.where(xbar == 0.0, 0.0, self.weights) / heaviest * -origin + u) * xbar
            g = g - self.total(xbar)
            xbar = (self.shares(g) + xbar) / self.tau
        del self.scaled  # an array of the scores' size, of which the rest needs some
        xbar = self.still(xbar)
        taubar = -self.total(self.z() * xbar)
        if c is not None:
            taubar = taubar - c * self.offset / self.tau
        return xbar, hbar, taubar, None if self.weights is None else -self.mask() * hbar


def sigmoid(xp: Any, z: Array) -> Array:
    """1 / (1 + exp(-z)), with relative accuracy in the lower tail and no overflow."""
    upper = z > 0.0
    decay = xp.exp(-xp.abs(z))
    del z
    numerator = xp.where(upper, 1.0, decay)
    decay = 1.0 + decay
    return numerator / decay
