"""Dask, with the selected axis in several chunks: the contract, the number of passes, and the memory."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import softk
from softk._reference.threshold import passes as passes_module
from softk.testing import LONG, Oracle

from . import closed_form
from .closed_form import assert_close

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
task_spec = pytest.importorskip("dask._task_spec")

PASSES = 6


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("a value was computed before it was asked for")


@pytest.fixture(autouse=True)
def _lazy() -> Iterator[None]:
    """Nothing may be computed, but by `value`."""
    with dask.config.set(scheduler=refuse):
        yield


@pytest.fixture
def _in_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few items are already too many, so that they are summed up in bins."""
    monkeypatch.setattr(passes_module, "MOST_ITEMS", 40)
    monkeypatch.setattr(passes_module, "BLOCK", 100)


def value(lazy: Any) -> np.ndarray:
    assert isinstance(lazy, da.Array)
    found: np.ndarray = lazy.compute(scheduler="sync")
    assert found.dtype == lazy.dtype
    assert found.shape == lazy.shape
    return found


def scores(kind: str, rng: Any, n: int) -> np.ndarray:
    x = rng.standard_normal((2, n))
    return {
        "normal": x,
        "ties": np.round(x, 1),
        "equal": np.full_like(x, 0.3),
        "gap": x + np.where(np.arange(n) % 3 == 0, 50.0, 0.0),
        "far": 1e4 + x,
        "sorted": np.sort(x, axis=-1),
        "outlier": np.where(np.arange(n) == 7, 1e6, x),
    }[kind]


KINDS = ("normal", "ties", "equal", "gap", "far", "sorted", "outlier")


@pytest.mark.parametrize("bins", [False, True])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-2, 0.3, 20.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_contract(kind: str, dtype: str, epsilon: float, bins: bool, rng: Any, request: Any) -> None:
    if bins:
        request.getfixturevalue("_in_bins")
    n = 600
    x = scores(kind, rng, n).astype(dtype)
    k = np.asarray([[n / 3], [17.3]], dtype)
    found = softk.topk(da.from_array(x, chunks=(1, (250, 250, 100))), da.from_array(k, chunks=1), epsilon=epsilon)
    assert found.chunks == ((1, 1), (250, 250, 100))
    mask, eps = value(found).astype(np.longdouble), float(np.finfo(dtype).eps)
    tau = np.asarray(epsilon / 2, dtype)
    for row, one, share in zip(x, k[:, 0], mask, strict=True):
        with np.errstate(invalid="ignore"):  # in a wide gap the oracle's derivative underflows in long double
            oracle = Oracle(row, one, 2.0 * float(tau), arithmetic=LONG)
        assert np.max(np.abs(share - oracle.mask)) <= 32 * eps
        assert abs(share.sum() - one) <= 16 * eps * max(1.0, float(one))


@pytest.mark.usefixtures("_in_bins")
@pytest.mark.parametrize("width", [1.0 / 16.0, 1.0])
def test_bins_need_the_width_that_they_have(width: float, rng: Any, monkeypatch: Any) -> None:
    """In float32 there is no correction: bins of a whole temperature are seen in the threshold."""
    monkeypatch.setattr(passes_module, "WIDTH", width)
    x = rng.standard_normal(100_000).astype("float32")
    found = value(softk.threshold(da.from_array(x, chunks=30_000), 20_000, epsilon=1.0))
    monkeypatch.undo()
    error = abs(float(found) - float(softk.threshold(x.astype("float64"), 20_000, epsilon=1.0)))
    assert (error <= 4 * np.finfo("float32").eps) == (width < 1.0)


SPECIAL = {
    "nan": ([0.3, math.nan, 1.0, 2.0, -1.0, 0.0], 2.0),
    "infinities": ([0.3, math.inf, 1.0, -math.inf, -1.0, 0.0], 2.0),
    "more-infinities-than-k": ([math.inf, 0.3, math.inf, 1.0, math.inf, -math.inf], 2.0),
    "fewer-than-k": ([0.3, -math.inf, 1.0, -math.inf, -math.inf, -math.inf], 3.0),
    "never": ([-math.inf] * 6, 2.0),
    "none": ([0.3, 1.0, 2.0, -1.0, 0.0, 0.5], 0.0),
    "all": ([0.3, 1.0, 2.0, -1.0, 0.0, 0.5], 6.0),
    "too-many": ([0.3, 1.0, 2.0, -1.0, 0.0, 0.5], 7.0),
    "negative": ([0.3, 1.0, 2.0, -1.0, 0.0, 0.5], -1.0),
    "nan-as-k": ([0.3, 1.0, 2.0, -1.0, 0.0, 0.5], math.nan),
    "huge": ([3e38, 1e38, -3e38, 2e38, 0.0, 1.0], 2.0),
}


@pytest.mark.parametrize("function", ["topk", "log_topk", "threshold", "hard"])
def test_special_values(function: str) -> None:
    """They are those of NumPy, in slices that do not touch each other."""
    x = np.asarray([row for row, _ in SPECIAL.values()], "float32")
    k = np.asarray([[one] for _, one in SPECIAL.values()], "float32")
    epsilon = np.full_like(k, 0.4)
    x, k, epsilon = np.concatenate([x, x[5:8]]), np.concatenate([k, k[4:7]]), np.concatenate([epsilon, epsilon[:3]])
    epsilon[-3:, 0] = 0.0, -1.0, math.nan
    f: Any = {"topk": softk.topk, "log_topk": softk.log_topk, "threshold": softk.threshold}.get(
        function, lambda x, k, epsilon: softk.topk(x, k, epsilon=epsilon, hard=True)
    )
    found = value(f(*(da.from_array(each, chunks=(4, 2)) for each in (x, k)), epsilon=da.from_array(epsilon)))
    with softk.kernels("none"):
        expected = f(x, k, epsilon=epsilon)
    assert np.isnan(expected[[0, 7, 8, 9, -3, -2, -1]]).all()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("mode", ["largest", "smallest"])
def test_hard_mask_takes_the_first_of_equal_scores(mode: Any, dtype: str, rng: Any) -> None:
    x = np.round(rng.standard_normal((3, 200)), 1).astype(dtype)
    for k in (1, 37, 200):
        found = softk.topk(da.from_array(x, chunks=((2, 1), 30)), k, hard=True, mode=mode)
        order = np.argsort(x if mode == "smallest" else -x, axis=-1, kind="stable")
        np.testing.assert_array_equal(value(found), np.argsort(order, axis=-1) < k)


def test_hard_mask_of_a_k_that_is_rounded(rng: Any) -> None:
    """Beyond the integers of float32 the hard mask has k as an integer too, and k itself is only near it."""
    from softk._reference.threshold.masks import hard_mask
    from softk_dask import backend

    x = np.round(rng.standard_normal((2, 100)), 1).astype("float32")
    inputs = [da.from_array(x, chunks=(1, 30)), da.full((2, 1), 36.0, dtype="float32", chunks=1)]
    tau, count = da.from_array(np.asarray(0.1, "float32")), da.from_array(np.asarray([[37], [38]]), chunks=1)
    found, *_ = backend.run(hard_mask, "forward", (*inputs, tau, None, None, count), ranks=None)
    order = np.argsort(-x, axis=-1, kind="stable")
    np.testing.assert_array_equal(value(found), np.argsort(order, axis=-1) < [[37], [38]])


def test_a_bracket_in_any_order(rng: Any) -> None:
    """Chunks whose scores lie in different ranges, and with most of the scores equal."""
    x = np.concatenate([np.arange(50.0), np.full(90, 20.0), np.arange(30.0)[::-1] + 0.5, [1e3], np.zeros(29)])
    for chunks in ((50, 90, 30, 1, 29), 7, 1):
        lazy = da.from_array(x, chunks=chunks)
        for k in (1, 3, 20, 60, 61, 149, 150, 200):
            found = softk.threshold(lazy, k, epsilon=1e-9)
            np.testing.assert_array_equal(value(found), softk.threshold(x, k, epsilon=1e-9))


def test_where_and_batch_axes(rng: Any) -> None:
    """All arguments have chunks of their own, and the selected axis is not the last."""
    x = rng.standard_normal((3, 90, 4))
    where, k = rng.uniform(size=(3, 90, 1)) < 0.7, rng.uniform(1.0, 30.0, (1, 1, 4))
    found = softk.topk(
        da.from_array(x, chunks=(2, 40, 3)),
        da.from_array(k, chunks=2),
        axis=1,
        epsilon=da.from_array(np.full((3, 1, 1), 0.2), chunks=1),
        where=da.from_array(where, chunks=(3, 25, 1)),
    )
    assert found.chunks == ((2, 1), (40, 40, 10), (3, 1))
    moved = [np.moveaxis(each, 1, -1) for each in (x, k, np.broadcast_to(where, x.shape))]
    expected = closed_form.topk(moved[0], moved[1], 0.2, where=moved[2])
    assert_close(value(found), np.moveaxis(expected.astype(float), -1, 1), 1e-13)


def test_several_axes(rng: Any) -> None:
    x = rng.standard_normal((6, 5, 8))
    found = softk.topk(da.from_array(x, chunks=(2, 3, 4)), 20.5, axis=(0, 2), epsilon=0.2)
    assert_close(value(found), softk.topk(x, 20.5, axis=(0, 2), epsilon=0.2), 1e-13)


def test_chunks_of_no_items_and_of_unknown_batch(rng: Any) -> None:
    x = rng.standard_normal((4, 9))
    found = softk.topk(da.from_array(x, chunks=(2, (4, 0, 5))), 2.5, epsilon=0.2)
    assert_close(value(found), closed_form.topk(x, 2.5, 0.2).astype(float), 1e-13)
    lazy = da.from_array(x, chunks=(1, 4))
    found = softk.topk(lazy[lazy[:, 0] > 0.0], 2.5, epsilon=0.2)
    computed = found.compute(scheduler="sync")
    assert_close(computed, closed_form.topk(x[x[:, 0] > 0.0], 2.5, 0.2).astype(float), 1e-13)


def test_with_weights_and_in_other_functions_the_axis_is_gathered(rng: Any) -> None:
    x = rng.standard_normal((4, 9))
    lazy = da.from_array(x, chunks=(2, 4))
    assert softk.topk(lazy, 2.5, weights=da.exp(lazy)).chunks == ((2, 2), (9,))
    assert softk.sort(lazy, epsilon=0.1).chunks == ((2, 2), (9,))
    assert_close(value(softk.quantile(lazy, 0.3, epsilon=0.1)), softk.quantile(x, 0.3, epsilon=0.1), 1e-13)


# --- derivatives


@pytest.mark.parametrize("case", ["soft", "near-hard"])
@pytest.mark.parametrize("function", ["topk", "threshold"])
def test_derivatives(function: str, case: str, rng: Any) -> None:
    values = closed_form.problem(rng, case, batch=(5,), n=23)
    values["weights"] = np.ones(23)
    values["k"] = rng.uniform(2.0, 20.0, (5, 1))
    lazy = {
        "x": da.from_array(values["x"], chunks=(2, 7)),
        "k": da.from_array(values["k"], chunks=(3, 1)),
        "epsilon": da.from_array(values["epsilon"], chunks=(5, 1)),
    }
    f: Any = {"topk": softk.topk, "threshold": softk.threshold}[function]
    out, pull = softk.vjp(f, lazy["x"], lazy["k"], epsilon=lazy["epsilon"])
    u = rng.standard_normal(out.shape)
    found = pull(da.from_array(u, chunks=4))
    expected = closed_form.pullback(function, u, values)
    assert set(found) == {"x", "k", "epsilon"}
    assert found["x"].chunks == lazy["x"].chunks
    for name, gradient in found.items():
        assert_close(value(gradient), expected[name])
    tangents = {name: rng.standard_normal(values[name].shape) for name in lazy} | {"weights": np.zeros(23)}
    moved = {name: da.from_array(tangents[name], chunks=3) for name in lazy}
    _, pushed = softk.jvp(f, lazy["x"], lazy["k"], tangents=moved, epsilon=lazy["epsilon"])
    assert_close(value(pushed), closed_form.push(function, tangents, values))


@pytest.mark.parametrize("kind", ["normal", "gap", "ties", "outlier"])
@pytest.mark.parametrize("name", ["topk", "log_topk", "threshold", "hard"])
def test_derivatives_are_those_of_one_chunk(name: str, kind: str, rng: Any) -> None:
    x = scores(kind, rng, 60)
    k, epsilon = np.asarray([[20.0], [3.0]]), np.asarray([[0.2], [0.01]])
    f: Any = {"log_topk": softk.log_topk, "threshold": softk.threshold}.get(name, softk.topk)
    hard = {"hard": True} if name == "hard" else {}
    with softk.kernels("none"):
        out, pull = softk.vjp(f, x, k, epsilon=epsilon, where=x < 60.0, **hard)
    u = rng.standard_normal(out.shape)
    lazy = [da.from_array(each, chunks=(1, 17)) for each in (x, k)]
    _, pull_lazy = softk.vjp(f, *lazy, epsilon=da.from_array(epsilon), where=lazy[0] < 60.0, **hard)
    expected, found = pull(u), pull_lazy(da.from_array(u))
    # The cotangent of epsilon is a difference of terms of the size of the scores in units of epsilon.
    terms = np.max(np.abs(u)) * np.ptp(x, axis=-1, keepdims=True) / epsilon
    for argument, gradient in found.items():
        rounding = 4.0 * np.finfo(float).eps * np.max(terms) if argument == "epsilon" else 0.0
        bound = 1e-12 * np.max(np.abs(expected[argument])) + rounding
        np.testing.assert_allclose(value(gradient), expected[argument], rtol=0.0, atol=bound)


# --- passes and memory


class Source:
    """Scores that are not in memory. It counts how often every chunk is loaded."""

    ndim = 1

    def __init__(self, n: int, dtype: str) -> None:
        self.shape, self.dtype = (n,), np.dtype(dtype)
        self.loads: Counter[int] = Counter()
        self.lock = threading.Lock()

    def __getitem__(self, index: tuple[slice]) -> np.ndarray:
        start, stop, _ = index[0].indices(self.shape[0])
        with self.lock:
            self.loads[start] += stop > start
        return np.random.default_rng(start).standard_normal(stop - start).astype(self.dtype)

    def __dask_tokenize__(self) -> Any:
        return (id(self),)


def largest(result: Any) -> int:
    """The size of the largest array of a task's result."""
    if isinstance(result, np.ndarray) and result.dtype != object:
        return result.size
    if isinstance(result, dict):
        return max(map(largest, result.values()), default=0)
    if isinstance(result, (list, tuple)):
        return max(map(largest, result), default=0)
    return 0


def measured(source: Source, *lazy: Any) -> tuple[int, int, Any]:
    """How often the chunks were loaded, and the size of the largest array that a task returned, with the values."""
    sizes: list[int] = []
    source.loads.clear()

    def watch(key: Any, result: Any, *_: Any) -> None:
        sizes.append(largest(result))

    with dask.callbacks.Callback(posttask=watch):
        found = dask.compute(*lazy, scheduler="threads", num_workers=2)
    return max(source.loads.values()), max(sizes), found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_passes_and_largest_array(dtype: str) -> None:
    """At most six passes each, and no task has more than a chunk, or what a digest has at most."""
    n, chunk = 400_000, 20_000
    source = Source(n, dtype)
    x = da.from_array(source, chunks=chunk)
    most = max(chunk, passes_module.MOST_ITEMS)
    forward = 3 if dtype == "float32" else 4
    for epsilon in (1e-4, 0.1, 100.0):
        mask = softk.topk(x, 1000, epsilon=epsilon)
        loads, size, (total,) = measured(source, mask.sum(dtype="float64"))
        assert loads == forward
        assert size <= most
        assert abs(total - 1000) <= 16 * np.finfo(dtype).eps * 1000
    loads, size, _ = measured(source, softk.threshold(x, 1000.5))
    assert loads == forward - 1
    assert size <= most
    loads, size, (total,) = measured(source, softk.topk(x, 1000, hard=True).sum())
    assert loads == forward + 2 <= PASSES
    assert size <= most
    assert total == 1000
    k, epsilon = da.from_array(np.asarray([1000.5], dtype)), da.from_array(np.asarray([0.1], dtype))
    for f in (softk.topk, softk.log_topk, softk.threshold):
        out, pull = softk.vjp(f, x, k, epsilon=epsilon)
        found = pull(da.ones_like(out))
        together = [found["x"].sum(), found["k"], found["epsilon"]]
        loads, size, _ = measured(source, *together)
        assert loads - (forward - 1) <= PASSES
        assert size <= most


def test_the_measure_sees_a_gathered_axis() -> None:
    source = Source(10_000, "float64")
    x = da.from_array(source, chunks=1000)
    _, size, _ = measured(source, softk.topk(x, 10, weights=da.ones(10_000)).sum())
    assert size == 10_000


@pytest.mark.parametrize("count", [10, 40])
def test_graph_grows_with_the_chunks_and_passes(count: int, rng: Any) -> None:
    x = da.from_array(rng.standard_normal(100 * count), chunks=100)
    (found,) = dask.optimize(softk.topk(x, 10))
    assert len(dict(found.__dask_graph__())) <= 4 * 2.5 * count + 40


def test_the_same_graph_for_the_same_call(rng: Any) -> None:
    x = da.from_array(rng.standard_normal(100), chunks=30)
    assert softk.topk(x, 10).name == softk.topk(x, 10).name
    assert softk.topk(x, 10).name != softk.topk(x, 11).name


# --- the copies of the tasks


def arrays(rng: Any) -> dict[str, Any]:
    x = da.from_array(rng.standard_normal((4, 6)), chunks=((2, 2), (2, 4)))
    part = dask.delayed(np.ones)((3,))
    return {
        "from_array": x,
        "elementwise": da.exp(-x),
        "reshaped": x.reshape(24),
        "rechunked": x.rechunk((4, 3)),
        "sliced": x.T[1:, ::2],
        "random": da.random.default_rng(0).normal(size=(4, 6), chunks=(2, 3)) + 1.0,
        "delayed": da.concatenate([da.from_delayed(part, (3,), float), da.arange(5, chunks=2)]),
        "reduced": x.sum(axis=1),
        "persisted": (x + 1.0).persist(scheduler="sync"),
    }


@pytest.mark.parametrize("name", [*arrays(np.random.default_rng(0))])
def test_copies_compute_the_same_from_other_tasks(name: str, rng: Any) -> None:
    from softk_dask.copies import computed_again

    array, after = arrays(rng)[name], da.zeros(4, chunks=1) + 1.0
    once = computed_again(array, None, "a")
    twice = computed_again(once, after, "b")
    expected = value(array)
    for copy in (once, twice, twice + once):
        assert_close(value(copy), 2.0 * expected if copy.name not in (once.name, twice.name) else expected)
    tasks = task_spec.convert_legacy_graph(dict(array.dask))
    kept = {key for key, task in tasks.items() if isinstance(task, task_spec.DataNode)}
    keys = [set(dict(each.dask)) for each in (array, once, twice)]
    assert keys[0] & keys[1] <= kept  # values in memory are not copied
    assert keys[1] & keys[2] <= kept


def test_copies_wait() -> None:
    from softk_dask.copies import computed_again

    order: list[str] = []

    def note(block: Any, name: str) -> Any:
        order.append(name)
        return block

    x = da.map_blocks(note, da.from_delayed(dask.delayed(note)(np.ones(3), "load"), (3,), float), "use", dtype=float)
    after = da.map_blocks(note, da.ones(6, chunks=2), "after", dtype=float)
    order.clear()
    value(computed_again(x, after, 0))
    assert order == ["after"] * 3 + ["load", "use"]


# --- a cluster


def test_a_cluster_computes_the_same_bits(rng: Any) -> None:
    distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
    x, u = rng.standard_normal((2, 4, 3000)).astype("float32")

    def results() -> Any:
        lazy = da.from_array(x, chunks=(2, 500))
        out, pull = softk.vjp(softk.topk, lazy, da.full((4, 1), 20.5, dtype="float32", chunks=2), epsilon=0.3)
        hard = softk.topk(lazy, 20, hard=True)
        return out, hard, pull(da.from_array(u, chunks=(4, 700)))

    expected = dask.compute(results(), scheduler="threads")[0]
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        found = client.compute(results(), sync=True)
        # What the cluster holds is not computed again.
        kept = da.from_array(x, chunks=(2, 500)).persist()
        held = softk.topk(kept, 20, epsilon=0.3).compute()
        reshaped = softk.topk((2.0 * kept).reshape(2, 2, 3000), 20, epsilon=0.6).compute()
        workers = client.run(lambda: None)
    assert len(workers) == 2
    for one, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(one, other)
    for name, gradient in expected[2].items():
        np.testing.assert_array_equal(found[2][name], gradient)
    np.testing.assert_allclose(held, softk.topk(x, 20, epsilon=0.3), rtol=0, atol=1e-5)
    np.testing.assert_allclose(reshaped.reshape(4, 3000), held, rtol=0, atol=1e-5)


def test_primitives_are_known_in_another_process() -> None:
    """A pickled primitive is a copy; the registered one has the kernels."""
    from softk._reference.threshold.masks import mask
    from softk_dask import _registered

    cloudpickle = pytest.importorskip("cloudpickle")
    copy = cloudpickle.loads(cloudpickle.dumps(mask))
    assert copy is not mask
    assert _registered(copy) is mask
