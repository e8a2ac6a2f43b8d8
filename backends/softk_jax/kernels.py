"""Numba's kernels as operations of JAX, on the CPU.

Each part of a primitive that has a kernel is an operation (a `Primitive` of JAX) with its own rules for batching, for
derivatives and for lowering to XLA. It is lowered to the kernel where the program is for one CPU, and to the operations
of the reference everywhere else: on other devices, on several devices and in exported programs.

The derivative of the mask is two linear operations, each the transpose of the other: `push` for tangents and `pull` for
cotangents. In the inputs they are not linear in, they are differentiated through the reference: no kernel is ever
differentiated.
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

from softk._reference.threshold.masks import hard_mask, mask
from softk._reference.threshold.solve import solver
from softk.backend import ADAPTERS, Array, Backend, Kernel

__all__ = ["KERNELS"]

DTYPES = ("float16", "bfloat16", "float32", "float64")

Inputs = tuple[Any, ...]

#: How many operands there are of each kind. The first are the inputs of the primitive. Those of a derivative continue
#: with the state, and then the tangents of the first four inputs, or the cotangents of the mask and the offset.
PROBLEM, STATE, TANGENTS = 5, 2, 4
#: Whether an operand has one number per item, or one per row.
OF_ITEMS = (True, False, False, True, True)
ITEMS = {
    "solve": OF_ITEMS,
    "mask": OF_ITEMS,
    "push": (*OF_ITEMS, False, False, True, False, False, True),
    "pull": (*OF_ITEMS, False, False, True, False),
}


#: The operands of which a kernel needs one number for each row: the state, and the cotangent of the offset.
WHOLE = {"push": (5, 6), "pull": (5, 6, 8)}


# --- operands: only those that are given; each is one row for the whole batch, or a row for each of its rows


def _all(present: tuple[bool, ...], operands: Sequence[Any]) -> tuple[Any, ...]:
    """The operands, with None for those that are not given."""
    given = iter(operands)
    return tuple(next(given) if is_there else None for is_there in present)


def _there(operands: Sequence[Any]) -> list[Any]:
    return [value for value in operands if value is not None]


def _full(value: Array, batch: tuple[int, ...], of_items: bool) -> Array:
    """An operand with a row for each row of the batch."""
    last = value.shape[-1] if of_items else 1
    if value.shape == (*batch, last):
        return value
    if value.ndim == 0:
        value = value[None]
    return jnp.broadcast_to(value.reshape((1,) * (len(batch) + 1 - value.ndim) + value.shape), (*batch, last))


def _canonical(part: str, batch: tuple[int, ...], operands: Sequence[Any]) -> tuple[Any, ...]:
    """The operands in the form that the reference expects."""
    return tuple(
        value if value is None or (not of_items and value.ndim == 0) else _full(value, batch, of_items)
        for value, of_items in zip(operands, ITEMS[part], strict=True)
    )


def _summed(value: Array, like: Any) -> Array:
    """The cotangent of an operand, which may be one row, from that of its broadcast to the batch."""
    if value.shape == like.shape:
        return value
    found: Array = jnp.sum(value.reshape(-1, value.shape[-1]), axis=0).reshape(like.shape)
    return found


# --- what the operations compute, by the reference


def _backend() -> Backend:
    found = ADAPTERS["jax"].load()
    assert found is not None
    return found


def _solved(*operands: Any, present: Any, batch: Any, ranks: Any) -> list[Array]:
    inputs = _canonical("solve", batch, _all(present, operands))
    with _backend().quiet(inputs[0]):
        return list(solver.forward(_backend(), inputs, ranks=ranks))


def _masked(*operands: Any, present: Any, batch: Any) -> list[Array]:
    inputs = _canonical("mask", batch, _all(present, operands))
    with _backend().quiet(inputs[0]):
        return list(mask.forward(_backend(), inputs, ranks=None))


@partial(jax.checkpoint, static_argnums=(0,))
def _push_once(static: tuple[Any, ...], *operands: Any) -> list[Array]:
    present, batch = static
    given = _canonical("push", batch, _all(present, operands))
    inputs, state, tangents = given[:PROBLEM], given[PROBLEM : PROBLEM + STATE], given[PROBLEM + STATE :]
    with _backend().quiet(inputs[0]):
        rule: Any = mask.jvp
        moved, doffset = rule(_backend(), inputs, (None, *state), tangents)
    return [jnp.asarray(moved), _full(jnp.asarray(doffset), batch, False)]


def _pushed(*operands: Any, present: Any, batch: Any) -> list[Array]:
    found: list[Array] = _push_once((present, batch), *operands)
    return found


def _pulled(*operands: Any, present: Any, batch: Any, needed: tuple[bool, ...]) -> list[Array]:
    """The transpose of `push`."""
    given = _all(present, operands)
    problem, (u, c) = given[: PROBLEM + STATE], given[PROBLEM + STATE :]
    avals = _tangent_avals(problem, batch)
    of_tangents = (*(value is not None for value in problem), *needed)

    def push(*tangents: Array) -> list[Array]:
        return _pushed(*_there(problem), *tangents, present=of_tangents, batch=batch)

    example = [aval for aval, is_needed in zip(avals, needed, strict=True) if is_needed]
    cotangents = [_full(u, batch, True), jnp.zeros(avals[1].shape, avals[1].dtype) if c is None else c]
    found: list[Array] = list(jax.linear_transpose(push, *example)(cotangents))
    return found


def _tangent_avals(problem: Sequence[Any], batch: tuple[int, ...]) -> list[Any]:
    """Of the tangents of the first four inputs, for the whole batch."""
    x, k = problem[:2]
    of_rows = _form((*batch, 1), k.dtype)
    return [_form((*batch, x.shape[-1]), x.dtype), of_rows, of_rows, _form((*batch, x.shape[-1]), k.dtype)]


def _form(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.core.ShapedArray(shape, jnp.dtype(dtype))


# --- what they compute, by the kernels


def _register(name: str, capsule: Any) -> None:
    jax.ffi.register_ffi_target(name, capsule, platform="cpu")


def _called(part: str, x: Any, weighted: bool, results: list[Any], operands: list[Array]) -> list[Array]:
    from softk_numba import xla

    name = xla.target(part, str(x.dtype), weighted, _register)
    return list(jax.ffi.ffi_call(name, [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in results])(*operands))


def _operands(part: str, present: Any, operands: Sequence[Any]) -> list[Array]:
    """All operands. Those that are not given have no rows."""
    given = list(_all(present, operands))
    x, k = given[:2]
    for i, value in enumerate(given):
        if value is None:
            dtype = x.dtype if i == PROBLEM + STATE else jnp.bool_ if i == 4 else k.dtype
            given[i] = jnp.zeros((0, x.shape[-1]) if ITEMS[part][i] else (0,), dtype)
    return given


def _solve_by_kernel(*operands: Any, present: Any, batch: Any, ranks: Any) -> list[Array]:
    given = _operands("solve", present, operands)
    ends = jnp.asarray(np.asarray((0, 0) if ranks is None else ranks[:2], np.int32))
    results = [_form((4, *batch, 1), given[1].dtype), _form((4, *batch, 1), jnp.bool_)]
    numbers, flags = _called("solve", given[0], present[3], results, [*given, ends])
    return [*(numbers[i] for i in range(4)), *(flags[i] for i in range(4))]


def _mask_by_kernel(*operands: Any, present: Any, batch: Any) -> list[Array]:
    given = _operands("mask", present, operands)
    return _called("mask", given[0], present[3], _mask_avals(*operands, present=present, batch=batch), given)


def _push_by_kernel(*operands: Any, present: Any, batch: Any) -> list[Array]:
    given = _operands("push", present, operands)
    return _called("push", given[0], present[3], _push_avals(*operands, present=present, batch=batch), given)


def _pull_by_kernel(*operands: Any, present: Any, batch: Any, needed: tuple[bool, ...]) -> list[Array]:
    given = _operands("pull", present, operands)
    results = _tangent_avals(given, batch)
    for i, is_needed in enumerate(needed):
        if not is_needed:
            shape = (0, given[0].shape[-1]) if i in (0, 3) else (0,)
            results[i] = _form(shape, results[i].dtype)
    found = _called("pull", given[0], present[3], results, given)
    return [value for value, is_needed in zip(found, needed, strict=True) if is_needed]


# --- the shapes and dtypes of their results


def _solve_avals(*operands: Any, present: Any, batch: Any, ranks: Any) -> list[Any]:
    dtype = operands[1].dtype
    return [_form((*batch, 1), dtype)] * 4 + [_form((*batch, 1), jnp.bool_)] * 4


def _mask_avals(*operands: Any, present: Any, batch: Any) -> list[Any]:
    x, k = operands[:2]
    return [_form((*batch, x.shape[-1]), x.dtype), _form((*batch, 1), k.dtype), _form((*batch, 1), k.dtype)]


def _push_avals(*operands: Any, present: Any, batch: Any) -> list[Any]:
    return _mask_avals(*operands, present=present, batch=batch)[:2]


def _pull_avals(*operands: Any, present: Any, batch: Any, needed: tuple[bool, ...]) -> list[Any]:
    avals = _tangent_avals(_all(present, operands), batch)
    return [aval for aval, is_needed in zip(avals, needed, strict=True) if is_needed]


# --- derivatives of derivatives


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, ad.Zero) or tangent.dtype == jax.dtypes.float0


def _differentiate(
    operation: Any, by_reference: Any, primals: Any, tangents: Any, *, present: Any, **params: Any
) -> tuple[Any, Any]:
    """The results of a rule and their tangents. In the tangents or cotangents among its operands a rule is linear."""
    results = operation.bind(*primals, present=present, **params)
    count = sum(present[: PROBLEM + STATE])
    moving = [not _is_zero(tangent) for tangent in tangents]
    terms = []
    if any(moving[count:]):
        if operation is pull and not moving[count]:  # a pull always has a cotangent of the mask
            tangents = (*tangents[:count], ad.instantiate_zeros(tangents[count]), *tangents[count + 1 :])
            moving[count] = True
        given = iter(moving)
        still = tuple(is_there and (next(given) or i < PROBLEM + STATE) for i, is_there in enumerate(present))
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


def _push_transposed(cotangents: Any, *operands: Any, present: Any, batch: Any) -> list[Any]:
    count = sum(present[: PROBLEM + STATE])
    u, c = cotangents
    linear = _all(present[PROBLEM + STATE :], operands[count:])
    needed = tuple(ad.is_undefined_primal(value) for value in linear)
    u = ad.instantiate_zeros(u)
    given = (*present[: PROBLEM + STATE], True, not isinstance(c, ad.Zero))
    found = iter(pull.bind(*operands[:count], u, *[c] * given[-1], present=given, batch=batch, needed=needed))
    return [None] * count + [
        _summed(next(found), value.aval) if is_needed else None
        for value, is_needed in zip(linear, needed, strict=True)
        if value is not None
    ]


def _pull_transposed(cotangents: Any, *operands: Any, present: Any, batch: Any, needed: Any) -> list[Any]:
    count = sum(present[: PROBLEM + STATE])
    given = iter(cotangents)
    tangents = [next(given) if is_needed else None for is_needed in needed]
    tangents = [None if isinstance(value, ad.Zero) else value for value in tangents]
    are_there = (*present[: PROBLEM + STATE], *(value is not None for value in tangents))
    found = push.bind(*operands[:count], *_there(tangents), present=are_there, batch=batch)
    return [None] * count + [
        _summed(moved, value.aval) if ad.is_undefined_primal(value) else None
        for value, moved in zip(operands[count:], found, strict=False)
    ]


# --- batching


def _batch(operation: Any, part: str, operands: Any, axes: Any, **params: Any) -> Any:
    """Add an axis in front of the batch. An operand that is one row for the whole batch stays one row."""
    size = next(value.shape[axis] for value, axis in zip(operands, axes, strict=True) if axis is not None)
    batch = (size, *params["batch"])
    places = [i for i, is_there in enumerate(params["present"]) if is_there]
    moved = []
    for place, value, axis in zip(places, operands, axes, strict=True):
        of_items = ITEMS[part][place]
        if axis is not None:
            value = jnp.moveaxis(value, axis, 0)
            ones = (1,) * (len(batch) + 1 - value.ndim)
            value = value.reshape((size, *ones, *value.shape[1:]))
            value = jnp.broadcast_to(value, (*batch, value.shape[-1]))
        elif place not in WHOLE.get(part, ()) and value.size == (value.shape[-1] if of_items else 1):
            value = value.reshape(value.shape[-1:] if of_items else ())
        else:
            value = _full(value, batch, of_items)
        moved.append(value)
    found = operation.bind(*moved, **{**params, "batch": batch})
    return found, [0] * len(found)


# --- the operations


def _operation(name: str, avals: Any, by_reference: Any, by_kernel: Any) -> Any:
    found: Any = Operation(name)
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
    kernel = mlir.lower_fun(by_kernel, multiple_results=True)

    def lower(context: Any, *operands: Any, **params: Any) -> Any:
        serves = _is_for_one_cpu(context)
        if serves and "present" in params:
            serves = starts(name.removeprefix("softk_"), str(context.avals_in[0].dtype), params["present"][3])
        return (kernel if serves else reference)(context, *operands, **params)

    mlir.register_lowering(found, reference)
    mlir.register_lowering(found, lower, platform="cpu")
    if name != "softk_probe":
        batching.primitive_batchers[found] = partial(_batch, found, name.removeprefix("softk_"))
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


solve = _operation("softk_solve", _solve_avals, _solved, _solve_by_kernel)
masking = _operation("softk_mask", _mask_avals, _masked, _mask_by_kernel)
push = _operation("softk_push", _push_avals, _pushed, _push_by_kernel)
pull = _operation("softk_pull", _pull_avals, _pulled, _pull_by_kernel)
for operation, rule, transposed in ((push, _pushed, _push_transposed), (pull, _pulled, _pull_transposed)):
    ad.primitive_jvps[operation] = partial(_differentiate, operation, rule)
    ad.primitive_transposes[operation] = transposed


# --- whether XLA takes the kernels


def _probe_by_kernel(*operands: Array) -> list[Array]:
    from softk_numba import xla

    name = xla.target("probe", "float32", False, _register)
    return list(jax.ffi.ffi_call(name, [jax.ShapeDtypeStruct((2, 3), jnp.float32)])(*operands))


probe = _operation(
    "softk_probe",
    lambda x, kept, nothing: [_form(x.shape, x.dtype)],
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


def _refuses(backend: Backend, inputs: Inputs, *groups: Any, **options: Any) -> str | None:
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


def _refuses_rule(backend: Backend, inputs: Inputs, outputs: Inputs, tangents: Inputs) -> str | None:
    if not any(value is not None for value in tangents[:TANGENTS]):
        return "there is no tangent"
    return _refuses(backend, inputs, outputs[1:], tangents)


def _bind(operation: Any, given: Sequence[Any], **params: Any) -> tuple[Array, ...]:
    present = tuple(value is not None for value in given)
    found = operation.bind(*_there(given), present=present, batch=tuple(given[0].shape[:-1]), **params)
    return tuple(found)


def _solve(backend: Backend, inputs: Inputs, *, ranks: tuple[int, ...] | None) -> tuple[Array, ...]:
    return _bind(solve, inputs, ranks=ranks)


def _mask(backend: Backend, inputs: Inputs, *, ranks: tuple[int, ...] | None) -> tuple[Array, ...]:
    return _bind(masking, inputs)


def _push(backend: Backend, inputs: Inputs, outputs: Inputs, tangents: Inputs) -> tuple[Array, ...]:
    return _bind(push, (*inputs[:PROBLEM], *outputs[1:], *tangents[:TANGENTS]))


KERNELS = (
    Kernel("numba", solver, "forward", _refuses, _solve),
    Kernel("numba", mask, "forward", _refuses, _mask),
    Kernel("numba", mask, "jvp", _refuses_rule, _push),
    Kernel("numba", hard_mask, "jvp", _refuses_rule, _push),
)
