"""Schedules of epsilon and k: numbers, arrays of every library, and traced steps."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import softk
from softk import schedules

from .libraries import Library

CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda part: 2.0 - 1.5 * part,
    "cosine": lambda part: 0.5 + 1.5 * math.cos(math.pi * part / 2) ** 2,
    "exponential": lambda part: 2.0 * 0.25**part,
    "constant": lambda part: 2.0,
}


def schedule(kind: str) -> schedules.Schedule:
    return schedules.constant(2.0) if kind == "constant" else getattr(schedules, kind)(2.0, 0.5, steps=40)


@pytest.mark.parametrize("kind", CURVES)
def test_numbers(kind: str) -> None:
    f = schedule(kind)
    for step in (0, 1, 10.5, np.int64(39)):
        assert isinstance(f(step), float)
        assert f(step) == pytest.approx(CURVES[kind](step / 40), rel=1e-14)
    end = 2.0 if kind == "constant" else 0.5
    assert (f(-1), f(0), f(40), f(1000)) == (2.0, 2.0, end, end)
    assert pickle.loads(pickle.dumps(f)) == f


@pytest.mark.parametrize("kind", CURVES)
@pytest.mark.parametrize("dtype", ["int64", "float64"])
def test_arrays(lib: Library, kind: str, dtype: str) -> None:
    steps = np.asarray([-5, 0, 7, 40, 41])
    found = lib.numpy(lib.call(schedule(kind), lib.array(steps, dtype)))
    expected = [CURVES[kind](min(max(step, 0), 40) / 40) for step in steps]
    np.testing.assert_allclose(found, expected, rtol=1e-6 if dtype == "int64" else 1e-14)


def test_a_traced_step() -> None:
    """One compiled program for all steps."""
    jax = pytest.importorskip("jax")
    x = jax.numpy.asarray([0.3, 0.1, 0.9])
    epsilon, count = schedule("exponential"), 0

    @jax.jit
    def mask(step: Any) -> Any:
        nonlocal count
        count += 1
        return softk.topk(x, 1, epsilon=epsilon(step))

    for step in (0, 20, 40):
        np.testing.assert_allclose(mask(step), softk.topk(x, 1, epsilon=epsilon(step)), rtol=1e-6)
    assert count == 1


def test_errors() -> None:
    for make, error, text in (
        (lambda: schedules.exponential(1.0, 0.0, steps=2), ValueError, "end must be positive and finite, got 0.0"),
        (lambda: schedules.linear(math.inf, 0.0, steps=2), ValueError, "start must be finite, got inf"),
        (lambda: schedules.linear(1.0, 0.0, steps=0), ValueError, "steps must be at least 1, got 0"),
        (lambda: schedules.cosine(1.0, 0.0, steps=2.0), TypeError, "steps must be a Python integer, got 2.0"),
        (lambda: schedules.constant("1"), TypeError, "value must be a number, got '1'"),
        (lambda: schedules.constant(1.0)("0"), TypeError, "step must be a number or an array, got str"),
        (lambda: schedules.constant(1.0)(np.asarray([True])), TypeError, "step must be real, got dtype bool"),
    ):
        with pytest.raises(error, match=text):
            make()
