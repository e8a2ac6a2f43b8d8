"""The array libraries that the suite runs on, behind one small interface.

`Library.array` makes an array from NumPy's, `Library.numpy` brings one back after checking that it is the library's
own, and `Library.call` applies a function of softk to such arrays (under `jax.jit` for the compiled variant). A library
that is absent, or a device that is not there, is skipped with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest


@dataclass(frozen=True)
class Library:
    """One way of holding arrays."""

    name: str
    module: str
    make: Callable[[np.ndarray], Any]
    bring: Callable[[Any], np.ndarray]
    is_own: Callable[[Any], bool]
    tags: frozenset[str] = field(default_factory=frozenset)  # "autodiff", "lazy", "traced", "gpu", "half"

    def array(self, values: Any, dtype: Any = None) -> Any:
        """The library's array of these values; float64 unless they have a dtype or one is given."""
        return self.make(np.array(values, dtype=dtype, copy=True))

    def numpy(self, values: Any) -> np.ndarray:
        """The values, of an array that must be this library's own."""
        assert self.is_own(values), f"{type(values)} is not an array of {self.name}"
        return self.bring(values)

    def call(self, f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``f(*args, **kwargs)``, where arrays are already the library's own."""
        if "traced" not in self.tags:
            return f(*args, **kwargs)
        import jax

        static = {name: value for name, value in kwargs.items() if not isinstance(value, jax.Array)}
        arrays = {name: value for name, value in kwargs.items() if isinstance(value, jax.Array)}
        places = [i for i, value in enumerate(args) if isinstance(value, jax.Array)]

        def traced(given: list[Any], named: dict[str, Any]) -> Any:
            full = list(args)
            for place, value in zip(places, given, strict=True):
                full[place] = value
            return f(*full, **named, **static)

        return jax.jit(traced)([args[i] for i in places], arrays)

    def evaluate(self, f: Callable[..., Any], *args: Any, **kwargs: Any) -> np.ndarray:
        """`call` with NumPy arrays made the library's own first, and the one result brought back."""
        args = tuple(self.make(value) if isinstance(value, np.ndarray) else value for value in args)
        kwargs = {key: self.make(value) if isinstance(value, np.ndarray) else value for key, value in kwargs.items()}
        return self.numpy(self.call(f, *args, **kwargs))

    def require(self) -> None:
        """Skip the test, with the reason, where the library or its device is absent."""
        module = pytest.importorskip(self.module, reason=f"{self.module} is not installed")
        if "gpu" not in self.tags:
            return
        if self.name == "torch-cuda" and not module.cuda.is_available():
            pytest.skip("torch sees no CUDA device")
        if self.name == "jax-gpu" and not _jax_gpus():
            pytest.skip("jax sees no GPU")
        if self.name == "cupy" and not module.cuda.is_available():
            pytest.skip("cupy sees no CUDA device")


def _read_only(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values.flags.writeable = False
    return values


def _strict(values: np.ndarray) -> Any:
    return importlib.import_module("array_api_strict").asarray(values)


def _torch(device: str) -> Callable[[np.ndarray], Any]:
    def make(values: np.ndarray) -> Any:
        return importlib.import_module("torch").asarray(values.copy()).to(device)

    return make


def _jax_gpus() -> list[Any]:
    jax = importlib.import_module("jax")
    try:
        return list(jax.devices("gpu"))
    except RuntimeError:
        return []


def _jax(values: np.ndarray) -> Any:
    jax = importlib.import_module("jax")
    return jax.device_put(values, jax.devices("cpu")[0])


def _jax_gpu(values: np.ndarray) -> Any:
    return importlib.import_module("jax").device_put(values, _jax_gpus()[0])


def _dask(values: np.ndarray) -> Any:
    """Two blocks along every axis that has two items."""
    chunks = tuple(-(-size // 2) if size > 1 else size for size in values.shape)
    return importlib.import_module("dask.array").from_array(values, chunks=chunks)


def _kind(module: str, name: str) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, getattr(importlib.import_module(module), name))


def _on(device: str) -> Callable[[Any], bool]:
    def check(values: Any) -> bool:
        return isinstance(values, importlib.import_module("torch").Tensor) and values.device.type == device

    return check


def _is_strict(values: Any) -> bool:
    return type(values).__module__.startswith("array_api_strict")


def _is_array(values: Any) -> bool:
    return isinstance(values, (np.ndarray, np.generic))


_AUTODIFF = frozenset({"autodiff", "half"})

LIBRARIES = [
    Library("numpy", "numpy", np.copy, np.asarray, _is_array, frozenset({"half"})),
    Library("numpy-read-only", "numpy", _read_only, np.asarray, _is_array),
    Library("array-api-strict", "array_api_strict", _strict, np.asarray, _is_strict),
    Library("torch", "torch", _torch("cpu"), lambda x: x.detach().numpy(), _on("cpu"), _AUTODIFF),
    Library("jax", "jax", _jax, np.asarray, _kind("jax", "Array"), _AUTODIFF),
    Library("jax-jit", "jax", _jax, np.asarray, _kind("jax", "Array"), _AUTODIFF | {"traced"}),
    Library("dask", "dask.array", _dask, np.asarray, _kind("dask.array", "Array"), frozenset({"lazy"})),
    Library(
        "torch-cuda", "torch", _torch("cuda"), lambda x: x.detach().cpu().numpy(), _on("cuda"), _AUTODIFF | {"gpu"}
    ),
    Library("jax-gpu", "jax", _jax_gpu, np.asarray, _kind("jax", "Array"), _AUTODIFF | {"gpu"}),
    Library(
        "cupy",
        "cupy",
        lambda x: importlib.import_module("cupy").asarray(x),
        lambda x: x.get(),
        _kind("cupy", "ndarray"),
        frozenset({"gpu", "half"}),
    ),
]

BY_NAME = {library.name: library for library in LIBRARIES}
