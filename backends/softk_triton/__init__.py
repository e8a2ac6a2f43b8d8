"""Fused Triton kernels for PyTorch tensors on CUDA devices: the mask, its solver and its rule, for at most 32 bits.

This file declares the kernels and the arguments that they support. `launch` calls them. `tiles` has the kernels for
rows that fit into registers, `segments` those for longer rows. Triton is imported when the first supported tensor
arrives.
"""

from __future__ import annotations

import importlib.util
from functools import cache, partial
from typing import Any

import torch

from softk._reference.threshold.masks import hard_mask, mask
from softk._reference.threshold.solve import solver
from softk.backend import Backend, Kernel, chosen_kernels

__all__ = ["KERNELS"]

#: The smallest compute capability that Triton supports.
CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: The largest sizes that the kernels' integers can count.
MOST_SCORES, MOST_ROWS = 1 << 30, 1 << 29
#: float32, in which the kernels hold k, represents every integer up to this one.
MOST_SCORES_OF_A_MASS = 1 << 24

Inputs = tuple[Any, ...]


@cache
def _absent(device: torch.device) -> str | None:
    """The reason why no kernel runs on the device, or None if kernels run."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return "kernels are for NVIDIA's devices"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"{device} must have compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or more"
    from . import launch

    return launch.fault_on(device)


def _is_interpreted(device: torch.device) -> bool:
    """Whether Triton's interpreter serves CPU tensors. It is slow, so it is used only if chosen by name."""
    if device.type != "cpu" or chosen_kernels() != "triton" or importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _refuses(backend: Backend, inputs: Inputs, *groups: Any, **options: Any) -> str | None:
    """The reason why the kernels do not support a problem, or None if they do."""
    x = inputs[0]
    if not isinstance(x, torch.Tensor) or not (x.device.type == "cuda" or _is_interpreted(x.device)):
        return f"the scores must be on a CUDA device, got {getattr(x, 'device', None)}"
    if x.dtype not in DTYPES:
        return f"the scores must have at most 32 bits, got {x.dtype}"
    if not 0 < x.shape[-1] <= MOST_SCORES or not 0 < x.numel() // x.shape[-1] <= MOST_ROWS:
        return f"there must be from 1 to {MOST_SCORES} scores and from 1 to {MOST_ROWS} slices, got {tuple(x.shape)}"
    arrays = (value for group in (inputs, *groups) for value in group if isinstance(value, torch.Tensor))
    if any(backend.memory(value) is None for value in arrays):
        return "a compiler, a transform or automatic differentiation records the operations"
    return _absent(x.device)


def _refuses_count(backend: Backend, inputs: Inputs, *, ranks: tuple[int, ...] | None) -> str | None:
    """`_refuses`, with a limit on k: the kernels hold k in float32, which would round a larger count."""
    if ranks is not None and ranks[0] > MOST_SCORES_OF_A_MASS:  # the first is k, rounded up
        return f"k must be at most {MOST_SCORES_OF_A_MASS}, got {ranks[0]}"
    return _refuses(backend, inputs)


def _refuses_rule(backend: Backend, inputs: Inputs, outputs: Inputs, cotangents: Inputs, needed: Any) -> str | None:
    if cotangents[0] is None:
        return "there is no cotangent of the mask"
    return _refuses(backend, inputs, outputs[1:], cotangents)


def _compute(part: str, backend: Backend, inputs: Inputs, *groups: Any, **options: Any) -> tuple[Any, ...]:
    from . import launch

    problem = launch.problem(inputs[:5])
    if part == "solve":
        return problem.settled()
    if part == "mask":
        return problem.mask()
    outputs, cotangents, needed = groups
    # The outputs after the mask are the offset and the reference. `where` and the integer k have no cotangent.
    found = problem.cotangents((*outputs[1:], *cotangents), needed[:4])
    return (*found, *(None for _ in inputs[4:]))


KERNELS = (
    Kernel("triton", solver, "forward", _refuses_count, partial(_compute, "solve")),
    Kernel("triton", mask, "forward", _refuses, partial(_compute, "mask")),
    Kernel("triton", mask, "vjp", _refuses_rule, partial(_compute, "rule")),
    Kernel("triton", hard_mask, "vjp", _refuses_rule, partial(_compute, "rule")),
)
