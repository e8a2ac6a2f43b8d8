"""PyTorch's function transforms and dual numbers, by value: one, two and three derivatives, batched in any way."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import softk

from . import closed_form
from .closed_form import ARGUMENTS, CASES, assert_close, host
from .oracles import assert_rows_close, curvature, dominated
from .plan_oracles import Transported

torch = pytest.importorskip("torch")

pytestmark = [
    # torch compiles its own forward-mode formulas with torch.jit.script, which it has deprecated.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning"),
    pytest.mark.usefixtures("on_device"),
]

FUNCTIONS = {"topk": softk.topk, "threshold": softk.threshold}


def positional(function: str) -> Callable[..., Any]:
    """The function of (x, k, epsilon, weights)."""

    def f(x: Any, k: Any, epsilon: Any, weights: Any = None) -> Any:
        return FUNCTIONS[function](x, k, epsilon=epsilon, weights=weights)

    return f


def tensors(values: dict[str, np.ndarray]) -> tuple[Any, ...]:
    return tuple(torch.tensor(value) for value in values.values())


def random(rng: Any, *shape: int) -> Any:
    return torch.tensor(rng.standard_normal(shape))


def weighted(f: Callable[..., Any], u: Any) -> Callable[..., Any]:
    return lambda *given: (f(*given) * u).sum()


ALL = (0, 1, 2, 3)


# --- first derivatives


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_grad_and_vjp(function: str, case: str, rng: Any) -> None:
    values = closed_form.problem(rng, case, batch=(3,))
    given, f = tensors(values), positional(function)
    out, pull = torch.func.vjp(f, *given)
    u = random(rng, *out.shape)
    expected = closed_form.pullback(function, host(u), values)
    for found in (pull(u), torch.func.grad(weighted(f, u), ALL)(*given)):
        for name, gradient in zip(ARGUMENTS, found, strict=True):
            assert_close(gradient, expected[name])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_jvp(function: str, case: str, rng: Any) -> None:
    values = closed_form.problem(rng, case, batch=(3,))
    given = tensors(values)
    tangents = {name: rng.standard_normal(value.shape) for name, value in values.items()}
    _, found = torch.func.jvp(positional(function), given, tensors(tangents))
    assert_close(found, closed_form.push(function, tangents, values))


@pytest.mark.parametrize("only", ARGUMENTS)
def test_jvp_in_one_argument(only: str, rng: Any) -> None:
    """The others have no tangent at all, which is not the same as a tangent of zeros."""
    values = closed_form.problem(rng, batch=(3,))
    given = dict(zip(ARGUMENTS, tensors(values), strict=True))
    tangent = rng.standard_normal(values[only].shape)

    def f(value: Any) -> Any:
        return positional("topk")(**{**given, only: value})

    _, found = torch.func.jvp(f, (given[only],), (torch.tensor(tangent),))
    assert_close(found, closed_form.push("topk", {only: tangent}, values))


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_jacobian(function: str, case: str, transform: str, rng: Any) -> None:
    values = closed_form.problem(rng, case)
    at = closed_form.Slice(**values)
    found = getattr(torch.func, transform)(positional(function), ALL)(*tensors(values))
    for name, block in zip(ARGUMENTS, found, strict=True):
        expected = at.get(function, 1, name)
        assert_close(block, expected.reshape(block.shape))


@pytest.mark.parametrize("transform", ["jacrev", "jacfwd"])
@pytest.mark.parametrize("weights", [False, True])
def test_jacobian_of_the_quantile(transform: str, weights: bool, rng: Any) -> None:
    values = closed_form.problem(rng)
    values["k"] = np.asarray(0.37)
    if not weights:
        del values["weights"]

    def f(x: Any, q: Any, epsilon: Any, weights: Any = None) -> Any:
        return softk.quantile(x, q, epsilon=epsilon, weights=weights)

    found = getattr(torch.func, transform)(f, ALL[: len(values)])(*tensors(values))
    for i, (name, block) in enumerate(zip(values, found, strict=True)):
        given = list(values.values())

        def at(value: np.ndarray, i: int = i, given: list[np.ndarray] = given) -> Any:
            return closed_form.quantile(*given[:i], value, *given[i + 1 :])[0]

        assert_close(block, closed_form.differences(at, values[name], 1e-4), 1e-9)


def test_tangents_and_cotangents_of_lower_precision(rng: Any) -> None:
    values = closed_form.problem(rng, batch=(3,))
    given = tuple(value.to(torch.bfloat16) for value in tensors(values))
    rounded = {name: host(value.double()) for name, value in zip(ARGUMENTS, given, strict=True)}
    tangents = tuple(random(rng, *value.shape).to(torch.bfloat16) for value in given)
    _, found = torch.func.jvp(positional("topk"), given, tangents)
    assert found.dtype == torch.bfloat16
    named = {name: host(value.double()) for name, value in zip(ARGUMENTS, tangents, strict=True)}
    assert_close(found.double(), closed_form.push("topk", named, rounded), 2.0 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("hard", [False, True])
def test_hard_and_removed_items(hard: bool, rng: Any) -> None:
    x = rng.standard_normal((3, 7))
    where = rng.uniform(size=(3, 7)) < 0.8
    where[:, :3] = True
    u = rng.standard_normal((3, 7))

    def f(x: Any) -> Any:
        return softk.topk(x, 2, epsilon=0.7, where=torch.tensor(where), hard=hard)

    values = {"x": x, "k": np.asarray(2.0), "epsilon": np.asarray(0.7)}
    expected = closed_form.pullback("topk", u * where, values, where)["x"]
    assert_close(torch.func.grad(weighted(f, torch.tensor(u)))(torch.tensor(x)), expected)
    tangent = random(rng, 3, 7)
    _, pushed = torch.func.jvp(f, (torch.tensor(x),), (tangent,))
    assert_close((pushed * torch.tensor(u)).sum(), (torch.tensor(expected) * tangent).sum())


# --- where one item has nearly all of the derivative: what is left of it by that item is the sum of the others


#: A derivative of f at x along v, by each way to transpose the rules: a cotangent of x, or a tangent of f(x).
TRANSPOSES: dict[str, tuple[str, Callable[..., Any]]] = {
    "reverse": ("cotangent", lambda f, x, v: torch.func.vjp(f, x)[1](v)[0]),
    "reverse of forward": (
        "cotangent",
        lambda f, x, v: torch.func.vjp(lambda t: torch.func.jvp(f, (x,), (t,))[1], torch.zeros_like(x))[1](v)[0],
    ),
    "forward of reverse": ("cotangent", lambda f, x, v: torch.func.jvp(torch.func.vjp(f, x)[1], (v,), (v,))[1][0]),
    "forward": ("tangent", lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1]),
    "reverse of reverse": ("tangent", lambda f, x, v: torch.autograd.functional.jvp(f, x, v)[1]),
}


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("function", ["topk", "log_topk"])
@pytest.mark.parametrize("transposed", TRANSPOSES)
def test_one_item_dominates(transposed: str, function: str, dtype: str, with_weights: bool, rng: Any) -> None:
    problem, log = dominated(dtype, with_weights), function == "log_topk"
    x, k, epsilon, *weights = tensors(problem.arguments)
    v = rng.standard_normal(x.shape).astype(dtype)

    def f(x: Any) -> Any:
        return getattr(softk, function)(x, k, epsilon=epsilon, weights=weights[0] if weights else None)

    kind, derivative = TRANSPOSES[transposed]
    expected = []
    for reference, row in zip(problem.oracles, v, strict=True):
        if kind == "cotangent":
            expected.append(reference.vjp(row, log=log)["x"])
        else:
            expected.append(reference.log_jvp(dx=row) if log else reference.jvp(dx=row)[0])
    assert_rows_close(host(derivative(f, x, torch.tensor(v))), np.stack(expected), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("transposed", TRANSPOSES)
def test_one_score_dominates_a_boundary(transposed: str, dtype: str, rng: Any) -> None:
    gaps = (7.0, 10.0, 20.0) if dtype == "float32" else (15.0, 22.0, 45.0)
    x = np.asarray([[gap, 0.0, gap + 1] for gap in gaps], dtype)
    anchors, marginals = np.asarray([0.0, 1.0], dtype), np.asarray([0.25, 2.75], dtype)
    kind, derivative = TRANSPOSES[transposed]
    v = rng.standard_normal((3, 3, 2) if kind == "cotangent" else (3, 3)).astype(dtype)

    def f(x: Any) -> Any:
        return softk.transport(x, torch.tensor(anchors), torch.tensor(marginals), epsilon=1.0).plan

    expected = []
    for row, direction in zip(x, v, strict=True):
        reference = Transported(row, anchors, marginals, 1.0)
        expected.append(reference.vjp(direction, ("x",))["x"] if kind == "cotangent" else reference.jvp(x=direction))
    found = derivative(f, torch.tensor(x), torch.tensor(v))
    assert_rows_close(host(found), np.stack(expected), dtype)


@pytest.mark.parametrize("modes", list(itertools.product(["jacrev", "jacfwd"], repeat=2)), ids="-".join)
@pytest.mark.parametrize(("gap", "k", "dtype"), [(10, 2.75, "float32"), (7, 2.95, "float32"), (20, 2.75, "float64")])
def test_hessian_where_one_item_dominates(gap: float, k: float, dtype: str, modes: tuple[str, str]) -> None:
    x, u, kind = np.asarray([gap, 0.0, gap + 1]), np.asarray([1.0, -2.0, 0.5]), getattr(torch, dtype)
    mass, weight = torch.tensor(k, dtype=kind), torch.tensor(u, dtype=kind)
    loss = weighted(lambda x: softk.topk(x, mass, epsilon=1.0), weight)
    for name in modes:
        loss = getattr(torch.func, name)(loss)
    assert_rows_close(host(loss(torch.tensor(x, dtype=kind))), curvature(x, k, 1.0, u), dtype)


# --- second and third derivatives


COMPOSITIONS = {
    "-".join(name.removeprefix("jac") for name in pair): pair
    for pair in itertools.product(["jacrev", "jacfwd"], repeat=2)
}


@pytest.mark.parametrize("pair", COMPOSITIONS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_derivatives_in_every_pair_of_arguments(function: str, pair: str, rng: Any) -> None:
    outer, inner = (getattr(torch.func, name) for name in COMPOSITIONS[pair])
    values = closed_form.problem(rng, "near-hard" if pair == "fwd-rev" else "soft", n=5)
    at = closed_form.Slice(**values)
    found = outer(inner(positional(function), ALL), ALL)(*tensors(values))
    for name, row in zip(ARGUMENTS, found, strict=True):
        for other, block in zip(ARGUMENTS, row, strict=True):
            assert_close(block, at.get(function, 2, name, other).reshape(block.shape), 1e-9)


#: Functions of the scores (4), a k and an epsilon: of every operator one.
OPERATORS = {
    "topk": lambda x, k, epsilon: softk.topk(x, k, epsilon=epsilon),
    "weights": lambda x, k, epsilon: softk.topk(x, k, epsilon=epsilon, weights=torch.exp(0.3 * x)),
    "hard": lambda x, k, epsilon: softk.topk(x, 2, epsilon=epsilon, hard=True),
    "log_topk": lambda x, k, epsilon: softk.log_topk(x, k, epsilon=epsilon),
    "threshold": lambda x, k, epsilon: softk.threshold(x, k, epsilon=epsilon, keepdims=True) * x,
    "quantile": lambda x, k, epsilon: softk.quantile(x, k / 4.0, epsilon=epsilon) * x,
    "budget": lambda x, k, epsilon: softk.budget.topk({"a": x[:1], "b": x[1:]}, k, epsilon=epsilon)["b"].sum() * x,
    "bounds": lambda x, k, epsilon: (
        softk.budget.topk({"a": x[:1], "b": x[1:]}, k, epsilon=epsilon, most={"a": 0.4, "b": 3.0})["b"].sum() * x
    ),
    "segment_topk": lambda x, k, epsilon: softk.segment_topk(x, 1, [2, 2], epsilon=epsilon) * k * x,
    "sorted_topk": lambda x, k, epsilon: softk.sorted_topk(x, 2, epsilon=epsilon).values.sum() * k * x,
    "sort": lambda x, k, epsilon: softk.sort(x, epsilon=epsilon) * k,
    "rank": lambda x, k, epsilon: softk.rank(x, epsilon=epsilon) * k,
    "rank, few anchors": lambda x, k, epsilon: softk.rank(x, epsilon=epsilon, num_anchors=3) * k,
    "transport": lambda x, k, epsilon: softk.transport(x, x[:3].cos(), k + x[1:].abs(), epsilon=epsilon).plan[:, 0],
    "assign": lambda x, k, epsilon: softk.assign(x[:, None] * x[:2], epsilon=epsilon[0]).plan[:, 0] * k,
    "neighbors": lambda x, k, epsilon: softk.neighbors.weights(x[:, None], x[:, None] + 0.1 * k, 2, epsilon=epsilon)[0],
    "attention": lambda x, k, epsilon: softk.attention.weights(x[None], x[:, None] * x, k, epsilon=epsilon)[0],
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_curvature_along_all_arguments_at_once(operator: str) -> None:
    """Reverse mode within forward mode, as for a product of a Hessian and a vector, and both beside differences.

    Where one argument moves alone, a tangent that is lost for the sake of another's is not seen.
    """
    x, k = torch.tensor([0.2, 1.7, -0.5, 0.9]).double(), torch.tensor([1.6]).double()
    epsilon, u = torch.tensor([0.5]).double(), torch.tensor([0.3, -1.0, 0.7, 0.2]).double()
    given, moved = (x, k, epsilon), (torch.tensor([0.1, 0.4, -0.3, 0.2]).double(), 0.7 * k, -0.5 * epsilon)
    gradient = torch.func.grad(weighted(OPERATORS[operator], u), (0, 1, 2))
    found = torch.func.jvp(gradient, given, moved)[1]

    def slope(h: float) -> list[Any]:
        ends = [
            gradient(*(value + sign * h * d for value, d in zip(given, moved, strict=True))) for sign in (1.0, -1.0)
        ]
        return [(one - other) / (2.0 * h) for one, other in zip(*ends, strict=True)]

    expected = [(4.0 * fine - coarse) / 3.0 for fine, coarse in zip(slope(5e-4), slope(1e-3), strict=True)]
    assert_close(torch.cat(found), torch.cat(expected), 1e-8)


def test_hessian(rng: Any) -> None:
    values = closed_form.problem(rng)
    at, u = closed_form.Slice(**values), random(rng, 7)
    found = torch.func.hessian(weighted(positional("topk"), u), ALL)(*tensors(values))
    for name, row in zip(ARGUMENTS, found, strict=True):
        for other, block in zip(ARGUMENTS, row, strict=True):
            expected = np.tensordot(host(u), at.get("topk", 2, name, other), 1)
            assert_close(block, expected.reshape(block.shape), 1e-9)


@pytest.mark.parametrize("weights", [False, True])
def test_hessian_of_the_quantile(weights: bool, rng: Any) -> None:
    values = closed_form.problem(rng, n=5)
    values["k"] = np.asarray(0.37)
    if not weights:
        del values["weights"]

    def f(x: Any, q: Any, epsilon: Any, weights: Any = None) -> Any:
        return softk.quantile(x, q, epsilon=epsilon, weights=weights)

    _, first, second = closed_form.quantile_derivatives(*values.values())
    place = closed_form.Slice(values["x"], 1.0, 1.0).place
    count = ALL[: len(values)]
    gradient = torch.func.grad(f, count)(*tensors(values))
    for outer in ("jacrev", "jacfwd"):
        found = getattr(torch.func, outer)(torch.func.jacfwd(f, count), count)(*tensors(values))
        for i, name in enumerate(values):
            assert_close(gradient[i], first[place[name]].reshape(gradient[i].shape))
            for j, other in enumerate(values):
                expected = second[place[name], place[other]]
                assert_close(found[i][j], expected.reshape(found[i][j].shape), 1e-9)


@pytest.mark.parametrize("modes", list(itertools.product(["jacrev", "jacfwd"], repeat=3)), ids="-".join)
def test_third_derivatives(modes: tuple[str, ...], rng: Any) -> None:
    """Against difference quotients of the closed second derivatives."""
    values = closed_form.problem(rng, n=4)
    u = random(rng, 4)
    f = weighted(positional("topk"), u)
    for name in modes:
        f = getattr(torch.func, name)(f, ALL)
    found = f(*tensors(values))
    for i, name in enumerate(ARGUMENTS):

        def second(value: np.ndarray, i: int = i, name: str = name) -> Any:
            at = closed_form.Slice(**{**values, name: value})
            return np.tensordot(host(u), at.mask2, 1)

        expected = closed_form.differences(second, values[name], 1e-3)
        at = closed_form.Slice(**values)
        for one, other in itertools.product(range(4), repeat=2):
            block = found[one][other][i]
            part = expected[at.place[ARGUMENTS[one]], at.place[ARGUMENTS[other]]]
            assert_close(block, part.reshape(block.shape), 1e-7)


# --- batching


def batched(values: dict[str, np.ndarray], dims: tuple[int | None, ...], rng: Any, size: int = 3) -> tuple[Any, ...]:
    """Arguments with a batch axis where dims says, each entry of it slightly another."""
    found = []
    for value, dim in zip(values.values(), dims, strict=True):
        if dim is None:
            found.append(torch.tensor(value))
        else:
            factor = rng.uniform(0.9, 1.1, (size, *value.shape))
            found.append(torch.tensor(factor * value).movedim(0, dim))
    return tuple(found)


def pick(given: tuple[Any, ...], dims: tuple[int | None, ...], i: int) -> tuple[Any, ...]:
    return tuple(value if dim is None else value.select(dim, i) for value, dim in zip(given, dims, strict=True))


EVERY_DIMS = [
    dims
    for dims in itertools.product((0, 1, None), (0, None), (0, None), (0, 1, None))
    if any(d is not None for d in dims)
]


@pytest.mark.parametrize("shape", [(), (2,)], ids=["slice", "slices"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_vmap_over_any_axes(function: str, shape: tuple[int, ...], rng: Any) -> None:
    f = positional(function)
    for dims in EVERY_DIMS:
        given = batched(closed_form.problem(rng, batch=shape), dims, rng)
        found = torch.func.vmap(f, dims)(*given)
        for i in range(3):
            one = pick(given, dims, i)
            expected = getattr(closed_form, function)(*(host(value) for value in one))
            expected = expected if function == "topk" else expected[..., 0]
            np.testing.assert_allclose(host(found[i]), expected.astype(float), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "dims", [(0, None, None, None), (1, 0, 0, 1), (None, 0, 0, None), (0, None, 0, 0), (None,) * 3 + (0,)]
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_vmap_of_grad_and_grad_of_vmap(function: str, dims: tuple[int | None, ...], rng: Any) -> None:
    f = positional(function)
    given = batched(closed_form.problem(rng), dims, rng)
    u = random(rng, *torch.func.vmap(f, dims)(*given).shape)
    inner = torch.func.vmap(lambda u, *one: torch.func.grad(weighted(f, u), ALL)(*one), (0, *dims))(u, *given)
    outer = torch.func.grad(weighted(torch.func.vmap(f, dims), u), ALL)(*given)
    sums = [torch.zeros_like(value) for value in given]
    for i in range(3):
        one = pick(given, dims, i)
        expected = closed_form.pullback(
            function,
            host(u[i]),
            {name: host(value) for name, value in zip(ARGUMENTS, one, strict=True)},
        )
        for name, gradient, total, dim in zip(ARGUMENTS, inner, sums, dims, strict=True):
            assert_close(gradient[i], expected[name])
            (total if dim is None else total.select(dim, i)).add_(torch.tensor(expected[name]))
    for gradient, total in zip(outer, sums, strict=True):
        assert_close(gradient, total)


@pytest.mark.parametrize("dims", [(0, None, None, None), (1, 0, 0, 1), (None, 0, 0, None), (0, None, 0, 0)])
def test_vmap_of_jvp_and_jvp_of_vmap(dims: tuple[int | None, ...], rng: Any) -> None:
    f = positional("topk")
    given = batched(closed_form.problem(rng), dims, rng)
    tangents = tuple(random(rng, *value.shape) for value in given)

    def push(given: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
        return torch.func.jvp(f, given, tangents)[1]

    inner = torch.func.vmap(push, (dims, dims))(given, tangents)
    _, outer = torch.func.jvp(torch.func.vmap(f, dims), given, tangents)
    for i in range(3):
        values, moved = ([host(value) for value in pick(some, dims, i)] for some in (given, tangents))
        named = dict(zip(ARGUMENTS, moved, strict=True)), dict(zip(ARGUMENTS, values, strict=True))
        expected = closed_form.push("topk", *named)
        assert_close(inner[i], expected)
        assert_close(outer[i], expected)


def test_vmap_of_the_hessian(rng: Any) -> None:
    dims = (0, None, 0, None)
    given = batched(closed_form.problem(rng, n=5), dims, rng)
    u = random(rng, 5)
    found = torch.func.vmap(torch.func.hessian(weighted(positional("topk"), u)), dims)(*given)
    for i in range(3):
        at = closed_form.Slice(*(host(value) for value in pick(given, dims, i)))
        assert_close(found[i], np.tensordot(host(u), at.get("topk", 2, "x", "x"), 1), 1e-9)


def test_nested_vmap(rng: Any) -> None:
    """Every score row with every k and every epsilon, by three maps."""
    x, k, epsilon = random(rng, 2, 6), torch.tensor([1.3, 2.6, 4.1]).double(), torch.tensor([0.4, 1.1]).double()
    vmap = torch.func.vmap
    f = partial(positional("topk"), weights=torch.tensor([0.5, 1.0, 1.0, 2.0, 1.0, 1.5]).double())
    found = vmap(vmap(vmap(f, (None, None, 0)), (None, 0, None)), (0, None, None))(x, k, epsilon)
    expected = closed_form.topk(
        host(x[:, None, None]),
        host(k[:, None, None]),
        host(epsilon[:, None]),
        host(f.keywords["weights"]),
    )
    assert_close(found, expected.astype(float), 1e-14)


def test_vmap_of_the_quantile(rng: Any) -> None:
    x, q = rng.standard_normal((4, 3)), np.asarray([[0.2, 0.5], [0.4, 0.9], [0.1, 0.8]])
    found = torch.func.vmap(lambda x, q: softk.quantile(x, q, epsilon=0.6), (1, 0))(torch.tensor(x), torch.tensor(q))
    expected = [[closed_form.quantile(x[:, i], q[i, j], 0.6)[0] for j in range(2)] for i in range(3)]
    assert_close(found, np.asarray(expected).astype(float), 1e-14)


def test_vmap_with_removed_items_and_a_hard_mask(rng: Any) -> None:
    x, where = random(rng, 3, 7), torch.tensor(rng.uniform(size=(3, 7)) < 0.8)
    where[:, :2] = True

    def f(x: Any, where: Any) -> Any:
        return softk.topk(x, 2, epsilon=0.7, where=where, hard=True)

    found = torch.func.vmap(f)(x, where)
    for i in range(3):
        assert torch.equal(found[i], f(x[i], where[i]))
    assert torch.equal(found.sum(-1), torch.full((3,), 2.0).double())


def test_out_dims_and_chunks(rng: Any) -> None:
    x = random(rng, 5, 7)

    def f(x: Any) -> Any:
        return softk.topk(x, 2.5, epsilon=0.7)

    whole = f(x)
    assert_close(torch.func.vmap(f, out_dims=1)(x), whole.T, 1e-15)
    assert_close(torch.func.vmap(f, chunk_size=2)(x), whole, 1e-15)


# --- dual numbers


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "names", [("x",), ("k",), ("epsilon",), ("weights",), ("k", "weights"), ARGUMENTS], ids="-".join
)
def test_dual_numbers(function: str, names: tuple[str, ...], rng: Any) -> None:
    from torch.autograd import forward_ad

    values = closed_form.problem(rng, batch=(3,))
    given = dict(zip(ARGUMENTS, tensors(values), strict=True))
    tangents = {name: rng.standard_normal(values[name].shape) for name in names}
    with forward_ad.dual_level():
        for name, tangent in tangents.items():
            given[name] = forward_ad.make_dual(given[name], torch.tensor(tangent))
        found = forward_ad.unpack_dual(positional(function)(**given)).tangent
    assert_close(found, closed_form.push(function, tangents, values))


def test_backward_of_a_dual_number(rng: Any) -> None:
    """Forward over reverse: a Hessian-vector product."""
    from torch.autograd import forward_ad

    values = closed_form.problem(rng)
    given, u, direction = tensors(values), random(rng, 7), random(rng, 7)
    x = given[0].requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, direction)
        out = positional("topk")(dual, *given[1:])
        (gradient,) = torch.autograd.grad(out, x, u)
        found = forward_ad.unpack_dual(gradient).tangent
    at = closed_form.Slice(**values)
    assert_close(found, np.tensordot(host(u), at.get("topk", 2, "x", "x"), 1) @ host(direction), 1e-9)


# torch's linearize reads constants through a graph module that does not hold them yet.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_linearize(rng: Any) -> None:
    values = closed_form.problem(rng, batch=(3,))
    tangents = {name: rng.standard_normal(value.shape) for name, value in values.items()}
    out, push = torch.func.linearize(positional("topk"), *tensors(values))
    assert_close(out, closed_form.topk(**values).astype(float), 1e-14)
    assert_close(push(*tensors(tangents)), closed_form.push("topk", tangents, values))


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobian_of_torch_autograd(strategy: str, rng: Any) -> None:
    values = closed_form.problem(rng)
    at = closed_form.Slice(**values)
    found = torch.autograd.functional.jacobian(positional("topk"), tensors(values), vectorize=True, strategy=strategy)
    for name, block in zip(ARGUMENTS, found, strict=True):
        assert_close(block, at.get("topk", 1, name).reshape(block.shape))
