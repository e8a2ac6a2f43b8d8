"""The exact solution, computed without softk by bisection on the threshold, and the errors of a candidate."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Truth(NamedTuple):
    """The mask and the derivative of sum(u * mask) with respect to the scores, each (rows, n)."""

    mask: np.ndarray
    gradient: np.ndarray


class Errors(NamedTuple):
    """The errors of a candidate."""

    mass: float  # the largest |sum mask - k| / k
    mask: float  # the largest absolute error of the mask
    gradient: float | None  # the largest absolute error, relative to the largest entry of the derivative


def solve(x: np.ndarray, u: np.ndarray, k: int, epsilon: float) -> Truth:
    """The mask sigmoid((x - t) / tau), tau = epsilon / 2, that sums to k in every row, in a higher precision than x.

    The inputs, including epsilon, are rounded to the dtype of x, as for the candidates.
    """
    number = np.float64 if x.dtype == np.float32 else np.longdouble
    tau = number(x.dtype.type(epsilon)) / 2
    z, tail = _distances(x.astype(number), k, tau)
    mask = np.where(z > 0, 1 / (1 + tail), tail / (1 + tail))
    slope = tail / (1 + tail) ** 2
    direct = slope * u
    # The tangent of the threshold is the mean of the tangents of the scores, weighted with the slopes.
    total = np.sum(slope, axis=-1, keepdims=True)
    mean = np.sum(direct, axis=-1, keepdims=True) / np.where(total > 0, total, 1)
    return Truth(mask, (direct - slope * mean) / tau)


def _distances(x: np.ndarray, k: int, tau: np.floating) -> tuple[np.ndarray, np.ndarray]:
    """z = (x - t) / tau and exp(-|z|) at the threshold t of each row."""

    def excess(t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The excess sum mask - k, computed from the tails on both sides of t, and the slope of the mass."""
        z = (x - t) / tau
        tail = np.exp(-np.abs(z))
        outside = tail / (1 + tail)
        above = z > 0
        signed = np.sum(np.where(above, -outside, outside), axis=-1, keepdims=True)
        count = np.count_nonzero(above, axis=-1, keepdims=True)
        slope = np.sum(outside / (1 + tail), axis=-1, keepdims=True) / tau
        return signed + (count - k), slope, z, tail

    # The threshold if all scores were equal to the smallest (largest) score: a bracket.
    shift = tau * np.log(x.dtype.type(x.shape[-1] - k) / k)
    low = np.min(x, axis=-1, keepdims=True) + shift
    high = np.max(x, axis=-1, keepdims=True) + shift
    while np.max(high - low) > tau / 4:
        middle = (low + high) / 2
        too_much = excess(middle)[0] > 0
        low, high = np.where(too_much, middle, low), np.where(too_much, high, middle)
    t = (low + high) / 2
    for _ in range(8):  # the start is within tau / 4 of the root, where Newton converges quadratically
        value, slope, _, _ = excess(t)
        step = value / np.where(slope > 0, slope, 1)
        t = np.clip(t + step, low, high)
        if np.max(np.abs(step)) <= 4 * np.finfo(x.dtype).eps * np.max(np.abs(x)):
            break
    _, _, z, tail = excess(t)
    return z, tail


def errors(mask: np.ndarray, gradient: np.ndarray | None, truth: Truth, k: int) -> Errors:
    """The errors of a mask and a derivative."""
    mass = np.max(np.abs(np.sum(mask.astype(np.longdouble), axis=-1) - k)) / k
    apart = np.max(np.abs(mask - truth.mask))
    if gradient is None:
        return Errors(float(mass), float(apart), None)
    scale = np.max(np.abs(truth.gradient))
    return Errors(float(mass), float(apart), float(np.max(np.abs(gradient - truth.gradient)) / scale))
