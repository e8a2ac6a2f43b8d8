"""Where fused kernels take the place of the operations: on a CUDA device with Triton, for scores below float64.

Each function returns None where there is no kernel for what it is given, and the operations do it: for float64, under a
transform or a trace, where autograd differentiates the operations themselves, or where there is no Triton.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.autograd import forward_ad

#: The devices whose tensors the kernels are for, and the capability that Triton asks of them.
DEVICES = {"cuda"}
CAPABILITY = (8, 0)
#: What kernels count to.
MOST_SCORES, MOST_ROWS = 1 << 30, 1 << 29
#: The largest count that float32, in which they hold the mass, tells from the next.
MOST_SCORES_OF_A_MASS = 1 << 24

Tensors = tuple[torch.Tensor, ...]
Inputs = tuple[torch.Tensor | None, ...]


@cache
def _available(device: torch.device) -> bool:
    """Whether kernels can run there."""
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    from . import _launch  # imports Triton, which not everybody has

    return _launch.runs_on(device)


def _is_plain(value: torch.Tensor) -> bool:
    """Whether its memory holds its values, and nobody is there to be told of what becomes of them."""
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
        and not torch._C._functorch.is_legacy_batchedtensor(value)
        and not value.is_neg()
    )


def _is_traced() -> bool:
    """Whether a compiler or a tracer records the operations."""
    if torch.compiler.is_compiling():  # which does not follow what comes next
        return True
    proxy = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return proxy is not None or torch._C._get_tracing_state() is not None


def _problem(inputs: Inputs, *others: torch.Tensor | None) -> Any:
    """The inputs of a primitive, the scores first, as the kernels see them; None if they do not serve."""
    x = inputs[0]
    if (
        x is None
        or x.device.type not in DEVICES
        or x.dtype not in (torch.float32, torch.float16, torch.bfloat16)
        or _is_traced()
        or not all(_is_plain(value) for value in (*inputs, *others) if value is not None)
        or not 0 < x.shape[-1] <= MOST_SCORES
        or not 0 < x.numel() // x.shape[-1] <= MOST_ROWS
        or not _available(x.device)
    ):
        return None
    from . import _launch

    return _launch.problem(inputs)


def settle(
    function: Callable[..., Tensors], options: dict[str, Any], arrays: tuple[torch.Tensor, ...]
) -> Tensors | None:
    """What an iteration settles to, if it is that of the threshold."""
    threshold = (function.__module__, function.__name__) == ("softk._solver", "approach")
    counted = not options.get("ranks") or max(options["ranks"]) <= MOST_SCORES_OF_A_MASS
    given = dict(zip(options["names"], arrays, strict=True)) if threshold and counted else {}
    problem = _problem(tuple(given.get(name) for name in ("x", "k", "tau", "weights", "where")))
    return None if problem is None else problem.settled()


def forward(name: str, inputs: Inputs) -> Tensors | None:
    """The outputs of a primitive, if it is the mask."""
    problem = _problem(inputs) if name == "topk_mask" else None
    return None if problem is None else problem.mask()


def pull(name: str, inputs: Inputs, outputs: Inputs, cotangents: Inputs, needed: tuple[bool, ...]) -> Inputs | None:
    """The cotangents of a primitive's inputs, if it has the rule of the mask and nobody differentiates it again."""
    again = torch.is_grad_enabled() or forward_ad._current_level >= 0
    if name not in ("topk_mask", "topk_hard_mask") or cotangents[0] is None or again:
        return None
    given = (*outputs[1:], *cotangents)  # the offset, the reference, u and c
    problem = _problem(inputs[:5], *given)
    return None if problem is None else (*problem.cotangents(given, needed[:4]), *(None,) * (len(inputs) - 4))
