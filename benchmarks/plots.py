"""The two figures of docs/benchmarks.md: time against n, and time and error against epsilon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from .candidates import SINKHORN

Record = dict[str, Any]
COLORS = {"NumPy": "#2171b5", "PyTorch": "#d94801", "JAX jit": "#238b45"}
NAMES = {"NumPy": "NumPy", "PyTorch": "PyTorch", "JAX jit": "JAX"}
GREY = "#636363"
STYLES = {"softk.topk": ("-", 2.2, "o"), "softmax": ("--", 1.2, ""), SINKHORN: (":", 1.6, "")}


SHOWN = "NumPy"
"""The framework whose Sinkhorn iterations are drawn. The tables have those of the others."""


def series(records: list[Record], group: str, axis: str) -> dict[tuple[str, str], list[tuple[float, Record]]]:
    """The measured records of each (framework, candidate), sorted along an axis."""
    found: dict[tuple[str, str], list[tuple[float, Record]]] = {}
    for record in records:
        usable = record["group"] == group and record["status"] == "measured" and record["dtype"] == "float32"
        if usable and record["both"] is not None:
            name = record["candidate"].removesuffix(" (SciPy)")
            found.setdefault((record["framework"], name), []).append((record[axis], record))
    return {key: sorted(values, key=lambda pair: pair[0]) for key, values in found.items()}


def label_ends(axes: plt.Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Label the right ends of the lines, given as (x, y, text, color), without overlap."""
    axes.figure.canvas.draw()
    height = axes.get_window_extent().height
    gap = 13.5 / height * axes.figure.dpi / 100  # of the axes' height
    low, high = np.log10(axes.get_ylim())
    places = [(np.log10(y) - low) / (high - low) for _, y, _, _ in ends]
    order = np.argsort(places)
    moved = np.asarray(places)[order]
    for _ in range(200):
        distance = np.diff(moved)
        tight = np.flatnonzero(distance < gap)
        if not tight.size:
            break
        for i in tight:
            push = (gap - (moved[i + 1] - moved[i])) / 2
            moved[i], moved[i + 1] = moved[i] - push, moved[i + 1] + push
    for place, index in zip(moved, order, strict=True):
        _, _, text, color = ends[index]
        axes.annotate(
            text, (1.015, place), xycoords="axes fraction", color=color, fontsize=8.5, va="center", clip_on=False
        )


def times(axes: plt.Axes, found: dict[tuple[str, str], list[tuple[float, Record]]]) -> list[Any]:
    """Draw medians with quartile bands. Returns (x, y, text, color) of each line, for its label."""
    ends = []
    for (framework, name), points in found.items():
        if framework not in COLORS or name not in STYLES or len(points) < 2:
            continue
        if name == SINKHORN and framework != SHOWN:
            continue
        style, width, marker = STYLES[name]
        where = [place for place, _ in points]
        middle = [1e3 * record["both"]["median"] for _, record in points]
        color = GREY if name == SINKHORN else COLORS[framework]
        axes.plot(where, middle, ls=style, lw=width, marker=marker, ms=4, color=color)
        if name == "softk.topk":
            low, high = ([1e3 * record["both"][q] for _, record in points] for q in ("q1", "q3"))
            axes.fill_between(where, low, high, color=color, alpha=0.18, lw=0)
        text = {"softk.topk": "softk", "softmax": "softmax", SINKHORN: SINKHORN}[name]
        ends.append((where, middle, f"{text}, {NAMES[framework]}", color))
    return ends


def finish(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def dress(axes: plt.Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="major")
    axes.minorticks_off()


def draw_lengths(records: list[Record], path: Path) -> None:
    """Draw the time of forward + backward of one slice against n."""
    figure, axes = plt.subplots(figsize=(8.2, 4.6), layout="constrained")
    axes.set(xscale="log", yscale="log")
    ends = times(axes, series(records, "lengths", "n"))
    axes.set(xlabel="n, scores in the slice", ylabel="forward + backward, milliseconds")
    axes.set_title("One slice, k = n / 100, ε = 0.1, float32", loc="left", fontsize=11)
    dress(axes)
    # A line that ends early is labeled at its end.
    last = max((where[-1] for where, _, _, _ in ends), default=1)
    for where, middle, text, color in ends:
        if where[-1] < last:
            place = {"xytext": (0, 7), "textcoords": "offset points", "va": "bottom", "ha": "right"}
            axes.annotate(text, (where[-1], middle[-1]), **place, color=color, fontsize=8.5)
    label_ends(axes, [(w[-1], m[-1], text, color) for w, m, text, color in ends if w[-1] == last])
    finish(figure, path)


def draw_epsilons(records: list[Record], path: Path) -> None:
    """Draw the time and the mask error of all solvers of the same problem against epsilon."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.3), layout="constrained")
    found = series(records, "epsilon", "epsilon")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="ε, in standard deviations of the scores")
    ends = times(left, found)
    left.set(ylabel="forward + backward, milliseconds")
    left.set_title("Time: (128, 1000), k = 10, float32", loc="left", fontsize=11)
    wrong = []
    peers = {"OTT topk_mask": "OTT topk_mask", "POT solve_batch": "POT solve_batch"}
    for (framework, name), points in found.items():
        where, missed = [], []
        for place, record in points:
            value = (record["errors"] or {}).get("mask") if record["kind"] == "soft" else None
            if value:
                where.append(place)
                missed.append(value)
        ours = name == "softk.topk"
        if len(where) < 2 or not (ours or name in peers or (name == SINKHORN and framework == SHOWN)):
            continue
        color = GREY if name == SINKHORN else COLORS.get(framework, GREY)
        style = "-" if ours else ":" if name in STYLES else "-."
        right.plot(where, missed, ls=style, lw=2.2 if ours else 1.4, marker="o" if ours else "", ms=4, color=color)
        text = f"softk, {NAMES[framework]}" if ours else peers.get(name, SINKHORN)
        wrong.append((where[-1], missed[-1], text, color))
    for (framework, name), points in found.items():
        if name in peers and len(points) > 1:
            where = [place for place, _ in points]
            middle = [1e3 * record["both"]["median"] for _, record in points]
            left.plot(where, middle, ls="-.", lw=1.4, color=COLORS[framework])
            ends.append((where, middle, peers[name], COLORS[framework]))
    right.set(ylabel="largest error of the mask", ylim=(1e-8, 3.0))
    right.set_title("Error: against the float64 truth", loc="left", fontsize=11)
    dress(left)
    dress(right)
    label_ends(left, [(w[-1], m[-1], text, color) for w, m, text, color in ends])
    label_ends(right, wrong)
    finish(figure, path)
