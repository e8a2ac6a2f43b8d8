"""What the operator holds: at the peak of forward + backward, and between the two."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import softk

#: Arrays of the working dtype beyond the arguments, the cotangent and the results, with kernels and without them.
PEAK = {
    "auto": {"": 1.0, "weights": 1.0, "where": 2.0, "weights where": 3.0},
    "none": {"": 3.3, "weights": 4.0, "where": 3.3, "weights where": 5.0},
}
#: What objects without an array may hold, in arrays of the test's size: some kilobytes.
SMALL = 0.01

FULL = pytest.mark.full
CASES = pytest.mark.parametrize("given", ["", "weights", "where", "weights where"])


def _arguments(given: str, shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    named = {
        "weights": rng.uniform(0.5, 2.0, size=shape).astype(dtype),
        "where": rng.uniform(size=shape) < 0.9,
    }
    return {name: named[name] for name in given.split()}


# --- at the peak


def _peak(both: Callable[[], tuple[Any, Any]]) -> int:
    """Bytes at the peak of a call beyond those before it and beyond its results."""
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        mask, cotangents = both()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert cotangents["x"].shape == mask.shape
    return peak - before - mask.nbytes - sum(value.nbytes for value in cotangents.values())


@CASES
@pytest.mark.parametrize(
    ("k", "dtype"),
    [
        (1000, "float32"),
        (500_000, "float64"),
        (1000.5, "float32"),
        *(pytest.param(*case, marks=FULL) for case in [(1000, "float64"), (500_000, "float32"), (1000.5, "float64")]),
    ],
)
@pytest.mark.parametrize("kernels", ["auto", "none"])
def test_peak(k: float, dtype: str, given: str, kernels: str, rng: np.random.Generator) -> None:
    """What is allocated in forward + backward beside the mask and the cotangents; weights and where are inputs."""
    n = 1_000_000
    x, u = rng.normal(size=(2, n)).astype(dtype)
    options = _arguments(given, (n,), dtype, rng)

    def both() -> tuple[Any, Any]:
        with softk.kernels(kernels):
            mask, pullback = softk.vjp(softk.topk, x, k, epsilon=0.1, **options)
            return mask, pullback(u)

    both()  # the first call may compile
    # What other threads of the test process allocate meanwhile is counted too: the smallest of three peaks is taken.
    arrays = min(_peak(both) for _ in range(3)) / x.nbytes
    assert arrays <= PEAK[kernels][given] + SMALL, f"{arrays:.3f} arrays at the peak"


# --- between forward and backward: x's size once, plus weights and where


def _allowed(given: str, n: int, itemsize: int) -> int:
    size = n * itemsize
    return size + ("weights" in given) * size + ("where" in given) * n + 64 * itemsize


@CASES
@pytest.mark.parametrize("moved", ["x", "all"])
@pytest.mark.parametrize("function", ["topk", "threshold"])
@pytest.mark.parametrize("mode", ["largest", "smallest"])
def test_saved_by_torch(given: str, moved: str, function: str, mode: str, rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    n = 10_000
    x = torch.asarray(rng.normal(size=n).astype("float32")).requires_grad_()
    options = {name: torch.asarray(value) for name, value in _arguments(given, (n,), "float32", rng).items()}
    k, epsilon = torch.asarray(100.0), torch.asarray(0.1)
    if moved == "all":
        for value in (k, epsilon, *(options[name] for name in options if name == "weights")):
            value.requires_grad_()
    saved = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = getattr(softk, function)(x, k, mode=mode, epsilon=epsilon, **options)
    assert out.requires_grad
    total = sum(size for size, _ in saved.values())
    assert total >= 4 * n
    assert total <= _allowed(given, n, 4), f"{sorted(size // n for size, _ in saved.values())} bytes a score are saved"


@pytest.mark.parametrize(
    ("given", "moved", "function"),
    [
        ("", "x", "topk"),
        ("", "all", "threshold"),
        ("weights", "all", "topk"),
        ("where", "x", "topk"),
        ("weights where", "x", "threshold"),
        ("weights where", "all", "topk"),
    ],
)
def test_saved_by_jax(given: str, moved: str, function: str, rng: np.random.Generator) -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    n = 10_000
    arguments = {"x": rng.normal(size=n), "k": np.asarray(100.0), "epsilon": np.asarray(0.1)}
    arguments |= _arguments(given, (n,), "float32", rng)
    arguments = {
        name: jax.numpy.asarray(value if value.dtype == bool else value.astype("float32"))
        for name, value in arguments.items()
    }
    names = [name for name in arguments if name != "where"] if moved == "all" else ["x"]
    others = {name: value for name, value in arguments.items() if name not in names}

    def f(moving: dict[str, Any]) -> Any:
        every = {**moving, **others}
        return getattr(softk, function)(every.pop("x"), every.pop("k"), **every)

    _, pullback = jax.vjp(f, {name: arguments[name] for name in names})
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(pullback)}.values()
    total = sum(leaf.nbytes for leaf in leaves)
    assert total >= 4 * n
    assert total <= _allowed(given, n, 4), f"{sorted(leaf.nbytes // n for leaf in leaves)} bytes a score are saved"
