"""The operators as primitives: what each one reads off the solved threshold, and its derivative in both directions.

Inputs, in this order: scores x (..., n), mass k and temperature tau (..., 1) or (), item weights (..., n) or None, and
where (..., n) or None, the items that are not removed, which has no derivative.
Every primitive ends its outputs with the offset, which is differentiable and from which its rule is built, so that
rules nest, and the reference, which is a constant.
"""

from __future__ import annotations

import math
from typing import Any

from ._rule import Linearisation, LogLinearisation
from ._solver import between, limits, logits, selectable, solve
from .backend import Array, Backend, Inputs, Primitive

Arrays = tuple[Array, ...]
Needed = tuple[bool, ...]


def _linearise(backend: Backend, inputs: tuple[Any, ...], outputs: Arrays, *, balanced: bool = True) -> Linearisation:
    """The rule; the mask's needs no balance where only the derivative in the scores is asked for."""
    *_, offset, reference = outputs
    return Linearisation(backend, inputs, reference, offset, balanced=balanced)


# --- scores narrower than what is computed in


def _widening(forward: Any, jvp: Any, vjp: Any) -> tuple[Any, Any, Any]:
    """The three functions of a primitive whose result is like the scores, for scores narrower than k.

    They are converted within, so that what is kept for the derivative is no larger than the scores.
    """

    def convert(backend: Backend, values: Array | None, like: Any) -> Array | None:
        return values if values is None or values.dtype == like.dtype else backend.xp.astype(values, like.dtype)

    def widened_forward(backend: Backend, x: Array, k: Array, *others: Array | None, **options: Any) -> Arrays:
        found, *rest = forward(backend, convert(backend, x, k), k, *others, **options)
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


# --- the mask: sigmoid((x - t) / tau)


def _mask_forward(
    backend: Backend,
    x: Array,
    k: Array,
    tau: Array,
    weights: Array | None,
    where: Array | None,
    *,
    ranks: tuple[int, ...] | None,
) -> Arrays:
    reference, offset, _ = solve(backend, x, k, tau, weights, where, ranks)
    z = logits(backend, selectable(backend.xp, x, where), reference, tau, offset)
    return backend.sigmoid(z), offset, reference


def _mask_jvp(backend: Backend, inputs: Inputs, outputs: Arrays, tangents: Inputs) -> Arrays:
    balanced = any(tangent is not None for tangent in tangents[1:4])
    rule = _linearise(backend, inputs[:5], outputs, balanced=balanced)
    mask, offset, _ = rule.push(*tangents[:4])
    return mask, offset


def _mask_vjp(backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: Needed) -> Inputs:
    u, c = cotangents
    found = _linearise(backend, inputs[:5], outputs, balanced=any(needed[1:4])).pull(u, c, None, needed)
    return (*found, *(None,) * (len(inputs) - len(found)))


mask = Primitive("topk_mask", *_widening(_mask_forward, _mask_jvp, _mask_vjp), constants=1, narrow=True)


# --- the logarithm of the mask: it neither underflows nor rounds to 0 before the mask does


def _log_forward(
    backend: Backend,
    x: Array,
    k: Array,
    tau: Array,
    weights: Array | None,
    where: Array | None,
    *,
    ranks: tuple[int, ...] | None,
) -> Arrays:
    xp = backend.xp
    x = selectable(xp, x, where)
    reference, offset, extreme = solve(backend, x, k, tau, weights, None, ranks)
    z = logits(backend, x, reference, tau, offset)
    # As far below as it is, and not only as far as a derivative sees.
    lower = xp.where(z < 0.0, (xp.minimum(x, limits(xp, x.dtype).largest) - reference) / tau - offset, 0.0)
    found = lower - xp.log1p(xp.exp(-xp.abs(z)))
    never = (x == -math.inf) | (k <= 0.0) | ((extreme == math.inf) & (x < math.inf))
    never = never & ~xp.isnan(offset)
    return xp.where(never, -math.inf, found), offset, reference


def _log_linearise(backend: Backend, inputs: tuple[Any, ...], outputs: Arrays) -> LogLinearisation:
    *_, offset, reference = outputs
    return LogLinearisation(backend, inputs, reference, offset)


def _log_jvp(backend: Backend, inputs: Inputs, outputs: Arrays, tangents: Inputs) -> Arrays:
    rule = _log_linearise(backend, inputs, outputs)
    found, offset, _ = rule.push(*tangents[:-1])
    return found, offset


def _log_vjp(backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: Needed) -> Inputs:
    u, c = cotangents
    return (*_log_linearise(backend, inputs, outputs).pull(u, c, None, needed), None)


log_mask = Primitive("topk_log_mask", *_widening(_log_forward, _log_jvp, _log_vjp), constants=1, narrow=True)


# --- the hard mask: k ones forward, the soft mask's derivative backward (a straight-through estimator)


def _hard_forward(
    backend: Backend,
    x: Array,
    k: Array,
    tau: Array,
    weights: Array | None,
    where: Array | None,
    count: Array | None = None,
    *,
    ranks: tuple[int, ...] | None,
) -> Arrays:
    """`count` is an integer of which k has a rounding."""
    xp = backend.xp
    x = selectable(xp, x, where)
    reference, offset, _ = solve(backend, x, k, tau, weights, None, ranks)
    whole = (k == xp.floor(k)) & ~xp.isnan(offset)
    wanted = xp.astype(xp.where(whole, k, 0.0), backend.index)
    if ranks is not None:
        wanted = xp.full_like(wanted, ranks[0])  # of which the scores' dtype may have a rounding
    if count is not None:
        wanted = xp.where(whole, count, 0)
    # The reference separates the k largest scores from the others, or is the score that both sides share; an infinite
    # score has a finite stand-in.
    infinite = xp.count_nonzero(x == math.inf, axis=-1, keepdims=True)
    level = reference if count is None else backend.order_statistics(x, between(xp, wanted, 1, x.shape[-1]))
    level = xp.where((infinite >= wanted) & (infinite > 0), math.inf, level)
    above, tied = x > level, x == level
    # Of the scores equal to it, as many as are still wanted, the lowest indices first.
    place = xp.cumulative_sum(xp.astype(tied, backend.index), axis=-1)
    place = place + xp.count_nonzero(above, axis=-1, keepdims=True)
    chosen = (above | (tied & (place <= wanted))) & (x > -math.inf) & (wanted > 0)
    chosen = xp.where(whole, xp.astype(chosen, x.dtype), math.nan)
    # Where a framework differentiates the operations themselves, they are those of the soft mask.
    soft = backend.sigmoid(logits(backend, x, reference, tau, offset))
    return chosen + (soft - backend.constant(soft)), offset, reference


hard_mask = Primitive("topk_hard_mask", *_widening(_hard_forward, _mask_jvp, _mask_vjp), constants=1, narrow=True)


# --- the mask of no scores at all: nothing to solve, and nothing depends on anything


def _empty_forward(backend: Backend, x: Array, *_: Array | None) -> Arrays:
    return (backend.xp.zeros_like(x),)


def _empty_jvp(backend: Backend, inputs: Inputs, outputs: Arrays, tangents: Inputs) -> Arrays:
    return (backend.xp.zeros_like(inputs[0]),)


def _empty_vjp(backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: Needed) -> Inputs:
    return (*(None if value is None else backend.xp.zeros_like(value) for value in inputs[:4]), None)


empty_mask = Primitive("empty_mask", _empty_forward, _empty_jvp, _empty_vjp, narrow=True)


# --- the threshold: t = r + tau s


def _threshold_forward(
    backend: Backend,
    x: Array,
    k: Array,
    tau: Array,
    weights: Array | None,
    where: Array | None,
    *,
    ranks: tuple[int, ...] | None,
) -> Arrays:
    reference, offset, extreme = solve(backend, x, k, tau, weights, where, ranks)
    return reference + tau * offset + extreme, offset, reference


def _threshold_jvp(backend: Backend, inputs: Inputs, outputs: Arrays, tangents: Inputs) -> Arrays:
    rule = _linearise(backend, inputs, outputs)
    _, offset, threshold = rule.push(*tangents[:-1])
    return threshold, offset


def _threshold_vjp(backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: Needed) -> Inputs:
    b, c = cotangents
    return (*_linearise(backend, inputs, outputs).pull(None, c, b, needed), None)


threshold = Primitive("topk_threshold", _threshold_forward, _threshold_jvp, _threshold_vjp, constants=1)


# --- the quantile: linear interpolation between the thresholds of two neighbouring ranks, half-way between their counts


class _Place:
    """Where the quantile q lies among n weighted scores: between the thresholds at `first` and at `second`."""

    def __init__(self, xp: Any, x: Array, q: Array, weights: Array | None, where: Array | None) -> None:
        if weights is None:
            n = xp.full_like(q, x.shape[-1])
            if where is not None:
                n = n - xp.astype(xp.count_nonzero(~where, axis=-1, keepdims=True), q.dtype)
            sampled = n > 0.0
        else:
            counted = weights if where is None else xp.where(where, weights, 0.0)
            n = xp.sum(xp.where(counted >= 0.0, counted, math.nan), axis=-1, keepdims=True)
            items = xp.astype(xp.count_nonzero(counted > 0.0, axis=-1, keepdims=True), q.dtype)
            # The place (n - 1) q tells no q from another unless there is more than one observation: several items that
            # are one together, or less, have no quantiles. Probabilities sum to 1 but for a rounding an item.
            sampled = (n - 1.0 > float(xp.finfo(q.dtype).eps) * items) | ((n > 0.0) & (items == 1.0))
        position = (n - 1.0) * q
        index = between(xp, xp.floor(position), 0.0, xp.maximum(xp.ceil(n) - 2.0, 0.0))
        margin = 0.5 * xp.minimum(n, 1.0)
        self.n = n
        self.first = between(xp, n - index - 0.5, margin, n - margin)
        self.second = between(xp, n - index - 1.5, margin, n - margin)
        # Both follow n, but where they are held at the margin.
        held = xp.where(n < 1.0, 0.5, xp.zeros_like(n))
        self.first_rate = xp.where(n - index - 0.5 >= margin, 1.0, held)
        self.second_rate = xp.where(n - index - 1.5 >= margin, 1.0, held)
        self.fraction = xp.where((q >= 0.0) & (q <= 1.0) & sampled, xp.maximum(position - index, 0.0), math.nan)


def _quantile_forward(
    backend: Backend, x: Array, q: Array, tau: Array, weights: Array | None, where: Array | None
) -> Arrays:
    xp = backend.xp
    place = _Place(xp, x, q, weights, where)
    one, first, first_reference = _threshold_forward(backend, x, place.first, tau, weights, where, ranks=None)
    two, second, second_reference = _threshold_forward(backend, x, place.second, tau, weights, where, ranks=None)
    value = (1.0 - place.fraction) * one + place.fraction * two
    value = xp.where(place.fraction == 0.0, one, xp.where(place.fraction == 1.0, two, value))  # no 0 * inf
    return value, first, second, first_reference, second_reference


def _quantile_parts(
    backend: Backend, inputs: Inputs, outputs: Arrays
) -> tuple[_Place, Linearisation, Linearisation, Array]:
    x, q, tau, weights, where = inputs
    _, first, second, first_reference, second_reference = outputs
    place = _Place(backend.xp, x, q, weights, where)
    one = Linearisation(backend, (x, place.first, tau, weights, where), first_reference, first)
    two = Linearisation(backend, (x, place.second, tau, weights, where), second_reference, second)
    apart = (second_reference - first_reference) + tau * (second - first)
    return place, one, two, apart


def _quantile_jvp(backend: Backend, inputs: Inputs, outputs: Arrays, tangents: Inputs) -> Arrays:
    dx, dq, dtau, da, _ = tangents
    q, where = inputs[1], inputs[4]
    place, one, two, apart = _quantile_parts(backend, inputs, outputs)
    dn = None if da is None else one.total(da if where is None else backend.xp.where(where, da, 0.0))
    _, first, one_push = one.push(dx, None if dn is None else place.first_rate * dn, dtau, da)
    _, second, two_push = two.push(dx, None if dn is None else place.second_rate * dn, dtau, da)
    value = one_push + place.fraction * (two_push - one_push)
    if dq is not None:
        value = value + apart * (place.n - 1.0) * dq
    if dn is not None:
        value = value + apart * q * dn
    return value, first, second


def _quantile_vjp(backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: Needed) -> Inputs:
    b, first_bar, second_bar = cotangents
    place, one, two, apart = _quantile_parts(backend, inputs, outputs)
    if b is None:
        b = backend.xp.zeros_like(apart)
    of_x, of_q, of_tau, of_a, _ = needed
    asked = (of_x, of_a, of_tau, of_a)
    pulled = [
        one.pull(None, first_bar, (1.0 - place.fraction) * b, asked),
        two.pull(None, second_bar, place.fraction * b, asked),
    ]
    (xbar, nbar, taubar, abar), (xbar_two, nbar_two, taubar_two, abar_two) = pulled
    if abar is not None and abar_two is not None:
        abar = abar + abar_two + (place.first_rate * nbar + place.second_rate * nbar_two + inputs[1] * apart * b)
        if inputs[4] is not None:
            abar = backend.xp.where(inputs[4], abar, 0.0)
    return _sum(xbar, xbar_two), (place.n - 1.0) * apart * b if of_q else None, _sum(taubar, taubar_two), abar, None


def _sum(one: Array | None, two: Array | None) -> Array | None:
    return None if one is None or two is None else one + two


quantile = Primitive("soft_quantile", _quantile_forward, _quantile_jvp, _quantile_vjp, constants=2)
