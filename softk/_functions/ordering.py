"""The public operators that sort scores: the sorted top-k, sort and rank."""

from __future__ import annotations

import math
import numbers
from typing import Any, Generic, NamedTuple

from softk._reference.plan.ranking import soft_rank
from softk._reference.plan.sorting import soft_sort, sorted_plan
from softk.backend import AnyArray, Array, ArrayT

from .arguments import Slices, require_scores
from .call import Argument, Call, operator_from
from .checks import Mode, check_flag, check_mode, check_temperature
from .signatures import plain_tuple


@plain_tuple
class SortedTopK(NamedTuple, Generic[ArrayT]):
    """The result of `softk.sorted_topk`.

    Attributes
    ----------
    values : array
        The k largest (smallest) scores in order: the shape of `x` with k in place of n.
    assignment : array
        The share of each score in each value: the shape of `x` with two axes (k, n) in place of n.
    """

    values: ArrayT
    assignment: ArrayT


def _ladder(slices: Slices, epsilon: Any, where: Any, weights: Any, rows: int, unit: float) -> dict[str, Any]:
    """The parts of a `Call` whose primitive has `rows` anchors of mass `unit`, which is also their distance."""
    slices.require_sizes()
    check_temperature(slices.xp, epsilon, slices.working)
    with slices.backend.quiet():
        arguments = {
            "x": slices.scores(),
            "epsilon": slices.per_slice("epsilon", epsilon, scale=0.5 / unit),
            "unit": Argument(slices.per_slice("unit", unit).value),
            "where": slices.kept(where),
            "weights": slices.per_item("weights", weights),
        }
    ranks = None
    # Selection by known ranks is cheaper than sorting only for a few of the largest scores.
    if slices.backend.memory(rows) is not None and 2 * rows <= slices.n and rows <= 64:
        edges = [unit * (row + 1) for row in range(rows)]
        ranks = (*(math.ceil(edge) for edge in edges), *(math.floor(edge) + 1 for edge in edges))
    return {"backend": slices.backend, "arguments": arguments, "options": {"rows": rows, "ranks": ranks}}


@operator_from
def sorted_topk(
    x: ArrayT,
    /,
    k: int,
    *,
    axis: int = -1,
    mode: Mode = "largest",
    epsilon: float | AnyArray = 0.1,
    where: AnyArray | None = None,
) -> Call[SortedTopK[ArrayT]]:
    """Soft top-k in sorted order: the k largest values, and the share of each score in each of them.

    The scores are transported to the anchors k, ..., 1, which take one unit of mass each, and the anchor 0, which takes
    the rest. Row j of the assignment is a soft indicator of the j-th largest score. For distinct scores and
    ``epsilon -> 0`` it is the exact indicator.

    Parameters
    ----------
    x : array
        Scores, as for `softk.topk`. ``+inf`` comes first; ``-inf`` is never selected.
    k : int
        How many scores to select, from 0 to n, the size of `x` along `axis`. It must be a Python integer, because the
        shapes of the results depend on it.
    axis : int, optional
        The axis along which to select.
    mode : {"largest", "smallest"}, optional
        Whether to select the largest scores, in descending order, or the smallest, in ascending order.
    epsilon : number or array, optional
        Strength of the entropy, in the units of `x`, as for `softk.topk`.
    where : array of bool, optional
        Items to choose from, broadcasting to the shape of `x`.

    Returns
    -------
    SortedTopK
        `values`, which are ``assignment @ x``, and `assignment`. Both have the dtype and device of `x`. The rows of the
        assignment sum to 1 and its columns to at most 1. If there are fewer than k items to select, the last rows are
        zero, and their values are ``-inf`` (``+inf`` for the smallest).

    Raises
    ------
    TypeError, ValueError
        As `softk.topk`; also if `k` is not a Python integer, or there are no scores along `axis`.

    Notes
    -----
    The sum over the rows is not the mask of `softk.topk`, except for k = 1 and in the limit ``epsilon -> 0``. Time and
    memory are O(n k). Each Newton step and each derivative solves one system of k equations.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section 3.3, sorted top-k.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> values, assignment = softk.sorted_topk(np.asarray([0.2, 1.7, -0.5, 0.9]), 2, epsilon=0.1)
    >>> values.round(3).tolist()
    [1.7, 0.9]
    >>> assignment.round(3).tolist()
    [[0.0, 1.0, 0.0, 0.0], [0.001, 0.0, 0.0, 0.999]]
    """
    slices = Slices(x, axis, smallest=check_mode(mode), epsilon=epsilon, where=where)
    require_scores(slices)
    rows = whole_number("k", k, 0, slices.n, "the size of x along axis")
    call = _ladder(slices, epsilon, where, None, max(rows, 1), 1.0)
    values, assignment = slices.one_per_row(), slices.row_by_item()
    if rows == 0:  # the primitive needs one row at least, so for k = 0 a row is computed and dropped
        values, assignment = without_rows(slices, values, 1), without_rows(slices, assignment, 2)
    return Call(primitive=sorted_plan, restores=(values, assignment), build=SortedTopK, **call)


@operator_from
def sort(
    x: ArrayT,
    /,
    *,
    axis: int = -1,
    descending: bool = False,
    epsilon: float | AnyArray,
    weights: AnyArray | None = None,
    where: AnyArray | None = None,
    num_anchors: int | None = None,
) -> Call[ArrayT]:
    """Soft sort along an axis.

    The scores are transported to n anchors of equal mass, a unit distance apart. Each sorted value is the mean of the
    scores that are transported to its anchor.

    Parameters
    ----------
    x : array
        Scores, as for `softk.topk`.
    axis : int, optional
        The axis along which to sort.
    descending : bool, optional
        Sort the largest score first.
    epsilon : number or array
        Strength of the entropy, in the units of `x`, as for `softk.topk`. It has no default, because sorted values and
        ranks do not show whether it fits the scores. A tenth of their standard deviation is a good start.
    weights : array, optional
        Item weights, at least 0, broadcasting to the shape of `x`: how much of the anchors' mass each score fills. Only
        their ratios matter, because they are divided by their mean. If all are 0, the values are NaN.
    where : array of bool, optional
        Items to sort, broadcasting to the shape of `x`. Anchors that lack items have the value ``+inf``, or ``-inf`` if
        `descending`. They come last. With n anchors there is one for each item that is left out.
    num_anchors : int, optional
        The number of anchors, from 2 to n; n by default. Each has the mass n / num_anchors, and neighboring anchors
        are n / num_anchors apart. The cost is O(n num_anchors). Each value is the mean of n / num_anchors scores.

    Returns
    -------
    array
        The sorted values, with the dtype and device of `x`: its shape with `num_anchors` in place of n.

    Raises
    ------
    TypeError, ValueError
        As `softk.topk`; also without `epsilon`, or if `num_anchors` is out of its range.

    References
    ----------
    Cuturi, Teboul, Vert, "Differentiable Ranking and Sorting using Optimal Transport", NeurIPS 2019, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> softk.sort(np.asarray([0.2, 1.7, -0.5, 0.9]), epsilon=0.1).round(3).tolist()
    [-0.499, 0.2, 0.9, 1.7]
    """
    check_flag("descending", descending)
    slices = Slices(x, axis, smallest=not descending, epsilon=epsilon, weights=weights, where=where)
    call = _anchored(slices, epsilon, where, weights, num_anchors)
    return Call(primitive=soft_sort, restores=(slices.one_per_row(),), **call)


@operator_from
def rank(
    x: ArrayT,
    /,
    *,
    axis: int = -1,
    descending: bool = False,
    epsilon: float | AnyArray,
    weights: AnyArray | None = None,
    where: AnyArray | None = None,
    num_anchors: int | None = None,
) -> Call[ArrayT]:
    """Soft ranks along an axis: 0 for the smallest score, n - 1 for the largest. Tied scores get their mean rank.

    The scores are transported to n anchors 0, ..., n - 1 of equal mass. The rank of a score is the mean of the anchors
    to which it is transported. For distinct scores and ``epsilon -> 0`` it is ``argsort(argsort(x))``.

    Parameters
    ----------
    x, axis, epsilon
        As for `softk.sort`.
    weights : array, optional
        Item weights, at least 0, broadcasting to the shape of `x`: how many ranks each score takes up. They are divided
        by their mean, so that the ranks are still from 0 to n - 1.
    where : array of bool, optional
        Items to rank, broadcasting to the shape of `x`. The items that are left out come after all others. They share
        the mean of the last ranks and have no derivative.
    descending : bool, optional
        Give rank 0 to the largest score.
    num_anchors : int, optional
        The number of anchors, from 2 to n; n by default. With fewer anchors, the ranks of the values of `softk.sort`
        are computed, and those of the scores are interpolated linearly between them. A rank then differs from the one
        by n anchors by a small part of n / num_anchors in the middle of the order. At both ends it differs by at most
        about two thirds of n / num_anchors.

    Returns
    -------
    array
        The ranks, with the shape, dtype and device of `x`.

    Raises
    ------
    TypeError, ValueError
        As `softk.sort`.

    References
    ----------
    Cuturi, Teboul, Vert, "Differentiable Ranking and Sorting using Optimal Transport", NeurIPS 2019, section 3.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> softk.rank(np.asarray([0.2, 1.7, -0.5, 0.9]), epsilon=0.1).round(3).tolist()
    [1.0, 3.0, 0.001, 1.999]
    """
    check_flag("descending", descending)
    slices = Slices(x, axis, smallest=not descending, epsilon=epsilon, weights=weights, where=where)
    call = _anchored(slices, epsilon, where, weights, num_anchors)
    return Call(primitive=soft_rank, restores=(slices.like_scores(),), **call)


def _anchored(slices: Slices, epsilon: Any, where: Any, weights: Any, num_anchors: int | None) -> dict[str, Any]:
    require_scores(slices)
    n = slices.n
    rows = (
        n if num_anchors is None else whole_number("num_anchors", num_anchors, min(2, n), n, "the size of x along axis")
    )
    return _ladder(slices, epsilon, where, weights, rows, n / rows)


def without_rows(slices: Slices, result: Argument, axes: int) -> Argument:
    """The result without its one row. The row is the first of the last `axes` axes."""
    no_rows = (..., slice(0, 0), *(slice(None),) * (axes - 1))

    def pull(cotangent: Array) -> Array:
        shape = (*cotangent.shape[:-axes], 1, *cotangent.shape[cotangent.ndim - axes + 1 :])
        return slices.xp.zeros(shape, dtype=slices.working, device=slices.device)

    return result.through(lambda values: values[no_rows], pull)


def whole_number(name: str, value: Any, least: int, most: int, most_is: str) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a Python integer, because shapes depend on it, got {value!r}")
    if not least <= int(value) <= most:
        raise ValueError(f"{name} must be from {least} to {most}, {most_is}, got {value!r}")
    return int(value)
