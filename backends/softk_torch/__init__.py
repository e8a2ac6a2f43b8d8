"""PyTorch for softk: the primitives as autograd functions, with `TopK` and `TopKAttention` as modules."""

from __future__ import annotations

from ._backend import TorchBackend, backend
from ._module import TopK, TopKAttention

__all__ = ["TopK", "TopKAttention", "TorchBackend", "backend"]
