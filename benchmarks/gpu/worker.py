"""Measure one framework on a device: `python -m benchmarks.gpu.worker`, started by `python -m benchmarks.gpu`.

It writes one record, a dictionary, per case, in the order of the cases, whether it was measured, skipped, or failed. If
the device stops responding, the process ends without a record of that case, and a new process measures the others.
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

from .cases import DTYPES, plan
from .drivers import NAMES, Driver, Inputs, itemsize, load, rotating

OVER = "the time for the whole run was over"
TIMES = timing.Plan(rounds=20, sample=0.003, budget=0.25)
ALLOWED = 0.01
"""The largest allowed |sum mask - k| / k, twice the error in half precision. A result beyond it is a failure."""
RATIOS = {
    "of_copy": ("copy", "forward"),
    "over_softmax": ("both", "softmax"),
    "over_hard": ("forward", "hard"),
    "over_compiled": ("both", "compiled"),
    "over_liger": ("both", "liger"),
}
"""The ratios, as (numerator, denominator), computed per round. A copy reads as many bytes as the scores and writes as
many as the mask, so its time over that of the forward pass is the share of its bandwidth that softk reaches."""
Record = dict[str, Any]


class Data:
    """The sets of inputs, held for one shape and dtype at a time."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.key: Any = None
        self.sets: list[Inputs] = []

    def of(self, case: Case) -> list[Inputs]:
        """The sets of a case. The sets of the previous shape or dtype are freed first."""
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
    """One record per case. Cases after the deadline are skipped."""
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
    """Time all functions on one case, in turns, and write the results into its record."""
    sets = data.of(case)
    record["sets"] = len(sets)
    calls: dict[str, timing.Call] = {}
    estimates: dict[str, float] = {}
    for name, function in driver.calls(case).items():
        call = rotating(function, sets)

        def prepare(name: str = name, call: timing.Call = call) -> None:
            estimates[name] = min(warm_up(driver, case, name, call), times.budget / 3)  # at least 3 rounds each

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
    """Run a step, and record the reason if it fails. Raises if the device no longer responds."""
    failed = attempt(step)
    if failed is not None:
        record["reasons"][name] = failed
        driver.free()
    return failed is None


def attempt(step: Callable[[], object]) -> str | None:
    """Run a step. Returns the reason if it fails. Its arrays are freed when this function returns."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # only errors are recorded
            step()
    except Exception as error:  # a step may raise anything; the error is its result
        return short(error)
    return None


def describe(case: Case, framework: str) -> Record:
    """The fields that identify a case in a record."""
    return {
        "framework": NAMES[framework],
        "rows": case.rows,
        "n": case.n,
        "k": case.k,
        "epsilon": case.epsilon,
        "dtype": case.dtype,
    }


def warm_up(driver: Driver, case: Case, name: str, call: timing.Call) -> float:
    """The seconds per call after compilation. Raises if softk's result is wrong."""
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
    """The peak memory of a call, in arrays of the size of the scores."""
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
    """Measure one framework and write one record per line, or, with --describe, describe the device."""
    parser = argparse.ArgumentParser(description="Measure one framework; started by python -m benchmarks.gpu.")
    parser.add_argument("framework", choices=tuple(NAMES))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
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
            except Exception as error:  # an absent or broken framework may raise anything
                found = {"absent": short(error).removeprefix("RuntimeError: ")}
            file.write(json.dumps(found) + "\n")
            return 0
        driver = load(options.framework, options.device)
        cases = plan(options.framework, quick=options.quick, dtypes=options.dtypes)[options.first :]
        times = timing.QUICK if options.quick else TIMES
        for record in measure(driver, options.framework, cases, times, deadline, watch):
            file.write(json.dumps(record) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
