"""Conversions of arrays that every library can batch and differentiate."""

from __future__ import annotations

from typing import Any

from softk.backend import Array, unknown


def cast(xp: Any, values: Array, dtype: Any) -> Array:
    """``astype``, without a copy if the dtype is already right."""
    return values if values.dtype == dtype else xp.astype(values, dtype)


def move_axis(xp: Any, values: Array, source: Any, destination: Any) -> Array:
    """``moveaxis``, by operations that every library can batch."""
    ndim = values.ndim
    sources, targets = (
        [i % ndim for i in (axes if isinstance(axes, tuple) else (axes,))] for axes in (source, destination)
    )
    rest = iter(i for i in range(ndim) if i not in sources)
    moved = dict(zip(targets, sources, strict=True))
    return xp.permute_dims(values, tuple(moved[i] if i in moved else next(rest) for i in range(ndim)))


def fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of the shape broadcasts to the target. Unknown sizes are assumed to fit."""
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(
        size in (1, full) or (unknown(size) and full != 1) or unknown(full) for size, full in pairs
    )


def shrink(xp: Any, values: Array, shape: tuple[int, ...]) -> Array:
    """The transpose of broadcasting: sum over the axes that broadcasting repeated."""
    lead = values.ndim - len(shape)
    repeated = tuple(i for i in range(values.ndim) if i < lead or (shape[i - lead] == 1 and values.shape[i] != 1))
    if repeated:
        values = xp.sum(values, axis=repeated, keepdims=True)
    return xp.reshape(values, shape) if lead else values
