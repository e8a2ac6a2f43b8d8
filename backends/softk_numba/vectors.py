"""Vectors of numbers in the registers of a processor, as a type of Numba, and a namespace for the formulas.

A `Vector` holds one number for each of several rows. It is LLVM's own vector type: a value like a number, which LLVM
keeps in as many registers as it needs. Loops over small arrays would say the same, but LLVM must then prove that the
arrays do not overlap, and sums go through memory.

    v = load(matrix, i)         one row of a matrix whose rows are as long as a vector
    v = spread(number)          one number in all places
    v * v + 0.5, v < w          arithmetic and comparisons, item by item; a number beside a vector is spread
    where(v < w, v, w)          the choice between two
    exp(v), log(v)              polynomials

The result for one place does not depend on what stands in the others.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import (
    intrinsic,
    lower_builtin,
    models,
    overload,
    register_model,
    type_callable,
)

from .cache import compiled, declared
from .operations import (
    DOUBLE_EXP,
    DOUBLE_LOG2,
    DOUBLE_REACH,
    DOUBLE_ROUNDER,
    LOG2_E,
    SINGLE_EXP,
    SINGLE_LOG2,
    SINGLE_REACH,
    SINGLE_ROUNDER,
)

#: The length of a vector in bytes: that of AVX-512's registers, and of two or four of smaller ones.
BYTES = 64
#: LLVM may join a product and a sum into one operation. It may not change their order.
FLAGS = ("contract",)
INLINED: dict[str, Any] = {"error_model": "numpy", "nogil": True, "forceinline": True}

_ELEMENTS = {
    types.boolean: ir.IntType(1),
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
}


class Vector(types.Type):
    """The type of vectors of `count` numbers of a dtype; comparisons give vectors of booleans."""

    def __init__(self, dtype: Any, count: int) -> None:
        self.dtype, self.count = dtype, count
        super().__init__(name=f"Vector({dtype}, {count})")

    @property
    def key(self) -> Any:
        return self.dtype, self.count


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.VectorType(_ELEMENTS[kind.dtype], kind.count))


def lanes_of(dtype: Any) -> int:
    """How many numbers of a dtype of NumPy or Numba a vector has."""
    return BYTES // (dtype.bitwidth // 8 if isinstance(dtype, types.Type) else dtype.itemsize)


def vector_of(dtype: Any) -> Vector:
    """The type of the vectors of a dtype."""
    return Vector(dtype, lanes_of(dtype))


# --- arithmetic


def _common(x: Any, y: Any) -> Any:
    """The type of two operands, of which one may be a number; None where neither is a vector."""
    if isinstance(x, Vector) and (x == y or isinstance(y, (types.Number, types.Boolean))):
        return x
    return y if isinstance(y, Vector) and isinstance(x, (types.Number, types.Boolean)) else None


def _splat(builder: Any, number: Any, kind: Any) -> Any:
    vector = ir.VectorType(_ELEMENTS[kind.dtype], kind.count)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def _as_vector(context: Any, builder: Any, value: Any, given: Any, kind: Any) -> Any:
    if isinstance(given, Vector):
        return value
    return _splat(builder, context.cast(builder, value, given, kind.dtype), kind)


def _operator(function: Any, instruction: Any, compares: bool = False) -> None:
    """Teach Numba an operator of two vectors, or of a vector and a number."""

    @type_callable(function)
    def _(context):
        def typer(x, y):
            kind = _common(x, y)
            return Vector(types.boolean, kind.count) if compares and kind is not None else kind

        return typer

    def lower(context, builder, signature, args):
        kind = _common(*signature.args)
        x, y = (
            _as_vector(context, builder, value, given, kind) for value, given in zip(args, signature.args, strict=True)
        )
        return instruction(builder, x, y, kind)

    for pair in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(function, *pair)(lower)


def _comparison(sign: str) -> Any:
    def instruction(builder, x, y, kind):
        if kind.dtype == types.boolean:
            return builder.icmp_unsigned(sign, x, y)
        return builder.fcmp_unordered(sign, x, y) if sign == "!=" else builder.fcmp_ordered(sign, x, y)

    return instruction


for _function, _name in (
    (operator.add, "fadd"),
    (operator.iadd, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
):
    _operator(_function, lambda builder, x, y, _, name=_name: getattr(builder, name)(x, y, flags=FLAGS))
_operator(operator.truediv, lambda builder, x, y, _: builder.fdiv(x, y))
_operator(operator.and_, lambda builder, x, y, _: builder.and_(x, y))
_operator(operator.or_, lambda builder, x, y, _: builder.or_(x, y))
for _function, _name in (
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
    (operator.ne, "!="),
):
    _operator(_function, _comparison(_name), compares=True)


@type_callable(operator.invert)
def _type_invert(context):
    return lambda x: x if isinstance(x, Vector) and x.dtype == types.boolean else None


@lower_builtin(operator.invert, Vector)
def _lower_invert(context, builder, signature, args):
    return builder.not_(args[0])


@type_callable(operator.neg)
def _type_negative(context):
    return lambda x: x if isinstance(x, Vector) else None


@lower_builtin(operator.neg, Vector)
def _lower_negative(context, builder, signature, args):
    return builder.fneg(args[0])


# --- memory and choices


@intrinsic
def spread(typingctx, number):
    """One number in all places."""
    kind = vector_of(number)

    def codegen(context, builder, signature, args):
        return _splat(builder, args[0], kind)

    return kind(number), codegen


def _place(context, builder, kind, matrix, row, column):
    """The address of an item of a matrix whose rows are contiguous."""
    found = context.make_array(kind)(context, builder, matrix)
    stride = builder.extract_value(found.strides, 0)
    start = builder.ptrtoint(found.data, stride.type)
    start = builder.add(start, builder.mul(row, stride))
    size = stride.type(kind.dtype.bitwidth // 8)
    return builder.add(start, builder.mul(column, size))


def _load(builder, address, vector, size):
    return builder.load(builder.inttoptr(address, vector.as_pointer()), align=size)


@intrinsic
def load(typingctx, matrix, row):
    """A row of a matrix whose rows are as long as a vector."""
    kind = vector_of(matrix.dtype)

    def codegen(context, builder, signature, args):
        place = _place(context, builder, matrix, args[0], args[1], args[1].type(0))
        return _load(builder, place, ir.VectorType(_ELEMENTS[kind.dtype], kind.count), matrix.dtype.bitwidth // 8)

    return kind(matrix, types.intp), codegen


@intrinsic
def store(typingctx, value, matrix, row):
    """Write a vector to a row of a matrix."""

    def codegen(context, builder, signature, args):
        place = _place(context, builder, matrix, args[1], args[2], args[2].type(0))
        builder.store(args[0], builder.inttoptr(place, args[0].type.as_pointer()), align=matrix.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(value, matrix, types.intp), codegen


@intrinsic
def where(typingctx, condition, x, y):
    """The items of x where a condition holds, those of y elsewhere."""
    kind = _common(x, y)
    if not isinstance(condition, Vector) or kind is None:
        return None

    def codegen(context, builder, signature, args):
        given = signature.args
        x, y = (_as_vector(context, builder, args[i], given[i], kind) for i in (1, 2))
        return builder.select(args[0], x, y)

    return kind(condition, x, y), codegen


@intrinsic
def any_of(typingctx, condition):
    """Whether a condition holds in any place."""

    def codegen(context, builder, signature, args):
        bits = ir.IntType(condition.count)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], bits), bits(0))

    return types.boolean(condition), codegen


# --- four columns of a matrix as four vectors


def _transposed(builder, parts):
    """The columns of four vectors of four numbers, as four vectors."""
    index = ir.VectorType(ir.IntType(32), 4)

    def mixed(x, y, *places):
        return builder.shuffle_vector(x, y, ir.Constant(index, list(places)))

    a, b, c, d = parts
    low, high = mixed(a, b, 0, 4, 1, 5), mixed(c, d, 0, 4, 1, 5)
    low_2, high_2 = mixed(a, b, 2, 6, 3, 7), mixed(c, d, 2, 6, 3, 7)
    return (
        mixed(low, high, 0, 1, 4, 5),
        mixed(low, high, 2, 3, 6, 7),
        mixed(low_2, high_2, 0, 1, 4, 5),
        mixed(low_2, high_2, 2, 3, 6, 7),
    )


@intrinsic
def load_columns(typingctx, matrix, row, column):
    """Four columns from the one given, of as many rows as a vector has places, from the one given."""
    kind = vector_of(matrix.dtype)

    def codegen(context, builder, signature, args):
        size = matrix.dtype.bitwidth // 8
        four = ir.VectorType(_ELEMENTS[kind.dtype], 4)
        columns: list[list[Any]] = [[], [], [], []]
        for first in range(0, kind.count, 4):
            rows = []
            for i in range(first, first + 4):
                row = builder.add(args[1], args[1].type(i))
                rows.append(_load(builder, _place(context, builder, matrix, args[0], row, args[2]), four, size))
            for column, part in zip(columns, _transposed(builder, rows), strict=True):
                column.append(part)
        return context.make_tuple(builder, signature.return_type, [_joined(builder, column) for column in columns])

    return types.UniTuple(kind, 4)(matrix, types.intp, types.intp), codegen


def _joined(builder, parts):
    """Two or four vectors in one."""
    while len(parts) > 1:
        count = parts[0].type.count
        places = ir.Constant(ir.VectorType(ir.IntType(32), 2 * count), list(range(2 * count)))
        parts = [builder.shuffle_vector(parts[i], parts[i + 1], places) for i in range(0, len(parts), 2)]
    return parts[0]


@intrinsic
def store_columns(typingctx, values, matrix, row, column):
    """Write four vectors to four columns from the one given, of the rows from the one given."""
    kind = values.dtype

    def codegen(context, builder, signature, args):
        size = matrix.dtype.bitwidth // 8
        columns = [builder.extract_value(args[0], i) for i in range(4)]
        index = ir.VectorType(ir.IntType(32), 4)
        for first in range(0, kind.count, 4):
            places = ir.Constant(index, [first + i for i in range(4)])
            parts = [builder.shuffle_vector(value, value, places) for value in columns]
            for i, part in enumerate(_transposed(builder, parts)):
                row = builder.add(args[2], args[2].type(first + i))
                place = _place(context, builder, matrix, args[1], row, args[3])
                builder.store(part, builder.inttoptr(place, part.type.as_pointer()), align=size)
        return context.get_dummy_value()

    return types.void(values, matrix, types.intp, types.intp), codegen


# --- the namespace of the formulas


@compiled(INLINED)
def minimum(x, y):
    """The smaller of two; y where one is NaN."""
    return where(x < y, x, y)


@compiled(INLINED)
def maximum(x, y):
    """The larger of two; y where one is NaN."""
    return where(x > y, x, y)


@compiled(INLINED)
def abs(x):
    """The absolute value."""
    return where(x < 0.0, -x, x)


def _bits(builder, value, kind):
    return builder.bitcast(value, ir.VectorType(ir.IntType(kind.dtype.bitwidth), kind.count))


def _constant(kind, number):
    return ir.Constant(ir.VectorType(ir.IntType(kind.dtype.bitwidth), kind.count), [number] * kind.count)


def _digits(kind):
    """How many bits of a number stand behind its exponent."""
    return 23 if kind.dtype == types.float32 else 52


@intrinsic
def _scaled(typingctx, x, shifted):
    """x times 2^n, for a number to whose last bits n was added."""

    def codegen(context, builder, signature, args):
        power = builder.shl(_bits(builder, args[1], x), _constant(x, _digits(x)))
        return builder.bitcast(builder.add(_bits(builder, args[0], x), power), args[0].type)

    return x(x, x), codegen


@intrinsic
def _split(typingctx, x):
    """The exponent of a positive normal number and the rest, which is between sqrt(1/2) and sqrt(2), about."""
    digits = _digits(x)
    half = (0x3F3504F3, 0x3F800000) if digits == 23 else (0x3FE6A09E667F3BCD, 0x3FF0000000000000)

    def codegen(context, builder, signature, args):
        above = builder.sub(_bits(builder, args[0], x), _constant(x, half[0]))
        power = builder.ashr(above, _constant(x, digits))
        rest = builder.add(builder.and_(above, _constant(x, (1 << digits) - 1)), _constant(x, half[0]))
        # Added to the last bits of 1.5 * 2^digits: a conversion of integers of 64 bits is not vectorized.
        shift = 1.5 * 2.0**digits
        bits = {23: 0x4B400000, 52: 0x4338000000000000}[digits]
        exponent = builder.bitcast(builder.add(power, _constant(x, bits)), args[0].type)
        shift = ir.Constant(args[0].type, [shift] * x.count)
        return context.make_tuple(
            builder,
            signature.return_type,
            (builder.fsub(exponent, shift), builder.bitcast(rest, args[0].type)),
        )

    return types.UniTuple(x, 2)(x), codegen


@declared
def exp(x):
    """exp(x), by the method of `operations.exponential` and clipped like it."""


@overload(exp, jit_options=INLINED)
def _exp(x):
    def single(x):
        x = maximum(x, -SINGLE_REACH)
        x = minimum(x, SINGLE_REACH)
        shifted = x * LOG2_E + SINGLE_ROUNDER
        whole = shifted - SINGLE_ROUNDER
        r = x - whole * SINGLE_LOG2[0]
        r = r - whole * SINGLE_LOG2[1]
        p = r * SINGLE_EXP[0] + SINGLE_EXP[1]
        p = p * r + SINGLE_EXP[2]
        p = p * r + SINGLE_EXP[3]
        p = p * r + SINGLE_EXP[4]
        p = p * r + SINGLE_EXP[5]
        p = p * r * r + r + 1.0
        return _scaled(p, shifted)

    def double(x):
        x = maximum(x, -DOUBLE_REACH)
        x = minimum(x, DOUBLE_REACH)
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
        return _scaled(p, shifted)

    return single if x.dtype == types.float32 else double


_LOG_2 = math.log(2.0)


@declared
def log(x):
    """log(x), for positive normal numbers: 2 artanh((m - 1) / (m + 1)) of what the power of 2 leaves."""


@overload(log, jit_options=INLINED)
def _log(x):
    def single(x):
        power, rest = _split(x)
        s = (rest - 1.0) / (rest + 1.0)
        square = s * s
        p = square * (2.0 / 9.0) + 2.0 / 7.0
        p = p * square + 2.0 / 5.0
        p = p * square + 2.0 / 3.0
        return power * _LOG_2 + (s * 2.0 + s * square * p)

    def double(x):
        power, rest = _split(x)
        s = (rest - 1.0) / (rest + 1.0)
        square = s * s
        p = square * (2.0 / 21.0) + 2.0 / 19.0
        p = p * square + 2.0 / 17.0
        p = p * square + 2.0 / 15.0
        p = p * square + 2.0 / 13.0
        p = p * square + 2.0 / 11.0
        p = p * square + 2.0 / 9.0
        p = p * square + 2.0 / 7.0
        p = p * square + 2.0 / 5.0
        p = p * square + 2.0 / 3.0
        return power * _LOG_2 + (s * 2.0 + s * square * p)

    return single if x.dtype == types.float32 else double
