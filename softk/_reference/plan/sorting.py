"""Sorting: anchors of equal mass at equal distances, and one more anchor for the remaining mass, if any.

As for the mask, the last outputs are the offsets, from which the rule is computed, and constants. Rows are anchors or
the boundaries between them, from the highest to the lowest. Columns are scores.

Inputs, in this order: scores x (..., n), tau between neighboring anchors (..., 1) or (), the mass of a row (), where
and item weights (..., n) or None. The number of rows is an option. In a rule it is the number of offsets, one per row.
The weights are divided by their mean, so that they sum to the number of scores.
"""

from __future__ import annotations

import math
from typing import Any

from softk._reference.threshold.limits import clip, limits, safe_denominator
from softk._reference.threshold.problem import effective_weights, selectable
from softk.backend import Array, Backend, Form, Inputs, Primitive

from .newton import newton
from .rule import PlanLinearization
from .system import Task, log_odds, plan, prepare

Arrays = tuple[Array, ...]


def _scale(xp: Any, x: Array, effective: Array) -> tuple[Array, Array]:
    """The inverse of the mean weight (..., 1), and of how many scores it is the mean.

    It is NaN for weights that are negative, infinite, or all 0.
    """
    count = xp.astype(xp.count_nonzero(x > -math.inf, axis=-1, keepdims=True), x.dtype)
    count = safe_denominator(xp, count)
    # The sum of the weights may overflow, so it is formed in units of the largest.
    largest = xp.max(effective, axis=-1, keepdims=True)
    valid = xp.all(effective >= 0.0, axis=-1, keepdims=True) & (largest < math.inf)
    valid = valid & ((largest > 0.0) | xp.all(x == -math.inf, axis=-1, keepdims=True))
    unit = xp.where(largest > 0.0, largest, 1.0)
    total = safe_denominator(xp, xp.sum(effective / unit, axis=-1, keepdims=True))
    return xp.where(valid, count / total / unit, math.nan), count


def _ladder(xp: Any, inputs: tuple[Any, ...], rows: int) -> Task:
    x, tau, unit, where, weights = inputs
    x = selectable(xp, x, where)
    masses = xp.broadcast_to(unit, (*x.shape[:-1], rows + 1))
    effective = effective_weights(xp, x, weights)
    if weights is None:
        return prepare(xp, x, masses, tau, effective)
    effective = effective * _scale(xp, x, effective)[0]
    # The anchors take no more than there is: a mass above the sum of the weights would be an error of the user's.
    total = xp.sum(effective, axis=-1, keepdims=True)
    above = xp.cumulative_sum(masses, axis=-1)
    task = prepare(xp, x, xp.minimum(xp.maximum(total - (above - masses), 0.0), masses), tau, effective)
    return task._replace(mass=xp.expand_dims(xp.minimum(above, total)[..., :-1], axis=-1))


def climb(
    backend: Backend, inputs: tuple[Any, ...], rows: int, ranks: tuple[int, ...] | None
) -> tuple[Task, Array, Array]:
    """The problem in canonical form, and the reference and offset of its boundaries."""
    task = _ladder(backend.xp, inputs, rows)
    reference, offset, _ = newton(backend, task, weighted=inputs[4] is not None, ranks=ranks)
    return task, reference, offset


def linearize(backend: Backend, inputs: tuple[Any, ...], outputs: Arrays) -> PlanLinearization:
    """The derivative of the plan, from the last outputs."""
    *_, offset, reference = outputs
    return PlanLinearization(backend, _ladder(backend.xp, inputs, offset.shape[-2]), reference, offset)


def weights_pushed(rule: PlanLinearization, inputs: tuple[Any, ...], da: Array | None) -> Array | None:
    """The tangent (..., 1, n) of the weights divided by their mean, from that of the weights."""
    if da is None:
        return None
    xp, x, own = rule.xp, rule.task.x, rule.task.weights
    scale, count = _scale(xp, x, effective_weights(xp, x, inputs[4]))
    da = scale * xp.where(x == -math.inf, 0.0, da)
    return xp.expand_dims(da, axis=-2) - own * xp.expand_dims(xp.sum(da, axis=-1, keepdims=True) / count, axis=-2)


def push(rule: PlanLinearization, tangents: Inputs, da: Array | None, scale: Any = 1.0) -> tuple[Array, Array]:
    """Tangents of the whole plan without the weights, and of the offsets, times a scale.

    `da` is from `weights_pushed`.
    """
    dx, dtau, *_ = tangents
    dtau = None if dtau is None else column(rule.xp, dtau)
    return rule.push(None if dx is None else rule.xp.expand_dims(dx, axis=-2), dtau, da, None, scale)


def pull(
    rule: PlanLinearization,
    inputs: tuple[Any, ...],
    ubar: Array | None,
    c: Array | None,
    taubar: Any,
    abar: Any,
    unit: Array | None = None,
) -> tuple[Array, Array, Array | None]:
    """Cotangents of the scores, the temperature and the weights, from those of the plan and of the offsets.

    `taubar` and `abar` are what else has been found of the temperature of each boundary, and of the divided weights.
    All cotangents that are given were multiplied by `unit` (..., 1), if there is one.
    """
    xp, tau, weights = rule.xp, inputs[1], inputs[4]
    xbar, by_boundary, own, _ = rule.pull(ubar, c)
    shared = xp.sum(by_boundary + taubar, axis=-2)
    if unit is not None:
        xbar, shared, own, abar = xbar / unit, shared / unit, own / unit, abar / unit
    shared = shared if tau.ndim else xp.sum(shared)
    if weights is None:
        return xbar, shared, None
    x, own = rule.task.x, own + abar
    scale, count = _scale(xp, x, effective_weights(xp, x, weights))
    mean = xp.sum(own * rule.task.weights[..., 0, :], axis=-1, keepdims=True) / count
    return xbar, shared, xp.where(x == -math.inf, 0.0, scale * (own - mean))


def _huge(xp: Any, values: Array) -> float:
    """A power of 2 of about the square root of the largest number."""
    return float(2.0 ** math.floor(math.log2(limits(xp, values.dtype).farthest)))


def small_unit(rule: PlanLinearization) -> Array:
    """What cotangents (..., 1) of sorted values are multiplied by: 1, but a small power of 2 if a score is huge.

    A cotangent times a difference of scores could overflow, although the cotangents of the scores are of the size of
    those of the values. What is found of the small cotangents is divided by the unit.
    """
    xp, x = rule.xp, rule.task.x
    size = xp.max(xp.where(xp.abs(x) < math.inf, xp.abs(x), 0.0), axis=-1, keepdims=True)
    huge = _huge(xp, x)
    return xp.where(size > huge, 1.0 / huge, xp.ones_like(size))


def large_scale(rule: PlanLinearization) -> Array:
    """What tangents (..., 1, 1) of a plan are multiplied by: 1, but a large power of 2 if all temperatures are huge.

    The tangent of a share is that of a score over the temperature, and could underflow, although the tangents of the
    sorted values are of the size of those of the scores.
    """
    xp, tau = rule.xp, rule.task.tau
    least, huge = xp.min(tau, axis=-2, keepdims=True), _huge(xp, tau)
    return xp.where(least > huge, huge, xp.ones_like(least))


def column(xp: Any, values: Array) -> Array:
    """Align an array of one value per slice with the boundaries."""
    return xp.expand_dims(values, axis=-1) if values.ndim else values


class Means:
    """The mean score of each row: r + sum_i P_ij (x_i - r) / c_j.

    The sum is measured from a constant r near the mean, so that a common offset of the scores adds no rounding error.
    The mean of a row that takes some of a +inf is +inf. If too few scores are left for a row, its mean is -inf.
    """

    def __init__(self, backend: Backend, task: Task, reference: Array, unit: Array) -> None:
        xp = backend.xp
        x, rows = task.x, reference.shape[-2]
        finite = xp.abs(x) < math.inf
        least = xp.min(xp.where(finite, x, math.inf), axis=-1, keepdims=True)
        most = xp.max(xp.where(finite, x, -math.inf), axis=-1, keepdims=True)
        some = least <= most
        # The reference may be a clipped infinity, so it is clipped to the range of the finite scores.
        near = clip(xp, reference[..., 0], xp.where(some, least, 0.0), xp.where(some, most, 0.0))
        self.xp, self.finite, self.near = xp, xp.expand_dims(finite, axis=-2), near
        # The difference of two scores may overflow; a fourth of it does not.
        size = xp.maximum(xp.abs(least), xp.abs(most))
        self.unit = xp.where(some & (size > 0.25 * limits(xp, x.dtype).largest), 0.25, xp.ones_like(size))
        apart = xp.expand_dims(self.unit * x, axis=-2) - xp.expand_dims(self.unit * near, axis=-1)
        self.apart = xp.where(self.finite, apart, 0.0)
        before = unit * xp.broadcast_to(xp.astype(xp.arange(rows, device=backend.device(x)), x.dtype), near.shape)
        count = xp.astype(xp.count_nonzero(x > -math.inf, axis=-1, keepdims=True), x.dtype)
        first = xp.sum(xp.where(x == math.inf, task.weights[..., 0, :], 0.0), axis=-1, keepdims=True)
        mass = clip(xp, count - before, 0.0, unit)
        none = xp.zeros_like(mass)
        # The infinite part of a mean: +inf for rows that get some of a +inf, -inf for rows that lack scores.
        self.end = xp.where(before < first, math.inf, none) + xp.where(mass < 0.999 * unit, -math.inf, none)
        self.mass = xp.where(self.end == 0.0, mass, math.inf)  # rows without a finite mean have no derivative

    def beyond(self, share: Array) -> Array:
        """What the finite means exceed `near` by."""
        return self._beyond(share) / self.unit

    def _beyond(self, share: Array) -> Array:
        return self.xp.sum(share * self.apart, axis=-1) / self.mass

    def of(self, share: Array) -> Array:
        beyond = self._beyond(share)
        found = (self.unit * self.near + beyond) / self.unit + self.end
        return self.xp.where(self.xp.isnan(beyond), math.nan, found)

    def push(self, share: Array, dshare: Array, dx: Array | None, scale: Any) -> Array:
        """The tangent of the means, from that of the rows of the plan times a scale."""
        xp = self.xp
        moved = dshare * (self.apart / scale)
        if dx is not None:
            dx = xp.expand_dims(self.unit * dx, axis=-2)
            moved = moved + share * xp.where(self.finite, dx, 0.0)
        return xp.sum(moved, axis=-1) / self.mass / self.unit

    def pull(self, share: Array, vbar: Array) -> tuple[Array, Array]:
        """Cotangents of the rows of the plan and of the scores."""
        xp = self.xp
        vbar = vbar / self.mass
        by_share, vbar = xp.expand_dims(vbar / self.unit, axis=-1), xp.expand_dims(vbar, axis=-1)
        return by_share * self.apart, xp.sum(xp.where(self.finite, vbar * share, 0.0), axis=-2)


def _sorted_forward(backend: Backend, inputs: tuple[Any, ...], *, rows: int, ranks: tuple[int, ...] | None) -> Arrays:
    xp = backend.xp
    task, reference, offset = climb(backend, inputs, rows, ranks)
    share = (plan(xp, log_odds(backend, task, reference) - offset) * task.weights)[..., :-1, :]
    return Means(backend, task, reference, inputs[2]).of(share), share, offset, reference


def means_pushed(
    backend: Backend,
    rule: PlanLinearization,
    inputs: tuple[Any, ...],
    outputs: Arrays,
    dshare: Array,
    dx: Array | None,
    da: Array | None,
    scale: Any = 1.0,
) -> Array:
    """The tangent of the means, from those of the plan without the weights, the scores and the divided weights.

    That of the plan was multiplied by a scale.
    """
    weights = rule.task.weights
    dshare = weights * dshare if da is None else weights * dshare + scale * (da * rule.share)
    means = Means(backend, rule.task, outputs[-1], inputs[2])
    return means.push((weights * rule.share)[..., :-1, :], dshare[..., :-1, :], dx, scale)


def means_pulled(
    backend: Backend,
    rule: PlanLinearization,
    inputs: tuple[Any, ...],
    outputs: Arrays,
    vbar: Array | None,
    ubar: Array | None,
    c: Array | None,
    taubar: Any,
    abar: Any,
    unit: Array | None = None,
) -> tuple[Array, Array, Array | None]:
    """Cotangents of scores, temperature and weights, from those of the means, of the plan and of the offsets.

    `taubar`, `abar` and `unit` are as for `pull`.
    """
    xp, weights, direct = backend.xp, rule.task.weights, None
    if vbar is not None:
        share = (weights * rule.share)[..., :-1, :]
        found, direct = Means(backend, rule.task, outputs[-1], inputs[2]).pull(share, vbar)
        ubar = found if ubar is None else ubar + found
    if ubar is not None:
        ubar = xp.concat([ubar, xp.zeros_like(ubar[..., :1, :])], axis=-2)
        abar = 0.0 if inputs[4] is None else abar + xp.sum(ubar * rule.share, axis=-2)
        ubar = weights * ubar
    xbar, taubar, abar = pull(rule, inputs, ubar, c, taubar, abar, unit)
    if direct is None:
        return xbar, taubar, abar
    return xbar + (direct if unit is None else direct / unit), taubar, abar


def _sorted_jvp(backend: Backend, inputs: tuple[Any, ...], outputs: Arrays, tangents: Inputs) -> Arrays:
    rule = linearize(backend, inputs, outputs)
    scale = large_scale(rule)
    weights, da = rule.task.weights, weights_pushed(rule, inputs, tangents[4])
    dshare, doffset = push(rule, tangents, da, scale)
    dvalues = means_pushed(backend, rule, inputs, outputs, dshare, tangents[0], da, scale)
    dshare = weights * (dshare / scale)
    if da is not None:
        dshare = dshare + da * rule.share
    return dvalues, dshare[..., :-1, :], doffset / scale


def _sorted_vjp(
    backend: Backend, inputs: tuple[Any, ...], outputs: Arrays, cotangents: Inputs, needed: tuple[bool, ...]
) -> Inputs:
    vbar, ubar, c = cotangents
    rule = linearize(backend, inputs, outputs)
    unit = small_unit(rule)
    rows = backend.xp.expand_dims(unit, axis=-1)
    vbar = None if vbar is None else vbar * unit
    ubar, c = (None if value is None else value * rows for value in (ubar, c))
    xbar, taubar, abar = means_pulled(backend, rule, inputs, outputs, vbar, ubar, c, 0.0, 0.0, unit)
    return xbar, taubar, None, None, abar


def per_row(inputs: tuple[Any, ...], rows: int) -> Form:
    """The form of an array with a number for each row."""
    x = inputs[0]
    return Form((*x.shape[:-1], rows, 1), x.dtype)


def _sorted_forms(xp: Any, inputs: tuple[Any, ...], *, rows: int, ranks: tuple[int, ...] | None) -> tuple[Form, ...]:
    x, row = inputs[0], per_row(inputs, rows)
    return Form(row.shape[:-1], x.dtype), Form((*row.shape[:-1], x.shape[-1]), x.dtype), row, row


sorted_plan = Primitive(
    "sorted_plan",
    _sorted_forward,
    _sorted_forms,
    _sorted_jvp,
    _sorted_vjp,
    results=("values", "assignment"),
    state=("offset",),
    constants=("reference",),
)


# --- the values alone, for a sort: the assignment of n scores to n anchors is not returned


def _values_forward(backend: Backend, inputs: tuple[Any, ...], *, rows: int, ranks: tuple[int, ...] | None) -> Arrays:
    values, _, *state = _sorted_forward(backend, inputs, rows=rows, ranks=ranks)
    return values, *state


def _values_jvp(backend: Backend, inputs: tuple[Any, ...], outputs: Arrays, tangents: Inputs) -> Arrays:
    dvalues, _, doffset = _sorted_jvp(backend, inputs, outputs, tangents)
    return dvalues, doffset


def _values_vjp(
    backend: Backend, inputs: tuple[Any, ...], outputs: Arrays, cotangents: Inputs, needed: tuple[bool, ...]
) -> Inputs:
    vbar, c = cotangents
    return _sorted_vjp(backend, inputs, outputs, (vbar, None, c), needed)


def _values_forms(xp: Any, inputs: tuple[Any, ...], *, rows: int, ranks: tuple[int, ...] | None) -> tuple[Form, ...]:
    values, _, *state = _sorted_forms(xp, inputs, rows=rows, ranks=ranks)
    return values, *state


soft_sort = Primitive(
    "soft_sort",
    _values_forward,
    _values_forms,
    _values_jvp,
    _values_vjp,
    results=("values",),
    state=("offset",),
    constants=("reference",),
)
