"""A part of a primitive as one operation of a compiler's graph.

A solver is one, because it stops when it is done. So is every part that a kernel computes on the CPU: the compiler
would make a loop over the scores for each sum. A derivative that is itself differentiated inside the graph is not,
because nothing differentiates a kernel. An exported program runs where softk may not be, and gets the operations too.
"""

from __future__ import annotations

from ast import literal_eval
from functools import cache
from typing import Any

import torch

import softk_numba
from softk.backend import ADAPTERS, PRIMITIVES, Backend, Form, Inputs, Part, Primitive, chosen_kernels

Tensors = list[torch.Tensor | None]


def is_one_operation(primitive: Primitive, part: Part, inputs: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether a part of a primitive is recorded as one operation."""
    # A symbol of a trace cannot be an option of an operation.
    if torch.compiler.is_exporting() or not all(map(_is_literal, options.values())):
        return False
    if not primitive.moving:  # also for a tracer whose tensors are of its own types
        types = (torch.Tensor, type(None))
        return torch.compiler.is_compiling() or any(type(value) not in types for value in inputs)
    x = inputs[0]
    if not torch.compiler.is_compiling() or not x.is_cpu:
        return False
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return False
    is_chosen = chosen_kernels() in ("auto", "numba")
    return is_chosen and softk_numba.computes(primitive, part, str(x.dtype).removeprefix("torch."))


def _is_literal(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_literal, value))
    return value is None or isinstance(value, (bool, int, float, str))


def compute(primitive: Primitive, part: Part, *groups: Any, **options: Any) -> tuple[Any, ...]:
    """What `Backend.run` returns, recorded as one operation."""
    inputs = groups[0]
    outputs, moved = groups[1:3] if part != "forward" else ((), ())
    needed = groups[3] if part == "vjp" else ()
    given = (list(group) for group in (inputs, outputs, moved, needed))
    found = iter(_operation(primitive.name, part, repr(options), *given))
    if part != "vjp":
        return tuple(found)
    return tuple(next(found) if is_given else None for is_given in _given(inputs, needed))


def _given(inputs: Inputs, needed: tuple[bool, ...] | list[bool]) -> list[bool]:
    """Which inputs get a cotangent."""
    return [is_needed and value is not None for value, is_needed in zip(inputs, needed, strict=True)]


def _compute(
    name: str, part: Part, options: str, inputs: Tensors, outputs: Tensors, moved: Tensors, needed: list[bool]
) -> list[torch.Tensor]:
    """The results, without those that are None. Each is contiguous, and shares its memory with no other tensor."""
    groups = {"forward": (), "jvp": (outputs, moved), "vjp": (outputs, moved, needed)}[part]
    found = Backend.run(_backend(), PRIMITIVES[name], part, tuple(inputs), *groups, **_options(options))
    taken = {value.data_ptr() for value in (*inputs, *outputs, *moved) if value is not None}
    results = []
    present = (value for value in found if value is not None)
    for value, form in zip(present, _forms(name, part, options, inputs, needed), strict=True):
        is_own = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
        if not is_own or value.shape != form.shape or value.data_ptr() in taken:
            value = value.expand(form.shape).clone(memory_format=torch.contiguous_format)
        taken.add(value.data_ptr())
        results.append(value)
    return results


def _empty(
    name: str, part: Part, options: str, inputs: list[Any], outputs: Any, moved: Any, needed: list[bool]
) -> list[torch.Tensor]:
    """Tensors of the shapes and dtypes of the results, for a compiler."""
    forms = _forms(name, part, options, inputs, needed)
    return [torch.empty(form.shape, dtype=form.dtype, device=inputs[0].device) for form in forms]


def _forms(name: str, part: Part, options: str, inputs: list[Any], needed: list[bool]) -> list[Form]:
    """The forms of the results."""
    if part == "vjp":
        pairs = zip(inputs, _given(tuple(inputs), needed), strict=True)
        return [Form(value.shape, value.dtype) for value, is_given in pairs if is_given]
    forms = list(PRIMITIVES[name].forms(_backend().xp, tuple(inputs), **_options(options)))
    return forms if part == "forward" else forms[: PRIMITIVES[name].moving]


@cache
def _options(text: str) -> dict[str, Any]:
    found: dict[str, Any] = literal_eval(text)
    return found


@cache
def _backend() -> Backend:
    found = ADAPTERS["torch"].load()
    assert found is not None
    return found


# By hand: the decorator `torch.library.custom_op` inspects every call, which takes longer than a small problem.
_library = torch.library.Library("softk", "DEF")
_library.define(
    "compute(str name, str part, str options, Tensor?[] inputs, Tensor?[] outputs, Tensor?[] moved, bool[] needed)"
    " -> Tensor[]",
    tags=[torch.Tag.pt2_compliant_tag],
)
_library.impl("compute", _compute, "CompositeExplicitAutograd")
torch.library.register_fake("softk::compute", _empty)
_operation = torch.ops.softk.compute.default
