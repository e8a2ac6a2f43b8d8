"""Nearest neighbors learned through softk, beside the alternatives: `make knn`, or `python docs/experiments/knn.py`.

Measures everything, and writes the numbers to docs/experiments/knn.json, the tables to docs/knn.md and the pictures to
docs/_static/. Until the end the numbers stand in docs/experiments/knn.part.json, from which an interrupted run goes on.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import knn_linear as linear
import knn_network as network
import numpy as np
import report
import torch
from report import Record, mean_and_error
from threadpoolctl import threadpool_limits  # comes with scikit-learn
from tqdm import tqdm

SEEDS = range(5)
PACKAGES = ("numpy", "scikit-learn", "torch")
COLORS = {"raw": "#888888", "PCA": "#efb118", "NCA": "#4269d0", "softk": "#ff5a3c"}
READINGS = (
    ("cross-entropy", "argmax", "cross-entropy, its own argmax"),
    ("cross-entropy", "neighbors", "cross-entropy, neighbors of its features"),
    ("softk", "neighbors", "soft neighbors, neighbors of its features"),
)


def groups(records: list[Record]) -> dict[tuple[str, int], dict[str, list[Record]]]:
    """(data, dimensions) -> method -> records, split by split."""
    found: dict[tuple[str, int], dict[str, list[Record]]] = {}
    for record in records:
        of = found.setdefault((record["data"], record["dimensions"]), {})
        of.setdefault(record["method"], []).append(record)
    return found


def linear_table(records: list[Record]) -> str:
    """Accuracy in per cent, the paired difference to NCA, and the seconds of one fit."""
    header = ["data", "dimensions", *linear.METHODS, "softk - NCA", "seconds: NCA", "softk"]
    rows = []
    for (data, dimensions), of in groups(records).items():
        accuracies = [mean_and_error(r["accuracy"] for r in of[method]) for method in linear.METHODS]
        pairs = zip(of["softk"], of["NCA"], strict=True)
        difference = mean_and_error((a["accuracy"] - b["accuracy"] for a, b in pairs), sign="+")
        seconds = [f"{np.mean([r['seconds'] for r in of[method]]):.2f}" for method in ("NCA", "softk")]
        rows.append([data, str(dimensions), *accuracies, difference, *seconds])
    return report.table(header, rows)


def linear_summary(records: list[Record]) -> str:
    """Where the difference to NCA is more than its error, and how many times as long a fit takes."""
    means: list[float] = []
    above: list[str] = []
    below: list[str] = []
    ratios: dict[str, list[float]] = {}
    for (data, dimensions), of in groups(records).items():
        pairs = zip(of["softk"], of["NCA"], strict=True)
        differences = 100.0 * np.asarray([a["accuracy"] - b["accuracy"] for a, b in pairs])
        mean = float(differences.mean())
        error = differences.std(ddof=1) / math.sqrt(differences.size) if differences.size > 1 else math.inf
        if abs(mean) > 2.0 * error:
            (above if mean > 0.0 else below).append(f"{data} in {dimensions}")
        means.append(mean)
        seconds = [np.mean([r["seconds"] for r in of[method]]) for method in ("softk", "NCA")]
        ratios.setdefault(data, []).append(float(seconds[0] / seconds[1]))
    counts = [f"{len(rows)} ({', '.join(rows)})" if rows else "none" for rows in (above, below)]
    times = ", ".join(f"{min(of):.0f} to {max(of):.0f} on {data}" for data, of in ratios.items())
    return (
        f"- softk - NCA lies between {min(means):+.1f} and {max(means):+.1f} points. Of {len(means)} rows it is more "
        f"than two standard errors above 0 in {counts[0]}, and below in {counts[1]}.\n"
        f"- A fit takes this many times as long as NCA's: {times}."
    )


def linear_chosen(records: list[Record], grid: list[float]) -> str:
    """How often each temperature and each start was chosen; a tie goes to what was tried first, the lowest."""
    rows = []
    for method in ("NCA", "softk"):
        settings = [r["setting"] for r in records if r["method"] == method]
        temperatures, starts = Counter(s[0] for s in settings), Counter(s[1] for s in settings)
        counts = [temperatures[t] for t in grid] + [starts[start] for start in linear.STARTS]
        rows.append([method, str(len(settings)), *map(str, counts)])
    header = ["chosen by", "of", *(f"temperature {t:g}" for t in grid), *linear.STARTS.values()]
    return report.table(header, rows)


def of_reading(records: list[Record], loss: str, reading: str) -> list[Record]:
    return [r for r in records if r["loss"] == loss and r["reading"] == reading]


def network_table(records: list[Record]) -> str:
    """Accuracy in per cent, the paired differences to the rows above, and the seconds of one training."""
    rows = []
    for i, (loss, reading, name) in enumerate(READINGS):
        found = of_reading(records, loss, reading)
        row = [name, mean_and_error(r["accuracy"] for r in found)]
        for other_loss, other_reading, _ in READINGS[: len(READINGS) - 1]:
            pairs = zip(found, of_reading(records, other_loss, other_reading), strict=True)
            row.append(mean_and_error((a["accuracy"] - b["accuracy"] for a, b in pairs), sign="+"))
        row[2 + i :] = [""] * (len(row) - 2 - i)  # to itself and to what comes after it
        rows.append([*row, f"{np.mean([r['seconds'] for r in found]):.1f}"])
    header = ["trained by, read by", "accuracy", "difference to the first", "to the second", "seconds"]
    return report.table(header, rows)


def network_seeds(records: list[Record]) -> str:
    """Accuracy in per cent of every seed, and the setting that was chosen for it."""
    rows = []
    for several in zip(*(of_reading(records, *names[:2]) for names in READINGS), strict=True):
        row = [str(several[0]["seed"])]
        for r in several:
            rate, other = r["setting"]
            name = "decay" if r["loss"] == "cross-entropy" else "epsilon"
            way = "" if r["way"] == "argmax" else f", {r['way'].replace('=', ' = ')}"
            row.append(f"{100.0 * r['accuracy']:.1f} (rate {rate:g}, {name} {other:g}{way})")
        rows.append(row)
    return report.table(["seed", *(name for *_, name in READINGS)], rows, len(READINGS) + 1)


def parts(result: Record) -> dict[str, str]:
    """Everything that the page shows, by the names of its markers."""
    return {
        "environment": report.described(result["environment"], result["seconds"], "Everything"),
        "linear": linear_table(result["linear"]),
        "summary": linear_summary(result["linear"]),
        "chosen": linear_chosen(result["linear"], result["settings"]["temperatures"]),
        "network": network_table(result["network"]),
        "seeds": network_seeds(result["network"]),
    }


def draw_linear(path: Path, records: list[Record]) -> None:
    """Accuracy against dimensions, a panel for each data set, with standard errors."""
    from matplotlib.figure import Figure

    found = groups(records)
    data = list(dict.fromkeys(name for name, _ in found))
    figure = Figure(figsize=(2.0 + 2.7 * len(data), 4.4), layout="constrained")
    panels = figure.subplots(1, len(data), squeeze=False, sharey=True)[0]
    for panel, name in zip(panels, data, strict=True):
        dimensions = [d for other, d in found if other == name]
        for i, method in enumerate(linear.METHODS):
            values = [100.0 * np.asarray([r["accuracy"] for r in found[name, d][method]]) for d in dimensions]
            errors = [v.std(ddof=1) / math.sqrt(v.size) if v.size > 1 else 0.0 for v in values]
            places = np.arange(len(dimensions)) + 0.1 * (i - 1.5)
            line = "--" if method == "raw" else "-"
            style = {"color": COLORS[method], "marker": "o", "ms": 4.5, "lw": 1.5, "ls": line, "capsize": 2}
            panel.errorbar(places, [v.mean() for v in values], errors, label=method, **style)
        panel.set_xticks(range(len(dimensions)), [str(d) for d in dimensions])
        panel.set(title=name, xlabel="dimensions")
        panel.margins(x=0.12)
        panel.grid(axis="y", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def draw_network(path: Path, records: list[Record]) -> None:
    """Every seed is a line through the three ways, so that the eye compares within it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    panel = figure.subplots()
    columns = [[100.0 * r["accuracy"] for r in of_reading(records, loss, reading)] for loss, reading, _ in READINGS]
    for values in zip(*columns, strict=True):
        panel.plot(values, range(3), color="#bbbbbb", lw=1, marker="o", ms=5, zorder=1)
    for place, (values, color) in enumerate(zip(columns, ("#4269d0", "#4269d0", "#ff5a3c"), strict=True)):
        panel.plot(np.mean(values), place, color=color, marker="D", ms=9, zorder=2)
    panel.set_yticks(range(3), [name.replace(", ", ",\n") for *_, name in READINGS])
    panel.invert_yaxis()
    panel.margins(y=0.2)
    panel.set(xlabel="test accuracy, % (a grey line is one seed, a diamond the mean)")
    panel.grid(axis="x", alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def settings(quick: bool) -> Record:
    """What the numbers follow from; those of other settings are not gone on from."""
    return {
        "quick": quick,
        "splits": {name: data.splits for name, data in linear.DATA.items()},
        "dimensions": list(linear.DIMENSIONS),
        "neighbors": list(linear.NEIGHBORS),
        "temperatures": list(linear.TEMPERATURES),
        "epochs": network.EPOCHS,
        "rates": list(network.RATES),
        "decays": list(network.DECAYS),
        "epsilons": list(network.EPSILONS),
    }


def measure(quick: bool, part: Path) -> Record:
    """Everything, with progress bars. What is done is stored as soon as it is, and not done again by the next run."""
    result: Record = {"settings": settings(quick), "environment": report.environment(*PACKAGES), "seconds": 0.0}
    result |= {"linear": [], "network": []}
    if part.exists():
        found = json.loads(part.read_text())
        same = found["settings"] == result["settings"]
        if same and found["environment"]["versions"] == result["environment"]["versions"]:
            result = found
    began = time.perf_counter()

    def add(kind: str, found: list[Record]) -> None:
        nonlocal began
        now = time.perf_counter()
        result[kind] += found
        result["seconds"] += now - began
        began = now
        report.save(part, result)

    done = {(r["data"], r["dimensions"], r["split"]) for r in result["linear"]}
    cells = [cell for cell in linear.cells(quick) if cell not in done]
    with tqdm(cells, desc="linear maps", unit="split", dynamic_ncols=True) as bar:
        for cell in bar:
            bar.set_postfix_str(f"{cell[0]}, {cell[1]} dimensions")
            add("linear", linear.measure(cell, quick=quick))
    seeds = set(SEEDS[:1] if quick else SEEDS) - {r["seed"] for r in result["network"]}
    for seed in tqdm(sorted(seeds), desc="network", unit="seed", dynamic_ncols=True):
        add("network", network.measure(seed, quick=quick))
    return result


def main(argv: list[str] | None = None) -> int:
    """Measure, or go on measuring, then write and draw."""
    quick, docs = report.command(argv, __doc__, "one split of the smallest data and one epoch of one seed")
    torch.set_num_threads(1)  # the arrays are small: a second thread costs more than it brings
    with threadpool_limits(1):
        result = measure(quick, report.unfinished(docs, "knn"))

    def draw(folder: Path) -> None:
        draw_linear(folder / "knn_linear.png", result["linear"])
        draw_network(folder / "knn_network.png", result["network"])

    report.publish(docs, "knn", "knn.md", parts(result), draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
