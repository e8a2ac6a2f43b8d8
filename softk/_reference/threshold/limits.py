"""What a dtype can hold, the tolerances of the solver, and arithmetic that stays within what a dtype can hold."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from softk.backend import Array

#: Newton steps at most, before the correction.
STEPS = 11
#: Newton corrections where a framework differentiates the operations themselves: with two of them second derivatives
#: are exact.
CORRECTIONS = 2
#: How far below the k-th largest score, in units of tau, the threshold may lie before a window must be rejected.
MARGIN = 4.0
#: A mass is rounded to this many units of its last digit: if it is that close to 0, n or the sum of the weights, it
#: counts as that number.
ROUNDINGS = 8.0
#: An item dominates a slice where it has more than this part of p, the derivative of the threshold in the scores.
DOMINANT = 0.75


class Limits(NamedTuple):
    """What a dtype can hold, as Python numbers."""

    eps: float
    largest: float  # the largest finite number; a score of +inf counts as this one
    farthest: float  # the largest |z| that a derivative sees, and the largest derivative
    saturated: float  # the offset at which a sigmoid is exactly 0 or 1
    reach: float  # the largest |z| such that exp(z), exp(-z) and their products with small factors are normal numbers


def limits(xp: Any, dtype: Any) -> Limits:
    info = xp.finfo(dtype)
    largest = float(info.max)
    saturated, reach = (128.0, 80.0) if info.bits <= 32 else (1024.0, 700.0)
    return Limits(float(info.eps), largest, (0.5 * largest) ** 0.5, saturated, reach)


def negligible(xp: Any, dtype: Any) -> float:
    """Negligible: adding it to 1 changes nothing in this dtype. Its products are still normal numbers."""
    return math.exp(0.9 * math.log(float(xp.finfo(dtype).smallest_normal)))


def widest_gap(bound: Limits) -> float:
    """Half the width of a gap, in units of tau, that is not narrowed: within eps both its tails are exponentials."""
    return 2.0 - math.log(bound.eps)


def small_step(bound: Limits) -> float:
    """The last Newton step may follow one of this size: both are quadratic, from eps^(1/4) by eps^(1/2) to eps."""
    return math.sqrt(math.sqrt(bound.eps))


def coldest(bound: Limits) -> float:
    """The least temperature whose inverse, and the products of it, are normal numbers; its inverse is the largest."""
    return 2.0**-60 if bound.largest < 1e300 else 2.0**-400


def clip(xp: Any, values: Array, least: Any, most: Any) -> Array:
    """The values clipped to an interval. Some namespaces' own clip is slow, or takes no arrays as bounds."""
    values = xp.maximum(values, least)
    return xp.minimum(values, most)


def exponential(xp: Any, exponent: Array) -> Array:
    """exp of numbers of at most 0, or what is negligible: processors are slow with subnormal numbers."""
    return xp.exp(xp.maximum(exponent, math.log(negligible(xp, exponent.dtype))))


def safe_denominator(xp: Any, values: Array) -> Array:
    """The values, with 1 in place of 0, for a quotient whose numerator is 0 there."""
    return xp.where(values == 0.0, 1.0, values)


def counted(xp: Any, k: Array, n: Any) -> Array:
    """What to add to a mass k of n items that misses 0 or n by a rounding, so that it is 0 or n; else 0.

    `n` may be a symbol of a trace, which is only compared. A k above 0 is never rounded to 0, however small it is.
    """
    unit = ROUNDINGS * limits(xp, k.dtype).eps  # a power of 2: k / unit is exact
    over = k - n
    found = xp.where((k < 0.0) & (-k / unit <= n), -k, 0.0)
    return xp.where(xp.abs(over) / unit <= n, -over, found)
