"""The kernels as targets of XLA's foreign function interface on the CPU, for JAX.

XLA calls a target with the address of a frame, a structure that jaxlib's `xla/ffi/api/c_api.h` describes. It is read as
64-bit words. Targets take matrices, whose last axis is a row and whose other axes are one batch, and vectors with one
number per row; those for sorting and ranking also take the plans of the rows, whose last two axes are a matrix. One
row, or one number, may hold for all rows. An operand that is not given and a result that is not needed have no rows.

XLA calls targets from its own threads, and several at once. The handlers do not acquire Python's lock, keep no state
between calls, and compute the rows one after another.
"""

from __future__ import annotations

import ctypes
import threading

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic, overload

from . import ladders, log_masks, masks
from .cache import callback, declared
from .launch import bound_of
from .operations import EXACT

#: The oldest version of the interface that has all that is read here: jaxlib rejects versions newer than its own.
MAJOR, MINOR = 0, 1
#: The stage in which a target computes.
EXECUTE = 3
#: The extension by which XLA asks for the version of a target.
METADATA = 1
#: The sizes in bytes of a frame (at least), of its lists of operands and results, and of a buffer.
FRAME_SIZE, LIST_SIZE, BUFFER_SIZE = 168, 40, 48

#: How the elements of an array are read. Numba computes with neither float16 nor bfloat16; `rows` converts their bits.
KINDS = (types.boolean, types.float32, types.float64, types.uint16, types.int16)
#: Indices into `KINDS`.
NONE, BOOL, FLOAT32, FLOAT64 = -1, 0, 1, 2
KIND_OF = {"float32": 1, "float64": 2, "float16": 3, "bfloat16": 4}


# --- the frame


def pointer_to(kind):
    """A compiled function that converts an address to a pointer."""

    @intrinsic
    def pointer(typingctx, address):
        signature = types.CPointer(kind)(types.int64)

        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return signature, codegen

    return pointer


POINTERS = [pointer_to(kind) for kind in KINDS]
word_pointer = pointer_to(types.int64)


@njit(**EXACT)
def words(address, n):
    return carray(word_pointer(address), (n,))


@njit(**EXACT)
def is_other_stage(frame):
    """Whether there is nothing to compute. Answers the question for the version."""
    extension = frame[1]
    while extension != 0:
        found = words(extension, 4)
        if (found[1] & 0xFFFFFFFF) == METADATA:
            words(found[3], 4)[3] = MAJOR | (MINOR << 32)
            return True
        extension = found[2]
    return (frame[4] & 0xFFFFFFFF) != EXECUTE


@njit(**EXACT)
def operand(frame, i):
    """The buffer of an operand: size of the structure, extension, dtype, address, rank and address of the shape."""
    return words(words(frame[9], i + 1)[i], 6)


@njit(**EXACT)
def result(frame, i):
    return words(words(frame[14], i + 1)[i], 6)


@njit(**EXACT)
def size_of(buffer, start, stop):
    """The product of the sizes of some axes."""
    shape = words(buffer[5], buffer[4])
    found = 1
    for i in range(start, stop):
        found *= shape[i]
    return found


@declared
def matrix(buffer, kind):
    """The memory of a buffer as rows; None where the kind is `NONE`."""


@overload(matrix, jit_options=EXACT, prefer_literal=True)
def _matrix(buffer, kind):
    if kind.literal_value == NONE:
        return lambda buffer, kind: None
    pointer = POINTERS[kind.literal_value]

    def read(buffer, kind):
        rank = buffer[4]
        return carray(pointer(buffer[3]), (size_of(buffer, 0, rank - 1), size_of(buffer, rank - 1, rank)))

    return read


@declared
def vector(buffer, kind):
    """The same, as one number per row."""


@overload(vector, jit_options=EXACT, prefer_literal=True)
def _vector(buffer, kind):
    pointer = POINTERS[kind.literal_value]
    return lambda buffer, kind: carray(pointer(buffer[3]), (size_of(buffer, 0, buffer[4]),))


@declared
def planes(buffer, kind):
    """The same, as one number per row for each index of the first axis."""


@overload(planes, jit_options=EXACT, prefer_literal=True)
def _planes(buffer, kind):
    pointer = POINTERS[kind.literal_value]
    return lambda buffer, kind: carray(pointer(buffer[3]), (size_of(buffer, 0, 1), size_of(buffer, 1, buffer[4])))


@declared
def matrices(buffer, kind):
    """The same, as one matrix per row of the batch."""


@overload(matrices, jit_options=EXACT, prefer_literal=True)
def _matrices(buffer, kind):
    pointer = POINTERS[kind.literal_value]

    def read(buffer, kind):
        rank = buffer[4]
        shape = size_of(buffer, 0, rank - 2), size_of(buffer, rank - 2, rank - 1), size_of(buffer, rank - 1, rank)
        return carray(pointer(buffer[3]), shape)

    return read


# --- the kernels


def _handlers(dtype, weighted):
    """The handlers of all parts for scores of a dtype."""
    of_mask = masks.mask_rows, masks.push_rows, masks.pull_rows
    of_log = log_masks.log_rows, log_masks.push_log_rows, log_masks.pull_log_rows
    handlers = _solve_handlers(dtype, weighted) | _ladder_handlers(dtype)
    for names, kernels in ((("mask", "push", "pull"), of_mask), (("log_mask", "push_log", "pull_log"), of_log)):
        handlers |= zip(names, _mask_handlers(dtype, weighted, *kernels), strict=True)
    return handlers


def _kinds(dtype, weighted):
    """How the scores, the numbers of each row and the weights are read."""
    number = FLOAT64 if dtype == "float64" else FLOAT32
    return KIND_OF[dtype], number, number if weighted else NONE


def _solve_handlers(dtype, weighted):
    kind, number, weight = _kinds(dtype, weighted)
    bound = bound_of(np.dtype(str(KINDS[number])))

    def solve(address):
        frame = words(address, 15)
        if is_other_stage(frame):
            return 0
        x = matrix(operand(frame, 0), kind)
        ranks = words(operand(frame, 5)[3], 1)[0]  # two numbers of 32 bits
        found = planes(result(frame, 0), number)
        masks.solve_rows(
            x,
            matrix(operand(frame, 3), weight),
            matrix(operand(frame, 4), BOOL),
            vector(operand(frame, 1), number),
            vector(operand(frame, 2), number),
            (ranks & 0xFFFFFFFF, ranks >> 32),
            found,
            planes(result(frame, 1), BOOL),
            bound,
            0,
            found.shape[1],
        )
        return 0

    return {"solve": solve}


def _mask_handlers(dtype, weighted, mask_rows, push_rows, pull_rows):
    """The handlers of the mask, or of its logarithm: forward, for tangents and for cotangents."""
    kind, number, weight = _kinds(dtype, weighted)
    bound = bound_of(np.dtype(str(KINDS[number])))

    def mask(address):
        frame = words(address, 15)
        if is_other_stage(frame):
            return 0
        out = matrix(result(frame, 0), kind)
        mask_rows(
            matrix(operand(frame, 0), kind),
            matrix(operand(frame, 3), weight),
            matrix(operand(frame, 4), BOOL),
            vector(operand(frame, 1), number),
            vector(operand(frame, 2), number),
            out,
            vector(result(frame, 1), number),
            vector(result(frame, 2), number),
            bound,
            0,
            out.shape[0],
        )
        return 0

    def push(address):
        frame = words(address, 15)
        if is_other_stage(frame):
            return 0
        moved = matrix(result(frame, 0), kind)
        push_rows(
            matrix(operand(frame, 0), kind),
            matrix(operand(frame, 3), weight),
            matrix(operand(frame, 4), BOOL),
            vector(operand(frame, 1), number),
            vector(operand(frame, 2), number),
            vector(operand(frame, 5), number),
            vector(operand(frame, 6), number),
            matrix(operand(frame, 7), kind),
            vector(operand(frame, 8), number),
            vector(operand(frame, 9), number),
            matrix(operand(frame, 10), number),
            moved,
            vector(result(frame, 1), number),
            bound,
            0,
            moved.shape[0],
        )
        return 0

    def pull(address):
        frame = words(address, 15)
        if is_other_stage(frame):
            return 0
        offsets = vector(operand(frame, 5), number)
        pull_rows(
            matrix(operand(frame, 0), kind),
            matrix(operand(frame, 3), weight),
            matrix(operand(frame, 4), BOOL),
            vector(operand(frame, 1), number),
            vector(operand(frame, 2), number),
            offsets,
            vector(operand(frame, 6), number),
            matrix(operand(frame, 7), kind),
            vector(operand(frame, 8), number),
            matrix(result(frame, 0), kind),
            vector(result(frame, 1), number),
            vector(result(frame, 2), number),
            matrix(result(frame, 3), number),
            bound,
            0,
            offsets.shape[0],
        )
        return 0

    return mask, push, pull


def _ladder_handlers(dtype):
    number = FLOAT64 if dtype == "float64" else FLOAT32
    bound = bound_of(np.dtype(str(KINDS[number])))

    def ladder(address):
        frame = words(address, 15)
        if is_other_stage(frame):
            return 0
        x, offsets = matrix(operand(frame, 0), number), matrix(result(frame, 3), number)
        ladders.ladder_rows(
            x,
            matrix(operand(frame, 3), BOOL),
            vector(operand(frame, 1), number),
            vector(operand(frame, 2), number),
            matrix(result(frame, 0), number),
            matrices(result(frame, 1), number),
            matrix(result(frame, 2), number),
            offsets,
            matrix(result(frame, 4), number),
            vector(result(frame, 5), BOOL),
            bound,
            0,
            x.shape[0],
        )
        return 0

    def pull_ladder(address):
        frame = words(address, 15)
        if is_other_stage(frame):
            return 0
        x, offsets = matrix(operand(frame, 0), number), matrix(operand(frame, 4), number)
        ladders.pull_ladder_rows(
            x,
            matrix(operand(frame, 3), BOOL),
            vector(operand(frame, 1), number),
            vector(operand(frame, 2), number),
            offsets,
            matrix(operand(frame, 5), number),
            matrix(operand(frame, 6), number),
            matrices(operand(frame, 7), number),
            matrix(operand(frame, 8), number),
            matrix(operand(frame, 9), number),
            matrix(result(frame, 0), number),
            vector(result(frame, 1), number),
            vector(result(frame, 2), BOOL),
            bound,
            0,
            x.shape[0],
        )
        return 0

    return {"ladder": ladder, "pull_ladder": pull_ladder}


def probe(address):
    """2 x in the rows where a boolean is set, and -1 in the others: a test of how frames are read.

    Nothing is computed where the structures have unexpected sizes.
    """
    frame = words(address, 15)
    if is_other_stage(frame):
        return 0
    if frame[0] < FRAME_SIZE or frame[5] != LIST_SIZE or frame[10] != LIST_SIZE or frame[7] != 3 or frame[12] != 1:
        return 0
    for i in range(3):
        if operand(frame, i)[0] != BUFFER_SIZE:
            return 0
    x, kept, nothing = (
        matrix(operand(frame, 0), FLOAT32),
        vector(operand(frame, 1), BOOL),
        matrix(operand(frame, 2), FLOAT32),
    )
    out = matrix(result(frame, 0), FLOAT32)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j] * np.float32(2.0) if kept[i] and nothing.shape[0] == 0 else np.float32(-1.0)
    return 0


# --- what XLA is given

_lock = threading.Lock()
_targets = {}


def name_of(part, dtype, weighted):
    """The name of a target."""
    return f"softk_{part}_{dtype}" + ("_weighted" if weighted else "")


def target(part, dtype, weighted, register):
    """The name of a target. The first call compiles it and registers it by ``register(name, capsule)``."""
    name = "softk_probe" if part == "probe" else name_of(part, dtype, weighted)
    with _lock:
        if name not in _targets:
            function = probe if part == "probe" else _handlers(dtype, weighted)[part]
            compiled = callback(function, types.int64(types.int64), name, dtype)
            register(name, _capsule(compiled.address))
            _targets[name] = compiled  # keeps the code in memory
    return name


def _capsule(address):
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(address, b"xla._CUSTOM_CALL_TARGET", None)
