"""Rows of numbers by their address, and vectors as parts of them.

An array of Numba counts its references, in an atomic operation of its own for almost every function that it is given
to, and has seven words. For a slice of a few scores that takes longer than the arithmetic. A `Pointer` is one address:
nobody counts, and no index is checked. The array that it points into must be alive: `hold` it after the last use.

    p = pointer_to(array)         the first number of a contiguous array
    p[i], p[i] = number           a number
    p = behind(p, count)          the pointer to a later number
    take(p, i), put(v, p, i)      a vector, from a place on
    filled(p, number)             a vector of the dtype, with a number in all places
    sum_of(v)                     the sum of all places
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from .vectors import BYTES, Vector

_ELEMENTS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.int64: ir.IntType(64)}
#: How many numbers a vector has, of either dtype: as many as of float64 fit into one of `vectors`.
BLOCK = BYTES // 8
#: The bytes of a line of the cache.
LINE = 64


class Pointer(types.Type):
    """The type of addresses of numbers of a dtype."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Pointer({dtype})")

    @property
    def key(self) -> Any:
        return self.dtype


@register_model(Pointer)
class _PointerModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _ELEMENTS[kind.dtype].as_pointer())


@intrinsic
def pointer_to(typingctx, values):
    """The address of the first number of a contiguous array."""

    def codegen(context, builder, signature, args):
        return context.make_array(values)(context, builder, args[0]).data

    return Pointer(values.dtype)(values), codegen


@intrinsic
def aligned(typingctx, pointer):
    """The first number from there on at the start of a line of the cache."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        start = builder.add(builder.ptrtoint(args[0], word), word(LINE - 1))
        return builder.inttoptr(builder.and_(start, word(-LINE)), args[0].type)

    return pointer(pointer), codegen


@intrinsic
def behind(typingctx, pointer, count):
    """The pointer to a later number."""

    def codegen(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), codegen


@intrinsic
def single(typingctx, pointer):
    """The same place, as one of numbers of float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType().as_pointer())

    return Pointer(types.float32)(pointer), codegen


@intrinsic
def hold(typingctx, values):
    """Keep an array alive up to here."""

    def codegen(context, builder, signature, args):
        return context.get_dummy_value()

    return types.void(values), codegen


# --- numbers


@type_callable(operator.getitem)
def _type_getitem(context):
    def typer(pointer, place):
        return pointer.dtype if isinstance(pointer, Pointer) and isinstance(place, types.Integer) else None

    return typer


@lower_builtin(operator.getitem, Pointer, types.Integer)
def _lower_getitem(context, builder, signature, args):
    place = context.cast(builder, args[1], signature.args[1], types.intp)
    return builder.load(builder.gep(args[0], [place]))


@type_callable(operator.setitem)
def _type_setitem(context):
    def typer(pointer, place, value):
        given = isinstance(place, types.Integer) and isinstance(value, types.Number)
        return types.void if isinstance(pointer, Pointer) and given else None

    return typer


@lower_builtin(operator.setitem, Pointer, types.Integer, types.Number)
def _lower_setitem(context, builder, signature, args):
    kind, place, value = signature.args
    place = context.cast(builder, args[1], place, types.intp)
    builder.store(context.cast(builder, args[2], value, kind.dtype), builder.gep(args[0], [place]))
    return context.get_dummy_value()


# --- vectors


def _vector_type(kind: Any) -> Any:
    return ir.VectorType(_ELEMENTS[kind.dtype], BLOCK)


def _address(builder, kind, pointer, place):
    return builder.bitcast(builder.gep(pointer, [place]), _vector_type(kind).as_pointer())


@intrinsic
def take(typingctx, pointer, place):
    """As many numbers as a vector has, from a place on."""

    def codegen(context, builder, signature, args):
        return builder.load(_address(builder, pointer, *args), align=pointer.dtype.bitwidth // 8)

    return Vector(pointer.dtype, BLOCK)(pointer, types.intp), codegen


@intrinsic
def put(typingctx, value, pointer, place):
    """Write a vector, from a place on."""

    def codegen(context, builder, signature, args):
        builder.store(args[0], _address(builder, pointer, *args[1:]), align=pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(value, pointer, types.intp), codegen


def _splat(builder: Any, number: Any, count: int) -> Any:
    vector = ir.VectorType(number.type, count)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), count), [0] * count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


@intrinsic
def filled(typingctx, pointer, number):
    """A vector of the dtype, with one number in all places."""
    kind = Vector(pointer.dtype, BLOCK)

    def codegen(context, builder, signature, args):
        return _splat(builder, context.cast(builder, args[1], number, pointer.dtype), BLOCK)

    return kind(pointer, number), codegen


@intrinsic
def first_places(typingctx, pointer, count):
    """Which places of a vector of the dtype are the first ones: so many, none if the count is negative."""

    def codegen(context, builder, signature, args):
        places = ir.Constant(ir.VectorType(args[1].type, BLOCK), list(range(BLOCK)))
        return builder.icmp_signed("<", places, _splat(builder, args[1], BLOCK))

    return Vector(types.boolean, BLOCK)(pointer, types.intp), codegen


def _reduction(combine: Any, doc: str) -> Any:
    """A number from the places of a vector: the halves are combined until one place is left."""

    @intrinsic
    def function(typingctx, value):
        def codegen(context, builder, signature, args):
            rest = args[0]
            while rest.type.count > 1:
                half = rest.type.count // 2
                index = ir.VectorType(ir.IntType(32), half)
                low, high = (
                    builder.shuffle_vector(rest, rest, ir.Constant(index, list(range(start, start + half))))
                    for start in (0, half)
                )
                rest = combine(builder, low, high)
            return builder.extract_element(rest, ir.IntType(32)(0))

        return value.dtype(value), codegen

    function.__doc__ = doc
    return function


sum_of = _reduction(lambda builder, x, y: builder.fadd(x, y), "The sum of the places.")
