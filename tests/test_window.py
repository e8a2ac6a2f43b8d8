"""The window: the scores that have a say, gathered into a shorter array. It changes no answer, and it is really taken.

A k in an array is solved from all scores, a k that is a number from those in the window.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import softk
from softk.backend import PRIMITIVES, backend_of
from softk.testing import Oracle

from .libraries import BY_NAME, Library

MASK = 32.0  # eps


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    """A kernel has a window of its own."""
    with softk.kernels("none"):
        yield


@pytest.fixture(params=["numpy", "torch"])
def lib(request: pytest.FixtureRequest) -> Library:
    found = BY_NAME[request.param]
    found.require()
    return found


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The share of the scores that each window keeps."""
    solver = importlib.import_module("softk._reference.threshold.solve")
    shares: list[float] = []
    window = solver.window

    def observed(backend: Any, x: Any, *given: Any) -> Any:
        near = window(backend, x, *given)
        shares.append(1.0 if near is None else near.shape[-1] / x.shape[-1])
        return near

    monkeypatch.setattr(solver, "window", observed)
    return shares


def both(lib: Library, x: np.ndarray, k: float, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    within = lib.evaluate(softk.topk, x, k, **options)
    return within, lib.evaluate(softk.topk, x, np.asarray(k, x.dtype), **options)


def assert_same(within: np.ndarray, whole: np.ndarray) -> None:
    np.testing.assert_allclose(within, whole, rtol=0.0, atol=MASK * np.finfo(whole.dtype).eps)


SCORES = {
    "normal": lambda rng, n: rng.normal(size=(3, n)),
    "cauchy": lambda rng, n: rng.standard_cauchy((3, n)),
    "tied": lambda rng, n: rng.integers(0, 9, (3, n)).astype(float),
    "constant": lambda rng, n: np.full((3, n), 0.3),
    "far offset": lambda rng, n: 1e6 + rng.normal(size=(3, n)),
    "all but a few far below": lambda rng, n: np.where(np.arange(n) % 100 == 0, rng.normal(size=(3, n)), -7.0),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SCORES)
def test_a_window_changes_no_answer(name: str, dtype: str, lib: Library, rng: np.random.Generator) -> None:
    x = SCORES[name](rng, 3000).astype(dtype)
    for k in (1, 2.5, 20, 30.75, 1e-3):
        for epsilon in (1e-3, 0.05, 0.4, 5.0):
            assert_same(*both(lib, x, k, epsilon=epsilon))


def test_it_is_taken(lib: Library, gathered: list[float], rng: np.random.Generator) -> None:
    x = rng.normal(size=(4, 20_000)).astype("float32")
    both(lib, x, 100, epsilon=0.1)
    assert len(gathered) == 1  # not where k is in an array
    assert gathered[0] < 0.25


def test_where_it_is_too_short_all_scores_are_used(lib: Library, gathered: list[float]) -> None:
    """With nearly three of three scores wanted the threshold falls to the crowd, far below the third."""
    x = np.full((1, 4000), -31.0)
    x[0, :3] = 0.0
    within, whole = both(lib, x, 2.9999999999, epsilon=2.0)
    assert gathered
    assert_same(within, whole)
    np.testing.assert_allclose(within.sum(), 2.9999999999, rtol=1e-14)


def test_infinite_scores_beside_finite_ones_of_their_size(lib: Library, rng: np.random.Generator) -> None:
    x = np.full((1, 1000), 3.3e38, "float32")
    x[0, :20] = np.inf
    assert_same(*both(lib, x, 2, epsilon=2e37))


def test_a_slice_with_nan_is_nan_and_no_other(lib: Library, rng: np.random.Generator) -> None:
    x = rng.normal(size=(4, 2000))
    x[1, 7] = np.nan
    within, whole = both(lib, x, 5, epsilon=0.1)
    assert np.isnan(within[1]).all()
    assert_same(within[[0, 2, 3]], whole[[0, 2, 3]])


def test_removed_items(lib: Library, rng: np.random.Generator) -> None:
    x, where = rng.normal(size=(4, 2000)), rng.uniform(size=(4, 2000)) < 0.3
    where[2] = False
    where[3, 4:] = False
    within, whole = both(lib, x, 5, epsilon=0.1, where=where)
    assert_same(within, whole)
    np.testing.assert_array_equal(within.sum(axis=-1)[2:], [0.0, np.count_nonzero(where[3])])


def test_no_slices_at_all(lib: Library) -> None:
    assert lib.evaluate(softk.topk, np.zeros((0, 1000)), 10).shape == (0, 1000)


def test_a_step_past_a_score_and_back_is_caught(lib: Library) -> None:
    """k is a little more than what the largest weigh: from the last score the step overshoots the one before it."""
    x, weights = np.asarray([0.2393, 4.2116, 6.321], "float32"), np.asarray([1.0751, 1.5296, 0.7536], "float32")
    for excess in (1e-4, 2e-5, 6e-6, 3e-6):
        k = np.asarray(weights[1] + weights[2] + np.float32(excess))
        mask = lib.evaluate(softk.topk, x, k, epsilon=0.36472582, weights=weights)
        assert abs(np.sum(weights.astype(float) * mask) - float(k)) <= 16.0 * np.finfo("float32").eps * float(k)
    x, weights = np.asarray([2.3183231, 0.5468323, -0.8811915], "float32"), np.asarray([0.4368512, 0.9821921, 0.968732])
    mask = lib.evaluate(softk.topk, x, 1.4190443, epsilon=0.18092134, weights=weights.astype("float32"))
    assert abs(np.sum(weights * mask) - 1.4190443) <= 16.0 * np.finfo("float32").eps * 1.4190443


@pytest.mark.parametrize(("dtype", "k"), [("float32", 1e-37), ("float32", 1e-30), ("float64", 1e-306)])
@pytest.mark.parametrize("n", [1, 1000])
def test_next_to_no_budget(dtype: str, k: float, n: int, lib: Library) -> None:
    """Beyond what an exponential holds the mask is nothing beside 1, and it is a number."""
    within, whole = both(lib, np.zeros(n, dtype), k, epsilon=1.0)
    for mask in (within, whole):
        assert np.all((mask >= 0.0) & (mask <= 1e-29))


@pytest.mark.kernels
@pytest.mark.parametrize("kernels", ["none", "auto"])
def test_a_window_that_ends_between_neighboring_numbers(kernels: str, lib: Library) -> None:
    """The end of a window is rounded to a score's dtype. A heavy item on that side of it must stay inside."""
    spacing = 2.0**-23
    x = (1.0 + spacing * np.asarray([[0.0, 4.0, -1.0, -2.0]])).astype("float32")
    weights = np.asarray([[1.0, 0.25, 4.0, 4.0]], "float32")
    for ratio in np.linspace(2.0, 60.0, 59):  # of tau and the spacing
        k, epsilon = np.asarray([[0.125]], "float32"), np.asarray([[2.0 * spacing / ratio]], "float32")
        with softk.kernels(kernels):
            found = lib.evaluate(softk.topk, x, k, epsilon=epsilon, weights=weights)
        expected = Oracle(x[0], k[0][0], epsilon[0][0], weights[0]).mask
        assert np.max(np.abs(found[0] - expected)) <= MASK * np.finfo(x.dtype).eps


def test_ranks_do_not_count_weights(rng: np.random.Generator) -> None:
    """An operator may pass the ranks of a k with weights, too."""
    x, weights = rng.normal(size=(1, 20_000)), rng.uniform(0.2, 3.0, size=(1, 20_000))
    inputs = x, np.asarray([[5.0]]), np.asarray([[0.05]]), weights, None
    for name in ("topk_mask", "topk_log_mask", "topk_threshold"):
        for kernels in ("none", "auto"):
            with softk.kernels(kernels):
                backend, primitive = backend_of(x), PRIMITIVES[name]
                found, expected = (backend.run(primitive, "forward", inputs, ranks=ranks) for ranks in ((5, 6), None))
            np.testing.assert_array_equal(found[0], expected[0])
