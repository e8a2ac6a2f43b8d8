"""The derivative rule of slices in shards, from one summary per member.

The rule needs reductions over all items that depend on each other: the nearest items, the sums of the tails that are
measured from them, the dominant item, and the sum of v u with u measured from that item. One exchange for each of them
would take long. So every member measures its items from its own nearest ones, and sums them up. The members exchange
these summaries, a few numbers per slice, and each merges all of them. What is measured from the nearest item of one
member is converted by a factor, as in a sum of exponentials.

The sum of v u must not cancel either. The item with the largest p of a side, if it is alone, is kept apart from the
others: it may be the one that dominates the slice. Of it there is u itself. Of the others there is the level of u, its
mean by v, and the sum of v (u - level). Their sum with u measured from anywhere else follows from these two, as
accurately as if it were formed item by item.
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

#: Multiples of this number, and numbers below it, are summed exactly in every dtype.
COARSE = 4096

#: Numbers of shape (..., 1), or of all members (..., members), by a name and the number of a side.
Summary = dict[Any, Array]


def summarize(items: Items, u: Array | None, *, balanced: bool) -> tuple[Summary, dict[Any, Any]]:
    """What a member exchanges, from its own items, and what it keeps: v', the side of every item, and its nearest.

    If the rule is balanced there are two sides, above and below the threshold, else all items are on one. Of each side:
    the ``nearest`` score, or else the distance d of the nearest item; the sum of the ``tails`` and that of the p,
    ``slopes``, in units of exp(-d); the ``largest`` p of an item and, with weights, the ``score`` of that item. Above
    the threshold also the ``mass``, the number or weight of the items, in two parts.

    Of the item that is alone with the largest p, ``top``, and of the ``others``: the level of u in proportion to the
    weights, and the sum of v times the weights, in the unit of the largest weight. The others also have the sum
    ``rest`` of v times what remains of u. Without weights these are sums of v', in units of exp(-d) too, and a weight
    is 1.
    """
    xp, weights = items.xp, items.weights
    found: Summary = {}
    sides: tuple[Any, ...] = (None,)
    if balanced:
        upper = items.log_odds() > 0.0
        sides = upper, ~upper
        nearest: tuple[Array, ...] = items.nearest_on_each_side(upper)
        *_, tail, one_and_tail = items.tails_from_each_side(upper, *nearest)
        if weights is None:
            count = xp.count_nonzero(upper, axis=-1, keepdims=True)
            fine = count % COARSE
            found["mass", 0], found["mass", 1] = (xp.astype(part, items.offset.dtype) for part in (count - fine, fine))
        else:
            found["mass", 0] = total(xp, xp.where(upper, weights, 0.0))
    else:
        distance, tail, one_and_tail = items.tails_from_nearest()
        nearest = (distance,)

    def keep(name: str, values: Any) -> None:
        found.update({(name, side): value for side, value in enumerate(values)})

    def of_side(values: Any, other: float) -> Any:
        return (values if side is None else xp.where(side, values, other) for side in sides)

    def sums(values: Any) -> list[Array]:
        return [total(xp, one) for one in of_side(values, 0.0)]

    def largest(values: Any) -> list[Array]:  # a member may have no items
        return [xp.maximum(xp.max(one, axis=-1, keepdims=True), 0.0) for one in of_side(values, 0.0)]

    def by_side(values: list[Array]) -> Any:
        """For every item the value of its side."""
        return values[0] if len(values) == 1 else xp.where(sides[0], *values)

    slope = tail / one_and_tail
    p = items.weighted(slope)
    of_largest = largest(p)
    is_top = (p >= by_side(of_largest)) & (p > 0.0)
    keep("nearest", nearest)
    keep("largest", of_largest)
    keep("slopes", sums(p))
    if balanced:
        keep("tails", sums(items.weighted(tail)))
    if weights is not None:
        x = xp.where(is_top, items.scores(), math.inf)
        keep("score", [xp.min(one, axis=-1, keepdims=True) for one in of_side(x, math.inf)])
    kept: dict[Any, Any] = {("nearest", side): one for side, one in enumerate(nearest)}
    kept |= {"slope": slope, "upper": sides[0]} if balanced else {"slope": slope}
    if u is None:
        return found, kept

    u, v = items.zero_where_removed(u), slope if weights is None else items.slope()
    alone = [count == 1.0 for count in sums(xp.astype(is_top, v.dtype))]
    is_top = is_top & by_side(alone)
    keep("top level", sums(xp.where(is_top, u, 0.0)))
    others = xp.where(is_top, 0.0, v)
    if weights is None:
        of_weights = sums(others)
        keep("top weight", [xp.where(one, p, 0.0) for one, p in zip(alone, of_largest, strict=True)])
        relative: Any = 1.0
    else:
        kept["v"] = v
        keep("top weight", sums(xp.where(is_top, v, 0.0)))
        relative = xp.where(slope > 0.0, weights, 0.0)
        keep("top unit", sums(xp.where(is_top, relative, 0.0)))
        units = largest(xp.where(is_top, 0.0, relative))
        keep("others unit", units)
        relative = relative / safe_denominator(xp, by_side(units))
        of_weights = sums(others * relative)
    # Any level serves here, because `rest` makes up for it. At the item that is alone it must be u without a rounding.
    farthest = limits(xp, p.dtype).farthest
    pairs = zip(sums(others * u), of_weights, strict=True)
    levels = [clip(xp, of_u / safe_denominator(xp, one), -farthest, farthest) for of_u, one in pairs]
    keep("others weight", of_weights)
    keep("others level", levels)
    keep("others rest", sums(others * (u - relative * by_side(levels))))
    return found, kept


class MergedLinearization(Linearization):
    """The rule for the cotangent u of the mask, None for none, with what all members have exchanged.

    Its `pull` reduces over the members once more, for what follows from the cotangent of the scores.
    """

    backend: PieceBackend

    def __init__(
        self,
        backend: PieceBackend,
        inputs: tuple[Any, ...],
        reference: Array,
        offset: Array,
        u: Array | None,
        *,
        balanced: bool,
    ) -> None:
        x, k, tau, weights, where = inputs

        def own(over: PieceBackend, x: Any, weights: Any, where: Any, u: Any) -> Any:
            return summarize(Items(over, (x, k, tau, weights, where), reference, offset), u, balanced=balanced)

        self.summary, self.own = backend.gathered(own, x, weights, where, u)
        self.sides = range(2 if balanced else 1)
        super().__init__(backend, inputs, reference, offset, balanced=balanced)
        self.v, self.own = self.own.get("v"), {}
        # The largest p of each member on each side, and whether it dominates.
        self.largest = [unit * self.summary["largest", side] for side, unit in zip(self.sides, self.units, strict=True)]
        self.dominates = [one > DOMINANT * self.scaled_sum for one in self.largest]
        self.exists = self.xp.any(self.xp.concat(self.dominates, axis=-1), axis=-1, keepdims=True)
        if u is not None:
            self.unit, self.level, self.rest = self.merged_cotangents()

    def slope_from_nearest(self) -> tuple[Array, Array]:
        xp, distances = self.xp, self.summary["nearest", 0]
        self.distance = xp.min(distances, axis=-1, keepdims=True)
        self.units = [decay_of(xp, self.distance - distances)]
        if self.weights is None:
            return self.distance, self.own["slope"] * decay_of(xp, self.distance - self.own["nearest", 0])
        return super().slope_from_nearest()

    def nearest_distance(self, size: Array) -> Array:
        return self.distance

    def slope_from_each_side(self) -> tuple[Array, Array]:
        xp, found, upper = self.xp, self.summary, self.own["upper"]
        high = xp.min(found["nearest", 0], axis=-1, keepdims=True)
        low = xp.max(found["nearest", 1], axis=-1, keepdims=True)
        mass = sum(total(xp, values) for name, values in found.items() if name[0] == "mass")
        units = self.units_of_members(found, high, low)
        tails = [total(xp, unit * found["tails", side]) for side, unit in zip(self.sides, units, strict=True)]
        if self.weights is None:
            *_, above, below = self.distances_from_each_side(high, low)
            slope = self.own["slope"] * xp.where(upper, *self.units_of_members(self.own, high, low))
        else:  # v' of an item without weight is clipped, and the member may have no item with weight near it
            above, below, tail, one_and_tail = self.tails_from_each_side(upper, high, low)
            slope = tail / one_and_tail
        distance, *factors = self.side_factors(above, below, mass, *tails)
        # What a member's sums are multiplied by, so that they are those of v'.
        self.units = [unit * factor for unit, factor in zip(units, factors, strict=True)]
        return distance, slope * xp.where(upper, *factors)

    def units_of_members(self, found: Summary, high: Array, low: Array) -> list[Array]:
        """For each side exp(-d) of every member, or of this one, in units of that of the nearest item of all."""
        xp, largest = self.xp, limits(self.xp, self.offset.dtype).largest
        every = [clip(xp, found["nearest", side], -largest, largest) for side in self.sides]
        nearest = [clip(xp, one, -largest, largest) for one in (high, low)]
        apart = [logits(self.backend, *pair, self.tau) for pair in zip(every, nearest, strict=True)]
        return [decay_of(xp, -apart[0]), decay_of(xp, apart[1])]

    def sum_of_slopes(self) -> Array:
        pairs = zip(self.sides, self.units, strict=True)
        return sum(total(self.xp, unit * self.summary["slopes", side]) for side, unit in pairs)

    def merged_cotangents(self) -> tuple[Array | None, Array, Array]:
        """The unit of the weights, the level of u, and the sum of v times what remains of u."""
        xp = self.xp

        def joined(top: list[Array], others: list[Array]) -> Array:
            return xp.concat([*top, *others], axis=-1)

        def named(name: str) -> list[Array]:
            return [self.summary[name, side] for side in self.sides]

        levels, weight = (joined(named(f"top {name}"), named(f"others {name}")) for name in ("level", "weight"))
        rest = joined([xp.zeros_like(one) for one in self.largest], named("others rest"))
        if self.weights is None:
            units = joined(self.units, self.units)
            weight, rest = units * weight, units * rest
        is_dominant = joined(self.dominates, [xp.zeros_like(one) for one in self.dominates])

        def of_dominant(values: Array) -> Array:
            return total(xp, xp.where(is_dominant, values, 0.0))

        unit, ratio, farthest = None, 1.0, limits(xp, levels.dtype).farthest
        if self.weights is not None:
            units = joined(named("top unit"), named("others unit"))
            unit = xp.where(self.exists, of_dominant(units), xp.max(units, axis=-1, keepdims=True))
            ratio = xp.minimum(units / safe_denominator(xp, unit), farthest)
        mean = total(xp, rest + levels * weight) / safe_denominator(xp, total(xp, ratio * weight))
        level = xp.where(self.exists, of_dominant(levels), clip(xp, mean, -farthest, farthest))
        return unit, level, total(xp, xp.where(is_dominant, 0.0, rest + (levels - ratio * level) * weight))

    # --- what the rule computes of the items, and reduces over all of them

    def dmask_dz(self) -> Array:
        return super().dmask_dz() if self.v is None else self.v

    def dominant_item(self) -> tuple[Array, Array]:
        # Of the items in a slice that has one, no other comes near to half of the sum. The merge has other roundings.
        return (self.weighted(self.scaled_slope) > 0.5 * self.scaled_sum) & self.exists, self.exists

    def dominant_score(self) -> Array:
        xp, bound = self.xp, limits(self.xp, self.offset.dtype)
        p = xp.concat(self.largest, axis=-1)
        of_largest = "nearest" if self.weights is None else "score"
        x = xp.concat([self.summary[of_largest, side] for side in self.sides], axis=-1)
        x_ref = xp.min(xp.where(p >= xp.max(p, axis=-1, keepdims=True), x, math.inf), axis=-1, keepdims=True)
        return self.backend.constant(clip(xp, x_ref, -bound.largest, bound.largest))

    def unit_of_weights(self, weights: Array, is_dominant: Array, exists: Array) -> Array:
        return self.unit

    def level_of(self, u: Array, weights: Array | None, is_dominant: Array, exists: Array) -> Array:
        return self.level

    def sum_of_rest(self, values: Array) -> Array:
        return self.rest
