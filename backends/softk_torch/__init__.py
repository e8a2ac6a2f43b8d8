"""PyTorch for softk: the primitives as autograd functions, and `TopK`, the operator as a module."""

from __future__ import annotations

from ._backend import TorchBackend, backend
from ._module import TopK

__all__ = ["TopK", "TorchBackend", "backend"]
