"""Ragged rows: every segment is what `softk.topk` makes of it alone, on every library."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import softk

from .closed_form import assert_close
from .libraries import BY_NAME, Library

LENGTHS = [5, 0, 700, 1, 80]
CUTS = np.cumsum([0, *LENGTHS])
MASSES = {
    "soft": np.asarray([2.5, 1.0, 100.3, 1.0, 200.0]),  # more than the last segment has
    "nearly hard": np.asarray([2.0, 0.0, 50.0, 0.5, 40.0]),
    "weights and where": np.asarray([2.0, 0.0, 100.0, 0.3, 20.0]),
    "hard": np.asarray([2.0, 1.0, 100.0, 1.0, 20.0]),
}


@pytest.fixture(params=["numpy", "torch", "jax", "dask", "array-api-strict"])
def library(request: pytest.FixtureRequest) -> Library:
    found = BY_NAME[request.param]
    found.require()
    return found


@pytest.mark.parametrize("kind", MASSES)
@pytest.mark.parametrize("given", ["list", "array"])
def test_every_segment_is_a_slice(library: Library, kind: str, given: str, rng: Any) -> None:
    """Values and derivatives in the scores, k, epsilon and the weights."""
    if library.name == "jax" and (kind == "nearly hard" or given == "list"):
        pytest.skip("compiling takes long")
    n, k = CUTS[-1], MASSES[kind]
    x, u = rng.standard_normal((2, 2, n))
    epsilon = np.full(5, 1e-3 if kind == "nearly hard" else 0.3)
    items: dict[str, np.ndarray] = {}
    if kind == "weights and where":
        items = {"weights": rng.uniform(0.3, 2.0, (2, n)), "where": rng.random((2, n)) < 0.8}
    options: dict[str, Any] = {"hard": True} if kind == "hard" else {}
    lengths = LENGTHS if given == "list" else library.array(LENGTHS, "int64")
    own = {name: library.array(value, value.dtype) for name, value in items.items()}
    out, pull = softk.vjp(
        softk.segment_topk,
        library.array(x),
        library.array(k),
        lengths,
        epsilon=library.array(epsilon),
        **own,
        **options,
    )
    found = {name: library.numpy(value) for name, value in pull(library.array(u)).items()}
    mask = library.numpy(out)
    assert set(found) == {"x", "k", "epsilon", *items} - {"where"}
    scale: dict[str, float] = {}
    pairs = []
    for i, (start, stop) in enumerate(pairwise(CUTS)):
        if start == stop:
            assert found["k"][i] == 0.0
            continue
        alone = {name: value[:, start:stop] for name, value in items.items()}
        is_over = "weights" not in items and k[i] > stop - start
        mass = np.full((2, 1), min(k[i], stop - start) if is_over else k[i])
        expected, pull_alone = softk.vjp(
            softk.topk, x[:, start:stop], mass, epsilon=np.full((2, 1), epsilon[i]), **alone, **options
        )
        np.testing.assert_allclose(mask[:, start:stop], expected, rtol=0, atol=1e-14)
        wanted = pull_alone(u[:, start:stop])
        per_item = ("x", *(name for name in items if name != "where"))
        pairs += [(name, found[name][:, start:stop], wanted[name]) for name in per_item]
        pairs.append(("k", found["k"][i], np.asarray(0.0) if is_over else wanted["k"].sum()))
        pairs.append(("epsilon", found["epsilon"][i], wanted["epsilon"].sum()))
    for name, _, wanted in pairs:
        scale[name] = max(scale.get(name, 0.0), np.abs(wanted).max())
    for name, value, wanted in pairs:
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-11 * scale[name] + 1e-300)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtypes_and_the_mass(dtype: str, rng: Any) -> None:
    """The mask has the dtype of the scores, and k is its sum over a segment of many sizes of scores."""
    lengths = [3000, 1, 40, 5000]
    x = (10.0 ** rng.uniform(-4, 4, sum(lengths))).astype(dtype)
    for epsilon in (1e-2, 1.0, 1e3):
        mask = softk.segment_topk(x, 20, lengths, epsilon=epsilon)
        assert mask.dtype == dtype
        if dtype == "float32":
            sums = np.add.reduceat(mask, np.cumsum([0, *lengths[:-1]]), dtype=np.float64)
            assert np.all(np.abs(sums - [20, 1, 20, 20]) <= 16 * 2.0**-23 * 20)


def test_special_segments() -> None:
    inf, nan = np.inf, np.nan
    x = np.asarray([1.0, nan, 3.0, 2.0, inf, inf, 0.0, -inf, 1.0])
    found = softk.segment_topk(x, 1, [2, 2, 3, 2], epsilon=1e-3)
    np.testing.assert_array_equal(found, [nan, nan, 1.0, 0.0, 0.5, 0.5, 0.0, 0.0, 1.0])
    np.testing.assert_array_equal(softk.segment_topk(x[:0], 1, []), x[:0])
    np.testing.assert_array_equal(softk.segment_topk(x[:0], 1, [0, 0]), x[:0])
    bad = softk.segment_topk(x[2:4], np.asarray([-1.0, 1.0]), [1, 1])
    np.testing.assert_array_equal(bad, [nan, 1.0])
    for lengths in ([1, 2], [1, 4], [-1, 5]):  # an array of lengths is not looked at
        assert np.isnan(softk.segment_topk(np.ones(4), 1, np.asarray(lengths))).all()


def test_smallest_and_one_epsilon(rng: Any) -> None:
    x = rng.standard_normal(12)
    found = softk.segment_topk(x, 2, [4, 8], mode="smallest", epsilon=0.4)
    np.testing.assert_allclose(found, softk.segment_topk(-x, 2, [4, 8], epsilon=0.4), rtol=0, atol=1e-15)


def test_traced_lengths_and_transforms_of_jax(rng: Any) -> None:
    """One program for all lengths of one total, under jit, grad and vmap."""
    jax = pytest.importorskip("jax")
    x, u = rng.standard_normal((2, 3, 20))
    count = 0

    def loss(x: Any, u: Any, lengths: Any) -> Any:
        nonlocal count
        count += 1
        return (u * softk.segment_topk(x, 2, lengths, epsilon=0.4)).sum()

    gradient = jax.jit(jax.vmap(jax.grad(loss), in_axes=(0, 0, None)))
    for lengths in ([7, 13, 0], [4, 6, 10]):
        found = gradient(jax.numpy.asarray(x), jax.numpy.asarray(u), jax.numpy.asarray(lengths))
        _, pull = softk.vjp(softk.segment_topk, x, 2, lengths, epsilon=0.4)
        assert_close(np.asarray(found), pull(u)["x"])
    assert count == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")  # torch's own forward mode
def test_native_derivatives_of_torch(rng: Any) -> None:
    torch = pytest.importorskip("torch")
    x = torch.tensor(rng.standard_normal((2, 5)), requires_grad=True)
    k = torch.tensor([1.3, 0.9], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor(rng.uniform(0.5, 2.0, 5), requires_grad=True)

    def f(x: Any, k: Any, weights: Any) -> Any:
        return softk.segment_topk(x, k, [3, 2], epsilon=0.7, weights=weights)

    assert torch.autograd.gradcheck(f, (x, k, weights), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, k, weights))
    mapped = torch.func.vmap(lambda row: softk.segment_topk(row, 1.5, [3, 2], epsilon=0.7))(x)
    torch.testing.assert_close(mapped, softk.segment_topk(x, 1.5, [3, 2], epsilon=0.7))


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
def test_nested_tensors_of_torch(rng: Any) -> None:
    """`softk.topk` of a jagged tensor: the rows alone, forward and backward; the rows may have further axes."""
    torch = pytest.importorskip("torch")

    def nested(*parts: Any) -> Any:
        return torch.nested.nested_tensor(list(parts), layout=torch.jagged)

    rows = [torch.tensor(rng.standard_normal(n)) for n in (5, 3, 8)]
    u = torch.tensor(rng.standard_normal(16))
    x = nested(*rows).requires_grad_()
    k = torch.tensor([[2.0], [1.5], [3.0]], dtype=torch.float64, requires_grad=True)
    mask = softk.topk(x, k, epsilon=0.4)
    assert mask.is_nested
    assert mask.shape == x.shape
    (mask.values() * u).sum().backward()
    for i, (start, stop) in enumerate(pairwise([0, 5, 8, 16])):
        row, mass = rows[i].clone().requires_grad_(), k.detach()[i].clone().requires_grad_()
        alone = softk.topk(row, mass, epsilon=0.4)
        (alone * u[start:stop]).sum().backward()
        assert_close(mask.values()[start:stop].detach(), alone.detach(), 1e-13)
        assert_close(x.grad.values()[start:stop], row.grad)
        assert_close(k.grad[i], mass.grad)
    deep = nested(torch.randn(5, 4), torch.randn(3, 4))
    found = softk.topk(deep, 2, axis=1, hard=True)
    assert torch.equal(found.values()[5:], softk.topk(deep.values()[5:], 2, axis=0, hard=True))
    weights = nested(*(torch.rand(n).double() + 0.5 for n in (5, 3, 8)))
    spent = (softk.topk(x, 2, weights=weights).values() * weights.values())[:5].sum()
    assert spent.item() == pytest.approx(2.0)
    for text, error, call in (
        ("axis must be 1, along which the rows of x", ValueError, lambda: softk.topk(deep, 2, axis=0)),
        ("weights must have ragged rows", TypeError, lambda: softk.topk(x, 1, weights=torch.ones(16))),
        (r"k must be a number, or have the shape \(3, 1\)", ValueError, lambda: softk.topk(x, torch.ones(3))),
    ):
        with pytest.raises(error, match=text):
            call()


def test_errors() -> None:
    x = np.ones(4)
    for k, lengths, options, kind, text in (
        (1, [1, 2], {}, ValueError, "lengths must sum to 4, the size of x along its last axis, got 3"),
        (1, [5, -1], {}, ValueError, r"lengths must be at least 0, got -1 as lengths\[1\]"),
        (1, [2.0, 2.0], {}, TypeError, r"lengths\[0\] must be a Python integer, got 2.0"),
        (1, 4, {}, TypeError, "lengths must be a list of integers or an integer array, got int"),
        (1, np.asarray([2.0, 2.0]), {}, TypeError, "lengths must be integers, got dtype float64"),
        (1, np.asarray([[2, 2]]), {}, ValueError, r"lengths must have one axis of known size, got shape \(1, 2\)"),
        (-1, [4], {}, ValueError, "k must be at least 0 and finite, got -1"),
        (np.ones(3), [2, 2], {}, ValueError, r"k must .* one value per segment, shape \(2,\), got shape \(3,\)"),
        (1.5, [4], {"hard": True}, ValueError, "k must be a whole number with hard=True, got 1.5"),
        (1, [4], {"epsilon": -1.0}, ValueError, "epsilon must be a positive"),
        (1, [4], {"axis": 0}, TypeError, "has no argument 'axis'"),
    ):
        with pytest.raises(kind, match=text):
            softk.segment_topk(x, k, lengths, **options)
