"""The largest weights by magnitude, inside a larger set of weights that have gradients, as primitives.

The inputs are the weights of m arrays (..., n_1), ..., (..., n_m), which may differ in their dtype. They are one slice
or m slices. In each slice, A is the set of the largest magnitudes, and B is a larger set. The sets are constants of
every derivative. They are those of the hard mask, whose exact selection does not depend on the temperature.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from softk.backend import Array, Backend, Form, Inputs, Primitive

from .masks import hard_mask

#: The sizes of A and B in every slice.
Counts = tuple[tuple[int, int], ...]

#: The temperature of the hard masks. Their values are the same for any other.
TEMPERATURE = 1.0


def _sets(backend: Backend, weights: tuple[Any, ...], counts: Counts, *, joint: bool) -> list[tuple[Array, Array]]:
    """The masks of A and of B for every array. A slice with a NaN has NaN masks."""
    if not joint:
        return [_masks(backend, (one,), *pair)[0] for one, pair in zip(weights, counts, strict=True)]
    return _masks(backend, weights, *counts[0])


def _masks(backend: Backend, parts: tuple[Any, ...], small: int, large: int) -> list[tuple[Array, Array]]:
    """The masks of the largest items of a slice, whose parts they are. Ties go to the first part and index."""
    xp, wide = backend.xp, _working(backend.xp, parts)
    # The magnitudes are copies of the weights anyway. Joined, they have the form that kernels support.
    magnitudes = [xp.abs(backend.constant(_cast(xp, part, wide))) for part in parts]
    joined = xp.concat(magnitudes, axis=-1) if len(parts) > 1 else magnitudes[0]
    masks = tuple(_largest(backend, joined, count) for count in (small, large))
    found, start = [], 0
    for part in parts:
        stop = start + part.shape[-1]
        found.append((masks[0][..., start:stop], masks[1][..., start:stop]))
        start = stop
    return found


def _largest(backend: Backend, x: Array, count: int) -> Array:
    if x.shape[-1] == 0:
        return x
    device = backend.device(x)
    k, tau = (backend.xp.full((), value, dtype=x.dtype, device=device) for value in (float(count), TEMPERATURE))
    ranks = count, count + 1  # exact where k is rounded to its dtype
    found: Array = backend.run(hard_mask, "forward", (x, k, tau, None, None), ranks=ranks)[0]
    return found


def _working(xp: Any, weights: tuple[Any, ...]) -> Any:
    """The widest dtype of the weights, float32 at least."""
    return xp.float64 if any(one.dtype == xp.float64 for one in weights) else xp.float32


# The functions without a cache are those that PyTorch's compiler can be told to call while it traces.


def masked(m: int, joint: bool) -> Primitive:
    """The masked weights of m arrays, which are one slice if they are joint."""
    return _masked(m, joint)


def penalty(m: int, joint: bool) -> Primitive:
    """The penalty of the weights of m arrays, which are one slice if they are joint."""
    return _penalty(m, joint)


@cache
def _masked(m: int, joint: bool) -> Primitive:
    """The weights of A, and 0 elsewhere. The derivative is that of the identity in B, and 0 elsewhere.

    The sets B are constants, from which the rules are built.
    """

    def forward(backend: Backend, inputs: tuple[Any, ...], *, counts: Counts) -> tuple[Array, ...]:
        xp = backend.xp
        values, kept = [], []
        for x, (small, large) in zip(inputs, _sets(backend, inputs, counts, joint=joint), strict=True):
            # The product is NaN in a slice with a NaN. It is not taken where it would be 0 times infinity.
            value = xp.where(small == 0.0, 0.0, _cast(xp, small, x.dtype) * x)
            if backend.differentiates_operations:
                # A weight of B outside A is 0 with a derivative of 1. The difference of infinities would be NaN.
                carried = (small == 0.0) & (large != 0.0) & (xp.abs(x) < math.inf)
                value = xp.where(carried, x - backend.constant(x), value)
            values.append(value)
            kept.append(large != 0.0)
        return *values, *kept

    def within(backend: Backend, inputs: Inputs, outputs: Inputs, rates: Inputs) -> tuple[Array, ...]:
        """The rates in B, and 0 elsewhere: a symmetric map, so its own transpose."""
        xp, sets = backend.xp, outputs[m:]
        return tuple(
            xp.zeros_like(x) if rate is None else xp.where(kept, rate, 0.0)
            for x, kept, rate in zip(inputs, sets, rates, strict=True)
        )

    def vjp(
        backend: Backend, inputs: Inputs, outputs: Inputs, cotangents: Inputs, needed: tuple[bool, ...]
    ) -> tuple[Array, ...]:
        return within(backend, inputs, outputs, cotangents)

    def forms(xp: Any, inputs: tuple[Any, ...], *, counts: Counts) -> tuple[Form, ...]:
        return *(Form(x.shape, x.dtype) for x in inputs), *(Form(x.shape, xp.bool) for x in inputs)

    return Primitive(
        f"masked_{m}_{'joint' if joint else 'apart'}",
        forward,
        forms,
        within,
        vjp,
        results=tuple(f"weights_{i}" for i in range(m)),
        constants=tuple(f"kept_{i}" for i in range(m)),
        narrow=True,
    )


@cache
def _penalty(m: int, joint: bool) -> Primitive:
    """The sum of c x**2 over all weights x, with c = 1 in A, 1 / D in the rest of B and 0 elsewhere.

    D is the share of A in its slice. The factors c are constants, from which the rules are built.
    """

    def forward(backend: Backend, inputs: tuple[Any, ...], *, counts: Counts) -> tuple[Array, ...]:
        xp, wide = backend.xp, _working(backend.xp, inputs)
        total = sum(x.shape[-1] for x in inputs)
        sizes = [total if joint else x.shape[-1] for x in inputs]
        rest = [size / pair[0] for size, pair in zip(sizes, counts * m if joint else counts, strict=True)]  # 1 / D
        factors = tuple(
            _cast(xp, small, wide) + factor * _cast(xp, large - small, wide)
            for (small, large), factor in zip(_sets(backend, inputs, counts, joint=joint), rest, strict=True)
        )
        return _weighted(backend, factors, inputs, inputs), *factors

    def jvp(backend: Backend, inputs: tuple[Any, ...], outputs: tuple[Any, ...], tangents: Inputs) -> tuple[Array, ...]:
        return (2.0 * _weighted(backend, outputs[1:], inputs, tangents),)

    def vjp(
        backend: Backend, inputs: tuple[Any, ...], outputs: Inputs, cotangents: Inputs, needed: tuple[bool, ...]
    ) -> Inputs:
        xp, u = backend.xp, cotangents[0]
        if u is None:
            return (None,) * m
        return tuple(
            _cast(xp, 2.0 * _product(xp, factor, x, u), x.dtype) for factor, x in zip(outputs[1:], inputs, strict=True)
        )

    def forms(xp: Any, inputs: tuple[Any, ...], *, counts: Counts) -> tuple[Form, ...]:
        wide = _working(xp, inputs)
        return Form((*inputs[0].shape[:-1], 1), wide), *(Form(x.shape, wide) for x in inputs)

    return Primitive(
        f"sparse_penalty_{m}_{'joint' if joint else 'apart'}",
        forward,
        forms,
        jvp,
        vjp,
        results=("penalty",),
        constants=tuple(f"factor_{i}" for i in range(m)),
        narrow=True,
    )


def _cast(xp: Any, values: Array, dtype: Any) -> Array:
    return values if values.dtype == dtype else xp.astype(values, dtype)


def _product(xp: Any, factor: Any, x: Any, rate: Any) -> Array:
    """factor * x * rate in the dtype of the factor, and 0 where the factor is 0 and x is infinite."""
    wide = factor.dtype
    return xp.where(factor == 0.0, 0.0, factor * _cast(xp, x, wide) * _cast(xp, rate, wide))


def _weighted(backend: Backend, factors: tuple[Any, ...], weights: tuple[Any, ...], rates: Inputs) -> Array:
    """The sum of factor * weight * rate over all items, shape (..., 1). A rate of None is zero."""
    xp, total = backend.xp, 0.0
    for factor, x, rate in zip(factors, weights, rates, strict=True):
        rate = xp.zeros_like(x) if rate is None else rate
        total = total + xp.sum(_product(xp, factor, x, rate), axis=-1, keepdims=True)
    return total
