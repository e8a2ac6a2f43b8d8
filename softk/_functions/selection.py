"""The public operator that selects for good and is learned through: the hard top-k with soft gates."""

from __future__ import annotations

from typing import Generic, NamedTuple

from softk._reference.threshold.selection import selection
from softk.backend import AnyArray, ArrayT

from .arguments import require_scores
from .call import Argument, Call, operator_from
from .masks import Mode, _masked
from .ordering import whole_number, without_rows
from .signatures import plain_tuple


@plain_tuple
class Selected(NamedTuple, Generic[ArrayT]):
    """The k largest (smallest) scores, where they are, and how much of each the soft top-k selects.

    All three have the shape of `x` with k in the place of n.

    Attributes
    ----------
    values : array
        The scores in order. Their derivative is that of a gather.
    indices : array
        Where they are along the axis: integers, without a derivative.
    gates : array
        The entries of ``softk.topk(x, k)`` there, in [0, 1]. Their derivative is that of the mask, in all scores.
    """

    values: ArrayT
    indices: ArrayT
    gates: ArrayT


@operator_from
def select(
    x: ArrayT,
    /,
    k: int,
    *,
    axis: int = -1,
    mode: Mode = "largest",
    epsilon: float | AnyArray = 0.1,
) -> Call[Selected[ArrayT]]:
    """Hard top-k whose gates have the derivative of the soft one.

    The selection is the library's own top-k: exactly k items, so that nothing is computed for the others. The gates say
    how much of each the soft mask selects, and depend on all scores: an item that was just missed pulls at the gates of
    those that were selected. A mixture of experts multiplies each expert's output by its gate, a sparse autoencoder
    each activation.

    Parameters
    ----------
    x : array
        Scores, as for `softk.topk`.
    k : int
        How many, from 0 to n, the size of `x` along `axis`. A Python number: shapes depend on it.
    axis : int, optional
        The axis along which to select.
    mode : {"largest", "smallest"}, optional
        Which end to select; the largest come in descending order, the smallest in ascending order.
    epsilon : number or array, optional
        Strength of the entropy, in the units of `x`, as for `softk.topk`.

    Returns
    -------
    Selected
        `values`, `indices` and `gates`: ``take_along_axis(x, indices)`` and ``take_along_axis(topk(x, k), indices)``,
        of the dtype and device of `x`. The indices have the library's dtype of indices, int64 in most.

    Raises
    ------
    TypeError, ValueError
        As `softk.topk`; also if `k` is not a Python integer, or there are no scores along `axis`.

    See Also
    --------
    topk : the whole mask; with ``hard=True``, k ones.
    sorted_topk : soft values in order.

    Notes
    -----
    Equal scores come in the order of the library's own top-k. That is the lowest index first in JAX and wherever the
    standard's ``argsort`` is used; NumPy and PyTorch do not say. A score of ``-inf`` has the gate 0, so where fewer
    than k can be selected the last values are ``-inf`` (``+inf`` for the smallest) with the gate 0. A NaN in a slice
    makes its gates NaN; its values are in the order in which the library sorts NaN.

    The gates of a slice sum to less than k, by what the soft mask gives to the other items. That share vanishes for
    ``epsilon -> 0``, and with it the derivative of the gates.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, sections 3.1 and 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> values, indices, gates = softk.select(np.asarray([0.2, 1.7, -0.5, 0.9]), 2, epsilon=0.5)
    >>> values.tolist(), indices.tolist(), gates.round(3).tolist()
    ([1.7, 0.9], [1, 3], [0.99, 0.8])
    """
    slices, call = _masked(selection, x, k, axis, mode, epsilon, None, None)
    require_scores(slices)
    slices.require_sizes()
    rows = whole_number("k", k, 0, slices.n, "the size of x along axis")
    call["options"]["count"] = max(rows, 1)
    values, gates, indices = slices.one_a_row(), slices.one_a_row(in_units=False), slices.index_a_row()
    if rows == 0:
        values, gates, indices = (without_rows(slices, result, 1) for result in (values, gates, indices))
    return Call(
        **call,
        restores=(values, gates, Argument(None), indices),  # the offset is nobody's business
        build=lambda values, gates, indices: Selected(values, indices, gates),
    )
