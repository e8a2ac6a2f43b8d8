"""The general transport problem: its plan against three other solvers, and what it says about itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import softk

from .libraries import BY_NAME, Library
from .plan_oracles import Transported, pot, sinkhorn
from .test_errors import complains

INF, NAN = math.inf, math.nan
EPS = {"float64": 2.0**-52, "float32": 2.0**-23}

#: The bound on the error of a plan, in eps, absolute in units of weight: that of the mask.
PLAN = 32

#: The bound on the error of a marginal.
MARGINAL = {"float64": 1e-8, "float32": 1e-4}

X = np.asarray([0.2, 1.7, -0.5, 0.9])
Y, B = np.asarray([0.0, 1.0, 2.0]), np.asarray([1.0, 2.0, 1.0])


def solve(lib: Library, *args: np.ndarray, **options: Any) -> softk.Plan:
    """`softk.transport` on a library, the results brought back."""
    made = [lib.array(value) for value in args]
    options = {key: lib.array(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}
    return softk.Plan(*map(lib.numpy, lib.call(softk.transport, *made, **options)))


def error_of(plan: np.ndarray, marginals: np.ndarray, total: Any) -> np.ndarray:
    """The largest difference of a column sum and its normalised marginal, in float64."""
    wanted = marginals * (np.asarray(total)[..., None] / marginals.sum(axis=-1, keepdims=True))
    return np.max(np.abs(plan.astype(float).sum(axis=-2) - wanted), axis=-1)


# --- against three other solvers


@cache
def batch(dtype: str) -> dict[str, np.ndarray]:
    """One problem a slice: anchors in any order and twice, marginals of any size and 0, weights 0, items removed."""
    rng = np.random.default_rng(11)
    rows, n, m = 9, 7, 4
    x, anchors = rng.normal(size=(rows, n)), rng.normal(size=(rows, m))
    marginals, weights = rng.uniform(0.2, 2.0, (rows, m)), rng.uniform(0.3, 2.0, (rows, n))
    where = np.ones((rows, n), dtype=bool)
    epsilon = np.asarray([[0.5], [5.0], [0.05], [0.5], [0.5], [0.5], [0.5], [0.3], [0.3]])
    anchors[3] = (0.5, -1.0, 0.5, 1.0)  # twice
    marginals[4] = (1.0, 0.0, 2.0, 0.5)  # the second takes nothing
    marginals[5] = (0.0, 3.0, 0.0, 1e-3)
    weights[6, [1, 4]] = 0.0
    where[7, [0, 3]] = False
    x[8] = 0.25  # constant
    named = {"x": x, "anchors": anchors, "marginals": marginals, "epsilon": epsilon, "weights": weights}
    return {name: values.astype(dtype) for name, values in named.items()} | {"where": where}


@cache
def references(dtype: str) -> list[Transported]:
    given = batch(dtype)
    return [
        Transported(**{name: v[i, 0] if name == "epsilon" else v[i] for name, v in given.items()}) for i in range(9)
    ]


@pytest.mark.parametrize("dtype", EPS)
def test_against_the_reference(lib: Library, dtype: str) -> None:
    if (lib.name, dtype) in (("jax", "float64"), ("jax-jit", "float32")):
        pytest.skip("compiling takes too long; run in the other dtype")
    problem = batch(dtype)
    options = {name: problem[name] for name in ("epsilon", "weights", "where")}
    found = solve(lib, problem["x"], problem["anchors"], problem["marginals"], **options)
    assert found.plan.shape == (9, 7, 4)
    assert found.potentials.shape == (9, 4)
    assert found.marginal_error.shape == found.iterations.shape == found.converged.shape == (9,)
    assert found.plan.dtype == found.potentials.dtype == found.marginal_error.dtype == dtype
    assert found.iterations.dtype.kind == "i"
    assert found.converged.dtype == bool
    assert np.all(found.converged)
    for i, reference in enumerate(references(dtype)):
        error = np.max(np.abs(found.plan[i] - reference.plan))
        assert error <= PLAN * EPS[dtype], f"slice {i}: off by {error / EPS[dtype]:.3g} eps"
        # A potential moves by epsilon / c for each unit of error in the mass c of its anchor.
        slack = PLAN * EPS[dtype] * (1.0 + float(reference.epsilon / min(reference.c)))
        np.testing.assert_allclose(found.potentials[i], reference.potentials, rtol=0, atol=slack)


def test_the_reference_is_a_plan() -> None:
    """To 50 digits, and of the density that makes it the optimum."""
    for i, reference in enumerate(references("float64")):
        assert reference.error <= 1e-50
        assert_optimal(reference.plan, batch("float64"), i)


def assert_optimal(plan: np.ndarray, problem: dict[str, np.ndarray], i: int) -> None:
    """log(P_ij P_kl / (P_il P_kj)) = 2 (x_i - x_k) (y_j - y_l) / epsilon: with the marginals, what a plan is."""
    rows = np.flatnonzero(plan.sum(axis=1) > 0)
    columns = np.flatnonzero(plan.sum(axis=0) > 0)
    logs = np.log(plan[rows][:, columns])
    x, y, epsilon = problem["x"][i][rows], problem["anchors"][i][columns], problem["epsilon"][i, 0]
    found = (logs - logs[:1]) - (logs - logs[:1])[:, :1]
    np.testing.assert_allclose(found, 2.0 * np.outer(x - x[0], y - y[0]) / epsilon, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("epsilon", [2.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_sinkhorn_and_pot(weighted: bool, epsilon: float, rng: np.random.Generator) -> None:
    """Two implementations of the paper's algorithm, until their marginals hold to 1e-13 of the whole."""
    x, anchors, marginals = rng.normal(size=30), rng.permutation(np.linspace(-1.0, 1.5, 6)), rng.uniform(0.5, 2.0, 6)
    weights = rng.uniform(0.2, 2.0, 30) if weighted else None
    found = softk.transport(x, anchors, marginals, epsilon=epsilon, weights=weights)
    for other in (sinkhorn, pot):
        wanted = other(x, anchors, marginals, epsilon, weights)
        np.testing.assert_allclose(found.plan, wanted, rtol=0, atol=1e-11, err_msg=other.__name__)


def test_sinkhorn_s_method_is_sinkhorn(lib: Library) -> None:
    """Where it converges it finds the same plan, in more iterations than Newton's method, and fewer than allowed."""
    if "jax" in lib.name:
        pytest.skip("compiling takes too long; run by the other libraries")
    problem = {name: values[:2] for name, values in batch("float64").items()}
    given = [problem[name] for name in ("x", "anchors", "marginals")]
    options = {name: problem[name] for name in ("epsilon", "weights", "where")}
    limit = 60  # a lazy array cannot stop before
    found = solve(lib, *given, method="sinkhorn", max_iterations=limit, tolerance=1e-10, **options)
    newton = solve(lib, *given, **options)
    assert np.all(found.marginal_error <= 1e-10) == np.all(found.converged)
    assert np.all(found.converged)
    assert np.all(found.iterations > newton.iterations)
    assert np.all(found.iterations < limit)
    np.testing.assert_allclose(found.plan, newton.plan, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.potentials, newton.potentials, rtol=0, atol=1e-8)


def test_two_anchors_are_the_top_k(lib: Library, rng: np.random.Generator) -> None:
    if "jax" in lib.name:
        pytest.skip("compiling takes too long; run by the other libraries")
    x, k = rng.normal(size=(5, 9)), np.asarray([[1.0], [4.0], [2.5], [8.0], [0.25]])
    epsilon = np.asarray([[0.1], [0.5], [2.0], [0.01], [1.0]])
    found = solve(lib, x, np.asarray([0.0, 1.0]), np.concatenate([9.0 - k, k], axis=1), epsilon=epsilon)
    mask = softk.topk(x, k, epsilon=epsilon)
    np.testing.assert_allclose(found.plan[..., 1], mask, rtol=0, atol=1e-14)
    np.testing.assert_allclose(found.plan[..., 0], 1.0 - mask, rtol=0, atol=1e-14)
    # The potential says where the threshold is.
    threshold = 0.5 * (1.0 - found.potentials[..., 1])
    np.testing.assert_allclose(threshold, softk.threshold(x, k, epsilon=epsilon), rtol=0, atol=1e-13)


def test_two_anchors_with_weights_are_the_top_k(rng: np.random.Generator) -> None:
    x, weights = rng.normal(size=12), rng.uniform(0.0, 2.0, 12)
    weights[3] = 0.0
    k = 0.3 * weights.sum()
    found = softk.transport(x, np.asarray([1.0, 0.0]), np.asarray([k, weights.sum() - k]), weights=weights)
    wanted = weights * softk.topk(x, k, weights=weights)
    np.testing.assert_allclose(found.plan[:, 0], wanted, rtol=0, atol=1e-14)


def test_sorted_top_k_is_a_transport(rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 10))
    found = softk.transport(x, np.asarray([0.0, 1.0, 2.0, 3.0]), np.asarray([7.0, 1.0, 1.0, 1.0]), epsilon=0.4)
    wanted = softk.sorted_topk(x, 3, epsilon=0.4).assignment
    np.testing.assert_allclose(np.swapaxes(found.plan, 1, 2)[:, :0:-1], wanted, rtol=0, atol=1e-14)


# --- arguments


def test_shapes(rng: np.random.Generator) -> None:
    """Items in the place of the selected axis, anchors last; anchors and marginals for all slices or for each."""
    x = rng.normal(size=(2, 5, 3))
    anchors, marginals = rng.normal(size=(2, 3, 4)), rng.uniform(0.5, 1.0, (3, 4))
    epsilon, weights = rng.uniform(0.2, 1.0, (1, 3)), rng.uniform(0.5, 1.0, (5, 1))
    where = rng.uniform(size=x.shape) < 0.8
    found = softk.transport(x, anchors, marginals, axis=1, epsilon=epsilon, weights=weights, where=where)
    assert found.plan.shape == (2, 5, 3, 4)
    assert found.potentials.shape == (2, 3, 4)
    assert found.marginal_error.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        wanted = Transported(x[i, :, j], anchors[i, j], marginals[j], epsilon[0, j], weights[:, 0], where[i, :, j])
        np.testing.assert_allclose(found.plan[i, :, j], wanted.plan, rtol=0, atol=PLAN * EPS["float64"])
        np.testing.assert_allclose(found.potentials[i, j], wanted.potentials, rtol=0, atol=1e-13)
    first = softk.transport(np.moveaxis(x, 1, 0), anchors, marginals, axis=0, epsilon=epsilon[0])
    last = softk.transport(np.moveaxis(x, 1, 2), anchors, marginals, axis=-1, epsilon=epsilon[0][:, None])
    np.testing.assert_array_equal(np.moveaxis(first.plan, 0, 2), last.plan)


def test_order_of_the_anchors(rng: np.random.Generator) -> None:
    x, anchors, marginals = rng.normal(size=(3, 8)), rng.normal(size=5), rng.uniform(0.2, 2.0, 5)
    marginals[2], order = 0.0, rng.permutation(5)
    one = softk.transport(x, anchors, marginals, epsilon=0.3)
    other = softk.transport(x, anchors[order], marginals[order], epsilon=0.3)
    np.testing.assert_array_equal(other.plan, one.plan[..., order])
    np.testing.assert_array_equal(other.potentials, one.potentials[..., order])


def test_an_anchor_that_takes_nothing(rng: np.random.Generator) -> None:
    """It might as well not be there, wherever it is."""
    x, anchors, marginals = rng.normal(size=8), np.asarray([0.1, 0.5, -0.4]), np.asarray([1.0, 2.0, 1.5])
    alone = softk.transport(x, anchors, marginals, epsilon=0.3)
    for place in (-1e30, -0.4, 0.3, 0.5, 1e30):
        more = softk.transport(x, np.append(anchors, place), np.append(marginals, 0.0), epsilon=0.3)
        np.testing.assert_allclose(more.plan[:, :3], alone.plan, rtol=0, atol=1e-14)
        np.testing.assert_array_equal(more.plan[:, 3], 0.0)
        np.testing.assert_allclose(more.potentials[:3], alone.potentials, rtol=0, atol=1e-13)
        assert more.potentials[3] == -INF


def test_anchors_twice(rng: np.random.Generator) -> None:
    """They share in proportion to their marginals what one would take."""
    x = rng.normal(size=8)
    one = softk.transport(x, np.asarray([0.0, 1.0]), np.asarray([3.0, 5.0]), epsilon=0.3)
    both = softk.transport(x, np.asarray([1.0, 0.0, 1.0]), np.asarray([1.0, 3.0, 4.0]), epsilon=0.3)
    np.testing.assert_allclose(both.plan, one.plan[:, [1, 0, 1]] * [0.2, 1.0, 0.8], rtol=0, atol=1e-14)
    all_equal = softk.transport(x, np.zeros(3), np.asarray([1.0, 3.0, 4.0]), epsilon=0.3)
    np.testing.assert_allclose(all_equal.plan, np.tile([0.125, 0.375, 0.5], (8, 1)), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_plan_does_not_depend_on_a_common_factor(light: Library, dtype: str) -> None:
    """Of the scores and epsilon: an anchor's square is only a part of its potential. Equal anchors share evenly."""
    x, masses = np.asarray([1.5, -1.75, 0.25, 1.0]), np.ones(4)

    def plan(power: int, anchors: list[float]) -> np.ndarray:
        given = (np.asarray(value, dtype) for value in (x * 2.0**power, np.asarray(anchors), masses))
        return solve(light, *given, epsilon=0.75 * 2.0**power).plan

    most = np.finfo(dtype).maxexp - 1
    # Equal anchors are as if at a small distance, which is not small enough for the largest scores.
    for anchors, powers in (([0.0, 0.25, 1.0, 0.25], (12, 24, 40, most // 2)), ([0.0, 0.25, 1.0, 0.5], (40, most - 2))):
        expected = plan(0, anchors)
        assert expected.max() < 0.9
        for power in powers:
            np.testing.assert_allclose(plan(power, anchors), expected, rtol=0, atol=PLAN * EPS[dtype])


def test_marginals_are_normalised(rng: np.random.Generator) -> None:
    x, weights = rng.normal(size=8), rng.uniform(0.2, 2.0, 8)
    for items in (None, weights):
        total = 8.0 if items is None else weights.sum()
        one = softk.transport(x, Y, B, weights=items)
        other = softk.transport(x, Y, B * 1e-3, weights=items)
        np.testing.assert_allclose(other.plan, one.plan, rtol=0, atol=1e-14)
        np.testing.assert_allclose(one.plan.sum(axis=0), B / B.sum() * total, rtol=1e-14)
        np.testing.assert_allclose(one.plan.sum(axis=1), 1.0 if items is None else weights, rtol=1e-14)


def test_items_that_are_not_transported(light: Library) -> None:
    """Removed ones, whatever their score, and those at -inf: their rows are zero, and the marginals know it."""
    x = np.asarray([[0.3, NAN, -INF, 1.0, 0.5], [0.3, INF, 0.2, 1.0, 0.5]])
    where = np.asarray([[True, False, True, True, True], [True, False, False, True, True]])
    found = solve(light, x, Y, B, where=where)
    alone = softk.transport(np.asarray([0.3, 1.0, 0.5]), Y, B)
    for i in range(2):
        np.testing.assert_allclose(found.plan[i][[0, 3, 4]], alone.plan, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(found.plan[0][[1, 2]], 0.0)
    np.testing.assert_array_equal(found.plan[1][[1, 2]], 0.0)
    assert np.all(found.converged)


def test_infinite_scores_go_to_the_highest_anchor() -> None:
    found = softk.transport(np.asarray([0.3, INF, 1.0, 0.5]), Y, np.asarray([1.0, 1.5, 1.5]), epsilon=0.3)
    np.testing.assert_array_equal(found.plan[1], [0.0, 0.0, 1.0])
    assert found.converged
    rest = softk.transport(np.asarray([0.3, 1.0, 0.5]), Y, np.asarray([1.0, 1.5, 0.5]), epsilon=0.3)
    np.testing.assert_allclose(found.plan[[0, 2, 3]], rest.plan, rtol=0, atol=1e-13)


@pytest.fixture
def light(lib: Library) -> Library:
    """Every library but JAX, which would compile every new shape."""
    if "jax" in lib.name:
        pytest.skip("compiling takes too long; the reference's problems run")
    return lib


BAD = {
    "x NaN": {"x": [NAN, 0.0, 1.0, 2.0]},
    "anchor NaN": {"anchors": [0.0, NAN, 2.0]},
    "marginal negative": {"marginals": [1.0, -1.0, 1.0]},
    "marginal NaN": {"marginals": [1.0, NAN, 1.0]},
    "marginal infinite": {"marginals": [1.0, INF, 1.0]},
    "marginals 0": {"marginals": [0.0, 0.0, 0.0]},
    "epsilon 0": {"epsilon": [0.0]},
    "epsilon negative": {"epsilon": [-1.0]},
    "epsilon NaN": {"epsilon": [NAN]},
    "weight negative": {"weights": [1.0, -1.0, 1.0, 1.0]},
    "weight NaN": {"weights": [1.0, NAN, 1.0, 1.0]},
}


def test_a_bad_slice_is_nan_and_no_other(light: Library) -> None:
    good = {"x": X, "anchors": Y, "marginals": B, "epsilon": np.asarray([0.5]), "weights": np.ones(4)}
    rows = [good | {name: np.asarray(value) for name, value in bad.items()} for bad in ({}, *BAD.values(), {})]
    given = {name: np.stack([row[name] for row in rows]) for name in good}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = solve(light, *(given.pop(name) for name in ("x", "anchors", "marginals")), **given)
    wanted = softk.transport(X, Y, B, epsilon=0.5)
    for i, name in enumerate(["good", *BAD, "good"]):
        if name == "good":
            np.testing.assert_allclose(found.plan[i], wanted.plan, rtol=0, atol=1e-14)
            assert found.converged[i]
        else:
            assert np.all(np.isnan(found.plan[i])), name
            assert not found.converged[i], name


def test_a_slice_depends_on_itself_alone(rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 9))
    other = x.copy()
    other[1] *= 1e6
    one, two = (softk.transport(values, Y, B, epsilon=0.1) for values in (x, other))
    for name in ("plan", "potentials", "iterations", "marginal_error"):
        np.testing.assert_array_equal(getattr(one, name)[[0, 2]], getattr(two, name)[[0, 2]])


def test_shifting_and_scaling(rng: np.random.Generator) -> None:
    x = rng.normal(size=9)
    one = softk.transport(x, Y, B, epsilon=0.3)
    for moved in (
        softk.transport(x + 5.0, Y, B, epsilon=0.3),
        softk.transport(x, Y - 5.0, B, epsilon=0.3),
        softk.transport(4.0 * x, 0.5 * Y, B, epsilon=2.0 * 0.3),
    ):
        np.testing.assert_allclose(moved.plan, one.plan, rtol=0, atol=1e-13)


# --- what it says about itself


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
def test_diagnostics_are_those_of_the_plan(method: str, dtype: str) -> None:
    """Converged or not: the marginal error is recomputed from the plan, and the plan from the potentials."""
    problem = batch(dtype)
    given = [problem[name] for name in ("x", "anchors", "marginals")]
    options = {name: problem[name] for name in ("epsilon", "weights", "where")}
    for limit in (1, 5, 1000):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", softk.ConvergenceWarning)
            found = softk.transport(*given, method=method, max_iterations=limit, **options)
        total = np.sum(problem["weights"], axis=-1, where=problem["where"], dtype=float)
        error = error_of(found.plan, problem["marginals"].astype(float), total)
        np.testing.assert_allclose(found.marginal_error, error, rtol=1e-3, atol=32 * EPS[dtype])
        count = np.sum(problem["where"] & (problem["weights"] > 0.0), axis=-1)
        np.testing.assert_array_equal(found.converged, found.marginal_error <= MARGINAL[dtype] * total / count)
        assert np.all(found.iterations <= limit)
        assert np.all(found.iterations[~found.converged] == limit)
        x, y, _, epsilon, a, kept = (values.astype(float) for values in problem.values())
        exponent = 2.0 * x[:, :, None] * y[:, None] + (found.potentials - y**2).astype(float)[:, None]
        exponent = exponent / epsilon[:, :, None]
        share = np.exp(exponent - exponent.max(axis=-1, keepdims=True))
        plan = (a * kept)[:, :, None] * (share / share.sum(axis=-1, keepdims=True))
        np.testing.assert_allclose(found.plan, plan, rtol=0, atol=500 * EPS[dtype])
    assert np.all(found.converged)


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_weights_of_any_size_converge_alike(method: str, unit: float, rng: np.random.Generator) -> None:
    """The tolerance is in units of the mean weight: the plan and the flag do not depend on the unit of the weights."""
    x, a = rng.normal(size=20), rng.uniform(0.5, 2.0, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", softk.ConvergenceWarning)
        for limit in (2, 1000):
            options = {"epsilon": 0.1, "method": method, "max_iterations": limit}
            one = softk.transport(x, Y, B, weights=a, **options)
            other = softk.transport(x, Y, B, weights=unit * a, **options)
            assert one.converged == other.converged == (limit > 2 or method == "newton")
            np.testing.assert_allclose(other.plan, unit * one.plan, rtol=0, atol=1e-7 * unit)


HARD_FOR_SINKHORN = {"epsilon": 0.01, "method": "sinkhorn", "max_iterations": 3}


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_it_warns_once_where_it_has_not_converged(library: str, rng: np.random.Generator) -> None:
    """However many slices; from the line of the call; with the error, the tolerance and what would help."""
    lib = BY_NAME[library]
    lib.require()
    x = lib.array(rng.normal(size=(5, 20)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = softk.transport(x, lib.array(Y), lib.array(B), **HARD_FOR_SINKHORN)
    assert [w.category for w in caught] == [softk.ConvergenceWarning]
    assert caught[0].filename == __file__
    for part in (f"{float(lib.numpy(found.marginal_error).max()):.3g}", "1e-08", "max_iterations (now 3)"):
        assert part in str(caught[0].message)
    assert not np.any(lib.numpy(found.converged))
    assert np.all(lib.numpy(found.iterations) == 3)
    assert np.all(lib.numpy(found.marginal_error) > 1e-3)


def test_it_does_not_warn_where_it_has(rng: np.random.Generator) -> None:
    x = rng.normal(size=(5, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.all(softk.transport(x, Y, B, epsilon=0.01).converged)
        found = softk.transport(x, Y, B, epsilon=2.0, method="sinkhorn")
        assert np.all(found.converged)
        assert np.all(softk.transport(x, Y, B, **HARD_FOR_SINKHORN, tolerance=100.0).converged)


def test_under_a_trace_it_says_so_in_an_array(rng: np.random.Generator) -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    x = jax.numpy.asarray(rng.normal(size=(2, 20)))
    y, b = jax.numpy.asarray(Y), jax.numpy.asarray(B)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = jax.jit(lambda x: softk.transport(x, y, b, **HARD_FOR_SINKHORN))(x)
    assert found.converged.shape == (2,)
    assert not np.any(found.converged)
    assert np.all(found.iterations == 3)


def test_newton_s_method_is_honest_too(rng: np.random.Generator) -> None:
    """With too few steps it has not converged, and says so."""
    x = rng.standard_cauchy(size=(3, 200))
    anchors, marginals = np.arange(9.0), np.asarray([192.0, *[1.0] * 8])
    options = {"epsilon": 0.03 * float(np.ptp(x))}
    with pytest.warns(softk.ConvergenceWarning) as caught:
        found = softk.transport(x, anchors, marginals, max_iterations=1, **options)
    assert len(caught) == 1
    assert np.all(found.iterations == 1)
    assert not np.all(found.converged)
    enough = softk.transport(x, anchors, marginals, **options)
    assert np.all(enough.converged)
    assert np.all(enough.iterations > 1)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-11])
def test_tolerance(tolerance: float, rng: np.random.Generator) -> None:
    """Sinkhorn's method stops there, and convergence is measured by it."""
    x = rng.normal(size=(2, 15))
    found = softk.transport(x, Y, B, epsilon=0.5, method="sinkhorn", tolerance=tolerance)
    assert np.all(found.converged)
    assert np.all(found.marginal_error <= tolerance)
    if tolerance > 1e-8:
        assert np.all(found.marginal_error > 1e-8)


# --- the target: marginals to 1e-8 (float64) and 1e-4 (float32) within 60 iterations

KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "uniform": lambda rng, n: rng.uniform(size=n),
    "cauchy": lambda rng, n: rng.standard_cauchy(n),
    "tied": lambda rng, n: rng.integers(0, 5, n) / 4.0,
    "constant": lambda _, n: np.ones(n),
}

WIDE = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)

SIZES = [
    *[(kind, n, k, WIDE) for kind in KINDS for n, k in ((10, 3), (10, 10), (1000, 4), (1000, 16))],
    ("normal", 10_000, 1, WIDE),
    ("cauchy", 10_000, 16, WIDE),
    ("tied", 10_000, 16, (1.0, 0.1)),
    ("uniform", 10_000, 64, (0.01,)),
]

EVERY_SIZE = [(kind, n, k, (e,)) for kind in KINDS for n in (100, 1000, 10_000) for k in (1, 4, 16, 64) for e in WIDE]


def ladder(kind: str, n: int, k: int, relative: tuple[float, ...]) -> tuple[np.ndarray, ...]:
    """Scores (E, n), anchors k ... 0, marginals 1 ... 1 and the rest, and epsilon (E, 1) in units of the range."""
    x = KINDS[kind](np.random.default_rng(n + k), n)
    anchors, marginals = np.arange(k, -1.0, -1.0), np.asarray([1.0] * k + [n - k])
    size = float(np.ptp(x)) or 1.0
    return np.tile(x, (len(relative), 1)), anchors, marginals, size * np.asarray(relative)[:, None]


def check_target(kind: str, n: int, k: int, relative: tuple[float, ...], dtype: str) -> None:
    """In float32 the rest, n - k, is known to its rounding only; its anchor is allowed that."""
    *given, epsilon = (values.astype(dtype) for values in ladder(kind, n, k, relative))
    found = softk.transport(*given, epsilon=epsilon)
    sums = found.plan.sum(axis=-2, dtype=float)
    assert np.max(np.abs(sums[:, :k] - 1.0)) <= MARGINAL[dtype]
    assert np.max(np.abs(sums[:, k] - (n - k))) <= max(MARGINAL[dtype], 4.0 * EPS[dtype] * n)
    assert np.max(found.iterations) <= 60
    assert np.all(found.converged)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("kind", "n", "k", "relative"), SIZES)
def test_target(kind: str, n: int, k: int, relative: tuple[float, ...], dtype: str) -> None:
    check_target(kind, n, k, relative, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("kind", "n", "k", "relative"), EVERY_SIZE)
def test_target_everywhere(kind: str, n: int, k: int, relative: tuple[float, ...], dtype: str) -> None:
    check_target(kind, n, k, relative, dtype)


@pytest.mark.parametrize("kind", ["normal", "uniform", "cauchy"])
def test_sinkhorn_is_far_from_the_target(kind: str) -> None:
    """After 1000 iterations, where epsilon is small: a reference to measure against, not a solver."""
    *given, epsilon = ladder(kind, 200, 8, (1e-4, 1e-5))
    with pytest.warns(softk.ConvergenceWarning):
        found = softk.transport(*given, epsilon=epsilon, method="sinkhorn")
    assert np.all(found.iterations == 1000)
    assert np.all(found.marginal_error > 0.3)
    newton = softk.transport(*given, epsilon=epsilon)
    assert np.all(newton.marginal_error <= 1e-8)


# --- properties


@st.composite
def problems(draw: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, np.ndarray]:
    n, m = draw(st.integers(1, 10)), draw(st.integers(2, 6))
    tied = st.integers(-3, 3).map(float)
    value = draw(st.sampled_from([tied, st.floats(-10.0, 10.0, allow_subnormal=False)]))
    x = draw(st.lists(value, min_size=n, max_size=n))
    anchors = draw(st.lists(value, min_size=m, max_size=m))
    mass = st.one_of(st.just(0.0), st.floats(1e-3, 5.0))
    marginals = draw(st.lists(mass, min_size=m, max_size=m).filter(any))
    weights = draw(st.lists(mass, min_size=n, max_size=n).filter(any))
    return *map(np.asarray, (x, anchors, marginals)), 10.0 ** draw(st.floats(-3.0, 2.0)), np.asarray(weights)


@given(problems())
def test_any_plan(problem: tuple[np.ndarray, np.ndarray, np.ndarray, float, np.ndarray]) -> None:
    """It has its marginals, gives anchors in order to scores in order, and says that it converged."""
    x, anchors, marginals, epsilon, weights = problem
    found = softk.transport(x, anchors, marginals, epsilon=epsilon, weights=weights)
    assert found.converged
    assert np.all(found.plan >= 0.0)
    np.testing.assert_allclose(found.plan.sum(axis=1), weights, rtol=1e-13)
    wanted = marginals * (weights.sum() / marginals.sum())
    np.testing.assert_allclose(found.plan.sum(axis=0), wanted, rtol=0, atol=1e-8)
    held = weights > 0.0
    mean = (found.plan[held] @ anchors) / weights[held]
    assert np.all(np.diff(mean[np.argsort(x[held], stable=True)]) >= -1e-7)


# --- errors


@pytest.mark.parametrize(
    ("error", "name", "value", "allowed", "change"),
    [
        (TypeError, "anchors", "got list", "must be an array", {"anchors": [0.0, 1.0, 2.0]}),
        (TypeError, "marginals", "got float", "must be an array", {"marginals": 1.0}),
        (TypeError, "anchors", "bool", "must be real", {"anchors": np.asarray([True, False, True])}),
        (ValueError, "anchors", r"\(1,\)", "at least 2 values", {"anchors": np.ones(1)}),
        (ValueError, "anchors", r"\(\)", "at least 2 values", {"anchors": np.asarray(1.0)}),
        (ValueError, "anchors", r"\(2, 3\)", r"shape \(3,\)", {"anchors": np.ones((2, 3))}),
        (ValueError, "marginals", r"\(2,\)", "3 values, one per anchor", {"marginals": np.ones(2)}),
        (ValueError, "weights", r"\(3,\)", "broadcast to the shape of x", {"weights": np.ones(3)}),
        (TypeError, "where", "float64", "boolean", {"where": np.ones(4)}),
        (ValueError, "epsilon", "0", "positive finite", {"epsilon": 0}),
        (ValueError, "axis", "2", "from -1 to 0", {"axis": 2}),
        (ValueError, "method", "'simplex'", "'newton' or 'sinkhorn'", {"method": "simplex"}),
        (ValueError, "method", "array", "'newton' or 'sinkhorn'", {"method": np.ones(2)}),
        (ValueError, "tolerance", "0", "positive", {"tolerance": 0.0}),
        (ValueError, "tolerance", "nan", "positive", {"tolerance": NAN}),
        (ValueError, "tolerance", "'1'", "positive", {"tolerance": "1"}),
        (ValueError, "max_iterations", "0", "positive integer", {"max_iterations": 0}),
        (ValueError, "max_iterations", "2.5", "positive integer", {"max_iterations": 2.5}),
        (ValueError, "max_iterations", "True", "positive integer", {"max_iterations": True}),
    ],
)
def test_errors(error: type[Exception], name: str, value: str, allowed: str, change: dict[str, Any]) -> None:
    given = {"anchors": Y, "marginals": B} | change
    anchors, marginals = given.pop("anchors"), given.pop("marginals")
    complains(error, name, value, allowed, softk.transport, X, anchors, marginals, **given)


def test_no_scores() -> None:
    complains(ValueError, "x", "axis", "at least", softk.transport, np.zeros((2, 0)), Y, B)


def test_mixed_libraries() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    complains(TypeError, "anchors", "Tensor", "same library", softk.transport, X, torch.ones(2), np.ones(2))
