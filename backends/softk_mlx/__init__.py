"""The MLX backend: every primitive is an `mlx.core.custom_function` with both derivative rules."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from softk.backend import Array, Backend, Primitive

__all__ = ["MlxBackend", "backend"]


def _placed(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *args, device=None, stable=True, **options: function(*args, **options)


def _exp(x: Array) -> Array:  # MLX's own has an error of up to 28 units in the last place, its expm1 of less than 1
    x = mx.clip(x, -1100.0, 1100.0)
    whole = mx.round(x * 1.4426950408889634)
    return mx.power(2.0, whole) * (1.0 + mx.expm1((x - whole * 0.693359375) + whole * 2.12194440e-4))  # Cody, Waite


#: mlx.core under the names of the standard. Arrays have no device, because an operation says where it runs.
_xp = SimpleNamespace(
    **vars(mx)
    | {name: _placed(getattr(mx, name)) for name in ("arange", "asarray", "full", "sort", "zeros")}
    | {
        "argsort": lambda x, *, axis, descending=False, stable=True: mx.argsort(-x if descending else x, axis=axis),
        "bool": mx.bool_,
        "exp": _exp,
        "sum": lambda x, *, dtype=None, **options: mx.sum(x if dtype is None else x.astype(dtype), **options),
    }
)


class MlxBackend(Backend):
    """MLX arrays, lazy until their values are read."""

    autodiff = "mx.grad, mx.vjp, mx.jvp"

    def bind(self, primitive: Primitive, **options: Any) -> Callable[..., tuple[Array, ...]]:
        def bound(*inputs: Array | None) -> tuple[Array, ...]:
            given = tuple(value is not None for value in inputs)  # MLX differentiates arrays alone

            def spread(arrays: Any) -> tuple[Array | None, ...]:
                rest = iter(arrays)
                return tuple(next(rest) if here else None for here in given)

            @mx.custom_function
            def operator(*arrays: Array) -> tuple[Array, ...]:
                return self.run(primitive, "forward", spread(arrays), **options)

            @operator.vjp
            def pull(arrays: Any, cotangents: Any, outputs: Any) -> tuple[Array, ...]:
                moving = tuple(cotangents)[: primitive.moving]
                found = self.run(primitive, "vjp", spread(arrays), tuple(outputs), moving, given)
                return tuple(value for value, here in zip(found, given, strict=True) if here)

            @operator.jvp
            def push(arrays: Any, tangents: Any) -> tuple[Array, ...]:
                outputs = self.run(primitive, "forward", spread(arrays), **options)
                found = self.run(primitive, "jvp", spread(arrays), outputs, spread(tangents))
                return (*found, *map(mx.zeros_like, outputs[len(found) :]))

            outputs: Any = operator(*(value for value in inputs if value is not None))
            return tuple(outputs)

        return bound

    def device(self, x: Array) -> Any:
        return None

    def constant(self, x: Array) -> Array:
        return mx.stop_gradient(x)


backend: Backend = MlxBackend(_xp, "mlx")
