"""Sorted top-k, sort and rank: the contract slice by slice on every array library, the values, and what must hold.

`SLICES` go through one call of `softk.sorted_topk` as one batch, so that a slice that is bad also shows that it spoils
no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import softk

from .libraries import BY_NAME, Library
from .plan_oracles import LONG, Ladder
from .test_errors import complains

SORT, RANK = partial(softk.sort, epsilon=0.1), partial(softk.rank, epsilon=0.1)
INF, NAN = math.inf, math.nan
EPS = {"float64": 2.0**-52, "float32": 2.0**-23}

#: The bound on the error of an assignment, in eps, absolute: that of the mask.
ASSIGNMENT = 32

GOLD = np.asarray([0.2, 1.7, -0.5, 0.9])

#: Scores, in multiples of 1/4 so that float32 holds them.
S = (0.5, 2.0, -1.0, 1.0, 3.0, 0.0)
N, K = len(S), 3


def numpy_results(lib: Library, f: Callable[..., Any], *args: Any, **kwargs: Any) -> list[np.ndarray]:
    """The results of a call, each an array of the library's own, brought back."""
    args = tuple(lib.array(value) if isinstance(value, np.ndarray) else value for value in args)
    kwargs = {key: lib.array(value) if isinstance(value, np.ndarray) else value for key, value in kwargs.items()}
    return [lib.numpy(value) for value in lib.call(f, *args, **kwargs)]


@pytest.fixture
def light(lib: Library) -> Library:
    """Every library but JAX, which would compile every new shape."""
    if "jax" in lib.name:
        pytest.skip("compiling takes too long; the tables run")
    return lib


# --- slice by slice


@dataclass(frozen=True)
class Slice:
    """One slice; what must come out follows from the contract and, among finite scores, from the reference."""

    name: str
    x: tuple[float, ...] = S
    epsilon: float = 0.5
    where: tuple[bool, ...] = (True,) * N

    @property
    def is_bad(self) -> bool:
        return bool(np.any(np.isnan(np.asarray(self.x)[np.asarray(self.where)]))) or not 0.0 < self.epsilon < INF

    def expected(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """+inf come first and tie; then the finite ones, as if they were alone; then rows of nothing."""
        if self.is_bad:
            return np.full(k, NAN), np.full((k, N), NAN)
        x, kept = np.asarray(self.x), np.asarray(self.where)
        values, assignment = np.full(k, -INF), np.zeros((k, N))
        first, finite = np.flatnonzero(kept & (x == INF)), np.flatnonzero(kept & np.isfinite(x))
        head = min(first.size, k)
        values[:head] = INF
        assignment[:head, first] = 1.0 / max(first.size, 1)
        rows = min(k - head, finite.size)
        if finite.size == 1 and rows:
            values[head], assignment[head, finite[0]] = x[finite[0]], 1.0
        elif rows and self.epsilon < 1e-3:  # the limit: a row goes to the scores that are equal to its own
            values[head : head + rows] = level = np.sort(x[finite])[::-1][:rows]
            equal = level[:, None] == x[finite]
            assignment[head : head + rows, finite] = equal / equal.sum(axis=1)[:, None]
        elif rows:
            reference = Ladder(x[finite], rows, self.epsilon)
            values[head : head + rows] = reference.values
            assignment[head : head + rows, finite] = reference.assignment
        return values, assignment


def without(*places: int) -> tuple[bool, ...]:
    """A `where` that removes the items at these places."""
    return tuple(i not in places for i in range(N))


def changed(places: dict[int, float]) -> tuple[float, ...]:
    return tuple(places.get(i, value) for i, value in enumerate(S))


SLICES = [
    Slice("distinct"),
    Slice("large epsilon", epsilon=20.0),
    Slice("near hard", epsilon=2.0**-7),
    Slice("hard", epsilon=2.0**-20),
    Slice("all tied", (1.0,) * N),
    Slice("ties at the boundary", (2.0, 1.0, 1.0, 1.0, 0.0, 0.0)),
    Slice("ties, near hard", (2.0, 1.0, 1.0, 1.0, 0.0, 0.0), 2.0**-20),
    Slice("gap", (40.0, 41.0, 42.0, -40.0, -41.0, -42.0)),
    Slice("offset", tuple(1024.0 + x for x in S)),
    Slice("one +inf", changed({0: INF})),
    Slice("two +inf", changed({0: INF, 5: INF})),
    Slice("as many +inf as k", changed({0: INF, 5: INF, 2: INF})),
    Slice("more +inf than k", changed({0: INF, 5: INF, 2: INF, 1: INF})),
    Slice("only +inf", (INF,) * N),
    Slice("-inf", changed({4: -INF, 1: -INF})),
    Slice("both infinities", changed({1: -INF, 2: INF, 3: -INF})),
    Slice("as many selectable as k", changed(dict.fromkeys((0, 2, 4), -INF))),
    Slice("fewer selectable than k", changed(dict.fromkeys((0, 2, 4, 1), -INF))),
    Slice("the start of a beam search", (0.0,) + (-INF,) * (N - 1), 0.1),
    Slice("+inf and one other", (INF, -INF, 0.5, -INF, -INF, -INF)),
    Slice("nothing selectable", (-INF,) * N),
    Slice("removed", where=without(4, 2)),
    Slice("few left", where=without(4, 2, 0, 5)),
    Slice("none left", where=(False,) * N),
    Slice("NaN removed", changed({1: NAN}), where=without(1)),
    Slice("+inf removed", changed({1: INF}), where=without(1)),
    Slice("NaN", changed({2: NAN})),
    Slice("NaN and infinities", changed({0: INF, 2: NAN, 3: -INF})),
    Slice("epsilon 0", epsilon=0.0),
    Slice("epsilon negative", epsilon=-0.5),
    Slice("epsilon infinite", epsilon=INF),
    Slice("epsilon NaN", epsilon=NAN),
]


@cache
def table(dtype: str) -> dict[str, np.ndarray]:
    return {
        "x": np.asarray([s.x for s in SLICES], dtype),
        "epsilon": np.asarray([[s.epsilon] for s in SLICES], dtype),
        "where": np.asarray([s.where for s in SLICES]),
    }


@cache
def answers() -> list[tuple[np.ndarray, np.ndarray]]:
    return [s.expected(K) for s in SLICES]


def assert_right(name: str, found: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    """Infinities and NaN exactly, the others within the tolerance."""
    np.testing.assert_array_equal(np.where(np.isfinite(found), 0.0, found), np.where(np.isfinite(wanted), 0.0, wanted))
    error = np.max(np.abs(np.where(np.isfinite(wanted), found - wanted, 0.0)), initial=0.0)
    assert error <= tolerance, f"{name}: off by {error:.3g}, {error / tolerance:.3g} of what is allowed"


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf - inf, in the comparison
@pytest.mark.parametrize("dtype", EPS)
def test_every_slice(lib: Library, dtype: str) -> None:
    if (lib.name, dtype) in (("jax", "float64"), ("jax-jit", "float32")):
        pytest.skip("compiling takes too long; run in the other dtype")
    problem = table(dtype)
    values, assignment = numpy_results(
        lib, softk.sorted_topk, problem["x"], K, epsilon=problem["epsilon"], where=problem["where"]
    )
    assert values.shape == (len(SLICES), K)
    assert assignment.shape == (len(SLICES), K, N)
    assert values.dtype == assignment.dtype == dtype
    for i, (s, (level, share)) in enumerate(zip(SLICES, answers(), strict=True)):
        assert_right(f"{s.name}, assignment", assignment[i], share, ASSIGNMENT * EPS[dtype])
        size = np.max(np.abs(s.x), where=np.isfinite(s.x), initial=1.0)
        assert_right(f"{s.name}, values", values[i], level, ASSIGNMENT * EPS[dtype] * size)


def test_the_start_of_a_beam_search(light: Library) -> None:
    """One beam is alive: the others are rows of exact zeros at -inf, and nothing is NaN."""
    x = np.asarray([0.0] + [-INF] * 7)
    values, assignment = numpy_results(light, softk.sorted_topk, x, 4)
    np.testing.assert_array_equal(values, [0.0, -INF, -INF, -INF])
    wanted = np.zeros((4, 8))
    wanted[0, 0] = 1.0
    np.testing.assert_array_equal(assignment, wanted)
    values, _ = numpy_results(light, softk.sorted_topk, -x, 4, mode="smallest")
    np.testing.assert_array_equal(values, [0.0, INF, INF, INF])


def test_axis_mode_where_and_an_epsilon_a_slice(lib: Library) -> None:
    rng = np.random.default_rng(5)
    x, epsilon = rng.normal(size=(2, 5, 3)), rng.uniform(0.1, 0.8, size=(2, 1, 3))
    where = rng.uniform(size=x.shape) < 0.7
    where[:, :2] = True
    if lib.name == "jax":
        pytest.skip("compiling takes too long; run with the outer jit")
    options = {"axis": 1, "mode": "smallest", "epsilon": epsilon, "where": where}
    values, assignment = numpy_results(lib, softk.sorted_topk, x, 2, **options)
    assert values.shape == (2, 2, 3)
    assert assignment.shape == (2, 2, 5, 3)
    for i, j in np.ndindex(2, 3):
        reference = Ladder(x[i, :, j], 2, epsilon[i, 0, j], largest=False, where=where[i, :, j])
        assert_right("assignment", assignment[i, :, :, j], reference.assignment, ASSIGNMENT * EPS["float64"])
        assert_right("values", values[i, :, j], reference.values, ASSIGNMENT * EPS["float64"])


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_every_axis(axis: int, rng: np.random.Generator) -> None:
    x = rng.normal(size=(4, 5, 3))
    values, assignment = softk.sorted_topk(x, 2, axis=axis)
    level, share = softk.sorted_topk(np.moveaxis(x, axis, -1), 2)
    np.testing.assert_array_equal(values, np.moveaxis(level, -1, axis))
    np.testing.assert_array_equal(assignment, np.moveaxis(share, (-2, -1), (axis % 3, axis % 3 + 1)))
    for f in (SORT, RANK):
        np.testing.assert_array_equal(f(x, axis=axis), np.moveaxis(f(np.moveaxis(x, axis, -1)), -1, axis))


def test_none_and_all(light: Library, rng: np.random.Generator) -> None:
    """No rows for k = 0; for k = n there is no anchor for a rest, and the columns sum to 1 as well."""
    x = rng.normal(size=(2, 5))
    values, assignment = numpy_results(light, softk.sorted_topk, x, 0)
    assert values.shape == (2, 0)
    assert assignment.shape == (2, 0, 5)
    values, assignment = numpy_results(light, softk.sorted_topk, x, 5, epsilon=0.4)
    assert assignment.shape == (2, 5, 5)
    np.testing.assert_allclose(assignment.sum(axis=-1), 1.0, rtol=0, atol=1e-14)
    np.testing.assert_allclose(assignment.sum(axis=-2), 1.0, rtol=0, atol=1e-14)
    for i in range(2):
        reference = Ladder(x[i], 5, 0.4)
        assert_right("assignment", assignment[i], reference.assignment, ASSIGNMENT * EPS["float64"])
        assert_right("values", values[i], reference.values, ASSIGNMENT * EPS["float64"] * 4)


def test_no_slices(light: Library) -> None:
    values, assignment = numpy_results(light, softk.sorted_topk, np.zeros((0, 5)), 2)
    assert values.shape == (0, 2)
    assert assignment.shape == (0, 2, 5)


HALF = [("numpy", "float16"), ("torch", "float16"), ("torch", "bfloat16"), ("jax", "bfloat16")]


@pytest.mark.parametrize(("library", "kind"), HALF)
def test_lower_precision(library: str, kind: str) -> None:
    """Computed in float32, and rounded to the own dtype at the end."""
    lib = BY_NAME[library]
    lib.require()

    def cast(values: Any, dtype: str) -> Any:
        return values.to(getattr(lib_torch, dtype)) if library == "torch" else values.astype(dtype)

    lib_torch = pytest.importorskip("torch") if library == "torch" else None
    x, epsilon = lib.array(table("float32")["x"]), lib.array(table("float32")["epsilon"])

    def results(x: Any) -> list[Any]:
        found = list(softk.sorted_topk(x, K, epsilon=epsilon))
        return found if library == "jax" else [*found, softk.sort(x, epsilon=0.1), softk.rank(x, epsilon=0.1)]

    given = cast(x, kind)
    for found, single in zip(results(given), results(cast(given, "float32")), strict=True):
        assert str(found.dtype).removeprefix("torch.") == kind
        wanted = cast(cast(single, kind), "float32")
        np.testing.assert_array_equal(np.asarray(cast(found, "float32")), np.asarray(wanted))


# --- values

#: By the reference, in 120 digits.
GOLDEN = {
    0.1: (
        [1.6997318421112027, 0.8996305281492044],
        [
            [2.5420796577968734e-13, 0.9996648026392257, 1.7592981257802436e-25, 0.00033519736052009346],
            [0.000910898111439341, 0.00033519736073989805, 7.581285170994262e-10, 0.9987539037696922],
        ],
    ),
    0.5: (
        [1.5757865896426122, 0.8805722933899217],
        [
            [0.0024293388936327985, 0.8468777796945248, 1.0783491046319073e-05, 0.15068209792079607],
            [0.17516503328610802, 0.15136071106585527, 0.012786251544633405, 0.6606880041034032],
        ],
    ),
    2.0: (
        [1.2225090189028833, 0.7269788652560927],
        [
            [0.11325559027024251, 0.5641941706121628, 0.03540528885548364, 0.28714495026211106],
            [0.24999369612005318, 0.2778793545493396, 0.15737787935667275, 0.3147490699739345],
        ],
    ),
}


def test_gold_case(light: Library) -> None:
    for epsilon, (level, share) in GOLDEN.items():
        values, assignment = numpy_results(light, softk.sorted_topk, GOLD, 2, epsilon=epsilon)
        np.testing.assert_allclose(values, level, rtol=0, atol=1e-14)
        np.testing.assert_allclose(assignment, share, rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", [1, 3, 10, 40])
def test_near_hard_is_hard(k: int, rng: np.random.Generator) -> None:
    """Scores that are hundreds of temperatures apart: the values are those of a sort, the assignment a permutation."""
    x = rng.permutation(np.arange(40.0)) + rng.uniform(0.0, 0.1, 40)
    for mode, order in (("largest", np.argsort(-x)), ("smallest", np.argsort(x))):
        values, assignment = softk.sorted_topk(x, k, mode=mode, epsilon=1e-3)
        np.testing.assert_allclose(values, x[order[:k]], rtol=0, atol=1e-12)
        np.testing.assert_allclose(assignment, np.eye(40)[order[:k]], rtol=0, atol=1e-12)


def test_sum_of_the_rows(rng: np.random.Generator) -> None:
    """The mask of the top-k for k = 1 and in the limit; for k = 2 and a large epsilon something else."""
    x = rng.normal(size=(3, 12))

    def rows_and_mask(k: int, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
        return softk.sorted_topk(x, k, epsilon=epsilon).assignment.sum(axis=-2), softk.topk(x, k, epsilon=epsilon)

    for epsilon in (5.0, 0.3, 1e-3):
        np.testing.assert_allclose(*rows_and_mask(1, epsilon), rtol=0, atol=1e-14)
    np.testing.assert_allclose(*rows_and_mask(4, 1e-5), rtol=0, atol=1e-12)
    rows, mask = rows_and_mask(2, 1.0)
    assert np.max(np.abs(rows - mask)) > 0.01


@pytest.mark.parametrize("choice", ["numba", "none"])
@pytest.mark.parametrize("dtype", EPS)
def test_groups_that_are_far_apart(light: Library, dtype: str, choice: str, rng: np.random.Generator) -> None:
    """For a large epsilon and many anchors, Newton's method must not trust a bad start, nor a rough plan."""
    far = [(200, 109, 105.0), (400, 391, 277.0), (400, 81, 1991.0), (400, 329, 40.0)]
    near = [(3, 1, epsilon) for epsilon in (1.0, 7.7, 30.0)]
    for n, k, epsilon in (*far, *near):
        x = np.concatenate([rng.normal(size=n // 2), 30.0 + rng.normal(size=n - n // 2)]).astype(dtype)
        with softk.kernels(choice):
            _, assignment = numpy_results(light, softk.sorted_topk, x, k, epsilon=epsilon)
        error = np.abs(assignment.astype(np.float64).sum(axis=-1) - 1.0)
        assert np.max(error) <= 32.0 * n * EPS[dtype], (n, k, epsilon)


def test_values_are_the_assignment_times_the_scores(rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 12)) + 100.0
    values, assignment = softk.sorted_topk(x, 4, epsilon=0.5)
    np.testing.assert_allclose(values, (assignment @ x[..., None])[..., 0], rtol=1e-14)


@pytest.mark.parametrize("epsilon", [10.0, 0.5, 0.01])
@pytest.mark.parametrize(("n", "anchors"), [(7, None), (7, 7), (12, 5), (50, 7), (9, 2)])
def test_sort_and_rank_against_the_reference(n: int, anchors: int | None, epsilon: float) -> None:
    x = np.random.default_rng(n).normal(size=n)
    rows = anchors or n
    options = {"unit": n / rows, "arithmetic": LONG}
    for descending in (False, True):
        reference = Ladder(x, rows, epsilon, largest=descending, **options)
        assert reference.error <= 1e-15 * n
        found = softk.sort(x, descending=descending, epsilon=epsilon, num_anchors=anchors)
        np.testing.assert_allclose(found, reference.values, rtol=0, atol=1e-13)
        found = softk.rank(x, descending=descending, epsilon=epsilon, num_anchors=anchors)
        np.testing.assert_allclose(found, reference.ranks, rtol=0, atol=1e-13 * n)


def test_sort_and_rank_on_every_library(lib: Library) -> None:
    """Finite scores, ties, and both infinities, which are where a hard sort has them and tie."""
    x = np.asarray(
        [S, (1.0, 1.0, 0.0, 1.0, 0.0, 3.0), (INF, 1.0, -INF, 0.0, -INF, 2.0), (INF, NAN, 1.0, 2.0, 0.0, 3.0)]
    )
    epsilon = np.asarray([[0.5], [0.5], [2.0**-12], [0.5]])
    if lib.name == "jax":
        pytest.skip("compiling takes too long; run with the outer jit")

    def both(x: Any, epsilon: Any) -> Any:
        if lib.name == "jax-jit":  # one compilation is enough: both are of the same iteration
            return (softk.sort(x, epsilon=epsilon),)
        return softk.sort(x, epsilon=epsilon), softk.rank(x, descending=True, epsilon=epsilon)

    values, *found = numpy_results(lib, both, x, epsilon)
    ranks = found[0] if found else softk.rank(x, descending=True, epsilon=epsilon)
    assert values.dtype == ranks.dtype == "float64"
    for i in range(2):
        reference = Ladder(x[i], N, 0.5, largest=False)
        np.testing.assert_allclose(values[i], reference.values, rtol=0, atol=1e-14)
        np.testing.assert_allclose(ranks[i], N - 1 - reference.ranks, rtol=0, atol=1e-14)
    np.testing.assert_allclose(values[2], [-INF, -INF, 0.0, 1.0, 2.0, INF], rtol=0, atol=1e-14)
    np.testing.assert_allclose(ranks[2], [0.0, 2.0, 4.5, 3.0, 4.5, 1.0], rtol=0, atol=1e-14)
    assert np.all(np.isnan(values[3]))
    assert np.all(np.isnan(ranks[3]))


def test_infinities_in_sort_and_rank() -> None:
    """In either direction, and only infinities as well."""
    x = np.asarray([[INF, 1.0, -INF, 0.0, -INF], [INF, INF, -INF, -INF, -INF], [3.0, INF, 1.0, INF, INF]])
    places = np.asarray([[4.0, 3.0, 0.5, 2.0, 0.5], [3.5, 3.5, 1.0, 1.0, 1.0], [1.0, 3.0, 0.0, 3.0, 3.0]])
    for sign in (1.0, -1.0):
        for descending in (False, True):
            order = -1.0 if descending else 1.0
            wanted = order * np.sort(order * sign * x, axis=-1)
            found = softk.sort(sign * x, descending=descending, epsilon=1e-3)
            np.testing.assert_array_equal(np.isinf(found), np.isinf(wanted))
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
            ranks = softk.rank(sign * x, descending=descending, epsilon=1e-3)
            np.testing.assert_allclose(ranks, places if sign * order > 0 else 4.0 - places, rtol=0, atol=1e-12)


def test_one_score() -> None:
    x = np.asarray([[0.3], [-7.0]])
    np.testing.assert_array_equal(softk.sort(x, epsilon=0.1), x)
    np.testing.assert_array_equal(softk.rank(x, epsilon=0.1), np.zeros((2, 1)))
    values, assignment = softk.sorted_topk(x, 1)
    np.testing.assert_array_equal(values, x)
    np.testing.assert_array_equal(assignment, np.ones((2, 1, 1)))


def test_few_anchors_for_many_scores(rng: np.random.Generator) -> None:
    """In the limit each anchor takes the mean of its share of the scores."""
    x = rng.permutation(10_000) / 10_000
    found = softk.sort(x, epsilon=1e-6, num_anchors=16)
    assert found.shape == (16,)
    np.testing.assert_allclose(found, np.sort(x).reshape(16, 625).mean(axis=1), rtol=0, atol=1e-9)
    # Evenly spaced scores have ranks that are linear in them.
    ranks = softk.rank(x, epsilon=1e-6, num_anchors=16)
    np.testing.assert_allclose(ranks, np.argsort(np.argsort(x)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("distribution", ["normal", "uniform", "exponential"])
def test_ranks_of_few_anchors_come_close_to_those_of_n(distribution: str, epsilon: float, rng: Any) -> None:
    """The documented error, in units of n / num_anchors, and no score without a rank of its own."""
    x = getattr(rng, distribution)(size=1000)
    x, order = x / x.std(), np.argsort(x)
    wanted = softk.rank(x, epsilon=epsilon)
    for anchors in (20, 100, 500):
        found = softk.rank(x, epsilon=epsilon, num_anchors=anchors)
        error = np.abs(found - wanted) * (anchors / x.size)
        assert error.max() <= 2 / 3
        assert error.mean() <= 0.12
        assert np.all(np.diff(found[order]) > 0.0)


@pytest.mark.parametrize("epsilon", [1.0, 1e-4])
def test_ranks_of_few_anchors_at_their_ends(light: Library, epsilon: float) -> None:
    """Ties that fill an anchor, infinite scores, and items that are left out."""
    x = np.asarray([[3.0, 3.0, 3.0, 1.0, 0.5, 0.0, -1.0, -1.0, -1.0], [INF, INF, 1.0, 0.5, 0.4, 0.3, 0.0, -INF, -INF]])

    def ranks(x: np.ndarray, **options: Any) -> np.ndarray:
        options = {name: light.array(value) for name, value in options.items()}
        return light.numpy(softk.rank(light.array(x), epsilon=epsilon, num_anchors=3, descending=True, **options))

    found = ranks(x)
    np.testing.assert_allclose(found[0, :3], found[0, 0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[1, [0, 1, 7, 8]], [0.5, 0.5, 7.5, 7.5], rtol=0, atol=1e-12)
    if epsilon < 1e-3:
        np.testing.assert_allclose(found[0, [0, 4, 8]], [1.0, 4.0, 7.0], rtol=0, atol=1e-9)
        np.testing.assert_allclose(found[1, [2, 6]], [2.0, 6.0], rtol=0, atol=1e-9)
    # A third of twice as many items, half of which are left out, is what a third of them is.
    padded, where = np.concatenate([x[:1], np.full((1, 9), NAN)], axis=1), np.arange(18)[None] < 9
    options = {"epsilon": epsilon, "descending": True, "where": light.array(where)}
    twice = light.numpy(softk.rank(light.array(padded), num_anchors=6, **options))
    np.testing.assert_allclose(twice[0], [*found[0], *[13.0] * 9], rtol=0, atol=1e-12)


@pytest.mark.parametrize("anchors", [None, 5])
def test_weights_of_a_sort_and_a_rank(light: Library, anchors: int | None, rng: Any) -> None:
    x, weights, where = rng.normal(size=(3, 12)), rng.uniform(0.1, 3.0, size=12), rng.random((3, 12)) < 0.8
    weights[3] = 0.0
    rows = anchors or 12

    def both(**options: Any) -> list[np.ndarray]:
        options = {name: light.array(value) for name, value in options.items()}
        return [
            light.numpy(f(light.array(x), epsilon=0.3, num_anchors=anchors, **options))
            for f in (softk.sort, softk.rank)
        ]

    found, scaled = both(weights=weights), both(weights=1e3 * weights)
    for i in range(3):
        reference = Ladder(x[i], rows, 0.3, unit=12 / rows, weights=weights, largest=False, arithmetic=LONG)
        np.testing.assert_allclose(found[0][i], reference.values, rtol=0, atol=1e-13)
        np.testing.assert_allclose(found[1][i], reference.ranks, rtol=0, atol=1e-12)
    for one, other in (*zip(found, scaled, strict=True), *zip(both(weights=np.ones(12)), both(), strict=True)):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
    for one, other in zip(both(weights=np.ones(12), where=where), both(where=where), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("anchors", [None, 4])
def test_weights_at_the_ends_of_the_range(light: Library, anchors: int | None) -> None:
    """Weights whose sum overflows are as good as others. Those that are no weights make their slice NaN."""
    x = np.asarray([0.3, 2.0, -1.0, 0.7, 1.1, -0.4, 0.1, 1.6], np.float32)
    weights = np.asarray([1.0, 3.0, 0.5, 2.0, 1.0, 1.0, 4.0, 0.25], np.float32)

    def both(x: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
        x, weights = light.array(np.broadcast_to(x, weights.shape).copy()), light.array(weights)
        options = {"epsilon": 0.2, "weights": weights, "num_anchors": anchors}
        return [light.numpy(f(x, **options)) for f in (softk.sort, softk.rank)]

    # Powers of 2 change no digit.
    for one, other in zip(both(x, weights), both(x, weights * np.float32(2.0**125)), strict=True):
        np.testing.assert_array_equal(one, other)
    bad = np.stack([0.0 * weights, -weights, np.where(np.arange(8) == 2, np.inf, weights), weights])
    bad[3, 5] = np.nan
    for found in both(x, bad.astype(np.float32)):
        assert np.isnan(found).all()


@pytest.mark.parametrize("epsilon", [1.0, 1e-4])
def test_heavy_scores_at_the_ends_of_ranks_by_few_anchors(light: Library, epsilon: float) -> None:
    """A weight counts as so many scores: the ranks are those of a score that is repeated."""
    x, weights = np.asarray([3.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0]), np.asarray([3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0])
    for top in (3.0, INF):
        x[0] = top
        options = {"epsilon": epsilon, "num_anchors": 4, "descending": True}
        found = light.numpy(
            softk.rank(light.array(x), weights=light.array(weights), **(options | {"epsilon": epsilon}))
        )
        repeated = np.repeat(x, weights.astype(int))
        # The distance of the anchors is 7 / 4 here, and 12 / 4 there: so is the temperature, for the same epsilon.
        wanted = light.numpy(softk.rank(light.array(repeated), **(options | {"epsilon": epsilon * 12.0 / 7.0})))
        first = np.cumsum(weights).astype(int) - weights.astype(int)
        np.testing.assert_allclose((found + 0.5) * 12.0 / 7.0 - 0.5, wanted[first], rtol=0, atol=1e-10)


# --- the published properties of a soft sort


@pytest.mark.parametrize("epsilon", [10.0, 0.1, 1e-3])
def test_sorted_values_do_not_decrease(epsilon: float, rng: np.random.Generator) -> None:
    x = rng.normal(size=(20, 30))
    assert np.all(np.diff(softk.sort(x, epsilon=epsilon)) >= -1e-14)
    assert np.all(np.diff(softk.sort(x, epsilon=epsilon, descending=True)) <= 1e-14)
    assert np.all(np.diff(softk.sorted_topk(x, 7, epsilon=epsilon).values) <= 1e-14)


def test_ranks_are_those_of_a_double_argsort(rng: np.random.Generator) -> None:
    x = rng.permutation(np.linspace(0.0, 1.0, 60))
    found = softk.rank(x, epsilon=1e-5)
    np.testing.assert_allclose(found, np.argsort(np.argsort(x)), rtol=0, atol=1e-12)
    found = softk.rank(x, epsilon=1e-5, descending=True)
    np.testing.assert_allclose(found, np.argsort(np.argsort(-x)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("epsilon", [3.0, 1e-4])
def test_ties_share_their_mean_rank(epsilon: float) -> None:
    x = np.asarray([1.0, 3.0, 1.0, 2.0, 3.0, 1.0])
    found = softk.rank(x, epsilon=epsilon)
    for value in (1.0, 3.0):
        assert np.ptp(found[x == value]) <= 1e-14
    if epsilon < 1.0:
        np.testing.assert_allclose(found, [1.0, 4.5, 1.0, 3.0, 4.5, 1.0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("q", [0.0, 0.1, 0.25, 0.5, 0.77, 1.0])
def test_quantile_of_evenly_spaced_scores(q: float, rng: np.random.Generator) -> None:
    x = rng.permutation(np.linspace(0.0, 1.0, 101))
    np.testing.assert_allclose(softk.quantile(x, q, epsilon=1e-4), q, rtol=0, atol=1e-9)


def test_shapes_of_a_batch(rng: np.random.Generator) -> None:
    x = rng.normal(size=(32, 10, 6, 4))
    values, assignment = softk.sorted_topk(x, 3, axis=1)
    assert values.shape == (32, 3, 6, 4)
    assert assignment.shape == (32, 3, 10, 6, 4)
    np.testing.assert_allclose(values, np.einsum("aknbc,anbc->akbc", assignment, x), rtol=0, atol=1e-13)
    assert softk.rank(x, axis=1, epsilon=0.1).shape == x.shape
    assert softk.sort(x, axis=1, epsilon=0.1).shape == x.shape
    assert softk.sort(x, axis=1, num_anchors=4, epsilon=0.1).shape == (32, 4, 6, 4)
    assert np.all(np.diff(softk.sort(x, axis=1, epsilon=0.1), axis=1) >= -1e-14)


# --- what leaves the results as they are


def everything(x: np.ndarray, k: int, epsilon: Any) -> dict[str, np.ndarray]:
    values, assignment = softk.sorted_topk(x, k, epsilon=epsilon)
    return {
        "values": values,
        "assignment": assignment,
        "sort": softk.sort(x, epsilon=epsilon),
        "rank": softk.rank(x, epsilon=epsilon),
    }


def test_permuting_the_scores(rng: np.random.Generator) -> None:
    x, order = rng.normal(size=(3, 15)), rng.permutation(15)
    one, other = everything(x, 4, 0.3), everything(x[:, order], 4, 0.3)
    np.testing.assert_allclose(other["assignment"], one["assignment"][..., order], rtol=0, atol=1e-14)
    np.testing.assert_allclose(other["rank"], one["rank"][..., order], rtol=0, atol=1e-13)
    for name in ("values", "sort"):
        np.testing.assert_allclose(other[name], one[name], rtol=0, atol=1e-14)


def test_shifting_and_scaling_the_scores(rng: np.random.Generator) -> None:
    """Powers of 2 change no bits but those of the exponent; a shift leaves what it leaves of the scores."""
    x = np.round(rng.normal(size=(3, 15)) * 2.0**20) / 2.0**20
    one = everything(x, 4, 0.3)
    moved, larger = everything(x + 64.0, 4, 0.3), everything(8.0 * x, 4, 8.0 * 0.3)
    for name, values in one.items():
        in_units = name in ("values", "sort")
        np.testing.assert_allclose(moved[name], values + 64.0 * in_units, rtol=0, atol=1e-12)
        np.testing.assert_allclose(larger[name], values * (8.0 if in_units else 1.0), rtol=1e-12, atol=0)


def test_negating_the_scores(rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 15))
    one, other = softk.sorted_topk(x, 4), softk.sorted_topk(-x, 4, mode="smallest")
    np.testing.assert_array_equal(one.values, -other.values)
    np.testing.assert_array_equal(one.assignment, other.assignment)
    np.testing.assert_array_equal(softk.sort(x, epsilon=0.1), -softk.sort(-x, descending=True, epsilon=0.1))


@pytest.mark.parametrize("other", [NAN, INF, -INF, 1e300, 0.0])
def test_a_slice_depends_on_itself_alone(other: float, rng: np.random.Generator) -> None:
    x = rng.normal(size=(4, 9))
    changed = x.copy()
    changed[2, 3:] = other
    one, two = everything(x, 3, 0.3), everything(changed, 3, 0.3)
    for name, values in one.items():
        np.testing.assert_array_equal(np.delete(values, 2, 0), np.delete(two[name], 2, 0))
        if other != other:
            assert np.all(np.isnan(two[name][2]))


# --- properties


@st.composite
def problems(draw: Any) -> tuple[np.ndarray, int, float]:
    """Scores with and without ties, k and epsilon, from hard to soft."""
    n = draw(st.integers(1, 14))
    tied = st.integers(-3, 3).map(float)
    free = st.floats(-50.0, 50.0, allow_subnormal=False)
    x = draw(st.lists(draw(st.sampled_from([tied, free])), min_size=n, max_size=n))
    return np.asarray(x), draw(st.integers(0, n)), 10.0 ** draw(st.floats(-5.0, 1.5))


@given(problems())
@settings(max_examples=100)
def test_assignments_are_plans(problem: tuple[np.ndarray, int, float]) -> None:
    """Rows sum to 1 and columns to at most 1; values descend within the range of the scores; ties share."""
    x, k, epsilon = problem
    values, assignment = softk.sorted_topk(x, k, epsilon=epsilon)
    assert values.shape == (k,)
    assert assignment.shape == (k, x.size)
    assert np.all(assignment >= 0.0)
    np.testing.assert_allclose(assignment.sum(axis=-1), 1.0, rtol=0, atol=1e-12)
    columns = assignment.sum(axis=-2)
    assert np.all(columns <= 1.0 + 1e-12)
    slack = 1e-12 * (1.0 + np.max(np.abs(x)))
    assert np.all(np.diff(values) <= slack)
    assert np.all((values >= x.min() - slack) & (values <= x.max() + slack))
    order = np.argsort(x)
    assert np.all(np.diff(columns[order]) >= -1e-12)
    for i, j in pairwise(order):
        if x[i] == x[j]:
            np.testing.assert_array_equal(assignment[:, i], assignment[:, j])


@given(problems())
@settings(max_examples=100)
def test_sorting_and_ranking_preserve_the_total(problem: tuple[np.ndarray, int, float]) -> None:
    x, _, epsilon = problem
    n, size = x.size, 1.0 + np.max(np.abs(x))
    values, ranks = softk.sort(x, epsilon=epsilon), softk.rank(x, epsilon=epsilon)
    assert np.all(np.diff(values) >= -1e-12 * size)
    np.testing.assert_allclose(values.sum(), x.sum(), rtol=0, atol=1e-11 * n * size)
    np.testing.assert_allclose(ranks.sum(), n * (n - 1) / 2, rtol=0, atol=1e-11 * n)
    assert np.all((ranks >= -1e-12 * n) & (ranks <= (n - 1) * (1.0 + 1e-12)))
    order = np.argsort(x)
    assert np.all(np.diff(ranks[order]) >= -1e-11 * n)
    down = softk.rank(x, epsilon=epsilon, descending=True)
    np.testing.assert_allclose(down, n - 1 - ranks, rtol=0, atol=1e-10 * n)


@given(problems())
@settings(max_examples=25)
def test_any_problem_against_the_reference(problem: tuple[np.ndarray, int, float]) -> None:
    x, k, epsilon = problem
    if x.size == 1:
        return
    k, epsilon = max(k, 1), max(epsilon, 0.1 * float(np.ptp(x)))  # what long double resolves
    reference = Ladder(x, k, epsilon, arithmetic=LONG)
    values, assignment = softk.sorted_topk(x, k, epsilon=epsilon)
    np.testing.assert_allclose(assignment, reference.assignment, rtol=0, atol=1e-13)
    np.testing.assert_allclose(values, reference.values, rtol=0, atol=1e-12 * (1.0 + np.max(np.abs(x))))


# --- errors


@pytest.mark.parametrize("k", [2.0, True, np.asarray(2), "2", None])
def test_k_is_no_integer(k: Any) -> None:
    complains(TypeError, "k", "got", "must be a Python integer", softk.sorted_topk, GOLD, k)


@pytest.mark.parametrize("k", [-1, 5])
def test_k_out_of_range(k: int) -> None:
    complains(ValueError, "k", str(k), "from 0 to 4, the size of x", softk.sorted_topk, GOLD, k)


@pytest.mark.parametrize("f", [SORT, RANK])
def test_number_of_anchors(f: Callable[..., Any]) -> None:
    for count in (1, 5, -2):
        complains(ValueError, "num_anchors", str(count), "from 2 to 4, the size of x", f, GOLD, num_anchors=count)
    for value in (2.0, True, np.asarray(3)):
        complains(TypeError, "num_anchors", "got", "must be a Python integer", f, GOLD, num_anchors=value)


SHORT = {"sorted_topk": lambda *args, **kw: softk.sorted_topk(*args, 1, **kw), "sort": SORT, "rank": RANK}


@pytest.mark.parametrize("name", SHORT)
def test_other_arguments(name: str) -> None:
    f = SHORT[name]
    with pytest.raises(ValueError, match=r"\bx\b.*\baxis\b"):
        f(np.zeros((3, 0)))
    complains(ValueError, "axis", "1", "from -1 to 0", f, GOLD, axis=1)
    for epsilon in (0.0, -1.0, INF, NAN):
        complains(ValueError, "epsilon", str(epsilon), "positive finite number", f, GOLD, epsilon=epsilon)
    complains(ValueError, "epsilon", r"\(4,\)", "one value per slice", f, GOLD, epsilon=np.ones(4))
    complains(TypeError, "x", "got list", "must be an array", f, [1.0, 2.0])
    complains(TypeError, "x", "int64", "real floating", f, np.arange(3))
    if name == "sorted_topk":
        complains(ValueError, "mode", "'low'", "'largest' or 'smallest'", f, GOLD, mode="low")
        complains(TypeError, "where", "float64", "boolean", f, GOLD, where=np.ones(4))


def test_sort_of_infinities_on_few_anchors() -> None:
    """A mean of scores one of which is infinite is infinite, from whichever end one counts."""
    x = np.asarray([5.0, 4.0, INF, -INF, 1.0, 2.0])
    np.testing.assert_array_equal(softk.sort(x, num_anchors=3, epsilon=1e-3), [-INF, 3.0, INF])
    np.testing.assert_array_equal(softk.sort(x, num_anchors=3, epsilon=1e-3, descending=True), [INF, 3.0, -INF])


def test_sort_of_the_largest_numbers() -> None:
    x = np.asarray([1e308, -1e308, 0.0])
    np.testing.assert_array_equal(softk.sort(x, epsilon=0.1), [-1e308, 0.0, 1e308])


def test_k_may_be_any_integer() -> None:
    x = np.asarray([0.2, 1.7, -0.5, 0.9])
    np.testing.assert_array_equal(softk.sorted_topk(x, np.int64(2)).values, softk.sorted_topk(x, 2).values)


@pytest.mark.parametrize("descending", [False, True])
def test_items_that_are_left_out_come_last(light: Library, descending: bool, rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 9))
    where = rng.random(x.shape) < 0.6
    where[0], where[:, 2] = True, True
    x[~where] = np.nan
    options = {"descending": descending, "epsilon": 0.3, "where": light.array(where)}
    values = light.numpy(softk.sort(light.array(x), **options))
    ranks = light.numpy(softk.rank(light.array(x), **options))
    for i, kept in enumerate(where):
        count = int(kept.sum())
        alone = x[i, kept]
        wanted = softk.sort(alone, descending=descending, epsilon=0.3)
        np.testing.assert_allclose(values[i, :count], wanted, atol=1e-12)
        np.testing.assert_array_equal(values[i, count:], -np.inf if descending else np.inf)
        np.testing.assert_allclose(ranks[i, kept], softk.rank(alone, descending=descending, epsilon=0.3), atol=1e-12)
        np.testing.assert_allclose(ranks[i, ~kept], (count + 8) / 2.0)


def test_items_that_are_left_out_of_a_ranking_have_no_derivative(rng: np.random.Generator) -> None:
    x, where = rng.normal(size=9), np.arange(9) % 3 != 0
    x[0] = np.nan
    _, pull = softk.vjp(softk.rank, x, epsilon=0.5, where=where)
    u = rng.normal(size=9)
    xbar = pull(u)["x"]
    np.testing.assert_array_equal(xbar[~where], 0.0)
    _, alone = softk.vjp(softk.rank, x[where], epsilon=0.5)
    np.testing.assert_allclose(xbar[where], alone(u[where])["x"], atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_any_number_of_anchors(dtype: str, rng: Any) -> None:
    """The sum of the masses of the anchors misses n by a rounding of each."""
    x = rng.standard_normal(100).astype(dtype)
    for m in range(2, 101):
        with softk.kernels("none"):
            for f in (softk.sort, softk.rank):
                assert np.isfinite(f(x, epsilon=0.1, num_anchors=m)).all()


def test_anchors_without_mass(rng: Any) -> None:
    """They come last, so that the sum of the masses before them is n, but for a rounding of each."""
    x = rng.standard_normal(100)
    with softk.kernels("none"):
        for m in range(2, 101):
            marginals = np.concatenate([np.full(m, 100 / m), np.zeros(1)])
            assert np.isfinite(softk.transport(x, np.arange(m + 1.0), marginals, epsilon=0.1).plan).all()
