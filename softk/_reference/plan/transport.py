"""The primitive of the transport problem with any anchors and marginals.

Inputs, in this order: scores x (..., n), anchors and marginals (..., m) in any order, tau = epsilon / 2 (..., 1) or (),
item weights and where (..., n) or None. The outputs are the plan, the offsets, from which the rule is computed, and
constants.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from softk._reference.threshold.limits import limits, safe_denominator
from softk._reference.threshold.problem import effective_weights, mean_weight, selectable
from softk.backend import Array, Backend, Form, Inputs, Primitive

from .newton import newton
from .rule import PlanLinearization
from .sinkhorn import sinkhorn
from .system import Task, log_odds, plan, prepare, running

Arrays = tuple[Array, ...]


class _Order:
    """The sorting of the anchors from the highest to the lowest, those of marginal 0 last, and its inverse."""

    def __init__(self, xp: Any, anchors: Array, marginals: Array) -> None:
        self.xp = xp
        self.down = xp.argsort(xp.where(marginals > 0.0, anchors, -math.inf), axis=-1, descending=True)
        self.up = xp.argsort(self.down, axis=-1)

    def sorted(self, values: Array) -> Array:
        return self.xp.take_along_axis(values, self.down, axis=-1)

    def restored(self, values: Array) -> Array:
        return self.xp.take_along_axis(values, self.up, axis=-1)

    def sorted_rows(self, values: Array) -> Array:
        return self._take_rows(values, self.down)

    def restored_rows(self, values: Array) -> Array:
        return self._take_rows(values, self.up)

    def _take_rows(self, values: Array, index: Array) -> Array:
        index = self.xp.broadcast_to(self.xp.expand_dims(index, axis=-1), values.shape)
        return self.xp.take_along_axis(values, index, axis=-2)


class _Transport(NamedTuple):
    """The problem in canonical form, and the parts of the conversion that its derivative needs."""

    order: _Order
    task: Task
    anchors: Array  # sorted (..., m)
    masses: Array  # sorted marginals, normalized to the total weight of the scores (..., m)
    scale: Array  # masses / marginals (..., 1)
    sum: Array  # the sum of the marginals (..., 1)
    total: Array  # the sum of the weights (..., 1)
    distance: Array  # the distance of neighboring anchors (..., m - 1)
    fixed: Array  # whether that distance is a constant


def _transport(xp: Any, inputs: tuple[Any, ...]) -> _Transport:
    x, anchors, marginals, tau, weights, where = inputs
    order = _Order(xp, anchors, marginals)
    anchors, marginals = order.sorted(anchors), order.sorted(marginals)
    valid = xp.all((marginals >= 0.0) & (marginals < math.inf), axis=-1, keepdims=True)
    taken = marginals > 0.0
    # tau is divided by the distance, which is therefore 1 beside an anchor of marginal 0, and bounded below elsewhere,
    # so that a boundary between equal anchors has a temperature of at least farthest^0.5 times the scores.
    both = taken[..., :-1] & taken[..., 1:]
    x = selectable(xp, x, where)
    bound = limits(xp, x.dtype)
    size = xp.max(xp.where(xp.abs(x) < math.inf, xp.abs(x), 0.0), axis=-1, keepdims=True)
    size = xp.minimum(xp.maximum(size, 1.0), 0.25 * bound.largest / bound.farthest**0.5)
    least = xp.maximum(tau / (size * bound.farthest**0.5), float(xp.finfo(x.dtype).smallest_normal))
    distance = xp.where(both, anchors[..., :-1] - anchors[..., 1:], 1.0)
    distance = xp.where(distance <= least, least, distance)
    effective = effective_weights(xp, x, weights)
    whole, total = (xp.sum(values, axis=-1, keepdims=True) for values in (marginals, effective))
    scale = total / xp.where(valid & (whole > 0.0), whole, math.nan)
    masses = marginals * scale
    task = prepare(xp, x, masses, tau / distance, effective)
    return _Transport(order, task, anchors, masses, scale, whole, total, distance, ~both)


def _transport_forward(
    backend: Backend, inputs: tuple[Any, ...], *, method: str, tolerance: float, limit: int
) -> Arrays:
    xp = backend.xp
    _, _, _, tau, weights, _ = inputs
    problem = _transport(xp, inputs)
    task, anchors, masses = problem.task, problem.anchors, problem.masses
    if method == "newton":
        reference, offset, count = newton(backend, task, weighted=weights is not None, limit=limit)
    else:
        reference, offset, count = sinkhorn(backend, task, masses, anchors, tolerance, limit)
    share = task.weights * plan(xp, log_odds(backend, task, reference) - offset)
    error = xp.max(xp.abs(xp.sum(share, axis=-1) - masses), axis=-1, keepdims=True)
    relative = error / mean_weight(xp, task.weights, -1)[..., 0]
    # (2 x y - y^2 + g) / epsilon differs by z between neighboring anchors, which gives the differences of g. The free
    # constant of g is chosen such that g = 0 at the lowest anchor of a positive marginal.
    apart = anchors[..., :-1] - anchors[..., 1:]
    squares = apart * (anchors[..., :-1] + anchors[..., 1:])
    rise = squares - 2.0 * (reference[..., 0] * apart + tau * offset[..., 0])
    taken = masses > 0.0
    rise = xp.where(taken[..., 1:], rise, 0.0)
    potentials = running(xp, xp.expand_dims(rise, axis=-1), reverse=True)[..., 0]
    potentials = problem.order.restored(xp.where(taken, potentials, -math.inf))
    return problem.order.restored_rows(share), offset, reference, error, relative, count[..., 0], potentials


def _transport_rule(backend: Backend, inputs: tuple[Any, ...], outputs: Arrays) -> tuple[_Transport, PlanLinearization]:
    problem = _transport(backend.xp, inputs)
    return problem, PlanLinearization(backend, problem.task, outputs[2], outputs[1])


def _transport_jvp(backend: Backend, inputs: tuple[Any, ...], outputs: Arrays, tangents: Inputs) -> Arrays:
    xp = backend.xp
    dx, danchors, dmarginals, dtau, da, _ = tangents
    tau = inputs[3]
    problem, rule = _transport_rule(backend, inputs, outputs)
    task = problem.task
    growth = xp.zeros_like(problem.distance)
    if dtau is not None:
        growth = growth + dtau / tau
    if danchors is not None:
        danchors = problem.order.sorted(danchors)
        moved = danchors[..., :-1] - danchors[..., 1:]
        growth = growth - xp.where(problem.fixed, 0.0, moved / problem.distance)
    dmasses = xp.zeros_like(problem.masses)
    if dmarginals is not None:
        # An anchor of marginal 0 is left out of the problem, so its marginal has no derivative.
        dmarginals = xp.where(problem.masses > 0.0, problem.order.sorted(dmarginals), 0.0)
        lost = problem.masses * (xp.sum(dmarginals, axis=-1, keepdims=True) / safe_denominator(xp, problem.sum))
        dmasses = dmasses + problem.scale * dmarginals - lost
    if da is not None:
        da = xp.where(task.x == -math.inf, 0.0, da)
        dmasses = dmasses + problem.masses * (xp.sum(da, axis=-1, keepdims=True) / safe_denominator(xp, problem.total))
        da = xp.expand_dims(da, axis=-2)
    dmasses = xp.expand_dims(dmasses, axis=-1)
    dtau = task.tau * xp.expand_dims(growth, axis=-1)
    dshare, doffset = rule.push(None if dx is None else xp.expand_dims(dx, axis=-2), dtau, da, dmasses)
    dshare = task.weights * dshare
    return problem.order.restored_rows(dshare if da is None else dshare + da * rule.share), doffset


def _transport_vjp(
    backend: Backend, inputs: tuple[Any, ...], outputs: Arrays, cotangents: Inputs, needed: tuple[bool, ...]
) -> Inputs:
    xp = backend.xp
    ubar, c = cotangents
    tau, weights = inputs[3], inputs[4]
    problem, rule = _transport_rule(backend, inputs, outputs)
    task = problem.task
    if ubar is not None:
        ubar = problem.order.sorted_rows(ubar)
    xbar, taubar, abar, massbar = rule.pull(None if ubar is None else task.weights * ubar, c)
    massbar = massbar[..., 0]
    # The masses are the marginals times total / sum, so the cotangents of both also have a term through the sums.
    taken = xp.sum(massbar * problem.masses, axis=-1, keepdims=True)
    marginalbar = problem.scale * massbar - taken / safe_denominator(xp, problem.sum)
    marginalbar = xp.where(problem.masses > 0.0, marginalbar, 0.0)
    # tau_j is tau over the distance of two anchors: its relative change is that of tau minus that of the distance.
    growth = (taubar * task.tau)[..., 0]
    moved = xp.where(problem.fixed, 0.0, -growth / problem.distance)
    none = xp.zeros_like(moved[..., :1])
    anchorbar = xp.concat([moved, none], axis=-1) - xp.concat([none, moved], axis=-1)
    growth = growth / tau
    taubar = xp.sum(growth, axis=-1, keepdims=True) if tau.ndim else xp.sum(growth)
    if weights is None:
        abar = None
    else:
        if ubar is not None:
            abar = abar + xp.sum(ubar * rule.share, axis=-2)
        abar = xp.where(task.x == -math.inf, 0.0, abar + taken / safe_denominator(xp, problem.total))
    return xbar, problem.order.restored(anchorbar), problem.order.restored(marginalbar), taubar, abar, None


def _transport_forms(xp: Any, inputs: tuple[Any, ...], **options: Any) -> tuple[Form, ...]:
    x, anchors, *_ = inputs
    *batch, n = x.shape
    m = anchors.shape[-1]
    row, one = Form((*batch, m - 1, 1), x.dtype), Form((*batch, 1), x.dtype)
    return Form((*batch, m, n), x.dtype), row, row, one, one, one, Form((*batch, m), x.dtype)


transport_plan = Primitive(
    "transport_plan",
    _transport_forward,
    _transport_forms,
    _transport_jvp,
    _transport_vjp,
    results=("plan",),
    state=("offset",),
    constants=("reference", "marginal_error", "relative_error", "iterations", "potentials"),
)
