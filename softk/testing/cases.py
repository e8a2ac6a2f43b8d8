"""Problems of the mask family: what its operators, adapters and kernels are held to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from .oracle import Arithmetic, Oracle

__all__ = ["EPSILONS", "SCORES", "Problem", "masses", "problems"]


@dataclass(frozen=True)
class Problem:
    """A batch of slices along the last axis of `x`, each with its mass, its epsilon and its options.

    Attributes
    ----------
    name : str
        What it is called.
    x : numpy.ndarray
        Scores, shape (..., n).
    k, epsilon : numpy.ndarray or float
        The mass and the strength of the entropy: shape (..., 1) or (), or a Python number.
    weights, where : numpy.ndarray or None
        Item weights and booleans, of the shape of `x`.
    mode : {"largest", "smallest"}
        Which end is selected.
    holds : {"derivatives", "mask", "contract"}
        What can be held to the oracle: the mask and its derivatives; the mask alone, because a derivative is not a
        number of the dtype or is rounded more than elsewhere; or neither, because the problem is about rounded or
        infinite values, of which softk's reference is the measure.
    parts : tuple of (str, slice)
        Rows that belong together: errors of derivatives are relative to the largest entry of these rows.
    arithmetic : Arithmetic or None
        What the oracle computes with.
    """

    name: str
    x: np.ndarray
    k: Any
    epsilon: Any
    weights: np.ndarray | None = None
    where: np.ndarray | None = None
    mode: str = "largest"
    holds: str = "derivatives"
    parts: tuple[tuple[str, slice], ...] = (("all", slice(None)),)
    arithmetic: Arithmetic | None = field(default=None, repr=False)

    def rounded(self, dtype: str, scores: str | None = None) -> Problem:
        """The same problem as it is in a dtype.

        Parameters
        ----------
        dtype : str
            That of the mass, epsilon and the weights, and of the scores unless they have one of their own.
        scores : str, optional
            The dtype of the scores: also "float16" or "bfloat16". They are kept in `dtype`.

        Returns
        -------
        Problem
            One whose numbers are all in `dtype`.
        """

        def convert(values: Any) -> Any:
            return values.astype(dtype) if isinstance(values, np.ndarray) else values

        with np.errstate(over="ignore", under="ignore"):
            x = convert(_narrowed(self.x, scores))
            return replace(self, x=x, k=convert(self.k), epsilon=convert(self.epsilon), weights=convert(self.weights))

    @property
    def arguments(self) -> dict[str, Any]:
        """The differentiable arguments that are given, by name."""
        named = {"x": self.x, "k": self.k, "epsilon": self.epsilon, "weights": self.weights}
        return {name: values for name, values in named.items() if values is not None}

    @property
    def options(self) -> dict[str, Any]:
        """The other arguments that are given, by name."""
        return ({} if self.where is None else {"where": self.where}) | (
            {} if self.mode == "largest" else {"mode": self.mode}
        )

    @property
    def is_numeric(self) -> bool:
        """Whether k is a Python number."""
        return not isinstance(self.k, np.ndarray)

    def row(self, i: Any) -> dict[str, Any]:
        """One slice, for the oracle: arrays of shape (n,) and numbers.

        Parameters
        ----------
        i : int or tuple of int
            Its place in the batch.
        """

        def number(values: Any) -> Any:
            return values[i][..., 0] if np.ndim(values) else np.asarray(values, self.x.dtype)[()]

        return {
            "x": self.x[i],
            "k": number(self.k),
            "epsilon": number(self.epsilon),
            "weights": None if self.weights is None else self.weights[i],
            "where": None if self.where is None else self.where[i],
        }

    @cached_property
    def oracles(self) -> list[Oracle]:
        """The oracle of every slice, in the order of the batch."""
        with np.errstate(all="ignore"):
            return [
                Oracle(**self.row(i), mode=self.mode, arithmetic=self.arithmetic) for i in np.ndindex(self.x.shape[:-1])
            ]

    @cached_property
    def mask(self) -> np.ndarray:
        """The masks of the oracle, of the shape of `x`."""
        return np.reshape([oracle.mask for oracle in self.oracles], self.x.shape)


def _narrowed(x: np.ndarray, dtype: str | None) -> np.ndarray:
    """The values after a conversion to a narrower dtype, and back."""
    if dtype != "bfloat16":
        return x if dtype is None else x.astype(dtype).astype(x.dtype)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)  # the upper half of a float32, rounded to even
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.where(np.isnan(x), x, rounded.astype(np.uint32).view(np.float32)).astype(x.dtype)


# --- adversarial scores


def _outlier(size: float) -> Callable[[np.random.Generator, int], np.ndarray]:
    return lambda rng, n: np.concatenate([[size], rng.normal(size=n - 1)])


#: Kinds of scores, each a function of a random generator and n.
SCORES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "uniform": lambda rng, n: rng.uniform(size=n),
    "cauchy": lambda rng, n: rng.standard_cauchy(size=n),
    "clustered": lambda rng, n: rng.integers(0, 5, n) + 1e-4 * rng.normal(size=n),
    "tied": lambda rng, n: rng.integers(0, 5, n) / 4.0,
    "constant": lambda rng, n: np.full(n, 0.3),
    "offset": lambda rng, n: 1e8 + rng.normal(size=n),
    "far offset": lambda rng, n: -1e8 + 1e3 * rng.normal(size=n),
    "wide": lambda rng, n: 1e30 * rng.uniform(-1.0, 1.0, n),
    "outlier above": _outlier(1e20),
    "outlier below": _outlier(-1e20),
    "moderate outlier": _outlier(1e3),
    "exponential": lambda rng, n: rng.choice([-1.0, 1.0], n) * 2.0 ** np.linspace(-60.0, 60.0, n),
    "arange": lambda rng, n: rng.permutation(np.arange(float(n))),
    "two levels": lambda rng, n: np.where(np.arange(n) < n // 3, 1.0, -1.0),
}

#: From all but hard to all but uniform, for scores of about 1.
EPSILONS = (1e-6, 1e-3, 0.1, 1.0, 20.0)


def masses(n: int) -> list[float]:
    """Whole and fractional masses of n scores, at both ends and in the middle."""
    wanted = (1.0, n - 1.0, float(n // 2), n // 3 + 0.5, 2.5, 1e-3, n - 0.01)
    return sorted({k for k in wanted if 0.0 < k <= n})


def around(rng: np.random.Generator, z: float, above: int, n: int, epsilon: float) -> np.ndarray:
    """Scores with a gap of 2 z tau in which a whole k lies, and with neighbors on both sides that matter."""
    tau = epsilon / 2
    high = z * tau + tau * np.sort(rng.exponential(2.0, above))
    low = -z * tau - tau * np.sort(rng.exponential(2.0, n - above))
    return rng.permutation(np.concatenate([high, low]))


def _column(*values: float) -> np.ndarray:
    return np.asarray(values, dtype=float)[:, None]


def joined(name: str, *parts: Problem) -> Problem:
    """Problems of one kind in one batch."""
    starts = np.cumsum([0] + [len(part.x) for part in parts])
    rows = [slice(int(start), int(end)) for start, end in itertools.pairwise(starts)]
    x, k, epsilon = (np.concatenate([getattr(part, key) for part in parts]) for key in ("x", "k", "epsilon"))
    weights = None if parts[0].weights is None else np.concatenate([part.weights for part in parts])
    return Problem(
        name, x, k, epsilon, weights, parts=tuple((part.name, row) for part, row in zip(parts, rows, strict=True))
    )


def smooth() -> Iterator[Problem]:
    """Problems of which the oracle knows the mask and its derivatives, from soft to nearly hard."""
    rng = np.random.default_rng(7)
    n = 40
    normal = rng.normal(size=(3, n))
    frequencies = rng.uniform(0.1, 3.0, size=(3, n))
    frequencies[:, 5] = 0.0
    share = np.asarray([[0.1], [0.5], [0.93]]) * frequencies.sum(axis=1, keepdims=True)
    sizes = _column(1.0, 0.1, 0.4)
    gaps = np.stack([around(rng, z, 11, n, 0.01) for z in (5.0, 20.0, 40.0)])
    weighted_gaps = np.stack([around(rng, z, 11, n, 0.01) for z in (3.0, 15.0, 40.0)])
    eighths = rng.integers(1, 24, size=(3, n)) / 8.0
    held = np.where(weighted_gaps > 0.0, eighths, 0.0).sum(axis=1, keepdims=True)
    tied = rng.integers(0, 4, size=(3, n)) / 4.0
    kept = rng.uniform(size=(3, n)) < 0.7
    yield joined(
        "plain",
        Problem("normal", normal, _column(1.0, 17.0, n - 1.0), sizes),
        Problem("fractional", normal, _column(1e-3, 2.5, n - 0.01), sizes),
        Problem("gap", gaps, _column(11.0, 11.0, 11.0), _column(0.01, 0.01, 0.01)),
        Problem("gap, one slice", gaps[2:], _column(11.0), _column(0.01)),
        Problem("near hard", normal, _column(3.5, 20.25, 31.75), _column(0.01, 0.003, 0.02)),
        Problem("tied", tied, _column(3.0, 20.0, 30.5), _column(0.3, 0.05, 1.0)),
        Problem("offset", np.round(normal, 2) + 1024.0, _column(3.0, 15.5, 30.0), _column(1.0, 0.5, 2.0)),
    )
    yield joined(
        "weighted",
        Problem("weighted", normal, share, sizes, weights=frequencies),
        Problem("weighted gap", weighted_gaps, held, _column(0.01, 0.01, 0.01), weights=eighths),
        Problem("weighted gap, one slice", weighted_gaps[2:], held[2:], _column(0.01), weights=eighths[2:]),
    )
    yield Problem("where", normal, _column(2.0, 9.5, 20.0), sizes, where=kept)
    yield Problem("where weighted", normal, _column(2.0, 9.5, 14.0), sizes, weights=frequencies, where=kept)
    yield Problem("smallest", normal, _column(2.0, 9.5, 30.0), sizes, weights=frequencies, mode="smallest")
    yield Problem("smallest, no weights", gaps, _column(n - 11.0, 2.5, 30.0), sizes / 30.0, mode="smallest")
    yield Problem("n = 2", normal[:, :2], _column(1.0, 0.3, 1.9), sizes)
    yield Problem("n = 200", rng.normal(size=(2, 200)), _column(20.0, 133.3), _column(0.1, 0.3))
    yield Problem("n = 5000", rng.normal(size=(1, 5000)), _column(371.5), _column(0.1))


def _shapes() -> Iterator[Problem]:
    """Numbers in the place of arrays, shared arguments, deep batches and sizes that vectors do not divide."""
    rng = np.random.default_rng(13)
    x = rng.normal(size=(2, 3, 21))
    one = np.asarray(0.4)
    weights = rng.uniform(0.5, 2.0, size=x.shape)
    yield Problem("numbers", x, 3, 0.4)
    yield Problem("numbers, fractional k", x, 3.25, 0.4)
    yield Problem("numbers, k of most", x, 20, 0.4)
    yield Problem("shared", x, np.asarray(4.5), one)
    yield Problem("shared, weighted", x, np.asarray(4.5), one, weights)
    yield Problem("no batch", x[0, 0], np.asarray([4.5]), np.asarray([0.3]), weights[0, 0])
    yield Problem("no batch, numbers", x[0, 0], 4, 0.3)
    yield Problem("deep batch", x, rng.uniform(2.0, 9.0, (2, 3, 1)), rng.uniform(0.1, 0.5, (2, 3, 1)), weights)
    same = np.broadcast_to(x[:1, :1], (2, 3, 21)).copy(), np.broadcast_to(weights[:1, :1], (2, 3, 21)).copy()
    yield Problem("repeated rows", same[0], rng.uniform(2.0, 9.0, (2, 3, 1)), np.full((2, 3, 1), 0.3), same[1])
    yield Problem("n = 1", x[0, :, :1], _column(0.5, 0.25, 0.75), _column(0.3, 0.1, 1.0), holds="mask")
    for n in (3, 7, 16, 17, 33, 64, 100, 257):
        yield Problem(f"rows of {n}", rng.normal(size=(3, n)), _column(1.0, 0.3 * n, n - 0.5), _column(0.5, 0.1, 0.3))
    count = 4_099
    long = rng.normal(size=(2, count))
    yield Problem("long", long, _column(count / 10 + 0.5, 17.0), _column(0.3, 0.1))
    yield Problem("long, weighted", long, _column(301.0, 170.0), _column(0.3, 0.1), rng.uniform(0.5, 2.0, long.shape))


def dominated(dtype: str, weighted: bool = False) -> Problem:
    """One item has nearly all of the derivative: k is fractional and the other scores are many temperatures away.

    The wider the gaps, the fewer digits the derivative by that item has in common with its terms.
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
    name = "dominated, weighted" if weighted else "dominated"
    each = tuple((f"row {i}", slice(i, i + 1)) for i in range(len(x)))
    return Problem(name, x, k, np.ones((len(x), 1)), weights, parts=each).rounded(dtype)


def _adversarial(n: int, step: int) -> Iterator[Problem]:
    """Every kind of scores, with masses and epsilons of every size."""
    rng = np.random.default_rng(n)
    pairs = list(itertools.product(masses(n), EPSILONS))
    for start, (kind, scores) in enumerate(SCORES.items()):
        few = pairs[start % step :: step]
        x = np.stack([scores(rng, n) for _ in few])
        k, epsilon = (_column(*values) for values in zip(*few, strict=True))
        yield Problem(f"{kind} scores", x, k, epsilon, holds="mask")


def _temperatures() -> Iterator[Problem]:
    """Epsilons at which all scores are next to each other, and scores below the smallest normal number."""
    rng = np.random.default_rng(17)
    x = rng.normal(size=(4, 40))
    yield Problem("huge epsilon", x, np.full((4, 1), 3.25), _column(1e2, 1e4, 1e6, 1e8), holds="mask")
    tiny = 2.0**-140 * rng.integers(-9, 9, size=(2, 12))
    yield Problem("subnormal scores", tiny, _column(3.0, 4.5), _column(0.3, 1.0), holds="mask")


def _rows(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=float)


_NAN, _INF = math.nan, math.inf
#: The edges of the contract: five scores a row or so, k = 2 and epsilon = 0.3 where nothing else is said.
EDGES: dict[str, dict[str, Any]] = {
    "infinite scores": {"x": [[_INF, 1, 2, 3, -_INF], [_INF, _INF, _INF, 0, 1], [-_INF] * 5]},
    "one number": {"x": [[0.5], [_NAN], [_INF], [-_INF]], "k": [[1.0], [1.0], [1.0], [1.0]]},
    "NaN": {"x": [[_NAN, 1, 2, 3, 4], [1, 2, 3, 4, 5]]},
    "nothing, everything, too much": {"x": [[1, 2, 3, 4, 5]] * 5, "k": [[0], [5], [5.5], [-1], [_NAN]]},
    "temperatures": {
        "x": [[1, 2, 3, 4, 5]] * 8,
        "epsilon": [[0], [-1], [_INF], [_NAN], [1e-40], [1e-38], [3e38], [1e30]],
    },
    "zeros of either sign": {"x": [[0.0, -0.0, 0.0, -0.0, 1.0], [-0.0, -0.0, 0.0, -1.0, -2.0]]},
    "ties": {"x": [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [3, 3, 1, 1, 1]]},
    "extremes": {"x": [[3e38, -3e38, 0, 1, 2], [3.4e38, 3.4e38, -3.4e38, 0, 1], [1e-45, 2e-45, 0, -1e-45, 3e-45]]},
    "all removed": {"x": [[1, 2, 3, 4, 5]] * 2, "where": [[False] * 5, [True, False, False, False, False]]},
    "removed NaN": {
        "x": [[_NAN, 2, 3, 4, 5], [1, _INF, 3, 4, 5]],
        "where": [[False] + [True] * 4, [True, False, True, True, True]],
    },
    "fewer than k": {"x": [[1, -_INF, -_INF, 0, -_INF]] * 3, "k": [[2], [3], [1.5]]},
    "weights out of range": {
        "x": [[1, 2, 3, 4, 5]] * 5,
        "weights": [[1, 1, -1, 1, 1], [1, _NAN, 1, 1, 1], [1, _INF, 1, 1, 1], [0] * 5, [1, 1, 1, 1, 1]],
    },
    "weights of what is removed": {
        "x": [[1, -_INF, 3, 4, 5], [1, 2, 3, 4, 5]],
        "weights": [[1, _NAN, 1, 1, 1], [1, -1, 1, 1, 1]],
        "where": [[True] * 5, [True, False, True, True, True]],
    },
    "weights of fewer than k": {
        "x": [[1, 2, 3, 4, 5], [1, 2, -_INF, -_INF, -_INF], [1, 2, 3, 4, 5]],
        "weights": [[1] * 5] * 3,
        "where": [[True, True, False, False, False], [True] * 5, [True, True, False, False, False]],
        "k": [[3], [3], [5.1]],
    },
    "weights of any size": {
        "x": [[1, 2, 3, 4, 5]] * 4,
        "weights": [[1e30] * 5, [1e-30] * 5, [1e-30, 1, 1e30, 1, 1], [0, 0, 1, 1, 0]],
        "k": [[2e30], [2e-30], [1e30], [1]],
    },
    "all of the weights": {
        "x": [[1, 2, 3, 4, 5]] * 3,
        "weights": [[0.1, 0.2, 0.3, 0.4, 0.5]] * 3,
        "k": [[1.5], [0], [1.6]],
    },
    "ends within a rounding": {
        "x": [[1, 2, 3, 4, 5]] * 4,
        "k": [[5 + 2e-6], [5 - 2e-6], [-2e-6], [5.01]],
    },
    "ends of weights within a rounding": {
        "x": [[1, 2, 3, 4, 5]] * 4,
        "weights": [[0.1, 0.2, 0.3, 0.4, 0.5]] * 4,
        "where": [[True] * 5, [True] * 5, [True] * 5, [False] + [True] * 4],
        "k": [[1.5 + 1e-6], [1.5 - 1e-6], [-5e-7], [1.4 + 5e-7]],
    },
    "small k": {"x": [[3, 0, 3, 3, 2]] * 3, "k": [[6e-22], [1e-33], [1e-37]], "epsilon": [[0.1]] * 3},
    "a weight within the rounding of k": {"x": [[5, 4, 3, 2, 1]], "weights": [[1, 1, 1e-8, 1e-8, 1]], "k": [[2]]},
    "no weight next to the threshold": {
        "x": [[6, 3.1, 2.9, 0, -1]] * 2,
        "weights": [[1, 0, 0, 1, 1]] * 2,
        "k": [[1]] * 2,
        "epsilon": [[0.6], [0.2]],
    },
}


def _edges() -> Iterator[Problem]:
    for name, given in EDGES.items():
        case = {"k": [[2.0]], "epsilon": [[0.3]], **given}
        shape = (len(case["x"]), 1)
        k, epsilon = (np.broadcast_to(_rows(case[part]), shape).copy() for part in ("k", "epsilon"))
        weights = _rows(case["weights"]) if "weights" in case else None
        where = np.asarray(case["where"]) if "where" in case else None
        yield Problem(name, _rows(case["x"]), k, epsilon, weights, where, holds="contract")
    x = np.asarray([[1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 1.0, _NAN, 2.0, 0.0]])
    for count in (0, 5):
        yield Problem(f"the number {count} of 5", x, count, 0.3, holds="contract")
    yield Problem("no slices", np.zeros((0, 5)), np.zeros((0, 1)), np.zeros((0, 1)), holds="contract")


def problems(dtype: str = "float64") -> Iterator[Problem]:
    """The problems on which softk's operators, adapters and kernels are checked, each with its name.

    They have smooth and nearly hard slices, ties, gaps, adversarial scores, infinities, NaN, weights of 0, items that
    are removed, arrays and numbers for k and epsilon, fractional masses and both ends, one score and thousands.

    Parameters
    ----------
    dtype : {"float32", "float64"}, optional
        The dtype that everything is rounded to.

    Yields
    ------
    Problem
        A batch of slices; `Problem.oracles` solves it in high precision.

    Examples
    --------
    >>> from softk.testing import problems
    >>> found = {problem.name: problem for problem in problems("float32")}
    >>> found["weighted"].x.shape, found["weighted"].k.dtype.name
    ((7, 40), 'float32')
    >>> found["NaN"].mask.tolist()[0]
    [nan, nan, nan, nan, nan]
    """
    everything = itertools.chain(smooth(), _shapes(), _temperatures(), _adversarial(16, 5), _edges())
    for problem in everything:
        yield problem.rounded(dtype)
    yield dominated(dtype)
    yield dominated(dtype, weighted=True)
