"""Attack the mask and its derivative with random problems: `make fuzz`, or `python -m tests.fuzz --problems 1e7`.

Each problem has a random length, scores, mass, temperature and, in half of the batches, weights. The scores have ties,
gaps, outliers, offsets and scales from 1e-20 to 1e20. softk's answer is compared with a root found by bisection and
Newton steps in a higher precision: float64 for float32, long double for float64. A batch is reproduced by its seed and
number. Interrupted, it prints what it has found.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import softk
from softk._reference.threshold.limits import ROUNDINGS

LENGTHS = (1, 2, 3, 4, 5, 8, 13, 16, 17, 32, 33, 64, 100, 257, 1000, 4097)
SIZE = 1 << 16
"""The number of scores of a batch."""
MASK, MASS = 32.0, 16.0
"""The allowed errors of the mask and, times max(1, k), of its sum, in units of the dtype's eps."""
DERIVATIVE = {"float32": 2e-5, "float64": 1e-11}
"""The allowed error of the derivative in the scores, relative to its largest entry in the slice.

With weights, the errors of the mask and of the derivative may be max(1, k / w) times as large, w being the least
weight: so much is the mask of that item moved by an allowed error of the sum.
"""


class Batch(NamedTuple):
    """Slices along the last axis; a row of `k` and `epsilon` for each."""

    x: np.ndarray  # (rows, n)
    k: np.ndarray  # (rows, 1)
    epsilon: np.ndarray  # (rows, 1)
    weights: np.ndarray | None  # (rows, n)
    u: np.ndarray  # (rows, n), the cotangent


class Found(NamedTuple):
    """What one batch showed. Errors are the largest of the batch; `wrong` has the first wrong problem of each kind."""

    problems: int
    nan: int
    wrong_masks: int
    wrong_sums: int
    wrong_derivatives: int
    mask: float
    mass: float
    derivative: float
    wrong: tuple[str, ...]


# --- problems


def _normal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.normal(size=shape)


def _cauchy(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.clip(rng.standard_cauchy(size=shape), -1e6, 1e6)


def _tied(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.integers(0, rng.integers(1, 6) + 1, size=shape).astype(float)


def _clusters(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    width = 10.0 ** rng.uniform(-9.0, -1.0, size=(shape[0], 1))
    return rng.integers(0, 3, size=shape) + width * rng.normal(size=shape)


def _geometric(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.choice((-1.0, 1.0), size=shape) * 10.0 ** rng.uniform(-8.0, 2.0, size=shape)


def _neighbors(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Scores a few roundings apart."""
    return 1.0 + 2.0**-23 * rng.integers(-4, 5, size=shape)


def _outlier(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    x = rng.normal(size=shape)
    x[:, rng.integers(shape[1])] *= 10.0 ** rng.uniform(0.0, 8.0, size=shape[0])
    return x


SCORES = (_normal, _cauchy, _tied, _clusters, _geometric, _neighbors, _outlier)


def draw(rng: np.random.Generator, dtype: str) -> Batch:
    """A random batch. Everything is rounded to the dtype, and is exact thereafter."""
    n = int(rng.choice(LENGTHS))
    shape = (max(1, SIZE // n), n)
    kind: Callable[[np.random.Generator, tuple[int, int]], np.ndarray] = SCORES[rng.integers(len(SCORES))]
    scale = 10.0 ** (rng.uniform(-20.0, 20.0, size=(shape[0], 1)) * rng.integers(2, size=(shape[0], 1)))
    offset = rng.integers(2, size=scale.shape) * rng.normal(size=scale.shape) * 10.0 ** rng.uniform(0, 4, scale.shape)
    x = (scale * (kind(rng, shape) + offset)).astype(dtype)
    epsilon = (scale * 10.0 ** rng.uniform(-8.0, 3.0, size=scale.shape)).astype(dtype)
    weights = None
    if rng.integers(2):
        weights = (0.125 + np.round(8.0 * rng.exponential(size=shape)) / 8.0).astype(dtype)  # whose sums are exact
    k = _masses(rng, x, weights)
    if weights is not None and rng.integers(2):  # whose sums are rounded: there k is no such sum
        weights = (weights * (1.0 + 0.1 * rng.uniform(size=shape))).astype(dtype)
        k = _between(x, weights, k)
    return Batch(x, k.astype(dtype), epsilon, weights, rng.normal(size=shape).astype(dtype))


def _heads(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """The sums of the weights of the largest 0, 1, ..., n scores of each row."""
    order = np.argsort(-x, axis=-1, kind="stable")
    w = np.ones(x.shape) if weights is None else np.take_along_axis(weights.astype(float), order, -1)
    return np.concatenate([np.zeros((len(x), 1)), np.cumsum(w, axis=-1)], axis=-1)


def _between(x: np.ndarray, weights: np.ndarray, k: np.ndarray) -> np.ndarray:
    """The middle between the sums on both sides of k, because a k that is within a rounding of a sum counts as it."""
    heads = _heads(x, weights)
    index = np.clip(np.sum(heads <= k, axis=-1, keepdims=True), 1, x.shape[1])
    return 0.5 * (np.take_along_axis(heads, index - 1, -1) + np.take_along_axis(heads, index, -1))


def _masses(rng: np.random.Generator, x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Masses of every kind: the sum of some of the largest weights, beside it, between, close to 0 and to all."""
    heads = _heads(x, weights)
    total = heads[:, -1:]
    whole = np.take_along_axis(heads, rng.integers(x.shape[1] + 1, size=total.shape), -1)
    # With weights, a k within a rounding of a sum counts as the sum.
    steps = rng.integers(-3, 4, size=total.shape) * float(np.finfo(x.dtype).eps) * (weights is None)
    tiny = 10.0 ** rng.uniform(-20.0, -1.0, size=total.shape)
    choices = [whole, whole * (1.0 + steps), total * rng.uniform(size=total.shape), total * tiny, total * (1.0 - tiny)]
    k = np.choose(rng.integers(len(choices), size=total.shape), choices)
    # A k within a few roundings of everything counts as everything.
    return np.where(k > total * (1.0 - 64.0 * float(np.finfo(x.dtype).eps)), total, k)


# --- the solution in a higher precision


@np.errstate(all="ignore")
def solve(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mask, the derivative of sum(u * mask) in the scores, and the terms of the derivative that the dtype rounds.

    The last two are NaN in rows where float64 has no derivative. No term is rounded without weights.
    """
    number = np.float64 if batch.x.dtype == np.float32 else np.longdouble
    x, k, epsilon, u = (part.astype(number) for part in (batch.x, batch.k, batch.epsilon, batch.u))
    w = np.ones_like(x) if batch.weights is None else batch.weights.astype(number)
    order = np.argsort(-x, axis=-1, kind="stable")
    heads = np.cumsum(np.take_along_axis(w, order, -1), axis=-1)
    total = heads[:, -1:]
    # Distances from the score at which the sum of the largest weights reaches k. The threshold is near it.
    anchor = np.minimum(np.sum(heads < k, axis=-1, keepdims=True), x.shape[1] - 1)
    d = 2.0 * (x - np.take_along_axis(np.take_along_axis(x, order, -1), anchor, -1)) / epsilon
    z = d - _root(d, w, k, total)
    tail = np.exp(-np.abs(z))
    mask = np.where(z > 0.0, 1.0, tail) / (1.0 + tail)
    mask = np.where(k >= total, 1.0, np.where(k <= 0.0, 0.0, mask))
    a = tail / (1.0 + tail) ** 2
    # A multiple of the weights changes nothing. With 0 at the item of the largest slope nothing cancels if it has all.
    most = np.argmax(w * a, axis=-1)[:, None]
    rounded = np.abs(a * u) if batch.weights is not None else np.zeros_like(u)
    np.put_along_axis(rounded, most, 0.0, -1)
    u = u - w * (np.take_along_axis(u, most, -1) / np.take_along_axis(w, most, -1))
    np.put_along_axis(u, most, 0.0, -1)
    slope = np.sum(w * a, axis=-1, keepdims=True)
    gradient = 2.0 * a * (u - w * np.sum(a * u, axis=-1, keepdims=True) / slope) / epsilon
    has_one = (slope > 1e-200) & (k > 0.0) & (k < total)
    return mask, np.where(has_one, gradient, np.nan), np.where(has_one, 2.0 * rounded / epsilon, np.nan)


def _root(d: np.ndarray, w: np.ndarray, k: np.ndarray, total: np.ndarray) -> np.ndarray:
    """s such that sum(w * sigmoid(d - s)) is k, by bisection, and by Newton steps that stay in the bracket."""
    result = np.zeros_like(k)
    rows = np.flatnonzero((k > 0.0) & (k < total))
    d, w, k, total = d[rows], w[rows], k[rows], total[rows]
    logit = np.log(k) - np.log(total - k)
    low, high = np.min(d, -1, keepdims=True) - logit, np.max(d, -1, keepdims=True) - logit
    s = np.clip(np.zeros_like(k), low, high)
    eps = np.finfo(d.dtype).eps
    for turn in itertools.count():
        z = d - s
        tail = np.exp(-np.abs(z))
        above = z > 0.0
        outside = w * tail / (1.0 + tail)
        signed = np.where(above, -outside, outside)
        value = (np.sum(np.where(above, w, 0.0), -1, keepdims=True) - k) + np.sum(signed, -1, keepdims=True)
        slope = np.sum(outside / (1.0 + tail), -1, keepdims=True)
        low, high = np.where(value >= 0.0, s, low), np.where(value <= 0.0, s, high)
        step = s + value / np.where(slope > 0.0, slope, 1.0)
        inside = (step > low) & (step < high) & (slope > 0.0) & (turn % 3 < 2)
        following = np.where(inside, step, low + 0.5 * (high - low))
        done = (high - low <= 8.0 * eps * np.maximum(1.0, np.abs(s))) | (inside & (following == s))
        close = done[:, 0]
        result[rows[close]] = following[close]
        rows, d, w, k, s = rows[~close], d[~close], w[~close], k[~close], following[~close]
        low, high = low[~close], high[~close]
        if not rows.size:
            break
        if turn > 400:
            raise ArithmeticError(f"the bisection of {rows.size} rows does not end")
    return result


def at_sums(batch: Batch, eps: float) -> Batch:
    """The same problems, where a k that misses a sum of the largest weights by its rounding is that sum.

    softk's contract is that such a k counts as the sum, if the threshold lies in the gap there. The derivative in the
    gap depends on what k misses the sum by.
    """
    assert batch.weights is not None
    order = np.argsort(-batch.x, axis=-1, kind="stable")
    sums = np.cumsum(np.take_along_axis(batch.weights, order, -1).astype(np.longdouble), axis=-1)
    nearest = np.argmin(np.abs(sums - batch.k), axis=-1)[:, None]
    sums = np.take_along_axis(sums, nearest, -1)
    return batch._replace(k=np.where(np.abs(sums - batch.k) <= ROUNDINGS * eps * batch.k, sums, batch.k))


# --- the attack


def attack(job: tuple[int, int, str, str]) -> Found:
    """Solve one batch both ways. `job` is the seed, the number of the batch, the dtype and the choice of kernels."""
    seed, number, dtype, choice = job
    batch = draw(np.random.default_rng((seed, number)), dtype)
    options: dict[str, Any] = {"epsilon": batch.epsilon}
    options |= {} if batch.weights is None else {"weights": batch.weights}
    with softk.kernels(choice):
        mask, pullback = softk.vjp(softk.topk, batch.x, batch.k, **options)
        gradient = pullback(batch.u)["x"]
    wanted, slope, rounded = solve(batch)
    eps, k = float(np.finfo(dtype).eps), batch.k.astype(float)
    w = np.ones((1, 1)) if batch.weights is None else batch.weights.astype(wanted.dtype)
    # An error of the sum moves the mask of an item of little weight by more.
    scale = 1.0 if batch.weights is None else np.maximum(1.0, k / np.min(w, axis=-1, keepdims=True))[:, 0]
    nan = ~np.isfinite(mask).all(-1) | ~np.isfinite(gradient).all(-1)
    off = np.max(np.abs(mask - wanted), axis=-1) / (eps * scale)
    outside = ((mask < 0.0) | (mask > 1.0)).any(-1)
    mass = np.abs(np.sum(w * mask.astype(wanted.dtype), -1, keepdims=True) - batch.k)[:, 0]
    mass = mass / (eps * np.maximum(1.0, k[:, 0]))
    # An item whose mask is rounded to 0 or 1 has no derivative. It is compared with those that have one.
    floor = eps * eps * np.max(np.abs(batch.u), axis=-1) / batch.epsilon[:, 0].astype(wanted.dtype)
    terms = 16.0 * eps / DERIVATIVE[dtype] * np.max(rounded, axis=-1)
    largest = np.maximum(np.max(np.abs(slope), axis=-1), np.maximum(floor, terms))
    usual = (largest > 1e-25) & (largest < 1e25)  # False for NaN
    apart = np.zeros_like(largest)
    apart[usual] = np.max(np.abs(gradient[usual] - slope[usual]), axis=-1) / largest[usual]
    apart = apart / scale
    doubtful = np.flatnonzero(apart > DERIVATIVE[dtype])
    if batch.weights is not None and doubtful.size:
        some = Batch(*(None if part is None else part[doubtful] for part in batch))
        _, slope, _ = solve(at_sums(some, eps))
        again = np.max(np.abs(gradient[doubtful] - slope), axis=-1) / largest[doubtful] / scale[doubtful]
        apart[doubtful] = np.fmin(apart[doubtful], again)
    bad = {"nan": nan, "mask": outside | (off > MASK), "mass": mass > MASS, "derivative": apart > DERIVATIVE[dtype]}
    wrong = []
    for name, rows in bad.items():
        if rows.any():
            i = int(np.flatnonzero(rows)[0])
            numbers = f"{off[i]:.3g} eps, {mass[i]:.3g} eps, {apart[i]:.3g}"
            given = {field: None if part is None else part[i].tolist() for field, part in batch._asdict().items()}
            wrong.append(f"{name} of row {i} of batch {number} ({dtype}): {numbers}: {given}")
    counts = [int(np.sum(rows)) for rows in bad.values()]
    worst = [float(np.nanmax(part)) for part in (off, mass, apart)]
    return Found(len(mask), *counts, *worst, tuple(wrong))


def campaign(problems: float, seed: int, dtypes: list[str], choice: str, processes: int) -> Iterator[tuple[str, Found]]:
    """The batches of all dtypes in turn, until there are enough problems."""
    count = 0
    jobs = ((seed, number, dtypes[number % len(dtypes)], choice) for number in itertools.count())
    with ProcessPoolExecutor(processes) as pool:
        while count < problems:
            some = list(itertools.islice(jobs, 8 * processes))
            for job, found in zip(some, pool.map(attack, some), strict=True):
                count += found.problems
                yield job[2], found


def joined(one: Found, other: Found) -> Found:
    """Counts are added, and the larger errors are kept."""
    added = [a + b for a, b in zip(one[:5], other[:5], strict=True)]
    return Found(*added, *map(max, one[5:8], other[5:8]), one.wrong + other.wrong)


def main(argv: list[str] | None = None) -> int:
    """Print a line for each dtype, and the wrong problems: of each batch the first of each kind."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--problems", type=float, default=1e7, help="how many to solve (default: 1e7)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DERIVATIVE), default=list(DERIVATIVE))
    parser.add_argument("--kernels", default="auto", help="the kernels to attack, as in SOFTK_KERNELS (default: auto)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)
    results: dict[str, Found] = {}
    batches = campaign(options.problems, options.seed, options.dtypes, options.kernels, options.processes)
    bar = tqdm(total=int(options.problems), unit="problem", unit_scale=True, dynamic_ncols=True)
    with bar, suppress(KeyboardInterrupt):
        for dtype, found in batches:
            for problem in found.wrong:
                tqdm.write(problem, file=sys.stderr)
            results[dtype] = joined(results[dtype], found) if dtype in results else found
            bar.update(found.problems)
    for dtype, found in results.items():
        counts = f"{found.nan} with NaN, {found.wrong_masks} wrong masks, {found.wrong_sums} wrong sums"
        errors = f"mask {found.mask:.2g} eps, sum {found.mass:.2g} eps max(1, k), derivative {found.derivative:.2g}"
        line = f"{found.problems:,} problems; {counts}, {found.wrong_derivatives} wrong derivatives"
        sys.stdout.write(f"{dtype}: {line}; largest errors: {errors}\n")
    return int(any(found.wrong for found in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
