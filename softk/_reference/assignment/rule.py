r"""The derivative of a balanced assignment, written once for every framework.

Write y_ij = dS_ij / epsilon - (S_ij + r_j) / epsilon^2 depsilon for the change of the exponents at a constant offset,
L for the Laplacian, and F(y)_ij = P_ij (y_ij - sum_l P_il y_il) for the change of the shares. Differentiate the column
sums:

    L ds = dc - sum_i da_i P_i - sum_i a_i F(y)_i,   dplan = da P + a F(y + ds).

For a cotangent U of the plan and sbar of the offset, F is symmetric, so

    L lambda = -sbar - sum_i a_i F(U)_i,   zbar = a F(U + lambda),   Sbar = zbar / epsilon,
    abar_i = sum_j P_ij (U_ij + lambda_j),   cbar = -lambda,   epsilonbar = -sum_ij zbar_ij (S_ij + r_j) / epsilon^2.

The rows of zbar sum to 0, and its columns to -sbar. The sum of epsilonbar is therefore that of the exponents at a flow
of 0, plus sbar times their shift: these are small where zbar is not.

Both directions solve one system: shift y by a number per group such that the columns of a F sum to a target. Near the
hard limit one item dominates the link of two groups, and y plus the shift nearly cancels there. The sum is then exact.
Its remainder is shifted once more, which removes the rounding error of the first shift.

There the changes dc - sum_i da_i P_i of the sums must pass links that L rounds to 0. The plan's change for these, and
the cotangents of the masses and the weights, are those of `network`.
"""

from __future__ import annotations

from softk.backend import Array, Backend

from .network import Network
from .system import Laplacian, Problem, at, column, shares

#: The shifts of the exponents, each of which corrects the one before.
ROUNDS = 3


class AssignmentRule:
    """The derivative at one point.

    Parameters
    ----------
    backend : Backend
        The framework of the arrays.
    problem : Problem
        The problem.
    reference, offset : array
        Its potentials, shape (..., 1, K).
    """

    def __init__(self, backend: Backend, problem: Problem, reference: Array, offset: Array) -> None:
        self.backend, self.xp, self.problem, self.offset = backend, backend.xp, problem, offset
        self.apart, self.share, self.best = self.found = shares(backend, problem, reference, offset)
        self.laplacian = Laplacian(backend, self.share, problem.weights)

    def network(self) -> Network:
        """It costs much more than the Laplacian, so it is only made for derivatives in the masses and the weights."""
        return Network(self.backend, self.problem, self.found, self.offset)

    def flow(self, y: Array) -> Array:
        """F(y), the change of the shares."""
        return self.share * (y - self.xp.sum(self.share * y, axis=-1, keepdims=True))

    def from_best(self, values: Array) -> Array:
        """The values of each item, measured from the one at the group of its largest share."""
        values = self.xp.broadcast_to(values, self.share.shape)
        return values - at(self.xp, values, self.best)

    def settle(self, y: Array, target: Array) -> tuple[Array, Array]:
        """y plus the shift with which the columns of its flow sum to the target, and the shift."""
        y = self.from_best(y)
        shift = 0.0 * target
        for _ in range(ROUNDS):
            lack = target - column(self.xp, self.problem.weights * self.flow(y))
            change = self.laplacian.solve(lack)
            y = y + self.from_best(change)
            shift = shift + change
        return y, shift

    def push(
        self, dscores: Array | None, dmasses: Array | None, depsilon: Array | None, dweights: Array | None
    ) -> tuple[Array, Array]:
        """Tangents of the plan and of the offset."""
        xp, problem = self.xp, self.problem
        # At a small epsilon y may overflow before the shift is added, so it is computed in a smaller unit.
        unit = xp.where(problem.epsilon < 2.0**-40, xp.sqrt(problem.epsilon), 1.0)
        y, none = xp.zeros_like(self.share), xp.zeros_like(problem.masses)
        if dscores is not None:
            y = y + xp.where(problem.allowed, dscores, 0.0) * (unit / problem.epsilon)
        if depsilon is not None:
            y = y - self.apart * (depsilon * (unit / problem.epsilon))
        y, shift = self.settle(y, none)
        dplan, doffset = problem.weights * self.flow(y) / unit, shift / unit
        if dmasses is None and dweights is None:
            return dplan, doffset
        gained = none if dmasses is None else dmasses
        if dweights is not None:
            gained = gained - column(xp, dweights * self.share)
            dplan = dplan + dweights * self.share
        doffset = doffset + self.settle(xp.zeros_like(self.share), unit * gained)[1] / unit
        return dplan + self.network().spread(gained), doffset

    def pull(
        self, u: Array | None, c: Array | None, *, epsilon: bool, sums: bool
    ) -> tuple[Array, Array, Array | None, Array]:
        """Cotangents of the scores, masses (..., 1, K), epsilon (..., 1, 1) if needed, and weights (..., B, 1).

        Those of the masses and the weights are accurate near the hard limit only if `sums` is true.
        """
        xp, problem = self.xp, self.problem
        u = xp.zeros_like(self.share) if u is None else u
        none = xp.zeros_like(problem.masses)
        y, shift = self.settle(u, none if c is None else -c)
        zbar = problem.weights * self.flow(y)
        scoresbar = xp.where(problem.allowed, zbar / problem.epsilon, 0.0)
        if sums:
            shift = -self.network().gather(u)
            if c is not None:
                shift = shift + self.settle(xp.zeros_like(u), -c)[1]
        weightsbar = xp.sum(self.share * (u + shift), axis=-1, keepdims=True)
        epsilonbar = None
        if epsilon:
            y, moved = self.settle(self.apart, none)
            epsilonbar = -xp.sum(y * zbar, axis=(-2, -1), keepdims=True) / problem.epsilon
            if c is not None:
                epsilonbar = epsilonbar - xp.sum(c * moved, axis=-1, keepdims=True) / problem.epsilon
        return scoresbar, -shift, epsilonbar, weightsbar
