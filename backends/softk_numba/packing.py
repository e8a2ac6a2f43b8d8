"""The scores of an interval, copied next to each other: a vector of them at a time where the processor can.

A comparison of a vector gives a number of 8 bits (4 for float64), one for each score. A table has for each such number
the order that brings the chosen scores to the front, which AVX2 does in one instruction. The whole vector is written,
and the next one over what was not chosen. That takes a quarter of the time of a loop over single scores. The compress
instructions of AVX-512 would do the same, but they are slow on some processors when they write to memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload

from .cache import compiled, declared
from .operations import EXACT

#: The bytes of a vector of AVX2, and the numbers of 4 bytes in it.
BYTES = 32
WORDS = BYTES // 4
_INT8, _INT32, _INT64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_ELEMENTS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}


def _can_permute() -> bool:
    """Whether the processor that is compiled for has AVX2."""
    *_, features = cpu_target.target_context.codegen().magic_tuple()
    return "+avx2" in str(features)


def _order(bits: int, lanes: int) -> list[int]:
    """The words of a vector, those of the chosen numbers first."""
    words = WORDS // lanes
    chosen = [i for i in range(lanes) if bits >> i & 1]
    order = [words * i + j for i in chosen for j in range(words)]
    return order + [0] * (WORDS - len(order))


def _address(context: Any, builder: Any, kind: Any, array: Any, i: Any, pointee: Any) -> Any:
    """The address of an item of a contiguous array, as one of another type."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [i]), pointee.as_pointer())


def _present(kind: Any) -> Any:
    """The type of an array that is there, of an array that may be None."""
    return kind.type if isinstance(kind, types.Optional) else kind


@intrinsic
def chosen_bits(typingctx, x, start, low, high):
    """Which numbers of a vector from `start` are in (low, high]: one bit for each."""
    lanes = BYTES // (x.dtype.bitwidth // 8)

    def codegen(context, builder, signature, args):
        kind = ir.VectorType(_ELEMENTS[x.dtype], lanes)
        place = _address(context, builder, x, args[0], args[1], kind)
        values = builder.load(place, align=x.dtype.bitwidth // 8)
        zeros = ir.Constant(ir.VectorType(_INT32, lanes), [0] * lanes)

        def spread(number):
            one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, _INT32(0))
            return builder.shuffle_vector(one, one, zeros)

        above = builder.fcmp_ordered(">", values, spread(args[2]))
        below = builder.fcmp_ordered("<=", values, spread(args[3]))
        bits = builder.bitcast(builder.and_(above, below), ir.IntType(lanes))
        return builder.zext(bits, _INT64)

    return types.intp(x, types.intp, x.dtype, x.dtype), codegen


@intrinsic
def pack(typingctx, values, start, bits, into, count):
    """Write the chosen numbers of a vector from `start` to `into[count:]`, and anything for the rest of a vector."""
    values = _present(values)
    into = _present(into)
    lanes = BYTES // (values.dtype.bitwidth // 8)

    def codegen(context, builder, signature, args):
        kind = ir.VectorType(ir.FloatType(), WORDS)  # as words, whatever the numbers are
        orders = [ir.Constant(ir.VectorType(_INT8, WORDS), _order(bits, lanes)) for bits in range(1 << lanes)]
        table = ir.Constant(ir.ArrayType(orders[0].type, len(orders)), orders)
        table = cgutils.global_constant(builder.module, f"softk_orders_{lanes}", table)
        order = builder.load(builder.gep(table, [_INT32(0), args[2]]), align=WORDS)
        order = builder.zext(order, ir.VectorType(_INT32, WORDS))
        found = builder.load(_address(context, builder, values, args[0], args[1], kind), align=4)
        name = "llvm.x86.avx2.permps"
        permute = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind, order.type]), name)
        found = builder.call(permute, [found, order])
        builder.store(found, _address(context, builder, into, args[3], args[4], kind), align=4)
        return context.get_dummy_value()

    return types.void(values, types.intp, types.intp, into, types.intp), codegen


@intrinsic
def count_of(typingctx, bits):
    """How many bits are 1."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.intp(types.intp), codegen


@declared
def gather_vectors(x, weights, low, high, into, weights_into):
    """Copy the scores in (low, high] of all whole vectors: how many scores were read, and how many were copied."""


@overload(gather_vectors, jit_options=EXACT)
def _gather_vectors(x, weights, low, high, into, weights_into):
    arrays = [kind for kind in map(_present, (x, weights, into, weights_into)) if isinstance(kind, types.Array)]
    if not _can_permute() or any(kind.layout != "C" or kind.dtype != x.dtype for kind in arrays):
        return lambda x, weights, low, high, into, weights_into: (0, 0)
    lanes = BYTES // (x.dtype.bitwidth // 8)

    def gather_vectors(x, weights, low, high, into, weights_into):
        count = 0
        stop = x.shape[0] - x.shape[0] % lanes
        for start in range(0, stop, lanes):
            bits = chosen_bits(x, start, low, high)
            pack(x, start, bits, into, count)
            if weights is not None:
                pack(weights, start, bits, weights_into, count)
            count += count_of(bits)
        return stop, count

    return gather_vectors


@compiled(EXACT)
def gather(x, weights, low, high, into, weights_into):
    """Copy the scores in (low, high], and their weights, and return their number. There is room for all of them."""
    number = x.dtype.type
    rounded, high = number(low), number(high)
    if rounded > low:  # a score that is equal to it is in the interval
        rounded = np.nextafter(rounded, -number(np.inf))
    start, count = gather_vectors(x, weights, rounded, high, into, weights_into)
    for i in range(start, x.shape[0]):
        value = x[i]
        into[count] = value
        if weights is not None:
            weights_into[count] = weights[i]
        count += 1 if (value > rounded) & (value <= high) else 0
    return count
