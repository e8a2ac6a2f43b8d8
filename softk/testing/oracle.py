"""The oracle of the mask family: one slice solved by bisection and differentiated by the implicit function theorem.

It shares no code and no formula with the reference in softk. The equation is solved for the threshold itself, in the
arithmetic of one's choice, and its derivatives follow from it directly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

__all__ = ["EXACT", "LONG", "Arithmetic", "Oracle"]


@dataclass(frozen=True)
class Arithmetic:
    """The numbers that the oracle computes with, in NumPy arrays.

    Attributes
    ----------
    array : callable
        Convert values to an array of these numbers.
    exp, log : callable
        The elementwise functions.
    """

    array: Callable[[Any], Any]
    exp: Callable[[Any], Any]
    log: Callable[[Any], Any]


@cache
def _context() -> Any:
    """The numbers of 120 digits, whose exponents have no bound. mpmath is loaded when they are first used."""
    import mpmath

    context = mpmath.MPContext()
    context.dps = 120
    return context


def _exact_array(values: Any) -> Any:
    context = _context()
    convert = np.frompyfunc(lambda value: value if isinstance(value, context.mpf) else context.mpf(float(value)), 1, 1)
    return np.asarray(convert(np.asarray(values)), dtype=object)


def _exactly(name: str) -> Callable[[Any], Any]:
    return lambda values: np.frompyfunc(getattr(_context(), name), 1, 1)(values)


#: mpmath with 120 digits.
EXACT = Arithmetic(_exact_array, _exactly("exp"), _exactly("log"))
#: NumPy's long double, which has 19 digits on x86 and no more than float64 on some other processors.
LONG = Arithmetic(lambda values: np.asarray(values, dtype=np.longdouble), np.exp, np.log)

#: What long double suffices for: how far the scores are apart, in epsilons; how much of p one item has; how small the
#: derivative of the weighted sum is; and how far the weights are apart.
_LEAST_SPREAD, _MOST_SPREAD, _MOST_SHARE, _LEAST_SLOPE, _MOST_RATIO = 1e-3, 1e4, 0.99, 1e-4, 1e6


class Oracle:
    """One slice of the soft top-k in high precision: its threshold, its mask and their derivatives.

    With F(t) the weighted sum of the mask m_i = sigmoid(z_i), z_i = (x_i - t) / tau, tau = epsilon / 2, and
    v_i = m_i (1 - m_i), the equation F = k gives

        dt = (sum a_i v_i (dx_i - z_i dtau) + tau (sum m_i da_i - dk)) / sum a_i v_i,
        dm_i = v_i (dx_i - dt - z_i dtau) / tau.

    The inputs are taken as they are: round them to the dtype under test first.

    Parameters
    ----------
    x : numpy.ndarray
        Scores, shape (n,).
    k, epsilon : float
        The mass and the strength of the entropy.
    weights : numpy.ndarray, optional
        Item weights, shape (n,).
    where : numpy.ndarray, optional
        Booleans, shape (n,): the items to choose from.
    mode : {"largest", "smallest"}, optional
        Which end to select.
    arithmetic : Arithmetic, optional
        `EXACT` or `LONG`. Without one, `LONG` where it suffices, which is much faster, and else `EXACT`.

    Attributes
    ----------
    regular : bool
        Whether the threshold is the root of the equation. Otherwise the mask is what the contract says: NaN for a bad
        value, 0 where nothing is selected, 1 where everything is, and equal shares of infinite scores; then there are
        no derivatives here.

    Examples
    --------
    >>> import numpy as np
    >>> from softk.testing import Oracle
    >>> oracle = Oracle(np.asarray([0.2, 1.7, -0.5, 0.9]), 2.0, 0.5)
    >>> oracle.mask.round(3).tolist()
    [0.196, 0.99, 0.015, 0.8]
    >>> oracle.vjp(np.asarray([1.0, 0.0, 0.0, 0.0]))["x"].round(3).tolist()
    [0.34, -0.018, -0.026, -0.295]
    """

    def __init__(
        self,
        x: Any,
        k: Any,
        epsilon: Any,
        weights: Any = None,
        where: Any = None,
        mode: str = "largest",
        arithmetic: Arithmetic | None = None,
    ) -> None:
        x = np.asarray(x)
        self.sign = 1 if mode == "largest" else -1
        self.where = np.ones(x.shape, dtype=bool) if where is None else np.asarray(where)
        values = self.sign * x
        weights = np.ones(x.shape) if weights is None else np.asarray(weights)
        able = self.where & (np.asarray(values, float) > -math.inf)
        infinite = np.asarray(values, float) == math.inf
        #: The items whose mask follows the threshold, and those whose mask is 1.
        self.kept, self.sure = able & ~infinite, able & infinite
        self._limit = self._contract(*(np.asarray(value, float) for value in (values, k, epsilon, weights)))
        self.regular = self._limit is None
        if not self.regular:
            return
        given = values, k, epsilon, weights
        if arithmetic is not None:
            self._set(arithmetic, *given)
        elif not self._is_fast(values, epsilon, weights) or not self._set(LONG, *given):
            self._set(EXACT, *given)

    def _contract(self, values: Any, k: Any, epsilon: Any, weights: Any) -> np.ndarray | None:
        """The mask where the equation does not give it, else None."""
        able, usable = self.kept | self.sure, (weights >= 0.0) & (weights < math.inf)
        bad = np.isnan(values[self.where]).any() or not usable[able].all()
        bad = bad or not 0.0 < epsilon < math.inf or not 0.0 <= k <= math.fsum(weights[usable])
        if bad:
            return np.full(values.shape, math.nan)
        if k == 0:
            return np.zeros(values.shape)
        of_infinite = math.fsum(weights[self.sure])
        if of_infinite >= k:
            return np.where(self.sure, k / of_infinite, 0.0)
        if k >= math.fsum(weights[able]):
            return np.where(able, 1.0, 0.0)
        return None

    def _is_fast(self, values: Any, epsilon: Any, weights: Any) -> bool:
        """Whether long double may suffice."""
        if np.finfo(np.longdouble).eps > 1e-18:
            return False
        x, a = (np.asarray(part[self.kept], np.longdouble) for part in (values, weights))
        a = a[a > 0.0]
        spread = np.ptp(x) / np.longdouble(epsilon)
        return bool(_LEAST_SPREAD <= spread <= _MOST_SPREAD and a.max() <= _MOST_RATIO * a.min())

    def _set(self, arithmetic: Arithmetic, values: Any, k: Any, epsilon: Any, weights: Any) -> bool:
        """Solve it. Whether the arithmetic was good enough, if it was long double."""
        number = self.number = arithmetic.array
        self.arithmetic = arithmetic
        self.a, self.k = number(weights[self.kept]), number(k)[()]
        self.tau = number(epsilon)[()] / 2
        self.held = self.k - number(weights[self.sure]).sum()  # the mass that is left for the others
        # Measured from a score near the threshold, so that no digits are lost in a common offset.
        x = values[self.kept]
        order = np.argsort(-np.asarray(x, float), kind="stable")
        place = np.count_nonzero(np.cumsum(self.a[order]) < self.held)
        self.origin = number(x[order[min(int(place), len(x) - 1)]])[()]
        self.x = number(x) - self.origin
        self.solve()
        weighted = bool((weights[self.kept] != 1.0).any())
        loses = self.p.max() > _MOST_SHARE or (weighted and _LEAST_SLOPE * self.a.sum() > self.V)
        return bool(self.V > 0.0) and not loses

    def solve(self) -> None:
        """Find the threshold and what depends on it."""
        self.s = self._root()
        self.z = (self.x - self.s) / self.tau
        tail = self.arithmetic.exp(-abs(self.z))
        self.m = np.where(self.z > 0, 1 / (1 + tail), tail / (1 + tail))
        self.rest = np.where(self.z > 0, tail / (1 + tail), 1 / (1 + tail))  # 1 - m
        self.v = tail / (1 + tail) ** 2
        self.V = (self.a * self.v).sum()

    def _root(self) -> Any:
        exp, log = self.arithmetic.exp, self.arithmetic.log
        x, a, k, tau = self.x, self.a, self.held, self.tau
        # If all scores were the lowest (the highest) of them, the threshold would be here.
        shift = tau * log((a.sum() - k) / k)
        low, high = min(x) + shift, max(x) + shift

        def excess(t: Any) -> tuple[Any, Any]:
            """The mass minus k, from the tails: it may be far below the rounding of k."""
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
        for _ in range(12):  # |F''| <= |F'| / tau, so Newton converges quadratically from here
            value, slope = excess(t)
            if not slope > 0:
                break
            t = t + value / slope
        return t

    @property
    def t(self) -> Any:
        """The threshold, in the arithmetic of the oracle, of the largest."""
        return self.origin + self.s

    @property
    def p(self) -> np.ndarray:
        """The derivative of the threshold in the scores that are neither removed nor infinite."""
        found: np.ndarray = self.a * self.v / self.V
        return found

    def _items(self, values: Any, sure: float = 0.0) -> np.ndarray:
        full = np.where(self.sure, sure, 0.0)
        with np.errstate(over="ignore"):  # a derivative may be beyond what float64 holds: then it is infinite
            full[self.kept] = np.asarray(values, dtype=float)
        return full

    @property
    def mask(self) -> np.ndarray:
        """The mask, shape (n,)."""
        return self._items(self.m, 1.0) if self._limit is None else self._limit

    @property
    def log_mask(self) -> np.ndarray:
        """The logarithm of the mask, shape (n,): -inf for the items that are never selected."""
        if self._limit is not None:
            with np.errstate(divide="ignore"):
                return np.asarray(np.log(self._limit))
        found = np.where(self.sure, 0.0, -np.inf)
        found[self.kept] = np.asarray(self.arithmetic.log(self.m), dtype=float)
        return found

    @property
    def threshold(self) -> float:
        """The threshold."""
        return float(self.sign * self.t)

    def rates(self, dx: Any = None, dk: Any = 0, depsilon: Any = 0, dweights: Any = None) -> tuple[Any, Any]:
        """Tangents of the mask of the items that can change, and of the threshold, in the oracle's own arithmetic."""
        nothing = np.zeros(self.kept.shape)
        dweights = nothing if dweights is None else dweights
        dx = self.sign * self.number((nothing if dx is None else dx)[self.kept])
        da, more = self.number(dweights[self.kept]), self.number(dweights[self.sure]).sum()
        dk, dtau = self.number(dk)[()], self.number(depsilon)[()] / 2
        dt = ((self.a * self.v * (dx - self.z * dtau)).sum() + self.tau * ((self.m * da).sum() + more - dk)) / self.V
        return self.v * (dx - dt - self.z * dtau) / self.tau, self.sign * dt

    def jvp(self, **tangents: Any) -> tuple[np.ndarray, float]:
        """Tangents of the mask and of the threshold.

        Parameters
        ----------
        dx, dweights : numpy.ndarray, optional
            Shape (n,).
        dk, depsilon : float, optional
            Tangents of the mass and of epsilon. What is not given is constant.

        Returns
        -------
        tuple
            That of the mask, shape (n,), and that of the threshold.
        """
        mask, threshold = self.rates(**tangents)
        return self._items(mask), float(threshold)

    def log_jvp(self, **tangents: Any) -> np.ndarray:
        """The tangent of the logarithm of the mask, for the arguments of `jvp`."""
        mask, _ = self.rates(**tangents)
        return self._items(mask / self.m)

    def vjp(self, u: Any = None, b: Any = 0, *, log: bool = False) -> dict[str, Any]:
        """Cotangents of the arguments.

        Parameters
        ----------
        u : numpy.ndarray, optional
            The cotangent of the mask, shape (n,); of its logarithm with ``log=True``.
        b : float, optional
            The cotangent of the threshold.

        Returns
        -------
        dict
            Of "x" and "weights", shape (n,), and of "k" and "epsilon", numbers.
        """
        u = self.number((np.zeros(self.kept.shape) if u is None else u)[self.kept])
        direct = (self.rest if log else self.v) * u / self.tau
        through = self.sign * self.number(b)[()] - direct.sum()  # the cotangent of t
        p = self.p  # an array comes first in a product: mpmath prints an array before it gives up on it
        by_mass = through * self.tau / self.V
        return {
            "x": self._items(self.sign * (direct + p * through)),
            "k": float(-by_mass),
            "epsilon": float(-((direct + p * through) * self.z).sum() / 2),
            "weights": self._items(self.m * by_mass, float(by_mass)),
        }
