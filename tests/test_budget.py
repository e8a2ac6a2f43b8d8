"""One budget over a tree of arrays: the values and derivatives of the joined scores, on every library."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest

import softk
from softk._reference.threshold import split
from softk._reference.threshold.counting import edges_by_counting, number_of
from softk._reference.threshold.pieces import PieceBackend, Pieces
from softk.backend import backend_of

from .closed_form import assert_close
from .libraries import BY_NAME, Library


class Pair(NamedTuple):
    weight: Any
    bias: Any


#: All parts are joined, or none is.
SIZES = (split.SMALL, 0)
LIBRARIES = ("numpy", "torch", "jax", "dask", "array-api-strict")


@pytest.fixture(params=SIZES, ids=["joined", "in pieces"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(split, "SMALL", request.param)
    if "jax" in sys.modules:  # what it compiled for the other size
        sys.modules["jax"].clear_caches()
    found: int = request.param
    return found


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    found = BY_NAME[request.param]
    found.require()
    return found


def tree_of(values: np.ndarray, dtype: Any = None) -> Any:
    """The values in a tree of four leaves, one of them of one item and one without any."""
    n = values.shape[-1]
    cut = n // 4 * 2
    first = values[:cut].reshape(2, -1)
    parts = [first, values[cut : n - 1], values[n - 1], values[:0]]
    if dtype is not None:
        parts = [part.astype(dtype) for part in parts]
    return {"layers": [Pair(parts[0], parts[1]), None], "last": (parts[2], parts[3])}


def leaves_of(tree: Any) -> list[Any]:
    pair = tree["layers"][0]
    return [pair.weight, pair.bias, *tree["last"]]


def joined(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in leaves_of(tree)])


def mapped(f: Any, tree: Any) -> Any:
    pair = tree["layers"][0]
    return {
        "layers": [Pair(f(pair.weight), f(pair.bias)), None],
        "last": tuple(f(leaf) for leaf in tree["last"]),
    }


@pytest.mark.parametrize("kind", ["plain", "weights and where", "nearly hard", "smallest"])
@pytest.mark.parametrize("function", ["topk", "threshold"])
def test_a_tree_is_its_joined_scores(library: Library, function: str, kind: str, small: int, rng: Any) -> None:
    """Values, and derivatives in the scores, k, epsilon and the weights, in both directions."""
    if library.name == "jax" and (kind, function) != ("weights and where", "topk"):
        pytest.skip("compiling takes long; one case has everything")
    n = 2000 if library.name == "numpy" else 60
    x, weights = rng.standard_normal(n), rng.uniform(0.3, 2.0, n)
    given: dict[str, Any] = {"epsilon": np.asarray(1e-4 if kind == "nearly hard" else 0.3)}
    if kind == "smallest":
        given["mode"] = "smallest"
    flat = dict(given)
    trees: dict[str, Any] = {}
    if kind == "weights and where":
        flat |= {"weights": weights, "where": rng.random(n) < 0.8}
        trees = {name: tree_of(flat[name]) for name in ("weights", "where")}
    k, u = np.asarray(0.213 * n + 0.3), rng.standard_normal(n)
    to = {"array": library.array, "numpy": library.numpy}

    def array(value: Any) -> Any:
        return to["array"](value, np.asarray(value).dtype)

    own = {name: mapped(array, value) for name, value in trees.items()}
    own |= {name: array(value) if isinstance(value, np.ndarray) else value for name, value in given.items()}
    tree = mapped(array, tree_of(x))
    out, pull = softk.vjp(getattr(softk.budget, function), tree, array(k), **own)
    wanted, pull_wanted = softk.vjp(getattr(softk, function), x, k, **flat)
    found_out = joined(mapped(to["numpy"], out)) if function == "topk" else to["numpy"](out)
    np.testing.assert_allclose(found_out, wanted, rtol=0, atol=1e-13)
    bar = u if function == "topk" else np.asarray(0.7)
    found = pull(mapped(array, tree_of(u)) if function == "topk" else array(bar))
    expected = pull_wanted(bar)
    assert set(found) == {"tree", *expected} - {"x"}
    assert_close(joined(mapped(to["numpy"], found["tree"])), expected["x"], 1e-10)
    for name in ("k", "epsilon"):
        assert_close(to["numpy"](found[name]), expected[name], 1e-10)
    if "weights" in expected:
        assert_close(joined(mapped(to["numpy"], found["weights"])), expected["weights"], 1e-10)
    tangents = {"tree": mapped(array, tree_of(u)), "k": array(np.asarray(0.3))}
    _, moved = softk.jvp(getattr(softk.budget, function), tree, array(k), tangents=tangents, **own)
    _, moved_wanted = softk.jvp(getattr(softk, function), x, k, tangents={"x": u, "k": np.asarray(0.3)}, **flat)
    moved = joined(mapped(to["numpy"], moved)) if function == "topk" else to["numpy"](moved)
    assert_close(moved, moved_wanted, 1e-10)


@pytest.mark.parametrize("n", [8, 1000])
def test_hard_masks_of_a_tree(library: Library, n: int, small: int, rng: Any) -> None:
    """Exactly k ones; of equal scores those of the first leaf."""
    if library.name == "jax" and (small or n > 8):
        pytest.skip("compiling takes long")
    x = np.round(2 * rng.standard_normal(n)) / 2
    for k in (0, 3, n):
        found = softk.budget.topk(mapped(library.array, tree_of(x)), k, hard=True)
        np.testing.assert_array_equal(joined(mapped(library.numpy, found)), softk.topk(x, k, hard=True))


def test_dtypes_of_leaves(small: int, rng: Any) -> None:
    """Each mask has the dtype of its scores, and the threshold the widest of them."""
    x = rng.standard_normal(64).astype(np.float16).astype(np.float64)
    tree = [x[:20].astype(np.float32), x[20:40].astype(np.float16), x[40:]]
    masks = softk.budget.topk(tree, 13, epsilon=0.5)
    assert [mask.dtype for mask in masks] == [np.float32, np.float16, np.float64]
    expected = softk.topk(x, 13, epsilon=0.5)
    for mask, start, tolerance in zip(masks, (0, 20, 40), (1e-6, 1e-3, 1e-14), strict=True):
        np.testing.assert_allclose(mask, expected[start : start + len(mask)], rtol=0, atol=tolerance)
    assert softk.budget.threshold(tree, 13).dtype == np.float64
    assert softk.budget.threshold(tree[1:2], 13).dtype == np.float16
    found = softk.vjp(softk.budget.threshold, tree, 13)[1](1.0)["tree"]  # a number is a cotangent of one number
    assert [one.dtype for one in found] == [np.float32, np.float16, np.float64]
    np.testing.assert_allclose(sum(one.sum(dtype=np.float64) for one in found), 1.0, rtol=1e-3)


def test_the_mass_is_k_over_the_whole_tree(small: int, rng: Any) -> None:
    for dtype, eps in ((np.float32, 2.0**-23), (np.float64, 2.0**-52)):
        tree = [10.0 ** rng.uniform(-6, 6, size).astype(dtype) for size in (3000, 1, 777)]
        for k in (0.01, 1, 1999.5, 3777):
            for epsilon in (1e-5, 0.1, 1e5):
                masks = softk.budget.topk(tree, k, epsilon=epsilon)
                mass = sum(mask.sum(dtype=np.float64) for mask in masks)
                assert abs(mass - k) <= 16 * eps * max(1, k)


def test_special_scores(small: int) -> None:
    inf, nan = np.inf, np.nan
    first, second = softk.budget.topk([np.asarray([inf, 0.0]), np.asarray([-inf, inf])], 1)
    np.testing.assert_array_equal([*first, *second], [0.5, 0.0, 0.0, 0.5])
    first, second = softk.budget.topk([np.asarray([1.0, -inf]), np.asarray([-inf])], 2)
    np.testing.assert_array_equal([*first, *second], [1.0, 0.0, 0.0])
    for found in softk.budget.topk([np.asarray([1.0, nan]), np.asarray([2.0])], 2):
        assert np.isnan(found).all()
    for found in softk.budget.topk([np.asarray([1.0, 3.0]), np.asarray([2.0])], np.asarray(4.0)):
        assert np.isnan(found).all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")  # torch's own forward mode
def test_native_gradients_of_torch(small: int, rng: Any) -> None:
    torch = pytest.importorskip("torch")
    x, u = rng.standard_normal((2, 40))
    k = torch.tensor(7.3, dtype=torch.float64, requires_grad=True)
    parts = [torch.tensor(x[:12].reshape(3, 4), requires_grad=True), torch.tensor(x[12:], requires_grad=True)]
    masks = softk.budget.topk({"a": parts[0], "b": parts[1]}, k, epsilon=0.3)
    loss = (masks["a"].reshape(-1) * torch.tensor(u[:12])).sum() + (masks["b"] * torch.tensor(u[12:])).sum()
    loss.backward()
    _, pull = softk.vjp(softk.topk, x, np.asarray(7.3), epsilon=0.3)
    expected = pull(u)
    assert_close(np.concatenate([part.grad.reshape(-1) for part in parts]), expected["x"])
    assert_close(k.grad, expected["k"])

    def f(first: Any, second: Any, k: Any) -> Any:
        return tuple(softk.budget.topk([first, second], k, epsilon=0.3))

    few = [part.detach()[:2].clone().requires_grad_() for part in parts]
    mass = torch.tensor(2.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (*few, mass), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (*few, mass))


def test_containers_and_transforms_of_jax(rng: Any) -> None:
    """A container that is registered with JAX, under jit, grad and vmap."""
    jax = pytest.importorskip("jax")

    @jax.tree_util.register_pytree_node_class
    class Layer:
        def __init__(self, weight: Any, bias: Any) -> None:
            self.weight, self.bias = weight, bias

        def tree_flatten(self) -> Any:
            return (self.weight, self.bias), None

        @classmethod
        def tree_unflatten(cls, _: Any, children: Any) -> Layer:
            return cls(*children)

    x, u = rng.standard_normal((2, 3, 30))

    def loss(layer: Any, k: Any, u: Any) -> Any:
        masks = softk.budget.topk({"layer": layer}, k, epsilon=0.3)["layer"]
        assert isinstance(masks, Layer)
        return (masks.weight.reshape(-1) * u[:12]).sum() + (masks.bias * u[12:]).sum()

    layers = Layer(jax.numpy.asarray(x[:, :12].reshape(3, 3, 4)), jax.numpy.asarray(x[:, 12:]))
    gradient = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)), in_axes=(0, None, 0)))
    found, of_k = gradient(layers, 7.3, jax.numpy.asarray(u))
    for i in range(3):
        _, pull = softk.vjp(softk.topk, x[i], np.asarray(7.3), epsilon=0.3)
        expected = pull(u[i])
        assert_close(np.concatenate([found.weight[i].reshape(-1), found.bias[i]]), expected["x"])
        assert_close(of_k[i], expected["k"])


def test_a_bare_array_and_what_is_remembered(rng: Any) -> None:
    """A call over a tree holds its scores, and is not kept for the next ones."""
    for _ in range(2):
        x = rng.standard_normal((3, 4))
        np.testing.assert_allclose(softk.budget.topk(x, 2), softk.topk(x, 2, axis=(0, 1)), rtol=0, atol=1e-14)


def test_containers() -> None:
    x = np.asarray([0.5, 1.0])
    found = softk.budget.topk(OrderedDict(b=x, a=(x,)), 1)
    assert type(found) is OrderedDict
    assert list(found) == ["b", "a"]
    weights = {"a": (2 * x,), "b": x}  # found by their keys
    masks = softk.budget.topk(OrderedDict(b=x, a=(x,)), 2, weights=weights)
    np.testing.assert_allclose((masks["a"][0] * 2 * x + masks["b"] * x).sum(), 2)


def test_errors() -> None:
    x = np.asarray([0.5, 1.0])
    tree = {"a": x, "b": [x]}
    cases: list[tuple[type[Exception], str, Any]] = [
        (TypeError, r"tree\['b'\] must be an array, None, or a dict, .* got str", lambda: ({"a": x, "b": "x"}, 1, {})),
        (TypeError, r"tree\['b'\]\[0\] must have a real floating-point dtype", lambda: ({"b": [x > 0]}, 1, {})),
        (ValueError, r"tree must have at least one array", lambda: ({"a": None}, 1, {})),
        (ValueError, r"tree must have at least one score", lambda: ([x[:0]], 0, {})),
        (ValueError, r"k must be from 0 to 4, the number of scores in the tree, got 5", lambda: (tree, 5, {})),
        (ValueError, r"k must be a number or an array", lambda: (tree, np.ones(2), {})),
        (ValueError, r"weights must have the structure of tree, got weights\['c'\]",
         lambda: (tree, 1, {"weights": {"a": x, "c": x}})),
        (ValueError, r"weights\['b'\]\[0\] must broadcast to the shape of tree\['b'\]\[0\], \(2,\), got shape \(3,\)",
         lambda: (tree, 1, {"weights": {"b": [np.ones(3)]}})),
        (TypeError, r"where must be a boolean array", lambda: (tree, 1, {"where": {"a": x}})),
        (ValueError, r"hard=True does not support weights", lambda: (tree, 1, {"weights": tree, "hard": True})),
        (ValueError, r"k must be a whole number with hard=True, got 1.5", lambda: (tree, 1.5, {"hard": True})),
        (ValueError, r"epsilon must be a positive", lambda: (tree, 1, {"epsilon": 0})),
        (ValueError, r"mode must be", lambda: (tree, 1, {"mode": "most"})),
    ]  # fmt: skip
    for kind, text, make in cases:
        given, k, options = make()
        with pytest.raises(kind, match=text):
            softk.budget.topk(given, k, **options)
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"tree.* must be an array of the same library"):
        softk.budget.topk([x, torch.ones(2)], 1)
    _, pull = softk.vjp(softk.budget.topk, tree, 1)
    with pytest.raises(ValueError, match=r"cotangent must have the structure of tree, got cotangent\['c'\]"):
        pull({"c": x})
    with pytest.raises(ValueError, match=r"cotangent\['a'\] must have the shape \(2,\), got \(3,\)"):
        pull({"a": np.ones(3)})
    with pytest.raises(ValueError, match=r"tangents must name array arguments, one of \['tree'\], got 'x'"):
        softk.jvp(softk.budget.topk, tree, 1, tangents={"x": x})


# --- selection by counting


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_number_has_an_ordinal(dtype: str, rng: Any) -> None:
    integer = np.int32 if dtype == "float32" else np.int64
    infinity = np.asarray(np.inf, dtype).view(integer)
    around = [1 << (23 if dtype == "float32" else 52), int(infinity)]
    ordinals = np.concatenate(
        [rng.integers(0, infinity, 10_000), [0, 1, 2, *around, *(one - 1 for one in around)]]
    ).astype(integer)
    xp = backend_of(ordinals).xp
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(number_of(xp, ordinals, np.dtype(dtype)), ordinals.view(dtype))
        np.testing.assert_array_equal(number_of(xp, -ordinals, np.dtype(dtype)), -ordinals.view(dtype))
        lowest = np.asarray([np.iinfo(integer).min, np.iinfo(integer).max])
        np.testing.assert_array_equal(number_of(xp, lowest, np.dtype(dtype)), [-np.inf, np.inf])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["every size", "ties", "infinities", "one value", "subnormal"])
def test_edges_are_those_of_the_sorted_scores(dtype: str, kind: str, rng: Any) -> None:
    n = 200
    info = np.finfo(dtype)
    x = {
        "every size": lambda: (
            np.exp(rng.uniform(np.log(float(info.tiny)), np.log(float(info.max)), n)) * rng.choice([-1, 1], n)
        ),
        "ties": lambda: rng.integers(-3, 3, n),
        "infinities": lambda: rng.choice([-np.inf, np.inf, 0.0, 1.0], n),
        "one value": lambda: np.full(n, 0.3),
        "subnormal": lambda: float(info.tiny) * rng.uniform(-1, 1, n),
    }[kind]().astype(dtype)
    backend = PieceBackend(backend_of(x), (None, None))
    pieces = Pieces((x[:70], x[70:]))
    ordered = np.append(np.sort(x)[::-1], -np.inf)
    with np.errstate(all="ignore"):
        for first in (1, 2, 50, 133, 199, 200):
            for last in (first - 1, first):
                high, low, count = edges_by_counting(backend, pieces, None, np.asarray([first]), np.asarray([last]))
                assert (high, count) == (ordered[first - 1], n)
                assert low == ordered[last]
