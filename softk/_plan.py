r"""The transport plan between scores and any number of anchors, by Newton's method on the boundaries between them.

With anchors y_1 > ... > y_m that take the masses c_1, ..., c_m, the plan of entropic optimal transport is

    P_ij = softmax_j((2 x_i y_j - y_j^2 + g_j) / epsilon),   sum_i a_i P_ij = c_j,

with one dual potential g_j an anchor (Xie et al., NeurIPS 2020, equation (4)). Only neighbours are compared here:

    log(P_ij / P_i,j+1) = z_ij = (x_i - t_j) / tau_j,   tau_j = epsilon / (2 (y_j - y_j+1)).

The m - 1 thresholds t_j are the unknowns. For two anchors there is one, and P is the mask of the top-k and its rest.

**In two parts.** t_j = r_j + tau_j s_j, as for the mask: the reference is a score or the middle of a gap, the offset
s_j the unknown. The potentials, of the size of y^2 / epsilon, would lose everything in float32.

**One condition a boundary.** Let Q_ij be the part of score i above boundary j and R_ij = 1 - Q_ij the part below, both
running sums of P. Then sum_i a_i Q_ij = C_j = c_1 + ... + c_j, and because

    dQ_ij / dz_il = Q_i,min(j,l) R_i,max(j,l) = (M_i)_jl,

the Jacobian J = sum_i a_i M_i is symmetric, positive definite and a sum of positive numbers. The excess sum a Q - C is
formed from the tails, as for the mask.

**The start.** Each boundary alone is the threshold of a top-k with the mass C_j. The differences of neighbouring masks
are a plan with the right masses; (x - r) / tau less its log-odds, on average, is a start that is exact for epsilon -> 0
and close when epsilon is large.

**The step.** The dual is a sum of logarithms of sums of exponentials: a Newton step d shortened to log(1 + |d|) / |d|
of itself always ascends, if |d| is its range in the potentials. With the largest change of a threshold in the place of
the range the steps are longer and nearly always better; the range is used from where Newton's decrement has grown.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ._linear import solve_definite
from ._solver import (
    CORRECTIONS,
    MARGIN,
    Ends,
    closer,
    find_ends,
    frame,
    hold,
    limits,
    logits,
    middle,
    nonzero,
    search,
    window,
)
from .backend import Array, Backend

#: Newton steps at most. In the measured range (the guide's table) 30 always sufficed, 10 nearly always.
STEPS = 40


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


# --- the plan of given boundaries


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


# --- the boundaries of a plan


def prepare(xp: Any, x: Array, masses: Array, tau: Array, held: Array) -> Task:
    """The problem in canonical form.

    Parameters
    ----------
    xp : namespace
        Of the arrays.
    x, held : array
        Scores, -inf for those that are removed, and their weights as `hold` returns them, shape (..., n).
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


def newton(
    backend: Backend, task: Task, *, weighted: bool, ranks: tuple[int, ...] | None = None, limit: int = STEPS
) -> Boundaries:
    """The boundaries by Newton's method.

    `weighted` says whether the weights of the task are the user's; `ranks` are ceil(C) of every boundary and then
    floor(C) + 1, where they are known without looking into an array; `limit` is the number of steps at most.
    """
    xp = backend.xp
    constants = (backend.constant(value) for value in task)
    options = {"weighted": weighted, "ranks": ranks, "limit": limit}
    reference, offset, count, valid = backend.settle(_approach, options, *constants)
    if backend.differentiates_operations:
        z = log_odds(backend, task, reference)
        for _ in range(CORRECTIONS):
            offset = offset + _step(backend, z - offset, task.mass, task.masses, task.weights)[0]
    return Boundaries(reference, xp.where(valid, offset, math.nan), count)


def _approach(
    backend: Backend, *arrays: Array, weighted: bool, ranks: tuple[int, ...] | None, limit: int
) -> tuple[Array, ...]:
    """The reference; the offset; the number of steps; and whether there is a plan."""
    xp, task = backend.xp, Task(*arrays)
    near = None if weighted or ranks is None else window(backend, task.x, xp.max(task.tau, axis=-2), ranks)
    if near is not None:
        within = task._replace(x=near, weights=xp.expand_dims(hold(xp, near, None), axis=-2))
        found, sure = _approach_within(backend, within, weighted, ranks, limit, task.x.shape[-1])
        if backend.known(xp.all(sure)):
            return found
    return _approach_within(backend, task, weighted, ranks, limit, task.x.shape[-1])[0]


def _approach_within(
    backend: Backend, task: Task, weighted: bool, ranks: tuple[int, ...] | None, limit: int, n: int
) -> tuple[tuple[Array, ...], Array]:
    """What `approach` returns, from all n scores or those of a window; and whether a window was wide enough."""
    xp = backend.xp
    bound = limits(xp, task.x.dtype)
    mass = task.mass[..., 0]
    if not weighted:  # sums of fractions that should be whole are
        nearest = xp.round(mass)
        mass = xp.where(xp.abs(nearest - mass) <= 4.0 * bound.eps * mass, nearest, mass)
    weights = task.weights[..., 0, :] if weighted else None
    ends = find_ends(backend, task.x, None, mass, weights, ranks, n)
    ends = Ends(*(xp.expand_dims(value, axis=-1) for value in ends))
    reference, gap = frame(backend, ends, task.tau)
    z = log_odds(backend, task, reference)
    mass = xp.expand_dims(mass, axis=-1)
    odds, half = closer(backend, z, gap)
    alone, _ = search(backend, odds, half, mass, task.weights, ends.nothing | ends.everything)
    del odds
    offset = _together(xp, z, alone + middle(gap), task.weights)
    offset = xp.where(ends.everything, -bound.saturated, xp.where(ends.nothing, bound.saturated, offset))

    def step(state: tuple[Array, Array, Array, Array, Array]) -> tuple[Any, Array]:
        offset, count, last, careful, done = state
        size, wanted = _step(backend, z - offset, mass, task.masses, task.weights)
        decrement = xp.sum(size * wanted, axis=-2, keepdims=True)
        careful = careful | (decrement > last)
        potentials = running(xp, size, reverse=True)
        span = xp.max(potentials, axis=-2, keepdims=True) - xp.min(potentials, axis=-2, keepdims=True)
        length = xp.where(careful, span, xp.max(xp.abs(size), axis=-2, keepdims=True))
        short = xp.where(length == 0.0, 1.0, xp.log1p(length) / nonzero(xp, length))
        offset = xp.where(done, offset, offset + short * size)
        count = xp.where(done, count, count + 1.0)
        done = done | ~(span > bound.eps**0.25)  # two steps of second order away from eps: the corrections
        return (offset, count, decrement, careful, done), done

    none = xp.zeros_like(offset[..., :1, :])
    state = (offset, none, none + math.inf, none > 0.0, none > 0.0)
    offset, count, *_ = backend.repeat(step, state, limit)
    for _ in range(CORRECTIONS):
        offset = offset + _step(backend, z - offset, mass, task.masses, task.weights)[0]
    valid = xp.all(ends.valid, axis=-2, keepdims=True) & (task.tau > 0.0) & (task.tau <= bound.largest)
    # A window leaves out what is log(n / eps) and the margin below the lower side of every gap. That is nothing beside
    # the score there, where it is below the boundary; else it must be beside all that is shared at the boundary.
    above, below = sides(xp, plan(xp, z - offset))
    shared = xp.sum(task.weights * (above * below), axis=-1, keepdims=True)
    sure = ends.nothing | ends.everything | (offset >= gap.low) | (xp.exp(gap.low - offset - MARGIN) <= shared)
    return (reference, offset, count, valid), sure | ~valid


def _step(backend: Backend, z: Array, mass: Array, masses: Array, weights: Array) -> tuple[Array, Array]:
    """Newton's step of the offsets, and the excess of the boundaries that asks for it."""
    xp = backend.xp
    share = plan(xp, z)
    above, below = sides(xp, share)
    system = System(backend, share, above, below, weights)
    wanted = excess(xp, above, below, mass, weights)
    column = xp.sum(weights * share[..., :-1, :], axis=-1, keepdims=True) - masses[..., :-1, :]
    return system.solve(system.choose(wanted, column)), wanted


def _together(xp: Any, z: Array, alone: Array, weights: Array) -> Array:
    """Offsets from the plan that the boundaries on their own make: the mean of its log-odds, where it has any."""
    y = z - alone
    positive = y > 0.0
    decay = xp.exp(-xp.abs(y))
    tail = decay / (1.0 + decay)
    above, below = xp.where(positive, 1.0 - tail, tail), xp.where(positive, tail, 1.0 - tail)
    all_of_it, none = xp.ones_like(above[..., :1, :]), xp.zeros_like(above[..., :1, :])
    # The difference of two masks is also that of their complements: taken of the small ones.
    by_mask = xp.concat([above, all_of_it], axis=-2) - xp.concat([none, above], axis=-2)
    by_rest = xp.concat([all_of_it, below], axis=-2) - xp.concat([below, none], axis=-2)
    share = xp.where(xp.concat([positive, all_of_it > 0.0], axis=-2), by_rest, by_mask)
    upper, lower = share[..., :-1, :], share[..., 1:, :]
    both = (upper > 0.0) & (lower > 0.0)
    upper, lower = xp.where(both, upper, 1.0), xp.where(both, lower, 1.0)
    weight = xp.where(both, weights * (upper * lower / (upper + lower)), 0.0)
    total = xp.sum(weight, axis=-1, keepdims=True)
    mean = xp.sum(weight * (z - (xp.log(upper) - xp.log(lower))), axis=-1, keepdims=True) / nonzero(xp, total)
    return xp.where(total > float(xp.finfo(z.dtype).smallest_normal), mean, alone)


def sinkhorn(backend: Backend, task: Task, masses: Array, anchors: Array, tolerance: float, limit: int) -> Boundaries:
    """The boundaries by the algorithm of the paper, in the log domain, from potentials of zero.

    With the rows normalised, one iteration adds epsilon log(c_j / sum_i a_i P_ij) to the potential g_j, and moves a
    threshold by the difference of its neighbours.

    Parameters
    ----------
    backend, task
        As for `newton`.
    masses, anchors : array
        Shape (..., m).
    tolerance : float
        The error in a mass that is good enough.
    limit : int
        Iterations at most.
    """
    xp = backend.xp
    masses, anchors = (xp.expand_dims(backend.constant(value), axis=-1) for value in (masses, anchors))
    reference = 0.5 * (anchors[..., :-1, :] + anchors[..., 1:, :])  # where g = 0
    constants = (backend.constant(value) for value in task)
    options = {"tolerance": tolerance, "limit": limit}
    offset, count = backend.settle(_iterate, options, *constants, masses, reference)
    valid = (task.tau > 0.0) & (task.tau <= limits(xp, offset.dtype).largest)
    return Boundaries(reference, xp.where(valid, offset, math.nan), count)


def _iterate(backend: Backend, *arrays: Array, tolerance: float, limit: int) -> tuple[Array, ...]:
    """The offset, and the number of iterations."""
    *given, masses, reference = arrays
    xp, task = backend.xp, Task(*given)
    z = log_odds(backend, task, reference)
    taken, least = masses > 0.0, float(xp.finfo(z.dtype).smallest_normal)

    def step(state: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        offset, count, done = state
        found = xp.sum(task.weights * plan(xp, z - offset), axis=-1, keepdims=True)
        done = done | (xp.max(xp.abs(found - masses), axis=-2, keepdims=True) <= tolerance)
        rise = xp.log(xp.where(taken, masses, 1.0)) - xp.log(xp.maximum(found, least))
        rise = xp.where(taken, rise, math.log(least))
        move = rise[..., 1:, :] - rise[..., :-1, :]
        return (xp.where(done, offset, offset + move), xp.where(done, count, count + 1.0), done), done

    none = xp.zeros_like(z[..., :1, :1])
    offset, count, _ = backend.repeat(step, (xp.zeros_like(z[..., :1]), none, none > 0.0), limit)
    return offset, count
