"""Newton's method and Sinkhorn's algorithm on the sorted top-k: time and error of the plan for each epsilon.

``python -m benchmarks.convergence`` prints the table, writes it into ``docs/transport.md`` and draws the picture there.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import softk

DOCS = Path(__file__).parent.parent / "docs"
MARKS = ("<!-- convergence -->\n", "<!-- /convergence -->")
EPSILONS = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
ACCURACY = 1e-8
"""The error of a column sum, in items, to which Sinkhorn's algorithm is run."""
LIMIT = 3000
SEEDS = 5
REPEATS, SECONDS = 50, 0.05
"""A call is repeated so often, or for so long, and at least once."""
OURS, GENERAL = "softk.sorted_topk", "Newton, array operations"
PAPER, ACCURATE = "Sinkhorn, 200 iterations", f"Sinkhorn to {ACCURACY:g}"
COLORS = {OURS: "#d94801", GENERAL: "#fdae6b", PAPER: "#6baed6", ACCURATE: "#08306b"}


class Solved(NamedTuple):
    """Iterations, 0 if they are not known, and the largest error of a column sum, in items."""

    steps: float
    error: float


class Row(NamedTuple):
    """A method at one epsilon: medians over the seeds, and the largest error of all seeds."""

    steps: float
    milliseconds: float
    error: float


def anchors_of(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The anchors k, ..., 1, 0, and their masses."""
    return np.arange(k, -1.0, -1.0), np.append(np.ones(k), n - k)


def sorted_topk(x: np.ndarray, k: int, epsilon: float) -> np.ndarray:
    """softk's operator, by a kernel where there is one."""
    assignment: np.ndarray = softk.sorted_topk(x, k, epsilon=epsilon).assignment
    return assignment


def error_of(assignment: np.ndarray) -> Solved:
    """The error of an assignment. It is not part of the time: the operator does not need it to stop."""
    return Solved(0.0, float(np.max(np.abs(np.sum(assignment, axis=-1) - 1.0))))


def transported(x: np.ndarray, k: int, epsilon: float, method: str, limit: int | None = None) -> Solved:
    """The same plan by `softk.transport`, which has no kernel."""
    anchors, masses = anchors_of(x.shape[-1], k)
    options = {"tolerance": ACCURACY} if method == "sinkhorn" else {}
    found = softk.transport(x, anchors, masses, epsilon=epsilon, method=method, max_iterations=limit, **options)
    return Solved(float(found.iterations), float(found.marginal_error))


def multiplied(x: np.ndarray, k: int, epsilon: float) -> Solved | None:
    """Sinkhorn's algorithm with products of a matrix and vectors, or None where entries of the matrix underflow.

    It has no exponentials in the loop, so it is several times faster than the iteration in the log domain.
    """
    anchors, masses = anchors_of(x.shape[-1], k)
    logs = (2.0 * x * anchors[:, None] - anchors[:, None] ** 2) / epsilon
    logs -= np.max(logs, axis=0)
    if np.min(logs) < -600.0:
        return None
    matrix = np.exp(logs)
    turned, factors = matrix.T.copy(), np.ones(k + 1)
    steps = 0
    while True:
        sums = matrix @ (1.0 / (turned @ factors))
        error = float(np.max(np.abs(factors * sums - masses)))
        if error <= ACCURACY or steps == LIMIT:
            return Solved(steps, error)
        factors = masses / sums
        steps += 1


def accurate(x: np.ndarray, k: int, epsilon: float) -> Solved:
    """Sinkhorn's algorithm to the accuracy, in the faster form that represents the numbers."""
    return multiplied(x, k, epsilon) or transported(x, k, epsilon, "sinkhorn", LIMIT)


METHODS: dict[str, Callable[[np.ndarray, int, float], Solved | np.ndarray]] = {
    OURS: sorted_topk,
    GENERAL: lambda x, k, epsilon: transported(x, k, epsilon, "newton"),
    PAPER: lambda x, k, epsilon: transported(x, k, epsilon, "sinkhorn", 200),
    ACCURATE: accurate,
}


def timed(solve: Callable[[], Solved | np.ndarray]) -> tuple[Solved, float]:
    """What was solved, and the shortest time of a call."""
    shortest, begin = np.inf, time.perf_counter()
    for _ in range(REPEATS):
        start = time.perf_counter()
        found = solve()
        end = time.perf_counter()
        shortest = min(shortest, end - start)
        if end - begin > SECONDS:
            break
    return found if isinstance(found, Solved) else error_of(found), shortest


def measure(n: int, k: int) -> dict[str, list[Row]]:
    """All methods at every epsilon."""
    scores = [np.random.default_rng(seed).uniform(size=n) for seed in range(SEEDS)]
    table: dict[str, list[Row]] = {name: [] for name in METHODS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", softk.ConvergenceWarning)
        for solve in METHODS.values():  # what is compiled or loaded at the first call
            timed(partial(solve, scores[0], k, EPSILONS[0]))
        for epsilon in EPSILONS:
            for name, solve in METHODS.items():
                runs = [timed(partial(solve, x, k, epsilon)) for x in scores]
                steps, errors = zip(*(found for found, _ in runs), strict=True)
                seconds = [time for _, time in runs]
                table[name].append(Row(float(np.median(steps)), 1e3 * float(np.median(seconds)), max(errors)))
    return table


def tabulate(table: dict[str, list[Row]], n: int, k: int) -> str:
    """The table, with a sentence about its problem and one about its last column."""
    titles = [f"{name}: " + ("ms" if name == OURS else "steps | ms") + " | error" for name in METHODS]
    columns = 3 * len(METHODS) + 1
    lines = [
        f"{n} scores, uniform in [0, 1], k = {k}, float64; medians over {SEEDS} seeds, the largest error of all seeds.",
        "",
        "| epsilon | " + " | ".join(titles) + " | its time over softk.sorted_topk's |",
        "|---:|" + "---:|" * (columns - 1),
    ]
    faster = 0
    for i, epsilon in enumerate(EPSILONS):
        cells = []
        for name, rows in table.items():
            steps = [] if name == OURS else [f"{rows[i].steps:.0f}"]
            cells += [*steps, f"{rows[i].milliseconds:#.3g}".rstrip("."), f"{rows[i].error:.0e}"]
        ratio = table[ACCURATE][i].milliseconds / table[OURS][i].milliseconds
        reached = table[ACCURATE][i].error <= ACCURACY
        faster += ratio > 1.0
        cells.append(("" if reached else "above ") + (f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.2g}"))
        lines.append(f"| {epsilon:g} | " + " | ".join(cells) + " |")
    where = "every epsilon" if faster == len(EPSILONS) else f"{faster} of {len(EPSILONS)} values of epsilon"
    about = (
        f"`softk.sorted_topk` is faster than Sinkhorn's algorithm to an error of {ACCURACY:g} at {where}.\n"
        f"That algorithm stops after {LIMIT} iterations. Where no entry of its matrix underflows, which needs a large\n"
        "epsilon, it multiplies by that matrix; else it is in the log domain."
    )
    return "\n".join([*lines, "", about]) + "\n"


def draw(table: dict[str, list[Row]], path: Path) -> None:
    """The errors and the times of all methods against epsilon."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.8), layout="constrained")
    for name, rows in table.items():
        line = {"color": COLORS[name], "marker": "o", "ms": 3.5, "lw": 1.8, "label": name}
        left.loglog(EPSILONS, [max(row.error, 1e-16) for row in rows], **line)
        right.loglog(EPSILONS, [row.milliseconds for row in rows], **line)
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
