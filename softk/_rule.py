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
"""

from __future__ import annotations

import math
from typing import Any

from ._solver import limits, logits, nonzero
from .backend import Array


class Linearisation:
    """The derivative at one point. Sums run along the last axis and keep it.

    Parameters
    ----------
    xp : namespace
        Of the arrays.
    x, tau : array
        Scores (..., n) and temperature.
    weights : array or None
        Item weights (..., n).
    reference, offset : array
        The solution, as `softk._solver.solve` returns it.
    """

    def __init__(self, xp: Any, x: Array, tau: Array, weights: Array | None, reference: Array, offset: Array) -> None:
        bound = limits(xp, x.dtype)
        self.xp, self.x, self.tau, self.weights, self.offset = xp, x, tau, weights, offset
        self.reference = reference
        near = -xp.abs(self.z())
        far = near <= -bound.farthest  # an infinite score has no part in the derivative
        apart = far if weights is None else far | (weights == 0.0)
        peak = xp.max(xp.where(apart, -math.inf, near), axis=-1, keepdims=True)
        peak = xp.maximum(peak, -bound.farthest)
        ceiling = math.log(bound.farthest)
        # v' = v exp(-peak); only an item without weight can come closer than the peak.
        growth = near - peak if weights is None else xp.minimum(near - peak, ceiling)
        growth = xp.exp(growth)
        near = xp.exp(near)
        near = 1.0 + near
        growth = growth / near
        growth = growth / near
        del near
        self.scaled = xp.where(far, 0.0, growth)
        del growth, far, apart
        self.height = xp.exp(peak)
        self.normal = self.total(self.weigh(self.scaled))  # V' = V exp(-peak)
        self.normal = xp.where(self.normal == 0.0, 1.0, self.normal)
        self.inverse = xp.exp(xp.minimum(-peak, ceiling)) / self.normal  # 1 / V

    def z(self) -> Array:
        """Log-odds of the mask. Computed where it is asked for: it is cheaper than to hold on to it."""
        return logits(self.xp, self.x, self.reference, self.tau) - self.offset

    def spread(self) -> Array:
        """v. Without weights v' is never held back, and v is in proportion to it."""
        if self.weights is None:
            return self.height * self.scaled
        decay = self.xp.exp(-self.xp.abs(self.z()))
        denominator = 1.0 + decay
        decay = decay / denominator
        return decay / denominator

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
        """Zero for the scores that do not move: +inf."""
        return self.xp.where(self.x > limits(self.xp, self.x.dtype).largest, 0.0, values)

    def weigh(self, values: Array) -> Array:
        return values if self.weights is None else self.weights * values

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
        return self.spread() * (w - shifted) + self.scaled * (dh / self.normal), ds, self.tau * (mean - found)

    def pull(self, u: Array | None, c: Array | None, b: Array | None) -> tuple[Array, Array, Array, Array | None]:
        """Cotangents of (x, k, tau, a) from those of the mask, the offset and the threshold. None is zero."""
        xp = self.xp
        g = xp.zeros_like(self.offset)
        if c is not None:
            g = g + c
        if b is not None:
            g = g + self.tau * b
        hbar = -self.inverse * g
        if u is None:
            xbar = self.weigh(self.scaled) * (g / (self.normal * self.tau))
        else:
            hbar = hbar + self.total(self.scaled * u) / self.normal
            # J^T a = 0: the same for the transpose.
            origin = self.at_peak(u if self.weights is None else u / nonzero(xp, self.weights))
            xbar = self.spread()
            xbar = xbar * (u - self.weigh(origin))
            g = g - self.total(xbar)
            xbar = xbar + self.weigh(self.scaled) * (g / self.normal)
            xbar = xbar / self.tau
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
