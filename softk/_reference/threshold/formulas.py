"""The formulas that are computed once per slice, in one source for arrays, Numba and Triton.

The functions are written with the global name `xp`, and call each other by name. `load` makes a copy of them for one
namespace: an array library's, or a module of functions that a kernel's compiler knows. The source of a copy is this
file, which is what Triton compiles and what Numba's cache on disk is kept for.

Their numbers are arrays of one value per slice, or single numbers within a kernel. Tolerances and limits are arguments:
`limits` has them for every dtype. They stand to the right of the numbers, for they may be constants of a compiler.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

from softk.backend import Backend

#: An array of one value per slice, or one number.
Number = Any
#: The namespace that a copy computes with; `load` sets it.
xp: Any = None


def is_rounding(delta: Number, k: Number, unit: Number) -> Number:
    """Whether a sum of weights misses k by no more than its rounding, `unit` times k."""
    return xp.abs(delta) <= k * unit


def deficit(delta: Number, offset: Number, half: Number, k: Number, unit: Number) -> Number:
    """delta = k less the weight above the threshold. Within the gap it counts as 0 if it is a rounding of that sum."""
    return xp.where((xp.abs(offset) < half) & is_rounding(delta, k, unit), 0.0, delta)


def step_size(lower: Number, upper: Number, slope: Number, delta: Number, eps: Number, smallest: Number) -> Number:
    """Newton's step for log A = log B, A = L + max(-delta, 0) and B = U + max(delta, 0), L and U being the tails.

    The slopes of log A and log B are approximated: each is the share of its tail in A or B, times the slope of the mass
    over the sum of both tails.
    """
    both = lower + upper
    # A tail may underflow to 0, and its logarithm must be finite. The floor is below every mass, even if the weights
    # are as small as the dtype can hold.
    floor = xp.minimum(both * eps, smallest)
    more = xp.maximum(delta, 0.0)
    rising = xp.maximum(upper + more, floor)
    falling = xp.maximum(lower + (more - delta), floor)
    rate = (lower / falling + upper / rising) * slope
    return xp.log(falling / rising) * (both / xp.where(rate == 0.0, 1.0, rate))


def midpoint(high: Number, low: Number) -> Number:
    """The middle between two finite numbers. No part of it overflows, however a compiler rearranges it."""
    together = (high > 0.0) == (low > 0.0)
    return xp.where(together, high - 0.5 * (high - low), 0.5 * (high + low))


def excess_of(half: Number, widest: Number) -> Number:
    """By how much each side of a gap moves inwards, so that its tails do not underflow; `half` is half its width."""
    return xp.maximum(half - widest, 0.0)


def asinh(size: Number) -> Number:
    """The inverse of sinh for a size >= 0 whose square is a number. Every runtime has these functions in float64."""
    return xp.log1p(size + size * size / (1.0 + xp.sqrt(1.0 + size * size)))


def balance(delta: Number, upper: Number, lower: Number, half_gap: Number, log_farthest: Number) -> Number:
    """Half the logarithm of B / A, from the mass: log B / A = 2 asinh(delta exp(N) / (2 sqrt(U L))) + log(U / L).

    `upper` and `lower` are the tails U and L, each in units of its nearest item; `half_gap` is N. The
    argument y of asinh may overflow in a wide gap. Above 1e9, asinh(y) is log(2 y): 1 / y^2 is negligible.
    """
    missing, both = xp.abs(delta), xp.sqrt(upper) * xp.sqrt(lower)
    y = missing * (0.5 * xp.exp(xp.minimum(half_gap, log_farthest))) / both
    log_twice = half_gap + xp.log(xp.where(missing > 0.0, missing, 1.0) / both)
    share = xp.where(y < 1e9, asinh(xp.minimum(y, 1e9)), log_twice)
    return xp.where(delta < 0.0, -share, share) + 0.5 * xp.log(upper / lower)


def is_beside(exact: Number, delta: Number, half_gap: Number, log_farthest: Number) -> Number:
    """Whether the threshold lies beside one side of the gap: `balance` is not used, because the offset is accurate.

    This is so where the deficit is not exact, and where the gap is so wide that a derivative sees one side only.
    """
    # Not ~exact: within a kernel `exact` may be a Python bool, and ~ of that is an integer.
    return (exact == False) | ((delta != 0.0) & (half_gap > log_farthest))  # noqa: E712


def rate_of(scaled_sum: Number, farthest: Number) -> Number:
    """1 / V', clipped to the largest derivative."""
    return xp.minimum(1.0 / scaled_sum, farthest)


_FORMULAS = (
    is_rounding,
    deficit,
    step_size,
    midpoint,
    excess_of,
    asinh,
    balance,
    is_beside,
    rate_of,
)


def load(namespace: Any, compiled: Callable[[Any], Any] = lambda function: function, **names: Any) -> SimpleNamespace:
    """The formulas, computing with a namespace.

    Parameters
    ----------
    namespace : module
        Has where, minimum, maximum, abs, exp, log, log1p and sqrt.
    compiled : callable
        Applied to every function: the decorator of a compiler.
    **names
        Further global names that the compiler must find.

    Returns
    -------
    SimpleNamespace
        The functions by their names.
    """
    scope: dict[str, Any] = {"xp": namespace, "__builtins__": builtins, **names}
    for formula in _FORMULAS:
        function = FunctionType(formula.__code__, scope, formula.__name__)
        function.__module__, function.__doc__ = __name__, formula.__doc__
        scope[formula.__name__] = compiled(function)
    return SimpleNamespace(**{formula.__name__: scope[formula.__name__] for formula in _FORMULAS})


def formulas_of(backend: Backend) -> SimpleNamespace:
    """The formulas for the arrays of a backend, loaded once."""
    if backend.formulas is None:
        backend.formulas = load(backend.xp)
    found: SimpleNamespace = backend.formulas
    return found
