"""The calls of other libraries beside those here, as docs/coming-from.md has them. Absent libraries are skipped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import softk

K = 3


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=12)


@pytest.fixture
def soft_sort() -> Any:
    """OTT's functions, in double precision."""
    ott = pytest.importorskip("ott.tools.soft_sort", reason="ott-jax is not installed", exc_type=ImportError)
    jax = pytest.importorskip("jax")
    loose = jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
    with jax.enable_x64(True), loose[0], loose[1]:
        yield ott


@pytest.mark.parametrize("epsilon", [0.3, pytest.param(0.1, marks=pytest.mark.full)])
def test_ott(soft_sort: Any, x: np.ndarray, epsilon: float) -> None:
    options = {"epsilon": epsilon, "threshold": 1e-10, "max_iterations": 20_000}
    plain = {"squashing_fun": lambda z: z, **options}
    squashed = 1.0 / (1.0 + np.exp(-(x - x.mean()) / x.std()))
    wide = epsilon * (x.size - 1)
    pairs = [
        (soft_sort.topk_mask(x, k=K, **plain), softk.topk(x, K, epsilon=epsilon)),
        (soft_sort.topk_mask(x, k=K, **options), softk.topk(squashed, K, epsilon=epsilon)),
        (soft_sort.ranks(x, **plain), softk.rank(x, epsilon=wide)),
        (soft_sort.sort(x, **plain), softk.sort(x, epsilon=wide)),
    ]
    for theirs, ours in pairs:
        np.testing.assert_allclose(np.asarray(theirs), ours, rtol=0, atol=1e-8)


@pytest.mark.parametrize("softness", [0.3, 0.1])
def test_softtorch(x: np.ndarray, softness: float) -> None:
    softtorch = pytest.importorskip("softtorch", reason="softtorch is not installed", exc_type=ImportError)
    torch = pytest.importorskip("torch")
    options = {"sinkhorn_max_iter": 20_000, "sinkhorn_tol": 1e-12}
    theirs = softtorch.topk(
        torch.asarray(x), K, softness=softness, method="ot", standardize=False, ot_kwargs=options
    ).indices
    np.testing.assert_allclose(theirs.numpy(), softk.sorted_topk(x, K, epsilon=K * softness).assignment, atol=1e-9)


def test_torchsort(x: np.ndarray) -> None:
    """Another operator with the same limit."""
    torchsort = pytest.importorskip("torchsort", reason="torchsort is not installed", exc_type=ImportError)
    torch = pytest.importorskip("torch")
    rows = torch.asarray(x)[None, :]
    theirs = torchsort.soft_rank(rows, regularization_strength=1e-3)[0].numpy()
    np.testing.assert_allclose(theirs, softk.rank(x, epsilon=1e-3) + 1.0, atol=1e-6)
    theirs = torchsort.soft_sort(rows, regularization_strength=1e-3)[0].numpy()
    np.testing.assert_allclose(theirs, softk.sort(x, epsilon=1e-3), atol=1e-6)


def test_entmax(x: np.ndarray) -> None:
    """Another operator with the same limit: with a small temperature all weight is on the largest score."""
    entmax = pytest.importorskip("entmax", reason="entmax is not installed", exc_type=ImportError)
    torch = pytest.importorskip("torch")
    for function in (entmax.sparsemax, entmax.entmax15):
        weights = function(torch.asarray(x / 1e-3), dim=-1).numpy()
        np.testing.assert_allclose(weights, softk.topk(x, 1, epsilon=1e-3), atol=1e-9)


@pytest.mark.parametrize("largest", [True, False])
def test_torch_topk(x: np.ndarray, largest: bool) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    scores = torch.asarray(x)
    theirs = torch.topk(scores, K, largest=largest)
    mode: Any = "largest" if largest else "smallest"
    values, indices, _ = softk.select(scores, K, mode=mode)
    assert torch.equal(values, theirs.values)
    assert torch.equal(indices, theirs.indices)
    assert torch.equal(softk.topk(scores, K, mode=mode, hard=True).nonzero().ravel(), theirs.indices.sort().values)
    soft = softk.sorted_topk(scores, K, mode=mode, epsilon=1e-3).values
    torch.testing.assert_close(soft, theirs.values, rtol=0, atol=1e-12)


def test_lax_top_k(x: np.ndarray) -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    scores = jax.numpy.asarray(x)
    values, indices, _ = softk.select(scores, K)
    for ours, theirs in zip((values, indices), jax.lax.top_k(scores, K), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_softmax_of_two_scores() -> None:
    x = np.asarray([0.3, -0.4])
    powers = np.exp(x / 0.7)
    np.testing.assert_allclose(softk.topk(x, 1, epsilon=0.7), powers / powers.sum(), rtol=1e-15)
