"""Newton's method and Sinkhorn's algorithm on balanced assignments: steps, time and error by groups and epsilon.

``python -m benchmarks.assignment`` prints the table and writes it into ``docs/assign.md``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np

import softk

PAGE = Path(__file__).parent.parent / "docs" / "assign.md"
MARKS = ("<!-- assignment -->\n", "<!-- /assignment -->")
CASES = [(16, 0.001), *((groups, epsilon) for groups in (16, 128, 1000) for epsilon in (0.01, 0.05, 0.3))]
LIMIT = 3000
HEADER = """
| groups | epsilon | Newton: steps | ms | error | Sinkhorn: iterations | ms | error |
|---:|---:|---:|---:|---:|---:|---:|---:|
"""


def cosines(items: int, groups: int) -> np.ndarray:
    """The cosines of random items and groups in 32 dimensions."""
    random = np.random.default_rng(0)
    left, right = (random.normal(size=(size, 32)) for size in (items, groups))
    left, right = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (left, right))
    scores: np.ndarray = left @ right.T
    return scores


def solve(scores: np.ndarray, epsilon: float, method: str) -> str:
    """The cells of a method: steps, milliseconds and the largest error of a marginal."""
    limit = LIMIT if method == "sinkhorn" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", softk.ConvergenceWarning)
        start = time.perf_counter()
        found = softk.assign(scores, epsilon=epsilon, method=method, max_iterations=limit)
        seconds = time.perf_counter() - start
    return f"{int(np.max(found.iterations))} | {1e3 * seconds:.1f} | {float(np.max(found.marginal_error)):.0e}"


def tabulate(items: int) -> str:
    """The table, with a sentence about its problems."""
    rows = [
        f"| {groups} | {epsilon:g} | "
        + " | ".join(solve(cosines(items, groups), epsilon, method) for method in ("newton", "sinkhorn"))
        + " |\n"
        for groups, epsilon in CASES
    ]
    about = (
        f"The scores are the cosines of {items} random items and of the groups in 32 dimensions, in float64. Sinkhorn's"
    )
    return f"{about}\nalgorithm stops when it has converged, or after {LIMIT} iterations.\n{HEADER}" + "".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=512, help="number of items (default: 512)")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page (default: docs/assign.md)")
    options = parser.parse_args()
    softk.assign(cosines(8, 2))  # what is imported on first use
    text = tabulate(options.items)
    print(text)
    before, rest = options.page.read_text().split(MARKS[0])
    options.page.write_text(before + MARKS[0] + text + MARKS[1] + rest.split(MARKS[1])[1])


if __name__ == "__main__":
    main()
