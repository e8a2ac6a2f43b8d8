"""The scores near the threshold, gathered into a shorter array.

Scores far below the k-th largest add less to the mass than its rounding. Where k is a small part of n, and where the
values of an array can be read without waiting, the solver works on the others alone: the window. It then checks that
the scores that were left out are negligible at the threshold that it found; otherwise it works on all scores.

This is the one place where a shape depends on values.
"""

from __future__ import annotations

import math
from typing import Any

from softk.backend import Array, Backend, is_in_host_memory

from .limits import MARGIN, limits

#: A window is taken only where it has at most this part of the scores.
LARGEST_PART = 0.5


def window(backend: Backend, x: Array, tau: Array, ranks: tuple[int, ...]) -> Array | None:
    """The scores that matter for the thresholds of the given ranks.

    Parameters
    ----------
    backend : Backend
        The framework of the arrays.
    x : array
        Scores, shape (..., n).
    tau : array
        Temperature, shape (..., 1) or ().
    ranks : tuple of int
        The ranks of the scores on either side of the thresholds.

    Returns
    -------
    array or None
        Shape (..., m): of each slice the scores above a level, then -inf. None where all scores must be used.
    """
    xp, n, rank = backend.xp, x.shape[-1], max(ranks)
    raw = backend.memory(x) if isinstance(n, int) else None
    block = n // (8 * rank) if raw is not None else 0
    if raw is None or not is_in_host_memory(raw) or 0 in x.shape or block < 4:
        return None
    # Cut the slice into blocks. The maximum of rank r among their maxima is a lower bound of the score of rank r,
    # because r scores are at least as large.
    blocks = n // block
    maxima = xp.max(xp.reshape(x[..., : block * blocks], (*x.shape[:-1], block, blocks)), axis=-2)
    bound = limits(xp, x.dtype)
    nth = xp.minimum(backend.select(maxima, (rank,)), bound.largest)  # +inf counts as the largest finite score
    # n scores that are log(n / eps) lower add up to a rounding of the one there.
    return _gather(xp, x, nth - (math.log(n / bound.eps) + MARGIN) * tau)


def _gather(xp: Any, x: Array, level: Array) -> Array | None:
    """The scores that are not below the level (..., 1), NaN included, and then -inf; None if they are too many."""
    chosen = ~(x < level)
    counts = xp.count_nonzero(chosen, axis=-1, keepdims=True)
    if max(int(xp.max(counts)), 1) > LARGEST_PART * x.shape[-1]:
        return None
    found, is_filled = gather(xp, x, chosen, counts)
    return xp.where(is_filled, found, -math.inf)


def gather(xp: Any, values: Array, chosen: Array, counts: Array) -> tuple[Array, Array]:
    """The chosen values of each slice, in their order, and which entries they fill; the others have any value.

    `counts` is the number of chosen values per slice, shape (..., 1). Both results have the shape (..., m), m >= 1.
    """
    width = 1 if 0 in counts.shape else max(int(xp.max(counts)), 1)
    shape = (*values.shape[:-1], width)
    counts = xp.reshape(counts, (-1, 1))
    places = xp.nonzero(xp.reshape(chosen, (-1,)))[0]  # in the flattened values, slice after slice
    if places.shape[0] == 0:
        return xp.zeros(shape, dtype=values.dtype), xp.zeros(shape, dtype=xp.bool)
    first = xp.cumulative_sum(counts, axis=0) - counts
    column = xp.arange(width)
    is_filled = column < counts
    index = xp.take(places, xp.reshape(xp.where(is_filled, first + column, 0), (-1,)))
    gathered = xp.reshape(xp.take(xp.reshape(values, (-1,)), index), shape)
    return gathered, xp.reshape(is_filled, shape)
