"""What a library says of itself: the devices that it has, and its own automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .backend import Array, Backend

__all__ = ["devices", "native_gradient"]


def devices(backend: Backend) -> list[Any]:
    """The devices that arrays of a library can be on now.

    Parameters
    ----------
    backend : Backend
        The library's backend, as `softk.backend.backend_of` finds it.

    Returns
    -------
    list
        Devices as the library has them, or ``[None]`` where there is only one.

    Examples
    --------
    >>> import numpy as np
    >>> from softk.backend import backend_of
    >>> from softk.testing import devices
    >>> devices(backend_of(np.ones(3)))
    [None]
    """
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
    """The derivative of a function by the library's own reverse mode.

    Parameters
    ----------
    backend : Backend
        The library's backend.
    f : callable
        A function of one array.
    x : array
        Where it is differentiated.
    cotangent : array
        Of the shape and dtype of ``f(x)``.

    Returns
    -------
    array or None
        The cotangent of `x`, of its shape and dtype; None where the library has no automatic differentiation.

    Examples
    --------
    >>> import numpy as np
    >>> from softk.backend import backend_of
    >>> from softk.testing import native_gradient
    >>> native_gradient(backend_of(np.ones(3)), np.sin, np.ones(3), np.ones(3)) is None
    True
    """
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
