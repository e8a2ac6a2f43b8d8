"""The random problems of `make fuzz`: some of them are solved, and a wrong answer is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import softk

from . import fuzz


@pytest.mark.parametrize("number", range(8))
def test_random_problems(number: int) -> None:
    dtype = sorted(fuzz.DERIVATIVE)[number % 2]
    found = fuzz.attack((2, number, dtype, "auto"))
    assert not found.wrong
    assert found.problems >= fuzz.SIZE // max(fuzz.LENGTHS)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("nan", lambda mask, gradient: (np.where(mask == mask.max(), np.nan, mask), gradient)),
        ("wrong_masks", lambda mask, gradient: (np.clip(mask + 1e-5, 0.0, 1.0).astype(mask.dtype), gradient)),
        ("wrong_masks", lambda mask, gradient: (mask - np.float32(1e-6), gradient)),
        ("wrong_derivatives", lambda mask, gradient: (mask, np.float32(1.0001) * gradient)),
    ],
)
def test_a_wrong_answer_is_found(field: str, change: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    vjp = softk.vjp

    def wrong(*args: Any, **given: Any) -> Any:
        mask, pullback = vjp(*args, **given)
        return change(mask, mask)[0], lambda u: {"x": change(mask, pullback(u)["x"])[1]}

    monkeypatch.setattr(softk, "vjp", wrong)
    found = fuzz.attack((2, 0, "float32", "auto"))
    assert getattr(found, field) > 0
    assert "of batch 0 (float32)" in found.wrong[0]


def test_results_are_added() -> None:
    one = fuzz.Found(10, 0, 1, 0, 0, 40.0, 2.0, 0.0, ("mask of row 3",))
    other = fuzz.Found(20, 0, 0, 0, 2, 1.0, 3.0, 1e-3, ("derivative of row 5",))
    both = fuzz.Found(30, 0, 1, 0, 2, 40.0, 3.0, 1e-3, ("mask of row 3", "derivative of row 5"))
    assert fuzz.joined(one, other) == both
