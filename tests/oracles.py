"""Independent references: what softk must compute, by other means and sharing no code with it.

`Reference` solves sum_i a_i sigmoid((x_i - t) / tau) = k for one slice by bisection and differentiates it by the
implicit function theorem, in the arithmetic of one's choice: mpmath with 120 digits, or NumPy's long double where there
are thousands of scores. `Quantile` builds on it. `sinkhorn` is the algorithm of the paper itself, run to convergence.

Inputs are taken as they are: round them to the dtype under test first (`Problem.rounded`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import mpmath
import numpy as np
import pytest

from .libraries import Library

DIGITS = mpmath.MPContext()
DIGITS.dps = 120


@dataclass(frozen=True)
class Arithmetic:
    """Numbers, in NumPy arrays, and their exponential."""

    array: Callable[[Any], np.ndarray]
    exp: Callable[[Any], Any]
    log: Callable[[Any], Any]


_digits = np.frompyfunc(lambda value: value if isinstance(value, DIGITS.mpf) else DIGITS.mpf(float(value)), 1, 1)
EXACT = Arithmetic(
    lambda values: np.asarray(_digits(np.asarray(values)), dtype=object),
    np.frompyfunc(DIGITS.exp, 1, 1),
    np.frompyfunc(DIGITS.log, 1, 1),
)
LONG = Arithmetic(lambda values: np.asarray(values, dtype=np.longdouble), np.exp, np.log)


class Reference:
    """One slice: the threshold, the mask and their derivatives.

    Needs 0 < k < sum a over the items that `where` keeps, and finite scores among those. With F(t) the weighted sum of
    the mask m_i = sigmoid(z_i), z_i = (x_i - t) / tau, and v_i = m_i (1 - m_i), F = k gives

        dt = (sum a_i v_i (dx_i - z_i dtau) + tau (sum m_i da_i - dk)) / sum a_i v_i,
        dm_i = v_i (dx_i - dt - z_i dtau) / tau.
    """

    def __init__(
        self,
        x: np.ndarray,
        k: float,
        epsilon: float,
        weights: np.ndarray | None = None,
        where: np.ndarray | None = None,
        mode: str = "largest",
        arithmetic: Arithmetic = EXACT,
    ) -> None:
        number = self.number = arithmetic.array
        self.arithmetic = arithmetic
        self.sign = 1 if mode == "largest" else -1
        self.kept = np.ones(x.shape, dtype=bool) if where is None else np.asarray(where)
        self.x = self.sign * number(x[self.kept])
        self.a = number((np.ones(x.shape) if weights is None else weights)[self.kept])
        self.k, self.tau = number(k)[()], number(epsilon)[()] / 2
        self.solve()

    def solve(self) -> None:
        """The threshold and what depends on it."""
        self.t = self._root()
        self.z = (self.x - self.t) / self.tau
        tail = self.arithmetic.exp(-abs(self.z))
        self.m = np.where(self.z > 0, 1 / (1 + tail), tail / (1 + tail))
        self.rest = np.where(self.z > 0, tail / (1 + tail), 1 / (1 + tail))  # 1 - m
        self.v = tail / (1 + tail) ** 2
        self.V = (self.a * self.v).sum()

    def _root(self) -> Any:
        exp, log = self.arithmetic.exp, self.arithmetic.log
        x, a, k, tau = self.x, self.a, self.k, self.tau
        # All scores at the least (at the greatest) of them would put t here.
        shift = tau * log((a.sum() - k) / k)
        low, high = min(x) + shift, max(x) + shift

        def excess(t: Any) -> tuple[Any, Any]:
            """The mass less k, through the tails, for it may be far smaller than a unit of the last digit of k."""
            z = (x - t) / tau
            above = z > 0
            tail = exp(-abs(z))
            share = a * tail / (1 + tail)
            value = share[~above].sum() - share[above].sum() + (a[above].sum() - k)
            return value, (share / (1 + tail)).sum() / tau

        while high - low > tau / 4:
            middle = (low + high) / 2
            if not low < middle < high:
                break
            if excess(middle)[0] > 0:
                low = middle
            else:
                high = middle
        t = (low + high) / 2
        for _ in range(12):  # |F''| <= |F'| / tau: Newton converges quadratically from here
            value, slope = excess(t)
            t = t + value / slope
        return t

    @property
    def p(self) -> np.ndarray:
        """The derivative of the threshold in the scores."""
        return self.a * self.v / self.V

    def _items(self, values: Any) -> np.ndarray:
        full = np.zeros(self.kept.shape)
        full[self.kept] = np.asarray(values, dtype=float)
        return full

    @property
    def mask(self) -> np.ndarray:
        return self._items(self.m)

    @property
    def log_mask(self) -> np.ndarray:
        """-inf for the items that are removed."""
        found = np.where(self.kept, 0.0, -np.inf)
        found[self.kept] = np.asarray(self.arithmetic.log(self.m), dtype=float)
        return found

    @property
    def threshold(self) -> float:
        return float(self.sign * self.t)

    def rates(self, dx: Any = None, dk: Any = 0, depsilon: Any = 0, dweights: Any = None) -> tuple[Any, Any]:
        """Tangents of the mask's kept items and of the threshold, in the reference's own arithmetic."""
        nothing = np.zeros(self.kept.shape)
        dx = self.sign * self.number((nothing if dx is None else dx)[self.kept])
        da = self.number((nothing if dweights is None else dweights)[self.kept])
        dk, dtau = self.number(dk)[()], self.number(depsilon)[()] / 2
        dt = ((self.a * self.v * (dx - self.z * dtau)).sum() + self.tau * ((self.m * da).sum() - dk)) / self.V
        return self.v * (dx - dt - self.z * dtau) / self.tau, self.sign * dt

    def jvp(self, **tangents: Any) -> tuple[np.ndarray, float]:
        mask, threshold = self.rates(**tangents)
        return self._items(mask), float(threshold)

    def log_jvp(self, **tangents: Any) -> np.ndarray:
        """The tangent of the logarithm of the mask."""
        mask, _ = self.rates(**tangents)
        return self._items(mask / self.m)

    def vjp(self, u: np.ndarray | None = None, b: Any = 0, *, log: bool = False) -> dict[str, Any]:
        """Cotangents of x, k, epsilon and weights, from those of the mask (of its logarithm) and of the threshold."""
        u = self.number((np.zeros(self.kept.shape) if u is None else u)[self.kept])
        direct = (self.rest if log else self.v) * u / self.tau
        through = self.sign * self.number(b)[()] - direct.sum()  # the cotangent of t
        p = self.p
        return {
            "x": self._items(self.sign * (direct + through * p)),
            "k": float(-through * self.tau / self.V),
            "epsilon": float(-((direct + through * p) * self.z).sum() / 2),
            "weights": self._items(through * self.tau * self.m / self.V),
        }


def curvature(x: np.ndarray, k: float, epsilon: float, u: np.ndarray) -> np.ndarray:
    """The Hessian of the mask times u, by difference quotients of the first derivative in 120 digits."""
    step = EXACT.array(1e-30)[()]
    columns = []
    for i in range(x.size):
        near = []
        for sign in (1, -1):
            moved = EXACT.array(x)
            moved[i] = moved[i] + sign * step
            at = Reference(moved, k, epsilon)
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
            at = Reference(x, EXACT.array(k)[()] + sign * dk, epsilon, masses + sign * da)
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
        index = min(DIGITS.floor(place), DIGITS.ceil(self.total) - 2)
        self.fraction = place - index
        self.one, self.two = (
            Reference(x, max(self.total - index - half, EXACT.array(0.5)[()]), epsilon, weights, where)
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


@dataclass(frozen=True)
class Problem:
    """A batch of slices, one of each row of `x`, with its mass, temperature and options."""

    name: str
    x: np.ndarray  # (B, n)
    k: np.ndarray  # (B, 1)
    epsilon: np.ndarray  # (B, 1)
    weights: np.ndarray | None = None
    where: np.ndarray | None = None
    mode: str = "largest"
    arithmetic: Arithmetic = field(default=EXACT, repr=False)
    parts: tuple[tuple[str, slice], ...] = (("all", slice(None)),)  # rows that belong together

    def rounded(self, dtype: str) -> Problem:
        """The same problem as it is in a dtype."""

        def convert(values: np.ndarray | None) -> Any:
            return None if values is None else values.astype(dtype)

        return replace(
            self, x=convert(self.x), k=convert(self.k), epsilon=convert(self.epsilon), weights=convert(self.weights)
        )

    @property
    def arguments(self) -> dict[str, np.ndarray]:
        """The differentiable arguments that are given."""
        named = {"x": self.x, "k": self.k, "epsilon": self.epsilon, "weights": self.weights}
        return {name: values for name, values in named.items() if values is not None}

    @property
    def options(self) -> dict[str, Any]:
        """The others, of which an ordinary call has none."""
        return ({} if self.where is None else {"where": self.where}) | (
            {} if self.mode == "largest" else {"mode": self.mode}
        )

    def row(self, i: int) -> dict[str, Any]:
        return {
            "x": self.x[i],
            "k": self.k[i, 0],
            "epsilon": self.epsilon[i, 0],
            "weights": None if self.weights is None else self.weights[i],
            "where": None if self.where is None else self.where[i],
        }

    @cached_property
    def references(self) -> list[Reference]:
        return [Reference(**self.row(i), mode=self.mode, arithmetic=self.arithmetic) for i in range(self.x.shape[0])]

    @cached_property
    def mask(self) -> np.ndarray:
        return np.stack([reference.mask for reference in self.references])


def _column(*values: float) -> np.ndarray:
    return np.asarray(values, dtype=float)[:, None]


def _around(rng: np.random.Generator, z: float, above: int, n: int, epsilon: float) -> np.ndarray:
    """Scores with a gap of 2 z tau in which a whole k lies, and neighbours on both sides that matter."""
    tau = epsilon / 2
    high = z * tau + tau * np.sort(rng.exponential(2.0, above))
    low = -z * tau - tau * np.sort(rng.exponential(2.0, n - above))
    return rng.permutation(np.concatenate([high, low]))


def _joined(name: str, *problems: Problem) -> Problem:
    """Problems of one kind in one batch, so that a framework that compiles does it once."""
    starts = np.cumsum([0] + [len(problem.x) for problem in problems])
    rows = [slice(int(start), int(end)) for start, end in pairwise(starts)]
    x, k, epsilon = (np.concatenate([getattr(problem, part) for problem in problems]) for part in ("x", "k", "epsilon"))
    weights = None if problems[0].weights is None else np.concatenate([problem.weights for problem in problems])
    parts = tuple((problem.name, part) for problem, part in zip(problems, rows, strict=True))
    return Problem(name, x, k, epsilon, weights, parts=parts)


def problems() -> list[Problem]:
    """What masks, derivatives and the agreement of the backends are measured on."""
    rng = np.random.default_rng(7)
    n = 40
    normal = rng.normal(size=(3, n))
    frequencies = rng.uniform(0.1, 3.0, size=(3, n))
    frequencies[:, 5] = 0.0
    share = np.asarray([[0.1], [0.5], [0.93]]) * frequencies.sum(axis=1, keepdims=True)
    sizes = _column(1.0, 0.1, 0.4)
    gaps = np.stack([_around(rng, z, 11, n, 0.01) for z in (5.0, 20.0, 40.0)])
    weighted_gaps = np.stack([_around(rng, z, 11, n, 0.01) for z in (3.0, 15.0, 40.0)])
    eighths = rng.integers(1, 24, size=(3, n)) / 8.0
    held = np.where(weighted_gaps > 0.0, eighths, 0.0).sum(axis=1, keepdims=True)
    tied = rng.integers(0, 4, size=(3, n)) / 4.0
    kept = rng.uniform(size=(3, n)) < 0.7
    return [
        _joined(
            "plain",
            Problem("normal", normal, _column(1.0, 17.0, n - 1.0), sizes),
            Problem("fractional", normal, _column(1e-3, 2.5, n - 0.01), sizes),
            Problem("gap", gaps, _column(11.0, 11.0, 11.0), _column(0.01, 0.01, 0.01)),
            Problem("gap, one slice", gaps[2:], _column(11.0), _column(0.01)),
            Problem("near hard", normal, _column(3.5, 20.25, 31.75), _column(0.01, 0.003, 0.02)),
            Problem("tied", tied, _column(3.0, 20.0, 30.5), _column(0.3, 0.05, 1.0)),
            Problem("offset", np.round(normal, 2) + 1024.0, _column(3.0, 15.5, 30.0), _column(1.0, 0.5, 2.0)),
        ),
        _joined(
            "weighted",
            Problem("weighted", normal, share, sizes, weights=frequencies),
            Problem("weighted gap", weighted_gaps, held, _column(0.01, 0.01, 0.01), weights=eighths),
            Problem("weighted gap, one slice", weighted_gaps[2:], held[2:], _column(0.01), weights=eighths[2:]),
        ),
        Problem("where", normal, _column(2.0, 9.5, 20.0), sizes, where=kept),
        Problem("where weighted", normal, _column(2.0, 9.5, 14.0), sizes, weights=frequencies, where=kept),
        Problem("smallest", normal, _column(2.0, 9.5, 30.0), sizes, weights=frequencies, mode="smallest"),
        Problem("n = 2", normal[:, :2], _column(1.0, 0.3, 1.9), sizes),
        Problem("n = 200", rng.normal(size=(2, 200)), _column(20.0, 133.3), _column(0.1, 0.3)),
        Problem("n = 5000", rng.normal(size=(1, 5000)), _column(371.5), _column(0.1), arithmetic=LONG),
    ]


@cache
def dominated(dtype: str, weighted: bool = False) -> Problem:
    """One item has nearly all of the derivative: k is fractional and the other scores are many temperatures away.

    As it is in a dtype. The wider the gaps, the fewer digits the derivative by that item has in common with its terms.
    """
    rng = np.random.default_rng(11)
    gaps, size = ((5.0, 7.0, 10.0, 13.0), 8.0) if dtype == "float32" else ((10.0, 15.0, 20.0, 25.0), 20.0)
    x = np.concatenate([np.asarray([[gap, 0.0, gap + 1] for gap in gaps]), size * rng.normal(size=(30, 3))])
    weights = rng.integers(2, 9, size=x.shape) / 4.0 if weighted else None
    k = np.asarray([2.95, 2.95, 2.75, 2.75] + [2.75, 1.75, 2.3] * 10)[:, None]
    if weights is not None:  # the same part of the weight of one item, exact in any dtype
        order, whole = np.argsort(-x, axis=1), np.floor(k)
        held = np.take_along_axis(weights, order, axis=1)
        part = np.take_along_axis(held, whole.astype(int), axis=1)
        k = np.where(np.arange(3) < whole, held, 0.0).sum(axis=1, keepdims=True) + 0.375 * part
    return Problem("dominated", x, k, np.ones((len(x), 1)), weights).rounded(dtype)


def assert_rows_close(found: Any, wanted: Any, dtype: str, scale: Any = None) -> None:
    """Relative to the largest entry of each row, or to a number a row, by the tolerance of derivatives."""
    found, wanted = (np.asarray(value, float).reshape(len(value), -1) for value in (found, wanted))
    assert found.shape == wanted.shape
    error = np.abs(found - wanted).max(axis=1) / (np.abs(wanted).max(axis=1) if scale is None else scale)
    np.testing.assert_array_less(error, {"float64": 1e-11, "float32": 2e-5}[dtype])


PROBLEMS = {problem.name: problem for problem in problems()}

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
