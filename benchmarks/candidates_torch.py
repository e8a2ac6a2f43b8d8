"""PyTorch, eager and compiled: softk, the functions of the framework, and the peers written for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch._dynamo

import softk

from .candidates import (
    BISECTION,
    BISECTIONS,
    INDICES,
    OPERATORS,
    REFERENCE,
    SELECT,
    SINKHORN,
    SINKHORN_ITERATIONS,
    Candidate,
    Prepare,
    Prepared,
    bisection,
    few,
    implicit,
    installed,
    sinkhorn,
)
from .cases import Case

Operator = Callable[[Case, torch.Tensor], torch.Tensor]
"""Takes (case, scores). Returns an array of the shape of the scores, or with k values per slice."""


def prepare(operator: Operator, device: str, *, compiled: bool = False, gradient: bool = True) -> Prepare:
    """Prepare an operator, or its compiled form, with autograd."""

    def prepared(case: Case, x: np.ndarray, u: np.ndarray) -> Prepared:
        scores, cotangent = torch.asarray(x, device=device), torch.asarray(u, device=device)
        leaf = scores.clone().requires_grad_()

        def function(values: torch.Tensor) -> torch.Tensor:
            return operator(case, values)

        if compiled:
            function = torch.compile(function, dynamic=False)

        def forward() -> torch.Tensor:
            if compiled:  # reuse the training graph, since a graph for inference would be compiled separately
                result = function(leaf)
            else:
                with torch.no_grad():
                    result = function(scores)
            _wait(device)
            return result

        def both() -> tuple[torch.Tensor, torch.Tensor]:
            out = function(leaf)
            (found,) = torch.autograd.grad(out, leaf, cotangent[..., : out.shape[-1]])
            _wait(device)
            return out, found

        return Prepared(forward, both if gradient else None, lambda array: array.detach().cpu().numpy())

    return prepared


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _softk(case: Case, x: torch.Tensor) -> torch.Tensor:
    return softk.topk(x, case.k, axis=case.axis, epsilon=case.epsilon)


def _reference(case: Case, x: torch.Tensor) -> torch.Tensor:
    with softk.kernels("none"):
        return softk.topk(x, case.k, axis=case.axis, epsilon=case.epsilon)


def _sorted(case: Case, x: torch.Tensor) -> torch.Tensor:
    values: torch.Tensor = softk.sorted_topk(x, case.k, epsilon=case.epsilon).values
    return values


def _select(case: Case, x: torch.Tensor) -> torch.Tensor:
    gates: torch.Tensor = softk.select(x, case.k, epsilon=case.epsilon).gates
    return gates


def _indices(case: Case, x: torch.Tensor) -> torch.Tensor:
    return torch.topk(x, case.k, dim=-1).indices


def _softmax(case: Case, x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, dim=-1)


def _sigmoid(case: Case, x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x)


def _hard(case: Case, x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x).scatter_(-1, torch.topk(x, case.k, dim=-1).indices, 1.0)


def _repeated(count: int) -> Callable[[Any, Any], Any]:
    """A loop that applies a step so many times."""

    def loop(step: Any, state: Any) -> Any:
        for _ in range(count):
            state = step(state)
        return state

    return loop


class _Implicit(torch.autograd.Function):
    """A solver of the mask, `solve(x, k, epsilon)`, with the implicit derivative at its result."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, k: int, epsilon: float, solve: Any) -> torch.Tensor:
        mask: torch.Tensor = solve(x, k, epsilon)
        ctx.save_for_backward(mask)
        ctx.epsilon = epsilon
        return mask

    @staticmethod
    def backward(ctx: Any, u: torch.Tensor) -> Any:
        return implicit(ctx.saved_tensors[0], u, ctx.epsilon), None, None, None


def _iterated(x: torch.Tensor, k: int, epsilon: float) -> torch.Tensor:
    mask: torch.Tensor = sinkhorn(torch, x, k, epsilon, _repeated(SINKHORN_ITERATIONS))
    return mask


def _bisected(x: torch.Tensor, k: int, epsilon: float) -> torch.Tensor:
    mask: torch.Tensor = bisection(torch, x, k, epsilon, torch.sigmoid, _repeated(BISECTIONS))
    return mask


def _sinkhorn(case: Case, x: torch.Tensor) -> torch.Tensor:
    mask: torch.Tensor = _Implicit.apply(x, case.k, case.epsilon, _iterated)
    return mask


def _bisection(case: Case, x: torch.Tensor) -> torch.Tensor:
    mask: torch.Tensor = _Implicit.apply(x, case.k, case.epsilon, _bisected)
    return mask


def _pot(case: Case, x: torch.Tensor) -> torch.Tensor:
    import ot

    n = case.n
    costs = torch.stack([x * x, (x - 1.0) ** 2], dim=-1)
    a = torch.full_like(x, 1.0 / n)
    b = torch.asarray([(n - case.k) / n, case.k / n], dtype=x.dtype, device=x.device).expand(case.rows, 2)
    solved = ot.solve_batch(costs, reg=case.epsilon, a=a, b=b, method="log_sinkhorn", grad="last_step")
    plan: torch.Tensor = solved.plan
    return n * plan[..., 1]


def _softsort(case: Case, x: torch.Tensor) -> torch.Tensor:
    import difftopk

    permutation: torch.Tensor = difftopk.SoftSort(tau=case.epsilon)(x)
    return permutation[:, : case.k, :].sum(dim=1)


@cache
def _network(n: int, k: int, steepness: float, device: str) -> Any:
    import difftopk

    return difftopk.DiffTopkNet("bitonic", n, k, sparse=False, device=device, steepness=steepness)


def _bitonic(case: Case, x: torch.Tensor) -> torch.Tensor:
    attribution: torch.Tensor = _network(case.n, case.k, 1.0 / case.epsilon, x.device.type)(x)[1]
    return attribution.sum(dim=-1)


def _soft_rank(case: Case, x: torch.Tensor) -> torch.Tensor:
    import torchsort

    ranks: torch.Tensor = torchsort.soft_rank(x, regularization_strength=case.epsilon)
    return ranks


def _softtorch(case: Case, x: torch.Tensor) -> torch.Tensor:
    import softtorch

    found = softtorch.topk(x, case.k, dim=-1, softness=case.epsilon, method="ot", standardize=False)
    shares: torch.Tensor = found.indices
    return shares.sum(dim=-2)


def _power_of_two(case: Case) -> str | None:
    return None if case.n & (case.n - 1) == 0 else "supports only powers of two"


def candidates(device: str) -> list[Candidate]:
    """softk, the functions of the framework, and the installed peers."""
    here = installed("PyTorch")
    found = [
        Candidate("softk.topk", "PyTorch", "soft", prepare(_softk, device), joint=True),
        Candidate(REFERENCE, "PyTorch", "soft", prepare(_reference, device), joint=True),
        Candidate("softk.sorted_topk", "PyTorch", "other", prepare(_sorted, device), obstacle=few(1.5e6)),
        Candidate(SELECT, "PyTorch", "other", prepare(_select, device, gradient=False)),
        Candidate(INDICES, "PyTorch", "other", prepare(_indices, device, gradient=False)),
        Candidate("softmax", "PyTorch", "other", prepare(_softmax, device), operators=OPERATORS),
        Candidate("sigmoid", "PyTorch", "other", prepare(_sigmoid, device)),
        Candidate("hard top-k (topk, scatter)", "PyTorch", "hard", prepare(_hard, device, gradient=False)),
        Candidate(BISECTION, "PyTorch", "soft", prepare(_bisection, device), peer=True),
        Candidate(SINKHORN, "PyTorch", "soft", prepare(_sinkhorn, device), peer=True),
    ]
    if "POT" in here:
        found.append(Candidate("POT solve_batch", "PyTorch", "soft", prepare(_pot, device), peer=True))
    if "difftopk" in here:
        softsort = prepare(_softsort, device)
        found.append(Candidate("difftopk SoftSort", "PyTorch", "other", softsort, peer=True, power=2, arrays=4))
        bitonic = Candidate(
            "difftopk bitonic", "PyTorch", "other", prepare(_bitonic, device), True, 2, 24, _power_of_two
        )
        found.append(bitonic)
    if "torchsort" in here:
        found.append(Candidate("torchsort soft_rank", "PyTorch", "other", prepare(_soft_rank, device), peer=True))
    if "softtorch" in here:
        found.append(
            Candidate("softtorch topk, ot", "PyTorch", "other", prepare(_softtorch, device), True, arrays=0.05)
        )
    return found


def compiled(device: str) -> list[Candidate]:
    """softk and the functions of the framework under torch.compile."""
    # Every case recompiles the same functions. Beyond the default limit of 8 they would silently run eagerly.
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 1000
    return [
        Candidate("softk.topk", "torch.compile", "soft", prepare(_softk, device, compiled=True)),
        Candidate(BISECTION, "torch.compile", "soft", prepare(_bisection, device, compiled=True), peer=True),
        Candidate("softmax", "torch.compile", "other", prepare(_softmax, device, compiled=True)),
        Candidate("sigmoid", "torch.compile", "other", prepare(_sigmoid, device, compiled=True)),
    ]
