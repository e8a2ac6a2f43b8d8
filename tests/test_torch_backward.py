"""PyTorch's backward pass, by value: every argument, twice, and in the company of torch's own machinery."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import softk

from . import closed_form
from .closed_form import ARGUMENTS, CASES, assert_close, host

torch = pytest.importorskip("torch")

pytestmark = [
    # torch compiles its own forward-mode formulas with torch.jit.script, which it has deprecated.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning"),
    pytest.mark.usefixtures("on_device"),
]

FUNCTIONS = {"topk": softk.topk, "threshold": softk.threshold}


def leaves(values: dict[str, np.ndarray], *, dtype: Any = None, frozen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Tensors of the arguments, which require grad unless they are frozen."""
    return {name: torch.tensor(value, dtype=dtype).requires_grad_(name not in frozen) for name, value in values.items()}


def call(function: str, arguments: dict[str, Any], **options: Any) -> Any:
    named = dict(arguments)
    return FUNCTIONS[function](named.pop("x"), named.pop("k"), **named, **options)


def cotangent(rng: Any, like: Any) -> Any:
    return torch.tensor(rng.standard_normal(tuple(like.shape)), dtype=like.dtype)


# --- first derivatives


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_backward_in_every_argument(function: str, case: str, rng: Any) -> None:
    values = closed_form.problem(rng, case, batch=(3,))
    arguments = leaves(values)
    out = call(function, arguments)
    u = cotangent(rng, out)
    (out * u).sum().backward()
    expected = closed_form.pullback(function, host(u), values)
    for name, leaf in arguments.items():
        assert_close(leaf.grad, expected[name])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_backward_against_central_differences(function: str, case: str, rng: Any) -> None:
    values = closed_form.problem(rng, case)
    arguments = leaves(values)
    out = call(function, arguments)
    u = cotangent(rng, out)
    (out * u).sum().backward()

    def loss(name: str, value: np.ndarray) -> Any:
        found = getattr(closed_form, function)(**{**values, name: value})
        return np.sum(found * host(u))

    for name, leaf in arguments.items():
        expected = closed_form.differences(partial(loss, name), values[name], 1e-3 * CASES[case][1])
        assert_close(leaf.grad, expected, 1e-9)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_quantile(case: str, weighted: bool, rng: Any) -> None:
    values = closed_form.problem(rng, case)
    values["q"] = np.asarray([0.21, 0.65])
    del values["k"]
    if not weighted:
        del values["weights"]
    arguments = leaves(values)
    named = dict(arguments)
    out = softk.quantile(named.pop("x"), named.pop("q"), **named)
    u = cotangent(rng, out)
    (out * u).sum().backward()

    def loss(name: str, value: np.ndarray) -> Any:
        given = {**values, name: value}
        q = given.pop("q")
        return sum(host(u)[i] * closed_form.quantile(q=q[i], **given)[0] for i in range(2))

    for name, leaf in arguments.items():
        expected = closed_form.differences(partial(loss, name), values[name], 1e-4 * CASES[case][1])
        assert_close(leaf.grad, expected, 1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_lower_precision(function: str, dtype: str, rng: Any) -> None:
    kind = getattr(torch, dtype)
    arguments = leaves(closed_form.problem(rng, batch=(3,)), dtype=kind)
    out = call(function, arguments)
    assert out.dtype == kind
    u = cotangent(rng, out)
    out.backward(u)
    rounded = {name: host(leaf.double()) for name, leaf in arguments.items()}
    expected = closed_form.pullback(function, host(u.double()), rounded)
    for name, leaf in arguments.items():
        assert leaf.grad.dtype == kind
        tolerance = 2e-5 if dtype == "float32" else 2.0 * torch.finfo(kind).eps
        assert_close(leaf.grad.double(), expected[name], tolerance)


def test_float32_scores_with_float64_arguments(rng: Any) -> None:
    """Each gradient comes back in the dtype of its own argument."""
    arguments = leaves(closed_form.problem(rng))
    arguments["x"] = arguments["x"].detach().float().requires_grad_()
    out = call("topk", arguments)
    assert out.dtype == torch.float32
    u = cotangent(rng, out)
    out.backward(u)
    values = {name: host(leaf.double()) for name, leaf in arguments.items()}
    expected = closed_form.pullback("topk", host(u.double()), values)
    for name, leaf in arguments.items():
        assert leaf.grad.dtype == leaf.dtype
        assert_close(leaf.grad.double(), expected[name], 2e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_removed_items(function: str, rng: Any) -> None:
    values = closed_form.problem(rng, batch=(3,))
    where = np.asarray([[1, 1, 0, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], bool)
    arguments = leaves(values)
    with torch.no_grad():
        arguments["x"][0, 2] = torch.nan
        arguments["x"][1, 1] = torch.inf
    out = call(function, arguments, where=torch.tensor(where))
    u = cotangent(rng, out)
    (out * u).sum().backward()
    expected = closed_form.pullback(function, host(u) * where if function == "topk" else host(u), values, where)
    for name, leaf in arguments.items():
        assert_close(leaf.grad, expected[name])
    assert (arguments["x"].grad[torch.tensor(~where)] == 0).all()


@pytest.mark.parametrize("mode", ["largest", "smallest"])
def test_hard_mask_has_the_soft_derivative(mode: str, rng: Any) -> None:
    values = {"x": rng.standard_normal((3, 7)), "epsilon": np.asarray([[0.4], [0.7], [1.3]])}
    hard, soft = leaves(values), leaves(values)
    k = torch.tensor([[2.0], [3.0], [1.0]], dtype=torch.float64)
    kh, ks = k.clone().requires_grad_(), k.clone().requires_grad_()
    out = softk.topk(hard["x"], kh, mode=mode, epsilon=hard["epsilon"], hard=True)
    ranks = torch.argsort(torch.argsort(hard["x"], descending=mode == "largest"))
    assert torch.equal(out, (ranks < k).double())
    like = softk.topk(soft["x"], ks, mode=mode, epsilon=soft["epsilon"])
    u = cotangent(rng, out)
    first = torch.autograd.grad((out * u).sum(), [hard["x"], kh, hard["epsilon"]], create_graph=True)
    second = torch.autograd.grad((like * u).sum(), [soft["x"], ks, soft["epsilon"]], create_graph=True)
    sign = 1.0 if mode == "largest" else -1.0
    expected = closed_form.pullback("topk", host(u), {**values, "x": sign * values["x"], "k": host(k)})
    assert_close(first[0].detach(), sign * expected["x"])
    for one, two in zip(first, second, strict=True):
        assert_close(one.detach(), two.detach())
    w = cotangent(rng, first[0])
    twice = torch.autograd.grad((first[0] * w).sum(), [hard["x"], kh, hard["epsilon"]])
    expected_twice = torch.autograd.grad((second[0] * w).sum(), [soft["x"], ks, soft["epsilon"]])
    for one, two in zip(twice, expected_twice, strict=True):
        assert_close(one, two)


@pytest.mark.parametrize("mode", ["largest", "smallest"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_every_axis_and_either_end(axis: int, mode: str, rng: Any) -> None:
    x = rng.standard_normal((4, 5, 3))
    shape = [4, 5, 3]
    shape[axis] = 1
    k = rng.uniform(0.8, 2.2, shape)
    u = rng.standard_normal((4, 5, 3))
    leaf, mass = torch.tensor(x, requires_grad=True), torch.tensor(k, requires_grad=True)
    softk.topk(leaf, mass, axis=axis, mode=mode, epsilon=0.7).backward(torch.tensor(u))
    sign = 1.0 if mode == "largest" else -1.0
    last = {"x": sign * np.moveaxis(x, axis, -1), "k": np.moveaxis(k, axis, -1), "epsilon": np.asarray(0.7)}
    expected = closed_form.pullback("topk", np.moveaxis(u, axis, -1), last)
    assert_close(leaf.grad, sign * np.moveaxis(expected["x"], -1, axis))
    assert_close(mass.grad, np.moveaxis(expected["k"], -1, axis))


@pytest.mark.parametrize(
    ("x", "k", "epsilon"),
    [
        pytest.param([1e30, -1e30, 3.0, 2.0], 2, 0.1, id="huge"),
        pytest.param([0.5, 0.5, 0.5, 0.5], 2, 0.1, id="ties"),
        pytest.param([9.0, 8.0, -8.0, -9.0], 2, 1e-6, id="gap"),
        pytest.param([1.0, 2.0, 3.0, 4.0], 0, 0.1, id="nothing"),
        pytest.param([1.0, 2.0, 3.0, 4.0], 4, 0.1, id="everything"),
        pytest.param([torch.inf, 2.0, 3.0, -torch.inf], 2, 0.1, id="infinite"),
        pytest.param([1e-300, 0.0, -1e-300, 5e-324], 1.5, 1e-280, id="tiny"),
    ],
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_derivative_is_nan(function: str, x: list[float], k: float, epsilon: float, rng: Any) -> None:
    """Not even inside: torch's anomaly mode looks at the result of every backward function."""
    values = {"x": np.asarray(x), "k": np.asarray(float(k)), "epsilon": np.asarray(epsilon), "weights": np.ones(4)}
    arguments = leaves(values)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")  # torch says so whenever it is
        with torch.autograd.set_detect_anomaly(True):
            out = call(function, arguments)
            out.backward(cotangent(rng, out))
    for leaf in arguments.values():
        assert torch.isfinite(leaf.grad).all()
    if function == "topk" and k in (0, 4):
        assert (arguments["x"].grad == 0).all()
    if function == "topk" and max(x) - min(x) == 0.0:
        assert_close(out.detach(), np.full(4, k / 4))


# --- second derivatives


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_double_backward_in_every_pair_of_arguments(function: str, case: str, rng: Any) -> None:
    values = closed_form.problem(rng, case)
    at = closed_form.Slice(**values)
    arguments = leaves(values)
    out = call(function, arguments)
    u = cotangent(rng, out)
    first = torch.autograd.grad((out * u).sum(), list(arguments.values()), create_graph=True)
    for name, gradient in zip(ARGUMENTS, first, strict=True):
        w = cotangent(rng, gradient)
        found = torch.autograd.grad((gradient * w).sum(), list(arguments.values()), retain_graph=True)
        for other, twice in zip(ARGUMENTS, found, strict=True):
            block = np.tensordot(host(u), at.get(function, 2, name, other), u.ndim)
            expected = (host(w).reshape(-1) @ block).reshape(twice.shape)
            assert_close(twice, expected, 1e-9)


def small(names: str) -> dict[str, Any]:
    """Well-conditioned arguments for torch's own difference quotients; the names are those that require grad."""
    values = {
        "x": [[0.3, -0.9, 1.1, 0.2], [1.4, 0.1, -0.6, 0.5]],
        "k": [[1.7], [2.1]],
        "epsilon": [[0.9], [1.2]],
        "weights": [0.6, 1.4, 1.0, 1.8],
    }
    return leaves(
        {name: np.asarray(value) for name, value in values.items()},
        frozen=tuple(name for name in ARGUMENTS if name not in names.split()),
    )


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "smallest": lambda: {"mode": "smallest"},
    "where": lambda: {"where": torch.tensor([[True, True, False, True], [True, True, True, True]])},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("names", ["x", "k epsilon", "x k epsilon weights"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck(function: str, names: str, options: str) -> None:
    arguments, others = small(names), OPTIONS[options]()

    def f(*values: Any) -> Any:
        return call(function, dict(zip(ARGUMENTS, values, strict=True)), **others)

    given = tuple(arguments.values())
    assert torch.autograd.gradcheck(
        f, given, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    if options == "plain":
        assert torch.autograd.gradgradcheck(f, given, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck_of_the_quantile(weighted: bool) -> None:
    arguments = small("x epsilon weights")
    q = torch.tensor([0.31, 0.72], dtype=torch.float64, requires_grad=True)

    def f(x: Any, q: Any, epsilon: Any, weights: Any = None) -> Any:
        return softk.quantile(x, q, epsilon=epsilon, weights=weights)

    given = (arguments["x"], q, arguments["epsilon"], *([arguments["weights"]] if weighted else []))
    assert torch.autograd.gradcheck(
        f, given, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(f, given, check_fwd_over_rev=True, check_batched_grad=True)


# --- the manners of autograd


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("wanted", [*ARGUMENTS, "x epsilon", "k weights", ""])
def test_only_what_is_wanted_is_differentiated(function: str, wanted: str, rng: Any) -> None:
    values = closed_form.problem(rng, batch=(3,))
    frozen = tuple(name for name in ARGUMENTS if name not in wanted.split())
    arguments = leaves(values, frozen=frozen)
    out = call(function, arguments)
    assert out.requires_grad == bool(wanted)
    if not wanted:
        return
    u = cotangent(rng, out)
    out.backward(u)
    expected = closed_form.pullback(function, host(u), values)
    for name, leaf in arguments.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            assert_close(leaf.grad, expected[name])


def test_unwanted_gradients_are_not_handed_to_autograd(rng: Any) -> None:
    """The node returns None for an argument that needs none, so that nothing upstream of it is run."""
    arguments = leaves(closed_form.problem(rng), frozen=("k", "weights"))
    out = call("topk", arguments)
    nodes = [out.grad_fn]
    seen: list[Any] = []
    while nodes:
        node = nodes.pop()
        if "_Function" in type(node).__name__:
            node.register_hook(lambda found, _: seen.append([value is not None for value in found]))
        else:
            nodes += [edge for edge, _ in node.next_functions if edge is not None]
    out.backward(cotangent(rng, out))
    assert [True, False, True, False] in [flags[-4:] for flags in seen]


@pytest.mark.parametrize("k", [2, np.asarray(2), np.asarray([[1], [2], [3]])], ids=["number", "integer", "integers"])
def test_whole_k_has_no_gradient(k: Any, rng: Any) -> None:
    values = closed_form.problem(rng, batch=(3,))
    arguments = leaves(values)
    arguments["k"] = k if isinstance(k, int) else torch.tensor(k)
    out = call("topk", arguments)
    u = cotangent(rng, out)
    out.backward(u)
    del arguments["k"]
    expected = closed_form.pullback("topk", host(u), {**values, "k": np.asarray(k, float)})
    for name, leaf in arguments.items():
        assert_close(leaf.grad, expected[name])


def test_one_tensor_as_k_and_epsilon(rng: Any) -> None:
    x = rng.standard_normal(7)
    both = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    u = rng.standard_normal(7)
    out = softk.topk(torch.tensor(x), both, epsilon=both)
    (gradient,) = torch.autograd.grad(out, both, torch.tensor(u), create_graph=True)
    at = closed_form.Slice(x, 0.8, 0.8)
    pair = [7, 8]
    assert_close(gradient.detach(), (u @ at.mask1)[pair].sum())
    (twice,) = torch.autograd.grad(gradient, both)
    assert_close(twice, np.tensordot(u, at.mask2, 1)[np.ix_(pair, pair)].sum(), 1e-9)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.view(7), lambda x: x[:]], ids=["itself", "view", "slice"])
def test_one_tensor_as_scores_and_weights(view: Callable[[Any], Any], rng: Any) -> None:
    x, u = rng.uniform(0.2, 2.0, 7), rng.standard_normal(7)
    both = torch.tensor(x, requires_grad=True)
    softk.topk(both, 2.3, epsilon=0.5, weights=view(both)).backward(torch.tensor(u))
    expected = closed_form.pullback("topk", u, {"x": x, "k": np.asarray(2.3), "epsilon": np.asarray(0.5), "weights": x})
    assert_close(both.grad, expected["x"] + expected["weights"])
    tangent = torch.tensor(rng.standard_normal(7))
    _, pushed = torch.func.jvp(lambda v: softk.topk(v, 2.3, epsilon=0.5, weights=view(v)), (both.detach(),), (tangent,))
    assert_close(pushed @ torch.tensor(u), both.grad @ tangent)


def test_three_times_the_same_tensor(rng: Any) -> None:
    value = np.asarray([[0.6], [0.9]])
    every = torch.tensor(value, requires_grad=True)
    x, u = rng.standard_normal((2, 5)), rng.standard_normal((2, 5))
    softk.topk(torch.tensor(x), every, epsilon=every, weights=every).backward(torch.tensor(u))
    given = {"x": x, "k": value, "epsilon": value, "weights": value}
    expected = closed_form.pullback("topk", u, given)
    assert_close(every.grad, expected["k"] + expected["epsilon"] + expected["weights"])


def test_inputs_are_left_alone(rng: Any) -> None:
    arguments = leaves(closed_form.problem(rng, batch=(3,)))
    before = {name: (leaf.detach().clone(), leaf._version) for name, leaf in arguments.items()}
    out = call("topk", arguments)
    u = cotangent(rng, out)
    kept = u.clone()
    out.backward(u)
    assert torch.equal(u, kept)
    for name, leaf in arguments.items():
        assert torch.equal(leaf.detach(), before[name][0])
        assert leaf._version == before[name][1]


def test_result_may_be_overwritten(rng: Any) -> None:
    """The rule is built from the threshold, so that the mask can be changed in place before backward."""
    values = closed_form.problem(rng, batch=(3,))
    arguments = leaves(values)
    out = call("topk", arguments)
    u = cotangent(rng, out)
    out.mul_(2.0)
    out.backward(u)
    expected = closed_form.pullback("topk", 2.0 * host(u), values)
    assert_close(arguments["x"].grad, expected["x"])


def test_changed_scores_are_noticed(rng: Any) -> None:
    arguments = leaves(closed_form.problem(rng))
    x = arguments["x"] * 1.0
    out = call("topk", {**arguments, "x": x})
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_backward_twice_through_one_graph(rng: Any) -> None:
    arguments = leaves(closed_form.problem(rng))
    out = call("topk", arguments)
    u = cotangent(rng, out)
    first = torch.autograd.grad(out, list(arguments.values()), u, retain_graph=True)
    second = torch.autograd.grad(out, list(arguments.values()), u)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


def test_non_leaves_views_and_strides(rng: Any) -> None:
    values = closed_form.problem(rng, batch=(3,))
    base = torch.tensor(np.stack([values["x"].T, 0.0 * values["x"].T], axis=-1), requires_grad=True)
    half = torch.tensor(values["k"] / 2.0, requires_grad=True)
    x = base[..., 0].T  # every second number, in the other order
    assert not x.is_contiguous()
    k = half * 2.0
    k.retain_grad()
    epsilon = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    out = softk.topk(x, k, epsilon=epsilon.expand(3, 1))
    u = cotangent(rng, out)
    out.backward(u)
    given = {"x": values["x"], "k": values["k"], "epsilon": np.asarray(0.7)}
    expected = closed_form.pullback("topk", host(u), given)
    assert_close(base.grad[..., 0], expected["x"].T)
    assert (base.grad[..., 1] == 0).all()
    assert_close(k.grad, expected["k"])
    assert_close(half.grad, 2.0 * expected["k"])
    assert_close(epsilon.grad, expected["epsilon"])


def test_what_backward_saves(rng: Any) -> None:
    """The scores and the weights themselves, and a few numbers a slice; no mask and nothing of the solver."""
    x = torch.tensor(rng.standard_normal((4, 1000)), requires_grad=True)
    weights = torch.tensor(rng.uniform(0.5, 1.5, (4, 1000)), requires_grad=True)
    saved: list[Any] = []

    def pack(value: Any) -> Any:
        saved.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        softk.topk(x, 30.5, epsilon=0.3, weights=weights)
    large = {value.untyped_storage().data_ptr() for value in saved if value.numel() >= 4000}
    assert large <= {x.untyped_storage().data_ptr(), weights.untyped_storage().data_ptr()}
    assert sum(value.numel() for value in saved if value.numel() < 4000) <= 40


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_checkpoint(function: str, reentrant: bool, rng: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    values = closed_form.problem(rng, batch=(3,))
    arguments = leaves(values)

    def f(*given: Any) -> Any:
        return call(function, dict(zip(ARGUMENTS, given, strict=True)))

    out = checkpoint(f, *arguments.values(), use_reentrant=reentrant)
    u = cotangent(rng, out)
    out.backward(u)
    expected = closed_form.pullback(function, host(u), values)
    for name, leaf in arguments.items():
        assert_close(leaf.grad, expected[name])


def test_autocast(device: str, rng: Any) -> None:
    """A layer that autocast lowers gives bfloat16 scores and gets bfloat16 gradients; float32 scores stay float32."""
    features = torch.tensor(rng.standard_normal((3, 5)), dtype=torch.float32)
    layer = torch.nn.Linear(5, 7)
    k = torch.tensor(2.4, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        scores = layer(features)
        scores.retain_grad()
        low = softk.topk(scores, k, epsilon=0.7)
        high = softk.topk(scores.detach().float().requires_grad_(), k, epsilon=0.7)
    assert (scores.dtype, low.dtype, high.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    values = {"x": host(scores.double()), "k": host(k.double()), "epsilon": np.asarray(0.7)}
    np.testing.assert_allclose(host(high), closed_form.topk(**values).astype(float), rtol=0, atol=1e-6)
    u = cotangent(rng, low)
    low.backward(u)
    expected = closed_form.pullback("topk", host(u.double()), values)
    assert scores.grad.dtype == torch.bfloat16
    assert_close(scores.grad.double(), expected["x"], 1e-2)
    assert_close(k.grad.double(), expected["k"], 1e-5)
    assert layer.weight.grad.dtype == torch.float32


def test_hooks_see_the_gradient(rng: Any) -> None:
    arguments = leaves(closed_form.problem(rng))
    out = call("topk", arguments)
    seen: list[Any] = []
    out.register_hook(lambda gradient: seen.append(gradient) or 2.0 * gradient)
    u = cotangent(rng, out)
    (plain,) = torch.autograd.grad(call("topk", arguments), arguments["x"], u)
    (doubled,) = torch.autograd.grad(out, arguments["x"], u)
    assert torch.equal(seen[0], u)
    assert_close(doubled, 2.0 * plain)


def test_no_grad_and_inference_mode(rng: Any) -> None:
    values = closed_form.problem(rng, batch=(3,))
    arguments = leaves(values)
    with torch.no_grad():
        assert not call("topk", arguments).requires_grad
    with torch.inference_mode():
        found = call("topk", arguments)
    assert_close(host(found), closed_form.topk(**values).astype(float), 1e-14)
