"""Short rows in Numba, several at once: as exact as the reference in float64, the same bits beside any other rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="Numba is not installed")

import softk
from softk._reference.threshold.masks import mask
from softk.backend import backend_of
from softk_numba import lanes, launch, masks

pytestmark = pytest.mark.kernels

ROWS = 16  # of each kind
INF, NAN = np.inf, np.nan


def scores(rng: np.random.Generator, n: int) -> np.ndarray:
    """Rows of many kinds, in random order, so that every block has several."""
    normal = rng.standard_normal((11, ROWS, n))
    kinds = [
        normal[0],
        np.round(2.0 * normal[1]) / 2.0,  # ties
        np.sign(normal[2]),  # two values
        0.0 * normal[3] + 0.3,  # constant
        normal[4] + 1e4,
        rng.standard_cauchy((ROWS, n)),
        np.exp(3.0 * normal[5]),
        np.where(rng.random((ROWS, n)) < 1.0 / n, 1e6, normal[6]),
        0.01 * normal[7] + np.sign(normal[8]),
        np.sign(normal[9]) * 2.0 ** -rng.integers(0, 60, (ROWS, n)),
        1e-6 * normal[10],
    ]
    return rng.permutation(np.concatenate(kinds))


def problem(dtype: str, n: int, *, broken: bool = False) -> tuple[Any, ...]:
    rng = np.random.default_rng(n)
    x = scores(rng, n).astype(dtype)
    rows = len(x)
    k = np.where(rng.random((rows, 1)) < 0.5, rng.integers(1, n, (rows, 1)), rng.uniform(0.02, n - 0.02, (rows, 1)))
    tau = rng.choice([0.5, 0.05, 0.005, 1e-4], (rows, 1))
    if broken:
        spoiled = np.arange(0, rows, 5)
        x[spoiled, rng.integers(0, n, len(spoiled))] = rng.choice([INF, -INF, NAN], len(spoiled))
        k[1::7], k[2::7], tau[3::11], tau[4::11] = 0.0, n, 1e-30, NAN
    return x, k.astype(dtype), tau.astype(dtype), None, None


def wide(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value if value is None else value.astype(np.float64) for value in inputs)


def run(part: str, *groups: Any, kernels: str = "numba", **options: Any) -> tuple[Any, ...]:
    backend = backend_of(groups[0][0])
    with softk.kernels(kernels), np.errstate(all="ignore"):
        return backend.run(mask, part, *groups, **options)


@pytest.mark.parametrize("n", [4, 5, 8, 33, 64, 256])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_mask(dtype: str, n: int) -> None:
    inputs, eps = problem(dtype, n), np.finfo(dtype).eps
    found = run("forward", inputs, ranks=None)[0]
    said = run("forward", wide(inputs), kernels="none", ranks=None)[0]
    np.testing.assert_allclose(found, said, rtol=0.0, atol=32.0 * eps)
    k = inputs[1][:, 0].astype(np.float64)
    off = np.abs(found.sum(1, dtype=np.longdouble) - k) / np.maximum(k, 1.0)
    assert off.max() <= 16.0 * eps


@pytest.mark.parametrize("n", [4, 8, 33, 64])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("with_offset", [False, True])
def test_the_rule(dtype: str, n: int, with_offset: bool) -> None:
    inputs, eps = problem(dtype, n), np.finfo(dtype).eps
    rng = np.random.default_rng(n)
    u = rng.standard_normal(inputs[0].shape).astype(dtype)
    c = rng.standard_normal(inputs[1].shape).astype(dtype) if with_offset else None
    outputs = run("forward", inputs, ranks=None)
    needed = (True, True, True, False, False)
    found = run("vjp", inputs, outputs, (u, c), needed)
    exact = run("vjp", wide(inputs), wide(outputs), wide((u, c)), needed, kernels="none")
    distances = np.abs(inputs[0] - inputs[0].min(1, keepdims=True)) / inputs[2]
    sizes = (
        np.abs(exact[0]).max(1, keepdims=True),
        np.maximum(np.abs(exact[1]), np.abs(u).max(1, keepdims=True)),
        np.abs(distances * exact[0]).sum(1, keepdims=True) + np.abs(exact[2]),
    )
    # Where the offset is asked for, the inverse of the slope of the mass is clipped to what a dtype can hold.
    tame = np.abs(exact[1]) < 1e6
    for value, expected, size in zip(found[:3], exact[:3], sizes, strict=True):
        off = (np.abs(value - expected) / np.maximum(size, 1e-25))[tame[:, 0]]
        assert off.max() <= 1000.0 * eps


@pytest.mark.parametrize("n", [8, 33])
def test_rows_that_are_left_to_the_other_kernels(n: int) -> None:
    """Infinite scores, NaN, k at its ends and temperatures that are out of range, beside rows that are not."""
    inputs = problem("float32", n, broken=True)
    outputs = run("forward", inputs, ranks=None)
    np.testing.assert_allclose(
        outputs[0], run("forward", wide(inputs), kernels="none", ranks=None)[0], rtol=0, atol=4e-6
    )
    assert np.isnan(outputs[1]).any()
    u = np.ones_like(inputs[0]) * np.arange(n, dtype=np.float32)
    found = run("vjp", inputs, outputs, (u, None), (True, True, False, False, False))
    np.testing.assert_array_equal(np.isnan(found[0]).all(1), np.isnan(outputs[1][:, 0]))


@pytest.mark.parametrize(("n", "dtype"), [(8, "float32"), (33, "float32"), (64, "float64")])
def test_a_row_does_not_depend_on_the_others(n: int, dtype: str) -> None:
    inputs = problem(dtype, n, broken=True)
    u = np.random.default_rng(1).standard_normal(inputs[0].shape).astype(dtype)
    needed = (True, True, True, False, False)

    def results(rows: Any) -> tuple[Any, ...]:
        some = tuple(value if value is None else value[rows] for value in inputs)
        outputs = run("forward", some, ranks=None)
        return *outputs, *run("vjp", some, outputs, (u[rows], None), needed)[:3]

    whole = results(slice(None))
    order = np.random.default_rng(2).permutation(len(u))
    for rows in (order, slice(3, 4), slice(5, 7), slice(1, 17), slice(2, 35), order[:21]):
        for value, expected in zip(results(rows), whole, strict=True):
            np.testing.assert_array_equal(value, expected[rows])


def test_a_block_may_begin_anywhere() -> None:
    """As it does where threads share the rows."""
    x, k, tau, *_ = problem("float32", 16)
    rows = len(x)

    def found(*cuts: int) -> tuple[np.ndarray, ...]:
        out = np.empty_like(x), np.empty(rows, np.float32), np.empty(rows, np.float32)
        for start, stop in zip((0, *cuts), (*cuts, rows), strict=True):
            masks.mask_rows(
                x, None, np.empty((0, 0), np.bool_), k[:, 0], tau[:, 0], *out, launch.bound_of(x.dtype), start, stop
            )
        return out

    whole = found()
    for cuts in ((1,), (7, 24, 25), (16, 100)):
        for value, expected in zip(found(*cuts), whole, strict=True):
            np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("layout", ["transposed", "one row"])
def test_rows_that_are_not_in_their_place(layout: str) -> None:
    x, k, tau, *_ = problem("float32", 12)
    x = np.broadcast_to(x[:1], x.shape) if layout == "one row" else np.asfortranarray(x)
    for value, expected in zip(
        run("forward", (x, k, tau, None, None), ranks=None),
        run("forward", (x.copy(order="C"), k, tau, None, None), ranks=None),
        strict=True,
    ):
        np.testing.assert_array_equal(value, expected)


def test_float16_is_rounded_once() -> None:
    x, k, tau, *_ = problem("float32", 16)
    x = np.clip(x, -6e4, 6e4).astype(np.float16)
    found = run("forward", (x, k, tau, None, None), ranks=None)
    said = run("forward", (x.astype(np.float32), k, tau, None, None), ranks=None)
    np.testing.assert_array_equal(found[0], said[0].astype(np.float16))
    np.testing.assert_array_equal(found[1], said[1])


def test_which_rows() -> None:
    """The lengths that the tests above are chosen by."""
    assert lanes.SHORTEST == 4
    assert lanes.LONGEST == 256
    assert [lanes.VECTORS * lanes.lanes_of(np.dtype(name)) for name in ("float32", "float64")] == [64, 32]
