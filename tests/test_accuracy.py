"""The mask against its two numbers: the mass that it must sum to, and a reference of high precision.

Errors are in units of the dtype's eps. The scores are adversarial: ties, offsets, ranges of 1e30, outliers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import softk
from softk.testing import Oracle
from softk.testing.cases import EPSILONS, SCORES, masses

from .libraries import Library
from .oracles import PROBLEMS, Quantile, problem_for, sinkhorn

MASS, MASK = 16.0, 32.0  # the numbers

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


def mass_error(mask: Any, k: Any, weights: Any = None) -> float:
    """|sum of weights * mask - k| of one slice, in eps max(1, k)."""
    eps = float(np.finfo(mask.dtype).eps)
    terms = mask.astype(np.float64) if weights is None else mask.astype(np.float64) * weights.astype(np.float64)
    return abs(math.fsum(terms) - float(k)) / (eps * max(1.0, float(k)))


def mask_error(mask: Any, reference: np.ndarray) -> float:
    """The largest absolute error, in eps."""
    return float(np.max(np.abs(mask.astype(np.float64) - reference)) / np.finfo(mask.dtype).eps)


def assert_in_unit_interval(mask: Any) -> None:
    assert bool(np.all((mask >= 0.0) & (mask <= 1.0)))


def assert_masses(mask: Any, k: Any, weights: Any = None) -> None:
    """Every row of a batch has its mass."""
    assert_in_unit_interval(mask)
    rows = [mass_error(mask[i], k[i, 0], None if weights is None else weights[i]) for i in range(mask.shape[0])]
    worst = int(np.argmax(rows))
    assert rows[worst] <= MASS, f"row {worst}: the mass is off by {rows[worst]:.3g} eps max(1, k)"


def stacked(n: int, dtype: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every kind of scores with every mass and temperature: one batch."""
    rows = list(itertools.product(SCORES.values(), masses(n), EPSILONS))
    x = np.stack([scores(rng, n) for scores, _, _ in rows]).astype(dtype)
    k = np.asarray([[k] for _, k, _ in rows]).astype(dtype)
    return x, k, np.asarray([[epsilon] for _, _, epsilon in rows]).astype(dtype)


# --- the mass


@DTYPES
@pytest.mark.parametrize("n", [1, 2, 5, 1000])
def test_mass(lib: Library, n: int, dtype: str, rng: np.random.Generator) -> None:
    x, k, epsilon = stacked(n, dtype, rng)
    mask = lib.evaluate(softk.topk, x, k, epsilon=epsilon)
    assert mask.dtype == dtype
    assert_masses(mask, k)


@DTYPES
def test_mass_weighted(lib: Library, dtype: str, rng: np.random.Generator) -> None:
    x, k, epsilon = stacked(100, dtype, rng)
    weights = (rng.uniform(size=x.shape) < 0.9) * rng.exponential(size=x.shape)
    weights = weights.astype(dtype)
    k = (k / 100.0 * weights.sum(axis=-1, keepdims=True)).astype(dtype)
    mask = lib.evaluate(softk.topk, x, k, epsilon=epsilon, weights=weights)
    assert_masses(mask, k, weights)


@DTYPES
def test_mass_of_a_few_levels(lib: Library, dtype: str) -> None:
    """Small and regular problems, whose solver is done at once and has to stay where it is in the steps that remain."""
    x = np.arange(5.0)
    rows = [
        (scale * np.roll(x, turn), k, epsilon)
        for scale in (1.0, 0.25)
        for turn in (0, 2)
        for k in np.arange(0.5, 5.0, 0.5)
        for epsilon in (0.01, 1.0, 20.0)
    ]
    given = [np.asarray(values, dtype) for values in zip(*rows, strict=True)]
    k, epsilon = given[1][:, None], given[2][:, None]
    assert_masses(lib.evaluate(softk.topk, given[0], k, epsilon=epsilon), k)


@DTYPES
@pytest.mark.parametrize(("shape", "axis"), [((300, 4), 0), ((2, 300, 3), -2)])
def test_mass_along_an_axis(eager: Library, shape: tuple[int, ...], axis: int, dtype: str, rng: Any) -> None:
    x = rng.standard_cauchy(size=shape).astype(dtype)
    mask = eager.evaluate(softk.topk, x, 7, axis=axis, epsilon=0.05)
    assert_masses(np.moveaxis(mask, axis, -1).reshape(-1, 300), np.full((x.size // 300, 1), 7.0))


@DTYPES
@pytest.mark.parametrize("k", [2.5, 500])
def test_mass_for_a_number_k(eager: Library, k: float, dtype: str, rng: np.random.Generator) -> None:
    """A k that is a Python number is selected for in another way than an array."""
    x = np.stack([scores(rng, 1000) for scores in SCORES.values()]).astype(dtype)
    mask = eager.evaluate(softk.topk, x, k, epsilon=0.01)
    assert_masses(mask, np.full((len(x), 1), k, dtype))


def _alone(kind: str, n: int, dtype: str, rng: Any, ks: Any, epsilons: Any) -> Iterator[float]:
    """The mass errors of slices solved one by one, where the solver stops as soon as this one slice is done."""
    x = SCORES[kind](rng, n).astype(dtype)
    for k, epsilon in itertools.product(ks, epsilons):
        mask = softk.topk(x, k, epsilon=epsilon)
        assert_in_unit_interval(mask)
        yield mass_error(mask, np.asarray(k, dtype))


@DTYPES
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("n", [1, 2, 10, 1000])
def test_mass_of_one_slice(kind: str, n: int, dtype: str, rng: np.random.Generator) -> None:
    assert max(_alone(kind, n, dtype, rng, masses(n), (*EPSILONS, 1e-5, 1e-2, 5.0))) <= MASS


@DTYPES
@pytest.mark.parametrize("kind", SCORES)
def test_mass_of_many_scores(kind: str, dtype: str, rng: np.random.Generator) -> None:
    n = 200_000
    ks = (1.0, n / 2) if dtype == "float64" else (1e-3, n - 1.0)
    assert max(_alone(kind, n, dtype, rng, ks, (1e-6, 0.1))) <= MASS


@pytest.mark.full
@DTYPES
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("n", [200_000, 1_000_000])
def test_mass_of_many_scores_everywhere(kind: str, n: int, dtype: str, rng: np.random.Generator) -> None:
    assert max(_alone(kind, n, dtype, rng, masses(n), EPSILONS)) <= MASS


@pytest.mark.full
@DTYPES
@pytest.mark.parametrize("weighted", [False, True])
def test_mass_of_random_problems(dtype: str, weighted: bool, rng: np.random.Generator) -> None:
    """Scores, sizes, masses, temperatures and weights drawn at random, 20 000 slices."""
    kinds = list(SCORES.values())
    for _ in range(2000):
        n = int(rng.choice([2, 3, 5, 17, 100, 500]))
        x = np.stack([kinds[i](rng, n) for i in rng.integers(len(kinds), size=10)]).astype(dtype)
        weights = rng.exponential(size=x.shape).astype(dtype) if weighted else None
        total = n if weights is None else weights.astype(float).sum(axis=1, keepdims=True)
        k = rng.uniform(size=(10, 1)) * total
        k = np.where((rng.uniform(size=k.shape) < 0.5) & (k >= 1.0), np.floor(k), k).astype(dtype)
        epsilon = (10.0 ** rng.uniform(-6.0, 1.3, size=(10, 1))).astype(dtype)
        assert_masses(softk.topk(x, k, epsilon=epsilon, weights=weights), k, weights)


# --- the mask


@DTYPES
@pytest.mark.parametrize("name", PROBLEMS)
def test_mask(lib: Library, name: str, dtype: str) -> None:
    problem = problem_for(lib, name, dtype)
    given = {key: value for key, value in problem.arguments.items() if key not in ("x", "k")}
    mask = lib.evaluate(softk.topk, problem.x, problem.k, **given, **problem.options)
    assert_in_unit_interval(mask)
    assert mask_error(mask, problem.mask) <= MASK


def assert_exact(x: np.ndarray, k: float, epsilon: float, dtype: str, **options: Any) -> None:
    """The mask of one slice is that of the reference, fed the rounded inputs."""
    x, k, epsilon = x.astype(dtype), np.asarray(k, dtype)[()], np.asarray(epsilon, dtype)[()]
    options = {name: value.astype(dtype) if name == "weights" else value for name, value in options.items()}
    mask = softk.topk(x, k, epsilon=epsilon, **options)
    assert_in_unit_interval(mask)
    error = mask_error(mask, Oracle(x, k, epsilon, **options).mask)
    assert error <= MASK, f"k = {k!r}, epsilon = {epsilon!r}: the mask is off by {error:.3g} eps"


@DTYPES
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("epsilon", [1e-6, 0.1, 20.0])
def test_mask_of_adversarial_scores(kind: str, epsilon: float, dtype: str, rng: np.random.Generator) -> None:
    for k in (1.0, 8.0, 6.5, 1e-3):
        assert_exact(SCORES[kind](rng, 16), k, epsilon, dtype)


@pytest.mark.full
@DTYPES
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_mask_of_adversarial_scores_everywhere(kind: str, epsilon: float, dtype: str, rng: Any) -> None:
    for n, _ in itertools.product((2, 5, 60), range(3)):
        x = SCORES[kind](rng, n)
        for k in masses(n):
            if k < n:
                assert_exact(x, k, epsilon, dtype)


def gapped(rng: np.random.Generator, n: int, above: int, gap: float) -> np.ndarray:
    """Scores of which `above` lie beyond a gap."""
    return rng.permutation(np.concatenate([rng.uniform(0.0, 2.0, n - above), 2.0 + gap + rng.uniform(0.0, 2.0, above)]))


@DTYPES
@pytest.mark.parametrize("gap", [10.0, 80.0, 300.0, 5000.0])
@pytest.mark.parametrize("above", [1, 13, 39])
def test_mask_in_a_gap(gap: float, above: int, dtype: str, rng: np.random.Generator) -> None:
    """The tails are far below the smallest float where k is whole, and one score takes the rest where it is not."""
    eps = float(np.finfo(dtype).eps)
    for rest in (0.0, 1e-3, -1e-3, 64 * eps, -64 * eps):
        assert_exact(gapped(rng, 40, above, gap), above + rest, 1.0, dtype)


@DTYPES
@pytest.mark.parametrize("gap", [80.0, 5000.0])
@pytest.mark.parametrize("steps", [-3, -1, 1, 3])
@pytest.mark.parametrize("above", [1, 13, 39, 777])
def test_mask_beside_a_whole_k(above: int, steps: int, gap: float, dtype: str, rng: np.random.Generator) -> None:
    """k is a few units of its last digit off a whole number: what it lacks is one score's, and is told exactly."""
    k = np.asarray(above, dtype)
    k = k + steps * np.spacing(k)
    x = gapped(rng, above + 20, above, gap).astype(dtype)
    mask = softk.topk(x, k, epsilon=1.0)
    # Beyond a gap, only scores next to it can lack or have anything: the mass of each side is known exactly.
    upper = np.sort(mask.astype(np.float64))[::-1][:above]
    lower = np.sort(mask.astype(np.float64))[::-1][above:]
    lack, have = math.fsum(1.0 - upper), math.fsum(lower)
    rest = float(k) - above
    # A mask beside 1 is rounded by half an eps whatever it is.
    assert abs(lack - max(-rest, 0.0)) <= (MASK + above / 2.0) * np.finfo(dtype).eps
    assert abs(have - max(rest, 0.0)) <= MASK * np.finfo(dtype).eps


@DTYPES
@pytest.mark.parametrize("gap", [10.0, 80.0, 5000.0])
def test_mask_in_a_gap_with_weights(gap: float, dtype: str, rng: np.random.Generator) -> None:
    """Weights with exact sums; items without weight lie anywhere, the gap included."""
    x = gapped(rng, 40, 11, gap)
    weights = rng.integers(1, 24, size=40) / 8.0
    k = float(weights[x > 2.0].sum())
    assert_exact(x, k, 1.0, dtype, weights=weights)
    assert_exact(x, k + 0.125, 1.0, dtype, weights=weights)
    if gap > 1000.0:
        return  # beside t, a mask that no mass holds follows the last digit of the scores far away
    x, weights = np.append(x, [2.0 + gap / 2.0, 2.0 + gap / 3.0]), np.append(weights, [0.0, 0.0])
    assert_exact(x, k, 1.0, dtype, weights=weights)


@DTYPES
@pytest.mark.parametrize("kind", SCORES)
def test_mask_with_weights(kind: str, dtype: str, rng: np.random.Generator) -> None:
    weights = rng.uniform(0.5, 2.0, size=12)
    for share, epsilon in itertools.product((0.05, 0.5, 0.97), (1e-3, 1.0)):
        assert_exact(SCORES[kind](rng, 12), share * weights.sum(), epsilon, dtype, weights=weights)


@DTYPES
@pytest.mark.parametrize("mode", ["largest", "smallest"])
def test_mask_of_a_part_of_the_scores(mode: str, dtype: str, rng: np.random.Generator) -> None:
    x, where = rng.normal(size=30), rng.uniform(size=30) < 0.6
    for k in (1.0, 4.5, float(where.sum() - 1)):
        assert_exact(x, k, 0.2, dtype, where=where, mode=mode)


@DTYPES
@pytest.mark.parametrize("name", PROBLEMS)
def test_log_mask(lib: Library, name: str, dtype: str) -> None:
    """Beside the mask's own error, an error of a rounding of z, of which the logarithm is nearly one."""
    problem = problem_for(lib, name, dtype)
    given = {key: value for key, value in problem.arguments.items() if key not in ("x", "k")}
    found = lib.evaluate(softk.log_topk, problem.x, problem.k, **given, **problem.options)
    wanted = np.stack([reference.log_mask for reference in problem.oracles])
    assert found.dtype == dtype
    assert np.all(found <= 0.0)
    removed = np.isneginf(wanted)
    np.testing.assert_array_equal(np.isneginf(found), removed)
    eps = np.finfo(dtype).eps
    error = np.abs(found - np.where(removed, 0.0, wanted))[~removed]
    assert np.all(error <= MASK * eps * np.maximum(1.0, np.abs(wanted[~removed])))


@DTYPES
def test_log_mask_where_the_mask_is_no_number(dtype: str) -> None:
    """Far below the threshold the mask is 0, far above it 1; their logarithms are neither 0 nor the same."""
    x = np.asarray([-3e4, -500.0, 0.0, 20.0, 400.0], dtype=dtype)
    found = softk.log_topk(x, 2, epsilon=1.0)
    reference = Oracle(x, 2.0, 1.0)
    assert np.all(softk.topk(x, 2, epsilon=1.0)[:2] == 0.0)
    np.testing.assert_allclose(found, reference.log_mask, rtol=4 * np.finfo(dtype).eps)
    assert found[4] == 0.0 or found[4] > -1e-150


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_largest_numbers_are_finite(lib: Library, dtype: str) -> None:
    """The lowest number of a dtype, with which masks are often filled, is a score like any other."""
    m = np.finfo(dtype).max
    x = np.asarray([[1.0, 2.0, -m, -m], [-m, -m, -m, -m], [1.0, -m, m, 0.0]], dtype=dtype)
    k = np.asarray([[3.0], [2.0], [1.0]], dtype=dtype)
    found = lib.evaluate(softk.topk, x, k)
    np.testing.assert_array_equal(found, [[1.0, 1.0, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 1.0, 0.0]])
    hard = lib.evaluate(softk.topk, x, k, hard=True)
    np.testing.assert_array_equal(hard, [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])


@DTYPES
def test_an_epsilon_near_the_largest_number(lib: Library, dtype: str) -> None:
    """What is removed has no mask beside it, nor has -inf; and the difference of two scores may overflow."""
    largest = float(np.finfo(dtype).max)
    x = np.asarray([[1.0, 2.0, -math.inf, 3.0, 9.0], [0.9, -0.9, 0.2, -0.9, 0.0], [1.0, -1.0, 0.3, 0.9, 0.0]])
    x = (x * np.asarray([[1.0], [largest], [largest]])).astype(dtype)
    where = np.asarray([[True] * 4 + [False]] * 3)
    k = np.asarray([[2.0], [1.5], [2.5]], dtype)
    epsilon = (np.asarray([[0.3], [0.5], [0.99]]) * largest).astype(dtype)
    found = lib.evaluate(softk.topk, x, k, epsilon=epsilon, where=where)
    wanted = [
        Oracle(x[i][x[i] > -math.inf], k[i, 0], epsilon[i, 0], where=where[i][x[i] > -math.inf]) for i in range(3)
    ]
    assert np.all(found[~where | (x == -math.inf)] == 0.0)
    for i in range(3):
        assert mask_error(found[i][x[i] > -math.inf], wanted[i].mask) <= MASK


# --- small masses


@pytest.fixture
def flushed() -> Iterator[None]:
    """Subnormal numbers are 0 in this thread, for NumPy as well; JAX has it so always."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps subnormal numbers")
    yield
    torch.set_flush_denormal(False)


@DTYPES
@pytest.mark.usefixtures("flushed")
def test_small_masses(eager: Library, dtype: str) -> None:
    """Each tail is in proportion to k, and the logarithm and the threshold follow it to the smallest of numbers."""
    x, u = np.asarray([3.0, 0.0, 3.0], dtype), np.asarray([0.3, -1.0, 0.7], dtype)
    eps = float(np.finfo(dtype).eps)
    for k in (3.0 / (1.0 + math.exp(50.0)), 1e-33, 1e-37):
        for mass in (k, np.asarray(k, dtype)):
            found = eager.evaluate(softk.topk, x, mass)
            np.testing.assert_allclose(found, np.asarray([k / 2, 0.0, k / 2]), rtol=200 * eps, atol=1e-44)
            log = eager.evaluate(softk.log_topk, x, mass)
            wanted = math.log(k / 2) - np.asarray([0.0, 60.0, 0.0])
            np.testing.assert_allclose(log, wanted, rtol=8 * eps)
            t = eager.evaluate(softk.threshold, x, mass)
            np.testing.assert_allclose(t, 3.0 - 0.05 * math.log(k / 2), rtol=8 * eps)

        def pullback(x: Any, k: Any, epsilon: Any, u: Any) -> Any:
            return softk.vjp(softk.topk, x, k, epsilon=epsilon)[1](u)

        given = (x, np.asarray(k, dtype), np.asarray(0.1, dtype), u)
        found = eager.call(pullback, *(eager.array(value) for value in given))
        np.testing.assert_allclose(eager.numpy(found["k"]), 0.5, rtol=1e-5)
        if k > 1e-35:  # its products are numbers
            wanted = k / 2 * np.asarray([-0.2, 0.0, 0.2]) / 0.05
            np.testing.assert_allclose(eager.numpy(found["x"]), wanted, rtol=1e-4, atol=1e-44)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_logarithm_of_a_mask_of_next_to_nothing(dtype: str) -> None:
    """Of many, of which none is a number any more."""
    k = 1e-37 if dtype == "float32" else 1e-305
    found = softk.log_topk(np.zeros(100_000, dtype), k)
    np.testing.assert_allclose(found, math.log(k) - math.log(1e5), rtol=4 * np.finfo(dtype).eps)


@DTYPES
@pytest.mark.usefixtures("flushed")
def test_mass_without_subnormal_numbers(dtype: str, rng: np.random.Generator) -> None:
    """The adversarial problems once more."""
    for n in (2, 5, 200):
        x, k, epsilon = stacked(n, dtype, rng)
        assert_masses(softk.topk(x, k, epsilon=epsilon), k)
        weights = rng.exponential(size=x.shape).astype(dtype)
        share = (k / n * weights.sum(axis=-1, keepdims=True)).astype(dtype)
        assert_masses(softk.topk(x, share, epsilon=epsilon, weights=weights), share, weights)
        for f in (softk.topk, softk.log_topk, softk.threshold):
            out, pullback = softk.vjp(f, x, k, epsilon=epsilon, weights=weights * (n / weights.sum(-1, keepdims=True)))
            found = pullback(rng.normal(size=out.shape).astype(dtype))
            assert not any(np.isnan(value).any() for value in (out, *found.values()))


# --- the paper's algorithm


def test_the_converged_algorithm_of_the_paper(lib: Library) -> None:
    x = np.random.default_rng(11).normal(size=50)
    rows = list(itertools.product((1.0, 5.0, 25.5, 49.0), (0.1, 0.5, 2.0)))
    k, epsilon = (np.asarray(values)[:, None] for values in zip(*rows, strict=True))
    masks = lib.evaluate(softk.topk, np.tile(x, (len(rows), 1)), k, epsilon=epsilon)
    wanted = np.stack([sinkhorn(x, *row) for row in rows])
    np.testing.assert_allclose(masks, wanted, rtol=0.0, atol=1e-10)


# --- the threshold and the quantile


@DTYPES
@pytest.mark.parametrize("name", PROBLEMS)
def test_threshold(eager: Library, name: str, dtype: str) -> None:
    problem = problem_for(eager, name, dtype)
    given = {key: value for key, value in problem.arguments.items() if key not in ("x", "k")}
    found = eager.evaluate(softk.threshold, problem.x, problem.k, **given, **problem.options)
    wanted = np.asarray([reference.threshold for reference in problem.oracles])
    # A few units of the last digit of t and of its parts: a score beside it and a multiple of epsilon.
    scale = np.abs(wanted) + 8.0 * problem.epsilon[:, 0]
    assert np.max(np.abs(found - wanted) / scale) <= 8.0 * np.finfo(dtype).eps


@DTYPES
@pytest.mark.parametrize("weighted", [False, True])
def test_quantile(eager: Library, weighted: bool, dtype: str) -> None:
    if eager.name == "jax" and dtype == "float32":
        pytest.skip("compiling takes too long; run in float64")
    rng = np.random.default_rng(5)
    x = rng.normal(size=(3, 30)).astype(dtype)
    q = np.asarray([0.0, 0.013, 0.37, 0.5, 0.951, 1.0], dtype)
    weights = rng.integers(1, 5, size=(3, 30)).astype(dtype) if weighted else None
    epsilon = np.asarray([[0.02], [0.2], [1.0]], dtype)
    given = {"weights": weights} if weighted else {}
    found = eager.evaluate(softk.quantile, x, q, epsilon=epsilon, **given)
    rows = [(x[i], epsilon[i, 0], weights[i] if weighted else None) for i in range(3)]
    wanted = [[Quantile(values, one, size, counts).value for values, size, counts in rows] for one in q]
    # (n - 1) q has one rounding of its own, of the size of n.
    assert np.max(np.abs(found - np.asarray(wanted))) <= 32.0 * np.finfo(dtype).eps * (1.0 + 3.0 * weighted)


def test_quantile_lies_between_thresholds(eager: Library, rng: np.random.Generator) -> None:
    n = 21
    x = rng.normal(size=n)
    places = np.asarray([0.0, 0.25, 3.0, 7.75, 19.5, 20.0])
    levels = n - 0.5 - np.arange(n)[:, None]
    thresholds = eager.evaluate(softk.threshold, np.tile(x, (n, 1)), levels, epsilon=0.3)
    wanted = np.interp(places, np.arange(n), thresholds)
    found = eager.evaluate(softk.quantile, x, places / (n - 1), epsilon=0.3)
    np.testing.assert_allclose(found, wanted, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("kernels", ["auto", "none"])
@pytest.mark.parametrize("n", [3, 12, 40])
def test_masses_at_a_running_sum_of_weights(n: int, kernels: str, rng: np.random.Generator) -> None:
    """k within roundings of what the largest scores weigh, whether or not it counts as the same: both tails are next to
    nothing, and a step from either side may go far past the root, or swing between the two sides.
    """
    rows, eps = 60_000, np.finfo("float32").eps
    x = rng.normal(size=(rows, n)) * np.exp(rng.normal(size=(rows, n)) * rng.uniform(0.0, 10.0, size=(rows, 1)))
    weights = rng.exponential(size=(rows, n)) ** rng.uniform(0.2, 4.0, size=(rows, 1)) + 1e-9
    x, weights = x.astype("float32"), weights.astype("float32")
    sums = np.cumsum(np.take_along_axis(weights, np.argsort(-x, axis=-1), axis=-1)[:, ::-1], axis=-1)
    k = sums[:, -1:] - np.take_along_axis(sums, rng.integers(0, n - 1, size=(rows, 1)), axis=-1)
    k = (k * (1.0 + eps * rng.integers(-6, 7, size=(rows, 1)))).astype("float32")
    epsilon = (10.0 ** rng.uniform(-4.0, 1.5, size=(rows, 1))).astype("float32")
    with softk.kernels(kernels):
        mask = softk.topk(x, k, epsilon=epsilon, weights=weights)
    mass = np.sum(weights.astype(float) * mask, axis=-1, keepdims=True)
    assert np.all(np.abs(mass - k) <= 16.0 * eps * np.maximum(k, np.max(weights, axis=-1, keepdims=True)))
