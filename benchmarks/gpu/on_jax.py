"""JAX under jit, timed by the host over several calls: calls are asynchronous, and JAX has no device events."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import softk
from benchmarks.cases import Case
from benchmarks.machine import installed
from benchmarks.timing import Call

from .drivers import Array, Driver, Inputs


class _JAX(Driver):
    def __init__(self, device: str) -> None:
        self.device = jax.devices("gpu" if device == "cuda" else device)[0]
        jax.config.update("jax_default_device", self.device)

    def describe(self) -> dict[str, Any]:
        return {"device": self.device.device_kind, "versions": installed(["jax", "jaxlib"])}

    def normal(self, rows: int, n: int, dtype: str, seed: int) -> Array:
        return jax.random.normal(jax.random.key(seed), (rows, n), dtype)

    def inputs(self, x: Array, u: Array) -> Inputs:
        return Inputs(x, u, None)  # arrays are immutable, so a copy allocates a new one

    def calls(self, case: Case) -> dict[str, Callable[[Inputs], Any]]:
        def mask(x: Array) -> Array:
            return softk.topk(x, case.k, epsilon=case.epsilon)

        return {
            "copy": _COPY,
            "forward": _Jitted(mask),
            "both": _Jitted(_both(mask), cotangent=True),
            "softmax": _SOFTMAX,
        }

    def clock(self, call: Call, count: int) -> float:
        before = time.perf_counter()
        for _ in range(count):
            last = call()
        jax.block_until_ready(last)
        return (time.perf_counter() - before) / count

    def mass_error(self, mask: Array, k: int) -> float:
        return float(jnp.max(jnp.abs(jnp.sum(mask, axis=-1, dtype=jnp.float32) - k))) / k

    def finite(self, gradient: Array) -> bool:
        return bool(jnp.all(jnp.isfinite(gradient)))

    def peak(self, call: Callable[[Inputs], Any], inputs: Inputs) -> float | None:
        # The temporary and output buffers, according to XLA.
        assert isinstance(call, _Jitted)
        plan = call.function.lower(*call.arguments(inputs)).compile().memory_analysis()
        return None if plan is None else float(plan.temp_size_in_bytes + plan.output_size_in_bytes)

    def free(self) -> None:
        gc.collect()
        jax.block_until_ready(jnp.zeros(1) + 1.0)


class _Jitted:
    """A jitted function of the scores, and optionally the cotangent, of a set of inputs."""

    def __init__(self, function: Callable[..., Any], *, cotangent: bool = False) -> None:
        self.function, self.cotangent = jax.jit(function), cotangent

    def arguments(self, given: Inputs) -> tuple[Array, ...]:
        return (given.x, given.u) if self.cotangent else (given.x,)

    def __call__(self, given: Inputs) -> Any:
        return self.function(*self.arguments(given))


def _both(function: Callable[[Array], Array]) -> Callable[[Array, Array], tuple[Array, Array]]:
    """A function that computes output and derivative, to be compiled as a whole."""

    def whole(x: Array, u: Array) -> tuple[Array, Array]:
        out, pullback = jax.vjp(function, x)
        return out, pullback(u)[0]

    return whole


# These do not depend on the case, so they are compiled only once per shape.
_COPY = _Jitted(jnp.copy)
_SOFTMAX = _Jitted(_both(lambda x: jax.nn.softmax(x, axis=-1)), cotangent=True)

driver = _JAX
