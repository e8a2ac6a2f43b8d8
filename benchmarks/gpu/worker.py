"""Measures one framework on a device: `python -m benchmarks.gpu.worker`, started by the command.

One record, a dictionary, is written for every case, in their order, whether it was measured, skipped, or failed. A case
after which the device answers no more ends the process, and has no record; the command starts another for what is left.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.cases import Case
from benchmarks.processes import short

from .cases import plan
from .drivers import NAMES, Driver, Inputs, itemsize, load, rotating

OVER = "the time for the whole run was over"
TIMES = timing.Plan(rounds=20, sample=0.003, budget=0.25)
ALLOWED = 0.01
"""Largest error of the mask's sum, over k: a mask in half precision has half of it. Beyond, the time means nothing."""
RATIOS = {"of_copy": ("copy", "forward"), "over_softmax": ("both", "softmax"), "over_hard": ("forward", "hard")}
"""What is divided by what, round by round. A copy moves the bytes of scores and mask once, so its time over that of the
forward pass is the share of its bandwidth."""
Record = dict[str, Any]


class Data:
    """The sets of inputs of one shape and dtype at a time."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.key: Any = None
        self.sets: list[Inputs] = []

    def of(self, case: Case) -> list[Inputs]:
        """Those of a case; the ones before are given up first."""
        key = (case.rows, case.n, case.dtype)
        if key != self.key:
            self.key, self.sets = None, []
            self.driver.free()
            self.sets, self.key = self.driver.sets(case), key
        return self.sets


def measure(
    driver: Driver,
    framework: str,
    cases: Iterable[Case],
    times: timing.Plan,
    deadline: float = math.inf,
    watch: Callable[[Case], None] = lambda case: None,
) -> Iterator[Record]:
    """A record of each case. What has not begun at the deadline is skipped."""
    data = Data(driver)
    for case in cases:
        watch(case)
        if time.monotonic() > deadline:
            yield {**describe(case, framework), "status": "skipped", "reasons": {"all": OVER}}
            continue
        record = {**describe(case, framework), "status": "failed", "reasons": {}}

        def step(case: Case = case, record: Record = record) -> None:
            measure_case(driver, data, case, times, deadline, record)

        guarded(driver, record, "all", step)
        yield record


def measure_case(driver: Driver, data: Data, case: Case, times: timing.Plan, deadline: float, record: Record) -> None:
    """Everything that is timed on one case, in turns, into its record."""
    sets = data.of(case)
    record["sets"] = len(sets)
    calls: dict[str, timing.Call] = {}
    estimates: dict[str, float] = {}
    for name, function in driver.calls(case).items():
        call = rotating(function, sets)

        def prepare(name: str = name, call: timing.Call = call) -> None:
            estimates[name] = min(warm_up(driver, case, name, call), times.budget / 3)  # all get their three rounds

        if guarded(driver, record, name, prepare):
            calls[name] = call
            if name == "both":

                def weigh(both: Callable[[Inputs], Any] = function) -> None:
                    record["arrays"] = arrays(driver, case, both, sets[0])

                guarded(driver, record, "arrays", weigh)
    measured = timing.interleaved(calls, estimates, times, deadline, driver.clock)
    summarise(record, measured)
    if "copy" in measured:
        record["copied"] = 2.0 * case.size * itemsize(case.dtype) / record["times"]["copy"]["median"]
    if "forward" in measured:
        record["status"] = "measured"


def guarded(driver: Driver, record: Record, name: str, step: Callable[[], object]) -> bool:
    """Whether a step succeeds; if not, why goes into the record. Raises if the device answers no more."""
    failed = attempt(step)
    if failed is not None:
        record["reasons"][name] = failed
        driver.free()
    return failed is None


def attempt(step: Callable[[], object]) -> str | None:
    """Why a step failed, if it did; nothing of it is held when this returns."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # errors are recorded
            step()
    except Exception as error:  # whatever it raises is its result
        return short(error)
    return None


def describe(case: Case, framework: str) -> Record:
    """What identifies a case in a record."""
    return {
        "framework": NAMES[framework],
        "rows": case.rows,
        "n": case.n,
        "k": case.k,
        "epsilon": case.epsilon,
        "dtype": case.dtype,
    }


def warm_up(driver: Driver, case: Case, name: str, call: timing.Call) -> float:
    """Seconds a call, once all is compiled; raises if what softk computes is wrong."""
    result: Any = call()
    if name in ("forward", "both"):
        mask = result if name == "forward" else result[0]
        error = driver.mass_error(mask, case.k)
        if not error <= ALLOWED:
            raise ArithmeticError(f"the mask's sum is off by {error:.1e} k")
        if name == "both" and not driver.finite(result[1]):
            raise ArithmeticError("the derivative is not finite")
        del mask
    del result
    seconds = driver.clock(call, 1)
    return driver.clock(call, 3) if seconds < 0.3 else seconds


def arrays(driver: Driver, case: Case, function: Callable[[Inputs], Any], given: Inputs) -> float | None:
    """What a call holds at its peak, in arrays of the scores' size."""
    peak = driver.peak(function, given)
    return None if peak is None else peak / (case.size * itemsize(case.dtype))


def summarise(record: Record, measured: dict[str, timing.Times]) -> None:
    """Put quartiles and ratios into a record."""
    record["times"] = {}
    for name, times in measured.items():
        first, median, third = times.quartiles()
        record["times"][name] = {"q1": first, "median": median, "q3": third, "rounds": times.count}
    for ratio, (over, under) in RATIOS.items():
        both = over in measured and under in measured
        record[ratio] = measured[over].ratio(measured[under]) if both else None


def main(argv: list[str] | None = None) -> int:
    """Measure and write the records as they come, one a line; or say what device there is."""
    parser = argparse.ArgumentParser(description="Measure one framework on a device; the command starts this.")
    parser.add_argument("framework", choices=tuple(NAMES))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--first", type=int, default=0, help="number of the case to begin with")
    parser.add_argument("--describe", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + options.seconds

    def watch(case: Case) -> None:
        print(f"case\t{case.label}", flush=True)

    with options.output.open("w") as file:
        if options.describe:
            try:
                found = load(options.framework, options.device).describe()
            except Exception as error:  # a framework that is absent or broken is so in its own way
                found = {"absent": short(error).removeprefix("RuntimeError: ")}
            file.write(json.dumps(found) + "\n")
            return 0
        driver = load(options.framework, options.device)
        cases = plan(options.framework, quick=options.quick)[options.first :]
        times = timing.QUICK if options.quick else TIMES
        for record in measure(driver, options.framework, cases, times, deadline, watch):
            file.write(json.dumps(record) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
