"""scikit-learn estimators that learn through softk, on NumPy alone."""

from .embedding import SoftNeighborsEmbedding

__all__ = ["SoftNeighborsEmbedding"]
