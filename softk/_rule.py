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
        self.x, self.k, self.tau, self.weights, self.where = inputs
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
        slip = backend.constant(self.slip(peak, upper, tail))
        # v' = v exp(-peak), which is the tail times the mask or its complement, whichever is large
        self.scaled = (1.0 - height * tail) * tail
        del tail
        self.scaled = xp.where(upper, xp.exp(slip), xp.exp(-slip)) * self.scaled
        del upper
        self.normal = self.total(self.weigh(self.scaled))  # V' = V exp(-peak)
        self.normal = xp.where(self.normal == 0.0, 1.0, self.normal)
        self.rate = xp.minimum(1.0 / self.normal, bound.farthest)
        self.inverse = xp.minimum(xp.exp(xp.minimum(-peak, ceiling)) * self.rate, bound.farthest)  # 1 / V

    def slip(self, peak: Array, upper: Array, tail: Array) -> Array:
        """What the offset is off by. Zero where no offset supplies k: where nothing or everything is selected."""
        xp = self.xp
        if self.weights is None:
            above = xp.astype(xp.count_nonzero(upper, axis=-1, keepdims=True), tail.dtype)
        else:
            above = self.total(xp.where(upper, self.weights, 0.0))
            tail = self.weigh(tail)
        delta = self.k - above
        delta = xp.where(xp.abs(delta) <= 4.0 * limits(xp, tail.dtype).eps * self.k, 0.0, delta * xp.exp(-peak))
        lower = self.total(xp.where(upper, 0.0, tail))
        upper = self.total(xp.where(upper, tail, 0.0))
        slip = (lower - upper - delta) / nonzero(xp, lower + upper)
        return xp.where(xp.abs(slip) < 0.5, slip, 0.0)

    def z(self) -> Array:
        """Log-odds of the mask. Computed where it is asked for: it is cheaper than to hold on to it."""
        return logits(self.xp, selectable(self.xp, self.x, self.where), self.reference, self.tau) - self.offset

    def gain(self) -> Array:
        """v, the derivative of the mask in z. Without weights v' is never held back, and v is in proportion to it."""
        if self.weights is None:
            return self.height * self.scaled
        decay = self.xp.exp(-self.xp.abs(self.z()))
        tail = decay / (1.0 + decay)
        del decay
        return (1.0 - tail) * tail

    def lift(self) -> Array:
        """v / V, the derivative of the mask in k."""
        return self.scaled * self.rate

    def centred(self, u: Array) -> Array:
        """v u, less a multiple of a v, which is zero at the item that dominates p: J^T a = 0."""
        origin = self.at_peak(u)
        if self.weights is None:
            u = self.kept(u) - origin
            return u * self.gain()
        xp, heaviest = self.xp, nonzero(self.xp, self.at_peak(self.weights))
        gain = self.gain()
        return (xp.where(gain == 0.0, 0.0, self.weights) / heaviest * -origin + self.kept(u)) * gain

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
            dh = dh - self.total(self.mask() * self.kept(da))
        # J 1 = 0: measured from the item that dominates p, w - <p, w> does not cancel where p is nearly 1.
        origin = self.at_peak(w)
        w = w - origin
        shifted = self.total(self.weigh(self.scaled) * w) / self.normal
        mean = shifted + origin
        found = self.inverse * dh
        ds = mean - found
        if dtau is not None:
            ds = ds - self.offset * (dtau / self.tau)
        return self.gain() * (w - shifted) + self.lift() * dh, ds, self.tau * (mean - found)

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
            hbar = hbar + self.total(self.lift() * self.kept(u))
            xbar = self.centred(u)
            g = g - self.total(xbar)
            xbar = (self.shares(g) + xbar) / self.tau
        del self.scaled  # an array of the scores' size, of which the rest needs some
        xbar = self.still(xbar)
        taubar = -self.total(self.z() * xbar)
        if c is not None:
            taubar = taubar - c * self.offset / self.tau
        return xbar, hbar, taubar, None if self.weights is None else -self.mask() * hbar


class LogLinearisation(Linearisation):
    """The derivative of the logarithm of the mask, log m = min(z, 0) - log1p(exp(-|z|)): with 1 - m in the place of v.

    What is never selected has the logarithm -inf and no derivative.
    """

    def gain(self) -> Array:
        z = self.z()
        never = (z <= -0.5 * limits(self.xp, z.dtype).farthest) | (self.k <= 0.0)
        return self.xp.where(never, 0.0, sigmoid(self.xp, -z))

    def lift(self) -> Array:
        """(1 - m) / V, of which v' / V' is the part that has no bound only below the threshold."""
        z = self.z()
        above = self.scaled * (1.0 + self.xp.exp(-self.xp.abs(z))) * self.rate
        return self.xp.where(z > 0.0, above, self.gain() * self.inverse)

    def centred(self, u: Array) -> Array:
        """(1 - m) u, less a multiple of p, which is zero at the item that dominates p."""
        direct = self.gain()
        direct = self.xp.where(direct == 0.0, 0.0, u) * direct
        share = self.shares(self.xp.ones_like(self.offset))
        return direct - share * (self.at_peak(direct) / nonzero(self.xp, self.at_peak(share)))


def sigmoid(xp: Any, z: Array) -> Array:
    """1 / (1 + exp(-z)), with relative accuracy in the lower tail and no overflow."""
    upper = z > 0.0
    decay = xp.exp(-xp.abs(z))
    del z
    numerator = xp.where(upper, 1.0, decay)
    decay = 1.0 + decay
    return numerator / decay
