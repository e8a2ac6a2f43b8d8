"""Floors and caps of groups: the arguments `least` and `most` of a budget."""

from __future__ import annotations

import math
from itertools import cycle
from typing import Any

from softk._reference.threshold.groups import bounded_mask
from softk.backend import Array, is_array

from .call import Argument
from .checks import is_number
from .leaves import Leaf
from .shapes import cast, fits, shrink
from .trees import Rebuild, matched

__all__ = ["Bounds"]

#: The bounds of a group that has none.
NONE = {"least": 0.0, "most": math.inf}


class Bounds:
    """The floors and caps of the groups of every leaf.

    A bound is a number, which holds for every group of its leaf, or an array with one value per group. A number, or an
    array without axes, in the place of the tree holds for every leaf.
    """

    def __init__(self, least: Any, most: Any, paths: list[str]) -> None:
        self.given: dict[str, list[Any]] = {}
        self.labels = {name: [name + path.removeprefix("tree") for path in paths] for name in NONE}
        self.trees: tuple[str, ...] = ()  # the bounds that are trees, and those that are one array without axes
        self.shared: tuple[str, ...] = ()
        self.groups: list[tuple[int, ...]] = []  # the shape of the bounds of every leaf, with all axes of its scores
        self.rows: list[tuple[int, int]] = []  # the number of its groups, and of the items of each
        for name, value in (("least", least), ("most", most)):
            is_one = is_array(value) and value.ndim == 0
            if value is None or is_number(value) or is_one:
                self.given[name] = [value] * len(paths)
                self.shared += (name,) if is_one else ()
            else:
                self.given[name] = matched(name, value, paths, "tree", numbers=True)
                self.trees += (name,)
            for label, bound in zip(self.labels[name], self.given[name], strict=True):
                if is_number(bound) and not (0 <= bound < math.inf or bound == NONE[name]):
                    allowed = "at least 0 and finite" if name == "least" else "at least 0"
                    raise ValueError(f"{label} must be {allowed}, got {bound!r}")

    def arrays(self, i: int) -> dict[str, Array]:
        """The bounds of a leaf that are arrays."""
        return {
            self.labels[name][i]: bounds[i]
            for name, bounds in self.given.items()
            if bounds[i] is not None and not is_number(bounds[i])
        }

    def group(self, leaves: list[Leaf]) -> None:
        """Put the items of every leaf in the order of its groups.

        The groups lie along the axes along which an array of bounds has a size. Without arrays a leaf is one group.
        """
        for i, leaf in enumerate(leaves):
            groups = [1] * leaf.ndim
            for label, bound in self.arrays(i).items():
                if not fits(tuple(bound.shape), leaf.shape):
                    raise ValueError(
                        f"{label} must be a number, or an array that broadcasts to the shape of its scores, "
                        f"{leaf.shape}, with size 1 along the axes of a group, got shape {tuple(bound.shape)}"
                    )
                if not leaf.xp.isdtype(bound.dtype, ("real floating", "integral")):
                    raise TypeError(f"{label} must be real, got dtype {bound.dtype}")
                for axis, size in enumerate(bound.shape, leaf.ndim - bound.ndim):
                    groups[axis] = groups[axis] if size == 1 else size
            own = [axis for axis, size in enumerate(groups) if size != 1]
            within = [axis for axis in range(leaf.ndim) if axis not in own]
            leaf.axes = (*own, *within)
            self.groups.append(tuple(groups))
            self.rows.append((math.prod(groups), math.prod(leaf.shape[axis] for axis in within)))

    def require_room(self, k: Any, *, weighted: bool) -> None:
        """Require bounds that leave room for k, as far as they are numbers."""
        for low, high, label in zip(self.given["least"], self.given["most"], self.labels["least"], strict=True):
            if is_number(low) and is_number(high) and low > high:
                raise ValueError(f"{label} must be at most most, {high!r}, got {low!r}")
        if not is_number(k):
            return
        for name, bounds in self.given.items():
            if not all(bound is None or is_number(bound) for bound in bounds):
                continue
            room = 0.0
            for bound, (count, size) in zip(bounds, self.rows, strict=True):
                room += count * min(NONE[name] if bound is None else bound, math.inf if weighted else size)
            rounding = 1e-6 * room if room < math.inf else 0.0
            if name == "least" and room > k + rounding:
                raise ValueError(f"least must sum to at most k, {k!r}, over all groups, got {room:g}")
            if name == "most" and room < k - rounding:
                raise ValueError(f"most must sum to at least k, {k!r}, over all groups, got {room:g}")

    def require_whole(self, leaves: list[Leaf]) -> None:
        """Require what the hard mask can select: whole bounds, and numbers of items that the dtype represents."""
        for name, bounds in self.given.items():
            for label, bound in zip(self.labels[name], bounds, strict=True):
                if is_number(bound) and bound < math.inf and bound != math.floor(bound):
                    raise ValueError(f"{label} must be a whole number with hard=True, got {bound!r}")
        n, dtype = sum(leaf.n for leaf in leaves), leaves[0].working
        largest = 2.0 / float(leaves[0].xp.finfo(dtype).eps)
        if n > largest:
            raise ValueError(
                f"tree must have at most {largest:.0f} scores in {dtype} with hard=True and floors or caps, got {n}"
            )

    def applied(self, call: dict[str, Any], leaves: list[Leaf], rebuild: Rebuild, *, hard: bool) -> dict[str, Any]:
        """The parts of a call with bounds, from those of a call without them."""
        arguments: dict[str, Argument] = {}
        rows = cycle(self.rows)  # for the scores, the weights and where
        for name, argument in call["arguments"].items():
            arguments[name] = _in_rows(leaves[0].xp, argument, (1, 1) if name in ("k", "epsilon") else next(rows))
        for name, bounds in self.given.items():
            for i, (label, bound) in enumerate(zip(self.labels[name], bounds, strict=True)):
                arguments[label] = _per_group(leaves[i], NONE[name] if bound is None else bound, self.groups[i])
        trees = call["trees"] | {name: (self.labels[name], rebuild) for name in (*self.trees, *self.shared)}
        primitive = bounded_mask(len(leaves), hard=hard)
        restores = tuple(map(_from_rows, leaves, call["restores"], self.rows))
        changed = {"primitive": primitive, "options": {}, "arguments": arguments, "restores": restores}
        return call | changed | {"trees": trees, "shared": self.shared}


def _from_rows(leaf: Leaf, mask: Argument, rows: tuple[int, int]) -> Argument:
    """The mask of a leaf, from rows of groups."""
    reshape = leaf.xp.reshape
    return mask.through(lambda values: reshape(values, (leaf.n,)), lambda cotangent: reshape(cotangent, rows))


def _in_rows(xp: Any, argument: Argument, rows: tuple[int, int]) -> Argument:
    """An argument of one axis, in rows. A number stays as it is."""
    value, push, pull = argument.value, argument.push, argument.pull
    if value is not None and value.ndim == 0:
        return argument
    return Argument(
        None if value is None else xp.reshape(value, rows),
        argument.given,
        None if push is None else lambda values: xp.reshape(push(values), rows),
        None if pull is None else lambda cotangent: pull(xp.reshape(cotangent, (rows[0] * rows[1],))),
    )


def _per_group(leaf: Leaf, bound: Any, groups: tuple[int, ...]) -> Argument:
    """The bounds of the groups of a leaf, (s, 1)."""
    xp, shape = leaf.xp, (math.prod(groups), 1)
    if is_number(bound):
        # A symbol of a trace stays a symbol.
        number = bound if leaf.backend.memory(bound) is None else float(bound)
        return Argument(xp.full(shape, number, dtype=leaf.working, device=leaf.device), bound)
    given = tuple(bound.shape)

    def push(values: Array) -> Array:
        return xp.reshape(xp.broadcast_to(cast(xp, values, leaf.working), groups), shape)

    def pull(cotangent: Array) -> Array:
        return cast(xp, shrink(xp, xp.reshape(cotangent, groups), given), bound.dtype)

    moving = xp.isdtype(bound.dtype, "real floating")
    return Argument(push(bound), bound, push if moving else None, pull if moving else None)
