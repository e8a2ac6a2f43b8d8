"""Arithmetic for Numba: an exponential that vectorizes, and the functions that the reference's formulas compute with.

Numba's `float` leaves a float32 as it is. A number of a row becomes float64 by `np.float64`.

`EXACT` and `FAST` are the options of compilation. `FAST` lets sums be reordered, so that they vectorize; it does not
assume that there are no NaNs or infinities. LLVM keeps the flags of every instruction when a function is inlined, so an
`EXACT` function stays exact within a `FAST` one.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from softk._reference.threshold import formulas

from .cache import compiled, declared

#: Without NumPy's error model every division is checked for 0, and nothing vectorizes.
EXACT: dict[str, Any] = {"error_model": "numpy", "nogil": True}
FAST: dict[str, Any] = {**EXACT, "fastmath": {"reassoc", "nsz", "arcp", "contract"}}
#: For a loop without a sum, where 0 keeps its sign. Functions that are inlined everywhere are compiled so.
WITHOUT_SUMS: dict[str, Any] = {**EXACT, "fastmath": {"contract"}}


# --- the exponential

#: exp(x) = 2^n exp(r): 1 / log(2), what rounds to the integer n, log(2) in two parts, the largest |x|, and the
#: polynomial of exp(r) less 1 + r, from its highest power.
LOG2_E = 1.4426950408889634
SINGLE_ROUNDER, DOUBLE_ROUNDER = 1.5 * 2.0**23, 1.5 * 2.0**52
SINGLE_LOG2, DOUBLE_LOG2 = (0.693359375, -2.12194440e-4), (6.93147180369123816490e-01, 1.90821492927058770002e-10)
SINGLE_REACH, DOUBLE_REACH = 87.0, 708.0
SINGLE_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
DOUBLE_EXP = tuple(1.0 / math.factorial(i) for i in range(12, 1, -1))


@declared
def exponential(x):
    """exp(x), for x clipped to a range in which it and its inverse are normal numbers: 87 in float32, 708 in float64.

    The argument is split into n log(2) + r. Adding and subtracting 1.5 * 2^23 (2^52) rounds to the integer n, which is
    then added to the exponent of a polynomial in r. Numba's own exp is a call of the C library for every number.
    """


@overload(exponential, jit_options=WITHOUT_SUMS)
def _exponential(x):
    number = np.float32

    def single(x):
        x = x if x > number(-SINGLE_REACH) else number(-SINGLE_REACH)
        x = x if x < number(SINGLE_REACH) else number(SINGLE_REACH)
        shifted = x * number(LOG2_E) + number(SINGLE_ROUNDER)
        whole = shifted - number(SINGLE_ROUNDER)
        r = x - whole * number(SINGLE_LOG2[0])
        r = r - whole * number(SINGLE_LOG2[1])
        p = number(SINGLE_EXP[0]) * r + number(SINGLE_EXP[1])
        p = p * r + number(SINGLE_EXP[2])
        p = p * r + number(SINGLE_EXP[3])
        p = p * r + number(SINGLE_EXP[4])
        p = p * r + number(SINGLE_EXP[5])
        p = p * r * r + r + number(1.0)
        power = np.int32(np.float32(shifted).view(np.int32) << np.int32(23))
        return np.int32(np.float32(p).view(np.int32) + power).view(np.float32)

    def double(x):
        x = x if x > -DOUBLE_REACH else -DOUBLE_REACH
        x = x if x < DOUBLE_REACH else DOUBLE_REACH
        shifted = x * LOG2_E + DOUBLE_ROUNDER
        whole = shifted - DOUBLE_ROUNDER
        r = x - whole * DOUBLE_LOG2[0]
        r = r - whole * DOUBLE_LOG2[1]
        p = r * DOUBLE_EXP[0] + DOUBLE_EXP[1]
        p = p * r + DOUBLE_EXP[2]
        p = p * r + DOUBLE_EXP[3]
        p = p * r + DOUBLE_EXP[4]
        p = p * r + DOUBLE_EXP[5]
        p = p * r + DOUBLE_EXP[6]
        p = p * r + DOUBLE_EXP[7]
        p = p * r + DOUBLE_EXP[8]
        p = p * r + DOUBLE_EXP[9]
        p = p * r + DOUBLE_EXP[10]
        p = p * r * r + r + 1.0
        power = np.float64(shifted).view(np.int64) << np.int64(52)
        return np.int64(np.float64(p).view(np.int64) + power).view(np.float64)

    return single if x == types.float32 else double


@declared
def reach_of(number):
    """The largest |x| that `exponential` does not clip, in a dtype."""


@overload(reach_of, jit_options=WITHOUT_SUMS)
def _reach_of(number):
    reach = np.float32(SINGLE_REACH) if number.dtype == types.float32 else DOUBLE_REACH
    return lambda number: reach


@declared
def clipped_of(number):
    """A number that is hardly above exp(-reach): what `exponential` finds for a clipped x, it finds below that."""


@overload(clipped_of, jit_options=WITHOUT_SUMS)
def _clipped_of(number):
    is_single = number.dtype == types.float32
    found = np.float32(1.01 * math.exp(-SINGLE_REACH)) if is_single else 1.01 * math.exp(-DOUBLE_REACH)
    return lambda number: found


def _extreme(name: str):
    """The LLVM intrinsic, of which a reduction vectorizes; a comparison's does not. For numbers that are not NaN."""

    @intrinsic
    def function(typingctx, x, y):
        def codegen(context, builder, signature, args):
            kind = ir.FloatType() if x == types.float32 else ir.DoubleType()
            found = builder.module.declare_intrinsic(f"llvm.{name}", (kind,), ir.FunctionType(kind, [kind, kind]))
            return builder.call(found, args, fastmath=("fast",))

        return x(x, y), codegen

    return function


larger, smaller = _extreme("maxnum"), _extreme("minnum")


# --- the namespace of the formulas: numbers in float64, of which NaN stays NaN


@compiled(EXACT)
def where(condition, x, y):
    """One of two numbers."""
    return x if condition else y


@compiled(EXACT)
def minimum(x, y):
    """The smaller of two numbers."""
    return x if x < y or x != x else y


@compiled(EXACT)
def maximum(x, y):
    """The larger of two numbers."""
    return x if x > y or x != x else y


@compiled(EXACT)
def abs(x):
    """The absolute value."""
    return math.fabs(x)


@compiled(EXACT)
def exp(x):
    """The exponential."""
    return math.exp(x)


@compiled(EXACT)
def log(x):
    """The natural logarithm: -inf of 0, NaN of negative numbers."""
    return np.log(x)


@compiled(EXACT)
def log1p(x):
    """log(1 + x)."""
    return math.log1p(x)


@compiled(EXACT)
def sqrt(x):
    """The square root."""
    return math.sqrt(x)


FORMULAS = formulas.load(sys.modules[__name__], compiled(EXACT))
