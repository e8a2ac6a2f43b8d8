"""Primitives of DTensors: every process computes the slices that it holds.

A slice depends on itself alone, so that nothing is sent where the scores are sharded along axes of the batch, or
replicated. The other inputs are laid out as the scores are, by PyTorch's own redistribution, which is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

Outputs = tuple[torch.Tensor, ...]


def is_distributed(values: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether a DTensor is among them."""
    return any(isinstance(value, DTensor) for value in values)


def by_process(function: Callable[..., Outputs], axes: int, inputs: tuple[torch.Tensor | None, ...]) -> Outputs:
    """``function(*inputs)`` of the local parts, as DTensors.

    Parameters
    ----------
    function : callable
        A primitive bound to its options.
    axes : int
        How many axes of the first input, counted from the last, belong to one problem.
    inputs : tuple of tensor or None
        Ordinary tensors among them have the same values on every process.
    """
    first = next(value for value in inputs if isinstance(value, DTensor))
    scores = inputs[0]
    assert scores is not None
    batch, mesh = scores.ndim - axes, first.device_mesh
    placements = [Replicate() if place.is_partial() else place for place in first.placements]
    for dim, place in enumerate(placements):
        if place.is_shard() and _axis(place, first) >= batch:
            raise NotImplementedError(
                "x must not be sharded along the selected axis, got such shards over dimension "
                f"{dim} of the mesh {mesh}; redistribute it, for example to Replicate()"
            )
    local = [None if value is None else _local(value, mesh, placements) for value in inputs]
    leading = tuple(scores.shape[:batch])
    return tuple(_whole(value, leading, mesh, placements) for value in function(*local))


def _axis(place: Any, value: torch.Tensor) -> int:
    axis: int = place.dim
    return axis % value.ndim


def _local(value: torch.Tensor, mesh: Any, placements: list[Placement]) -> torch.Tensor:
    if value.ndim == 0 and not isinstance(value, DTensor):  # a number
        return value
    if not isinstance(value, DTensor):
        value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    found: torch.Tensor = value.redistribute(mesh, placements).to_local()
    return found


def _whole(value: torch.Tensor, leading: tuple[int, ...], mesh: Any, placements: list[Placement]) -> DTensor:
    """The size of the whole is given, for the last shard may be shorter."""
    shape = torch.Size((*leading, *value.shape[len(leading) :]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=shape, stride=stride)
