"""What the tests of PyTorch's devices run: one call with its derivatives in every argument, on any device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import softk

#: Arguments that are arrays and have a derivative.
MOVING = ("x", "k", "epsilon", "weights")


@dataclass(frozen=True)
class Case:
    """A function, which of its arguments are arrays, and the others."""

    function: Callable[..., Any]
    arrays: tuple[str, ...] = ()
    k: Any = 2.5
    options: dict[str, Any] = field(default_factory=lambda: {"epsilon": 0.3})

    def values(self, rng: Any, batch: tuple[int, ...] = (3,), n: int = 40) -> dict[str, np.ndarray]:
        """Random scores, and what else is an array here."""
        every = {
            "x": rng.standard_normal((*batch, n)),
            "k": rng.uniform(1.2, 0.2 * n, (*batch, 1)),
            "epsilon": rng.uniform(0.2, 0.6, (*batch, 1)),
            "weights": rng.uniform(0.5, 1.5, n),
            "where": rng.uniform(size=(*batch, n)) > 0.2,
        }
        return {name: every[name] for name in ("x", *self.arrays)}

    def __call__(self, arguments: dict[str, Any]) -> Any:
        named = {**self.options, **arguments}
        return self.function(named.pop("x"), named.pop("k", self.k), **named)


HARD = {"epsilon": 0.3, "hard": True}
EVERYTHING = ("k", "epsilon", "weights", "where")

#: The masks and thresholds.
CASES = {
    "topk": Case(softk.topk),
    "whole k": Case(softk.topk, k=3),
    "arrays": Case(softk.topk, ("k", "epsilon"), options={}),
    "weights": Case(softk.topk, ("weights",)),
    "where": Case(softk.topk, ("where",)),
    "everything": Case(softk.topk, EVERYTHING, options={"mode": "smallest"}),
    "hard": Case(softk.topk, k=3, options=HARD),
    "log": Case(softk.log_topk),
    "log, everything": Case(softk.log_topk, EVERYTHING, options={}),
    "threshold": Case(softk.threshold),
    "threshold, everything": Case(softk.threshold, EVERYTHING, options={"keepdims": True}),
    "quantile": Case(softk.quantile, k=0.3),
}


def _values_of(x: Any, k: int, **options: Any) -> Any:
    return softk.sorted_topk(x, k, **options).values


def _plan_of(x: Any, anchors: Any, **options: Any) -> Any:
    return softk.transport(x, x[0, :4].detach().clone(), 1.0 + x.detach()[..., 4:8].abs(), **options).plan


#: Those with more than two anchors, which solve systems of equations.
PLANS = {
    "sorted": Case(_values_of, ("where",), k=3),
    "sort": Case(lambda x, k, **options: softk.sort(x, **options), ("epsilon",), options={}),
    "rank": Case(lambda x, k, **options: softk.rank(x, num_anchors=5, **options)),
    "transport": Case(_plan_of),
}


def tensors(values: dict[str, np.ndarray], device: str, dtype: Any) -> dict[str, Any]:
    """Leaves that require grad, but for booleans."""
    import torch

    found = {}
    for name, value in values.items():
        moving = name in MOVING
        found[name] = torch.asarray(value).to(device=device, dtype=dtype if moving else None).requires_grad_(moving)
    return found


def derivatives(case: Case, arguments: dict[str, Any], cotangent: Any) -> tuple[Any, ...]:
    """The result and its derivative along the cotangent in every argument that has one."""
    import torch

    out = case(arguments)
    moving = [arguments[name] for name in MOVING if name in arguments]
    return (out.detach(), *torch.autograd.grad(out, moving, cotangent))


def cotangent(case: Case, arguments: dict[str, Any], rng: Any) -> Any:
    """Random, of the shape, dtype and device of the result."""
    import torch

    with torch.no_grad():
        like = case(arguments)
    return torch.asarray(rng.standard_normal(tuple(like.shape))).to(like)
