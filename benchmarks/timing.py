"""Times of several candidates side by side: round after round, each gets its turn."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Call = Callable[[], object]
"""Does the work once and returns when it is done, device included, unless the clock waits for the device."""


Clock = Callable[[Call, int], float]
"""Seconds a call, of so many calls one after the other; it returns when their work is done."""


class Plan(NamedTuple):
    """How long to measure."""

    rounds: int = 15
    sample: float = 0.002  # seconds a sample lasts at least: faster calls are repeated within it
    budget: float = 1.0  # seconds for one candidate, all rounds together; a slow one takes part in fewer


QUICK = Plan(rounds=3, sample=0.0005, budget=0.05)


class Times(NamedTuple):
    """Seconds a call, one number for each round that the candidate took part in, NaN for the others."""

    seconds: np.ndarray

    def quartiles(self) -> tuple[float, float, float]:
        """First quartile, median, third quartile."""
        first, median, third = np.nanquantile(self.seconds, (0.25, 0.5, 0.75))
        return float(first), float(median), float(third)

    def ratio(self, other: Times) -> float:
        """Median of the ratios round by round: what slows the machine for a while slows both."""
        return float(np.nanmedian(self.seconds / other.seconds))

    @property
    def count(self) -> int:
        """In how many rounds it took part."""
        return int(np.count_nonzero(~np.isnan(self.seconds)))


def host(call: Call, count: int) -> float:
    """The clock of the processor."""
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
    """Time all of them in turns. `estimates` are seconds a call, from calls that have warmed up everything.

    After the deadline, on the monotonic clock, no new round begins but the first.
    """
    names = list(calls)
    repeats, wanted = {}, {}
    for name in names:
        estimate = max(estimates[name], 1e-7)
        repeats[name] = max(1, min(10_000, math.ceil(plan.sample / estimate)))
        wanted[name] = max(1, min(plan.rounds, int(plan.budget / (repeats[name] * estimate))))
    seconds = {name: np.full(plan.rounds, np.nan) for name in names}
    for name in names:
        if estimates[name] > plan.budget:  # the estimate is a time too, and enough of so slow a call
            seconds[name][0] = estimates[name]
    names = [name for name in names if estimates[name] <= plan.budget]
    gc.collect()
    gc.disable()
    try:
        for turn in range(plan.rounds):
            if turn and time.monotonic() > deadline:
                break
            # A different one begins every round, so that no candidate always comes after the same other one's debris.
            start = turn % len(names) if names else 0
            for name in names[start:] + names[:start]:
                if turn % math.ceil(plan.rounds / wanted[name]):
                    continue
                seconds[name][turn] = clock(calls[name], repeats[name])
    finally:
        gc.enable()
    return {name: Times(values) for name, values in seconds.items()}


def once(call: Call) -> float:
    """Seconds of one call."""
    return host(call, 1)
