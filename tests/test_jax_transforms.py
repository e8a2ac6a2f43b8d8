"""JAX's transforms, by value: derivatives of any order and mode, batching, tracing, exporting, sharding."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softk
import softk.attention
import softk.beam
import softk.neighbors
from softk.testing import Oracle, Problem

from . import closed_form
from .closed_form import ARGUMENTS, CASES, assert_close
from .libraries import BY_NAME
from .oracles import assert_rows_close, curvature, dominated
from .plan_oracles import Ladder, Transported

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")

FUNCTIONS = {"topk": softk.topk, "threshold": softk.threshold}
ALL = (0, 1, 2, 3)


def wide(*values: Any) -> Any:
    """A case of the wider grid: the transforms are cheap, but each new composition of them is compiled anew."""
    return pytest.param(*values, marks=pytest.mark.full)


def positional(function: str, **options: Any) -> Callable[..., Any]:
    """The function of (x, k, epsilon, weights)."""

    def f(x: Any, k: Any, epsilon: Any, weights: Any = None) -> Any:
        return FUNCTIONS[function](x, k, epsilon=epsilon, weights=weights, **options)

    return f


def arrays(values: dict[str, np.ndarray], dtype: Any = None) -> tuple[Any, ...]:
    return tuple(jnp.asarray(value, dtype) for value in values.values())


def random(rng: Any, *shape: int) -> Any:
    return jnp.asarray(rng.standard_normal(shape))


def weighted(f: Callable[..., Any], u: Any) -> Callable[..., Any]:
    return lambda *given: (f(*given) * u).sum()


# --- first derivatives


EAGER_AND_TRACED = pytest.mark.parametrize(
    ("function", "case", "jit"),
    [
        *(("topk", case, False) for case in CASES),
        *(wide("threshold", case, False) for case in CASES),
        ("topk", "near-hard", True),
        wide("topk", "soft", True),
        wide("threshold", "soft", True),
        wide("threshold", "near-hard", True),
    ],
)


@EAGER_AND_TRACED
def test_grad_and_vjp(function: str, case: str, jit: bool, rng: Any) -> None:
    values = closed_form.problem(rng, case, batch=(3,))
    given = arrays(values)
    f = jax.jit(positional(function)) if jit else positional(function)
    out, pull = jax.vjp(f, *given)
    u = random(rng, *out.shape)
    expected = closed_form.pullback(function, u, values)
    for found in (pull(u), jax.grad(weighted(f, u), ALL)(*given)):
        for name, gradient in zip(ARGUMENTS, found, strict=True):
            assert_close(gradient, expected[name])


@EAGER_AND_TRACED
def test_jvp_and_linearize(function: str, case: str, jit: bool, rng: Any) -> None:
    values = closed_form.problem(rng, case, batch=(3,))
    tangents = {name: rng.standard_normal(value.shape) for name, value in values.items()}
    f = jax.jit(positional(function)) if jit else positional(function)
    expected = closed_form.push(function, tangents, values)
    _, found = jax.jvp(f, arrays(values), arrays(tangents))
    assert_close(found, expected)
    _, push = jax.linearize(f, *arrays(values))
    assert_close(push(*arrays(tangents)), expected)


@pytest.mark.parametrize("only", [wide("x"), "k", wide("epsilon"), "weights"])
def test_one_argument_alone(only: str, rng: Any) -> None:
    values = closed_form.problem(rng, batch=(3,))
    given = dict(zip(ARGUMENTS, arrays(values), strict=True))
    tangent, u = rng.standard_normal(values[only].shape), rng.standard_normal((3, 7))

    def f(value: Any) -> Any:
        return positional("topk")(**{**given, only: value})

    _, found = jax.jvp(f, (given[only],), (jnp.asarray(tangent),))
    assert_close(found, closed_form.push("topk", {only: tangent}, values))
    gradient = jax.grad(weighted(f, u))(given[only])
    assert_close(gradient, closed_form.pullback("topk", u, values)[only])


@pytest.mark.parametrize(
    ("function", "transform"),
    [("topk", "jacrev"), ("threshold", "jacfwd"), wide("topk", "jacfwd"), wide("threshold", "jacrev")],
)
def test_jacobian(function: str, transform: str, rng: Any) -> None:
    values = closed_form.problem(rng)
    at = closed_form.Slice(**values)
    found = getattr(jax, transform)(positional(function), ALL)(*arrays(values))
    for name, block in zip(ARGUMENTS, found, strict=True):
        assert_close(block, at.get(function, 1, name).reshape(block.shape))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradient_against_central_differences(function: str, rng: Any) -> None:
    values = closed_form.problem(rng, "near-hard")
    u = rng.standard_normal(7 if function == "topk" else ())
    found = jax.grad(weighted(positional(function), u), ALL)(*arrays(values))
    for name, gradient in zip(ARGUMENTS, found, strict=True):

        def loss(value: np.ndarray, name: str = name) -> Any:
            return np.sum(getattr(closed_form, function)(**{**values, name: value}) * u)

        assert_close(gradient, closed_form.differences(loss, values[name], 2e-5), 1e-9)


@pytest.mark.parametrize("weights", [wide(False), True])
def test_quantile(weights: bool, rng: Any) -> None:
    values = closed_form.problem(rng)
    values["k"] = np.asarray(0.37)
    if not weights:
        del values["weights"]

    def f(x: Any, q: Any, epsilon: Any, weights: Any = None) -> Any:
        return softk.quantile(x, q, epsilon=epsilon, weights=weights)

    given, count = arrays(values), ALL[: len(values)]
    _, first, second = closed_form.quantile_derivatives(*values.values())
    place = closed_form.Slice(values["x"], 1.0, 1.0).place
    for transform in (jax.grad, jax.jacfwd):
        for name, gradient in zip(values, transform(f, count)(*given), strict=True):
            assert_close(gradient, first[place[name]].reshape(gradient.shape))
    found = jax.hessian(f, count)(*given)
    for (i, name), (j, other) in itertools.product(enumerate(values), repeat=2):
        assert_close(found[i][j], second[place[name], place[other]].reshape(found[i][j].shape), 1e-9)


@pytest.mark.parametrize("dtype", ["float32", wide("float16"), "bfloat16"])
def test_lower_precision(dtype: str, rng: Any) -> None:
    given = arrays(closed_form.problem(rng, batch=(3,)), dtype)
    rounded = {name: np.asarray(value, float) for name, value in zip(ARGUMENTS, given, strict=True)}
    tolerance = 2e-5 if dtype == "float32" else 2.0 * float(jnp.finfo(dtype).eps)
    out, pull = jax.vjp(positional("topk"), *given)
    u = random(rng, 3, 7).astype(dtype)
    assert out.dtype == dtype
    expected = closed_form.pullback("topk", np.asarray(u, float), rounded)
    for name, gradient in zip(ARGUMENTS, pull(u), strict=True):
        assert gradient.dtype == dtype
        assert_close(np.asarray(gradient, float), expected[name], tolerance)
    tangents = tuple(random(rng, *value.shape).astype(dtype) for value in given)
    _, pushed = jax.jvp(positional("topk"), given, tangents)
    assert pushed.dtype == dtype
    named = {name: np.asarray(value, float) for name, value in zip(ARGUMENTS, tangents, strict=True)}
    assert_close(np.asarray(pushed, float), closed_form.push("topk", named, rounded), tolerance)


def test_each_gradient_has_the_dtype_of_its_argument(rng: Any) -> None:
    x, k, epsilon, weights = arrays(closed_form.problem(rng))
    given = (x.astype("float32"), k, epsilon.astype("float16"), weights)
    values = {name: np.asarray(value, float) for name, value in zip(ARGUMENTS, given, strict=True)}
    u = random(rng, 7).astype("float32")
    found = jax.grad(weighted(positional("topk"), u), ALL)(*given)
    expected = closed_form.pullback("topk", np.asarray(u, float), values)
    for name, gradient, value in zip(ARGUMENTS, found, given, strict=True):
        assert gradient.dtype == value.dtype
        assert_close(np.asarray(gradient, float), expected[name], 2e-3 if value.dtype == "float16" else 2e-5)


@pytest.mark.parametrize("dtype", ["int32", wide("int64"), wide("uint8")])
def test_whole_k_is_ignored_by_every_transform(dtype: str, rng: Any) -> None:
    """An integer argument carries a tangent of the type float0, of no value."""
    values = {"x": rng.standard_normal((3, 7)), "k": np.asarray([[1.0], [2.0], [4.0]]), "epsilon": np.asarray(0.7)}
    x, k, epsilon = arrays(values)
    k = k.astype(dtype)
    u = random(rng, 3, 7)
    expected = closed_form.pullback("topk", u, values)
    f = positional("topk")
    found = jax.grad(weighted(f, u), (0, 2))(x, k, epsilon)
    assert_close(found[0], expected["x"])
    assert_close(found[1], expected["epsilon"])
    _, pull = jax.vjp(f, x, k, epsilon)
    cotangents = pull(u)
    assert_close(cotangents[0], expected["x"])
    assert cotangents[1].dtype == jax.dtypes.float0
    move = random(rng, 3, 7)
    _, pushed = jax.jvp(f, (x, k, epsilon), (move, np.zeros((3, 1), jax.dtypes.float0), jnp.zeros(())))
    assert_close((pushed * u).sum(), (expected["x"] * move).sum())
    assert_close(jax.vmap(jax.grad(weighted(f, u[0])), (0, 0, None))(x, k, epsilon).shape, (3, 7))


@pytest.mark.parametrize("hard", [False, True])
def test_hard_and_removed_items(hard: bool, rng: Any) -> None:
    x, u = rng.standard_normal((3, 7)), rng.standard_normal((3, 7))
    where = rng.uniform(size=(3, 7)) < 0.8
    where[:, :3] = True
    given = np.where(where, x, np.nan)

    def f(x: Any) -> Any:
        return softk.topk(x, 2, epsilon=0.7, where=jnp.asarray(where), hard=hard)

    values = {"x": x, "k": np.asarray(2.0), "epsilon": np.asarray(0.7)}
    expected = closed_form.pullback("topk", u * where, values, where)["x"]
    assert_close(jax.grad(weighted(f, u))(jnp.asarray(given)), expected)
    move = random(rng, 3, 7)
    _, pushed = jax.jvp(f, (jnp.asarray(given),), (move,))
    assert_close((pushed * u).sum(), (expected * move).sum())


@pytest.mark.parametrize("mode", ["largest", "smallest"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_every_axis_and_either_end(axis: int, mode: str, rng: Any) -> None:
    x, u, shape = rng.standard_normal((4, 5, 3)), rng.standard_normal((4, 5, 3)), [4, 5, 3]
    shape[axis] = 1
    k = rng.uniform(0.8, 2.2, shape)
    found = jax.grad(weighted(lambda x, k: softk.topk(x, k, axis=axis, mode=mode, epsilon=0.7), u), (0, 1))(
        jnp.asarray(x), jnp.asarray(k)
    )
    sign = 1.0 if mode == "largest" else -1.0
    last = {"x": sign * np.moveaxis(x, axis, -1), "k": np.moveaxis(k, axis, -1), "epsilon": np.asarray(0.7)}
    expected = closed_form.pullback("topk", np.moveaxis(u, axis, -1), last)
    assert_close(found[0], sign * np.moveaxis(expected["x"], -1, axis))
    assert_close(found[1], np.moveaxis(expected["k"], -1, axis))


# --- where one item has nearly all of the derivative: what is left of it by that item is the sum of the others


def by_rows(function: str, problem: Problem, u: np.ndarray, tangents: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """Cotangents and tangents by the reference, the latter of one argument at a time."""
    log = function == "log_topk"
    pulled: dict[str, list[Any]] = {name: [] for name in problem.arguments}
    pushed: dict[str, list[Any]] = {name: [] for name in problem.arguments}
    for i, reference in enumerate(problem.oracles):
        found = reference.vjp(b=u[i]) if function == "threshold" else reference.vjp(u[i], log=log)
        for name in pulled:
            pulled[name].append(np.atleast_1d(found[name]))
            moved = tangents[name][i]
            moved = {f"d{name}": moved if moved.size > 1 else moved[0]}
            both = reference.jvp(**moved)
            pushed[name].append(reference.log_jvp(**moved) if log else both[function == "threshold"])
    return pulled, pushed


@pytest.mark.parametrize(
    ("function", "dtype", "with_weights"),
    [
        ("topk", "float32", False),
        ("topk", "float64", True),
        ("log_topk", "float32", False),
        wide("topk", "float64", False),
        wide("topk", "float32", True),
        wide("log_topk", "float64", True),
        wide("threshold", "float32", True),
        wide("threshold", "float64", False),
        wide("hard", "float32", False),
    ],
)
def test_one_item_dominates(function: str, dtype: str, with_weights: bool, rng: Any) -> None:
    """Both modes, in every argument, under jit."""
    problem = dominated(dtype, with_weights)
    if function == "hard":
        problem = Problem("whole", problem.x, np.floor(problem.k), problem.epsilon)
    public = getattr(softk, "topk" if function == "hard" else function)
    options = {"hard": True} if function == "hard" else {}
    names = tuple(problem.arguments)

    def f(*given: Any) -> Any:
        x, k, epsilon, *weights = given
        return public(x, k, epsilon=epsilon, **({"weights": weights[0]} if weights else {}), **options)

    given = arrays(problem.arguments)
    u = rng.standard_normal(len(problem.x) if function == "threshold" else problem.x.shape).astype(dtype)
    tangents = {name: rng.standard_normal(value.shape).astype(dtype) for name, value in problem.arguments.items()}
    pulled, pushed = by_rows(function, problem, u, tangents)
    found = jax.jit(lambda u, *given: jax.vjp(f, *given)[1](u))(jnp.asarray(u), *given)
    for name, gradient in zip(names, found, strict=True):
        scale = None
        if problem.arguments[name].shape[-1] == 1:  # a sum over the items, which is as accurate as its terms
            scale = [np.abs(row / by * v).sum() for row, by, v in zip(pushed[name], tangents[name], u, strict=True)]
        assert_rows_close(gradient, pulled[name], dtype, scale)

    @jax.jit
    def push(*moved: Any) -> Any:
        return jax.jvp(f, given, moved)[1]

    for name in names:
        moved = arrays({other: value * (other == name) for other, value in tangents.items()}, dtype)
        assert_rows_close(push(*moved), pushed[name], dtype)


@pytest.mark.parametrize(
    ("x", "k", "dtype"),
    [([10.0, 0, 11], 2.75, "float32"), wide([7.0, 0, 8], 2.95, "float32"), wide([20.0, 0, 21], 2.75, "float64")],
)
def test_one_item_dominates_under_every_transform(x: list[float], k: float, dtype: str) -> None:
    u = np.asarray([1.0, -2.0, 0.5])
    reference = Oracle(np.asarray(x, float), k, 1.0)
    expected = reference.vjp(u)["x"]
    jacobian = np.stack([reference.jvp(dx=row)[0] for row in np.eye(3)], axis=1)
    with jax.enable_x64(dtype == "float64"):
        at, weight = jnp.asarray(x, dtype), jnp.asarray(u, dtype)

        def mask(x: Any) -> Any:
            return softk.topk(x, jnp.asarray(k, dtype), epsilon=jnp.asarray(1.0, dtype))

        def loss(x: Any) -> Any:
            return (mask(x) * weight).sum()

        def step(total: Any, x: Any) -> tuple[Any, Any]:
            return total + loss(x), None

        def scanned(x: Any) -> Any:
            return jax.lax.scan(step, jnp.zeros((), dtype), x[None])[0]

        gradients = {
            "grad": jax.grad(loss)(at),
            "checkpoint": jax.grad(jax.checkpoint(loss))(at),
            "scan": jax.grad(scanned)(at),
            "vmap": jax.vmap(jax.grad(loss))(jnp.stack([at, at]))[1],
            "linear transpose": jax.linear_transpose(jax.linearize(mask, at)[1], at)(weight)[0],
            "transposed twice": jax.jit(lambda v: jax.vjp(lambda v: jax.vjp(mask, at)[1](v)[0], v)[1](v)[0])(weight),
            "forward of reverse": jax.jvp(lambda v: jax.vjp(mask, at)[1](v)[0], (weight,), (weight,))[1],
        }
        jacobians = [jax.jacrev(mask)(at), jax.jacfwd(mask)(at)]
        hessians = [outer(inner(loss))(at) for outer, inner in itertools.product((jax.jacfwd, jax.jacrev), repeat=2)]
    for name, found in gradients.items():
        assert found.dtype == dtype, name
        assert_rows_close(found[None], expected[None], dtype)
    for found in jacobians:
        assert_rows_close(found, jacobian, dtype)
    curved = curvature(np.asarray(x, float), k, 1.0, u)
    for found in hessians:
        assert_rows_close(found, curved, dtype)


@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        ("transport", "float32"),
        wide("transport", "float64"),
        wide("rank", "float32"),
        wide("sort", "float32"),
    ],
)
def test_one_score_dominates_a_boundary(function: str, dtype: str, rng: Any) -> None:
    gap = 20.0 if dtype == "float32" else 45.0
    x = np.asarray([[gap, 0.0, gap + 1], [gap / 3, 0.0, gap / 3 + 1], [gap / 2, 0.0, -gap / 2]], dtype)
    anchors, marginals = np.asarray([0.0, 1.0], dtype), np.asarray([0.25, 2.75], dtype)

    def f(x: Any, epsilon: Any) -> Any:
        if function == "transport":
            return softk.transport(x, jnp.asarray(anchors), jnp.asarray(marginals), epsilon=epsilon).plan
        return getattr(softk, function)(x, epsilon=epsilon, num_anchors=2)

    at, moved = jnp.asarray(x), rng.standard_normal(x.shape).astype(dtype)
    u = rng.standard_normal((3, 3, 2) if function == "transport" else (3, 3 if function == "rank" else 2)).astype(dtype)
    epsilon, one = jnp.ones((3, 1), dtype), np.ones((3, 1), dtype)
    pulled = jax.jit(lambda x, epsilon, u: jax.vjp(f, x, epsilon)[1](u))(at, epsilon, jnp.asarray(u))
    still = jnp.zeros((3, 1), dtype)
    pushed = jax.jit(lambda x, dx: jax.jvp(f, (x, epsilon), (dx, still))[1])(at, jnp.asarray(moved))
    by_x, by_epsilon, tangents = [], [], []
    for row, cotangent, direction in zip(x, u, moved, strict=True):
        if function == "transport":
            transported = Transported(row, anchors, marginals, float(one[0, 0]))
            found, tangent = transported.vjp(cotangent, ("x", "epsilon")), transported.jvp(x=direction)
        else:
            part = {"rank": "ranks", "sort": "values"}[function]
            ladder = Ladder(row, 2, 1.0, unit=1.5, largest=False)
            found, tangent = ladder.vjp(**{part: cotangent}), ladder.jvp(x=direction)[part]
        by_x.append(found["x"])
        by_epsilon.append([found["epsilon"]])
        tangents.append(tangent)
    assert_rows_close(pulled[0], np.stack(by_x), dtype)
    # Ranks are linear between the sorted values, whatever epsilon is. So what is left of its derivative is negligible.
    scale = np.abs(np.stack(by_x)).max(axis=1) if function == "rank" else None
    assert_rows_close(pulled[1], np.asarray(by_epsilon), dtype, scale)
    assert_rows_close(pushed, np.stack(tangents), dtype)


# --- second and third derivatives


@pytest.mark.parametrize(
    ("function", "modes"),
    [
        ("topk", ("jacrev", "jacfwd")),
        ("topk", ("jacfwd", "jacfwd")),
        ("threshold", ("jacrev", "jacrev")),
        wide("topk", ("jacrev", "jacrev")),
        wide("topk", ("jacfwd", "jacrev")),
        wide("threshold", ("jacrev", "jacfwd")),
        wide("threshold", ("jacfwd", "jacfwd")),
        wide("threshold", ("jacfwd", "jacrev")),
    ],
)
def test_second_derivatives_in_every_pair_of_arguments(function: str, modes: tuple[str, str], rng: Any) -> None:
    values = closed_form.problem(rng, "near-hard" if modes[0] == modes[1] else "soft", n=5)
    at = closed_form.Slice(**values)
    f = positional(function)
    for name in modes:
        f = getattr(jax, name)(f, ALL)
    found = jax.jit(f)(*arrays(values))
    for (i, name), (j, other) in itertools.product(enumerate(ARGUMENTS), repeat=2):
        assert_close(found[i][j], at.get(function, 2, name, other).reshape(found[i][j].shape), 1e-9)


@pytest.mark.full
@pytest.mark.parametrize(
    "modes",
    [("jacrev", "jacfwd", "jacfwd"), wide(("jacrev", "jacrev", "jacrev")), wide(("jacfwd", "jacfwd", "jacfwd"))],
)
def test_third_derivatives(modes: tuple[str, ...], rng: Any) -> None:
    """Against difference quotients of the closed second derivatives."""
    values = closed_form.problem(rng, n=4)
    u = rng.standard_normal(4)
    f = weighted(positional("topk"), u)
    for name in modes:
        f = getattr(jax, name)(f, ALL)
    found = jax.jit(f)(*arrays(values))
    place = closed_form.Slice(**values).place
    for i, name in enumerate(ARGUMENTS):

        def second(value: np.ndarray, name: str = name) -> Any:
            return np.tensordot(u, closed_form.Slice(**{**values, name: value}).mask2, 1)

        expected = closed_form.differences(second, values[name])
        for one, other in itertools.product(range(4), repeat=2):
            block = found[one][other][i]
            part = expected[place[ARGUMENTS[one]], place[ARGUMENTS[other]]]
            assert_close(block, part.reshape(block.shape), 1e-7)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        ("topk", {"mode": "smallest", "where": np.asarray([[1, 1, 0, 1], [1, 1, 1, 1]], bool)}),
        wide("topk", {}),
        wide("threshold", {}),
        wide("threshold", {"mode": "smallest", "where": np.asarray([[1, 1, 0, 1], [1, 1, 1, 1]], bool)}),
    ],
    ids=["topk-options", "topk", "threshold", "threshold-options"],
)
def test_check_grads(function: str, options: dict[str, Any]) -> None:
    """JAX's own difference quotients, to second order in both modes."""
    from jax.test_util import check_grads

    options = {name: jnp.asarray(value) if name == "where" else value for name, value in options.items()}
    x = [[0.3, -0.9, 1.1, 0.2], [1.4, 0.1, -0.6, 0.5]]
    given = tuple(map(jnp.asarray, (x, [[1.7], [2.1]], [[0.9], [1.2]], [0.6, 1.4, 1.0, 1.8])))

    def f(*given: Any) -> Any:
        return positional(function, **options)(*map(jnp.asarray, given))  # the difference quotients are NumPy's

    check_grads(f, given, order=2)


# --- batching


def batched(values: dict[str, np.ndarray], dims: tuple[int | None, ...], rng: Any, size: int = 3) -> tuple[Any, ...]:
    """Arguments with a batch axis where dims says, each entry of it slightly another."""
    found = []
    for value, dim in zip(values.values(), dims, strict=True):
        some = value if dim is None else rng.uniform(0.9, 1.1, (size, *value.shape)) * value
        found.append(jnp.asarray(some if dim is None else np.moveaxis(some, 0, dim)))
    return tuple(found)


def pick(given: tuple[Any, ...], dims: tuple[int | None, ...], i: int) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(value if dim is None else jnp.take(value, i, axis=dim))
        for name, value, dim in zip(ARGUMENTS, given, dims, strict=True)
    }


SOME_DIMS = [(0, None, None, None), (1, 0, 0, 1), (None, 0, 0, None), (None, None, None, 0)]
EVERY_DIMS = [
    dims for dims in itertools.product((0, 1, None), (0, None), (0, None), (0, 1, None)) if set(dims) != {None}
]


@pytest.mark.parametrize(
    ("function", "shape", "cases"),
    [
        ("topk", (2,), SOME_DIMS),
        ("threshold", (), SOME_DIMS[1:2]),
        *(wide(function, shape, EVERY_DIMS) for function in FUNCTIONS for shape in ((), (2,))),
    ],
    ids=lambda value: str(len(value)) if isinstance(value, list) else str(value),
)
def test_vmap_over_any_axes(function: str, shape: tuple[int, ...], cases: list[Any], rng: Any) -> None:
    for dims in cases:
        given = batched(closed_form.problem(rng, batch=shape), dims, rng)
        found = jax.vmap(positional(function), dims)(*given)
        for i in range(3):
            expected = getattr(closed_form, function)(**pick(given, dims, i))
            expected = expected if function == "topk" else expected[..., 0]
            np.testing.assert_allclose(found[i], expected.astype(float), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("function", "dims"),
    [
        ("topk", SOME_DIMS[1]),
        *(wide("topk", dims) for dims in EVERY_DIMS),
        *(wide("threshold", dims) for dims in SOME_DIMS),
    ],
)
def test_vmap_of_grad_and_grad_of_vmap(function: str, dims: tuple[int | None, ...], rng: Any) -> None:
    f = positional(function)
    given = batched(closed_form.problem(rng), dims, rng)
    u = random(rng, *jax.vmap(f, dims)(*given).shape)
    inner = jax.vmap(lambda u, *one: jax.grad(weighted(f, u), ALL)(*one), (0, *dims))(u, *given)
    outer = jax.grad(weighted(jax.vmap(f, dims), u), ALL)(*given)
    each = [closed_form.pullback(function, u[i], pick(given, dims, i)) for i in range(3)]
    for name, dim, one, many in zip(ARGUMENTS, dims, inner, outer, strict=True):
        expected = np.stack([found[name] for found in each])
        assert_close(one, expected)
        assert_close(many, expected.sum(0) if dim is None else np.moveaxis(expected, 0, dim))


def test_vmap_of_jvp_and_jvp_of_vmap(rng: Any) -> None:
    dims = (1, 0, None, 0)
    given = batched(closed_form.problem(rng), dims, rng)
    tangents = tuple(random(rng, *value.shape) for value in given)
    f = positional("topk")
    inner = jax.vmap(lambda given, moved: jax.jvp(f, given, moved)[1], (dims, dims))(given, tangents)
    _, outer = jax.jvp(jax.vmap(f, dims), given, tangents)
    expected = [closed_form.push("topk", pick(tangents, dims, i), pick(given, dims, i)) for i in range(3)]
    assert_close(inner, np.stack(expected))
    assert_close(outer, np.stack(expected))


def test_vmap_of_the_hessian(rng: Any) -> None:
    dims = (0, None, 0, None)
    given = batched(closed_form.problem(rng, n=5), dims, rng)
    u = rng.standard_normal(5)
    found = jax.vmap(jax.hessian(weighted(positional("topk"), u)), dims)(*given)
    for i in range(3):
        expected = np.tensordot(u, closed_form.Slice(**pick(given, dims, i)).get("topk", 2, "x", "x"), 1)
        assert_close(found[i], expected, 1e-9)


def test_nested_vmap(rng: Any) -> None:
    """Every score row with every k and every epsilon, by three maps."""
    x, k, epsilon = rng.standard_normal((2, 6)), np.asarray([1.3, 2.6, 4.1]), np.asarray([0.4, 1.1])
    f = jax.vmap(positional("topk"), (None, None, 0))
    found = jax.vmap(jax.vmap(f, (None, 0, None)), (0, None, None))(*map(jnp.asarray, (x, k, epsilon)))
    expected = closed_form.topk(x[:, None, None], k[:, None, None], epsilon[:, None])
    assert_close(found, expected.astype(float), 1e-14)


def test_vmap_of_the_quantile_and_of_a_hard_mask(rng: Any) -> None:
    x, q = rng.standard_normal((4, 3)), np.asarray([[0.2, 0.5], [0.4, 0.9], [0.1, 0.8]])
    found = jax.vmap(lambda x, q: softk.quantile(x, q, epsilon=0.6), (1, 0))(jnp.asarray(x), jnp.asarray(q))
    expected = [[closed_form.quantile(x[:, i], q[i, j], 0.6)[0] for j in range(2)] for i in range(3)]
    assert_close(found, np.asarray(expected).astype(float), 1e-14)
    hard = jax.vmap(lambda x: softk.topk(x, 2, hard=True), 1, 1)(jnp.asarray(x))
    assert_close(hard, (np.argsort(np.argsort(-x, axis=0), axis=0) < 2).astype(float))


# --- tracing


def test_one_trace_for_many_values(rng: Any) -> None:
    """k, epsilon and weights are data, whether they come as arrays or as numbers."""
    traces = 0

    @jax.jit
    def f(x: Any, k: Any, epsilon: Any) -> Any:
        nonlocal traces
        traces += 1
        return softk.topk(x, k, epsilon=epsilon)

    gradient = jax.jit(jax.grad(lambda x, k, epsilon, u: (f(x, k, epsilon) * u).sum()))
    x, u = rng.standard_normal((3, 7)), rng.standard_normal((3, 7))
    for k, epsilon in [(1.5, 0.3), (2.0, 0.7), (4.25, 1.4), (5.9, 0.9)]:
        values = {"x": x, "k": np.asarray(k), "epsilon": np.asarray(epsilon)}
        assert_close(f(jnp.asarray(x), k, epsilon), closed_form.topk(**values).astype(float), 1e-13)
        found = gradient(jnp.asarray(x), k, epsilon, jnp.asarray(u))
        assert_close(found, closed_form.pullback("topk", u, values)["x"])
    assert traces == 1


def test_one_compilation_for_many_values(rng: Any) -> None:
    """Also without a jit of one's own: an array k or epsilon is no part of what is compiled."""
    x, compiled = random(rng, 3, 7), []

    def listen(event: str, _: float, **__: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    def call(k: float, epsilon: float) -> None:
        softk.topk(x, jnp.asarray(k), epsilon=jnp.asarray(epsilon)).block_until_ready()

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        call(1.5, 0.3)
        first = len(compiled)
        call(2.5, 0.4)
        call(6.5, 1.4)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert first > 0
    assert len(compiled) == first


def test_bad_values_under_a_trace_are_nan(rng: Any) -> None:
    x = jnp.asarray(rng.standard_normal((4, 7)))
    k = jnp.asarray([[2.0], [-1.0], [8.0], [jnp.nan]])
    out = jax.jit(lambda x, k: softk.topk(x, k))(x, k)
    assert np.isnan(out).all(axis=1).tolist() == [False, True, True, True]
    with pytest.raises(ValueError, match="k must be"):
        jax.jit(lambda x: softk.topk(x, 8))(x)


@pytest.mark.parametrize("function", ["topk", wide("threshold")])
def test_checkpoint(function: str, rng: Any) -> None:
    values = closed_form.problem(rng, batch=(3,))
    f = positional(function)
    u = random(rng, *jax.eval_shape(f, *arrays(values)).shape)
    found = jax.grad(weighted(jax.checkpoint(f), u), ALL)(*arrays(values))
    expected = closed_form.pullback(function, u, values)
    for name, gradient in zip(ARGUMENTS, found, strict=True):
        assert_close(gradient, expected[name])


def test_control_flow(rng: Any) -> None:
    """Inside scan and cond, differentiated through: gradient descent on the scores, unrolled."""
    x, u = rng.standard_normal(6), rng.standard_normal(6)

    def loss(x: Any) -> Any:
        return (softk.topk(x, 2, epsilon=0.9) * u).sum()

    def descend(x: Any) -> Any:
        def step(x: Any, _: Any) -> Any:
            return jax.lax.cond(x[0] < 1e3, lambda: x - 0.5 * jax.grad(loss)(x), lambda: x), None

        return jax.lax.scan(step, x, length=3)[0]

    def reference(x: np.ndarray) -> Any:
        for _ in range(3):
            x = x - 0.5 * np.tensordot(u, closed_form.Slice(x, 2.0, 0.9).get("topk", 1, "x"), 1)
        return x

    assert_close(descend(jnp.asarray(x)), reference(x).astype(float))
    expected = closed_form.differences(reference, x)
    assert_close(jax.jacrev(descend)(jnp.asarray(x)), expected, 1e-8)


@pytest.mark.parametrize("function", ["topk", wide("threshold")])
def test_debugged_nans(function: str, rng: Any) -> None:
    """Nothing inside, forward or backward, is NaN for finite input: a debugger for NaN stays silent."""
    hostile = [
        ([1e30, -1e30, 3.0, 2.0], 2.0, 0.1),
        ([0.5, 0.5, 0.5, 0.5], 2.0, 0.1),
        ([9.0, 8.0, -8.0, -9.0], 2.0, 1e-6),
        ([1.0, 2.0, 3.0, 4.0], 0.0, 0.1),
        ([1.0, 2.0, 3.0, 4.0], 4.0, 0.1),
        ([1e-300, 0.0, -1e-300, 5e-324], 1.5, 1e-280),
        (rng.standard_normal(4).tolist(), 1.7, 0.3),
    ]
    with jax.debug_nans(True):
        for x, k, epsilon in hostile:
            given = (jnp.asarray(x), jnp.asarray(k), jnp.asarray(epsilon), jnp.ones(4))
            for weights in (given[3:], ()):
                out, pull = jax.vjp(positional(function), *given[:3], *weights)
                found = pull(jnp.asarray(rng.standard_normal(out.shape)))
                assert all(jnp.isfinite(gradient).all() for gradient in found)


def test_without_x64(rng: Any) -> None:
    """JAX's default: everything is float32."""
    values = closed_form.problem(rng, batch=(3,))
    with jax.enable_x64(False):
        given = arrays(values)
        assert all(value.dtype == "float32" for value in given)
        rounded = {name: np.asarray(value, float) for name, value in zip(ARGUMENTS, given, strict=True)}
        out, pull = jax.vjp(jax.jit(positional("topk")), *given)
        u = random(rng, 3, 7)
        found = pull(u)
        middle = softk.quantile(given[0], jnp.asarray([0.2, 0.9]), epsilon=0.6)
        numbers = softk.topk(given[0], 2, epsilon=0.6)
        hard = softk.topk(given[0], 2, hard=True)
    assert {value.dtype.name for value in (out, *found, middle, numbers, hard)} == {"float32"}
    expected = closed_form.pullback("topk", np.asarray(u, float), rounded)
    for name, gradient in zip(ARGUMENTS, found, strict=True):
        assert_close(gradient, expected[name], 2e-5)
    assert_close(np.asarray(hard.sum(-1)), np.full(3, 2.0, np.float32))


@pytest.mark.parametrize("order", [0, wide(1), 2])
def test_export_with_symbolic_shapes(order: int, rng: Any) -> None:
    """One artefact for every shape, with its derivatives."""
    from jax import export

    b, n = export.symbolic_shape("b, n")
    shapes = (jax.ShapeDtypeStruct((b, n), "float64"), jax.ShapeDtypeStruct((b, 1), "float64"))
    exported = export.export(jax.jit(lambda x, k: softk.topk(x, k, epsilon=0.7)))(*shapes)
    for shape in [(3, 7), (2, 12)]:
        values = {
            "x": rng.standard_normal(shape),
            "k": rng.uniform(1.0, 4.0, (shape[0], 1)),
            "epsilon": np.asarray(0.7),
        }
        x, k, _ = arrays(values)
        assert_close(exported.call(x, k), closed_form.topk(**values).astype(float), 1e-13)
        if order == 0:
            continue
        u = random(rng, *shape)
        gradient = jax.jit(jax.grad(weighted(exported.call, u), (0, 1)))
        expected = closed_form.pullback("topk", u, values)
        assert_close(gradient(x, k)[0], expected["x"])
        assert_close(gradient(x, k)[1], expected["k"])
        if order == 2:
            w = random(rng, *shape)
            twice = jax.jit(jax.grad(lambda x, k=k, w=w, g=gradient: (g(x, k)[0] * w).sum()))(x)
            for i in range(shape[0]):
                at = closed_form.Slice(values["x"][i], values["k"][i], 0.7)
                assert_close(twice[i], w[i] @ np.tensordot(u[i], at.get("topk", 2, "x", "x"), 1).astype(float), 1e-9)


def test_export_with_a_number_as_k(rng: Any) -> None:
    from jax import export

    b, n = export.symbolic_shape("b, n", constraints=["n >= 6"])
    f = jax.jit(lambda x: softk.topk(x, 5, epsilon=0.7))
    exported = export.export(f)(jax.ShapeDtypeStruct((b, n), "float64"))
    for shape in [(3, 7), (2, 200)]:
        x = rng.standard_normal(shape)
        assert_close(exported.call(jnp.asarray(x)), closed_form.topk(x, 5.0, 0.7).astype(float), 1e-13)


def test_shapes_without_values() -> None:
    shape = jax.eval_shape(lambda x: softk.topk(x, 2), jax.ShapeDtypeStruct((3, 7), "bfloat16"))
    assert (shape.shape, shape.dtype) == ((3, 7), "bfloat16")


def test_what_backward_keeps(rng: Any) -> None:
    """The scores, and a few numbers a slice."""
    x = random(rng, 4, 1000)
    _, pull = jax.vjp(lambda x: softk.topk(x, 30.5, epsilon=0.3), x)
    kept = jax.tree.leaves(pull)
    assert [value.size for value in kept if value.size >= 4000] == [4000]
    assert sum(value.size for value in kept if value.size < 4000) <= 40


def precisions(jaxpr: Any) -> list[Any]:
    """Of every product of matrices within."""
    found: list[Any] = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.params["precision"])
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            inner = getattr(part, "jaxpr", part)
            found += precisions(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("function", ["neighbors", "sorted_topk", "attention", "beam"])
def test_products_of_matrices_are_exact(function: str) -> None:
    """Distances, scores and Newton's steps have small differences, which a GPU's default of 10 bits would lose."""

    def loss(x: Any) -> Any:
        if function == "neighbors":
            return jnp.sum(softk.neighbors.weights(x, x, 2, epsilon=0.3) ** 2)
        if function == "attention":
            return jnp.sum(softk.attention.attend(x, x, x, 2, epsilon=0.3) ** 2)
        if function == "beam":
            found = softk.beam.step(x, 2, table=jnp.ones((64, 3), x.dtype), states=x, epsilon=0.3)
            return jnp.sum(found.inputs**2) + jnp.sum(found.states**2)
        return jnp.sum(softk.sorted_topk(x, 3, epsilon=0.3).values ** 2)

    with jax.default_matmul_precision("default"):
        traced = jax.make_jaxpr(jax.hessian(loss))(jnp.ones((5, 64), jnp.float32))
    found = precisions(traced.jaxpr)
    assert found
    assert set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize("name", ["jax", pytest.param("jax-gpu", marks=pytest.mark.gpu)])
def test_nothing_is_moved_between_devices(name: str, rng: Any) -> None:
    """Once compiled. The guard does notice an array of the host."""
    library = BY_NAME[name]
    library.require()

    def loss(x: Any, k: Any, epsilon: Any, weights: Any, where: Any, u: Any) -> Any:
        soft = softk.topk(x, k, epsilon=epsilon, weights=weights, where=where)
        plain = softk.topk(x, 3, epsilon=0.3) + softk.topk(x, 3, epsilon=0.3, hard=True)
        return (u * (soft + plain)).sum() + softk.threshold(x, 2.5, epsilon=epsilon).sum()

    x, k, epsilon = rng.standard_normal((3, 40)), rng.uniform(1, 5, (3, 1)), rng.uniform(0.2, 0.6, (3, 1))
    weights, where = rng.uniform(0.5, 1.5, (3, 40)), rng.uniform(size=(3, 40)) > 0.2
    given = [library.array(value) for value in (x, k, epsilon, weights, where, rng.standard_normal((3, 40)))]
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    wanted = step(*given)
    with jax.transfer_guard("disallow"):
        found = step(*given)
        with pytest.raises(Exception, match="transfer"):
            step(x, *given[1:])
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, two)


# --- every function, where the arrays are not what a jit makes of them


def transported(x: Any) -> Any:
    return softk.transport(x, jnp.asarray([0.0, 1.0, 0.4]), jnp.asarray([1.0, 2.0, 3.0]), epsilon=0.5).plan


#: Functions of scores (..., 12) whose results keep the first axis: each way to a threshold, and what is made of it.
WAYS: dict[str, Callable[[Any], Any]] = {
    "topk": lambda x: softk.topk(x, 5, epsilon=0.5),
    "few": lambda x: softk.topk(x, 1, epsilon=0.5),
    "array": lambda x: softk.topk(x, jnp.asarray(3.5), epsilon=0.5),
    "weights": lambda x: softk.topk(x, 2.5, epsilon=0.5, weights=jnp.linspace(0.5, 1.5, 12)),
    "where": lambda x: softk.topk(x, 2.5, epsilon=0.5, where=x > -1.0),
    "hard": lambda x: softk.topk(x, 3, epsilon=0.5, hard=True),
    "log_topk": lambda x: softk.log_topk(x, 2.5, epsilon=0.5),
    "threshold": lambda x: softk.threshold(x, 2.5, epsilon=0.5),
    "quantile": lambda x: softk.quantile(x, 0.3, epsilon=0.5),
    "sorted_topk": lambda x: softk.sorted_topk(x, 3, epsilon=0.5).assignment,
    "values": lambda x: softk.sorted_topk(x, 3, epsilon=0.5).values,
    "sort": lambda x: softk.sort(x, epsilon=0.5, num_anchors=4),
    "rank": lambda x: softk.rank(x, epsilon=0.5, num_anchors=4),
    "transport": transported,
    "neighbors": lambda x: softk.neighbors.weights(x, jnp.outer(jnp.linspace(-1.0, 1.0, 5), jnp.ones(12)), 2),
}

#: Two that run in little time; the others are as they are traced.
RUN = ("topk", "array", "log_topk", "threshold")


@pytest.mark.parametrize("name", WAYS)
def test_shard_map(name: str, rng: Any) -> None:
    """With its check of what varies over the devices, which every loop must pass, forward and backward."""
    x, f = random(rng, 4, 12), WAYS[name]
    over = jax.sharding.PartitionSpec("d")
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("d",))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=over, out_specs=over)

    def derivative(g: Callable[..., Any]) -> Callable[..., Any]:
        return jax.grad(lambda x: (g(x) ** 2).sum())

    if name in RUN:
        assert_close(jax.jit(derivative(mapped))(x), jax.jit(derivative(f))(x), 1e-13)
    else:
        assert jax.eval_shape(derivative(mapped), x).shape == x.shape
        assert jax.eval_shape(mapped, x).shape == jax.eval_shape(f, x).shape


def looped(f: Callable[[Any], Any], loop: str) -> Callable[[Any], Any]:
    """The sum of squares of what the function finds within a loop."""

    def scanned(x: Any) -> Any:
        return jax.lax.scan(lambda state, _: (state + 0.1 * (f(state) ** 2).sum(), None), x, length=2)[0].sum()

    def mapped(x: Any) -> Any:
        return (jax.lax.map(jax.jit(f), jnp.stack([x, 2.0 * x])) ** 2).sum()

    return {"scan": scanned, "map": mapped}[loop]


@pytest.mark.parametrize("kernels", ["auto", "none"])
@pytest.mark.parametrize(
    ("name", "loop"),
    [
        ("array", "scan"),
        ("threshold", "map"),
        # The hard mask has the soft one's derivative, of which its difference quotients know nothing.
        *(wide(name, loop) for name in WAYS for loop in ("scan", "map") if name not in ("topk", "few", "hard")),
    ],
)
def test_second_derivatives_within_a_loop(name: str, loop: str, kernels: str, rng: Any) -> None:
    """Against difference quotients of the first. JAX splits the body of a loop, and must keep the rules within."""
    x, v, h = random(rng, 1, 12), random(rng, 1, 12), 1e-5
    with softk.kernels(kernels):
        first = jax.jit(jax.grad(looped(WAYS[name], loop)))
        expected = (first(x + h * v) - first(x - h * v)) / (2.0 * h)
        forward, reverse = jax.jvp(first, (x,), (v,))[1], jax.grad(lambda x: (first(x) * v).sum())(x)
        for found in (forward, reverse):
            assert_close(found, expected, 1e-7)


@pytest.mark.parametrize(("name", "at"), [("k", 1.6), wide("epsilon", 0.8), wide("weight", 1.3)])
def test_third_derivatives_in_one_number(name: str, at: float, rng: Any) -> None:
    """Reverse of reverse of reverse, against difference quotients of the second."""
    x, u, h = random(rng, 4), random(rng, 4), 1e-5

    def f(value: Any) -> Any:
        given = {"k": jnp.asarray(1.6), "epsilon": jnp.asarray(0.8), name: value}
        weights = jnp.ones(4).at[1].set(value) if name == "weight" else None
        return (softk.topk(x, given["k"], epsilon=given["epsilon"], weights=weights) * u).sum()

    second = jax.jit(jax.grad(jax.grad(f)))
    expected = (second(at + h) - second(at - h)) / (2.0 * h)
    assert_close(jax.jit(jax.grad(second))(at), expected, 1e-7)


@pytest.mark.parametrize("varied", ["x", "k", "epsilon", "anchors", "none"])
def test_shard_map_of_one_argument_among_replicas(varied: str, rng: Any) -> None:
    """A loop carries what varies with any of its arguments, and with nothing that does not."""
    spec = jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("d",))
    values = {"x": random(rng, 4, 12), "k": jnp.asarray([[2.5]] * 4), "epsilon": jnp.asarray([[0.5]] * 4)}
    values["anchors"] = jnp.asarray([[0.0, 1.0, 0.4]] * 4)
    specs = {name: spec("d") if name == varied else spec() for name in values}
    out = spec() if varied == "none" else spec("d")

    def loss(x: Any, k: Any, epsilon: Any, anchors: Any) -> Any:
        plan = softk.transport(x, anchors, jnp.asarray([1.0, 2.0, 3.0]), epsilon=epsilon).plan
        mask = softk.topk(x, k, epsilon=epsilon) + softk.log_topk(x, k, epsilon=epsilon)
        return (plan**2).sum((1, 2)) + (mask**2).sum(1) + softk.threshold(x, k, epsilon=epsilon)

    mapped = jax.shard_map(loss, mesh=mesh, in_specs=tuple(specs.values()), out_specs=out)
    found = jax.eval_shape(jax.grad(lambda *given: mapped(*given).sum(), ALL), *values.values())
    assert [value.shape for value in found] == [value.shape for value in values.values()]


@pytest.mark.parametrize("name", [name if name in ("topk", "array") else wide(name) for name in WAYS])
def test_without_jit(name: str, rng: Any) -> None:
    """Loops in Python, over numbers of Python."""
    x, f = random(rng, 2, 12), WAYS[name]
    expected = jax.jit(f)(x)
    with jax.disable_jit():
        found = f(x)
    assert_close(found, expected, 1e-12)


def test_derivatives_without_jit(rng: Any) -> None:
    x, u = rng.standard_normal((2, 5)), rng.standard_normal((2, 5))
    values = {"x": x, "k": np.asarray([[1.5], [2.25]]), "epsilon": np.asarray(0.7)}
    with jax.disable_jit():
        found = jax.grad(weighted(positional("topk"), u), (0, 1, 2))(*arrays(values))
    expected = closed_form.pullback("topk", u, values)
    for name, gradient in zip(values, found, strict=True):
        assert_close(gradient, expected[name])


# --- several devices


def test_sharded_over_devices(rng: Any) -> None:
    """The batch and then the selected axis over four devices: the same numbers, forward and backward."""
    x, u, k = rng.standard_normal((8, 12)), rng.standard_normal((8, 12)), rng.uniform(2.0, 6.0, (8, 1))
    root = Path(__file__).parents[1]
    setup = f"import sys\nsys.path[:0] = [{str(root)!r}, {str(root / 'backends')!r}]\n"
    source = f"""
    import os
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    import warnings
    warnings.simplefilter("error")
    import jax, jax.numpy as jnp, numpy as np, softk
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")
    assert len(jax.devices()) == 4
    x, u, k = (np.asarray(v) for v in ({x.tolist()}, {u.tolist()}, {k.tolist()}))
    mesh = Mesh(np.asarray(jax.devices()), ("d",))
    found = []
    for spec in (P("d", None), P(None, "d"), P(None, None)):
        here = NamedSharding(mesh, spec)
        row = NamedSharding(mesh, P("d", None) if spec == P("d", None) else P(None, None))
        given = jax.device_put(x, here), jax.device_put(k, row)
        both = jax.jit(jax.value_and_grad(lambda x, k: (softk.topk(x, k, epsilon=0.7) * u).sum(), (0, 1)))
        _, (gx, gk) = both(*given)
        mask = jax.jit(lambda x, k: softk.topk(x, k, epsilon=0.7))(*given)
        eager = softk.topk(*given, epsilon=0.7)
        if spec == P("d", None):
            assert mask.sharding.is_equivalent_to(here, 2), mask.sharding
            text = jax.jit(lambda x, k: softk.topk(x, k, epsilon=0.7)).lower(*given).compile().as_text()
            assert "all-gather" not in text
        found.append([np.asarray(v).tolist() for v in (mask, gx, gk, eager)])
    over = P("d", None)
    mapped = jax.shard_map(lambda x, k: softk.topk(x, k, epsilon=0.7), mesh=mesh, in_specs=(over, over), out_specs=over)
    gx, gk = jax.jit(jax.grad(lambda x, k: (mapped(x, k) * u).sum(), (0, 1)))(x, k)
    found.append([np.asarray(v).tolist() for v in (mapped(x, k), gx, gk, mapped(x, k))])
    # One temperature for all devices: its derivative is the sum of theirs.
    shared = jax.shard_map(
        lambda x, k, e: softk.topk(x, k, epsilon=e), mesh=mesh, in_specs=(over, over, P()), out_specs=over
    )
    by_epsilon = jax.jit(jax.grad(lambda e: (shared(x, k, e) * u).sum()))(jnp.asarray(0.7))
    print((found, float(by_epsilon)))
    """
    done = subprocess.run(
        [sys.executable, "-c", setup + textwrap.dedent(source)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    values = {"x": x, "k": k, "epsilon": np.asarray(0.7)}
    expected = closed_form.pullback("topk", u, values)
    out = closed_form.topk(**values).astype(float)
    found, by_epsilon = eval(done.stdout)
    assert_close(by_epsilon, expected["epsilon"])
    for mask, in_x, in_k, eager in found:
        assert_close(mask, out, 1e-13)
        assert_close(eager, out, 1e-13)
        assert_close(in_x, expected["x"])
        assert_close(in_k, expected["k"])


def test_an_axis_over_devices(rng: Any) -> None:
    """The selected axis over four devices in a shard_map: values, derivatives, and no gathering of the scores."""
    root = Path(__file__).parents[1]
    source = """
    import os
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    import jax, jax.numpy as jnp, numpy as np, softk, softk_jax.sharded
    from jax.sharding import Mesh, PartitionSpec as P
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")
    mesh, over = Mesh(np.asarray(jax.devices()), ("d",)), P(None, "d")
    rng = np.random.default_rng(3)
    x, u = (jnp.asarray(rng.standard_normal((2, 1200))) for _ in range(2))
    weights = jnp.asarray(rng.uniform(0.5, 2.0, (2, 1200)))

    def loss(x, k, epsilon, weights):
        def local(x, k, epsilon, weights, u):
            mask = softk_jax.sharded.topk(x, k, axis_name="d", epsilon=epsilon, weights=weights)
            return jax.lax.psum((u * mask).sum(), "d"), mask
        specs = (over, P(), P(), over, over)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), over))(x, k, epsilon, weights, u)

    def whole(x, k, epsilon, weights):
        mask = softk.topk(x, k, epsilon=epsilon, weights=weights)
        return (u * mask).sum(), mask

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    for epsilon in (0.3, 1e-3):
        given = x, jnp.asarray(140.3), jnp.asarray(epsilon), weights
        (_, mask), found = gradient(*given)
        (_, wanted_mask), wanted = jax.value_and_grad(whole, (0, 1, 2, 3), has_aux=True)(*given)
        np.testing.assert_allclose(mask, wanted_mask, rtol=0, atol=64 * 2.0**-52)
        for own, other in zip(found, wanted):
            np.testing.assert_allclose(own, other, rtol=0, atol=1e-11 * float(abs(other).max()))

    def explicit(x, k, epsilon, weights, u):
        _, pullback = softk.vjp(softk_jax.sharded.topk, x, k, axis_name="d", epsilon=epsilon, weights=weights)
        return pullback(u)

    parts = {"x": over, "k": P(), "epsilon": P(), "weights": over}
    found = jax.jit(jax.shard_map(explicit, mesh=mesh, in_specs=(*parts.values(), over), out_specs=parts))(*given, u)
    for name, other in zip(parts, wanted):
        np.testing.assert_allclose(found[name], other, rtol=0, atol=1e-11 * float(abs(other).max()))
    text = gradient.lower(*given).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text and "all-to-all" not in text
    hard = lambda x: softk_jax.sharded.topk(x, 30, axis_name="d", hard=True)
    found = jax.jit(jax.shard_map(hard, mesh=mesh, in_specs=over, out_specs=over))(x.round())
    np.testing.assert_array_equal(found, softk.topk(x.round(), 30, hard=True))

    def second(f):
        given = x, jnp.asarray(140.3), jnp.asarray(0.3), weights
        moved = u, jnp.asarray(0.7), jnp.asarray(-0.1), weights[:, ::-1]
        return jax.jit(lambda: jax.jvp(jax.grad(lambda *v: f(*v)[0], (0, 1, 2, 3)), given, moved)[1])()

    for own, other in zip(second(loss), second(whole)):
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-11 * float(abs(other).max()))

    def refused(error, message, f):
        try:
            f(x)
        except error as found:
            assert message in str(found), found
        else:
            raise AssertionError("it was not refused")

    def over_devices(k, name):
        local = lambda x: softk_jax.sharded.topk(x, k, axis_name=name)
        return jax.shard_map(local, mesh=mesh, in_specs=over, out_specs=over)

    refused(TypeError, "axis_name must be a string", lambda x: softk_jax.sharded.topk(x, 2, axis_name=0))
    refused(ValueError, "call topk inside jax.shard_map", lambda x: softk_jax.sharded.topk(x, 2, axis_name="d"))
    unknown = "axis_name must be an axis of the surrounding shard_map, one of ('d',), got 'data'"
    refused(ValueError, unknown, over_devices(2, "data"))
    refused(ValueError, unknown, jax.jit(over_devices(2, "data")))
    refused(ValueError, "k must be from 0 to 1200", over_devices(1201, "d"))
    np.testing.assert_array_equal(over_devices(1200, "d")(x), 1.0)

    explicit = jax.make_mesh((4,), ("e",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        x = jax.device_put(x, jax.sharding.NamedSharding(explicit, P(None, "e")))
        message = "x must not be sharded along axis over an explicit axis"
        for f in (softk.topk, softk.threshold, softk.log_topk):
            refused(ValueError, message, lambda x: f(x, 2, epsilon=0.3))
            assert f(x, 1, axis=0, epsilon=0.3).shape[-1] == 1200
    print("done")
    """
    setup = f"import sys\nsys.path[:0] = [{str(root)!r}, {str(root / 'backends')!r}]\n"
    done = subprocess.run([sys.executable, "-c", setup + textwrap.dedent(source)], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
