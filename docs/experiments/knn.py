"""Nearest neighbours learned through softk, beside the alternatives: `make knn`, or `python docs/experiments/knn.py`.

Measures everything, and writes the numbers to docs/experiments/knn.json, the tables to docs/knn.md and the pictures to
docs/_static/. What docs/experiments/knn.json has already is not measured again; `--again` begins anew.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import knn_linear as linear
import knn_network as network
import numpy as np
import torch
from threadpoolctl import threadpool_limits  # comes with scikit-learn
from tqdm import tqdm

HERE = Path(__file__).parent
SEEDS = range(5)
COLOURS = {"raw": "#888888", "PCA": "#efb118", "NCA": "#4269d0", "softk": "#ff5a3c"}
READINGS = (
    ("cross-entropy", "argmax", "cross-entropy, its own argmax"),
    ("cross-entropy", "neighbours", "cross-entropy, neighbours of its features"),
    ("softk", "neighbours", "soft neighbours, neighbours of its features"),
)

Record = dict[str, Any]


def mean_and_error(values: Iterable[float], sign: str = "") -> str:
    """In per cent; the error is that of the mean, and needs two values."""
    found = 100.0 * np.asarray(list(values))
    mean = f"{round(found.mean(), 1) + 0.0:{sign}.1f}"  # no minus before a zero
    return mean if found.size < 2 else f"{mean} ± {found.std(ddof=1) / math.sqrt(found.size):.1f}"


def rows_of(header: list[str], rows: list[list[str]], text: int) -> str:
    """A table in Markdown, the first `text` columns of it words."""
    rules = ["---"] * text + ["--:"] * (len(header) - text)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rules, *rows))


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
        difference = mean_and_error((a["accuracy"] - b["accuracy"] for a, b in pairs), "+")
        seconds = [f"{np.mean([r['seconds'] for r in of[method]]):.2f}" for method in ("NCA", "softk")]
        rows.append([data, str(dimensions), *accuracies, difference, *seconds])
    return rows_of(header, rows, 1)


def network_table(records: list[Record]) -> str:
    """Accuracy in per cent, the paired difference to cross-entropy's own argmax, and the seconds of one training."""

    def of(loss: str, reading: str) -> list[Record]:
        return [r for r in records if r["loss"] == loss and r["reading"] == reading]

    reference = of("cross-entropy", "argmax")
    rows = []
    for loss, reading, name in READINGS:
        found = of(loss, reading)
        difference = mean_and_error((a["accuracy"] - b["accuracy"] for a, b in zip(found, reference, strict=True)), "+")
        seconds = f"{np.mean([r['seconds'] for r in found]):.1f}"
        beside = "" if (loss, reading) == READINGS[0][:2] else difference
        rows.append([name, mean_and_error(r["accuracy"] for r in found), beside, seconds])
    return rows_of(["trained by, read by", "accuracy", "difference to the first", "seconds"], rows, 1)


def write(page: Path, tables: dict[str, str]) -> None:
    """Put each table between the markers of its name."""
    text = page.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    page.write_text(text)


def draw_linear(path: Path, records: list[Record]) -> None:
    """Accuracy against dimensions, a panel for each data set, with standard errors."""
    from matplotlib.figure import Figure

    found = groups(records)
    data = list(dict.fromkeys(name for name, _ in found))
    figure = Figure(figsize=(2.0 + 2.7 * len(data), 3.4), layout="constrained")
    panels = figure.subplots(1, len(data), squeeze=False)[0]
    for panel, name in zip(panels, data, strict=True):
        dimensions = [d for other, d in found if other == name]
        for i, method in enumerate(linear.METHODS):
            values = [100.0 * np.asarray([r["accuracy"] for r in found[name, d][method]]) for d in dimensions]
            errors = [v.std(ddof=1) / math.sqrt(v.size) if v.size > 1 else 0.0 for v in values]
            places = np.arange(len(dimensions)) + 0.1 * (i - 1.5)
            line = "--" if method == "raw" else "-"
            style = {"color": COLOURS[method], "marker": "o", "ms": 4.5, "lw": 1.5, "ls": line, "capsize": 2}
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
    columns = [
        [100.0 * r["accuracy"] for r in records if r["loss"] == loss and r["reading"] == reading]
        for loss, reading, _ in READINGS
    ]
    for values in zip(*columns, strict=True):
        panel.plot(values, range(3), color="#bbbbbb", lw=1, marker="o", ms=5, zorder=1)
    for place, (values, colour) in enumerate(zip(columns, ("#4269d0", "#4269d0", "#ff5a3c"), strict=True)):
        panel.plot(np.mean(values), place, color=colour, marker="D", ms=9, zorder=2)
    panel.set_yticks(range(3), [name.replace(", ", ",\n") for *_, name in READINGS])
    panel.invert_yaxis()
    panel.margins(y=0.2)
    panel.set(xlabel="test accuracy, % (a grey line is one seed, a diamond the mean)")
    panel.grid(axis="x", alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def measure(quick: bool, store: Path) -> dict[str, list[Record]]:
    """Everything, with progress bars. What is done is stored as soon as it is, and not done again by the next run."""
    records: dict[str, list[Record]] = {"linear": [], "network": []}
    if store.exists():
        records = json.loads(store.read_text())
    store.parent.mkdir(parents=True, exist_ok=True)

    def add(part: str, found: list[Record]) -> None:
        records[part] += found
        store.write_text(json.dumps(records, indent=1) + "\n")

    done = {(r["data"], r["dimensions"], r["split"]) for r in records["linear"]}
    cells = [cell for cell in linear.cells(quick) if cell not in done]
    with tqdm(cells, desc="linear maps", unit="split", dynamic_ncols=True) as bar:
        for cell in bar:
            bar.set_postfix_str(f"{cell[0]}, {cell[1]} dimensions")
            add("linear", linear.measure(cell, quick=quick))
    seeds = set(SEEDS[:1] if quick else SEEDS) - {r["seed"] for r in records["network"]}
    for seed in tqdm(sorted(seeds), desc="network", unit="seed", dynamic_ncols=True):
        add("network", network.measure(seed, quick=quick))
    return records


def main(argv: list[str] | None = None) -> int:
    """Measure or read, then write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one split of the smallest data and one epoch of one seed")
    parser.add_argument("--again", action="store_true", help="forget the numbers of the last run")
    parser.add_argument("--docs", type=Path, default=HERE.parent, help="where to write (default: docs)")
    options = parser.parse_args(argv)
    store = options.docs / "experiments" / "knn.json"
    if options.again:
        store.unlink(missing_ok=True)
    torch.set_num_threads(1)  # the arrays are small: a second thread costs more than it brings
    with threadpool_limits(1):
        records = measure(options.quick, store)
    tables = {"linear": linear_table(records["linear"]), "network": network_table(records["network"])}
    write(options.docs / "knn.md", tables)
    pictures = options.docs / "_static"
    pictures.mkdir(exist_ok=True)
    draw_linear(pictures / "knn_linear.png", records["linear"])
    draw_network(pictures / "knn_network.png", records["network"])
    print("\n\n".join(tables.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
