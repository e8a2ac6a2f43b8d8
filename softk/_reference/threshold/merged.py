"""The derivative rule of slices in shards, from one summary per member.

The rule needs reductions over all items that depend on each other: the nearest items, the sums of the tails that are
measured from them, the dominant item, and the sum of v u with u measured from that item. One exchange for each of them
would take long. So every member measures its items from its own nearest ones, and sums them up. The members exchange
these summaries, a few numbers per slice, and each merges all of them. What is measured from the nearest item of one
member is converted by a factor, as in a sum of exponentials.

The sum of v u must not cancel either. On each side of the threshold a member has two sets of items: those with its
largest p, and the others. The item that dominates the slice, if there is one, is alone in a set of the first kind, and
its u is known exactly. Of every set there is the level of u, its mean by v, and the sum of v (u - level). The sum over
a set with u measured from anywhere else follows from these two, as accurately as if it were formed item by item.
"""

from __future__ import annotations

import math
from typing import Any

from softk.backend import Array

from .items import Items, decay_of
from .limits import DOMINANT, clip, limits, safe_denominator
from .pieces import PieceBackend
from .problem import logits, total
from .rule import Linearization

#: The sides of the threshold, and the sets of items on each.
SIDES = ABOVE, BELOW = 0, 1
SETS = [(side, kind) for side in SIDES for kind in ("top", "others")]
#: Multiples of this number, and numbers below it, are summed exactly in every dtype.
COARSE = 4096

#: Numbers of shape (..., 1), or of all members (..., members), by a name and a side or a set.
Summary = dict[Any, Array]


def summarize(items: Items, u: Array | None) -> Summary:
    """What a member exchanges, from its own items.

    Of each side: the score that is ``nearest`` to the threshold, at the distance d; the sum of the ``tails`` and that
    of the p, ``slopes``, in units of exp(-d); the ``largest`` p of an item and, with weights, the ``score`` of that
    item. Above the threshold also the ``mass``, the number or weight of the items, in two parts. Of each set: the
    ``level`` of u in proportion to the weights, the sum ``rest`` of v times what remains of u, and ``weight``, that of
    v times the weights, in the ``unit`` of the largest weight. Without weights these are sums of v', in units of
    exp(-d) too, and a weight is 1.
    """
    xp, weights = items.xp, items.weights
    upper = items.log_odds() > 0.0
    sides = upper, ~upper

    def sums(values: Any, parts: Any) -> list[Array]:
        return [total(xp, xp.where(part, values, 0.0)) for part in parts]

    def largest(values: Any, parts: Any) -> list[Array]:
        every = (xp.max(xp.where(part, values, 0.0), axis=-1, keepdims=True) for part in parts)
        return [xp.maximum(one, 0.0) for one in every]  # a member may have no items

    found: Summary = {}
    if weights is None:
        count = xp.count_nonzero(upper, axis=-1, keepdims=True)
        fine = count % COARSE
        found["mass", 0], found["mass", 1] = (xp.astype(part, items.offset.dtype) for part in (count - fine, fine))
    else:
        found["mass", 0] = total(xp, xp.where(upper, weights, 0.0))
    nearest = items.nearest_on_each_side(upper)
    *_, tail, one_and_tail = items.tails_from_each_side(upper, *nearest)
    slope = tail / one_and_tail
    p = items.weighted(slope)
    of_largest = largest(p, sides)
    of_sides = {
        "nearest": nearest,
        "tails": sums(items.weighted(tail), sides),
        "slopes": sums(p, sides),
        "largest": of_largest,
    }
    is_top = (p >= xp.where(upper, *of_largest)) & (p > 0.0)
    if weights is not None:
        x = xp.where(is_top, items.scores(), math.inf)
        of_sides["score"] = [xp.min(xp.where(side, x, math.inf), axis=-1, keepdims=True) for side in sides]
    found |= {(name, side): values[side] for name, values in of_sides.items() for side in SIDES}
    if u is None:
        return found

    sets = [side & kind for side in sides for kind in (is_top, ~is_top)]

    def of_set(values: list[Array]) -> Any:
        """For every item the value of its set."""
        return xp.where(upper, xp.where(is_top, *values[:2]), xp.where(is_top, *values[2:]))

    u, of_sets = items.zero_where_removed(u), {}
    if weights is None:
        v, relative = slope, xp.ones_like(slope)
    else:
        v, relative = items.slope(), xp.where(slope > 0.0, weights, 0.0)
        of_sets["unit"] = largest(relative, sets)
        relative = relative / safe_denominator(xp, of_set(of_sets["unit"]))
    # An item that is alone in the first set must have its u as the level, without a rounding.
    factor = xp.where(is_top, 1.0, v)
    levels = [
        of_u / safe_denominator(xp, of_weights)
        for of_u, of_weights in zip(sums(factor * u, sets), sums(factor * relative, sets), strict=True)
    ]
    # In the other set any level serves, because `rest` makes up for it.
    farthest = limits(xp, p.dtype).farthest
    levels = [levels[0], clip(xp, levels[1], -farthest, farthest), levels[2], clip(xp, levels[3], -farthest, farthest)]
    of_sets["level"], of_sets["weight"] = levels, sums(v * relative, sets)
    of_sets["rest"] = sums(v * (u - relative * of_set(levels)), sets)
    found |= {
        (name, *place): value for name, values in of_sets.items() for place, value in zip(SETS, values, strict=True)
    }
    return found


class MergedLinearization(Linearization):
    """The rule for the cotangent u of the mask, None for none, with what all members have exchanged.

    It is balanced. Its `pull` reduces over the members once more, for what follows from the cotangent of the scores.
    """

    backend: PieceBackend

    def __init__(
        self, backend: PieceBackend, inputs: tuple[Any, ...], reference: Array, offset: Array, u: Array | None
    ) -> None:
        x, k, tau, weights, where = inputs

        def own(over: PieceBackend, x: Any, weights: Any, where: Any, u: Any) -> Summary:
            return summarize(Items(over, (x, k, tau, weights, where), reference, offset), u)

        self.summary = backend.gathered(own, x, weights, where, u)
        super().__init__(backend, inputs, reference, offset)
        # The largest p of each member on each side, and whether it dominates.
        self.largest = [unit * self.summary["largest", side] for side, unit in zip(SIDES, self.units, strict=True)]
        self.dominates = [one > DOMINANT * self.scaled_sum for one in self.largest]
        self.exists = self.xp.any(self.xp.concat(self.dominates, axis=-1), axis=-1, keepdims=True)
        if u is not None:
            self.unit, self.level, self.rest = self.merged_cotangents()

    def slope_from_each_side(self) -> tuple[Array, Array]:
        xp, found = self.xp, self.summary
        upper = self.log_odds() > 0.0
        high = xp.min(found["nearest", ABOVE], axis=-1, keepdims=True)
        low = xp.max(found["nearest", BELOW], axis=-1, keepdims=True)
        above, below, tail, one_and_tail = self.tails_from_each_side(upper, high, low)
        mass = sum(total(xp, values) for name, values in found.items() if name[0] == "mass")
        units = self.units_of_members(high, low)
        tails = [total(xp, unit * found["tails", side]) for side, unit in zip(SIDES, units, strict=True)]
        distance, *factors = self.side_factors(above, below, mass, *tails)
        # What a member's sums are multiplied by, so that they are those of v'.
        self.units = [unit * factor for unit, factor in zip(units, factors, strict=True)]
        return distance, tail * xp.where(upper, *factors) / one_and_tail

    def units_of_members(self, high: Array, low: Array) -> list[Array]:
        """For each side exp(-d) of every member, in units of that of the nearest item of all."""
        xp, largest = self.xp, limits(self.xp, self.offset.dtype).largest
        every = [clip(xp, self.summary["nearest", side], -largest, largest) for side in SIDES]
        nearest = [clip(xp, one, -largest, largest) for one in (high, low)]
        apart = [logits(self.backend, *pair, self.tau) for pair in zip(every, nearest, strict=True)]
        return [decay_of(xp, -apart[ABOVE]), decay_of(xp, apart[BELOW])]

    def sum_of_slopes(self) -> Array:
        pairs = zip(SIDES, self.units, strict=True)
        return sum(total(self.xp, unit * self.summary["slopes", side]) for side, unit in pairs)

    def merged_cotangents(self) -> tuple[Array | None, Array, Array]:
        """The unit of the weights, the level of u, and the sum of v times what remains of u."""
        xp = self.xp

        def of_sets(name: str) -> Array:
            return xp.concat([self.summary[name, *place] for place in SETS], axis=-1)

        levels = of_sets("level")
        weight, rest = of_sets("weight"), of_sets("rest")
        if self.weights is None:
            units = xp.concat([self.units[side] for side, _ in SETS], axis=-1)
            weight, rest = units * weight, units * rest
        never = xp.zeros_like(self.dominates[0])
        is_dominant = xp.concat([self.dominates[ABOVE], never, self.dominates[BELOW], never], axis=-1)

        def of_dominant(values: Array) -> Array:
            return total(xp, xp.where(is_dominant, values, 0.0))

        unit, ratio, farthest = None, 1.0, limits(xp, levels.dtype).farthest
        if self.weights is not None:
            units = of_sets("unit")
            unit = xp.where(self.exists, of_dominant(units), xp.max(units, axis=-1, keepdims=True))
            ratio = xp.minimum(units / safe_denominator(xp, unit), farthest)
        mean = total(xp, rest + levels * weight) / safe_denominator(xp, total(xp, ratio * weight))
        level = xp.where(self.exists, of_dominant(levels), clip(xp, mean, -farthest, farthest))
        return unit, level, total(xp, xp.where(is_dominant, 0.0, rest + (levels - ratio * level) * weight))

    # --- what the rule reduces over all items, from the merge

    def dominant_item(self) -> tuple[Array, Array]:
        # Of the items in a slice that has one, no other comes near to half of the sum. The merge has other roundings.
        return (self.weighted(self.scaled_slope) > 0.5 * self.scaled_sum) & self.exists, self.exists

    def dominant_score(self) -> Array:
        xp, bound = self.xp, limits(self.xp, self.offset.dtype)
        p = xp.concat(self.largest, axis=-1)
        of_largest = "nearest" if self.weights is None else "score"
        x = xp.concat([self.summary[of_largest, side] for side in SIDES], axis=-1)
        x_ref = xp.min(xp.where(p >= xp.max(p, axis=-1, keepdims=True), x, math.inf), axis=-1, keepdims=True)
        return self.backend.constant(clip(xp, x_ref, -bound.largest, bound.largest))

    def unit_of_weights(self, weights: Array, is_dominant: Array, exists: Array) -> Array:
        return self.unit

    def level_of(self, u: Array, weights: Array | None, is_dominant: Array, exists: Array) -> Array:
        return self.level

    def sum_of_rest(self, values: Array) -> Array:
        return self.rest
