"""What an adapter may and may not do: keep arrays in their library, and take every derivative from the primitive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import softk
from softk.backend import PRIMITIVES, Form, Primitive, backend_of

from . import closed_form
from .closed_form import assert_close

# --- nothing passes through NumPy


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("an array was converted to NumPy behind the user's back")


@pytest.fixture
def no_torch_conversion(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    torch = pytest.importorskip("torch")
    for name in ("__array__", "numpy", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    monkeypatch.setattr(np, "asarray", partial(_guarded, np.asarray, torch.Tensor))
    monkeypatch.setattr(np, "array", partial(_guarded, np.array, torch.Tensor))
    yield torch
    monkeypatch.undo()


@pytest.fixture
def no_jax_conversion(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """JAX converts single numbers itself, to print or compile them in, so only larger arrays are watched."""
    jax = pytest.importorskip("jax")
    kind = type(jax.numpy.zeros(()))
    convert = kind.__array__

    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        return refuse() if self.size > 1 else convert(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__array__", guarded)
    monkeypatch.setattr(kind, "tolist", refuse)
    monkeypatch.setattr(np, "asarray", partial(_guarded, np.asarray, kind))  # which reads the buffer of an array
    monkeypatch.setattr(np, "array", partial(_guarded, np.array, kind))
    yield jax
    monkeypatch.undo()


def _guarded(convert: Callable[..., Any], kind: type, value: Any, *args: Any, **kwargs: Any) -> Any:
    return refuse() if isinstance(value, kind) and value.size != 1 else convert(value, *args, **kwargs)


def calls(x: Any, k: Any, epsilon: Any, weights: Any, q: Any) -> list[Callable[..., Any]]:
    """Every function with its arguments, each a function of what it can be differentiated in."""
    return [
        partial(softk.topk, x, k, epsilon=epsilon, weights=weights),
        partial(softk.topk, x, 2, epsilon=0.7, where=x > -1.0, mode="smallest"),
        partial(softk.topk, x, 2, epsilon=0.7, axis=0, hard=True),
        partial(softk.threshold, x, k, epsilon=epsilon, weights=weights, keepdims=True),
        partial(softk.quantile, x, q, epsilon=epsilon, weights=weights),
    ]


def values(rng: Any) -> list[np.ndarray]:
    found = closed_form.problem(rng, batch=(3,))
    return [*found.values(), np.asarray([0.2, 0.7])]


def test_the_guards_guard(no_torch_conversion: Any, no_jax_conversion: Any) -> None:
    tensor, array = no_torch_conversion.ones(3), no_jax_conversion.numpy.ones(3)
    for convert in (np.asarray, np.array, lambda value: value.__array__(), lambda value: value.numpy()):
        with pytest.raises(AssertionError, match="behind the user's back"):
            convert(tensor)
    for convert in (np.asarray, lambda value: value.__array__(), lambda value: value.tolist()):
        with pytest.raises(AssertionError, match="behind the user's back"):
            convert(array)


@pytest.fixture
def no_kernels() -> Iterator[None]:
    """A kernel reads the memory of a tensor as an array of NumPy. A test of its own sees that this is no copy."""
    with softk.kernels("none"):
        yield


def test_torch_stays_in_torch(rng: Any, no_torch_conversion: Any, no_kernels: None) -> None:
    torch = no_torch_conversion
    leaves = [torch.tensor(value, requires_grad=True) for value in values(rng)]
    for call in calls(*leaves):
        out = call()
        assert type(out) is torch.Tensor
        found = torch.autograd.grad(out.sum(), leaves, allow_unused=True, create_graph=True)
        assert all(type(gradient) is torch.Tensor for gradient in found if gradient is not None)
        torch.autograd.grad(found[0].square().sum(), leaves, allow_unused=True)
        x = leaves[0].detach()
        moved = {"x": torch.ones_like(x)}
        (_, *args), keywords = call.args, call.keywords
        given = [value.detach() if isinstance(value, torch.Tensor) else value for value in args]
        named = {key: value.detach() if isinstance(value, torch.Tensor) else value for key, value in keywords.items()}
        out, pull = softk.vjp(call.func, x, *given, **named)
        assert all(type(gradient) is torch.Tensor for gradient in pull(torch.ones_like(out)).values())
        assert type(softk.jvp(call.func, x, *given, tangents=moved, **named)[1]) is torch.Tensor
        torch.func.vmap(lambda x, call=call, given=given: call.func(x, 1.0 * (given[0] is not None), epsilon=0.7))(x)


def test_jax_stays_in_jax(rng: Any, no_jax_conversion: Any) -> None:
    jax = no_jax_conversion
    arrays = [jax.numpy.asarray(value) for value in values(rng)]
    for call in calls(*arrays):
        assert isinstance(call(), jax.Array)
    found = jax.grad(lambda arrays: calls(*arrays)[0]().sum())(arrays)
    assert all(isinstance(gradient, jax.Array) for gradient in found)
    call = calls(*arrays)[-1]
    moved = {"x": jax.numpy.ones_like(arrays[0])}
    out, pull = softk.vjp(call.func, *call.args, **call.keywords)
    assert all(isinstance(gradient, jax.Array) for gradient in pull(jax.numpy.ones_like(out)).values())
    assert isinstance(softk.jvp(call.func, *call.args, tangents=moved, **call.keywords)[1], jax.Array)


def test_strict_arrays_stay_strict(rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = pytest.importorskip("array_api_strict")
    kind = type(strict.zeros(()))
    arrays = [strict.asarray(value) for value in values(rng)]
    monkeypatch.setattr(kind, "__array__", refuse, raising=False)
    monkeypatch.setattr(kind, "__buffer__", refuse, raising=False)
    for call in calls(*arrays):
        assert isinstance(call(), kind)
        out, pull = softk.vjp(call.func, *call.args, **call.keywords)
        assert all(isinstance(gradient, kind) for gradient in pull(strict.ones_like(out)).values())


# --- what an adapter computes is what the primitive says: a toy whose derivative is wrong on purpose

FACTOR = 3.0


def _forward(backend: Any, inputs: Any, *, shift: float) -> tuple[Any, ...]:
    x, a, unused = inputs
    assert unused is None
    return a * x * x + shift, backend.xp.zeros_like(x) + 7.0, a * x


def _jvp(backend: Any, inputs: Any, outputs: Any, tangents: Any) -> tuple[Any, ...]:
    x, a, _ = inputs
    dx, da, _ = tangents
    first, second = backend.xp.zeros_like(x), backend.xp.zeros_like(x)
    if dx is not None:
        first, second = first + FACTOR * 2.0 * a * x * dx, second + 5.0 * dx
    if da is not None:
        first = first + FACTOR * x * x * da
    return first, second


def _vjp(backend: Any, inputs: Any, outputs: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
    assert len(needed) == len(inputs)
    x, a, _ = inputs
    u, c = cotangents
    u = backend.xp.zeros_like(x) if u is None else u
    xbar = FACTOR * 2.0 * a * x * u
    if c is not None:
        xbar = xbar + 5.0 * c
    return xbar, FACTOR * x * x * u, None


def _forms(xp: Any, inputs: Any, **_: Any) -> tuple[Form, ...]:
    return (Form(inputs[0].shape, inputs[0].dtype),) * 3


OUTPUTS: Any = {"results": ("y",), "state": ("moving",), "constants": ("dead",)}


@pytest.fixture
def toy() -> Iterator[Primitive]:
    """y = a x^2 + shift whose derivative is thrice too large, a constant whose derivative is 5, and a true constant."""
    yield Primitive("a toy", _forward, _forms, _jvp, _vjp, **OUTPUTS)
    del PRIMITIVES["a toy"]


X, A, U, W = (np.asarray(value) for value in ([0.5, -1.5, 2.0], [1.0, 2.0, -0.7], [0.3, -1.1, 0.8], [1.3, 0.4, -0.6]))
IN_X, IN_A = FACTOR * 2.0 * A * X * U, FACTOR * X * X * U
#: The rule is itself differentiated truthfully.
IN_XX, IN_XA = FACTOR * 2.0 * A * U * W, FACTOR * 2.0 * X * U * W


def test_toy_in_torch(toy: Primitive) -> None:
    torch = pytest.importorskip("torch")
    x, a = (torch.tensor(value, requires_grad=True) for value in (X, A))
    f = partial(backend_of(x).bind(toy, shift=0.25), x, a, None)
    y, constant, dead = f()
    np.testing.assert_array_equal(y.detach(), A * X * X + 0.25)
    assert constant.requires_grad
    assert not dead.requires_grad
    first = torch.autograd.grad(y, (x, a), torch.tensor(U), create_graph=True)
    assert_close(first[0].detach(), IN_X)
    assert_close(first[1].detach(), IN_A)
    second = torch.autograd.grad(first[0], (x, a), torch.tensor(W))
    assert_close(second[0], IN_XX)
    assert_close(second[1], IN_XA)
    (constant_in_x,) = torch.autograd.grad(f()[1], x, torch.tensor(U))
    assert_close(constant_in_x, 5.0 * U)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")  # torch's own forward mode
def test_toy_in_torch_transforms(toy: Primitive) -> None:
    torch = pytest.importorskip("torch")
    x, a, u = (torch.tensor(value) for value in (X, A, U))

    def f(x: Any, a: Any) -> Any:
        return backend_of(x).bind(toy, shift=0.25)(x, a, None)[0]

    moved = torch.func.jvp(f, (x, a), (u, torch.tensor(W)))[1]
    assert_close(moved, FACTOR * (2.0 * A * X * U + X * X * W))
    assert_close(torch.func.vmap(torch.func.grad(lambda x, a, u: f(x, a) * u))(x, a, u), IN_X)
    assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x, a), A * X * X + 0.25)
    leaf = x.clone().requires_grad_()
    torch.compile(f, fullgraph=True, backend="aot_eager")(leaf, a).backward(u)
    assert_close(leaf.grad, IN_X)


def test_toy_in_jax(toy: Primitive) -> None:
    jax = pytest.importorskip("jax")
    x, a, u, w = (jax.numpy.asarray(value) for value in (X, A, U, W))
    bound = backend_of(x).bind(toy, shift=0.25)

    def loss(x: Any, a: Any) -> Any:
        return (bound(x, a, None)[0] * u).sum()

    np.testing.assert_array_equal(bound(x, a, None)[0], A * X * X + 0.25)
    for transform in (jax.grad, jax.jacfwd, lambda f, places: jax.jit(jax.grad(f, places))):
        in_x, in_a = transform(loss, (0, 1))(x, a)
        assert_close(in_x, IN_X)
        assert_close(in_a, IN_A)
    in_xx, in_xa = jax.grad(lambda x, a: (jax.grad(loss)(x, a) * w).sum(), (0, 1))(x, a)
    assert_close(in_xx, IN_XX)
    assert_close(in_xa, IN_XA)
    assert_close(jax.grad(lambda x: (bound(x, a, None)[1] * u).sum())(x), 5.0 * U)
    assert_close(jax.grad(lambda x: (bound(x, a, None)[2] * u).sum())(x), 0.0 * U)


def test_toy_in_autograd(toy: Primitive) -> None:
    autograd = pytest.importorskip("autograd")
    make_jvp = pytest.importorskip("autograd.differential_operators").make_jvp
    bound = pytest.importorskip("softk_autograd").backend.bind(toy, shift=0.25)

    def loss(x: Any, a: Any) -> Any:
        return autograd.numpy.sum(bound(x, a, None)[0] * U)

    np.testing.assert_array_equal(bound(X, A, None)[0], A * X * X + 0.25)
    assert_close(autograd.grad(loss, 0)(X, A), IN_X)
    assert_close(autograd.grad(loss, 1)(X, A), IN_A)
    assert_close(make_jvp(loss, 0)(X, A)(W)[1], (IN_X * W).sum())
    for place, expected in ((0, IN_XX), (1, IN_XA)):
        found = autograd.grad(lambda x, a: autograd.numpy.sum(autograd.grad(loss, 0)(x, a) * W), place)(X, A)
        assert_close(found, expected)
    assert_close(autograd.grad(lambda x: autograd.numpy.sum(bound(x, A, None)[1] * U))(X), 5.0 * U)


@pytest.mark.parametrize("library", ["numpy", "array_api_strict", "torch", "jax", "dask"])
def test_softk_vjp_and_jvp_apply_the_rules_given(library: str, toy: Primitive, monkeypatch: pytest.MonkeyPatch) -> None:
    """topk itself, with the toy in the place of its primitive: mask = k (tau-blind) x^2 and thrice its derivative."""
    make = {
        "numpy": lambda: np.asarray,
        "array_api_strict": lambda: pytest.importorskip("array_api_strict").asarray,
        "torch": lambda: pytest.importorskip("torch").tensor,
        "jax": lambda: pytest.importorskip("jax.numpy").asarray,
        "dask": lambda: lambda value: pytest.importorskip("dask.array").from_array(value, chunks=-1),
    }[library]()

    def forward(backend: Any, inputs: Any, *, ranks: Any) -> Any:
        return _forward(backend, (*inputs[:2], inputs[3]), shift=0.0)

    def jvp(backend: Any, inputs: Any, outputs: Any, tangents: Any) -> Any:
        return _jvp(backend, (inputs[0], inputs[1], None), outputs, (tangents[0], tangents[1], None))

    def vjp(backend: Any, inputs: Any, outputs: Any, cotangents: Any, needed: Any) -> Any:
        xbar, abar, _ = _vjp(backend, (inputs[0], inputs[1], None), outputs, cotangents, needed[:3])
        total = backend.xp.sum(abar, axis=-1, keepdims=True)
        return xbar, total, 0.0 * total, None, None

    from softk._reference.threshold import masks

    x, k, u = make(X), make(np.asarray([2.0])), make(U)
    softk.vjp(softk.topk, x, k)  # loads the kernels, which are those of the primitive that has the name now
    monkeypatch.setattr(masks, "mask", Primitive("another toy", forward, _forms, jvp, vjp, **OUTPUTS))
    try:
        out, pull = softk.vjp(softk.topk, x, k)
        assert_close(np.asarray(out), 2.0 * X * X)
        found = pull(u)
        assert_close(np.asarray(found["x"]), FACTOR * 4.0 * X * U)
        assert_close(np.asarray(found["k"]), np.asarray([FACTOR * (X * X * U).sum()]))
        _, moved = softk.jvp(softk.topk, x, k, tangents={"x": make(W)})
        assert_close(np.asarray(moved), FACTOR * 4.0 * X * W)
    finally:
        del PRIMITIVES["another toy"]


def test_every_result_of_an_adapter_comes_from_the_primitive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the primitive fails, so does the call: no adapter has a way around it."""

    def fail(*_: Any, **__: Any) -> Any:
        raise ArithmeticError("the primitive was asked")

    from softk._reference.threshold import masks

    monkeypatch.setattr(masks, "mask", Primitive("a failing toy", fail, _forms, fail, fail, **OUTPUTS))
    torch, jnp = pytest.importorskip("torch"), pytest.importorskip("jax.numpy")
    da, anp = pytest.importorskip("dask.array"), pytest.importorskip("autograd")
    for call in (
        lambda: softk.topk(X, 2),
        lambda: softk.topk(torch.tensor(X), 2),
        lambda: softk.topk(jnp.asarray(X), 2),
        lambda: softk.topk(da.from_array(X, chunks=-1), 2).compute(),
        lambda: anp.grad(lambda x: softk.topk(x, 2)[0])(X),
    ):
        with pytest.raises(ArithmeticError, match="the primitive was asked"):
            call()
    del PRIMITIVES["a failing toy"]
