"""The scores of a problem in units of its temperature, and the weights of its items."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from softk.backend import Array, Backend

from .limits import limits, negligible, safe_denominator


def selectable(xp: Any, x: Array, where: Array | None) -> Array:
    """The scores, with -inf for the items that are removed. Formed where it is needed, and not kept, to save memory."""
    return x if where is None else xp.where(where, x, -math.inf)


def logits(backend: Backend, x: Array, reference: Array, tau: Array, offset: Array | None = None) -> Array:
    """(x - reference) / tau, clipped to the farthest distance that a derivative sees, minus the offset.

    +inf counts as the largest finite score: several of them tie, and share k if they are more than k.
    """
    xp = backend.xp
    bound = limits(xp, x.dtype)
    # For a tau so large that farthest * tau overflows, all numbers are scaled down by a power of 2. For other tau they
    # are not: the second derivative of the quotient contains 1 / tau^2, which may overflow.
    is_large = tau > bound.largest / bound.farthest
    factor = xp.where(is_large, 2.0 ** -math.ceil(math.log2(bound.farthest)), xp.ones_like(tau))
    scaled_tau = tau * factor
    reach = bound.farthest * scaled_tau
    scaled_x = xp.minimum(x, bound.largest) * factor
    z = backend.clip(scaled_x - reference * factor, -reach, reach) / scaled_tau
    return z if offset is None else z - offset


def effective_weights(xp: Any, x: Array, weights: Array | None) -> Array:
    """The user's weights, or 1; but 0 where the score is -inf: there the user's weight is ignored, even NaN."""
    if weights is None:
        return xp.astype(~(x == -math.inf), x.dtype)
    return xp.where(x == -math.inf, 0.0, weights)


def mean_weight(xp: Any, weights: Array, axis: int) -> Array:
    """The mean along an axis of the weights that are not 0, with the axis kept; 1 if all are 0."""
    number = xp.count_nonzero(weights, axis=axis, keepdims=True)
    number = xp.astype(xp.where(number == 0, 1, number), weights.dtype)
    return safe_denominator(xp, xp.sum(weights, axis=axis, keepdims=True) / number)


def weighted(xp: Any, weights: Array, values: Array) -> Array:
    """weights * values, and 0 where the value is negligible: the weight of a removed item may be any number or NaN."""
    return xp.where(values > 2.0 * negligible(xp, values.dtype), weights, 0.0) * values


def total(xp: Any, values: Array) -> Array:
    """The sum over a slice, shape (..., 1)."""
    return xp.sum(values, axis=-1, keepdims=True)


def totals(backend: Backend, *values: Callable[[], Array]) -> tuple[Array, ...]:
    """The sums of several values over a slice, in one reduction where the slice is in pieces. Booleans are counted.

    The values are functions, so that those of a slice in one piece are not held at the same time.
    """
    xp = backend.xp
    if backend.is_split:
        found = backend.totals(*(value() for value in values))  # type: ignore[attr-defined]
        return tuple(found[..., i : i + 1] for i in range(len(values)))
    return tuple(_sum_or_count(xp, value()) for value in values)


def _sum_or_count(xp: Any, value: Array) -> Array:
    if xp.isdtype(value.dtype, "bool"):
        return xp.count_nonzero(value, axis=-1, keepdims=True)
    return total(xp, value)


def sigmoid(xp: Any, z: Array) -> Array:
    """1 / (1 + exp(-z)), exactly 0 and 1 at the infinities. The derivatives of its operations are finite there."""
    decay = xp.exp(-xp.abs(z))  # the argument of exp is never positive, so it cannot overflow
    return xp.where(z > 0.0, 1.0, decay) / (1.0 + decay)


def dot(xp: Any, one: Array, other: Array) -> Array:
    """The sum of the products over a slice, shape (..., 1).

    It is no matrix product: processors and frameworks may round the factors of those more coarsely than their dtype.
    """
    return total(xp, one * other)
