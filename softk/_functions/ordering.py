"""The public operators that put scores in order: the sorted top-k, sort and rank."""

from __future__ import annotations

import math
import numbers
from typing import Any, Generic, NamedTuple

from softk._reference.plan.sorting import soft_rank, sorted_plan
from softk.backend import AnyArray, Array, ArrayT

from .arguments import Slices, require_scores
from .call import Argument, Call, operator_from
from .checks import check_flag, check_mode, check_temperature
from .masks import Mode
from .signatures import plain_tuple


@plain_tuple
class SortedTopK(NamedTuple, Generic[ArrayT]):
    """The soft twin of a library's top-k.

    Attributes
    ----------
    values : array
        The k largest (smallest) scores in order: the shape of `x` with k in the place of n.
    assignment : array
        Which scores they are made of: the shape of `x` with two axes (k, n) in the place of n.
    """

    values: ArrayT
    assignment: ArrayT


def _ladder(slices: Slices, epsilon: Any, where: Any, rows: int, unit: float, step: float) -> dict[str, Any]:
    """The call of a primitive with `rows` anchors of mass `unit` at the distance `step`."""
    slices.require_sizes()
    check_temperature(slices.xp, epsilon, slices.working)
    with slices.backend.quiet():
        arguments = {
            "x": slices.scores(),
            "epsilon": slices.per_slice("epsilon", epsilon, scale=0.5 / step),
            "unit": Argument(slices.per_slice("unit", unit).value),
            "where": slices.kept(where),
        }
    ranks = None
    if slices.backend.memory(rows) is not None and 2 * rows <= slices.n and rows <= 64:  # else sorting is no dearer
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
    """Soft top-k in order: the k largest values, and which scores each of them is made of.

    The scores are transported to the anchors k, ..., 1, which take one unit each, and 0, which takes the rest. Row j of
    the assignment is a soft indicator of the j-th largest score; for distinct scores and ``epsilon -> 0`` it is the
    hard one.

    Parameters
    ----------
    x : array
        Scores, as for `softk.topk`. ``+inf`` come first, ``-inf`` never.
    k : int
        How many, from 0 to n, the size of `x` along `axis`. A Python number: shapes depend on it.
    axis : int, optional
        The axis along which to select.
    mode : {"largest", "smallest"}, optional
        Which end to select; the smallest come in ascending order.
    epsilon : number or array, optional
        Strength of the entropy, in the units of `x`, as for `softk.topk`.
    where : array of bool, optional
        Items to choose from, broadcasting to the shape of `x`.

    Returns
    -------
    SortedTopK
        `values`, ``assignment @ x``, and `assignment`, whose rows sum to 1 and whose columns to at most 1, both of the
        dtype and device of `x`. Rows for which no items are left are zero, and their values ``-inf`` (``+inf`` for the
        smallest).

    Raises
    ------
    TypeError, ValueError
        As `softk.topk`; also if `k` is not a Python integer, or there are no scores along `axis`.

    Notes
    -----
    The sum of the rows is not the mask of `softk.topk`, except for k = 1 and in the limit. Time and memory are
    O(n k), and one system of k equations is solved for each Newton step and each derivative.

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
    call = _ladder(slices, epsilon, where, max(rows, 1), 1.0, 1.0)
    values, assignment = slices.one_a_row(), slices.row_by_item()
    if rows == 0:
        values, assignment = without_rows(slices, values, 1), without_rows(slices, assignment, 2)
    return Call(primitive=sorted_plan, restores=(values, assignment), build=SortedTopK, **call)


@operator_from
def sort(
    x: ArrayT,
    /,
    *,
    axis: int = -1,
    descending: bool = False,
    epsilon: float | AnyArray = 0.1,
    num_anchors: int | None = None,
) -> Call[ArrayT]:
    """Soft sort along an axis.

    The scores are transported to n anchors at unit distance, of equal mass; each sorted value is the mean of the scores
    that its anchor takes.

    Parameters
    ----------
    x : array
        Scores, as for `softk.topk`.
    axis : int, optional
        The axis along which to sort.
    descending : bool, optional
        The largest first.
    epsilon : number or array, optional
        Strength of the entropy, in the units of `x`, as for `softk.topk`.
    num_anchors : int, optional
        How many anchors, evenly over 0 ... n - 1, from 2 to n. Fewer than n cost less, O(n num_anchors), and each takes
        the mean of n / num_anchors scores.

    Returns
    -------
    array
        The sorted values, of the dtype and device of `x`: its shape, with `num_anchors` in the place of n.

    Raises
    ------
    TypeError, ValueError
        As `softk.topk`; also if `num_anchors` is out of its range.

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
    slices = Slices(x, axis, smallest=not descending, epsilon=epsilon)
    call = _anchored(slices, epsilon, num_anchors)
    return Call(primitive=sorted_plan, restores=(slices.one_a_row(),), **call)


@operator_from
def rank(
    x: ArrayT,
    /,
    *,
    axis: int = -1,
    descending: bool = False,
    epsilon: float | AnyArray = 0.1,
    num_anchors: int | None = None,
) -> Call[ArrayT]:
    """Soft ranks along an axis: 0 for the smallest score, n - 1 for the largest; ties share their mean.

    The scores are transported to n anchors 0, ..., n - 1 of equal mass; the rank of a score is the mean of the anchors
    that it goes to. For ``epsilon -> 0`` it is ``argsort(argsort(x))``.

    Parameters
    ----------
    x, axis, epsilon, num_anchors
        As for `softk.sort`.
    descending : bool, optional
        0 for the largest.

    Returns
    -------
    array
        The ranks, of the shape, dtype and device of `x`.

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
    slices = Slices(x, axis, smallest=not descending, epsilon=epsilon)
    call = _anchored(slices, epsilon, num_anchors)
    return Call(primitive=soft_rank, restores=(slices.like_scores(),), **call)


def _anchored(slices: Slices, epsilon: Any, num_anchors: int | None) -> dict[str, Any]:
    require_scores(slices)
    n = slices.n
    rows = n if num_anchors is None else whole_number("num_anchors", num_anchors, min(2, n), n, "the size of x")
    return _ladder(slices, epsilon, None, rows, n / rows, (n - 1) / (rows - 1) if rows > 1 else 1.0)


def without_rows(slices: Slices, result: Argument, axes: int) -> Argument:
    """None of the one row that was computed."""
    here = (..., slice(0, 0), *(slice(None),) * (axes - 1))

    def pull(cotangent: Array) -> Array:
        shape = (*cotangent.shape[:-axes], 1, *cotangent.shape[cotangent.ndim - axes + 1 :])
        return slices.xp.zeros(shape, dtype=slices.working, device=slices.device)

    return result.through(lambda values: values[here], pull)


def whole_number(name: str, value: Any, least: int, most: int, most_is: str) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a Python integer, on which shapes may depend, got {value!r}")
    if not least <= int(value) <= most:
        raise ValueError(f"{name} must be from {least} to {most}, {most_is}, got {value!r}")
    return int(value)
