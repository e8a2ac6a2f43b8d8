"""Measure one framework in its own process: `python -m benchmarks.worker`, started by `python -m benchmarks`.

It writes one record, a dictionary, per candidate and case, whether it was measured, skipped, or failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from . import memory, timing, truth, truth_sorted
from .candidates import PEERS, Candidate, Kind, Prepared, availability
from .cases import Case, plan, quick_plan
from .processes import short

FRAMEWORKS = ("numpy", "torch", "jax", "compiled")
"""Each has its own process. `compiled` is torch.compile, which comes last because it compiles for minutes."""
TOO_LONG = 3.0
"""A peer that would take more than this many seconds per call is skipped."""
OVER = "the time for the whole run was over"
Record = dict[str, Any]


def environment(framework: str, threads: str) -> dict[str, str]:
    """The environment variables that set the number of threads. They must be set before the framework is imported."""
    if threads == "all":
        return {}
    found = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    if framework == "jax":
        found["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    return found


def on_one_core() -> None:
    """Pin this process to one core, which limits every thread pool. Some systems only have the variables."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def cases_of(framework: str, threads: str, *, quick: bool) -> list[Case]:
    """The cases that a worker measures."""
    cases = (quick_plan if quick else plan)(threads)
    return [case for case in cases if case.compiled or framework != "compiled"]


class Pace:
    """The times of the candidates so far, to predict the time of the next case."""

    def __init__(self) -> None:
        self.rates: dict[tuple[str, str], float] = {}  # seconds by rows * n^power
        self.compiling = 0.0  # the longest first call of torch.compile

    def expected(self, candidate: Candidate, case: Case) -> float:
        """Seconds per call, extrapolated from the previous case; 0 if there was none."""
        rate = self.rates.get((candidate.framework, candidate.name), 0.0)
        return rate * case.rows * float(case.n) ** candidate.power

    def learn(self, candidate: Candidate, case: Case, seconds: float) -> None:
        """Record the time of a call."""
        rate = seconds / (case.rows * float(case.n) ** candidate.power)
        self.rates[candidate.framework, candidate.name] = rate


def measure(
    cases: Iterable[Case],
    candidates: list[Candidate],
    times: timing.Plan,
    threads: str = "all",
    deadline: float = math.inf,
    watch: Callable[[Case], None] = lambda case: None,
) -> Iterator[Record]:
    """The records of all candidates on all cases, case by case. Cases after the deadline are skipped."""
    pace = Pace()
    for case in cases:
        watch(case)
        if time.monotonic() > deadline:
            for framework in dict.fromkeys(candidate.framework for candidate in candidates):
                yield {**describe(case, threads), "framework": framework, "status": "skipped", "reason": OVER}
            continue
        yield from measure_case(case, candidates, times, threads, deadline, pace)


def measure_case(
    case: Case, candidates: list[Candidate], times: timing.Plan, threads: str, deadline: float, pace: Pace
) -> Iterator[Record]:
    """Measure all candidates on one case."""
    x, u = case.scores(), case.cotangent()
    flat = case.flat()
    flat_x, flat_u = (array.reshape(flat.rows, flat.n) for array in (x, u))
    judge = judged_by(flat, flat_x, flat_u)
    records: list[Record] = []
    calls: dict[str, timing.Call] = {}
    estimates: dict[str, float] = {}
    for candidate in candidates:
        if not candidate.belongs(case):
            continue
        record = {
            **describe(case, threads),
            "candidate": candidate.name,
            "framework": candidate.framework,
            "kind": candidate.kind,
        }
        records.append(record)
        own, *arrays = (case, x, u) if candidate.joint else (flat, flat_x, flat_u)
        reason = candidate.refuses(own) or _too_long(candidate, own, deadline, pace)
        if reason is not None:
            record |= {"status": "skipped", "reason": reason}
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # only the errors of candidates are recorded
                prepared = candidate.prepare(own, *arrays)
                output, gradient = warm_up(candidate, own, prepared, record, pace)
            record |= {"status": "measured", "errors": judge(candidate.kind, output, gradient)}
        except Exception as error:  # a candidate may raise anything; the error is its result
            record |= {"status": "failed", "reason": short(error)}
            continue
        if not candidate.peer:  # limit the estimate, so that softk and its framework get at least three rounds
            record["second_call"] = {name: min(s, times.budget / 3) for name, s in record["second_call"].items()}
        key = f"{candidate.framework}|{candidate.name}"
        if prepared.both is not None and "both" in record["second_call"]:
            calls[f"{key}|both"], estimates[f"{key}|both"] = prepared.both, record["second_call"]["both"]
        if "forward" in record["second_call"]:
            calls[f"{key}|forward"], estimates[f"{key}|forward"] = prepared.forward, record["second_call"]["forward"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = timing.interleaved(calls, estimates, times, deadline)
    for record in records:
        if record["status"] == "measured":
            summarise(record, measured)
    yield from records


def judged_by(case: Case, x: np.ndarray, u: np.ndarray) -> Callable[..., Record | None]:
    """A function of the kind, the output and the derivative of a candidate: the errors, if they are defined."""
    if case.operator == "topk":
        right = truth.solve(x, u, case.k, case.epsilon)

        def errors(kind: Kind, output: np.ndarray, gradient: np.ndarray | None) -> Record | None:
            if kind != "soft":
                return None
            whole = None if gradient is None else gradient.reshape(x.shape)
            return truth.errors(output.reshape(x.shape), whole, right, case.k)._asdict()

        return errors

    exact = truth_sorted.solve(case, x, u)

    def distances(kind: Kind, output: np.ndarray, gradient: np.ndarray | None) -> Record | None:
        return None if kind == "other" else truth_sorted.errors(kind, output, gradient, exact)._asdict()

    return distances


def describe(case: Case, threads: str) -> Record:
    """The fields that identify a case in a record."""
    return {
        "group": case.group,
        "operator": case.operator,
        "joint": case.joint,
        "rows": case.rows,
        "n": case.n,
        "k": case.k,
        "epsilon": case.epsilon,
        "dtype": case.dtype,
        "threads": threads,
    }


def _too_long(candidate: Candidate, case: Case, deadline: float, pace: Pace) -> str | None:
    left = deadline - time.monotonic()
    if candidate.framework == "torch.compile" and 1.5 * pace.compiling > left:
        return "too little of the whole run's time was left to compile it"
    if left < 0.0:
        return OVER
    expected = pace.expected(candidate, case)
    return f"one call would take about {expected:.0f} s" if candidate.peer and expected > TOO_LONG else None


def warm_up(candidate: Candidate, case: Case, prepared: Prepared, record: Record, pace: Pace) -> tuple[Any, Any]:
    """Make a few calls of each phase. The first one compiles, the others estimate the time. Returns the results."""
    record |= {"first_call": {}, "second_call": {}}
    output = gradient = None
    for phase in ("both", "forward"):
        call = prepared.both if phase == "both" else prepared.forward
        unwanted = not case.forward or "forward" in record["first_call"]
        if call is None or (phase == "forward" and unwanted and output is not None):
            continue
        before = time.perf_counter()
        try:
            result = call()
        except Exception as error:
            if phase == "forward":
                raise
            record["reason"] = f"backward failed: {short(error)}"
            continue
        seconds = time.perf_counter() - before
        record["first_call"][phase] = seconds
        if candidate.framework == "torch.compile":
            pace.compiling = max(pace.compiling, seconds)
        if phase == "both":
            output, gradient = (prepared.numpy(array) for array in result)
        elif output is None:
            output = prepared.numpy(result)
        del result
        # Take the faster of two calls, since other processes may interfere, and a compiler may compile twice.
        slow = seconds > 0.3 * TOO_LONG
        eager = candidate.framework in ("NumPy", "PyTorch")
        times = [seconds] if slow and eager else [timing.once(call)]
        if times[0] < 0.3 * TOO_LONG or candidate.framework == "torch.compile":
            times.append(timing.once(call))
        elif phase == "both":
            record["first_call"]["forward"] = None  # too slow: the forward pass is not timed separately
        record["second_call"][phase] = min(times)
    again = record["second_call"]
    pace.learn(candidate, case, again.get("both", again.get("forward", 0.0)))
    return output, gradient


def summarise(record: Record, measured: dict[str, timing.Times]) -> None:
    """Put quartiles into a record, and ratios to the softmax of the same framework in the same rounds."""
    framework = record["framework"]
    softmax = next((name for name in ("softmax", "softmax (SciPy)") if f"{framework}|{name}|both" in measured), None)
    del record["second_call"]
    for phase in ("forward", "both"):
        times = measured.get(f"{framework}|{record['candidate']}|{phase}")
        if times is None:
            record[phase] = None
            continue
        first, median, third = times.quartiles()
        record[phase] = {"q1": first, "median": median, "q3": third, "rounds": times.count, "over_softmax": None}
        if softmax is not None:
            reference = measured.get(f"{framework}|{softmax}|{phase}")
            record[phase]["over_softmax"] = None if reference is None else times.ratio(reference)


def memory_records(candidates: list[Candidate], case: Case) -> Iterator[Record]:
    """The memory records of softk, softmax and the Sinkhorn iterations on one case."""
    for candidate in candidates:
        if candidate.framework not in memory.MEASURES:
            continue
        if candidate.name.split(" ")[0] not in ("softk.topk", "softmax", "200"):
            continue
        if candidate.framework == "JAX jit" and candidate.peer:
            continue
        what, measured = memory.MEASURES[candidate.framework]
        record = {**describe(case, "all"), "group": "memory", "candidate": candidate.name, "what": what}
        record["framework"] = candidate.framework
        try:
            yield {**record, "status": "measured", "arrays": measured(candidate, case)}
        except Exception as error:
            yield {**record, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:200]}


def main(argv: list[str] | None = None) -> int:
    """Measure one framework, and write one record per line as soon as it is measured."""
    parser = argparse.ArgumentParser(description="Measure one framework; started by python -m benchmarks.")
    parser.add_argument("framework", choices=FRAMEWORKS)
    parser.add_argument("--threads", choices=("one", "all"), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + options.seconds
    if options.threads == "one":
        on_one_core()
    cases = cases_of(options.framework, options.threads, quick=options.quick)
    if options.framework == "compiled":
        from .candidates_torch import compiled

        found = compiled(options.device)
    else:
        modules = [import_module(f"benchmarks.{part}_{options.framework}") for part in ("candidates", "sorting")]
        found = [candidate for module in modules for candidate in module.candidates(options.device)]
    if options.framework in ("torch", "compiled") and options.threads == "one":
        import torch

        torch.set_num_threads(1)

    def watch(case: Case) -> None:
        print(f"case\t{case.label}", flush=True)

    with options.output.open("w") as file:
        times = timing.QUICK if options.quick else timing.Plan()
        for peer in PEERS:  # the framework "torch" has the peers of "PyTorch"
            if peer.framework.lower() in (options.framework, f"py{options.framework}"):
                record = {"group": "peers", "peer": peer.distribution, "status": availability(peer)}
                file.write(json.dumps(record) + "\n")
        if options.threads == "all":
            large = Case("memory", 1, 10_000 if options.quick else 1_000_000, 1000)
            for record in memory_records(found, large):
                file.write(json.dumps(record) + "\n")
        for record in measure(cases, found, times, options.threads, deadline, watch):
            file.write(json.dumps(record) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
