"""Derivatives, in both directions and in every argument, against implicit differentiation in high precision.

Errors are relative to the largest entry of a derivative, over slices of one kind: 1e-11 in float64, 2e-5 in float32.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import softk
import softk._reference.threshold.rule
from softk.testing import EXACT, Oracle, Problem

from .libraries import BY_NAME, Library
from .oracles import FEW, PROBLEMS, Exact, Quantile, mixed, problem, problem_for

TOLERANCE = {"float64": 1e-11, "float32": 2e-5}

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
FUNCTIONS = pytest.mark.parametrize("function", ["topk", "log_topk", "threshold"])


def assert_close(name: str, found: np.ndarray, wanted: np.ndarray, dtype: str, part: Any = ...) -> None:
    """Relative to the largest entry."""
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    found, wanted = found[part].astype(np.float64), wanted[part]
    error, scale = np.max(np.abs(found - wanted)), np.max(np.abs(wanted))

    tolerance = TOLERANCE[dtype]
    assert error <= tolerance * scale, f"{name}: off by {error / scale if scale else error:.3g} of the largest"


def directions(shapes: dict[str, tuple[int, ...]], dtype: str) -> dict[str, np.ndarray]:
    """A random direction for each argument."""
    rng = np.random.default_rng(42)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def evaluate(lib: Library, f: Any, *arrays: np.ndarray, names: list[str], **options: Any) -> Any:
    """`f` of the library's arrays, the last of them by name; a dictionary of results, each brought back."""
    made = [lib.array(values) for values in arrays]
    places = len(made) - len(names)
    options = {name: lib.array(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}
    found = lib.call(f, *made[:places], **dict(zip(names, made[places:], strict=True)), **options)
    return {name: lib.numpy(values) for name, values in found.items()}


def check_pullback(lib: Library, function: str, case: Problem, dtype: str) -> None:
    """`softk.vjp` on one library, for a random cotangent, against the reference."""
    names = [name for name in case.arguments if name not in ("x", "k")]
    shape = case.x.shape[:-1] if function == "threshold" else case.x.shape
    u = directions({"u": shape}, dtype)["u"]

    def pullback(x: Any, k: Any, u: Any, **kwargs: Any) -> Any:
        return softk.vjp(getattr(softk, function), x, k, **kwargs)[1](u)

    given = [case.x, case.k, u, *(case.arguments[name] for name in names)]
    found = evaluate(lib, pullback, *given, names=names, **case.options)
    rows = [
        reference.vjp(b=u[i]) if function == "threshold" else reference.vjp(u[i], log=function == "log_topk")
        for i, reference in enumerate(case.oracles)
    ]
    assert set(found) == set(case.arguments)
    for name in case.arguments:
        wanted = np.stack([np.atleast_1d(row[name]) for row in rows])
        for label, part in case.parts:
            assert_close(f"{label}, cotangent of {name}", found[name], wanted, dtype, part)


def check_pushforward(lib: Library, function: str, case: Problem, dtype: str, moved: tuple[str, ...]) -> None:
    """`softk.jvp` on one library, for random tangents of the arguments `moved`, against the reference."""
    names = [name for name in case.arguments if name not in ("x", "k")]
    tangents = directions({name: case.arguments[name].shape for name in moved}, dtype)

    def pushforward(x: Any, k: Any, *moves: Any, **kwargs: Any) -> Any:
        given = dict(zip(moved, moves, strict=True))
        return dict(
            zip(("out", "rate"), softk.jvp(getattr(softk, function), x, k, tangents=given, **kwargs), strict=True)
        )

    given = [case.x, case.k, *tangents.values(), *(case.arguments[name] for name in names)]
    found = evaluate(lib, pushforward, *given, names=names, **case.options)["rate"]
    rows = []
    for i, reference in enumerate(case.oracles):
        row = {f"d{name}": tangents[name][i] for name in moved}
        row |= {name: value[0] for name, value in row.items() if name in ("dk", "depsilon")}
        rows.append(
            reference.log_jvp(**row) if function == "log_topk" else reference.jvp(**row)[function == "threshold"]
        )
    for label, part in case.parts:
        assert_close(f"{label}, rate with {', '.join(moved)}", found, np.stack(rows), dtype, part)


# --- the mask and the threshold


def _spare(lib: Library, name: str, function: str) -> None:
    if "jax" in lib.name and function == "log_topk" and name != "weighted":
        pytest.skip("compiling takes too long; run on one problem, and by the other libraries")


@DTYPES
@FUNCTIONS
@pytest.mark.parametrize("name", PROBLEMS)
def test_pullback(lib: Library, name: str, function: str, dtype: str) -> None:
    _spare(lib, name, function)
    check_pullback(lib, function, problem_for(lib, name, dtype), dtype)


@DTYPES
@FUNCTIONS
@pytest.mark.parametrize("name", PROBLEMS)
def test_pushforward(lib: Library, name: str, function: str, dtype: str) -> None:
    _spare(lib, name, function)
    case = problem_for(lib, name, dtype)
    check_pushforward(lib, function, case, dtype, tuple(case.arguments))


@DTYPES
@FUNCTIONS
@pytest.mark.parametrize("moved", ["x", "k", "epsilon", "weights"])
@pytest.mark.parametrize("library", ["numpy", "array-api-strict", "torch"])
def test_pushforward_along_one_argument(library: str, moved: str, function: str, dtype: str) -> None:
    BY_NAME[library].require()
    check_pushforward(BY_NAME[library], function, problem("weighted", dtype), dtype, (moved,))


@pytest.mark.parametrize("axis", [0, 1])
def test_pullback_along_another_axis(lib: Library, axis: int, rng: np.random.Generator) -> None:
    """The other axes stay in their places, and shared arguments get the sum over the slices."""
    if "traced" in lib.tags:
        pytest.skip("compiling takes too long; run without the outer jit")
    x, u = rng.normal(size=(2, 5, 6, 4))
    weights = rng.uniform(0.5, 2.0, size=x.shape)
    options = {"axis": axis, "epsilon": 0.4}

    def pullback(x: Any, k: Any, u: Any, weights: Any) -> Any:
        return softk.vjp(softk.topk, x, k, weights=weights, **options)[1](u)

    found = evaluate(lib, pullback, x, np.asarray(2.0), u, weights, names=["weights"])
    wanted = {"x": np.zeros(x.shape), "weights": np.zeros(x.shape), "k": np.zeros(())}
    views = [np.moveaxis(values, axis, -1) for values in (x, u, weights, wanted["x"], wanted["weights"])]
    for place in np.ndindex(views[0].shape[:-1]):
        values, cotangent, counts, xbar, abar = (view[place] for view in views)
        row = Oracle(values, 2.0, 0.4, counts).vjp(cotangent)
        xbar[:], abar[:] = row["x"], row["weights"]
        wanted["k"] += row["k"]
    for name, values in wanted.items():
        assert_close(name, found[name], values, "float64")


# --- the quantile


def _quantile_case(dtype: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    case = {
        "x": rng.normal(size=(3, 30)),
        "q": np.asarray([0.21, 0.5, 0.937]),
        "epsilon": np.asarray([[0.1], [0.3], [1.0]]),
        "weights": rng.uniform(0.5, 2.5, size=(3, 30)),
    }
    case = {name: values.astype(dtype) for name, values in case.items()}
    return case | {"where": rng.uniform(size=(3, 30)) < 0.7}


QUANTILES = pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ("", "float64"),
        ("weights", "float64"),
        ("weights", "float32"),
        ("where", "float64"),
        ("weights where", "float64"),
    ],
)


@QUANTILES
def test_quantile_pullback(lib: Library, given: str, dtype: str) -> None:
    if "traced" in lib.tags or ("jax" in lib.name and (given != "weights where" or dtype == "float32")):
        pytest.skip("compiling takes too long; run on one problem, and by the other libraries")
    case = _quantile_case(dtype)
    names = ["epsilon", "weights"] if "weights" in given else ["epsilon"]
    options = {"where": case["where"]} if "where" in given else {}
    u = directions({"u": (3, 3)}, dtype)["u"]

    def pullback(x: Any, q: Any, u: Any, **kwargs: Any) -> Any:
        return softk.vjp(softk.quantile, x, q, **kwargs)[1](u)

    found = evaluate(lib, pullback, case["x"], case["q"], u, *(case[name] for name in names), names=names, **options)
    wanted = {name: np.zeros(case[name].shape) for name in ("x", "q", *names)}
    for j, i in np.ndindex(3, 3):
        row = _quantile(case, i, j, given).vjp(u[j, i])
        for name, place in {"x": i, "q": j, "epsilon": i, "weights": i}.items():
            if name in wanted:
                wanted[name][place] += row[name]
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        assert_close(name, found[name], values, dtype)


@QUANTILES
def test_quantile_pushforward(lib: Library, given: str, dtype: str) -> None:
    if "traced" in lib.tags or ("jax" in lib.name and (given != "weights where" or dtype == "float32")):
        pytest.skip("compiling takes too long; run on one problem, and by the other libraries")
    case = _quantile_case(dtype)
    names = ["epsilon", "weights"] if "weights" in given else ["epsilon"]
    options = {"where": case["where"]} if "where" in given else {}
    moved = ("x", "q", *names)
    tangents = directions({name: case[name].shape for name in moved}, dtype)

    def pushforward(x: Any, q: Any, *moves: Any, **kwargs: Any) -> Any:
        along = dict(zip(moved, moves, strict=True))
        return {"rate": softk.jvp(softk.quantile, x, q, tangents=along, **kwargs)[1]}

    arrays = [case["x"], case["q"], *tangents.values(), *(case[name] for name in names)]
    found = evaluate(lib, pushforward, *arrays, names=names, **options)["rate"]
    wanted = np.zeros((3, 3))
    for j, i in np.ndindex(3, 3):
        row = {"dx": tangents["x"][i], "dq": tangents["q"][j], "depsilon": tangents["epsilon"][i, 0]}
        row |= {"dweights": tangents["weights"][i]} if "weights" in given else {}
        wanted[j, i] = _quantile(case, i, j, given).jvp(**row)
    assert_close("rate", found, wanted, dtype)


def _quantile(case: dict[str, np.ndarray], i: int, j: int, given: str) -> Quantile:
    named = {name: case[name][i] for name in given.split()}
    return Quantile(case["x"][i], case["q"][j], case["epsilon"][i, 0], **named)


@pytest.mark.parametrize("given", ["", "weights", "where", "weights where"])
def test_quantile_values(lib: Library, given: str) -> None:
    if "jax" in lib.name and given not in ("where", "weights where"):
        pytest.skip("compiling takes too long; run on two problems, and by the other libraries")
    case = _quantile_case("float64")
    named = {name: case[name] for name in given.split()}
    found = lib.evaluate(softk.quantile, case["x"], case["q"], epsilon=case["epsilon"], **named)
    wanted = [[_quantile(case, i, j, given).value for i in range(3)] for j in range(3)]
    np.testing.assert_allclose(found, wanted, rtol=0.0, atol=1e-13)


def test_quantile_near_the_top_of_a_total_that_is_not_whole() -> None:
    """The mass of the last threshold is held at 1/2 there, and does not follow the weights."""
    x, weights = np.asarray([0.3, 1.1, -0.4, 2.0]), np.asarray([1.3, 0.7, 1.1, 1.2])
    wanted = Quantile(x, 0.98, 0.5, weights)
    assert wanted.held
    out, pullback = softk.vjp(softk.quantile, x, np.asarray(0.98), epsilon=0.5, weights=weights)
    assert abs(out - wanted.value) <= 1e-14
    for name, values in wanted.vjp(1.0).items():
        if name != "epsilon":
            assert_close(name, pullback(np.asarray(1.0))[name], np.asarray(values), "float64")


@pytest.mark.parametrize("lib", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("total", [1.02, 1.7, 2.6])
def test_quantile_of_few_observations(lib: str, total: float) -> None:
    """The frequencies of the items that are left sum to little more than 1; those that are removed are many."""
    library = BY_NAME[lib]
    library.require()
    rng = np.random.default_rng(8)
    x, where = rng.normal(size=12), np.arange(12) % 4 != 1
    weights = rng.uniform(0.2, 1.0, 12)
    weights *= total / weights[where].sum()
    weights[~where] = [50.0, np.nan, -1.0]
    q, epsilon, u = np.asarray(0.64), np.asarray(0.15), 0.7
    wanted = Quantile(x, 0.64, 0.15, np.where(where, weights, 0.0), where)

    def run(x: Any, q: Any, epsilon: Any, weights: Any, where: Any, tangents: Any) -> Any:
        options = {"epsilon": epsilon, "weights": weights, "where": where}
        out, pullback = softk.vjp(softk.quantile, x, q, **options)
        _, rate = softk.jvp(softk.quantile, x, q, **options, tangents=tangents)
        return out, pullback(u + 0.0 * out), rate

    given = {"x": x, "q": q, "epsilon": epsilon, "weights": weights}
    tangents = {name: rng.normal(size=value.shape) for name, value in given.items()}
    moved = {name: library.array(value) for name, value in tangents.items()}
    out, found, rate = run(*(library.array(value) for value in (*given.values(), where)), moved)
    assert abs(library.numpy(out) - wanted.value) <= 1e-14
    for name, values in wanted.vjp(u).items():
        assert_close(name, library.numpy(found[name]), np.asarray(values), "float64")
    along = {f"d{name}": np.where(where, v, 0.0) if name == "weights" else v for name, v in tangents.items()}
    assert_close("rate", library.numpy(rate), np.asarray(wanted.jvp(**along)), "float64")


# --- native gradients


NATIVE = pytest.mark.parametrize("name", [*FEW, "smallest", "where weighted"])


@FUNCTIONS
@NATIVE
def test_native_gradients_of_torch(name: str, function: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    case, f = problem(name, "float64"), getattr(softk, function)
    arguments = {key: torch.asarray(values.copy()).requires_grad_() for key, values in case.arguments.items()}
    options = {key: torch.asarray(v.copy()) if isinstance(v, np.ndarray) else v for key, v in case.options.items()}
    out = f(arguments["x"], arguments["k"], **_rest(arguments), **options)
    u = torch.asarray(directions({"u": tuple(out.shape)}, "float64")["u"])
    out.backward(u)
    plain = {key: value.detach() for key, value in arguments.items()}
    _, pullback = softk.vjp(f, plain["x"], plain["k"], **_rest(plain), **options)
    for key, wanted in pullback(u).items():
        _assert_same(arguments[key].grad.numpy(), wanted.numpy())


@FUNCTIONS
@pytest.mark.parametrize("name", ["where weighted"])
def test_native_gradients_of_jax(name: str, function: str) -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    case, f = problem(name, "float64"), getattr(softk, function)
    arguments = {key: jax.numpy.asarray(values) for key, values in case.arguments.items()}
    options = {key: jax.numpy.asarray(v) if isinstance(v, np.ndarray) else v for key, v in case.options.items()}
    out, pullback = softk.vjp(f, arguments["x"], arguments["k"], **_rest(arguments), **options)
    u = jax.numpy.asarray(directions({"u": out.shape}, "float64")["u"])
    wanted = pullback(u)

    def loss(arguments: Any) -> Any:
        return jax.numpy.sum(u * f(arguments["x"], arguments["k"], **_rest(arguments), **options))

    found = jax.jit(jax.grad(loss))(arguments)
    assert set(found) == set(wanted)
    for key in wanted:
        _assert_same(np.asarray(found[key]), np.asarray(wanted[key]))


def _rest(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in ("x", "k")}


def _assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    assert np.max(np.abs(found - wanted)) <= 1e-12 * np.max(np.abs(wanted))


# --- the tests tested: the reference's derivatives are differences, and a broken rule does not pass


@pytest.mark.parametrize("name", ["plain", "weighted", "where weighted", "smallest", "n = 2"])
def test_the_reference_against_differences(name: str) -> None:
    """Central differences in 120 digits have 40 good ones."""
    case = PROBLEMS[name]
    step = EXACT.array(1e-30)[()]
    for i in range(len(case.x)):
        reference = Exact(**case.row(i), mode=case.mode)
        moves = {
            key: move[i] for key, move in directions({k: v.shape for k, v in case.arguments.items()}, "f8").items()
        }
        mask, threshold = reference.rates(
            moves["x"], moves["k"][0], moves["epsilon"][0], moves.get("weights", np.zeros(case.x.shape[1]))
        )

        def moved(sign: int, at: Oracle = reference, moves: dict[str, Any] = moves) -> Oracle:
            other = copy.copy(at)
            h, number = sign * step, at.number
            other.x = at.x + h * at.sign * number(moves["x"][at.kept])
            if "weights" in moves:
                other.a = at.a + h * number(moves["weights"][at.kept])
            other.held = at.held + h * number(moves["k"])[0]
            other.tau = at.tau + h * number(moves["epsilon"])[0] / 2
            other.solve()
            return other

        high, low = moved(1), moved(-1)
        slope = (high.m - low.m) / (2 * step)
        assert max(abs(slope - mask)) <= 1e-25 * max(abs(mask))
        rate = reference.sign * (high.t - low.t) / (2 * step)
        assert abs(rate - threshold) <= 1e-25 * (abs(threshold) + abs(reference.t))
        # The two directions are transposes of each other.
        u = np.random.default_rng(i).normal(size=case.x.shape[1])
        bars = reference.vjp(u, 0.7)
        paired = sum(float(np.sum(bars[key] * move)) for key, move in moves.items())
        direct = float(np.sum(u * reference._items(mask)) + 0.7 * float(threshold))
        size = sum(float(np.sum(np.abs(bars[key] * move))) for key, move in moves.items())
        assert abs(paired - direct) <= 1e-13 * size


def _unweighted(rule: Any) -> Any:
    rule = copy.copy(rule)
    rule.weights = np.ones_like(rule.weights)
    return rule


def _parts(rule: Any) -> tuple[np.ndarray, np.ndarray]:
    """v and p, from the mask."""
    v = rule.mask() * (1.0 - rule.mask())
    share = rule.weights * v
    return v, share / np.sum(share, axis=-1, keepdims=True)


def _broken_pulls(pull: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    def drop_a_weight(rule: Any, u: Any, *others: Any) -> Any:
        return pull(_unweighted(rule), u, *others)

    def swap_the_transpose(rule: Any, u: Any, *others: Any) -> Any:
        v, p = _parts(rule)
        _, *found = pull(rule, u, *others)
        return v * (u - np.sum(p * u, axis=-1, keepdims=True)) / rule.tau, *found

    def zero_dk(rule: Any, u: Any, *others: Any) -> Any:
        xbar, kbar, *found = pull(rule, u, *others)
        return xbar, 0.0 * kbar, *found

    return {f.__name__: f for f in (drop_a_weight, swap_the_transpose, zero_dk)}


def _broken_pushes(push: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    def drop_a_weight(rule: Any, *tangents: Any) -> Any:
        return push(_unweighted(rule), *tangents)

    def swap_the_transpose(rule: Any, dx: Any, dk: Any, dtau: Any, da: Any) -> Any:
        v, p = _parts(rule)
        dm, *others = push(rule, None, dk, dtau, da)
        return dm + (v * dx - p * np.sum(v * dx, axis=-1, keepdims=True)) / rule.tau, *others

    def zero_dk(rule: Any, dx: Any, dk: Any, dtau: Any, da: Any) -> Any:
        return push(rule, dx, None, dtau, da)

    return {f.__name__: f for f in (drop_a_weight, swap_the_transpose, zero_dk)}


@pytest.mark.parametrize("fault", ["drop_a_weight", "swap_the_transpose", "zero_dk"])
@pytest.mark.parametrize("direction", ["pull", "push"])
def test_a_broken_rule_is_caught(fault: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, numpy = problem("weighted", "float64"), BY_NAME["numpy"]
    rule = softk._reference.threshold.rule.Linearization

    def check() -> None:
        with softk.kernels("none"):  # a kernel has a rule of its own
            if direction == "pull":
                check_pullback(numpy, "topk", case, "float64")
            else:
                check_pushforward(numpy, "topk", case, "float64", tuple(case.arguments))

    check()
    broken = (_broken_pulls if direction == "pull" else _broken_pushes)(getattr(rule, direction))
    monkeypatch.setattr(rule, direction, broken[fault])
    with pytest.raises(AssertionError, match="of the largest"):
        check()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("kind", ["Linearization", "LogLinearization"])
def test_a_rule_may_be_used_twice(kind: str, balanced: bool, weighted: bool, rng: np.random.Generator) -> None:
    """Neither direction changes what the other one, or the same one with another cotangent, computes."""
    backend = softk.backend.backend_of(np.ones(1))
    x, weights, where = rng.normal(size=(3, 40)), rng.uniform(0.5, 2.0, size=(3, 40)), rng.uniform(size=(3, 40)) < 0.9
    given = (x, np.full((3, 1), 6.5), np.full((3, 1), 0.2), *((weights, where) if weighted else (None, None)))
    solve = importlib.import_module("softk._reference.threshold.solve").solve
    reference, offset, _ = solve(backend, *given, None)

    def linearize() -> Any:
        return getattr(softk._reference.threshold.rule, kind)(backend, given, reference, offset, balanced=balanced)

    rule, needed = linearize(), (True, True, True, weighted)
    for _ in range(2):
        cotangents = rng.normal(size=(3, 40)), rng.normal(size=(3, 1)), rng.normal(size=(3, 1))
        before = [value.copy() for value in cotangents]
        for found, wanted in zip(rule.pull(*cotangents, needed), linearize().pull(*cotangents, needed), strict=True):
            np.testing.assert_array_equal(found, wanted)
        for found, wanted in zip(rule.push(*cotangents, None), linearize().push(*cotangents, None), strict=True):
            np.testing.assert_array_equal(found, wanted)
        for value, kept in zip(cotangents, before, strict=True):
            np.testing.assert_array_equal(value, kept)


def test_what_stands_at_a_removed_item_does_no_harm() -> None:
    """A NaN in a tangent or a cotangent there is nobody's, as one in the scores is."""
    x, where = np.asarray([1.0, 2.0, 3.0, np.nan]), np.asarray([True, True, True, False])
    weights, u = np.ones(4), np.asarray([0.3, -1.0, 2.0, 0.0])
    spoiled = np.where(where, u, np.nan)
    for f in (softk.topk, softk.log_topk):
        _, pullback = softk.vjp(f, x, 1.5, weights=weights, where=where)
        for name, values in pullback(u).items():
            np.testing.assert_array_equal(pullback(spoiled)[name], values)
        for name in ("x", "weights"):
            _, wanted = softk.jvp(f, x, 1.5, weights=weights, where=where, tangents={name: u})
            _, found = softk.jvp(f, x, 1.5, weights=weights, where=where, tangents={name: spoiled})
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_second_derivatives_are_finite_where_the_first_are_held(dtype: str) -> None:
    """All the weight is selected, and an item without any is far away: 1 / V is more than a number can be."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    given = [torch.tensor(values, dtype=getattr(torch, dtype)) for values in ([0.0, 100.0], 1.0, 0.01, [0.0, 1.0])]
    x, k, epsilon, weights = arguments = [value.requires_grad_() for value in given]
    mask = softk.topk(x, k, epsilon=epsilon, weights=weights)
    first = torch.autograd.grad((mask * torch.tensor([0.3, -1.0])).sum(), arguments, create_graph=True)
    for gradient in first:
        for second in torch.autograd.grad(gradient.sum(), arguments, retain_graph=True, allow_unused=True):
            assert second is None or bool(torch.isfinite(second).all())


@pytest.mark.parametrize(
    ("dtype", "size"), [("float64", 1e-320), ("float64", 1e300), ("float32", 1e-42), ("float32", 1e30)]
)
def test_weights_of_any_size(dtype: str, size: float, rng: np.random.Generator) -> None:
    """The scores' derivative follows the proportions of the weights; what overflows is held, and nothing is NaN."""
    x, u = rng.normal(size=(2, 20)).astype(dtype)
    weights = (rng.uniform(0.5, 2.0, size=20) * size).astype(dtype)
    weights[3] = 0.0
    k = (0.3 * weights.sum()).astype(dtype)
    found = softk.vjp(softk.topk, x, k, weights=weights)[1](u)
    assert all(np.all(np.isfinite(value)) for value in found.values())
    like = weights.astype(np.float64) / size
    wanted = softk.vjp(softk.topk, x.astype(np.float64), np.asarray(float(k) / size), weights=like)[1](u.astype(float))
    tolerance = 5e-3 if size < 1e-40 else 1e-5  # a subnormal number has few digits
    np.testing.assert_allclose(found["x"], wanted["x"], rtol=0.0, atol=tolerance * np.abs(wanted["x"]).max())


def test_a_slice_on_which_nothing_depends_has_no_derivative_in_either_direction() -> None:
    """Fewer selectable scores than k: the threshold is infinite, and both rules agree that nothing moves it."""
    x = np.asarray([-np.inf, -np.inf, 1.0, 2.0])
    _, pullback = softk.vjp(softk.threshold, x, 3)
    _, rate = softk.jvp(softk.threshold, x, 3, tangents={"x": np.asarray([0.5, -1.0, 2.0, 3.0])})
    np.testing.assert_array_equal(pullback(np.asarray(1.0))["x"], np.zeros(4))
    assert rate == 0.0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("f", [softk.topk, softk.log_topk])
def test_where_one_score_has_all_but_next_to_nothing(f: Any, weighted: bool, rng: np.random.Generator) -> None:
    """p is 1 for one score, but for 1e-8 to 1e-30: what the others have is all there is of the derivative."""
    for _ in range(60):
        x = (np.arange(4) * rng.uniform(0.5, 1.7)).astype("float32")
        weights = rng.uniform(0.5, 2.0, size=4).astype("float32") if weighted else None
        masses = np.ones(4, "float32") if weights is None else weights
        j = int(rng.integers(1, 4))
        k = np.float32(masses[4 - j :].sum() - masses[4 - j] * rng.uniform(0.1, 0.9))
        u, dx = rng.normal(size=(2, 4)).astype("float32")
        given = {} if weights is None else {"weights": weights}
        reference = Oracle(x, k, np.float32(0.05), **given)
        found = softk.vjp(f, x, k, epsilon=np.asarray(np.float32(0.05)), **given)[1](u)
        wanted = reference.vjp(u, log=f is softk.log_topk)
        terms = {"x": wanted["x"], "epsilon": wanted["x"] * reference.z.astype(float)}  # whose sum may be far smaller
        for name, parts in terms.items():
            np.testing.assert_allclose(found[name], wanted[name], rtol=0.0, atol=2e-5 * np.max(np.abs(parts)))
        pushed = softk.jvp(f, x, k, epsilon=np.float32(0.05), **given, tangents={"x": dx})[1]
        want = reference.log_jvp(dx=dx) if f is softk.log_topk else reference.jvp(dx=dx)[0]
        np.testing.assert_allclose(pushed, want, rtol=0.0, atol=2e-5 * np.max(np.abs(want)))


BESIDE = [
    (dtype, spacing, steps)
    for dtype, spacing in (("float32", 30.0), ("float64", 30.0), ("float32", 10.0), ("float64", 70.0))
    for steps in (-5, -1, 1, 2, 8, 20)
]


def test_a_mass_that_is_a_few_roundings_off_a_whole_number(eager: Library) -> None:
    """What it lacks of the whole number is one score's to supply, and is known exactly."""
    u = np.asarray([0.3, -1.0, 0.7, 0.2])
    for dtype, spacing, steps in BESIDE:
        x, k = (spacing * np.arange(3.0, -1.0, -1.0)).astype(dtype), np.asarray(2.0, dtype)
        k = k + np.asarray(steps, dtype) * np.spacing(k)
        reference = Oracle(x, k, 1.0)
        wanted = reference.vjp(u.astype(dtype))["k"]
        for epsilon in (1.0, np.asarray(1.0, dtype)):
            found = evaluate(
                eager,
                lambda x, k, u, **given: softk.vjp(softk.topk, x, k, **given)[1](u),
                *(x, k, u.astype(dtype)),
                names=[],
                epsilon=epsilon,
            )
            assert_close("k", found["k"], np.asarray(wanted), dtype)
        pushed = evaluate(
            eager,
            lambda x, k, dk: {"": softk.jvp(softk.topk, x, k, epsilon=1.0, tangents={"k": dk})[1]},
            *(x, k, np.asarray(1.0, dtype)),
            names=[],
        )
        assert_close("along k", pushed[""], reference.jvp(dk=1.0)[0], dtype)


@pytest.mark.parametrize(
    ("dtype", "epsilon"),
    [*(("float32", size) for size in (1e-2, 1e-5, 1e-9)), *(("float64", size) for size in (1e-3, 1e-10, 1e-14, 1e-60))],
)
@pytest.mark.parametrize("kind", ["plain", "tied", "weighted", "weightless", "beside"])
def test_derivatives_in_a_gap_of_any_width(dtype: str, epsilon: float, kind: str, rng: np.random.Generator) -> None:
    """p is exact to rounding where |z| is not, for scores whose distances on either side are those of the reference."""
    eps = float(np.finfo(dtype).eps)
    near = epsilon * np.round(rng.normal(size=9), 2) if epsilon > 8.0 * eps else np.zeros(9)
    x = (np.where(np.arange(9) < 4, 1.375, 0.25) + (0.0 if kind == "tied" else near)).astype(dtype)
    size = np.asarray(epsilon, dtype)[()]
    weights = np.round(8.0 * rng.uniform(0.5, 2.5, size=9)).astype(dtype) / 8 if kind.startswith("weight") else None
    if kind == "weightless":
        weights[[1, 6]] = 0.0
    k = float((np.ones(9) if weights is None else weights)[:4].sum()) + (4 * eps if kind == "beside" else 0.0)
    u, dx = rng.normal(size=(2, 9)).astype(dtype)
    given = {"epsilon": float(size), **({} if weights is None else {"weights": weights})}
    reference = Oracle(x, np.asarray(k, dtype)[()], size, weights)
    mass = np.asarray(k, dtype)
    found = softk.vjp(softk.topk, x, mass, **given)[1](u)
    wanted = reference.vjp(u)
    for name in ("k", "weights") if weights is not None else ("k",):
        assert_close(name, np.asarray(found[name]), np.asarray(wanted[name]), dtype)
    if np.max(np.abs(wanted["x"])) > 1e-25:  # elsewhere float32 has no number for it
        assert_close("x", found["x"], wanted["x"], dtype)
    assert_close(
        "along k",
        softk.jvp(softk.topk, x, mass, **given, tangents={"k": np.ones_like(mass)})[1],
        reference.jvp(dk=1.0)[0],
        dtype,
    )
    found = softk.vjp(softk.threshold, x, mass, **given)[1](np.ones_like(mass)[()])
    assert_close("the threshold's x", found["x"], reference.vjp(b=1)["x"], dtype)
    found = softk.vjp(softk.log_topk, x, mass, **given)[1](u)
    assert_close("the log mask's x", found["x"] * size, reference.vjp(u, log=True)["x"] * float(size), dtype)
    pushed = softk.jvp(softk.log_topk, x, mass, **given, tangents={"x": dx})[1]
    assert_close("the log mask along x", pushed * size, reference.log_jvp(dx=dx) * float(size), dtype)


@DTYPES
@pytest.mark.parametrize("weighted", [False, True])
def test_a_gap_between_neighboring_numbers(
    eager: Library, weighted: bool, dtype: str, rng: np.random.Generator
) -> None:
    """Whose midpoint is rounded to one of them: either tail is measured from its own score all the same."""
    eps, rows, n = float(np.finfo(dtype).eps), 8, 20
    base = (1.0 + eps * np.arange(rows)[:, None]).astype(dtype)
    x = np.tile(base - np.asarray(10.0, dtype), (1, n))
    x[:, 0], x[:, 1:3] = base[:, 0], np.nextafter(base, np.asarray(2.0, dtype))
    epsilon = np.full(
        (rows, 1), 2.0 * eps / (2.5 * float(np.log(1.0 / eps))), dtype
    )  # the gap is so wide that it is narrowed
    weights = np.round(8.0 * rng.uniform(0.5, 2.0, size=n)).astype(dtype) / 8 if weighted else None
    k = np.full((rows, 1), 2.0 if weights is None else float(weights[1:3].sum()), dtype)
    u = rng.normal(size=x.shape).astype(dtype)
    given = [*(() if weights is None else (np.broadcast_to(weights, x.shape).copy(),))]
    names = ["weights"] if weighted else []

    def pull(x: Any, k: Any, u: Any, epsilon: Any, **given: Any) -> Any:
        mask, pullback = softk.vjp(softk.topk, x, k, epsilon=epsilon, **given)
        return {"mask": mask, **{name: value for name, value in pullback(u).items() if name in ("x", "k")}}

    found = evaluate(eager, pull, x, k, u, epsilon, *given, names=names)
    for i in range(rows):
        reference = Oracle(x[i], k[i][0], epsilon[i][0], weights)
        wanted = reference.vjp(u[i].astype(float))
        assert np.max(np.abs(found["mask"][i] - reference.mask)) <= 32.0 * eps
        assert_close("x", found["x"][i], wanted["x"], dtype)
        assert_close("k", found["k"][i], np.asarray([wanted["k"]]), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_gap_as_wide_as_a_derivative_sees(eager: Library, dtype: str, rng: np.random.Generator) -> None:
    """Below, at and above the width from which a fractional k is said to lie beside one side of the gap."""
    largest = float(np.finfo(dtype).max)
    width = np.linspace(0.96, 1.02, 13)[:, None] * 0.5 * float(np.log(0.5 * largest))  # in units of epsilon
    rows = len(width)
    x = np.concatenate([width, np.zeros((rows, 1)), np.full((rows, 1), -3.0), np.full((rows, 1), -9e3)], axis=1)
    x, k, epsilon = x.astype(dtype), np.full((rows, 1), 1.44, dtype), np.ones((rows, 1), dtype)
    u = rng.normal(size=x.shape).astype(dtype)

    def pull(x: Any, k: Any, u: Any, epsilon: Any) -> Any:
        pullback = softk.vjp(softk.topk, x, k, epsilon=epsilon)[1]
        return {name: value for name, value in pullback(u).items() if value is not None}

    found = evaluate(eager, pull, x, k, u, epsilon, names=[])
    for i in range(rows):
        wanted = Oracle(x[i], k[i][0], epsilon[i][0]).vjp(u[i].astype(float))
        for name in ("x", "k", "epsilon"):
            assert_close(name, found[name][i], np.atleast_1d(wanted[name]), dtype)


def test_derivative_in_k_where_the_gap_is_wider_than_a_number_resolves() -> None:
    """|z| of 2e8 in float32, where neighbors are 16 apart; the mean of the means of either side, however wide."""
    x = np.asarray([0.0] * 11 + [1e6] * 2, np.float32)
    u = np.cos(np.arange(13.0)).astype(np.float32)
    found = softk.vjp(softk.topk, x, np.asarray(np.float32(2.0)), epsilon=np.asarray(np.float32(0.00848)))[1](u)
    np.testing.assert_allclose(found["k"], 0.5 * u[:11].mean() + 0.5 * u[11:].mean(), rtol=2e-6)


# --- numbers of any size


#: Scores, mass, temperature and weights, by what is special about them.
EXTREME: dict[str, tuple[list[float], float, float, list[float] | None]] = {
    "far above": ([3.0, 2.0, 0.0], 1.7, 1e-5, [1.5, 0.75, 1.0]),
    "farther": ([3.0, 2.0, 0.0], 1.7, 1e-10, [1.5, 0.75, 1.0]),
    "far below": ([3.0, 2.0, 0.0], 2.0, 1e-6, [1.5, 0.75, 1.0]),
    "near the end": ([3.0, 2.0, 0.0], 2.9, 1e-9, [1.5, 0.75, 1.0]),
    "tied": ([0.47, 0.47, 0.1], 1.4092808, 2.1e-9, [0.5214, 0.9133, 0.2105]),
    "nearly hard": ([3.0, 2.0, 0.0], 1.6, 1e-16, None),
    "next to nothing": ([1.0, 0.5, 0.0], 1e-22, 0.5, [1.5, 0.75, 1.0]),
    "next to nothing, hard": ([1.0, 0.5, 0.0], 1e-22, 1e-10, None),
    "just a number": ([-1.946, 0.1603, 0.1788], 8.5e-20, 0.339, None),
    "wide gap": ([1.2197825, 1.0874178, 1.1952306, 1.0020956, 1.0647597, 0.01], 5.0, 0.0207, None),
    "nearly tied": ([-12.0564, 8.0608, -12.0561, 8.0517, 0.6142, 8.0418], 3.7, 1.5, [1.0, 2.0, 1.5, 0.7, 1.0, 1.2]),
}


def _assert_close_in_range(label: Any, found: Any, wanted: Any, dtype: str, size: float = 0.0) -> None:
    """Where float32 has a number for what is wanted; relative to its largest, or to that of the terms of a sum."""
    wanted, info = np.asarray(wanted, float), np.finfo(dtype)
    if np.max(np.abs(wanted)) < 0.5 * (0.5 * float(info.max)) ** 0.5:  # larger ones are held
        assert found.dtype == dtype
        scale = max(np.max(np.abs(wanted)), size, float(info.smallest_normal) / TOLERANCE[dtype], 1e-90)
        assert np.max(np.abs(found - wanted)) <= TOLERANCE[dtype] * scale, (label, dtype, found, wanted)


def _terms_by_k(reference: Oracle, u: Any, function: str) -> float:
    """The size of the terms of the cotangent of k, whose sum may be far smaller. That of a weight is -m times it."""
    along_k = reference.log_jvp(dk=1.0) if function == "log_topk" else reference.jvp(dk=1.0)[function == "threshold"]
    return float(np.max(np.abs(np.asarray(u * along_k, float))))


def _terms_by_epsilon(reference: Oracle, by_x: Any, function: str) -> float:
    """The size of the terms of the cotangent of epsilon, whose sum may be far smaller."""
    origin = reference.x[np.argmax(reference.a * reference.v)]
    terms = np.abs(np.asarray(by_x * (reference.x - origin) / reference.tau, float)).max()
    middle = float(abs(origin - reference.s) / reference.tau) * abs(float(np.sum(by_x)))
    return float(max(terms, middle if function == "threshold" else 0.0))


@DTYPES
@FUNCTIONS
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_numbers(eager: Library, name: str, function: str, dtype: str, rng: np.random.Generator) -> None:
    """What is far away, small or large takes nothing away from what is not."""
    if "jax" in eager.name and name not in ("far above", "next to nothing", "nearly tied"):
        pytest.skip("compiling takes too long; run on three problems, and by the other libraries")
    x, k, epsilon, weights = (None if v is None else np.asarray(v, dtype) for v in EXTREME[name])
    reference = Oracle(x, k[()], epsilon[()], weights)
    arguments = {"x": x, "k": k, "epsilon": epsilon} | ({} if weights is None else {"weights": weights})
    options = {key: arguments[key] for key in arguments if key not in ("x", "k")}
    u = rng.normal(size=() if function == "threshold" else x.shape).astype(dtype)
    f = getattr(softk, function)

    def pull(x: Any, k: Any, u: Any, **given: Any) -> Any:
        return softk.vjp(f, x, k, **given)[1](u)

    found = evaluate(eager, pull, x, k, u, *options.values(), names=list(options))
    wanted = reference.vjp(b=u) if function == "threshold" else reference.vjp(u, log=function == "log_topk")
    for key, values in found.items():
        size = 0.0  # of the largest term, if values are a sum
        if key == "epsilon":
            size = _terms_by_epsilon(reference, wanted["x"], function)
        elif key in ("k", "weights"):
            size = _terms_by_k(reference, u, function)
        _assert_close_in_range(key, values, wanted[key], dtype, size)
    for key, values in arguments.items():
        tangent = rng.normal(size=values.shape).astype(dtype)

        def push(x: Any, k: Any, tangent: Any, key: str = key, **given: Any) -> Any:
            return {"": softk.jvp(f, x, k, **given, tangents={key: tangent})[1]}

        found = evaluate(eager, push, x, k, tangent, *options.values(), names=list(options))[""]
        row = {f"d{key}": tangent if tangent.ndim else tangent[()]}
        rate = reference.log_jvp(**row) if function == "log_topk" else reference.jvp(**row)[function == "threshold"]
        size = _terms_by_epsilon(reference, reference.p * 0.5 * tangent, function) if key == "epsilon" else 0.0
        _assert_close_in_range(f"along {key}", found, rate, dtype, size if function == "threshold" else 0.0)


@pytest.mark.parametrize("epsilon", [10.0, 1e3, 1e6, 1e15])
def test_derivative_in_a_large_temperature(eager: Library, epsilon: float, rng: np.random.Generator) -> None:
    """All scores are next to each other, and all of them far from the threshold."""
    x, k, size = np.asarray([3.0, 1.0, 0.0, 2.0], "f4"), np.asarray(1.3, "f4"), np.asarray(epsilon, "f4")
    u = rng.normal(size=4).astype("f4")
    for function in ("topk", "log_topk"):
        f = getattr(softk, function)
        found = evaluate(
            eager,
            lambda x, k, u, epsilon, f=f: softk.vjp(f, x, k, epsilon=epsilon)[1](u),
            x,
            k,
            u,
            size,
            names=["epsilon"],
        )
        reference = Oracle(x, k[()], size[()])
        wanted = reference.vjp(u, log=function == "log_topk")
        terms = np.max(np.abs(np.asarray(wanted["x"] * (reference.x + reference.origin - 1.5) / reference.tau, float)))
        assert abs(found["epsilon"] - wanted["epsilon"]) <= 1e-6 * terms
        rate = evaluate(
            eager,
            lambda x, k, moved, epsilon, f=f: {"": softk.jvp(f, x, k, epsilon=epsilon, tangents={"epsilon": moved})[1]},
            *(x, k, np.asarray(0.7, "f4"), size),
            names=["epsilon"],
        )[""]
        moved = {"depsilon": np.float32(0.7)}
        want = reference.log_jvp(**moved) if function == "log_topk" else reference.jvp(**moved)[0]
        assert np.max(np.abs(rate - want)) <= 2e-6 * np.max(np.abs(want))


@pytest.mark.parametrize("epsilon", [1e38, 4e-38])
def test_thresholds_in_any_temperature(eager: Library, epsilon: float, rng: np.random.Generator) -> None:
    """The derivative in the scores has no units, and is a mean whatever the temperature is."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, size = np.asarray([3.0, 1.0, 0.0, 2.0], "f4"), np.asarray(epsilon, "f4")
    moved = np.asarray([1.0, 0.01, -0.5, 2.0], "f4")
    b = np.asarray(10.0 if epsilon > 1.0 else 0.043, "f4")
    torch.set_flush_denormal(True)  # as JAX has it always
    try:
        for f, place in ((softk.threshold, 1.3), (softk.quantile, 0.4)):
            where = np.asarray(place, "f4")
            by_x = evaluate(
                eager,
                lambda x, k, b, e, f=f: {"": softk.vjp(f, x, k, epsilon=e)[1](b)["x"]},
                x,
                where,
                b,
                size,
                names=[],
            )[""]
            rate = evaluate(
                eager,
                lambda x, k, dx, e, f=f: {"": softk.jvp(f, x, k, epsilon=e, tangents={"x": dx})[1]},
                *(x, where, moved, size),
                names=[],
            )[""]
            mean = np.full(4, 0.25)
            if epsilon < 1.0:  # of the one score, or two, that the mass ends at
                mean = np.asarray([0.0, 0.0, 0.0, 1.0]) if f is softk.threshold else np.asarray([0.0, 0.8, 0.0, 0.2])
            np.testing.assert_allclose(by_x, b * mean, rtol=1e-5, atol=1e-6 * b)
            np.testing.assert_allclose(rate, moved @ mean, rtol=1e-5)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(("epsilon", "size"), [(1e-36, 100.0), (1e-30, 1e9)])
def test_tangents_that_are_large_beside_the_temperature(eager: Library, epsilon: float, size: float) -> None:
    x, k, moved = (np.asarray(v, "f4") for v in ([3.0, 1.0, 0.0, 2.0], 1.3, [1.0, 2.0, -3.0, 4.0]))
    for f, wanted in ((softk.topk, np.zeros(4)), (softk.log_topk, None), (softk.threshold, np.asarray(4.0 * size))):
        rate = evaluate(
            eager,
            lambda x, k, dx, e, f=f: {"": softk.jvp(f, x, k, epsilon=e, tangents={"x": dx})[1]},
            *(x, k, np.asarray(size * moved, "f4"), np.asarray(epsilon, "f4")),
            names=[],
        )[""]
        assert not np.any(np.isnan(rate))
        if wanted is not None:
            np.testing.assert_allclose(rate, wanted, rtol=1e-6)


def test_weights_beside_an_infinite_score(eager: Library) -> None:
    """It has its mass, and no part in the derivative."""
    x, k, weights = np.asarray([np.inf, 0.3, -0.7]), np.asarray([1.5]), np.asarray([1.0, 2.0, 1.5])
    reference = Oracle(x[1:], 0.5, 0.5, weights[1:])
    u = np.asarray([0.4, 1.3, -0.6])
    for function in ("topk", "log_topk", "threshold"):
        f, cotangent = getattr(softk, function), np.asarray(0.7) if function == "threshold" else u
        wanted = reference.vjp(b=0.7) if function == "threshold" else reference.vjp(u[1:], log=function == "log_topk")
        found = evaluate(
            eager,
            lambda x, k, u, weights, f=f: softk.vjp(f, x, k, epsilon=0.5, weights=weights)[1](u),
            *(x, k, cotangent, weights),
            names=["weights"],
        )
        assert_close("k", found["k"][0], np.asarray(wanted["k"]), "float64")
        assert_close("x", found["x"], np.asarray([0.0, *wanted["x"]]), "float64")
        # Its mask is 1, and is what k is less.
        assert_close("weights", found["weights"], np.asarray([-wanted["k"], *wanted["weights"]]), "float64")


def test_second_derivative_beside_an_infinite_score() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, k = torch.tensor([torch.inf, 0.3, -0.7], dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 1.5], dtype=torch.float64)
    x, k = x.requires_grad_(), k.requires_grad_()
    mask = softk.topk(x, k, epsilon=0.5, weights=weights)
    by_x = torch.autograd.grad(mask[1], x, create_graph=True)[0]
    by_k = torch.autograd.grad(by_x[1], k)[0]
    step = EXACT.array(1e-30)[()]
    rates = []
    for sign in (1, -1):
        at = Exact(np.asarray([0.3, -0.7]), EXACT.array(0.5)[()] + sign * step, 0.5, np.asarray([2.0, 1.5]))
        rates.append(at.v[0] * (1 - at.a[0] * at.v[0] / at.V) / at.tau)
    wanted = float((rates[0] - rates[1]) / (2 * step))
    assert abs(float(by_k[0]) - wanted) <= 1e-11 * abs(wanted)


# --- second derivatives in gaps

#: Scores, mass, temperature and weights: of gaps in which 1 / V is more than is held, by one side or by both.
WIDE: dict[str, tuple[list[float], float, float, list[float] | None]] = {
    "narrow": ([2.07, 2.0, 0.02, 0.07], 2.0, 0.25, None),
    "held": ([12.07, 12.0, 0.02, 0.07], 2.0, 0.25, None),
    "wide": ([20.07, 20.0, 0.02, 0.07], 2.0, 0.25, None),
    "wider": ([200.07, 200.0, 0.02, 0.07], 2.0, 0.25, None),
    "weighted": ([20.07, 20.0, 0.02, 0.07], 1.75, 0.25, [1.0, 0.75, 2.0, 0.5]),
    "next to nothing": ([2.07, 2.0, 0.02, 0.07], 1e-22, 0.25, [1.0, 0.75, 2.0, 0.5]),
}


@DTYPES
@pytest.mark.parametrize("name", WIDE)
def test_second_derivatives_of_the_mask_in_a_gap(name: str, dtype: str) -> None:
    """Of the scores' derivative and the temperature's in k, in the weights; and the other way about."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, k, epsilon, weights = (None if v is None else np.asarray(v, dtype) for v in WIDE[name])
    u = np.asarray([0.3, -1.0, 0.7, 0.2], dtype)
    given = [torch.tensor(v).requires_grad_() for v in (x, k, epsilon, weights) if v is not None]

    def loss(x: Any, k: Any, epsilon: Any, weights: Any = None) -> Any:
        return (softk.topk(x, k, epsilon=epsilon, weights=weights) * torch.tensor(u)).sum()

    found = torch.autograd.functional.hessian(loss, tuple(given))
    wanted = mixed(x, k[()], epsilon[()], u, weights)
    places = {"k": 1, "weights": 3}
    for key, (by_x, by_epsilon) in wanted.items():
        other = places[key]
        for one, two, want in ((0, other, by_x), (other, 0, by_x.T), (2, other, by_epsilon), (other, 2, by_epsilon)):
            values = found[one][two].numpy().reshape(want.shape)
            # z is known to a rounding of its own, and is a factor of the temperature's.
            scale = np.max(np.abs(want)) if 2 not in (one, two) else np.max(np.abs(by_x)) * float(np.ptp(x) / epsilon)
            assert np.max(np.abs(values - want)) <= TOLERANCE[dtype] * scale, (one, two, values, want)


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize(
    ("x", "k", "epsilon", "u", "right", "dtype"),
    [
        ([30, 20, 10, 0], 2 + 4 * 2.0**-22, 1.0, [0.3, -1, 0.7, 0.2], -0.14107292, "float32"),
        ([90, 60, 30, 0], 2 + 2.0**-51, 1.0, [0.3, -1, 0.7, 0.2], -0.14798307, "float64"),
        *(
            (
                [0.1257, 0.1257, -0.1321, 0.6404, 0.1049, -0.5357],
                1,
                epsilon,
                [0.3, -1, 0.7, 0.2, 0.5, -0.4],
                -0.075,
                "float64",
            )
            for epsilon in (1e-10, 1e-12, 1e-14)
        ),
    ],
)
def test_the_derivative_in_k_of_a_mask_that_is_all_but_hard(
    eager: Library, x: list[float], k: float, epsilon: float, u: list[float], right: float, dtype: str, as_array: bool
) -> None:
    """Whether epsilon is a number or an array."""
    given, cotangent, mass = (eager.array(np.asarray(value, dtype)) for value in (x, u, [k]))
    strength = eager.array(np.asarray([epsilon], dtype)) if as_array else epsilon
    _, pullback = softk.vjp(softk.topk, given, mass, epsilon=strength)
    assert abs(eager.numpy(pullback(cotangent)["k"])[0] - right) <= 1e-7
