"""Sparse training: networks whose weights are mostly 0 in every step, without a dense phase.

`topkast` returns the parameters of which only the largest are not 0, with gradients for a larger share of them, and
`regularizer` the penalty that belongs to it.
"""

from ._functions.sparse import regularizer, topkast

__all__ = ["regularizer", "topkast"]
