"""Benchmark softk on a CUDA device, print the tables, and update docs/benchmarks-gpu.md: `python -m benchmarks.gpu`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import processes
from benchmarks.machine import ROOT, processor, versions
from benchmarks.report import between, write_json

from . import plots, report
from .cases import DTYPES, plan
from .drivers import NAMES
from .worker import OVER, describe

PAGE = ROOT / "docs" / "benchmarks-gpu.md"
RESULTS = ROOT / "benchmarks" / "results_gpu.json"
PICTURE = ROOT / "docs" / "_static" / "benchmark_gpu.png"
RESERVES = {"torch": 150.0, "cupy": 75.0, "jax": 150.0}
"""Seconds reserved for each framework; earlier frameworks must not use them."""
DESCRIPTION = 120.0
"""The time limit in seconds for importing a framework and describing its device."""


VARIABLES = {"XLA_PYTHON_CLIENT_PREALLOCATE": os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false")}
"""JAX allocates memory as needed, instead of three quarters of the device, which others may be using."""


def devices(frameworks: list[str], device: str) -> dict[str, dict[str, Any]]:
    """Each framework's description of the device, or why it has none, from processes that end and free the device."""
    found = {}
    for framework in frameworks:
        done = processes.run(
            "benchmarks.gpu.worker", [framework, "--device", device, "--describe"], DESCRIPTION, variables=VARIABLES
        )
        found[framework] = done.records[0] if done.records else {"absent": done.reason}
    return found


def run_framework(framework: str, seconds: float, options: argparse.Namespace, bar: Any) -> list[dict[str, Any]]:
    """The records of a framework on all of its cases. If a process dies, its case has failed; a new one continues."""
    cases = plan(framework, quick=options.quick, dtypes=options.dtypes)
    end = time.monotonic() + seconds
    records: list[dict[str, Any]] = []

    def watch(case: str) -> None:
        bar.set_description_str(f"{NAMES[framework]}: {case}")
        bar.update()

    while len(records) < len(cases) and (left := end - time.monotonic()) > 0.0:
        arguments = [framework, "--device", options.device, "--first", str(len(records))]
        arguments += ["--dtypes", *options.dtypes]
        arguments += ["--quick"] if options.quick else []
        done = processes.run("benchmarks.gpu.worker", arguments, left, watch, VARIABLES)
        records += done.records
        if len(records) < len(cases):
            lost = {"status": "failed", "reasons": {"all": done.reason or "its process ended without a record"}}
            records.append({**describe(cases[len(records)], framework), **lost})
            tqdm.write(f"{NAMES[framework]}: {done.reason}", file=sys.stderr)
    over = {"status": "skipped", "reasons": {"all": OVER}}
    return records + [{**describe(case, framework), **over} for case in cases[len(records) :]]


def driver() -> str | None:
    """The version of the device driver, or None without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [""])[0].strip() or None if done.returncode == 0 else None


def environment(found: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The environment of the measurement."""
    named: dict[str, Any] = {}
    for description in reversed(found):  # the first framework describes the device best, so its values win
        named |= {name: value for name, value in description.items() if name != "versions"}
    here = versions(["numpy"])
    if options.commit and "(" not in here["softk"]:
        here["softk"] += f" ({options.commit})"
    for description in found:
        here |= description["versions"]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **named,
        "driver": driver() if options.device == "cuda" else None,
        "processor": processor(),
        "system": platform.platform(terse=True),
        "versions": here,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=report.COMMAND, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to test that it runs; never on the page")
    parser.add_argument("--minutes", type=float, default=7.0, help="time limit of the measurement (default: 7)")
    parser.add_argument(
        "--frameworks",
        nargs="+",
        choices=tuple(NAMES),
        default=list(NAMES),
        help="those to measure (default: all); the page keeps the stored results of the others",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=list(DTYPES),
        help="those to measure (default: all); the page keeps the stored results of the others",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for --quick")
    parser.add_argument("--output", type=Path, help="folder for a copy of the page and its JSON file")
    parser.add_argument("--commit", help="commit of the measured code, if git is not available")
    parser.add_argument(
        "--redraw",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="JSON",
        help="measure nothing; make the page from a stored file (default: benchmarks/results_gpu.json)",
    )
    options = parser.parse_args(argv)
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu is for --quick")
    if options.quick and options.output is None:
        options.output = Path(tempfile.mkdtemp(prefix="softk-benchmarks-gpu-"))
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the workers one after the other, then write the results."""
    options = parse(argv)
    if options.redraw:
        stored = options.redraw.exists() or options.redraw != RESULTS
        publish(json.loads(options.redraw.read_text()) if stored else None, options.output)
        return 0
    start = time.monotonic()
    found = devices(options.frameworks, options.device)
    present = {framework: value for framework, value in found.items() if "absent" not in value}
    absent = {framework: value["absent"] for framework, value in found.items() if "absent" in value}
    if not present:
        reasons = "; ".join(f"{NAMES[framework]}: {reason}" for framework, reason in absent.items())
        print(f"no CUDA device to measure: {reasons}", file=sys.stderr)
        return 1
    result: dict[str, Any] = {
        "environment": environment(list(present.values()), options),
        "quick": options.quick,
        "absent": absent,
        "records": [],
    }
    end = start + 60.0 * options.minutes
    runs = list(present)
    count = sum(len(plan(run, quick=options.quick, dtypes=options.dtypes)) for run in runs)
    with tqdm(total=count, unit="case", dynamic_ncols=True) as bar:
        for i, framework in enumerate(runs):
            seconds = end - time.monotonic() - sum(RESERVES[later] for later in runs[i + 1 :])
            result["records"] += run_framework(framework, seconds, options, bar)
            result["environment"]["minutes"] = (time.monotonic() - start) / 60.0
            if options.output:  # an interrupted run keeps its results so far
                copy(result, options.output)
    if not options.quick and RESULTS.exists():
        result = with_others(result, json.loads(RESULTS.read_text()), options.frameworks, options.dtypes)
    publish(result, options.output)
    return 0 if any(record["status"] == "measured" for record in result["records"]) else 1


def with_others(
    result: dict[str, Any], stored: dict[str, Any] | None, frameworks: list[str], dtypes: list[str]
) -> dict[str, Any]:
    """The results of a run of some frameworks and dtypes, and those that are stored for the others."""
    measured = {report.table_of(NAMES[framework], dtype) for framework in frameworks for dtype in dtypes}
    stored = stored or {"records": []}
    others: dict[str, list[dict[str, Any]]] = {}  # by the table in which they stand
    for record in stored["records"]:
        name = report.table_of(record["framework"], record["dtype"])
        if name not in measured:
            others.setdefault(name, []).append(record)
    if not others:
        return result
    earlier = {name: stored.get("earlier", {}).get(name, stored["environment"]) for name in others}
    return {**result, "records": [*result["records"], *chain(*others.values())], "earlier": earlier}


def copy(result: dict[str, Any] | None, folder: Path) -> None:
    """Write the page, its picture and its JSON file to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAGE.name).write_text(filled(PAGE.read_text(), result))
    if result is not None:
        plots.draw(result["records"], folder / PICTURE.name)
        write_json(folder / RESULTS.name, result)


def filled(text: str, result: dict[str, Any] | None) -> str:
    """The page with the results, all tables folded."""
    return between(text, report.page(result), unfolded=0)


def publish(result: dict[str, Any] | None, output: Path | None) -> None:
    """Print the tables and write them with picture and JSON file. A quick run writes only to the output folder."""
    print(report.page(result))
    if output is not None:
        copy(result, output)
        print(f"written: {output}")
    if result is None or not result["quick"]:
        PAGE.write_text(filled(PAGE.read_text(), result))
        print(f"written: {PAGE}")
    if result is not None and not result["quick"]:
        plots.draw(result["records"], PICTURE)
        write_json(RESULTS, result)
        print(f"written: {PICTURE}, {RESULTS}")


if __name__ == "__main__":
    raise SystemExit(main())
