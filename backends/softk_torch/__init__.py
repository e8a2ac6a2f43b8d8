"""The PyTorch backend, which binds the primitives to autograd, and the modules `TopK` and `TopKAttention`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .adapter import TorchBackend, backend

if TYPE_CHECKING:
    from .layers import TopK, TopKAttention

__all__ = ["TopK", "TopKAttention", "TorchBackend", "backend"]


def __getattr__(name: str) -> Any:
    """Import the layers on first use. They import softk's functions, which load this adapter."""
    if name in ("TopK", "TopKAttention"):
        return getattr(importlib.import_module(".layers", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
