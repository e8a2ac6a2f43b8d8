"""What a dtype can hold, the tolerances of the solver, and arithmetic that stays within both."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from softk.backend import Array

#: Steps before the correction, at most.
STEPS = 11
#: Newton corrections where a framework differentiates the operations themselves: two make that exact to second order.
CORRECTIONS = 2
#: A mass is rounded by as many units of its last digit: that close to 0, n or a sum of weights, it counts as that.
ROUNDINGS = 8.0


class Limits(NamedTuple):
    """What a dtype can hold, as Python numbers."""

    eps: float
    largest: float  # finite score; +inf counts as this one
    farthest: float  # |z| beyond which a score has no part in any derivative
    saturated: float  # offset at which a sigmoid is exactly 0 or 1
    reach: float  # |z| of which exp(z) and exp(-z) are numbers, with room for products


def limits(xp: Any, dtype: Any) -> Limits:
    info = xp.finfo(dtype)
    largest = float(info.max)
    saturated, reach = (128.0, 80.0) if info.bits <= 32 else (1024.0, 700.0)
    return Limits(float(info.eps), largest, (0.5 * largest) ** 0.5, saturated, reach)


def negligible(xp: Any, dtype: Any) -> float:
    """Negligible: adding it to 1 changes nothing in this dtype. Its products are still normal numbers."""
    return math.exp(0.9 * math.log(float(xp.finfo(dtype).smallest_normal)))


def widest_gap(bound: Limits) -> float:
    return 2.0 - math.log(bound.eps)


def clip(xp: Any, values: Array, least: Any, most: Any) -> Array:
    """Clip; the namespaces' own clip is slow or restricted where the bounds are arrays."""
    values = xp.maximum(values, least)
    return xp.minimum(values, most)


def exponential(xp: Any, exponent: Array, over: Any = None) -> Array:
    """exp of numbers of at most 0, not below what is negligible beside 1: processors are slow with subnormal numbers.

    `over` is the namespace that overwrites, for an exponent that nobody reads again.
    """
    over = over or xp
    return over.exp(over.maximum(exponent, math.log(negligible(xp, exponent.dtype))))


def safe_denominator(xp: Any, values: Array) -> Array:
    """The values, with 1 in the place of 0: for a quotient whose numerator is 0 there."""
    return xp.where(values == 0.0, 1.0, values)


def counted(xp: Any, k: Array, n: Any) -> Array:
    """What to add to a mass k of n items, so that it is the end, 0 or n, that it misses by its rounding.

    `n` may be a symbol of a trace, which is only compared. Above 0 there is nothing to add, however small k is.
    """
    unit = ROUNDINGS * limits(xp, k.dtype).eps  # of numbers of the size of n; a power of 2
    over = k - n
    found = xp.where((k < 0.0) & (-k / unit <= n), -k, 0.0)
    return xp.where(xp.abs(over) / unit <= n, -over, found)
