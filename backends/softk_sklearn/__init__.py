"""scikit-learn estimators trained with softk. They need only NumPy and scikit-learn."""

from .embedding import SoftNeighborsEmbedding

__all__ = ["SoftNeighborsEmbedding"]
