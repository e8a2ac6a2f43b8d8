"""softk: the differentiable top-k for every array library."""

from ._derivatives import jvp, vjp
from ._operators import quantile, threshold, topk

__version__ = "0.1.0"

__all__ = ["jvp", "quantile", "threshold", "topk", "vjp"]
