"""Calls of one form are described once; no call may be taken for another, and nothing outlives its trace."""

from __future__ import annotations

import gc
import importlib
import math
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import softk
from softk._functions import recall
from softk._reference.threshold.masks import mask
from softk.backend import Kernel, backend_of

from .libraries import BY_NAME, Library

X = np.asarray([[0.5, 2.0, -1.0, 1.0], [3.0, 0.0, 1.0, 2.0]])
REMEMBERING = ("numpy", "torch", "jax")
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "topk": lambda x: softk.topk(x, 2),
    "hard": lambda x: softk.topk(x, 2, hard=True),
    "smallest": lambda x: softk.topk(x, 1.5, mode="smallest", axis=0),
    "log_topk": lambda x: softk.log_topk(x, 2, epsilon=0.5),
    "threshold": lambda x: softk.threshold(x, 2, keepdims=True),
    "quantile": lambda x: softk.quantile(x, 0.3, epsilon=0.1),
    "sorted_topk": lambda x: softk.sorted_topk(x, 2).assignment,
    "no rows": lambda x: softk.sorted_topk(x, 0).values,
    "select": lambda x: softk.select(x, 2).gates,
    "sort": lambda x: softk.sort(x, num_anchors=3, epsilon=0.1),
    "rank": lambda x: softk.rank(x, epsilon=0.1),
}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was called before is remembered: it starts anew with every call that is kept."""
    monkeypatch.setattr(recall, "MOST", 0)


@pytest.fixture
def every(library: Library, name: str) -> Callable[[Any], Any]:
    """A function and a library that remembers; of JAX, which compiles each of them, a few."""
    if library.name == "jax" and name not in ("topk", "smallest", "quantile"):
        pytest.skip("what JAX keeps is the same for all functions")
    return FUNCTIONS[name]


@pytest.fixture(params=REMEMBERING)
def library(request: pytest.FixtureRequest) -> Library:
    found = BY_NAME[request.param]
    found.require()
    return found


def described(*args: Any, **kwargs: Any) -> Any:
    return softk.topk.call(*args, **kwargs)  # type: ignore[attr-defined]


def test_calls_of_one_form_are_described_once(library: Library) -> None:
    x, y = library.array(X), library.array(X + 1.0)
    assert described(x, 2, epsilon=0.3) is described(y, 2, epsilon=0.3)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X[:1], 2), {}),
        ((X.astype("float32"), 2), {}),
        ((X, 2.0), {}),
        ((X, 3), {}),
        ((X, 2), {"epsilon": 0.2}),
        ((X, 2), {"axis": 0}),
        ((X, 2), {"mode": "smallest"}),
        ((X, 2), {"hard": True}),
    ],
    ids=str,
)
def test_other_forms_are_others(library: Library, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    first = described(library.array(X), 2)
    other = described(library.array(args[0], args[0].dtype), *args[1:], **kwargs)
    assert other is not first
    if library.name != "jax":  # which compiles each of them
        assert library.numpy(other.evaluate(library.array(args[0], args[0].dtype))).shape == args[0].shape


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_remembered_call_is_as_good_as_a_new_one(
    library: Library, name: str, every: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """On other scores than those of the call that is remembered."""
    scores = [rng.normal(size=(3, 5)) for _ in range(3)]
    found = [library.numpy(every(library.array(x))) for x in scores]
    monkeypatch.setattr(type(backend_of(library.array(X))), "cache_key", lambda *_: None)
    for x, values in zip(scores, found, strict=True):
        np.testing.assert_array_equal(values, library.numpy(every(library.array(x))))


def test_equal_numbers_of_other_types() -> None:
    """1, 1.0, True and NumPy's 1 are equal and of one hash."""
    softk.topk(X, 1, axis=1, epsilon=1, hard=True)
    softk.threshold(X, 1, keepdims=True)
    with pytest.raises(TypeError, match="k must be a number or an array"):
        softk.topk(X, True, axis=1, epsilon=1, hard=True)
    with pytest.raises(TypeError, match="axis must be an integer or a tuple of integers, got True"):
        softk.topk(X, 1, axis=True, epsilon=1, hard=True)
    with pytest.raises(TypeError, match=r"axis must be an integer or a tuple of integers, got 1\.0"):
        softk.topk(X, 1, axis=1.0, epsilon=1, hard=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="epsilon must be a number or an array"):
        softk.topk(X, 1, axis=1, epsilon=True, hard=True)
    with pytest.raises(TypeError, match="hard must be True or False, got 1"):
        softk.topk(X, 1, axis=1, epsilon=1, hard=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="keepdims must be True or False, got 1"):
        softk.threshold(X, 1, keepdims=1)  # type: ignore[arg-type]
    softk.sorted_topk(X, 1)
    with pytest.raises(TypeError, match="k must be a Python integer"):
        softk.sorted_topk(X, 1.0)  # type: ignore[arg-type]
    np.testing.assert_array_equal(softk.topk(X, np.int64(1)), softk.topk(X, 1))
    assert described(X, np.int64(1)) is not described(X, np.int64(1))


def test_numbers_under_another_name() -> None:
    """The same values for other arguments are another call."""
    found = softk.threshold(X, 1, axis=0, epsilon=0.5)
    np.testing.assert_array_equal(softk.threshold(X, epsilon=0.5, k=1, axis=0), found)
    assert softk.quantile(X, 0.5, epsilon=0.25).tolist() != softk.quantile(X, epsilon=0.5, q=0.25).tolist()


@pytest.mark.parametrize("order", [(0.0, -0.0), (-0.0, 0.0)])
def test_both_zeros(order: tuple[float, float], fresh: None) -> None:
    """They are one k: whichever comes first, the mask has the same bits as without a memory."""
    for f in (softk.topk, softk.log_topk, softk.threshold):
        alone = [f(X, np.asarray(k)) for k in order]
        for k, expected in zip(order, alone, strict=True):
            found = f(X, k)
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def test_other_types_of_arrays() -> None:
    """What is no ordinary array is refused after one of the same shape and dtype as before."""
    softk.topk(X, 2)
    with pytest.raises(TypeError, match="ordinary array"):
        softk.topk(np.ma.masked_array(X), 2)
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.asmatrix(X)
    with pytest.raises(TypeError, match="ordinary array"):
        softk.topk(matrix, 2)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
def test_other_layouts_of_tensors() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    softk.topk(torch.asarray(X), 2)
    with pytest.raises(TypeError, match="dense array"):
        softk.topk(torch.asarray(X).to_sparse(), 2)
    with pytest.raises(TypeError, match="dense array"):
        softk.topk(torch.nested.nested_tensor([torch.zeros(4)] * 2), 2)
    assert softk.topk(torch.asarray(X, device="meta"), 2).is_meta


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scores_are_not_kept(library: Library, name: str, every: Callable[[Any], Any]) -> None:
    x = library.array(X + 0.25)
    every(x)
    watch = weakref.ref(x)
    del x
    gc.collect()
    assert watch() is None


@pytest.mark.parametrize(("name", "args"), [("topk", (2,)), ("threshold", (2,)), ("quantile", (0.3,)), ("sort", ())])
def test_nobody_writes_in_what_is_kept(name: str, args: tuple[Any, ...]) -> None:
    f = getattr(softk, name)
    call = f.call(X, *args, epsilon=0.1)
    constants = [value for value in call.others if value is not None]
    assert constants
    for value in constants:
        value.flags.writeable = False
    out, pullback = softk.vjp(f, X, *args, epsilon=0.1)
    pullback(out)
    softk.jvp(f, X, *args, epsilon=0.1, tangents={"x": X})
    assert f.call(X, *args, epsilon=0.1) is call
    assert not any(np.shares_memory(f(X, *args, epsilon=0.1), value) for value in constants)


def test_it_starts_anew_when_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "MOST", 4)
    x = np.concatenate([X, X])
    first = described(x, 0.5)
    assert described(x, 0.5) is first
    for k in (1.0, 1.5, 2.0, 2.5, 3.0):
        described(x, k)
    assert described(x, 0.5) is not first


def test_many_threads(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setattr(recall, "MOST", 3)
    x = rng.normal(size=(2, 6))
    ks = [0.5 * (i % 11) for i in range(400)]
    expected = {k: softk.topk(x, np.asarray(k)) for k in set(ks)}
    with ThreadPoolExecutor(8) as pool:
        for k, found in zip(ks, pool.map(lambda k: softk.topk(x, k), ks), strict=True):
            np.testing.assert_allclose(found, expected[k], rtol=0.0, atol=1e-15)


def test_kernels_are_chosen_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of(X)
    with softk.kernels("none"):
        expected = softk.topk(X, 2)
    kernel = Kernel("triton", mask, "forward", lambda *_, **__: None, lambda _, inputs, **__: (inputs[0] * 0.0,) * 3)
    with softk.kernels("auto"):
        monkeypatch.setattr(backend, "kernels", (kernel,))
        assert not softk.topk(X, 2).any()
        monkeypatch.setattr(backend, "kernels", (replace(kernel, refuses=lambda *_, **__: "it rests"),))
        np.testing.assert_array_equal(softk.topk(X, 2), expected)


def test_lazy_sizes() -> None:
    """Sizes that are not known are NaN, which is no size."""
    da = pytest.importorskip("dask.array", reason="dask is not installed")
    x = da.from_array(X, chunks=(1, 4))
    x = x[x[:, 0] > -math.inf]
    assert described(x, 2) is not described(x, 2)
    np.testing.assert_allclose(softk.topk(x, 2).compute(), softk.topk(X, 2), rtol=0.0, atol=1e-15)


# --- PyTorch: where the first call of a form is made


def _first_calls() -> dict[str, Callable[[Any], Any]]:
    torch = importlib.import_module("torch")
    fake = importlib.import_module("torch._subclasses.fake_tensor")
    make_fx = importlib.import_module("torch.fx.experimental.proxy_tensor").make_fx

    def in_inference(x: Any) -> Any:
        with torch.inference_mode():
            return softk.topk(x, 2)

    def of_fakes(x: Any) -> Any:
        with fake.FakeTensorMode() as mode:
            return softk.topk(mode.from_tensor(x), 2)

    return {
        "inference": in_inference,
        "no_grad": lambda x: torch.no_grad()(softk.topk)(x, 2),
        "vmap": lambda x: torch.func.vmap(lambda row: softk.topk(x, 2) + row)(x[None]),
        "grad": lambda x: torch.func.grad(lambda y: (y * softk.topk(x, 2)).sum())(x),
        "jvp": lambda x: torch.func.jvp(lambda y: y * softk.topk(x, 2), (x,), (x,)),
        "fake": of_fakes,
        "make_fx": lambda x: make_fx(lambda y: y * softk.topk(x, 2))(x),
        "compile": lambda x: torch.compile(lambda y: softk.topk(y, 2), backend="aot_eager")(x),
        "parameter": lambda x: softk.topk(torch.nn.Parameter(x), 2).sum().backward(),
    }


# torch compiles its own forward-mode formulas with torch.jit.script, which it has deprecated.
DEPRECATED = pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is:DeprecationWarning")


@DEPRECATED
@pytest.mark.parametrize("first", list(_first_calls()) if importlib.util.find_spec("torch") else [])
def test_no_tensor_outlives_a_mode(first: str, fresh: None) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, u = torch.asarray(X), torch.asarray(X[::-1].copy())
    k = torch.asarray(2.0, dtype=x.dtype)
    y = x.clone().requires_grad_()
    expected = torch.autograd.grad(softk.topk(y, k), y, u)[0]
    _first_calls()[first](x)
    found = torch.autograd.grad(softk.topk(y, 2), y, u)[0]
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-14)
    _first_calls()[first](x)  # and with what was kept outside
    with torch.inference_mode():
        torch.testing.assert_close(softk.topk(x, 2), softk.topk(x, k), rtol=0.0, atol=1e-15)


@DEPRECATED
def test_no_derivative_is_lost_beside_remembered_numbers() -> None:
    """Scores without a gradient first, and then a tensor of the same form with one, in either mode."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, v = torch.asarray(X), torch.asarray(X[::-1].copy())
    assert not softk.topk(x, 2).requires_grad
    assert softk.topk(x.clone().requires_grad_(), 2).requires_grad
    with torch.autograd.forward_ad.dual_level():
        found = torch.autograd.forward_ad.unpack_dual(softk.topk(torch.autograd.forward_ad.make_dual(x, v), 2)).tangent
    _, expected = softk.jvp(softk.topk, X, 2, tangents={"x": X[::-1].copy()})
    np.testing.assert_allclose(found.numpy(), expected, rtol=0.0, atol=1e-13)


# --- JAX


def test_no_tracer_outlives_its_trace(fresh: None) -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    x = jax.numpy.asarray(X)
    inside = jax.jit(lambda y: y * softk.topk(x, 2))(x)  # scores that are no tracer, under a trace
    found = softk.topk(x, 2)
    np.testing.assert_allclose(inside, x * found, rtol=0.0, atol=1e-15)
    np.testing.assert_allclose(jax.jit(lambda y: y * softk.topk(x, 2))(x), inside, rtol=0.0, atol=1e-15)
    np.testing.assert_allclose(found, softk.topk(X, 2), rtol=0.0, atol=1e-14)


def test_no_mesh_outlives_its_statement(fresh: None) -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    if not hasattr(jax, "set_mesh"):
        pytest.skip("this JAX has no jax.set_mesh")
    x = jax.device_put(jax.numpy.asarray(X), jax.devices()[0])
    with jax.set_mesh(jax.make_mesh((1,), ("rows",))):
        described(x, 2)
    kept = described(x, 2)
    constants = [value for value in kept.others if value is not None]
    assert constants
    assert all(isinstance(value.sharding, jax.sharding.SingleDeviceSharding) for value in constants)


def test_precision_is_that_of_the_call(fresh: None) -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    x = jax.numpy.asarray(X, dtype="float32")
    for wide in (True, False, True):
        with jax.enable_x64(wide) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(wide):
            assert softk.topk(x, 2).dtype == np.float32


def test_kernels_are_those_in_force_at_the_call() -> None:
    """JAX compiles a primitive with its kernels, so a call of another choice is another call."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    x = jax.numpy.asarray(X)
    for choice in ("auto", "none", "auto"):
        with softk.kernels(choice):
            call = described(x, 2)
            assert call.bound is call.backend.bind(call.primitive, **call.options)
    with softk.kernels("none"):
        assert described(x, 2) is not call
