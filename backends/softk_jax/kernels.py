"""Numba's kernels as operations of JAX, on the CPU.

Each part of a primitive that has a kernel is an operation (a `Primitive` of JAX) with its own rules for batching, for
derivatives and for lowering to XLA. It is lowered to the kernel where the program is for one CPU, and to the operations
of the reference everywhere else: on other devices, on several devices and in exported programs.

The derivative is two linear operations, each the transpose of the other: `push` for tangents and `pull` for cotangents.
In the inputs they are not linear in, they are differentiated through the reference: no kernel is ever differentiated.

This file has what the operations share. `masks` has those of the mask, `ladders` those for sorting and ranking.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive as Operation
from jax.interpreters import ad, batching, mlir

from softk.backend import ADAPTERS, Array, Backend

DTYPES = ("float16", "bfloat16", "float32", "float64")

Inputs = tuple[Any, ...]


# --- operands: only those that are given


def all_of(present: tuple[bool, ...], operands: Sequence[Any]) -> tuple[Any, ...]:
    """The operands, with None for those that are not given."""
    given = iter(operands)
    return tuple(next(given) if is_there else None for is_there in present)


def there(operands: Sequence[Any]) -> list[Any]:
    """Those that are given."""
    return [value for value in operands if value is not None]


def summed(value: Array, like: Any) -> Array:
    """The cotangent of an operand, which may be one row, from that of its broadcast to the batch."""
    if value.shape == like.shape:
        return value
    found: Array = jnp.sum(value.reshape(-1, value.shape[-1]), axis=0).reshape(like.shape)
    return found


def form(shape: tuple[int, ...], dtype: Any) -> Any:
    """The type of an array of JAX."""
    return jax.core.ShapedArray(shape, jnp.dtype(dtype))


# --- what an operation computes


def adapter() -> Backend:
    """The backend of JAX, for the reference."""
    found = ADAPTERS["jax"].load()
    assert found is not None
    return found


def _register(name: str, capsule: Any) -> None:
    jax.ffi.register_ffi_target(name, capsule, platform="cpu")


def called(part: str, x: Any, weighted: bool, results: list[Any], operands: list[Array]) -> list[Array]:
    """The results of a kernel, of the given types."""
    from softk_numba import xla

    name = xla.target(part, str(x.dtype), weighted, _register)
    return list(jax.ffi.ffi_call(name, [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in results])(*operands))


# --- derivatives of derivatives


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, ad.Zero) or tangent.dtype == jax.dtypes.float0


def differentiate(
    operation: Any,
    by_reference: Any,
    fixed: int,
    whole: bool,
    primals: Any,
    tangents: Any,
    *,
    present: Any,
    **params: Any,
) -> tuple[Any, Any]:
    """The results of a rule and their tangents.

    A rule is linear in its operands but the first `fixed`. If `whole`, the first of these is always given.
    """
    results = operation.bind(*primals, present=present, **params)
    count = sum(present[:fixed])
    moving = [not _is_zero(tangent) for tangent in tangents]
    terms = []
    if any(moving[count:]):
        if whole and not moving[count]:
            tangents = (*tangents[:count], ad.instantiate_zeros(tangents[count]), *tangents[count + 1 :])
            moving[count] = True
        given = iter(moving)
        still = tuple(is_there and (next(given) or i < fixed) for i, is_there in enumerate(present))
        linear = [tangent for tangent, is_moving in zip(tangents[count:], moving[count:], strict=True) if is_moving]
        terms.append(operation.bind(*primals[:count], *linear, present=still, **params))
    if any(moving[:count]):
        places = [i for i in range(count) if moving[i]]

        def rule(*moved: Array) -> list[Array]:
            operands = list(primals)
            for i, value in zip(places, moved, strict=True):
                operands[i] = value
            found: list[Array] = by_reference(*operands, present=present, **params)
            return found

        terms.append(jax.jvp(rule, tuple(primals[i] for i in places), tuple(tangents[i] for i in places))[1])
    return results, [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]


# --- the operations


def define(
    name: str, avals: Any, by_reference: Any, by_kernel: Any = None, batch: Any = None, weights: int | None = None
) -> Any:
    """A new operation.

    Parameters
    ----------
    name : str
        Its name, and that of its kernel.
    avals : callable
        The types of its results.
    by_reference, by_kernel : callable
        What it computes, by operations of JAX and by the kernel, if there is one.
    batch : callable, optional
        ``batch(operation, operands, axes, **params)``, its rule for batching.
    weights : int, optional
        The place of the item weights among its operands, for which the kernel is compiled anew.
    """
    found: Any = Operation(f"softk_{name}")
    found.multiple_results = True
    found.def_abstract_eval(avals)

    @cache
    def compiled(params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        return jax.jit(partial(found.bind, **dict(params)))

    @found.def_impl
    def compute(*operands: Any, **params: Any) -> Any:
        with jax.disable_jit(False):
            return compiled(tuple(sorted(params.items())))(*operands)

    reference = mlir.lower_fun(by_reference, multiple_results=True)
    mlir.register_lowering(found, reference)
    if batch is not None:
        batching.primitive_batchers[found] = partial(batch, found)
    if by_kernel is None:
        return found
    kernel = mlir.lower_fun(by_kernel, multiple_results=True)

    def lower(context: Any, *operands: Any, **params: Any) -> Any:
        serves = _is_for_one_cpu(context)
        if serves and "present" in params:
            weighted = weights is not None and params["present"][weights]
            serves = starts(name, str(context.avals_in[0].dtype), weighted)
        return (kernel if serves else reference)(context, *operands, **params)

    mlir.register_lowering(found, lower, platform="cpu")
    return found


def _is_for_one_cpu(context: Any) -> bool:
    """Whether the program that is being lowered runs in this process and on one device."""
    module = context.module_context
    return getattr(module.axis_context, "num_devices", 0) == 1 and not module.lowering_parameters.for_export


@cache
def starts(part: str, dtype: str, weighted: bool) -> bool:
    """Whether a kernel compiles. Where it does not, a warning says why."""
    from softk_numba import xla

    try:
        xla.target(part, dtype, weighted, _register)
    except Exception as error:
        message = f"softk computes without its kernels for JAX: {type(error).__name__}: {error}"
        warnings.warn(message.splitlines()[0], RuntimeWarning, stacklevel=2)
        return False
    return True


# --- whether XLA takes the kernels


def _probe_by_kernel(*operands: Array) -> list[Array]:
    from softk_numba import xla

    name = xla.target("probe", "float32", False, _register)
    return list(jax.ffi.ffi_call(name, [jax.ShapeDtypeStruct((2, 3), jnp.float32)])(*operands))


probe = define(
    "probe",
    lambda x, kept, nothing: [form(x.shape, x.dtype)],
    lambda x, kept, nothing: [jnp.zeros_like(x)],
    _probe_by_kernel,
)


@cache
def fault() -> str | None:
    """Why XLA cannot run the kernels here, or None. The first call runs a small one."""
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed"
    try:
        cpu = jax.local_devices(backend="cpu")[0]
        x = np.arange(6.0, dtype=np.float32).reshape(2, 3)
        given = x, np.asarray([True, False]), np.empty((0, 3), np.float32)
        with jax.ensure_compile_time_eval(), jax.default_device(cpu), jax.transfer_guard("allow"):
            found = np.asarray(probe.bind(*(jnp.asarray(value) for value in given))[0])
    except Exception as error:
        return f"XLA refuses Numba's functions: {type(error).__name__}: {error}".splitlines()[0][:200]
    if not np.array_equal(found, np.stack([2.0 * x[0], x[0] * 0.0 - 1.0])):
        return "this version of jaxlib calls functions in an unknown way"
    return None


def refuses(backend: Backend, inputs: Inputs, *groups: Any, **options: Any) -> str | None:
    """Why no kernel serves a problem, or None."""
    x = inputs[0]
    if not all(isinstance(size, int) for size in x.shape):
        return f"the shape must not be symbolic, got {x.shape}"
    if 0 in x.shape:
        return f"there must be scores, got the shape {tuple(x.shape)}"
    if str(x.dtype) not in DTYPES:
        return f"the scores must be of one of {', '.join(DTYPES)}, got {x.dtype}"
    if jax.default_backend() != "cpu":
        return f"the default device must be a CPU, got {jax.default_backend()}"
    given = [value for group in (inputs, *groups) for value in group if value is not None]
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(value).sharding.mesh for value in given)]
    if any(kind.name != "Auto" for mesh in meshes for kind in mesh.axis_types):
        return "the arrays are sharded over a mesh with manual or explicit axes"
    return fault()
