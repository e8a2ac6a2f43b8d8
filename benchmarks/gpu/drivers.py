"""What a framework supplies to be measured on a device."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import Case
from benchmarks.timing import Call

Array = Any
NAMES = {"torch": "PyTorch", "cupy": "CuPy", "jax": "JAX jit"}
ROTATED = 2**28
"""Bytes of all sets of scores together, several times the level 2 cache of any device: what is read is not in it."""
MOST_SETS = 16
SEED = 7


class Inputs(NamedTuple):
    """Scores, a cotangent, and where a copy of the scores goes."""

    x: Array
    u: Array
    target: Array


class Driver(ABC):
    """One framework on one device. It raises when made where there is no such device."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The device's name, its bytes of memory and of level 2 cache, where known, and versions."""

    @abstractmethod
    def normal(self, rows: int, n: int, dtype: str, seed: int) -> Array:
        """Standard normal numbers on the device."""

    @abstractmethod
    def inputs(self, x: Array, u: Array) -> Inputs:
        """Scores as this framework differentiates by them, and room for their copy."""

    @abstractmethod
    def calls(self, case: Case) -> dict[str, Callable[[Inputs], Any]]:
        """What is timed: "copy", "forward", "both" (softk's mask, and with its derivative), "softmax" and "hard"."""

    @abstractmethod
    def clock(self, call: Call, count: int) -> float:
        """Seconds a call, of so many one after the other, on the device's clock if it has one."""

    @abstractmethod
    def mass_error(self, mask: Array, k: int) -> float:
        """The largest |sum mask - k| / k of a slice."""

    @abstractmethod
    def finite(self, gradient: Array) -> bool:
        """Whether all of it is a number."""

    @abstractmethod
    def peak(self, call: Callable[[Inputs], Any], inputs: Inputs) -> float | None:
        """Bytes that a call holds at its peak, results included and inputs not; None where it cannot be told."""

    @abstractmethod
    def free(self) -> None:
        """Give back what is cached, and wait for the device; raises if the device is beyond use in this process."""

    def sets(self, case: Case) -> list[Inputs]:
        """As many as are needed for the scores not to be in the cache when their turn comes again."""
        count = min(MOST_SETS, max(2, math.ceil(ROTATED / (case.size * itemsize(case.dtype)))))
        shape = (case.rows, case.n, case.dtype)
        return [
            self.inputs(self.normal(*shape, SEED + i), self.normal(*shape, SEED + MOST_SETS + i)) for i in range(count)
        ]


def itemsize(dtype: str) -> int:
    """Bytes of a number; NumPy does not know all of them."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def rotating(function: Callable[[Inputs], Any], sets: list[Inputs]) -> Call:
    """A call that takes the next set every time."""
    turn = cycle(sets)
    return lambda: function(next(turn))


def load(framework: str, device: str) -> Driver:
    """The driver of a framework; raises with the reason where it cannot be."""
    try:
        module = import_module(f"benchmarks.gpu.on_{framework}")
    except ModuleNotFoundError as error:
        if error.name == framework:
            raise RuntimeError("is not installed") from error
        raise
    found: Driver = module.driver(device)
    return found
