"""Checks of numbers and kinds. Every error names the argument, its value and what is allowed."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

from ._registry import is_array
from ._solver import ROUNDINGS


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def require_array(name: str, value: Any, *, or_number: bool = False) -> None:
    wanted = "a number or an array" if or_number else "an array"
    if not is_array(value) or is_number(value):
        raise TypeError(
            f"{name} must be {wanted} of a library that follows the Python Array API standard "
            f"(NumPy, CuPy, PyTorch, JAX, Dask, ...), got {kind_of(value)}"
        )
    if type(value).__name__ in ("MaskedArray", "matrix") and type(value).__module__.startswith("numpy"):
        raise TypeError(f"{name} must be an ordinary array, got {kind_of(value)}; pass its data, its mask as where=")


def kind_of(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def check_axis(axis: Any, ndim: int) -> int:
    """The axis counted from the first."""
    try:
        number = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis must be an integer, got {axis!r}") from None
    if not -ndim <= number < ndim:
        raise ValueError(f"axis must be from {-ndim} to {ndim - 1} for x of {ndim} axes, got {axis!r}")
    return number % ndim


def check_mode(mode: Any) -> bool:
    """Whether the smallest are meant."""
    if not isinstance(mode, str) or mode not in ("largest", "smallest"):
        raise ValueError(f"mode must be 'largest' or 'smallest', got {mode!r}")
    return bool(mode == "smallest")


def counted_number(k: Any, n: int | None, eps: float) -> Any:
    """A number k, or the end, 0 or n, that it misses by its rounding; `softk._solver.counted` says it of arrays.

    Without n, which weights decide, the only end is 0.
    """
    if isinstance(k, numbers.Integral) or (n is not None and 0 <= k <= n and k == math.floor(k)):
        return k
    if n is not None and abs(k - n) <= ROUNDINGS * eps * n:
        return n
    return 0.0 if 0.0 < -k <= ROUNDINGS * eps * (1 if n is None else n) else k


def check_mass(xp: Any, k: Any, n: int, dtype: Any, weighted: bool, of: str = "the size of x along axis") -> Any:
    """k, which as a number must be 0 <= k <= n, or any that there is where weights decide how much is selected.

    A number that misses an end by its rounding is returned as that end. The solver alone knows the sum of weights.
    """
    if not is_number(k):
        return k
    info = xp.finfo(dtype)
    k = counted_number(k, None if weighted else n, float(info.eps))
    if weighted and not 0 <= k <= float(info.max):
        raise ValueError(
            f"k must be at least 0 and finite (at most {float(info.max):.3g} in float{info.bits}), got {k!r}"
        )
    if not weighted and not 0 <= k <= n:
        raise ValueError(f"k must be from 0 to {n}, {of}, got {k!r}")
    return k


def check_temperature(xp: Any, epsilon: Any, dtype: Any) -> None:
    if not is_number(epsilon):
        return
    info = xp.finfo(dtype)
    least, most = 2.0 * float(info.smallest_normal), float(info.max)
    if not least <= float(epsilon) <= most:
        raise ValueError(
            f"epsilon must be a positive finite number (from {least:.3g} to {most:.3g} in float{info.bits}), "
            f"got {epsilon!r}"
        )
