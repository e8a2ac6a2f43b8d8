"""A transport problem in canonical form, the plan for given boundaries, and the Jacobian of its masses in them."""

from __future__ import annotations

from typing import Any, NamedTuple

from softk._reference.threshold.limits import limits
from softk._reference.threshold.problem import logits
from softk.backend import Array, Backend

from .linear import solve_definite


class Task(NamedTuple):
    """A transport problem in canonical form: one row per boundary or anchor, one column per score."""

    x: Array  # scores (..., n), -inf for those that are removed
    masses: Array  # c (..., m, 1)
    mass: Array  # C (..., m - 1, 1)
    tau: Array  # (..., m - 1, 1)
    weights: Array  # (..., 1, n), 0 for the scores that cannot be selected


class Boundaries(NamedTuple):
    """The thresholds reference + tau * offset between neighboring anchors, shape (..., m - 1, 1)."""

    reference: Array
    offset: Array
    steps: Array  # the number of steps taken, shape (..., 1, 1)


def prepare(xp: Any, x: Array, masses: Array, tau: Array, weights: Array) -> Task:
    """Make the problem in canonical form.

    Parameters
    ----------
    xp : namespace
        The namespace of the arrays.
    x, weights : array
        Scores, -inf for those that are removed, and their weights as `effective_weights` returns them, shape (..., n).
    masses : array
        The masses of the anchors, shape (..., m), from the highest anchor to the lowest. Anchors of mass 0 come last.
    tau : array
        epsilon / 2 over the distance of neighboring anchors, shape (..., m - 1), (..., 1) or ().
    """
    mass = xp.cumulative_sum(masses, axis=-1)[..., :-1]
    tau = xp.broadcast_to(tau, mass.shape)
    return Task(
        x,
        xp.expand_dims(masses, axis=-1),
        xp.expand_dims(mass, axis=-1),
        xp.expand_dims(tau, axis=-1),
        xp.expand_dims(weights, axis=-2),
    )


def log_odds(backend: Backend, task: Task, reference: Array) -> Array:
    """(x - r) / tau, shape (..., m - 1, n)."""
    return logits(backend, backend.xp.expand_dims(task.x, axis=-2), reference, task.tau)


def plan(xp: Any, z: Array) -> Array:
    """The plan P (..., m, n), without the weights.

    Up to a constant per score, log P_ij is the sum of z_il over l >= j. It is measured from where z changes its sign,
    which is where P is large, so that no large numbers are subtracted:
    sum_{l >= j} min(z_l, 0) - sum_{l < j} max(z_l, 0).
    """
    positive = z > 0.0
    behind = running(xp, xp.where(positive, 0.0, z), reverse=True)
    exponent = behind - running(xp, xp.where(positive, z, 0.0))
    share = xp.exp(exponent - xp.max(exponent, axis=-2, keepdims=True))
    return share / xp.sum(share, axis=-2, keepdims=True)


def sides(xp: Any, share: Array) -> tuple[Array, Array]:
    """Q and R (..., m - 1, n): the shares of each score above and below each boundary."""
    return running(xp, share)[..., 1:-1, :], running(xp, share, reverse=True)[..., 1:-1, :]


def running(xp: Any, values: Array, *, reverse: bool = False) -> Array:
    """Cumulative sums over the rows, with one more row than the values.

    Row j is the sum of the rows before j or, with `reverse`, of row j and all rows after it.
    """
    if reverse:
        return xp.flip(running(xp, xp.flip(values, axis=-2)), axis=-2)
    nothing = xp.zeros_like(values[..., :1, :])
    return xp.concat([nothing, xp.cumulative_sum(values, axis=-2)], axis=-2)


class System:
    """The Jacobian J at one plan, in coordinates in which it is well conditioned, and the solution of systems with it.

    If the mass of an anchor is tiny, the two boundaries next to it have nearly the same row of J. The anchor then
    replaces the lower boundary as an unknown, which moves the two boundaries apart. As M = Q_min R_max, the entries are
    still products U_k V_l for k < l of a share above and a share below, with U = Q and V = R for a boundary, and U = P
    and V = -P for an anchor, whose diagonal element is P (1 - P). No entry is a difference. An anchor is an unknown if
    its mass is far below what both its boundaries share, and if it is spread over many scores: sum a P (1 - P) is then
    of the size of the mass.

    Parameters
    ----------
    backend : Backend
        The framework of the arrays.
    share, above, below : array
        P (..., m, n), Q and R (..., m - 1, n).
    weights : array
        Item weights (..., 1, n).
    """

    def __init__(self, backend: Backend, share: Array, above: Array, below: Array, weights: Array) -> None:
        self.backend, xp = backend, backend.xp
        own = share[..., :-1, :]  # the anchor above each boundary
        alone = xp.sum((1.0 - own) * own * weights, axis=-1, keepdims=True)  # sum a P (1 - P)
        taken = xp.sum(weights * own, axis=-1, keepdims=True)  # the mass of the anchor
        edge = xp.sum(weights * (above * below), axis=-1, keepdims=True)  # sum a Q R, what the boundary shares
        # The choice of the unknowns is a constant to every derivative.
        edge_, alone_, taken_ = (backend.constant(value) for value in (edge, alone, taken))
        previous = xp.concat([xp.zeros_like(edge_[..., :1, :]), edge_[..., :-1, :]], axis=-2)
        self.node = (alone_ > 0.5 * taken_) & (taken_ < 0.1 * xp.minimum(edge_, previous))
        second = xp.matrix_transpose(xp.where(self.node, -own, below))
        upper = xp.triu(xp.matmul(weights * xp.where(self.node, own, above), second), k=1)
        del second
        b = upper.shape[-1]
        index = xp.arange(b, device=backend.device(share))
        diagonal = xp.broadcast_to(xp.reshape(index, (b, 1)) == xp.reshape(index, (1, b)), upper.shape)
        diagonal = xp.astype(diagonal, share.dtype) * xp.where(self.node, alone, edge)
        self.matrix = upper + xp.matrix_transpose(upper) + diagonal

    def choose(self, boundary: Array, anchor: Array) -> Array:
        """Choose, for each unknown, between the value of a boundary and the value of the anchor above it."""
        return self.backend.xp.where(self.node, anchor, boundary)

    def solve(self, wanted: Array) -> Array:
        """Solve J d = wanted for a right-hand side from `choose`; d are changes of the boundaries."""
        xp = self.backend.xp
        found = solve_definite(self.backend, self.matrix, wanted)
        anchors = xp.where(self.node, found, 0.0)
        return found - xp.concat([anchors[..., 1:, :], xp.zeros_like(anchors[..., :1, :])], axis=-2)


def excess(xp: Any, above: Array, below: Array, mass: Array, weights: Array) -> Array:
    """The excess sum_i a_i Q_ij - C_j (..., m - 1, 1), without cancellation."""
    # A score counts as above or below the boundary, whichever has its larger share; the smaller shares are the tails.
    upper = above > 0.5
    tails = xp.sum(weights * xp.where(upper, -below, above), axis=-1, keepdims=True)
    delta = xp.sum(xp.where(upper, weights, 0.0), axis=-1, keepdims=True) - mass
    rounding = 4.0 * limits(xp, above.dtype).eps * mass
    return tails + xp.where(xp.abs(delta) <= rounding, 0.0 * delta, delta)
