"""Which backend serves an array: found from the array's type, without importing anything.

An adapter is imported when the first array of its framework arrives. softk knows its own adapters by name; a third
party adds one through the entry-point group ``softk.backends``: the entry's name is the top-level module of the
array type, its value a `Backend`.

Everything here is plain dictionaries and import statements, which a framework that traces Python can follow.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import array_api_compat

from .backend import Array, Backend


def _numpy() -> Backend:
    from softk_numpy import backend

    return backend


def _torch() -> Backend:
    from softk_torch import backend

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


#: Top-level module of an array type -> its adapter.
ADAPTERS: dict[str, Callable[[], Backend]] = {
    "numpy": _numpy,
    "torch": _torch,
    "jax": _jax,
    "jaxlib": _jax,
    "cupy": _cupy,
    "dask": _dask,
    "autograd": _autograd,
}

#: The names of the array types among the types of a module: a mixin, a module or a random generator is no array.
ARRAYS: dict[str, tuple[str, ...]] = {
    "numpy": ("ndarray", "generic"),
    "torch": ("Tensor",),
    "jax": ("Array", "Tracer"),
    "jaxlib": ("ArrayImpl",),
    "cupy": ("ndarray",),
    "dask": ("Array",),
    "autograd": ("ArrayBox",),
}

_by_type: dict[type, Backend | None] = {}
_by_namespace: dict[str, Backend] = {}


def is_array(value: Any) -> bool:
    """Whether some backend can serve the value: an array of a known framework or of the standard."""
    return _adapter(type(value)) is not None or hasattr(type(value), "__array_namespace__")


def backend_of(x: Array) -> Backend:
    """The backend of an array, found from its type."""
    adapter = _adapter(type(x))
    return adapter if adapter is not None else _standard(array_api_compat.array_namespace(x))


def _adapter(kind: type) -> Backend | None:
    if _is_tensor(kind):
        return ADAPTERS["torch"]()
    if kind not in _by_type:
        _by_type[kind] = _load(kind)
    return _by_type[kind]


def _is_tensor(kind: type) -> bool:
    """Whether PyTorch's adapter serves the type.

    It is not looked up: PyTorch's compiler can list neither the bases of a parameter's type nor its module, and would
    compile again whenever the dictionary of the types has grown.
    """
    from ._third_parties import ENTRIES

    torch = sys.modules.get("torch")
    if torch is None or not issubclass(kind, torch.Tensor):
        return False
    return not ENTRIES or kind in (torch.Tensor, torch.nn.Parameter)


def _load(kind: type) -> Backend | None:
    from ._third_parties import ENTRIES

    for base in kind.__mro__:  # a subclass from elsewhere may have a backend of its own
        root = base.__module__.partition(".")[0]
        name = base.__name__.rpartition(".")[2]  # JAX's own holds a module
        if root in ADAPTERS and name in ARRAYS[root]:
            return ADAPTERS[root]()
        for entry in ENTRIES:
            if entry.name == root:
                return _third_party(entry)
    return None


def _third_party(entry: Any) -> Backend | None:
    """A third party's adapter; its fault must not break softk for its users."""
    try:
        found = entry.load()
        if isinstance(found, Backend):
            return found
        fault = f"it is a {type(found).__name__}, not a softk.backend.Backend"
    except Exception as error:
        fault = repr(error)
    warnings.warn(f"softk backend {entry.name!r} ({entry.value}) is ignored: {fault}", stacklevel=2)
    return None


def _standard(xp: Any) -> Backend:
    name = xp.__name__
    if name not in _by_namespace:
        _by_namespace[name] = Backend(xp)
    return _by_namespace[name]
