"""Slices in shards: the derivative from one exchange of summaries, with threads of NumPy in the place of processes."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError, local
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest

from softk._reference.threshold import masks
from softk._reference.threshold.split import in_pieces
from softk.backend import Backend


class Members(Backend):
    """Threads, each of which holds a shard. `sent` has the number of values of each exchange."""

    def __init__(self, count: int) -> None:
        super().__init__(xp)
        self.count, self.barrier, self.mine = count, Barrier(count, timeout=20), local()
        self.posted: list[Any] = [None] * count
        self.sent: list[int] = []

    def shards(self, group: str) -> tuple[int, int]:
        return self.mine.place, self.count

    def reduce_shards(self, values: Any, operation: Any, group: str) -> Any:
        if self.mine.place == 0:
            self.sent.append(values.size)
        self.posted[self.mine.place] = values
        self.barrier.wait()
        found = (np.sum if operation == "sum" else np.max)(np.stack(self.posted), axis=0)
        self.barrier.wait()
        return found

    def each(self, function: Any) -> list[Any]:
        def member(place: int) -> Any:
            self.mine.place = place
            try:
                with np.errstate(all="ignore"):
                    return function(place)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            found = [pool.submit(member, place) for place in range(self.count)]
        errors = [one.exception() for one in found if one.exception() is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
            raise error
        return [one.result() for one in found]


NAMES, ALL = ("x", "k", "tau", "weights"), (True, True, True, True, False)
OPERATORS = {"mask": masks.mask, "hard_mask": masks.hard_mask, "threshold": masks.threshold}


def solved(kind: str, inputs: Any) -> tuple[Any, ...]:
    """The outputs of the operator for the slices in one piece; the rule does not read the first."""
    with np.errstate(all="ignore"):
        return None, *Backend(xp).run(OPERATORS[kind], "forward", inputs, ranks=None)[1:]


def pulled(
    kind: str, cuts: list[int], inputs: Any, outputs: Any, u: Any, needed: tuple[bool, ...] = ALL
) -> tuple[list[Any], list[int]]:
    """The cotangents by members that hold what lies between the cuts, and the sizes of their exchanges."""
    members, primitive = Members(len(cuts) - 1), in_pieces(kind, ("members",))
    x, k, tau, weights, where = inputs

    def cut(values: Any, place: int) -> Any:
        return None if values is None else values[..., cuts[place] : cuts[place + 1]]

    def pull(place: int) -> Any:
        given = cut(x, place), k, tau, cut(weights, place), cut(where, place)
        own = (u, None) if kind == "threshold" else (cut(u, place), None)
        return members.run(primitive, "vjp", given, outputs, own, needed)

    found = []
    for i, parts in enumerate(list(zip(*members.each(pull), strict=True))[:4]):
        if i in (0, 3):
            found.append(None if parts[0] is None else np.concatenate(parts, axis=-1))
        else:
            found.append(parts[0])
            for other in parts[1:]:
                np.testing.assert_array_equal(other, parts[0], err_msg=NAMES[i])
    return found, members.sent


def whole(kind: str, inputs: Any, outputs: Any, u: Any) -> list[Any]:
    """The same in one piece, at the same solution, by the reference in float64."""

    def wide(values: Any) -> Any:
        return tuple(one if one is None or one.dtype == bool else one.astype(np.float64) for one in values)

    with np.errstate(all="ignore"):
        given = wide(inputs), wide(outputs), wide((u, None)), ALL
        return list(Backend(xp).run(OPERATORS[kind], "vjp", *given)[:4])


N, CUTS = 3000, [0, 700, 700, 2000, 3000]  # one member has nothing


def scores(case: str, rng: np.random.Generator) -> Any:
    x = rng.normal(size=(3, N))
    if case == "ties":  # among the items of one member, and of several
        return np.round(x, 1)
    if case == "one dominates":
        x[:, 1234] += 40.0
    elif case == "a gap":
        x[:, ::50] += 30.0
    elif case == "equal":
        x[:] = 0.25
    return x


def cotangents(rng: np.random.Generator, x: Any, k: float) -> list[Any]:
    """A random one, one with a large mean, which no derivative sees, and that of the score after the k-th."""
    last = np.zeros_like(x)
    np.put_along_axis(last, np.argsort(-x, axis=-1)[:, [min(int(k), N - 1)]], 1.0, axis=-1)
    return [rng.normal(size=x.shape), 1000.0 + rng.normal(size=x.shape), last]


@pytest.mark.parametrize("case", ["normal", "ties", "one dominates", "a gap", "equal"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_cotangents(dtype: str, weighted: bool, case: str, rng: np.random.Generator) -> None:
    """Those of the slices in one piece, in float64, from near the hard limit to far from it."""
    x = scores(case, rng).astype(dtype)
    weights = where = None
    if weighted:
        weights, where = rng.uniform(0.5, 2.0, size=x.shape).astype(dtype), rng.uniform(size=x.shape) < 0.9
        weights[:, ::7] = 0.0
    # float32 holds no smaller and no larger derivatives.
    tolerance, least, most = (1e-11, 1e-280, 1e150) if dtype == "float64" else (2e-5, 1e-28, 1e15)
    compared = 0
    ks, taus = (1.0, 40.3, 60.0, N - 0.5, float(N)), (0.3, 1e-2, 1e-4)
    if dtype == "float32" and weighted:  # elsewhere the float32 solution itself is not that of float64
        ks, taus = (40.3,), (0.3,)
    for k, tau in itertools.product(ks, taus):
        inputs = (x, np.full((3, 1), k, dtype), np.full((3, 1), tau, dtype), weights, where)
        for u, kind in itertools.product(cotangents(rng, x, k), ("mask", "threshold")):
            bar, outputs = (u if kind == "mask" else u[:, :1]).astype(dtype), solved(kind, inputs)
            found, sent = pulled(kind, CUTS, inputs, outputs, bar)
            assert len(sent) == 2, sent
            alone, sent = pulled(kind, CUTS, inputs, outputs, bar, (True, *(False,) * 4))
            assert len(sent) == 1, sent
            wanted_of_all = whole(kind, inputs, outputs, bar)
            names, found = ("x alone", *NAMES), [alone[0], *found]
            for name, own, wanted in zip(names, found, [wanted_of_all[0], *wanted_of_all], strict=True):
                if wanted is None:
                    assert own is None
                    continue
                if (name, kind, dtype) == ("tau", "threshold", "float32") and tau < 0.3:
                    continue  # a difference of two large z, in one piece too
                size = np.max(np.abs(wanted), axis=-1, keepdims=True)
                if dtype == "float32" and name in ("k", "tau"):  # sums of terms that nearly cancel in some slices
                    size = size.max()
                if (name, kind) == ("tau", "threshold"):
                    size = np.maximum(size, np.abs(bar * np.maximum(np.abs(outputs[1]), 1.0)))
                kept = (size > least / tolerance) & (size < most)
                compared += np.count_nonzero(kept)
                off = np.abs(own - wanted) / np.where(kept, size, np.inf)
                np.testing.assert_array_less(off, tolerance, err_msg=f"{name} of the {kind}, k {k}, tau {tau}")
    assert compared > 40


def test_what_is_exchanged(rng: np.random.Generator) -> None:
    """How many numbers per slice and member, and that the hard mask has the derivative of the soft one."""
    x, u = rng.normal(size=(2, 3, N))
    for weights in (None, rng.uniform(0.5, 2.0, size=x.shape)):
        inputs = (x, np.full((3, 1), 40.3), np.full((3, 1), 0.1), weights, None)
        outputs = solved("mask", inputs)
        every, all_sent = pulled("mask", CUTS, inputs, outputs, u)
        _, sent = pulled("mask", CUTS, inputs, outputs, u, (True, *(False,) * 4))
        assert sent == [(8 if weights is None else 11) * 3 * 4]
        assert all_sent == [(20 if weights is None else 25) * 3 * 4, 3 * 2]
        hard, _ = pulled("hard_mask", CUTS, inputs, outputs, u)
        np.testing.assert_array_equal(hard[0], every[0])


def test_what_no_derivative_sees(rng: np.random.Generator) -> None:
    """Removed items with NaN scores, weights and cotangents, infinite scores, and a slice that has a NaN."""
    x, u = rng.normal(size=(2, 4, N))
    where = rng.uniform(size=x.shape) < 0.8
    x[1, ::9], x[2, ::11] = math.inf, -math.inf
    weights = rng.uniform(0.5, 2.0, size=x.shape)
    for given in (None, weights):
        spoiled = None if given is None else np.where(where, given, np.nan)
        inputs = (np.where(where, x, np.nan), np.full((4, 1), 40.3), np.full((4, 1), 0.1), spoiled, where)
        inputs[0][3, np.flatnonzero(where[3])[7]] = math.nan
        outputs, bar = solved("mask", inputs), np.where(where, u, np.nan)
        found, _ = pulled("mask", CUTS, inputs, outputs, bar)
        for name, own, wanted in zip(NAMES, found, whole("mask", inputs, outputs, bar), strict=True):
            if wanted is not None:
                assert np.all(np.isfinite(own[:3])), name
                np.testing.assert_array_equal(np.isnan(own), np.isnan(wanted), err_msg=name)
                size = np.max(np.abs(wanted[:3]), axis=-1, keepdims=True)
                assert np.all(np.abs(own - wanted)[:3] <= 1e-11 * size), name


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_weights_of_any_size(size: float, rng: np.random.Generator) -> None:
    """In float32: the members have weights of different sizes, and the scores' derivative follows their proportions."""
    x, u = rng.normal(size=(2, 3, N)).astype(np.float32)
    proportions = rng.uniform(0.5, 2.0, size=x.shape) * np.where(np.arange(N) < 700, 1e-3, 1.0)
    weights = (proportions * size).astype(np.float32)
    tau = np.full((3, 1), 0.3, np.float32)
    k = 0.1 * proportions.sum(axis=-1, keepdims=True)
    inputs = (x, (k * size).astype(np.float32), tau, weights, None)
    found, _ = pulled("mask", CUTS, inputs, solved("mask", inputs), u)
    like = (x.astype(float), k, tau.astype(float), weights.astype(float) / size, None)
    wanted = whole("mask", like, solved("mask", like), u)
    assert all(np.all(np.isfinite(one)) for one in found)
    np.testing.assert_allclose(found[0], wanted[0], rtol=0.0, atol=2e-5 * np.abs(wanted[0]).max())


def test_shards_beside_what_every_member_has(rng: np.random.Generator) -> None:
    """Two parts in shards, and one that is whole and the same for every member: it counts once."""
    parts, bars = zip(*rng.normal(size=(3, 2, 2, 900)), strict=True)
    members, m = Members(2), 3
    primitive = in_pieces("mask", ("members", None, "members"))
    k, tau = np.full((2, 1), 300.7), np.full((2, 1), 0.05)
    joined = (np.concatenate(parts, axis=-1), k, tau, None, None)
    outputs = solved("mask", joined)
    wanted = whole("mask", joined, outputs, np.concatenate(bars, axis=-1))

    def pull(place: int) -> Any:
        def own(values: Any) -> Any:
            half = slice(450 * place, 450 * (place + 1))
            return values[0][:, half], values[1], values[2][:, half]

        given = *own(parts), k, tau, *(None,) * (2 * m)
        masks_of, needed = (None,) * m, (True,) * (m + 2) + (False,) * (2 * m)
        mask = members.run(primitive, "forward", given, ranks=None)[:m]
        found = members.run(primitive, "vjp", given, (*masks_of, *outputs[1:]), (*own(bars), None), needed)
        return mask, found[: m + 2]

    (first, of_first), (second, of_second) = members.each(pull)

    def put_together(one: Any, other: Any) -> Any:
        np.testing.assert_array_equal(one[1], other[1])
        return np.concatenate([one[0], other[0], one[1], one[2], other[2]], axis=-1)

    mask = put_together(first, second)
    np.testing.assert_allclose(mask.sum(axis=-1, keepdims=True), k, rtol=0.0, atol=16 * 2.0**-52 * 301)
    for own, true in zip((put_together(of_first, of_second), *of_first[3:]), wanted[:3], strict=True):
        assert np.all(np.abs(own - true) <= 1e-11 * np.abs(true).max(axis=-1, keepdims=True))
