"""The quantile: linear interpolation between the thresholds at two neighboring half-integer masses.

Inputs, in this order: scores x (..., n), the probability q and temperature tau (..., 1) or (), item weights (..., n) or
None, and where (..., n) or None. The last outputs are the offsets of both thresholds and their references.
"""

from __future__ import annotations

import math
from typing import Any

from softk.backend import Array, Backend, Form, Inputs, Primitive

from .limits import clip
from .masks import threshold, threshold_forward
from .problem import total

Arrays = tuple[Array, ...]
Needed = tuple[bool, ...]


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
            # The position (n - 1) q depends on q only if there is more than one observation. So several items whose
            # weights sum to 1 or less have no quantiles. The sum of probabilities is 1 up to a rounding per item.
            sampled = (n - 1.0 > float(xp.finfo(q.dtype).eps) * items) | ((n > 0.0) & (items == 1.0))
        position = (n - 1.0) * q
        index = clip(xp, xp.floor(position), 0.0, xp.maximum(xp.ceil(n) - 2.0, 0.0))
        margin = 0.5 * xp.minimum(n, 1.0)
        self.n = n
        self.first = clip(xp, n - index - 0.5, margin, n - margin)
        self.second = clip(xp, n - index - 1.5, margin, n - margin)
        # Their derivatives in n: 1, except where they are clipped to the margin.
        held = xp.where(n < 1.0, 0.5, xp.zeros_like(n))
        self.first_rate = xp.where(n - index - 0.5 >= margin, 1.0, held)
        self.second_rate = xp.where(n - index - 1.5 >= margin, 1.0, held)
        self.fraction = xp.where((q >= 0.0) & (q <= 1.0) & sampled, xp.maximum(position - index, 0.0), math.nan)


def _quantile_forward(backend: Backend, inputs: tuple[Any, ...]) -> Arrays:
    x, q, tau, weights, where = inputs
    xp = backend.xp
    place = _Place(xp, x, q, weights, where)
    one, first, first_reference = threshold_forward(backend, (x, place.first, tau, weights, where), ranks=None)
    two, second, second_reference = threshold_forward(backend, (x, place.second, tau, weights, where), ranks=None)
    value = (1.0 - place.fraction) * one + place.fraction * two
    value = xp.where(place.fraction == 0.0, one, xp.where(place.fraction == 1.0, two, value))  # not 0 * inf
    return value, first, second, first_reference, second_reference


class _Bounds:
    """The thresholds at both masses: their place, the arguments of their rule, and their distance.

    The rule is that of the primitive `threshold`, so kernels serve it.
    """

    def __init__(self, backend: Backend, inputs: Inputs, outputs: Arrays) -> None:
        x, q, tau, weights, where = inputs
        _, first, second, first_reference, second_reference = outputs
        self.place = place = _Place(backend.xp, x, q, weights, where)
        self.one = (x, place.first, tau, weights, where), (None, first, first_reference)
        self.two = (x, place.second, tau, weights, where), (None, second, second_reference)
        self.apart = (second_reference - first_reference) + tau * (second - first)


def _quantile_jvp(backend: Backend, inputs: Inputs, outputs: Arrays, tangents: Inputs) -> Arrays:
    dx, dq, dtau, da, _ = tangents
    q, where = inputs[1], inputs[4]
    bounds = _Bounds(backend, inputs, outputs)
    place, apart = bounds.place, bounds.apart
    dn = None if da is None else total(backend.xp, da if where is None else backend.xp.where(where, da, 0.0))

    def push(bound: tuple[Inputs, Inputs], rate: Array) -> Arrays:
        return backend.run(threshold, "jvp", *bound, (dx, None if dn is None else rate * dn, dtau, da, None))

    one, first = push(bounds.one, place.first_rate)
    two, second = push(bounds.two, place.second_rate)
    value = one + place.fraction * (two - one)
    if dq is not None:
        value = value + apart * (place.n - 1.0) * dq
    if dn is not None:
        value = value + apart * q * dn
    return value, first, second


def _quantile_vjp(backend: Backend, inputs: Inputs, outputs: Arrays, cotangents: Inputs, needed: Needed) -> Inputs:
    b, first_bar, second_bar = cotangents
    bounds = _Bounds(backend, inputs, outputs)
    place, apart = bounds.place, bounds.apart
    if b is None:
        b = backend.xp.zeros_like(apart)
    of_x, of_q, of_tau, of_a, _ = needed
    asked = (of_x, of_a, of_tau, of_a, False)

    def pull(bound: tuple[Inputs, Inputs], share: Array, offset_bar: Array | None) -> Inputs:
        return backend.run(threshold, "vjp", *bound, (share * b, offset_bar), asked)

    xbar, nbar, taubar, abar, _ = pull(bounds.one, 1.0 - place.fraction, first_bar)
    xbar_two, nbar_two, taubar_two, abar_two, _ = pull(bounds.two, place.fraction, second_bar)
    if abar is not None and abar_two is not None:
        abar = abar + abar_two + (place.first_rate * nbar + place.second_rate * nbar_two + inputs[1] * apart * b)
        if inputs[4] is not None:
            abar = backend.xp.where(inputs[4], abar, 0.0)
    return _sum(xbar, xbar_two), (place.n - 1.0) * apart * b if of_q else None, _sum(taubar, taubar_two), abar, None


def _sum(one: Array | None, two: Array | None) -> Array | None:
    return None if one is None or two is None else one + two


def _quantile_forms(xp: Any, inputs: tuple[Any, ...]) -> tuple[Form, ...]:
    x, q, *_ = inputs
    return (Form((*x.shape[:-1], 1), q.dtype),) * 5


quantile = Primitive(
    "soft_quantile",
    _quantile_forward,
    _quantile_forms,
    _quantile_jvp,
    _quantile_vjp,
    results=("quantile",),
    state=("first_offset", "second_offset"),
    constants=("first_reference", "second_reference"),
)
