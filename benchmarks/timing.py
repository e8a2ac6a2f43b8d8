"""Interleaved timing of several candidates: in every round, each candidate is timed once."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Call = Callable[[], object]
"""Does the work once. It waits for the device, unless the clock does so."""


Clock = Callable[[Call, int], float]
"""The seconds per call of `count` consecutive calls. It returns when their work is done."""


class Plan(NamedTuple):
    """How long to measure."""

    rounds: int = 15
    sample: float = 0.002  # minimum duration of a sample in seconds; faster calls are repeated in it
    budget: float = 1.0  # seconds for all rounds of one candidate; slow candidates get fewer rounds


QUICK = Plan(rounds=3, sample=0.0005, budget=0.05)


class Times(NamedTuple):
    """Seconds per call, one number per round; NaN for rounds in which the candidate did not take part."""

    seconds: np.ndarray

    def quartiles(self) -> tuple[float, float, float]:
        """The first quartile, the median and the third quartile."""
        first, median, third = np.nanquantile(self.seconds, (0.25, 0.5, 0.75))
        return float(first), float(median), float(third)

    def ratio(self, other: Times) -> float:
        """The median of the ratios per round. A temporary slowdown of the machine affects both times of a round."""
        return float(np.nanmedian(self.seconds / other.seconds))

    @property
    def count(self) -> int:
        """The number of rounds in which the candidate took part."""
        return int(np.count_nonzero(~np.isnan(self.seconds)))


def host(call: Call, count: int) -> float:
    """Time calls with the clock of the host."""
    before = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - before) / count


def interleaved(
    calls: Mapping[str, Call],
    estimates: Mapping[str, float],
    plan: Plan,
    deadline: float = math.inf,
    clock: Clock = host,
) -> dict[str, Times]:
    """Time all calls in turns. `estimates` are seconds per call after a warm-up.

    After the deadline, on the monotonic clock, no round starts except the first.
    """
    names = list(calls)
    repeats, wanted = {}, {}
    for name in names:
        estimate = max(estimates[name], 1e-7)
        repeats[name] = max(1, min(10_000, math.ceil(plan.sample / estimate)))
        wanted[name] = max(1, min(plan.rounds, int(plan.budget / (repeats[name] * estimate))))
    seconds = {name: np.full(plan.rounds, np.nan) for name in names}
    for name in names:
        if estimates[name] > plan.budget:  # for so slow a call the estimate itself is the measurement
            seconds[name][0] = estimates[name]
    names = [name for name in names if estimates[name] <= plan.budget]
    gc.collect()
    gc.disable()
    try:
        for turn in range(plan.rounds):
            if turn and time.monotonic() > deadline:
                break
            # Rotate the order, so that no candidate always runs with the cache left by the same other one.
            start = turn % len(names) if names else 0
            for name in names[start:] + names[:start]:
                if turn % math.ceil(plan.rounds / wanted[name]):
                    continue
                seconds[name][turn] = clock(calls[name], repeats[name])
    finally:
        gc.enable()
    return {name: Times(values) for name, values in seconds.items()}


def once(call: Call) -> float:
    """The seconds of one call."""
    return host(call, 1)
