"""The interface of a framework that is measured on a device."""

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
"""Bytes of all sets of scores together: several times the level 2 cache of any device, so that reads miss it."""
MOST_SETS = 16
SEED = 7


class Inputs(NamedTuple):
    """Scores, a cotangent, and a buffer for a copy of the scores."""

    x: Array
    u: Array
    target: Array


class Driver(ABC):
    """One framework on one device. The constructor raises if there is no such device."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The name of the device, its memory and level 2 cache in bytes, if known, and versions."""

    @abstractmethod
    def normal(self, rows: int, n: int, dtype: str, seed: int) -> Array:
        """Standard normal numbers on the device."""

    @abstractmethod
    def inputs(self, x: Array, u: Array) -> Inputs:
        """The inputs, prepared for differentiation with respect to the scores."""

    @abstractmethod
    def calls(self, case: Case) -> dict[str, Callable[[Inputs], Any]]:
        """The timed functions: "copy", "forward" (softk's mask), "both" (with its derivative), "softmax" and "hard"."""

    @abstractmethod
    def clock(self, call: Call, count: int) -> float:
        """The seconds per call of `count` consecutive calls, on the clock of the device if it has one."""

    @abstractmethod
    def mass_error(self, mask: Array, k: int) -> float:
        """The largest |sum mask - k| / k over the slices."""

    @abstractmethod
    def finite(self, gradient: Array) -> bool:
        """Whether all elements are finite."""

    @abstractmethod
    def peak(self, call: Callable[[Inputs], Any], inputs: Inputs) -> float | None:
        """The peak memory of a call in bytes, including results but not inputs; None if it cannot be measured."""

    @abstractmethod
    def free(self) -> None:
        """Free cached memory and wait for the device. Raises if this process can no longer use the device."""

    def sets(self, case: Case) -> list[Inputs]:
        """So many sets of inputs that the scores of a set are no longer in the cache when it is used again."""
        count = min(MOST_SETS, max(2, math.ceil(ROTATED / (case.size * itemsize(case.dtype)))))
        shape = (case.rows, case.n, case.dtype)
        return [
            self.inputs(self.normal(*shape, SEED + i), self.normal(*shape, SEED + MOST_SETS + i)) for i in range(count)
        ]


def itemsize(dtype: str) -> int:
    """The size of a number in bytes. NumPy does not know bfloat16."""
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def rotating(function: Callable[[Inputs], Any], sets: list[Inputs]) -> Call:
    """A call that uses the next set of inputs every time."""
    turn = cycle(sets)
    return lambda: function(next(turn))


def load(framework: str, device: str) -> Driver:
    """The driver of a framework. Raises with the reason if it is not available."""
    try:
        module = import_module(f"benchmarks.gpu.on_{framework}")
    except ModuleNotFoundError as error:
        if error.name == framework:
            raise RuntimeError("is not installed") from error
        raise
    found: Driver = module.driver(device)
    return found
