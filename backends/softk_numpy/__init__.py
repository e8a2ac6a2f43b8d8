"""NumPy for softk: selection by partition, and a solver that stops when it is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from softk.backend import Array, Backend

__all__ = ["NumpyBackend", "backend"]


class NumpyBackend(Backend):
    """Arrays in memory: values can be looked at, and NumPy partitions in O(n)."""

    def known(self, flag: Array) -> bool | None:
        return bool(flag)

    def repeat(self, step: Callable[[Any], tuple[Any, Array]], state: Any, limit: int) -> Any:
        for _ in range(limit):
            state, done = step(state)
            if done.all():
                break
        return state

    def order_statistics(self, x: Array, ranks: Array, static: tuple[int, ...] | None) -> Array:
        if x.size == 0:
            return np.empty((*x.shape[:-1], ranks.shape[-1]), x.dtype)
        index = x.shape[-1] - ranks
        ordered = np.partition(x, np.unique(index), axis=-1)
        return np.take_along_axis(ordered, np.broadcast_to(index, (*x.shape[:-1], ranks.shape[-1])), axis=-1)


backend = NumpyBackend(xp, "numpy")
