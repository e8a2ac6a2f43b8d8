"""Soft ranks: the mean rank of the anchors to which a score is transported, 0 for the highest.

The anchors are those of `sorting`, and so are the inputs and the outputs.

**One anchor for each score.** Anchor j has the rank j, and rank_i = sum_j P_ij j.

**Few anchors.** Anchor j takes the scores of the ranks from j n / m - 1/2 to (j + 1) n / m - 1/2, and has the rank c_j
in their middle. Let S(x) = sum_j P_j(x) c_j. If a score shares its mass with many anchors, S is a smooth function of
the score. If each score goes to one anchor, S is a staircase. It is then accurate only in the middle of a step, which
is at the sorted value v_j, the mean of the scores of anchor j. So the ranks are linear between the nodes (v_j, S(v_j)).
Two more nodes are the largest and the smallest finite score. For these two, the rank of the first (last) anchor is the
first (last) rank that it takes, not c_j.
"""

from __future__ import annotations

import math
from typing import Any

from softk._reference.threshold.limits import clip, limits, safe_denominator
from softk._reference.threshold.problem import logits
from softk.backend import Array, Backend, Form, Inputs, Primitive

from . import sorting
from .system import Task, log_odds, plan, running, sides

Arrays = tuple[Array, ...]

#: Differences of scores are formed in this unit, so that none overflows.
UNIT = 0.25
#: A score equals a node if they differ by at most so many roundings of the largest score.
CLOSE = 4.0


class _Nodes:
    """The nodes (..., m + 2): the largest score, the sorted values and the smallest score, with their ranks."""

    def __init__(
        self,
        backend: Backend,
        task: Task,
        means: sorting.Means,
        share: Array,
        reference: Array,
        offset: Array,
        *,
        is_weighted: bool,
    ) -> None:
        self.xp, self.is_weighted = backend.xp, is_weighted
        xp = self.xp
        x = task.x
        self.task, self.device, self.tau = task, backend.device(x), task.tau[..., :-1, :]
        finite = xp.abs(x) < math.inf
        top = xp.max(xp.where(finite, x, -math.inf), axis=-1, keepdims=True)
        low = xp.min(xp.where(finite, x, math.inf), axis=-1, keepdims=True)
        some = low <= top
        top, low = xp.where(some, top, 0.0), xp.where(some, low, 0.0)
        self.ends = finite & (x == top), finite & (x == low)
        # A sorted value that is infinite counts as the outermost score. The others have two parts: their sum would be
        # rounded, and a rounding may be large beside a temperature.
        self.is_top, self.is_low = means.end == math.inf, means.end == -math.inf
        outermost = self.is_top | self.is_low
        near = xp.where(self.is_top, top, xp.where(self.is_low, low, means.near))
        beyond = xp.where(outermost, 0.0, means.beyond(share))
        none = xp.zeros_like(top)
        near, beyond = xp.concat([top, near, low], axis=-1), xp.concat([none, beyond, none], axis=-1)
        ranks = self._rank(backend, near, beyond, reference, offset)
        self._interpolate(backend, clip(xp, x, low, top), finite, near, beyond, *ranks)

    def _rank(
        self, backend: Backend, near: Array, beyond: Array, reference: Array, offset: Array
    ) -> tuple[Array, Array]:
        """The ranks of the nodes, in two parts, and how fast they fall with the log-odds at each boundary.

        The first part is the rank of the node's own anchor, which is exact, and the second one is small. What
        neighboring nodes differ by is then accurate.
        """
        xp, x, rows = self.xp, self.task.x, reference.shape[-2]
        n, bound = x.shape[-1], limits(xp, x.dtype)
        apart = (xp.expand_dims(near, axis=-2) - reference) + xp.expand_dims(beyond, axis=-2)
        self.apart = logits(backend, clip(xp, apart, -bound.largest, bound.largest), 0.0, self.task.tau)
        share = plan(xp, self.apart - offset)[..., :-1, :]
        self.apart = self.apart[..., :-1, :]
        places, by_weights = self._places(backend, rows, n)
        # How the ranks of the nodes change with the weight of the +inf scores, and of the ties at both ends.
        self.by_weights = [xp.sum(share * values, axis=-2) for values in by_weights]
        own = (n / rows) * (_indices(backend, x, rows) + 0.5) - 0.5
        own = xp.concat([own[..., :1], own, own[..., -1:]], axis=-1)
        apart = xp.sum(share * (places - xp.expand_dims(own, axis=-2)), axis=-2)
        rise = places[..., 1:, :] - places[..., :-1, :]
        above, below = sides(xp, share)
        before = running(xp, above * rise)[..., 1:, :]
        behind = running(xp, below * rise, reverse=True)[..., 1:, :]
        self.fall = below * before + above * behind
        self.rate = 1.0 / xp.maximum(self.tau, 1.0 / bound.farthest)  # no larger than any other derivative
        return own, apart

    def _interpolate(
        self, backend: Backend, x: Array, finite: Array, near: Array, beyond: Array, own: Array, apart: Array
    ) -> None:
        """The interval of each score, its place there, from 0 to 1, its rank, and how fast the rank falls with it."""
        xp = self.xp
        nodes = xp.expand_dims((near + beyond)[..., 1:-1], axis=-1)
        self.interval = xp.count_nonzero(nodes > xp.expand_dims(x, axis=-2), axis=-2)
        (begin, end), (more, less) = self._around(UNIT * near), self._around(UNIT * beyond)
        # A score that equals a node up to its rounding has its rank, and the derivative of S there.
        least = (CLOSE * limits(xp, x.dtype).eps * UNIT) * xp.maximum(xp.abs(near[..., :1]), xp.abs(near[..., -1:]))
        above, below = (begin - UNIT * x) + more, (UNIT * x - end) - less
        at_begin, at_end = above <= least, below <= least
        width = xp.where(at_begin | at_end, 1.0, above + below)
        self.place = xp.where(at_begin, 0.0, xp.where(at_end, 1.0, above / width))
        (one, other), (own, next_) = self._around(apart), self._around(own)
        rise = (next_ - own) + (other - one)
        steep = xp.sum(self.fall * self.rate, axis=-2)
        at_node = xp.where(at_begin, *self._around(steep))
        slope = xp.where(at_begin | at_end, at_node, rise * (UNIT / width))
        self.slope = xp.where(finite, slope, 0.0)
        self.found = own + (one + self.place * rise)
        if backend.differentiates_operations:
            off = xp.where(at_begin, above, xp.where(at_end, -below, 0.0)) / UNIT
            self.found = self.found + self.slope * (off - backend.constant(off))

    def _places(self, backend: Backend, rows: int, n: int) -> tuple[Array, list[Array]]:
        """The ranks of the anchors, for each node (..., m, m + 2), and how they change with the weights at the ends."""
        xp, x = self.xp, self.task.x
        of_all = xp.expand_dims(_count(xp, x > -math.inf, x.dtype), axis=-1)
        of_first, *ties = (xp.expand_dims(self._weight(mask), axis=-1) for mask in (x == math.inf, *self.ends))
        edges = xp.expand_dims(_indices(backend, x, rows + 1) * (n / rows), axis=-1)
        moves = xp.astype(edges < of_first, x.dtype)
        edges = clip(xp, edges, of_first, of_all)
        begin, end = edges[..., :-1, :], edges[..., 1:, :]
        middle = 0.5 * (begin + end) - 0.5
        # Ties have their mean rank. If they fill the anchor, that is its middle.
        before, behind = (xp.maximum(0.5 * (end - begin - tied), 0.0) for tied in ties)
        at_first, at_last = (begin == of_first) & (before > 0.0), (end == of_all) & (behind > 0.0)
        is_top, is_low = xp.expand_dims(self.is_top, axis=-2), xp.expand_dims(self.is_low, axis=-2)

        def of_nodes(first: Array, middle: Array, last: Array) -> Array:
            return xp.concat([first, xp.where(is_top, first, xp.where(is_low, last, middle)), last], axis=-1)

        first, last = xp.where(at_first, middle - before, middle), xp.where(at_last, middle + behind, middle)
        places = of_nodes(first, middle, last)
        if not self.is_weighted:
            return places, []
        one, other = moves[..., :-1, :], moves[..., 1:, :]
        none, half = xp.zeros_like(middle), 0.5 * (one + other)
        by_first = of_nodes(xp.where(at_first, one, half), half, xp.where(at_last, other, half))
        by_top = of_nodes(xp.where(at_first, 0.5, none), none, none)
        return places, [by_first, by_top, of_nodes(none, none, xp.where(at_last, -0.5, none))]

    def _weight(self, mask: Array) -> Array:
        """The sum of the weights of some scores (..., 1)."""
        xp = self.xp
        return xp.sum(xp.where(mask, self.task.weights[..., 0, :], 0.0), axis=-1, keepdims=True)

    def _ends(self) -> tuple[Array, Array, Array]:
        """The scores whose weights the ranks of the nodes depend on directly."""
        return (self.task.x == math.inf, *self.ends)

    def _around(self, values: Array) -> tuple[Array, Array]:
        """What the nodes above and below each score have, of values at the nodes."""
        xp = self.xp
        above = xp.take_along_axis(values, self.interval, axis=-1)
        return above, xp.take_along_axis(values, self.interval + 1, axis=-1)

    def _gathered(self, above: Array, below: Array) -> Array:
        """The transpose of `_around`."""
        xp, size = self.xp, self.is_top.shape[-1] + 2
        nodes = xp.reshape(xp.arange(size, device=self.device), (size, 1))
        nodes = xp.broadcast_to(nodes, (*above.shape[:-1], size, 1))
        found: Any = 0.0
        for interval, values in ((self.interval, above), (self.interval + 1, below)):
            is_there = nodes == xp.expand_dims(interval, axis=-2)
            found = found + xp.sum(xp.where(is_there, xp.expand_dims(values, axis=-2), 0.0), axis=-1)
        return found

    def push(self, tangents: Inputs, dvalues: Array, doffset: Array, da: Array | None) -> Array:
        """The tangent of the ranks, from those of the inputs, sorted values, offsets and divided weights."""
        xp = self.xp
        dx, dtau, *_ = tangents
        zero = xp.zeros_like(dvalues[..., :1])
        top, low = (zero, zero) if dx is None else (self._mean(end, dx) for end in self.ends)
        dvalues = xp.where(self.is_top, top, xp.where(self.is_low, low, dvalues))
        moved = xp.concat([top, dvalues, low], axis=-1)
        dz = xp.expand_dims(moved, axis=-2) * self.rate - doffset[..., :-1, :]
        if dtau is not None:
            dz = dz - self.apart * (sorting.column(xp, dtau) * self.rate)
        ranks = -xp.sum(self.fall * dz, axis=-2)
        if da is not None:
            for end, by_weight in zip(self._ends(), self.by_weights, strict=True):
                ranks = ranks + by_weight * xp.sum(xp.where(end, da[..., 0, :], 0.0), axis=-1, keepdims=True)
        (begin, end), (first, last) = self._around(ranks), self._around(moved)
        by_place = (1.0 - self.place) * first + self.place * last
        if dx is not None:
            by_place = by_place - dx
        return (1.0 - self.place) * begin + self.place * end + self.slope * by_place

    def pull(self, ubar: Array) -> tuple[Array, Array, Array, Array, Any]:
        """Cotangents of the scores, the temperature at each boundary, the sorted values, the offsets, the weights."""
        xp = self.xp
        direct = self.slope * ubar
        above, below = 1.0 - self.place, self.place
        moved = self._gathered(above * direct, below * direct)
        of_ranks, abar = self._gathered(above * ubar, below * ubar), 0.0
        for end, by_weight in zip(self._ends(), self.by_weights, strict=False):
            abar = abar + xp.where(end, xp.sum(by_weight * of_ranks, axis=-1, keepdims=True), 0.0)
        zbar = -self.fall * xp.expand_dims(of_ranks, axis=-2)
        moved = moved + xp.sum(zbar * self.rate, axis=-2)
        taubar = -xp.sum(zbar * self.apart, axis=-1, keepdims=True) * self.rate
        own = moved[..., 1:-1]
        xbar, parts = -direct, ((self.is_top, moved[..., :1]), (self.is_low, moved[..., -1:]))
        for end, (is_end, outermost) in zip(self.ends, parts, strict=True):
            cotangent = outermost + xp.sum(xp.where(is_end, own, 0.0), axis=-1, keepdims=True)
            xbar = xbar + xp.where(end, cotangent / self._ties(end), 0.0)
        offsetbar = -xp.sum(zbar, axis=-1, keepdims=True)
        # No node shares anything with the last boundary, below which there is nothing.
        taubar, offsetbar = (xp.concat([one, xp.zeros_like(one[..., :1, :])], axis=-2) for one in (taubar, offsetbar))
        return xbar, taubar, xp.where(self.is_top | self.is_low, 0.0, own), offsetbar, abar

    def _mean(self, end: Array, values: Array) -> Array:
        xp = self.xp
        return xp.sum(xp.where(end, values, 0.0), axis=-1, keepdims=True) / self._ties(end)

    def _ties(self, end: Array) -> Array:
        xp = self.xp
        return safe_denominator(xp, _count(xp, end, self.task.x.dtype))


def _is_full(inputs: tuple[Any, ...], rows: int) -> bool:
    """Whether there is one anchor for each score."""
    return bool(rows == inputs[0].shape[-1])


def _indices(backend: Backend, x: Array, size: int) -> Array:
    """0, 1, ..., for each slice (..., size)."""
    xp = backend.xp
    return xp.broadcast_to(xp.astype(xp.arange(size, device=backend.device(x)), x.dtype), (*x.shape[:-1], size))


def _count(xp: Any, mask: Array, dtype: Any) -> Array:
    return xp.astype(xp.count_nonzero(mask, axis=-1, keepdims=True), dtype)


def _places(backend: Backend, x: Array) -> Array:
    """The ranks of n anchors (..., n, 1)."""
    return backend.xp.expand_dims(_indices(backend, x, x.shape[-1]), axis=-1)


def _nodes(
    backend: Backend, inputs: tuple[Any, ...], task: Task, share: Array, reference: Array, offset: Array
) -> _Nodes:
    means = sorting.Means(backend, task, reference, inputs[2])
    weighted = inputs[4] is not None
    return _Nodes(backend, task, means, task.weights * share, reference, offset, is_weighted=weighted)


def _forward(backend: Backend, inputs: tuple[Any, ...], *, rows: int, ranks: tuple[int, ...] | None) -> Arrays:
    xp = backend.xp
    task, reference, offset = sorting.climb(backend, inputs, rows, ranks)
    share = plan(xp, log_odds(backend, task, reference) - offset)[..., :-1, :]
    x = task.x
    if _is_full(inputs, rows):
        found = xp.sum(share * _places(backend, x), axis=-2)
    else:
        found = _nodes(backend, inputs, task, share, reference, offset).found
        first = xp.sum(xp.where(x == math.inf, task.weights[..., 0, :], 0.0), axis=-1, keepdims=True)
        found = xp.where(x == math.inf, 0.5 * (first - 1.0), found)
    # Scores of -inf are not transported. They come after all others, and share their mean rank.
    count = _count(xp, x > -math.inf, x.dtype)
    found = xp.where(x == -math.inf, 0.5 * (count + (x.shape[-1] - 1)), found)
    return xp.where(xp.isnan(offset[..., 0, :]), math.nan, found), offset, reference


def _jvp(backend: Backend, inputs: tuple[Any, ...], outputs: Arrays, tangents: Inputs) -> Arrays:
    xp = backend.xp
    *_, offset, reference = outputs
    rule = sorting.linearize(backend, inputs, outputs)
    x = rule.task.x
    da = sorting.weights_pushed(rule, inputs, tangents[4])
    dshare, doffset = sorting.push(rule, tangents, da)
    if _is_full(inputs, offset.shape[-2]):
        moved = xp.sum(dshare[..., :-1, :] * _places(backend, x), axis=-2)
        return xp.where(x == -math.inf, 0.0, moved), doffset
    share = rule.share[..., :-1, :]
    nodes = _nodes(backend, inputs, rule.task, share, reference, offset)
    dvalues = sorting.means_pushed(backend, rule, inputs, outputs, dshare, tangents[0], da)
    moved = nodes.push(tangents, dvalues, doffset, da)
    moved = xp.where(xp.abs(x) == math.inf, 0.0, moved)
    if da is not None:
        first = 0.5 * xp.sum(xp.where(x == math.inf, da[..., 0, :], 0.0), axis=-1, keepdims=True)
        moved = xp.where(x == math.inf, first, moved)
    return moved, doffset


def _vjp(
    backend: Backend, inputs: tuple[Any, ...], outputs: Arrays, cotangents: Inputs, needed: tuple[bool, ...]
) -> Inputs:
    xp = backend.xp
    ubar, c = cotangents
    *_, offset, reference = outputs
    rule = sorting.linearize(backend, inputs, outputs)
    x = rule.task.x
    if ubar is None:
        xbar, taubar, abar = sorting.pull(rule, inputs, None, c, 0.0, 0.0)
    elif _is_full(inputs, offset.shape[-2]):
        ubar = xp.expand_dims(xp.where(x == -math.inf, 0.0, ubar), axis=-2) * _places(backend, x)
        # No score is transported below the last anchor.
        xbar, taubar, abar = sorting.pull(rule, inputs, xp.concat([ubar, ubar[..., -1:, :]], axis=-2), c, 0.0, 0.0)
    else:
        nodes = _nodes(backend, inputs, rule.task, rule.share[..., :-1, :], reference, offset)
        direct, by_nodes, vbar, own, abar = nodes.pull(xp.where(xp.abs(x) == math.inf, 0.0, ubar))
        c = own if c is None else c + own
        first = 0.5 * xp.sum(xp.where(x == math.inf, ubar, 0.0), axis=-1, keepdims=True)
        abar = abar + xp.where(x == math.inf, first, 0.0)
        xbar, taubar, abar = sorting.means_pulled(backend, rule, inputs, outputs, vbar, None, c, by_nodes, abar)
        xbar = xbar + direct
    return xbar, taubar, None, None, abar


def _forms(xp: Any, inputs: tuple[Any, ...], *, rows: int, ranks: tuple[int, ...] | None) -> tuple[Form, ...]:
    x, row = inputs[0], sorting.per_row(inputs, rows)
    return Form(x.shape, x.dtype), row, row


soft_rank = Primitive(
    "soft_rank", _forward, _forms, _jvp, _vjp, results=("rank",), state=("offset",), constants=("reference",)
)
