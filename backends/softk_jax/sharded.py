"""The soft top-k inside `jax.shard_map`, over an axis that is spread over the devices of a mesh.

Sharded arrays under `jax.jit` go through `softk.topk` itself.
"""

from __future__ import annotations

from typing import Any, Literal

import jax

from softk._functions.arguments import Slices
from softk._functions.call import Call, operator_from
from softk._functions.checks import check_flag, check_mass, check_mode, check_temperature, require_whole
from softk._reference.threshold.split import in_pieces

__all__ = ["topk"]


@operator_from
def topk(
    x: jax.Array,
    /,
    k: float | jax.Array,
    *,
    axis_name: str,
    axis: int | tuple[int, ...] = -1,
    mode: Literal["largest", "smallest"] = "largest",
    epsilon: float | jax.Array = 0.1,
    weights: jax.Array | None = None,
    where: jax.Array | None = None,
    hard: bool = False,
) -> Call[jax.Array]:
    """Soft top-k along an axis whose scores are spread over the devices of a mesh axis, inside `jax.shard_map`.

    Every device passes its own part and gets its own part of the mask, which sums to `k` over all of them. The scores
    are not sent: the devices exchange a few numbers per slice.

    Parameters
    ----------
    x : array
        The scores of this device.
    k : number or array
        How many scores to select in all, as for `softk.topk`, the same on every device.
    axis_name : str
        The name of the axis of the mesh.
    axis, mode, epsilon, weights, where, hard
        As for `softk.topk`. An epsilon is the same on every device; weights and where are those of the scores `x`. Ties
        go to the device that comes first.

    Returns
    -------
    array
        The mask of the scores `x`.

    Raises
    ------
    TypeError, ValueError
        As `softk.topk`; also if `axis_name` is not a string, or not an axis of the surrounding `jax.shard_map`.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, sections 3.1 and 3.2.

    Examples
    --------
    >>> import jax
    >>> import numpy as np
    >>> import softk_jax.sharded
    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("model",))
    >>> topk = lambda x: softk_jax.sharded.topk(x, 2, axis_name="model", epsilon=0.5)
    >>> masked = jax.jit(jax.shard_map(topk, mesh=mesh, in_specs=P("model"), out_specs=P("model")))
    >>> print(masked(jax.numpy.asarray([0.2, 1.7, -0.5, 0.9])).round(3))
    [0.196 0.99  0.015 0.8  ]
    """
    check_flag("hard", hard)
    if not isinstance(axis_name, str):
        raise TypeError(f"axis_name must be a string, the name of an axis of the mesh, got {axis_name!r}")
    slices = Slices(x, axis, smallest=check_mode(mode), joint=True, k=k, epsilon=epsilon, weights=weights, where=where)
    n = _devices_along(axis_name, x) * slices.n
    over = f"the size of x along axis on all devices along {axis_name!r}"
    k = check_mass(slices.xp, k, n, slices.working, weights is not None, over)
    check_temperature(slices.xp, epsilon, slices.working)
    if hard:
        require_whole(k, weights, k)
    arguments: dict[str, Any] = {
        "x": slices.scores(narrow=True),
        "k": slices.per_slice("k", k),
        "epsilon": slices.per_slice("epsilon", epsilon, scale=0.5),
        "weights": slices.per_item("weights", weights),
        "where": slices.kept(where),
    }
    primitive = in_pieces("hard_mask" if hard else "mask", (axis_name,))
    return Call(slices.backend, primitive, {"ranks": None}, arguments, (slices.like_scores(narrow=True),))


def _devices_along(axis_name: str, x: jax.Array) -> int:
    """The number of devices along an axis of the surrounding shard_map."""
    try:
        return int(jax.lax.axis_size(axis_name))
    except NameError:
        mesh = jax.typeof(x).sharding.mesh
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        axes = tuple(name for name, kind in kinds if kind.name == "Manual")
    if not axes:
        raise ValueError(f"axis_name must be an axis of a shard_map, got {axis_name!r}; call topk inside jax.shard_map")
    raise ValueError(f"axis_name must be an axis of the surrounding shard_map, one of {axes}, got {axis_name!r}")
