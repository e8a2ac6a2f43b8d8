"""How the kernels are called: arrays of a framework as NumPy's, in rows, and room for what they find."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from softk._reference.threshold.limits import ROUNDINGS, coldest, limits, negligible, small_step, widest_gap

from . import ladders, masks
from .pool import in_parallel

Inputs = tuple[Any, ...]

_NOTHING = np.empty((0, 0), np.bool_)
#: The bits of the two dtypes that Numba does not compute with; `rows` tells them apart by these.
_BITS = {"float16": np.uint16, "bfloat16": np.int16}


class Bound(NamedTuple):
    """What the kernels know of the dtype that they compute in."""

    eps: float
    smallest: float  # the smallest normal number
    log_farthest: float
    tolerance: float  # a step that is smaller is the last but one
    unit: float  # a mass is rounded by so much of it
    largest: float
    farthest: float
    saturated: float
    widest_gap: float
    coldest: float  # only between these temperatures z is computed in the dtype: 1 / tau and tau z are normal numbers
    hottest: float
    log_negligible: float
    negligible: float


@cache
def bound_of(dtype: Any) -> Bound:
    """The limits of a dtype, most of them those of the reference."""
    bound, info = limits(np, dtype), np.finfo(dtype)
    least = negligible(np, dtype)
    return Bound(
        eps=bound.eps,
        smallest=float(info.smallest_normal),
        log_farthest=math.log(bound.farthest),
        tolerance=small_step(bound),
        unit=ROUNDINGS * bound.eps,
        largest=bound.largest,
        farthest=bound.farthest,
        saturated=bound.saturated,
        widest_gap=widest_gap(bound),
        coldest=coldest(bound),
        hottest=1.0 / coldest(bound),
        log_negligible=math.log(least),
        negligible=least,
    )


# --- a framework's arrays as NumPy's


def _is_numpy(raw: Any) -> bool:
    """Whether this is NumPy's. Its arithmetic on arrays without axes gives scalars."""
    return isinstance(raw, (np.ndarray, np.generic))


def numpy_of(raw: Any) -> np.ndarray[Any, Any]:
    """The memory of an array on the host as NumPy's, without a copy; the bits of float16 and bfloat16 as integers."""
    if _is_numpy(raw):
        values = np.asarray(raw)
        return values.view(np.uint16) if values.dtype == np.float16 else values
    if raw.requires_grad:
        raw = raw.detach()
    if raw.element_size() == 2:
        import torch

        raw = raw.view(torch.int16).numpy().view(_BITS[str(raw.dtype).removeprefix("torch.")])
    else:
        raw = raw.numpy()
    found: np.ndarray[Any, Any] = raw
    return found


def empty(like: Any, shape: tuple[int, ...], dtype: Any = None) -> Any:
    """A new array of the same framework, and of the same dtype unless another one is given."""
    if _is_numpy(like):
        return np.empty(shape, dtype or like.dtype)
    return like.new_empty(shape, dtype=dtype)


def rows_of(values: Any, n: int) -> np.ndarray[Any, Any]:
    """An array (..., n) as a matrix: of one row where all are the same memory, and a view where strides allow one."""
    raw = numpy_of(values)
    if raw.ndim == 2 and raw.flags.carray:  # most are
        return raw
    if raw.ndim > 1 and not any(raw.strides[i] for i in range(raw.ndim - 1) if raw.shape[i] > 1):
        raw = raw[(0,) * (raw.ndim - 1)]
    return _writeable(raw.reshape(-1, n))


def contiguous_rows_of(values: Any, n: int) -> np.ndarray[Any, Any]:
    """The same, as a contiguous one."""
    return np.ascontiguousarray(rows_of(values, n))


def numbers_of(values: Any) -> np.ndarray[Any, Any]:
    """An array of one number per slice, or of one for all of them, as a vector."""
    return _writeable(np.ascontiguousarray(numpy_of(values).reshape(-1)))


def _writeable(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same memory, as an array that may be written to: Numba compiles again for one that may not. Nobody writes."""
    if values.flags.writeable:
        return values
    return np.asarray(_Alias(values))


class _Alias:
    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self.values = values
        interface = dict(values.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


# --- the parts of a primitive


class Problem:
    """The inputs of a primitive, as the kernels take them."""

    def __init__(self, inputs: Inputs) -> None:
        x, k, tau, weights, where = inputs[:5]
        self.given, self.n = x, x.shape[-1]
        self.x = rows_of(x, self.n)
        self.rows = math.prod(x.shape[:-1])
        self.k, self.tau, self.like = numbers_of(k), numbers_of(tau), k
        self.dtype = self.k.dtype
        # The kernels read weights in place, and so in the dtype that is computed in.
        self.weights = None if weights is None else contiguous_rows_of(weights, self.n).astype(self.dtype, copy=False)
        self.where = _NOTHING if where is None else contiguous_rows_of(where, self.n)
        self.arguments = (self.x, self.weights, self.where, self.k, self.tau)
        self.bound = bound_of(self.dtype)

    def per_item(self, like: Any) -> tuple[Any, np.ndarray[Any, Any]]:
        """Room for a result of the scores' shape, and the same as rows."""
        found = empty(like, self.given.shape)
        return found, numpy_of(found).reshape(self.rows, self.n)

    def per_row(self, *count: int, dtype: Any = None) -> tuple[Any, np.ndarray[Any, Any]]:
        """Room for a result of one number per slice, or for some of them."""
        found = empty(self.like, (*count, *self.given.shape[:-1], 1), dtype)
        return found, numpy_of(found).reshape(*count, self.rows)

    def run(self, kernel: Any, *arguments: Any) -> None:
        in_parallel(kernel, (*self.arguments, *arguments, self.bound), self.rows, self.n, self.given)


def solved(kernel: Any, inputs: Inputs) -> tuple[Any, ...]:
    """A result of the shape of the scores, the offset and the reference."""
    problem = Problem(inputs)
    found, rows = problem.per_item(problem.given)
    offset, offsets = problem.per_row()
    reference, references = problem.per_row()
    problem.run(kernel, rows, offsets, references)
    return found, offset, reference


def placed(kernel: Any, inputs: Inputs) -> tuple[Any, ...]:
    """A result of the shape of the scores at thresholds that are known."""
    x, k, tau, offset, reference = inputs
    problem = Problem((x, k, tau, None, None))
    found, rows = problem.per_item(problem.given)
    problem.run(kernel, numbers_of(offset), numbers_of(reference), rows)
    return (found,)


def settled(inputs: Inputs, ranks: tuple[int, ...] | None) -> tuple[Any, ...]:
    """What the solver settles to."""
    problem = Problem(inputs)
    numbers, number_rows = problem.per_row(4)
    flags, flag_rows = problem.per_row(4, dtype=np.bool_ if _is_numpy(problem.like) else _torch_bool())
    problem.run(masks.solve_rows, (0, 0) if ranks is None else (ranks[0], ranks[1]), number_rows, flag_rows)
    return *(numbers[i] for i in range(4)), *(flags[i] for i in range(4))


def _torch_bool() -> Any:
    import torch

    return torch.bool


def pulled(
    kernel: Any, inputs: Inputs, outputs: Inputs, cotangents: Inputs, needed: tuple[bool, ...], *, per_item: bool
) -> tuple[Any, ...]:
    """The cotangents of the inputs that are needed, from those of the result and the offset."""
    problem = Problem(inputs)
    n, dtype = problem.n, problem.dtype
    _, offset, reference = outputs
    u, c = cotangents
    none, unused = np.empty(0, dtype), np.empty((0, n), dtype)
    of_x, of_k, of_tau, of_weights = needed[:4]
    x, x_rows = problem.per_item(problem.given) if of_x else (None, np.empty((0, n), problem.x.dtype))
    k, k_rows = problem.per_row() if of_k else (None, none)
    tau, tau_rows = problem.per_row() if of_tau else (None, none)
    has_weights = of_weights and problem.weights is not None
    weights, weights_rows = problem.per_item(problem.like) if has_weights else (None, unused)
    if per_item:
        u_rows = np.zeros((1, n), problem.x.dtype) if u is None else contiguous_rows_of(u, n)
    else:
        u_rows = none if u is None else numbers_of(u)
    problem.run(
        kernel,
        numbers_of(offset),
        numbers_of(reference),
        u_rows,
        none if c is None else numbers_of(c),
        x_rows,
        k_rows,
        tau_rows,
        weights_rows,
    )
    return x, k, tau, weights, *(None for _ in inputs[4:])


def pushed(kernel: Any, inputs: Inputs, outputs: Inputs, tangents: Inputs, *, per_item: bool) -> tuple[Any, ...]:
    """The tangents of the result and the offset."""
    problem = Problem(inputs)
    n, dtype = problem.n, problem.dtype
    _, offset, reference = outputs
    dx, dk, dtau, da = tangents[:4]
    none = np.empty(0, dtype)
    found, rows = problem.per_item(problem.given) if per_item else problem.per_row()
    doffset, doffsets = problem.per_row()
    problem.run(
        kernel,
        numbers_of(offset),
        numbers_of(reference),
        np.empty((0, n), problem.x.dtype) if dx is None else contiguous_rows_of(dx, n),
        none if dk is None else numbers_of(dk),
        none if dtau is None else numbers_of(dtau),
        np.empty((0, n), dtype) if da is None else contiguous_rows_of(da, n),
        rows,
        doffsets,
    )
    return found, doffset


# --- sorting and ranking


class Ladder:
    """The inputs of a primitive for sorting or ranking, as the kernels take them."""

    def __init__(self, inputs: Inputs, rows: int) -> None:
        x, tau, unit, where, _ = inputs
        self.given, self.n, self.b = x, x.shape[-1], rows
        self.x, self.batch = rows_of(x, self.n), tuple(x.shape[:-1])
        self.x = np.ascontiguousarray(self.x)
        self.rows = math.prod(self.batch)
        self.tau, self.unit = numbers_of(tau), numbers_of(unit)
        self.where = _NOTHING if where is None else contiguous_rows_of(where, self.n)
        self.bound = bound_of(self.x.dtype)
        self.left = np.zeros(self.rows, np.bool_)

    def room(self, *shape: int) -> tuple[Any, np.ndarray[Any, Any]]:
        """Room for a result of that shape per slice, and the same with one leading axis."""
        found = empty(self.given, (*self.batch, *shape))
        return found, numpy_of(found).reshape(self.rows, *shape)

    def those_left(self, given: Inputs) -> Inputs:
        """The slices that are left to the reference, of inputs with or without the batch axes."""
        return tuple(self._left_of(value) for value in given)

    def _left_of(self, value: Any) -> Any:
        if value is None or not value.ndim:
            return value
        rest = tuple(value.shape[len(self.batch) :])
        return value.reshape(self.rows, *rest)[self.left.nonzero()[0]]

    def fill(self, found: Inputs, those: Inputs) -> None:
        """Write what the reference has found into the results."""
        for value, part in zip(found, those, strict=True):
            if value is not None:
                rows = numpy_of(value)
                rows.reshape(self.rows, *rows.shape[len(self.batch) :])[self.left] = numpy_of(part)

    def run(self, kernel: Any, *arguments: Any) -> None:
        in_parallel(
            kernel,
            (self.x, self.where, self.tau, self.unit, *arguments, self.left, self.bound),
            self.rows,
            self.n + 64 * self.b,
            self.given,
        )


def climbed(primitive: Any, backend: Any, inputs: Inputs, rows: int, **options: Any) -> tuple[Any, ...]:
    """The outputs of a primitive for sorting or ranking.

    They are the values, the assignment if it is a result, or the ranks, and then the state.
    """
    ladder = Ladder(inputs, rows)
    n, is_rank = ladder.n, "rank" in primitive.results
    none = np.empty((0, 0), ladder.x.dtype)
    found: tuple[Any, ...]
    offset, offsets = ladder.room(rows, 1)
    reference, references = ladder.room(rows, 1)
    state = offsets[:, :, 0], references[:, :, 0]
    if is_rank:
        ranks, rank_rows = ladder.room(n)
        ladder.run(ladders.ladder_rows, none, none[:, :, None], rank_rows, *state)
        found = ranks, offset, reference
    else:
        values, value_rows = ladder.room(rows)
        assignment, assignment_rows = None, none[:, :, None]
        if "assignment" in primitive.results:
            assignment, assignment_rows = ladder.room(rows, n)
        ladder.run(ladders.ladder_rows, value_rows, assignment_rows, none, *state)
        found = (values, *(() if assignment is None else (assignment,)), offset, reference)
    if ladder.left.any():
        ladder.fill(found, primitive.forward(backend, ladder.those_left(inputs), rows=rows, ranks=None))
    return found


def pulled_from_ladder(
    primitive: Any, backend: Any, inputs: Inputs, outputs: Inputs, cotangents: Inputs, needed: tuple[bool, ...]
) -> tuple[Any, ...]:
    """The cotangents of the scores and of the temperature."""
    offset, reference = outputs[-2:]
    ladder = Ladder(inputs, offset.shape[-2])
    n, b = ladder.n, ladder.b
    given = dict(zip((*primitive.results, *primitive.state), cotangents, strict=True))
    vbar, ubar, rbar, c = (given.get(name) for name in ("values", "assignment", "rank", "offset"))
    dtype = ladder.x.dtype
    xbar, x_rows = ladder.room(n)
    taubar, tau_rows = ladder.room(1)
    state = (np.ascontiguousarray(rows_of(value, 1).reshape(-1, b)) for value in (offset, reference))
    ladder.run(
        ladders.pull_ladder_rows,
        *state,
        np.empty((0, b), dtype) if vbar is None else _whole(vbar, ladder.rows, b),
        np.empty((0, b, n), dtype) if ubar is None else _whole(ubar, ladder.rows, b, n),
        np.empty((0, n), dtype) if rbar is None else _whole(rbar, ladder.rows, n),
        np.empty((0, b), dtype) if c is None else _whole(c, ladder.rows, b),
        x_rows,
        tau_rows[:, 0],
    )
    tau = inputs[1]
    if ladder.left.any():
        inputs = (inputs[0], tau if tau.ndim else backend.xp.broadcast_to(tau, taubar.shape), *inputs[2:])
        those = (ladder.those_left(group) for group in (inputs, (*(None for _ in outputs[:-2]), offset, reference)))
        found = primitive.vjp(backend, *those, ladder.those_left(cotangents), needed)
        ladder.fill((xbar, taubar), found[:2])
    return xbar, taubar if tau.ndim else backend.xp.sum(taubar), None, None, None


def _whole(values: Any, *shape: int) -> np.ndarray[Any, Any]:
    """An array without gaps and of that shape."""
    return _writeable(np.ascontiguousarray(numpy_of(values)).reshape(shape))
