"""Independent references beside the oracle of `softk.testing`: what softk must compute, sharing no code with it.

`curvature` and `mixed` are second derivatives by difference quotients in 120 digits, `Quantile` is made of two
thresholds, and `sinkhorn` is the algorithm of the paper itself, run to convergence.

Inputs are taken as they are: round them to the dtype under test first (`Problem.rounded`).
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import pytest

from softk.testing import EXACT, Oracle, Problem
from softk.testing import cases as kit

from .libraries import Library

#: The oracle in 120 digits, whatever the problem.
Exact = partial(Oracle, arithmetic=EXACT)


def curvature(x: np.ndarray, k: float, epsilon: float, u: np.ndarray) -> np.ndarray:
    """The Hessian of the mask times u, by difference quotients of the first derivative in 120 digits."""
    step = EXACT.array(1e-30)[()]
    columns = []
    for i in range(x.size):
        near = []
        for sign in (1, -1):
            moved = EXACT.array(x)
            moved[i] = moved[i] + sign * step
            at = Exact(moved, k, epsilon)
            direct = at.v * EXACT.array(u) / at.tau
            near.append(direct - direct.sum() * at.v / at.V)
        columns.append((near[0] - near[1]) / (2 * step))
    return np.asarray(np.stack(columns), float)


def mixed(
    x: np.ndarray, k: float, epsilon: float, u: np.ndarray, weights: np.ndarray | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """How the derivatives of <u, mask> in x (n, ...) and epsilon change with k and with the weights; likewise."""
    step = EXACT.array(1e-30)[()]
    masses = EXACT.array(np.ones(x.shape) if weights is None else weights)

    def difference(dk: Any, da: Any) -> tuple[np.ndarray, np.ndarray]:
        near = []
        for sign in (step, -step):
            at = Exact(x, EXACT.array(k)[()] + sign * dk, epsilon, masses + sign * da)
            direct = at.v * EXACT.array(u) / at.tau
            by_x = direct - direct.sum() * at.p
            near.append(np.append(by_x, -(at.z * by_x).sum() / 2))
        found = np.asarray((near[0] - near[1]) / (2 * step), float)
        return found[:-1], found[-1:]

    units = np.eye(len(x), dtype=int)
    wanted = {"k": difference(1, 0 * units[0])}
    if weights is not None:
        columns = [difference(0, unit) for unit in units]
        wanted["weights"] = np.stack([c[0] for c in columns], -1), np.concatenate([c[1] for c in columns])
    return wanted


class Quantile:
    """One slice's quantile: between the thresholds at k = n - j - 1/2, j the floor and the ceiling of (n - 1) q.

    n is the sum of the weights. Where it is not whole, the last of these k would be below 1/2 and stays there.
    """

    def __init__(
        self, x: np.ndarray, q: float, epsilon: float, weights: np.ndarray | None = None, where: Any = None
    ) -> None:
        kept = np.ones(x.shape, dtype=bool) if where is None else where
        self.q = EXACT.array(q)[()]
        self.total = EXACT.array((np.ones(x.shape) if weights is None else weights)[kept]).sum()
        place = (self.total - 1) * self.q
        index = min(np.floor(place), np.ceil(self.total) - 2)
        self.fraction = place - index
        self.one, self.two = (
            Exact(x, max(self.total - index - half, EXACT.array(0.5)[()]), epsilon, weights, where)
            for half in EXACT.array([0.5, 1.5])
        )
        self.held = self.total - index < 2  # the second mass does not follow n
        self.apart = self.two.t - self.one.t

    @property
    def value(self) -> float:
        return float(self.one.t + self.fraction * self.apart)

    def jvp(self, dx: Any = None, dq: Any = 0, depsilon: Any = 0, dweights: Any = None) -> float:
        grown = EXACT.array(0 if dweights is None else dweights[self.one.kept]).sum()
        _, one = self.one.rates(dx, grown, depsilon, dweights)
        _, two = self.two.rates(dx, 0 * grown if self.held else grown, depsilon, dweights)
        moved = (self.total - 1) * EXACT.array(dq)[()] + grown * self.q
        return float(one + self.fraction * (two - one) + self.apart * moved)

    def vjp(self, b: float) -> dict[str, Any]:
        b = EXACT.array(b)[()]
        one, two = self.one.vjp(b=(1 - self.fraction) * b), self.two.vjp(b=self.fraction * b)
        found = {name: one[name] + two[name] for name in ("x", "epsilon", "weights")}
        by_total = one["k"] + (0.0 if self.held else two["k"]) + float(self.q * self.apart * b)
        found["weights"] = found["weights"] + np.where(self.one.kept, by_total, 0.0)
        return {**found, "q": float((self.total - 1) * self.apart * b)}


def sinkhorn(x: np.ndarray, k: float, epsilon: float, iterations: int = 100_000) -> np.ndarray:
    """The authors' algorithm, to convergence: n Gamma[:, 1] of the n x 2 entropic transport problem.

    Anchors 0 and 1, nu = ((n - k)/n, k/n), mu = 1/n, cost (x - y)^2; dual potentials f and g in the log domain.
    """
    n = len(x)
    cost = (x[:, None] - np.asarray([0.0, 1.0])) ** 2
    log_mu, log_nu = -np.log(n), np.log(np.asarray([(n - k) / n, k / n]))
    g = np.zeros(2)
    for _ in range(iterations):
        f = epsilon * (log_mu - np.logaddexp.reduce((g - cost) / epsilon, axis=1))
        plan = np.exp((f[:, None] + g - cost) / epsilon)
        if abs(n * plan[:, 1].sum() - k) <= 1e-13 * n:
            return n * plan[:, 1]
        g = epsilon * (log_nu - np.logaddexp.reduce((f[:, None] - cost) / epsilon, axis=0))
    raise AssertionError("Sinkhorn's iteration did not converge")


@cache
def dominated(dtype: str, weighted: bool = False) -> Problem:
    """One item has nearly all of the derivative, as the problem is in a dtype."""
    return kit.dominated(dtype, weighted)


def assert_rows_close(found: Any, wanted: Any, dtype: str, scale: Any = None) -> None:
    """Relative to the largest entry of each row, or to a number a row, by the tolerance of derivatives."""
    found, wanted = (np.asarray(value, float).reshape(len(value), -1) for value in (found, wanted))
    assert found.shape == wanted.shape
    error = np.abs(found - wanted).max(axis=1) / (np.abs(wanted).max(axis=1) if scale is None else scale)
    np.testing.assert_array_less(error, {"float64": 1e-11, "float32": 2e-5}[dtype])


#: What masks, derivatives and the agreement of the backends are measured on.
PROBLEMS = {problem.name: problem for problem in kit.smooth()}

#: Those that a library runs which compiles every call anew.
FEW = ("plain", "weighted", "where")


@cache
def problem(name: str, dtype: str) -> Problem:
    """A problem as it is in a dtype, solved once for all libraries."""
    return PROBLEMS[name].rounded(dtype)


def problem_for(lib: Library, name: str, dtype: str) -> Problem:
    """The same, unless a library that compiles would take too long over it: JAX runs few, under an outer jit fewer."""
    single = dtype == "float32" and ("traced" in lib.tags or name != "plain")
    if "jax" in lib.name and (name not in FEW or single):
        pytest.skip("compiling takes too long; run by the other libraries")
    return problem(name, dtype)
