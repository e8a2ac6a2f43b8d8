"""Run all benchmarks, print the tables, and update docs/benchmarks.md: `make bench`, or `python -m benchmarks`."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import memory, plots, processes, report
from .candidates import PEERS, availability, total_memory
from .machine import ROOT, processor, versions
from .worker import FRAMEWORKS, cases_of, environment

RESERVES = {"numpy": 15.0, "torch": 40.0, "jax": 60.0, "compiled": 90.0}
"""Seconds reserved for each process; earlier processes must not use them."""
LARGEST_SHARE = 0.35
"""The largest share of the time of the whole run that one process may use."""
VERSIONS = ("numpy", "scipy", "torch", "jax", "jaxlib")


def run_worker(framework: str, threads: str, seconds: float, options: argparse.Namespace, bar: Any) -> list[Any]:
    """The records of one framework with one number of threads, measured in its own process."""

    def watch(case: str) -> None:
        bar.set_description_str(f"{framework}, {threads}: {case}")
        bar.update()

    arguments = [framework, "--threads", threads, "--device", options.device, *(["--quick"] if options.quick else [])]
    records, code, reason = processes.run(
        "benchmarks.worker", arguments, seconds, watch, environment(framework, threads)
    )
    if code:
        lost = {"group": "shapes", "rows": 0, "n": 0, "k": 0, "epsilon": 0.1, "dtype": "all", "threads": threads}
        lost |= {"candidate": "all", "framework": framework, "status": "failed", "kind": "other"}
        records.append({**lost, "reason": reason})
        tqdm.write(f"{framework}, {threads} threads: {reason}", file=sys.stderr)
    return records


def split_peers(records: list[Any]) -> dict[str, Any]:
    """Split the records of the workers into peers and measurements. Peers without a record get their metadata."""
    found = {record["peer"]: record["status"] for record in records if record["group"] == "peers"}
    peers = {
        peer.distribution: {
            "status": found.get(peer.distribution) or availability(peer, load=False),
            "computes": peer.computes,
        }
        for peer in PEERS
    }
    return {"peers": peers, "records": [record for record in records if record["group"] != "peers"]}


def busy_seconds() -> float:
    """The processor time used by all processes together, or NaN if the system does not provide it."""
    try:
        user, nice, system = (int(field) for field in Path("/proc/stat").read_text().split()[1:4])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return math.nan


def own_seconds() -> float:
    """The processor time of this process and of its finished children."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def machine(device: str) -> dict[str, Any]:
    """The environment of the measurement."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": total_memory() / 2**30,
        "system": platform.platform(terse=True),
        "device": device,
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
        "versions": versions(VERSIONS),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes without torch.compile, to test that it runs")
    parser.add_argument("--minutes", type=float, default=35.0, help="time limit of the measurement (default: 35)")
    parser.add_argument(
        "--frameworks",
        nargs="+",
        choices=FRAMEWORKS,
        default=list(FRAMEWORKS),
        help="those to measure (default: all); the page keeps the stored results of the others",
    )
    parser.add_argument("--threads", nargs="+", choices=("all", "one"), default=["all", "one"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for PyTorch and JAX (default: cpu)")
    parser.add_argument("--output", type=Path, help="folder for the results, instead of the documentation")
    parser.add_argument("--redraw", action="store_true", help="measure nothing; page and figures from results.json")
    options = parser.parse_args(argv)
    if options.device == "cuda":
        options.threads = ["all"]
        options.frameworks = [name for name in options.frameworks if name != "numpy"]
        options.output = options.output or ROOT / "benchmarks" / "cuda"  # the page in the documentation is for the CPU
    if options.quick:
        options.threads = ["all"]
    if options.quick and options.output is None:
        options.output = Path(tempfile.mkdtemp(prefix="softk-benchmarks-"))
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the workers one after the other, then write the results."""
    options = parse(argv)
    if options.redraw:
        publish(json.loads(((options.output or ROOT / "benchmarks") / "results.json").read_text()), options)
        return 0
    start, busy, own = time.monotonic(), busy_seconds(), own_seconds()
    result: dict[str, Any] = {"environment": machine(options.device), "quick": options.quick, "records": []}
    runs = [(framework, threads) for threads in options.threads for framework in options.frameworks]
    runs.sort(key=lambda run: run[0] == "compiled")
    planned = sum(len(cases_of(framework, threads, quick=options.quick)) for framework, threads in runs)
    end = start + 60.0 * options.minutes
    with tqdm(total=planned, unit="case", dynamic_ncols=True) as bar:
        for i, (framework, threads) in enumerate(runs):
            seconds = end - time.monotonic() - sum(RESERVES[later] for later, _ in runs[i + 1 :])
            seconds = min(seconds, LARGEST_SHARE * 60.0 * options.minutes)
            result["records"] += run_worker(framework, threads, seconds, options, bar)
    result |= split_peers(result["records"])
    result["import_seconds"] = memory.import_seconds(1 if options.quick else 5)
    result["environment"]["minutes"] = (time.monotonic() - start) / 60.0
    others = busy_seconds() - busy - (own_seconds() - own)
    share = others / ((time.monotonic() - start) * result["environment"]["cores"])
    result["environment"]["others"] = None if math.isnan(share) else max(0.0, share)
    stored = (options.output or ROOT / "benchmarks") / "results.json"
    if stored.exists():
        result = merged(result, json.loads(stored.read_text()), options.frameworks)
    publish(result, options)
    ours = report.of(result["records"], candidate="softk.topk")
    return 1 if not ours or report.of(ours, status="failed") else 0


def merged(result: dict[str, Any], stored: dict[str, Any], frameworks: list[str]) -> dict[str, Any]:
    """The results of a run of some frameworks, and those that are stored for the others."""
    others = {name: title for name, title in report.TITLES.items() if name not in frameworks}
    kept = [record for record in stored["records"] if record["framework"] in (*others, *others.values())]
    earlier = {title: stored.get("earlier", {}).get(title, stored["environment"]) for title in others.values()}
    return {**result, "records": [*kept, *result["records"]], "earlier": earlier}


def publish(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the tables, and write them with the JSON file and the figures."""
    static = options.output or ROOT / "docs" / "_static"
    results = (options.output or ROOT / "benchmarks") / "results.json"
    report.write_json(results, result)
    plots.draw_lengths(result["records"], static / "benchmark_n.png")
    plots.draw_epsilons(result["records"], static / "benchmark_epsilon.png")
    print(report.page(result))
    if options.output is None:
        report.write_page(ROOT / "docs" / "benchmarks.md", result)
        print("written: docs/benchmarks.md, docs/_static/benchmark_*.png, benchmarks/results.json")
    else:
        print(f"written: {options.output}")


if __name__ == "__main__":
    raise SystemExit(main())
