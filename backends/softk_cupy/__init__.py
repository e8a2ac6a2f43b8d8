"""The CuPy backend: it selects by partition and never synchronizes with the device."""

from __future__ import annotations

from typing import Any

import array_api_compat.cupy as xp
import cupy as cp

from softk.backend import Array, Backend, Words, pick

__all__ = ["CupyBackend", "backend"]


class CupyBackend(Backend):
    """Arrays on a CUDA device. The solver runs its full number of steps, because reading a value synchronizes."""

    words = Words("{}.astype(cp.float32)", "cp.asarray({})", "cp.asarray({}) within `with {}.device:`")

    def memory(self, x: Any) -> Any:
        return x

    def select(self, x: Array, ranks: Array | tuple[int, ...]) -> Array:
        if not isinstance(ranks, tuple) or x.size == 0:
            return super().select(x, ranks)
        n = x.shape[-1]
        if 2 * max(ranks) <= n:
            # CuPy's partition is fast only for ranks near the lower end, so the scores are negated.
            places = [rank - 1 for rank in ranks]
            return -pick(xp, cp.partition(-x, sorted(set(places)), axis=-1), places)
        places = [n - rank for rank in ranks]
        return pick(xp, cp.partition(x, sorted(set(places)), axis=-1), places)


backend = CupyBackend(xp, "cupy")
