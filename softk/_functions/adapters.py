"""The registration of softk's own adapters and of third-party adapters.

An adapter is imported when the first array of its library arrives. A third party adds one through the entry-point group
``softk.backends``. The name of the entry is the top-level module of the array types, and its value is a `Backend`.

The loaders are plain import statements, because a framework that traces Python can trace those.
"""

from __future__ import annotations

import warnings
from functools import partial
from importlib.metadata import EntryPoint, entry_points

from softk.backend import ADAPTERS, Adapter, Backend


def _numpy() -> Backend:
    from softk_numpy import backend

    return backend


def _torch() -> Backend:
    from softk_torch.adapter import backend

    return backend


def _jax() -> Backend:
    from softk_jax import backend

    return backend


def _cupy() -> Backend:
    from softk_cupy import backend

    return backend


def _dask() -> Backend:
    from softk_dask import backend

    return backend


def _autograd() -> Backend:
    from softk_autograd import backend

    return backend


def _mlx() -> Backend:
    from softk_mlx import backend

    return backend


def _third_party(entry: EntryPoint) -> Backend | None:
    """Load a third-party adapter. If it fails, warn and ignore it, so that softk keeps working."""
    try:
        found = entry.load()
        if isinstance(found, Backend):
            return found
        fault = f"it is a {type(found).__name__}, not a softk.backend.Backend"
    except Exception as error:
        fault = repr(error)
    warnings.warn(f"softk backend {entry.name!r} ({entry.value}) is ignored: {fault}", stacklevel=2)
    return None


def register_third_parties(entries: tuple[EntryPoint, ...]) -> None:
    """Add the adapters of the entry points. They do not replace softk's own adapters."""
    for entry in entries:
        ADAPTERS.setdefault(entry.name, Adapter(partial(_third_party, entry)))


ADAPTERS |= {
    "numpy": Adapter(_numpy, ("ndarray", "generic")),
    "torch": Adapter(_torch, ("Tensor",)),
    "jax": Adapter(_jax, ("Array", "Tracer")),
    "jaxlib": Adapter(_jax, ("ArrayImpl",)),
    "cupy": Adapter(_cupy, ("ndarray",)),
    "dask": Adapter(_dask, ("Array",)),
    "autograd": Adapter(_autograd, ("ArrayBox",)),
    "mlx": Adapter(_mlx, ("array",)),
}
register_third_parties(tuple(entry_points(group="softk.backends")))
