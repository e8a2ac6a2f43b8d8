r"""The derivative of the soft top-k, once, for every operator and every framework.

**The formulas.** The mask is m = sigmoid(z) with z = (x - r) / tau - s. The reference r is a constant, and the offset s
solves sum_i a_i m_i = k. The implicit function theorem differentiates that equation (Xie et al., NeurIPS 2020, section
3.2, reduced to its one unknown). Write v = m (1 - m), V = sum_i a_i v_i, p = a v / V, w = (dx - z dtau) / tau and
dh = dk - <m, da>. Here dh is the change of mass that the threshold makes up for. The tangents of the mask, the offset
and the threshold t = r + tau s are

    dm = v (w - <p, w>) + (v / V) dh
    ds = <p, w> - s dtau / tau - dh / V
    dt = tau (<p, w> - dh / V)

For cotangents u of m, c of s and b of t, and with g = c + tau b, the cotangents of the inputs are

    wbar = v u + p (g - <v, u>),   xbar = wbar / tau,   taubar = -<z, xbar> - c s / tau,
    hbar = <v, u> / V - g / V,     kbar = hbar,         abar = -m hbar.

**Underflow.** Far from the threshold v underflows, but v / V and p do not. Let d be the smallest |z| among the items
with weight. Then v = exp(-d) v' and V = exp(-d) V', and the quotients of v and V are those of v' and V'. Only
1 / V = exp(d) / V' has no bound. It is clipped at the square root of half the largest float, so that its product with 0
is 0. A quotient in proportion to 1 / V is formed first and clipped afterwards: tau / V, and below the threshold
m / V = v' / V' / (1 - m).

**The second derivative of the mask in k** contains v times 1 / V, which is at most 1 where 1 / V is clipped. Far from
the threshold the derivative of v' in z is -v' above it and v' below it. The part that the clipped 1 / V lacks is added
as the product of its value with k less k, which is zero and has the missing derivative. Second derivatives are then
right there; third derivatives are not.

**Units.** The derivative of the threshold in the scores has no unit, so tau is never multiplied in and divided out
again. A tangent is divided by tau after its mean was subtracted: before that the quotient may overflow.

**The temperature.** The sum of xbar is 0 if g is 0, and w enters as its difference from the mean. Therefore z may be
measured from any score: (x - x_ref) / tau. The score with the largest p is taken as x_ref. Far from the threshold, and
where the scores with large p nearly tie, rounding would destroy the differences of z itself.

**p in a gap.** z is accurate to eps |z|, and so is a p that is computed from z. In a gap between scores |z| is large,
and that is not accurate enough for the derivatives that are in proportion to p: those in k, the weights and the
temperature, and those of the threshold and the log mask. But the distance between a score and the nearest score on its
side of the threshold is accurate to eps of that distance. These distances determine p on each side up to one number:
the share of either side. That number follows from the mass. Let the nearest scores lie h above and l below the
threshold, and let the tails of both sides be A = exp(-h) U and B = exp(-l) L. Then

    B - A = delta,   A B = U L exp(-2 N),   N = (h + l) / 2,   so   B / A = exp(2 asinh(delta exp(N) / (2 sqrt(U L)))).

Without weights delta is exact. With weights it is the difference of two sums: up to a rounding of these sums it counts
as 0. A larger delta is the mass of items near one side. Then the offset determines the distance from that side
accurately, and the other side may be at any distance. The width of the gap, 2 N, does not depend on the offset, and
matters only if delta is tiny. So p is accurate to rounding up to the largest |z| that a derivative sees, the square
root of half the largest float.

**Both directions are accurate, and so are their transposes.** A framework may transpose these operations: JAX derives
its reverse mode from `push`, and a framework that differentiates `pull` in the cotangents derives a forward mode. If
one item j dominates, with nearly all of p, its derivative is minus the sum of the others' derivatives, and the
difference of its own terms loses all digits. So neither direction forms that difference. w - w_j and u - a u_j / a_j
are set to 0 at j, and the transpose of setting to 0 leaves the item out of a sum. The tangent of the item j is
-sum_{i != j} a_i dm_i / a_j.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from softk.backend import Array, Backend

from .formulas import formulas_of
from .items import Items
from .limits import DOMINANT, ROUNDINGS, clip, limits, safe_denominator
from .problem import dot, logits, sigmoid, total, totals


class Linearization(Items):
    """The derivative of the mask, the offset and the threshold at one point. Nothing changes its state.

    Parameters
    ----------
    backend, inputs, reference, offset
        As for `Items`.
    balanced : bool
        Whether p must be accurate in a gap too. The mask's derivative in the scores does not need it: it is 0 there.
    """

    def __init__(
        self, backend: Backend, inputs: tuple[Any, ...], reference: Array, offset: Array, *, balanced: bool = True
    ) -> None:
        super().__init__(backend, inputs, reference, offset)
        # d and v', where v = exp(-d) v'
        self.distance, self.scaled_slope = self.slope_from_each_side() if balanced else self.slope_from_nearest()
        self.scale = self.xp.exp(-self.distance)
        # V', where V = exp(-d) V'
        self.scaled_sum = safe_denominator(self.xp, self.sum_of_slopes())

    # --- v' and d

    def slope_from_nearest(self) -> tuple[Array, Array]:
        """d and v' = exp(d - |z|) / (1 + exp(-|z|))^2, with z as it is."""
        distance, tail, one_and_tail = self.tails_from_nearest()
        return distance, tail / one_and_tail

    def slope_from_each_side(self) -> tuple[Array, Array]:
        """d and v', with z measured from the nearest item on each side, and the share of each side from the mass."""
        xp = self.xp
        upper = self.log_odds() > 0.0
        above, below, tail, one_and_tail = self.tails_from_each_side(upper, *self.nearest_on_each_side(upper))
        if self.weights is None:
            mass = xp.astype(xp.count_nonzero(upper, axis=-1, keepdims=True), tail.dtype)
        else:
            mass = total(xp, xp.where(upper, self.weights, 0.0))
        weighted = self.weighted(tail)
        high, low = total(xp, xp.where(upper, weighted, 0.0)), total(xp, xp.where(upper, 0.0, weighted))
        distance, factor_above, factor_below = self.side_factors(above, below, mass, high, low)
        return distance, tail * xp.where(upper, factor_above, factor_below) / one_and_tail

    def sum_of_slopes(self) -> Array:
        """V'."""
        return total(self.xp, self.weighted(self.scaled_slope))

    def side_factors(
        self, above: Array, below: Array, mass: Array, high: Array, low: Array
    ) -> tuple[Array, Array, Array]:
        """d, and what the tails above and below are multiplied by, so that their ratio follows from the mass.

        `above` and `below` are the distances |z| of the nearest items. `mass` is the number, or the weight, of the
        items above the threshold. `high` and `low` are the sums of the tails above and below, in units of exp(-|z|) of
        the nearest item of the side.
        """
        xp, constant, formulas = self.xp, self.backend.constant, formulas_of(self.backend)
        bound = limits(xp, self.offset.dtype)
        log_farthest = math.log(bound.farthest)
        delta = self.k - mass
        # Whether the ratio of the tails follows from the mass. Where nothing or everything is selected one side is
        # empty, and no offset gives the mass k.
        exact = (high > 0.0) & (low > 0.0)
        if self.weights is not None:  # delta is a difference of rounded sums: it is exact only where it counts as 0
            exact = exact & formulas.is_rounding(delta, self.k, ROUNDINGS * bound.eps)
            delta = xp.zeros_like(delta)
        high, low = xp.where(exact, high, 1.0), xp.where(exact, low, 1.0)
        half_gap = 0.5 * (above + below)
        share = formulas.balance(delta, high, low, half_gap, log_farthest)
        # Elsewhere |z| of the nearest items gives the ratio: the threshold lies beside one of them, and is accurate for
        # that side. The other side may be at any distance.
        beside = formulas.is_beside(exact, delta, half_gap, log_farthest)
        share = constant(xp.where(beside, 0.5 * (above - below), share))
        nearest = constant(xp.where(beside, xp.minimum(above, below), half_gap - xp.abs(share)))
        # `share` and `nearest` are constants. These terms have the value 0 and carry the derivative of each |z|.
        derivative_above, derivative_below = constant(above) - above, constant(below) - below
        factor_above = xp.exp(derivative_above - share - xp.abs(share))
        factor_below = xp.exp(derivative_below + share - xp.abs(share))
        # An item at the farthest distance has no derivative, even if no other item is nearer.
        factor_above = xp.where(above < 0.5 * bound.farthest, factor_above, 0.0)
        factor_below = xp.where(below < 0.5 * bound.farthest, factor_below, 0.0)
        return nearest, factor_above, factor_below

    # --- what the formulas are made of. Values per item are computed again where they are needed, to save memory.

    def mask(self) -> Array:
        """m."""
        return sigmoid(self.xp, self.log_odds())

    def p_times(self, factor: Array) -> Array:
        """p times a per-slice factor. With weights every item is divided by V': 1 / V' overflows if all are tiny."""
        if self.weights is None:
            return self.scaled_slope * (factor / self.scaled_sum)
        return self.weighted(self.scaled_slope) / self.scaled_sum * factor

    def dmask_dz(self) -> Array:
        """v, the derivative of the mask in z."""
        if self.weights is None:  # v' is not clipped then, and v must be exactly in proportion to p
            return self.scaled_slope * self.scale
        return self.slope()

    def dmask_dk(self) -> Array:
        """v / V, the derivative of the mask in k."""
        return self.scaled_slope * self.inverse_scaled_sum()

    def far_side_over_sum(self) -> Array:
        """m / V below the threshold, which is v' / V' / (1 - m) there, and (1 - m) / V above it."""
        return self.scaled_slope * (1.0 + self.xp.exp(-self.xp.abs(self.log_odds()))) * self.inverse_scaled_sum()

    def inverse_scaled_sum(self) -> Array:
        """1 / V', clipped."""
        return formulas_of(self.backend).rate_of(self.scaled_sum, limits(self.xp, self.x.dtype).farthest)

    def over_sum(self, factor: Array | None = None) -> Array:
        """factor / V, or 1 / V. The quotient is clipped, neither of the two by itself."""
        xp, farthest = self.xp, limits(self.xp, self.x.dtype).farthest
        quotient, most = self.inverse_scaled_sum(), farthest + xp.zeros_like(self.offset)
        if factor is not None:
            quotient, most = factor * quotient, most * clip(xp, self.backend.constant(factor), 1.0, farthest)
        clipped = self.backend.constant(self.distance + xp.log(quotient)) > xp.log(most)
        # exp(d) may overflow where the product does not: it is multiplied in as two factors exp(d / 2).
        half = 0.5 * xp.where(clipped, 0.0, self.distance)
        half = xp.exp(xp.minimum(half, 1.9 * math.log(farthest)))
        return xp.where(clipped, most, half * xp.where(clipped, 1.0, quotient) * half)

    # --- the dominant item, from which w and u are measured

    def dominant_item(self) -> tuple[Array, Array]:
        """Whether an item dominates p, per item; and whether there is such an item, per slice."""
        is_dominant = self.weighted(self.scaled_slope) > DOMINANT * self.scaled_sum
        return is_dominant, self.xp.any(is_dominant, axis=-1, keepdims=True)

    def measured_from_dominant(self, values: Array) -> tuple[Array, Array]:
        """The values less the value of the dominant item, or less their mean by p where there is none; and that level.

        At the dominant item the result is set to 0, not subtracted: rounding and compilers cannot change that.
        """
        xp = self.xp
        is_dominant, exists = self.dominant_item()
        mean = dot(xp, self.weighted(self.scaled_slope), values) / self.scaled_sum
        level = xp.where(exists, total(xp, xp.where(is_dominant, values, 0.0)), mean)
        return xp.where(is_dominant, 0.0, values - level), level

    def relative_weights(self, is_dominant: Array, exists: Array) -> Array:
        """The weights in units of the dominant item's, or of the largest: weights may have any size."""
        weights = self.xp.where(self.scaled_slope > 0.0, self.weights, 0.0)
        return weights / safe_denominator(self.xp, self.unit_of_weights(weights, is_dominant, exists))

    def unit_of_weights(self, weights: Array, is_dominant: Array, exists: Array) -> Array:
        """The weight of the dominant item, or the largest."""
        xp = self.xp
        of_dominant = total(xp, xp.where(is_dominant, weights, 0.0))
        return xp.where(exists, of_dominant, xp.max(weights, axis=-1, keepdims=True))

    def dominant_score(self) -> Array:
        """x_ref, the score with the largest p. Distances from it are accurate for the items that matter in the mean."""
        xp, largest = self.xp, limits(self.xp, self.x.dtype).largest
        p = self.weighted(self.scaled_slope)
        is_largest = p >= xp.max(p, axis=-1, keepdims=True)
        x_ref = xp.min(xp.where(is_largest, self.scores(), math.inf), axis=-1, keepdims=True)
        return self.backend.constant(clip(xp, x_ref, -largest, largest))

    # --- tangents

    def push(
        self, dx: Array | None, dk: Array | None, dtau: Array | None, da: Array | None
    ) -> tuple[Array, Array, Array]:
        """Tangents (dm, ds, dt) of the mask, the offset and the threshold. None is zero."""
        xp = self.xp
        # z is measured from x_ref here, so tau_w is too large by shift * dtau for all items of a slice. That does not
        # change dm, and is subtracted from ds and dt.
        tau_w = xp.zeros_like(self.x) if dx is None else self.zero_where_fixed(dx)
        shift = xp.zeros_like(self.offset)
        if dtau is not None:
            x_ref = self.dominant_score()
            tau_w = tau_w - self.log_odds_from(x_ref) * dtau
            shift = logits(self.backend, x_ref, self.reference, self.tau)
        tau_w, level = self.measured_from_dominant(tau_w)
        mean = dot(xp, self.weighted(self.scaled_slope), tau_w) / self.scaled_sum
        dm = self.jvp_of_mask(tau_w - mean) / self.tau
        ds = dt = mean + level
        if dtau is not None:
            ds, dt = ds - shift * dtau, dt - (shift - self.offset) * dtau
        ds = ds / self.tau
        if dk is not None or da is not None:
            dh, dh_over_sum, tau_dh_over_sum = self.tangents_of_mass(dk, da)
            dm = dm + self.jvp_of_mask_in_mass(dh, dh_over_sum)
            ds, dt = ds - dh_over_sum, dt - tau_dh_over_sum
        return dm, ds, dt

    def tangents_of_mass(self, dk: Array | None, da: Array | None) -> tuple[Array, Array, Array]:
        """dh, dh / V and tau dh / V. Below the threshold V may be as small as m, and only m / V is formed."""
        xp = self.xp
        dh = xp.zeros_like(self.offset) if dk is None else dk + xp.zeros_like(self.offset)
        if da is None:
            return dh, self.over_sum() * dh, self.over_sum(self.tau) * dh
        da = self.zero_where_removed(da)
        upper = self.log_odds() > 0.0
        dh = dh - total(xp, xp.where(upper, self.mask() * da, 0.0))
        below = total(xp, xp.where(upper, 0.0, self.mask() * da))
        below_over_sum = total(xp, xp.where(upper, 0.0, self.far_side_over_sum() * da))
        dh_over_sum = self.over_sum() * dh - below_over_sum
        return dh - below, dh_over_sum, self.over_sum(self.tau) * dh - self.tau * below_over_sum

    def jvp_of_mask(self, w: Array) -> Array:
        """v w for a w whose mean by p is 0."""
        dm = self.jvp_in_scores(w)
        missing = self.missing_rate()
        if missing is None:
            return dm
        xp, constant = self.xp, self.backend.constant
        turned, p = constant(self.sign()) * w, constant(self.p_times(xp.ones_like(missing)))
        return dm + constant(self.scaled_slope) * missing * (turned - dot(xp, p, turned))

    def jvp_in_scores(self, w: Array) -> Array:
        """v w. Its sum by the weights is 0, which gives the value at the dominant item."""
        xp = self.xp
        is_dominant, exists = self.dominant_item()
        dm = xp.where(is_dominant, 0.0, self.dmask_dz() * w)
        at_dominant = xp.astype(is_dominant, dm.dtype)
        if self.weights is None:
            return dm - xp.where(exists, at_dominant, self.scaled_slope / self.scaled_sum) * total(xp, dm)
        weights = self.relative_weights(is_dominant, exists)
        mean_slope = self.scaled_slope / safe_denominator(xp, dot(xp, self.scaled_slope, weights))
        return dm - xp.where(exists, at_dominant, mean_slope) * dot(xp, weights, dm)

    def jvp_of_mask_in_mass(self, dh: Array, dh_over_sum: Array) -> Array:
        """(v / V) dh."""
        return self.dmask_dk() * dh

    # --- cotangents

    def pull(
        self,
        u: Array | None,
        c: Array | None,
        b: Array | None,
        needed: tuple[bool, ...],
    ) -> tuple[Array | None, Array | None, Array | None, Array | None]:
        """Cotangents of (x, k, tau, a), from those of the mask, the offset and the threshold. None is zero.

        A cotangent that is not needed is None.
        """
        of_x, of_k, of_tau, of_a, *_ = needed
        of_a = of_a and self.weights is not None
        xbar = self.cotangent_of_scores(u, c, b) if of_x or of_tau else None
        x_ref = self.dominant_score() if of_tau else None
        # The sums that remain, in one reduction: that of the temperature, and those of the mass.
        terms = [lambda: self.log_odds_from(x_ref) * xbar] if of_tau else []
        if u is not None and (of_k or of_a):
            terms += self.terms_of_mass(self.zero_where_removed(u))
        sums = list(totals(self.backend, *terms)) if terms else []
        taubar = None
        if of_tau:
            taubar = -sums.pop(0)
            shift = logits(self.backend, x_ref, self.reference, self.tau)  # z at x_ref plus the offset
            if c is not None:
                taubar = taubar - shift * c / self.tau
            if b is not None:
                taubar = taubar - (shift - self.offset) * b
        hbar, abar = self.cotangents_of_mass(sums, c, b, of_a) if of_k or of_a else (None, None)
        return xbar if of_x else None, hbar if of_k else None, taubar, abar

    def cotangent_of_scores(self, u: Array | None, c: Array | None, b: Array | None) -> Array:
        """xbar."""
        xp = self.xp
        xbar = None
        if u is not None:
            xbar = self.vjp_of_mask(u, xp.zeros_like(self.offset) if c is None else c) / self.tau
        elif c is not None:
            xbar = self.p_times(c) / self.tau
        if b is not None:  # tau b / tau
            xbar = self.p_times(b) if xbar is None else xbar + self.p_times(b)
        # +inf does not move. v' is 0 for the other scores that do not.
        return xp.zeros_like(self.x) if xbar is None else self.zero_where_fixed(xbar)

    def cotangents_of_mass(
        self, sums: list[Array], c: Array | None, b: Array | None, of_a: bool
    ) -> tuple[Array, Array | None]:
        """hbar and, if asked for, abar, from the sums of `terms_of_mass`. None are zero.

        hbar is the sum of the first and of the second over V. Below the threshold V may be as small as m, and only
        m / V is formed.
        """
        xp = self.xp
        hbar, over_sum = (*sums, None, None)[:2]
        hbar = xp.zeros_like(self.offset) if hbar is None else hbar
        if over_sum is None and c is None and b is None:
            return hbar, -self.mask() * hbar if of_a else None
        direct = hbar
        over_sum = xp.zeros_like(hbar) if over_sum is None else over_sum
        over_sum = over_sum if c is None else over_sum - c
        hbar = direct + self.over_sum() * over_sum
        if b is not None:
            hbar = hbar - self.over_sum(self.tau) * b
            over_sum = over_sum - self.tau * b
        if not of_a:
            return hbar, None
        mask = self.mask()
        below = mask * direct + self.far_side_over_sum() * over_sum
        return hbar, -xp.where(self.log_odds() > 0.0, mask * hbar, below)

    def vjp_of_mask(self, u: Array, g: Array) -> Array:
        """v u + p (g - <v, u>)."""
        wbar = self.vjp_in_scores(u, g)
        missing = self.missing_rate()
        if missing is None:
            return wbar
        xp, constant = self.xp, self.backend.constant
        u, slope = self.zero_where_removed(u), constant(self.scaled_slope)
        weights = xp.ones_like(slope) if self.weights is None else xp.where(slope > 0.0, constant(self.weights), 0.0)
        weights = weights / safe_denominator(xp, xp.max(weights, axis=-1, keepdims=True))
        u = u - weights * (dot(xp, slope, u) / safe_denominator(xp, dot(xp, slope, weights)))
        turned = slope * constant(self.sign()) * u
        return wbar + (turned - constant(self.p_times(xp.ones_like(missing))) * total(xp, turned)) * missing

    def vjp_in_scores(self, u: Array, g: Array) -> Array:
        """v u + p (g - <v, u>). It does not change if a multiple of the weights is subtracted from u.

        That multiple makes u zero at the dominant item, where u less its mean would be lost in rounding. Where no item
        dominates it makes the mean of u zero.
        """
        u = self.less_multiple_of_weights(self.zero_where_removed(u))
        if self.weights is None:
            g = g - self.scale * self.sum_of_rest(self.scaled_slope * u)
            return (u * self.scale + g / self.scaled_sum) * self.scaled_slope
        direct = u * self.dmask_dz()
        return direct + self.p_times(g - self.sum_of_rest(direct))

    def less_multiple_of_weights(self, u: Array) -> Array:
        """u less a multiple of the weights, as `vjp_in_scores` subtracts it."""
        xp = self.xp
        is_dominant, exists = self.dominant_item()
        if self.weights is None:
            return xp.where(is_dominant, 0.0, u - self.level_of(u, None, is_dominant, exists))
        weights = self.relative_weights(is_dominant, exists)
        return xp.where(is_dominant, 0.0, u - weights * self.level_of(u, weights, is_dominant, exists))

    def level_of(self, u: Array, weights: Array | None, is_dominant: Array, exists: Array) -> Array:
        """What the weights are multiplied by: u at the dominant item, or the mean of u."""
        xp, slope = self.xp, self.scaled_slope
        of_weights = self.scaled_sum if weights is None else safe_denominator(xp, dot(xp, slope, weights))
        mean = dot(xp, slope, u) / of_weights
        return xp.where(exists, total(xp, xp.where(is_dominant, u, 0.0)), mean)

    def sum_of_rest(self, values: Array) -> Array:
        """The sum of what remains of v u, without v or in units of exp(-d)."""
        return total(self.xp, values)

    def terms_of_mass(self, u: Array) -> list[Callable[[], Array]]:
        """The terms of <v / V, u> as a sum of two parts: of the first, and of the second times V, if there is one."""
        return [lambda: self.dmask_dk() * u]

    # --- what second derivatives lack where 1 / V is clipped

    def missing_rate(self) -> Array | None:
        """Zero, with exp(-d) times the clipped part of 1 / V as its derivative in -dh. None if not needed."""
        watched = any(value is not None and self.backend.memory(value) is None for value in (self.k, self.weights))
        if not watched or not self.backend.detaches:
            return None
        xp, constant = self.xp, self.backend.constant
        farthest = limits(xp, self.x.dtype).farthest
        dh = self.k - constant(self.k)
        if self.weights is not None:
            upper = constant(self.log_odds()) > 0.0  # below the threshold m / V is not clipped
            dweights = self.weights - constant(self.weights)
            dh = dh - total(xp, xp.where(upper, constant(self.mask()) * dweights, 0.0))
        rate, distance = constant(self.inverse_scaled_sum()), constant(self.distance)
        is_clipped = distance + xp.log(rate) > math.log(farthest)
        return -dh * xp.where(is_clipped, rate - xp.exp(-distance) * farthest, 0.0)

    def sign(self) -> Array:
        """The sign of z. Far from the threshold v' times it is minus the derivative of v' in z."""
        return self.xp.where(self.log_odds() > 0.0, 1.0, -self.xp.ones_like(self.x))


class LogLinearization(Linearization):
    """The derivative of log m = min(z, 0) - log1p(exp(-|z|)): 1 - m takes the place of v.

    Where the mask is 0 for certain, its logarithm is -inf and has no derivative.
    """

    def dmask_dz(self) -> Array:
        """1 - m, the derivative of log m in z."""
        xp, z = self.xp, self.log_odds()
        never = (z <= -0.5 * limits(xp, z.dtype).farthest) | (self.k <= 0.0)
        slope = sigmoid(xp, -z)
        if self.weights is None:  # rounded as p is, which `vjp_in_scores` divides it by
            slope = xp.where(z > 0.0, self.scale * self.scaled_slope * (1.0 + xp.exp(-xp.abs(z))), slope)
        return xp.where(never, 0.0, slope)

    def dmask_dk(self) -> Array:
        """(1 - m) / V above the threshold: the same function of |z| as m / V below it."""
        return self.far_side_over_sum()

    def jvp_in_scores(self, w: Array) -> Array:
        """(1 - m) w."""
        return self.dmask_dz() * w

    def jvp_of_mask_in_mass(self, dh: Array, dh_over_sum: Array) -> Array:
        """(1 - m) / V dh. Below the threshold 1 - m is of the order of 1, and 1 / V may be clipped."""
        return self.xp.where(self.log_odds() > 0.0, self.dmask_dk() * dh, self.dmask_dz() * dh_over_sum)

    def vjp_in_scores(self, u: Array, g: Array) -> Array:
        """(1 - m) u + p (g - <1 - m, u>), measured from the dominant item too."""
        xp = self.xp
        direct = self.dmask_dz()
        direct = xp.where(direct == 0.0, 0.0, u) * direct
        is_dominant, exists = self.dominant_item()
        p = self.p_times(xp.ones_like(self.offset))
        p = p / xp.where(exists, total(xp, xp.where(is_dominant, p, 0.0)), 1.0)
        sum_of_direct = xp.where(exists, total(xp, xp.where(is_dominant, direct, 0.0)), total(xp, direct))
        others = xp.where(is_dominant, 0.0, direct - p * sum_of_direct)
        return others + self.p_times(g - total(xp, others))

    def terms_of_mass(self, u: Array) -> list[Callable[[], Array]]:
        upper = self.log_odds() > 0.0
        return [
            lambda: self.xp.where(upper, self.dmask_dk() * u, 0.0),
            lambda: self.xp.where(upper, 0.0, self.dmask_dz() * u),
        ]

    def missing_rate(self) -> None:
        """This derivative has no factor v, and is clipped where the derivative of the offset is."""
