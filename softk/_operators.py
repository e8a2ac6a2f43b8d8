"""The public operators. Each one makes its arguments canonical and names the primitive that computes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, ParamSpec, Protocol, cast

from . import _primitives
from ._arguments import Call, Slices, static_ranks
from ._checks import check_mass, check_mode, check_temperature, is_number
from .backend import Array, Primitive

Mode = Literal["largest", "smallest"]
P = ParamSpec("P")


class Operator(Protocol[P]):
    """A public function that can also say what it would compute, which is where `softk.vjp` and `softk.jvp` start."""

    call: Callable[P, Call]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Array: ...


def operator_from(describe: Callable[P, Call]) -> Operator[P]:
    @wraps(describe)
    def function(*args: P.args, **kwargs: P.kwargs) -> Array:
        return describe(*args, **kwargs).evaluate()

    function.__annotations__ = {**describe.__annotations__, "return": "Array"}
    function.call = describe  # type: ignore[attr-defined]
    return cast("Operator[P]", function)


def _masked(
    primitive: Primitive, x: Array, k: Any, axis: int, mode: Mode, epsilon: Any, weights: Any, where: Any
) -> tuple[Slices, dict[str, Any]]:
    """The arguments that topk and threshold share, checked and canonical."""
    smallest = check_mode(mode)
    slices = Slices(x, axis, smallest=smallest, k=k, epsilon=epsilon, weights=weights, where=where)
    check_mass(slices.xp, k, slices.n, slices.working, weights is not None)
    check_temperature(slices.xp, epsilon, slices.working)
    bits = slices.xp.finfo(slices.working).bits
    with slices.backend.quiet():
        arguments = {
            "x": slices.scores(narrow=primitive.narrow),
            "k": slices.per_slice("k", k),
            "epsilon": slices.per_slice("epsilon", epsilon, scale=0.5),
            "weights": slices.per_item("weights", weights),
            "where": slices.kept(where),
        }
    options = {"ranks": None if weights is not None else static_ranks(slices.backend, k, bits)}
    return slices, {"backend": slices.backend, "primitive": primitive, "options": options, "arguments": arguments}


@operator_from
def topk(
    x: Array,
    k: Any,
    /,
    *,
    axis: int = -1,
    mode: Mode = "largest",
    epsilon: Any = 0.1,
    weights: Array | None = None,
    where: Array | None = None,
    hard: bool = False,
) -> Call:
    """Soft indicator of the k largest scores along an axis, with useful gradients.

    The mask is the exact solution of the entropic optimal transport problem between the scores and the anchors 0
    and 1: ``mask = sigmoid((x - t) / (epsilon / 2))``, with the one threshold ``t`` of each slice at which the mask
    sums to `k`. For ``epsilon -> 0`` it is the ordinary top-k indicator.

    Parameters
    ----------
    x : array
        Scores, of any shape with at least one axis, real floating-point. ``-inf`` is never selected, ``+inf`` always
        (more of them than `k` share it); a slice with a NaN has a NaN mask. float16 and bfloat16 are computed in
        float32.
    k : number or array
        How many to select: from 0 to n, the size of `x` along `axis`, and not necessarily whole. An array holds one
        value a slice: it broadcasts against `x` with size 1 along `axis`.
    axis : int, optional
        The axis along which to select. Every slice along it depends on itself alone.
    mode : {"largest", "smallest"}, optional
        Which end to select.
    epsilon : number or array, optional
        Strength of the entropy, in the units of `x`: scores that differ by much more than `epsilon` are told apart,
        scores closer than that share. Positive. An array holds one value a slice, as for `k`.
    weights : array, optional
        Item weights, at least 0, broadcasting to the shape of `x`: then ``sum(weights * mask) = k`` and `k` may be
        as large as their sum. An item of weight 0 has a mask but no say in the threshold; one that is removed, or at
        ``-inf``, may have any weight.
    where : array of bool, optional
        Items to choose from, broadcasting to the shape of `x`. The others have mask 0 and gradient 0, whatever their
        score. If fewer than `k` remain, all of them are selected.
    hard : bool, optional
        Return the exact indicator of the k largest (ties to the lowest index), with the derivative of the soft one.
        For a whole `k` without weights.

    Returns
    -------
    array
        The mask, of the shape, dtype and device of `x`, in [0, 1], with sum `k` along `axis`.

    Raises
    ------
    TypeError
        If an argument is not an array (or number) of the right kind, or is of another library or device than `x`.
    ValueError
        If a number, `axis`, `mode` or a shape is out of its range. Arrays never raise for their values: a bad value
        makes its slice NaN.

    Notes
    -----
    Derivatives flow to `x`, `k`, `epsilon` and `weights`, natively where the framework has autodiff, through
    `softk.vjp` and `softk.jvp` on every other array. The mask for k = 1 is not a softmax (for more than two scores),
    and it is not k times a softmax, which can exceed 1.

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
    """
    primitive = _primitives.hard_mask if hard else _primitives.mask
    slices, call = _masked(primitive, x, k, axis, mode, epsilon, weights, where)
    if slices.n == 0:
        call |= {"primitive": _primitives.empty_mask, "options": {}}
    if hard and weights is not None:
        raise ValueError("hard=True must come without weights, got weights; leave out one of the two")
    if hard and is_number(k) and k != math.floor(k):
        raise ValueError(f"k must be whole with hard=True, got {k!r}")
    return Call(**call, restores=(slices.like_scores(narrow=True),))


@operator_from
def log_topk(
    x: Array,
    k: Any,
    /,
    *,
    axis: int = -1,
    mode: Mode = "largest",
    epsilon: Any = 0.1,
    weights: Array | None = None,
    where: Array | None = None,
) -> Call:
    """Logarithm of the mask of `softk.topk`, accurate where the mask underflows or rounds to 1.

    A cross-entropy needs it: ``-sum(target * log_topk(x, k))`` has a gradient for a target that is far from selected.

    Parameters
    ----------
    x, k, axis, mode, epsilon, weights, where
        As for `softk.topk`.

    Returns
    -------
    array
        ``log(topk(x, k))``, at most 0, of the shape, dtype and device of `x`; ``-inf`` for what is never selected.

    Raises
    ------
    TypeError, ValueError
        As `softk.topk`.

    Notes
    -----
    ``log(1 - topk(x, k))`` is the logarithm of the mask of the others: ``log_topk(x, n - k, mode="smallest")``.

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
    slices, call = _masked(_primitives.log_mask, x, k, axis, mode, epsilon, weights, where)
    if slices.n == 0:
        call |= {"primitive": _primitives.empty_mask, "options": {}}
    return Call(**call, restores=(slices.like_scores(narrow=True),))


@operator_from
def threshold(
    x: Array,
    k: Any,
    /,
    *,
    axis: int = -1,
    mode: Mode = "largest",
    epsilon: Any = 0.1,
    weights: Array | None = None,
    where: Array | None = None,
    keepdims: bool = False,
) -> Call:
    """Soft k-th largest score along an axis: the level t at which the mask of `topk` is one half.

    Parameters
    ----------
    x, k, axis, mode, epsilon, weights, where
        As for `softk.topk`.
    keepdims : bool, optional
        Keep `axis`, with size 1.

    Returns
    -------
    array
        The threshold of every slice, in the units of `x`, of its dtype and device: the shape of `x` without `axis`.
        For k = 0 it is +inf and where everything is selected -inf (the other way round for the smallest).

    Raises
    ------
    TypeError, ValueError
        As `softk.topk`; also if there are no scores along `axis`.

    Notes
    -----
    For ``epsilon -> 0`` and a whole k it is the middle between the k-th and the next score; its derivative with
    respect to the scores is the weights of a soft selection of the marginal ones, ``p = softmax(log v)``,
    ``v = mask * (1 - mask)``, which sum to 1.

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
    slices, call = _masked(_primitives.threshold, x, k, axis, mode, epsilon, weights, where)
    require_scores(slices)
    return Call(**call, restores=(slices.one_a_slice(keepdims),))


@operator_from
def quantile(
    x: Array,
    q: Any,
    /,
    *,
    axis: int = -1,
    epsilon: Any = 0.1,
    weights: Array | None = None,
    where: Array | None = None,
    keepdims: bool = False,
) -> Call:
    """Soft quantile along an axis: NumPy's default quantile with soft order statistics.

    The j-th smallest of n scores (j from 0) becomes the threshold at k = n - j - 1/2, half-way between the counts;
    between two of them the quantile is interpolated linearly. For ``epsilon -> 0`` it is ``numpy.quantile``.

    Parameters
    ----------
    x : array
        Scores, as for `softk.topk`.
    q : number or array
        Probabilities, from 0 to 1. The axes of an array come first in the result, as in NumPy.
    axis, epsilon
        As for `softk.topk`.
    weights : array, optional
        Frequencies, at least 0, broadcasting to the shape of `x`: their sum takes the place of n.
    where : array of bool, optional
        Items that count, broadcasting to the shape of `x`.
    keepdims : bool, optional
        Keep `axis`, with size 1.

    Returns
    -------
    array
        The quantiles, in the units, dtype and device of `x`: the shape of `q`, then that of `x` without `axis`.

    Raises
    ------
    TypeError, ValueError
        As `softk.topk`; also if there are no scores along `axis`.

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
    """
    slices = Slices(x, axis, q=q, epsilon=epsilon, weights=weights, where=where)
    require_scores(slices)
    if is_number(q) and not 0.0 <= q <= 1.0:
        raise ValueError(f"q must be from 0 to 1, got {q!r}")
    check_temperature(slices.xp, epsilon, slices.working)
    with slices.backend.quiet():
        probability = slices.probabilities(q)
        arguments = {
            "x": slices.scores().lead(slices, probability.leading),
            "q": probability.argument,
            "epsilon": slices.per_slice("epsilon", epsilon, scale=0.5).lead(slices, probability.leading),
            "weights": slices.per_item("weights", weights).lead(slices, probability.leading),
            "where": slices.kept(where).lead(slices, probability.leading),
        }
    restore = slices.one_a_slice(keepdims, leading=len(probability.leading))
    return Call(slices.backend, _primitives.quantile, {}, arguments, (restore,))


def require_scores(slices: Slices) -> None:
    if slices.n == 0:
        raise ValueError(f"x must have at least one score along axis, got shape {slices.shape}, axis {slices.axis}")
