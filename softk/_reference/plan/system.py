"""A transport problem in canonical form, the plan of given boundaries, and the Jacobian of the boundaries' masses."""

from __future__ import annotations

from typing import Any, NamedTuple

from softk._reference.threshold.limits import limits
from softk._reference.threshold.problem import logits
from softk.backend import Array, Backend

from .linear import solve_definite


class Task(NamedTuple):
    """A transport problem in canonical form: a row a boundary, a column a score."""

    x: Array  # scores (..., n), -inf for those that are removed
    masses: Array  # c (..., m, 1)
    mass: Array  # C (..., m - 1, 1)
    tau: Array  # (..., m - 1, 1)
    weights: Array  # (..., 1, n), 0 for the scores that cannot be selected


class Boundaries(NamedTuple):
    """The thresholds reference + tau * offset between neighbouring anchors, shape (..., m - 1, 1)."""

    reference: Array
    offset: Array
    steps: Array  # how many were taken, shape (..., 1, 1)


def prepare(xp: Any, x: Array, masses: Array, tau: Array, held: Array) -> Task:
    """The problem in canonical form.

    Parameters
    ----------
    xp : namespace
        Of the arrays.
    x, held : array
        Scores, -inf for those that are removed, and their weights as `effective_weights` returns them, shape (..., n).
    masses : array
        What each anchor takes, from the highest to the lowest anchor, shape (..., m), those that take nothing last.
    tau : array
        epsilon / 2 over the distance of neighbouring anchors, shape (..., m - 1), (..., 1) or ().
    """
    mass = xp.cumulative_sum(masses, axis=-1)[..., :-1]
    tau = xp.broadcast_to(tau, mass.shape)
    return Task(
        x,
        xp.expand_dims(masses, axis=-1),
        xp.expand_dims(mass, axis=-1),
        xp.expand_dims(tau, axis=-1),
        xp.expand_dims(held, axis=-2),
    )


def log_odds(backend: Backend, task: Task, reference: Array) -> Array:
    """(x - r) / tau (..., m - 1, n)."""
    return logits(backend, backend.xp.expand_dims(task.x, axis=-2), reference, task.tau)


def plan(xp: Any, z: Array) -> Array:
    """P (..., m, n).

    log P_ij is, but for a constant, the sum of the z from j on. It is counted from where z changes its sign, which is
    where P is large, so that no large numbers are subtracted: sum_{l >= j} min(z_l, 0) - sum_{l < j} max(z_l, 0).
    """
    positive = z > 0.0
    behind = running(xp, xp.where(positive, 0.0, z), reverse=True)
    exponent = behind - running(xp, xp.where(positive, z, 0.0))
    share = xp.exp(exponent - xp.max(exponent, axis=-2, keepdims=True))
    return share / xp.sum(share, axis=-2, keepdims=True)


def sides(xp: Any, share: Array) -> tuple[Array, Array]:
    """Q and R (..., m - 1, n): the parts above and below each boundary."""
    return running(xp, share)[..., 1:-1, :], running(xp, share, reverse=True)[..., 1:-1, :]


def running(xp: Any, values: Array, *, reverse: bool = False) -> Array:
    """Sums of the rows before each row, or from it on, and of all or none: one row more."""
    if reverse:
        return xp.flip(running(xp, xp.flip(values, axis=-2)), axis=-2)
    nothing = xp.zeros_like(values[..., :1, :])
    return xp.concat([nothing, xp.cumulative_sum(values, axis=-2)], axis=-2)


class System:
    """J, and how to solve with it: at one plan, in coordinates in which it is well conditioned.

    Where an anchor takes next to nothing, the boundaries on either side of it have nearly the same row. There the
    unknown is not the second of the two but the anchor itself: the two move apart. With M = Q_min R_max the entries
    are again products of a part above and a part below, U_k V_l for k < l, with U = Q and V = R for a boundary, U = P
    and V = -P for an anchor, and P (1 - P) on its diagonal: none is formed as a difference. An anchor is an unknown
    where its mass is far below what both its boundaries share, and diffuse: sum a P (1 - P) is of the size of the mass.

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
        alone = xp.sum((1.0 - own) * own * weights, axis=-1, keepdims=True)
        taken = xp.sum(weights * own, axis=-1, keepdims=True)
        edge = xp.sum(weights * (above * below), axis=-1, keepdims=True)
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
        """Of what belongs to each boundary, and to the anchor above it, that which is the unknown."""
        return self.backend.xp.where(self.node, anchor, boundary)

    def solve(self, wanted: Array) -> Array:
        """J^-1 for a right-hand side by `choose`, as changes of the boundaries."""
        xp = self.backend.xp
        found = solve_definite(self.backend, self.matrix, wanted)
        anchors = xp.where(self.node, found, 0.0)
        return found - xp.concat([anchors[..., 1:, :], xp.zeros_like(anchors[..., :1, :])], axis=-2)


def excess(xp: Any, above: Array, below: Array, mass: Array, weights: Array) -> Array:
    """sum_i a_i Q_ij - C_j (..., m - 1, 1), without cancellation."""
    upper = above > 0.5
    tails = xp.sum(weights * xp.where(upper, -below, above), axis=-1, keepdims=True)
    delta = xp.sum(xp.where(upper, weights, 0.0), axis=-1, keepdims=True) - mass
    rounding = 4.0 * limits(xp, above.dtype).eps * mass
    return tails + xp.where(xp.abs(delta) <= rounding, 0.0 * delta, delta)
