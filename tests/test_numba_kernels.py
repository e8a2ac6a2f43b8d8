"""The kernels for arrays in memory keep the contract of the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import softk
import softk_numba
from softk.backend import Kernel, backend_of
from softk.testing import check_kernel

pytestmark = pytest.mark.kernels

KERNELS = softk_numba.KERNELS
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
