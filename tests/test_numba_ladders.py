"""The kernels for sorting and ranking: that they find what the reference does, in every edge case and state."""

from __future__ import annotations

import math
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

import softk
from softk._reference.plan.ranking import soft_rank
from softk._reference.plan.sorting import soft_sort, sorted_plan
from softk.backend import Kernel, backend_of
from softk.testing.memory import poisoned

pytest.importorskip("numba", reason="Numba is not installed")

pytestmark = pytest.mark.kernels

BACKEND = backend_of(np.ones(1))
EPS = {"float32": 2.0**-23, "float64": 2.0**-52}
DERIVATIVES = {"float32": 2e-5, "float64": 1e-11}


def kernel_of(primitive: Any, part: str) -> Kernel:
    (found,) = (one for one in BACKEND.kernels if one.primitive is primitive and one.part == part)
    return found


def rows_of(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n)
    x = rng.normal(size=n)
    tied, few, infinite, broken, lowest = np.round(3.0 * x) / 3.0, x.copy(), x.copy(), x.copy(), x.copy()
    few[n // 4 :] = -math.inf
    infinite[:2] = math.inf
    broken[1] = math.nan
    lowest[:] = -math.inf
    far = np.concatenate([x[: n // 2], x[n // 2 :] - 40.0])
    return {
        "usual": x,
        "tied": tied,
        "equal": np.zeros(n),
        "few": few,
        "infinite": infinite,
        "NaN": broken,
        "lowest": lowest,
        "two groups": far,
        "heavy tails": rng.standard_t(1.5, size=n),
        "evenly spaced": np.linspace(-1.0, 1.0, n),
    }


#: n, rows and whether the rows are anchors of the whole mass, as in `softk.sort`.
SHAPES = [(8, 8, True), (40, 3, False), (40, 40, True), (40, 7, True), (90, 90, True), (300, 3, False), (1, 1, True)]


def inputs_of(n: int, rows: int, is_sort: bool, epsilon: Any, dtype: str, removed: bool = False) -> tuple[Any, ...]:
    x = np.stack(list(rows_of(n).values())).astype(dtype) if n > 2 else np.asarray([[0.5], [math.nan]], dtype)
    unit = n / rows if is_sort else 1.0
    tau = np.asarray(epsilon, dtype) / 2.0 / unit
    where = np.random.default_rng(7).random(x.shape) < 0.7 if removed else None
    return x, np.asarray(tau, dtype), np.asarray(unit, dtype), where, None


def assert_close(name: str, found: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    assert found.shape == wanted.shape, name
    assert found.dtype == wanted.dtype, name
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted), err_msg=name)
    with np.errstate(invalid="ignore"):
        error = np.where((found == wanted) | np.isnan(wanted), 0.0, np.abs(found - wanted))
    assert np.max(error, initial=0.0) <= tolerance, (name, np.max(error), np.argwhere(error == np.max(error))[0])


def by(choice: str, primitive: Any, part: str, *groups: Any, **options: Any) -> tuple[Any, ...]:
    with softk.kernels("none"):
        return computed(choice, primitive, part, *groups, **options)


def computed(choice: str, primitive: Any, part: str, *groups: Any, **options: Any) -> tuple[Any, ...]:
    """`by`, without the choice of kernels, which holds for all threads."""
    compute = kernel_of(primitive, part).compute if choice == "numba" else getattr(primitive, part)
    with BACKEND.quiet():
        return tuple(compute(BACKEND, *groups, **options))


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("primitive", [sorted_plan, soft_sort, soft_rank], ids=lambda one: one.name)
def test_they_find_what_the_reference_does(primitive: Any, dtype: str) -> None:
    for n, rows, is_sort in SHAPES:
        if primitive is not sorted_plan and not is_sort:
            continue
        for epsilon in (3000.0, 30.0, 1.0, 0.1, 1e-3):
            inputs = inputs_of(n, rows, is_sort, epsilon, dtype, removed=epsilon == 0.1)
            found = by("numba", primitive, "forward", inputs, rows=rows, ranks=None)
            wanted = by("none", primitive, "forward", inputs, rows=rows, ranks=None)
            # The rounding of a mass and of a row's sum, in float32 also that of the reference.
            scale = n if primitive is soft_rank else max(1.0, np.max(np.abs(inputs[0][np.isfinite(inputs[0])])))
            for name, one, other in zip(primitive.results, found, wanted, strict=False):
                label = f"{name}, n {n}, rows {rows}, epsilon {epsilon}"
                assert_close(label, one, other, 16.0 * n * EPS[dtype] * (1.0 if name == "assignment" else scale))


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("primitive", [sorted_plan, soft_sort, soft_rank], ids=lambda one: one.name)
def test_their_derivatives_are_the_reference_s_in_double_precision(primitive: Any, dtype: str) -> None:
    for n, rows, is_sort in SHAPES:
        if primitive is not sorted_plan and not is_sort:
            continue
        for epsilon in (1.0, 0.1):
            inputs = inputs_of(n, rows, is_sort, np.full((1, 1), epsilon), dtype, removed=epsilon == 0.1)
            inputs = (inputs[0], np.broadcast_to(inputs[1], (len(inputs[0]), 1)).copy(), *inputs[2:])
            precise = tuple(value if value is None or value.dtype == bool else value.astype(float) for value in inputs)
            if is_sort:  # a mass that is rounded to float32 is none that float64 divides the scores into
                precise = (*precise[:2], np.asarray(n / rows), *precise[3:])
            exact = by("none", primitive, "forward", precise, rows=rows, ranks=None)
            state = by("numba", primitive, "forward", inputs, rows=rows, ranks=None)
            rng = np.random.default_rng(n)
            cotangents = tuple(rng.normal(size=value.shape).astype(dtype) for value in exact[: primitive.moving])
            for with_state in (False, True):
                given = (*cotangents[:-1], cotangents[-1] if with_state else None)
                if with_state and dtype == "float32":
                    continue  # the offset of a gap is rounded, and its derivative is as large as the gap is wide
                needed = (True, True, False, False, False)
                found = by("numba", primitive, "vjp", inputs, state, given, needed)
                double = tuple(None if value is None else value.astype(float) for value in given)
                wanted = by("none", primitive, "vjp", precise, exact, double, needed)
                for name, one, other in zip(("x", "tau"), found, wanted, strict=False):
                    np.testing.assert_array_equal(np.isnan(one), np.isnan(other))
                    for i, (mine, theirs) in enumerate(zip(one, other, strict=True)):
                        label = f"{name}, n {n}, rows {rows}, epsilon {epsilon}, slice {i}, state {with_state}"
                        size = np.max(np.abs(theirs), initial=1e-300, where=np.isfinite(theirs))
                        if name == "tau":  # a sum of x-cotangents times distances, which may nearly cancel
                            with np.errstate(invalid="ignore"):
                                terms = np.abs(wanted[0][i] * inputs[0][i] / inputs[1][i])
                            size += np.sum(terms, where=np.isfinite(terms))
                        assert_close(label, mine.astype(float), theirs, 4.0 * DERIVATIVES[dtype] * size)


def test_the_state_serves_the_other() -> None:
    """The reference's rule takes the kernel's state, and the kernel's rule the reference's."""
    inputs = inputs_of(40, 3, False, 0.3, "float64")
    states = [by(choice, sorted_plan, "forward", inputs, rows=3, ranks=None) for choice in ("numba", "none")]
    rng = np.random.default_rng(0)
    given = (rng.normal(size=states[0][0].shape), rng.normal(size=states[0][1].shape), None)
    needed = (True, True, False, False, False)
    found = [
        by(choice, sorted_plan, "vjp", inputs, state, given, needed)[0]
        for choice in ("numba", "none")
        for state in states
    ]
    for one in found[1:]:
        assert_close("x", one, found[0], 1e-11 * np.nanmax(np.abs(found[0])))


@pytest.mark.parametrize("epsilon", [1.0, 0.05, 1e-4])
def test_many_scores(epsilon: float) -> None:
    """A thousand anchors, by conjugate gradients: the masses, and the derivative against the reference's."""
    x = np.random.default_rng(1).normal(size=(1, 1000))
    u = np.random.default_rng(2).normal(size=x.shape)
    results = []
    for choice in ("numba", "none"):
        with softk.kernels(choice):
            ranks, pull = softk.vjp(softk.rank, x, epsilon=epsilon)
            results.append((ranks, pull(u)["x"]))
    (ranks, xbar), (wanted, xbar_wanted) = results
    assert_close("rank", ranks, wanted, 1e-9)
    assert_close("x", xbar, xbar_wanted, 1e-10 * np.max(np.abs(xbar_wanted)))


def test_a_sort_of_many_scores_forms_no_plan() -> None:
    """Of 20,000 scores and as many anchors, where the plan would be 3 GB."""
    x = np.random.default_rng(1).uniform(size=(1, 20_000))
    tracemalloc.start()
    with softk.kernels("numba"):
        values, pull = softk.vjp(softk.sort, x, epsilon=1e-5)
        xbar = pull(np.ones_like(values))["x"]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 400 * x.nbytes
    assert np.all(np.diff(values) > 0.0)
    np.testing.assert_allclose(values.sum(), x.sum(), rtol=1e-12)
    np.testing.assert_allclose(xbar, 1.0, atol=1e-9)  # the sum of the values is that of the scores


def test_the_same_bits_from_any_memory_and_thread() -> None:
    inputs = inputs_of(90, 90, True, 0.3, "float32")
    forward = partial(computed, "numba", soft_rank, "forward", inputs, rows=90, ranks=None)
    with softk.kernels("none"):
        first = forward()
        with poisoned(math.nan):
            again = forward()
        with ThreadPoolExecutor(4) as pool:
            others = list(pool.map(lambda _: forward(), range(4)))
    for other in (again, *others):
        for one, two in zip(first, other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_a_slice_that_is_left_to_the_reference_is_the_reference_s() -> None:
    """A temperature beyond the range of the kernel, beside one that is not."""
    inputs = inputs_of(40, 3, False, 0.3, "float64")
    tau = np.full((len(inputs[0]), 1), 0.1)
    tau[0], tau[1], tau[2] = 1e-200, 1e200, -1.0
    inputs = (inputs[0], tau, *inputs[2:])
    found, wanted = (by(choice, sorted_plan, "forward", inputs, rows=3, ranks=None) for choice in ("numba", "none"))
    for name, one, other in zip(sorted_plan.results, found, wanted, strict=False):
        assert_close(name, one, other, 1e-13)
    np.testing.assert_array_equal(found[1][:2], wanted[1][:2])


@pytest.mark.parametrize("primitive", [sorted_plan, soft_sort, soft_rank], ids=lambda one: one.name)
def test_no_slice_of_float32_is_left_to_the_reference(primitive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of JAX rely on it. The values are the reference's, also where scores are infinite at any temperature."""

    def fill(*_: Any) -> None:
        raise AssertionError("a slice is left to the reference")

    monkeypatch.setattr("softk_numba.launch.Ladder.fill", fill)
    for n, rows, is_sort in SHAPES:
        if primitive is not sorted_plan and not is_sort:
            continue
        for epsilon in (1e37, 1.0, 1e-37):
            inputs = inputs_of(n, rows, is_sort, epsilon, "float32")
            found = by("numba", primitive, "forward", inputs, rows=rows, ranks=None)
            wanted = by("none", primitive, "forward", inputs, rows=rows, ranks=None)
            scale = n if primitive is soft_rank else max(1.0, np.max(np.abs(inputs[0][np.isfinite(inputs[0])])))
            for name, one, other in zip(primitive.results, found, wanted, strict=False):
                assert_close(
                    f"{name}, n {n}, rows {rows}, epsilon {epsilon}", one, other, 16.0 * n * EPS["float32"] * scale
                )
            given = (*(np.ones_like(value) for value in found[: len(primitive.results)]), None)
            xbar, *_ = by("numba", primitive, "vjp", inputs, found, given, (True, True, False, False, False))
            moves = np.isfinite(inputs[0]) & ~np.isnan(inputs[0]).any(axis=-1, keepdims=True)
            assert np.all(xbar[np.isinf(inputs[0])] == 0.0)
            assert np.all(np.isfinite(xbar[moves]))
