"""softk.neighbors: values and derivatives against a dense oracle on every library, and what is held in memory."""

from __future__ import annotations

import gc
import math
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

import softk
from softk import neighbors
from softk._reference.neighbors import block
from softk.backend import Kernel, backend_of

from . import closed_form
from .closed_form import WIDE, assert_close, differences
from .libraries import BY_NAME, Library
from .test_errors import complains

INF, NAN = math.inf, math.nan
Q, N, CLASSES = 4, 7, 3
#: Differences are formed in the first, a matrix product in the second.
FEW, MANY = 3, 11
EPSILON = {"soft": 1.5, "near-hard": 0.2}


# --- the oracle: all distances at once, and a threshold by bisection, in extended precision


def dense_weights(queries: Any, keys: Any, k: Any, *, epsilon: Any, where: Any = True, exclude: Any = None) -> Any:
    difference = np.asarray(queries, WIDE)[..., :, None, :] - np.asarray(keys, WIDE)[..., None, :, :]
    scores = -np.sum(difference * difference, axis=-1)
    if exclude is not None:
        where = where & (exclude[..., None] != np.arange(scores.shape[-1]))
    return closed_form.topk(scores, k, epsilon, where=np.broadcast_to(where, scores.shape))


def dense_probabilities(queries: Any, keys: Any, labels: Any, k: Any, **options: Any) -> Any:
    return dense_weights(queries, keys, k, **options) @ np.asarray(labels, WIDE) / np.asarray(k, WIDE)


def dense_loss(
    queries: Any, keys: Any, query_labels: Any, key_labels: Any, k: Any, *, floor: float = 0.0, **options: Any
) -> Any:
    """One number a query."""
    found = dense_probabilities(queries, keys, key_labels, k, **options)
    return -np.log(np.sum(found * np.asarray(query_labels, WIDE), axis=-1) + floor)


def problem(rng: Any, d: int, case: str = "soft") -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Points far from the origin; k and epsilon of each query; soft labels; and what may be chosen."""
    points = {"queries": 5.0 + rng.normal(size=(Q, d)), "keys": 5.0 + rng.normal(size=(N, d))}
    labels = {
        "query_labels": rng.dirichlet(np.ones(CLASSES), Q),
        "key_labels": rng.dirichlet(np.ones(CLASSES), N),
    }
    where = rng.uniform(size=(Q, N)) < 0.9
    where[:, :4] = True
    options = {
        "k": rng.uniform(1.2, 2.7, (Q, 1)),
        "epsilon": EPSILON[case] * rng.uniform(0.7, 1.3, (Q, 1)),
        "where": where,
        "exclude": np.asarray([0, 3, -1, N]),
    }
    return points, labels, options


Case = tuple[Callable[..., Any], Callable[..., Any], tuple[str, ...], dict[str, Any]]
FUNCTIONS: dict[str, Case] = {
    "weights": (neighbors.weights, dense_weights, ("queries", "keys", "k"), {}),
    "class_probabilities": (
        neighbors.class_probabilities,
        dense_probabilities,
        ("queries", "keys", "key_labels", "k"),
        {},
    ),
    "loss": (
        partial(neighbors.loss, reduction="none"),
        dense_loss,
        ("queries", "keys", "query_labels", "key_labels", "k"),
        {"floor": 0.02},
    ),
}


def arguments(function: str, rng: Any, d: int, case: str = "soft") -> tuple[list[Any], dict[str, Any]]:
    points, labels, options = problem(rng, d, case)
    every = {**points, **labels, "k": options.pop("k")}
    *_, names, more = FUNCTIONS[function]
    return [every[name] for name in names], {**options, **more}


# --- values, on every library


@pytest.mark.parametrize("d", [FEW, MANY])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values(lib: Library, function: str, d: int, rng: Any) -> None:
    if lib.name == "jax-jit" or (lib.name == "jax" and (d == MANY) != (function == "weights")):
        pytest.skip("compiling takes too long; jax runs in few or in many dimensions, and compiled in other tests")
    args, options = arguments(function, rng, d)
    f, dense, *_ = FUNCTIONS[function]
    assert_close(lib.evaluate(f, *args, **options), dense(*args, **options), 1e-13)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_float32(function: str, rng: Any) -> None:
    args, options = arguments(function, rng, FEW)
    args = [value.astype("float32") for value in args]
    options = {**options, "epsilon": options["epsilon"].astype("float32")}
    f, dense, *_ = FUNCTIONS[function]
    found = f(*args, **options)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.asarray(dense(*args, **options), float), rtol=2e-6, atol=2e-6)


def test_half_precision_is_computed_in_single(rng: Any) -> None:
    args, options = arguments("weights", rng, FEW)
    args = [value.astype("float16") for value in args]
    found = neighbors.weights(*args, **options)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, np.asarray(dense_weights(*args, **options), float), atol=1e-3)


@pytest.mark.parametrize("d", [FEW, MANY])
@pytest.mark.parametrize("narrow", ["queries", "others"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtypes_of_at_most_32_bits_stand_beside_each_other(function: str, narrow: str, d: int, rng: Any) -> None:
    """As under autocast. The distances are computed in float32, and each cotangent has the dtype of its argument."""
    torch = pytest.importorskip("torch")
    args, options = arguments(function, rng, d)
    f, dense, *_ = FUNCTIONS[function]
    given = []
    for i, value in enumerate(args):
        half = (i == 0) == (narrow == "queries")
        given.append(torch.tensor(value).to(torch.bfloat16 if half else torch.float32).requires_grad_())
    named = {name: torch.tensor(v) if isinstance(v, np.ndarray) else v for name, v in options.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = f(*given, **named)
    wide = [value.detach().double().requires_grad_() for value in given]
    wanted = f(*wide, **named)
    assert_close(wanted.detach(), dense(*(value.detach().numpy() for value in wide), **options).astype(float), 1e-13)
    eps = {kind: torch.finfo(kind).eps for kind in (torch.float32, torch.bfloat16)}
    roundings = {torch.float32: 100, torch.bfloat16: 0.6}
    assert out.dtype == given[0].dtype
    assert_close(out.detach().double(), wanted.detach(), roundings[out.dtype] * eps[out.dtype])
    u = torch.tensor(rng.standard_normal(tuple(out.shape))).to(out.dtype)
    pairs = zip(torch.autograd.grad(out, given, u), torch.autograd.grad(wanted, wide, u.double()), strict=True)
    for argument, (one, other) in zip(given, pairs, strict=True):
        assert one.dtype == argument.dtype
        assert_close(one.double(), other, roundings[one.dtype] * eps[one.dtype])


def test_an_offset_of_all_points_costs_nothing(rng: Any) -> None:
    """|q|^2 + |y|^2 - 2 <q, y> at this offset would be off by its eps times 1e8, which is 10."""
    queries, keys = rng.integers(-8, 8, (2, Q, MANY)) / 4.0
    for dtype, offset in (("float64", 1e8), ("float32", 1e4)):
        found = neighbors.weights((queries + offset).astype(dtype), (keys + offset).astype(dtype), 2, epsilon=1.0)
        assert_close(found, dense_weights(queries, keys, 2, epsilon=1.0), 1e-5 if dtype == "float32" else 1e-7)


def test_a_batch_is_many_problems(rng: Any) -> None:
    queries, keys = rng.normal(size=(2, 3, Q, FEW)), rng.normal(size=(3, N, FEW))
    labels, own = rng.integers(0, CLASSES, (3, N)), rng.integers(0, CLASSES, (2, 3, Q))
    found = neighbors.loss(queries, keys, own, labels, 2, epsilon=0.7, reduction="none")
    assert found.shape == (2, 3, Q)
    for i, j in np.ndindex(2, 3):
        one = neighbors.loss(queries[i, j], keys[j], own[i, j], labels[j], 2, epsilon=0.7, reduction="none")
        assert_close(found[i, j], one, 1e-14)
    out, pullback = softk.vjp(neighbors.loss, queries, keys, own, labels, 2, epsilon=0.7)
    assert_close(out, np.mean(found), 1e-14)
    singles = [
        softk.vjp(neighbors.loss, queries[i, 1], keys[1], own[i, 1], labels[1], 2, epsilon=0.7)[1](1.0)["keys"]
        for i in range(2)
    ]
    assert_close(pullback(1.0)["keys"][1], sum(singles) / 6, 1e-12)


def test_integers_are_their_one_hot_labels(lib: Library, rng: Any) -> None:
    if "jax" in lib.name:
        pytest.skip("compiling takes too long; integers run with vmap")
    (points, _, options), labels = problem(rng, FEW), rng.integers(0, CLASSES, N)
    own, k = rng.integers(0, CLASSES, Q), options.pop("k")
    one_hot = [(values[:, None] == np.arange(CLASSES)).astype(float) for values in (own, labels)]
    found = lib.evaluate(neighbors.class_probabilities, *points.values(), labels, k, num_classes=CLASSES, **options)
    assert_close(found, dense_probabilities(*points.values(), one_hot[1], k, **options), 1e-13)
    found = lib.evaluate(neighbors.loss, *points.values(), own, labels, k, floor=0.1, **options)
    assert_close(found, np.mean(dense_loss(*points.values(), *one_hot, k, floor=0.1, **options)), 1e-13)


def test_reductions(rng: Any) -> None:
    args, options = arguments("loss", rng, FEW)
    each = neighbors.loss(*args, reduction="none", **options)
    assert_close(neighbors.loss(*args, reduction="sum", **options), np.sum(each), 1e-14)
    assert_close(neighbors.loss(*args, **options), np.mean(each), 1e-14)


# --- derivatives by value


@pytest.mark.parametrize("d", [FEW, MANY])
@pytest.mark.parametrize("case", EPSILON)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_derivatives(function: str, case: str, d: int, rng: Any) -> None:
    """In every argument, along a random tangent and for a random cotangent, against differences of the oracle."""
    args, options = arguments(function, rng, d, case)
    _, dense, names, _ = FUNCTIONS[function]
    named = ["labels" if name == "key_labels" and function == "class_probabilities" else name for name in names]
    values = {**dict(zip(named, args, strict=True)), "epsilon": options.pop("epsilon")}
    options = {**options, **({"reduction": "none"} if function == "loss" else {})}
    public = getattr(neighbors, function)
    out, pullback = softk.vjp(public, *args, epsilon=values["epsilon"], **options)
    cotangent = rng.normal(size=out.shape)
    found = pullback(cotangent)
    assert set(found) == set(values)
    options.pop("reduction", None)
    for name, value in values.items():
        tangent = rng.normal(size=value.shape)

        def along(step: Any, name: str = name, tangent: Any = tangent) -> Any:
            *given, epsilon = {**values, name: values[name] + step * tangent}.values()
            return dense(*given, epsilon=epsilon, **options)

        expected = np.asarray(differences(along, np.zeros((), WIDE), 1e-4 * EPSILON[case]), float)
        more = {"reduction": "none"} if function == "loss" else {}
        _, rate = softk.jvp(public, *args, epsilon=values["epsilon"], tangents={name: tangent}, **options, **more)
        assert_close(rate, expected, 1e-10)
        assert found[name].shape == value.shape
        scale = np.abs(found[name]).sum() * np.abs(tangent).max()
        assert abs(np.sum(found[name] * tangent) - np.sum(cotangent * expected)) <= 1e-10 * scale


@pytest.mark.parametrize("name", ["array-api-strict", "dask", "torch"])
def test_explicit_derivatives_on_other_libraries(name: str, rng: Any) -> None:
    lib = BY_NAME[name]
    lib.require()
    points, _, options = problem(rng, FEW)
    labels = rng.integers(0, CLASSES, Q), rng.integers(0, CLASSES, N)
    args = [*points.values(), *labels, options.pop("k")]
    out, pullback = softk.vjp(neighbors.loss, *args, floor=0.1, **options)
    expected = pullback(1.0)
    moved = {key: lib.array(value, value.dtype) for key, value in options.items()}
    value, theirs = softk.vjp(neighbors.loss, *(lib.array(v, v.dtype) for v in args), floor=0.1, **moved)
    assert_close(lib.numpy(value), out, 1e-14)
    found = theirs(1.0)
    assert set(found) == set(expected)
    for key in expected:
        assert_close(lib.numpy(found[key]), expected[key], 1e-12)


def gradients(name: str, f: Callable[..., Any], args: list[np.ndarray]) -> tuple[Any, ...]:
    """Of a scalar function, by the framework's own autodiff."""
    if name == "jax":
        jax = pytest.importorskip("jax")
        gradient = jax.jit(jax.grad(f, tuple(range(len(args)))))
        return tuple(np.asarray(g) for g in gradient(*map(jax.numpy.asarray, args)))
    if name == "autograd":
        found = pytest.importorskip("autograd").grad(lambda every: f(*every))(tuple(args))
        return tuple(found)
    torch = pytest.importorskip("torch")
    tensors = [torch.tensor(value, requires_grad=True) for value in args]
    return tuple(g.numpy() for g in torch.autograd.grad(f(*tensors), tensors))


@pytest.mark.parametrize(
    ("name", "cells", "d"),
    [
        ("torch", 2**20, MANY),
        ("torch", 2 * N, FEW),
        ("autograd", 2**20, FEW),
        ("autograd", 2 * N, MANY),
        ("jax", 2 * N, FEW),
        ("jax", 2**20, MANY),
    ],
)
def test_native_gradients(name: str, cells: int, d: int, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two queries, of which the last is short: JAX loops over them."""
    points, labels, options = problem(rng, d)
    k, epsilon = options["k"][:3], options["epsilon"][:3]
    args = [points["queries"][:3], points["keys"], labels["query_labels"][:3], labels["key_labels"], k, epsilon]
    _, pullback = softk.vjp(neighbors.loss, *args[:-1], epsilon=epsilon, floor=0.1)
    expected = pullback(1.0)
    monkeypatch.setattr(block, "CELLS", cells)
    _fresh_traces()
    try:
        found = gradients(name, lambda *a: neighbors.loss(*a[:-1], epsilon=a[-1], floor=0.1), args)
    finally:
        _fresh_traces()
    for value, key in zip(found, ("queries", "keys", "query_labels", "key_labels", "k", "epsilon"), strict=True):
        assert_close(value, expected[key], 1e-12)


def _fresh_traces() -> None:
    """JAX keeps what it traced with another size of the blocks."""
    try:
        import softk_jax
    except ModuleNotFoundError:
        return
    softk_jax._bound.cache_clear()


# torch compiles its own forward-mode formulas with torch.jit.script, which it has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_order_on_torch(function: str, rng: Any) -> None:
    torch = pytest.importorskip("torch")
    args, options = arguments(function, rng, 2)
    fixed = {key: torch.asarray(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}
    epsilon = torch.asarray(fixed.pop("epsilon")).requires_grad_()
    tensors = [torch.asarray(value).requires_grad_() for value in args]
    f = FUNCTIONS[function][0]

    def of(*given: Any) -> Any:
        return f(*given[:-1], epsilon=given[-1], **fixed)

    direction = torch.asarray(rng.normal(size=tuple(of(*tensors, epsilon).shape)))
    small = [*tensors, epsilon]
    assert torch.autograd.gradcheck(of, small, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(of, small, (direction,), check_fwd_over_rev=True, fast_mode=True)


def test_second_order_on_jax(rng: Any) -> None:
    """Forward over reverse along a direction, against a difference of the explicit gradient."""
    jax = pytest.importorskip("jax")
    args, options = arguments("loss", rng, 2)
    direction = rng.normal(size=args[1].shape)
    arrays = [jax.numpy.asarray(value) for value in args]
    fixed = {
        key: jax.numpy.asarray(value) if isinstance(value, np.ndarray) else value for key, value in options.items()
    }
    gradient = jax.grad(lambda keys: neighbors.loss(arrays[0], keys, *arrays[2:], **fixed))
    found = jax.jit(lambda keys, along: jax.jvp(gradient, (keys,), (along,))[1])(arrays[1], direction)

    def explicit(step: Any) -> Any:
        keys = args[1] + float(step) * direction
        return softk.vjp(neighbors.loss, args[0], keys, *args[2:], **options)[1](1.0)["keys"]

    assert_close(found, np.asarray(differences(explicit, np.zeros((), WIDE), 1e-3), float), 1e-8)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_batched_by_vmap(name: str, rng: Any) -> None:
    queries, keys = rng.normal(size=(2, Q, FEW)), rng.normal(size=(N, FEW))
    labels, own = rng.integers(0, CLASSES, N), rng.integers(0, CLASSES, Q)
    explicit = [softk.vjp(neighbors.loss, one, keys, own, labels, 2.5, epsilon=0.7) for one in queries]
    if name == "torch":
        torch = pytest.importorskip("torch")
        make, both = torch.asarray, lambda f: torch.func.vmap(torch.func.grad_and_value(f))
    else:
        jax = pytest.importorskip("jax")
        make, both = jax.numpy.asarray, lambda f: jax.jit(jax.vmap(lambda x: jax.value_and_grad(f)(x)[::-1]))
    fixed = make(keys), make(own), make(labels)
    gradients, values = both(lambda one: neighbors.loss(one, *fixed, 2.5, epsilon=0.7))(make(queries))
    assert_close(values, [out for out, _ in explicit], 1e-13)
    assert_close(gradients, [pullback(1.0)["queries"] for _, pullback in explicit], 1e-12)


# --- blocks of queries


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("cells", [1, 3 * N])
def test_blocks_change_nothing(function: str, cells: int, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    args, options = arguments(function, rng, FEW)
    public = getattr(neighbors, function)
    out, pullback = softk.vjp(public, *args, **options)
    cotangent = rng.normal(size=np.shape(out))
    expected = pullback(cotangent)
    tangents = {"keys": rng.normal(size=args[1].shape)}
    rate = softk.jvp(public, *args, tangents=tangents, **options)[1]
    monkeypatch.setattr(block, "CELLS", cells)
    calls = []
    run = block.Block.run

    def counted(self: Any, primitive: Any, part: Any, *groups: Any, **more: Any) -> Any:
        calls.append((part, self.scores.shape[0]))
        return run(self, primitive, part, *groups, **more)

    monkeypatch.setattr(block.Block, "run", counted)
    blocked, pullback = softk.vjp(public, *args, **options)
    assert calls == [("forward", rows) for rows in ([1] * Q if cells == 1 else [2, 2])]
    assert_close(blocked, out, 1e-15)
    found = pullback(cotangent)
    assert set(found) == set(expected)
    for name in expected:
        assert_close(found[name], expected[name], 1e-14)
    assert_close(softk.jvp(public, *args, tangents=tangents, **options)[1], rate, 1e-14)


def test_memory_is_that_of_a_block(rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of 900 x 900 leave-one-out: a third of one dense array at the peak."""
    n, cells = 900, 7200
    monkeypatch.setattr(block, "CELLS", cells)
    points, labels, every = rng.normal(size=(n, 3)), rng.integers(0, 5, n), np.arange(n)

    def both(count: int) -> Any:
        points_, labels_, every_ = points[:count], labels[:count], every[:count]
        _, pullback = softk.vjp(neighbors.loss, points_, points_, labels_, labels_, 5, epsilon=0.1, exclude=every_)
        return pullback(1.0)

    both(20)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        found = both(n)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found["keys"].shape == points.shape
    dense = 8 * n * n
    assert peak - before < dense / 3, f"{(peak - before) / dense:.2f} of a dense array"
    assert peak - before > 8 * cells  # so that a smaller block would be seen


# --- kernels

#: The kernels of a block: forward, and for a derivative of the points alone.
KERNELS = {
    "weights": [("topk_mask", "forward"), ("topk_mask", "vjp")],
    "class_probabilities": [("topk_mask", "forward"), ("topk_mask", "vjp")],
    "loss": [("topk_log_mask", "forward"), ("topk_log_mask_at", "forward"), ("topk_log_mask", "vjp")],
}


Plain = tuple[Callable[..., Any], Any, Any, tuple[Any, ...], dict[str, Any]]


def plain(
    function: str, xp: Any, rng: Any, dtype: str = "float32", count: int = 6, n: int = 40, d: int = MANY
) -> Plain:
    """A function, its points, and the rest: integer labels, a fractional k, and each point leaves out itself."""
    points, k = rng.normal(size=(n, d)).astype(dtype), 2.5
    labels = xp.asarray(rng.integers(0, CLASSES, n))
    options: dict[str, Any] = {
        "epsilon": 0.5,
        "where": xp.asarray(rng.uniform(size=(1, n)) < 0.9),
        "exclude": xp.asarray(np.arange(count)),
    }
    args: tuple[Any, ...] = (k,)
    if function == "class_probabilities":
        args, options["num_classes"] = (labels, k), CLASSES
    if function == "loss":
        args, options["reduction"] = (labels[:count], labels, k), "none"
    return getattr(neighbors, function), xp.asarray(points[:count]), xp.asarray(points), args, options


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_kernels_compute_a_block(function: str, name: str, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    f, queries, keys, args, options = plain(function, pytest.importorskip(name), rng)
    backend = backend_of(queries)
    used: list[tuple[str, str]] = []

    def watched(kernel: Kernel) -> Kernel:
        def compute(*args: Any, **options: Any) -> Any:
            used.append((kernel.primitive.name, kernel.part))
            return kernel.compute(*args, **options)

        return replace(kernel, compute=compute)

    monkeypatch.setattr(backend, "kernels", tuple(map(watched, backend.kernels)))
    if name == "torch":
        queries.requires_grad_()
        keys.requires_grad_()
        f(queries, keys, *args, **options).sum().backward()
    else:
        out, pullback = softk.vjp(f, queries, keys, *args, **options)
        pullback(np.ones_like(out))
    assert used == KERNELS[function]


@pytest.mark.kernels
@pytest.mark.parametrize("function", FUNCTIONS)
def test_kernels_of_a_compiled_block(function: str, rng: Any) -> None:
    """They are operations of the graphs."""
    pytest.importorskip("numba")
    torch = pytest.importorskip("torch")
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    f, queries, keys, args, options = plain(function, torch, rng)
    found = []

    def of(queries: Any, keys: Any) -> Any:
        return f(queries, keys, *args, **options)

    def record(graph: Any, inputs: Any) -> Any:
        found.extend(node.args[:2] for node in graph.graph.nodes if "softk.compute" in str(node.target))
        return make_boxed_func(graph)

    points = queries.requires_grad_(), keys.requires_grad_()
    out = torch.compile(of, fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record))(*points)
    u = torch.asarray(rng.normal(size=tuple(out.shape))).to(out)
    expected = of(*points)
    gradients, wanted = torch.autograd.grad(out, points, u), torch.autograd.grad(expected, points, u)
    assert found == KERNELS[function]
    for one, two in zip((out.detach(), *gradients), (expected.detach(), *wanted), strict=True):
        assert_close(one, two, 1e-6)


@pytest.mark.kernels
@pytest.mark.parametrize("function", FUNCTIONS)
def test_kernels_in_a_program_of_jax(function: str, rng: Any) -> None:
    pytest.importorskip("numba")
    jax = pytest.importorskip("jax")
    f, queries, keys, args, options = plain(function, jax.numpy, rng)

    def total(queries: Any, keys: Any) -> Any:
        return jax.numpy.sum(f(queries, keys, *args, **options))

    text = jax.jit(jax.grad(total, (0, 1))).lower(queries, keys).compile().as_text()
    found = re.findall(r'custom_call_target="softk_(\w+)"', text)
    log = "log_" if function == "loss" else ""
    assert found == [f"{log}mask_float32", "pull_log_float32" if log else "pull_float32"]


@pytest.mark.kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("epsilon", [0.5, 0.01], ids=["soft", "near-hard"])
@pytest.mark.parametrize("d", [2, MANY])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_kernels_and_reference_agree(
    function: str, d: int, epsilon: float, dtype: str, tolerance: float, rng: Any
) -> None:
    """Of 40 queries and 3000 keys: values, and derivatives for a random cotangent and along random tangents."""
    pytest.importorskip("numba")
    f, queries, keys, args, options = plain(function, np, rng, dtype, 40, 3000, d)
    options["epsilon"] = epsilon
    tangents = {"queries": rng.normal(size=queries.shape), "keys": rng.normal(size=keys.shape)}
    tangents = {name: value.astype(dtype) for name, value in tangents.items()}
    u = None

    def everything() -> list[Any]:
        nonlocal u
        out, pullback = softk.vjp(f, queries, keys, *args, **options)
        u = rng.normal(size=out.shape).astype(dtype) if u is None else u
        return [out, *pullback(u).values(), softk.jvp(f, queries, keys, *args, tangents=tangents, **options)[1]]

    found = everything()
    with softk.kernels("none"):
        expected = everything()
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert np.abs(two).max() > 0.0
        assert_close(one, two, tolerance)


# --- what values may be


def test_removed_keys_may_be_anything(rng: Any) -> None:
    points, *_ = problem(rng, FEW)
    keys = points["keys"].copy()
    keys[2], keys[5] = NAN, INF
    where = np.ones((1, N), dtype=bool)
    where[0, 2] = False
    keep = np.asarray([0, 1, 3, 4, 6])
    for d in (FEW, MANY):
        queries, wide = (np.concatenate([v, np.zeros((len(v), d - FEW))], axis=1) for v in (points["queries"], keys))
        out, pullback = softk.vjp(neighbors.weights, queries, wide, 2, epsilon=0.5, where=where)
        assert_close(out[:, keep], dense_weights(queries, wide[keep], 2, epsilon=0.5), 1e-13)
        assert not out[:, [2, 5]].any()
        found = pullback(rng.normal(size=out.shape))
        assert np.isfinite(found["queries"]).all()
        assert np.isfinite(found["keys"]).all()
        assert not found["keys"][[2, 5]].any()
        assert np.isnan(neighbors.weights(queries, wide, 2, epsilon=0.5)).all()


@pytest.mark.parametrize("d", [FEW, MANY])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_query_spoils_no_other(bad: float, d: int, rng: Any) -> None:
    args, options = arguments("loss", rng, d)
    expected = neighbors.loss(*args, reduction="none", **options)
    queries = args[0].copy()
    queries[1, 0] = bad
    found = neighbors.loss(queries, *args[1:], reduction="none", **options)
    assert np.isnan(found[1])
    assert_close(np.delete(found, 1), np.delete(expected, 1), 1e-15)


@pytest.mark.parametrize("name", ["k", "epsilon"])
def test_a_bad_array_value_makes_its_query_nan(name: str, rng: Any) -> None:
    points, _, options = problem(rng, FEW)
    options[name][2] = -1.0
    found = neighbors.weights(*points.values(), options.pop("k"), **options)
    assert np.isnan(found[2]).all()
    assert np.isfinite(np.delete(found, 2, axis=0)).all()


def test_fewer_keys_than_k_are_all_chosen(rng: Any) -> None:
    points, *_ = problem(rng, FEW)
    where = np.arange(N) < 2
    found = neighbors.weights(*points.values(), 3, epsilon=0.5, where=where)
    np.testing.assert_array_equal(found, np.broadcast_to(where.astype(float), (Q, N)))
    shares = neighbors.class_probabilities(
        *points.values(), np.zeros(N, dtype=int), 3, num_classes=2, epsilon=0.5, where=where
    )
    assert_close(shares, np.tile([2 / 3, 0.0], (Q, 1)), 1e-15)


@pytest.mark.parametrize("k", [N - 1, N, N - 1.5])
def test_there_is_a_gradient_where_not_all_keys_are_chosen(k: float, rng: Any) -> None:
    """Each point leaves out itself."""
    points, labels, every = rng.normal(size=(N, FEW)), np.arange(N) % 2, np.arange(N)
    _, pullback = softk.vjp(neighbors.loss, points, points, labels, labels, k, epsilon=1.0, exclude=every)
    assert all(values.any() == (k < N - 1) for values in pullback(1.0).values())


def test_labels_outside_their_range_do_not_vote(rng: Any) -> None:
    points, *_ = problem(rng, FEW)
    labels = np.asarray([0, 1, -1, 2, 0, 3, 1])
    found = neighbors.class_probabilities(*points.values(), labels, 2, num_classes=3, epsilon=0.5)
    weights = neighbors.weights(*points.values(), 2, epsilon=0.5)
    for label in range(3):
        assert_close(found[:, label], weights[:, labels == label].sum(axis=1) / 2, 1e-14)


def test_a_query_that_nobody_agrees_with(rng: Any) -> None:
    """Its likelihood is 0, or the floor; it has no gradient, and spoils none."""
    points, *_ = problem(rng, FEW)
    own, labels = np.asarray([0, 9, 1, 2]), np.asarray([0, 1, 2, 0, 1, 2, 0])
    out, pullback = softk.vjp(neighbors.loss, *points.values(), own, labels, 2, epsilon=0.5, reduction="none")
    assert out[1] == INF
    found = pullback(np.ones(Q))
    assert not found["queries"][1].any()
    assert np.isfinite(found["keys"]).all()
    assert found["queries"][0].any()
    floored = neighbors.loss(*points.values(), own, labels, 2, epsilon=0.5, reduction="none", floor=0.01)
    assert_close(floored[1], -np.log(0.01), 1e-14)


def test_a_query_among_strangers_is_led_home() -> None:
    """Its own class is so far away that the weight underflows; the logarithm does not, nor does the gradient."""
    keys = np.asarray([[0.0], [0.1], [0.2], [40.0]])
    labels = np.asarray([0, 0, 0, 1])
    out, pullback = softk.vjp(neighbors.loss, np.asarray([[0.05]]), keys, np.asarray([1]), labels, 1, epsilon=0.5)
    assert neighbors.weights(np.asarray([[0.05]]), keys, 1, epsilon=0.5)[0, 3] == 0.0
    assert 5000.0 < out < 8000.0
    assert pullback(1.0)["queries"][0, 0] < -100.0  # downhill is towards 40


# --- errors

X, Y = np.zeros((2, 3)), np.zeros((4, 3))
ONES, ZEROS = np.zeros(2, dtype=int), np.zeros(4, dtype=int)


@pytest.mark.parametrize(
    ("error", "name", "value", "allowed", "f", "args", "options"),
    [
        (TypeError, "queries", "list", "must be an array", neighbors.weights, ([1.0], Y, 1), {}),
        (TypeError, "keys", "got float", "must be an array", neighbors.weights, (X, 1.0, 1), {}),
        (TypeError, "keys", "float32", "dtype of queries", neighbors.weights, (X, Y.astype("float32"), 1), {}),
        (ValueError, "keys", r"\(3,\)", "at least two axes", neighbors.weights, (X, Y[0], 1), {}),
        (ValueError, "keys", "got 3 and 2", "the same coordinates", neighbors.weights, (X, Y[:, :2], 1), {}),
        (ValueError, "keys", r"\(0, 3\)", "at least one point", neighbors.weights, (X, Y[:0], 1), {}),
        (ValueError, "keys", r"\(2,\) and \(3,\)", "broadcast", neighbors.weights,
         (np.zeros((2, 2, 3)), np.zeros((3, 4, 3)), 1), {}),
        (ValueError, "k", "got 5", "from 0 to 4, the number of keys", neighbors.weights, (X, Y, 5), {}),
        (ValueError, "k", "got 0", "above 0", neighbors.loss, (X, Y, ONES, ZEROS, 0), {}),
        (ValueError, "k", r"\(3,\)", "one value per slice", neighbors.weights, (X, Y, np.ones(3)), {}),
        (ValueError, "epsilon", "got -1", "positive", neighbors.weights, (X, Y, 1), {"epsilon": -1}),
        (TypeError, "where", "int64", "boolean", neighbors.weights, (X, Y, 1), {"where": ZEROS}),
        (ValueError, "where", r"\(3,\)", r"\(2, 4\)", neighbors.weights, (X, Y, 1), {"where": np.ones(3, bool)}),
        (TypeError, "exclude", "float64", "integers", neighbors.weights, (X, Y, 1), {"exclude": np.ones(2)}),
        (ValueError, "exclude", r"\(4,\)", r"\(2,\)", neighbors.weights, (X, Y, 1), {"exclude": ZEROS}),
        (ValueError, "num_classes", "None", "above 0", neighbors.class_probabilities, (X, Y, ZEROS, 1), {}),
        (ValueError, "num_classes", "got 2", "left out", neighbors.class_probabilities, (X, Y, np.ones((4, 2)), 1),
         {"num_classes": 2}),
        (ValueError, "labels", r"\(2, 3\)", r"\(4, 'c'\)", neighbors.class_probabilities, (X, Y, X, 1), {}),
        (ValueError, "labels", r"\(2,\)", r"\(4,\)", neighbors.class_probabilities, (X, Y, ONES, 1),
         {"num_classes": 2}),
        (TypeError, "labels", "float32", "float64", neighbors.class_probabilities,
         (X, Y, np.ones((4, 2), "float32"), 1), {}),
        (TypeError, "key_labels", "float64", "both be integers", neighbors.loss, (X, Y, ONES, Y, 1), {}),
        (TypeError, "key_labels", "int32", "int64", neighbors.loss, (X, Y, ONES, ZEROS.astype("int32"), 1), {}),
        (ValueError, "key_labels", r"\(4, 2\)", "same number of classes", neighbors.loss, (X, Y, X, Y[:, :2], 1), {}),
        (ValueError, "floor", "got -0.1", "at least 0", neighbors.loss, (X, Y, ONES, ZEROS, 1), {"floor": -0.1}),
        (ValueError, "reduction", "'max'", "'mean'", neighbors.loss, (X, Y, ONES, ZEROS, 1), {"reduction": "max"}),
    ],
)  # fmt: skip
def test_errors(error: Any, name: str, value: str, allowed: str, f: Any, args: Any, options: Any) -> None:
    complains(error, name, value, allowed, f, *args, **options)


def test_mixed_libraries_are_refused() -> None:
    torch = pytest.importorskip("torch")
    complains(TypeError, "keys", "torch", "same library as queries", neighbors.weights, X, torch.zeros(4, 3), 1)
