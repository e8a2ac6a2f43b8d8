"""A third party's backend: found through its entry point, and here it counts the passes over the data.

`Loop` is an array type that softk has never heard of: NumPy's arrays in a class of another top-level module. Its
array counts the comparisons of scores to a threshold, of which every sweep of the solver has one; its namespace counts
the exponentials.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import array_api_compat.numpy as xp
import numpy as np
import pytest

import softk
import softk.backend
from softk._functions import adapters
from softk.backend import Backend

SWEEPS, TYPICAL = 12, 6  # the numbers


class Loop:
    """An array of the standard, around one of NumPy's."""

    __module__ = "loopback.arrays"

    def __init__(self, inner: np.ndarray) -> None:
        self.inner = inner

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        return NAMESPACE

    def __getitem__(self, index: Any) -> Loop:
        return Loop(np.asarray(self.inner[index]))

    shape = property(lambda self: self.inner.shape)
    ndim = property(lambda self: self.inner.ndim)
    size = property(lambda self: self.inner.size)
    dtype = property(lambda self: self.inner.dtype)
    device = property(lambda self: "cpu")


def _operator(name: str) -> None:
    f = getattr(operator, f"__{name}__")

    def forward(self: Loop, *others: Any) -> Loop:
        if name == "gt" and isinstance(others[0], Loop):
            NAMESPACE.comparisons.append(self.size)
        return Loop(np.asarray(f(self.inner, *map(_inner, others))))

    def backward(self: Loop, other: Any) -> Loop:
        return Loop(np.asarray(f(_inner(other), self.inner)))

    setattr(Loop, f"__{name}__", forward)
    setattr(Loop, f"__r{name}__", backward)


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "pow",
    "and",
    "or",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "neg",
    "invert",
):
    _operator(_name)


def _inner(value: Any) -> Any:
    if isinstance(value, Loop):
        return value.inner
    return type(value)(map(_inner, value)) if isinstance(value, list | tuple) else value


class Namespace:
    """NumPy's namespace on such arrays."""

    __name__ = "loopback"

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.exponentials: list[int] = []  # the size of each
        self.comparisons: list[int] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(xp, name)
        if (
            not callable(found)
            or isinstance(found, type)
            or name in ("finfo", "iinfo", "isdtype", "__array_namespace_info__")
        ):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs = {key: _inner(value) for key, value in kwargs.items()}
            result = found(*map(_inner, args), **kwargs)
            if name in ("exp", "exp2", "expm1"):
                self.exponentials.append(result.size)
            return Loop(np.asarray(result))

        return call


NAMESPACE = Namespace()


class LoopBackend(Backend):
    """The base class, and NumPy's warnings out of the way."""

    def __init__(self) -> None:
        super().__init__(NAMESPACE)
        self.early = False

    def quiet(self, x: Any = None) -> Any:
        return np.errstate(all="ignore")

    def repeat(self, step: Any, state: Any, limit: int) -> Any:
        for _ in range(limit):
            state, done = step(state)
            if self.early and done.inner.all():
                break
        return state


class Entry:
    """An entry point, as importlib.metadata describes one."""

    value = "loopback:backend"

    def __init__(self, name: str, result: Any) -> None:
        self.name, self.result = name, result

    def load(self) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install entry points into an environment in which no array has been seen yet."""

    def install(*entries: Entry) -> None:
        monkeypatch.setattr(softk.backend, "ADAPTERS", dict(softk.backend.ADAPTERS))
        monkeypatch.setattr(adapters, "ADAPTERS", softk.backend.ADAPTERS)
        monkeypatch.setattr(softk.backend, "_by_type", {})
        monkeypatch.setattr(softk.backend, "_by_namespace", {})
        adapters.register_third_parties(entries)

    return install


@pytest.fixture
def backend(install: Any) -> Iterator[LoopBackend]:
    """The loopback backend, installed, its counter at zero."""
    backend = LoopBackend()
    install(Entry("loopback", backend))
    NAMESPACE.clear()
    yield backend
    NAMESPACE.clear()


# --- the entry point


def test_a_third_party_backend_serves_its_arrays(backend: LoopBackend, rng: np.random.Generator) -> None:
    x, u, weights = rng.normal(size=(3, 4, 30))
    weights = np.abs(weights)
    assert softk.backend.backend_of(Loop(x)) is backend
    mask, pullback = softk.vjp(softk.topk, Loop(x), 3.5, epsilon=0.2, weights=Loop(weights))
    wanted, wanted_pullback = softk.vjp(softk.topk, x, 3.5, epsilon=0.2, weights=weights)
    assert isinstance(mask, Loop)
    np.testing.assert_allclose(mask.inner, wanted, rtol=0.0, atol=64 * np.finfo(float).eps)
    found = pullback(Loop(u))
    for name, value in wanted_pullback(u).items():
        assert isinstance(found[name], Loop)
        np.testing.assert_allclose(found[name].inner, value, rtol=0.0, atol=1e-11 * np.max(np.abs(value)))


def test_its_other_functions(backend: LoopBackend, rng: np.random.Generator) -> None:
    x = rng.normal(size=(4, 30))
    for f, k in ((softk.threshold, 3), (partial(softk.quantile, epsilon=0.1), 0.3)):
        np.testing.assert_allclose(f(Loop(x), k).inner, f(x, k), rtol=1e-13)
    hard = softk.topk(Loop(x), 3, hard=True)
    assert (hard.inner == softk.topk(x, 3, hard=True)).all()
    np.testing.assert_allclose(softk.topk(Loop(x.T), Loop(np.asarray(2.5)), axis=0).inner.sum(axis=0), 2.5)


def test_libraries_do_not_mix(backend: LoopBackend, rng: np.random.Generator) -> None:
    x = rng.normal(size=5)
    with pytest.raises(TypeError, match="weights must be an array of the same library as x"):
        softk.topk(Loop(x), 2, weights=np.ones(5))


def test_an_unknown_library_of_the_standard_needs_no_backend(install: Any) -> None:
    install()
    x = np.asarray([0.2, 1.7, -0.5, 0.9])
    with np.errstate(all="ignore"):
        mask = softk.topk(Loop(x), 2, epsilon=0.5)
    np.testing.assert_allclose(mask.inner, softk.topk(x, 2, epsilon=0.5), rtol=1e-13)
    assert type(softk.backend.backend_of(mask)) is Backend


def test_entry_points_of_other_libraries_are_not_loaded(install: Any) -> None:
    install(Entry("other", RuntimeError("loaded")))
    softk.topk(np.ones(3), 1)
    with np.errstate(all="ignore"):
        softk.topk(Loop(np.ones(3)), 1)


@pytest.mark.parametrize("fault", [RuntimeError("it broke"), "not a backend", LoopBackend, None], ids=repr)
def test_a_bad_entry_point_warns(install: Any, fault: Any) -> None:
    """And does no more: arrays of the standard are served all the same, and the warning comes once."""
    install(Entry("loopback", fault))
    x = np.asarray([0.2, 1.7, -0.5, 0.9])
    with np.errstate(all="ignore"):
        with pytest.warns(UserWarning, match=r"softk backend 'loopback' \(loopback:backend\) is ignored"):
            mask = softk.topk(Loop(x), 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            softk.topk(Loop(x), 2)
    np.testing.assert_allclose(mask.inner, softk.topk(x, 2), rtol=1e-13)


# --- the passes


class Count(NamedTuple):
    """Passes over the scores."""

    sweeps: int  # of the solver
    forward: int  # exponentials
    backward: int


def count(x: np.ndarray, k: Any, **options: Any) -> Count:
    def full(sizes: list[int]) -> int:
        # Half of it at least: a backend that gives up slices that are done would be counted too.
        return round(sum(size for size in sizes if size > x.shape[-1] // 2) / x.size)

    options = {name: Loop(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}
    k = Loop(k) if isinstance(k, np.ndarray) else k
    NAMESPACE.clear()
    mask, pullback = softk.vjp(softk.topk, Loop(x), k, **options)
    sweeps, forward = full(NAMESPACE.comparisons), full(NAMESPACE.exponentials)
    NAMESPACE.clear()
    pullback(mask)
    return Count(sweeps, forward, full(NAMESPACE.exponentials))


def _families(dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    n = 500
    yield "normal", rng.normal(size=n).astype(dtype)
    yield "uniform", rng.uniform(size=n).astype(dtype)
    yield "cauchy", rng.standard_cauchy(size=n).astype(dtype)
    yield "clustered", (rng.integers(0, 5, n) + 1e-4 * rng.normal(size=n)).astype(dtype)
    yield "tied", rng.integers(0, 5, n).astype(dtype)
    yield "constant", np.full(n, 0.3, dtype)
    yield "offset", (1e8 + rng.normal(size=n)).astype(dtype)
    yield "wide", (1e30 * rng.normal(size=n)).astype(dtype)
    yield "outlier above", np.append(rng.normal(size=n - 1), 1e20).astype(dtype)
    yield "outlier below", np.append(rng.normal(size=n - 1), -1e20).astype(dtype)
    yield "exponential", (2.0 ** np.linspace(-60.0, 60.0, n)).astype(dtype)
    yield "arange", np.arange(n).astype(dtype)


FAMILIES = [pytest.param(x, id=f"{name}-{dtype}") for dtype in ("float32", "float64") for name, x in _families(dtype)]
MASSES = (1, 2.5, 250, 333.25, 499, 1e-3, 499.99)
EPSILONS = (1e-6, 1e-4, 1e-2, 0.1, 1.0, 20.0)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("x", FAMILIES)
def test_passes(x: np.ndarray, early: bool, backend: LoopBackend) -> None:
    """At most 12, whatever the scores."""
    backend.early = early
    counts = [count(x, k, epsilon=epsilon).sweeps for k in MASSES for epsilon in EPSILONS]
    assert min(counts) >= 1
    assert max(counts) <= SWEEPS
    if early:
        assert np.median(counts) <= TYPICAL


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("x", FAMILIES)
def test_passes_with_weights(x: np.ndarray, early: bool, backend: LoopBackend, rng: np.random.Generator) -> None:
    backend.early = early
    weights = rng.exponential(size=x.shape).astype(x.dtype)
    shares = [float(share * weights.sum()) for share in (0.002, 0.1, 0.5, 0.95)]
    counts = [count(x, k, epsilon=epsilon, weights=weights).sweeps for k in shares for epsilon in EPSILONS]
    assert max(counts) <= SWEEPS
    if early:
        assert np.median(counts) <= TYPICAL


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "k"), [((1000,), 10), ((20_000,), 100), ((200_000,), 1000), ((100_000,), 2.5)])
@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1.0])
def test_passes_are_few_where_a_backend_stops_early(
    shape: tuple[int, ...], k: float, epsilon: float, dtype: str, backend: LoopBackend, rng: np.random.Generator
) -> None:
    backend.early = True
    assert 1 <= count(rng.normal(size=shape).astype(dtype), k, epsilon=epsilon).sweeps <= TYPICAL


def test_passes_of_a_normal_case(backend: LoopBackend, rng: np.random.Generator) -> None:
    """A guard: what one more pass would cost is seen here first."""
    x, weights = rng.normal(size=(8, 1000)), rng.uniform(0.5, 2.0, size=(8, 1000))
    given = {"epsilon": 0.1}

    def check(found: Count, sweeps: int, forward: int, backward: int) -> None:
        assert 1 <= found.sweeps <= sweeps
        assert found.forward <= forward
        assert found.backward <= backward

    check(count(x, 10, **given), 12, 2, 1)
    check(count(x, 10, weights=weights, **given), 12, 2, 3)
    check(count(x, np.asarray(10.0), epsilon=np.asarray(0.1)), 12, 2, 1)
    backend.early = True
    check(count(x, 10, **given), 5, 2, 1)
    check(count(x, 10, weights=weights, **given), 5, 2, 3)
