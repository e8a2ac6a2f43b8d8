"""The problems measured on a device: shapes, k, epsilon and dtypes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from benchmarks.cases import Case

SHAPES = ((65_536, 128), (16_384, 1024), (4096, 8192), (1024, 65_536), (16, 10**6), (1, 10**8))
QUICK_SHAPES = ((64, 100), (2, 1000))
EPSILONS = (0.001, 0.01, 0.1, 1.0)
EPSILON = 0.1
HALVES = ("bfloat16",)
DTYPES = ("float32", *HALVES)
LARGEST_K = 10_000
"""The limit of the small k, which is n / 100."""
COMPILED = ((16_384, 1024), (16, 10**6), QUICK_SHAPES[0])
"""The only shapes with several values of epsilon on JAX, where compiling each value takes longer than measuring it."""


def small(n: int) -> int:
    """The small k: n / 100, within limits."""
    return max(1, min(n // 100, LARGEST_K))


def is_anchored(case: Case) -> bool:
    """Whether the softmaxes of other libraries are measured beside a case: once for each shape."""
    return case.k == small(case.n) and case.epsilon == EPSILON and case.dtype == "float32"


def plan(framework: str, *, quick: bool = False, dtypes: Collection[str] = DTYPES) -> list[Case]:
    """The cases of a framework in the order of their importance. If time runs out, the last ones are dropped."""
    shapes = QUICK_SHAPES if quick else SHAPES
    first = [Case("gpu", rows, n, k, EPSILON) for rows, n in shapes for k in (small(n), n // 2)]
    halves = [replace(case, dtype=dtype) for case in first for dtype in HALVES] if framework == "torch" else []
    halves.sort(key=lambda case: shapes.index((case.rows, case.n)))
    halves.sort(key=lambda case: HALVES.index(case.dtype))
    others = [
        Case("gpu", rows, n, small(n), epsilon)
        for rows, n in shapes
        if framework != "jax" or (rows, n) in COMPILED
        for epsilon in (EPSILONS[:1] if quick else EPSILONS)
        if epsilon != EPSILON
    ]
    return [case for case in first + halves + others if case.dtype in dtypes]
