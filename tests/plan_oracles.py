"""Independent references for transport plans: what softk must compute, by other means and sharing no code with it.

`Transported` solves one slice of sum_i a_i softmax_j((2 x_i y_j - y_j^2 + g_j) / epsilon) = c_j for the potentials g by
Newton's method with a line search along falling temperatures, and differentiates it by the implicit function theorem:
all in the arithmetic of one's choice, mpmath with 120 digits or NumPy's long double. softk solves for the boundaries
between neighboring anchors, and never forms g. `Ladder` makes sorting and ranking of it. `sinkhorn` is the algorithm
of the paper in the log domain, and `pot` that of the POT library.

Inputs are taken as they are: round them to the dtype under test first.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

import numpy as np
import pytest

from softk.testing import EXACT, LONG, Arithmetic

__all__ = ["EXACT", "LONG", "Ladder", "Transported", "pot", "sinkhorn"]

#: The arguments of a transport problem that have derivatives.
ARGUMENTS = ("x", "anchors", "marginals", "epsilon", "weights")


class Transported:
    """One slice of the transport problem: the plan (n, m) and its derivatives.

    Needs finite scores among those that are kept, and marginals of which two are positive. An anchor whose marginal is
    0 takes nothing.
    """

    def __init__(
        self,
        x: np.ndarray,
        anchors: np.ndarray,
        marginals: np.ndarray,
        epsilon: float,
        weights: np.ndarray | None = None,
        where: np.ndarray | None = None,
        arithmetic: Arithmetic = EXACT,
    ) -> None:
        self.arithmetic, number = arithmetic, arithmetic.array
        self.kept = np.ones(np.shape(x), dtype=bool) if where is None else np.asarray(where)
        self.taken = np.asarray(marginals) > 0
        self.x = number(np.asarray(x)[self.kept])
        self.a = number((np.ones(np.shape(x)) if weights is None else np.asarray(weights))[self.kept])
        self.y = number(np.asarray(anchors)[self.taken])
        self.marginals = number(np.asarray(marginals)[self.taken])
        self.c = self.marginals * self.a.sum() / self.marginals.sum()
        self.epsilon = number(epsilon)[()]
        self.g = self._solve()
        self.share = self._shares(self.g, self.epsilon)

    # -- the solution

    def _shares(self, g: np.ndarray, epsilon: Any) -> np.ndarray:
        """The softmax of each score's row."""
        exponent = (2 * self.x[:, None] * self.y - self.y**2 + g) / epsilon
        share = self.arithmetic.exp(exponent - exponent.max(axis=1)[:, None])
        return share / share.sum(axis=1)[:, None]

    def _hessian(self, share: np.ndarray, epsilon: Any) -> np.ndarray:
        """d(sum_i a_i P_ij)/dg_l, as a Laplacian: its diagonal is the sum of the others. The last potential is 0."""
        away = (self.a[:, None] * share).T @ share
        away = away - np.diag(np.diag(away))
        return ((np.diag(away.sum(axis=1)) - away) / epsilon)[:-1, :-1]

    def _solve(self) -> np.ndarray:
        center = (max(self.x) + min(self.x)) / 2
        g = self.y**2 - 2 * center * self.y
        size = (max(self.x) - min(self.x) + self.epsilon) * (max(self.y) - min(self.y) + self.epsilon)
        epsilon = self.epsilon
        while epsilon < size:
            epsilon = 2 * epsilon
        g = g + epsilon * self.arithmetic.log(self.c)
        while True:
            g = self._newton(g - g[-1], epsilon)
            if epsilon == self.epsilon:
                break
            epsilon = epsilon / 2
        error = abs((self.a[:, None] * self._shares(g, epsilon)).sum(axis=0) - self.c)
        if not max(error) <= 1e-17 * max(len(self.x), 10) * self.c.sum():
            raise AssertionError(f"the reference did not converge: its marginals are off by {float(max(error)):.3g}")
        return g

    def _newton(self, g: np.ndarray, epsilon: Any) -> np.ndarray:
        """Until no step, however short, lessens the error any more."""
        share = self._shares(g, epsilon)
        lack = (self.c - (self.a[:, None] * share).sum(axis=0))[:-1]
        for _ in range(200):
            step = np.append(_solved(self._hessian(share, epsilon), lack[:, None])[:, 0], 0 * self.epsilon)
            length, error = 1.0, (lack**2).sum()
            while length > 1e-9:
                tried = g + length * step
                new_share = self._shares(tried, epsilon)
                new_lack = (self.c - (self.a[:, None] * new_share).sum(axis=0))[:-1]
                if (new_lack**2).sum() < (1 - 1e-4 * length) * error:
                    break
                length /= 2
            else:
                return g
            g, share, lack = tried, new_share, new_lack
            if (lack**2).sum() < 1e-220 * self.c.sum() ** 2:
                return g
        return g

    @property
    def plan(self) -> np.ndarray:
        return self._full(self.a[:, None] * self.share)

    @property
    def error(self) -> float:
        """Of the marginals."""
        return float(max(abs((self.a[:, None] * self.share).sum(axis=0) - self.c)))

    @property
    def potentials(self) -> np.ndarray:
        """0 at the lowest anchor that takes anything, -inf at those that take nothing."""
        full = np.full(self.taken.shape, -np.inf)
        full[self.taken] = np.asarray(self.g - self.g[np.argmin(self.y)], dtype=float)
        return full

    def _full(self, values: np.ndarray) -> np.ndarray:
        full = np.zeros((*values.shape[:-2], *self.kept.shape, *self.taken.shape))
        full[..., np.flatnonzero(self.kept)[:, None], np.flatnonzero(self.taken)] = np.asarray(values, dtype=float)
        return full

    # -- its derivatives

    def rates(self, tangents: dict[str, np.ndarray]) -> np.ndarray:
        """Tangents of the kept part of the plan (D, ...), along D directions at once, in the own arithmetic."""
        dshare, _, da = self._rates(tangents)
        return da[:, :, None] * self.share + self.a[:, None] * dshare

    def _rates(self, tangents: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tangents of the shares, of the potentials and of the weights."""
        number, zero = self.arithmetic.array, 0 * self.epsilon
        tangents = {name: number(values) for name, values in tangents.items()}
        count = len(next(iter(tangents.values())))
        x, y, a, share, epsilon = self.x, self.y, self.a, self.share, self.epsilon

        dx = tangents["x"][:, self.kept] if "x" in tangents else np.full((count, len(x)), zero)
        dy = tangents["anchors"][:, self.taken] if "anchors" in tangents else np.full((count, len(y)), zero)
        da = tangents["weights"][:, self.kept] if "weights" in tangents else np.full((count, len(x)), zero)
        db = tangents["marginals"][:, self.taken] if "marginals" in tangents else np.full((count, len(y)), zero)
        depsilon = tangents.get("epsilon", np.full(count, zero))

        sums, total = self.marginals.sum(), a.sum()
        dc = db * (total / sums) + self.marginals * ((da.sum(axis=1) - total * db.sum(axis=1) / sums) / sums)[:, None]
        exponent = (2 * x[:, None] * y - y**2 + self.g) / epsilon
        moved = 2 * (dx[:, :, None] * y + (x[:, None] - y) * dy[:, None, :]) / epsilon
        moved = moved - exponent * (depsilon / epsilon)[:, None, None]
        held = share * (moved - (share * moved).sum(axis=2)[:, :, None])  # dP at constant g
        lack = dc - (da[:, :, None] * share + a[:, None] * held).sum(axis=1)
        dg = _solved(self._hessian(share, epsilon), lack[:, :-1].T).T
        dg = np.concatenate([dg, np.full((count, 1), zero)], axis=1)
        moved = moved + dg[:, None, :] / epsilon
        return share * (moved - (share * moved).sum(axis=2)[:, :, None]), dg, da

    def shares_at(self, x: np.ndarray) -> np.ndarray:
        """The shares of scores that have no weight."""
        exponent = (2 * x[:, None] * self.y - self.y**2 + self.g) / self.epsilon
        share = self.arithmetic.exp(exponent - exponent.max(axis=1)[:, None])
        return share / share.sum(axis=1)[:, None]

    def rates_at(self, x: np.ndarray, dx: np.ndarray, tangents: dict[str, np.ndarray]) -> np.ndarray:
        """Their tangents (D, ...), if the scores move by dx (D, ...) and the arguments by the tangents."""
        _, dg, _ = self._rates(tangents)
        share = self.shares_at(x)
        exponent = (2 * x[:, None] * self.y - self.y**2 + self.g) / self.epsilon
        moved = (2 * dx[:, :, None] * self.y + dg[:, None, :]) / self.epsilon
        if "epsilon" in tangents:
            moved = moved - exponent * (tangents["epsilon"] / self.epsilon)[:, None, None]
        return share * (moved - (share * moved).sum(axis=2)[:, :, None])

    def jvp(self, **tangents: Any) -> np.ndarray:
        """The tangent of the plan along one direction."""
        return self._full(self.rates({name: np.asarray(value)[None] for name, value in tangents.items()}))[0]

    def jacobian(self, name: str) -> np.ndarray:
        """The derivatives of the plan with respect to each entry of one argument, which come first."""
        sizes = {"x": self.kept.size, "weights": self.kept.size, "epsilon": 1}
        size = sizes.get(name, self.taken.size)
        directions = np.ones(1) if name == "epsilon" else np.eye(size)
        return self._full(self.rates({name: directions}))

    def vjp(self, u: np.ndarray, names: tuple[str, ...] = ARGUMENTS) -> dict[str, np.ndarray]:
        """Cotangents from that of the plan. No transposed rule is involved: only the Jacobian."""
        found = {name: np.tensordot(self.jacobian(name), np.asarray(u, dtype=float), 2) for name in names}
        return {name: values[0] if name == "epsilon" else values for name, values in found.items()}


class Ladder:
    """One slice of a sorted top-k, a sort or a ranking, as the transport to evenly spaced anchors.

    `rows` anchors of mass `unit` and as far apart, the highest first, and one more below for the rest. The weights are
    divided by their mean.
    """

    def __init__(
        self,
        x: np.ndarray,
        rows: int,
        epsilon: float,
        *,
        unit: float = 1.0,
        largest: bool = True,
        weights: np.ndarray | None = None,
        where: np.ndarray | None = None,
        arithmetic: Arithmetic = EXACT,
    ) -> None:
        self.sign = 1.0 if largest else -1.0
        self.kept = np.ones(np.shape(x), dtype=bool) if where is None else np.asarray(where)
        self.rows, self.unit, self.number = rows, unit, arithmetic.array
        self.count = int(np.count_nonzero(self.kept))
        rest = float(self.count) - rows * unit
        masses = np.asarray([unit] * rows + [rest if rest > 1e-9 else 0.0])
        x = self.sign * np.where(self.kept, x, 0.0).astype(float)
        self.transported = Transported(
            x, unit * np.arange(rows, -1.0, -1.0), masses, epsilon, weights, self.kept, arithmetic
        )

    @property
    def _scale(self) -> Any:
        """The inverse of the mean weight."""
        return self.count / self.transported.a.sum()

    def _of_rows(self, values: np.ndarray) -> np.ndarray:
        """The part of the anchors that are rows, as floats, with zeros for the scores that are not kept."""
        full = np.zeros((*values.shape[:-2], self.rows, self.kept.size))
        full[..., self.kept] = np.asarray(np.swapaxes(values, -1, -2)[..., : self.rows, :], dtype=float)
        return full

    # -- the results

    @property
    def assignment(self) -> np.ndarray:
        return self._of_rows(self._scale * self.transported.a[:, None] * self.transported.share)

    def _values(self) -> np.ndarray:
        """The means of the anchors, the largest first, in the own arithmetic."""
        of = self.transported
        return self._scale * (of.a * of.x) @ of.share[:, : self.rows] / self.unit

    @property
    def values(self) -> np.ndarray:
        return self.sign * np.asarray(self._values(), dtype=float)

    @property
    def ranks(self) -> np.ndarray:
        """0 at the highest anchor. Interpolated, if there are fewer anchors than scores."""
        if self.rows == self.kept.size:
            return np.arange(self.rows) @ self._of_rows(self.transported.share)
        x, (nodes, ranks) = self.transported.x, self._nodes()
        above, place = self._places(nodes)
        found = np.zeros(self.kept.size)
        found[self.kept] = np.asarray((1 - place) * ranks[above] + place * ranks[above + 1], dtype=float)
        assert len(x) == self.kept.size, "the ranks of items that are left out are not computed"
        return found

    def _ranks_of_anchors(self) -> np.ndarray:
        """Those that they give to the nodes (m + 2, m)."""
        x = self.transported.x
        middle = self.unit * (np.arange(self.rows) + 0.5) - 0.5
        ranks = np.tile(middle, (self.rows + 2, 1))
        found = self.number(ranks)
        weights, zero = self._scale * self.transported.a, 0 * self.transported.epsilon
        ties = [weights[x == end].sum() for end in (max(x), min(x))]
        found[0, 0] = found[0, 0] - max((self.unit - ties[0]) / 2, zero)
        found[-1, -1] = found[-1, -1] + max((self.unit - ties[1]) / 2, zero)
        return found

    def _nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """The scores and the ranks of the nodes."""
        x = self.transported.x
        nodes = np.concatenate([[max(x)], self._values(), [min(x)]])
        share = self.transported.shares_at(nodes)[:, : self.rows]
        return nodes, (share * self._ranks_of_anchors()).sum(axis=1)

    def _places(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The last node that is not below each score, and how far the score is to the next one, from 0 to 1."""
        x = self.transported.x
        above = np.asarray([min(np.count_nonzero(nodes >= value) - 1, self.rows) for value in x])
        return above, (nodes[above] - x) / (nodes[above] - nodes[above + 1])

    # -- their derivatives

    def jacobians(self, name: str) -> dict[str, np.ndarray]:
        """The derivatives of the three results with respect to each entry of an argument, which come first."""
        of, directions = self.transported, np.ones(1) if name == "epsilon" else np.eye(self.kept.size)
        tangents = {name: self.number(self.sign * directions if name == "x" else directions)}
        dshare, _, da = of._rates(tangents)
        scale, zero = self._scale, 0 * of.epsilon
        weights, dweights = scale * of.a, scale * (da - of.a * (da.sum(axis=1) / of.a.sum())[:, None])
        dx = tangents["x"][:, self.kept] if name == "x" else np.full((len(directions), len(of.x)), zero)
        moved = dweights[:, :, None] * of.share + weights[:, None] * dshare
        dvalues = (of.x[:, None] * moved + (weights * dx)[:, :, None] * of.share).sum(axis=1)[
            :, : self.rows
        ] / self.unit
        found = {"assignment": self._of_rows(moved), "values": self.sign * np.asarray(dvalues, dtype=float)}
        if self.rows == self.kept.size:
            ranks = np.einsum("j,dji->di", np.arange(self.rows), self._of_rows(dshare))
        else:
            ranks = self._interpolated(dx, dvalues, dweights, tangents)
        return found | {"ranks": ranks}

    def _interpolated(
        self, dx: np.ndarray, dvalues: np.ndarray, dweights: np.ndarray, tangents: dict[str, np.ndarray]
    ) -> np.ndarray:
        of = self.transported
        nodes, ranks = self._nodes()
        above, place = self._places(nodes)
        ends = [of.x == end for end in (max(of.x), min(of.x))]
        outermost = [dx[:, end].sum(axis=1)[:, None] / np.count_nonzero(end) for end in ends]
        dnodes = np.concatenate([outermost[0], dvalues, outermost[1]], axis=1)
        dranks = (of.rates_at(nodes, dnodes, tangents)[:, :, : self.rows] * self._ranks_of_anchors()).sum(axis=2)
        # The ranks of the outermost anchors depend on the weights of the outermost scores, unless these fill them.
        weights, share = self._scale * of.a, of.shares_at(nodes)
        for k, j, end, sign in ((0, 0, ends[0], 0.5), (-1, self.rows - 1, ends[1], -0.5)):
            if weights[end].sum() < self.unit:
                dranks[:, k] = dranks[:, k] + sign * share[k, j] * dweights[:, end].sum(axis=1)
        width = nodes[above] - nodes[above + 1]
        dplace = (dnodes[:, above] - dx - place * (dnodes[:, above] - dnodes[:, above + 1])) / width
        moved = (1 - place) * dranks[:, above] + place * dranks[:, above + 1]
        found = moved + dplace * (ranks[above + 1] - ranks[above])
        # A score that equals a node, where the ranks have a kink, has the derivative that the node has.
        still = {"epsilon": self.number(np.zeros(1))}
        shares = of.rates_at(nodes, self.number(np.ones((1, len(nodes)))), still)[0, :, : self.rows]
        slopes = (shares * self._ranks_of_anchors()).sum(axis=1)
        for k, node in enumerate(nodes):
            for i in np.flatnonzero(abs(of.x - node) <= 1e-15 * max(abs(of.x))):
                found[:, i] = dranks[:, k] + slopes[k] * (dx[:, i] - dnodes[:, k])
        return np.asarray(found, dtype=float)

    def jvp(self, **tangents: Any) -> dict[str, np.ndarray]:
        """The tangents of the three results. An argument without a tangent does not move."""
        found: dict[str, Any] = {"assignment": 0.0, "values": 0.0, "ranks": 0.0}
        for name, value in tangents.items():
            for part, blocks in self.jacobians(name).items():
                found[part] = found[part] + np.tensordot(np.atleast_1d(value), blocks, 1)
        return found

    def vjp(self, names: tuple[str, ...] = ("x", "epsilon"), **cotangents: np.ndarray) -> dict[str, Any]:
        found = {}
        for name in names:
            blocks = self.jacobians(name)
            found[name] = sum(np.tensordot(blocks[part], u, u.ndim) for part, u in cotangents.items())
        return {name: values[0] if name == "epsilon" else values for name, values in found.items()}

    @cached_property
    def error(self) -> float:
        return self.transported.error


def _solved(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The solution of linear equations, in the arithmetic of their entries, by elimination with pivots."""
    size = len(matrix)
    table = np.concatenate([matrix, right], axis=1)
    for i in range(size):
        pivot = i + int(np.argmax(abs(table[i:, i])))
        table[[i, pivot]] = table[[pivot, i]]
        for j in range(i + 1, size):
            table[j, i:] = table[j, i:] - table[i, i:] * (table[j, i] / table[i, i])
    for i in reversed(range(size)):
        table[i, size:] = (table[i, size:] - table[i, i + 1 : size] @ table[i + 1 : size, size:]) / table[i, i]
    return table[:, size:]


# --- Sinkhorn's algorithm, twice


def sinkhorn(
    x: np.ndarray,
    anchors: np.ndarray,
    marginals: np.ndarray,
    epsilon: float,
    weights: np.ndarray | None = None,
    iterations: int = 1_000_000,
) -> np.ndarray:
    """The plan (n, m) by the algorithm of the paper in the log domain, run until its marginals hold to 1e-13."""
    a = np.ones(len(x)) if weights is None else np.asarray(weights)
    a, x, positions = a[a > 0], np.asarray(x), np.asarray(anchors)
    kept = np.ones(len(x), dtype=bool) if weights is None else np.asarray(weights) > 0
    c = np.asarray(marginals) * (a.sum() / np.sum(marginals))
    cost = (x[kept][:, None] - positions) ** 2
    g = np.zeros(len(positions))
    for _ in range(iterations):
        f = epsilon * (np.log(a) - np.logaddexp.reduce((g - cost) / epsilon, axis=1))
        plan = np.exp((f[:, None] + g - cost) / epsilon)
        if np.max(np.abs(plan.sum(axis=0) - c)) <= 1e-13 * a.sum():
            full = np.zeros((len(x), len(positions)))
            full[kept] = plan
            return full
        g = epsilon * (np.log(c) - np.logaddexp.reduce((f[:, None] - cost) / epsilon, axis=0))
    raise AssertionError("Sinkhorn's iteration did not converge")


def pot(
    x: np.ndarray, anchors: np.ndarray, marginals: np.ndarray, epsilon: float, weights: np.ndarray | None = None
) -> np.ndarray:
    """The plan (n, m) of the POT library."""
    for name in ("PYTORCH", "JAX", "CUPY", "TENSORFLOW"):  # it would import every framework that it finds
        os.environ.setdefault(f"POT_BACKEND_DISABLE_{name}", "1")
    ot = pytest.importorskip("ot", reason="POT is not installed")

    a = np.ones(len(x)) if weights is None else np.asarray(weights)
    c = np.asarray(marginals) * (a.sum() / np.sum(marginals))
    cost = (np.asarray(x)[:, None] - np.asarray(anchors)) ** 2
    options = {"numItermax": 100_000, "stopThr": 1e-13, "warn": True}
    found: np.ndarray = ot.sinkhorn(a, c, cost, epsilon, method="sinkhorn_log", **options)
    return found


# --- balanced assignments


class Assigned:
    """One slice of a balanced assignment: the plan (B, K) and its derivatives, in the arithmetic of one's choice.

    Newton's method with a line search on the potentials in the units of the scores, along falling temperatures. Every
    item needs an allowed group. A group whose capacity is 0 takes nothing.
    """

    #: The arguments that have derivatives.
    ARGUMENTS = ("scores", "capacities", "epsilon", "weights")

    def __init__(
        self,
        scores: np.ndarray,
        capacities: np.ndarray | None = None,
        epsilon: float = 0.1,
        weights: np.ndarray | None = None,
        where: np.ndarray | None = None,
        arithmetic: Arithmetic = EXACT,
    ) -> None:
        self.arithmetic, number = arithmetic, arithmetic.array
        self.shape = scores.shape
        capacities = np.ones(self.shape[1]) if capacities is None else np.asarray(capacities)
        self.taken = capacities > 0
        allowed = np.isfinite(scores) if where is None else np.isfinite(scores) & where
        self.allowed = allowed[:, self.taken]
        self.scores = number(np.where(self.allowed, scores[:, self.taken], 0.0))
        self.a = number(np.ones(self.shape[0]) if weights is None else np.asarray(weights))
        self.capacities = number(capacities[self.taken])
        self.c = self.capacities * self.a.sum() / self.capacities.sum()
        self.epsilon = number(epsilon)[()]
        self.u = self._solve()
        self.share = self._shares(self.u, self.epsilon)

    def _shares(self, u: np.ndarray, epsilon: Any) -> np.ndarray:
        exponent = (self.scores + u) / epsilon
        top = np.asarray([max(row[allowed]) for row, allowed in zip(exponent, self.allowed, strict=True)])
        share = self.arithmetic.exp(np.where(self.allowed, exponent - top[:, None], 0 * self.epsilon))
        share = np.where(self.allowed, share, 0 * self.epsilon)
        return share / share.sum(axis=1)[:, None]

    def _hessian(self, share: np.ndarray) -> np.ndarray:
        links = (self.a[:, None] * share).T @ share
        links = links - np.diag(np.diag(links))
        return (np.diag(links.sum(axis=1)) - links)[:-1, :-1]

    def _lack(self, share: np.ndarray) -> np.ndarray:
        return self.c - (self.a[:, None] * share).sum(axis=0)

    def _solve(self) -> np.ndarray:
        zero = 0 * self.epsilon
        u, epsilon = np.full(len(self.c), zero), self.epsilon
        while epsilon < self.scores.max() - self.scores.min():
            epsilon = 2 * epsilon
        while True:
            share = self._shares(u, epsilon)
            for _ in range(100):
                lack = self._lack(share)
                error = (lack**2).sum()
                if error < 1e-200 * self.c.sum() ** 2 or len(u) == 1:
                    break
                step = np.append(_solved(self._hessian(share), lack[:-1, None])[:, 0], zero) * epsilon
                for i in range(40):
                    tried = u + step / 2**i
                    share = self._shares(tried, epsilon)
                    if (self._lack(share) ** 2).sum() < error:
                        u = tried
                        break
                else:
                    break
            if epsilon == self.epsilon:
                break
            epsilon = epsilon / 2
        if not max(abs(self._lack(self._shares(u, epsilon)))) <= 1e-17 * max(self.shape) * self.c.sum():
            raise AssertionError("the reference did not converge")
        return u

    def _full(self, values: np.ndarray) -> np.ndarray:
        full = np.zeros((*values.shape[:-2], *self.shape))
        full[..., self.taken] = np.asarray(values, dtype=float)
        return full

    @property
    def plan(self) -> np.ndarray:
        return self._full(self.a[:, None] * self.share)

    @property
    def potentials(self) -> np.ndarray:
        """Their mean over the groups that take something is 0."""
        full = np.full(self.shape[1], -np.inf)
        full[self.taken] = np.asarray(self.u - self.u.sum() / len(self.u), dtype=float)
        return full

    def jvp(self, **tangents: Any) -> np.ndarray:
        """The tangent of the plan along one direction."""
        return self._full(self._rate({name: self.arithmetic.array(value) for name, value in tangents.items()}))

    def _rate(self, tangents: dict[str, np.ndarray]) -> np.ndarray:
        zero, share, a = 0 * self.epsilon, self.share, self.a
        moved = np.full(share.shape, zero)
        if "scores" in tangents:
            moved = moved + tangents["scores"][:, self.taken] / self.epsilon
        if "epsilon" in tangents:
            moved = moved - (self.scores + self.u) * (tangents["epsilon"][()] / self.epsilon**2)
        moved = np.where(self.allowed, moved, zero)
        da = tangents.get("weights", np.full(len(a), zero))
        dcapacities = tangents["capacities"][self.taken] if "capacities" in tangents else np.full(len(self.c), zero)
        whole, total = self.capacities.sum(), a.sum()
        dc = dcapacities * total / whole + self.capacities * (da.sum() / whole - total * dcapacities.sum() / whole**2)

        def changed(moved: np.ndarray) -> np.ndarray:
            return a[:, None] * share * (moved - (share * moved).sum(axis=1)[:, None])

        lack = dc - (da[:, None] * share + changed(moved)).sum(axis=0)
        if len(lack) > 1:
            moved = moved + np.append(_solved(self._hessian(share), lack[:-1, None])[:, 0], zero)
        return da[:, None] * share + changed(moved)

    def vjp(self, cotangent: np.ndarray) -> dict[str, Any]:
        """Cotangents from that of the plan, by the Jacobian. No transposed rule is involved."""
        sizes = {"scores": self.shape, "capacities": self.shape[1:], "epsilon": (), "weights": self.shape[:1]}
        found = {}
        for name, shape in sizes.items():
            one = np.zeros(shape)
            values = np.zeros(shape)
            for place in np.ndindex(*shape):
                one[place] = 1.0
                values[place] = np.sum(self.jvp(**{name: one}) * cotangent)
                one[place] = 0.0
            found[name] = values
        return found
