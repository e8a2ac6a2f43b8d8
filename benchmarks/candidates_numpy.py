"""NumPy: softk and the functions of NumPy and SciPy, with hand-written derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import special

import softk

from .candidates import (
    MOST_ITERATIONS,
    OPERATORS,
    REFERENCE,
    SETTLED,
    SINKHORN,
    SINKHORN_ITERATIONS,
    Candidate,
    Prepare,
    Prepared,
    few,
    implicit,
    sinkhorn,
)
from .cases import Case


def _softk(case: Case, x: np.ndarray, u: np.ndarray) -> Prepared:
    def forward() -> np.ndarray:
        return softk.topk(x, case.k, axis=case.axis, epsilon=case.epsilon)

    def both() -> tuple[np.ndarray, np.ndarray]:
        mask, pullback = softk.vjp(softk.topk, x, case.k, axis=case.axis, epsilon=case.epsilon)
        return mask, pullback(u)["x"]

    return Prepared(forward, both, np.asarray)


def _reference(case: Case, x: np.ndarray, u: np.ndarray) -> Prepared:
    prepared = _softk(case, x, u)

    def forward() -> np.ndarray:
        with softk.kernels("none"):
            mask: np.ndarray = prepared.forward()
        return mask

    def both() -> tuple[np.ndarray, np.ndarray]:
        assert prepared.both is not None
        with softk.kernels("none"):
            return prepared.both()

    return Prepared(forward, both, np.asarray)


def _sorted(case: Case, x: np.ndarray, u: np.ndarray) -> Prepared:
    def forward() -> np.ndarray:
        return softk.sorted_topk(x, case.k, epsilon=case.epsilon).values

    def both() -> tuple[np.ndarray, np.ndarray]:
        found, pullback = softk.vjp(softk.sorted_topk, x, case.k, epsilon=case.epsilon)
        return found.values, pullback((u[..., : case.k], None))["x"]

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


def _settle(step: Any, state: Any) -> Any:
    """Iterate until the scales change only by rounding, or up to the limit of iterations."""
    for _ in range(MOST_ITERATIONS):
        before, state = state, step(state)
        if all(
            np.all(np.abs(a - b) <= 4 * np.finfo(a.dtype).eps * np.abs(a)) for a, b in zip(state, before, strict=True)
        ):
            break
    return state


def _sinkhorn(loop: Any) -> Prepare:
    def prepare(case: Case, x: np.ndarray, u: np.ndarray) -> Prepared:
        def forward() -> np.ndarray:
            mask: np.ndarray = sinkhorn(np, x, case.k, case.epsilon, loop)
            return mask

        def both() -> tuple[np.ndarray, np.ndarray]:
            mask = forward()
            return mask, implicit(mask, u, case.epsilon)

        return Prepared(forward, both, np.asarray)

    return prepare


def candidates(device: str) -> list[Candidate]:
    """All candidates. The device is ignored, because NumPy has only one."""
    return [
        Candidate("softk.topk", "NumPy", "soft", _softk, joint=True),
        Candidate(REFERENCE, "NumPy", "soft", _reference, joint=True),
        Candidate("softk.sorted_topk", "NumPy", "other", _sorted, obstacle=few(1.5e6)),
        Candidate("softmax (SciPy)", "NumPy", "other", _softmax, operators=OPERATORS),
        Candidate("sigmoid (SciPy)", "NumPy", "other", _sigmoid),
        Candidate("hard top-k (argpartition)", "NumPy", "hard", _hard),
        Candidate(SINKHORN, "NumPy", "soft", _sinkhorn(_loop), peer=True),
        Candidate(SETTLED, "NumPy", "soft", _sinkhorn(_settle), peer=True),
    ]
