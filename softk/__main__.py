"""``python -m softk``: list the installed array libraries that softk supports, and check each of them.

Useful after an installation and in bug reports.
"""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from . import __version__, topk, vjp
from ._native import devices, native_gradient
from ._reference.plan.ranking import soft_rank
from ._reference.plan.sorting import soft_sort, sorted_plan
from .backend import ADAPTERS, Array, Backend, Kernel, chosen_kernels

N, K, EPSILON = 1000, 10, 0.05
# Deterministic multiples of a power of two, exact in float32, so that every library computes from the same input.
SCORES = [((i * 7919) % 2048 - 1024) / 512 for i in range(N)]
COTANGENT = [((i * 5077) % 1024 - 512) / 256 for i in range(N)]

HEADER = ("library", "version", "device", "dtype", "autodiff", "mass error", "gradient error", "self-check")


def main() -> int:
    """Print the tables and return the exit status: 1 if a self-check failed or no library was found, else 0."""
    print(f"softk {__version__}, Python {platform.python_version()}, {platform.platform()}\n")
    reference = _reference()
    rows = [row for name in _names() for row in _rows(name, reference)]
    if not rows:
        print("softk has found no array library that it has an adapter for. Install one, for example:\n")
        print("    python -m pip install numpy\n")
        print(f"softk also supports {', '.join(name for name in ADAPTERS if name not in ('numpy', 'jaxlib'))}.")
        return 1
    _print_table([HEADER, *rows])
    print(f"\nSelf-check: topk of {N} scores, k = {K}, epsilon = {EPSILON}. The mass error is |sum mask - k| / k; the")
    print("gradient error is relative to the largest entry of NumPy's float64 gradient.")
    if served := [row for name in _names() for row in _kernel_rows(name)]:
        print(f"\nKernels, used instead of the library's array operations. SOFTK_KERNELS is {chosen_kernels()!r}.\n")
        _print_table([("kernel", "library", "device", "computes", "serves float32"), *served])
        for note in _notes():
            print(f"\n{note}")
    return int(any(row[-1].startswith("failed") for row in rows))


def _print_table(table: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for i, row in enumerate(table):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if i == 0:
            print("  ".join("-" * width for width in widths))


def _names() -> Iterator[str]:
    """The names of the installed libraries that have an adapter. softk's own adapters come first."""
    for name in ADAPTERS:
        if name != "jaxlib" and find_spec(name) is not None:
            yield name


def _reference() -> list[float] | None:
    """NumPy's gradient, against which the others are checked; None without NumPy."""
    if find_spec("numpy") is None:
        return None
    try:
        xp = _backend("numpy").xp
        found = vjp(topk, xp.asarray(SCORES), K, epsilon=EPSILON)[1](xp.asarray(COTANGENT))["x"]
    except Exception:  # NumPy's row of the table says why
        return None
    return [float(value) for value in found]


def _rows(name: str, reference: list[float] | None) -> Iterator[tuple[str, ...]]:
    try:
        backend = _backend(name)
        found = devices(backend)
    except Exception as error:  # a broken installation is a row of the table, not a traceback
        yield (
            name,
            _version(name),
            "-",
            "-",
            "-",
            "-",
            "-",
            _fault(error),
        )
        return
    for device in found:
        try:
            mass, gradient, dtype, eps = _check(backend, device, reference)
        except Exception as error:
            label = "cpu" if device is None else str(device)
            yield (name, _version(name), label, "-", backend.autodiff, "-", "-", _fault(error))
            continue
        passed = mass <= 16.0 * eps and not gradient > (2e-5 if eps > 1e-10 else 1e-11)
        yield (
            name,
            _version(name),
            "cpu" if device is None else str(device),
            dtype,
            backend.autodiff,
            f"{mass:.1e}",
            "-" if math.isnan(gradient) else f"{gradient:.1e}",
            "passed" if passed else "failed",
        )


def _kernel_rows(name: str) -> Iterator[tuple[str, ...]]:
    """One row per kernel and device: whether the kernel supports float32 scores there, or the reason why not."""
    try:
        backend = _backend(name)
        found = devices(backend) if backend.kernels else []
    except Exception:  # the table of libraries already reports this failure
        return
    for device in found:
        xp, placement = backend.xp, {} if device is None else {"device": device}
        x = xp.asarray(SCORES, dtype=xp.float32, **placement)
        k, tau = (xp.asarray(value, dtype=xp.float32, **placement) for value in (float(K), EPSILON / 2.0))
        label = "cpu" if device is None else str(device)
        for kernel in backend.kernels:
            if kernel.part == "forward":
                yield kernel.name, name, label, kernel.primitive.name, _answer(kernel, backend, x, k, tau)


def _answer(kernel: Kernel, backend: Backend, x: Any, k: Any, tau: Any) -> str:
    """Whether a kernel supports the arguments, or why not."""
    try:
        if kernel.primitive in (sorted_plan, soft_sort, soft_rank):
            reason = kernel.refuses(backend, (x, tau, k, None), rows=K, ranks=None)
        else:
            reason = kernel.refuses(backend, (x, k, tau, None, None), ranks=None)
    except Exception as error:  # a kernel of another library may be for a primitive with other arguments
        return _fault(error)
    return "yes" if reason is None else f"no: {reason}"


def _notes() -> list[str]:
    """What the kernels report about themselves, each line once."""
    found: dict[str, None] = {}
    for name in _names():
        try:
            kernels = _backend(name).kernels
        except Exception:  # the first table has a row that says so
            continue
        for kernel in kernels:
            if kernel.note is not None and (note := kernel.note()) is not None:
                found[note] = None
    return list(found)


def _fault(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {error}".splitlines()[0][:100]


def _backend(name: str) -> Backend:
    found = ADAPTERS[name].load()
    if found is None:
        raise ImportError(f"the entry point softk.backends {name!r} does not lead to a Backend")
    return found


def _check(backend: Backend, device: Any, reference: list[float] | None) -> tuple[float, float, str, float]:
    """The relative mass error, the relative gradient error, the dtype and its machine epsilon."""
    xp = backend.xp
    placement = {} if device is None else {"device": device}
    x, cotangent = xp.asarray(SCORES, **placement), xp.asarray(COTANGENT, **placement)

    def operator(scores: Array) -> Array:
        return topk(scores, K, epsilon=EPSILON)

    mask = operator(x)
    gradient = native_gradient(backend, operator, x, cotangent)
    if gradient is None:
        gradient = vjp(topk, x, K, epsilon=EPSILON)[1](cotangent)["x"]
    mass = abs(math.fsum(_values(mask)) - K) / K
    dtype, eps = str(x.dtype).removeprefix("torch."), float(xp.finfo(x.dtype).eps)
    if reference is None:
        return mass, math.nan, dtype, eps
    scale = max(abs(value) for value in reference)
    error = max(abs(a - b) for a, b in zip(_values(gradient), reference, strict=True)) / scale
    return mass, error, dtype, eps


def _values(x: Array) -> list[float]:
    x = x.compute() if hasattr(x, "compute") else x  # compute a lazy array once, not once per element
    found: list[float] = x.tolist()
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # the distribution has another name than the module, as cupy-cuda12x does
        return str(getattr(sys.modules.get(name), "__version__", "?"))


if __name__ == "__main__":
    sys.exit(main())
