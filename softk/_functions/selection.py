"""The hard top-k with soft gates as a public function."""

from __future__ import annotations

from typing import Generic, NamedTuple

from softk._reference.threshold.selection import selection
from softk.backend import AnyArray, ArrayT

from .arguments import require_scores
from .call import Argument, Call, operator_from
from .checks import Mode
from .masks import _masked
from .ordering import whole_number, without_rows
from .signatures import plain_tuple


@plain_tuple
class Selected(NamedTuple, Generic[ArrayT]):
    """The k largest (smallest) scores, their indices, and their entries of the soft mask.

    All three have the shape of `x` with k in the place of n.

    Attributes
    ----------
    values : array
        The scores in order. Their derivative is that of a gather.
    indices : array
        Their indices along the axis: integers, without a derivative.
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

    The selection is the library's own top-k: exactly k items, so a model computes nothing for the others. The gates are
    the entries of the soft mask at the selected items. They depend on all scores: the score of an item that was just
    missed has a gradient too. A mixture of experts multiplies the output of each selected expert by its gate, a sparse
    autoencoder each selected activation.

    Parameters
    ----------
    x : array
        Scores, as for `softk.topk`.
    k : int
        How many, from 0 to n, the size of `x` along `axis`. A Python integer, because shapes depend on it.
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
    Equal scores come in the order of the library's own top-k. In JAX, and where the standard's ``argsort`` is used, the
    lowest index comes first. NumPy and PyTorch do not specify the order. A score of ``-inf`` has the gate 0, so where
    fewer than k can be selected the last values are ``-inf`` (``+inf`` for the smallest) with the gate 0. A NaN in a
    slice makes its gates NaN; its values are in the order in which the library sorts NaN.

    The gates of a slice sum to less than k: the rest of the soft mask belongs to the other items. That rest vanishes
    for ``epsilon -> 0``, and so does the derivative of the gates.

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
    slices, call = _masked(selection, x, k, axis, mode, epsilon, None, None, joint=False)
    require_scores(slices)
    slices.require_sizes()
    rows = whole_number("k", k, 0, slices.n, "the size of x along axis")
    call["options"]["count"] = max(rows, 1)
    values, gates, indices = slices.one_per_row(), slices.one_per_row(in_units=False), slices.index_per_row()
    if rows == 0:
        values, gates, indices = (without_rows(slices, result, 1) for result in (values, gates, indices))
    return Call(
        **call,
        restores=(values, gates, Argument(None), indices),  # the offset is no result
        build=lambda values, gates, indices: Selected(values, indices, gates),
    )
