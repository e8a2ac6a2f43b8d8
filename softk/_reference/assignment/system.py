"""A balanced assignment in canonical form, the plan for given potentials, and the Laplacian of its column sums."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from softk._reference.plan.linear import solve_definite
from softk._reference.threshold.limits import clip, limits, safe_denominator
from softk.backend import Array, Backend

#: How many items are added one after the other.
BLOCK = 64


class Problem(NamedTuple):
    """An assignment in canonical form: one row per item, one column per group."""

    scores: Array  # (..., B, K), 0 for pairs that are forbidden
    allowed: Array  # (..., B, K)
    masses: Array  # c (..., 1, K), 0 for the groups that take nothing
    weights: Array  # a (..., B, 1), 0 for the items that no group may take
    epsilon: Array  # (..., 1, 1)


class Shares(NamedTuple):
    """The plan without the weights, for given potentials."""

    apart: Array  # the exponents at an offset of 0, measured from the largest of each item (..., B, K)
    share: Array  # P (..., B, K)
    best: Array  # the group of the largest share of each item (..., B, 1)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum of two numbers, and its rounding error (Knuth)."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def shares(backend: Backend, problem: Problem, reference: Array, offset: Array) -> Shares:
    """The shares of the groups in each item, for reference and offset of shape (..., 1, K)."""
    xp = backend.xp
    allowed = problem.allowed
    total, lost = two_sum(problem.scores, reference)
    lost = backend.constant(lost)
    largest = xp.argmax(xp.where(allowed, total, -math.inf), axis=-1, keepdims=True)
    apart = (total - at(xp, total, largest)) + (lost - at(xp, lost, largest))
    farthest = limits(xp, total.dtype).farthest
    # A forbidden pair counts as 0, so its exponent may be above the largest of the others, and overflow.
    apart = xp.where(allowed, clip(xp, apart / problem.epsilon, -farthest, farthest), 0.0)
    exponent = xp.where(allowed, apart + offset, -math.inf)
    top = xp.max(exponent, axis=-1, keepdims=True)
    share = xp.exp(exponent - backend.constant(xp.where(top == -math.inf, 0.0, top)))
    share = share / safe_denominator(xp, xp.sum(share, axis=-1, keepdims=True))
    return Shares(apart, share, xp.argmax(share, axis=-1, keepdims=True))


def at(xp: Any, values: Array, group: Array) -> Array:
    """The value of each item at one group, shape (..., B, 1)."""
    return xp.take_along_axis(values, group, axis=-1)


def column(xp: Any, values: Array) -> Array:
    """The sum over the items, shape (..., 1, K).

    Libraries add along this axis one after the other, and the rounding errors of many items add up. The sums of blocks
    are therefore added.
    """
    *batch, items, groups = values.shape
    if items <= 2 * BLOCK:
        return xp.sum(values, axis=-2, keepdims=True)
    whole = items - items % BLOCK
    blocks = xp.reshape(values[..., :whole, :], (*batch, whole // BLOCK, BLOCK, groups))
    rest = xp.sum(values[..., whole:, :], axis=-2, keepdims=True)
    return column(xp, xp.sum(blocks, axis=-2)) + rest


def group_index(backend: Backend, share: Array, dtype: Any = None) -> Array:
    """The numbers of the groups, of as many axes as the shares."""
    groups = share.shape[-1]
    index = backend.xp.arange(groups, dtype=dtype, device=backend.device(share))
    return backend.xp.reshape(index, (*(1,) * (share.ndim - 1), groups))


def excess(backend: Backend, found: Shares, problem: Problem) -> Array:
    """The excess sum_i a_i P_ij - c_j (..., 1, K), without cancellation.

    An item counts for the group of its largest share. Its other shares are the tails, which move to their groups.
    """
    xp, weights = backend.xp, problem.weights
    own = found.best == group_index(backend, found.share, found.best.dtype)
    low = xp.where(own, 0.0, found.share)
    tails = xp.where(own, -xp.sum(low, axis=-1, keepdims=True), found.share)
    delta = column(xp, xp.where(own, weights, 0.0)) - problem.masses
    rounding = 4.0 * limits(xp, delta.dtype).eps * problem.masses
    delta = delta - backend.constant(xp.where(xp.abs(delta) <= rounding, delta, 0.0))
    return column(xp, weights * tails) + delta


class Laplacian:
    """The derivative of the column sums in the offset, and the solution of systems with it.

    Its null space is a common change of all offsets. The matrix gets d d^T / sum(d) in addition, with its diagonal d,
    which makes it definite and does not change the differences of a solution.
    """

    def __init__(self, backend: Backend, share: Array, weights: Array) -> None:
        self.backend, xp = backend, backend.xp
        index = group_index(backend, share)
        apart = xp.matrix_transpose(index) != index
        links = xp.matmul(xp.matrix_transpose(weights * share), share)
        links = xp.where(apart, links, 0.0)
        size = xp.sum(links, axis=-1, keepdims=True)
        part = size / safe_denominator(xp, xp.sum(size, axis=-2, keepdims=True))
        self.matrix = xp.where(apart, -links, size) + size * xp.matrix_transpose(part)

    def solve(self, wanted: Array) -> Array:
        """The change of the offsets (..., 1, K) that changes the column sums by `wanted`, whose sum is 0."""
        xp = self.backend.xp
        return xp.matrix_transpose(solve_definite(self.backend, self.matrix, xp.matrix_transpose(wanted)))


def step(backend: Backend, found: Shares, problem: Problem) -> tuple[Array, Array]:
    """Newton's step of the offsets, and the excess that it removes."""
    surplus = excess(backend, found, problem)
    return Laplacian(backend, found.share, problem.weights).solve(-surplus), surplus
