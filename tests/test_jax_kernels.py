"""Numba's kernels under JAX: values, derivatives and transforms against the reference and an oracle, and fallbacks."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softk
from softk._reference.plan.sorting import sorted_plan
from softk._reference.threshold.masks import mask as mask_primitive

from . import closed_form

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")
pytest.importorskip("numba")

from softk_jax import backend, kernels  # noqa: E402

pytestmark = pytest.mark.kernels

if jax.default_backend() != "cpu":
    pytest.skip("the kernels are for the CPU", allow_module_level=True)

#: Of the mask: 32 roundings, or one where the result is rounded to a narrower dtype than is computed in.
MASK = {
    name: count * float(jnp.finfo(name).eps)
    for name, count in [("float16", 1), ("bfloat16", 1), ("float32", 32), ("float64", 32)]
}
#: Of derivatives, relative to the largest.
TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 2e-5, "float64": 1e-11}
ROWS, N = 3, 12

#: What stands before the name of a kernel in a compiled program.
TARGET = 'custom_call_target="softk_'


def problem(rng: Any, dtype: str = "float32", weighted: bool = False, epsilon: float = 0.3) -> dict[str, Any]:
    """Random arguments, with a k of each row that is not whole."""
    values = {
        "x": rng.standard_normal((ROWS, N)),
        "k": rng.uniform(1.5, 4.5, (ROWS, 1)),
        "epsilon": np.full((ROWS, 1), epsilon),
    }
    if weighted:
        values["weights"] = rng.uniform(0.5, 1.5, (ROWS, N))
    return {name: jnp.asarray(value, dtype) for name, value in values.items()}


def random(rng: Any, like: Any) -> Any:
    return jnp.asarray(rng.standard_normal(like.shape), like.dtype)


def masks(**options: Any) -> Callable[..., Any]:
    """The mask as a function of its arguments by position."""

    def f(x: Any, k: Any, epsilon: Any, weights: Any = None) -> Any:
        return softk.topk(x, k, epsilon=epsilon, weights=weights, **options)

    return f


def exact(values: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, float) for name, value in values.items()}


def by_reference(f: Callable[..., Any], *given: Any) -> Any:
    with softk.kernels("none"):
        return f(*given)


def assert_same(f: Callable[[], Any], tolerance: float) -> None:
    """The kernels and the reference find the same numbers, in each array relative to the largest."""
    found, expected = f(), by_reference(f)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
        one, two = np.asarray(one, float), np.asarray(two, float)
        finite = np.isfinite(two)
        np.testing.assert_array_equal(one[~finite], two[~finite])
        closed_form.assert_close(np.where(finite, one, 0.0), np.where(finite, two, 0.0), tolerance)


def targets(f: Callable[..., Any], *given: Any) -> list[str]:
    """The kernels in a program, which is compiled anew, in the order of their calls."""
    lines = jax.jit(lambda *given: f(*given)).lower(*given).compile().as_text().splitlines()
    return [line.split(TARGET)[1].split('"')[0] for line in lines if TARGET in line]


# --- what runs


def test_one_call_forward_and_one_backward(rng: Any) -> None:
    """And nothing else of the size of the scores: no copy and no second forward."""
    values = problem(rng)
    x, u = values["x"], random(rng, values["x"])

    def both(x: Any, u: Any) -> Any:
        mask, pull = jax.vjp(lambda x: softk.topk(x, 3, epsilon=0.3), x)
        return mask, pull(u)

    text = jax.jit(both).lower(x, u).compile().as_text()
    assert targets(both, x, u) == ["mask_float32", "pull_float32"]
    for operation in (" copy(", " transpose(", " fusion(", " while("):
        assert operation not in text
    assert by_reference(targets, both, x, u) == []


def test_the_kernel_of_each_transform(rng: Any) -> None:
    x, u = (random(rng, problem(rng)["x"]) for _ in range(2))
    k, epsilon = jnp.asarray(2.5, "float32"), jnp.asarray(0.3, "float32")

    def mask(x: Any) -> Any:
        return softk.topk(x, k, epsilon=epsilon)

    assert targets(lambda x: jax.jvp(mask, (x,), (u,))[1], x) == ["mask_float32", "push_float32"]
    assert targets(jax.vmap(mask), x) == ["mask_float32"]
    assert targets(lambda x: softk.threshold(x, k, epsilon=epsilon), x) == ["solve_float32"]
    assert targets(lambda x: softk.topk(x, 2, hard=True), x) == ["solve_float32"]

    def logs(x: Any) -> Any:
        return softk.log_topk(x, k, epsilon=epsilon)

    assert targets(lambda x: jax.jvp(logs, (x,), (u,)), x) == ["log_mask_float32", "push_log_float32"]
    assert targets(lambda x: jax.vjp(logs, x)[1](u), x) == ["log_mask_float32", "pull_log_float32"]


# --- values and first derivatives


@pytest.mark.parametrize(
    ("dtype", "weighted", "epsilon"),
    [
        ("float32", False, 0.3),
        ("float32", False, 0.01),
        ("float32", True, 0.3),
        ("float32", True, 0.01),
        ("float64", False, 0.3),
        ("bfloat16", False, 0.3),
        pytest.param("float16", False, 0.3, marks=pytest.mark.full),
        pytest.param("float16", True, 0.3, marks=pytest.mark.full),
        pytest.param("bfloat16", True, 0.3, marks=pytest.mark.full),
        pytest.param("float64", True, 0.01, marks=pytest.mark.full),
    ],
)
def test_values_and_derivatives(dtype: str, weighted: bool, epsilon: float, rng: Any) -> None:
    """Against an oracle that shares nothing with the library."""
    values = problem(rng, dtype, weighted, epsilon)
    given, tangents = tuple(values.values()), {name: random(rng, value) for name, value in values.items()}
    out, pull = jax.vjp(jax.jit(masks()), *given)
    assert out.dtype == dtype
    tolerance, rounded = TOLERANCE[dtype], exact(values)
    expected_mask = closed_form.topk(**rounded).astype(float)
    np.testing.assert_allclose(np.asarray(out, float), expected_mask, rtol=0.0, atol=MASK[dtype])
    u = random(rng, out)
    expected = closed_form.pullback("topk", np.asarray(u, float), rounded)
    for (name, value), found in zip(values.items(), pull(u), strict=True):
        assert (found.shape, found.dtype) == (value.shape, value.dtype)
        closed_form.assert_close(np.asarray(found, float), expected[name], tolerance)
    _, moved = jax.jvp(masks(), given, tuple(tangents.values()))
    closed_form.assert_close(np.asarray(moved, float), closed_form.push("topk", exact(tangents), rounded), tolerance)


@pytest.mark.parametrize(
    ("dtype", "weighted"),
    [
        ("float32", False),
        ("float64", False),
        ("bfloat16", False),
        pytest.param("float32", True, marks=pytest.mark.full),
    ],
)
def test_logarithms(dtype: str, weighted: bool, rng: Any) -> None:
    """The logarithm of the oracle's mask m. A cotangent u of it is one of u / m of the mask."""
    values = problem(rng, dtype, weighted)
    given, tangents = tuple(values.values()), {name: random(rng, value) for name, value in values.items()}

    def f(x: Any, k: Any, epsilon: Any, weights: Any = None) -> Any:
        return softk.log_topk(x, k, epsilon=epsilon, weights=weights)

    tolerance, rounded = TOLERANCE[dtype], exact(values)
    mask = closed_form.topk(**rounded).astype(float)
    out, pull = jax.vjp(jax.jit(f), *given)
    assert out.dtype == dtype
    closed_form.assert_close(np.asarray(out, float), np.log(mask), max(tolerance, MASK[dtype]))
    u = random(rng, out)
    expected = closed_form.pullback("topk", np.asarray(u, float) / mask, rounded)
    for (name, value), found in zip(values.items(), pull(u), strict=True):
        assert (found.shape, found.dtype) == (value.shape, value.dtype)
        closed_form.assert_close(np.asarray(found, float), expected[name], tolerance)
    _, moved = jax.jvp(f, given, tuple(tangents.values()))
    closed_form.assert_close(
        np.asarray(moved, float), closed_form.push("topk", exact(tangents), rounded) / mask, tolerance
    )


@pytest.mark.parametrize("name", ["hessian", "reverse of forward", "vmap over k", "linear transpose"])
def test_transforms_of_logarithms(name: str, rng: Any) -> None:
    values = problem(rng)
    x, k, epsilon = values["x"][0], values["k"][0, 0], values["epsilon"][0, 0]
    every = transforms(lambda x, k, epsilon: softk.log_topk(x, k, epsilon=epsilon), random(rng, x))
    assert_same(lambda: every[name](x, k, epsilon), 5e-5)


@pytest.mark.parametrize("hard", [False, True])
def test_removed_items(hard: bool, rng: Any) -> None:
    values = problem(rng)
    kept = jnp.asarray(np.arange(ROWS * N).reshape(ROWS, N) % 4 != 1)
    x, u = jnp.where(kept, values["x"], math.nan), random(rng, values["x"])

    def both() -> Any:
        mask, pull = jax.vjp(lambda x: softk.topk(x, 3, epsilon=0.3, where=kept, hard=hard), x)
        return mask, pull(u)[0]

    assert_same(both, 2e-5)


@pytest.mark.parametrize("function", ["topk", "log_topk"])
@pytest.mark.parametrize("x64", [False, True])
def test_edges(x64: bool, function: str) -> None:
    """Infinities, NaN, ties, k at the ends and beyond them: rows do not affect each other."""
    f = getattr(softk, function)
    big = float(np.finfo(np.float32).max)
    rows = [
        ([1.0, 0.0, -1.0, 0.5], 2.0),
        ([math.inf, 0.0, -math.inf, 0.5], 2.0),
        ([math.inf, math.inf, -1.0, 0.5], 1.0),
        ([-math.inf, -math.inf, -math.inf, 0.5], 1.0),
        ([math.nan, 0.0, -1.0, 0.5], 2.0),
        ([0.5, 0.5, 0.5, 0.5], 1.5),
        ([1.0, 0.0, -1.0, 0.5], 0.0),
        ([1.0, 0.0, -1.0, 0.5], 4.0),
        ([1.0, 0.0, -1.0, 0.5], 5.0),
        ([1.0, 0.0, -1.0, 0.5], -1.0),
        ([1.0, 0.0, -1.0, 0.5], math.nan),
        ([big, 0.0, -big, 0.5], 2.0),
        ([100.0, 0.0, -100.0, 0.5], 2.0),
    ]
    with jax.enable_x64(x64):
        x, k = jnp.asarray([row for row, _ in rows], "float32"), jnp.asarray([[k] for _, k in rows], "float32")
        u = jnp.asarray([[0.3, -1.0, 0.7, 0.2]] * len(rows), "float32")

        def both() -> Any:
            mask, pull = jax.vjp(lambda x: f(x, k, epsilon=jnp.float32(0.2)), x)
            return mask, *pull(u), jax.jvp(lambda x: f(x, k, epsilon=jnp.float32(0.2)), (x,), (u,))[1]

        found, expected = both(), by_reference(both)
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(one), np.isnan(two))
        np.testing.assert_allclose(one, two, rtol=2e-5, atol=2e-6)


# --- transforms


def transforms(f: Callable[..., Any], u: Any) -> dict[str, Callable[..., Any]]:
    """Transforms of a function of (x, k, epsilon) of one row."""

    def loss(*given: Any) -> Any:
        return (f(*given) * u).sum()

    def scanned(x: Any, k: Any, epsilon: Any) -> Any:
        def step(x: Any, _: Any) -> Any:
            return x - 0.1 * jax.grad(loss)(x, k, epsilon), None

        return jax.lax.scan(step, x, length=3)[0]

    def looped(x: Any, k: Any, epsilon: Any) -> Any:
        return jax.lax.while_loop(
            lambda state: state[0] < 3, lambda state: (state[0] + 1, state[1] - 0.1 * f(state[1], k, epsilon)), (0, x)
        )[1]

    every = (0, 1, 2)
    return {
        "grad": jax.grad(loss, every),
        "jit of grad": jax.jit(jax.grad(loss, every)),
        "jacfwd": jax.jacfwd(f, every),
        "jacrev": jax.jacrev(f, every),
        "hessian": jax.hessian(loss, every),
        "reverse of reverse": jax.jacrev(jax.jacrev(loss, every), every),
        "reverse of forward": jax.jacrev(jax.jacfwd(loss, every), every),
        "checkpoint": jax.grad(jax.checkpoint(loss), every),
        "scan": scanned,
        "derivative of scan": jax.jacrev(scanned),
        "while": looped,
        "vmap of grad": lambda x, k, epsilon: jax.vmap(jax.grad(loss, every), (0, None, 0))(
            jnp.stack([x, 2.0 * x]), k, jnp.stack([epsilon, 2.0 * epsilon])
        ),
        "vmap over k": lambda x, k, epsilon: jax.vmap(jax.grad(loss, every), (None, 0, None))(
            x, jnp.stack([k, 1.2 * k]), epsilon
        ),
        "nested vmap": lambda x, k, epsilon: jax.vmap(
            jax.vmap(jax.grad(loss, every), (None, None, 0)), (1, None, None)
        )(jnp.stack([x, -x, 2.0 * x], axis=1), k, jnp.stack([epsilon, 2.0 * epsilon])),
        "vmap of hessian": lambda x, k, epsilon: jax.vmap(jax.hessian(loss), (0, None, None))(
            jnp.stack([x, 2.0 * x]), k, epsilon
        ),
        "linear transpose": lambda *given: jax.linear_transpose(jax.linearize(f, *given)[1], *given)(u),
    }


#: The transforms of sorting and ranking that are in the wider run only: each takes seconds to compile.
WIDE = {"grad", "jacrev", "reverse of forward", "reverse of reverse", "while", "vmap over k", "vmap of hessian"}


@pytest.mark.parametrize("name", list(transforms(masks(), 0.0)))
@pytest.mark.parametrize("weighted", [False, pytest.param(True, marks=pytest.mark.full)])
def test_transforms(name: str, weighted: bool, rng: Any) -> None:
    values = problem(rng, weighted=weighted)
    x, k, epsilon = values["x"][0], values["k"][0, 0], values["epsilon"][0, 0]
    u = random(rng, x)
    weights = values["weights"][0] if weighted else None

    def f(*given: Any) -> Any:
        return masks()(*given, weights)

    assert_same(lambda: transforms(f, u)[name](x, k, epsilon), 5e-5)


def test_the_derivative_by_weights_under_vmap(rng: Any) -> None:
    """One row of weights for all slices, and weights of each slice."""
    values = problem(rng, weighted=True)
    x, k, epsilon, weights = values.values()
    u = random(rng, x)

    def loss(x: Any, k: Any, epsilon: Any, weights: Any, u: Any) -> Any:
        return (masks()(x, k, epsilon, weights) * u).sum()

    for axis, given in ((None, weights[0]), (0, weights)):
        f = jax.vmap(jax.grad(loss, (0, 1, 2, 3)), (0, 0, 0, axis, 0))
        assert_same(lambda f=f, given=given: f(x, k[:, 0], epsilon[:, 0], given, u), 2e-5)
    assert_same(lambda: jax.grad(loss, (0, 1, 2, 3))(x, k, epsilon, weights[0], u), 2e-5)


def test_second_derivatives_against_an_oracle(rng: Any) -> None:
    values = {"x": rng.standard_normal(6), "k": np.asarray(2.3), "epsilon": np.asarray(0.7)}
    at, u = closed_form.Slice(**values), rng.standard_normal(6)
    given = tuple(map(jnp.asarray, values.values()))
    found = jax.hessian(lambda *given: (masks()(*given) * u).sum(), (0, 1, 2))(*given)
    for i, name in enumerate(values):
        for j, other in enumerate(values):
            expected = np.tensordot(u, at.get("topk", 2, name, other), 1)
            closed_form.assert_close(found[i][j], expected.astype(float).reshape(found[i][j].shape), 1e-9)


def test_donated_scores(rng: Any) -> None:
    x = random(rng, problem(rng)["x"])
    expected = np.asarray(softk.topk(x, 3, epsilon=0.3))
    step = jax.jit(lambda x: softk.topk(x, 3, epsilon=0.3), donate_argnums=0)
    np.testing.assert_array_equal(step(x + 0.0), expected)


def test_many_threads_at_once(rng: Any) -> None:
    x = random(rng, jnp.zeros((8, 200), "float32"))
    step = jax.jit(jax.grad(lambda x: (softk.topk(x, 20.5, epsilon=0.3) ** 2).sum()))
    given = [x * (1.0 + 0.1 * i) for i in range(8)]
    expected = [np.asarray(step(value)) for value in given]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for one, two in zip(pool.map(step, given), expected, strict=True):
                np.testing.assert_array_equal(one, two)


def test_without_jit(rng: Any) -> None:
    values = tuple(problem(rng).values())
    expected = masks()(*values)
    with jax.disable_jit():
        np.testing.assert_array_equal(masks()(*values), expected)


# --- sorting and ranking

#: The functions whose primitives have the kernels of a ladder.
LADDERS: dict[str, Callable[..., Any]] = {
    "sorted_topk": lambda x, **options: tuple(softk.sorted_topk(x, 3, **options)),
    "smallest": lambda x, **options: softk.sorted_topk(x, 4, mode="smallest", **options)[0],
    "sort": softk.sort,
    "few anchors": lambda x, **options: softk.sort(x, num_anchors=5, **options),
    "rank": softk.rank,
    "ranks of few anchors": lambda x, **options: softk.rank(x, num_anchors=5, descending=True, **options),
}
#: Of their derivatives, relative to the largest. The kernels compute in float64, the reference in float32.
LADDER = {"float32": 1e-4, "float64": 1e-10}


def ladder_problem(rng: Any, dtype: str = "float32") -> tuple[Any, Any]:
    """Scores and an epsilon of each row."""
    x = rng.standard_normal((2, ROWS, N))
    return jnp.asarray(x, dtype), jnp.asarray(rng.uniform(0.2, 1.0, (2, ROWS, 1)), dtype)


@pytest.mark.parametrize("name", list(LADDERS))
def test_ladder_kernels_run(name: str, rng: Any) -> None:
    x, epsilon = ladder_problem(rng)

    def f(x: Any, epsilon: Any) -> Any:
        return LADDERS[name](x, epsilon=epsilon)

    def both(x: Any, epsilon: Any) -> Any:
        found, pull = jax.vjp(f, x, epsilon)
        return found, pull(jax.tree.map(jnp.ones_like, found))

    given = x, epsilon
    assert targets(f, *given) == ["ladder_float32"]
    assert targets(jax.vmap(f), *given) == ["ladder_float32"]
    assert targets(both, *given) == ["ladder_float32", "pull_ladder_float32"]
    assert targets(lambda *given: jax.jvp(f, given, given), *given) == [
        "ladder_float32"
    ]  # tangents are the reference's
    assert by_reference(targets, both, *given) == []


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.full)])
@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("name", list(LADDERS))
def test_ladders(name: str, removed: bool, dtype: str, rng: Any) -> None:
    """Values and derivatives against the reference, and against the same kernels on NumPy."""
    x, epsilon = ladder_problem(rng, dtype)
    kept = jnp.asarray(rng.random(x.shape) < 0.7) if removed else None
    x = x if kept is None else jnp.where(kept, x, math.nan)

    def f(x: Any, epsilon: Any) -> Any:
        return LADDERS[name](x, epsilon=epsilon, where=kept)

    u = jax.tree.map(lambda value: random(rng, value), jax.eval_shape(f, x, epsilon))

    def both() -> Any:
        def whole(x: Any, epsilon: Any, u: Any) -> Any:
            found, pull = jax.vjp(f, x, epsilon)
            return found, pull(u)

        return jax.jit(whole)(x, epsilon, u)  # a new function, which JAX traces with the kernels in force

    assert_same(both, LADDER[dtype])
    assert_same(lambda: jax.jvp(f, (x, epsilon), (random(np.random.default_rng(1), x), 0.3 * epsilon)), LADDER[dtype])
    by_numpy = {"sorted_topk": softk.sorted_topk, "rank": softk.rank, "sort": softk.sort}.get(name)
    if by_numpy is not None:
        where = None if kept is None else np.asarray(kept)
        count = (3,) if name == "sorted_topk" else ()
        found, pull = softk.vjp(by_numpy, np.asarray(x), *count, epsilon=np.asarray(epsilon), where=where)
        expected = pull(jax.tree.map(np.asarray, u))
        mine, cotangents = both()
        for one, two in zip(jax.tree.leaves(mine), jax.tree.leaves(tuple(found) if count else found), strict=True):
            np.testing.assert_array_equal(one, two)
        for one, key in zip(cotangents, ("x", "epsilon"), strict=True):
            closed_form.assert_close(np.asarray(one, float), np.asarray(expected[key], float), MASK[dtype])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ["sorted_topk", "sort", "rank"])
def test_slices_out_of_the_ordinary(name: str, dtype: str) -> None:
    """Infinities, nothing to choose from, temperatures at the ends of the range, and NaN, beside a usual slice.

    The kernels leave some of float64 to the reference.
    """
    usual = [1.0, 0.0, -1.0, 0.5]
    rows = [
        (usual, 0.3),
        ([math.inf, 0.0, -math.inf, 0.5], 0.3),
        ([math.inf, math.inf, math.inf, math.inf], 0.3),
        ([-math.inf] * 4, 0.3),
        ([-math.inf, -math.inf, -math.inf, 0.5], 0.3),
        ([math.nan, 0.0, -1.0, 0.5], 0.3),
        ([0.5] * 4, 0.3),
        (usual, 1e-38),
        (usual, 1e38 if dtype == "float32" else 1e200),
        (usual, 0.0),
        (usual, -1.0),
        (usual, math.nan),
    ]
    x = jnp.asarray([row for row, _ in rows], dtype)
    epsilon = jnp.asarray([[value] for _, value in rows], dtype)

    def f(x: Any, epsilon: Any) -> Any:
        return LADDERS[name](x, epsilon=epsilon)

    u = jax.tree.map(lambda value: random(np.random.default_rng(0), value), jax.eval_shape(f, x, epsilon))

    def both() -> Any:
        found, pull = jax.vjp(jax.jit(lambda *given: f(*given)), x, epsilon)
        return found, pull(u)

    found, expected = both(), by_reference(both)
    alone = [f(x[i], epsilon[i]) for i in (0, 1)]
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == dtype
        np.testing.assert_array_equal(np.isnan(one), np.isnan(two))
        for i in range(len(rows)):
            size = np.max(np.abs(two[i]), initial=1.0, where=np.isfinite(two[i]))
            np.testing.assert_allclose(one[i], two[i], rtol=0.0, atol=2e-5 * float(size), err_msg=str(rows[i]))
    for i, single in enumerate(alone):  # slices do not affect each other
        for one, two in zip(jax.tree.leaves(found[0]), jax.tree.leaves(single), strict=True):
            np.testing.assert_allclose(one[i], two, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("name", ["sorted_topk", "rank"])
def test_ladders_without_x64(name: str, rng: Any) -> None:
    with jax.enable_x64(False):
        x, epsilon = ladder_problem(rng)
        u = jax.tree.map(lambda value: random(rng, value), jax.eval_shape(lambda: LADDERS[name](x, epsilon=epsilon)))

        def both() -> Any:
            found, pull = jax.vjp(lambda x, epsilon: LADDERS[name](x, epsilon=epsilon), x, epsilon)
            return found, pull(u)

        assert_same(both, LADDER["float32"])


@pytest.mark.parametrize(
    "transform",
    [name if name not in WIDE else pytest.param(name, marks=pytest.mark.full) for name in transforms(masks(), 0.0)],
)
def test_transforms_of_ladders(transform: str, rng: Any) -> None:
    values = problem(rng)
    x, k, epsilon = values["x"][0, :6], values["k"][0, 0], values["epsilon"][0, 0]
    u = random(rng, x)

    def f(x: Any, k: Any, epsilon: Any) -> Any:
        return softk.rank(x, epsilon=epsilon) + softk.sorted_topk(k * x, 2, epsilon=epsilon).assignment.sum(-2)

    assert_same(lambda: transforms(f, u)[transform](x, k, epsilon), 2e-4)


# --- where the reference serves


def refusal(primitive: Any, part: str, *groups: Any, **options: Any) -> str | None:
    """Why the kernel of a part does not serve."""
    (kernel,) = (one for one in backend.kernels if one.primitive is primitive and one.part == part)
    reason: str | None = kernel.refuses(backend, *groups, **options)
    return reason


def test_what_is_refused(rng: Any) -> None:
    x, one = jnp.ones((2, 3), "float32"), jnp.ones((2, 1), "float32")

    def refused(x: Any) -> Any:
        return refusal(mask_primitive, "forward", (x, one, one, None, None), ranks=None)

    assert refused(x) is None
    assert "must be scores" in refused(x[:, :0])
    assert "must be of one of" in refused(x.astype("int32"))
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, n"), "float32")
    assert "must not be symbolic" in refused(symbolic)
    given = (x, one, one, None, None), (x, one, one)
    assert refusal(mask_primitive, "jvp", *given, (None,) * 5) == "there is no tangent"


def test_what_the_kernels_for_sorting_refuse(rng: Any) -> None:
    x, one, row = jnp.ones((2, 3), "float32"), jnp.ones((2, 1), "float32"), jnp.ones((2, 2, 1), "float32")
    inputs, outputs = (x, one, jnp.float32(1.0), None, None), (None, None, row, row)
    assert refusal(sorted_plan, "forward", inputs, rows=2, ranks=None) is None
    assert refusal(sorted_plan, "jvp", inputs, outputs, (x, None, None, None, None)) is None
    assert refusal(sorted_plan, "jvp", inputs, outputs, (None,) * 5) == "there is no tangent"
    assert "no weights" in refusal(sorted_plan, "forward", (*inputs[:4], x), rows=2, ranks=None)
    for dtype in ("float16", "bfloat16"):
        narrow = (x.astype(dtype), *inputs[1:])
        assert "float32 or float64" in str(refusal(sorted_plan, "forward", narrow, rows=2, ranks=None))
        assert "float32 or float64" in str(refusal(sorted_plan, "jvp", narrow, outputs, (x, *(None,) * 4)))


def test_exported_programs_have_no_kernel(rng: Any) -> None:
    x = random(rng, problem(rng)["x"])
    for function in (softk.topk, lambda *given, **options: softk.sorted_topk(*given, **options).assignment):
        f = jax.jit(lambda x, function=function: function(x, 3, epsilon=0.3))
        exported = jax.export.export(f)(jax.ShapeDtypeStruct(x.shape, x.dtype))
        assert "softk_mask_float32" not in exported.mlir_module()
        assert "softk_ladder_float32" not in exported.mlir_module()
        closed_form.assert_close(exported.call(x), f(x), 1e-6)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Nothing is known of the kernels, before and after, and nothing is compiled."""

    def forget() -> None:
        kernels.fault.cache_clear()
        kernels.starts.cache_clear()
        jax.clear_caches()

    forget()
    yield
    forget()


def test_a_kernel_that_does_not_compile(unchecked: None, monkeypatch: pytest.MonkeyPatch, rng: Any) -> None:
    """A warning says so once, and the reference serves."""

    def handlers(dtype: str, weighted: bool) -> Any:
        raise RuntimeError("LLVM has no such instruction")

    x = random(rng, jnp.zeros((2, 9), "float32"))
    assert kernels.fault() is None
    monkeypatch.setattr("softk_numba.xla._targets", {"softk_probe": None})
    monkeypatch.setattr("softk_numba.xla._handlers", handlers)
    with pytest.warns(RuntimeWarning, match="LLVM has no such instruction"):
        assert targets(lambda x: softk.topk(x, 2.5, epsilon=0.2), x) == []
    assert targets(lambda x: softk.topk(x, 2.5, epsilon=0.2) + 1.0, x) == []


@pytest.mark.parametrize("failure", ["refused", "unread", "absent"])
def test_without_a_handshake_the_reference_serves(
    failure: str, unchecked: None, monkeypatch: pytest.MonkeyPatch, rng: Any
) -> None:
    if failure == "refused":

        def register(name: str, capsule: Any) -> None:
            raise RuntimeError("the version of the interface is not supported")

        monkeypatch.setattr("softk_numba.xla._targets", {})
        monkeypatch.setattr(kernels, "_register", register)
        said = "the version of the interface is not supported"
    elif failure == "unread":
        monkeypatch.setattr(kernels, "_is_for_one_cpu", lambda context: False)
        said = "an unknown way"
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        said = "Numba is not installed"
    x = random(rng, jnp.zeros((2, 9), "float32"))
    given = (x, jnp.float32(2.5), jnp.float32(0.1), None, None)
    assert said in kernels.refuses(backend, given, ranks=None)
    assert targets(lambda x: softk.topk(x, 2.5, epsilon=0.2), x) == []


def run(source: str, devices: int = 1) -> str:
    """What a program prints in a process of its own."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(source)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_call_within_a_trace() -> None:
    """The handshake is no part of the program that is being traced."""
    source = """
    import jax, softk
    step = jax.jit(jax.grad(lambda x: softk.topk(x, 2, epsilon=0.3)[0]))
    with jax.transfer_guard("disallow_explicit"):
        text = step.lower(jax.ShapeDtypeStruct((6,), "float32")).as_text()
    print("softk_pull_float32" in text, "softk_probe" in text)
    """
    assert run(source) == "True False\n"


@pytest.mark.parametrize(
    ("function", "pull"),
    [
        ("softk.topk(x, 3.5, epsilon=0.3)", "softk_pull_float32"),
        ("softk.sorted_topk(x, 3, epsilon=0.3).assignment.sum(-2)", "softk_pull_ladder_float32"),
    ],
)
def test_over_two_devices(function: str, pull: str) -> None:
    """Sharded by the compiler, by shard_map and by pmap the reference serves; on one of the devices the kernels do."""
    source = """
    import jax, jax.numpy as jnp, numpy as np, softk
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    x = np.random.default_rng(0).standard_normal((4, 12)).astype("float32")
    u = np.random.default_rng(1).standard_normal((4, 12)).astype("float32")

    def f(x):
        return FUNCTION

    def loss(x, u):
        return (f(x) * u).sum()

    gradient = jax.jit(jax.grad(loss))
    mesh = Mesh(np.asarray(jax.devices()), ("d",))
    with softk.kernels("none"):
        expected = jax.jit(jax.grad(lambda x, u: loss(x, u)))(x, u)
    on_second = jax.device_put((x, u), jax.devices()[1])
    assert "PULL" in gradient.lower(*on_second).compile().as_text()
    found = [gradient(x, u), gradient(*on_second)]
    for spec in (P("d"), P(None, "d"), P()):
        given = jax.device_put((x, u), NamedSharding(mesh, spec))
        text = gradient.lower(*given).compile().as_text()
        assert 'custom_call_target="softk_' not in text
        assert spec != P("d") or "all-gather" not in text
        found.append(gradient(*given))
    mapped = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P("d"))
    found.append(jax.jit(mapped)(x, u))
    outer = jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    found.append(jax.jit(jax.grad(lambda x: (outer(x) * u).sum()))(x))
    split = [v.reshape(2, 2, 12) for v in (x, u)]
    found.append(jax.pmap(jax.grad(loss))(*split).reshape(4, 12))
    for value in found:
        np.testing.assert_allclose(np.asarray(value), expected, rtol=0, atol=2e-6)
    explicit = jax.make_mesh((2,), ("e",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        given = jax.device_put((x, u), NamedSharding(explicit, P("e")))
        np.testing.assert_allclose(np.asarray(jax.jit(jax.grad(loss))(*given)), expected, rtol=0, atol=2e-6)
    # The compiler places the arrays of this mesh, and it has one device only.
    auto = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    with jax.set_mesh(auto):
        assert 'custom_call_target="softk_' in jax.jit(jax.grad(loss)).lower(x, u).compile().as_text()
    print("same")
    """
    assert run(source.replace("FUNCTION", function).replace("PULL", pull), devices=2) == "same\n"


_COMPILED = """
import sys
from softk_numba.xla import target
target(sys.argv[1], "float32", False, lambda name, capsule: None)
"""

_DERIVATIVES = """
import jax
import jax.numpy as jnp

import softk

x, u = jnp.asarray([[0.5, 2.0, -1.0, 1.0]]), jnp.asarray([[1.0, -2.0, 0.5, 0.25]])
for f in (softk.topk, softk.log_topk):
    print(*jax.jit(jax.grad(lambda x: jnp.sum(u * f(x, 2, epsilon=0.5))))(x)[0])
"""


def test_handlers_from_a_cache_that_several_processes_wrote(tmp_path: Path) -> None:
    """Each is the first function that its process compiles. They have the same types, and are still told apart."""
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }

    def printed(*command: str, **more: str) -> str:
        command = (sys.executable, "-c", *command)
        done = subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for part in ("pull", "pull_log"):
        printed(_COMPILED, part)
    found, wanted = (
        np.asarray(printed(_DERIVATIVES, SOFTK_KERNELS=choice).split(), float) for choice in ("numba", "none")
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)
