"""The hard top-k with soft gates: what is selected, against a sort; the gates and all derivatives, against mpmath."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import softk
from softk import testing
from softk._reference.threshold.masks import mask
from softk.backend import Backend, Kernel, backend_of

from .libraries import BY_NAME, Library
from .test_errors import complains

INF, NAN = math.inf, math.nan
X = np.asarray([[0.5, 2.0, -1.0, 1.25, 0.75, 3.0], [0.0, -0.25, 1.5, 0.5, 0.25, 1.0]])
EPSILON = 0.8
CASES = [(2, "largest", -1), (4, "smallest", -1), (1, "largest", 0), (5, "largest", -1), (1, "smallest", -1)]
each_case = pytest.mark.parametrize(("k", "mode", "axis"), CASES)


class Oracle:
    """Values, indices, gates and their derivatives of scores without ties: a sort, and the mask with 120 digits."""

    def __init__(self, x: np.ndarray, k: int, mode: str, axis: int, epsilon: float = EPSILON) -> None:
        self.x, self.axis = np.moveaxis(x.astype(np.float64), axis, -1), axis
        ordered = np.argsort(self.x if mode == "smallest" else -self.x, axis=-1)
        self.order = ordered[..., :k]
        self.slices = [testing.Oracle(row, k, epsilon, mode=mode) for row in self.x.reshape(-1, self.x.shape[-1])]

    def _taken(self, values: Any) -> np.ndarray:
        rows = np.reshape(values, self.x.shape)
        return np.moveaxis(np.take_along_axis(rows, self.order, axis=-1), -1, self.axis)

    @property
    def results(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        masks = [one.mask for one in self.slices]
        return self._taken(self.x), np.moveaxis(self.order, -1, self.axis), self._taken(masks)

    def _put(self, values: np.ndarray) -> np.ndarray:
        found = np.zeros(self.x.shape)
        np.put_along_axis(found, self.order, np.moveaxis(values, self.axis, -1), axis=-1)
        return found

    def vjp(self, of_values: np.ndarray, of_gates: np.ndarray) -> tuple[np.ndarray, float]:
        """Cotangents of x and epsilon."""
        u = self._put(of_gates).reshape(len(self.slices), -1)
        parts = [one.vjp(row) for one, row in zip(self.slices, u, strict=True)]
        found = np.reshape([part["x"] for part in parts], self.x.shape) + self._put(of_values)
        return np.moveaxis(found, -1, self.axis), sum(part["epsilon"] for part in parts)

    def jvp(self, dx: np.ndarray, depsilon: float) -> tuple[np.ndarray, np.ndarray]:
        """Tangents of the values and the gates."""
        rows = np.moveaxis(dx, self.axis, -1)
        flat = rows.reshape(len(self.slices), -1)
        rates = [one.jvp(dx=row, depsilon=depsilon)[0] for one, row in zip(self.slices, flat, strict=True)]
        return self._taken(rows), self._taken(rates)


def numpy_results(lib: Library, f: Callable[..., Any], *args: Any, **kwargs: Any) -> list[np.ndarray]:
    made = tuple(lib.array(value) if isinstance(value, np.ndarray) else value for value in args)
    return [lib.numpy(value) for value in lib.call(f, *made, **kwargs)]


def assert_close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    scale = max(float(np.max(np.abs(expected), initial=0.0)), 1.0)
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=tolerance * scale)


# --- the results


@each_case
def test_results(lib: Library, k: int, mode: str, axis: int) -> None:
    values, indices, gates = numpy_results(lib, softk.select, X, k, mode=mode, axis=axis, epsilon=EPSILON)
    expected = Oracle(X, k, mode, axis).results
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(indices, expected[1])
    assert_close(gates, expected[2])
    assert (values.dtype, gates.dtype) == (np.float64, np.float64)
    assert indices.dtype == np.int64


@pytest.mark.parametrize("k", [0, 6])
def test_none_and_all(lib: Library, k: int) -> None:
    values, indices, gates = numpy_results(lib, softk.select, X, k)
    np.testing.assert_array_equal(values, -np.sort(-X, axis=-1)[:, :k])
    np.testing.assert_array_equal(indices, np.argsort(-X, axis=-1)[:, :k])
    np.testing.assert_array_equal(gates, np.ones((2, k)))


def test_one_score(lib: Library) -> None:
    values, indices, gates = numpy_results(lib, softk.select, X[:, :1], 1)
    np.testing.assert_array_equal(values, X[:, :1])
    np.testing.assert_array_equal(indices, [[0], [0]])
    np.testing.assert_array_equal(gates, [[1.0], [1.0]])


@pytest.mark.parametrize("mode", ["largest", "smallest"])
def test_infinite_scores(lib: Library, mode: str) -> None:
    """Fewer than k that can be selected; more than k that always are; and a slice of ordinary scores beside them."""
    sign = 1.0 if mode == "largest" else -1.0
    x = sign * np.asarray([[-INF, 1.0, -INF, 0.0], [INF, 0.5, INF, INF], [0.5, 2.0, -1.0, 1.0]])
    values, indices, gates = numpy_results(lib, softk.select, x, 3, mode=mode, epsilon=EPSILON)
    np.testing.assert_array_equal(sign * values, [[1.0, 0.0, -INF], [INF, INF, INF], [2.0, 1.0, 0.5]])
    np.testing.assert_array_equal(np.take_along_axis(x, indices, axis=-1), values)
    assert all(len(set(row)) == 3 for row in indices.tolist())
    np.testing.assert_array_equal(gates[:2], [[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert_close(gates[2:], Oracle(x[2:], 3, mode, -1).results[2])


def test_ties(lib: Library) -> None:
    """Whichever of them are selected, they are what their indices say, and share."""
    x = np.asarray([[1.0, 0.0, 1.0, 1.0, 0.0, 1.0], [0.5, 0.5, 2.0, 0.5, 0.5, -1.0]])
    values, indices, gates = numpy_results(lib, softk.select, x, 3, epsilon=EPSILON)
    np.testing.assert_array_equal(values, [[1.0, 1.0, 1.0], [2.0, 0.5, 0.5]])
    np.testing.assert_array_equal(np.take_along_axis(x, indices, axis=-1), values)
    assert all(len(set(row)) == 3 for row in indices.tolist())
    masks = np.stack([testing.Oracle(row, 3, EPSILON).mask for row in x])
    assert_close(gates, np.take_along_axis(masks, indices, axis=-1))


@pytest.mark.parametrize("name", ["jax", "jax-jit", "array-api-strict"])
def test_the_lowest_index_where_it_is_promised(name: str) -> None:
    lib = BY_NAME[name]
    lib.require()
    _, indices, _ = numpy_results(lib, softk.select, np.asarray([[0.0, 1.0, 1.0, 2.0, 1.0]]), 3)
    np.testing.assert_array_equal(indices, [[3, 1, 2]])


def test_nan_spoils_its_own_slice(lib: Library) -> None:
    x = X.copy()
    x[0, 1] = NAN
    values, indices, gates = numpy_results(lib, softk.select, x, 2, epsilon=EPSILON)
    assert np.isnan(gates[0]).all()
    np.testing.assert_array_equal(np.take_along_axis(x, indices, axis=-1), values)
    expected = Oracle(X, 2, "largest", -1).results
    np.testing.assert_array_equal(values[1], expected[0][1])
    assert_close(gates[1], expected[2][1])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_narrow_scores(lib: Library, dtype: str) -> None:
    if dtype == "float16" and "half" not in lib.tags:
        pytest.skip(f"{lib.name} is not tried with float16")
    x, tolerance = X.astype(dtype), 1e-3 if dtype == "float16" else 1e-6
    values, _, gates = numpy_results(lib, softk.select, x, 2, epsilon=EPSILON)
    expected = Oracle(x, 2, "largest", -1).results
    np.testing.assert_array_equal(values, expected[0])
    assert_close(gates, expected[2], tolerance)
    assert (values.dtype, gates.dtype) == (x.dtype, x.dtype)


def test_bfloat16() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.asarray(X).bfloat16().requires_grad_()
    found = softk.select(x, 2, epsilon=EPSILON)
    expected = Oracle(X, 2, "largest", -1)
    np.testing.assert_array_equal(found.values.detach().double(), expected.results[0])
    assert found.gates.dtype is torch.bfloat16
    assert_close(found.gates.detach().double(), expected.results[2], 4e-3)
    v, u = torch.asarray([[1.0, -2.0], [0.5, 3.0]]).bfloat16(), torch.asarray([[0.5, 1.0], [-1.0, 2.0]]).bfloat16()
    (gradient,) = torch.autograd.grad(found[::2], x, (v, u))
    assert gradient.dtype is torch.bfloat16
    assert_close(gradient.double(), expected.vjp(v.double().numpy(), u.double().numpy())[0], 8e-3)


# --- the derivatives


@each_case
def test_explicit_derivatives(eager: Library, k: int, mode: str, axis: int, rng: np.random.Generator) -> None:
    x, epsilon = eager.array(X), eager.array(np.asarray(EPSILON))
    oracle = Oracle(X, k, mode, axis)
    shape = oracle.results[0].shape
    v, u, dx = rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=X.shape)
    out, pullback = softk.vjp(softk.select, x, k, mode=mode, axis=axis, epsilon=epsilon)
    assert_close(eager.numpy(out.gates), oracle.results[2])
    found = pullback((eager.array(v), eager.array(u)))
    expected = oracle.vjp(v, u)
    assert_close(eager.numpy(found["x"]), expected[0])
    assert_close(eager.numpy(found["epsilon"]), expected[1])
    for pair, alone in (((v, None), (v, 0.0 * u)), ((None, u), (0.0 * v, u))):
        given = tuple(None if one is None else eager.array(one) for one in pair)
        assert_close(eager.numpy(pullback(given)["x"]), oracle.vjp(*alone)[0])
    tangents = {"x": eager.array(dx), "epsilon": eager.array(np.asarray(0.5))}
    _, rates = softk.jvp(softk.select, x, k, tangents=tangents, mode=mode, axis=axis, epsilon=epsilon)
    for rate, wanted in zip(rates, oracle.jvp(dx, 0.5), strict=True):
        assert_close(eager.numpy(rate), wanted)


def test_derivatives_of_none_and_all(eager: Library) -> None:
    x = eager.array(X)
    for k in (0, 6):
        out, pullback = softk.vjp(softk.select, x, k, epsilon=EPSILON)
        found = eager.numpy(pullback((out.values, out.gates))["x"])
        np.testing.assert_array_equal(found, X if k else np.zeros_like(X))


def test_derivatives_beside_infinite_scores(eager: Library) -> None:
    x = np.asarray([[-INF, 1.0, -INF, 0.0], [INF, 0.5, 2.0, -1.0]])
    out, pullback = softk.vjp(softk.select, eager.array(x), 3, epsilon=EPSILON)
    u = np.asarray([[0.5, -1.0, 2.0], [0.5, -1.0, 2.0]])
    found = eager.numpy(pullback((None, eager.array(u)))["x"])
    expected = np.zeros_like(x)
    expected[1, 1:] = testing.Oracle(x[1, 1:], 2, EPSILON).vjp(np.asarray([2.0, -1.0, 0.0]))["x"]
    assert_close(found, expected)
    assert eager.numpy(out.indices)[1].tolist() == [0, 2, 1]


def test_ties_have_the_mask_s_derivative(eager: Library) -> None:
    x, u = np.asarray([0.5, 0.5, 2.0, 0.5, -1.0]), np.asarray([0.5, -1.0])
    out, pullback = softk.vjp(softk.select, eager.array(x), 2, epsilon=EPSILON)
    full = np.zeros(5)
    full[eager.numpy(out.indices)] = u
    assert_close(eager.numpy(pullback((None, eager.array(u)))["x"]), testing.Oracle(x, 2, EPSILON).vjp(full)["x"])


def test_torch(rng: np.random.Generator) -> None:
    """Both modes of autograd, second derivatives, batches of gradients, torch.func and a compiled graph."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.asarray(X).requires_grad_()
    v, u = (torch.asarray(rng.normal(size=(2, 3))) for _ in range(2))
    expected = Oracle(X, 3, "largest", -1).vjp(v.numpy(), u.numpy())[0]

    def loss(x: Any) -> Any:
        values, _, gates = softk.select(x, 3, epsilon=EPSILON)
        return (values * v + gates * u).sum()

    assert_close(torch.autograd.grad(loss(x), x)[0], expected)
    assert_close(torch.func.grad(loss)(x.detach()), expected)
    found = torch.func.vmap(torch.func.grad(lambda row: softk.select(row, 3, epsilon=EPSILON).gates[1]))(x.detach())
    only = np.zeros((2, 3))
    only[:, 1] = 1.0
    assert_close(found, Oracle(X, 3, "largest", -1).vjp(np.zeros((2, 3)), only)[0])


@pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is:DeprecationWarning")
def test_torch_second_derivatives() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")

    def gates(x: Any, epsilon: Any) -> Any:
        values, _, gates = softk.select(x, 2, epsilon=epsilon)
        return values * values, gates

    given = (torch.asarray(X).requires_grad_(), torch.asarray(EPSILON, dtype=torch.float64).requires_grad_())
    assert torch.autograd.gradcheck(gates, given, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(gates, given)


def test_torch_compiled() -> None:
    """One graph, for the gradient too."""
    torch = pytest.importorskip("torch", reason="torch is not installed")

    def loss(x: Any) -> Any:
        values, indices, gates = softk.select(x, 2, epsilon=EPSILON)
        return (values * gates).sum() + indices.sum()

    x = torch.asarray(X).requires_grad_()
    expected = torch.autograd.grad(loss(x), x)[0].numpy()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(x), x)[0], expected)
    gradient = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    assert_close(gradient(x.detach()), expected)


def test_jax(rng: np.random.Generator) -> None:
    """Reverse mode, forward mode, a batch of gradients and the two over each other."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    x = jax.numpy.asarray(X)
    v, u, dx = rng.normal(size=(2, 3)), rng.normal(size=(2, 3)), rng.normal(size=X.shape)
    oracle = Oracle(X, 3, "largest", -1)

    def both(x: Any) -> Any:
        values, _, gates = softk.select(x, 3, epsilon=EPSILON)
        return values, gates

    def loss(x: Any) -> Any:
        values, gates = both(x)
        return (values * v + gates * u).sum()

    assert_close(jax.jit(jax.grad(loss))(x), oracle.vjp(v, u)[0])
    for rate, wanted in zip(
        jax.jit(lambda x, dx: jax.jvp(both, (x,), (dx,))[1])(x, dx), oracle.jvp(dx, 0.0), strict=True
    ):
        assert_close(rate, wanted)
    rows = jax.jit(jax.vmap(jax.grad(lambda row: softk.select(row, 3, epsilon=EPSILON).gates[1])))(x)
    only = np.zeros((2, 3))
    only[:, 1] = 1.0
    assert_close(rows, oracle.vjp(np.zeros((2, 3)), only)[0])
    step = 1e-5
    slope = jax.jit(lambda x, dx: jax.jvp(jax.grad(loss), (x,), (dx,))[1])(x, dx)
    difference = (oracle_gradient(X + step * dx, v, u) - oracle_gradient(X - step * dx, v, u)) / (2.0 * step)
    assert_close(slope, difference, 1e-8)


def oracle_gradient(x: np.ndarray, v: np.ndarray, u: np.ndarray) -> np.ndarray:
    return Oracle(x, 3, "largest", -1).vjp(v, u)[0]


def test_autograd(rng: np.random.Generator) -> None:
    """HIPS autograd, in both modes and twice."""
    autograd = pytest.importorskip("autograd", reason="autograd is not installed")
    anp = importlib.import_module("autograd.numpy")
    v, u, dx = rng.normal(size=(2, 3)), rng.normal(size=(2, 3)), rng.normal(size=X.shape)

    def loss(x: Any) -> Any:
        values, _, gates = softk.select(x, 3, epsilon=EPSILON)
        return anp.sum(values * v + gates * u)

    gradient = autograd.grad(loss)
    assert_close(gradient(X), oracle_gradient(X, v, u))
    step = 1e-5
    difference = (oracle_gradient(X + step * dx, v, u) - oracle_gradient(X - step * dx, v, u)) / (2.0 * step)
    assert_close(autograd.grad(lambda x: anp.sum(gradient(x) * dx))(X), difference, 1e-8)


# --- the parts


def test_the_mask_s_kernel_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel computes for the mask, forward and backward, is what the gates are made of."""
    marks = (np.arange(12.0).reshape(2, 6), np.zeros((2, 1)), np.zeros((2, 1)))
    kernels = (
        Kernel("triton", mask, "forward", lambda *_, **__: None, lambda *_, **__: marks),
        Kernel("triton", mask, "vjp", lambda *_, **__: None, lambda *args, **__: (10.0 * args[3][0], *(None,) * 4)),
    )
    monkeypatch.setattr(backend_of(X), "kernels", kernels)
    with softk.kernels("auto"):
        out, pullback = softk.vjp(softk.select, X, 2)
        cotangent = pullback((None, np.asarray([[1.0, 2.0], [3.0, 4.0]])))["x"]
    np.testing.assert_array_equal(out.gates, [[5.0, 1.0], [8.0, 11.0]])
    np.testing.assert_array_equal(cotangent[0], [0, 20, 0, 0, 0, 10])


@pytest.mark.parametrize("name", ["numpy", "array-api-strict", "torch", "jax"])
def test_scatter_is_the_transpose_of_a_gather(name: str, rng: np.random.Generator) -> None:
    """The library's own, and that which is made of the standard's operations."""
    lib = BY_NAME[name]
    lib.require()
    values = rng.normal(size=(3, 4))
    indices = np.argsort(rng.normal(size=(3, 7)), axis=-1)[:, :4]
    expected = np.zeros((3, 7))
    np.put_along_axis(expected, indices, values, axis=-1)
    backend = backend_of(lib.array(values))
    for scatter in (backend.scatter, lambda *args: Backend.scatter(backend, *args)):
        found = lib.numpy(scatter(lib.array(values), lib.array(indices, "int64"), 7))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("name", ["numpy", "array-api-strict", "torch", "jax"])
def test_the_library_s_own_top_k(name: str, k: int, rng: np.random.Generator) -> None:
    lib = BY_NAME[name]
    lib.require()
    x = rng.normal(size=(3, 7))
    backend = backend_of(lib.array(x))
    for top_k in (backend.top_k, lambda *args: Backend.top_k(backend, *args)):
        values, indices = (lib.numpy(one) for one in top_k(lib.array(x), k))
        np.testing.assert_array_equal(indices, np.argsort(-x, axis=-1)[:, :k])
        np.testing.assert_array_equal(values, -np.sort(-x, axis=-1)[:, :k])


# --- errors


@pytest.mark.parametrize("k", [2.0, True, None, np.asarray(2), "2"], ids=repr)
def test_k_is_no_whole_number(k: Any) -> None:
    complains(TypeError, "k", "got", "Python integer|a number or an array", softk.select, X, k)


@pytest.mark.parametrize("k", [-1, 7])
def test_k_out_of_range(k: int) -> None:
    complains(ValueError, "k", f"got {k}", "from 0 to 6", softk.select, X, k)


def test_other_errors() -> None:
    complains(ValueError, "x", r"\(2, 0\)", "at least one score", softk.select, np.zeros((2, 0)), 0)
    complains(ValueError, "mode", "'max'", "'largest' or 'smallest'", softk.select, X, 2, mode="max")
    complains(ValueError, "epsilon", "got 0", "positive", softk.select, X, 2, epsilon=0)
    complains(ValueError, "axis", "got 2", "from -2 to 1", softk.select, X, 2, axis=2)
    _, pullback = softk.vjp(softk.select, X, 2)
    complains(TypeError, "cotangent", r"\(values, gates\)", "tuple", pullback, X)
    complains(ValueError, "cotangent[1], of gates,", r"\(2, 6\)", r"shape \(2, 2\)", pullback, (None, X))
