"""Fused kernels for arrays in the memory of the host, in Numba: the threshold, the mask and its rule.

They serve every framework whose arrays lie in memory, of float16, bfloat16, float32 and float64. This file says when.
`launch` calls them; `masks` has the loops over rows, `solve` and `rule` what is done in each, `rows` how a row is read
and written, `operations` the arithmetic and `pool` the threads. Numba is imported when the first array arrives that a
kernel will serve.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

from softk._reference.threshold.masks import hard_mask, mask
from softk._reference.threshold.solve import solver
from softk.backend import Backend, Kernel, is_in_host_memory

__all__ = ["KERNELS"]

DTYPES = ("float16", "bfloat16", "float32", "float64")

Inputs = tuple[Any, ...]


@cache
def _absent() -> str | None:
    """Why no kernel runs; None where kernels do."""
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed"
    return None


def _refuses(backend: Backend, inputs: Inputs, *groups: Any, **options: Any) -> str | None:
    """Why the kernels do not serve a problem, None where they do."""
    x = inputs[0]
    if 0 in x.shape:
        return f"there must be scores, got the shape {tuple(x.shape)}"
    dtype = str(x.dtype).rpartition(".")[2]
    if dtype not in DTYPES:
        return f"the scores must be of one of {', '.join(DTYPES)}, got {x.dtype}"
    for group in (inputs, *groups):
        for value in group:
            if value is None or isinstance(value, bool):
                continue
            if backend.memory(value) is None:
                return "a compiler, a transform or automatic differentiation records the operations"
            if not is_in_host_memory(value):
                return f"the arrays must be in the memory of the host, got {getattr(value, 'device', None)}"
    return _absent()


def _refuses_rule(backend: Backend, inputs: Inputs, outputs: Inputs, given: Inputs, *needed: Any) -> str | None:
    if given[0] is None and needed:
        return "there is no cotangent of the mask"
    return _refuses(backend, inputs, outputs[1:], given)


def _solve(backend: Backend, inputs: Inputs, *, ranks: tuple[int, ...] | None) -> tuple[Any, ...]:
    from . import launch

    return launch.settled(inputs, ranks)


def _mask(backend: Backend, inputs: Inputs, *, ranks: tuple[int, ...] | None) -> tuple[Any, ...]:
    from . import launch

    return launch.mask(inputs)


def _pull(backend: Backend, inputs: Inputs, outputs: Inputs, cotangents: Inputs, needed: Any) -> tuple[Any, ...]:
    from . import launch

    return launch.pulled(inputs, outputs, cotangents, needed)


def _push(backend: Backend, inputs: Inputs, outputs: Inputs, tangents: Inputs) -> tuple[Any, ...]:
    from . import launch

    return launch.pushed(inputs, outputs, tangents)


KERNELS = (
    Kernel("numba", solver, "forward", _refuses, _solve),
    Kernel("numba", mask, "forward", _refuses, _mask),
    Kernel("numba", mask, "vjp", _refuses_rule, _pull),
    Kernel("numba", mask, "jvp", _refuses_rule, _push),
    Kernel("numba", hard_mask, "vjp", _refuses_rule, _pull),
    Kernel("numba", hard_mask, "jvp", _refuses_rule, _push),
)
