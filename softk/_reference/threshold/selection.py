"""The hard top-k with soft gates: the k largest scores, their indices, and their entries of the soft mask.

The mask is a primitive of its own, which a kernel may compute. The rest is linear: entries of an array are gathered,
and their cotangents are scattered.
"""

from __future__ import annotations

from typing import Any

from softk.backend import Array, Backend, Form, Inputs, Primitive, index_dtype

from .masks import mask

Arrays = tuple[Array, ...]


def _of_mask(outputs: Inputs) -> Inputs:
    """The outputs of the mask, which its rule is built from, among those of the selection."""
    _, _, offset, _, reference = outputs
    return None, offset, reference


def _forward(backend: Backend, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None, count: int) -> Arrays:
    found, offset, reference = backend.run(mask, "forward", inputs, ranks=ranks)
    values, indices = backend.top_k(inputs[0], count)
    gates = backend.xp.take_along_axis(found, indices, axis=-1)
    return values, gates, offset, indices, reference


def _jvp(backend: Backend, inputs: Inputs, outputs: Inputs, tangents: Inputs) -> Arrays:
    xp, dx, indices = backend.xp, tangents[0], outputs[3]
    found, offset = backend.run(mask, "jvp", inputs, _of_mask(outputs), tangents)
    gates = xp.take_along_axis(found, indices, axis=-1)
    values = xp.zeros_like(gates) if dx is None else xp.take_along_axis(dx, indices, axis=-1)
    return values, gates, offset


def _vjp(backend: Backend, inputs: Inputs, outputs: Inputs, cotangents: Inputs, needed: tuple[bool, ...]) -> Inputs:
    xp, (of_values, of_gates, of_offset) = backend.xp, cotangents
    x: Any = inputs[0]

    def put(values: Array | None) -> Array | None:
        return None if values is None else backend.scatter(values, outputs[3], x.shape[-1])

    found, *others = backend.run(mask, "vjp", inputs, _of_mask(outputs), (put(of_gates), of_offset), needed)
    values = put(of_values)
    if found is not None and values is not None:
        found = found + (values if values.dtype == found.dtype else xp.astype(values, found.dtype))
    return found, *others


def _forms(xp: Any, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None, count: int) -> tuple[Form, ...]:
    x, k, *_ = inputs
    shape = (*x.shape[:-1], count)
    number = Form((*x.shape[:-1], 1), k.dtype)
    return Form(shape, x.dtype), Form(shape, x.dtype), number, Form(shape, index_dtype(xp)), number


selection = Primitive(
    "topk_selection",
    _forward,
    _forms,
    _jvp,
    _vjp,
    results=("values", "gates"),
    state=("offset",),
    constants=("indices", "reference"),
    narrow=True,
)
