"""The operators as primitives: how each result follows from the threshold, and its derivative in both directions.

Inputs, in this order: scores x (..., n), mass k and temperature tau (..., 1) or (), item weights (..., n) or None, and
where (..., n) or None, the items that are not removed, which has no derivative.
The last two outputs of every primitive are the offset, which is differentiable, and the reference, which is a constant.
The rule is built from them, so that rules nest.
"""

from __future__ import annotations

import math
from typing import Any

from softk.backend import Array, Backend, Form, Inputs, Primitive, index_dtype

from .limits import clip, exponential, limits
from .merged import MergedLinearization
from .pieces import PieceBackend
from .problem import logits, selectable, sigmoid
from .rule import Linearization, LogLinearization
from .solve import solve

Arrays = tuple[Array, ...]
Needed = tuple[bool, ...]


def _linearize(backend: Backend, inputs: tuple[Any, ...], outputs: Arrays, *, balanced: bool = True) -> Linearization:
    """The rule. The mask's derivative in the scores alone does not need an accurate p in a gap."""
    *_, offset, reference = outputs
    return Linearization(backend, inputs, reference, offset, balanced=balanced)


def _pull(
    backend: Backend,
    inputs: tuple[Any, ...],
    outputs: Arrays,
    cotangents: tuple[Any, Any, Any],
    needed: Needed,
    *,
    balanced: bool,
) -> tuple[Array | None, ...]:
    """The cotangents of the inputs but `where`. Members of a group exchange a summary, not one sum after the other."""
    if isinstance(backend, PieceBackend) and backend.has_shards:
        *_, offset, reference = outputs
        rule: Linearization = MergedLinearization(backend, inputs, reference, offset, cotangents[0], balanced=balanced)
    else:
        rule = _linearize(backend, inputs, outputs, balanced=balanced)
    return rule.pull(*cotangents, needed)


# --- scores in float16 or bfloat16, which are computed in float32


def _widening(forward: Any, jvp: Any, vjp: Any) -> tuple[Any, Any, Any]:
    """The three functions of a primitive whose result has the scores' dtype, for scores narrower than k.

    The functions convert the scores themselves, so that a framework keeps the narrow scores for the derivative.
    """

    def convert(backend: Backend, values: Array | None, like: Any) -> Array | None:
        return values if values is None or values.dtype == like.dtype else backend.xp.astype(values, like.dtype)

    def widened_forward(backend: Backend, inputs: tuple[Any, ...], **options: Any) -> Arrays:
        x, k, *others = inputs
        found, *rest = forward(backend, (convert(backend, x, k), k, *others), **options)
        return convert(backend, found, x), *rest

    def widened_jvp(backend: Backend, inputs: Inputs, outputs: Arrays, tangents: Inputs) -> Arrays:
        (x, k, *others), (dx, *tangents_of_others) = inputs, tangents
        given = (convert(backend, x, k), k, *others), outputs, (convert(backend, dx, k), *tangents_of_others)
        found, *rest = jvp(backend, *given)
        return convert(backend, found, x), *rest

    def widened_vjp(backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: Needed) -> Inputs:
        (x, k, *others), (u, *cotangents_of_others) = inputs, cotangents
        given = (convert(backend, x, k), k, *others), outputs, (convert(backend, u, k), *cotangents_of_others)
        found, *rest = vjp(backend, *given, needed)
        return convert(backend, found, x), *rest

    return widened_forward, widened_jvp, widened_vjp


def _per_slice(inputs: tuple[Any, ...]) -> Form:
    x, k, *_ = inputs
    return Form((*x.shape[:-1], 1), k.dtype)


def _like_scores_forms(xp: Any, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> tuple[Form, ...]:
    x = inputs[0]
    return Form(x.shape, x.dtype), _per_slice(inputs), _per_slice(inputs)


def _like_scores(name: str, result: str, forward: Any, jvp: Any, vjp: Any) -> Primitive:
    """A primitive whose result has the shape and the dtype of the scores."""
    forward, jvp, vjp = _widening(forward, jvp, vjp)
    return Primitive(
        name,
        forward,
        _like_scores_forms,
        jvp,
        vjp,
        results=(result,),
        state=("offset",),
        constants=("reference",),
        narrow=True,
    )


# --- the mask: sigmoid((x - t) / tau)


def _mask_forward(backend: Backend, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> Arrays:
    x, k, tau, weights, where = inputs
    xp = backend.xp
    reference, offset, _ = solve(backend, x, k, tau, weights, where, ranks)
    z = logits(backend, selectable(xp, x, where), reference, tau, offset)
    return sigmoid(xp, z), offset, reference


def _mask_jvp(backend: Backend, inputs: Inputs, outputs: Arrays, tangents: Inputs) -> Arrays:
    balanced = any(tangent is not None for tangent in tangents[1:4])
    rule = _linearize(backend, inputs[:5], outputs, balanced=balanced)
    mask, offset, _ = rule.push(*tangents[:4])
    return mask, offset


def _mask_vjp(backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: Needed) -> Inputs:
    u, c = cotangents
    found = _pull(backend, inputs[:5], outputs, (u, c, None), needed, balanced=any(needed[1:4]))
    return (*found, *(None,) * (len(inputs) - len(found)))


mask = _like_scores("topk_mask", "mask", _mask_forward, _mask_jvp, _mask_vjp)


# --- the logarithm of the mask, accurate where the mask underflows or rounds to 1


def _log_forward(backend: Backend, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> Arrays:
    x, k, tau, weights, where = inputs
    xp = backend.xp
    x = selectable(xp, x, where)
    reference, offset, extreme = solve(backend, x, k, tau, weights, None, ranks)
    z = logits(backend, x, reference, tau, offset)
    # Without the clipping of z, which is for derivatives only.
    lower = xp.where(z < 0.0, (xp.minimum(x, limits(xp, x.dtype).largest) - reference) / tau - offset, 0.0)
    found = lower - xp.log1p(xp.exp(-xp.abs(z)))
    never = (x == -math.inf) | (k <= 0.0) | ((extreme == math.inf) & (x < math.inf))
    never = never & ~xp.isnan(offset)
    return xp.where(never, -math.inf, found), offset, reference


def _log_linearize(backend: Backend, inputs: tuple[Any, ...], outputs: Arrays) -> LogLinearization:
    *_, offset, reference = outputs
    return LogLinearization(backend, inputs, reference, offset)


def _log_jvp(backend: Backend, inputs: Inputs, outputs: Arrays, tangents: Inputs) -> Arrays:
    rule = _log_linearize(backend, inputs, outputs)
    found, offset, _ = rule.push(*tangents[:4])
    return found, offset


def _log_vjp(backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: Needed) -> Inputs:
    u, c = cotangents
    return (*_log_linearize(backend, inputs, outputs).pull(u, c, None, needed), None)


log_mask = _like_scores("topk_log_mask", "log_mask", _log_forward, _log_jvp, _log_vjp)


# --- the same at a threshold that is known, for rules: a framework differentiates its operations


def _log_at_forward(backend: Backend, inputs: tuple[Any, ...]) -> Arrays:
    x, k, tau, offset, reference = inputs
    xp = backend.xp
    z = logits(backend, x, reference, tau, offset)
    found = xp.where(z < 0.0, z, 0.0) - xp.log1p(exponential(xp, -xp.abs(z)))
    never = ((x == -math.inf) | (k <= 0.0)) & ~xp.isnan(offset)
    return (xp.where(never, -math.inf, found),)


def _log_at_forms(xp: Any, inputs: tuple[Any, ...]) -> tuple[Form, ...]:
    return (Form(inputs[0].shape, inputs[0].dtype),)


log_mask_at = Primitive("topk_log_mask_at", _log_at_forward, _log_at_forms, results=("log_mask",))


# --- the hard mask: k ones forward, the soft mask's derivative backward (a straight-through estimator)


def _hard_forward(backend: Backend, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> Arrays:
    x, k, tau, weights, where, *rest = inputs
    count = rest[0] if rest else None  # k as an integer, exact where k is rounded
    xp = backend.xp
    x = selectable(xp, x, where)
    reference, offset, _ = solve(backend, x, k, tau, weights, None, ranks)
    index = index_dtype(xp)
    whole = (k == xp.floor(k)) & ~xp.isnan(offset)
    wanted = xp.astype(xp.where(whole, k, 0.0), index)
    if ranks is not None:
        wanted = xp.full_like(wanted, ranks[0])  # exact where k is rounded to the scores' dtype
    if count is not None:
        wanted = xp.where(whole, count, 0)
    # The reference lies between the k largest scores and the others, or it is the k-th score if others equal it.
    # It is finite even if the k-th score is infinite.
    infinite = xp.count_nonzero(x == math.inf, axis=-1, keepdims=True)
    # In passes over chunks the solver has the exact k itself.
    is_exact = count is None or backend.is_split
    level = reference if is_exact else backend.select(x, clip(xp, wanted, 1, x.shape[-1]))
    level = xp.where((infinite >= wanted) & (infinite > 0), math.inf, level)
    above, tied = x > level, x == level
    # Of the scores equal to it, those with the lowest indices are chosen, as many as are still wanted.
    place = xp.cumulative_sum(xp.astype(tied, index), axis=-1)
    place = place + xp.count_nonzero(above, axis=-1, keepdims=True)
    chosen = (above | (tied & (place <= wanted))) & (x > -math.inf) & (wanted > 0)
    chosen = xp.where(whole, xp.astype(chosen, x.dtype), math.nan)
    # A framework that differentiates the operations themselves gets the derivative of the soft mask.
    soft = sigmoid(xp, logits(backend, x, reference, tau, offset))
    return chosen + (soft - backend.constant(soft)), offset, reference


hard_mask = _like_scores("topk_hard_mask", "mask", _hard_forward, _mask_jvp, _mask_vjp)


# --- the mask of no scores at all, which is constant


def _empty_forward(backend: Backend, inputs: Inputs) -> Arrays:
    return (backend.xp.zeros_like(inputs[0]),)


def _empty_jvp(backend: Backend, inputs: Inputs, outputs: Arrays, tangents: Inputs) -> Arrays:
    return (backend.xp.zeros_like(inputs[0]),)


def _empty_vjp(backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: Needed) -> Inputs:
    return (*(None if value is None else backend.xp.zeros_like(value) for value in inputs[:4]), None)


def _empty_forms(xp: Any, inputs: tuple[Any, ...]) -> tuple[Form, ...]:
    return (Form(inputs[0].shape, inputs[0].dtype),)


empty_mask = Primitive(
    "empty_mask", _empty_forward, _empty_forms, _empty_jvp, _empty_vjp, results=("mask",), narrow=True
)


# --- the threshold: t = r + tau s


def threshold_forward(backend: Backend, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> Arrays:
    x, k, tau, weights, where = inputs
    reference, offset, extreme = solve(backend, x, k, tau, weights, where, ranks)
    return reference + tau * offset + extreme, offset, reference


def _threshold_forms(xp: Any, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> tuple[Form, ...]:
    return (_per_slice(inputs),) * 3


def _threshold_jvp(backend: Backend, inputs: Inputs, outputs: Arrays, tangents: Inputs) -> Arrays:
    rule = _linearize(backend, inputs, outputs)
    _, offset, threshold = rule.push(*tangents[:-1])
    return threshold, offset


def _threshold_vjp(backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: Needed) -> Inputs:
    b, c = cotangents
    return (*_pull(backend, inputs, outputs, (None, c, b), needed, balanced=True), None)


threshold = Primitive(
    "topk_threshold",
    threshold_forward,
    _threshold_forms,
    _threshold_jvp,
    _threshold_vjp,
    results=("threshold",),
    state=("offset",),
    constants=("reference",),
)
