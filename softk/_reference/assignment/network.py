r"""The mass that moves where the capacities or the weights change, for links between the groups of any size.

Two groups are linked by W_jl = sum_i a_i P_ij P_il. Near the hard limit a link may be exp(-1000) of another one, and
yet all mass that some groups gain must pass it. The potentials would then be of the order of exp(1000), and the small
differences of the potentials on either side of the link would be lost in them. Therefore no potential is formed, only
the mass that each link moves, which the mass that moves in all bounds.

**Elimination.** The groups are eliminated one after the other. Group k hands what it gains to the groups j > k in the
parts p_j = W_kj / sum_l W_kl, and the link of j and l grows by m_jl = W_kj W_kl / sum_l W_kl. Nothing is subtracted
(Grassmann, Taksar and Heyman). The links are logarithms, so none underflows.

**The flows.** Let H_kj be the flow from j to k through their link, as it is when the first of them is eliminated.
Backwards, if c_k is what group k gains or was handed,

    H_kj = p_j c_k + sum_l (m_lj / W_lj) H_lj,   with the link W_lj as it is at the end,

because a part of the flow from j to l goes over k. All factors are at most 1. Item i, whose largest share is that of
group b, moves X_il = a_i P_il P_ib / W_lb H_lb / P_ib, of which P_ij X_il comes from each group j.

`spread` is this map, and `gather` its transpose, which makes potentials: an average of the differences of its argument.
Both are corrected by what they lack, because the logarithm of a tiny link is rounded.
"""

from __future__ import annotations

import math
from typing import Any

from softk._reference.threshold.limits import limits
from softk.backend import Array, Backend

from .system import Problem, Shares, at, column, group_index

#: The largest number of elements of the array of the shares of each item in two groups.
BLOCK = 2**20
#: The solutions, each of which corrects the one before.
ROUNDS = 2


class Network:
    """The links between the groups at one point.

    Parameters
    ----------
    backend : Backend
        The framework of the arrays.
    problem : Problem
        The problem.
    found : Shares
        Its shares.
    offset : array
        The offset of the groups (..., 1, K), which belongs to the shares.
    """

    def __init__(self, backend: Backend, problem: Problem, found: Shares, offset: Array) -> None:
        self.backend, self.xp, self.problem, self.found = backend, backend.xp, problem, found
        xp, weights, self.groups = self.xp, problem.weights, group_index(backend, found.share, found.best.dtype)
        # The logarithm of a share that is 0. A sum of six of them is finite.
        none = limits(xp, weights.dtype).largest / -1024.0
        exponent = xp.where(problem.allowed, found.apart + offset, none)
        logs = xp.maximum(exponent - _log_sum(backend, exponent, -1), none)
        weighted = logs + xp.where(weights > 0.0, xp.log(xp.where(weights > 0.0, weights, 1.0)), none)
        self.links, self.logs = self.eliminated(self.all_links(logs, weighted))
        self.parts = [xp.exp(part) for part in self.logs]
        best = xp.broadcast_to(found.best, logs.shape)
        own = best == self.groups
        self.own = xp.astype(own, logs.dtype)
        # The product may be of a lower precision, which the logarithms of tiny links do not stand.
        link = xp.matmul(self.own, self.links)
        exact = xp.take_along_axis(backend.constant(self.links), best, axis=-2)
        link = link + backend.constant(exact - link)
        # a_i P_il / W_lb, which 1 / P_ib bounds
        part = xp.exp(xp.minimum(weighted - link, 1.0 + math.log(logs.shape[-1])))
        self.part = xp.where(problem.allowed & (weights > 0.0) & ~own, part, 0.0)

    def all_links(self, logs: Array, weighted: Array) -> Array:
        """The logarithms of the links (..., K, K). The diagonal has no meaning."""
        xp, (items, groups) = self.xp, logs.shape[-2:]
        shares = xp.expand_dims(logs, axis=-3)

        def block(rows: Array) -> tuple[Array, ...]:
            return (_log_sum(self.backend, xp.expand_dims(rows, axis=-1) + shares, -2)[..., 0, :],)

        rows = max(1, min(groups, BLOCK // (items * groups)))
        return self.backend.map_rows(block, rows, xp.matrix_transpose(weighted))[0]

    def eliminated(self, links: Array) -> tuple[Array, list[Array]]:
        """The logarithms of the links, each as it is when the first of its groups is eliminated, and those of p."""
        xp = self.xp
        # Below all links, for the groups that are eliminated. All arrays keep their shapes: compilers take long for
        # loops of shapes that shrink.
        gone = limits(xp, links.dtype).largest / -16.0
        parts = []
        for k in range(links.shape[-1] - 1):
            row = xp.where(self.groups > k, links[..., k : k + 1, :], gone)
            parts.append(row - _log_sum(self.backend, row, -1))
            grown = xp.matrix_transpose(row) + parts[-1]
            most = xp.maximum(links, grown)
            grown = most + xp.log1p(xp.exp(xp.minimum(links, grown) - most))
            links = xp.where(self.after(k), grown, links)
        return links, parts

    def after(self, k: int) -> Array:
        """The pairs of groups after group k."""
        after = self.groups > k
        return after & self.xp.matrix_transpose(after)

    def back(self, k: int) -> Array:
        """m / W (..., K, K) of the pairs of groups after group k, and 0 for the others."""
        xp = self.xp
        grown = xp.matrix_transpose(self.links[..., k : k + 1, :]) + self.logs[k] - self.links
        return xp.where(self.after(k), xp.exp(xp.minimum(grown, 0.0)), 0.0)

    def spread(self, gained: Array) -> Array:
        """The change of the plan (..., B, K) whose rows sum to 0 and whose columns sum to `gained` (..., 1, K)."""
        plan = self._spread(gained)
        for _ in range(ROUNDS - 1):
            plan = plan + self._spread(gained - column(self.xp, plan))
        return plan

    def gather(self, u: Array) -> Array:
        """The cotangent (..., 1, K) of `gained` for the cotangent u of the plan."""
        potentials = self._gather(u)
        for _ in range(ROUNDS - 1):
            potentials = potentials + self._gather(u - potentials)
        return potentials

    def _spread(self, gained: Array) -> Array:
        xp, groups = self.xp, self.groups
        for k, part in enumerate(self.parts):
            gained = gained + part * gained[..., k : k + 1]
        flows = xp.zeros_like(self.links)
        for k in range(len(self.parts) - 1, -1, -1):
            row = self.parts[k] * gained[..., k : k + 1] + xp.sum(self.back(k) * flows, axis=-2, keepdims=True)
            flows = xp.where(groups == k, -xp.matrix_transpose(row), flows)
            flows = xp.where(xp.matrix_transpose(groups) == k, row, flows)
        moved = self.part * xp.matmul(self.own, xp.matrix_transpose(flows))
        return moved - self.found.share * xp.sum(moved, axis=-1, keepdims=True)

    def _gather(self, u: Array) -> Array:
        xp, groups = self.xp, self.groups
        u = u - at(xp, u, self.found.best)
        moved = self.part * (u - xp.sum(self.found.share * u, axis=-1, keepdims=True))
        flows = xp.matmul(xp.matrix_transpose(self.own), moved)
        flows = xp.matrix_transpose(flows) - flows
        potentials = xp.zeros_like(self.problem.masses)
        for k, part in enumerate(self.parts):
            row = flows[..., k : k + 1, :]
            potentials = xp.where(groups == k, xp.sum(part * row, axis=-1, keepdims=True), potentials)
            flows = flows + self.back(k) * (row - xp.matrix_transpose(row))
        for k in range(len(self.parts) - 1, -1, -1):
            handed = xp.sum(self.parts[k] * potentials, axis=-1, keepdims=True)
            potentials = xp.where(groups == k, potentials + handed, potentials)
        return potentials


def _log_sum(backend: Backend, values: Array, axis: int) -> Array:
    """log(sum(exp(values))) of finite values."""
    xp: Any = backend.xp
    most = backend.constant(xp.max(values, axis=axis, keepdims=True))
    return most + xp.log(xp.sum(xp.exp(values - most), axis=axis, keepdims=True))
