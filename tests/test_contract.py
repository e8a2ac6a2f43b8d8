"""The contract of topk, threshold and quantile, row by row, on every array library.

Most rules speak of one slice. `SLICES` lists such slices with what must come out, and all of them go through one call:
so a slice that is bad (NaN, a k out of range) also shows that it spoils no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import product
from typing import Any

import array_api_compat
import numpy as np
import pytest

import softk
from softk.backend import backend_of
from softk.testing import native_gradient

from . import closed_form
from .libraries import BY_NAME, Library

INF, NAN = math.inf, math.nan
EPS = {"float64": 2.0**-52, "float32": 2.0**-23}
FUNCTIONS = {
    "topk": softk.topk,
    "log_topk": softk.log_topk,
    "threshold": softk.threshold,
    "quantile": softk.quantile,
}

#: The bound on the error of a mask, in eps, absolute.
MASK = 32

#: Scores, in multiples of 1/4 so that float32 holds them; without ties.
S = (0.5, 2.0, -1.0, 1.0, 3.0, 0.0)
N = len(S)
#: Item weights that sum to N, so that k = N is everything with them and without; one is 0.
A = (0.5, 2.0, 1.0, 0.0, 1.5, 1.0)


@dataclass(frozen=True)
class Slice:
    """One slice and its answer. An answer of None is the closed form's; 0, 1 and NaN are meant exactly."""

    name: str
    x: tuple[float, ...] = S
    k: float = 2.0
    epsilon: float = 0.5
    weights: tuple[float, ...] | None = None
    where: tuple[bool, ...] | None = None
    mask: Any = None
    threshold: float | None = None

    @property
    def kept(self) -> np.ndarray:
        return np.full(N, True) if self.where is None else np.asarray(self.where)

    @property
    def masses(self) -> np.ndarray:
        return np.ones(N) if self.weights is None else np.asarray(self.weights)

    @property
    def is_bad(self) -> bool:
        return self.mask is NAN

    def expected(self, function: str) -> Any:
        """What the contract says; the closed form for the items that are neither removed nor +inf."""
        explicit = self.mask if function == "topk" or self.is_bad else self.threshold
        if explicit is not None:
            return np.broadcast_to(explicit, (N,) if function == "topk" else ())
        x, first = np.asarray(self.x), self.kept & (np.asarray(self.x) == INF)
        others = self.kept & ~first
        rest = {"x": x[others], "k": self.k - self.masses[first].sum(), "weights": self.masses[others]}
        if function == "threshold":
            return closed_form.threshold(**rest, epsilon=self.epsilon)[0]
        mask = np.where(first, 1.0, 0.0)
        mask[others] = closed_form.topk(**rest, epsilon=self.epsilon)
        return mask


def without(*places: int) -> tuple[bool, ...]:
    """A `where` that removes the items at these places."""
    return tuple(i not in places for i in range(N))


def changed(values: tuple[float, ...], places: dict[int, float]) -> tuple[float, ...]:
    return tuple(places.get(i, value) for i, value in enumerate(values))


PLAIN = [
    Slice("whole k"),
    Slice("fractional k", k=2.5),
    Slice("a small budget", k=2.0**-10),
    Slice("nearly everything", k=N - 2.0**-10),
    Slice("k = 0", k=0.0, mask=0.0, threshold=INF),
    Slice("k = n", k=N, mask=1.0, threshold=-INF),
    Slice("all tied", (1.0,) * N, mask=np.full(N, 1 / 3)),
    Slice("ties at the boundary", (2.0, 1.0, 1.0, 1.0, 0.0, 0.0)),
    Slice("gap", (42.0, 43.0, 44.0, -38.0, -39.0, -40.0), 3.0, threshold=2.0),
    Slice("small epsilon", epsilon=2.0**-20, mask=(0, 1, 0, 0, 1, 0), threshold=1.5),
    Slice("small epsilon, fractional k", k=2.5, epsilon=2.0**-20, mask=(0, 1, 0, 0.5, 1, 0), threshold=1.0),
    Slice("small epsilon, ties", (1, 1, 1, 0, 0, 2), 2.0, 2.0**-20, mask=(1 / 3, 1 / 3, 1 / 3, 0, 0, 1)),
    Slice("large epsilon", epsilon=20.0),
    Slice("offset", tuple(1024.0 + x for x in S), 3.0),
    Slice("+inf is always selected", changed(S, {0: INF}), 3.0),
    Slice("+inf, fractional k", changed(S, {0: INF, 5: INF}), 2.5),
    Slice("-inf is never selected", changed(S, {4: -INF}), 3.0),
    Slice("both infinities", changed(S, {1: -INF, 2: INF, 3: -INF}), 2.5),
    Slice("more +inf than k", (INF, INF, INF, 1.0, 2.0, 3.0), 2.0, mask=(2 / 3, 2 / 3, 2 / 3, 0, 0, 0), threshold=INF),
    Slice("far more +inf than k", (INF, INF, 0.0, 1.0, 2.0, 3.0), 0.5, mask=(0.25, 0.25, 0, 0, 0, 0), threshold=INF),
    Slice("as many +inf as k", (INF, 0.0, 1.0, INF, 2.0, 3.0), 2.0, mask=(1, 0, 0, 1, 0, 0), threshold=INF),
    Slice("only +inf", (INF,) * N, 2.0, mask=np.full(N, 1 / 3), threshold=INF),
    Slice("only infinities", (INF, INF, -INF, -INF, -INF, -INF), 1.0, mask=(0.5, 0.5, 0, 0, 0, 0), threshold=INF),
    Slice("+inf, k = 0", changed(S, {0: INF}), 0.0, mask=0.0, threshold=INF),
    Slice("+inf, k = n", changed(S, {0: INF}), N, mask=1.0, threshold=-INF),
    Slice(
        "fewer selectable than k",
        changed(S, dict.fromkeys((0, 2, 4), -INF)),
        4.0,
        mask=(0, 1, 0, 1, 0, 1),
        threshold=-INF,
    ),
    Slice(
        "as many selectable as k",
        changed(S, dict.fromkeys((0, 2, 4), -INF)),
        3.0,
        mask=(0, 1, 0, 1, 0, 1),
        threshold=-INF,
    ),
    Slice("fewer selectable than k = n", changed(S, {1: -INF}), N, mask=(1, 0, 1, 1, 1, 1), threshold=-INF),
    Slice("nothing selectable", (-INF,) * N, 2.0, mask=0.0, threshold=-INF),
    Slice("nothing selectable, k = 0", (-INF,) * N, 0.0, mask=0.0, threshold=INF),
    Slice("NaN", changed(S, {2: NAN}), mask=NAN),
    Slice("NaN, k = 0", changed(S, {2: NAN}), 0.0, mask=NAN),
    Slice("NaN, k = n", changed(S, {2: NAN}), N, mask=NAN),
    Slice("NaN and infinities", changed(S, {0: INF, 2: NAN, 3: -INF}), mask=NAN),
    Slice("k below 0", k=-1.0, mask=NAN),
    Slice("k above n", k=N + 0.5, mask=NAN),
    Slice("k NaN", k=NAN, mask=NAN),
    Slice("k inf", k=INF, mask=NAN),
    Slice("k -inf", k=-INF, mask=NAN),
    Slice("epsilon 0", epsilon=0.0, mask=NAN),
    Slice("epsilon negative", epsilon=-0.5, mask=NAN),
    Slice("epsilon NaN", epsilon=NAN, mask=NAN),
    Slice("epsilon inf", epsilon=INF, mask=NAN),
    Slice("k below 0, fewer selectable", (-INF,) * N, -1.0, mask=NAN),
]
WHERE = [
    Slice("the best removed", where=without(4)),
    Slice("the best two removed, fractional k", k=1.5, where=without(1, 4)),
    Slice("NaN removed", changed(S, {0: NAN}), where=without(0)),
    Slice("+inf removed", changed(S, {0: INF}), where=without(0)),
    Slice("-inf removed", changed(S, {0: -INF}), where=without(0)),
    Slice("+inf kept", changed(S, {0: INF}), k=2.5, where=without(1)),
    Slice("fewer left than k", k=4.0, where=without(0, 2, 4), mask=(0, 1, 0, 1, 0, 1), threshold=-INF),
    Slice("as many left as k", k=3.0, where=without(0, 2, 4), mask=(0, 1, 0, 1, 0, 1), threshold=-INF),
    Slice("fewer left than k = n", k=N, where=without(1), mask=(1, 0, 1, 1, 1, 1), threshold=-INF),
    Slice("none left", where=(False,) * N, mask=0.0, threshold=-INF),
    Slice("none left, all NaN", (NAN,) * N, where=(False,) * N, mask=0.0, threshold=-INF),
    Slice("NaN kept", changed(S, {0: NAN, 1: NAN}), where=without(0), mask=NAN),
    Slice("removed, k above n", k=N + 0.5, where=without(0), mask=NAN),
]
FAR = changed(S, {3: 4000.0})  # the item of weight 0, 16000 temperatures above the others
WEIGHTED = [
    Slice("weighted", weights=A),
    Slice("weighted, fractional k", k=2.25, weights=A),
    Slice("weighted, a small budget", k=2.0**-10, weights=A),
    Slice("weighted gap", (40.0, 41.0, -43.0, 7.0, -40.0, -41.0), 2.5, weights=A),
    Slice("weightless far above", FAR, weights=A),
    Slice("weightless far below", tuple(-x for x in FAR), weights=A),
    Slice("weightless +inf", changed(S, {3: INF}), weights=A),
    Slice("weightless -inf", changed(S, {3: -INF}), weights=A),
    Slice("k = sum of weights", k=N, weights=A, mask=1.0, threshold=-INF),
    Slice("k = sum of weights, weightless far below", tuple(-x for x in FAR), N, weights=A, mask=1.0, threshold=-INF),
    Slice("weighted, k = 0", k=0.0, weights=A, mask=0.0, threshold=INF),
    Slice("weighted, k = 0, weightless far above", FAR, 0.0, weights=A, mask=0.0, threshold=INF),
    Slice("no weight at all, k = 0", k=0.0, weights=(0.0,) * N, mask=0.0, threshold=INF),
    Slice("k above the sum of weights", k=N + 0.5, weights=A, mask=NAN),
    Slice(
        "+inf heavier than k", changed(S, {1: INF, 4: INF}), 1.75, weights=A, mask=(0, 0.5, 0, 0, 0.5, 0), threshold=INF
    ),
    Slice("+inf lighter than k", changed(S, {1: INF}), 3.0, weights=A),
    Slice(
        "selectable weigh less than k", changed(S, {1: -INF}), 5.0, weights=A, mask=(1, 0, 1, 1, 1, 1), threshold=-INF
    ),
    Slice("selectable weigh k", changed(S, {1: -INF}), 4.0, weights=A, mask=(1, 0, 1, 1, 1, 1), threshold=-INF),
    Slice("weight negative", weights=changed(A, {0: -0.5}), mask=NAN),
    Slice("weight NaN", weights=changed(A, {0: NAN}), mask=NAN),
    Slice("weight inf", weights=changed(A, {0: INF}), mask=NAN),
    Slice("weightless NaN", changed(S, {3: NAN}), weights=A, mask=NAN),
    Slice("weighted, k NaN", k=NAN, weights=A, mask=NAN),
    Slice("weighted, removed", weights=A, where=without(4)),
    Slice("weight NaN removed", weights=changed(A, {0: NAN}), where=without(0)),
    Slice("weight negative removed", weights=changed(A, {0: -1.0}), where=without(0)),
    Slice("weight inf removed", weights=changed(A, {0: INF}), where=without(0)),
    Slice("score and weight NaN removed", changed(S, {0: NAN}), weights=changed(A, {0: NAN}), where=without(0)),
    Slice("those left weigh less than k", k=5.0, weights=A, where=without(1), mask=(1, 0, 1, 1, 1, 1), threshold=-INF),
    Slice("weighted, removed, k above the sum of all", k=N + 0.5, weights=A, where=without(1), mask=NAN),
]
#: Without weights and where, and all of them: what holds without weights holds with weights of 1.
SLICES = {"plain": PLAIN, "full": PLAIN + WHERE + WEIGHTED}
TABLES = pytest.mark.parametrize(("table", "dtype"), [("plain", "float64"), ("full", "float64"), ("full", "float32")])


def arguments(table: str, dtype: str) -> dict[str, np.ndarray]:
    """The slices of a table as the arguments of one call."""
    slices = SLICES[table]
    columns = {
        "x": np.asarray([s.x for s in slices], dtype),
        "k": np.asarray([[s.k] for s in slices], dtype),
        "epsilon": np.asarray([[s.epsilon] for s in slices], dtype),
    }
    if table == "full":
        columns["weights"] = np.asarray([s.masses for s in slices], dtype)
        columns["where"] = np.asarray([s.kept for s in slices])
    return columns


@cache
def answers(lib: Library, function: str, table: str, dtype: str) -> np.ndarray:
    given = arguments(table, dtype)
    found = lib.evaluate(FUNCTIONS[function], given.pop("x"), given.pop("k"), **given)
    assert found.dtype == dtype
    return found


def pulled(x: Any, k: Any, cotangent: Any, f: Callable[..., Any], **kwargs: Any) -> dict[str, Any]:
    return softk.vjp(f, x, k, **kwargs)[1](cotangent)


def pushed(x: Any, k: Any, tangents: dict[str, Any], f: Callable[..., Any], **kwargs: Any) -> Any:
    return softk.jvp(f, x, k, tangents=tangents, **kwargs)[1]


def cotangents(lib: Library, function: str, given: dict[str, np.ndarray], **options: Any) -> dict[str, np.ndarray]:
    """The cotangents of all arguments, for a cotangent of the result that has no symmetry."""
    arrays = {name: lib.array(values) for name, values in given.items()}
    shape = given["x"].shape if function in ("topk", "log_topk") else given["x"].shape[:-1]
    cotangent = lib.array(np.cos(np.arange(math.prod(shape))).reshape(shape), given["x"].dtype)
    x, k = arrays.pop("x"), arrays.pop("k")
    found = lib.call(pulled, x, k, cotangent, FUNCTIONS[function], **arrays, **options)
    return {name: lib.numpy(values) for name, values in found.items()}


def is_right(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    """Whether an answer is right: an expected 0, 1, infinity or NaN exactly, the rest to the tolerance."""
    exact = ~np.isfinite(expected) | (expected == 0.0) | (expected == 1.0)
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    near = np.abs(np.where(exact, 0.0, found) - np.where(exact, 0.0, expected)) <= tolerance
    return bool(np.all(np.where(exact, same, near)))


def assert_right(found: np.ndarray, expected: dict[str, Any], tolerances: Any) -> None:
    """Every slice's answer, named in the message where it is wrong."""
    wrong = {}
    for answer, (name, value), tolerance in zip(found, expected.items(), tolerances, strict=True):
        answer, value = np.asarray(answer, np.float64), np.asarray(value, np.float64)
        assert answer.shape == value.shape
        if not is_right(answer, value, tolerance):
            wrong[name] = f"{answer} is not {value}"
    assert not wrong, "\n".join(f"{name}: {text}" for name, text in wrong.items())


# --- every slice of the tables


@TABLES
def test_mask(lib: Library, table: str, dtype: str) -> None:
    expected = {s.name: s.expected("topk") for s in SLICES[table]}
    tolerance = MASK * EPS[dtype]
    assert_right(answers(lib, "topk", table, dtype), expected, [tolerance] * len(expected))


@TABLES
def test_threshold(lib: Library, table: str, dtype: str) -> None:
    expected = {s.name: s.expected("threshold") for s in SLICES[table]}
    # The mask's error, MASK eps, moves t by tau / V as much, and V > 1/8 in every slice but for those of a small budget
    # and its complement, where the mask's error is in proportion to V. Then t is rounded where the scores are.
    sizes = [np.max(np.abs(s.x), where=np.isfinite(s.x), initial=0.0) for s in SLICES[table]]
    tolerances = [
        EPS[dtype] * (MASK * 4.0 * s.epsilon + 4.0 * size) for s, size in zip(SLICES[table], sizes, strict=True)
    ]
    assert_right(answers(lib, "threshold", table, dtype), expected, tolerances)


@pytest.mark.parametrize(("table", "dtype"), [("plain", "float64"), ("full", "float32")])
@pytest.mark.parametrize("function", ["topk", "log_topk", "threshold"])
def test_derivatives_of_every_slice(lib: Library, function: str, table: str, dtype: str) -> None:
    """None is NaN or infinite, not even beside slices that are NaN; what is removed or infinite has none."""
    found = cotangents(lib, function, arguments(table, dtype))
    assert set(found) == set(arguments(table, dtype)) - {"where"}
    for i, s in enumerate(SLICES[table]):
        if not s.is_bad:
            assert all(np.all(np.isfinite(values[i])) for values in found.values()), (s.name, found["x"][i])
            assert np.all(found["x"][i][~s.kept | ~np.isfinite(s.x)] == 0.0), s.name
            assert "weights" not in found or np.all(found["weights"][i][~s.kept] == 0.0), s.name


@pytest.mark.parametrize("function", ["topk", "threshold"])
def test_smallest_are_the_largest_of_the_negated(eager: Library, function: str) -> None:
    given = arguments("plain", "float64")
    found = eager.evaluate(FUNCTIONS[function], -given.pop("x"), given.pop("k"), mode="smallest", **given)
    largest = answers(eager, function, "plain", "float64")
    np.testing.assert_array_equal(found, largest if function == "topk" else -largest)


@pytest.mark.parametrize("function", ["topk", "log_topk", "threshold"])
def test_slices_are_independent(eager: Library, function: str) -> None:
    """Alone or beside any others: the same, but for a last bit, since others may make the solver do a step more."""
    batch = answers(eager, function, "full", "float64")
    given = arguments("full", "float64")
    for i in range(len(batch)):
        row = {name: values[i : i + 1] for name, values in given.items()}
        alone = eager.evaluate(FUNCTIONS[function], row.pop("x"), row.pop("k"), **row)[0]
        np.testing.assert_allclose(alone, batch[i], rtol=4 * EPS["float64"], atol=4 * EPS["float64"])


def test_large_batch_of_small_slices(lib: Library) -> None:
    """Most of them are solved long before the last one, and must stay solved."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((10_000, 3))
    k, epsilon = rng.uniform(0.1, 2.9, (10_000, 1)), rng.uniform(0.05, 2.0, (10_000, 1))
    mask = lib.evaluate(softk.topk, x, k, epsilon=epsilon)
    error = np.abs(mask.sum(axis=-1, keepdims=True) - k) / np.maximum(k, 1.0)
    worst = int(np.argmax(error))
    assert error[worst] <= 16 * EPS["float64"], (x[worst], k[worst], epsilon[worst])


@pytest.mark.parametrize("function", ["topk", "threshold"])
def test_same_input_same_output(eager: Library, function: str) -> None:
    given = arguments("full", "float64")
    again = eager.evaluate(FUNCTIONS[function], given.pop("x"), given.pop("k"), **given)
    np.testing.assert_array_equal(again, answers(eager, function, "full", "float64"))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_inputs_are_not_modified(eager: Library, function: str) -> None:
    if eager.module == "jax":
        pytest.skip("arrays of jax cannot be modified")
    original = arguments("full", "float64")
    if function == "quantile":
        original["k"] = np.asarray([0.25, 0.5])
    given = {name: eager.array(values) for name, values in original.items()}
    rest = {name: values for name, values in given.items() if name not in ("x", "k")}
    out = eager.call(FUNCTIONS[function], given["x"], given["k"], **rest)
    eager.call(pulled, given["x"], given["k"], out, FUNCTIONS[function], **rest)
    for name, values in original.items():
        np.testing.assert_array_equal(eager.numpy(given[name]), values)


# --- how arguments are given

ROWS = np.asarray([S, changed(S, {0: INF, 1: -INF}), (1.0, 1.0, 1.0, 0.0, 0.0, 2.0), changed(S, {2: NAN})])


@pytest.mark.parametrize(("function", "k"), [("topk", 0), ("topk", 2.5), ("topk", N), ("threshold", 1)])
def test_number_is_an_array_of_it(eager: Library, function: str, k: float) -> None:
    """A number takes another way through the solver, by ranks that are known beforehand."""
    f = FUNCTIONS[function]
    found = eager.evaluate(f, ROWS, k, epsilon=0.5)
    full = np.full((len(ROWS), 1), float(k))
    expected = eager.evaluate(f, ROWS, full, epsilon=np.full((len(ROWS), 1), 0.5))
    np.testing.assert_allclose(found, expected, rtol=4 * EPS["float64"], atol=4 * EPS["float64"])


@pytest.mark.parametrize(("function", "scalar"), [("topk", np.int64(2)), ("threshold", np.float32(2.5))])
def test_numpy_scalars_are_numbers(eager: Library, function: str, scalar: Any) -> None:
    found = eager.evaluate(FUNCTIONS[function], ROWS, scalar, epsilon=np.float32(0.5))
    np.testing.assert_array_equal(found, eager.evaluate(FUNCTIONS[function], ROWS, scalar.item(), epsilon=0.5))


@pytest.mark.parametrize("number", [np.float16(0.5), np.float64(0.5), Fraction(1, 2)])
def test_every_real_number_counts(number: Any) -> None:
    for f in FUNCTIONS.values():
        np.testing.assert_array_equal(f(ROWS, number, epsilon=number), f(ROWS, 0.5, epsilon=0.5))


@pytest.mark.parametrize(
    ("axis", "shape"),
    [(-1, ()), (2, (3, 1)), (1, (2, 1, 4)), (-2, (4,)), (0, (3, 4))],
    ids=str,
)
def test_k_and_epsilon_of_each_slice(eager: Library, axis: int, shape: tuple[int, ...], rng: Any) -> None:
    x = rng.standard_normal((2, 3, 4))
    k, epsilon = rng.uniform(0.1, 1.9, shape), rng.uniform(0.1, 2.0, shape)
    found = eager.evaluate(softk.topk, x, np.asarray(k), axis=axis, epsilon=np.asarray(epsilon))
    assert found.shape == x.shape
    batch = (*x.shape[:axis], 1, *x.shape[axis + 1 :]) if axis >= 0 else (*x.shape[: 3 + axis], 1, *x.shape[4 + axis :])
    for i in np.ndindex(batch):
        at = tuple(slice(None) if j == axis % 3 else place for j, place in enumerate(i))
        one = closed_form.topk(x[at], np.broadcast_to(k, batch)[i], np.broadcast_to(epsilon, batch)[i])
        np.testing.assert_allclose(found[at], one, rtol=0, atol=MASK * EPS["float64"])


@pytest.mark.parametrize(
    ("function", "shape", "axis"),
    [
        ("topk", (5,), 0),
        ("topk", (3, 4), 0),
        ("topk", (2, 3, 4), -2),
        ("threshold", (2, 3, 4), 1),
    ],
)
def test_axis(lib: Library, function: str, shape: tuple[int, ...], axis: int, rng: Any) -> None:
    x = rng.standard_normal(shape)
    found = lib.evaluate(FUNCTIONS[function], x, 1.5, axis=axis, epsilon=0.5)
    last = np.moveaxis(x, axis, -1)
    if function == "topk":
        expected = np.moveaxis(closed_form.topk(last, 1.5, 0.5), -1, axis)
    else:
        expected = closed_form.threshold(last, 1.5, 0.5)[..., 0]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=MASK * EPS["float64"])


def joined(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The axes as one axis at the end."""
    moved = np.moveaxis(values, axes, range(-len(axes), 0))
    return moved.reshape(*moved.shape[: -len(axes)], -1)


@pytest.mark.parametrize(
    ("function", "axis"),
    [*((f, (-1, 0)) for f in FUNCTIONS), *(("topk", axis) for axis in ((0, 1), (2, 1), (1,), (0, 1, 2)))],
    ids=str,
)
def test_several_axes(eager: Library, function: str, axis: tuple[int, ...], rng: Any) -> None:
    """The axes of a tuple count as one, in every argument, and in the derivatives."""
    x, weights = rng.standard_normal((2, 3, 4)), rng.uniform(0.5, 2.0, (3, 1))
    axes = tuple(sorted(one % 3 for one in axis))
    kept = tuple(1 if one in axes else size for one, size in enumerate(x.shape))
    share = 0.8 if function == "quantile" else 1.5
    k, epsilon = share * rng.uniform(0.5, 1.0, kept), rng.uniform(0.3, 0.8, kept)
    options = {"keepdims": True} if function in ("threshold", "quantile") else {}
    where = np.ones(x.shape, bool) if function == "log_topk" else rng.random(x.shape) < 0.8  # its -inf has no distance
    given = {"epsilon": epsilon, "weights": weights, "where": where}
    names = ("x", "q" if function == "quantile" else "k", "epsilon", "weights")
    if function == "quantile":  # the axes of a probability come first, so it has none here
        k = np.asarray(0.4)

    def pulled(values: Any, mass: Any, u: Any, axis: Any, **given: Any) -> tuple[Any, ...]:
        out, pull = softk.vjp(FUNCTIONS[function], values, mass, axis=axis, **given, **options)
        found = pull(u)
        return (out, *(found[name] for name in names))

    def flat(values: np.ndarray) -> np.ndarray:
        return joined(np.broadcast_to(values, x.shape), axes)

    def one(values: np.ndarray) -> np.ndarray:
        return joined(values, axes) if values.ndim else values

    one_axis = {"epsilon": one(epsilon), "weights": flat(weights), "where": flat(given["where"])}
    u = rng.standard_normal(x.shape if function.endswith("topk") else kept)
    wanted = pulled(flat(x), one(k), joined(u, axes), -1, **one_axis)
    arrays = {name: eager.array(value, value.dtype) for name, value in given.items()}
    found = pulled(eager.array(x), eager.array(k), eager.array(u), axis, **arrays)
    found = tuple(eager.numpy(value) for value in found)
    assert [value.shape for value in found] == [u.shape, x.shape, k.shape, epsilon.shape, weights.shape]
    of_weights = (
        np.moveaxis(
            wanted[4].reshape(*(s for i, s in enumerate(x.shape) if i not in axes), *(x.shape[i] for i in axes)),
            range(-len(axes), 0),
            axes,
        )
        .sum(axis=(0, 2))
        .reshape(3, 1)
    )
    for own, other in zip(found[:4], wanted[:4], strict=True):
        closed_form.assert_close(joined(own, axes) if own.ndim else own, other, 1e-12)
    closed_form.assert_close(found[4], of_weights, 1e-12)


@pytest.mark.parametrize("keepdims", [False, True])
def test_several_axes_of_a_quantile(eager: Library, keepdims: bool, rng: Any) -> None:
    x, q = rng.standard_normal((2, 3, 4)), np.asarray([0.1, 0.7])
    found = eager.evaluate(softk.quantile, x, q, axis=(2, 0), epsilon=1e-6, keepdims=keepdims)
    np.testing.assert_allclose(found, np.quantile(x, q, axis=(0, 2), keepdims=keepdims), rtol=0, atol=1e-9)


def test_a_tuple_selects_in_the_order_of_the_axes() -> None:
    """Ties go to the lowest index, the last axis first, whatever the order in the tuple."""
    found = softk.topk(np.ones((2, 3)), 4, axis=(1, 0), hard=True)
    np.testing.assert_array_equal(found, [[1, 1, 1], [1, 0, 0]])


def test_axis_may_be_any_integer() -> None:
    np.testing.assert_array_equal(softk.topk(ROWS, 1, axis=(np.int64(0), 1)), softk.topk(ROWS, 1, axis=(0, 1)))
    np.testing.assert_array_equal(softk.topk(ROWS, 1, axis=np.int64(0)), softk.topk(ROWS, 1, axis=0))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64"])
def test_integer_k_and_weights(eager: Library, dtype: str) -> None:
    x, k, weights = ROWS[:3], np.asarray([[2], [0], [5]]), np.asarray([1, 2, 0, 1, 3, 1])
    as_float = eager.evaluate(softk.topk, x, k.astype(float), weights=weights.astype(float))
    found = eager.evaluate(softk.topk, x, k.astype(dtype), weights=weights.astype(dtype))
    np.testing.assert_array_equal(found, as_float)


def test_integer_arguments_have_no_cotangent(eager: Library) -> None:
    given = {"x": ROWS[:3], "k": np.asarray([[2], [0], [5]]), "weights": np.asarray([1, 2, 0, 1, 3, 1])}
    assert set(cotangents(eager, "topk", given)) == {"x"}


@pytest.mark.parametrize("function", ["topk", "quantile"])
def test_cotangents_have_the_shape_and_dtype_of_their_arguments(eager: Library, function: str) -> None:
    given = {
        "x": ROWS[:2].astype(np.float32),
        "k": np.asarray(0.5),
        "epsilon": np.asarray([[0.5], [1.0]], np.float32),
        "weights": np.asarray(A),
    }
    found = cotangents(eager, function, given)
    named = {"q" if function == "quantile" and name == "k" else name: values for name, values in given.items()}
    assert {name: (values.shape, values.dtype) for name, values in found.items()} == {
        name: (values.shape, values.dtype) for name, values in named.items()
    }


@pytest.mark.parametrize("name", ["weights", "where"])
def test_items_broadcast(eager: Library, name: str) -> None:
    x = np.moveaxis(np.broadcast_to(ROWS[:2], (3, 2, N)), -1, 1)
    row = np.asarray([A]).T if name == "weights" else np.asarray([without(1)]).T
    found = eager.evaluate(softk.topk, x.copy(), 2, axis=1, **{name: row})
    full = eager.evaluate(softk.topk, x.copy(), 2, axis=1, **{name: np.broadcast_to(row, x.shape).copy()})
    np.testing.assert_array_equal(found, full)


@pytest.mark.parametrize("function", ["topk", "quantile"])
def test_whole_weights_are_repetitions(eager: Library, function: str, rng: Any) -> None:
    weights = np.asarray([2, 1, 3])
    x = rng.standard_normal((4, 3))
    at = 0.3 if function == "quantile" else 2.5
    found = eager.evaluate(FUNCTIONS[function], x, at, epsilon=0.5, weights=weights)
    repeated = eager.evaluate(FUNCTIONS[function], np.repeat(x, weights, axis=-1), at, epsilon=0.5)
    if function == "topk":
        repeated = repeated[:, np.cumsum(weights) - 1]
    # Both are within MASK eps of the truth; for a threshold that is tau / V = 1/4 / (1/2) as much, and its rounding.
    np.testing.assert_allclose(found, repeated, rtol=0, atol=2 * MASK * EPS["float64"])


@pytest.mark.parametrize(("function", "axis"), [("threshold", 0), ("quantile", -1)])
def test_keepdims(eager: Library, function: str, axis: int) -> None:
    f, x = FUNCTIONS[function], ROWS[:3]
    kept = eager.evaluate(f, x, 0.5, axis=axis, epsilon=0.1, keepdims=True)
    np.testing.assert_array_equal(kept, np.expand_dims(eager.evaluate(f, x, 0.5, axis=axis, epsilon=0.1), axis))


# --- kinds of arrays


@pytest.mark.parametrize(
    ("function", "dtype"),
    [("topk", "float16"), ("quantile", "float16"), ("topk", "bfloat16")],
)
def test_half_precision_is_computed_in_float32(eager: Library, function: str, dtype: str) -> None:
    if (dtype == "bfloat16" and "autodiff" not in eager.tags) or "half" not in eager.tags:
        pytest.skip(f"{eager.name} has no {dtype}")
    x = eager.array(ROWS, np.float32)
    xp = array_api_compat.array_namespace(x)
    half = getattr(xp, dtype)
    x, level, weights = (xp.astype(values, half) for values in (x, eager.array([[0.5]] * 4), eager.array([A])))

    def call(convert: Callable[[Any], Any]) -> Any:
        return eager.call(
            FUNCTIONS[function], convert(x), convert(level), epsilon=convert(level), weights=convert(weights)
        )

    found, single = call(lambda values: values), call(lambda values: xp.astype(values, xp.float32))
    assert found.dtype == half
    assert single.dtype == xp.float32
    rounded = xp.astype(xp.astype(single, half), xp.float32)
    np.testing.assert_array_equal(eager.numpy(xp.astype(found, xp.float32)), eager.numpy(rounded))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_result_is_of_the_kind_of_x(eager: Library, function: str) -> None:
    x = eager.array(ROWS, np.float32)
    found = eager.call(FUNCTIONS[function], x, 0.5, epsilon=0.1)
    assert type(found) is type(x)
    assert found.dtype == x.dtype
    assert array_api_compat.device(found) == array_api_compat.device(x)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_device_is_kept(function: str) -> None:
    """array-api-strict has devices that are not its default, on which a forgotten `device=` shows."""
    strict = pytest.importorskip("array_api_strict")
    x = strict.asarray(ROWS[:3], device=strict.Device("device1"))
    assert x.device != strict.asarray(0.0).device
    for k in (0.5, strict.asarray(0.5, device=x.device, dtype=strict.float64)):
        out, pullback = softk.vjp(FUNCTIONS[function], x, k, epsilon=0.1)
        assert out.device == x.device
        assert all(values.device == x.device for values in pullback(out).values())


VIEWS: dict[str, Callable[[Any], Any]] = {
    "transposed": lambda values: np.ascontiguousarray(values.T),
    "strided": lambda values: np.repeat(values, 2, axis=-1),
    "reversed": lambda values: values[:, ::-1].copy(),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(eager: Library, view: str) -> None:
    """What is not contiguous in memory is as good."""
    if view == "reversed" and eager.module == "torch":
        pytest.skip("torch has no negative strides")
    x = eager.array(VIEWS[view](ROWS))
    xp = array_api_compat.array_namespace(x)
    x = {
        "transposed": lambda: xp.permute_dims(x, (1, 0)),
        "strided": lambda: x[:, ::2],
        "reversed": lambda: x[:, ::-1],
    }[view]()
    for f in (softk.topk, softk.threshold):
        found = eager.numpy(eager.call(f, x, 2, epsilon=0.5))
        expected = eager.evaluate(f, ROWS, 2, epsilon=0.5)
        if "gpu" in eager.tags:  # sums follow the layout of the memory there
            np.testing.assert_allclose(found, expected, rtol=16 * EPS["float64"], atol=EPS["float64"])
        else:
            np.testing.assert_array_equal(found, expected)


def test_empty_batch(eager: Library) -> None:
    x = np.zeros((0, 3))
    assert eager.evaluate(softk.topk, x, 2).shape == (0, 3)
    assert eager.evaluate(softk.threshold, x, 2.5).shape == (0,)
    assert eager.evaluate(softk.threshold, x, np.zeros((0, 1)), keepdims=True).shape == (0, 1)
    assert eager.evaluate(softk.quantile, x, 0.5, epsilon=0.1).shape == (0,)
    assert eager.evaluate(softk.quantile, x, np.asarray([0.2, 0.5]), epsilon=0.1).shape == (2, 0)
    assert eager.evaluate(softk.topk, x, 2, weights=np.ones(3), where=np.full((1, 3), True), hard=False).shape == (0, 3)
    given = {"x": x, "k": np.zeros((0, 1)), "epsilon": np.asarray(0.5)}
    assert {name: values.shape for name, values in cotangents(eager, "topk", given).items()} == {
        "x": (0, 3),
        "k": (0, 1),
        "epsilon": (),
    }


@TABLES
def test_log_mask_is_the_logarithm_of_the_mask(lib: Library, table: str, dtype: str) -> None:
    """In every slice of the tables: infinities, NaN, removed items, k = 0 and k = n."""
    mask, found = (answers(lib, function, table, dtype).astype(np.float64) for function in ("topk", "log_topk"))
    with np.errstate(divide="ignore"):
        wanted = np.log(mask)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    assert np.all(np.isneginf(wanted[np.isneginf(found)]))
    seen = wanted > -20.0
    tolerance = 4 * MASK * EPS[dtype]
    np.testing.assert_allclose(np.exp(found[seen]), mask[seen], rtol=0.0, atol=tolerance)
    low = seen & (wanted < -1.0)
    np.testing.assert_allclose(found[low], wanted[low], rtol=0.0, atol=tolerance)
    assert np.all(found[~seen & ~np.isnan(found)] < -19.0)
    never = np.stack([np.broadcast_to(~s.kept | np.isneginf(s.x), (N,)) for s in SLICES[table]])
    assert np.all(np.isneginf(found[never & ~np.isnan(found)]))


@pytest.mark.parametrize("hard", [False, True])
def test_no_scores(lib: Library, hard: bool) -> None:
    """Of nothing, nothing is selected."""
    assert lib.evaluate(softk.topk, np.zeros((2, 0)), 0, hard=hard).shape == (2, 0)
    assert lib.evaluate(softk.topk, np.zeros((0, 2)), np.asarray([0.0, 0.0]), axis=0, hard=hard).shape == (0, 2)


def test_one_score(eager: Library) -> None:
    x = np.asarray([[5.0]])
    np.testing.assert_allclose(eager.evaluate(softk.topk, x, 0.25), [[0.25]], rtol=4 * EPS["float64"])
    t = eager.evaluate(softk.threshold, x, 0.25, epsilon=2.0)
    np.testing.assert_allclose(t, [5.0 + math.log(3.0)], rtol=4 * EPS["float64"])
    np.testing.assert_array_equal(
        eager.evaluate(softk.quantile, x, np.asarray([0.0, 0.3, 1.0]), epsilon=0.1), [[5.0]] * 3
    )


# --- derivatives at the extremes


def extremes(dtype: str, most: float = INF) -> dict[str, np.ndarray]:
    """Slices of every kind of scores, of at most that size, at every kind of k and epsilon."""
    rng = np.random.default_rng(0)
    largest = float(np.finfo(dtype).max)
    kinds = [
        rng.standard_normal(N),
        np.asarray([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]),
        np.zeros(N),
        np.asarray([1.0, 1.0, 1.0, -1.0, -1.0, -1.0]) * 40.0,
        np.asarray([INF, INF, 1.0, 0.0, -INF, -INF]),
        np.asarray([INF] * 3 + [-INF] * 3),
        np.full(N, -INF),
        1e6 + rng.standard_normal(N),
        1e30 * rng.standard_normal(N),
        np.asarray([1e30, *rng.standard_normal(N - 1)]),
        float(np.finfo(dtype).smallest_subnormal) * np.arange(N),
        np.asarray([largest, -largest, 0.0, 1.0, largest, -largest]),
        rng.permutation([3.0, 1e-3, -3.0, 1e-6, -1e-6, 0.0]),
    ]
    kinds = [x for x in kinds if np.max(np.abs(x)) <= most]
    levels = (0.0, 1e-6, 1.0, 2.0, 2.5, 3.0, N - 1.0, N - 1e-3, N)
    rows = list(product(kinds, levels, (1e-6, 0.1, 20.0)))
    return {
        "x": np.stack([x for x, _, _ in rows]).astype(dtype),
        "k": np.asarray([[k] for _, k, _ in rows], dtype),
        "epsilon": np.asarray([[epsilon] for _, _, epsilon in rows], dtype),
    }


ITEMS = {"weights": np.asarray([A]), "where": np.asarray([without(2)])}


def nan_slices(found: np.ndarray, given: dict[str, np.ndarray]) -> list[tuple[Any, ...]]:
    """The first slices whose derivative is NaN."""
    rows = np.flatnonzero(np.isnan(found).reshape(len(found), -1).any(axis=-1))
    return [tuple(given[name][i].tolist() for name in ("x", "k", "epsilon")) for i in rows[:3]]


def extreme_problem(function: str, dtype: str, items: bool) -> dict[str, np.ndarray]:
    # The derivative in q is n times as large as the scores; where that is infinite, two of either sign add up to NaN.
    given = extremes(dtype, most=1e35 if function == "quantile" else INF)
    if function == "quantile":
        given["k"] = np.asarray(0.3, dtype)
    if items:
        given |= {name: values.astype(dtype) if name == "weights" else values for name, values in ITEMS.items()}
    return given


@pytest.mark.parametrize(
    ("function", "items"), [("topk", False), ("topk", True), ("threshold", True), ("quantile", True)]
)
def test_no_cotangent_is_nan(eager: Library, function: str, items: bool) -> None:
    given = extreme_problem(function, "float32", items)
    found = cotangents(eager, function, given)
    for name in ("x", "k", "epsilon"):
        if name in found and found[name].ndim:
            assert not nan_slices(found[name], given), name
    assert not any(np.isnan(values).any() for values in found.values())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_tangent_is_nan(eager: Library, function: str) -> None:
    """Along all arguments at once: a NaN of one of them stays one in the sum."""
    given = extreme_problem(function, "float32", True)
    arrays = {name: eager.array(values) for name, values in given.items()}
    tangents = {
        "q" if (function, name) == ("quantile", "k") else name: eager.array(
            np.cos(np.arange(values.size)).reshape(values.shape), "float32"
        )
        for name, values in given.items()
        if name != "where"
    }
    x, k = arrays.pop("x"), arrays.pop("k")
    found = eager.numpy(eager.call(pushed, x, k, tangents, FUNCTIONS[function], **arrays))
    assert not nan_slices(found, given)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_native_gradient_is_nan(eager: Library, function: str) -> None:
    """The frameworks compose the rules with their own derivatives of everything around them."""
    if "autodiff" not in eager.tags or "traced" in eager.tags:
        pytest.skip(f"{eager.name} is differentiated by softk.vjp")
    given = extreme_problem(function, "float32", True)
    arrays = {name: eager.array(values) for name, values in given.items()}
    x, k = arrays.pop("x"), arrays.pop("k")
    shape = given["x"].shape if function in ("topk", "log_topk") else given["x"].shape[:-1]
    cotangent = eager.array(np.cos(np.arange(math.prod(shape))).reshape(shape), "float32")
    found = native_gradient(backend_of(x), lambda x: FUNCTIONS[function](x, k, **arrays), x, cotangent)
    assert not nan_slices(eager.numpy(found), given)


# --- hard=True


def k_hot(x: np.ndarray, k: float, kept: np.ndarray) -> np.ndarray:
    """The first k of the selectable by score, the lowest index first among equals."""
    if not (0 <= k <= x.size) or k != math.floor(k) or np.any(np.isnan(x[kept])):
        return np.full(x.size, NAN)
    x = np.where(kept, x, -INF)
    mask = np.zeros(x.size)
    mask[np.argsort(-x, stable=True)[: int(k)]] = 1.0
    return np.where(x == -INF, 0.0, mask)


def hard_problem() -> dict[str, np.ndarray]:
    """The slices of the tables without weights, and some with many ties and infinities."""
    rng = np.random.default_rng(0)
    slices = [s for s in PLAIN + WHERE if s.epsilon > 0.0 and s.epsilon < INF]
    drawn = rng.choice([0.0, -0.0, 1.0, 1.0, INF, -INF], (30, N))
    return {
        "x": np.concatenate([np.asarray([s.x for s in slices]), drawn]),
        "k": np.concatenate([[[s.k] for s in slices], rng.integers(0, N + 1, (30, 1))]),
        "where": np.concatenate([[s.kept for s in slices], rng.uniform(size=(30, N)) < 0.8]),
    }


@pytest.mark.parametrize("mode", ["largest", "smallest"])
def test_hard_mask(lib: Library, mode: str) -> None:
    given = hard_problem()
    expected = np.stack([k_hot(x, k, kept) for x, (k,), kept in zip(*given.values(), strict=True)])
    x = given["x"] if mode == "largest" else -given["x"]
    found = lib.evaluate(softk.topk, x, given["k"], where=given["where"], mode=mode, hard=True)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("k", [2.0, N])
def test_hard_mask_of_a_number(eager: Library, k: float) -> None:
    expected = np.stack([k_hot(x, k, np.full(N, True)) for x in ROWS])
    np.testing.assert_array_equal(eager.evaluate(softk.topk, ROWS, k, hard=True), expected)


def test_hard_mask_has_the_soft_derivative(eager: Library) -> None:
    """A kernel solves for the threshold of each mask by itself: the two may differ by roundings."""
    given = hard_problem()
    whole = given["k"][:, 0] == np.floor(given["k"][:, 0])
    given = {name: values[whole] for name, values in given.items()} | {"epsilon": np.asarray(0.5)}
    soft, hard = (cotangents(eager, "topk", given, hard=hard) for hard in (False, True))
    assert set(hard) == {"x", "k", "epsilon"}
    for name, values in soft.items():
        largest = np.max(np.abs(values), where=np.isfinite(values), initial=0.0)  # invalid rows are NaN
        np.testing.assert_allclose(hard[name], values, rtol=0, atol=4 * EPS["float64"] * largest)


def test_hard_mask_of_a_count_that_the_dtype_does_not_hold(rng: np.random.Generator) -> None:
    """float32 does not tell 2^24 + 1 from 2^24."""
    x = np.zeros(2**24 + 3, np.float16)
    x[rng.integers(0, x.size, 1000)] = 1.0
    found = softk.topk(x, 2**24 + 1, hard=True)
    assert int(np.count_nonzero(found)) == 2**24 + 1
    assert np.all(found[x == 1.0] == 1.0)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_hard_masks_of_an_array_of_counts_that_the_dtype_does_not_hold(name: str) -> None:
    """Each has as many ones as it says, and the largest scores."""
    lib = BY_NAME[name]
    lib.require()
    n = 2**24 + 8
    x = np.zeros(n, np.float32)
    x[-7:] = 1.0
    found = lib.numpy(softk.topk(lib.array(x), lib.array(np.asarray([2**24 + 3])), hard=True))
    assert np.all(found[:-12] == 1.0)
    assert np.all(found[-12:-7] == 0.0)
    assert np.all(found[-7:] == 1.0)


# --- a k within a rounding of an end


@pytest.mark.parametrize("dtype", EPS)
def test_k_within_a_rounding_of_an_end(lib: Library, dtype: str) -> None:
    """8 units of its last digit on either side of n, and as many below 0, but above it every k is itself."""
    eps = EPS[dtype]
    over, under = [[N * (1 + step * eps)] for step in (-8, -3, 1, 8)], [[-8 * N * eps], [-eps / 4]]
    k = np.asarray([*over, *under, [N * (1 + 24 * eps)], [-24 * N * eps]], dtype)
    x = np.tile(np.asarray(S, dtype), (len(k), 1))
    expected = np.asarray([1.0] * 4 + [0.0] * 2 + [NAN] * 2, dtype)[:, None] * np.ones(N)
    np.testing.assert_array_equal(lib.evaluate(softk.topk, x, k), expected)
    np.testing.assert_array_equal(lib.evaluate(softk.topk, x, k, hard=True), expected)
    ends = np.asarray([-INF] * 4 + [INF] * 2 + [NAN] * 2)
    np.testing.assert_array_equal(lib.evaluate(softk.threshold, x, k), ends)
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(lib.evaluate(softk.log_topk, x, k), np.log(expected))
    found = cotangents(lib, "topk", {"x": x[:6], "k": k[:6]})
    assert all(np.all(np.isfinite(values)) for values in found.values())
    small = lib.evaluate(softk.topk, x[:1], np.asarray([[eps / 4]], dtype), epsilon=2.0**-9)
    np.testing.assert_allclose(small, [np.where(np.asarray(S) == 3.0, eps / 4, 0.0)], rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_narrow_k_within_a_rounding_of_an_end(dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.tensor(S, dtype=getattr(torch, dtype))
    k = torch.tensor(N * (1 + 2 * EPS["float32"]), requires_grad=True)
    for mask in (softk.topk(x, k), softk.topk(x, k.to(x.dtype)), softk.topk(x, N * (1 + 2 * EPS["float32"]))):
        assert mask.dtype == x.dtype
        assert bool((mask == 1).all())
    # A k that left by a rounding is still moved back: by the derivative at the end.
    u = torch.linspace(-1.0, 2.0, N)
    (found,) = torch.autograd.grad(softk.topk(torch.tensor(S), k, epsilon=1.0) @ u, k)
    (wanted,) = torch.autograd.grad(softk.topk(torch.tensor(S), (k - k.detach()) + N, epsilon=1.0) @ u, k)
    assert found == wanted != 0.0


def test_a_number_k_within_a_rounding_of_an_end(eager: Library) -> None:
    x = np.asarray([3.0, 1.0, 2.0])
    number = 10 * (0.1 + 0.2)
    assert number > 3
    for hard in (False, True):
        np.testing.assert_array_equal(eager.evaluate(softk.topk, x, number, hard=hard), np.ones(3))
        np.testing.assert_array_equal(eager.evaluate(softk.topk, x, 0.3 - 3 * 0.1, hard=hard), np.zeros(3))
    np.testing.assert_array_equal(eager.evaluate(softk.topk, x, 0.3 - 3 * 0.1, weights=x), np.zeros(3))
    np.testing.assert_array_equal(eager.evaluate(softk.topk, x.astype("float32"), 3.000001), np.ones(3))
    np.testing.assert_array_equal(eager.evaluate(softk.topk, x, np.float64(number), mode="smallest"), np.ones(3))
    assert eager.evaluate(softk.threshold, x, number) == -INF
    points = np.asarray([[0.0], [1.0], [5.0]])
    found = eager.evaluate(softk.neighbors.weights, points, points, number)
    np.testing.assert_array_equal(found, np.ones((3, 3)))
    np.testing.assert_array_equal(
        eager.evaluate(softk.neighbors.weights, points, points, np.full((3, 1), number)), np.ones((3, 3))
    )


def test_a_probability_within_a_rounding_of_an_end(eager: Library) -> None:
    q = np.asarray([1.0 + 2 * EPS["float64"], -EPS["float64"] / 8, 0.0, 1.0])
    found = eager.evaluate(softk.quantile, ROWS, q, epsilon=0.1)
    np.testing.assert_array_equal(found[:2], found[:1:-1])
    np.testing.assert_array_equal(eager.evaluate(softk.quantile, ROWS, float(q[0]), epsilon=0.1), found[0])
    np.testing.assert_array_equal(eager.evaluate(softk.quantile, ROWS, float(q[1]), epsilon=0.1), found[1])


@pytest.mark.parametrize("dtype", EPS)
def test_weights_that_sum_to_k(eager: Library, dtype: str) -> None:
    """Normalised weights, however their sum was rounded: all that is kept is selected."""
    rng = np.random.default_rng(1)
    x, weights = rng.normal(size=(200, 20)).astype(dtype), rng.uniform(size=(200, 20)).astype(dtype)
    where = rng.uniform(size=x.shape) < 0.7
    where[:, 0] = True
    weights /= np.where(where, weights, 0.0).astype(dtype).sum(axis=-1, keepdims=True)
    found = eager.evaluate(softk.topk, x, 1.0, weights=weights, where=where)
    np.testing.assert_array_equal(found, where)
    kept = np.where(where, weights, 0.0).astype(dtype)
    for k in (np.cumulative_sum(kept, axis=-1)[:, -1:], np.cumulative_sum(kept[:, ::-1], axis=-1)[:, -1:]):
        mask = eager.evaluate(softk.topk, x, k, weights=kept, epsilon=0.01)
        np.testing.assert_array_equal(mask[where], 1.0)
        assert not np.isnan(eager.evaluate(softk.log_topk, x, k, weights=kept)).any()
        assert np.all(eager.evaluate(softk.threshold, x, k, weights=kept) == -INF)


@pytest.mark.parametrize(("dtype", "narrow"), [("float64", "float32"), ("float32", "float16")])
def test_narrow_weights_that_sum_to_k(eager: Library, dtype: str, narrow: str) -> None:
    """The rounding of their sum is that of their own dtype."""
    if narrow == "float16" and "half" not in eager.tags:
        pytest.skip(f"{eager.name} has no float16")
    rng = np.random.default_rng(1)
    x, weights = rng.normal(size=(200, 20)).astype(dtype), rng.uniform(size=(200, 20)).astype(narrow)
    where = rng.uniform(size=x.shape) < 0.7
    where[:, 0] = True
    weights /= np.where(where, weights, 0.0).astype(narrow).sum(axis=-1, keepdims=True)
    for k in (1.0, np.ones((200, 1), dtype)):
        np.testing.assert_array_equal(eager.evaluate(softk.topk, x, k, weights=weights, where=where), where)
        assert np.all(eager.evaluate(softk.threshold, x, k, weights=weights, where=where) == -INF)
    assert np.isnan(eager.evaluate(softk.topk, x, 3.0, weights=weights, where=where)).all()


def test_a_sum_of_weights_in_another_order() -> None:
    """One by one the same number is rounded the same way each time, which in float32 is a tenth of a percent here."""
    for size in (0.1, 0.3, 0.123):
        weights = np.full(100_000, size, np.float32)
        k = np.cumulative_sum(weights)[-1]
        mask = softk.topk(np.linspace(0.0, 1.0, weights.size, dtype=np.float32), k, weights=weights)
        assert not np.isnan(mask).any()
        held = min(float(k), math.fsum(weights))
        assert abs(math.fsum(mask * weights.astype(float)) - held) <= 16 * EPS["float32"] * held


def test_weights_of_a_part_that_sum_to_k() -> None:
    x, weights = np.asarray([3, 2, 1, 0], np.float32), np.asarray([1.1, 1.3, 1.3, 1.0], np.float32)
    found = softk.topk(x, 3.6999998, weights=weights, where=np.asarray([True, True, True, False]))
    np.testing.assert_array_equal(found, [1.0, 1.0, 1.0, 0.0])


# --- the quantile

LEVELS = np.asarray([0.0, 0.125, 0.25, 0.5, 0.9375, 1.0])
LADDER = (2.0, -1.0, 0.5, 4.0, 1.0, -3.0)

QUANTILE_EPSILON = 2.0**-9

QUANTILES = [
    Slice("finite", LADDER, epsilon=QUANTILE_EPSILON),
    Slice("offset", tuple(1024.0 + x for x in LADDER), epsilon=QUANTILE_EPSILON),
    Slice("NaN", changed(LADDER, {0: NAN}), mask=NAN, epsilon=QUANTILE_EPSILON),
    Slice("+inf", changed(LADDER, {0: INF}), epsilon=QUANTILE_EPSILON),
    Slice("-inf", changed(LADDER, {0: -INF}), epsilon=QUANTILE_EPSILON),
    Slice("two +inf, two -inf", (INF, 1.0, -INF, -INF, 0.0, INF), epsilon=QUANTILE_EPSILON),
    Slice("only +inf", (INF,) * N, epsilon=QUANTILE_EPSILON),
    Slice("only -inf", (-INF,) * N, epsilon=QUANTILE_EPSILON),
    Slice("where", LADDER, where=without(0, 3), epsilon=QUANTILE_EPSILON),
    Slice("NaN removed", changed(LADDER, {0: NAN}), where=without(0), epsilon=QUANTILE_EPSILON),
    Slice("one left", LADDER, where=without(0, 1, 2, 3, 5), epsilon=QUANTILE_EPSILON),
    Slice("frequencies", LADDER, weights=(2, 1, 3, 0, 1, 2), epsilon=QUANTILE_EPSILON),
    Slice(
        "NaN of frequency 0 removed",
        changed(LADDER, {3: NAN}),
        weights=(2, 1, 3, 0, 1, 2),
        where=without(3),
        epsilon=QUANTILE_EPSILON,
    ),
    Slice("frequencies, where", LADDER, weights=(2, 1, 3, 0, 1, 2), where=without(0), epsilon=QUANTILE_EPSILON),
    Slice("frequency NaN removed", LADDER, weights=(NAN, 1, 3, 0, 1, 2), where=without(0), epsilon=QUANTILE_EPSILON),
    Slice("one item of frequency 1", LADDER, weights=(0, 0, 1, 0, 0, 0), epsilon=QUANTILE_EPSILON),
    Slice("one item of frequency 0.3", LADDER, weights=(0, 0, 0.3, 0, 0, 0), epsilon=QUANTILE_EPSILON),
    Slice("one item left, of frequency 0.3", LADDER, weights=(2, 1, 0.3, 0, 0, 0), where=without(0, 1)),
    Slice("probabilities", LADDER, weights=(0.1, 0.2, 0.3, 0.0, 0.2, 0.2), mask=NAN, epsilon=QUANTILE_EPSILON),
    Slice("less than one observation", LADDER, weights=(0.1,) * N, mask=NAN, epsilon=QUANTILE_EPSILON),
    Slice("one observation left", LADDER, weights=(9, 0.5, 0, 0.5, 0, 0), where=without(0), mask=NAN),
    Slice("frequency negative", LADDER, weights=(2, 1, -1, 0, 1, 2), mask=NAN, epsilon=QUANTILE_EPSILON),
    Slice("frequency NaN", LADDER, weights=(2, 1, NAN, 0, 1, 2), mask=NAN, epsilon=QUANTILE_EPSILON),
    Slice("frequency inf", LADDER, weights=(2, 1, INF, 0, 1, 2), mask=NAN, epsilon=QUANTILE_EPSILON),
    Slice("nothing of any frequency", LADDER, weights=(0,) * N, mask=NAN, epsilon=QUANTILE_EPSILON),
    Slice("none left", LADDER, where=(False,) * N, mask=NAN, epsilon=QUANTILE_EPSILON),
    Slice("epsilon 0", LADDER, epsilon=0.0, mask=NAN),
    Slice("epsilon NaN", LADDER, epsilon=NAN, mask=NAN),
]


def hard_quantile(s: Slice) -> np.ndarray:
    """NumPy's quantile of the items repeated by their frequency; its own has NaN beside infinities."""
    if s.is_bad:
        return np.full(LEVELS.shape, NAN)
    x = np.sort(np.repeat(np.asarray(s.x)[s.kept], np.ceil(s.masses[s.kept]).astype(int)))
    place = (x.size - 1) * LEVELS
    below = np.floor(place).astype(int)
    low, high, fraction = x[below], x[np.minimum(below + 1, x.size - 1)], place - below
    inner = np.where((fraction == 0.0) | (low == high), low, 0.0)
    between = (fraction > 0.0) & (low != high)
    inner[between] = (1.0 - fraction[between]) * low[between] + fraction[between] * high[between]
    return inner


@pytest.mark.parametrize("dtype", EPS)
def test_quantile_of_every_slice(lib: Library, dtype: str) -> None:
    """Neighbors are 500 temperatures apart: exact where no score is repeated."""
    found = lib.evaluate(
        softk.quantile,
        np.asarray([s.x for s in QUANTILES], dtype),
        LEVELS.astype(dtype),
        epsilon=np.asarray([[s.epsilon] for s in QUANTILES], dtype),
        weights=np.asarray([s.masses for s in QUANTILES], dtype),
        where=np.asarray([s.kept for s in QUANTILES]),
    )
    assert found.shape == (len(LEVELS), len(QUANTILES))
    expected = {s.name: hard_quantile(s) for s in QUANTILES}
    assert_right(found.T, expected, [quantile_tolerance(s, EPS[dtype]) for s in QUANTILES])


def quantile_tolerance(s: Slice, eps: float) -> float:
    """Rounding, and how far the order statistics of m equal scores lie apart: up to log(2 m - 1) temperatures."""
    size = np.max(np.abs(s.x), where=np.isfinite(s.x), initial=1.0)
    repeated = np.max(s.masses, where=np.isfinite(s.masses), initial=1.0)
    return float(8 * eps * size + (1 + 1e-6) * QUANTILE_EPSILON / 2 * math.log(2 * repeated - 1))


@pytest.mark.parametrize(("shape", "axis", "keepdims"), [((2, 3), 0, True), ((), 1, False)])
def test_quantile_is_numpy_s(eager: Library, shape: tuple[int, ...], axis: int, keepdims: bool, rng: Any) -> None:
    x = 0.25 * rng.permutation(2 * 3 * 4).reshape(2, 3, 4)
    q = np.asarray(rng.uniform(size=shape))
    found = eager.evaluate(softk.quantile, x, q, axis=axis, epsilon=1e-3, keepdims=keepdims)
    expected = np.quantile(x, q, axis=axis, keepdims=keepdims)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=8 * EPS["float64"] * np.max(x))


def test_soft_quantile(eager: Library, rng: Any) -> None:
    """Away from the limit: linear interpolation of soft order statistics, with weights that are not whole too."""
    x, weights = rng.standard_normal((2, N)), np.asarray(A)
    q = np.asarray([0.1, 0.55, 0.95])
    found = eager.evaluate(softk.quantile, x, q, epsilon=0.5, weights=weights)
    expected = [closed_form.quantile(x, level, 0.5, weights)[:, 0] for level in q]
    np.testing.assert_allclose(found, np.stack(expected), rtol=0, atol=MASK * EPS["float64"])


@pytest.mark.parametrize("dtype", EPS)
def test_weights_that_are_probabilities_have_no_quantiles(eager: Library, dtype: str, rng: Any) -> None:
    """Whatever their sum was rounded to. Multiplied with a number of observations they are frequencies."""
    x = rng.standard_normal((40, 500)).astype(dtype)
    weights = np.exp(2.0 * rng.standard_normal((40, 500))).astype(dtype)
    weights /= np.sum(weights, axis=-1, keepdims=True)
    q = np.asarray([0.0, 0.3, 1.0], dtype)
    assert np.all(np.isnan(eager.evaluate(softk.quantile, x, q, weights=weights, epsilon=0.1)))
    found = eager.evaluate(softk.quantile, x, q, epsilon=1e-3, weights=np.asarray(500, dtype) * weights)
    assert np.all(np.diff(found, axis=0) > 0.1)
    if dtype == "float32":
        return
    narrow = weights.astype("float32")
    assert np.all(np.isnan(eager.evaluate(softk.quantile, x, q, weights=narrow, epsilon=0.1)))
    few = np.asarray([0.1, 0.2, 0.3, 0.4], narrow.dtype)
    assert np.all(
        np.isnan(eager.evaluate(softk.quantile, np.arange(1.0, 5.0).astype(dtype), q, weights=few, epsilon=0.1))
    )


@pytest.mark.parametrize("q", [0.05, 0.3, 0.62, 0.9])
def test_two_readings_of_weights(eager: Library, q: float, rng: Any) -> None:
    """The level above which a share of the weight lies is NumPy's weighted quantile, and that of many observations."""
    x, weights = 0.25 * rng.permutation(9), rng.dirichlet(np.ones(9))
    wanted = np.quantile(x, q, weights=weights, method="inverted_cdf")
    by_share = eager.evaluate(softk.threshold, x, (1.0 - q) * weights.sum(), epsilon=1e-3, weights=weights)
    by_count = eager.evaluate(softk.quantile, x, q, epsilon=1e-3, weights=1e4 * weights)
    assert abs(by_share - wanted) <= 0.01
    assert abs(by_count - wanted) <= 0.01


@pytest.mark.parametrize("weighted", [False, True])
def test_how_far_a_quantile_lies_beyond_the_data(eager: Library, weighted: bool, rng: Any) -> None:
    """At most epsilon / 2 * log(2 n - 1), which scores that are all equal reach."""
    x = np.concatenate([rng.standard_normal((20, N)), np.full((1, N), 3.0)])
    weights = np.asarray(A) if weighted else np.ones(N)
    epsilon, q = rng.uniform(0.1, 3.0, (21, 1)), np.asarray([0.0, 1.0])
    least, most = eager.evaluate(softk.quantile, x, q, epsilon=epsilon, weights=weights)
    bound = epsilon[:, 0] / 2 * math.log(2 * np.sum(weights) - 1)
    below, above = np.min(x, axis=-1) - least, most - np.max(x, axis=-1)
    for beyond in (below, above):
        assert np.all(beyond <= bound * (1.0 + 1e-12))
        assert beyond[-1] == pytest.approx(bound[-1], rel=1e-12)
        assert weighted or np.all(beyond > 0.0)


def test_bad_probabilities_are_nan(eager: Library) -> None:
    """Each by itself: neither another slice nor another probability is touched."""
    found = eager.evaluate(softk.quantile, ROWS, np.asarray([0.5, -0.125, 1.125, NAN, INF, 1.0]), epsilon=0.1)
    good = eager.evaluate(softk.quantile, ROWS, np.asarray([0.5, 0.0, 0.0, 0.0, 0.0, 1.0]), epsilon=0.1)
    np.testing.assert_allclose(found[[0, -1]], good[[0, -1]], rtol=4 * EPS["float64"])
    assert np.all(np.isnan(found[1:-1]))
