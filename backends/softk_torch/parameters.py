"""The numbers of a module that may be learned: checked when the module is made, held as parameters or buffers."""

from __future__ import annotations

from typing import Any

import torch

import softk


def scores_of_size(n: int) -> torch.Tensor:
    """Scores without data, with which softk checks the other arguments."""
    return torch.empty(n, dtype=torch.float64, device="meta")


def require_numbers(k: float | torch.Tensor, epsilon: float | torch.Tensor, mode: Any = "largest") -> None:
    """Raise for numbers that are invalid for any input."""
    number, strength = (1.0 if isinstance(value, torch.Tensor) else value for value in (k, epsilon))
    # n is unknown, so k must not be compared with it: with weights there is no upper end.
    softk.topk(scores_of_size(1), number, mode=mode, epsilon=strength, weights=scores_of_size(1))


def require_dim(dim: int | tuple[int, ...], x: torch.Tensor, *, called: str = "x") -> None:
    """Raise for a dim that the input does not have: PyTorch's name for what the functions call axis."""
    for one in dim if isinstance(dim, tuple) else (dim,):
        if isinstance(one, int) and not -x.ndim <= one < x.ndim:
            raise ValueError(f"dim must be from {-x.ndim} to {x.ndim - 1} for {called} of {x.ndim} axes, got {dim!r}")


def hold(module: torch.nn.Module, **values: float | torch.Tensor) -> None:
    """Set the attributes of a module: tensors that are no parameters become buffers, other values stay as they are."""
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
            module.register_buffer(name, value)
        else:
            setattr(module, name, value)


def show(value: Any) -> str:
    """An option as the representation of a module shows it."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    learned = isinstance(value, torch.nn.Parameter)
    if value.numel() == 1 and not value.is_meta:
        return f"{value.item():.4g}{' (learned)' if learned else ''}"
    return f"{'learned' if learned else 'tensor'}, shape {tuple(value.shape)}"
