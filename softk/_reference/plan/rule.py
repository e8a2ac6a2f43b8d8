r"""The derivative of the transport plan, written once for every framework and every operator based on a plan.

Differentiate sum_i a_i Q_ij = C_j, with z_ij = (x_i - r_j) / tau_j - s_j, M_i and J as in the docstring of this
package. Write w_ij = dx_i / tau_j - (x_i - r_j) / tau_j^2 dtau_j, the change of z at a constant offset. Then, for
each score, dQ = M dz and

    dz = w - ds,   J ds = sum_i a_i M_i w_i + sum_i da_i Q_i - dC,
    dP_j = P_j (sum_{l >= j} R_l dz_l - sum_{l < j} Q_l dz_l).

M is never formed: (M w)_j = R_j sum_{l <= j} Q_l w_l + Q_j sum_{l > j} R_l w_l. For a cotangent U of the plan, with the
differences D_j = U_j - U_j+1,

    <U, dP> = <D, dQ>,   so   zbar = M D,   J lambda = c - sum_i zbar_i,   wbar = zbar + a M lambda,
    xbar = sum_j wbar_j / tau_j,   taubar_j = -sum_i wbar_ij (x_i - r_j) / tau_j^2,
    abar = sum_j lambda_j Q_j,   Cbar = -lambda

(c the cotangent of s). If one score dominates a boundary, w minus its mean and D + a lambda nearly cancel there. Both
are therefore measured from their value at that score, and set to 0 there by ``where`` instead of a subtraction, as in
the rule of the mask.
"""

from __future__ import annotations

from typing import Any

from softk._reference.threshold.limits import limits, safe_denominator
from softk.backend import Array, Backend

from .system import System, Task, log_odds, plan, running, sides


class PlanLinearization:
    """The derivative at one point. Rows are boundaries (m - 1) or anchors (m), columns are scores.

    Parameters
    ----------
    backend : Backend
        The framework of the arrays.
    task : Task
        The problem.
    reference, offset : array
        Its boundaries, as `newton.newton` returns them.
    """

    def __init__(self, backend: Backend, task: Task, reference: Array, offset: Array) -> None:
        self.xp, self.task = backend.xp, task
        xp = backend.xp
        self.apart = log_odds(backend, task, reference)
        self.share = plan(xp, self.apart - offset)
        self.above, self.below = sides(xp, self.share)
        self.system = System(backend, self.share, self.above, self.below, task.weights)
        # The scores of the largest weight at each boundary. One dominates only if it does not tie.
        weight = task.weights * (self.above * self.below)
        self.peak = (weight >= xp.max(weight, axis=-1, keepdims=True)) & (weight > 0.0)
        self.alone = self.peak & (xp.count_nonzero(self.peak, axis=-1, keepdims=True) == 1)

    def total(self, values: Array) -> Array:
        return self.xp.sum(values, axis=-1, keepdims=True)

    def at_peak(self, values: Array) -> Array:
        """The value at the score of the largest weight a Q R at each boundary; the mean over ties."""
        xp = self.xp
        count = xp.astype(xp.count_nonzero(self.peak, axis=-1, keepdims=True), self.apart.dtype)
        return self.total(xp.where(self.peak, values, 0.0)) / safe_denominator(xp, count)

    def sums(self, w: Array) -> tuple[Array, Array]:
        """sum_{l < j} Q_l w_l and sum_{l >= j} R_l w_l for each score and all anchors j: what M w and dP consist of."""
        return running(self.xp, self.above * w), running(self.xp, self.below * w, reverse=True)

    def across(self, before: Array, behind: Array) -> Array:
        """dQ = M w for each score, from the `sums` of a change w of the log-odds."""
        before = self.below * before[..., 1:, :]
        return self.above * behind[..., 1:, :] + before

    def spread(self, before: Array, behind: Array) -> Array:
        """dP, for all anchors, from the `sums`."""
        return (behind - before) * self.share

    def weighed(self, w: Array, weights: Array | None) -> Array:
        """sum_i a_i M_i w_i, in the unknowns of the system. The weights a are 1 if they are None."""

        def summed(values: Array) -> Array:
            return self.total(values if weights is None else values * weights)

        sums = self.sums(w)
        boundaries = summed(self.across(*sums))
        return self.system.choose(boundaries, summed(self.spread(*sums)[..., :-1, :]))

    def moving(self) -> Array:
        """Whether a tangent moves a score: only finite scores move."""
        most = limits(self.xp, self.apart.dtype).largest
        return self.xp.expand_dims((self.task.x >= -most) & (self.task.x <= most), axis=-2)

    def push(
        self, dx: Array | None, dtau: Array | None, da: Array | None, dmasses: Array | None, scale: Any = 1.0
    ) -> tuple[Array, Array]:
        """Tangents (dP, ds) times a scale, from those of scores and weights (..., 1, n), tau (..., m - 1, 1) and c
        (..., m, 1).
        """
        xp, tau = self.xp, self.task.tau
        w = xp.zeros_like(self.apart)
        # At a small temperature w may overflow before its mean is subtracted, so it is computed in a smaller unit.
        least = xp.min(tau, axis=-2, keepdims=True)
        unit = xp.where(least < 2.0**-40, xp.sqrt(least), 1.0)
        scaled = unit * scale
        if dx is not None:
            w = w + xp.where(self.moving(), dx, 0.0) * (scaled / tau)
        if dtau is not None:
            w = w - self.apart * (dtau * (scaled / tau))
        # Measure w from the dominating score, where it is then exactly 0.
        origin = self.at_peak(w)
        w = xp.where(self.alone, 0.0, w - origin)
        change = self.weighed(w, self.task.weights)
        if da is not None:
            by_weights = self.system.choose(self.total(da * self.above), self.total(da * self.share[..., :-1, :]))
            change = change + scaled * by_weights
        if dmasses is not None:
            change = change - scaled * self.system.choose(running(xp, dmasses)[..., 1:-1, :], dmasses[..., :-1, :])
        ds = self.system.solve(change)
        return self.spread(*self.sums(w - ds)) / unit, (ds + origin) / unit

    def pull(self, u: Array | None, c: Array | None) -> tuple[Array, Array, Array, Array]:
        """Cotangents of the scores (..., n), tau, weights (..., n) and c, from those of the plan and of the offsets."""
        xp, tau, weights = self.xp, self.task.tau, self.task.weights
        difference = xp.zeros_like(self.apart) if u is None else u[..., :-1, :] - u[..., 1:, :]
        # Subtract the multiple of the weights that equals the difference at the dominating score.
        origin = self.at_peak(difference) / safe_denominator(
            xp, self.at_peak(xp.broadcast_to(weights, self.apart.shape))
        )
        difference = xp.where(self.alone, 0.0, difference - weights * origin)
        wanted = -self.weighed(difference, None)
        if c is not None:
            before = xp.concat([xp.zeros_like(c[..., :1, :]), c[..., :-1, :]], axis=-2)
            wanted = wanted + self.system.choose(c, c - before)
        slack = self.system.solve(wanted)
        wbar = self.across(*self.sums(difference + weights * slack))
        del difference
        slack = slack - origin
        # Bounded, because infinite cotangents of different terms would cancel to NaN.
        rate = 1.0 / xp.maximum(tau, 1.0 / limits(xp, tau.dtype).farthest)
        xbar = xp.sum(xp.where(self.moving(), wbar * rate, 0.0), axis=-2)
        taubar = -self.total(self.apart * wbar) / tau
        return xbar, taubar, xp.sum(slack * self.above, axis=-2), -running(xp, slack, reverse=True)
