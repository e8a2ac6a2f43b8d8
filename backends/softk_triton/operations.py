"""The functions that the reference's formulas compute with, for Triton."""

from __future__ import annotations

import triton
import triton.language as tl

# Functions, and not other names for those of `tl`, in whose place the interpreter puts its own for a while.


@triton.jit
def where(condition, x, y):
    return tl.where(condition, x, y)


@triton.jit
def minimum(x, y):
    return tl.minimum(x, y)


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y)


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def log(x):
    """The logarithm, to a relative error also near 1, where the processor's own has an absolute error: by a series."""
    q = (x - 1.0) / (x + 1.0)
    square = q * q
    series = 2.0 * q * (1.0 + square * (1.0 / 3.0 + square * (1.0 / 5.0 + square * (1.0 / 7.0 + square / 9.0))))
    return tl.where(tl.abs(q) < 0.125, series, tl.log(x))


@triton.jit
def log1p(x):
    """log(1 + x), for x >= 0. The quotient makes up for what is lost in rounding 1 + x."""
    rounded = 1.0 + x
    less = rounded - 1.0
    return tl.where(less == 0.0, x, log(rounded) * (x / tl.where(less == 0.0, 1.0, less)))
