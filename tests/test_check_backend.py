"""What `check_backend` lets pass and what it does not: softk's own adapters, and adapters with one fault each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import softk
from softk.backend import ADAPTERS, Adapter, Backend, backend_of
from softk.testing import Problem, check_backend, native_gradient

FEW = ("weighted", "deep batch", "numbers", "infinite scores", "NaN")


def few(problem: Problem) -> bool:
    return problem.name in FEW


def test_numpy() -> None:
    check_backend(np.ones(1))


def test_torch() -> None:
    check_backend(pytest.importorskip("torch").ones(1), second=True, only=few)


def test_array_api_strict() -> None:
    check_backend(pytest.importorskip("array_api_strict").ones(1), only=few)


def test_autograd() -> None:
    backend = pytest.importorskip("softk_autograd").backend
    check_backend(backend, make=np.asarray, second=True, only=few)


@pytest.mark.full
def test_jax() -> None:
    jax = pytest.importorskip("jax")
    check_backend(jax.numpy.ones(1), second=True, only=few)


@pytest.mark.full
def test_dask() -> None:
    """The adapter selects and solves within its blocks, by NumPy's."""
    check_backend(
        pytest.importorskip("dask.array").ones(1),
        skip=("select", "top_k", "solve", "scatter", "reduce_segments"),
        only=few,
    )


def _changed(**methods: Callable[..., Any]) -> Backend:
    """NumPy's adapter with other methods."""
    backend = copy.copy(backend_of(np.ones(1)))
    backend.__class__ = type("Changed", (type(backend),), methods)
    return backend


def _one_step(self: Any, step: Any, state: Any, limit: int) -> Any:
    return step(state)[0]


def _first_rows(self: Any, function: Any, rows: int, first: Any, *others: Any) -> Any:
    return function(first[:rows], *others)


FAULTS: dict[str, tuple[dict[str, Callable[..., Any]], str]] = {
    "constant": ({"constant": lambda self, x: x + 1e-9}, "constant: it changes the values"),
    "memory": ({"memory": lambda self, x: None}, "memory: a number must be returned as it is"),
    "shape": ({"memory": lambda self, x: getattr(x, "T", x)}, "memory: it returns memory of another shape"),
    "holds": (
        {"holds": lambda self, values: True, "memory": lambda self, x: None if np.ndim(x) else x},
        "holds: it dis",
    ),
    "key of values": ({"cache_key": lambda self, x: float(x.sum())}, "cache_key: it depends on the values"),
    "key of no shape": ({"cache_key": lambda self, x: x.dtype}, "cache_key: it does not depend on the shape"),
    "key of no dtype": ({"cache_key": lambda self, x: x.shape}, "cache_key: it does not depend on the dtype"),
    "top_k": ({"top_k": lambda self, x, k: (np.sort(x)[..., :k], np.argsort(x)[..., :k])}, "top_k: the 1 largest"),
    "indices": (
        {"top_k": lambda self, x, k: (-np.sort(-x)[..., :k], np.argsort(x)[..., :k])},
        "top_k: the scores at 1",
    ),
    "scatter": ({"scatter": lambda self, values, indices, size: np.ones((3, 4))}, "scatter: the result"),
    "segments": ({"reduce_segments": lambda self, x, *_: np.zeros((3, 3))}, "reduce_segments: the sum"),
    "repeat": ({"repeat": _one_step}, "repeat: 2 steps is off by 1"),
    "solve": ({"solve": lambda self, matrix, right: right}, "solve: matrices times the solutions"),
    "map_rows": ({"map_rows": _first_rows}, "map_rows: 1 rows at a time, the first result"),
    "select": ({"select": lambda self, x, ranks: np.sort(x)[..., : np.shape(ranks)[-1]]}, "select: the scores of rank"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hook_that_does_something_else_is_found(fault: str) -> None:
    methods, text = FAULTS[fault]
    with pytest.raises(AssertionError, match=f"backend numpy, {text}"):
        check_backend(_changed(**methods), only=few)


def _served_by(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    monkeypatch.setitem(ADAPTERS, "numpy", Adapter(lambda: backend, ("ndarray", "generic")))
    monkeypatch.setattr(softk.backend, "_by_type", {})


def test_a_wrong_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Any, primitive: Any, part: str, *groups: Any, **options: Any) -> Any:
        found = Backend.run(self, primitive, part, *groups, **options)
        return (found[0] * (1.0 - 1e-12), *found[1:]) if part == "forward" and primitive.vjp else found

    backend = _changed(run=run)
    _served_by(monkeypatch, backend)
    with pytest.raises(AssertionError, match="backend numpy: problem weighted, float64: the mask is off by"):
        check_backend(backend, only=few)


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A derivative three times as large, by `softk.vjp`."""

    def run(self: Any, primitive: Any, part: str, *groups: Any, **options: Any) -> Any:
        found = Backend.run(self, primitive, part, *groups, **options)
        return tuple(3.0 * value if value is not None else None for value in found) if part == "vjp" else found

    backend = _changed(run=run)
    _served_by(monkeypatch, backend)
    with pytest.raises(AssertionError, match=r"problem weighted, float64: topk, softk.vjp in x in weighted is off by"):
        check_backend(backend, only=few)


def test_a_wrong_native_derivative_is_found() -> None:
    """The framework's own derivative is three times as large, though `softk.vjp` is right."""
    autograd = pytest.importorskip("softk_autograd").backend

    def gradient(f: Any, x: Any, u: Any) -> Any:
        found = native_gradient(autograd, f, x, u)
        return found if found.shape != (7, 40) else 3.0 * found

    with pytest.raises(AssertionError, match="topk, the library's derivative in x in weighted is off by"):
        check_backend(autograd, make=np.asarray, gradient=gradient, dtypes=("float64",), only=few)


@pytest.mark.filterwarnings("ignore:Output seems independent of input")
def test_a_conversion_without_a_derivative_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A framework whose `permute_dims` is not recorded: the rule is right, and the gradient along another axis is 0."""
    tracer, adapter = pytest.importorskip("autograd.tracer"), pytest.importorskip("softk_autograd").backend
    transpose = adapter.xp.permute_dims
    monkeypatch.setattr(adapter.xp, "permute_dims", lambda x, axes: transpose(tracer.getval(x), axes), raising=False)
    with pytest.raises(AssertionError, match="backend autograd: topk, x along axis 0: the library's derivative is off"):
        check_backend(adapter, make=np.asarray, dtypes=("float64",), only=few)


def test_a_differentiated_constant_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    autograd = pytest.importorskip("softk_autograd").backend
    backend = copy.copy(autograd)
    backend.__class__ = type("Changed", (type(autograd),), {"constant": lambda self, x: x})
    with pytest.raises(AssertionError, match="backend autograd, constant: its result is differentiated"):
        check_backend(backend, make=np.asarray, only=few)


def test_a_bad_hook_is_refused() -> None:
    with pytest.raises(ValueError, match=r"skip must be among constant, .*, got 'fast'"):
        check_backend(np.ones(1), skip=("fast",))
    with pytest.raises(TypeError):
        check_backend([1.0, 2.0])


def test_nothing_is_not_checked() -> None:
    with pytest.raises(ValueError, match="only must take at least one problem"):
        check_backend(np.ones(1), only=lambda problem: False)
    for dtypes in ((), "float32", ("float16",)):
        with pytest.raises(ValueError, match="dtypes must be a sequence of float64, float32, got"):
            check_backend(np.ones(1), dtypes=dtypes, only=few)
    with pytest.raises(ValueError, match="second must be False where the library has no gradient"):
        check_backend(np.ones(1), second=True, only=few)


def test_the_report() -> None:
    report = check_backend(np.ones(1), skip=("top_k",), dtypes=("float32",), only=lambda p: p.name == "weighted")
    assert report.problems == ("weighted, float32",)
    assert report.native == ()
    assert "top_k" not in report.hooks
    assert report.served_by == "numpy"
    autograd = pytest.importorskip("softk_autograd").backend
    report = check_backend(autograd, make=np.asarray, only=lambda p: p.name in ("weighted", "NaN"))
    assert report.native == ("weighted, float64",)
    assert report.served_by == "numpy"  # NumPy's arrays are its own


def test_float32_alone_is_differentiated() -> None:
    torch = pytest.importorskip("torch")
    backend = backend_of(torch.ones(1))

    def gradient(f: Any, x: Any, u: Any) -> Any:
        found = native_gradient(backend, f, x, u)
        return found if tuple(found.shape) != (7, 40) else 3.0 * found

    report = check_backend(backend, second=True, dtypes=("float32",), only=few)
    assert report.native == ("weighted, float32", "deep batch, float32")
    with pytest.raises(AssertionError, match="weighted, float32: topk, the library's derivative in x in weighted is"):
        check_backend(backend, gradient=gradient, dtypes=("float32",), only=few)


def test_an_error_names_the_hook_or_the_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, x: Any) -> Any:
        raise ZeroDivisionError("a fault")

    with pytest.raises(AssertionError, match=r"backend numpy, constant: ZeroDivisionError\('a fault'\)"):
        check_backend(_changed(constant=broken), only=few)

    def run(self: Any, *groups: Any, **options: Any) -> Any:
        raise ZeroDivisionError("a fault")

    backend = _changed(run=run)
    _served_by(monkeypatch, backend)
    with pytest.raises(AssertionError, match=r"problem weighted, float64: ZeroDivisionError\('a fault'\)"):
        check_backend(backend, only=few)
