"""softk: the differentiable top-k for every array library."""

from . import attention, beam, budget, losses, neighbors, sampling, schedules, sparse
from ._functions.assignment import assign
from ._functions.derivatives import jvp, vjp
from ._functions.masks import log_topk, quantile, threshold, topk
from ._functions.ordering import SortedTopK, rank, sort, sorted_topk
from ._functions.segments import segment_topk
from ._functions.selection import Selected, select
from ._functions.transport import ConvergenceWarning, Plan, transport
from .backend import kernels

__version__ = "0.1.0"

__all__ = [
    "ConvergenceWarning",
    "Plan",
    "Selected",
    "SortedTopK",
    "assign",
    "attention",
    "beam",
    "budget",
    "jvp",
    "kernels",
    "log_topk",
    "losses",
    "neighbors",
    "quantile",
    "rank",
    "sampling",
    "schedules",
    "segment_topk",
    "select",
    "sort",
    "sorted_topk",
    "sparse",
    "threshold",
    "topk",
    "transport",
    "vjp",
]
