"""The operators that sort: softk's own, and what the candidates of all frameworks share."""

from __future__ import annotations

from typing import Any

import softk

from .cases import Case, Operator

SORTING: tuple[Operator, ...] = ("sorted_topk", "sort", "rank")
PERMUTATIONS: tuple[Operator, ...] = ("sort", "rank")
"""Those with as many anchors as scores, unless a case has fewer."""


def softk_of(case: Case) -> tuple[Any, dict[str, Any]]:
    """softk's function, and its options."""
    if case.operator == "sorted_topk":
        return softk.sorted_topk, {"k": case.k, "epsilon": case.epsilon}
    return {"sort": softk.sort, "rank": softk.rank}[case.operator], {"epsilon": case.epsilon, "num_anchors": case.k}


def by_softk(case: Case, x: Any) -> Any:
    """The sorted values, or the ranks."""
    f, options = softk_of(case)
    found = f(x, **options)
    return found.values if case.operator == "sorted_topk" else found


def permutation_only(case: Case) -> str | None:
    """The obstacle of a candidate whose permutation has as many anchors as scores."""
    return None if case.k == case.n else "has as many anchors as scores"
