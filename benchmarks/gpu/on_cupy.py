"""CuPy: softk with `softk.vjp`, softmax with a hand-written derivative, timed by events of the device."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import cupy as cp
import numpy as np

import softk
from benchmarks.cases import Case
from benchmarks.timing import Call

from .drivers import Array, Driver, Inputs


class _CuPy(Driver):
    def __init__(self, device: str) -> None:
        if device != "cuda":
            raise RuntimeError("has arrays on a CUDA device only")
        if cp.cuda.runtime.getDeviceCount() == 0:  # without a driver this call raises
            raise RuntimeError(f"cupy {cp.__version__} sees no CUDA device")

    def describe(self) -> dict[str, Any]:
        properties = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)
        return {
            "device": properties["name"].decode(),
            "memory": properties["totalGlobalMem"],
            "cache": properties.get("l2CacheSize"),
            "versions": {"cupy": cp.__version__},
        }

    def normal(self, rows: int, n: int, dtype: str, seed: int) -> Array:
        # NumPy generates the numbers, because CuPy's generators need cuRAND, which may be missing.
        return cp.asarray(np.random.default_rng(seed).standard_normal((rows, n), dtype=np.dtype(dtype)))

    def inputs(self, x: Array, u: Array) -> Inputs:
        return Inputs(x, u, cp.empty_like(x))

    def calls(self, case: Case) -> dict[str, Callable[[Inputs], Any]]:
        def copy(given: Inputs) -> Any:
            return cp.copyto(given.target, given.x)

        def forward(given: Inputs) -> Any:
            return softk.topk(given.x, case.k, epsilon=case.epsilon)

        def both(given: Inputs) -> Any:
            mask, pullback = softk.vjp(softk.topk, given.x, case.k, epsilon=case.epsilon)
            return mask, pullback(given.u)["x"]

        def softmax(given: Inputs) -> Any:
            share = cp.exp(given.x - given.x.max(axis=-1, keepdims=True))
            share /= share.sum(axis=-1, keepdims=True)
            return share, share * (given.u - (given.u * share).sum(axis=-1, keepdims=True))

        return {"copy": copy, "forward": forward, "both": both, "softmax": softmax}

    def clock(self, call: Call, count: int) -> float:
        start, end = cp.cuda.Event(), cp.cuda.Event()
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(cp.cuda.get_elapsed_time(start, end)) / 1e3 / count

    def mass_error(self, mask: Array, k: int) -> float:
        return float(abs(mask.sum(axis=-1, dtype=cp.float64) - k).max()) / k

    def finite(self, gradient: Array) -> bool:
        return bool(cp.isfinite(gradient).all())

    def peak(self, call: Callable[[Inputs], Any], inputs: Inputs) -> float | None:
        # The memory pool does not report its peak. The growth of the emptied pool is a close upper bound.
        self.free()
        pool = cp.get_default_memory_pool()
        before = pool.used_bytes()
        call(inputs)
        return float(pool.total_bytes() - before)

    def free(self) -> None:
        gc.collect()
        cp.cuda.Device().synchronize()
        cp.get_default_memory_pool().free_all_blocks()


driver = _CuPy
