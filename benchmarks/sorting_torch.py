"""PyTorch: the operators that sort, of softk and of the peers."""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType
from typing import Any

import torch

from .candidates import Candidate, Kind, installed
from .candidates_torch import prepare
from .cases import Case, Operator
from .sorting import PERMUTATIONS, SORTING, by_softk, permutation_only


def _torchsort(case: Case, x: torch.Tensor) -> torch.Tensor:
    import torchsort

    if case.operator == "rank":
        ranks: torch.Tensor = torchsort.soft_rank(x, regularization_strength=case.epsilon) - 1.0
        return ranks
    values: torch.Tensor = torchsort.soft_sort(x, regularization_strength=case.epsilon)
    return values.flip(-1)[..., : case.k] if case.operator == "sorted_topk" else values


def _softsort(case: Case, x: torch.Tensor) -> torch.Tensor:
    import difftopk

    return _applied(case, x, difftopk.SoftSort(tau=case.epsilon)(x))


def _softtorch(case: Case, x: torch.Tensor) -> torch.Tensor:
    import softtorch

    options = {"dim": -1, "softness": case.epsilon, "method": "softsort", "standardize": False, "descending": False}
    if case.operator == "rank":
        ranks: torch.Tensor = softtorch.rank(x, **options)
        return ranks
    values: torch.Tensor = softtorch.sort(x, **options, return_indices=False).values
    return values


@cache
def _allrank() -> Any:
    """The module with NeuralSort and Sinkhorn's iteration.

    It imports others that read files, and does not use them. Empty modules stand in for those that are not installed.
    """
    empty: dict[str, dict[str, Any]] = {
        "torchvision": {"transforms": None},
        "torchvision.transforms": {"Compose": None},
        "sklearn.datasets": {"load_svmlight_file": None},
        "allrank.utils.file_utils": dict.fromkeys(("open_local_or_gs", "is_gs_path", "copy_file_to_local")),
    }
    for name, members in empty.items():
        vars(sys.modules.setdefault(name, ModuleType(name))).update(members)
    from allrank.models.losses import loss_utils

    return loss_utils


def _neural_sort(case: Case, x: torch.Tensor) -> torch.Tensor:
    package = _allrank()
    none = torch.zeros_like(x, dtype=torch.bool)
    plan = package.deterministic_neural_sort(x[..., None], tau=case.epsilon, mask=none)
    return _applied(case, x, package.sinkhorn_scaling(plan, none, tol=1e-6, max_iter=50))


def _applied(case: Case, x: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """The result of a relaxed permutation, whose rows are the places in descending order."""
    if case.operator == "rank":
        places = torch.arange(case.n - 1, -1, -1, dtype=x.dtype, device=x.device)
        return permutation.mT @ places
    values = (permutation[:, : case.k] @ x[..., None])[..., 0]
    return values if case.operator == "sorted_topk" else values.flip(-1)


def candidates(device: str) -> list[Candidate]:
    """softk's operators, and those of the installed peers."""
    here = installed("PyTorch")
    ours = prepare(by_softk, device)
    found = [Candidate(f"softk.{name}", "PyTorch", "soft", ours, operators=(name,)) for name in SORTING]

    def add(name: str, kind: Kind, f: Any, operators: tuple[Operator, ...], **options: Any) -> None:
        if name.split(" ")[0].lower() in here:
            found.append(Candidate(name, "PyTorch", kind, prepare(f, device), True, operators=operators, **options))

    matrix: dict[str, Any] = {"power": 2, "obstacle": permutation_only}
    add("torchsort", "relaxation", _torchsort, SORTING)
    add("difftopk SoftSort", "relaxation", _softsort, ("sorted_topk", "sort"), power=2, arrays=4)
    add("softtorch SoftSort", "relaxation", _softtorch, PERMUTATIONS, arrays=4, **matrix)
    # Its derivative keeps two matrices of every iteration.
    add("allRank NeuralSort", "soft", _neural_sort, PERMUTATIONS, arrays=110, **matrix)
    return found
