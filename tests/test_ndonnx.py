"""ndonnx: arrays that are traced to an ONNX program, whose batch is not known until it runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import softk

ndx = pytest.importorskip("ndonnx", reason="ndonnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def program(f: Callable[..., dict[str, Any]], **like: np.ndarray) -> Callable[..., dict[str, np.ndarray]]:
    """The function as an ONNX program, traced once for any number of rows."""
    inputs = {
        name: ndx.argument(shape=("rows", *values.shape[1:]), dtype=ndx.asarray(values).dtype)
        for name, values in like.items()
    }
    outputs = f(**inputs)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # which takes minutes
    session = onnxruntime.InferenceSession(ndx.build(inputs, outputs).SerializeToString(), options)
    return lambda **values: dict(zip(outputs, session.run(list(outputs), values), strict=True))


def masks(x: Any, k: Any, epsilon: Any, weights: Any, where: Any, u: Any, points: Any) -> dict[str, Any]:
    mask, pullback = softk.vjp(softk.topk, x, k, epsilon=epsilon)
    return {
        "mask": mask,
        **{f"cotangent of {name}": values for name, values in pullback(u).items()},
        "hard": softk.topk(x, 2, mode="smallest", hard=True),
        "weighted": softk.log_topk(x, 2.5, epsilon=0.5, weights=weights, where=where),
        "threshold": softk.threshold(points, 2, axis=1),
        "quantile": softk.quantile(x, 0.3, keepdims=True, epsilon=0.1),
        "neighbors": softk.neighbors.weights(points, points, 1),
    }


def test_batch_that_is_not_known(rng: Any) -> None:
    """A number of rows that the trace has not seen, and the values are NumPy's."""

    def given(rows: int) -> dict[str, np.ndarray]:
        x, u = rng.normal(size=(2, rows, 6))
        k, epsilon = rng.uniform(0.5, 3.0, (rows, 1)), rng.uniform(0.1, 1.0, (rows, 1))
        weights, where = rng.uniform(0.5, 2.0, (rows, 6)), rng.uniform(size=(rows, 6)) > 0.3
        points = rng.normal(size=(rows, 3, 2))
        return {"x": x, "k": k, "epsilon": epsilon, "weights": weights, "where": where, "u": u, "points": points}

    run = program(masks, **given(1))
    for rows in (1, 4):
        arguments = given(rows)
        found, wanted = run(**arguments), masks(**arguments)
        assert set(found) == set(wanted)
        for name, values in wanted.items():
            assert found[name].shape == values.shape, name
            np.testing.assert_allclose(found[name], values, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: softk.sorted_topk(x, 2),
        partial(softk.sort, epsilon=0.1),
        partial(softk.rank, epsilon=0.1),
        lambda x: softk.transport(x, x[0, :2], x[0, :2]),
    ],
)
def test_sizes_that_the_solver_of_many_anchors_needs(f: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"x must have a known size along axis 0, got shape \(None, 6\)"):
        f(ndx.argument(shape=("rows", 6), dtype=ndx.float64))


@pytest.mark.parametrize("f", [softk.topk, softk.log_topk, softk.threshold, partial(softk.quantile, epsilon=0.1)])
def test_selected_axis_that_is_not_known(f: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"x must have a known size along axis 1, got shape \(6, None\)"):
        f(ndx.argument(shape=(6, "items"), dtype=ndx.float64), 1)


def test_keys_that_are_not_known() -> None:
    keys = ndx.argument(shape=("keys", 5), dtype=ndx.float64)
    with pytest.raises(ValueError, match=r"key must have a known size along axis 0, got shape \(None, 5\)"):
        softk.attention.attend(keys, keys, keys, 2)
