"""Primitives on DTensors: every process computes its local slices.

Slices are independent, so there is no communication if the scores are replicated or sharded along batch axes. The other
inputs are redistributed to the placements of the scores. PyTorch's redistribution is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

Outputs = tuple[torch.Tensor, ...]


def is_distributed(values: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether one of the values is a DTensor."""
    return any(isinstance(value, DTensor) for value in values)


def by_process(function: Callable[..., Outputs], axes: int, inputs: tuple[torch.Tensor | None, ...]) -> Outputs:
    """``function(*inputs)``, computed from the local parts of the inputs. The results are DTensors.

    Parameters
    ----------
    function : callable
        A primitive bound to its options.
    axes : int
        The number of trailing axes of the first input that form one problem.
    inputs : tuple of tensor or None
        Ordinary tensors must have the same values on every process.
    """
    first = next(value for value in inputs if isinstance(value, DTensor))
    scores = inputs[0]
    assert scores is not None
    batch, mesh = scores.ndim - axes, first.device_mesh
    # Partial sums must be added before a nonlinear function is applied.
    placements = [Replicate() if place.is_partial() else place for place in first.placements]
    for dim, place in enumerate(placements):
        if place.is_shard() and _axis(place, first) >= batch:
            raise NotImplementedError(
                "x must not be sharded along the selected axis, but it is, over dimension "
                f"{dim} of the mesh {mesh}; redistribute it, for example to Replicate()"
            )
    local = [None if value is None else _local(value, mesh, placements) for value in inputs]
    leading = tuple(scores.shape[:batch])
    return tuple(_whole(value, leading, mesh, placements) for value in function(*local))


def _axis(place: Any, value: torch.Tensor) -> int:
    axis: int = place.dim
    return axis % value.ndim


def _local(value: torch.Tensor, mesh: Any, placements: list[Placement]) -> torch.Tensor:
    if value.ndim == 0 and not isinstance(value, DTensor):  # a number has no axis to shard
        return value
    if not isinstance(value, DTensor):
        value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    found: torch.Tensor = value.redistribute(mesh, placements).to_local()
    return found


def _whole(value: torch.Tensor, leading: tuple[int, ...], mesh: Any, placements: list[Placement]) -> DTensor:
    """The DTensor of a local result. The global shape is given, because the last shard may be shorter."""
    shape = torch.Size((*leading, *value.shape[len(leading) :]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=shape, stride=stride)
