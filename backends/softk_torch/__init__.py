"""PyTorch for softk: the primitives as autograd functions, with `TopK` and `TopKAttention` as modules."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .adapter import TorchBackend, backend

if TYPE_CHECKING:
    from .layers import TopK, TopKAttention

__all__ = ["TopK", "TopKAttention", "TorchBackend", "backend"]


def __getattr__(name: str) -> Any:
    """The layers call softk's functions, which load this adapter: they are loaded when they are asked for."""
    if name in ("TopK", "TopKAttention"):
        return getattr(importlib.import_module(".layers", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
