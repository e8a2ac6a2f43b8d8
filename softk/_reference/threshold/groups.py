"""One budget over groups of items, each with a floor and a cap: the mask, as a primitive.

**The problem.** The items have scores x_i and weights a_i. The mask maximizes the sum of a_i (m_i x_i + tau H(m_i)),
where H is the binary entropy. The sum of a_i m_i is k over all items, and from least_g to most_g in group g.

**Optimality.** Let F_g(t) be the sum of a_i sigmoid((x_i - t) / tau) over the items of group g. It decreases in t. The
Lagrange multiplier of a bound that is met with equality shifts the threshold of its group, and nothing else. So there
is one common threshold t with

    k_g = min(max(F_g(t), least_g), most_g),   sum_g k_g = k,

and the mask of group g is the soft top-k of its own items with the mass k_g. A group whose k_g is at a bound is fixed.
The other groups are free. Together they are one soft top-k, with the mass that the fixed groups leave.

**Which groups are fixed** (Bitran and Hax, 1981). The soft top-k of all free groups gives them the masses F_g. Let E be
the mass by which the groups above their caps exceed them, and D the mass that the groups below their floors lack. If
E >= D, the masses clipped to their bounds sum to no more than they should, so the common threshold is not above the
present one. A group above its cap stays above it if the threshold falls, so it is fixed there. If E < D, the groups
below their floors are fixed. This repeats until no free group violates a bound. Every step fixes a group.

A group that has no more than its floor is selected whole. It is fixed from the start.

**The derivative.** The set of the fixed groups is locally constant. So the derivative is that of the soft top-k of the
free groups, whose mass is k less the bounds of the others, and of the soft top-k of every fixed group.

Inputs, in this order, for m leaves: the scores of every leaf, (..., s_i, n_i), a row per group; k and tau (..., 1, 1)
or (); m times the weights or None; m times where or None; m times the floors and m times the caps (..., s_i, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

from softk.backend import Array, Backend, Form, Inputs, Primitive

from . import masks
from .limits import ROUNDINGS, limits
from .problem import selectable, total

#: Where the mass of a group comes from, as a number per group.
FREE, AT_CAP, AT_FLOOR, WHOLE = 0.0, 1.0, -1.0, 2.0

Arrays = list[Any]


class _Problem:
    """The inputs of one call. A list has an array per leaf, of one value per item (..., s, n) or group (..., s, 1)."""

    def __init__(self, backend: Backend, inputs: Inputs, m: int) -> None:
        self.backend, self.xp = backend, backend.xp
        self.x, self.k, self.tau, self.weights, self.where, self.least, self.most = _listed(inputs, m)
        self.dtype = self.k.dtype

    def each(self, function: Callable[..., Array], *values: Any) -> Arrays:
        """The function of the values of every leaf."""
        return [function(*of_leaf) for of_leaf in zip(*values, strict=True)]

    @cached_property
    def able(self) -> Arrays:
        """Whether an item can be selected."""
        return self.each(lambda x, where: ~(selectable(self.xp, x, where) == -math.inf), self.x, self.where)

    @cached_property
    def capacity(self) -> Arrays:
        """The number, or the weight, of the items of every group that can be selected."""
        return self.masses(self.able)

    def masses(self, values: Any) -> Arrays:
        """The sums over the groups of values, times the weights. The weight of a value of 0 may be any number."""
        xp = self.xp

        def mass(value: Array, weights: Array | None) -> Array:
            value = self.wide(value)
            return total(xp, value if weights is None else xp.where(value > 0.0, weights, 0.0) * value)

        return self.each(mass, values, self.weights)

    def over_all(self, values: Arrays) -> Array:
        """The sum over all groups, (..., 1, 1)."""
        found: Array = sum(self.xp.sum(value, axis=-2, keepdims=True) for value in values)
        return found

    def wide(self, values: Array) -> Array:
        return values if values.dtype == self.dtype else self.xp.astype(values, self.dtype)

    # --- the two kinds of soft top-k that the mask is made of

    def bounds(self, sides: Arrays) -> Arrays:
        """The bounds of the groups that are fixed at one, and 0 for the others."""
        return self.each(self.at_bound, sides, self.least, self.most)

    def at_bound(self, side: Array, least: Any, most: Any) -> Array:
        return self.xp.where(side == AT_CAP, most, self.xp.where(side == AT_FLOOR, least, 0.0))

    def of_free(self, sides: Arrays) -> Inputs:
        """The inputs of the soft top-k of all free groups, which are one row."""
        xp = self.xp

        def mass_of(kind: float) -> Array:
            return self.over_all(self.each(lambda side, mass: xp.where(side == kind, mass, 0.0), sides, self.capacity))

        rest = self.k - self.over_all(self.bounds(sides)) - mass_of(WHOLE)
        # Rounding must not take the mass out of its range. More than all is all.
        most = mass_of(FREE)
        over = self.backend.constant(xp.minimum(rest, 0.0) + xp.maximum(rest - most, 0.0))
        free = self.each(lambda able, side: able & (side == FREE), self.able, sides)
        return self.joined(self.x), rest - over, self.tau, self.joined(self.weights), self.joined(free)

    def of_fixed(self, sides: Arrays) -> list[Inputs]:
        """The inputs of the soft top-k's of the groups of every leaf, of which those that are not at a bound have 0."""
        tau = self.per_group(self.tau)
        return list(zip(self.x, self.bounds(sides), tau, self.weights, self.where, strict=True))

    def per_group(self, value: Any) -> Arrays:
        """A number, or a value of all groups, for the groups of every leaf."""
        if value is None or value.ndim == 0:
            return [value] * len(self.x)
        return [value + self.xp.zeros_like(least) for least in self.least]

    def joined(self, values: Any) -> Any:
        """One row of all items, in the working dtype. A tangent that is not given is 0; None if all are."""
        if all(value is None for value in values):
            return None
        xp, rows = self.xp, []
        for value, x in zip(values, self.x, strict=True):
            if value is None:
                value = xp.zeros(x.shape, dtype=self.dtype, device=self.backend.device(x))
            value = value if xp.isdtype(value.dtype, "bool") else self.wide(value)
            rows.append(xp.reshape(value, (*value.shape[:-2], 1, value.shape[-2] * value.shape[-1])))
        return xp.concat(rows, axis=-1) if len(rows) > 1 else rows[0]

    def separated(self, row: Any) -> Arrays:
        """The inverse of `joined`."""
        if row is None:
            return [None] * len(self.x)
        found, start = [], 0
        for x in self.x:
            stop = start + x.shape[-2] * x.shape[-1]
            part = row[..., start:stop]
            found.append(self.xp.reshape(part, (*part.shape[:-2], *x.shape[-2:])))
            start = stop
        return found

    def within(self, sides: Arrays, values: Any, *kinds: float) -> Arrays:
        """The values, and 0 for the groups of other kinds. None stays None."""

        def chosen(side: Array, value: Any) -> Any:
            if value is None:
                return None
            kept = side == kinds[0]
            for kind in kinds[1:]:
                kept = kept | (side == kind)
            return self.xp.where(kept, value, 0.0)

        return self.each(chosen, sides, values)

    def if_able(self, able: Array, values: Any) -> Any:
        """The values, and 0 for the items that cannot be selected. None stays None."""
        return None if values is None else self.xp.where(able, values, 0.0)

    def bound_moved(self, side: Array, dleast: Any, dmost: Any) -> Any:
        """The tangent of the bound of a group. None is zero."""
        if dleast is None and dmost is None:
            return None
        none = self.xp.zeros_like(side)
        return self.at_bound(side, none if dleast is None else dleast, none if dmost is None else dmost)

    def added(self, of_fixed: Any, of_free: Any) -> Any:
        """A cotangent of a leaf, in the dtype of the first. None is not needed."""
        if of_fixed is None:
            return None
        found = self.wide(of_fixed) + of_free
        return found if found.dtype == of_fixed.dtype else self.xp.astype(found, of_fixed.dtype)

    # --- which groups are fixed

    def sides(self) -> Arrays:
        """Where the mass of every group comes from."""
        xp, backend = self.xp, self.backend

        def start(least: Array, capacity: Array) -> Array:
            return xp.where(capacity <= least, WHOLE, xp.zeros_like(least))

        def by_how_much(side: Array, more: Array, less: Array) -> Array:
            return xp.where(side == FREE, xp.maximum(more - less, 0.0), 0.0)

        def step(sides: Arrays) -> tuple[Arrays, Array]:
            mask = backend.run(masks.mask, "forward", self.of_free(sides), ranks=None)[0]
            mass = self.masses(self.separated(mask))
            excess = self.each(by_how_much, sides, mass, self.most)
            lack = self.each(by_how_much, sides, self.least, mass)
            falls = self.over_all(excess) >= self.over_all(lack)  # the common threshold does not rise

            def fixed(side: Array, excess: Array, lack: Array) -> Array:
                above, below = (excess > 0.0) & falls, (lack > 0.0) & ~falls
                return xp.where(above, AT_CAP, xp.where(below, AT_FLOOR, side))

            return self.each(fixed, sides, excess, lack), self.over_all(excess) + self.over_all(lack) <= 0.0

        count = sum(least.shape[-2] for least in self.least)
        found: Arrays = backend.repeat(step, self.each(start, self.least, self.capacity), count + 1)
        return found

    def is_valid(self) -> Array:
        """Whether all values are in their ranges, and the bounds leave room for k, (..., 1, 1). A NaN is not valid."""
        xp, eps = self.xp, limits(self.xp, self.dtype).eps
        usable = self.each(lambda x, able: ~xp.isnan(x) | ~able, self.x, self.able)
        largest, rounding = [xp.ones_like(x) for x in self.x], ROUNDINGS * eps
        if self.weights[0] is not None:
            # An item that is never selected may have any weight.
            has_weight = [(weights >= 0.0) & (weights < math.inf) for weights in self.weights]
            usable = self.each(lambda one, other, able: one & (other | ~able), usable, has_weight, self.able)
            largest = [xp.astype(one, self.dtype) for one in has_weight]
            rounding = rounding + sum(x.shape[-2] * x.shape[-1] for x in self.x) * eps  # summed in another order
        # A floor counts only as far as items can be selected. For a cap all items count, as they do for k.
        least = self.over_all(self.each(xp.minimum, self.least, self.capacity))
        most = self.over_all(self.each(xp.minimum, self.most, self.masses(largest)))
        found = (least <= self.k * (1.0 + rounding)) & (self.k <= most * (1.0 + rounding)) & (self.tau > 0.0)
        for one, low, high in zip(usable, self.least, self.most, strict=True):
            in_order = (low >= 0.0) & (low < math.inf) & (high >= low) & xp.all(one, axis=-1, keepdims=True)
            found = found & xp.all(in_order, axis=-2, keepdims=True)
        return found


def _listed(values: Inputs, m: int) -> list[Any]:
    """The inputs, or their tangents, with a list of what the leaves have."""
    parts = (list(values[start : start + m]) for start in (m + 2, 2 * m + 2, 3 * m + 2, 4 * m + 2))
    return [list(values[:m]), *values[m : m + 2], *parts]


def bounded_mask(m: int, *, hard: bool) -> Primitive:
    """The soft mask of m leaves, or the hard mask with its derivative."""
    return _bounded_mask(m, hard)


@cache
def _bounded_mask(m: int, hard: bool) -> Primitive:
    def forward(backend: Backend, inputs: Inputs) -> tuple[Array, ...]:
        xp, constant = backend.xp, backend.constant
        values = _Problem(backend, tuple(None if value is None else constant(value) for value in inputs), m)
        sides, valid = [constant(side) for side in values.sides()], values.is_valid()
        problem = _Problem(backend, inputs, m)
        joint, offset, reference = backend.run(masks.mask, "forward", problem.of_free(sides), ranks=None)
        found, rest = [], []
        indicator = _hard(values) if hard else None
        for i, (of_free, given, able) in enumerate(
            zip(problem.separated(joint), problem.of_fixed(sides), problem.able, strict=True)
        ):
            of_fixed, *state = _apart(backend, "forward", given, ranks=None)
            side = sides[i]
            mask = xp.where(side == WHOLE, xp.astype(able, of_free.dtype), problem.wide(of_fixed))
            mask = xp.where(side == FREE, of_free, mask)
            if indicator is not None:
                mask = indicator[i] + (mask - constant(mask))
            mask = xp.where(valid, mask, math.nan)
            found.append(mask if mask.dtype == problem.x[i].dtype else xp.astype(mask, problem.x[i].dtype))
            rest.append(state)
        offsets, references = zip(*rest, strict=True)
        return *found, offset, *offsets, reference, *references, *sides

    def states(outputs: Inputs) -> tuple[Inputs, list[Inputs], Arrays]:
        """The outputs of the two kinds of soft top-k, and where the masses of the groups come from."""
        offset, offsets, reference, references, sides = (
            outputs[m],
            outputs[m + 1 : 2 * m + 1],
            outputs[2 * m + 1],
            outputs[2 * m + 2 : 3 * m + 2],
            outputs[3 * m + 2 :],
        )
        return (None, offset, reference), [(None, *pair) for pair in zip(offsets, references, strict=True)], list(sides)

    def jvp(backend: Backend, inputs: Inputs, outputs: Inputs, tangents: Inputs) -> tuple[Array, ...]:
        xp, problem = backend.xp, _Problem(backend, inputs, m)
        free, fixed, sides = states(outputs)
        dx, dk, dtau, da, _, dleast, dmost = _listed(tangents, m)
        dbounds = problem.each(problem.bound_moved, sides, dleast, dmost)
        # The mass of the free groups.
        drest = None if dk is None else dk + xp.zeros_like(outputs[m])
        whole = problem.each(problem.if_able, problem.able, problem.within(sides, da, WHOLE))
        for change in (*dbounds, *(None if one is None else total(xp, one) for one in whole)):
            if change is not None:
                change = xp.sum(change, axis=-2, keepdims=True)
                drest = -change if drest is None else drest - change
        moved = problem.joined(dx), drest, dtau, problem.joined(da), None
        joint, doffset = backend.run(masks.mask, "jvp", problem.of_free(sides), free, moved)
        found, doffsets = [], []
        given = zip(dx, dbounds, problem.per_group(dtau), da, [None] * m, strict=True)
        for x, side, of_free, problem_of, state, tangent in zip(
            problem.x, sides, problem.separated(joint), problem.of_fixed(sides), fixed, given, strict=True
        ):
            of_fixed, of_offset = _apart(backend, "jvp", problem_of, state, tangent)
            mask = xp.where(side == FREE, of_free, xp.where(side == WHOLE, 0.0, problem.wide(of_fixed)))
            found.append(mask if mask.dtype == x.dtype else xp.astype(mask, x.dtype))
            doffsets.append(of_offset)
        return *found, doffset, *doffsets

    def vjp(backend: Backend, inputs: Inputs, outputs: Inputs, cotangents: Inputs, needed: tuple[bool, ...]) -> Inputs:
        xp, problem = backend.xp, _Problem(backend, inputs, m)
        free, fixed, sides = states(outputs)
        of_x, of_k, of_tau, of_a, _, of_least, of_most = _listed(needed, m)
        of_bounds = [low or high for low, high in zip(of_least, of_most, strict=True)]
        u, c, cs = list(cotangents[:m]), cotangents[m], cotangents[m + 1 :]
        wanted = any(of_x), of_k or any(of_a) or any(of_bounds), of_tau, any(of_a), False
        bars = problem.joined(problem.within(sides, u, FREE)), c
        row, restbar, taubar, row_of_a, _ = backend.run(masks.mask, "vjp", problem.of_free(sides), free, bars, wanted)
        # The mass of a group that is selected whole is the sum of its weights, which the free groups lack.
        whole = problem.within(sides, [restbar if is_needed else None for is_needed in of_a], WHOLE)
        whole = problem.each(problem.if_able, problem.able, whole)
        xbars, abars, lows, highs = [], [], [], []
        given = problem.of_fixed(sides), fixed, problem.within(sides, u, AT_CAP, AT_FLOOR), cs
        for i, (problem_of, state, *bars_of) in enumerate(zip(*given, strict=True)):
            wanted = of_x[i], of_bounds[i], of_tau, of_a[i], False
            xbar, bound, tau, abar, _ = _apart(backend, "vjp", problem_of, state, tuple(bars_of), wanted)
            xbars.append(xbar)
            abars.append(None if abar is None else abar - whole[i])
            if of_tau:
                taubar = taubar + xp.sum(tau, axis=-2, keepdims=True)
            bound = None if bound is None else bound - restbar
            lows.append(None if bound is None else xp.where(sides[i] == AT_FLOOR, bound, 0.0))
            highs.append(None if bound is None else xp.where(sides[i] == AT_CAP, bound, 0.0))
        xbars = problem.each(problem.added, xbars, problem.separated(row))
        abars = problem.each(problem.added, abars, problem.separated(row_of_a))
        return *xbars, restbar, taubar, *abars, *(None,) * m, *lows, *highs

    def forms(xp: Any, inputs: tuple[Any, ...]) -> tuple[Form, ...]:
        scores, dtype, batch = inputs[:m], inputs[m].dtype, inputs[0].shape[:-2]
        number = Form((*batch, 1, 1), dtype)
        per_group = [Form((*x.shape[:-1], 1), dtype) for x in scores]
        return *(Form(x.shape, x.dtype) for x in scores), number, *per_group, number, *per_group, *per_group

    def named(kind: str) -> tuple[str, ...]:
        return tuple(f"{kind}_{i}" for i in range(m))

    return Primitive(
        f"bounded_{'hard_' if hard else ''}mask_{m}",
        forward,
        forms,
        jvp,
        vjp,
        results=named("mask"),
        state=("offset", *named("offset")),
        constants=("reference", *named("reference"), *named("side")),
        axes=2,
        narrow=True,
    )


def _apart(backend: Backend, part: Any, inputs: tuple[Any, ...], *groups: Any, **options: Any) -> tuple[Any, ...]:
    """A part of the soft top-k of every group of a leaf. A leaf without scores has zeros."""
    x, bound = inputs[:2]
    if 0 not in x.shape:
        return backend.run(masks.mask, part, inputs, *groups, **options)
    xp = backend.xp
    mask, number = xp.zeros_like(x), xp.zeros_like(bound)
    if part == "forward":
        return mask, number, number
    return (mask, number) if part == "jvp" else (mask, number, number, xp.zeros_like(mask), None)


def _hard(problem: _Problem) -> Arrays:
    """The exact indicator: the floor of every group first, then the largest of those that the caps allow."""
    backend, xp = problem.backend, problem.xp

    def largest(counts: Arrays) -> Arrays:
        given = zip(
            problem.x, problem.each(xp.minimum, counts, problem.capacity), problem.per_group(problem.tau), strict=True
        )
        return [
            xp.zeros_like(x)
            if 0 in x.shape
            else backend.run(masks.hard_mask, "forward", (x, count, tau, None, where), ranks=None)[0]
            for (x, count, tau), where in zip(given, problem.where, strict=True)
        ]

    floors, caps = largest(problem.least), largest(problem.most)
    others = problem.each(lambda cap, floor: (cap == 1.0) & (floor == 0.0), caps, floors)
    rest = problem.k - problem.over_all(problem.each(xp.minimum, problem.least, problem.capacity))
    rest = xp.minimum(rest, problem.over_all(problem.masses(others)))
    inputs = problem.joined(problem.x), rest, problem.tau, None, problem.joined(others)
    chosen = problem.separated(backend.run(masks.hard_mask, "forward", inputs, ranks=None)[0])
    return problem.each(lambda floor, one: problem.wide(floor) + one, floors, chosen)
