"""Sorting and ranking: anchors of equal mass at equal distances, and one more anchor for the remaining mass, if any.

As for the mask, the last outputs are the offsets, from which the rule is computed, and constants. Rows are anchors or
the boundaries between them, from the highest to the lowest. Columns are scores.

Inputs, in this order: scores x (..., n), tau between neighboring anchors (..., 1) or (), the mass of a row (), where
(..., n) or None. The number of rows is an option. In a rule it is the number of offsets, one per row.
"""

from __future__ import annotations

import math
from typing import Any

from softk._reference.threshold.limits import clip, limits
from softk._reference.threshold.problem import effective_weights, selectable
from softk.backend import Array, Backend, Form, Inputs, Primitive

from .newton import newton
from .rule import PlanLinearization
from .system import Task, log_odds, plan, prepare

Arrays = tuple[Array, ...]


def _ladder(xp: Any, inputs: tuple[Any, ...], rows: int) -> Task:
    x, tau, unit, where = inputs
    x = selectable(xp, x, where)
    return prepare(xp, x, xp.broadcast_to(unit, (*x.shape[:-1], rows + 1)), tau, effective_weights(xp, x, None))


def _climb(
    backend: Backend, inputs: tuple[Any, ...], rows: int, ranks: tuple[int, ...] | None
) -> tuple[Task, Array, Array]:
    task = _ladder(backend.xp, inputs, rows)
    reference, offset, _ = newton(backend, task, weighted=False, ranks=ranks)
    return task, reference, offset


def _linearize(backend: Backend, inputs: tuple[Any, ...], outputs: Arrays) -> PlanLinearization:
    *_, offset, reference = outputs
    return PlanLinearization(backend, _ladder(backend.xp, inputs, offset.shape[-2]), reference, offset)


def _push(rule: PlanLinearization, tangents: Inputs) -> tuple[Array, Array]:
    """Tangents of the whole plan and of the offsets."""
    dx, dtau, *_ = tangents
    column = None if dtau is None else _column(rule.xp, dtau)
    return rule.push(None if dx is None else rule.xp.expand_dims(dx, axis=-2), column, None, None)


def _column(xp: Any, values: Array) -> Array:
    """Align an array of one value per slice with the boundaries."""
    return xp.expand_dims(values, axis=-1) if values.ndim else values


def _one(xp: Any, taubar: Array, tau: Array) -> Array:
    """The cotangent of the temperature that all boundaries share: the sum of theirs."""
    shared = xp.sum(taubar, axis=-2)
    return shared if tau.ndim else xp.sum(shared)


class _Means:
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
        far = limits(xp, x.dtype).largest
        apart = clip(xp, xp.expand_dims(x, axis=-2) - xp.expand_dims(near, axis=-1), -far, far)
        self.apart = xp.where(self.finite, apart, 0.0)
        before = unit * xp.broadcast_to(xp.astype(xp.arange(rows, device=backend.device(x)), x.dtype), near.shape)
        count = xp.astype(xp.count_nonzero(x > -math.inf, axis=-1, keepdims=True), x.dtype)
        first = xp.astype(xp.count_nonzero(x == math.inf, axis=-1, keepdims=True), x.dtype)
        mass = clip(xp, count - before, 0.0, unit)
        none = xp.zeros_like(mass)
        # The infinite part of a mean: +inf for rows that get some of a +inf, -inf for rows that lack scores.
        self.end = xp.where(before < first, math.inf, none) + xp.where(mass < 0.999 * unit, -math.inf, none)
        self.mass = xp.where(self.end == 0.0, mass, math.inf)  # rows without a finite mean have no derivative

    def of(self, share: Array) -> Array:
        found = self.xp.sum(share * self.apart, axis=-1) / self.mass
        return self.xp.where(self.xp.isnan(found), math.nan, self.near + found + self.end)

    def push(self, share: Array, dshare: Array, dx: Array | None) -> Array:
        xp = self.xp
        moved = dshare * self.apart
        if dx is not None:
            moved = moved + share * xp.where(self.finite, xp.expand_dims(dx, axis=-2), 0.0)
        return xp.sum(moved, axis=-1) / self.mass

    def pull(self, share: Array, vbar: Array) -> tuple[Array, Array]:
        """Cotangents of the rows of the plan and of the scores."""
        xp = self.xp
        vbar = xp.expand_dims(vbar / self.mass, axis=-1)
        return vbar * self.apart, xp.sum(xp.where(self.finite, vbar * share, 0.0), axis=-2)


def _sorted_forward(backend: Backend, inputs: tuple[Any, ...], *, rows: int, ranks: tuple[int, ...] | None) -> Arrays:
    xp = backend.xp
    task, reference, offset = _climb(backend, inputs, rows, ranks)
    share = (plan(xp, log_odds(backend, task, reference) - offset) * task.weights)[..., :-1, :]
    return _Means(backend, task, reference, inputs[2]).of(share), share, offset, reference


def _sorted_jvp(backend: Backend, inputs: tuple[Any, ...], outputs: Arrays, tangents: Inputs) -> Arrays:
    rule = _linearize(backend, inputs, outputs)
    weights = rule.task.weights
    dshare, doffset = _push(rule, tangents)
    share, dshare = (weights * rule.share)[..., :-1, :], (weights * dshare)[..., :-1, :]
    means = _Means(backend, rule.task, outputs[-1], inputs[2])
    return means.push(share, dshare, tangents[0]), dshare, doffset


def _sorted_vjp(
    backend: Backend, inputs: tuple[Any, ...], outputs: Arrays, cotangents: Inputs, needed: tuple[bool, ...]
) -> Inputs:
    xp = backend.xp
    vbar, ubar, c = cotangents
    rule = _linearize(backend, inputs, outputs)
    weights, direct = rule.task.weights, None
    if vbar is not None:
        share = (weights * rule.share)[..., :-1, :]
        found, direct = _Means(backend, rule.task, outputs[-1], inputs[2]).pull(share, vbar)
        ubar = found if ubar is None else ubar + found
    if ubar is not None:
        ubar = weights * xp.concat([ubar, xp.zeros_like(ubar[..., :1, :])], axis=-2)
    xbar, taubar, _, _ = rule.pull(ubar, c)
    return xbar if direct is None else xbar + direct, _one(xp, taubar, inputs[1]), None, None


def _per_row(inputs: tuple[Any, ...], rows: int) -> Form:
    x = inputs[0]
    return Form((*x.shape[:-1], rows, 1), x.dtype)


def _sorted_forms(xp: Any, inputs: tuple[Any, ...], *, rows: int, ranks: tuple[int, ...] | None) -> tuple[Form, ...]:
    x, row = inputs[0], _per_row(inputs, rows)
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


# --- the soft rank: the mean position of the rows to which a score is transported, 0 for the highest


def _positions(backend: Backend, x: Array, rows: int) -> Array:
    """The positions of the rows, evenly over 0 ... n - 1, from the highest row to the lowest (..., m - 1, 1)."""
    xp = backend.xp
    step = (x.shape[-1] - 1) / max(rows - 1, 1)
    place = step * xp.astype(xp.arange(rows, device=backend.device(x)), x.dtype)
    return xp.broadcast_to(xp.reshape(place, (rows, 1)), (*x.shape[:-1], rows, 1))


def _rank_forward(backend: Backend, inputs: tuple[Any, ...], *, rows: int, ranks: tuple[int, ...] | None) -> Arrays:
    xp = backend.xp
    task, reference, offset = _climb(backend, inputs, rows, ranks)
    share = plan(xp, log_odds(backend, task, reference) - offset)[..., :-1, :]
    place = _positions(backend, task.x, rows)
    found = xp.sum(share * place, axis=-2)
    # Scores of -inf are not transported. They come after all others, and share their mean rank.
    count = xp.count_nonzero(task.x > -math.inf, axis=-1, keepdims=True)
    last = 0.5 * (xp.astype(count, found.dtype) + (task.x.shape[-1] - 1))
    last = xp.where(xp.isnan(offset[..., 0, :]), math.nan, last)
    return xp.where(task.x == -math.inf, last, found), offset, reference


def _rank_jvp(backend: Backend, inputs: tuple[Any, ...], outputs: Arrays, tangents: Inputs) -> Arrays:
    rule = _linearize(backend, inputs, outputs)
    place = _positions(backend, rule.task.x, outputs[-1].shape[-2])
    dshare, doffset = _push(rule, tangents)
    return backend.xp.sum(rule.task.weights * dshare[..., :-1, :] * place, axis=-2), doffset


def _rank_vjp(
    backend: Backend, inputs: tuple[Any, ...], outputs: Arrays, cotangents: Inputs, needed: tuple[bool, ...]
) -> Inputs:
    xp = backend.xp
    ubar, c = cotangents
    rule = _linearize(backend, inputs, outputs)
    if ubar is not None:
        place = _positions(backend, rule.task.x, outputs[-1].shape[-2])
        place = xp.concat([place, place[..., -1:, :]], axis=-2)
        ubar = rule.task.weights * xp.expand_dims(ubar, axis=-2) * place
    xbar, taubar, _, _ = rule.pull(ubar, c)
    return xbar, _one(xp, taubar, inputs[1]), None, None


def _rank_forms(xp: Any, inputs: tuple[Any, ...], *, rows: int, ranks: tuple[int, ...] | None) -> tuple[Form, ...]:
    x, row = inputs[0], _per_row(inputs, rows)
    return Form(x.shape, x.dtype), row, row


soft_rank = Primitive(
    "soft_rank",
    _rank_forward,
    _rank_forms,
    _rank_jvp,
    _rank_vjp,
    results=("rank",),
    state=("offset",),
    constants=("reference",),
)
