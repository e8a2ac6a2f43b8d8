"""Where a fused kernel takes the place of the operations: on a CUDA device with Triton, for scores below float64.

Each function returns None where there is no kernel for what it is given, and the operations do it: for float64, under a
transform or a trace, where autograd differentiates the operations themselves, or where there is no Triton.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from softk._solver import approach

#: The devices whose tensors the kernels are for.
DEVICES = {"cuda"}
#: The longest row that a tile takes, and how many scores each of its warps.
LONGEST = 32768
PER_WARP = 1024

Tensors = tuple[torch.Tensor, ...]


@cache
def _kernels() -> Any:
    """The kernels, imported where the first tensor asks for them."""
    if importlib.util.find_spec("triton") is None:
        return None
    from . import _kernels

    return _kernels


def _serve(inputs: tuple[torch.Tensor | None, ...], *others: torch.Tensor | None) -> bool:
    """Whether there is a kernel for these inputs of a primitive, the scores first, and what belongs to them."""
    x, given = inputs[0], [value for value in (*inputs, *others) if value is not None]
    return (
        x is not None
        and x.device.type in DEVICES
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and 0 < x.shape[-1] <= LONGEST
        and x.numel() > 0
        and all(type(value) in (torch.Tensor, torch.nn.Parameter) for value in given)
        and not torch.compiler.is_compiling()
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(value) for value in given)
        and _kernels() is not None
    )


class _Problem:
    """Scores and what belongs to them as the kernels see them: rows, of which a program takes a tile."""

    def __init__(
        self,
        x: Any,
        k: Any,
        tau: Any,
        weights: torch.Tensor | None,
        where: torch.Tensor | None,
    ) -> None:
        self.x, n = x.contiguous(), x.shape[-1]
        count = x.numel() // n
        block = max(1 << (n - 1).bit_length(), 16)
        rows = max(PER_WARP // 2 // block, 1)
        arrays, steps = zip(_per_row(k), _per_row(tau), _per_item(weights), _per_item(where), strict=True)
        self.arrays = (self.x, *arrays)
        self.grid = (-(-count // rows),)
        self.size = {
            "n": n,
            "rows": count,
            **dict(zip(("k_step", "tau_step", "weights_step", "where_step"), steps, strict=True)),
            "ROWS": rows,
            "BLOCK": block,
            "AGAIN": block == LONGEST,
            "num_warps": min(max(rows * block // PER_WARP, 1), 32),
        }

    def per_item(self, dtype: torch.dtype | None = None, *, wanted: bool = True) -> Any:
        """Room for a result of the scores' shape."""
        if not wanted:
            return None
        return torch.empty(self.x.shape, dtype=dtype or self.x.dtype, device=self.x.device)

    def per_row(self, dtype: torch.dtype = torch.float32, *, count: int | None = None, wanted: bool = True) -> Any:
        """Room for a result, or some, of one value a slice."""
        shape = (*self.x.shape[:-1], 1)
        if not wanted:
            return None
        return torch.empty(shape if count is None else (count, *shape), dtype=dtype, device=self.x.device)

    def run(self, kernel: Any, *arrays: torch.Tensor | None, **options: Any) -> None:
        """A kernel, on the device of the scores and its current stream."""
        on_device = torch.cuda.device(self.x.device) if self.x.device.type == "cuda" else nullcontext()
        with on_device:
            kernel[self.grid](*self.arrays, *arrays, **options, **self.size)


def _per_row(value: torch.Tensor) -> tuple[torch.Tensor, int]:
    """An array of one value a slice, or one for all, and how far the next one is."""
    return (value, 0) if value.ndim == 0 else (value.contiguous(), 1)


def _per_item(value: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """An array of the scores' shape, and how far the next row is: no step where one row serves all."""
    if value is None:
        return None, 0
    pairs = zip(value.shape[:-1], value.stride(), strict=False)
    if value.stride(-1) == 1 and all(size == 1 or step == 0 for size, step in pairs):
        return value, 0
    return value.contiguous(), value.shape[-1]


def settle(
    function: Callable[..., Tensors], options: dict[str, Any], arrays: tuple[torch.Tensor, ...]
) -> Tensors | None:
    """What an iteration settles to, if it is that of the threshold."""
    given = dict(zip(options["names"], arrays, strict=True)) if function is approach else {}
    inputs = tuple(given.get(name) for name in ("x", "k", "tau", "weights", "where"))
    if not _serve(inputs):
        return None
    problem = _Problem(*inputs)
    found, flags = problem.per_row(count=4), problem.per_row(torch.bool, count=4)
    problem.run(_kernels().solve_tile, None, None, None, found, flags)
    return *found.unbind(), *flags.unbind()


def forward(name: str, inputs: tuple[torch.Tensor | None, ...]) -> Tensors | None:
    """The outputs of a primitive, if it is the mask."""
    if name != "topk_mask" or not _serve(inputs):
        return None
    problem = _Problem(*inputs)
    mask, offset, reference = problem.per_item(), problem.per_row(), problem.per_row()
    problem.run(_kernels().solve_tile, mask, offset, reference, None, None)
    return mask, offset, reference


def pull(
    name: str,
    inputs: tuple[torch.Tensor | None, ...],
    outputs: tuple[torch.Tensor | None, ...],
    cotangents: tuple[torch.Tensor | None, ...],
    needed: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...] | None:
    """The cotangents of a primitive's inputs, if it has the rule of the mask and nobody differentiates it again."""
    (*_, offset, reference), (u, c) = outputs, cotangents[:2] if len(cotangents) > 1 else (None, None)
    if name not in ("topk_mask", "topk_hard_mask") or u is None or torch.is_grad_enabled():
        return None
    if not _serve(inputs, offset, reference, u, c):
        return None
    problem = _Problem(*inputs)
    of_x, of_k, of_tau, of_weights, _ = needed
    found = (
        problem.per_item(wanted=of_x),
        problem.per_row(wanted=of_k),
        problem.per_row(wanted=of_tau),
        problem.per_item(torch.float32, wanted=of_weights and inputs[3] is not None),
    )
    given = (value if value is None else value.contiguous() for value in (offset, reference, u, c))
    problem.run(_kernels().pull_tile, *given, *found)
    return *found, None
