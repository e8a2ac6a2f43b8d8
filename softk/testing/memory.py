"""Arrays of any library: how they lie in memory, what they hold, and fresh memory that is full of NaN."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from softk.backend import Array, Backend

__all__ = ["LAYOUTS", "UnsupportedError", "address", "poisoned", "same_bits", "values_of"]


def values_of(backend: Backend, x: Array) -> np.ndarray:
    """The values as a NumPy array: float64 for every floating-point dtype but the wider, booleans as they are."""
    if backend.name == "torch":
        x = x.detach().resolve_neg().cpu()
        return np.asarray(x.double().numpy() if x.is_floating_point() else x.numpy())
    if backend.name == "cupy":
        x = x.get()
    found = np.asarray(x)
    return found if found.dtype.kind in "biu" else found.astype(np.float64)


def address(x: Array) -> int | None:
    """Where the memory of an array of NumPy or PyTorch begins; None if it is empty, or an array of another library."""
    if 0 in x.shape:
        return None
    if hasattr(x, "data_ptr"):
        return int(x.data_ptr())
    return int(x.__array_interface__["data"][0]) if isinstance(x, np.ndarray) else None


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays hold the same values, NaN and the signs of zeros included."""
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    signs = (np.signbit(values) & (values == 0.0) for values in (one, other))
    return bool(np.array_equal(one, other, equal_nan=True)) and bool(np.array_equal(*signs))


# --- layouts


class UnsupportedError(Exception):
    """A library has no such layout, or it would hold other values."""


Maker = Callable[[np.ndarray], Array]


def _contiguous(xp: Any, make: Maker, values: np.ndarray) -> Array:
    return make(values)


def _strided(xp: Any, make: Maker, values: np.ndarray) -> Array:
    """Every other number of a wider array, with NaN (or True) in between."""
    if values.ndim == 0:
        return make(values)
    wide = np.full((*values.shape[:-1], 2 * values.shape[-1]), np.nan if values.dtype.kind == "f" else 1)
    wide = wide.astype(values.dtype)
    wide[..., ::2] = values
    return make(wide)[..., ::2]


def _transposed(xp: Any, make: Maker, values: np.ndarray) -> Array:
    """The batch runs fastest in memory."""
    if values.ndim < 2:
        return make(values)
    turned = make(np.ascontiguousarray(np.moveaxis(values, -1, 0)))
    return xp.permute_dims(turned, (*range(1, values.ndim), 0))


def _reversed(xp: Any, make: Maker, values: np.ndarray) -> Array:
    """A negative stride."""
    if values.ndim == 0:
        return make(values)
    backward = make(np.ascontiguousarray(values[..., ::-1]))
    try:
        return backward[..., ::-1]
    except (ValueError, IndexError, NotImplementedError) as reason:
        raise UnsupportedError(str(reason)) from reason


def _broadcast(xp: Any, make: Maker, values: np.ndarray) -> Array:
    """One row in memory, where all rows are equal."""
    if values.ndim < 2 or 0 in values.shape:
        return make(values)
    row = values[(slice(0, 1),) * (values.ndim - 1)]
    equal = same_bits(np.broadcast_to(row, values.shape), values)
    return xp.broadcast_to(make(row), values.shape) if equal else make(values)


#: How an array may lie in memory: ``layout(xp, make, values) -> array``.
LAYOUTS: dict[str, Callable[[Any, Maker, np.ndarray], Array]] = {
    "contiguous": _contiguous,
    "strided": _strided,
    "transposed": _transposed,
    "reversed": _reversed,
    "broadcast": _broadcast,
}


# --- fresh memory

_SOURCES = {
    "numpy": ("empty", "empty_like"),
    "torch": ("empty", "empty_like", "empty_strided"),
    "cupy": ("empty", "empty_like"),
}


@contextmanager
def poisoned(fill: float = np.nan) -> Iterator[None]:
    """A context in which the memory that NumPy, PyTorch and CuPy hand out unwritten is full of a number.

    What a kernel returns without having written it, or reads before it has written it, is then seen. Integers are 77
    there and booleans True for NaN, 78 and False else. Memory that compiled code asks of the system is not reached but
    by chance: some of it is filled and freed beforehand.

    Parameters
    ----------
    fill : float, optional
        What floating-point memory holds.
    """
    odd = bool(np.isnan(fill))

    def numpy_like(found: Any) -> Any:
        if found.dtype.kind in "fciub":
            found[...] = {"f": fill, "c": fill, "b": odd}.get(found.dtype.kind, 78 - odd)
        return found

    def torch_like(found: Any) -> Any:
        if found.device.type == "meta" or found.is_sparse:
            return found
        if found.is_floating_point():
            return found.fill_(fill)
        return found.fill_(odd if found.dtype == sys.modules["torch"].bool else 78 - odd)

    def filled(make: Callable[..., Any], fill_in: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: fill_in(make(*args, **kwargs))

    homes: list[tuple[Any, str, Any]] = []
    for name, functions in _SOURCES.items():
        module = sys.modules.get(name)
        if module is not None:
            homes += [(module, function, torch_like if name == "torch" else numpy_like) for function in functions]
    if "torch" in sys.modules:
        homes.append((sys.modules["torch"].Tensor, "new_empty", torch_like))
    before = [(home, function, getattr(home, function)) for home, function, _ in homes]
    freed = [np.full(size, fill) for size in (4, 16, 64, 256, 1024, 4096, 1 << 15) for _ in range(4)]
    del freed
    try:
        for (home, function, fill_in), (_, _, make) in zip(homes, before, strict=True):
            setattr(home, function, filled(make, fill_in))
        yield
    finally:
        for home, function, make in before:
            setattr(home, function, make)
