"""The HIPS autograd backend: every primitive becomes an `autograd.extend.primitive` with both derivative rules."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd.builtins import tuple as boxed_tuple
from autograd.extend import defjvp, defjvp_argnums, defvjp, defvjp_argnums
from autograd.extend import primitive as traced
from autograd.tracer import isbox

from softk.backend import Array, Backend, Primitive
from softk_numpy import NumpyBackend
from softk_numpy import backend as numpy_backend

__all__ = ["AutogradBackend", "backend"]


#: Functions of the standard that autograd.numpy has under an older name.
_RENAMED = {"concat": "concatenate", "cumulative_sum": "cumsum", "permute_dims": "transpose"}


class _Namespace:
    """autograd.numpy, with the few functions of the standard that it lacks or cannot differentiate."""

    __name__ = "autograd.numpy"
    isdtype = staticmethod(np.isdtype)
    __array_namespace_info__ = staticmethod(np.__array_namespace_info__)
    finfo = staticmethod(np.finfo)

    def __getattr__(self, name: str) -> Any:
        return getattr(anp, _RENAMED.get(name, name))

    @staticmethod
    def astype(x: Array, dtype: Any) -> Array:
        return x.astype(dtype)

    @staticmethod
    def broadcast_to(x: Array, shape: tuple[int, ...]) -> Array:
        return anp.broadcast_to(anp.reshape(x, (1,) * (len(shape) - x.ndim) + tuple(x.shape)), shape)

    @staticmethod
    def flip(x: Array, *, axis: int) -> Array:
        return x[(..., slice(None, None, -1), *(slice(None),) * (-axis - 1))]

    @staticmethod
    def matrix_transpose(x: Array) -> Array:
        return anp.swapaxes(x, -1, -2)

    @staticmethod
    def argsort(x: Array, **options: Any) -> Array:
        return numpy_backend.xp.argsort(_value(x), **options)

    @staticmethod
    def take(x: Array, index: Array, *, axis: int) -> Array:
        return x[(*(slice(None),) * axis, index)]

    @staticmethod
    def take_along_axis(x: Array, index: Array, *, axis: int) -> Array:
        return _take(x, _value(index), axis)

    @staticmethod
    def where(condition: Array, x: Any, y: Any) -> Array:
        """``where`` after an explicit broadcast, because autograd's own rule ignores that an argument was broadcast."""
        shape = np.broadcast_shapes(*(np.shape(_value(value)) for value in (condition, x, y)))
        x, y = (value if np.shape(_value(value)) in ((), shape) else anp.broadcast_to(value, shape) for value in (x, y))
        return anp.where(condition, x, y)

    @staticmethod
    def full(shape: Any, value: float, *, dtype: Any, device: Any) -> Array:
        return np.full(shape, value, dtype=dtype)


def _value(x: Array) -> Array:
    # Nested differentiation puts boxes into boxes.
    while isbox(x):
        x = x._value
    return x


@traced
def _put(values: Array, index: Array, axis: int, size: int) -> Array:
    """Zeros with the values at indices along an axis."""
    shape = list(values.shape)
    shape[axis] = size
    found = np.zeros(shape, values.dtype)
    np.put_along_axis(found, index, values, axis)
    return found


#: The indices that the rules take along an axis differ, so each of the two is the other's transpose.
_take = traced(np.take_along_axis)
defvjp(_take, lambda ans, x, index, axis: lambda g: _put(g, index, axis, x.shape[axis]), argnums=(0,))
defjvp(_take, lambda g, ans, x, index, axis: _take(g, index, axis), argnums=(0,))
defvjp(_put, lambda ans, values, index, axis, size: lambda g: _take(g, index, axis), argnums=(0,))
defjvp(_put, lambda g, ans, values, index, axis, size: _put(g, index, axis, size), argnums=(0,))


class AutogradBackend(NumpyBackend):
    """Boxed NumPy arrays, which may be mixed with plain ones."""

    wraps = "numpy"
    autodiff = "autograd.grad, jacobian, ..."

    def bind(self, primitive: Primitive, **options: Any) -> Callable[..., tuple[Array, ...]]:
        return _bound(primitive, tuple(sorted(options.items())))

    def device(self, x: Array) -> Any:
        return "cpu"

    def constant(self, x: Array) -> Array:
        return _value(x)

    def memory(self, x: Any) -> Any:
        return None if isbox(x) else x

    # In operations that the tape knows:

    def scatter(self, values: Array, indices: Array, size: int) -> Array:
        found: Array = _put(values, _value(indices), -1, size)
        return found


@cache
def _bound(primitive: Primitive, options: tuple[tuple[str, Any], ...]) -> Callable[..., tuple[Array, ...]]:
    operator: Callable[..., tuple[Array, ...]] = traced(numpy_backend.bind(primitive, **dict(options)))

    def pullback(argnums: Any, outputs: Any, inputs: Any, _: Any) -> Callable[[Any], tuple[Array, ...]]:
        def pull(cotangents: Any) -> tuple[Array, ...]:
            needed = tuple(i in argnums for i in range(len(inputs)))
            # autograd also passes cotangents of the constants, which have no derivative.
            parts = _parts(outputs), _parts(cotangents)[: primitive.moving]
            with backend.quiet():
                found = backend.run(primitive, "vjp", inputs, *parts, needed)
            return tuple(found[i] for i in argnums)

        return pull

    def push(argnums: Any, tangents: Any, outputs: Any, inputs: Any, _: Any) -> Any:
        given = dict(zip(argnums, tangents, strict=True))
        parts = _parts(outputs)
        with backend.quiet():
            found = backend.run(primitive, "jvp", inputs, parts, tuple(given.get(i) for i in range(len(inputs))))
            constants = parts[len(found) :]
            return boxed_tuple((*found, *(anp.zeros_like(value) for value in constants)))

    defvjp_argnums(operator, pullback)
    defjvp_argnums(operator, push)
    return operator


def _parts(boxed: Any) -> tuple[Array, ...]:
    """The elements of a tuple, which may be boxed as a whole."""
    return tuple(boxed[i] for i in range(len(boxed)))


backend: Backend = AutogradBackend(_Namespace(), "autograd")
