"""Checks of types and numbers. Every error names the argument, its value and what is allowed."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any, Literal, TypeGuard

from softk._reference.threshold.limits import ROUNDINGS
from softk.backend import Array, adapted, backend_of, is_array, unknown

Mode = Literal["largest", "smallest"]
Reduction = Literal["mean", "sum", "none"]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether the value is a real number, or the symbol of one in a PyTorch trace."""
    real = isinstance(value, numbers.Real) or hasattr(type(value), "__sym_float__")
    return real and not isinstance(value, bool)


def require_array(name: str, value: Any, *, or_number: bool = False) -> None:
    wanted = "a number or an array" if or_number else "an array"
    if not is_array(value) or is_number(value):
        raise TypeError(
            f"{name} must be {wanted} of a library that follows the Python Array API standard "
            f"(NumPy, CuPy, PyTorch, JAX, Dask, ...), got {kind_of(value)}{_remedy(name, value)}"
        )
    kind = type(value)
    if kind.__name__ in ("MaskedArray", "matrix", "MaskedTensor") and kind.__module__.startswith(("numpy", "torch")):
        raise TypeError(
            f"{name} must be an ordinary array, got {kind_of(value)}; pass its data, and its valid entries as where="
        )
    dense = backend_of(value).densely(value)
    if dense is not None:
        layout = getattr(value, "layout", None)
        got = kind_of(value) + ("" if layout is None else f" of layout {layout}")
        raise TypeError(f"{name} must be a dense array, got {got}; convert it: {dense.format(name)}")


def _remedy(name: str, value: Any) -> str:
    """How to make an array or a number of a value that is neither: the end of an error message."""
    if isinstance(value, (str, bool)):
        return f" {value!r}"
    if hasattr(type(value), "__jax_array__"):
        return f"; pass jnp.asarray({name})"
    if isinstance(value, (list, tuple)):
        return f"; convert it, for example np.asarray({name}) or torch.tensor({name})"
    return f"; call it, as in {name}(step)" if callable(value) else ""


def require_size(name: str, x: Array, axis: int) -> None:
    """Require that the size of an axis is known, because the solver needs it."""
    if unknown(x.shape[axis]):
        words = backend_of(x).words
        raise ValueError(
            f"{name} must have a known size along axis {axis}, got shape {tuple(x.shape)}; {words.measure.format(name)}"
        )


def require_equal_sizes(arrays: dict[str, Array]) -> None:
    """Require that no size is NaN, with which the blocks of two Dask arrays could not be matched."""
    for name, value in arrays.items():
        for axis, size in enumerate(value.shape):
            if isinstance(size, float):
                require_size(name, value, axis)


def kind_of(value: Any) -> str:
    backend = adapted(type(value))
    if backend is not None and backend.words.kind is not None:
        return backend.words.kind
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def check_axis(axis: Any, ndim: int, called: str = "x", *, allowed: str = "an integer") -> int:
    """Return the axis as a number from 0 to ``ndim - 1``."""
    try:
        if isinstance(axis, bool):
            raise TypeError
        number = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis must be {allowed}, got {axis!r}") from None
    if not -ndim <= number < ndim:
        raise ValueError(f"axis must be from {-ndim} to {ndim - 1} for {called} of {ndim} axes, got {axis!r}")
    return number % ndim


def check_axes(axis: Any, ndim: int, called: str = "x") -> tuple[int, ...]:
    """Return an axis, or a tuple of them, as numbers from 0 to ``ndim - 1`` in ascending order."""
    if not isinstance(axis, tuple):
        return (check_axis(axis, ndim, called, allowed="an integer or a tuple of integers"),)
    axes = tuple(sorted(check_axis(one, ndim, called, allowed="an integer or a tuple of integers") for one in axis))
    if not axes:
        raise ValueError(f"axis must name at least one axis of {called}, got {axis!r}")
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis must name each axis once, got {axis!r}")
    return axes


def check_flag(name: str, value: Any) -> None:
    """Require a bool. Other values, such as the string "no" or an array, could count as true by accident."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_integer(name: str, value: Any) -> int:
    """Return a Python integer. An array is refused, because reading its value would synchronize with its device."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a Python integer, got {value!r}")
    return int(value)


def check_count(name: str, value: Any) -> int:
    """Return a Python integer of at least 1."""
    if check_integer(name, value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return int(value)


def check_reduction(reduction: Any) -> None:
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def check_mode(mode: Any) -> bool:
    """Return whether the smallest scores are selected."""
    if not isinstance(mode, str) or mode not in ("largest", "smallest"):
        raise ValueError(f"mode must be 'largest' or 'smallest', got {mode!r}")
    return bool(mode == "smallest")


def counted_number(k: Any, n: int | None, eps: float) -> Any:
    """Return a number k, replaced by 0 or n if it misses that end only by its rounding.

    `formulas.counted` does the same for arrays. With weights, n is None and the only end is 0. A symbolic number stays
    as it is, because a comparison would make the trace depend on its value.
    """
    symbolic = not isinstance(k, numbers.Real)
    if symbolic:
        return k
    if isinstance(k, numbers.Integral):
        return k
    # A whole k is exact. Only near n it is asked for, because a compiler makes a graph of its own for whole numbers.
    if n is not None and abs(k - n) <= ROUNDINGS * eps * n and not (0 <= k <= n and k == math.floor(k)):
        return n
    # Only a negative k is set to 0. A positive k stays as it is, however small.
    return 0.0 if 0.0 < -k <= ROUNDINGS * eps * (1 if n is None else n) else k


def check_mass(xp: Any, k: Any, n: int, dtype: Any, weighted: bool, of: str = "the size of x along axis") -> Any:
    """Return k. A number must be from 0 to n, or, with weights, at least 0 and finite.

    A number that misses an end by its rounding is returned as that end. With weights the upper end is their sum, which
    only the solver knows.
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


def at_most(xp: Any, k: Any, n: int) -> Any:
    """k, a number or an array, but at most n."""
    if is_number(k):
        return n if k > n else k
    require_array("k", k, or_number=True)
    return xp.where(k > n, n, k)


def working_dtype(xp: Any, dtype: Any) -> Any:
    """The dtype in which arrays of a real floating dtype are computed: float32 at least."""
    return xp.float32 if xp.finfo(dtype).bits < 32 else dtype


def check_precision(xp: Any, name: str, value: Any, of: str, other: Any, *, besides: str = "") -> None:
    """Require that two arrays are computed in the same dtype. float16, bfloat16 and float32 may be mixed."""
    if xp.isdtype(value.dtype, "real floating") and working_dtype(xp, value.dtype) == working_dtype(xp, other.dtype):
        return
    narrow = ", or another of at most 32 bits" if xp.finfo(other.dtype).bits <= 32 else ""
    raise TypeError(
        f"{name} must {besides}have the dtype of {of}, {other.dtype}{narrow}, got {value.dtype}; convert one"
    )


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


def require_whole(counted: Any, weights: Any, k: Any) -> None:
    """Require what the hard mask can select: no weights, and a whole k. `counted` is k without its rounding."""
    if weights is not None:
        raise ValueError("hard=True does not support weights, got weights; leave out one of the two")
    if is_number(counted) and counted != math.floor(counted):
        raise ValueError(f"k must be a whole number with hard=True, got {k!r}")
