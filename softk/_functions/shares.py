"""Trees whose leaves are spread over processes: every process computes with its own items."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from softk.backend import Array, Backend, Share, is_array

from .call import Argument


class Shares:
    """The items of this process: of the leaves, and of other arrays that broadcast to one of them.

    `groups` is as for `split.in_pieces`, with a group for every leaf.
    """

    def __init__(self, backend: Backend, leaves: dict[str, Array]) -> None:
        self.backend, self.whole = backend, leaves
        self.shares = {path: backend.share(leaf, leaf) for path, leaf in leaves.items()}
        self.groups = tuple(None if share is None else share.group for share in self.shares.values())
        self.given: dict[str, Array] = {}  # the arrays of the user that are spread, or broadcast to one that is
        self.leaves = {path: self.part(path, leaf, path) for path, leaf in leaves.items()}

    @property
    def are_any(self) -> bool:
        """Whether an array of the call is a spread one. One that is replicated is, too."""
        return any(share is not None for share in self.shares.values())

    def part(self, name: str, value: Any, path: str) -> Any:
        """The items of this process, of an array that broadcasts to a leaf. Other values stay as they are."""
        if not is_array(value):
            return value
        share = self.shares[path] if value is self.whole[path] else self.backend.share(value, self.whole[path])
        if share is None:
            return value
        self.shares[name], self.given[name] = share, value
        return share.local(value)

    def number(self, name: str, value: Any) -> Any:
        """A value that is the same on every process, as an ordinary array. Numbers stay as they are."""
        share = self._replicated(name, value) if is_array(value) else None
        if share is None:
            return value
        self.shares[name], self.given[name] = share, value
        return share.local(value)

    def _replicated(self, name: str, value: Array) -> Share | None:
        """How an array is spread that must be the same on every process."""
        share = self.backend.share(value, value)
        if share is not None and share.group is not None:
            raise NotImplementedError(f"{name} must have the same value on every process, but it is sharded")
        return share

    def require_order(self) -> None:
        """Require that ties are broken as in leaves that are whole."""
        for path in self.whole:
            share = self.shares[path]
            if share is not None and share.group is not None and not share.in_order:
                raise NotImplementedError(
                    f"{path} must be sharded along its first axis with hard=True, because ties go to the lowest index"
                )

    def argument(self, name: str, argument: Argument) -> Argument:
        """The argument of the whole array, from that of the items of this process."""
        share = self.shares.get(name)
        if share is None:
            return argument
        return replace(_spread(argument, share, transposed=False), given=self.given[name])

    def result(self, path: str, restore: Argument) -> Argument:
        """The result that is spread as a leaf is, from that of the items of this process."""
        share = self.shares[path]
        return restore if share is None else _spread(restore, share, transposed=True)

    def number_result(self, restore: Argument) -> Argument:
        """The result of one number that is the same on every process, spread over them if the first leaf is."""
        share, push, pull = next(iter(self.shares.values())), restore.push, restore.pull
        if share is None or push is None or pull is None:
            return restore

        def local(bar: Array) -> Array:
            own = self._replicated("cotangent", bar)
            return bar if own is None else own.local(bar)

        return replace(restore, push=lambda x: share.everywhere(push(x)), pull=lambda bar: pull(local(bar)))


def _spread(argument: Argument, share: Share, *, transposed: bool) -> Argument:
    push, pull = argument.push, argument.pull
    if push is None or pull is None:
        return argument
    if transposed:
        return replace(argument, push=lambda x: share.whole(push(x)), pull=lambda bar: pull(share.local(bar)))
    return replace(argument, push=lambda x: push(share.local(x)), pull=lambda bar: share.whole(pull(bar)))
