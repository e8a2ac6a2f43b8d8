"""The scores of a problem in units of its temperature, and the weights of its items."""

from __future__ import annotations

import math
from typing import Any

from softk.backend import Array, Backend

from .limits import clip, limits, negligible


def selectable(xp: Any, x: Array, where: Array | None) -> Array:
    """The scores, with -inf for the items that are removed. Formed where it is asked for: nobody holds on to a copy."""
    return x if where is None else xp.where(where, x, -math.inf)


def logits(backend: Backend, x: Array, reference: Array, tau: Array, offset: Array | None = None) -> Array:
    """(x - reference) / tau, clipped to the farthest distance that a derivative still sees, less the offset.

    +inf counts as the largest score: many of them tie, and share k when they are more than k. Beside a tau so large
    that what clips them would overflow, scores are made smaller first, by a power of two.
    """
    xp, over = backend.xp, backend.overwriting
    bound = limits(xp, x.dtype)
    # Only there: the second derivative of a quotient has the square of its denominator.
    large = bound.largest / bound.farthest
    part = xp.where(tau > large, 2.0 ** -math.ceil(math.log2(bound.farthest)), xp.ones_like(tau))
    tau = tau * part
    reach = bound.farthest * tau
    x = xp.minimum(x, bound.largest)  # one step at a time: each lets go of the array before it
    x = x * part
    x = x - reference * part
    z = over.divide(clip(over, x, -reach, reach), tau)
    return z if offset is None else over.subtract(z, offset)


def effective_weights(xp: Any, x: Array, weights: Array | None) -> Array:
    """The user's weights, or 1; but 0 where the score is -inf, where the user's weight is ignored, even NaN."""
    if weights is None:
        return xp.astype(~(x == -math.inf), x.dtype)
    return xp.where(x == -math.inf, 0.0, weights)


def weigh(xp: Any, weights: Array, values: Array) -> Array:
    """weights * values, where the weight of an item with next to no value may be anything: an item that was removed."""
    return xp.where(values > 2.0 * negligible(xp, values.dtype), weights, 0.0) * values
