"""The items of slices at a threshold: what the derivative rule computes of each, before any sum over them."""

from __future__ import annotations

import math
from typing import Any

from softk.backend import Array, Backend

from .limits import clip, exponential, limits, negligible
from .problem import logits, selectable, weighted


class Items:
    """The items of slices, seen from one threshold. Nothing changes its state.

    Per-slice values have shape (..., 1), per-item values (..., n). Values per item are computed again where they are
    needed, to save memory.

    Parameters
    ----------
    backend : Backend
        The framework of the arrays.
    inputs : tuple of array or None
        Scores (..., n), mass, temperature, item weights (..., n) and where (..., n).
    reference, offset : array
        The solution, as `solve.solve` returns it.
    """

    def __init__(self, backend: Backend, inputs: tuple[Any, ...], reference: Array, offset: Array) -> None:
        self.backend, self.xp = backend, backend.xp
        self.x, self.k, self.tau, self.weights, self.where = inputs
        self.reference, self.offset = reference, offset

    def scores(self) -> Array:
        """x, and -inf for the items that are removed."""
        return selectable(self.xp, self.x, self.where)

    def log_odds(self) -> Array:
        """z, the log-odds of the mask."""
        return logits(self.backend, self.scores(), self.reference, self.tau, self.offset)

    def log_odds_from(self, origin: Array) -> Array:
        """(x - origin) / tau."""
        return logits(self.backend, self.scores(), origin, self.tau)

    def weighted(self, values: Array) -> Array:
        """a times the values."""
        return values if self.weights is None else weighted(self.xp, self.weights, values)

    def slope(self) -> Array:
        """v = m (1 - m), from z itself."""
        tail = self.xp.exp(-self.xp.abs(self.log_odds()))
        tail = tail / (1.0 + tail)
        return (1.0 - tail) * tail

    def zero_where_fixed(self, values: Array) -> Array:
        """The values, with 0 for the scores that no tangent moves: +inf and the scores that are removed."""
        is_fixed = self.x > limits(self.xp, self.x.dtype).largest
        return self.xp.where(is_fixed if self.where is None else is_fixed | ~self.where, 0.0, values)

    def zero_where_removed(self, values: Array) -> Array:
        """The values, with 0 for the items that are removed, even where the value is NaN."""
        return values if self.where is None else self.xp.where(self.where, values, 0.0)

    # --- |z| as it is

    def tails_from_nearest(self) -> tuple[Array, Array, Array]:
        """d of the nearest item; t = 1 / (1 + exp(|z|)) in units of exp(-d), and 1 / (1 - t)."""
        distance, decay = self.decay_from_nearest()
        one_and_tail = self.xp.exp(-distance) * decay + 1.0
        return distance, decay / one_and_tail, one_and_tail

    def decay_from_nearest(self) -> tuple[Array, Array]:
        """d and exp(d - |z|)."""
        xp = self.xp
        size = xp.abs(self.log_odds())
        distance = self.nearest_distance(size)
        if self.weights is None:
            return distance, decay_of(xp, distance - size)
        # An item without weight may be nearer.
        return distance, decay_of(xp, xp.minimum(distance - size, math.log(limits(xp, self.x.dtype).farthest)))

    def nearest_distance(self, size: Array) -> Array:
        """The smallest |z| of the items with weight."""
        xp = self.xp
        with_weight = size if self.weights is None else xp.where(self.weights == 0.0, math.inf, size)
        # An item at the farthest distance has no derivative, even if no other item is nearer.
        return xp.minimum(xp.min(with_weight, axis=-1, keepdims=True), 0.5 * limits(xp, size.dtype).farthest)

    # --- the sides of the threshold

    def nearest_on_each_side(self, upper: Array) -> tuple[Array, Array]:
        """The scores with weight that are nearest above and below the threshold; inf or -inf where there is none."""
        xp = self.xp
        x = xp.minimum(self.scores(), limits(xp, self.x.dtype).largest)
        is_above, is_below = upper, ~upper
        if self.weights is not None:
            weightless = self.weights == 0.0
            is_above, is_below = is_above & ~weightless, is_below & ~weightless
        high = xp.min(xp.where(is_above, x, math.inf), axis=-1, keepdims=True)
        return high, xp.max(xp.where(is_below, x, -math.inf), axis=-1, keepdims=True)

    def decay_from_each_side(self, upper: Array, high: Array, low: Array) -> tuple[Array, Array, Array]:
        """|z| of the nearest items above and below the threshold; and exp(d - |z|), with the d of that side.

        `high` and `low` are what `nearest_on_each_side` returns.
        """
        xp = self.xp
        no_high, no_low = high == math.inf, low == -math.inf
        high, low, above, below = self.distances_from_each_side(high, low)
        # On a side where no item has weight, |z| is measured from the nearest item across the threshold.
        across_above, across_below = xp.where(no_high, 2.0 * below, 0.0), xp.where(no_low, 2.0 * above, 0.0)
        high, low = xp.where(no_high, low, high), xp.where(no_low, high, low)
        above, below = xp.where(no_high, below, above), xp.where(no_low, above, below)

        apart = self.log_odds_from(xp.where(upper, high, low))
        # Not its absolute value, which has no derivative at the nearest item itself.
        exponent = xp.where(upper, -apart, apart)
        if self.weights is not None:
            exponent = exponent + xp.where(upper, across_above, across_below)
            # An item without weight may be nearer.
            exponent = xp.minimum(exponent, math.log(limits(xp, self.x.dtype).farthest))
        return above, below, decay_of(xp, exponent)

    def distances_from_each_side(self, high: Array, low: Array) -> tuple[Array, Array, Array, Array]:
        """The nearest scores as finite numbers, and their |z|."""
        xp, bound = self.xp, limits(self.xp, self.x.dtype)
        both = self.backend.constant(clip(xp, xp.concat([high, low], axis=-1), -bound.largest, bound.largest))
        near = xp.abs(logits(self.backend, both, self.reference, self.tau, self.offset))
        near = xp.minimum(near, 0.5 * bound.farthest)
        return both[..., :1], both[..., 1:], near[..., :1], near[..., 1:]

    def tails_from_each_side(self, upper: Array, high: Array, low: Array) -> tuple[Array, Array, Array, Array]:
        """|z| of the nearest items above and below; t = 1 / (1 + exp(|z|)) in units of exp(-d), and 1 / (1 - t)."""
        xp = self.xp
        above, below, decay = self.decay_from_each_side(upper, high, low)
        one_and_tail = xp.where(upper, xp.exp(-above), xp.exp(-below)) * decay + 1.0
        return above, below, decay / one_and_tail, one_and_tail


def decay_of(xp: Any, exponent: Array) -> Array:
    """exp(exponent), and exactly 0 where that is negligible beside 1."""
    is_large = exponent > math.log(negligible(xp, exponent.dtype))
    return exponential(xp, exponent) * xp.astype(is_large, exponent.dtype)
