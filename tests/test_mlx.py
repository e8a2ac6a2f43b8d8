"""MLX: the contract of an adapter, and MLX's own transformations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import softk
from softk.backend import backend_of
from softk.testing import check_backend

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")

X, U = (np.asarray(values, "float32") for values in ([0.2, 1.7, -0.5, 0.9], [0.3, -1.0, 0.7, 0.2]))


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def mask(x: Any) -> Any:
    return softk.topk(x, 2, epsilon=0.5)


def weighed(x: Any) -> Any:
    return mx.sum(mx.array(U) * mask(x))


def test_its_derivatives_are_numpys() -> None:
    """MLX differentiates natively, in both directions, in every argument; NumPy's are in double precision."""
    wide, u = X.astype("float64"), U.astype("float64")
    expected, pullback = softk.vjp(softk.topk, wide, np.asarray(1.7), epsilon=np.asarray(0.5))
    arrays = [mx.array(X), mx.array(1.7), mx.array(0.5)]

    def operator(x: Any, k: Any, epsilon: Any) -> Any:
        return softk.topk(x, k, epsilon=epsilon)

    (found,), gradients = mx.vjp(operator, arrays, [mx.array(U)])
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=1e-6)
    for gradient, wanted in zip(gradients, pullback(u).values(), strict=True):
        np.testing.assert_allclose(np.asarray(gradient), wanted, rtol=0, atol=2e-6)
    tangents = {"x": u, "k": np.asarray(0.4), "epsilon": np.asarray(-0.3)}
    rate = mx.jvp(operator, arrays, [mx.array(np.asarray(values, "float32")) for values in tangents.values()])[1][0]
    wanted = softk.jvp(softk.topk, wide, np.asarray(1.7), epsilon=np.asarray(0.5), tangents=tangents)[1]
    np.testing.assert_allclose(np.asarray(rate), wanted, rtol=0, atol=2e-6)


@pytest.mark.full
def test_its_transformations() -> None:
    """mx.compile builds C++, which takes most of the time."""
    x = mx.array(X)
    plain = np.asarray(mask(x))
    np.testing.assert_allclose(np.asarray(mx.compile(mask)(x)), plain, rtol=1e-6)
    rows = mx.stack([x, 2.0 * x])
    np.testing.assert_allclose(np.asarray(mx.vmap(mask)(rows)), np.asarray(mask(rows)), rtol=1e-6)
    second = mx.grad(lambda x: mx.sum(mx.array(U[::-1].copy()) * mx.grad(weighed)(x)))(x)

    def gradient(values: np.ndarray) -> np.ndarray:
        return softk.vjp(softk.topk, values, 2, epsilon=0.5)[1](U.astype("float64"))["x"]

    wide, step = X.astype("float64"), 1e-5
    steps = step * np.eye(4)
    rates = np.stack([(gradient(wide + one) - gradient(wide - one)) / (2 * step) for one in steps])
    np.testing.assert_allclose(np.asarray(second), rates @ U[::-1], rtol=0, atol=2e-5 * np.abs(rates).max())


def test_its_exponential_is_accurate() -> None:
    """To one unit in the last place, where that of MLX itself is off by up to 28."""
    values = np.linspace(-80.0, 80.0, 20_001).astype("float32")
    wanted = np.exp(values.astype("float64"))
    found = np.asarray(backend_of(mx.array(values)).xp.exp(mx.array(values))).astype("float64")
    assert np.max(np.abs(found - wanted) / np.spacing(wanted.astype("float32"))) < 1.0
    ends = backend_of(mx.array(values)).xp.exp(mx.array([np.inf, -np.inf, np.nan]))
    np.testing.assert_array_equal(np.asarray(ends), [np.inf, 0.0, np.nan])


@pytest.mark.full
def test_the_adapter_keeps_its_contract() -> None:
    def gradient(f: Any, x: Any, cotangent: Any) -> Any:
        return mx.vjp(f, [x], [cotangent])[1][0]

    check_backend(backend_of(mx.array(X)), make=mx.array, gradient=gradient, dtypes=("float32",))


@pytest.mark.full
def test_its_other_functions() -> None:
    x = mx.array(X)
    points = np.arange(6.0, dtype="float32").reshape(3, 2)
    pairs = [
        (softk.topk(x, 2, hard=True), softk.topk(X, 2, hard=True)),
        (softk.topk(x.astype(mx.bfloat16), 2, epsilon=0.5).astype(mx.float32), softk.topk(X, 2, epsilon=0.5)),
        (softk.quantile(x, 0.3, epsilon=0.1), softk.quantile(X, 0.3, epsilon=0.1)),
        (softk.sort(x, epsilon=0.1), softk.sort(X, epsilon=0.1)),
        (softk.rank(x, epsilon=0.1), softk.rank(X, epsilon=0.1)),
        (softk.select(x, 2).gates, softk.select(X, 2).gates),
        (softk.sorted_topk(x, 2).assignment, softk.sorted_topk(X, 2).assignment),
        (softk.neighbors.weights(mx.array(points), mx.array(points), 1), softk.neighbors.weights(points, points, 1)),
        (softk.losses.ndcg(x, mx.array([0, 1, 0, 2])), softk.losses.ndcg(X, np.asarray([0, 1, 0, 2]))),
    ]
    for theirs, ours in pairs:
        np.testing.assert_allclose(np.asarray(theirs), ours, rtol=0, atol=1e-2 if theirs is pairs[1][0] else 2e-5)
