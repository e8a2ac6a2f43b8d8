"""What is measured: shapes, k, epsilon and dtypes, and the inputs that belong to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

SHAPES = ((128, 1000, 10), (8, 20_000, 100), (4096, 64, 8), (1, 1_000_000, 1000))
"""(slices, scores a slice, k)."""
HALVES = ((128, 1000, 500), (1, 1_000_000, 500_000))
EPSILONS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
Peers = Literal["all", "solvers", "sinkhorn", "none"]
"""Which peers take part, beside softk and what its framework has: all, those that solve the same problem, the paper's
iterations on NumPy alone, or none."""
LENGTHS = (100, 1000, 10_000, 100_000, 1_000_000, 10_000_000)


@dataclass(frozen=True)
class Case:
    """One problem of one batch of slices, and which candidates it is for."""

    group: str  # the table or plot that it belongs to: "shapes", "epsilon" or "lengths"
    rows: int
    n: int
    k: int
    epsilon: float = 0.1
    dtype: str = "float32"
    peers: Peers = "all"
    compiled: bool = False  # for torch.compile as well, which takes long over every new shape
    forward: bool = True  # the forward pass on its own as well

    @property
    def size(self) -> int:
        """How many scores there are."""
        return self.rows * self.n

    @property
    def label(self) -> str:
        """For the progress bar."""
        return f"({self.rows}, {self.n}) k={self.k} epsilon={self.epsilon:g} {self.dtype}"

    def scores(self) -> np.ndarray:
        """Standard normal, the same for every candidate; rounding to the dtype comes before everything else."""
        return np.random.default_rng(0).normal(size=(self.rows, self.n)).astype(self.dtype)

    def cotangent(self) -> np.ndarray:
        """Random: for one that is constant along a slice the derivative is zero, whatever a candidate does."""
        return np.random.default_rng(1).normal(size=(self.rows, self.n)).astype(self.dtype)


def plan(threads: str) -> list[Case]:
    """All cases of a full run, `threads` being "one" or "all", in the order of their worth, small ones first."""
    shapes = [Case("shapes", *shape, compiled=True) for shape in SHAPES] + [Case("shapes", *shape) for shape in HALVES]
    # Doubles decide little about time that floats do not: softk and its framework only.
    doubles = [replace(case, dtype="float64", peers="none", compiled=False) for case in shapes]
    doubles.sort(key=lambda case: case.size)
    if threads == "one":
        alone = [replace(case, peers="all" if 2 * case.k < case.n else "none") for case in shapes]
        return alone + doubles
    rows, n, k = SHAPES[0]
    epsilons = [Case("epsilon", rows, n, k, epsilon, peers="solvers", forward=False) for epsilon in EPSILONS]
    precise = [
        Case("epsilon", rows, n, k, epsilon, "float64", peers="none", forward=False) for epsilon in EPSILONS[::2]
    ]
    lengths = [Case("lengths", 1, n, max(1, n // 100), peers="sinkhorn", forward=False) for n in LENGTHS]
    # If time runs out, it is the doubles that are missing, which decide least.
    return lengths + shapes + epsilons + precise + doubles


def quick_plan(threads: str) -> list[Case]:
    """One or two tiny cases of every group, which prove that all of it runs."""
    shapes = [Case("shapes", 4, 64, 8), Case("shapes", 2, 100, 50, dtype="float64", peers="none")]
    if threads == "one":
        return shapes[:1]
    epsilons = [Case("epsilon", 4, 64, 8, epsilon, peers="none") for epsilon in (1.0, 0.01)]
    lengths = [Case("lengths", 1, n, max(1, n // 100), peers="none", forward=False) for n in (100, 1000)]
    return shapes + epsilons + lengths
