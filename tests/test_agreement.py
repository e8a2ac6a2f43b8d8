"""Across libraries: from the same float64 input the same mask, to 64 eps, and the same derivatives, to 1e-11."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import softk

from .libraries import BY_NAME, Library
from .oracles import FEW, PROBLEMS, problem_for

EPS = float(np.finfo(np.float64).eps)


def everything(lib: Library, name: str) -> dict[str, np.ndarray]:
    """The mask and its derivatives, in both directions, on one library."""
    case = problem_for(lib, name, "float64")
    rng = np.random.default_rng(17)
    u, dx = rng.normal(size=(2, *case.x.shape))
    names = [key for key in case.arguments if key not in ("x", "k")]

    def f(x: Any, k: Any, u: Any, dx: Any, **kwargs: Any) -> dict[str, Any]:
        mask, pullback = softk.vjp(softk.topk, x, k, **kwargs)
        _, rate = softk.jvp(softk.topk, x, k, tangents={"x": dx}, **kwargs)
        return {"mask": mask, "rate": rate, **pullback(u)}

    made = [lib.array(values) for values in (case.x, case.k, u, dx)]
    kwargs = {key: lib.array(case.arguments[key]) for key in names}
    kwargs |= {key: lib.array(value) if isinstance(value, np.ndarray) else value for key, value in case.options.items()}
    return {key: lib.numpy(value) for key, value in lib.call(f, *made, **kwargs).items()}


_numpy: dict[str, dict[str, np.ndarray]] = {}


@pytest.mark.parametrize("name", [*FEW, "where weighted", "smallest", "n = 200"])
def test_libraries_agree(lib: Library, name: str) -> None:
    if name not in _numpy:
        _numpy[name] = everything(BY_NAME["numpy"], name)
    wanted, found = _numpy[name], everything(lib, name)
    assert set(found) == set(wanted)
    assert np.max(np.abs(found.pop("mask") - wanted["mask"])) <= 64.0 * EPS
    for key, values in found.items():
        for label, part in PROBLEMS[name].parts:
            error, scale = np.max(np.abs(values - wanted[key])[part]), np.max(np.abs(wanted[key][part]))
            assert error <= 1e-11 * scale, f"{label}, {key}: {error / scale:.3g} of the largest"
