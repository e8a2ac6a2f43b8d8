"""NumPy: softk, and what the library itself has, with derivatives by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import special

import softk

from .candidates import SINKHORN, SINKHORN_ITERATIONS, Candidate, Prepared, implicit, sinkhorn
from .cases import Case


def _softk(case: Case, x: np.ndarray, u: np.ndarray) -> Prepared:
    def forward() -> np.ndarray:
        return softk.topk(x, case.k, epsilon=case.epsilon)

    def both() -> tuple[np.ndarray, np.ndarray]:
        mask, pullback = softk.vjp(softk.topk, x, case.k, epsilon=case.epsilon)
        return mask, pullback(u)["x"]

    return Prepared(forward, both, np.asarray)


def _softmax(case: Case, x: np.ndarray, u: np.ndarray) -> Prepared:
    def both() -> tuple[np.ndarray, np.ndarray]:
        share = special.softmax(x, axis=-1)
        return share, share * (u - np.sum(u * share, axis=-1, keepdims=True))

    return Prepared(lambda: special.softmax(x, axis=-1), both, np.asarray)


def _sigmoid(case: Case, x: np.ndarray, u: np.ndarray) -> Prepared:
    def both() -> tuple[np.ndarray, np.ndarray]:
        mask = special.expit(x)
        return mask, u * mask * (1.0 - mask)

    return Prepared(lambda: special.expit(x), both, np.asarray)


def _hard(case: Case, x: np.ndarray, u: np.ndarray) -> Prepared:
    def forward() -> np.ndarray:
        mask = np.zeros_like(x)
        np.put_along_axis(mask, np.argpartition(x, -case.k, axis=-1)[:, -case.k :], 1.0, axis=-1)
        return mask

    return Prepared(forward, None, np.asarray)


def _loop(step: Any, state: Any) -> Any:
    for _ in range(SINKHORN_ITERATIONS):
        state = step(state)
    return state


def _sinkhorn(case: Case, x: np.ndarray, u: np.ndarray) -> Prepared:
    def forward() -> np.ndarray:
        mask: np.ndarray = sinkhorn(np, x, case.k, case.epsilon, _loop)
        return mask

    def both() -> tuple[np.ndarray, np.ndarray]:
        mask = forward()
        return mask, implicit(mask, u, case.epsilon)

    return Prepared(forward, both, np.asarray)


def candidates(device: str) -> list[Candidate]:
    """All of them; NumPy has one device."""
    return [
        Candidate("softk.topk", "NumPy", "soft", _softk),
        Candidate("softmax (SciPy)", "NumPy", "other", _softmax),
        Candidate("sigmoid (SciPy)", "NumPy", "other", _sigmoid),
        Candidate("hard top-k (argpartition)", "NumPy", "hard", _hard),
        Candidate(SINKHORN, "NumPy", "soft", _sinkhorn, peer=True),
    ]
