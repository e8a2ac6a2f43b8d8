"""JAX under jit: the operators that sort, of softk and of OTT."""

from __future__ import annotations

from typing import Any

from .candidates import Candidate, few, installed
from .candidates_jax import OTT_OPTIONS, prepare
from .cases import Case
from .sorting import SORTING, by_softk


def _ott(case: Case, x: Any) -> Any:
    """softk's problem. The anchors lie between 0 and 1 here, so epsilon is divided as their distances are."""
    from ott.tools import soft_sort

    n, k = case.n, case.k
    if case.operator == "sorted_topk":
        return soft_sort.sort(x, topk=k, epsilon=case.epsilon / k, **OTT_OPTIONS)[..., ::-1]
    f = soft_sort.sort if case.operator == "sort" else soft_sort.ranks
    return f(x, num_targets=k, epsilon=case.epsilon / (n - 1), **OTT_OPTIONS)


def candidates(device: str) -> list[Candidate]:
    """softk's operators, and OTT's if it is installed."""
    ours = prepare(by_softk, device)
    found = [Candidate(f"softk.{name}", "JAX jit", "soft", ours, operators=(name,)) for name in SORTING]
    if "ott-jax" in installed("JAX"):
        ott = prepare(_ott, device)
        for name in SORTING:
            title = f"OTT {'ranks' if name == 'rank' else 'sort'}"
            found.append(Candidate(title, "JAX jit", "soft", ott, True, obstacle=few(1.1e6), operators=(name,)))
    return found
