"""The kernels for arrays in memory keep the contract of the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import softk
import softk_numba
from softk._reference.threshold.masks import log_mask, log_mask_at
from softk.backend import Kernel, backend_of
from softk.testing import check_kernel

pytestmark = pytest.mark.kernels

#: `check_kernel` has the operators. The logarithm at a known threshold is part of a rule, and has a test of its own.
KERNELS = [kernel for kernel in softk_numba.KERNELS if kernel.primitive is not log_mask_at]
IDS = [f"{kernel.primitive.name}-{kernel.part}" for kernel in KERNELS]


@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_with_numpy(kernel: Any) -> None:
    report = check_kernel(kernel, np.asarray, dtypes=("float16", "float32", "float64"))
    assert report.served
    assert all(name.startswith("no slices") for name in report.refused)


@pytest.mark.full
@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_with_torch(kernel: Any) -> None:
    report = check_kernel(kernel, torch.from_numpy, dtypes=("float16", "bfloat16", "float32", "float64"))
    assert report.served
    assert all(name.startswith("no slices") for name in report.refused)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_tensor_is_read_in_place(dtype: str) -> None:
    from softk_numba import launch

    x = torch.zeros(3, 5, dtype=getattr(torch, dtype)).requires_grad_()
    assert launch.numpy_of(x).ctypes.data == x.data_ptr()
    assert launch.rows_of(x.T[:, None], 3).ctypes.data == x.data_ptr()


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_logarithm_at_a_known_threshold(dtype: str, make: Any, rng: Any) -> None:
    """As the reference has it, for scores, masses and temperatures of any size, and as the operator itself finds it."""
    x = (-rng.exponential(size=(64, 300)) * np.exp(8.0 * rng.standard_normal((64, 1)))).astype(dtype)
    x[0, 5], x[1, 5], x[2, 5], x[3] = -np.inf, np.inf, np.nan, -np.inf
    k = rng.uniform(0.5, 7.0, (64, 1)).astype(dtype)
    k[4], k[5], k[6] = 0.0, -1.0, 300.0
    tau = np.exp(6.0 * rng.standard_normal((64, 1))).astype(dtype)
    tau[7], tau[8], tau[9] = 1e-36, 1e36, -1.0
    scores, mass, temperature = make(x), make(k), make(tau)
    backend = backend_of(scores)
    with backend.quiet():
        logs, *state = backend.run(log_mask, "forward", (scores, mass, temperature, None, None), ranks=None)
        given = scores, mass, temperature, *state
        found, expected = (
            np.asarray(f(backend, given)[0])
            for f in (
                next(kernel.compute for kernel in softk_numba.KERNELS if kernel.primitive is log_mask_at),
                log_mask_at.forward,
            )
        )
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    assert np.isneginf(found).any()
    assert np.isnan(found).any()
    for other, rows in ((expected, slice(None)), (np.asarray(logs), slice(10, None))):
        one, two = found[rows], other[rows]
        finite = np.isfinite(two)
        assert finite.any()
        error = np.abs(one[finite] - two[finite]) / np.maximum(1.0, np.abs(two[finite]))
        assert error.max() <= 4.0 * np.finfo(dtype).eps


@pytest.mark.parametrize("part", ["vjp", "jvp"])
def test_the_derivative_of_a_quantile_is_that_of_two_thresholds(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both thresholds, and the derivative of both, are computed by kernels."""
    used: list[tuple[str, str]] = []
    backend = backend_of(np.ones(1))

    def watched(kernel: Kernel) -> Kernel:
        def compute(*args: Any, **options: Any) -> Any:
            used.append((kernel.primitive.name, kernel.part))
            return kernel.compute(*args, **options)

        return replace(kernel, compute=compute)

    monkeypatch.setattr(backend, "kernels", tuple(watched(kernel) for kernel in backend.kernels))
    x = np.random.default_rng(0).standard_normal((3, 20))
    if part == "vjp":
        softk.vjp(softk.quantile, x, 0.3, epsilon=0.5)[1](np.ones(3))
    else:
        softk.jvp(softk.quantile, x, 0.3, epsilon=0.5, tangents={"x": x})
    assert used.count(("topk_threshold", part)) == 2
    assert used.count(("solve_threshold", "forward")) == 2
