"""The figure of docs/benchmarks-gpu.md: softk over softmax and over PyTorch's hard top-k, against the size of a row."""

from __future__ import annotations

from pathlib import Path

from benchmarks.plots import Record, dress, finish, plt
from benchmarks.report import of

from .report import hard, table_of

EPSILON = 0.1
STYLES = {  # of the tables
    "PyTorch, float32": ("#d94801", "-", "s"),
    "PyTorch, bfloat16": ("#fd8d3c", "--", "D"),
    "JAX jit, float32": ("#238b45", "-", "^"),
    "CuPy, float32": ("#6a51a3", "-", "o"),
}


def draw(records: list[Record], path: Path) -> None:
    """Draw both ratios, for epsilon 0.1 and the small k."""
    found = [record for record in of(records, status="measured", epsilon=EPSILON) if record["k"] != record["n"] // 2]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
    left.set_title("Forward + backward, over softmax of the same library", loc="left", fontsize=11)
    right.set_title("Forward, over PyTorch's hard top-k", loc="left", fontsize=11)
    for name, (color, style, marker) in STYLES.items():
        own = [record for record in found if table_of(record["framework"], record["dtype"]) == name]
        ratios = [(record["n"], record["over_softmax"], hard(record, records)) for record in own]
        for axes, place in ((left, 1), (right, 2)):
            points = sorted((one[0], one[place]) for one in ratios if one[place] is not None)
            axes.plot(
                [n for n, _ in points],
                [ratio for _, ratio in points],
                color=color,
                ls=style,
                marker=marker,
                ms=5,
                lw=2,
                label=name,
            )
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="n, scores in a row", ylabel="ratio of times")
        axes.axhline(1.0, color="black", lw=0.8)
        dress(axes)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES), frameon=False)
    finish(figure, path)
