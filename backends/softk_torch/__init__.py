"""The PyTorch backend, which binds the primitives to autograd, and softk's functions as modules."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .adapter import TorchBackend, backend

if TYPE_CHECKING:
    from .layers import SubsetSampler, TopK, TopKAttention
    from .losses import NDCG, AveragePrecision, Precision, Recall, ReciprocalRank, Spearman, TopKCrossEntropy

__all__ = [
    "NDCG",
    "AveragePrecision",
    "Precision",
    "Recall",
    "ReciprocalRank",
    "Spearman",
    "SubsetSampler",
    "TopK",
    "TopKAttention",
    "TopKCrossEntropy",
    "TorchBackend",
    "backend",
]

#: The modules that are imported on first use: they import softk's functions, which load this adapter.
_LAYERS = ("SubsetSampler", "TopK", "TopKAttention")
_LOSSES = ("NDCG", "AveragePrecision", "Precision", "Recall", "ReciprocalRank", "Spearman", "TopKCrossEntropy")


def __getattr__(name: str) -> Any:
    if name in (*_LAYERS, *_LOSSES):
        return getattr(importlib.import_module(".layers" if name in _LAYERS else ".losses", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
