"""CuPy for softk: selection by partition, and nothing that waits for the device."""

from __future__ import annotations

from typing import Any

import array_api_compat.cupy as xp
import cupy as cp

from softk.backend import Array, Backend

__all__ = ["CupyBackend", "backend"]


class CupyBackend(Backend):
    """Arrays on a CUDA device. The solver runs its full number of steps, since reading a value would wait for it."""

    def devices(self) -> list[Any]:
        return [cp.cuda.Device(i) for i in range(cp.cuda.runtime.getDeviceCount())]

    def order_statistics(self, x: Array, ranks: Array, static: tuple[int, ...] | None) -> Array:
        if static is None or x.size == 0:
            return super().order_statistics(x, ranks, static)
        index = [x.shape[-1] - rank for rank in static]
        ordered = cp.partition(x, sorted(set(index)), axis=-1)
        return cp.concatenate([ordered[..., i : i + 1] for i in index], axis=-1)


backend = CupyBackend(xp, "cupy")
