"""One budget over a tree of arrays. Each leaf is a piece of one slice."""

from __future__ import annotations

import math
from typing import Any

from softk._reference.threshold.split import in_pieces
from softk.backend import Array, backend_of

from .arguments import static_ranks
from .bounds import Bounds
from .call import Argument, Call, operator_from
from .checks import Mode, check_flag, check_mass, check_mode, check_temperature, require_whole
from .leaves import Leaf, TreeCall, compute_alike
from .shares import Shares
from .trees import Rebuild, flatten, matched

__all__ = ["threshold", "topk"]


def _described(
    kind: str,
    tree: Any,
    k: Any,
    epsilon: Any,
    mode: Any,
    weights: Any,
    where: Any,
    least: Any = None,
    most: Any = None,
) -> tuple[list[Leaf], dict[str, Any], Rebuild, Shares]:
    """What both functions share: the leaves, the parts of a `TreeCall`, what puts results in the leaves' places, and
    what this process holds of the arrays.
    """
    smallest = check_mode(mode)
    leaves, rebuild = flatten("tree", tree)
    if not leaves:
        raise ValueError(f"tree must have at least one array, got {tree!r}")
    shares = Shares(backend_of(next(iter(leaves.values()))), leaves)
    leaves = shares.leaves
    paths, like = list(leaves), next(iter(leaves.values()))
    trees = {"tree": (paths, rebuild)}
    items: dict[str, dict[str, Any]] = {}
    for name, other in (("weights", weights), ("where", where)):
        if other is not None:
            items[name] = {
                label: shares.part(label, part, path)
                for path, part in zip(paths, matched(name, other, paths, "tree"), strict=True)
                for label in [name + path.removeprefix("tree")]
            }
            trees[name] = list(items[name]), rebuild
    bounds = None if least is None and most is None else Bounds(least, most, paths)
    if shares.are_any and bounds is not None:
        raise NotImplementedError("least and most must be None for a tree with arrays that are spread over processes")
    if kind == "hard_mask":
        shares.require_order()
    k, epsilon = shares.number("k", k), shares.number("epsilon", epsilon)
    slices = []
    for i, (path, leaf) in enumerate(leaves.items()):
        others = {name: value for of in items.values() for name, value in [list(of.items())[i]] if value is not None}
        if i == 0:
            others |= {"k": k, "epsilon": epsilon}
        if bounds is not None:
            others |= bounds.arrays(i)
        slices.append(Leaf(path, leaf, others, smallest=smallest, like=like))
    first = slices[0]
    xp, backend = first.xp, first.backend
    compute_alike(slices)
    n = sum(math.prod(leaf.shape) for leaf in shares.whole.values())
    if n == 0:
        raise ValueError(f"tree must have at least one score, got only arrays without any, such as {paths[0]}")
    k = check_mass(xp, k, n, first.working, weights is not None, "the number of scores in the tree")
    check_temperature(xp, epsilon, first.working)
    if bounds is not None:
        bounds.group(slices)
        bounds.require_room(k, weighted=weights is not None)
        if kind == "hard_mask":
            bounds.require_whole(slices)
    bits = 64 if kind == "hard_mask" else xp.finfo(first.working).bits
    with backend.quiet():
        arguments = {path: one.leaf_scores().of(leaf) for one, (path, leaf) in zip(slices, leaves.items(), strict=True)}
        arguments["k"] = first.mass(k, weights, n)
        arguments["epsilon"] = first.per_slice("epsilon", epsilon, scale=0.5)
        for name in ("weights", "where"):
            for one, path in zip(slices, paths, strict=True):
                label = name + path.removeprefix("tree")
                if name not in items:
                    arguments[label] = Argument(None)
                elif name == "weights":
                    arguments[label] = one.leaf_weights(label, items[name][label])
                else:
                    arguments[label] = one.leaf_where(items[name][label])
    call: dict[str, Any] = {
        "backend": backend,
        "primitive": in_pieces(kind, shares.groups),
        "options": {"ranks": None if weights is not None else static_ranks(backend, k, bits)},
        "arguments": {name: shares.argument(name, argument) for name, argument in arguments.items()},
        "restores": tuple(shares.result(path, one.leaf_mask()) for one, path in zip(slices, paths, strict=True)),
        "trees": trees,
    }
    if bounds is not None:
        with backend.quiet():
            call = bounds.applied(call, slices, rebuild, hard=kind == "hard_mask")
    return slices, call, rebuild, shares


@operator_from
def topk(
    tree: Any,
    k: float | Array,
    /,
    *,
    epsilon: float | Array = 0.1,
    mode: Mode = "largest",
    weights: Any = None,
    where: Any = None,
    least: Any = None,
    most: Any = None,
    hard: bool = False,
) -> Call[Any]:
    """Soft indicator of the k largest scores of all arrays of a tree together.

    It is `softk.topk` of the scores of all leaves as one slice: there is one threshold, and the masks sum to `k` over
    the whole tree. The arrays may differ in shape and dtype.

    Parameters
    ----------
    tree : dict, list, tuple, named tuple or array
        Scores: a nest of containers whose leaves are arrays, as for `softk.topk`, of any shape. None stays None. In
        JAX also the containers that are registered with ``jax.tree_util``. All arrays are of one library and on one
        device. They are computed in the widest of their dtypes, in float32 at least.
    k : number or array
        How many scores to select, from 0 to their number in the whole tree. An array has one value.
    epsilon : number or array, optional
        Strength of the entropy, in the units of the scores, as for `softk.topk`. An array has one value.
    mode : {"largest", "smallest"}, optional
        Whether to select the largest or the smallest scores.
    weights : tree, optional
        Item weights, such as costs: a tree of the same structure, whose leaves broadcast to those of `tree`. Then
        ``sum(weights * mask)`` over the whole tree is `k`. A leaf of None has the weights 1.
    where : tree of bool, optional
        Items to choose from, in the same way. A leaf of None chooses from all of its items.
    least, most : number or tree, optional
        A floor and a cap of what each group of items gets of the budget. A number, or an array without axes, holds for
        every leaf, and a leaf is one group. A tree has the structure of `tree`. Its leaves are None, numbers, or arrays
        that broadcast to the shape of the scores with size 1 along the axes of a group. For a leaf of shape (h, n), an
        array of shape (h, 1) has one bound per row, and each row is a group. A group with fewer items than its floor is
        selected whole.
    hard : bool, optional
        Return the exact indicator of the k largest scores, with the derivative of the soft mask. Ties go to the leaf
        that comes first, and in it to the lowest index. `k`, `least` and `most` must be whole numbers, and `weights`
        are not supported.

    Returns
    -------
    tree
        The masks, in the containers of `tree`. Each has the shape, dtype and device of its scores.

    Raises
    ------
    TypeError
        If a leaf is not an array, or of another library or device than the first one.
    ValueError
        As `softk.topk`; also if the tree has no scores, if `weights`, `where`, `least` or `most` have another
        structure, or if floors and caps that are numbers leave no room for `k`. Where those in arrays leave no room,
        the masks are NaN.
    NotImplementedError
        For DTensors with `least` or `most`, with strided shards, or with `hard` if they are not sharded along their
        first axis.

    See Also
    --------
    softk.topk : one budget over the axes of one array.

    Notes
    -----
    Derivatives flow to every leaf, to `k`, `epsilon` and the weights, in the autodiff of the framework. `softk.vjp` and
    `softk.jvp` take and return trees.

    Leaves of at most 65,536 scores are joined, and a tree without larger ones is computed by the kernels. Larger leaves
    are not copied: the reference implementation computes them from sums over each leaf, in at most 24 passes without
    `weights` and `hard`. It also computes leaves that are sharded over processes.

    In PyTorch the leaves may be DTensors, such as the parameters of FSDP2, without `least` and `most`. A mask has the
    placements of its scores. The processes exchange a few numbers. An ordinary tensor beside DTensors must be the same
    on every process.

    With `least` or `most` all leaves are joined by a copy. Every group has the soft mask of its own items, with a mass
    ``min(max(f, least), most)``. Here f is the mass that the group has at a threshold that is common to all groups, and
    the masses sum to `k`. This is the optimum of the entropic problem with these constraints. The groups at a bound are
    found in a few soft top-k's, at most one per group. Their bounds, too, have derivatives.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, sections 3.1 and 3.2.

    Bitran and Hax, "Disaggregation and Resource Allocation Using Convex Knapsack Problems with Bounded Variables",
    Management Science 27, 1981, for `least` and `most`.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> tree = {"hidden": np.asarray([[0.2, 1.7], [-0.5, 0.9]]), "out": np.asarray([1.1])}
    >>> masks = softk.budget.topk(tree, 2, epsilon=0.5)
    >>> masks["hidden"].round(3).tolist(), masks["out"].round(3).tolist()
    ([[0.04, 0.944], [0.003, 0.408]], [0.605])

    Every row gets at least one half, and together they get 3:

    >>> x = np.asarray([[3.0, 2.0, 1.0], [-3.0, -4.0, -5.0]])
    >>> softk.budget.topk(x, 3, least=np.asarray([[0.5], [0.5]])).round(3).tolist()
    [[1.0, 1.0, 0.5], [0.5, 0.0, 0.0]]
    """
    check_flag("hard", hard)
    kind = "hard_mask" if hard else "mask"
    _, call, rebuild, _ = _described(kind, tree, k, epsilon, mode, weights, where, least, most)
    if hard:
        require_whole(call["arguments"]["k"].given, weights, k)
    return TreeCall(
        **call,
        build=lambda *masks: rebuild(iter(masks)),
        results=rebuild,
    )


@operator_from
def threshold(
    tree: Any,
    k: float | Array,
    /,
    *,
    epsilon: float | Array = 0.1,
    mode: Mode = "largest",
    weights: Any = None,
    where: Any = None,
) -> Call[Any]:
    """The level that separates the k largest scores of all arrays of a tree: there the masks of `topk` are one half.

    Parameters
    ----------
    tree, k, epsilon, mode, weights, where
        As for `softk.budget.topk`.

    Returns
    -------
    array
        The threshold, of shape (), in the units of the scores and the dtype that they are computed in; in the dtype of
        the scores if all have the same. It is a replicated DTensor if the first leaf is a DTensor.

    Raises
    ------
    TypeError, ValueError
        As `softk.budget.topk`.

    See Also
    --------
    softk.threshold : of one array.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> tree = [np.asarray([[0.2, 1.7], [-0.5, 0.9]]), np.asarray([1.1])]
    >>> float(softk.budget.threshold(tree, 2, epsilon=0.01).round(6))
    1.0
    """
    slices, call, _, shares = _described("threshold", tree, k, epsilon, mode, weights, where)
    first = slices[0]
    is_mixed = any(one.dtype != first.dtype for one in slices)
    call["restores"] = (shares.number_result(first.one_number(first.working if is_mixed else first.dtype)),)
    return TreeCall(**call)
