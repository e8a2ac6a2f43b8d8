"""Conversion of arguments to the canonical form that primitives take, and of their results back to the user's form.

In canonical form the selected axis is last, the dtype is float32 or float64, k and epsilon have the shape (..., 1) or
(), weights and where have the shape of the scores, and the scores are negated if the smallest are selected.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from softk._reference.threshold.limits import ROUNDINGS, counted
from softk.backend import Array, Backend, backend_of, broadcast_like, index_dtype, unknown

from .call import Argument
from .checks import (
    check_axes,
    check_axis,
    is_number,
    kind_of,
    require_array,
    require_equal_sizes,
    require_size,
    working_dtype,
)
from .shapes import cast, fits, move_axis, shrink


class Slices:
    """The scores and the axis that slices them, against which the other arguments are checked and converted."""

    def __init__(
        self, x: Any, axis: Any, *, called: str = "x", smallest: bool = False, joint: bool = False, **others: Any
    ) -> None:
        """`joint` allows several axes, whose scores form one slice in the order of the axes."""
        require_array(called, x)
        arrays = {}
        for name, value in others.items():
            # where and weights have one value per item, so they cannot be numbers, but may be absent. Those of a tree
            # are named by their paths, such as weights['bias'].
            per_item = re.split(r"[\[.]", name)[0] in ("where", "weights")
            if (value is None and per_item) or (is_number(value) and not per_item):
                continue
            require_array(name, value, or_number=not per_item)
            arrays[name] = value
        self.backend = backend = common_backend(called, x, arrays)
        self.xp = xp = backend.xp
        if not xp.isdtype(x.dtype, "real floating") or xp.finfo(x.dtype).bits > 64:
            is_complex = xp.isdtype(x.dtype, "complex floating")
            advice = "" if is_complex else f"; convert it: {backend.words.cast.format(called)}"
            raise TypeError(f"{called} must have a real floating-point dtype of at most 64 bits, got {x.dtype}{advice}")
        if x.ndim == 0:
            raise ValueError(f"{called} must have at least one axis, got an array of shape ()")
        self.called, self.shape, self.ndim, self.device = called, tuple(x.shape), x.ndim, backend.device(x)
        self.axes = check_axes(axis, x.ndim, called) if joint else (check_axis(axis, x.ndim, called),)
        for one in self.axes if len(self.axes) == 1 else range(x.ndim):  # several axes are reshaped to one
            require_size(called, x, one)
        beside = {name: value for name, value in arrays.items() if value.ndim}
        if beside:
            require_equal_sizes({called: x, **beside})
        self.n = self.shape[self.axis] if len(self.axes) == 1 else math.prod([self.shape[one] for one in self.axes])
        self.batch = tuple(size for one, size in enumerate(self.shape) if one not in self.axes)
        self.dtype = x.dtype
        self.working = working_dtype(xp, x.dtype)
        self.sign = -1.0 if smallest else 1.0
        # What is kept of a call must not keep the scores alive; their sizes may be known to nothing else, though.
        self.like = x if any(unknown(size) for size in self.shape) else None

    @property
    def axis(self) -> int:
        """The selected axis, or the first of them."""
        return self.axes[0]

    @property
    def per_slice_shape(self) -> tuple[Any, ...]:
        """The shape of the scores with size 1 along the selected axes."""
        return tuple(1 if one in self.axes else size for one, size in enumerate(self.shape))

    def require_sizes(self) -> None:
        """Require known sizes. Dask's unknown sizes, NaN, are allowed, because Dask computes block by block."""
        for axis, size in enumerate(self.shape):
            if size is None:
                require_size(self.called, self.like, axis)

    # -- conversions

    def _repeat(self, values: Array, shape: tuple[Any, ...]) -> Array:
        """Broadcast to a shape of the batch axes, with further axes of the values before or after them."""
        if not any(unknown(size) for size in shape):
            return self.xp.broadcast_to(values, shape)
        return broadcast_like(self.xp, values, shape, self._last(self.like)[..., :1])

    def _last(self, values: Array) -> Array:
        """The selected axis moved to the end, or several of them made one at the end."""
        count = len(self.axes)
        ends = tuple(range(-count, 0))
        if self.axes != tuple(range(self.ndim - count, self.ndim)):
            values = move_axis(self.xp, values, self.axes, ends)
        if count == 1:
            return values
        shape = tuple(values.shape)
        return self.xp.reshape(values, (*shape[:-count], math.prod(shape[-count:])))

    def _back(self, values: Array) -> Array:
        """The inverse of `_last`, for values of one per item or one per slice."""
        count = len(self.axes)
        ends = tuple(range(-count, 0))
        if count > 1:
            sizes = [self.shape[one] if values.shape[-1] == self.n else 1 for one in self.axes]
            values = self.xp.reshape(values, (*values.shape[:-1], *sizes))
        if self.axes == tuple(range(self.ndim - count, self.ndim)):
            return values
        return move_axis(self.xp, values, ends, self.axes)

    def _cast(self, values: Array, dtype: Any) -> Array:
        return cast(self.xp, values, dtype)

    def _stretch(self, name: str, values: Array) -> Array:
        """Broadcast an array of one value per item to the shape of the scores."""
        if tuple(values.shape) == self.shape:
            return values
        if not fits(tuple(values.shape), self.shape):
            raise ValueError(
                f"{name} must broadcast to the shape of {self.called}, {self.shape}, got shape {tuple(values.shape)}"
            )
        return broadcast_like(self.xp, values, self.shape, self.like)

    def scores(self, *, narrow: bool = False, leading: tuple[int, ...] = ()) -> Argument:
        """x, without a value until the call is evaluated.

        `narrow` keeps its dtype, for a primitive that converts it to the working dtype itself. `leading` are axes that
        are put in front, along which it is repeated.
        """

        def push(values: Array) -> Array:
            values = self._last(self._cast(values, self.dtype if narrow else self.working))
            values = values if self.sign > 0.0 else -values
            return self.xp.broadcast_to(values, (*leading, *values.shape)) if leading else values

        def pull(cotangent: Array) -> Array:
            if leading:
                cotangent = self.xp.sum(cotangent, axis=tuple(range(len(leading))))
            if self.sign < 0.0:
                cotangent = -cotangent
            return self._cast(self._back(cotangent), self.dtype)

        return Argument(None, None, push, pull)

    def per_slice(self, name: str, value: Any, scale: float = 1.0, dtype: Any = None) -> Argument:
        """k or epsilon: a number, or an array that broadcasts against x with size 1 along axis."""
        xp = self.xp
        if is_number(value):
            # A symbol of a trace stays a symbol, because float() would make the trace depend on its value.
            number = scale * (value if self.backend.memory(value) is None else float(value))
            return Argument(xp.full((), number, dtype=self.working, device=self.device), value)
        shape, target = tuple(value.shape), (*self.batch, 1)
        aligned = (1,) * (self.ndim - len(shape)) + shape
        if not fits(shape, self.per_slice_shape):
            raise ValueError(
                f"{name} must be a number or an array that broadcasts to one value per slice, shape "
                f"{self.per_slice_shape}, "
                f"got shape {shape}{self._with_axis(name, shape)}"
            )
        if not xp.isdtype(value.dtype, ("real floating", "integral")):
            raise TypeError(f"{name} must be real, got dtype {value.dtype}")

        def push(values: Array) -> Array:
            values = self._cast(values, dtype or self.working)
            if len(shape) < self.ndim:
                values = xp.reshape(values, aligned)
            values = self._last(values)
            if scale != 1.0:
                values = scale * values
            return self._repeat(values, target)

        def pull(cotangent: Array) -> Array:
            cotangent = self._back(self._repeat(cotangent, target))
            return self._cast(scale * shrink(xp, cotangent, shape), value.dtype)

        return Argument(push(value), value, *self._linear(value, push, pull))

    def mass(self, k: Any, weights: Any = None, n: int | None = None) -> Argument:
        """k. Without weights, a value that misses 0 or n by its rounding becomes that end and keeps its derivative."""
        argument = self.per_slice("k", k)
        if weights is not None or is_number(k):
            return argument
        return self._counted(argument, self.n if n is None else n)

    def whole_mass(self, k: Any) -> dict[str, Argument]:
        """An integer k as an extra input, if n exceeds the integers that the working dtype represents exactly."""
        xp, n = self.xp, self.n
        if is_number(k) or not isinstance(n, int) or n <= 2.0 / float(xp.finfo(self.working).eps):
            return {}
        if not xp.isdtype(k.dtype, "integral"):
            return {}
        return {"count": self.per_slice("k", k, dtype=index_dtype(xp))}

    def _counted(self, argument: Argument, n: int) -> Argument:
        value: Any = argument.value
        return replace(argument, value=value + self.backend.constant(counted(self.xp, value, n)))

    def rounding_of(self, weights: Any) -> float | None:
        """The machine epsilon of weights in a narrower dtype than the working dtype; None for other weights."""
        xp = self.xp
        if weights is None or not xp.isdtype(weights.dtype, "real floating"):
            return None
        eps = float(xp.finfo(weights.dtype).eps)
        return eps if eps > float(xp.finfo(self.working).eps) else None

    def mass_of_all(self, mass: Argument, x: Array, weights: Argument, where: Argument) -> Argument:
        """Set k to the sum of narrower weights if it misses it only by their rounding, with the same derivative."""
        eps, xp, value = self.rounding_of(weights.given), self.xp, weights.value
        if eps is None or value is None:
            return mass
        scores = self._last(self._cast(x, self.working))
        scores = scores if self.sign > 0.0 else -scores
        able = scores > -math.inf if where.value is None else where.value & (scores > -math.inf)
        total = xp.sum(xp.where(able, value, 0.0), axis=-1, keepdims=True)
        short = total - mass.value
        # The user may have summed in another order, so k may exceed the sum by a rounding per item.
        near = (short <= ROUNDINGS * eps * total) & (-short <= (ROUNDINGS + self.n) * eps * total)
        return replace(mass, value=mass.value + self.backend.constant(xp.where(near, short, 0.0)))

    def summed_to_one(self, weights: Argument) -> Argument:
        """Normalize narrower weights to a sum of 1 in the working dtype, if only their rounding keeps them from it."""
        eps, xp, value = self.rounding_of(weights.given), self.xp, weights.value
        if eps is None or value is None:
            return weights
        total = xp.sum(value, axis=-1, keepdims=True)
        near = xp.abs(total - 1.0) <= self.n * eps
        return replace(weights, value=value / self.backend.constant(xp.where(near, total, 1.0)))

    def _with_axis(self, name: str, shape: tuple[int, ...]) -> str:
        """The hint of an error message for an array that lacks only the selected axis; else an empty string."""
        after = self.ndim - 1 - self.axis
        if len(self.axes) > 1 or len(shape) < after or not fits(shape, self.batch):
            return ""
        before = len(shape) - after
        index = [*[":"] * before, "None", *[":"] * after]
        return f"; write {name}[{', '.join(index)}]"

    def per_item(self, name: str, value: Any) -> Argument:
        """weights: an array that broadcasts to the scores."""
        xp = self.xp
        if value is None:
            return Argument(None)
        shape = tuple(value.shape)
        if not xp.isdtype(value.dtype, ("real floating", "integral")):
            raise TypeError(f"{name} must be real, got dtype {value.dtype}")

        def push(values: Array) -> Array:
            return self._last(self._stretch(name, self._cast(values, self.working)))

        def pull(cotangent: Array) -> Array:
            return self._cast(shrink(xp, self._back(cotangent), shape), value.dtype)

        return Argument(push(value), value, *self._linear(value, push, pull))

    def kept(self, where: Any) -> Argument:
        """where: a boolean array that broadcasts to the scores."""
        if where is None:
            return Argument(None)
        if not self.xp.isdtype(where.dtype, "bool"):
            raise TypeError(f"where must be a boolean array, got dtype {where.dtype}")
        return Argument(self._last(self._stretch("where", where)), where)

    def probabilities(self, q: Any) -> Probabilities:
        """q: a number, or an array whose axes become the first axes of the result."""
        xp = self.xp
        if is_number(q):
            return Probabilities(self.per_slice("q", q), ())
        if not xp.isdtype(q.dtype, ("real floating", "integral")):
            raise TypeError(f"q must be real, got dtype {q.dtype}")
        shape = tuple(q.shape)
        padded, full = (*shape, *(1,) * (len(self.batch) + 1)), (*shape, *self.batch, 1)

        def push(values: Array) -> Array:
            return self._repeat(xp.reshape(self._cast(values, self.working), padded), full)

        def pull(cotangent: Array) -> Array:
            return self._cast(xp.reshape(shrink(xp, cotangent, padded), shape), q.dtype)

        return Probabilities(self._counted(Argument(push(q), q, *self._linear(q, push, pull)), 1), shape)

    def per_anchor(self, name: str, value: Array, anchors: int | None = None) -> Argument:
        """anchors or marginals: one value per anchor along the last axis, for all slices or for each."""
        xp, shape = self.xp, tuple(value.shape)
        if not xp.isdtype(value.dtype, ("real floating", "integral")):
            raise TypeError(f"{name} must be real, got dtype {value.dtype}")
        if not shape or shape[-1] < 2 or (anchors is not None and shape[-1] != anchors):
            wanted = "at least 2 values" if anchors is None else f"{anchors} values, one per anchor,"
            raise ValueError(f"{name} must have {wanted} along its last axis, got shape {shape}")
        if not fits(shape[:-1], self.batch):
            raise ValueError(
                f"{name} must have the shape {shape[-1:]}, or one that broadcasts to {(*self.batch, shape[-1])}, "
                f"got {shape}"
            )

        def push(values: Array) -> Array:
            return self._repeat(self._cast(values, self.working), (*self.batch, shape[-1]))

        def pull(cotangent: Array) -> Array:
            return self._cast(shrink(xp, cotangent, shape), value.dtype)

        return Argument(push(value), value, *self._linear(value, push, pull))

    def _linear(self, value: Array, push: Any, pull: Any) -> tuple[Any, Any]:
        return (push, pull) if self.xp.isdtype(value.dtype, "real floating") else (None, None)

    # -- results

    def like_scores(self, *, narrow: bool = False) -> Argument:
        """A result of the shape of the scores. `narrow` is for a primitive that converts the dtype itself."""

        def push(values: Array) -> Array:
            return self._cast(self._back(values), self.dtype)

        def pull(cotangent: Array) -> Array:
            return self._last(self._cast(cotangent, self.dtype if narrow else self.working))

        return Argument(None, None, push, pull)

    def one_per_slice(self, keepdims: bool, leading: int = 0, *, in_units: bool = True) -> Argument:
        """A result of one value per slice, with `leading` extra axes in front.

        `in_units` says whether it is in the units of the scores. If so, it is negated where the scores are.
        """
        xp, several = self.xp, len(self.axes) > 1
        axis = leading + self.axis
        negative = in_units and self.sign < 0.0

        def push(values: Array) -> Array:
            values = self._cast(-values if negative else values, self.dtype)
            if keepdims and several:
                return xp.reshape(values, (*values.shape[:leading], *self.per_slice_shape))
            return move_axis(xp, values, -1, axis) if keepdims else xp.squeeze(values, axis=-1)

        def pull(cotangent: Any) -> Array:
            if is_number(cotangent):  # of a result without axes
                cotangent = xp.full((), cotangent, dtype=self.working, device=self.device)
            cotangent = self._cast(cotangent, self.working)
            if keepdims and several:
                cotangent = xp.reshape(cotangent, (*cotangent.shape[:leading], *self.batch, 1))
            else:
                cotangent = move_axis(xp, cotangent, axis, -1) if keepdims else xp.expand_dims(cotangent, axis=-1)
            return -cotangent if negative else cotangent

        return Argument(None, None, push, pull)

    def diagnostic(self, dtype: Any) -> Argument:
        """A result of one value per slice without a derivative. Its sign does not depend on that of the scores."""
        return Argument(None, None, lambda values: self._cast(self.xp.squeeze(values, axis=-1), dtype))

    def one_per_row(self, *, in_units: bool = True) -> Argument:
        """A result of one value per row (..., m), in place of the selected axis. `in_units` as for `one_per_slice`."""
        negative = in_units and self.sign < 0.0

        def push(values: Array) -> Array:
            return self._cast(self._back(-values if negative else values), self.dtype)

        def pull(cotangent: Array) -> Array:
            cotangent = self._last(self._cast(cotangent, self.working))
            return -cotangent if negative else cotangent

        return Argument(None, None, push, pull)

    def index_per_row(self) -> Argument:
        """A result of one index a row (..., m), in the place of the selected axis, without a derivative."""
        return Argument(None, None, self._back)

    def row_by_item(self) -> Argument:
        """A result of one value per row and item (..., m, n). The two axes replace the selected axis."""
        xp, target = self.xp, (self.axis, self.axis + 1)

        def push(values: Array) -> Array:
            return self._cast(move_axis(xp, values, (-2, -1), target), self.dtype)

        def pull(cotangent: Array) -> Array:
            return move_axis(xp, self._cast(cotangent, self.working), target, (-2, -1))

        return Argument(None, None, push, pull)

    def item_by_row(self) -> Argument:
        """A result of one value per item and row. The items replace the selected axis, and the rows come last."""
        xp = self.xp

        def push(values: Array) -> Array:
            return self._cast(move_axis(xp, values, -1, self.axis), self.dtype)

        def pull(cotangent: Array) -> Array:
            return move_axis(xp, self._cast(cotangent, self.working), self.axis, -1)

        return Argument(None, None, push, pull)


@dataclass(frozen=True)
class Probabilities:
    """The canonical q, and the axes that it adds in front of the axes of the result."""

    argument: Argument
    leading: tuple[int, ...]


def common_backend(first: str, x: Array, others: dict[str, Array]) -> Backend:
    """The backend that serves all array arguments. They must be of one library and on one device."""
    backend = backend_of(x)
    for value in others.values():
        other = backend_of(value)
        if other.wraps == backend.name:  # a boxed array among plain ones: the framework that boxes serves both
            backend = other
    for name, value in others.items():
        other = backend_of(value)
        if other is not backend and backend.wraps != other.name:
            # Never the way that drops a gradient: to a library without autodiff.
            keeps = backend.autodiff != Backend.autodiff or other.autodiff == Backend.autodiff
            code = backend.words.own.format(name) if keeps else other.words.own.format(first)
            raise TypeError(
                f"{name} must be an array of the same library as {first}: got {kind_of(value)} beside {kind_of(x)}; "
                f"convert one, for example {code}"
            )
        if backend.device(x) != backend.device(value):
            raise TypeError(
                f"{name} must be on the device of {first}: got {backend.device(value)} beside {backend.device(x)}; "
                f"move one, for example {backend.words.move.format(name, first)}"
            )
    return backend


def static_ranks(backend: Backend, k: Any, bits: int) -> tuple[int, int] | None:
    """ceil(k) and floor(k) + 1 of a Python number, rounded to the working dtype; None for arrays and symbols."""
    if not is_number(k) or backend.memory(k) is None:
        return None
    rounded = as_float32(k) if bits <= 32 else float(k)
    return math.ceil(rounded), math.floor(rounded) + 1


def as_float32(k: float) -> float:
    """k rounded to float32, by operations that every version of ``torch.compile`` traces, and without NumPy."""
    _, exponent = math.frexp(k)
    unit = 2.0 ** (max(exponent, -125) - 24)  # the distance of the numbers of float32 around k
    return round(k / unit) * unit


def require_scores(slices: Slices) -> None:
    if slices.n == 0:
        raise ValueError(
            f"{slices.called} must have at least one score along axis, got shape {slices.shape}, "
            f"axis {slices.axis if len(slices.axes) == 1 else slices.axes}"
        )
