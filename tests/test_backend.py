"""What a framework does in its own way does what the base class says: it selects, has a sigmoid, overwrites nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import softk
from softk._reference.threshold.problem import dot, sigmoid, total
from softk.backend import backend_of

from .libraries import Library

RANKS = [(1, 2), (3, 4), (6, 7), (7, 7), (2, 2), (1, 3, 6), (1, 2, 3, 4, 5, 6, 7)]


def scores(kind: str, shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> np.ndarray:
    x = rng.normal(size=shape).astype(dtype)
    if kind == "tied":
        return np.round(x)
    if kind == "infinite":
        x[rng.uniform(size=shape) < 0.3] = -np.inf
        x[rng.uniform(size=shape) < 0.2] = np.inf
    return x


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 70)])
@pytest.mark.parametrize("kind", ["normal", "tied", "infinite"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_select(eager: Library, dtype: str, kind: str, shape: tuple[int, ...], rng: Any) -> None:
    """The scores of some ranks, whether those are numbers or arrays, one a slice or the same for all."""
    if eager.name == "dask":
        pytest.skip("Dask selects within its blocks, which are NumPy's")
    x = scores(kind, shape, dtype, rng)
    ordered = -np.sort(-x, axis=-1)
    given = eager.array(x, dtype)
    backend = backend_of(given)
    n = shape[-1]
    for ranks in [*RANKS, (n - 1, n), (n // 2, n // 2 + 1)]:
        wanted = ordered[..., [rank - 1 for rank in ranks]]
        np.testing.assert_array_equal(eager.numpy(backend.select(given, ranks)), wanted)
    places = rng.integers(1, n + 1, size=(*shape[:-1], 2))
    found = backend.select(given, eager.array(places, "int64"))
    np.testing.assert_array_equal(eager.numpy(found), np.take_along_axis(ordered, places - 1, axis=-1))


@pytest.mark.parametrize("n", [1, 1000, 1024, 5000])
def test_sums(eager: Library, n: int, rng: Any) -> None:
    """Sums and sums of products are rounded as their dtype is."""
    x, y = rng.normal(size=(2, 3, n)).astype("float32")
    one = rng.normal(size=(1, n)).astype("float32")
    given, other, row = (eager.array(value, "float32") for value in (x, y, one))
    xp = backend_of(given).xp
    pairs = [
        (total(xp, given), x.astype(float)),
        (dot(xp, given, other), x.astype(float) * y),
        (dot(xp, row, given), one.astype(float) * x),
    ]
    for found, terms in pairs:
        exact = terms.sum(axis=-1, keepdims=True)
        bound = 8.0 * np.finfo("float32").eps * np.abs(terms).sum(axis=-1, keepdims=True)
        assert np.all(np.abs(eager.numpy(found) - exact) <= bound)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sigmoid(eager: Library, dtype: str, rng: Any) -> None:
    z = np.concatenate([rng.normal(size=1000) * 20.0, [0.0, -1e4, 1e4, -np.inf, np.inf]]).astype(dtype)
    given = eager.array(z, dtype)
    backend = backend_of(given)
    with backend.quiet(given), np.errstate(over="ignore"):
        found = eager.numpy(sigmoid(backend.xp, given))
        exact = 1.0 / (1.0 + np.exp(-z.astype(float)))
    np.testing.assert_allclose(found, exact, rtol=0.0, atol=4.0 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(found[-4:], [0.0, 1.0, 0.0, 1.0])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 1), (2, 3000)])
def test_nothing_that_is_given_is_overwritten(eager: Library, shape: tuple[int, ...], plain: bool, rng: Any) -> None:
    x, u, weights = rng.normal(size=shape), rng.normal(size=shape), rng.uniform(0.5, 2.0, size=shape)
    where, k, epsilon = rng.uniform(size=shape) < 0.9, np.asarray(0.4), np.asarray(0.1)
    values = {"x": x, "weights": weights, "k": k, "epsilon": epsilon}
    given = {name: eager.array(value, "float64") for name, value in values.items()}
    kept, cotangent = eager.array(where, "bool"), eager.array(u, "float64")
    for f in (softk.topk, softk.log_topk):
        options = {"epsilon": given["epsilon"]}
        if not plain:
            options |= {"weights": given["weights"], "where": kept}
        mask, pullback = softk.vjp(f, given["x"], given["k"], **options)
        before = eager.numpy(mask).copy()
        first = {name: eager.numpy(value).copy() for name, value in pullback(cotangent).items()}
        for name, value in pullback(cotangent).items():
            np.testing.assert_array_equal(eager.numpy(value), first[name])
        softk.jvp(f, given["x"], given["k"], **options, tangents={"x": cotangent})
        np.testing.assert_array_equal(eager.numpy(mask), before)
    for name, value in values.items():
        np.testing.assert_array_equal(eager.numpy(given[name]), value)
    np.testing.assert_array_equal(eager.numpy(cotangent), u)
    np.testing.assert_array_equal(eager.numpy(kept), where)
