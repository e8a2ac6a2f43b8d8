r"""Selection by counting: the scores on either side of a threshold, from sums over the items alone.

A score is found digit by digit. The floating-point numbers are numbered in their order, and every pass counts the
scores that are at least as large as each of a few candidates. The candidate with the right count gives the next digit.
A pass needs no order of the scores and no copy of them, so it works where they lie in several arrays or processes. With
weights, the weight of these scores takes the place of their number.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from softk.backend import Array, index_dtype

if TYPE_CHECKING:
    from .pieces import PieceBackend, Pieces

#: The bits that a pass after the first one finds. The first pass finds those that remain.
DIGIT = 3
#: The same by the bits of the dtype, where a pass sends messages: then eleven passes find a score of either dtype.
DIGIT_OF_SHARDS = {32: 3, 64: 6}


def edges_by_counting(
    backend: PieceBackend | Any, x: Pieces | Any, weights: Pieces | Any | None, least: Array, most: Array
) -> tuple[Array, Array, Array]:
    """The largest score v with mass(x >= v) >= least, the largest one with mass(x >= v) > most, -inf if there is none,
    and the mass of all items, without those that are NaN.

    Parameters
    ----------
    backend : PieceBackend
        The reductions over the items.
    x : Pieces
        Scores, shape (..., n).
    weights : Pieces or None
        The weights that the mass of some scores is the sum of. None counts the scores.
    least, most : array
        Shape (..., 1): integers without weights.
    """
    xp, bits = backend.xp, backend.xp.finfo(x.dtype).bits
    index = index_dtype(xp)
    digit = DIGIT_OF_SHARDS[bits] if backend.has_shards else DIGIT
    first = bits - digit * ((bits - 1) // digit)  # 2 of 32 bits, 4 of 64

    # The first digit has a sign, so the candidates of the first pass are multiples of its place on both sides of 0.
    start = xp.astype(xp.zeros_like(least + most), index)
    places, half = digit * ((bits - 1) // digit), 1 << (first - 1)
    candidates = [(j - half) << places for j in range(1, 1 << first)]
    pivots = number_of(xp, xp.concat([start + one for one in candidates], axis=-1), x.dtype)
    found = backend.masses(x, xp.concat([pivots, xp.full_like(pivots[..., :1], -math.inf)], axis=-1), weights)
    everything = found[..., -1:]
    base = start + -(2 ** (bits - 1))
    reached = everything if weights is None else xp.zeros_like(everything) + math.inf
    for i, one in enumerate(candidates):
        accepted = found[..., i : i + 1] >= least
        base, reached = xp.where(accepted, one, base), xp.where(accepted, found[..., i : i + 1], reached)

    def step(state: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array, Array], Array]:
        base, reached, unit = state  # the unit is the place of the digit
        pivots = xp.concat([base + unit * j for j in range(1, 1 << digit)], axis=-1)
        found = backend.masses(x, number_of(xp, pivots, x.dtype), weights)
        # The mass falls with the pivot, so the first pivots are accepted, and the last of them has the smallest mass.
        accepted = found >= least
        base = base + unit * xp.astype(xp.count_nonzero(accepted, axis=-1, keepdims=True), index)
        smallest = xp.where(accepted, found, xp.maximum(found, reached))
        reached = xp.minimum(xp.min(smallest, axis=-1, keepdims=True), reached)
        # Where the mass is right the gap is found, although its edge is not known to the last digit.
        return (base, reached, xp.maximum(unit >> digit, 1)), (reached >= least) & (reached <= most)

    unit = start + (1 << (places - digit))
    base, reached, _ = backend.repeat(step, (base, reached, unit), places // digit)
    level = number_of(xp, base, x.dtype)
    above, below = backend.extremes(xp.where(x >= level, x, math.inf), xp.where(x >= level, -math.inf, x))
    return above, xp.where(reached > most, above, below), everything


def number_of(xp: Any, ordinal: Array, dtype: Any) -> Array:
    """The floating-point number of an ordinal: 0 for 0, the next larger number for the next larger ordinal.

    Ordinals beyond those of the infinities are clipped to them. The result is a product of exact powers of two.
    """
    bits = xp.finfo(dtype).bits
    mantissa, bias = (23, 127) if bits == 32 else (52, 1023)
    infinity = (2 * bias + 1) << mantissa
    size = xp.abs(xp.maximum(xp.minimum(ordinal, infinity), -infinity))
    exponent, fraction = size >> mantissa, size & ((1 << mantissa) - 1)
    number = xp.astype(xp.where(exponent == 0, fraction, fraction + (1 << mantissa)), dtype)
    power = xp.maximum(exponent, 1) - (bias + mantissa)
    far = xp.abs(power)
    for place in range(11 if bits == 64 else 8):
        factor = 2.0 ** (2 ** max(place - 1, 0))
        factors = xp.where(power < 0, xp.full_like(number, 1.0 / factor), factor)
        factors = xp.where((far >> place) & 1 == 1, factors, 1.0)
        # Twice the root: the power of the last place may lie outside the normal numbers.
        number = number * factors if place == 0 else number * factors * factors
    number = xp.where(size >= infinity, math.inf, number)
    return xp.where(ordinal < 0, -number, number)
