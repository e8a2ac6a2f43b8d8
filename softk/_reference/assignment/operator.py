"""The primitive of the balanced assignment.

Inputs, in this order: scores (..., B, K), capacities (..., 1, K) or None, epsilon (..., 1, 1) or (), item weights
(..., B, 1) or None, and where (..., B, K) or None. The outputs are the plan, the offsets, from which the rule is
computed, and constants.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from softk._reference.threshold.limits import limits, safe_denominator
from softk._reference.threshold.problem import mean_weight
from softk.backend import Array, Backend, Form, Inputs, Primitive

from .rule import AssignmentRule
from .solve import potentials
from .system import Problem, column, shares

Arrays = tuple[Array, ...]


class _Given(NamedTuple):
    """The problem in canonical form, and the parts of the conversion that its derivative needs."""

    problem: Problem
    taken: Array  # the groups that may take something (..., 1, K)
    able: Array  # the items that some group may take (..., B, 1)
    unit: Array  # of the capacities, a power of 2 (..., 1, 1)
    scale: Array  # masses / capacities, these in their unit (..., 1, 1)
    whole: Array  # the sum of the capacities, in their unit (..., 1, 1)
    part: Array  # the part of each group of the whole (..., 1, K)
    live: Array  # whether an item has a weight (..., 1, 1)
    valid: Array  # (..., 1, 1)


def _unit(xp: Any, largest: Array) -> Array:
    """A power of 2 with which the sums of capacities up to this one neither overflow nor lose digits."""
    power = 96 if xp.finfo(largest.dtype).bits <= 32 else 768
    far = 2.0 ** (2 * power // 3)
    return xp.where(largest > far, 2.0**power, xp.where(largest < 1.0 / far, 2.0**-power, xp.ones_like(largest)))


def _given(xp: Any, inputs: tuple[Any, ...]) -> _Given:
    scores, capacities, epsilon, weights, where = inputs
    if capacities is None:
        capacities = xp.ones_like(scores[..., :1, :])
    if weights is None:
        weights = xp.ones_like(scores[..., :1])
    taken = capacities != 0.0
    allowed = (scores != -math.inf) & taken
    if where is not None:
        allowed = allowed & where
    scores = xp.where(allowed, scores, 0.0)
    able = xp.any(allowed, axis=-1, keepdims=True)
    weights = xp.where(able, weights, 0.0)
    valid = xp.all((capacities >= 0.0) & (capacities < math.inf), axis=-1, keepdims=True)
    unit = _unit(xp, xp.max(xp.where(valid, capacities, 1.0), axis=-1, keepdims=True))
    capacities = capacities / unit
    whole, total = xp.sum(capacities, axis=-1, keepdims=True), column(xp, weights)
    valid = valid & (whole > 0.0)
    valid = valid & xp.all((weights >= 0.0) & (weights < math.inf), axis=-2, keepdims=True)
    valid = valid & xp.all(xp.abs(scores) < math.inf, axis=(-2, -1), keepdims=True)
    valid = valid & (epsilon > 0.0) & (epsilon <= limits(xp, scores.dtype).largest)
    # Without weight the plan is 0. Its derivative in the weights is the limit for equal weights.
    live = total != 0.0
    weights = xp.where(live, weights, xp.astype(able, weights.dtype))
    scale = xp.where(live, total, column(xp, weights)) / xp.where(valid, whole, math.nan)
    return _Given(
        Problem(scores, allowed, capacities * scale, weights, epsilon),
        taken,
        able,
        unit,
        xp.where(live, scale, 0.0),
        whole,
        capacities / safe_denominator(xp, whole),
        live,
        valid,
    )


def _forward(backend: Backend, inputs: tuple[Any, ...], *, method: str, tolerance: float, limit: int) -> Arrays:
    xp = backend.xp
    given = _given(xp, inputs)
    problem = given.problem
    reference, offset, count = potentials(backend, problem, method=method, tolerance=tolerance, limit=limit)
    offset = xp.where(given.valid, offset, math.nan)
    plan = xp.where(given.valid, problem.weights * shares(backend, problem, reference, offset).share, math.nan)
    plan = xp.where(given.live, plan, 0.0 * plan)
    error = xp.max(xp.abs(column(xp, plan) - xp.where(given.live, problem.masses, 0.0)), axis=-1)
    relative = error / mean_weight(xp, problem.weights, -2)[..., 0]
    # The free constant of the potentials is chosen such that their mean over the groups that take something is 0.
    dual = xp.where(given.taken, reference + problem.epsilon * offset, 0.0)
    number = xp.astype(xp.count_nonzero(given.taken, axis=-1, keepdims=True), dual.dtype)
    dual = dual - xp.sum(dual, axis=-1, keepdims=True) / safe_denominator(xp, number)
    dual = xp.where(given.taken, xp.where(given.valid, dual, math.nan), -math.inf)
    return plan, offset, reference, error, relative, count[..., 0], dual[..., 0, :]


def _rule(backend: Backend, inputs: tuple[Any, ...], outputs: Arrays) -> tuple[_Given, AssignmentRule]:
    given = _given(backend.xp, inputs)
    return given, AssignmentRule(backend, given.problem, outputs[2], outputs[1])


def _jvp(backend: Backend, inputs: tuple[Any, ...], outputs: Arrays, tangents: Inputs) -> Arrays:
    xp = backend.xp
    dscores, dcapacities, depsilon, dweights, _ = tangents
    given, rule = _rule(backend, inputs, outputs)
    masses = xp.where(given.live, given.problem.masses, 0.0)
    dscores = None if dscores is None else xp.where(given.live, dscores, 0.0)
    depsilon = None if depsilon is None else xp.where(given.live, depsilon, 0.0)
    dmasses = None
    if dcapacities is not None:
        # A group of capacity 0 is left out of the problem, so its capacity has no derivative.
        dcapacities = xp.where(given.taken, dcapacities, 0.0) / given.unit
        lost = xp.sum(dcapacities, axis=-1, keepdims=True) / safe_denominator(xp, given.whole)
        dmasses = given.scale * dcapacities - masses * lost
    if dweights is not None:
        dweights = xp.where(given.able, dweights, 0.0)
        gained = given.part * column(xp, dweights)
        dmasses = gained if dmasses is None else dmasses + gained
    return rule.push(dscores, dmasses, depsilon, dweights)


def _vjp(
    backend: Backend, inputs: tuple[Any, ...], outputs: Arrays, cotangents: Inputs, needed: tuple[bool, ...]
) -> Inputs:
    xp = backend.xp
    _, capacities, epsilon, weights, _ = inputs
    given, rule = _rule(backend, inputs, outputs)
    scoresbar, massesbar, epsilonbar, weightsbar = rule.pull(
        *cotangents, epsilon=needed[2], sums=needed[1] or needed[3]
    )
    scoresbar = xp.where(given.live, scoresbar, 0.0)
    epsilonbar = None if epsilonbar is None else xp.where(given.live, epsilonbar, 0.0)
    if epsilonbar is not None and not epsilon.ndim:
        epsilonbar = xp.sum(epsilonbar)
    # The masses are the capacities times total / whole, so the cotangents of both also have a term through the sums.
    taken = xp.sum(massesbar * given.part, axis=-1, keepdims=True)
    if capacities is None:
        capacitiesbar = None
    else:
        capacitiesbar = given.scale * (massesbar - taken) / given.unit
        capacitiesbar = xp.where(given.taken, capacitiesbar, 0.0)
    if weights is None:
        weightsbar = None
    else:
        weightsbar = weightsbar + taken
        weightsbar = xp.where(given.able, weightsbar, 0.0)
    return scoresbar, capacitiesbar, epsilonbar, weightsbar, None


def _forms(xp: Any, inputs: tuple[Any, ...], **options: Any) -> tuple[Form, ...]:
    scores = inputs[0]
    *batch, items, groups = scores.shape
    row, one = Form((*batch, 1, groups), scores.dtype), Form((*batch, 1), scores.dtype)
    return Form((*batch, items, groups), scores.dtype), row, row, one, one, one, Form((*batch, groups), scores.dtype)


assignment = Primitive(
    "assignment",
    _forward,
    _forms,
    _jvp,
    _vjp,
    results=("plan",),
    state=("offset",),
    constants=("reference", "marginal_error", "relative_error", "iterations", "potentials"),
    axes=2,
)
