"""The measured problems: shapes, k, epsilon and dtypes, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

SHAPES = ((128, 1000, 10), (8, 20_000, 100), (4096, 64, 8), (1, 1_000_000, 1000), (2, 16, 4), (32, 100, 10))
"""(slices, scores per slice, k)."""
LARGEST = (1, 10_000_000, 1000)
#: The batch-level top-k of a sparse autoencoder: one budget for all activations of (4096, 16384), 32 an example.
BATCH = (1, 4096 * 16_384, 32 * 4096)
HALVES = ((128, 1000, 500), (1, 1_000_000, 500_000))
EPSILONS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
Peers = Literal["all", "solvers", "sinkhorn", "none"]
"""The peers that are measured in addition to softk and the functions of its framework: all peers, only those that solve
the same problem, only the paper's iterations on NumPy, or none."""
LENGTHS = (100, 1000, 10_000, 100_000, 1_000_000, 10_000_000)


@dataclass(frozen=True)
class Case:
    """A problem for one batch of slices, and the candidates that are measured on it."""

    group: str  # the table or plot of the case: "shapes", "epsilon" or "lengths"
    rows: int
    n: int
    k: int
    epsilon: float = 0.1
    dtype: str = "float32"
    peers: Peers = "all"
    compiled: bool = False  # also under torch.compile, which is slow to compile every new shape
    forward: bool = True  # also time the forward pass by itself

    @property
    def size(self) -> int:
        """The number of scores."""
        return self.rows * self.n

    @property
    def label(self) -> str:
        """The label in the progress bar."""
        return f"({self.rows}, {self.n}) k={self.k} epsilon={self.epsilon:g} {self.dtype}"

    def scores(self) -> np.ndarray:
        """Standard normal scores, rounded to the dtype, the same for every candidate."""
        return np.random.default_rng(0).normal(size=(self.rows, self.n)).astype(self.dtype)

    def cotangent(self) -> np.ndarray:
        """A random cotangent. With one that is constant along a slice, the derivative of every candidate is 0."""
        return np.random.default_rng(1).normal(size=(self.rows, self.n)).astype(self.dtype)


def plan(threads: str) -> list[Case]:
    """All cases of a full run in the order of their importance, small ones first. `threads` is "one" or "all"."""
    shapes = [Case("shapes", *shape, compiled=True) for shape in SHAPES] + [Case("shapes", *shape) for shape in HALVES]
    shapes.append(Case("shapes", *LARGEST, peers="none"))
    batch = [Case("shapes", *BATCH, peers="none")]
    # float64 adds little information about speed, so only softk and its framework are measured.
    doubles = [replace(case, dtype="float64", peers="none", compiled=False) for case in shapes]
    doubles.sort(key=lambda case: case.size)
    if threads == "one":
        alone = [replace(case, peers="all" if 2 * case.k < case.n else "none") for case in shapes]
        return alone + batch + doubles
    rows, n, k = SHAPES[0]
    epsilons = [Case("epsilon", rows, n, k, epsilon, peers="solvers", forward=False) for epsilon in EPSILONS]
    precise = [
        Case("epsilon", rows, n, k, epsilon, "float64", peers="none", forward=False) for epsilon in EPSILONS[::2]
    ]
    lengths = [Case("lengths", 1, n, max(1, n // 100), peers="sinkhorn", forward=False) for n in LENGTHS]
    # The least important cases, in float64, come last, because they are dropped if time runs out.
    return lengths + shapes + batch + epsilons + precise + doubles


def quick_plan(threads: str) -> list[Case]:
    """One or two tiny cases of every group, to test that the benchmarks run."""
    shapes = [Case("shapes", 4, 64, 8), Case("shapes", 2, 100, 50, dtype="float64", peers="none")]
    if threads == "one":
        return shapes[:1]
    epsilons = [Case("epsilon", 4, 64, 8, epsilon, peers="none") for epsilon in (1.0, 0.01)]
    lengths = [Case("lengths", 1, n, max(1, n // 100), peers="none", forward=False) for n in (100, 1000)]
    return shapes + epsilons + lengths
