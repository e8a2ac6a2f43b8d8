"""For those who write an adapter: what the libraries' own differentiation says, on every device that there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .backend import Array, Backend

__all__ = ["devices", "native_gradient"]


def devices(backend: Backend) -> list[Any]:
    """The devices that arrays of the backend's library can be on now; None for the only one."""
    match backend.name:
        case "torch":
            import torch

            return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
        case "jax":
            import jax

            return list(jax.devices())
        case "cupy":
            import cupy

            return [cupy.cuda.Device(i) for i in range(cupy.cuda.runtime.getDeviceCount())]
    return [None]


def native_gradient(backend: Backend, f: Callable[[Array], Array], x: Array, cotangent: Array) -> Array | None:
    """The pullback of `f` at `x` by the library's own reverse mode; None where the library has none."""
    match backend.name:
        case "torch":
            import torch

            x = x.detach().requires_grad_()
            return torch.autograd.grad(f(x), x, cotangent)[0]
        case "jax":
            import jax

            return jax.vjp(f, x)[1](cotangent)[0]
        case "autograd":
            from autograd import make_vjp

            return make_vjp(f)(x)[0](cotangent)
    return None
