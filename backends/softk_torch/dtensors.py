"""Primitives on DTensors, and on shards: every process computes with its local part.

Slices are independent, so there is no communication if the scores are replicated or sharded along batch axes. Where the
selected axis is sharded, the masks and the threshold are computed by sums over the processes, a few numbers per slice:
the scores stay where they are. The other inputs are redistributed to the placements of the scores. PyTorch's
redistribution is differentiable.

A group is named by the name that PyTorch gives it, or by several of them, joined by "+", over which a sum runs in turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from softk._reference.threshold import masks
from softk._reference.threshold.split import in_pieces
from softk.backend import PRIMITIVES, Share

Outputs = tuple[torch.Tensor, ...]

#: The group of a name, as PyTorch's own collectives in a graph find it.
_group_named: Callable[[str], dist.ProcessGroup] = vars(dist.distributed_c10d)["_resolve_process_group"]


def is_distributed(values: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether one of the values is a DTensor."""
    return any(isinstance(value, DTensor) for value in values)


def shards(group: str) -> tuple[int, int]:
    """The index of this process in a group, and the number of its members."""
    index, members = 0, 1
    for name in group.split("+"):  # the first one has the outermost shards
        one = _group_named(name)
        size = dist.get_world_size(one)
        index, members = index * size + dist.get_rank(one), members * size
    return index, members


def reduce_shards(values: torch.Tensor, operation: Literal["sum", "max"], group: str) -> torch.Tensor:
    """The sum or the maximum over the processes of a group. It is not differentiated: the rule of a primitive calls it.

    Raises
    ------
    NotImplementedError
        If autograd records it, for a second derivative.
    """
    _refuse_recorded(values)
    found = values.detach().clone(memory_format=torch.contiguous_format)
    kind = dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX
    for name in group.split("+"):
        dist.all_reduce(found, kind, _group_named(name))
    return found


def gather_shards(values: torch.Tensor, group: str) -> torch.Tensor:
    """The values of all processes of a group along the last axis. It is not differentiated, like `reduce_shards`."""
    _refuse_recorded(values)
    found = values.detach().contiguous()
    for name in reversed(group.split("+")):  # the first one has the outermost shards
        one = _group_named(name)
        every = [torch.empty_like(found) for _ in range(dist.get_world_size(one))]
        dist.all_gather(every, found, one)
        found = torch.cat(every, dim=-1)
    return found


def _refuse_recorded(values: torch.Tensor) -> None:
    if torch.is_grad_enabled() and values.requires_grad:
        raise NotImplementedError("second derivatives over an axis that is sharded over processes are not supported")


def by_process(
    apply: Callable[..., Outputs], name: str, options: Any, inputs: tuple[torch.Tensor | None, ...]
) -> Outputs:
    """The results of a primitive, computed from the local parts of the inputs, as DTensors.

    Parameters
    ----------
    apply : callable
        ``apply(name, options, *inputs)``, of ordinary tensors.
    name, options
        The primitive.
    inputs : tuple of tensor or None
        Ordinary tensors must have the same values on every process.
    """
    primitive = PRIMITIVES[name]
    first = next(value for value in inputs if isinstance(value, DTensor))
    scores = inputs[0]
    assert scores is not None
    batch, mesh = scores.ndim - primitive.axes, first.device_mesh
    # Partial sums must be added before a nonlinear function is applied.
    placements = [Replicate() if place.is_partial() else place for place in first.placements]
    selected = [dim for dim, place in enumerate(placements) if _is_shard(place) and _axis(place, first) >= batch]
    per_slice = [Replicate() if dim in selected else place for dim, place in enumerate(placements)]
    results_per_item: int = len(primitive.results)
    if selected:
        kind = _KINDS.get(name)
        if kind is None or len(inputs) > 5 or any(isinstance(placements[dim], _StridedShard) for dim in selected):
            raise NotImplementedError(
                "x must not be sharded along the selected axis for this function, but it is, over dimension "
                f"{selected[0]} of the mesh {mesh}; redistribute it, for example to Replicate()"
            )
        name = in_pieces(kind, (group_of(mesh, selected),)).name
        results_per_item = 0 if kind == "threshold" else 1
    # Scores, weights and where have one value per item, k and the temperature one per slice.
    local = [
        None if value is None else _local(value, mesh, placements if i not in (1, 2) or not selected else per_slice)
        for i, value in enumerate(inputs)
    ]
    leading = tuple(scores.shape[:batch])
    found = apply(name, options, *local)
    if not selected:
        return tuple(_whole(value, (*leading, *value.shape[batch:]), mesh, placements) for value in found)
    return tuple(
        _whole(value, tuple(scores.shape), mesh, placements)
        if i < results_per_item
        else _whole(value, (*leading, 1), mesh, per_slice)
        for i, value in enumerate(found)
    )


def share(value: torch.Tensor, of: torch.Tensor) -> Share:
    """`Backend.share` of a tensor that is a DTensor, or broadcasts to one."""
    first: Any = of if isinstance(of, DTensor) else value
    mesh, is_spread = first.device_mesh, isinstance(of, DTensor)
    placements = [Replicate() if place.is_partial() else place for place in first.placements]
    selected = [dim for dim, place in enumerate(placements) if _is_shard(place)]
    if any(isinstance(placements[dim], _StridedShard) for dim in selected):
        raise NotImplementedError(
            f"a leaf, and what broadcasts to it, must not have strided shards, got the placements {first.placements}; "
            "redistribute it, for example to Replicate()"
        )
    if selected and not is_spread:
        raise NotImplementedError(
            "what broadcasts to a leaf that is an ordinary tensor must be replicated, got the placements "
            f"{first.placements}; redistribute it to Replicate()"
        )
    own, back = list(placements), list(placements)
    for dim in selected:
        axis = _axis(placements[dim], first) - first.ndim
        if value.ndim >= -axis and value.shape[axis] == first.shape[axis]:
            own[dim] = back[dim] = Shard(axis + value.ndim)
        else:  # the same for all items along this axis, so every process has a part of the cotangent
            own[dim], back[dim] = Replicate(), Partial()
    shape, everywhere = tuple(value.shape), [Replicate()] * mesh.ndim
    given: Any = None
    if isinstance(value, DTensor) and value is not first:
        given = [Replicate() if place.is_partial() else place for place in value.placements]

    def local(values: torch.Tensor) -> torch.Tensor:
        if not isinstance(values, DTensor):
            values = DTensor.from_local(values, mesh, everywhere, run_check=False)
        found: torch.Tensor = values.redistribute(mesh, own).to_local(grad_placements=back)
        return found

    def whole(items: torch.Tensor) -> torch.Tensor:
        found = _whole(items, shape, mesh, back)
        if value is first:
            return found
        return found.redistribute(mesh, given) if given is not None else found.redistribute(mesh, everywhere).to_local()

    def same(values: torch.Tensor) -> torch.Tensor:
        return _whole(values, tuple(values.shape), mesh, everywhere)

    before = [math.prod(first.shape[: _axis(placements[dim], first)]) for dim in selected]
    group = group_of(mesh, selected) if selected else None
    return Share(local, whole, same, group, all(count == 1 for count in before))


#: The operators that are computed by sums over the processes, where the selected axis is sharded.
_KINDS = {masks.mask.name: "mask", masks.hard_mask.name: "hard_mask", masks.threshold.name: "threshold"}


def group_of(mesh: Any, dims: list[int]) -> str:
    """The name of the group over some dimensions of a mesh, as `shards` and `reduce_shards` take it."""
    return "+".join(mesh.get_group(dim).group_name for dim in dims)


def _is_shard(place: Any) -> bool:
    """Whether a placement is a shard, strided or not: PyTorch's own `is_shard` is false for a strided one."""
    return isinstance(place, (Shard, _StridedShard))


def _axis(place: Any, value: torch.Tensor) -> int:
    axis: int = place.dim
    return axis % value.ndim


def _local(value: torch.Tensor, mesh: Any, placements: Any) -> torch.Tensor:
    if value.ndim == 0 and not isinstance(value, DTensor):  # a number has no axis to shard
        return value
    if not isinstance(value, DTensor):
        value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    found: torch.Tensor = value.redistribute(mesh, placements).to_local()
    return found


def _whole(value: torch.Tensor, shape: tuple[int, ...], mesh: Any, placements: Any) -> DTensor:
    """The DTensor of a local result. The global shape is given, because the last shard may be shorter."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
