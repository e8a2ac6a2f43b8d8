"""The measured problems: shapes, k, epsilon and dtypes, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

SHAPES = ((128, 1000, 10), (8, 20_000, 100), (4096, 64, 8), (1, 1_000_000, 1000), (2, 16, 4), (32, 100, 10))
"""(slices, scores per slice, k)."""
LARGEST = (1, 10_000_000, 1000)
#: The batch-level top-k of a sparse autoencoder: one budget for all activations, 32 an example.
BATCH = (4096, 16_384, 32 * 4096)
HALVES = ((128, 1000, 500), (1, 1_000_000, 500_000))
EPSILONS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
Peers = Literal["all", "solvers", "sinkhorn", "none"]
"""The peers that are measured in addition to softk and the functions of its framework: all peers, only those that solve
the same problem, only the paper's iterations on NumPy, or none."""
LENGTHS = (100, 1000, 10_000, 100_000, 1_000_000, 10_000_000)
Operator = Literal["topk", "sorted_topk", "sort", "rank"]
#: (operator, slices, scores per slice, k). For `sort` and `rank`, k is the number of anchors.
SORTED: tuple[tuple[Operator, int, int, int], ...] = (
    ("sorted_topk", 128, 1000, 10),
    ("sorted_topk", 4096, 8, 2),
    ("sort", 64, 1000, 1000),
    ("sort", 1, 1000, 1000),
    ("rank", 64, 1000, 1000),
    ("rank", 1, 1000, 1000),
    ("rank", 1, 100_000, 1000),
)


@dataclass(frozen=True)
class Case:
    """A problem for one batch of slices, and the candidates that are measured on it."""

    group: str  # the table or plot of the case: "shapes", "sorted", "epsilon" or "lengths"
    rows: int
    n: int
    k: int
    epsilon: float = 0.1
    dtype: str = "float32"
    peers: Peers = "all"
    compiled: bool = False  # also under torch.compile, which is slow to compile every new shape
    forward: bool = True  # also time the forward pass by itself
    operator: Operator = "topk"
    joint: bool = False  # one k for both axes

    @property
    def size(self) -> int:
        """The number of scores."""
        return self.rows * self.n

    @property
    def label(self) -> str:
        """The label in the progress bar."""
        return f"{self.operator} of ({self.rows}, {self.n}) k={self.k} epsilon={self.epsilon:g} {self.dtype}"

    @property
    def axis(self) -> int | tuple[int, int]:
        """The axis or the axes of a slice."""
        return (0, 1) if self.joint else -1

    def flat(self) -> Case:
        """The same problem with a slice along the last axis."""
        return replace(self, rows=1, n=self.size, joint=False) if self.joint else self

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
    batch = [Case("shapes", *BATCH, peers="none", joint=True)]
    ordered = [Case("sorted", rows, n, k, operator=operator) for operator, rows, n, k in SORTED]
    # float64 adds little information about speed, so only softk and its framework are measured.
    doubles = [replace(case, dtype="float64", peers="none", compiled=False) for case in shapes]
    doubles.sort(key=lambda case: case.size)
    if threads == "one":
        alone = [replace(case, peers="all" if 2 * case.k < case.n else "none") for case in shapes]
        return alone + ordered + batch + doubles
    rows, n, k = SHAPES[0]
    epsilons = [Case("epsilon", rows, n, k, epsilon, peers="solvers", forward=False) for epsilon in EPSILONS]
    precise = [
        Case("epsilon", rows, n, k, epsilon, "float64", peers="none", forward=False) for epsilon in EPSILONS[::2]
    ]
    lengths = [Case("lengths", 1, n, max(1, n // 100), peers="sinkhorn", forward=False) for n in LENGTHS]
    # The least important cases, in float64, come last, because they are dropped if time runs out.
    return lengths + shapes + ordered + batch + epsilons + precise + doubles


def quick_plan(threads: str) -> list[Case]:
    """One or two tiny cases of every group, to test that the benchmarks run."""
    shapes = [Case("shapes", 4, 64, 8), Case("shapes", 2, 100, 50, dtype="float64", peers="none")]
    if threads == "one":
        return shapes[:1]
    shapes.append(Case("shapes", 4, 16, 8, peers="none", joint=True))
    ordered = [Case("sorted", 5, 20, k, operator=f) for f, k in (("sorted_topk", 4), ("sort", 20), ("rank", 20))]
    epsilons = [Case("epsilon", 4, 64, 8, epsilon, peers="none") for epsilon in (1.0, 0.01)]
    lengths = [Case("lengths", 1, n, max(1, n // 100), peers="none", forward=False) for n in (100, 1000)]
    return shapes + ordered + epsilons + lengths
