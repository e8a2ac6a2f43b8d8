"""Attention restricted to about k keys per query, by a soft top-k of the scores.

Both functions are compositions of array operations and `softk.log_topk`. A framework with autodiff differentiates them
natively, in the arrays, k and epsilon. `softk.vjp` and `softk.jvp` do not support them, so on a library without
autodiff they have no derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ._functions.arguments import common_backend
from ._functions.checks import (
    at_most,
    check_flag,
    check_precision,
    is_number,
    require_array,
    require_size,
    working_dtype,
)
from ._functions.masks import log_topk
from ._functions.shapes import cast, fits
from ._functions.signatures import explained
from .backend import AnyArray, Array, ArrayT, Backend, backend_of, index_dtype

__all__ = ["attend", "weights"]


@explained
def attend(
    query: ArrayT,
    key: AnyArray,
    value: AnyArray,
    k: float | AnyArray,
    *,
    epsilon: float | AnyArray = 0.1,
    where: AnyArray | None = None,
    bias: AnyArray | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout: Callable[[Any], Any] | None = None,
) -> ArrayT:
    """Scaled dot-product attention in which each query attends to about k keys.

    The weights are the softmax of the scores times their soft top-k mask, normalized to a sum of 1. For a query that
    may attend to at most k keys, it is ordinary attention.

    Parameters
    ----------
    query : array
        Shape (..., L, E), real floating-point.
    key : array
        Shape (..., S, E), of the dtype of `query`. Leading axes broadcast against those of `query`. float16, bfloat16
        and float32 may be mixed, as they are under a framework's automatic mixed precision.
    value : array
        Shape (..., S, V). The same holds for its dtype and leading axes.
    k : number or array
        How many keys a query attends to. It may be fractional. A k above the number of keys that the query may attend
        to is clipped to that number. For k = 0 the result is 0. An array broadcasts against (..., L, 1).
    epsilon : number or array, optional
        Strength of the entropy, in the units of the scaled scores. An array broadcasts against (..., L, 1).
    where : array of bool, optional
        The keys that a query may attend to, broadcasting to (..., L, S).
    bias : array, optional
        Added to the scaled scores, broadcasting to (..., L, S). A bias of ``-inf`` excludes a key.
    is_causal : bool, optional
        Query i may attend only to the keys 0 to i. `where` and `bias` apply in addition.
    scale : float, optional
        Factor of the dot products; ``1 / sqrt(E)`` by default.
    enable_gqa : bool, optional
        Grouped-query attention. The axis before the last two is the axis of the heads. `query` has a multiple of the
        heads of `key` and `value`, and neighboring heads of `query` share a head of `key` and `value`.
    dropout : callable, optional
        A function that is applied to the weights before they are multiplied with the values, such as a framework's
        dropout. It gets an array of float32 at least.

    Returns
    -------
    array
        Shape (..., L, V), of the dtype of `value`. A query that may attend to no key gets 0, with a derivative of 0.

    Raises
    ------
    TypeError
        If an argument is not an array (or number) of the right kind, or is of another library, device or dtype than
        `query`.
    ValueError
        If a shape does not fit or a number is out of its range. An invalid value in an array of `k` or `epsilon` makes
        its row NaN.

    Notes
    -----
    The (L, S) weights are held in memory. For half-precision arrays, the scores, the weights and the products with the
    values are computed in float32, also under automatic mixed precision such as ``torch.autocast``. Only the result is
    rounded to the dtype of `value`. The derivatives are the framework's own. `softk.vjp` does not support attention, so
    there are none on a library without autodiff.

    References
    ----------
    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, equation (1), with the mask of Xie et al.,
    "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> from softk.attention import attend
    >>> query, key = np.asarray([[1.0, 0.0]]), np.asarray([[3.0, 0.0], [2.0, 1.0], [-1.0, 0.0]])
    >>> attend(query, key, np.eye(3), 1, epsilon=0.2).round(3).tolist()
    [[0.986, 0.014, 0.0]]
    >>> attend(query, key, np.eye(3), 3).round(3).tolist()
    [[0.644, 0.318, 0.038]]
    """
    share = _weights(query, key, k, epsilon, where, bias, is_causal, scale, enable_gqa)
    require_array("value", value)
    backend = common_backend("query", query, {"key": key, "value": value})
    xp = backend.xp
    check_precision(xp, "value", value, "query", query)
    if value.ndim < 2 or value.shape[-2] != key.shape[-2]:
        raise ValueError(f"value must have shape (..., {key.shape[-2]}, V), one row per key, got {tuple(value.shape)}")
    dtype = value.dtype
    value = _grouped(xp, "value", value, query) if enable_gqa else value
    _require_broadcast("value", value, share)
    share = share if dropout is None else dropout(share)
    with backend.quiet(query):
        result: ArrayT = cast(xp, xp.matmul(share, cast(xp, value, share.dtype)), dtype)
    return result


@explained
def weights(
    query: ArrayT,
    key: AnyArray,
    k: float | AnyArray,
    *,
    epsilon: float | AnyArray = 0.1,
    where: AnyArray | None = None,
    bias: AnyArray | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ArrayT:
    """The weights of `attend`, without the product with the values.

    Parameters
    ----------
    query, key, k, epsilon, where, bias, is_causal, scale, enable_gqa
        As for `attend`.

    Returns
    -------
    array
        Shape (..., L, S), at least 0, of the dtype of `query`. The rows sum to 1, or to 0 for a query that may attend
        to no key.

    Raises
    ------
    TypeError, ValueError
        As `attend`.

    Notes
    -----
    `softk.vjp` does not support attention, as for `attend`.

    References
    ----------
    See `attend`.

    Examples
    --------
    >>> import numpy as np
    >>> from softk.attention import weights
    >>> x = np.asarray([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> weights(x, x, 2, epsilon=0.2, is_causal=True).round(3).tolist()
    [[1.0, 0.0, 0.0], [0.33, 0.67, 0.0], [0.495, 0.01, 0.495]]
    """
    share = _weights(query, key, k, epsilon, where, bias, is_causal, scale, enable_gqa)
    result: ArrayT = cast(backend_of(share).xp, share, query.dtype)
    return result


def _weights(
    query: Array,
    key: Array,
    k: Any,
    epsilon: Any,
    where: Array | None,
    bias: Array | None,
    is_causal: bool,
    scale: Any,
    enable_gqa: bool,
) -> Array:
    """The weights in the dtype of the computation, float32 at least."""
    check_flag("is_causal", is_causal)
    check_flag("enable_gqa", enable_gqa)
    require_array("query", query)
    require_array("key", key)
    backend = common_backend("query", query, {"key": key})
    xp = backend.xp
    if not xp.isdtype(query.dtype, "real floating"):
        raise TypeError(f"query must be real floating-point, got dtype {query.dtype}")
    if query.ndim < 2:
        raise ValueError(f"query must have shape (..., L, E), got {tuple(query.shape)}")
    check_precision(xp, "key", key, "query", query)
    if key.ndim < 2 or key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have shape (..., S, {query.shape[-1]}), as query's E, got {tuple(key.shape)}")
    if scale is None:
        scale = 1.0 / math.sqrt(max(query.shape[-1], 1))
    elif not is_number(scale) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    require_size("key", key, key.ndim - 2)
    key = _grouped(xp, "key", key, query) if enable_gqa else key
    _require_broadcast("key", key, query)

    with backend.quiet(query):
        # In half precision the rounding of the products would exceed the difference between the scores of two keys.
        wide = working_dtype(xp, query.dtype)
        scores = xp.matmul(cast(xp, query, wide), xp.matrix_transpose(cast(xp, key, wide))) * scale
    rows, n = scores.shape[-2:]
    for name, value, kind, wanted in (("where", where, "bool", "bool"), ("bias", bias, "real floating", "floats")):
        if value is not None:
            require_array(name, value)
            backend = common_backend("query", query, {"key": key, name: value})
            if not xp.isdtype(value.dtype, kind):
                other = "bias" if name == "where" else "where"
                raise TypeError(f"{name} must be an array of {wanted}, got dtype {value.dtype}; see {other}=")
            if not fits(tuple(value.shape), tuple(scores.shape)):
                raise ValueError(
                    f"{name} must broadcast to {tuple(scores.shape)}, the shape of the weights, "
                    f"got {tuple(value.shape)}"
                )
    with backend.quiet():
        if bias is not None:
            scores = scores + xp.broadcast_to(cast(xp, bias, scores.dtype), tuple(scores.shape))
        if is_causal:
            positions = [xp.arange(size, dtype=index_dtype(xp), device=backend.device(query)) for size in (rows, n)]
            causal = xp.expand_dims(positions[0], axis=-1) >= xp.expand_dims(positions[1], axis=0)
            where = causal if where is None else where & causal
    if n == 0:  # without keys the weights are empty
        return scores
    k = at_most(xp, k, n)
    with backend.quiet(query):
        return _renormalized(backend, scores, k, epsilon, where)


def _renormalized(backend: Backend, scores: Array, k: Any, epsilon: Any, where: Array | None) -> Array:
    """softmax(scores) * mask, divided by its sum, which is softmax(scores + log mask).

    For a small k the product underflows, and the quotient would be 0 / 0. Its derivative has the square of the sum,
    which underflows much earlier. The logarithm of the mask does not underflow.
    """
    xp = backend.xp
    log_mask = log_topk(scores, k, epsilon=epsilon, where=where)
    removed = log_mask == -math.inf
    logits = xp.where(removed, -math.inf, scores + xp.where(removed, 0.0, log_mask))
    # The peak must not be detached, although it cancels in the result. Its cotangent is minus the sum of the cotangents
    # of all logits, which is 0 in exact arithmetic. It cancels the rounding error at the largest logit, whose own
    # cotangent is a difference of nearly equal numbers if one weight is nearly 1.
    peak = xp.max(logits, axis=-1, keepdims=True)
    empty = peak == -math.inf
    share = xp.exp(logits - xp.where(empty, 0.0, peak))
    total = xp.sum(share, axis=-1, keepdims=True)
    return share / xp.where(empty, 1.0, total)


def _grouped(xp: Any, name: str, values: Array, query: Array) -> Array:
    """The keys or values, with each head repeated for all query heads that share it."""
    if query.ndim < 3 or values.ndim < 3 or values.shape[-3] == 0 or query.shape[-3] % values.shape[-3]:
        raise ValueError(
            f"{name} must have an axis of heads before its last two axes with enable_gqa=True, whose size divides "
            f"that of query, got shapes {tuple(values.shape)} and {tuple(query.shape)}"
        )
    return xp.repeat(values, query.shape[-3] // values.shape[-3], axis=-3)


def _require_broadcast(name: str, value: Array, other: Array) -> None:
    """Require that the leading axes of an array broadcast against those of another array."""
    pairs = zip(reversed(value.shape[:-2]), reversed(other.shape[:-2]), strict=False)
    if any(1 not in (size, full) and size != full for size, full in pairs):
        raise ValueError(
            f"{name} must have leading axes that broadcast against {tuple(other.shape[:-2])}, "
            f"got shape {tuple(value.shape)}"
        )
