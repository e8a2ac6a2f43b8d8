"""The public mask and threshold operators. Each converts its arguments and names the primitive that computes it."""

from __future__ import annotations

from typing import Any, ParamSpec, TypeVar

from softk._reference.threshold import masks as primitives
from softk._reference.threshold.quantile import quantile as quantile_primitive
from softk.backend import AnyArray, ArrayT, Primitive, backend_of, is_array

from .arguments import Slices, require_scores, static_ranks
from .call import Call, operator_from
from .checks import (
    Mode,
    check_flag,
    check_mass,
    check_mode,
    check_temperature,
    counted_number,
    is_number,
    require_whole,
)
from .segments import topk_of_ragged

P = ParamSpec("P")
R = TypeVar("R")


def _masked(
    primitive: Primitive,
    x: Any,
    k: Any,
    axis: Any,
    mode: Mode,
    epsilon: Any,
    weights: Any,
    where: Any,
    *,
    joint: bool = True,
) -> tuple[Slices, dict[str, Any]]:
    """The arguments that the mask and threshold operators share, checked and in canonical form.

    `joint` says whether `axis` may be a tuple.
    """
    smallest = check_mode(mode)
    slices = Slices(x, axis, smallest=smallest, joint=joint, k=k, epsilon=epsilon, weights=weights, where=where)
    k = check_mass(slices.xp, k, slices.n, slices.working, weights is not None)
    check_temperature(slices.xp, epsilon, slices.working)
    # The hard mask counts in integers, so its k is not rounded to the working dtype.
    bits = 64 if primitive is primitives.hard_mask else slices.xp.finfo(slices.working).bits
    with slices.backend.quiet():
        arguments = {
            "x": slices.scores(narrow=primitive.narrow),
            "k": slices.mass(k, weights),
            "epsilon": slices.per_slice("epsilon", epsilon, scale=0.5),
            "weights": slices.per_item("weights", weights),
            "where": slices.kept(where),
        }
        if weights is not None:
            arguments["k"] = slices.mass_of_all(arguments["k"], x, arguments["weights"], arguments["where"])
    options = {"ranks": None if weights is not None else static_ranks(slices.backend, k, bits)}
    return slices, {"backend": slices.backend, "primitive": primitive, "options": options, "arguments": arguments}


@operator_from
def topk(
    x: ArrayT,
    /,
    k: float | AnyArray,
    *,
    axis: int | tuple[int, ...] = -1,
    mode: Mode = "largest",
    epsilon: float | AnyArray = 0.1,
    weights: AnyArray | None = None,
    where: AnyArray | None = None,
    hard: bool = False,
) -> Call[ArrayT]:
    """Soft indicator of the k largest scores along an axis, with useful gradients.

    The mask is the exact solution of the entropic optimal transport problem between the scores and the anchors 0
    and 1: ``mask = sigmoid((x - t) / (epsilon / 2))``, with one threshold ``t`` per slice at which the mask sums to
    `k`. For ``epsilon -> 0`` it is the ordinary top-k indicator.

    Parameters
    ----------
    x : array
        Scores, of any shape with at least one axis, real floating-point. ``-inf`` is never selected, ``+inf`` always
        (if there are more than `k`, they share `k` equally). A NaN makes the mask of its slice NaN. float16 and
        bfloat16 are computed in float32. A nested tensor of PyTorch with the layout ``torch.jagged`` is selected from
        along its ragged axis, as by `softk.segment_topk`.
    k : number or array
        How many scores to select, from 0 to n, the size of `x` along `axis`. It may be fractional. An array has one
        value per slice: it broadcasts against `x` with size 1 along `axis`.
    axis : int or tuple of int, optional
        The axis along which to select. A tuple selects from all scores along its axes together: `k` is then at most
        the product of their sizes, and an array of one value per slice has size 1 along all of them. Slices are
        independent of each other.
    mode : {"largest", "smallest"}, optional
        Whether to select the largest or the smallest scores.
    epsilon : number or array, optional
        Strength of the entropy, in the units of `x`. Positive. The mask separates scores that differ by much more than
        `epsilon`; closer scores share the mass. An array has one value per slice, as for `k`.
    weights : array, optional
        Item weights, at least 0, broadcasting to the shape of `x`: then ``sum(weights * mask) = k`` and `k` may be
        as large as their sum. An item of weight 0 gets a mask value but does not affect the threshold. The weight of an
        item that is removed, or has the score ``-inf``, may be any number or NaN. It does not affect the mask: a finite
        one only counts in the sum that `k` may not exceed.
    where : array of bool, optional
        Items to choose from, broadcasting to the shape of `x`. The others are removed: they have mask 0 and gradient 0
        for any score. If fewer than `k` remain, all of them are selected.
    hard : bool, optional
        Return the exact indicator of the k largest scores (ties go to the lowest index), with the derivative of the
        soft mask. `k` must be a whole number, and `weights` are not supported.

    Returns
    -------
    array
        The mask, with the shape, dtype and device of `x`. Its values are in [0, 1] and sum to `k` along `axis`.

    Raises
    ------
    TypeError
        If an argument is not an array (or number) of the right kind, or is of another library or device than `x`.
    ValueError
        If a number, `axis`, `mode` or a shape is out of its range. Values in arrays never raise: an invalid value makes
        its slice NaN.

    Notes
    -----
    Derivatives flow to `x`, `k`, `epsilon` and `weights`: natively if the framework has autodiff, and through
    `softk.vjp` and `softk.jvp` on every other array. For k = 1 the mask is not a softmax (for more than two scores).
    For other k it is not k times a softmax, which can exceed 1.

    References
    ----------
    Xie, Dai, Chen, Dai, Zhao, Zha, Wei, Pfister, "Differentiable Top-k with Optimal Transport", NeurIPS 2020:
    equation (4) is the transport problem, section 3.1 the two anchors, section 3.2 the derivative by implicit
    differentiation. The threshold is solved for directly instead of by Sinkhorn's iteration.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> mask = softk.topk(np.asarray([0.2, 1.7, -0.5, 0.9]), 2, epsilon=0.5)
    >>> mask.round(3).tolist()
    [0.196, 0.99, 0.015, 0.8]
    >>> float(mask.sum().round(9))
    2.0

    One budget for a whole batch:

    >>> x = np.asarray([[0.2, 1.7], [-0.5, 0.9]])
    >>> softk.topk(x, 2, axis=(0, 1), epsilon=0.5).round(3).tolist()
    [[0.196, 0.99], [0.015, 0.8]]
    """
    check_flag("hard", hard)
    rows = backend_of(x).ragged(x) if is_array(x) else None
    if rows is not None:
        return topk_of_ragged(x, rows, k, axis, epsilon, weights, where, mode=mode, hard=hard)  # type: ignore[no-any-return]
    primitive = primitives.hard_mask if hard else primitives.mask
    slices, call = _masked(primitive, x, k, axis, mode, epsilon, weights, where)
    if slices.n == 0:  # an empty slice has no threshold
        call |= {"primitive": primitives.empty_mask, "options": {}}
    counted = call["arguments"]["k"].given
    if hard:
        require_whole(counted, weights, k)
    if hard and slices.n and weights is None:
        call["arguments"] |= slices.whole_mass(counted)
    return Call(**call, restores=(slices.like_scores(narrow=True),))


@operator_from
def log_topk(
    x: ArrayT,
    /,
    k: float | AnyArray,
    *,
    axis: int | tuple[int, ...] = -1,
    mode: Mode = "largest",
    epsilon: float | AnyArray = 0.1,
    weights: AnyArray | None = None,
    where: AnyArray | None = None,
) -> Call[ArrayT]:
    """Logarithm of the mask of `softk.topk`, accurate where the mask underflows or rounds to 1.

    Use it in a cross-entropy: ``-sum(target * log_topk(x, k))`` has a useful gradient even if the mask underflows at a
    target item.

    Parameters
    ----------
    x, k, axis, mode, epsilon, weights, where
        As for `softk.topk`.

    Returns
    -------
    array
        ``log(topk(x, k))``, at most 0, with the shape, dtype and device of `x`. It is ``-inf`` for items that are never
        selected.

    Raises
    ------
    TypeError, ValueError
        As `softk.topk`.

    Notes
    -----
    ``log(1 - topk(x, k))``, the logarithm of the complement, is ``log_topk(x, n - k, mode="smallest")``.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, sections 3.1 and 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> softk.log_topk(np.asarray([0.0, 1.0, 500.0, 501.0]), 2, epsilon=0.5).round(3).tolist()
    [-1002.0, -998.0, 0.0, 0.0]
    """
    slices, call = _masked(primitives.log_mask, x, k, axis, mode, epsilon, weights, where)
    if slices.n == 0:
        call |= {"primitive": primitives.empty_mask, "options": {}}
    return Call(**call, restores=(slices.like_scores(narrow=True),))


@operator_from
def threshold(
    x: ArrayT,
    /,
    k: float | AnyArray,
    *,
    axis: int | tuple[int, ...] = -1,
    mode: Mode = "largest",
    epsilon: float | AnyArray = 0.1,
    weights: AnyArray | None = None,
    where: AnyArray | None = None,
    keepdims: bool = False,
) -> Call[ArrayT]:
    """The level that separates the k largest scores along an axis: there the mask of `topk` is one half.

    Parameters
    ----------
    x, k, axis, mode, epsilon, weights, where
        As for `softk.topk`.
    keepdims : bool, optional
        Keep the selected axes, with size 1.

    Returns
    -------
    array
        The threshold of each slice, in the units, dtype and device of `x`: the shape of `x` without `axis`. It is +inf
        for k = 0 and -inf if everything is selected. The signs are reversed with ``mode="smallest"``.

    Raises
    ------
    TypeError, ValueError
        As `softk.topk`; also if there are no scores along `axis`.

    Notes
    -----
    It has the default epsilon of `softk.topk`, so that both calls agree. With an epsilon far above the differences of
    the scores it lies outside their range.

    For ``epsilon -> 0`` and a whole k it is the midpoint between the k-th and the next score. Its derivative with
    respect to the scores is ``p = softmax(log v)`` with ``v = mask * (1 - mask)``: positive numbers that sum to 1 and
    are largest for the scores near the threshold.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section 3.1: the threshold is the
    difference of the two dual potentials.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> t = softk.threshold(np.asarray([0.2, 1.7, -0.5, 0.9]), 2, epsilon=0.01)
    >>> float(t.round(6))
    0.55
    """
    check_flag("keepdims", keepdims)
    slices, call = _masked(primitives.threshold, x, k, axis, mode, epsilon, weights, where)
    require_scores(slices)
    return Call(**call, restores=(slices.one_per_slice(keepdims),))


@operator_from
def quantile(
    x: ArrayT,
    /,
    q: float | AnyArray,
    *,
    axis: int | tuple[int, ...] = -1,
    epsilon: float | AnyArray,
    weights: AnyArray | None = None,
    where: AnyArray | None = None,
    keepdims: bool = False,
) -> Call[ArrayT]:
    """Soft quantile along an axis: NumPy's default quantile with soft order statistics.

    The j-th smallest of n scores (j from 0) becomes the threshold at k = n - j - 1/2, halfway between two counts.
    Between two of these thresholds the quantile is interpolated linearly. For ``epsilon -> 0`` it is
    ``numpy.quantile``.

    Parameters
    ----------
    x : array
        Scores, as for `softk.topk`.
    q : number or array
        Probabilities, from 0 to 1. The axes of an array come first in the result, as in NumPy.
    axis
        As for `softk.topk`.
    epsilon : number or array
        Strength of the entropy, in the units of `x`, as for `softk.topk`. It has no default, because a quantile does
        not show whether it fits the scores. A tenth of their standard deviation is a good start.
    weights : array, optional
        Frequencies, at least 0, broadcasting to the shape of `x`: how many observations each item stands for. Their sum
        replaces n. The quantile of several items whose frequencies sum to at most 1 is NaN. See the notes for weights
        that are probabilities.
    where : array of bool, optional
        Items to include, broadcasting to the shape of `x`.
    keepdims : bool, optional
        Keep the selected axes, with size 1.

    Returns
    -------
    array
        The quantiles, in the units, dtype and device of `x`: the shape of `q`, then the shape of `x` without `axis`.

    Raises
    ------
    TypeError, ValueError
        As `softk.topk`; also without `epsilon`, or if there are no scores along `axis`.

    Notes
    -----
    A soft quantile may lie outside the range of the data: it is a threshold, not a convex combination of the scores.
    Without weights, the quantile for q = 1 is never below the largest score, since the mask of `softk.topk` sums to one
    half there. All soft quantiles lie between ``min(x) - d`` and ``max(x) + d`` with
    ``d = epsilon / 2 * log(2 n - 1)``. Both bounds are attained if all scores are equal.

    Weights can be interpreted in two ways. Here they are frequencies: doubling all of them doubles the sample, and
    whole weights are equivalent to repeated items. In ``numpy.quantile(x, q, weights=w, method="inverted_cdf")`` they
    are probabilities up to a factor. That quantile is the level above which a share ``1 - q`` of the weight lies. Its
    soft counterpart is ``softk.threshold(x, (1 - q) * w.sum(), weights=w)`` for q between 0 and 1. To turn
    probabilities into frequencies, multiply them by the number of observations; the larger that is, the closer the two
    quantiles are.

    References
    ----------
    Hyndman and Fan, "Sample Quantiles in Statistical Packages", The American Statistician 1996, definition 7, with
    the soft order statistics of Xie et al., NeurIPS 2020.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> softk.quantile(np.linspace(0, 10, 11), np.asarray([0.1, 0.5, 0.75]), epsilon=0.01).round(6).tolist()
    [1.0, 5.0, 7.5]

    Probabilities, first as the frequencies of ten observations, then as the level above which 75 % of the weight lies:

    >>> x, w = np.asarray([1.0, 2.0, 3.0, 4.0]), np.asarray([0.1, 0.2, 0.3, 0.4])
    >>> float(softk.quantile(x, 0.25, epsilon=0.01, weights=10 * w).round(2))
    2.25
    >>> float(softk.threshold(x, 0.75 * w.sum(), epsilon=0.01, weights=w).round(2))
    2.01
    """
    check_flag("keepdims", keepdims)
    slices = Slices(x, axis, joint=True, q=q, epsilon=epsilon, weights=weights, where=where)
    require_scores(slices)
    if is_number(q):
        number = counted_number(q, 1, float(slices.xp.finfo(slices.working).eps))
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"q must be from 0 to 1, got {q!r}")
        q = number
    check_temperature(slices.xp, epsilon, slices.working)
    with slices.backend.quiet():
        probability = slices.probabilities(q)
        arguments = {
            "x": slices.scores(leading=probability.leading),
            "q": probability.argument,
            "epsilon": slices.per_slice("epsilon", epsilon, scale=0.5).lead(slices.xp, probability.leading),
            "weights": slices.summed_to_one(slices.per_item("weights", weights)).lead(slices.xp, probability.leading),
            "where": slices.kept(where).lead(slices.xp, probability.leading),
        }
    restore = slices.one_per_slice(keepdims, leading=len(probability.leading))
    return Call(slices.backend, quantile_primitive, {}, arguments, (restore,))
