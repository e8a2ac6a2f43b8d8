"""Forward + backward for pytest-benchmark: `make bench-history` saves a run and compares it with earlier ones."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from .cases import SHAPES, Case

CASES = [Case("shapes", *shape) for shape in SHAPES]
PAIRS = [(module, name) for module in ("numpy", "torch", "jax") for name in ("softk.topk", "softmax")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rows}x{case.n}")
@pytest.mark.parametrize(("module", "name"), PAIRS)
def test_forward_and_backward(benchmark: Any, module: str, name: str, case: Case) -> None:
    pytest.importorskip({"numpy": "scipy"}.get(module, module))
    candidates = import_module(f"benchmarks.candidates_{module}").candidates("cpu")
    candidate = next(c for c in candidates if c.name.startswith(name) and c.framework != "torch.compile")
    benchmark.group = f"({case.rows}, {case.n}) k={case.k}, {candidate.framework}"
    both = candidate.prepare(case, case.scores(), case.cotangent()).both
    both()
    benchmark(both)
