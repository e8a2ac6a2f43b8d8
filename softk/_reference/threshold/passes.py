r"""The solver in a few passes over the items, for slices whose items are held one chunk at a time.

A pass computes a short summary of every chunk, joins the summaries, and draws a conclusion that the next pass starts
from. There are two passes, and a third one in float64.

**The bracket.** A chunk of m scores is sorted, and every s-th of them is kept, s = sqrt(m / 2). If j of the kept scores
are at least v, then between s j and s j + s - 1 scores of the chunk are. The sums of these bounds over all chunks
bracket every rank: the score of rank r is at least v if the lower bound reaches r, and at most v if fewer than r scores
can be larger. Between the two ends of the bracket there are at most twice as many scores as were kept.

**The digest.** The scores within the bracket are gathered: the scores on either side of the threshold are among them.
On each side of the bracket, items matter as far as `_reach` says. They are few, or they are summed up in bins of width
h = 1/16 of a temperature. Each bin is replaced by two items with the same number, mean, variance and third moment:
the quadrature of Gauss. A sigmoid changes by a factor of exp(h) at most within a bin, and the relative error of its sum
is h^4 / 4320 = 4e-9 at most. The bins of several chunks are joined in the same way, so a digest does not grow. Digests
are of one side of the gap each, so wide gaps stay empty. The ordinary solver finds the threshold of the digest, in
float64.

**The correction.** In float64 the last step of Newton's method is made with the tails of all items. Its error is the
square of 4e-9.

This holds for any batch, k, temperature and ties. NaN makes a slice NaN. Item weights are not supported.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from softk.backend import Array, Backend, index_dtype

from .ends import Ends, Gap, middle, narrow_gap, reference_of
from .formulas import formulas_of
from .limits import MARGIN, clip, limits
from .newton import Tails, search, sweep
from .problem import logits, selectable
from .solve import usable
from .window import gather

__all__ = ["Problem", "passes"]

#: The width of a bin, in units of tau.
WIDTH = 1.0 / 16.0
#: A digest with more items than this on one side of the bracket is summed up in bins.
MOST_ITEMS = 1 << 13
#: A chunk is digested in blocks of so many items, which bounds the memory of intermediate arrays.
BLOCK = 1 << 17


class Problem(NamedTuple):
    """One chunk of the items of a batch of slices, or none, and what holds for the whole slices."""

    x: Array | None  # scores (..., m)
    where: Array | None
    k: Array  # mass (..., 1) or (), in the working dtype
    tau: Array
    whole: Array | None  # k as an integer, exact where k is rounded
    ranks: tuple[int, ...] | None  # ceil(k) and floor(k) + 1 where k is a Python number
    n: int  # the number of items of all chunks

    def scores(self, backend: Backend) -> Array:
        """The scores in the working dtype, -inf for items that are removed."""
        xp = backend.xp
        x: Any = self.x
        x = x if x.dtype == self.k.dtype else xp.astype(x, self.k.dtype)
        return selectable(xp, x, self.where)


class Ranks(NamedTuple):
    """The ranks of the scores on either side of the threshold, and k in float64: each (..., 1) or ()."""

    first: Array
    last: Array
    mass: Array


def _ranks(backend: Backend, problem: Problem) -> Ranks:
    xp = backend.xp
    index = index_dtype(xp)
    _, _, k = usable(xp, problem.tau, problem.k)
    mass = xp.astype(k, xp.float64)
    mass = xp.where((mass >= 0.0) & (mass <= float(problem.n)), mass, 0.0)
    first, last = xp.astype(xp.ceil(mass), index), xp.astype(xp.floor(mass), index) + 1
    if problem.ranks is not None:
        first, last = xp.full_like(first, problem.ranks[0]), xp.full_like(last, problem.ranks[1])
    elif problem.whole is not None:
        first = clip(xp, xp.astype(problem.whole, index), 0, problem.n)
        last = first + 1
    mass = xp.where(last > first, xp.astype(first, xp.float64), mass)
    return Ranks(xp.where(first < 1, 1, first), last, mass)


class Bracket(NamedTuple):
    """What the first pass concludes, per slice: (..., 1)."""

    low: Array  # a score that is not above those on either side of the threshold; -inf if there is none
    high: Array  # one that is not below them; +inf
    below: Array  # how far below the bracket items matter, in units of tau, in float64
    above: Array


class Solved(NamedTuple):
    """What the second pass concludes: the outputs of the solver, in their order."""

    reference: Array
    offset: Array
    high: Array
    low: Array
    nothing: Array
    everything: Array
    settled: Array
    infinite: Array


# --- the first pass


class Sketch(NamedTuple):
    """Scores in descending order per chunk, each of which stands for some scores of its chunk."""

    scores: Array  # (..., q)
    strides: tuple[tuple[int, int], ...]  # pairs of a number of scores, and how many of the chunk each stands for
    slack: int  # how many scores of all chunks come after the last one that is kept before them, at most


class Bracketing:
    """The pass that brackets the scores on either side of the threshold."""

    def part(self, backend: Backend, problem: Problem, state: None) -> Sketch:
        xp, x = backend.xp, problem.scores(backend)
        stride = max(math.isqrt(x.shape[-1] // 2), 1)
        ordered = xp.sort(xp.where(xp.isnan(x), -math.inf, x), axis=-1, descending=True, stable=False)
        kept = ordered[..., stride - 1 :: stride]
        return Sketch(xp.asarray(kept, copy=True), ((kept.shape[-1], stride),), stride - 1)

    def join(self, backend: Backend, parts: list[Sketch]) -> Sketch:
        return Sketch(
            backend.xp.concat([part.scores for part in parts], axis=-1),
            tuple(pair for part in parts for pair in part.strides),
            sum(part.slack for part in parts),
        )

    def conclude(self, backend: Backend, problem: Problem, state: None, sketch: Sketch) -> Bracket:
        xp, index = backend.xp, index_dtype(backend.xp)
        ranks = _ranks(backend, problem)
        order = xp.argsort(sketch.scores, axis=-1, descending=True, stable=False)
        scores = xp.take_along_axis(sketch.scores, order, axis=-1)
        strides = xp.concat([xp.full((count,), stride, dtype=index) for count, stride in sketch.strides])
        each = xp.reshape(xp.take(strides, xp.reshape(order, (-1,))), order.shape)
        # At least so many scores are not below this one. Of equal scores the last has the largest number, and the first
        # the smallest number before it.
        up_to = xp.cumulative_sum(each, axis=-1)
        reached = xp.count_nonzero(up_to < ranks.last, axis=-1, keepdims=True)
        before = xp.count_nonzero(up_to - each + sketch.slack < ranks.first, axis=-1, keepdims=True)
        last = scores.shape[-1] - 1
        low = xp.take_along_axis(scores, xp.where(reached > last, last, reached), axis=-1)
        high = xp.take_along_axis(scores, xp.where(before > 0, before - 1, 0), axis=-1)
        low, high = xp.where(reached > last, -math.inf, low), xp.where(before > 0, high, math.inf)
        below, above = self._reach(backend, problem, ranks)
        zero = xp.zeros_like(xp.astype(low, xp.float64), dtype=xp.float64)
        return Bracket(low, high, below + zero, above + zero)

    @staticmethod
    def _reach(backend: Backend, problem: Problem, ranks: Ranks) -> tuple[Array, Array]:
        """How far from the scores on either side of the threshold items matter, in units of tau.

        The items that are not below the lower score are floor(k) + 1. If they alone have the mass k, the threshold is
        log((floor(k) + 1) / (floor(k) + 1 - k)) below that score. It cannot be lower. So much farther away than
        log(n / eps), n items change neither the mass nor the tails by a rounding. The other side is the same.
        """
        xp, n = backend.xp, problem.n
        last, first = xp.astype(ranks.last, xp.float64), xp.astype(ranks.first, xp.float64)
        under, over = last - ranks.mass, ranks.mass - (first - 1.0)
        under, over = xp.where(under > 0.0, under, 1.0), xp.where(over > 0.0, over, 1.0)  # where k is invalid, or 0
        far = math.log(n / limits(xp, problem.k.dtype).eps) + MARGIN
        return far + 2.0 * xp.log(last / under), far + 2.0 * xp.log((n - first + 1.0) / over)


# --- the second pass


class Side(NamedTuple):
    """Items on one side of the bracket, in float64: how far they are from it, in units of tau, and how many each is."""

    distance: Array  # (..., m)
    number: Array  # 0 for an entry that is no item
    reach: Array  # how far away items matter, (..., 1)


class Digest(NamedTuple):
    """The items that matter, and how many there are in all."""

    inside: Array  # the scores within the bracket, then -inf
    lower: Side
    upper: Side
    reached: Array  # how many scores are not below the bracket
    beyond: Array  # how many of them are too far above it to matter
    bad: Array  # how many are NaN


class Digesting:
    """The pass that finds the threshold, from the items near it."""

    def part(self, backend: Backend, problem: Problem, bracket: Bracket) -> Digest:
        x = problem.scores(backend)
        rows = math.prod(x.shape[:-1])
        size = max(BLOCK // max(rows, 1), 1)
        blocks = [x[..., start : start + size] for start in range(0, max(x.shape[-1], 1), size)]
        return self.join(backend, [self._of_block(backend, block, problem, bracket) for block in blocks])

    def _of_block(self, backend: Backend, x: Array, problem: Problem, bracket: Bracket) -> Digest:
        xp = backend.xp
        largest = limits(xp, x.dtype).largest
        _, tau, _ = usable(xp, problem.tau, problem.k)
        is_high, is_low = x >= bracket.high, (x <= bracket.low) & (x < bracket.high) & (x >= -largest)
        wide = xp.astype(xp.minimum(x, largest), xp.float64)
        tau = xp.astype(tau, xp.float64)
        upper = logits(backend, wide, _finite(backend, bracket.high), tau)
        lower = -logits(backend, wide, _finite(backend, bracket.low), tau)
        is_near_high, is_near_low = is_high & (upper <= bracket.above), is_low & (lower <= bracket.below)

        def side(distance: Array, chosen: Array, reach: Array) -> Side:
            found, is_filled = gather(xp, distance, chosen, _count(xp, chosen))
            return Side(xp.where(is_filled, found, 0.0), xp.astype(is_filled, xp.float64), reach)

        is_inside = (x > bracket.low) & (x < bracket.high)
        inside, is_filled = gather(xp, x, is_inside, _count(xp, is_inside))
        found = Digest(
            xp.where(is_filled, inside, -math.inf),
            side(lower, is_near_low, bracket.below),
            side(upper, is_near_high, bracket.above),
            _count(xp, is_high),
            _count(xp, is_high & ~is_near_high),
            _count(xp, xp.isnan(x)),
        )
        return self.join(backend, [found])

    def join(self, backend: Backend, parts: list[Digest]) -> Digest:
        xp = backend.xp

        def joined(sides: list[Side]) -> Side:
            distances = xp.concat([side.distance for side in sides], axis=-1)
            whole = Side(distances, xp.concat([side.number for side in sides], axis=-1), sides[0].reach)
            return _summed_up(backend, whole) if distances.shape[-1] > MOST_ITEMS else whole

        return Digest(
            xp.concat([part.inside for part in parts], axis=-1),
            joined([part.lower for part in parts]),
            joined([part.upper for part in parts]),
            *(sum(counts) for counts in zip(*(part[3:] for part in parts), strict=True)),
        )

    def conclude(self, backend: Backend, problem: Problem, bracket: Bracket, digest: Digest) -> Solved:
        xp = backend.xp
        _, tau, k = usable(xp, problem.tau, problem.k)
        ranks, largest = _ranks(backend, problem), limits(xp, k.dtype).largest
        ordered = xp.sort(digest.inside, axis=-1, descending=True, stable=False)
        high, low = (self._score(backend, rank, bracket, digest, ordered) for rank in (ranks.first, ranks.last))
        zero = xp.zeros_like(high)
        tau, k = tau + zero, k + zero
        nothing = k <= 0.0
        everything = ~nothing & (low < -largest)
        ends = Ends(high, low, nothing, everything, (k >= 0.0) & (k <= problem.n) & (digest.bad == 0))
        reference, gap = reference_of(backend, ends, tau)
        farthest = limits(xp, k.dtype).farthest

        def z(values: Array) -> Array:
            distance = (_finite(backend, values) - xp.astype(reference, xp.float64)) / xp.astype(tau, xp.float64)
            return clip(xp, distance, -farthest, farthest)

        items = xp.concat(
            [z(bracket.high) + digest.upper.distance, z(digest.inside), z(bracket.low) - digest.lower.distance], axis=-1
        )
        is_inside = xp.astype(digest.inside >= -largest, xp.float64)
        numbers = xp.concat([digest.upper.number, is_inside, digest.lower.number], axis=-1)
        wide = Gap(*(xp.astype(value, xp.float64) for value in gap))
        odds, half = narrow_gap(backend, items, wide)
        rest = ranks.mass - xp.astype(digest.beyond, xp.float64)
        offset, tails = search(backend, odds, half, rest, numbers, nothing | everything)
        settled = ends.valid & ~xp.isnan(tails.lower)
        offset = xp.astype(offset + middle(wide), k.dtype)
        return Solved(reference, offset, *gap, nothing, everything, settled, high > largest)

    @staticmethod
    def _score(backend: Backend, rank: Array, bracket: Bracket, digest: Digest, ordered: Array) -> Array:
        """The score of a rank, from the scores within the bracket in descending order."""
        xp = backend.xp
        place = rank - digest.reached
        items = _count(xp, ordered > -math.inf)
        inner = xp.take_along_axis(ordered, clip(xp, place - 1, 0, ordered.shape[-1] - 1), axis=-1)
        return xp.where(place < 1, bracket.high, xp.where(place > items, bracket.low, inner))


def _finite(backend: Backend, values: Array) -> Array:
    """The scores in float64; infinite ones count as the largest number of their dtype."""
    xp = backend.xp
    largest = limits(xp, values.dtype).largest
    return xp.astype(clip(xp, values, -largest, largest), xp.float64)


def _count(xp: Any, chosen: Array) -> Array:
    return xp.count_nonzero(chosen, axis=-1, keepdims=True)


def _summed_up(backend: Backend, side: Side) -> Side:
    """Two items per bin, in the place of many."""
    xp = backend.xp
    bins = int(xp.max(side.reach) / WIDTH) + 1
    *batch, n = side.distance.shape
    rows = math.prod(batch)
    place = xp.minimum(xp.floor(side.distance / WIDTH), bins - 1.0)
    inner = side.distance / WIDTH - place  # where in its bin an item lies, from 0 to 1
    # NumPy sorts short integers in linear time, by a stable method only.
    order = xp.argsort(xp.astype(place, xp.uint16 if bins < 1 << 16 else xp.int64), axis=-1, stable=True)
    place, inner, number = (xp.take_along_axis(values, order, axis=-1) for values in (place, inner, side.number))
    first = xp.reshape(xp.arange(rows) * bins, (rows, 1))
    segments = xp.reshape(xp.reshape(xp.astype(place, first.dtype), (rows, n)) + first, (1, rows * n))

    def moment(values: Array) -> Array:
        return backend.reduce_segments(xp.reshape(values, (1, rows * n)), "sum", segments, rows * bins)

    total = moment(number)
    mean, second, third = (moment(number * inner**power) / xp.where(total > 0.0, total, 1.0) for power in (1, 2, 3))
    # The two roots t of t^2 - skewness t - 1, times the deviation, are the distances of the two items from the mean.
    variance = xp.maximum(second - mean * mean, 0.0)
    deviation = xp.sqrt(variance)
    skewness = third - 3.0 * mean * second + 2.0 * mean * mean * mean
    # In a bin of equal items the skewness is a rounding, and does not matter.
    skewness = xp.where(variance > 1e-8, skewness / xp.maximum(variance * deviation, 1e-12), 0.0)
    root = 0.5 * xp.abs(skewness) + xp.sqrt(1.0 + 0.25 * skewness * skewness)  # the larger one
    farther = xp.where(skewness < 0.0, -root, root)
    few = total / (1.0 + root * root)
    places = [clip(xp, mean + step * deviation, 0.0, 1.0) for step in (farther, -1.0 / farther)]
    start = xp.astype(xp.arange(rows * bins) % bins, xp.float64)
    found = [xp.reshape((start + one) * WIDTH, (*batch, bins)) for one in places]
    numbers = [xp.reshape(one, (*batch, bins)) for one in (few, total - few)]
    return Side(xp.concat(found, axis=-1), xp.concat(numbers, axis=-1), side.reach)


# --- the third pass


class Correcting:
    """The pass that makes the last step of Newton's method with all items."""

    def part(self, backend: Backend, problem: Problem, solved: Solved) -> Tails:
        xp, x = backend.xp, problem.scores(backend)
        _, tau, _ = usable(xp, problem.tau, problem.k)
        gap = Gap(solved.high, solved.low)
        odds, _ = narrow_gap(backend, logits(backend, x, solved.reference, tau), gap)
        return sweep(backend, odds, xp.exp(solved.offset - middle(gap)), None)

    def join(self, backend: Backend, parts: list[Tails]) -> Tails:
        return Tails(*(sum(values) for values in zip(*parts, strict=True)))

    def conclude(self, backend: Backend, problem: Problem, solved: Solved, tails: Tails) -> Solved:
        xp = backend.xp
        eps, smallest = limits(xp, problem.k.dtype).eps, float(xp.finfo(problem.k.dtype).smallest_normal)
        delta = _ranks(backend, problem).mass - tails.above
        size = formulas_of(backend).step_size(tails.lower, tails.upper, tails.slope, delta, eps, smallest)
        is_fixed = solved.nothing | solved.everything | ~solved.settled
        return solved._replace(offset=xp.where(is_fixed, solved.offset, solved.offset + size))


def passes(bits: int) -> tuple[Any, ...]:
    """The passes for a working dtype of so many bits.

    Each has three functions: ``part(backend, problem, state)`` of a chunk, ``join(backend, parts)`` of some parts, and
    ``conclude(backend, problem, state, whole)`` of the join of all. The state is what the pass before concluded.
    """
    return (Bracketing(), Digesting()) if bits <= 32 else (Bracketing(), Digesting(), Correcting())
