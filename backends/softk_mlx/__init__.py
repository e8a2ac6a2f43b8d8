"""The MLX backend: every primitive is an `mlx.core.custom_function` with both derivative rules."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from softk.backend import Array, Backend, Primitive

__all__ = ["MlxBackend", "backend"]


class _Namespace:
    """mlx.core under the names of the standard. Arrays have no device, because an operation says where it runs."""

    __name__ = "mlx.core"

    def __getattr__(self, name: str) -> Any:
        found = getattr(mx, {"bool": "bool_"}.get(name, name))
        return found if name not in ("arange", "asarray", "full", "sort", "zeros") else _without_device(found)

    @staticmethod
    def argsort(x: Array, *, axis: int, descending: bool = False, stable: bool = True) -> Array:
        return mx.argsort(-x if descending else x, axis=axis)

    @staticmethod
    def sum(x: Array, *, axis: Any = None, keepdims: bool = False, dtype: Any = None) -> Array:
        return mx.sum(x if dtype is None else x.astype(dtype), axis=axis, keepdims=keepdims)

    @staticmethod
    def exp(x: Array) -> Array:  # MLX's own has an error of up to 28 units in the last place, its expm1 of less than 1
        x = mx.clip(x, -1100.0, 1100.0)
        whole = mx.round(x * 1.4426950408889634)
        return mx.power(2.0, whole) * (1.0 + mx.expm1((x - whole * 0.693359375) + whole * 2.12194440e-4))  # Cody, Waite


def _without_device(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *args, device=None, stable=True, **options: function(*args, **options)


class MlxBackend(Backend):
    """MLX arrays, lazy until their values are read."""

    autodiff = "mx.grad, mx.vjp, mx.jvp"

    def bind(self, primitive: Primitive, **options: Any) -> Callable[..., tuple[Array, ...]]:
        def bound(*inputs: Array | None) -> tuple[Array, ...]:
            given = [i for i, value in enumerate(inputs) if value is not None]  # MLX differentiates arrays alone

            def spread(arrays: Any) -> list[Array | None]:
                return [arrays[given.index(i)] if i in given else None for i in range(len(inputs))]

            @mx.custom_function
            def operator(*arrays: Array) -> tuple[Array, ...]:
                return self.run(primitive, "forward", spread(arrays), **options)

            @operator.vjp
            def pull(arrays: Any, cotangents: Any, outputs: Any) -> tuple[Array, ...]:
                needed, moving = tuple(i in given for i in range(len(inputs))), tuple(cotangents)[: primitive.moving]
                found = self.run(primitive, "vjp", spread(arrays), tuple(outputs), moving, needed)
                return tuple(found[i] for i in given)

            @operator.jvp
            def push(arrays: Any, tangents: Any) -> tuple[Array, ...]:
                outputs = self.run(primitive, "forward", spread(arrays), **options)
                found = self.run(primitive, "jvp", spread(arrays), outputs, tuple(spread(tangents)))
                return (*found, *(mx.zeros_like(value) for value in outputs[len(found) :]))

            outputs: Any = operator(*(inputs[i] for i in given))
            return tuple(outputs)

        return bound

    def device(self, x: Array) -> Any:
        return None

    def constant(self, x: Array) -> Array:
        return mx.stop_gradient(x)


backend: Backend = MlxBackend(_Namespace(), "mlx")
