"""Trees of arrays: dictionaries, lists, tuples and named tuples, nested in any way, and the containers that JAX knows.

The leaves are arrays. None stays None. The order of the leaves is that of the containers.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from softk.backend import is_array

from .checks import is_number, kind_of

Rebuild = Callable[[Iterator[Any]], Any]


def flatten(name: str, tree: Any, *, numbers: bool = False) -> tuple[dict[str, Any], Rebuild]:
    """The leaves by their paths, such as ``tree['bias'][0]``, and a function that puts other leaves in their places.

    `numbers` allows leaves that are numbers.
    """
    leaves: dict[str, Any] = {}
    return leaves, _walk(name, tree, leaves, numbers)


def _walk(path: str, tree: Any, leaves: dict[str, Any], numbers: bool) -> Rebuild:
    if tree is None:
        return lambda _: None
    if is_array(tree) or (numbers and is_number(tree)):
        leaves[path] = tree
        return next
    children = _children(tree)
    if children is None:
        raise TypeError(
            f"{path} must be an array{', a number' if numbers else ''}, None, or a dict, list, tuple or named tuple of "
            f"them, got {kind_of(tree)}"
        )
    parts, build = children
    walked = [_walk(f"{path}{label}", child, leaves, numbers) for label, child in parts]
    return lambda values: build([one(values) for one in walked])


def _children(tree: Any) -> tuple[list[tuple[str, Any]], Callable[[list[Any]], Any]] | None:
    """The labels and the children of a container, and what makes a container of other children; None if it is none."""
    if isinstance(tree, dict):
        kind: Any = OrderedDict if isinstance(tree, OrderedDict) else dict
        return [(f"[{key!r}]", child) for key, child in tree.items()], lambda new: kind(zip(tree, new, strict=True))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        pairs = zip(tree._fields, tree, strict=True)
        return [(f".{field}", child) for field, child in pairs], lambda new: type(tree)(*new)
    if isinstance(tree, (list, tuple)):
        kind = list if isinstance(tree, list) else tuple
        return [(f"[{i}]", child) for i, child in enumerate(tree)], kind
    jax = sys.modules.get("jax")
    if jax is None:
        return None
    # One level of a container that is registered with JAX.
    parts, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda child: child is not tree)
    if len(parts) == 1 and parts[0][1] is tree:
        return None
    return [(jax.tree_util.keystr(key), child) for key, child in parts], structure.unflatten


def matched(name: str, tree: Any, paths: list[str], root: str, *, numbers: bool = False) -> list[Any]:
    """The leaves of a tree with the structure of another one, whose paths begin with `root`. A leaf may be None.

    `numbers` is as for `flatten`.

    Raises
    ------
    ValueError
        If the tree lacks a leaf, or has another one.
    """
    leaves, _ = flatten(name, tree, numbers=numbers)
    wanted = [name + path.removeprefix(root) for path in paths]
    unknown = [path for path in leaves if path not in wanted]
    if unknown:
        raise ValueError(f"{name} must have the structure of {root}, got {unknown[0]}, which {root} has not")
    return [leaves.get(path) for path in wanted]
