"""The call of a function whose scores are the leaves of a tree, and the conversion of a leaf."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

from softk.backend import Array

from .arguments import Slices
from .call import Argument, Call
from .checks import require_array
from .trees import Rebuild, matched

__all__ = ["Leaf", "TreeCall", "compute_alike"]


@dataclass
class TreeCall(Call[Any]):
    """A call whose scores are the leaves of a tree: one argument per leaf, named by its path.

    `trees` has the arguments that are trees, the scores first: their leaves, and what puts other leaves in their
    places. `results` is what does this with the results; None if there is one result. `shared` are the arguments that
    are one number for all leaves.
    """

    trees: dict[str, tuple[list[str], Rebuild]] = field(default_factory=dict)
    results: Rebuild | None = None
    shared: tuple[str, ...] = ()
    holds_scores: ClassVar[bool] = True

    def inputs(self, x: Any) -> tuple[Array | None, ...]:
        return tuple(argument.value for argument in self.arguments.values())

    def sample(self, x: Any) -> Array:
        return next(iter(self.arguments.values())).given

    def spread(self, name: str, value: Any) -> dict[str, Any]:
        if name not in self.trees:
            return super().spread(name, value)
        leaves = self.trees[name][0]
        if name in self.shared:
            return dict.fromkeys(leaves, value)
        found = zip(leaves, matched(name, value, leaves, name), strict=True)
        return {leaf: part for leaf, part in found if part is not None}

    def collect(self, found: dict[str, Array]) -> dict[str, Any]:
        of_trees = {leaf for leaves, _ in self.trees.values() for leaf in leaves}
        whole: dict[str, Any] = {name: value for name, value in found.items() if name not in of_trees}
        for name, (leaves, rebuild) in self.trees.items():
            if name in self.shared:
                whole |= {name: sum(found[leaf] for leaf in leaves)} if leaves[0] in found else {}
            elif any(leaf in found for leaf in leaves):
                whole[name] = rebuild(iter([found.get(leaf) for leaf in leaves]))
        return whole

    def cotangents(self, cotangent: Any, out: Any) -> dict[str, Any]:
        if self.results is None:
            return super().cotangents(cotangent, out)
        root, (leaves, _) = next(iter(self.trees.items()))
        parts = matched("cotangent", cotangent, leaves, root)
        return {"cotangent" + leaf.removeprefix(root): part for leaf, part in zip(leaves, parts, strict=True)}

    def tangent(self, rates: list[Array]) -> Any:
        return rates[0] if self.results is None else self.results(iter(rates))


class Leaf(Slices):
    """A leaf, all of whose items belong to the slice. A leaf without axes is one item."""

    def __init__(
        self, path: str, x: Any, others: dict[str, Any], *, smallest: bool, like: Array, root: str = "tree"
    ) -> None:
        require_array(path, x)
        self.is_item = x.ndim == 0
        x = x[None] if self.is_item else x
        others = {root: like, **others}  # the first leaf, whose library and device the others have
        super().__init__(x, tuple(range(x.ndim)), called=path, smallest=smallest, joint=True, **others)

    def leaf_scores(self) -> Argument:
        scores, xp = self.scores(narrow=True), self.xp
        if not self.is_item:
            return scores
        push: Any = scores.push
        pull: Any = scores.pull
        return Argument(None, None, lambda x: push(x[None]), lambda cotangent: xp.reshape(pull(cotangent), ()))

    def leaf_mask(self) -> Argument:
        mask, xp = self.like_scores(narrow=True), self.xp
        if not self.is_item:
            return mask
        push: Any = mask.push
        pull: Any = mask.pull
        return Argument(
            None, None, lambda values: xp.reshape(push(values), ()), lambda cotangent: pull(cotangent[None])
        )

    def one_number(self, dtype: Any) -> Argument:
        """A result of one number, in a dtype of its own."""
        result = copy(self)
        result.dtype = dtype
        return result.one_per_slice(False)

    def leaf_weights(self, path: str, weights: Any) -> Argument:
        """The weights of a leaf, 1 if it has none."""
        if weights is None:
            return Argument(self.xp.ones((self.n,), dtype=self.working, device=self.device))
        return self.per_item(path, weights)

    def leaf_where(self, where: Any) -> Argument:
        if where is None:
            return Argument(self.xp.ones((self.n,), dtype=self.xp.bool, device=self.device))
        return self.kept(where)


def compute_alike(leaves: list[Leaf]) -> None:
    """Compute all leaves in the widest of their dtypes, float32 at least."""
    xp = leaves[0].xp
    wide = xp.float64 if any(one.working == xp.float64 for one in leaves) else xp.float32
    for one in leaves:
        one.working = wide
