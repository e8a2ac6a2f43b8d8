"""Sparse parameters by Top-KAST. Each leaf of a tree is a piece of one slice, or a slice of its own."""

from __future__ import annotations

from typing import Any, Literal

from softk._reference.threshold.sparse import masked, penalty

from .call import Call, operator_from
from .checks import is_number
from .leaves import Leaf, TreeCall, compute_alike
from .trees import Rebuild, flatten

__all__ = ["regularizer", "topkast"]

Scope = Literal["global", "tensor"]


def _check_shares(forward: Any, backward: Any) -> None:
    for name, value in (("forward", forward), ("backward", backward)):
        if not is_number(value):
            raise TypeError(
                f"{name} must be a Python number, because the number of weights depends on it, got {value!r}"
            )
        if not 0.0 < value <= 1.0:
            raise ValueError(f"{name} must be a share above 0 and at most 1, got {value!r}")
    if backward < forward:
        raise ValueError(f"backward must be at least forward, {forward!r}, got {backward!r}")


def _count(share: Any, n: int) -> int:
    return max(1, round(float(share) * n))


def _described(
    parameters: Any, forward: Any, backward: Any, scope: Any
) -> tuple[list[Leaf], dict[str, Any], Rebuild, bool]:
    """What both functions share: the leaves, parts of a `TreeCall`, what rebuilds the tree, and whether it is joint."""
    _check_shares(forward, backward)
    if not isinstance(scope, str) or scope not in ("global", "tensor"):
        raise ValueError(f"scope must be 'global' or 'tensor', got {scope!r}")
    leaves, rebuild = flatten("parameters", parameters)
    if not leaves:
        raise ValueError(f"parameters must have at least one array, got {parameters!r}")
    paths, like = list(leaves), next(iter(leaves.values()))
    slices = [Leaf(path, leaf, {}, smallest=False, like=like, root="parameters") for path, leaf in leaves.items()]
    compute_alike(slices)
    total = sum(one.n for one in slices)
    if total == 0:
        raise ValueError(f"parameters must have at least one weight, got only arrays without any, such as {paths[0]}")
    sizes = [total] if scope == "global" else [one.n for one in slices]
    call = {
        "backend": slices[0].backend,
        "options": {"counts": tuple((_count(forward, n), _count(backward, n)) for n in sizes)},
        "arguments": {
            path: one.leaf_scores().of(leaf) for one, (path, leaf) in zip(slices, leaves.items(), strict=True)
        },
        "trees": {"parameters": (paths, rebuild)},
    }
    return slices, call, rebuild, scope == "global"


@operator_from
def topkast(parameters: Any, forward: float, backward: float, /, *, scope: Scope = "global") -> Call[Any]:
    """Parameters of which only the largest are not 0, with gradients for a larger share of them: Top-KAST.

    The set A has the share `forward` of the weights, those of the largest magnitude. The result has these weights, and
    exact zeros elsewhere. The larger set B has the share `backward`. The gradient of the result passes unchanged to the
    weights of B, also to those that are 0 in the result, so that they can grow into A. The other weights have a
    gradient of exactly 0.

    Parameters
    ----------
    parameters : dict, list, tuple, named tuple or array
        The weights: a nest of containers whose leaves are real floating-point arrays of any shape. None stays None. In
        JAX also the containers that are registered with ``jax.tree_util``. All arrays are of one library and on one
        device. They may differ in shape and dtype.
    forward : float
        The share of the weights that are not 0, above 0 and at most 1. Of n weights, ``max(1, round(forward * n))`` are
        kept, with Python's ``round``: a half is rounded to the even number.
    backward : float
        The share of the weights that have a gradient, from `forward` to 1, counted in the same way.
    scope : {"global", "tensor"}, optional
        Whether the weights of all arrays are ranked together, or those of each array alone. With "tensor" the shares
        are those of each array. With "global" an array of small weights may lose all of them.

    Returns
    -------
    tree
        The masked parameters, in the containers of `parameters`. Each array has the shape, dtype and device of its
        weights.

    Raises
    ------
    TypeError
        If a leaf is not a real floating-point array, or is of another library or device than the first one, or a share
        is not a number.
    ValueError
        If a share or `scope` is out of its range, `backward` is below `forward`, or there are no weights. Values in
        arrays never raise: a NaN makes its array NaN, and with ``scope="global"`` all arrays.

    See Also
    --------
    regularizer : the penalty that belongs to it.
    softk.budget.topk : the hard mask that selects, and a soft one whose scores are learned.

    Notes
    -----
    Exactly as many weights as said are selected. Of equal magnitudes, those of the array that comes first are selected,
    and in it those of the lowest index, as by ``softk.budget.topk(hard=True)``. ``jax.jit`` sorts the keys of a
    dictionary, which may change the array that comes first.

    Pass only the arrays that are to be sparse. Biases and the parameters of normalizations are usually left out. An
    optimizer with a momentum or a weight decay also moves weights outside B.

    The parameters and the result are dense arrays, so the computation is not faster than that of a dense network. Both
    sets are computed in each call. float16 and bfloat16 weights are ranked exactly.

    Derivatives flow in the autodiff of the framework. `softk.vjp` and `softk.jvp` take and return trees.

    References
    ----------
    Jayakumar, Pascanu, Rae, Osindero, Elsen, "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020, section 2.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> weights = {"hidden": np.asarray([[0.2, -1.7], [0.5, 0.9]]), "out": np.asarray([-1.1])}
    >>> masked, pullback = softk.vjp(softk.sparse.topkast, weights, 0.4, 0.8)
    >>> masked["hidden"].tolist(), masked["out"].tolist()
    ([[0.0, -1.7], [0.0, 0.0]], [-1.1])
    >>> gradient = pullback({"hidden": np.full((2, 2), 3.0), "out": np.asarray([5.0])})["parameters"]
    >>> gradient["hidden"].tolist(), gradient["out"].tolist()
    ([[0.0, 3.0], [3.0, 3.0]], [5.0])
    """
    slices, call, rebuild, joint = _described(parameters, forward, backward, scope)
    return TreeCall(
        **call,
        primitive=masked(len(slices), joint),
        restores=tuple(one.leaf_mask() for one in slices),
        build=lambda *weights: rebuild(iter(weights)),
        results=rebuild,
    )


@operator_from
def regularizer(parameters: Any, forward: float, backward: float, /, *, scope: Scope = "global") -> Call[Any]:
    """The penalty of Top-KAST: squared weights, those with a gradient but without an effect more than the others.

    It is the sum of ``w**2`` over the weights w of A, plus the sum of ``w**2 / D`` over those of B that are not in A.
    Weights outside B cost nothing. A and B are the sets of `topkast`, and D is the density of A, the number of its
    weights divided by that of all. With ``scope="tensor"`` each array has its own D.

    A weight of B outside A gets a gradient although it is 0 in the forward pass. The larger penalty keeps it from
    growing into A without need, so that A becomes stable.

    Parameters
    ----------
    parameters, forward, backward, scope
        As for `topkast`.

    Returns
    -------
    array
        The penalty, of shape (), in the widest of the dtypes of the weights, in float32 at least. Multiply it by a
        coefficient, and add it to the loss.

    Raises
    ------
    TypeError, ValueError
        As `topkast`. A NaN in an array makes the penalty NaN.

    See Also
    --------
    topkast : the masked parameters.

    Notes
    -----
    The gradient is ``2 w`` in A, ``2 w / D`` in the rest of B and exactly 0 elsewhere. The sets are constants of the
    derivative. `softk.vjp` and `softk.jvp` take and return trees.

    References
    ----------
    Jayakumar, Pascanu, Rae, Osindero, Elsen, "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020, section 2: the
    exploration regularization loss, with squares in the place of magnitudes.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> weights = [np.asarray([3.0, 1.0, 0.5]), np.asarray(2.0)]
    >>> float(softk.sparse.regularizer(weights, 0.25, 0.5))  # 3**2 + 2**2 / 0.25
    25.0
    """
    slices, call, _, joint = _described(parameters, forward, backward, scope)
    first = slices[0]
    return TreeCall(**call, primitive=penalty(len(slices), joint), restores=(first.one_number(first.working),))
