"""Ranking metrics of scored lists, and a top-k cross-entropy, that are smooth functions of the scores.

A list is a slice of the scores along an axis. Its metric is that of the hard ranking, with softk's mask, ranks or
permutation in place of the hard ones. As ``epsilon -> 0`` it becomes the hard metric. A list depends on itself alone,
and items that `where` removes change nothing.

All functions are compositions of array operations and softk's operators. A framework with autodiff differentiates them
natively. `softk.vjp` and `softk.jvp` do not support them, so on a library without autodiff they have no derivative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from typing import Any, Literal

from ._functions.arguments import Slices, require_scores
from ._functions.checks import (
    Reduction,
    at_most,
    check_count,
    check_flag,
    check_reduction,
    is_number,
    kind_of,
    require_array,
)
from ._functions.masks import log_topk, topk
from ._functions.ordering import rank, sorted_topk
from ._functions.shapes import cast, fits
from ._functions.signatures import explained
from .backend import AnyArray, ArrayT, index_dtype

__all__ = ["average_precision", "cross_entropy", "ndcg", "precision", "recall", "reciprocal_rank", "spearman"]


class _Lists(Slices):
    """The scored lists in canonical form: items along the last axis, float32 at least."""

    def __init__(self, scores: Any, axis: Any, epsilon: Any, where: Any, reduction: Any, **others: Any) -> None:
        for name, value in others.items():
            if name != "k":
                require_array(name, value)
        super().__init__(scores, axis, called="scores", epsilon=epsilon, where=where, **others)
        require_scores(self)
        check_reduction(reduction)
        self.reduction = reduction
        with self.backend.quiet():
            self.x: Any = self.scores().of(scores).value
            self.epsilon: Any = epsilon if is_number(epsilon) else self.per_slice("epsilon", epsilon).value
            self.where: Any = self.kept(where).value

    def only(self, kept: Any) -> Any:
        """The items of a condition that `where` has not removed."""
        return kept if self.where is None else kept & self.where

    def items(self, name: str, values: Any) -> Any:
        """One number per item. Removed items have 0."""
        if self.xp.isdtype(values.dtype, "bool"):
            values = cast(self.xp, values, self.working)
        values = self.per_item(name, values).value
        return values if self.where is None else self.xp.where(self.where, values, 0.0)

    def relevant(self, relevance: Any) -> tuple[Any, Any, Any]:
        """Which items are relevant and can be ranked, the number of relevant items, and the valid lists."""
        values = self.items("relevance", relevance)
        relevant = values > 0.0
        count = self.xp.sum(cast(self.xp, relevant, self.working), axis=-1)
        return relevant & (self.x > -math.inf), _safe(self.xp, count), self.all_valid(values)

    def all_valid(self, values: Any) -> Any:
        """The lists whose items have finite numbers of at least 0."""
        return self.xp.all((values >= 0.0) & (values < math.inf), axis=-1)

    def masses(self, k: Any) -> list[Any]:
        """Each of the given k, as a number or an array of one value per list."""
        values = list(k) if isinstance(k, tuple) else [k]
        if not values:
            raise ValueError(f"k must have at least one number, got {k!r}")
        for value in values:
            if isinstance(k, tuple) and not is_number(value):
                raise TypeError(f"k must be a number, an array, or a tuple of numbers, got {k!r}")
            if is_number(value) and not value > 0:
                raise ValueError(f"k must be above 0, got {k!r}")
        return [value if is_number(value) else self.per_slice("k", value).value for value in values]

    def mask(self, k: Any) -> Any:
        return topk(self.x, at_most(self.xp, k, self.n), epsilon=self.epsilon, where=self.where)

    def ranks(self, kept: Any = None) -> Any:
        """Soft ranks from 1, the rank of the best, among the items of a condition. Other items come last."""
        kept = self.where if kept is None else kept
        x = self.x if kept is None else self.xp.where(kept, self.x, -math.inf)
        return 1.0 + rank(x, descending=True, epsilon=self.epsilon)

    def result(self, values: Any, valid: Any) -> Any:
        """One value per list, NaN for invalid lists, reduced over the lists."""
        xp = self.xp
        values = xp.where(valid, values, math.nan)
        if self.reduction != "none" and values.ndim:
            values = xp.mean(values) if self.reduction == "mean" else xp.sum(values)
        return cast(xp, values, self.dtype)

    def results(self, k: Any, values: list[Any], valid: Any) -> Any:
        """The result for one k, or for each of several along a first axis."""
        found = [self.result(value, valid) for value in values]
        return self.xp.stack(found, axis=0) if isinstance(k, tuple) else found[0]


def _safe(xp: Any, total: Any) -> Any:
    """A denominator. A list without anything to divide by has a numerator of 0, and gets 1."""
    return xp.where(total > 0.0, total, 1.0)


@explained
def ndcg(
    scores: ArrayT,
    relevance: AnyArray,
    /,
    *,
    k: int | None = None,
    axis: int = -1,
    epsilon: float | AnyArray = 0.1,
    where: AnyArray | None = None,
    gains: Literal["exp2", "linear"] = "exp2",
    reduction: Reduction = "none",
) -> ArrayT:
    """Soft normalized discounted cumulative gain, to be maximized.

    The soft permutation of `softk.sorted_topk` with all n rows takes the place of the hard ranking: rank j has the gain
    ``(assignment @ gain)[j]``, and the discount ``1 / log2(j + 1)``, with ranks from 1. The sum over the first k ranks
    is divided by its largest possible value, that of the items in the order of their gains.

    Parameters
    ----------
    scores : array
        Scores of the items, of any shape with at least one axis, real floating-point. An item of score ``-inf`` is not
        ranked and gains nothing. A NaN makes the value of its list NaN.
    relevance : array
        Relevance of the items, at least 0: bool, integer or real floating-point, broadcasting to the shape of `scores`.
        A negative, infinite or NaN relevance makes the value of its list NaN.
    k : int, optional
        The number of ranks that count, at least 1; all ranks by default, or if it is larger than the list.
    axis : int, optional
        The axis of the items. Lists along it are independent of each other.
    epsilon : number or array, optional
        Strength of the entropy, in the units of `scores`. Positive. Items whose scores differ by much more are ranked
        as in a hard sort; closer items share their ranks. An array has one value per list: it broadcasts against
        `scores` with size 1 along `axis`.
    where : array of bool, optional
        The items of each list, broadcasting to the shape of `scores`. The others are padding and may have any score.
    gains : {"exp2", "linear"}, optional
        The gain of an item, ``2**relevance - 1`` or its relevance.
    reduction : {"none", "mean", "sum"}, optional
        One value per list, or their mean or sum. Lists without relevant items count in the mean.

    Returns
    -------
    array
        The values, with the dtype and device of `scores`: its shape without `axis`, or () for a reduction. They are
        between 0 and 1. A list without relevant items has the value 0 and no gradient.

    Raises
    ------
    TypeError
        If an argument is not an array (or number) of the right kind, or is of another library or device than `scores`.
    ValueError
        If a number, a word or a shape is out of its range. Values in arrays never raise: an invalid value makes its
        list NaN.

    Notes
    -----
    Derivatives flow to `scores`, `epsilon` and a real floating-point `relevance`. float16 and bfloat16 are computed in
    float32. The (n, n) permutation of each list is held in memory.

    The permutation is doubly stochastic to rounding. NeuralNDCG rescales an approximate permutation by up to 50
    iterations of Sinkhorn's algorithm. Both are equal, with its temperature as `epsilon`, once these have converged.

    References
    ----------
    Pobrotyn and Białobrzeski, "NeuralNDCG: Direct Optimisation of a Ranking Metric via Differentiable Relaxation of
    Sorting", arXiv:2102.07831, 2021, equation (9). Järvelin and Kekäläinen, "Cumulated Gain-Based Evaluation of IR
    Techniques", ACM TOIS 2002, for the metric.

    Examples
    --------
    >>> import numpy as np
    >>> from softk import losses
    >>> scores, relevance = np.asarray([0.2, 1.7, -0.5, 0.9]), np.asarray([0, 1, 0, 2])
    >>> [float(losses.ndcg(scores, relevance, epsilon=epsilon).round(3)) for epsilon in (1.0, 0.1, 0.01)]
    [0.814, 0.797, 0.797]
    >>> float(losses.ndcg(scores, relevance, k=1, epsilon=0.01).round(3))
    0.333
    """
    if k is not None:
        k = check_count("k", k)
    if not isinstance(gains, str) or gains not in ("exp2", "linear"):
        raise ValueError(f"gains must be 'exp2' or 'linear', got {gains!r}")
    lists = _Lists(scores, axis, epsilon, where, reduction, relevance=relevance)
    xp, n = lists.xp, lists.n
    rows = n if k is None or k > n else k
    with lists.backend.quiet(scores):
        values = lists.items("relevance", relevance)
        gain = values if gains == "linear" else 2.0**values - 1.0
        place = xp.arange(rows, dtype=lists.working, device=lists.backend.device(scores))
        discount = xp.reshape(1.0 / xp.log2(place + 2.0), (*(1,) * len(lists.batch), rows))
        plan = sorted_topk(lists.x, n, epsilon=lists.epsilon, where=lists.where).assignment[..., :rows, :]
        found = xp.sum(xp.matmul(plan, xp.expand_dims(gain, axis=-1))[..., 0] * discount, axis=-1)
        ideal = xp.sum(-xp.sort(-gain, axis=-1)[..., :rows] * discount, axis=-1)
        result: ArrayT = lists.result(found / _safe(xp, ideal), lists.all_valid(values))
    return result


@explained
def recall(
    scores: ArrayT,
    relevance: AnyArray,
    /,
    k: float | AnyArray | tuple[float, ...],
    *,
    axis: int = -1,
    epsilon: float | AnyArray = 0.1,
    where: AnyArray | None = None,
    reduction: Reduction = "none",
) -> ArrayT:
    """Soft recall: the share of the relevant items that is among the k best, to be maximized.

    It is ``sum(topk(scores, k) * relevant) / sum(relevant)``.

    Parameters
    ----------
    scores, axis, epsilon, where, reduction
        As for `ndcg`.
    relevance : array
        As for `ndcg`. Items with a relevance above 0 are relevant, all to the same degree.
    k : number, array, or tuple of numbers
        How many items are selected, above 0 and possibly fractional. A k above the number of items selects all. An
        array has one value per list, as for `softk.topk`. A tuple of numbers gives one result for each of them.

    Returns
    -------
    array
        As for `ndcg`. For several k, the first axis of the result is theirs.

    Raises
    ------
    TypeError, ValueError
        As `ndcg`; also if `k` is not above 0.

    Notes
    -----
    Derivatives flow to `scores`, `epsilon` and an array `k`. `relevance` has none. Each k takes one solve of O(n).

    References
    ----------
    Patel, Tolias, Matas, "Recall@k Surrogate Loss with Large Batches and Similarity Mixup", CVPR 2022, equation (2)
    for the metric, with the mask of Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from softk import losses
    >>> scores, relevance = np.asarray([0.2, 1.7, -0.5, 0.9]), np.asarray([1, 1, 0, 0])
    >>> float(losses.recall(scores, relevance, 2, epsilon=0.5).round(3))
    0.593
    >>> losses.recall(scores, relevance, (1, 2, 3, 10), epsilon=0.01).tolist()
    [0.5, 0.5, 1.0, 1.0]
    """
    one = 1 if isinstance(k, tuple) else k  # several numbers are checked below
    lists = _Lists(scores, axis, epsilon, where, reduction, relevance=relevance, k=one)
    xp = lists.xp
    masses = lists.masses(k)
    with lists.backend.quiet(scores):
        relevant, count, valid = lists.relevant(relevance)
        hits = cast(xp, relevant, lists.working)
        values = [xp.sum(lists.mask(mass) * hits, axis=-1) / count for mass in masses]
        result: ArrayT = lists.results(k, values, valid)
    return result


@explained
def precision(
    scores: ArrayT,
    relevance: AnyArray,
    /,
    k: float | AnyArray | tuple[float, ...],
    *,
    axis: int = -1,
    epsilon: float | AnyArray = 0.1,
    where: AnyArray | None = None,
    reduction: Reduction = "none",
) -> ArrayT:
    """Soft precision: the share of relevant items among the k best, to be maximized.

    It is ``sum(topk(scores, k) * relevant) / k``. A list of fewer than k items has the value of one that is filled up
    with irrelevant items.

    Parameters
    ----------
    scores, relevance, k, axis, epsilon, where, reduction
        As for `recall`.

    Returns
    -------
    array
        As for `recall`.

    Raises
    ------
    TypeError, ValueError
        As `recall`.

    Notes
    -----
    As for `recall`.

    References
    ----------
    Manning, Raghavan, Schütze, "Introduction to Information Retrieval", 2008, section 8.4, precision at k, with the
    mask of Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from softk import losses
    >>> scores, relevance = np.asarray([0.2, 1.7, -0.5, 0.9]), np.asarray([1, 1, 0, 0])
    >>> losses.precision(scores, relevance, (1, 2, 4, 8), epsilon=0.01).tolist()
    [1.0, 0.5, 0.5, 0.25]
    """
    one = 1 if isinstance(k, tuple) else k  # several numbers are checked below
    lists = _Lists(scores, axis, epsilon, where, reduction, relevance=relevance, k=one)
    xp = lists.xp
    masses = lists.masses(k)
    with lists.backend.quiet(scores):
        relevant, _, valid = lists.relevant(relevance)
        hits = cast(xp, relevant, lists.working)
        values = [xp.sum(lists.mask(mass) * hits / mass, axis=-1) for mass in masses]
        result: ArrayT = lists.results(k, values, valid)
    return result


@explained
def average_precision(
    scores: ArrayT,
    relevance: AnyArray,
    /,
    *,
    axis: int = -1,
    epsilon: float | AnyArray = 0.1,
    where: AnyArray | None = None,
    reduction: Reduction = "none",
) -> ArrayT:
    """Soft average precision: the mean over the relevant items of the precision at their ranks, to be maximized.

    The precision at the rank of a relevant item is its soft rank among the relevant items, divided by its soft rank
    among all items, as by `softk.rank` with ranks from 1.

    Parameters
    ----------
    scores, axis, epsilon, where, reduction
        As for `ndcg`.
    relevance : array
        As for `recall`.

    Returns
    -------
    array
        As for `ndcg`.

    Raises
    ------
    TypeError, ValueError
        As `ndcg`.

    Notes
    -----
    Derivatives flow to `scores` and `epsilon`. Equal scores get their mean rank. scikit-learn gives them the worst one.

    References
    ----------
    Rolínek, Musil, Paulus, Vlastelica, Michaelis, Martius, "Optimizing Rank-Based Metrics with Blackbox
    Differentiation", CVPR 2020, section 3.3, with the soft ranks of Cuturi, Teboul, Vert, "Differentiable Ranking and
    Sorting using Optimal Transport", NeurIPS 2019.

    Examples
    --------
    >>> import numpy as np
    >>> from softk import losses
    >>> scores, relevance = np.asarray([0.2, 1.7, -0.5, 0.9]), np.asarray([1, 1, 0, 0])
    >>> [float(losses.average_precision(scores, relevance, epsilon=epsilon).round(3)) for epsilon in (1.0, 0.01)]
    [0.753, 0.833]
    """
    lists = _Lists(scores, axis, epsilon, where, reduction, relevance=relevance)
    xp = lists.xp
    with lists.backend.quiet(scores):
        relevant, count, valid = lists.relevant(relevance)
        ratio = lists.ranks(relevant) / lists.ranks()
        hits = cast(xp, relevant, lists.working)
        result: ArrayT = lists.result(xp.sum(ratio * hits, axis=-1) / count, valid)
    return result


@explained
def reciprocal_rank(
    scores: ArrayT,
    relevance: AnyArray,
    /,
    *,
    axis: int = -1,
    epsilon: float | AnyArray = 0.1,
    where: AnyArray | None = None,
    reduction: Reduction = "none",
) -> ArrayT:
    """Soft reciprocal rank of the best relevant item, to be maximized.

    The best relevant item is selected by the soft mask of the relevant items for k = 1, so that all relevant items with
    nearly the best score have a gradient: ``sum(topk(scores, 1, where=relevant) / rank)``, with ranks from 1.

    Parameters
    ----------
    scores, axis, epsilon, where, reduction
        As for `ndcg`.
    relevance : array
        As for `recall`.

    Returns
    -------
    array
        As for `ndcg`.

    Raises
    ------
    TypeError, ValueError
        As `ndcg`.

    Notes
    -----
    Derivatives flow to `scores` and `epsilon`.

    References
    ----------
    Voorhees, "The TREC-8 Question Answering Track Report", TREC 1999, for the metric, with the soft ranks of Cuturi,
    Teboul, Vert, "Differentiable Ranking and Sorting using Optimal Transport", NeurIPS 2019.

    Examples
    --------
    >>> import numpy as np
    >>> from softk import losses
    >>> scores, relevance = np.asarray([0.2, 1.7, -0.5, 0.9]), np.asarray([1, 0, 0, 1])
    >>> [float(losses.reciprocal_rank(scores, relevance, epsilon=epsilon).round(3)) for epsilon in (1.0, 0.01)]
    [0.438, 0.5]
    """
    lists = _Lists(scores, axis, epsilon, where, reduction, relevance=relevance)
    xp = lists.xp
    with lists.backend.quiet(scores):
        relevant, _, valid = lists.relevant(relevance)
        best = topk(lists.x, 1, epsilon=lists.epsilon, where=relevant)
        result: ArrayT = lists.result(xp.sum(best / lists.ranks(), axis=-1), valid)
    return result


@explained
def spearman(
    scores: ArrayT,
    targets: AnyArray,
    /,
    *,
    axis: int = -1,
    epsilon: float | AnyArray = 0.1,
    where: AnyArray | None = None,
    reduction: Reduction = "none",
) -> ArrayT:
    """Soft rank correlation of Spearman between scores and targets, to be maximized.

    It is Pearson's correlation between the soft ranks of the scores and the ranks of the targets. Equal targets have
    their mean rank.

    Parameters
    ----------
    scores, axis, epsilon, where, reduction
        As for `ndcg`.
    targets : array
        What the scores should be ordered like, of any real dtype, broadcasting to the shape of `scores`. A NaN makes
        the value of its list NaN.

    Returns
    -------
    array
        As for `ndcg`, between -1 and 1. A list has the value 0 and no gradient if all its scores or all its targets are
        equal, or if it has fewer than two items.

    Raises
    ------
    TypeError, ValueError
        As `ndcg`.

    Notes
    -----
    Derivatives flow to `scores` and `epsilon`. The ranks of the targets are piecewise constant. A model should not
    start with equal scores, because at them the correlation is not continuous.

    References
    ----------
    Spearman, "The Proof and Measurement of Association between Two Things", The American Journal of Psychology 1904;
    Blondel, Teboul, Berthet, Djolonga, "Fast Differentiable Sorting and Ranking", ICML 2020, for soft ranks in it.

    Examples
    --------
    >>> import numpy as np
    >>> from softk import losses
    >>> scores, targets = np.asarray([0.2, 1.7, -0.5, 0.9]), np.asarray([1, 2, 0, 3])
    >>> [float(losses.spearman(scores, targets, epsilon=epsilon).round(3)) for epsilon in (1.0, 0.01)]
    [0.815, 0.8]
    """
    lists = _Lists(scores, axis, epsilon, where, reduction, targets=targets)
    xp, n = lists.xp, lists.n
    with lists.backend.quiet(scores):
        values = lists.items("targets", targets)
        others, own = xp.expand_dims(values, axis=-2), xp.expand_dims(values, axis=-1)
        kept = xp.ones_like(lists.x) if lists.where is None else cast(xp, lists.where, lists.working)
        present = xp.expand_dims(kept, axis=-2) > 0.0
        # Twice the mean rank: the items below, counted twice, and the equal ones.
        below, equal = (xp.count_nonzero(each & present, axis=-1) for each in (others < own, others == own))
        wanted = cast(xp, 2 * below + equal, lists.working)
        count = _safe(xp, xp.sum(kept, axis=-1, keepdims=True))
        ranks = -lists.ranks()  # rank 1 is the best, and has the largest target
        ranks, wanted = (
            kept * (each - xp.sum(kept * each, axis=-1, keepdims=True) / count) for each in (ranks, wanted)
        )
        spread = xp.sum(ranks**2, axis=-1)
        # Equal scores have equal ranks up to rounding. A correlation with rounding errors would be noise.
        least = n * (64.0 * n * float(xp.finfo(lists.working).eps)) ** 2
        both = spread * xp.sum(wanted**2, axis=-1)
        apart = (spread > least) & (both > 0.0)
        found = xp.where(apart, xp.sum(ranks * wanted, axis=-1), 0.0 * spread) / xp.sqrt(xp.where(apart, both, 1.0))
        result: ArrayT = lists.result(found, ~xp.any(xp.isnan(values), axis=-1))
    return result


@explained
def cross_entropy(
    scores: ArrayT,
    labels: AnyArray,
    /,
    k: float | AnyArray | Mapping[float, float],
    *,
    axis: int = -1,
    epsilon: float | AnyArray = 0.1,
    where: AnyArray | None = None,
    complement: bool = False,
    reduction: Reduction = "mean",
) -> ArrayT:
    """Top-k cross-entropy: minus the log of the soft top-k mask at the labels, to be minimized.

    It asks that the labels are among the k best scores, not that they are the best.

    Parameters
    ----------
    scores, axis, epsilon, where
        As for `ndcg`. The items are the classes.
    labels : array
        Either integers, the index of one item per list: the shape of `scores` without `axis`. A negative integer marks
        a list without a label. An index beyond the last item makes the value of its list NaN. Or one bool or real
        floating-point number per item, at least 0, broadcasting to the shape of `scores`: several labels, or a
        distribution over the items. The terms of the items are then added with these weights. Labels at items that
        `where` removes are ignored.
    k : number, array, or mapping
        How many items are selected, above 0 and possibly fractional. A k above the number of items selects all, and
        then the loss is 0. An array has one value per list, as for `softk.topk`. A mapping ``{k: probability}`` is a
        distribution over several numbers k: the mask is then the mean mask.
    complement : bool, optional
        Add ``-(1 - label) * log(1 - mask)`` for every item: items that are not labels should not be among the k best.
        The term is left out if the smallest k selects all items, because then no score changes it.
    reduction : {"mean", "sum", "none"}, optional
        The mean or the sum over all lists, or one value per list. Lists without labels count in the mean.

    Returns
    -------
    array
        The loss, with the dtype and device of `scores`, of shape () unless `reduction` is "none": then the shape of
        `scores` without `axis`. A list without labels has the value 0 and no gradient. It is +inf, with a gradient of
        0, if a label has the score ``-inf``.

    Raises
    ------
    TypeError, ValueError
        As `ndcg`; also if `k` is not above 0, or its probabilities are negative or do not sum to 1.

    Notes
    -----
    Derivatives flow to `scores`, `epsilon`, an array `k` and real floating-point `labels`. The logarithm of the mask is
    computed by `softk.log_topk`, and that of its complement as the log mask of the n - k smallest scores. Neither
    underflows, so a label with a very low score has a gradient of full size.

    References
    ----------
    Petersen, Kuehne, Borgelt, Deussen, "Differentiable Top-k Classification Learning", ICML 2022, section 3: the
    negative logarithm of the probability of being among the top k, with a distribution over k. The probability is here
    the mask of Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from softk import losses
    >>> scores, labels = np.asarray([[0.2, 1.7, -0.5, 0.9], [2.0, 0.1, 0.3, 0.2]]), np.asarray([3, 1])
    >>> losses.cross_entropy(scores, labels, 2, epsilon=0.5, reduction="none").round(3).tolist()
    [0.223, 1.394]
    >>> float(losses.cross_entropy(scores, labels, {1: 0.5, 2: 0.5}, epsilon=0.5).round(3))
    1.39
    """
    check_flag("complement", complement)
    one = 1 if isinstance(k, Mapping) else k  # a distribution is checked below
    lists = _Lists(scores, axis, epsilon, where, reduction, labels=labels, k=one)
    masses, probabilities = _distribution(lists, k) if isinstance(k, Mapping) else (lists.masses(k), [1.0])
    xp = lists.xp
    with lists.backend.quiet(scores):
        masses = [at_most(xp, mass, lists.n) for mass in masses]
        targets, valid = _targets(lists, labels)
        logs = [log_topk(lists.x, mass, epsilon=lists.epsilon, where=lists.where) for mass in masses]
        log_mask = _mixed(xp, logs, probabilities)
        value = -_weighted(xp, targets, log_mask)
        if complement:
            value = value - _complement(lists, masses, probabilities, targets)
        labeled = xp.any(targets > 0.0, axis=-1) | xp.isnan(value)
        result: ArrayT = lists.result(xp.where(labeled, value, 0.0), valid)
    return result


def _distribution(lists: _Lists, k: Mapping[float, float]) -> tuple[list[Any], list[float]]:
    """The numbers k of a positive probability, and their probabilities."""
    for mass, probability in k.items():
        if not is_number(mass) or not is_number(probability):
            raise TypeError(f"k must map numbers to numbers, got {kind_of(mass)} with {kind_of(probability)}")
        if not probability >= 0.0:
            raise ValueError(f"k must have probabilities of at least 0, got {probability!r} for {mass!r}")
    if not abs(sum(k.values()) - 1.0) <= 1e-6:
        raise ValueError(f"k must have probabilities that sum to 1, got {dict(k)!r}")
    positive = {mass: probability for mass, probability in k.items() if probability > 0.0}
    return lists.masses(tuple(positive)), list(positive.values())


def _targets(lists: _Lists, labels: Any) -> tuple[Any, Any]:
    """The weights of the items as labels, 0 for removed items; and the lists whose labels are valid."""
    xp, n = lists.xp, lists.n
    if not xp.isdtype(labels.dtype, "integral"):
        values = lists.items("labels", labels)
        return values, lists.all_valid(values)
    shape = tuple(labels.shape)
    if not fits(shape, lists.batch):
        hint = "; one label per item must be bool or floating-point" if fits(shape, lists.shape) else ""
        raise ValueError(f"labels must have one integer per list, shape {lists.batch}, got {shape}{hint}")
    labels = cast(xp, xp.broadcast_to(labels, lists.batch), index_dtype(xp))
    place = xp.arange(n, dtype=labels.dtype, device=lists.device)
    chosen = xp.expand_dims(labels, axis=-1) == xp.reshape(place, (*(1,) * len(lists.batch), n))
    return cast(xp, lists.only(chosen), lists.working), labels < n


def _mixed(xp: Any, logs: list[Any], probabilities: list[float]) -> Any:
    """The logarithm of a mean of masks, from their logarithms. It is -inf, without a derivative, where all are."""
    if len(logs) == 1:
        return logs[0]
    never = reduce(lambda one, other: one & other, (log == -math.inf for log in logs))
    parts = [xp.where(never, 0.0, log) + math.log(share) for log, share in zip(logs, probabilities, strict=True)]
    return xp.where(never, -math.inf, reduce(xp.logaddexp, parts))


def _complement(lists: _Lists, masses: list[Any], probabilities: list[float], targets: Any) -> Any:
    """The sum over the items of (1 - label) * log(1 - mask)."""
    xp = lists.xp
    # An item of score -inf has the mask 0, and its term is 0.
    able = lists.only(lists.x > -math.inf)
    count = xp.sum(cast(xp, able, lists.working), axis=-1, keepdims=True)
    rests = [xp.where(count > mass, count - mass, 0.0) for mass in masses]
    logs = [log_topk(lists.x, rest, mode="smallest", epsilon=lists.epsilon, where=able) for rest in rests]
    some = reduce(lambda one, other: one | other, (rest > 0.0 for rest in rests))
    return _weighted(xp, 1.0 - targets, xp.where(able & some, _mixed(xp, logs, probabilities), 0.0))


def _weighted(xp: Any, weights: Any, logs: Any) -> Any:
    """The weighted sum of logarithms. A weight of 0 leaves out a logarithm of -inf, and its derivative."""
    out = (logs == -math.inf) & ~(weights > 0.0)
    return xp.sum(xp.where(out, 0.0, weights * xp.where(out, 0.0, logs)), axis=-1)
