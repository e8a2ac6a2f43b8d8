"""Identities of the operator, on problems that Hypothesis draws: it looks for the one that breaks them.

Tolerances follow from the two bounds, on the mass and on the mask, and from the rounding of one float (eps):
where two masks are compared, each may be MASK eps from the truth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import softk

#: The bounds in eps: of |sum mask - k| / max(1, k), and of a mask.
MASS, MASK = 16, 32
DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])


@dataclass(frozen=True)
class Problem:
    """One slice, in float64 but with values that the dtype under test holds exactly."""

    x: np.ndarray
    k: float
    epsilon: float
    weights: np.ndarray | None = None

    def arguments(self, dtype: str) -> tuple[Any, Any, dict[str, Any]]:
        items = {} if self.weights is None else {"weights": self.weights.astype(dtype)}
        return self.x.astype(dtype), np.asarray(self.k, dtype), {"epsilon": np.asarray(self.epsilon, dtype), **items}

    def mask(self, dtype: str) -> np.ndarray:
        """The mask, which must come in the dtype, as float64."""
        x, k, rest = self.arguments(dtype)
        mask = softk.topk(x, k, **rest)
        assert mask.dtype == dtype
        return mask.astype(np.float64)

    def threshold(self, dtype: str) -> float:
        x, k, rest = self.arguments(dtype)
        return float(softk.threshold(x, k, **rest))

    @property
    def masses(self) -> np.ndarray:
        return np.ones(self.x.shape) if self.weights is None else self.weights


#: Scores are multiples of this and at most 32, so ties are frequent, and sums with the offsets are exact in float32.
GRID = 2.0**-6
OFFSETS = (0.0, 1.0, -1024.0, 2.0**16)


@st.composite
def problems(draw: st.DrawFn, *, weighted: bool | None = False, least: int = 1) -> Problem:
    """n from 1 to 60, scores from all equal to all distinct, k whole or not, epsilon over seven orders of magnitude."""
    n = draw(st.integers(least, 60))
    levels = draw(st.sampled_from([1, 2, 5, 64, 2048]))
    places = npst.arrays(np.int64, n, elements=st.integers(0, levels - 1))
    x = GRID * draw(places).astype(np.float64) * draw(st.sampled_from([1, 2048 // levels]))
    x = x + draw(st.sampled_from(OFFSETS))
    # On a logarithmic scale, and with few enough digits that float32 holds it.
    epsilon = 20.0 * 2.0 ** (draw(st.integers(-24 * 4, 0)) / 4)
    weights = None
    if weighted or (weighted is None and draw(st.booleans())):
        weights = draw(npst.arrays(np.int64, n, elements=st.integers(0, 32))) / 8.0
    total = float(n if weights is None else weights.sum())
    assume(total > 0.0)
    whole = st.integers(0, math.floor(total)).map(float)
    eighths = st.integers(0, math.floor(8 * total)).map(lambda count: count / 8)
    near_the_ends = st.sampled_from([2.0**-12, total - 2.0**-12]).filter(lambda k: 0 <= k <= total)
    return Problem(x, draw(whole | eighths | near_the_ends), float(np.float32(epsilon)), weights)


def eps(dtype: str) -> float:
    return float(np.finfo(dtype).eps)


def assert_masks_agree(first: np.ndarray, second: np.ndarray, dtype: str) -> None:
    np.testing.assert_allclose(first, second, rtol=0, atol=2 * MASK * eps(dtype))


# --- the mask


@DTYPES
@given(problem=problems(weighted=None))
@example(problem=Problem(np.asarray([0.0, 1.0, 1.0]), 1.0, 1e-6))
def test_mass(dtype: str, problem: Problem) -> None:
    mask = problem.mask(dtype)
    error = math.fsum([*(problem.masses * mask), -problem.k])
    assert abs(error) <= MASS * eps(dtype) * max(1.0, problem.k)


@DTYPES
@given(
    x=npst.arrays(np.float32, st.integers(1, 60), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    share=st.floats(0.0, 1.0, width=32),
    epsilon=st.floats(2.0**-20, 32.0, width=32),
)
def test_mass_of_any_floats(dtype: str, x: np.ndarray, share: float, epsilon: float) -> None:
    """Scores of all magnitudes at once, subnormal ones too, and a k without a pattern."""
    problem = Problem(x.astype(np.float64), float(np.float32(share * x.size)), epsilon)
    mask = problem.mask(dtype)
    assert np.all((mask >= 0.0) & (mask <= 1.0))
    assert abs(math.fsum([*mask, -problem.k])) <= MASS * eps(dtype) * max(1.0, problem.k)


@DTYPES
@given(problem=problems(weighted=None))
def test_mask_is_from_0_to_1(dtype: str, problem: Problem) -> None:
    mask = problem.mask(dtype)
    assert np.all((mask >= 0.0) & (mask <= 1.0))
    if problem.k == 0.0:
        assert np.all(mask == 0.0)
    if problem.k == problem.masses.sum():
        assert np.all(mask == 1.0)


@DTYPES
@given(problem=problems(weighted=None))
def test_larger_score_has_the_larger_mask(dtype: str, problem: Problem) -> None:
    """Every step from the score to its mask is monotone, but for the rounding of the last: a sum and a quotient."""
    mask = problem.mask(dtype)[np.argsort(problem.x, stable=True)]
    assert np.all(mask[1:] >= mask[:-1] * (1.0 - 2 * eps(dtype)))


@DTYPES
@given(problem=problems(weighted=None))
def test_tied_scores_share(dtype: str, problem: Problem) -> None:
    """Equal scores have equal masks, and together what one item of their joint weight would have."""
    mask = problem.mask(dtype)
    values, group = np.unique(problem.x, return_inverse=True)
    joint = Problem(values, problem.k, problem.epsilon, np.bincount(group, problem.masses))
    for value in range(len(values)):
        same = mask[group == value]
        assert np.max(same) - np.min(same) <= 2 * eps(dtype) * np.max(same)
    assert_masks_agree(mask, joint.mask(dtype)[group], dtype)


@DTYPES
@given(problem=problems(weighted=None), data=st.data())
def test_permutation(dtype: str, problem: Problem, data: st.DataObject) -> None:
    order = np.asarray(data.draw(st.permutations(range(problem.x.size))))
    weights = None if problem.weights is None else problem.weights[order]
    moved = replace(problem, x=problem.x[order], weights=weights)
    assert_masks_agree(moved.mask(dtype), problem.mask(dtype)[order], dtype)


@DTYPES
@given(problem=problems(weighted=None), shift=st.integers(-(2**22), 2**22))
def test_shift(dtype: str, problem: Problem, shift: int) -> None:
    """The shift is exact: scores are below 2**17 in steps of GRID, and so are their sums."""
    moved = replace(problem, x=problem.x + GRID * shift)
    assert np.all(moved.x.astype(dtype) == moved.x)
    assert_masks_agree(moved.mask(dtype), problem.mask(dtype), dtype)


@DTYPES
@given(problem=problems(weighted=None), power=st.integers(-40, 40))
def test_scale(dtype: str, problem: Problem, power: int) -> None:
    """Of the scores and epsilon together; by a power of 2, which is exact."""
    scaled = replace(problem, x=problem.x * 2.0**power, epsilon=problem.epsilon * 2.0**power)
    assert_masks_agree(scaled.mask(dtype), problem.mask(dtype), dtype)


@DTYPES
@given(problem=problems(weighted=None), factor=st.integers(-20, 20).map(lambda power: 2.0**power))
def test_scale_of_weights(dtype: str, problem: Problem, factor: float) -> None:
    """Of the weights and k together."""
    weighted = replace(problem, weights=problem.masses)
    scaled = replace(problem, weights=factor * problem.masses, k=factor * problem.k)
    assert_masks_agree(scaled.mask(dtype), weighted.mask(dtype), dtype)


@DTYPES
@given(problem=problems(weighted=None))
def test_complement(dtype: str, problem: Problem) -> None:
    """What the k largest leave over is the n - k smallest."""
    rest = replace(problem, x=-problem.x, k=problem.masses.sum() - problem.k)
    assume(np.asarray(rest.k, dtype) == rest.k)
    assert_masks_agree(1.0 - rest.mask(dtype), problem.mask(dtype), dtype)


@DTYPES
@given(problem=problems(weighted=None))
def test_smallest(dtype: str, problem: Problem) -> None:
    x, k, rest = problem.arguments(dtype)
    np.testing.assert_array_equal(softk.topk(-x, k, mode="smallest", **rest), softk.topk(x, k, **rest))
    np.testing.assert_array_equal(softk.threshold(-x, k, mode="smallest", **rest), -softk.threshold(x, k, **rest))


@DTYPES
@given(problem=problems(weighted=None), data=st.data())
def test_removed_items_are_as_if_absent(dtype: str, problem: Problem, data: st.DataObject) -> None:
    kept = data.draw(npst.arrays(bool, problem.x.size).filter(np.any))
    x, k, rest = problem.arguments(dtype)
    left = problem.masses[kept].sum()
    mask = softk.topk(np.where(kept, x, np.asarray(np.nan, dtype)), k, where=kept, **rest).astype(np.float64)
    assert np.all(mask[~kept] == 0.0)
    weights = None if problem.weights is None else problem.weights[kept]
    if problem.k == 0.0:
        assert np.all(mask == 0.0)
    elif problem.k >= left:
        assert np.all(mask[kept] == 1.0)
    else:
        alone = Problem(problem.x[kept], problem.k, problem.epsilon, weights)
        assert_masks_agree(mask[kept], alone.mask(dtype), dtype)


@DTYPES
@given(problem=problems(), data=st.data())
def test_more_mass_is_more_for_everyone(dtype: str, problem: Problem, data: st.DataObject) -> None:
    """Masks grow with k: each is within MASK eps of one that does, strictly."""
    more = data.draw(st.integers(math.ceil(8 * problem.k), 8 * problem.x.size)) / 8
    least, most = problem.mask(dtype), replace(problem, k=more).mask(dtype)
    assert np.all(most >= least - 2 * MASK * eps(dtype))


# --- the derivative


@DTYPES
@given(problem=problems(weighted=None))
def test_jacobian_is_symmetric_and_kills_constants(dtype: str, problem: Problem) -> None:
    """diag(a) J is symmetric and J 1 = 0, J_ij = v_i (delta_ij - p_j) / tau.

    An entry is a few products of v and p, each rounded to eps, and at most max v / tau; p sums to 1 within n eps.
    """
    x, k, rest = problem.arguments(dtype)
    n = problem.x.size
    mask, pullback = softk.vjp(softk.topk, np.tile(x, (n, 1)), k, **rest)
    jacobian = pullback(np.eye(n, dtype=dtype))["x"].astype(np.float64)
    assert np.all(np.isfinite(jacobian))
    mask = mask.astype(np.float64)
    # v from the mask is good to eps where the mask is near 1; exactly there the derivative may be anything up to that.
    size = 2.0 / problem.epsilon * (np.max(mask * (1.0 - mask)) + 2 * eps(dtype))
    weighted = problem.masses[:, None] * jacobian
    assert np.max(np.abs(weighted - weighted.T)) <= 16 * eps(dtype) * size * np.max(problem.masses)
    assert np.max(np.abs(np.sum(jacobian, axis=-1))) <= (n + 16) * eps(dtype) * size


@DTYPES
@given(problem=problems(weighted=None))
def test_derivative_of_the_threshold_is_a_distribution(dtype: str, problem: Problem) -> None:
    """dt/dx = p, at least 0 and with sum 1, unless the threshold is infinite."""
    total = problem.masses.sum()
    assume(0.0 < problem.k < total)
    x, k, rest = problem.arguments(dtype)
    t, pullback = softk.vjp(softk.threshold, x, k, **rest)
    assert np.isfinite(t)
    p = pullback(np.ones_like(t))["x"].astype(np.float64)
    assert np.all(p >= 0.0)
    assert np.all(p[problem.masses == 0.0] == 0.0)
    assert abs(np.sum(p) - 1.0) <= (problem.x.size + 16) * eps(dtype)


@DTYPES
@given(problem=problems(weighted=None), data=st.data())
def test_pullback_is_the_transpose_of_the_pushforward(dtype: str, problem: Problem, data: st.DataObject) -> None:
    """<u, J dx> = <J^T u, dx>, in x and in k."""
    x, k, rest = problem.arguments(dtype)
    n = problem.x.size
    signs = npst.arrays(np.int8, n, elements=st.integers(-2, 2))
    u, dx = data.draw(signs).astype(dtype), data.draw(signs).astype(dtype)
    dk = np.ones_like(k)
    mask, pullback = softk.vjp(softk.topk, x, k, **rest)
    pulled = pullback(u)
    _, along_x = softk.jvp(softk.topk, x, k, tangents={"x": dx}, **rest)
    _, along_k = softk.jvp(softk.topk, x, k, tangents={"k": dk}, **rest)
    mask = mask.astype(np.float64)
    # Sums of n terms, each at most 4 max v / tau (4 max v / V <= 4 / max a for k, whose sum is at most 2 n / max a).
    size = 4.0 * n * 2.0 / problem.epsilon * (np.max(mask * (1.0 - mask)) + 2 * eps(dtype))
    first, second = u.astype(np.float64) @ along_x, pulled["x"].astype(np.float64) @ dx
    assert abs(first - second) <= (n + 16) * eps(dtype) * size
    per_k = np.sum(np.abs(u.astype(np.float64) * along_k))
    assert abs(u.astype(np.float64) @ along_k - pulled["k"]) <= (n + 16) * eps(dtype) * per_k


# --- threshold and quantile


@DTYPES
@given(problem=problems(weighted=None))
def test_threshold_is_where_the_mask_is_one_half(dtype: str, problem: Problem) -> None:
    """mask = sigmoid((x - t) / tau), as far as t can be told: rounded to eps |t|, it may be off by many tau."""
    assume(0.0 < problem.k < problem.masses.sum())
    t = problem.threshold(dtype)
    assert math.isfinite(t)
    z = 2.0 * (problem.x.astype(np.longdouble) - t) / problem.epsilon
    decay = np.exp(-np.abs(z))
    mask = np.where(z > 0, 1.0, decay) / (1.0 + decay)
    # t = r + tau s in two roundings; the mask's slope is at most 1/4 in z.
    tolerance = MASK * eps(dtype) + 2 * eps(dtype) * (abs(t) + np.max(np.abs(problem.x))) / (4 * problem.epsilon / 2)
    np.testing.assert_allclose(problem.mask(dtype), mask.astype(np.float64), rtol=0, atol=tolerance)


def quantile_tolerance(problem: Problem, dtype: str) -> float:
    """How far a quantile may be off.

    At a mass half-way between two counts V >= 1/4, so a mass wrong by MASS eps n moves the threshold by 4 MASS eps n
    tau. The place between two thresholds is rounded to eps n, which moves the result by that share of their distance,
    at most the range of the scores and 2 log(2 n) tau; and the result is rounded where the scores are.
    """
    n, tau = problem.x.size, problem.epsilon / 2
    return eps(dtype) * (
        4 * MASS * n * tau + n * (np.ptp(problem.x) + 2 * math.log(2 * n) * tau) + 4 * np.max(np.abs(problem.x))
    )


@DTYPES
@given(problem=problems(), levels=st.lists(st.floats(0.0, 1.0, width=32), min_size=2, max_size=8))
def test_quantile_grows_with_q(dtype: str, problem: Problem, levels: list[float]) -> None:
    x, _, rest = problem.arguments(dtype)
    found = softk.quantile(x, np.asarray(sorted(levels), dtype), **rest).astype(np.float64)
    assert np.all(np.diff(found) >= -2 * quantile_tolerance(problem, dtype))


@DTYPES
@given(problem=problems(), q=st.floats(0.0, 1.0, width=32))
def test_quantile_of_the_negated(dtype: str, problem: Problem, q: float) -> None:
    """Reflection: the quantile at q of x is minus the one at 1 - q of -x."""
    assume(np.asarray(1.0 - q, dtype) == 1.0 - q)
    x, _, rest = problem.arguments(dtype)
    found = softk.quantile(x, np.asarray(q, dtype), **rest) + softk.quantile(-x, np.asarray(1.0 - q, dtype), **rest)
    assert abs(float(found)) <= 2 * quantile_tolerance(problem, dtype)


@DTYPES
@given(problem=problems(), data=st.data())
def test_quantile_between_counts_is_a_threshold(dtype: str, problem: Problem, data: st.DataObject) -> None:
    """Where (n - 1) q = j is whole, the quantile is the threshold at k = n - j - 1/2."""
    n = problem.x.size
    j = data.draw(st.integers(0, n - 1))
    x, _, rest = problem.arguments(dtype)
    q = np.asarray(j / max(n - 1, 1), dtype)
    found = float(softk.quantile(x, q, **rest))
    expected = float(softk.threshold(x, np.asarray(n - j - 0.5, dtype), **rest))
    assert abs(found - expected) <= 2 * quantile_tolerance(problem, dtype)
