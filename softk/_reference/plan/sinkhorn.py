"""The boundaries of a plan by Sinkhorn's algorithm, as in the paper."""

from __future__ import annotations

import math
from typing import Any

from softk._reference.threshold.limits import limits
from softk._reference.threshold.problem import mean_weight
from softk.backend import Array, Backend, Form, Primitive

from .system import Boundaries, Task, log_odds, plan


def sinkhorn(backend: Backend, task: Task, masses: Array, anchors: Array, tolerance: float, limit: int) -> Boundaries:
    """Find the boundaries by the algorithm of the paper, in the log domain, starting from potentials of zero.

    One iteration, with normalized rows, adds epsilon log(c_j / sum_i a_i P_ij) to the potential g_j. An offset changes
    by the difference of these logarithms at the two anchors of its boundary.

    Parameters
    ----------
    backend, task
        As for `newton`.
    masses, anchors : array
        Shape (..., m).
    tolerance : float
        The iteration stops when the error of every mass is at most this, in units of the mean weight.
    limit : int
        The largest number of iterations.
    """
    xp = backend.xp
    masses, anchors = (xp.expand_dims(backend.constant(value), axis=-1) for value in (masses, anchors))
    reference = 0.5 * (anchors[..., :-1, :] + anchors[..., 1:, :])  # the threshold for g = 0
    constants = tuple(backend.constant(value) for value in task)
    options = {"tolerance": tolerance, "limit": limit}
    offset, count = backend.run(solver, "forward", (*constants, masses, reference), **options)
    valid = (task.tau > 0.0) & (task.tau <= limits(xp, offset.dtype).largest)
    return Boundaries(reference, xp.where(valid, offset, math.nan), count)


def _iterate(backend: Backend, inputs: tuple[Any, ...], *, tolerance: float, limit: int) -> tuple[Array, ...]:
    """The offset and the number of iterations."""
    *given, masses, reference = inputs
    xp, task = backend.xp, Task(*given)
    z = log_odds(backend, task, reference)
    taken, least = masses > 0.0, float(xp.finfo(z.dtype).smallest_normal)
    enough = tolerance * mean_weight(xp, task.weights, -1)

    def step(state: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        offset, count, done = state
        found = xp.sum(task.weights * plan(xp, z - offset), axis=-1, keepdims=True)
        done = done | (xp.max(xp.abs(found - masses), axis=-2, keepdims=True) <= enough)
        rise = xp.log(xp.where(taken, masses, 1.0)) - xp.log(xp.maximum(found, least))
        rise = xp.where(taken, rise, math.log(least))  # a finite number for log(0), since inf - inf is NaN
        move = rise[..., 1:, :] - rise[..., :-1, :]
        return (xp.where(done, offset, offset + move), xp.where(done, count, count + 1.0), done), done

    none = xp.zeros_like(z[..., :1, :1])
    offset, count, _ = backend.repeat(step, (xp.zeros_like(z[..., :1]), none, none > 0.0), limit)
    return offset, count


def _forms(xp: Any, inputs: tuple[Any, ...], **options: Any) -> tuple[Form, ...]:
    reference, dtype = inputs[-1], inputs[0].dtype
    *batch, boundaries, _ = reference.shape
    return Form((*batch, boundaries, 1), dtype), Form((*batch, 1, 1), dtype)


#: The iteration, as one operation in a framework's graph.
solver = Primitive("solve_plan_by_sinkhorn", _iterate, _forms, constants=("offset", "iterations"))
