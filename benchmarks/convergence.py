"""Newton's method and Sinkhorn's algorithm on the sorted top-k: iterations, time and marginal error for each epsilon.

``python -m benchmarks.convergence`` prints the table, writes it into ``docs/transport.md`` and draws the picture there.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np

import softk

DOCS = Path(__file__).parent.parent / "docs"
MARKS = ("<!-- convergence -->\n", "<!-- /convergence -->")
EPSILONS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
METHODS = (("newton", None), ("sinkhorn", 200), ("sinkhorn", 1000))
COLORS = ("#d94801", "#6baed6", "#08306b")
SEEDS = 5


def solve(x: np.ndarray, k: int, epsilon: float, method: str, limit: int | None) -> tuple[softk.Plan, float]:
    """The plan of the sorted top-k, with the anchors k, ..., 1, 0, and the time in seconds."""
    anchors = np.arange(k, -1.0, -1.0)
    marginals = np.ones(k + 1)
    marginals[-1] = x.shape[-1] - k
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", softk.ConvergenceWarning)
        start = time.perf_counter()
        found = softk.transport(x, anchors, marginals, epsilon=epsilon, method=method, max_iterations=limit)
        return found, time.perf_counter() - start


def measure(n: int, k: int) -> list[list[tuple[float, float, float]]]:
    """Median iterations and milliseconds, and the largest marginal error, over the seeds, by method and epsilon."""
    scores = [np.random.default_rng(seed).uniform(size=n) for seed in range(SEEDS)]
    table = []
    for method, limit in METHODS:
        rows = []
        for epsilon in EPSILONS:
            runs = [solve(x, k, epsilon, method, limit) for x in scores]
            rows.append(
                (
                    float(np.median([plan.iterations for plan, _ in runs])),
                    1e3 * float(np.median([seconds for _, seconds in runs])),
                    float(np.max([plan.marginal_error for plan, _ in runs])),
                )
            )
        table.append(rows)
    return table


def name(method: str, limit: int | None) -> str:
    return "Newton" if method == "newton" else f"Sinkhorn, at most {limit} iterations"


def tabulate(table: list[list[tuple[float, float, float]]], n: int, k: int) -> str:
    lines = [
        f"{n} scores, uniform in [0, 1], k = {k}, float64; medians over {SEEDS} seeds, the largest error of all seeds.",
        "",
        "| epsilon | " + " | ".join(f"{name(*m)}: steps | ms | error" for m in METHODS) + " |",
        "|---:|" + "---:|" * (3 * len(METHODS)),
    ]
    for i, epsilon in enumerate(EPSILONS):
        cells = [f"{rows[i][0]:.0f} | {rows[i][1]:.1f} | {rows[i][2]:.1e}" for rows in table]
        lines.append(f"| {epsilon:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(table: list[list[tuple[float, float, float]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.8), layout="constrained")
    for method, rows, color in zip(METHODS, table, COLORS, strict=True):
        line = {"color": color, "marker": "o", "ms": 3.5, "lw": 1.8, "label": name(*method)}
        left.loglog(EPSILONS, [max(row[2], 1e-16) for row in rows], **line)
        right.loglog(EPSILONS, [row[1] for row in rows], **line)
    left.set(ylabel="items", title="largest error of a column sum")
    right.set(ylabel="milliseconds", title="time of the forward pass")
    left.axhline(1.0, color="black", lw=0.8, ls=":")
    left.text(EPSILONS[0], 2.0, "a whole item", ha="right", fontsize=9)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), frameon=False)
    for axes in (left, right):
        axes.set_xlabel("ε, for scores in [0, 1] and anchors a unit apart")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1000, help="number of scores")
    parser.add_argument("--k", type=int, default=10, help="number of selected scores")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page and the figure")
    options = parser.parse_args()
    table = measure(options.n, options.k)
    text = tabulate(table, options.n, options.k)
    print(text)
    page = options.docs / "transport.md"
    before, rest = page.read_text().split(MARKS[0])
    page.write_text(before + MARKS[0] + text + MARKS[1] + rest.split(MARKS[1])[1])
    draw(table, options.docs / "_static" / "convergence.png")


if __name__ == "__main__":
    main()
