"""NumPy: softk's operators that sort, and Sinkhorn's algorithm from a good start."""

from __future__ import annotations

from typing import Any

import numpy as np

import softk

from .candidates import MOST_ITERATIONS, SETTLED, Candidate, Prepared, few
from .cases import Case
from .sorting import SORTING, by_softk, softk_of


def _softk(case: Case, x: np.ndarray, u: np.ndarray) -> Prepared:
    f, options = softk_of(case)

    def both() -> tuple[np.ndarray, np.ndarray]:
        found, pullback = softk.vjp(f, x, **options)
        if case.operator == "sorted_topk":
            return found.values, pullback((u[..., : case.k], None))["x"]
        return found, pullback(u[..., : found.shape[-1]])["x"]

    return Prepared(lambda: by_softk(case, x), both, np.asarray)


def _sinkhorn(case: Case, x: np.ndarray, u: np.ndarray) -> Prepared:
    """The iteration until it settles, then the implicit derivative."""

    def both() -> tuple[np.ndarray, np.ndarray]:
        shares, masses, heights = settled(case, x)
        values = values_of(case, x, shares, masses, heights)
        return values, pulled(case, x, u[..., : values.shape[-1]], shares, masses, heights)

    return Prepared(lambda: values_of(case, x, *settled(case, x)), both, np.asarray)


def settled(case: Case, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The shares (rows, n, m) of the scores at the anchors, from the highest, their masses, and their heights.

    The iteration starts at the potentials of the hard operator, as NeuralSort does, and stops when the factors of the
    anchors change only by rounding, or at the limit of iterations. It multiplies by one matrix of exponentials.
    """
    n, k, number = case.n, case.k, x.dtype.type
    if case.operator == "sorted_topk":
        masses = np.append(np.ones(k, x.dtype), number(n - k))[:n]  # for k = n there is no rest
        heights = np.arange(k, -1, -1, dtype=x.dtype)[:n]
    else:
        masses, heights = np.full(k, n / k, x.dtype), np.linspace(n - 1, 0, k, dtype=x.dtype)
    tau = case.epsilon / 2 / (heights[0] - heights[1])
    places = np.cumsum(masses.astype(float))[:-1] - 0.5
    ordered = -np.sort(-x, axis=-1)
    starts = np.stack([np.interp(places, np.arange(n), row) for row in ordered]).astype(x.dtype)
    logs = np.zeros((*x.shape, len(masses)), x.dtype)
    np.cumsum((starts[:, None, :] - x[:, :, None]) / number(tau), axis=-1, out=logs[..., 1:])
    kernel = np.exp(logs - logs.max(axis=-1, keepdims=True))
    factors = np.ones((len(x), len(masses)), x.dtype)
    for _ in range(MOST_ITERATIONS):
        rows = 1.0 / np.matvec(kernel, factors)
        before, factors = factors, masses / np.vecmat(rows, kernel)
        if np.all(np.abs(factors - before) <= 4 * np.finfo(x.dtype).eps * np.abs(factors)):
            break
    shares = kernel * factors[:, None, :]
    return shares / shares.sum(axis=-1, keepdims=True), masses, heights


def values_of(case: Case, x: np.ndarray, shares: np.ndarray, masses: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """The ranks, or the sorted values."""
    if case.operator == "rank":
        return np.matvec(shares, heights)
    values: np.ndarray = np.vecmat(x, shares) / masses
    return values[:, : case.k] if case.operator == "sorted_topk" else values[:, ::-1]


def pulled(case: Case, x: np.ndarray, u: np.ndarray, shares: np.ndarray, masses: Any, heights: np.ndarray) -> Any:
    """The implicit derivative at the last iterate."""
    weights = np.zeros((len(x), len(masses)), x.dtype)
    if case.operator == "rank":
        cotangent = u[:, :, None] * heights
    else:
        weights[:, : u.shape[-1]] = u if case.operator == "sorted_topk" else u[:, ::-1]
        weights /= masses
        cotangent = x[:, :, None] * weights[:, None, :]
    direct = shares * (cotangent - np.sum(shares * cotangent, axis=-1, keepdims=True))
    links = -np.matmul(shares.transpose(0, 2, 1), shares)
    diagonal = np.arange(len(masses))
    links[:, diagonal, diagonal] = 0.0
    links[:, diagonal, diagonal] = 1e-30 - links.sum(axis=-1)  # across a wide gap the links are 0 to rounding
    moved = np.linalg.solve(links[:, :-1, :-1], direct.sum(axis=-2)[:, :-1, None])[..., 0]
    potentials = np.pad(moved, ((0, 0), (0, 1)))
    spread = shares * (heights - np.matvec(shares, heights)[..., None])
    slope = np.matvec(direct, heights) - np.matvec(spread, potentials)
    return slope * x.dtype.type(2.0 / case.epsilon) + np.matvec(shares, weights)


def candidates(device: str) -> list[Candidate]:
    """softk's operators, and the iteration. The device is ignored, because NumPy has only one."""
    found = [Candidate(f"softk.{name}", "NumPy", "soft", _softk, operators=(name,)) for name in SORTING]
    limit = few(2e6)  # the memory and the time of the iteration grow with the numbers of the plan
    return [*found, Candidate(SETTLED, "NumPy", "soft", _sinkhorn, True, obstacle=limit, operators=SORTING)]
