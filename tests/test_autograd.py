"""HIPS autograd, by value: both modes, twice, with any of the arguments on the tape and the others plain NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import softk

from . import closed_form
from .closed_form import ARGUMENTS, CASES, assert_close
from .oracles import assert_rows_close, dominated

autograd = pytest.importorskip("autograd")
anp = pytest.importorskip("autograd.numpy")
check_grads = pytest.importorskip("autograd.test_util").check_grads
make_jvp = pytest.importorskip("autograd.differential_operators").make_jvp
make_jvp_reversemode = pytest.importorskip("autograd.differential_operators").make_jvp_reversemode

FUNCTIONS = {"topk": softk.topk, "threshold": softk.threshold}
PLACES = {name: i for i, name in enumerate(ARGUMENTS)}


def positional(function: str, **options: Any) -> Callable[..., Any]:
    def f(x: Any, k: Any, epsilon: Any, weights: Any = None) -> Any:
        return FUNCTIONS[function](x, k, epsilon=epsilon, weights=weights, **options)

    return f


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_argument_on_the_tape(function: str, name: str, case: str, rng: Any) -> None:
    """The others are plain arrays: for k, epsilon and weights the scores themselves are plain."""
    values = closed_form.problem(rng, case, batch=(3,))
    u = rng.standard_normal((3, 7) if function == "topk" else 3)

    def loss(*given: Any) -> Any:
        return anp.sum(positional(function)(*given) * u)

    found = autograd.grad(loss, PLACES[name])(*values.values())
    assert type(found) in (np.ndarray, np.float64)
    assert_close(found, closed_form.pullback(function, u, values)[name])


@pytest.mark.parametrize("names", [*itertools.combinations(ARGUMENTS, 2), ARGUMENTS], ids="-".join)
def test_some_arguments_on_the_tape(names: tuple[str, ...], rng: Any) -> None:
    values = closed_form.problem(rng, batch=(3,))
    u = rng.standard_normal((3, 7))

    def loss(given: dict[str, Any]) -> Any:
        return anp.sum(positional("topk")(**{**values, **given}) * u)

    found = autograd.grad(loss)({name: values[name] for name in names})
    expected = closed_form.pullback("topk", u, values)
    for name in names:
        assert_close(found[name], expected[name])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_forward_mode(function: str, name: str, case: str, rng: Any) -> None:
    values = closed_form.problem(rng, case, batch=(3,))
    tangent = np.asarray(rng.standard_normal(values[name].shape))
    _, found = make_jvp(positional(function), PLACES[name])(*values.values())(tangent)
    assert_close(found, closed_form.push(function, {name: tangent}, values))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_jacobian(function: str, rng: Any) -> None:
    values = closed_form.problem(rng)
    at = closed_form.Slice(**values)
    for name in ARGUMENTS:
        found = autograd.jacobian(positional(function), PLACES[name])(*values.values())
        assert_close(found, at.get(function, 1, name).reshape(np.shape(found)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_derivatives_in_every_pair_of_arguments(function: str, case: str, rng: Any) -> None:
    values = closed_form.problem(rng, case, n=5)
    at = closed_form.Slice(**values)
    u = rng.standard_normal(5 if function == "topk" else ())

    def loss(*given: Any) -> Any:
        return anp.sum(positional(function)(*given) * u)

    for name, other in itertools.product(ARGUMENTS, repeat=2):
        found = autograd.jacobian(autograd.grad(loss, PLACES[name]), PLACES[other])(*values.values())
        expected = np.tensordot(u, at.get(function, 2, name, other), np.ndim(u))
        assert_close(found, expected.reshape(np.shape(found)), 1e-9)


def test_hessian(rng: Any) -> None:
    values = closed_form.problem(rng)
    u = rng.standard_normal(7)
    found = autograd.hessian(lambda *given: anp.sum(positional("topk")(*given) * u))(*values.values())
    assert_close(found, np.tensordot(u, closed_form.Slice(**values).get("topk", 2, "x", "x"), 1), 1e-9)


def test_third_derivative(rng: Any) -> None:
    values = closed_form.problem(rng, n=4)
    u = rng.standard_normal(4)
    hessian = autograd.hessian(lambda *given: anp.sum(positional("topk")(*given) * u))

    def second(x: Any) -> Any:
        return np.tensordot(u, closed_form.Slice(**{**values, "x": x}).get("topk", 2, "x", "x"), 1)

    expected = closed_form.differences(second, values["x"])
    assert_close(autograd.jacobian(hessian)(*values.values()), expected, 1e-7)


@pytest.mark.parametrize("mode", ["rev", "fwd"])
@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "smallest"}, {"axis": 0}, {"where": np.asarray([[1, 1, 0, 1], [1, 1, 1, 1]], bool)}],
    ids=["plain", "smallest", "axis", "where"],
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_check_grads(function: str, options: dict[str, Any], mode: str) -> None:
    """autograd's own difference quotients, of the first derivatives and of the second."""
    x = np.asarray([[0.3, -0.9, 1.1, 0.2], [1.4, 0.1, -0.6, 0.5]])
    shape = (1, 4) if options.get("axis") == 0 else (2, 1)
    k, epsilon, weights = np.full(shape, 0.8), np.full(shape, 0.9), np.asarray([0.6, 1.4, 1.0, 1.8])
    check_grads(positional(function, **options), modes=[mode], order=2)(x, k, epsilon, weights)


@pytest.mark.parametrize("weighted", [False, True])
def test_quantile(weighted: bool, rng: Any) -> None:
    values = closed_form.problem(rng)
    values["k"] = np.asarray(0.37)
    if not weighted:
        del values["weights"]

    def f(x: Any, q: Any, epsilon: Any, weights: Any = None) -> Any:
        return softk.quantile(x, q, epsilon=epsilon, weights=weights)

    value, first, second = closed_form.quantile_derivatives(*values.values())
    place = closed_form.Slice(values["x"], 1.0, 1.0).place
    assert_close(f(*values.values()), np.float64(value), 1e-14)
    for i, name in enumerate(values):
        gradient = autograd.grad(f, i)(*values.values())
        assert_close(gradient, first[place[name]].reshape(np.shape(gradient)))
        found = autograd.jacobian(autograd.grad(f, i))(*values.values())
        assert_close(found, second[place[name], place["x"]].reshape(np.shape(found)), 1e-9)
    check_grads(f, modes=["rev", "fwd"], order=2)(*values.values())


def test_quantiles_of_a_batch(rng: Any) -> None:
    x, q = rng.standard_normal((3, 6)), np.asarray([0.15, 0.8])
    check_grads(lambda x, q: softk.quantile(x, q, epsilon=0.6, keepdims=True), modes=["rev", "fwd"], order=1)(x, q)
    found = autograd.grad(lambda q: anp.sum(softk.quantile(x, q, epsilon=0.6)))(q)
    expected = [sum(closed_form.quantile_derivatives(row, each, 0.6)[1][6] for row in x).astype(float) for each in q]
    assert_close(found, expected)


def test_hard_mask_has_the_soft_derivative(rng: Any) -> None:
    x, u = rng.standard_normal((3, 7)), rng.standard_normal((3, 7))
    hard = autograd.grad(lambda x: anp.sum(softk.topk(x, 2, epsilon=0.7, hard=True) * u))(x)
    expected = closed_form.pullback("topk", u, {"x": x, "k": np.asarray(2.0), "epsilon": np.asarray(0.7)})["x"]
    assert_close(hard, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_lower_precision(dtype: str, rng: Any) -> None:
    x, u = rng.standard_normal((3, 7)).astype(dtype), rng.standard_normal((3, 7)).astype(dtype)
    found = autograd.grad(lambda x: anp.sum(softk.topk(x, 2, epsilon=0.7) * u))(x)
    assert found.dtype == dtype
    values = {"x": x.astype(float), "k": np.asarray(2.0), "epsilon": np.asarray(0.7)}
    expected = closed_form.pullback("topk", u.astype(float), values)["x"]
    assert_close(found.astype(float), expected, 2e-5 if dtype == "float32" else 2e-3)


def test_within_a_larger_function(rng: Any) -> None:
    """autograd's own operations before and after, and one value in two places."""
    values = {"x": rng.standard_normal(6), "k": np.asarray(0.9), "epsilon": np.asarray(0.9)}
    u = rng.standard_normal(6)

    def f(x: Any, s: Any) -> Any:
        return anp.sum(anp.tanh(softk.topk(anp.sin(x), s, epsilon=s)) * u)

    inner = {**values, "x": np.sin(values["x"])}
    mask = closed_form.topk(**inner).astype(float)
    expected = closed_form.pullback("topk", u / np.cosh(mask) ** 2, inner)
    in_x, in_s = autograd.grad(f, 0)(values["x"], 0.9), autograd.grad(f, 1)(values["x"], 0.9)
    assert_close(in_x, expected["x"] * np.cos(values["x"]))
    assert_close(in_s, expected["k"] + expected["epsilon"])


def test_second_derivatives_are_numbers_across_a_deep_gap() -> None:
    x = np.asarray([3.0, 0.0, -1.0])
    found = autograd.hessian(lambda x: np.sum(np.asarray([0.3, -1.0, 2.0]) * softk.log_topk(x, 1, epsilon=1e-3)))(x)
    assert np.all(np.isfinite(found))


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("function", ["topk", "log_topk"])
def test_one_item_dominates(function: str, dtype: str, with_weights: bool, rng: Any) -> None:
    """Either mode, and the forward mode that is a transpose of the reverse one."""
    problem, log = dominated(dtype, with_weights), function == "log_topk"
    x, k, epsilon, *weights = problem.arguments.values()
    v = rng.standard_normal(x.shape).astype(dtype)

    def f(x: Any) -> Any:
        return getattr(softk, function)(x, k, epsilon=epsilon, weights=weights[0] if weights else None)

    pairs = list(zip(problem.oracles, v, strict=True))
    pushed = [reference.log_jvp(dx=row) if log else reference.jvp(dx=row)[0] for reference, row in pairs]
    pulled = [reference.vjp(row, log=log)["x"] for reference, row in pairs]
    assert_rows_close(autograd.make_vjp(f)(x)[0](v), pulled, dtype)
    assert_rows_close(make_jvp(f)(x)(v)[1], pushed, dtype)
    assert_rows_close(make_jvp_reversemode(f)(x)(v), pushed, dtype)
