"""The two figures of docs/benchmarks.md: time against n, and time and error against epsilon."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from .candidates import SINKHORN

Record = dict[str, Any]
OURS = "softk.topk"
COLORS = {"NumPy": "#2171b5", "PyTorch": "#d94801", "JAX jit": "#238b45"}
NAMES = {"NumPy": "NumPy", "PyTorch": "PyTorch", "JAX jit": "JAX"}
GREY = "#636363"
STYLES = {OURS: "-", "softmax": "--", SINKHORN: ":", "OTT topk_mask": "-.", "POT solve_batch": "-."}
WIDTHS = {"NumPy": 4.2, "PyTorch": 2.5, "JAX jit": 1.2}
"""Of the lines of softk. A narrow line is drawn over a wide one, so both are seen where they coincide."""
MARKERS = {"NumPy": "o", "PyTorch": "s", "JAX jit": "^"}
SHOWN = "NumPy"
"""The framework whose Sinkhorn iterations are drawn. The tables have those of the others."""


class End(NamedTuple):
    """The right end of a line, and its label."""

    x: float
    y: float
    text: str
    color: str


def series(records: list[Record], group: str, axis: str) -> dict[tuple[str, str], list[tuple[float, Record]]]:
    """The measured records of each (framework, candidate) that is drawn, sorted along an axis."""
    found: dict[tuple[str, str], list[tuple[float, Record]]] = {}
    for record in records:
        usable = record["group"] == group and record["status"] == "measured" and record["dtype"] == "float32"
        if usable and record["both"] is not None:
            name = record["candidate"].removesuffix(" (SciPy)")
            found.setdefault((record["framework"], name), []).append((record[axis], record))
    return {
        (framework, name): sorted(points, key=lambda pair: pair[0])
        for (framework, name), points in found.items()
        if framework in COLORS and name in STYLES and (name != SINKHORN or framework == SHOWN)
    }


def draw_line(axes: plt.Axes, framework: str, name: str, where: list[float], values: list[float]) -> End:
    """Draw the line of a candidate. Returns its end."""
    color = GREY if name == SINKHORN else COLORS[framework]
    width = WIDTHS[framework] if name == OURS else 1.4
    marked = {"marker": MARKERS[framework], "ms": width + 3.0} if name == OURS else {}
    axes.plot(where, values, ls=STYLES[name], lw=width, color=color, zorder=3.0 - 0.1 * width, **marked)
    who = {OURS: "softk", "softmax": "softmax", SINKHORN: SINKHORN}.get(name)
    return End(where[-1], values[-1], name if who is None else f"{who}, {NAMES[framework]}", color)


def label_ends(axes: plt.Axes, ends: list[End]) -> None:
    """Label the right ends of the lines without overlap. A thin line leads from each end to its label.

    A line that ends early is labeled above its end.
    """
    last = max((end.x for end in ends), default=0.0)
    for end in ends:
        if end.x < last:
            place = {"xytext": (0, 7), "textcoords": "offset points", "va": "bottom", "ha": "right"}
            axes.annotate(end.text, (end.x, end.y), **place, color=end.color, fontsize=8.5)
    ends = [end for end in ends if end.x == last]
    if not ends:
        return
    axes.figure.canvas.draw()
    height = axes.get_window_extent().height
    gap = 13.5 / height * axes.figure.dpi / 100  # of the axes' height
    low, high = np.log10(axes.get_ylim())
    places = np.asarray([(np.log10(end.y) - low) / (high - low) for end in ends])
    order = np.argsort(places)
    moved = places[order]
    for _ in range(200):
        tight = np.flatnonzero(np.diff(moved) < gap)
        if not tight.size:
            break
        for i in tight:
            push = (gap - (moved[i + 1] - moved[i])) / 2
            moved[i], moved[i + 1] = moved[i] - push, moved[i + 1] + push
    for place, index in zip(moved, order, strict=True):
        end = ends[index]
        axes.annotate(
            end.text,
            (end.x, end.y),
            (1.05, place),
            textcoords="axes fraction",
            color=end.color,
            fontsize=8.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": end.color, "lw": 0.7, "relpos": (0.0, 0.5), "shrinkB": 5.0},
        )


def times(axes: plt.Axes, found: dict[tuple[str, str], list[tuple[float, Record]]]) -> list[End]:
    """Draw medians with quartile bands. Returns the ends of the lines."""
    ends = []
    for (framework, name), points in found.items():
        if len(points) < 2:
            continue
        where = [place for place, _ in points]
        low, middle, high = ([1e3 * record["both"][q] for _, record in points] for q in ("q1", "median", "q3"))
        ends.append(draw_line(axes, framework, name, where, middle))
        if name == OURS:
            axes.fill_between(where, low, high, color=COLORS[framework], alpha=0.18, lw=0)
    return ends


def errors(axes: plt.Axes, found: dict[tuple[str, str], list[tuple[float, Record]]]) -> list[End]:
    """Draw the errors of the mask of the candidates that solve the same problem. Returns the ends of the lines."""
    ends = []
    for (framework, name), points in found.items():
        soft = [(place, (record["errors"] or {}).get("mask")) for place, record in points if record["kind"] == "soft"]
        drawn = [(place, value) for place, value in soft if value]
        if len(drawn) > 1:
            where, values = (list(column) for column in zip(*drawn, strict=True))
            ends.append(draw_line(axes, framework, name, where, values))
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
    label_ends(axes, ends)
    finish(figure, path)


def draw_epsilons(records: list[Record], path: Path) -> None:
    """Draw the time and the mask error of all solvers of the same problem against epsilon."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    found = series(records, "epsilon", "epsilon")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="ε, in standard deviations of the scores")
        dress(axes)
    timed, wrong = times(left, found), errors(right, found)
    left.set(ylabel="forward + backward, milliseconds")
    left.set_title("Time: (128, 1000), k = 10, float32", loc="left", fontsize=11)
    right.set(ylabel="largest error of the mask", ylim=(1e-8, 3.0))
    right.set_title("Error: against the float64 truth", loc="left", fontsize=11)
    label_ends(left, timed)
    label_ends(right, wrong)
    finish(figure, path)
