"""Dask: values stay lazy, the batch stays in its blocks, and the graph stays small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import softk

from . import closed_form
from .closed_form import assert_close

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("a value was computed before it was asked for")


@pytest.fixture(autouse=True)
def _lazy() -> Iterator[None]:
    """Nothing may be computed, but by `value`."""
    with dask.config.set(scheduler=refuse):
        yield


def value(lazy: Any) -> np.ndarray:
    assert isinstance(lazy, da.Array)
    found: np.ndarray = lazy.compute(scheduler="sync")
    return found


def test_the_guard_guards() -> None:
    with pytest.raises(AssertionError, match="a value was computed"):
        da.ones(3).compute()


def blocks(values: np.ndarray, chunks: Any) -> Any:
    return da.from_array(values, chunks=chunks)


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "topk": lambda x, k: softk.topk(x, k, epsilon=0.7),
    "hard": lambda x, k: softk.topk(x, 2, epsilon=0.7, hard=True),
    "where": lambda x, k: softk.topk(x, k, epsilon=0.7, where=x > -1.0),
    "weights": lambda x, k: softk.topk(x, k, epsilon=0.7, weights=da.exp(x)),
    "threshold": lambda x, k: softk.threshold(x, k, epsilon=0.7),
    "threshold-keepdims": lambda x, k: softk.threshold(x, k, epsilon=0.7, keepdims=True),
    "quantiles": lambda x, k: softk.quantile(x, da.from_array(np.asarray([0.2, 0.7]), chunks=1), epsilon=0.7),
    "epsilon": lambda x, k: softk.topk(x, k, epsilon=0.1 + k),
}


@pytest.mark.parametrize("call", CALLS)
def test_values_are_those_of_numpy_and_lazy(call: str, rng: Any) -> None:
    x, k = rng.standard_normal((5, 8)), rng.uniform(1.0, 4.0, (5, 1))
    found = CALLS[call](blocks(x, (2, 3)), blocks(k, (3, 1)))
    assert isinstance(found, da.Array)
    expected = {
        "topk": lambda: closed_form.topk(x, k, 0.7),
        "hard": lambda: (np.argsort(np.argsort(-x)) < 2).astype(float),
        "where": lambda: closed_form.topk(x, k, 0.7, where=x > -1.0),
        "weights": lambda: closed_form.topk(x, k, 0.7, np.exp(x)),
        "threshold": lambda: closed_form.threshold(x, k, 0.7)[:, 0],
        "threshold-keepdims": lambda: closed_form.threshold(x, k, 0.7),
        "quantiles": lambda: np.stack([closed_form.quantile(x, q, 0.7)[:, 0] for q in (0.2, 0.7)]),
        "epsilon": lambda: closed_form.topk(x, k, 0.1 + k),
    }[call]().astype(float)
    assert found.shape == expected.shape
    assert found.dtype == np.float64
    assert_close(value(found), expected, 1e-13)


def test_a_number_as_the_probability(rng: Any) -> None:
    x = rng.standard_normal((5, 8))
    for keepdims in (False, True):
        found = softk.quantile(blocks(x, (2, 3)), 0.35, epsilon=0.7, keepdims=keepdims)
        expected = closed_form.quantile(x, 0.35, 0.7).astype(float)
        assert_close(value(found), expected if keepdims else expected[:, 0], 1e-13)


@pytest.mark.parametrize("chunks", [((2, 3), (3, 5), (4,)), ((5,), (8,), (2, 2)), ((1, 1, 1, 1, 1), (4, 4), (4,))])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_results_keep_the_blocks(axis: int, chunks: Any, rng: Any) -> None:
    x = rng.standard_normal((5, 8, 4))
    found = softk.topk(blocks(x, chunks), 2.5, axis=axis, epsilon=0.7)
    assert found.chunks == chunks
    values = np.moveaxis(closed_form.topk(np.moveaxis(x, axis, -1), 2.5, 0.7).astype(float), -1, axis)
    assert_close(value(found), values, 1e-13)
    level = softk.threshold(blocks(x, chunks), 2.5, axis=axis, epsilon=0.7)
    assert level.chunks == (*chunks[:axis], *chunks[axis + 1 :])


@pytest.mark.parametrize("mixed", [((2, 3), (5,), (8,)), ((5,), (1, 4), (3, 5)), ((1, 3, 1), (2, 2, 1), (1, 7))])
def test_mixed_blocks(mixed: Any, rng: Any) -> None:
    """k, epsilon and the weights follow the blocks of the scores, however they come."""
    batch, other, items = mixed
    values = closed_form.problem(rng, batch=(5,), n=8)
    weights = rng.uniform(0.3, 2.0, (5, 8))
    found = softk.topk(
        blocks(values["x"], (batch, items)),
        blocks(values["k"], (other, 1)),
        epsilon=blocks(values["epsilon"], (batch[::-1], 1)),
        weights=blocks(weights, (other, items[::-1])),
    )
    assert found.chunks == (batch, (8,))  # with weights, the axis is gathered
    assert_close(value(found), closed_form.topk(**{**values, "weights": weights}).astype(float), 1e-13)


def test_arguments_without_axes_and_of_items(rng: Any) -> None:
    values = closed_form.problem(rng, n=8)
    x = rng.standard_normal((4, 8))
    found = softk.topk(
        blocks(x, (2, 4)),
        blocks(values["k"], ()),
        epsilon=blocks(values["epsilon"], ()),
        weights=blocks(values["weights"], 3),
    )
    assert_close(value(found), closed_form.topk(**{**values, "x": x}).astype(float), 1e-13)


@pytest.mark.parametrize("one", ["scores", "slices"])
def test_single_item_and_single_slice(one: str, rng: Any) -> None:
    """Sizes at which a score and a value a slice cannot be told apart by their shape."""
    x = rng.standard_normal((4, 1) if one == "scores" else (1, 4))
    k = np.full((x.shape[0], 1), 0.5)
    found = softk.topk(
        blocks(x, 2), blocks(k, 2), epsilon=blocks(np.full_like(k, 0.7), 1), weights=blocks(np.ones_like(x), 1)
    )
    assert_close(value(found), closed_form.topk(x, k, 0.7).astype(float), 1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype_is_known_without_computing(dtype: str, rng: Any) -> None:
    x = rng.standard_normal((4, 8)).astype(dtype)
    for found in (
        softk.topk(blocks(x, (2, 8)), 2),
        softk.threshold(blocks(x, (2, 8)), 2),
        softk.quantile(blocks(x, (2, 8)), 0.3, epsilon=0.1),
    ):
        assert found.dtype == dtype
        assert value(found).dtype == dtype
        assert found._meta.dtype == dtype


def tasks(*lazy: Any) -> int:
    """Tasks of a graph after Dask's own optimisation, which is what runs."""
    (optimised,) = [dask.optimize(*lazy)]
    return len(set().union(*(dict(found.__dask_graph__()).keys() for found in optimised)))


@pytest.mark.parametrize("count", [4, 16])
def test_graph_grows_with_the_blocks_alone(count: int, rng: Any) -> None:
    """A few tasks a block, whatever the solver does inside of them."""
    x = da.from_array(rng.standard_normal((2 * count, 50)), chunks=(2, 50))
    bare = tasks(x)
    assert tasks(softk.topk(x, 5, epsilon=0.7)) - bare <= 5 * count + 8
    k = da.from_array(rng.uniform(1.0, 9.0, (2 * count, 1)), chunks=(2, 1))
    weights = da.from_array(rng.uniform(0.5, 2.0, 50), chunks=50)
    whole = softk.topk(x, k, epsilon=0.7, weights=weights)
    assert tasks(whole) - tasks(x, k, weights) <= 8 * count + 8
    assert tasks(softk.quantile(x, 0.3, epsilon=0.1)) - bare <= 10 * count + 10


@pytest.mark.parametrize("function", ["topk", "threshold"])
def test_pullback_is_lazy_and_right(function: str, rng: Any) -> None:
    values = closed_form.problem(rng, batch=(5,), n=8)
    chunks = {"x": (2, 3), "k": (3, 1), "epsilon": (5, 1), "weights": 5}
    given = {name: blocks(array, chunks[name]) for name, array in values.items()}
    f = {"topk": softk.topk, "threshold": softk.threshold}[function]
    out, pull = softk.vjp(f, given["x"], given["k"], epsilon=given["epsilon"], weights=given["weights"])
    u = rng.standard_normal(out.shape)
    found = pull(blocks(u, 3))
    expected = closed_form.pullback(function, u, values)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert_close(value(gradient), expected[name])
    tangents = {name: rng.standard_normal(array.shape) for name, array in values.items()}
    moved = {name: blocks(array, chunks[name]) for name, array in tangents.items()}
    _, pushed = softk.jvp(f, given["x"], given["k"], tangents=moved, epsilon=given["epsilon"], weights=given["weights"])
    assert_close(value(pushed), closed_form.push(function, tangents, values))


def test_pullback_of_the_quantile(rng: Any) -> None:
    x, u = rng.standard_normal((3, 8)), rng.standard_normal((2, 3))
    q, epsilon = np.asarray([0.25, 0.8]), np.asarray([[0.5], [0.7], [1.1]])
    _, pull = softk.vjp(softk.quantile, blocks(x, (2, 4)), blocks(q, 1), epsilon=blocks(epsilon, (1, 1)))
    found = pull(blocks(u, 1))
    at = [[closed_form.quantile_derivatives(x[i], q[j], epsilon[i])[1] for i in range(3)] for j in range(2)]
    in_x = [sum(u[j, i] * at[j][i][:8] for j in range(2)) for i in range(3)]
    assert_close(value(found["x"]), np.asarray(in_x).astype(float))
    assert_close(
        value(found["q"]), np.asarray([sum(u[j, i] * at[j][i][8] for i in range(3)) for j in range(2)]).astype(float)
    )
    in_epsilon = [[sum(u[j, i] * at[j][i][9] for j in range(2))] for i in range(3)]
    assert_close(value(found["epsilon"]), np.asarray(in_epsilon).astype(float))


def test_computed_in_threads(rng: Any) -> None:
    x = rng.standard_normal((64, 30))
    found = softk.topk(blocks(x, (4, 10)), 3.5, epsilon=0.4).compute(scheduler="threads")
    assert_close(found, closed_form.topk(x, 3.5, 0.4).astype(float), 1e-13)


ROWS = np.asarray([[0.5, 2.0, -1.0, 1.0], [-3.0, 0.0, 1.0, 2.0], [1.0, 0.0, 3.0, -2.0]])


def filtered() -> Any:
    """Two of the rows, in blocks whose sizes nobody knows."""
    x = da.from_array(ROWS, chunks=(1, 4))
    return x[x[:, 0] > 0.0]


@pytest.mark.parametrize(
    "f",
    [
        lambda x: softk.topk(x, 2),
        lambda x: softk.threshold(x, 2.5),
        lambda x: softk.quantile(x, 0.3, epsilon=0.1),
        lambda x: softk.sorted_topk(x, 2).assignment,
        lambda x: softk.rank(x, epsilon=0.1),
    ],
)
def test_batch_in_blocks_of_unknown_size(f: Callable[[Any], Any]) -> None:
    assert_close(value(f(filtered())), f(ROWS[ROWS[:, 0] > 0.0]), 1e-13)


def test_unknown_sizes_that_are_needed() -> None:
    """Those of the selected axis, and all where two arrays must fit block by block."""
    x = filtered()
    needed = r"x must have a known size along axis 0, got shape \(nan, 4\); x\.compute_chunk_sizes\(\) finds it"
    for call in (
        lambda: softk.topk(x, 2, axis=0),
        lambda: softk.threshold(x, 2, axis=0),
        lambda: softk.quantile(x, 0.5, axis=0, epsilon=0.1),
        lambda: softk.sorted_topk(x, 1, axis=0),
        lambda: softk.sort(x, axis=0, epsilon=0.1),
        lambda: softk.topk(x, x[:, :1]),
        lambda: softk.topk(x, 2, weights=x),
        lambda: softk.topk(x, 2, where=x > 0.0),
        lambda: softk.vjp(softk.topk, x, 2)[1](x),
    ):
        with pytest.raises(ValueError, match=needed):
            call()
    with pytest.raises(ValueError, match=r"k must have a known size along axis 0, got shape \(nan, 1\)"):
        softk.topk(da.from_array(ROWS), x[:, :1])
    with pytest.raises(ValueError, match=r"queries must have a known size along axis 0"):
        softk.neighbors.weights(x, da.from_array(ROWS), 2)
    with pytest.raises(ValueError, match=r"keys must have a known size along axis 0"):
        softk.neighbors.weights(da.from_array(ROWS), x, 2)
