"""The exact results of `sorted_topk`, `sort` and `rank`, computed without softk, and the errors of a candidate.

A slice of n scores, in descending order, is transported to m anchors of known masses. The logarithms of the shares of a
score at neighboring anchors differ by (score - threshold) / tau. The m - 1 thresholds are found by Newton's method on
the potentials of the anchors. The scores are processed in chunks, each with the anchors at which it has a share.
Neighboring anchors must share scores: epsilon is not too small for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from .cases import Case

CHECKED = 4
"""The number of slices of a case that are solved. The others of a candidate are not compared."""
CHUNK = 1000
NEGLIGIBLE = 1e-18
"""The largest share at the ends of the range of anchors of a chunk. Anchors beyond it are left out."""


class Truth(NamedTuple):
    """Of the slices that are checked."""

    values: np.ndarray  # (slices, results)
    gradient: np.ndarray  # of sum(u * values) with respect to the scores, (slices, n)
    hard: np.ndarray  # the result of the hard operator, as `values`


class Errors(NamedTuple):
    """The errors of a candidate. The first two are None if it solves another problem."""

    values: float | None  # the largest absolute error
    gradient: float | None  # the largest absolute error, relative to the largest entry of the derivative
    hard: float  # the largest distance to the result of the hard operator


class Chunk(NamedTuple):
    """Some scores, and their shares at a range of anchors."""

    scores: slice
    anchors: slice
    share: np.ndarray


class Plan:
    """The transport of one slice of scores, in descending order, to anchors in descending order."""

    def __init__(self, scores: np.ndarray, masses: np.ndarray, tau: float) -> None:
        self.scores, self.masses, self.tau = scores, masses, tau
        edges = np.cumsum(masses)[:-1]
        # Newton's method starts in the middles between the scores that the hard operator separates.
        self.thresholds = np.interp(edges - 0.5, np.arange(len(scores)), scores)
        self.error = self._solve()

    def _solve(self) -> float:
        """Newton's method, with shorter steps where a whole one increases the error. Returns the error."""
        chunks, missing = self._measured()
        for _ in range(60):
            step = np.append(np.linalg.solve(self.hessian(chunks)[:-1, :-1], missing[:-1]), 0.0)
            before, length, error = self.thresholds, 1.0, np.abs(missing).sum()
            while length > 1e-3:
                self.thresholds = before - self.tau * length * (step[:-1] - step[1:])
                chunks, missing = self._measured()
                if np.abs(missing).sum() < error:
                    break
                length /= 2
            else:  # nothing but rounding errors is left
                self.thresholds = before
                break
        return float(np.max(np.abs(self._measured()[1])))

    def _measured(self) -> tuple[list[Chunk], np.ndarray]:
        """The shares, and how much mass is missing at the anchors."""
        chunks, found = list(self.chunks()), np.zeros_like(self.masses)
        for chunk in chunks:
            found[chunk.anchors] += chunk.share.sum(axis=0)
        return chunks, self.masses - found

    def chunks(self) -> Iterator[Chunk]:
        """The shares of all scores."""
        n, m = len(self.scores), len(self.masses)
        for start in range(0, n, CHUNK):
            scores, pad = slice(start, min(n, start + CHUNK)), 16
            own = self.scores[scores]
            first, last = (int(np.count_nonzero(self.thresholds > score)) for score in (own[0], own[-1]))
            while True:
                anchors = slice(max(0, first - pad), min(m, last + pad + 1))
                share = self.shares(own, self.thresholds[anchors.start : anchors.stop - 1])
                above, below = share[:, 0].max(), share[:, -1].max()
                if (anchors.start == 0 or above < NEGLIGIBLE) and (anchors.stop == m or below < NEGLIGIBLE):
                    break
                pad *= 2
            yield Chunk(scores, anchors, share)

    def shares(self, scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        """The shares of scores at the anchors between and beside these thresholds."""
        logs = np.zeros((len(scores), len(thresholds) + 1))
        np.cumsum((thresholds - scores[:, None]) / self.tau, axis=1, out=logs[:, 1:])
        logs -= logs.max(axis=1, keepdims=True)
        share: np.ndarray = np.exp(logs)
        share /= share.sum(axis=1, keepdims=True)
        return share

    def hessian(self, chunks: list[Chunk]) -> np.ndarray:
        """The derivative of the masses with respect to the potentials. Its rows sum to 0."""
        matrix = np.zeros((len(self.masses), len(self.masses)))
        for _, anchors, share in chunks:
            matrix[anchors, anchors] -= share.T @ share
        np.fill_diagonal(matrix, 0.0)
        np.fill_diagonal(matrix, -matrix.sum(axis=1))
        return matrix


def solve(case: Case, x: np.ndarray, u: np.ndarray) -> Truth:
    """The exact results of the first slices, in float64, for the inputs as the candidates get them."""
    found = [_slice(case, *pair) for pair in zip(x[:CHECKED].astype(float), u[:CHECKED].astype(float), strict=True)]
    return Truth(*(np.stack(part) for part in zip(*found, strict=True)))


def _slice(case: Case, x: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, k = case.n, case.k
    order = np.argsort(-x, kind="stable")
    tau = float(np.dtype(case.dtype).type(case.epsilon)) / 2
    scores = x[order]
    if case.operator == "sorted_topk":
        plan = Plan(scores, np.append(np.ones(k), n - k)[:n], tau)  # for k = n there is no rest
    else:
        plan = Plan(scores, np.full(k, n / k), tau * k / n)
    if plan.error > 1e-9 * n / k:
        raise ArithmeticError(f"the exact solution of {case.label} misses a mass by {plan.error}")
    if case.operator == "rank":
        values, gradient = _ranks(plan, u[order]) if k == n else _interpolated_ranks(plan, u[order])
        hard = np.arange(n - 1.0, -1.0, -1.0)
        back = np.argsort(order)
        return values[back], gradient[back], hard[back]
    # The values of `sort` are in ascending order, those of `sorted_topk` in descending order.
    turn = slice(None) if case.operator == "sorted_topk" else slice(None, None, -1)
    values, gradient = _means(plan, k, u[:k][turn])
    hard = np.diff(np.interp(np.linspace(0, n, k + 1), np.arange(n + 1), np.append(0.0, np.cumsum(scores)))) * k / n
    hard = scores[:k] if case.operator == "sorted_topk" else hard
    return values[turn], gradient[np.argsort(order)], hard[turn]


def _means(plan: Plan, k: int, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean score of each of the first k anchors, and the derivative for the cotangent u."""
    weights = np.zeros_like(plan.masses)
    weights[:k] = u / plan.masses[:k]
    values = np.zeros_like(plan.masses)
    for scores, anchors, share in plan.chunks():
        values[anchors] += plan.scores[scores] @ share
    gradient = _through_the_plan(plan, lambda scores, anchors: np.outer(plan.scores[scores], weights[anchors]))
    for scores, anchors, share in plan.chunks():
        gradient[scores] += share @ weights[anchors]
    return (values / plan.masses)[:k], gradient


def _ranks(plan: Plan, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean rank of the anchors of each score, and the derivative for the cotangent u. There are n anchors."""
    height = np.arange(len(plan.masses) - 1.0, -1.0, -1.0)
    values = np.concatenate([share @ height[anchors] for _, anchors, share in plan.chunks()])
    return values, _through_the_plan(plan, lambda scores, anchors: np.outer(u[scores], height[anchors]))


def _interpolated_ranks(plan: Plan, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ranks by fewer anchors, linear between nodes, and the derivative for the cotangent u.

    The nodes are the outermost scores and the means of the anchors. The rank of a node is the mean of that of its
    anchors. No two scores are equal.
    """
    scores, n, k = plan.scores, len(plan.scores), len(plan.masses)
    means, _ = _means(plan, k, np.zeros(k))
    nodes = np.concatenate([scores[:1], means, scores[-1:]])
    share = plan.shares(nodes, plan.thresholds)
    height = np.tile(n - n / k * (np.arange(k) + 0.5) - 0.5, (k + 2, 1))
    height[0, 0] += (n / k - 1) / 2
    height[-1, -1] -= (n / k - 1) / 2
    ranks = np.sum(share * height, axis=1)
    first = np.searchsorted(-means, -scores)
    width = nodes[first] - nodes[first + 1]
    place, slope = (nodes[first] - scores) / width, (ranks[first + 1] - ranks[first]) / width
    values = (1 - place) * ranks[first] + place * ranks[first + 1]

    by_node, by_rank = np.zeros_like(nodes), np.zeros_like(nodes)
    for node, part in ((first, (1 - place) * u), (first + 1, place * u)):
        np.add.at(by_rank, node, part)
        np.add.at(by_node, node, slope * part)
    pulled = _centered(share, by_rank[:, None] * height)
    by_node += pulled @ (-np.arange(k) / plan.tau)
    gradient = _means(plan, k, by_node[1:-1])[1] - slope * u
    gradient[0] += by_node[0]
    gradient[-1] += by_node[-1]
    return values, gradient + _through_the_potentials(plan, list(plan.chunks()), pulled.sum(axis=0))


def _through_the_plan(plan: Plan, cotangent: Callable[[slice, slice], np.ndarray]) -> np.ndarray:
    """The derivative of sum(cotangent * share) with respect to the scores.

    A score adds to the logarithm of its share at anchor j, the first of which is 0, -j / tau times its change.
    """
    chunks = list(plan.chunks())
    place = -np.arange(len(plan.masses)) / plan.tau
    gradient, moved = np.zeros_like(plan.scores), np.zeros_like(plan.masses)
    for scores, anchors, share in chunks:
        pulled = _centered(share, cotangent(scores, anchors))
        gradient[scores] = pulled @ place[anchors]
        moved[anchors] += pulled.sum(axis=0)
    return gradient + _through_the_potentials(plan, chunks, moved)


def _through_the_potentials(plan: Plan, chunks: list[Chunk], moved: np.ndarray) -> np.ndarray:
    """The derivative with respect to the scores, given that with respect to the logarithms of the shares at an anchor.

    The potentials of the anchors change such that the masses stay the same.
    """
    gradient, place = np.zeros_like(plan.scores), -np.arange(len(plan.masses)) / plan.tau
    potentials = np.append(np.linalg.solve(plan.hessian(chunks)[:-1, :-1], moved[:-1]), 0.0)
    for scores, anchors, share in chunks:
        gradient[scores] = -_centered(share, place[None, anchors]) @ potentials[anchors]
    return gradient


def _centered(share: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The shares times the values minus their mean."""
    centered: np.ndarray = share * (values - np.sum(share * values, axis=1, keepdims=True))
    return centered


def errors(kind: str, values: np.ndarray, gradient: np.ndarray | None, truth: Truth) -> Errors:
    """The errors of a candidate. `kind` is "soft" if it solves the same problem."""
    values = values[: len(truth.values)]
    hard = float(np.max(np.abs(values - truth.hard)))
    if kind != "soft":
        return Errors(None, None, hard)
    wrong = float(np.max(np.abs(values - truth.values)))
    if gradient is None:
        return Errors(wrong, None, hard)
    apart = np.max(np.abs(gradient[: len(truth.values)] - truth.gradient))
    return Errors(wrong, float(apart / np.max(np.abs(truth.gradient))), hard)
