"""Every error names the argument, its value and what is allowed."""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softk

from .libraries import BY_NAME, Library

FUNCTIONS = {"topk": softk.topk, "threshold": softk.threshold, "quantile": partial(softk.quantile, epsilon=0.1)}
X = np.asarray([[0.5, 2.0, -1.0, 1.0], [3.0, 0.0, 1.0, 2.0]])
INF, NAN = math.inf, math.nan


def complains(
    error: type[Exception], name: str, value: str, allowed: str, f: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """The call raises exactly that error, whose one line has all three parts (the last two are regular expressions)."""
    with pytest.raises(error) as caught:
        f(*args, **kwargs)
    assert caught.type is error
    text = str(caught.value)
    assert re.search(rf"(^|\W){re.escape(name)}($|\W)", text), f"no {name!r} in: {text}"
    assert re.search(value, text), f"no value {value!r} in: {text}"
    assert re.search(allowed, text), f"no range {allowed!r} in: {text}"
    assert "\n" not in text


# --- x


@pytest.mark.parametrize(
    ("x", "value"),
    [
        ([0.5, 2.0], r"got list; convert it, for example np\.asarray\(x\)"),
        ((0.5, 2.0), r"got tuple; convert it"),
        (0.5, "got float"),
        (np.float64(0.5), r"got numpy\.float64"),
        (3, "got int"),
        (None, "got NoneType"),
        ("scores", "got str 'scores'"),
        (memoryview(b"scores"), "got memoryview"),
        (range(3), "got range"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_x_is_no_array(function: str, x: Any, value: str) -> None:
    complains(TypeError, "x", value, "must be an array .* Array API standard", FUNCTIONS[function], x, 1)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "complex128"])
def test_dtype_of_x(lib: Library, function: str, dtype: str) -> None:
    f = FUNCTIONS[function]
    complains(TypeError, "x", f"got .*{dtype}", "real floating-point dtype", lib.call, f, lib.array(X, dtype), 1)


@pytest.mark.parametrize("dtype", ["object", "S3", "datetime64[s]", "longdouble"])
def test_dtype_of_x_that_only_numpy_has(dtype: str) -> None:
    x = np.zeros((2, 3), dtype)
    complains(TypeError, "x", re.escape(f"got {x.dtype}"), "real floating-point dtype of at most 64", softk.topk, x, 1)


def masked(values: np.ndarray) -> Any:
    return np.ma.masked_array(values, mask=False)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("x", (masked(X), 1), {}),
        ("k", (X, masked(X[:, :1])), {}),
        ("epsilon", (X, 1), {"epsilon": masked(X[:, :1])}),
        ("weights", (X, 1), {"weights": masked(X)}),
        ("where", (X, 1), {"where": masked(X > 0)}),
    ],
)
def test_masked_array(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    complains(TypeError, name, "MaskedArray", "ordinary array.*where=", softk.topk, *args, **kwargs)


def test_masked_array_of_probabilities() -> None:
    q = masked(np.asarray([0.5]))
    complains(TypeError, "q", "MaskedArray", "ordinary array", softk.quantile, X, q, epsilon=0.1)


def coordinates(values: Any) -> Any:
    return pytest.importorskip("sparse", reason="sparse is not installed").COO.from_numpy(np.asarray(values))


def torch_sparse(values: Any) -> Any:
    return importlib.import_module("torch").asarray(values).to_sparse()


def nested(layout: str) -> Callable[[Any], Any]:
    def make(values: Any) -> Any:
        torch = importlib.import_module("torch")
        rows = [torch.asarray(values)[0], torch.asarray(values)[0, :1]]
        return torch.nested.nested_tensor(rows, layout=getattr(torch, layout))

    return make


def chunked(values: Any) -> Any:
    return importlib.import_module("dask.array").from_array(values).map_blocks(coordinates)


@pytest.mark.filterwarnings("ignore:.*(nested tensors is in prototype|GCXS):UserWarning")
@pytest.mark.parametrize(
    ("library", "make", "kind", "dense"),
    [
        ("numpy", coordinates, r"sparse\..*COO", "{}.todense()"),
        ("torch", torch_sparse, "torch.Tensor", "{}.to_dense()"),
        ("torch", nested("strided"), "torch.Tensor", "to_padded_tensor({}, -math.inf)"),
        ("torch", nested("jagged"), "NestedTensor", "to_padded_tensor({}, -math.inf)"),
        ("dask", chunked, r"dask\.array", "block.todense()"),
    ],
    ids=["sparse", "torch-sparse", "torch-nested", "torch-jagged", "dask-of-sparse"],
)
def test_array_that_is_not_dense(library: str, make: Callable[[Any], Any], kind: str, dense: str) -> None:
    """As scores, and beside them; an empty entry is no score of 0, and what a library lacks for it is no answer."""
    BY_NAME[library].require()
    x, other = BY_NAME[library].array(X), make(X)

    def refused(name: str, f: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        complains(
            TypeError, name, f"got .*{kind}", rf"dense array.*{re.escape(dense.format(name))}", f, *args, **kwargs
        )

    for f in FUNCTIONS.values():
        if not (kind == "NestedTensor" and f is softk.topk):  # which takes it as the scores
            refused("x", f, other, 1)
        refused("epsilon", f, x, 1, epsilon=other)
        refused("weights", f, x, 1, weights=other)
    for f in (partial(softk.sort, epsilon=0.1), partial(softk.rank, epsilon=0.1)):
        refused("x", f, other)
    refused("k", softk.topk, x, other)
    refused("x", softk.sorted_topk, other, 1)
    refused("anchors", softk.transport, x, other, x)
    refused("keys", softk.neighbors.weights, x, other, 1)
    refused("query", softk.attention.attend, other, x, x, 1)
    refused("scores", softk.beam.step, other)
    refused("cotangent", softk.vjp(softk.topk, x, 1)[1], other)
    refused("tangents['x']", softk.jvp, softk.topk, x, 1, tangents={"x": other})


@pytest.mark.parametrize(
    ("module", "make"),
    [
        ("numpy", lambda np: np.random.default_rng()),
        ("numpy", lambda np: np.dtype("float32")),
        ("numpy", lambda np: type("Mixed", (np.lib.mixins.NDArrayOperatorsMixin,), {})()),
        ("torch", lambda torch: torch.nn.Linear(2, 2)),
        ("torch", lambda torch: torch.float32),
        ("dask", lambda dask: dask.delayed(1)),
        ("jax", lambda jax: jax.ShapeDtypeStruct((3,), "float32")),
        ("jax.experimental.sparse", lambda sparse: sparse.BCOO.fromdense(X)),
        ("scipy.sparse", lambda sparse: sparse.csr_array(X)),
    ],
    ids=["generator", "numpy-dtype", "mixin", "module", "torch-dtype", "delayed", "jax-shape", "jax-sparse", "scipy"],
)
def test_what_comes_with_a_library_is_no_array(module: str, make: Callable[[Any], Any]) -> None:
    """A library's arrays are known by their own type, not by the module of any of its bases."""
    value = make(pytest.importorskip(module, reason=f"{module} is not installed"))
    kind = re.escape(type(value).__qualname__)
    for f in FUNCTIONS.values():
        complains(TypeError, "x", f"got .*{kind}", "must be an array .* Array API standard", f, value, 1)
    complains(TypeError, "k", f"got .*{kind}", "a number or an array", softk.topk, X, value)
    complains(TypeError, "weights", f"got .*{kind}", "must be an array", softk.topk, X, 1, weights=value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
def test_masked_tensor() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.masked.masked_tensor(torch.asarray(X), torch.asarray(X > 0))
    complains(TypeError, "x", "MaskedTensor", "ordinary array.*where=", softk.topk, x, 1)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_x_without_axes(lib: Library, function: str) -> None:
    x = lib.array(1.0)
    complains(ValueError, "x", r"got .*shape \(\)", "at least one axis", lib.call, FUNCTIONS[function], x, 1)


@pytest.mark.parametrize("function", ["threshold", "quantile"])
@pytest.mark.parametrize(("shape", "axis"), [((2, 0), -1), ((0, 2), 0)])
def test_no_scores(lib: Library, function: str, shape: tuple[int, ...], axis: int) -> None:
    f, x, value = FUNCTIONS[function], lib.array(np.zeros(shape)), re.escape(f"got shape {shape}, axis {axis % 2}")
    complains(ValueError, "x", value, "at least one score along axis", lib.call, f, x, 0, axis=axis)


# --- numbers


@pytest.mark.parametrize("k", [-1, -1e-9, 5, 4.001, 1e300, INF, -INF, NAN, np.float32(4.5), np.int64(-2)], ids=repr)
@pytest.mark.parametrize("function", ["topk", "threshold"])
def test_k_out_of_range(function: str, k: Any) -> None:
    complains(ValueError, "k", re.escape(f"got {k!r}"), "from 0 to 4", FUNCTIONS[function], X, k)


def test_range_of_k_is_the_size_along_axis() -> None:
    complains(ValueError, "k", "got 3", "from 0 to 2", softk.topk, X, 3, axis=0)
    complains(ValueError, "k", "got 1", "from 0 to 0", softk.topk, np.zeros((2, 0)), 1)


@pytest.mark.parametrize("k", [-1, -1e-9, INF, -INF, NAN], ids=repr)
@pytest.mark.parametrize("function", ["topk", "threshold"])
def test_k_out_of_range_with_weights(function: str, k: float) -> None:
    """Its upper bound, the sum of the weights, is an array's value: it makes NaN instead."""
    f = FUNCTIONS[function]
    complains(ValueError, "k", re.escape(f"got {k!r}"), "at least 0 and finite", f, X, k, weights=np.ones(4))


@pytest.mark.parametrize("epsilon", [0, 0.0, -0.1, INF, -INF, NAN, 1e-310, np.float32(-1.0)], ids=repr)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_epsilon_out_of_range(function: str, epsilon: Any) -> None:
    f = FUNCTIONS[function]
    complains(ValueError, "epsilon", re.escape(f"got {epsilon!r}"), "positive finite", f, X, 1, epsilon=epsilon)


@pytest.mark.parametrize("epsilon", [1e-39, 1e39])
def test_range_of_epsilon_is_the_working_dtype_s(epsilon: float) -> None:
    """What is 0 or infinite in float32 is out of range there, and for half precision too."""
    softk.topk(X, 1, epsilon=epsilon)
    for dtype in ("float32", "float16"):
        x = X.astype(dtype)
        complains(
            ValueError,
            "epsilon",
            re.escape(f"got {epsilon!r}"),
            "from .* to .* in float32",
            softk.topk,
            x,
            1,
            epsilon=epsilon,
        )


@pytest.mark.parametrize("q", [-0.1, 1.0001, 50, INF, -INF, NAN, np.float32(2.0)], ids=repr)
def test_q_out_of_range(q: Any) -> None:
    complains(ValueError, "q", re.escape(f"got {q!r}"), "from 0 to 1", softk.quantile, X, q, epsilon=0.1)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "NoneType"),
        ("2", "str"),
        ([2], "list"),
        (True, "bool"),
        (2j, "complex"),
        (Decimal(2), "Decimal"),
        (np.complex128(2), "complex128"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_neither_number_nor_array(value: Any, kind: str) -> None:
    wanted = "a number or an array|must be real"
    complains(TypeError, "k", kind, wanted, softk.topk, X, value)
    complains(TypeError, "k", kind, wanted, softk.threshold, X, value)
    complains(TypeError, "q", kind, wanted, softk.quantile, X, value, epsilon=0.1)
    complains(TypeError, "epsilon", kind, wanted, softk.topk, X, 2, epsilon=value)


@pytest.mark.parametrize("value", [1.0, True, [1.0, 1.0, 1.0, 1.0], "all", np.float64(1.0)], ids=repr)
@pytest.mark.parametrize("name", ["weights", "where"])
def test_not_an_array_of_items(name: str, value: Any) -> None:
    for f in FUNCTIONS.values():
        complains(TypeError, name, f"got .*{type(value).__name__}", "must be an array", f, X, 1, **{name: value})


@pytest.mark.parametrize("dtype", ["bool", "complex128"])
def test_dtype_of_real_arguments(lib: Library, dtype: str) -> None:
    x, one, row = lib.array(X), lib.array([[1], [1]], dtype), lib.array([1] * 4, dtype)
    allowed = "must be real"
    complains(TypeError, "k", dtype, allowed, lib.call, softk.topk, x, one)
    complains(TypeError, "q", dtype, allowed, lib.call, softk.quantile, x, one, epsilon=0.1)
    complains(TypeError, "epsilon", dtype, allowed, lib.call, softk.topk, x, 1, epsilon=one)
    complains(TypeError, "weights", dtype, allowed, lib.call, softk.topk, x, 1, weights=row)


@pytest.mark.parametrize("dtype", ["int64", "float64"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtype_of_where(lib: Library, function: str, dtype: str) -> None:
    where, f = lib.array([1] * 4, dtype), FUNCTIONS[function]
    complains(TypeError, "where", f"got .*{dtype}", "boolean", lib.call, f, lib.array(X), 1, where=where)


# --- axis, mode, hard


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("axis", [2, -3, 100])
def test_axis_out_of_range(lib: Library, function: str, axis: int) -> None:
    f, x = FUNCTIONS[function], lib.array(X)
    complains(ValueError, "axis", f"got {axis}", "from -2 to 1 .* 2 axes", lib.call, f, x, 1, axis=axis)


@pytest.mark.parametrize("axis", [None, 0.0, "last", [0, 1], True, False, np.True_], ids=repr)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_axis_is_no_integer(function: str, axis: Any) -> None:
    f = FUNCTIONS[function]
    complains(TypeError, "axis", re.escape(f"got {axis!r}"), "must be an integer", f, X, 1, axis=axis)


@pytest.mark.parametrize("function", [*FUNCTIONS, "log_topk"])
def test_axis_is_a_bad_tuple(function: str) -> None:
    f = FUNCTIONS.get(function, softk.log_topk)
    complains(ValueError, "axis", r"got \(\)", "at least one axis", f, X, 1, axis=())
    complains(ValueError, "axis", r"got \(0, -2\)", "each axis once", f, X, 1, axis=(0, -2))
    complains(ValueError, "axis", "got 2", "from -2 to 1 .* 2 axes", f, X, 1, axis=(0, 2))
    complains(TypeError, "axis", "got 1.0", "an integer or a tuple of integers", f, X, 1, axis=(0, 1.0))


def test_several_axes_where_one_is_asked_for() -> None:
    for f in (softk.sorted_topk, softk.select):
        complains(TypeError, "axis", r"got \(0, 1\)", "must be an integer", f, X, 1, axis=(0, 1))


def test_shape_of_slice_arguments_of_several_axes() -> None:
    complains(ValueError, "k", r"got shape \(2, 1\)", r"shape \(1, 1\)", softk.topk, X, np.ones((2, 1)), axis=(0, 1))
    complains(ValueError, "k", "got 9", "from 0 to 8", softk.topk, X, 9, axis=(0, 1))


@pytest.mark.parametrize("mode", ["max", "Largest", "", None, 1, ["largest"]], ids=repr)
@pytest.mark.parametrize("function", ["topk", "threshold"])
def test_mode(function: str, mode: Any) -> None:
    f = FUNCTIONS[function]
    complains(ValueError, "mode", re.escape(f"got {mode!r}"), "'largest' or 'smallest'", f, X, 1, mode=mode)


def test_hard_has_no_weights(lib: Library) -> None:
    x, weights = lib.array(X), lib.array(np.ones(4))
    complains(
        ValueError, "hard", "weights", "not support weights", lib.call, softk.topk, x, 1, weights=weights, hard=True
    )


@pytest.mark.parametrize("k", [0.5, 2.25, np.float32(1.5)], ids=repr)
def test_hard_needs_a_whole_k(k: Any) -> None:
    complains(ValueError, "k", re.escape(f"got {k!r}"), "a whole number with hard=True", softk.topk, X, k, hard=True)


# --- shapes


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((2,), -1),
        ((4,), -1),
        ((2, 4), -1),
        ((3, 1), -1),
        ((1, 2, 1), -1),
        ((2, 1), 0),
        ((3,), 0),
        ((5, 1, 4), 0),
        ((0, 1), -1),
    ],
    ids=str,
)
def test_shape_of_slice_arguments(lib: Library, shape: tuple[int, ...], axis: int) -> None:
    """One value along axis, and no more slices than x has."""
    x, values = lib.array(X), lib.array(np.full(shape, 0.5))
    value, allowed = re.escape(f"got shape {shape}"), re.escape(str((2, 1) if axis == -1 else (1, 4)))
    complains(ValueError, "k", value, allowed, lib.call, softk.topk, x, values, axis=axis)
    complains(ValueError, "k", value, allowed, lib.call, softk.threshold, x, values, axis=axis)
    for f in FUNCTIONS.values():
        complains(ValueError, "epsilon", value, allowed, lib.call, f, x, 1, axis=axis, epsilon=values)


@pytest.mark.parametrize("shape", [(2,), (5,), (4, 2), (3, 4), (1, 2, 4), (5, 2, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("name", ["weights", "where"])
def test_shape_of_item_arguments(lib: Library, name: str, shape: tuple[int, ...]) -> None:
    values = {name: lib.array(np.ones(shape), "bool" if name == "where" else None)}
    for f in FUNCTIONS.values():
        value = re.escape(f"got shape {shape}")
        complains(ValueError, name, value, r"shape of x, \(2, 4\)", lib.call, f, lib.array(X), 1, **values)


def test_items_do_not_enlarge_an_axis_of_one() -> None:
    value = r"got shape \(2, 4\)"
    complains(ValueError, "weights", value, r"\(2, 1\)", softk.topk, X[:, :1], 1, weights=np.ones((2, 4)))
    complains(ValueError, "k", value, r"\(1, 1\)", softk.topk, X[:1], np.ones((2, 4)))


# --- one library, one device

UNMIXED = ["numpy", "array-api-strict", "torch", "jax", "dask"]
KINDS = {"array-api-strict": r"array_api_strict\.", "jax": "a JAX array", "dask": r"dask\.array\."}
PAIRS = pytest.mark.parametrize(("name", "other"), list(permutations(UNMIXED, 2)))


def two_libraries(name: str, other: str) -> tuple[Any, Callable[..., Any], str]:
    """Scores of the one, how to make arrays of the other, and how a message names the two."""
    for library in (BY_NAME[name], BY_NAME[other]):
        library.require()
    one, two = (KINDS.get(found, rf"{found}\.") for found in (name, other))
    value = rf"{two}.* beside {one}"
    return BY_NAME[name].array(X), BY_NAME[other].array, value


@PAIRS
def test_mixed_libraries(name: str, other: str) -> None:
    x, foreign, value = two_libraries(name, other)
    same = "same library as x"
    column, row = foreign([[1.0], [1.0]]), foreign(np.ones(4))
    for f in (softk.topk, softk.threshold):
        complains(TypeError, "k", value, same, f, x, column)
        complains(TypeError, "k", value, same, f, x, foreign(1.0))
    complains(TypeError, "q", value, same, softk.quantile, x, row, epsilon=0.1)
    for f in FUNCTIONS.values():
        complains(TypeError, "epsilon", value, same, f, x, 1, epsilon=column)
        complains(TypeError, "weights", value, same, f, x, 1, weights=row)
        complains(TypeError, "where", value, same, f, x, 1, where=foreign(np.full(4, True)))


@pytest.mark.parametrize(("name", "code"), [("torch", "torch.asarray({})"), ("jax", "jnp.asarray({})")])
def test_the_advice_for_mixed_libraries_drops_no_gradient(name: str, code: str) -> None:
    """NumPy's array is to be converted, on either side."""
    x, foreign, _ = two_libraries("numpy", name)
    advice = f"; convert one, for example {code}"
    for scores, epsilon, of in ((x, foreign(0.5), "x"), (foreign(X), np.asarray(0.5), "epsilon")):
        with pytest.raises(TypeError, match=re.escape(advice.format(of)) + "$"):
            softk.topk(scores, 1, epsilon=epsilon)


def test_tracers_are_called_arrays_of_jax() -> None:
    jax = pytest.importorskip("jax")
    for transform in (jax.grad, jax.jit, lambda f: lambda e: jax.vmap(f)(np.asarray([e]))):
        with pytest.raises(TypeError, match=r"got a JAX array beside numpy\.ndarray; .* jnp\.asarray\(x\)"):
            transform(lambda e: softk.topk(np.ones(3), 1, epsilon=e)[0])(0.5)


def test_objects_that_jax_converts() -> None:
    class Parameter:
        def __jax_array__(self) -> Any:
            raise AssertionError("it is not converted")

    with pytest.raises(TypeError, match=r"x must be an array .*Parameter; pass jnp.asarray\(x\)$"):
        softk.topk(Parameter(), 1)
    with pytest.raises(TypeError, match=r"epsilon must be a number or an array .*; pass jnp.asarray\(epsilon\)$"):
        softk.topk(np.ones(3), 1, epsilon=Parameter())


@PAIRS
def test_mixed_libraries_of_derivatives(name: str, other: str) -> None:
    x, foreign, value = two_libraries(name, other)
    same = "same library"
    _, pullback = softk.vjp(softk.topk, x, 1)
    complains(TypeError, "cotangent", value, same, pullback, foreign(X))
    complains(TypeError, "tangents", value, same, softk.jvp, softk.topk, x, 1, tangents={"x": foreign(X)})


def strict_devices() -> tuple[Any, Any]:
    strict = importlib.import_module("array_api_strict")
    return strict.asarray(X), strict.asarray([[1.0], [1.0]], device=strict.Device("device1"))


def torch_devices() -> tuple[Any, Any]:
    torch = importlib.import_module("torch")
    return torch.asarray(X), torch.ones((2, 1), dtype=torch.float64, device="meta")


@pytest.mark.parametrize(
    ("library", "arrays", "first", "second"),
    [("array-api-strict", strict_devices, "CPU_DEVICE", "device1"), ("torch", torch_devices, "cpu", "meta")],
    ids=["array-api-strict", "torch"],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_mixed_devices(library: str, arrays: Callable[[], Any], first: str, second: str, swapped: bool) -> None:
    BY_NAME[library].require()
    x, column = arrays()
    if swapped:
        x, column, first, second = column, x[:, :1], second, first
    value, same = f"{second}.* beside .*{first}", "device of x"
    for f in FUNCTIONS.values():
        complains(TypeError, "epsilon", value, same, f, x, 1, epsilon=column)
        complains(TypeError, "weights", value, same, f, x, 1, weights=column)
        complains(TypeError, "where", value, same, f, x, 1, where=column > 0.0)
    complains(TypeError, "k", value, same, softk.topk, x, column)
    complains(TypeError, "k", value, same, softk.threshold, x, column)
    complains(TypeError, "q", value, same, softk.quantile, x, column, epsilon=0.1)


# --- explicit derivatives


@pytest.mark.parametrize("f", [np.sort, "topk", None, lambda x, k: x], ids=lambda f: type(f).__name__)
def test_foreign_function(f: Any) -> None:
    value, allowed = re.escape(f"got {f!r}"), r"function of softk.*softk\.topk"
    complains(TypeError, "f", value, allowed, softk.vjp, f, X, 1)
    complains(TypeError, "f", value, allowed, softk.jvp, f, X, 1, tangents={})


@pytest.mark.parametrize(
    ("function", "wrong", "right"),
    [("topk", (2,), (2, 4)), ("topk", (2, 1), (2, 4)), ("threshold", (2, 4), (2,)), ("quantile", (), (2,))],
)
def test_shape_of_the_cotangent(lib: Library, function: str, wrong: tuple[int, ...], right: tuple[int, ...]) -> None:
    """Not even one that would broadcast."""
    _, pullback = softk.vjp(getattr(softk, function), lib.array(X), 0.5, epsilon=0.1)
    value, allowed = re.escape(f"got {wrong}"), re.escape(f"shape {right}")
    complains(ValueError, "cotangent", value, allowed, pullback, lib.array(np.ones(wrong)))


@pytest.mark.parametrize("cotangent", [None, 1.0, [[1.0] * 4] * 2, "ones"], ids=lambda value: type(value).__name__)
def test_cotangent_is_no_array(cotangent: Any) -> None:
    _, pullback = softk.vjp(softk.topk, X, 1)
    with pytest.raises((TypeError, ValueError), match=r"cotangent must .*got .*"):
        pullback(cotangent)


@pytest.mark.parametrize("name", ["k", "weights", "where", "axis", "q", "y"])
def test_tangent_of_what_has_none(name: str) -> None:
    """A number, an argument that was not given, an array that is not real floating-point, no argument at all."""
    kwargs = {"where": np.full(4, True), "epsilon": np.asarray(0.5)}
    value, allowed = f"got '{name}'", re.escape("one of ['epsilon', 'x']")
    complains(ValueError, "tangents", value, allowed, softk.jvp, softk.topk, X, 1, tangents={name: X}, **kwargs)


def test_tangent_of_an_integer_array() -> None:
    k = np.asarray([[1], [2]])
    complains(ValueError, "tangents", "got 'k'", r"one of \['x'\]", softk.jvp, softk.topk, X, k, tangents={"k": k})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_shape_of_a_tangent(lib: Library, function: str) -> None:
    f, x, epsilon = getattr(softk, function), lib.array(X), lib.array(0.5)
    named: dict[str, Any] = {"epsilon": 0.1, "tangents": {"x": lib.array(np.ones(4))}}
    complains(ValueError, "tangents['x']", r"got \(4,\)", r"shape \(2, 4\)", softk.jvp, f, x, 0.5, **named)
    tangents = {"epsilon": lib.array(np.ones((2, 1)))}
    allowed = r"shape \(\)"
    name = "tangents['epsilon']"
    complains(ValueError, name, r"got \(2, 1\)", allowed, softk.jvp, f, x, 0.5, epsilon=epsilon, tangents=tangents)


@pytest.mark.parametrize("derivative", [softk.vjp, softk.jvp])
def test_derivatives_check_their_function_s_arguments(derivative: Any) -> None:
    kwargs = {"tangents": {}} if derivative is softk.jvp else {}
    complains(ValueError, "k", "got 5", "from 0 to 4", derivative, softk.topk, X, 5, **kwargs)
    complains(
        ValueError, "axis", "got 2", "from -2 to 1", derivative, softk.quantile, X, 0.5, axis=2, epsilon=0.1, **kwargs
    )


# --- names and types

ONE = np.asarray([1.0, 1.0])
#: Every public function with the arguments that it needs.
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "topk": (softk.topk, (X,), {"k": 2}),
    "log_topk": (softk.log_topk, (X,), {"k": 2}),
    "threshold": (softk.threshold, (X,), {"k": 2}),
    "quantile": (softk.quantile, (X,), {"q": 0.5}),
    "select": (softk.select, (X,), {"k": 2}),
    "sorted_topk": (softk.sorted_topk, (X,), {"k": 2}),
    "sort": (softk.sort, (X,), {}),
    "rank": (softk.rank, (X,), {}),
    "transport": (softk.transport, (X,), {"anchors": np.asarray([0.0, 1.0]), "marginals": ONE}),
    "assign": (softk.assign, (X, np.ones(4)), {}),
    "weights": (softk.neighbors.weights, (X,), {"keys": X, "k": 1}),
    "class_probabilities": (softk.neighbors.class_probabilities, (X,), {"keys": X, "labels": X, "k": 1}),
    "loss": (softk.neighbors.loss, (X,), {"keys": X, "query_labels": X, "key_labels": X, "k": 1}),
    "attend": (softk.attention.attend, (X,), {"key": X, "value": X, "k": 1}),
    "attention.weights": (softk.attention.weights, (X,), {"key": X, "k": 1}),
    "ndcg": (softk.losses.ndcg, (X, X), {}),
    "recall": (softk.losses.recall, (X, X), {"k": 2}),
    "precision": (softk.losses.precision, (X, X), {"k": 2}),
    "average_precision": (softk.losses.average_precision, (X, X), {}),
    "reciprocal_rank": (softk.losses.reciprocal_rank, (X, X), {}),
    "spearman": (softk.losses.spearman, (X, X), {}),
    "cross_entropy": (softk.losses.cross_entropy, (X, np.asarray([0, 1])), {"k": 2}),
    "subset": (softk.sampling.subset, (X, 2, np.full((2, 4), 0.5)), {}),
    "step": (softk.beam.step, (X,), {"beams": 2}),
    "search": (softk.beam.search, (lambda inputs, states: (X, states), X), {"states": X}),
}
#: What must be passed by name.
REST: dict[str, dict[str, Any]] = {
    "search": {"length": 2, "end": 0},
    **{name: {"epsilon": 0.1} for name in ("quantile", "sort", "rank")},
}
each_function = pytest.mark.parametrize("name", CALLS)


@each_function
def test_arguments_by_name_and_by_position(name: str) -> None:
    f, args, named = CALLS[name]
    rest = REST.get(name, {})
    found = [f(*args, **named, **rest), f(*args, *named.values(), **rest)]
    if hasattr(f, "call"):
        found += [softk.vjp(f, *args, **named, **rest)[0], softk.jvp(f, *args, tangents={}, **named, **rest)[0]]
    parts = [one if isinstance(one, tuple) else (one,) for one in found]
    for column in zip(*parts, strict=True):
        for values in column[1:]:
            np.testing.assert_array_equal(values, column[0])


@pytest.mark.parametrize(
    ("name", "foreign", "meant"),
    [
        *((name, "dim", "use axis=") for name in ("topk", "log_topk", "threshold", "quantile", "sorted_topk")),
        *((name, "dim", "use axis=") for name in ("sort", "rank", "transport")),
        *((name, "largest", 'mode="largest" or mode="smallest"') for name in ("topk", "log_topk", "threshold")),
        ("sorted_topk", "largest", 'mode="largest" or mode="smallest"'),
        ("sort", "largest", "use descending="),
        ("rank", "reverse", "use descending="),
        *((name, "eps", "use epsilon=") for name in CALLS),
        *((name, "temperature", "epsilon=, which is twice the temperature") for name in CALLS if name != "assign"),
        ("assign", "temperature", "epsilon=, which is the temperature"),
        ("assign", "scores", "pass scores as the first positional argument"),
        ("topk", "sorted", "softk.sorted_topk"),
        ("sorted_topk", "sorted", "always sorts"),
        ("threshold", "keepdim", "use keepdims="),
        ("quantile", "keepdim", "use keepdims="),
        ("topk", "weight", "use weights="),
        ("topk", "mask", "use where="),
        ("weights", "mask", "use where="),
        ("attend", "attn_mask", "use where=, of bool, or bias=, of floats"),
        ("attend", "mask", "use where=, of bool, or bias=, of floats"),
        ("attend", "dropout_p", "use dropout="),
        ("weights", "n_neighbors", "use k="),
        ("step", "k", "use beams="),
        ("quantile", "quantiles", "use q="),
        ("topk", "input", "pass x as the first positional argument"),
        ("topk", "x", "pass x as the first positional argument"),
        ("weights", "queries", "pass queries as the first positional argument"),
        ("topk", "keepdims", "its arguments are x, k, axis, mode, epsilon, weights, where, hard"),
        ("quantile", "mode", "its arguments are x, q, axis, epsilon"),
        ("threshold", "hard", "its arguments are x, k, axis"),
    ],
)
def test_the_argument_that_is_meant(name: str, foreign: str, meant: str) -> None:
    f, args, named = CALLS[name]
    given = {**named, **REST.get(name, {}), foreign: 1}
    calls = [lambda: f(*args, **given)]
    if hasattr(f, "call"):
        calls += [lambda: softk.vjp(f, *args, **given), lambda: softk.jvp(f, *args, tangents={}, **given)]
    for call in calls:
        complains(TypeError, foreign, rf"^{f.__name__}\(\) has no argument '{foreign}'", re.escape(meant), call)


def test_too_many_places() -> None:
    """torch.topk takes the axis in the third place."""
    complains(TypeError, "axis", "got 3", "only x, k by position.*axis=, mode=, epsilon=", softk.topk, X, 2, -1)
    complains(TypeError, "axis", "got 2", "only x by position.*axis=, descending=", softk.sort, X, -1, epsilon=0.1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'k'"):
        softk.topk(X)  # type: ignore[call-arg]


@each_function
def test_signature_is_clean(name: str) -> None:
    """What a reader is shown: every argument, and the type of the result by its own name."""
    seen = inspect.signature(CALLS[name][0])
    assert not {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL} & {
        one.kind for one in seen.parameters.values()
    }
    returned = {"sorted_topk": "SortedTopK[ArrayT]", "transport": "Plan[ArrayT]", "step": "Step[ArrayT]"}
    returned |= {"assign": "Plan[ArrayT]", "search": "Beams[ArrayT]", "select": "Selected[ArrayT]"}
    assert seen.return_annotation == returned.get(name, "ArrayT")
    assert CALLS[name][0].__annotations__["return"] == seen.return_annotation


TYPED = """
import softk
import torch
from numpy import float32, int64
from numpy.typing import NDArray

def f(x: NDArray[float32], k: NDArray[int64], t: torch.Tensor) -> None:
    reveal_type(softk.topk(x, k))
    reveal_type(softk.topk(t, 2.5, epsilon=t))
    reveal_type(softk.quantile(t, q=0.5, epsilon=0.1))
    reveal_type(softk.sorted_topk(t, 2))
    values, _ = softk.sorted_topk(x, k=2)
    reveal_type(values)
    reveal_type(softk.transport(t, t, t).plan)
    reveal_type(softk.neighbors.loss(t, t, t, t, 1))
    reveal_type(softk.attention.attend(t, t, t, k=2))
    reveal_type(softk.beam.step(t).tokens)
    softk.topk([1.0], 2)
    softk.topk(t, 2, dim=1)
    softk.topk(t, "2")
    softk.topk(t, 2, mode="max")
"""


def test_types(tmp_path: Path) -> None:
    """To a type checker the result is of the array's own type, and a call that raises is an error."""
    pytest.importorskip("torch", reason="torch is not installed")
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    (tmp_path / "typed.py").write_text(TYPED)
    root = Path(softk.__file__).parent.parent
    config = ["--config-file", str(root / "pyproject.toml"), "--cache-dir", str(root / ".mypy_cache")]
    printed, problems, _ = api.run([*config, str(tmp_path / "typed.py")])
    assert not problems
    array, tensor = r"numpy\.ndarray\[.*float.*", r"torch\._tensor\.Tensor"
    pair = rf"tuple\[{tensor}, {tensor}, fallback=softk\._functions\.ordering\.SortedTopK\[{tensor}\]\]"
    wanted = [array, tensor, tensor, pair, array, tensor, tensor, tensor, tensor]
    found = re.findall(r'Revealed type is "(.*)"', printed)
    assert len(found) == len(wanted), printed
    for one, pattern in zip(found, wanted, strict=True):
        assert re.fullmatch(pattern, one), printed
    kinds = re.findall(r"error: .*\[(.*)\]$", printed, re.MULTILINE)
    assert kinds == ["type-var", "call-arg", "arg-type", "arg-type"], printed


# --- words of the library at hand


WORDS = {
    "numpy": (".astype(np.float32)", "np.asarray"),
    "array-api-strict": ("xp.astype(x, xp.float32)", "xp.asarray"),
    "torch": ("x.float() or x.to(torch.float32)", "torch.asarray"),
    "jax": ("x.astype(jnp.float32)", "jnp.asarray"),
    "dask": ('x.astype("float32")', "da.asarray"),
}


@pytest.mark.parametrize("name", WORDS)
def test_advice_in_the_words_of_the_library(name: str) -> None:
    cast, own = (re.escape(words) for words in WORDS[name])
    BY_NAME[name].require()
    x, other = BY_NAME[name].array(X), BY_NAME["array-api-strict" if name == "numpy" else "numpy"]
    other.require()
    for f in FUNCTIONS.values():
        complains(TypeError, "x", "got .*int64", f"convert it: .*{cast}", f, BY_NAME[name].array(X, "int64"), 1)
        complains(TypeError, "weights", "beside", rf"{own}\(weights\)", f, x, 1, weights=other.array(X))


def test_no_advice_to_convert_a_complex_array(lib: Library) -> None:
    """Its imaginary part would be lost."""
    with pytest.raises(TypeError, match=r"got .*complex128") as caught:
        lib.call(softk.topk, lib.array(X, "complex128"), 1)
    assert "convert" not in str(caught.value)


def test_device_in_the_words_of_the_library() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    where = torch.ones(4, dtype=torch.bool, device="meta")
    complains(TypeError, "where", "beside", r"where\.to\(x\.device\)", softk.topk, torch.asarray(X), 1, where=where)


@pytest.mark.parametrize(
    ("shape", "axis", "given", "index"),
    [
        ((3, 4), -1, (3,), "[:, None]"),
        ((4, 4), -1, (4,), "[:, None]"),
        ((2, 3, 4), -1, (2, 3), "[:, :, None]"),
        ((2, 3, 4), -1, (3,), "[:, None]"),
        ((2, 3, 4), 1, (2, 4), "[:, None, :]"),
    ],
    ids=str,
)
def test_where_the_axis_is_missing(
    lib: Library, shape: tuple[int, ...], axis: int, given: tuple[int, ...], index: str
) -> None:
    x, values = lib.array(np.zeros(shape)), np.ones(given)
    right = eval(f"values{index}")
    for f in FUNCTIONS.values():
        allowed = re.escape(f"write epsilon{index}")
        complains(ValueError, "epsilon", "got shape", allowed, f, x, 1, axis=axis, epsilon=lib.array(values))
    for f in (softk.topk, softk.log_topk, softk.threshold):
        complains(ValueError, "k", "got shape", re.escape(f"write k{index}"), f, x, lib.array(values), axis=axis)
    lib.call(softk.topk, x, lib.array(right), axis=axis)


def test_no_index_helps() -> None:
    with pytest.raises(ValueError, match=r"got shape \(4,\)$"):
        softk.topk(np.zeros((3, 4)), np.ones(4))


# --- switches


@pytest.mark.parametrize("value", ["yes", 1, 0, None, np.True_, np.asarray(True)], ids=repr)
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("hard", lambda value: softk.topk(X, 1, hard=value)),
        ("hard", lambda value: softk.beam.step(X, hard=value)),
        ("hard", lambda value: softk.beam.search(lambda x, s: (x, s), X, length=1, end=0, hard=value)),
        ("keepdims", lambda value: softk.threshold(X, 1, keepdims=value)),
        ("keepdims", lambda value: softk.quantile(X, 0.5, keepdims=value, epsilon=0.1)),
        ("descending", lambda value: softk.sort(X, descending=value, epsilon=0.1)),
        ("descending", lambda value: softk.rank(X, descending=value, epsilon=0.1)),
        ("is_causal", lambda value: softk.attention.attend(X, X, X, 1, is_causal=value)),
        ("enable_gqa", lambda value: softk.attention.weights(X, X, 1, enable_gqa=value)),
    ],
    ids=["topk", "step", "search", "threshold", "quantile", "sort", "rank", "attend", "attention.weights"],
)
def test_switch_is_a_bool(name: str, call: Callable[[Any], Any], value: Any) -> None:
    complains(TypeError, name, re.escape(f"got {value!r}"), "must be True or False", call, value)


# --- structures of derivatives


@pytest.mark.parametrize(
    "cotangent",
    [X, np.ones((2, 2, 4)), {"values": X}, (X,), (X, X, X), None, 1.0],
    ids=["array", "two-rows", "mapping", "one", "three", "none", "number"],
)
def test_cotangent_of_a_pair(cotangent: Any) -> None:
    _, pullback = softk.vjp(softk.sorted_topk, X, 2)
    complains(TypeError, "cotangent", "got ", r"a tuple \(values, assignment\)", pullback, cotangent)


def test_parts_of_the_cotangent_of_a_pair() -> None:
    found, pullback = softk.vjp(softk.sorted_topk, X, 2)
    complains(ValueError, "cotangent[0]", r"got \(2, 4\)", r"of values, .*\(2, 2\)", pullback, (X, None))
    complains(ValueError, "cotangent[1]", r"got \(2, 4\)", r"of assignment, .*\(2, 2, 4\)", pullback, [None, X])
    assert set(pullback(found)) == {"x"}


def test_cotangent_of_one_array() -> None:
    mask, pullback = softk.vjp(softk.topk, X, 2)
    for cotangent in ((mask,), [mask], {"x": mask}):
        complains(TypeError, "cotangent", f"got {type(cotangent).__name__}", "one array", pullback, cotangent)
    plan, pullback = softk.vjp(softk.transport, X, X[:, :2], np.ones((2, 2)))
    complains(TypeError, "cotangent", "got softk.*Plan", "one array, the cotangent of plan", pullback, plan)
    assert "x" in pullback(plan.plan)


@pytest.mark.parametrize("dtype", ["complex128", "bool"])
def test_cotangent_is_real(lib: Library, dtype: str) -> None:
    x, wrong = lib.array(X), lib.array(np.ones((2, 4)), dtype)
    _, pullback = softk.vjp(softk.topk, x, 1)
    complains(TypeError, "cotangent", f"got dtype .*{dtype}", "must be real", pullback, wrong)
    tangents = {"x": wrong}
    complains(
        TypeError, "tangents['x']", f"got dtype .*{dtype}", "real", softk.jvp, softk.topk, x, 1, tangents=tangents
    )
    wrong = lib.array(np.ones((2, 2)), dtype)
    pullback = softk.vjp(softk.sorted_topk, x, 2)[1]
    complains(TypeError, "cotangent[0]", f"got dtype .*{dtype}", "must be real", pullback, (wrong, None))


@pytest.mark.parametrize("tangents", [X, [X], None], ids=lambda value: type(value).__name__)
def test_tangents_are_a_mapping(tangents: Any) -> None:
    complains(TypeError, "tangents", "got ", "a mapping", softk.jvp, softk.topk, X, 1, tangents=tangents)


def test_explicit_derivatives_are_those_of_operators() -> None:
    """A composition has none of its own, and the error says what differentiates it."""
    for f, args in ((softk.attention.attend, (X, X, X, 1)), (softk.attention.weights, (X, X, 1))):
        message = rf"got softk\.attention\.{f.__name__}, which is a composition.*autodiff of PyTorch, JAX"
        with pytest.raises(TypeError, match=message):
            softk.vjp(f, *args)
        with pytest.raises(TypeError, match=message):
            softk.jvp(f, *args, tangents={})
    with pytest.raises(TypeError, match=r"got softk\.beam\.step, which is a composition"):
        softk.vjp(softk.beam.step, X, beams=1)
    with pytest.raises(
        TypeError, match=r"f must be a function of softk, such as softk\.topk, got <ufunc 'sin'>; pass the func"
    ):
        softk.vjp(np.sin, X)


@pytest.mark.parametrize("name", ["quantile", "sort", "rank"])
def test_epsilon_has_no_default_where_the_result_does_not_show_it(name: str) -> None:
    """With an epsilon far above their differences, the quantile of small scores would lie far outside their range."""
    f, args, named = CALLS[name]
    for call in (f, partial(softk.vjp, f), partial(softk.jvp, f, tangents={})):
        complains(
            TypeError, "epsilon", rf"{name}\(\)", "units of the scores.*tenth of their standard", call, *args, **named
        )
    x = 1e-3 * np.random.default_rng(0).normal(size=1000)
    small = f(x, *named.values(), epsilon=0.1 * x.std())
    large = f(1e3 * x, *named.values(), epsilon=1e2 * x.std())
    np.testing.assert_allclose(small, (1.0 if name == "rank" else 1e-3) * large, rtol=1e-9, atol=1e-12)


def test_the_defaults_of_epsilon_are_those_of_the_guide() -> None:
    """The guide has one table of every function that takes epsilon."""
    table = (Path(__file__).parent.parent / "docs" / "guide.md").read_text().split("## The default of epsilon")[1]
    rows = [row.split("|") for row in table.split("\n## ")[0].splitlines() if row.startswith("| `")]
    told = {name: row[2].strip() for row in rows for name in re.findall(r"`([\w.]+)`", row[1])}
    modules = [softk, softk.budget, softk.neighbors, softk.attention, softk.losses, softk.sampling, softk.beam]
    for package, name in (("torch", "softk_torch.distributed"), ("jax", "softk_jax.sharded")):
        if importlib.util.find_spec(package) is not None:
            modules.append(importlib.import_module(name))
        else:
            told = {function: default for function, default in told.items() if not function.startswith(name)}
    for module in modules:
        prefix = "" if module is softk else module.__name__.removeprefix("softk.") + "."
        for name in module.__all__:
            f = getattr(module, name)
            if inspect.isroutine(f) and "epsilon" in inspect.signature(f).parameters:
                default = inspect.signature(f).parameters["epsilon"].default
                assert told.pop(prefix + name) == ("none" if default is inspect.Parameter.empty else str(default))
    estimator = told.pop("softk_sklearn.SoftNeighborsEmbedding")
    if importlib.util.find_spec("sklearn") is not None:
        from softk_sklearn import SoftNeighborsEmbedding

        assert estimator == str(SoftNeighborsEmbedding().epsilon)
    assert not told
