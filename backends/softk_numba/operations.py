"""Arithmetic for Numba: an exponential that vectorizes, and the functions that the reference's formulas compute with.

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

from .cache import compiled

#: Without NumPy's error model every division is checked for 0, and nothing vectorizes.
EXACT: dict[str, Any] = {"error_model": "numpy", "nogil": True}
FAST: dict[str, Any] = {**EXACT, "fastmath": {"reassoc", "nsz", "arcp", "contract"}}
_INLINED = {"error_model": "numpy", "nogil": True, "fastmath": {"contract"}}


# --- the exponential


def exponential(x):
    """exp(x), for x clipped to a range in which it and its inverse are normal numbers: 87 in float32, 708 in float64.

    The argument is split into n log(2) + r. Adding and subtracting 1.5 * 2^23 (2^52) rounds to the integer n, which is
    then added to the exponent of a polynomial in r. Numba's own exp is a call of the C library for every number.
    """
    raise NotImplementedError("compiled code only")


@overload(exponential, jit_options=_INLINED)
def _exponential(x):
    number = np.float32

    def single(x):
        x = x if x > number(-87.0) else number(-87.0)
        x = x if x < number(87.0) else number(87.0)
        shifted = x * number(1.4426950408889634) + number(12582912.0)
        whole = shifted - number(12582912.0)
        r = x - whole * number(0.693359375)
        r = r - whole * number(-2.12194440e-4)
        p = number(1.9875691500e-4) * r + number(1.3981999507e-3)
        p = p * r + number(8.3334519073e-3)
        p = p * r + number(4.1665795894e-2)
        p = p * r + number(1.6666665459e-1)
        p = p * r + number(5.0000001201e-1)
        p = p * r * r + r + number(1.0)
        power = np.int32(np.float32(shifted).view(np.int32) << np.int32(23))
        return np.int32(np.float32(p).view(np.int32) + power).view(np.float32)

    def double(x):
        x = x if x > -708.0 else -708.0
        x = x if x < 708.0 else 708.0
        shifted = x * 1.4426950408889634 + 6755399441055744.0
        whole = shifted - 6755399441055744.0
        r = x - whole * 6.93147180369123816490e-01
        r = r - whole * 1.90821492927058770002e-10
        p = r * (1.0 / 479001600.0) + 1.0 / 39916800.0
        p = p * r + 1.0 / 3628800.0
        p = p * r + 1.0 / 362880.0
        p = p * r + 1.0 / 40320.0
        p = p * r + 1.0 / 5040.0
        p = p * r + 1.0 / 720.0
        p = p * r + 1.0 / 120.0
        p = p * r + 1.0 / 24.0
        p = p * r + 1.0 / 6.0
        p = p * r + 0.5
        p = p * r * r + r + 1.0
        power = np.float64(shifted).view(np.int64) << np.int64(52)
        return np.int64(np.float64(p).view(np.int64) + power).view(np.float64)

    return single if x == types.float32 else double


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
def abs(x):  # noqa: A001
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
