"""Random subsets: the model that hard samples follow, the relaxation and its derivatives, and the noise."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
import scipy.stats

import softk
from softk import sampling

from . import closed_form
from .closed_form import WIDE, assert_close, differences
from .libraries import Library
from .test_errors import complains

INF, NAN = math.inf, math.nan
WEIGHTS = np.asarray([1.0, 2.0, 3.0, 5.0, 0.5])


def plackett_luce(weights: np.ndarray, k: int) -> dict[tuple[int, ...], float]:
    """The probability of every subset of k items, added up over the orders in which it may be drawn."""
    found = {}
    for subset in combinations(range(len(weights)), k):
        found[subset] = 0.0
        for order in permutations(subset):
            left, probability = weights.sum(), 1.0
            for item in order:
                probability *= weights[item] / left
                left -= weights[item]
            found[subset] += probability
    return found


def reference(scores: Any, k: Any, noise: Any, epsilon: Any) -> np.ndarray:
    return closed_form.topk(np.asarray(scores, WIDE) - np.log(-np.log(np.asarray(noise, WIDE))), k, epsilon)


# --- the distribution


@pytest.mark.parametrize("k", [1, 2, 3])
def test_hard_subsets_follow_plackett_luce(k: int) -> None:
    """Chi-square over all subsets, with a fixed seed."""
    noise = np.random.default_rng(7).random((20_000, len(WEIGHTS)))
    masks = sampling.subset(np.log(WEIGHTS), k, noise, hard=True)
    assert np.all(masks.sum(axis=1) == k)
    wanted = plackett_luce(WEIGHTS, k)
    assert math.isclose(sum(wanted.values()), 1.0)
    counts = [np.all(masks[:, subset] == 1.0, axis=1).sum() for subset in wanted]
    assert sum(counts) == 20_000
    assert scipy.stats.chisquare(counts, 20_000 * np.asarray(list(wanted.values()))).pvalue > 0.01


def test_inclusion_frequencies() -> None:
    """Of hard subsets, and of soft ones at a small epsilon, whose masks are those of the hard ones but for a few."""
    noise = np.random.default_rng(3).random((20_000, len(WEIGHTS)))
    wanted = np.zeros(len(WEIGHTS))
    for subset, probability in plackett_luce(WEIGHTS, 2).items():
        wanted[list(subset)] += probability
    error = 4 * np.sqrt(wanted * (1 - wanted) / 20_000)
    for options in ({"hard": True}, {"epsilon": 1e-3}):
        found = sampling.subset(np.log(WEIGHTS), 2, noise, **options).mean(axis=0)
        assert np.all(np.abs(found - wanted) < error)


def test_removed_items_are_never_drawn() -> None:
    """The others follow the model that is left."""
    noise = np.random.default_rng(5).random((20_000, len(WEIGHTS)))
    where = np.asarray([True, True, False, True, True])
    removed = sampling.subset(np.log(WEIGHTS), 2, noise, where=where, hard=True)
    without = sampling.subset(np.where(where, np.log(WEIGHTS), -INF), 2, noise, hard=True)
    np.testing.assert_array_equal(removed, without)
    assert not removed[:, 2].any()
    wanted = plackett_luce(WEIGHTS[where], 2)
    counts = [np.all(removed[:, where][:, subset] == 1.0, axis=1).sum() for subset in wanted]
    assert scipy.stats.chisquare(counts, 20_000 * np.asarray(list(wanted.values()))).pvalue > 0.01


# --- values


def problem(rng: Any) -> tuple[np.ndarray, ...]:
    return (
        rng.standard_normal((2, 6)),
        rng.uniform(0.7, 4.3, (2, 1)),
        rng.random((3, 2, 6)),
        rng.uniform(0.2, 0.8, (2, 1)),
    )


def test_values(lib: Library, rng: Any) -> None:
    """Scores of one shape, and noise with an axis in front."""
    scores, k, noise, epsilon = problem(rng)
    found = lib.evaluate(sampling.subset, scores, k, noise, epsilon=epsilon)
    assert found.shape == (3, 2, 6)
    wanted = reference(np.broadcast_to(scores, (3, 2, 6)), np.broadcast_to(k, (3, 2, 1)), noise, epsilon[None])
    assert_close(found, wanted.astype(float), 1e-13)


def test_axis_and_hard(rng: Any) -> None:
    scores, _, noise, _ = problem(rng)
    for options in ({"hard": True}, {"epsilon": 0.3}):
        wanted = sampling.subset(scores, 2, noise, **options)
        found = sampling.subset(scores.T, 2, np.swapaxes(noise, 1, 2), axis=1, **options)
        np.testing.assert_array_equal(np.swapaxes(found, 1, 2), wanted)
        perturbed = scores + sampling.gumbel(noise)
        np.testing.assert_array_equal(wanted, softk.topk(perturbed, 2, **options))


def test_k_at_both_ends(rng: Any) -> None:
    scores, _, noise, _ = problem(rng)
    np.testing.assert_array_equal(sampling.subset(scores, 50, noise), np.ones((3, 2, 6)))
    np.testing.assert_array_equal(sampling.subset(scores, 0, noise), np.zeros((3, 2, 6)))
    found = sampling.subset(scores, np.asarray([[50.0], [-1.0]]), noise)
    assert np.all(found[:, 0] == 1.0)
    assert np.all(np.isnan(found[:, 1]))


def test_a_bad_value_makes_its_sample_nan(rng: Any) -> None:
    scores, _, noise, _ = problem(rng)
    clean = sampling.subset(scores, 2, noise)
    for bad in (-0.1, 1.1, NAN):
        spoiled = noise.copy()
        spoiled[1, 0, 3] = bad
        found = sampling.subset(scores, 2, spoiled)
        assert np.all(np.isnan(found[1, 0]))
        found[1, 0] = clean[1, 0]
        np.testing.assert_array_equal(found, clean)


# --- the noise


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_gumbel(dtype: str, rng: Any) -> None:
    values = np.concatenate([rng.random(50), [0.0, 1.0]]).astype(dtype)
    with np.errstate(all="raise"):
        found = sampling.gumbel(values)
    assert found.dtype == dtype
    assert np.all(np.isfinite(found))
    inner = (values > 0) & (values < 1)
    wanted = -np.log(-np.log(values[inner].astype(WIDE)))
    assert_close(found[inner].astype(float), wanted.astype(float), 4 * float(np.finfo(dtype).eps))
    assert found[50] == found.min()
    assert found[51] == found.max()
    assert np.all(np.isnan(sampling.gumbel(np.asarray([-0.5, 1.5, NAN]))))


def test_gumbel_has_its_distribution() -> None:
    found = sampling.gumbel(np.random.default_rng(1).random(5000))
    assert scipy.stats.kstest(found, "gumbel_r").pvalue > 0.01


# --- derivatives


def test_gradients_of_torch(rng: Any) -> None:
    """In scores, k, noise and epsilon; those of the hard subset are the same."""
    torch = pytest.importorskip("torch")
    given = dict(zip(("scores", "k", "noise", "epsilon"), problem(rng), strict=True))
    given["noise"] = 0.1 + 0.8 * given["noise"]
    leaves = {key: torch.tensor(value, requires_grad=True) for key, value in given.items()}
    u = rng.standard_normal((3, 2, 6))
    sampling.subset(*list(leaves.values())[:3], epsilon=leaves["epsilon"]).backward(torch.tensor(u))
    for name in given:

        def along(value: np.ndarray, name: str = name) -> Any:
            scores, k, noise, epsilon = {**given, name: value}.values()
            full = np.broadcast_to(scores, (3, 2, 6)), np.broadcast_to(k, (3, 2, 1))
            return np.sum(u * reference(*full, noise, epsilon[None]))

        assert_close(leaves[name].grad, differences(along, given[name], 3e-4).astype(float), 1e-9)
    scores = leaves["scores"]
    soft, hard = (
        torch.autograd.grad(
            sampling.subset(scores, 2, leaves["noise"], epsilon=0.5, hard=hard), scores, torch.tensor(u)
        )[0]
        for hard in (False, True)
    )
    assert_close(hard, soft, 1e-14)


def test_gradients_of_jax(rng: Any) -> None:
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    scores, _, noise, _ = problem(rng)
    u = rng.standard_normal((3, 2, 6))

    def loss(scores: Any, noise: Any) -> Any:
        return jax.numpy.sum(u * sampling.subset(scores, 2, noise, epsilon=0.5))

    found = jax.jit(jax.grad(loss))(*map(jax.numpy.asarray, (scores, noise)))
    leaf = torch.tensor(scores, requires_grad=True)
    (wanted,) = torch.autograd.grad(sampling.subset(leaf, 2, torch.tensor(noise), epsilon=0.5), leaf, torch.tensor(u))
    assert_close(np.asarray(found), wanted, 1e-12)


def test_the_gradient_of_the_mean_is_the_mean_gradient() -> None:
    """Of a function of soft subsets: the pathwise estimate, against a difference with the same noise."""
    torch = pytest.importorskip("torch")
    noise = torch.tensor(np.random.default_rng(2).random((4000, len(WEIGHTS))))
    value = torch.tensor([1.0, -1.0, 2.0, 0.0, 3.0], dtype=torch.float64)
    scores = torch.tensor(np.log(WEIGHTS), requires_grad=True)

    def mean(scores: Any) -> Any:
        return ((sampling.subset(scores, 2, noise, epsilon=1.0) @ value) ** 2).mean()

    (found,) = torch.autograd.grad(mean(scores), scores)
    move = torch.tensor([0.0, 1e-5, 0.0, -1e-5, 0.0], dtype=torch.float64)
    difference = (mean(scores + move) - mean(scores - move)) / 2e-5
    assert abs((found[1] - found[3]) - difference).item() < 1e-7


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_narrow_dtypes(dtype: str, rng: Any) -> None:
    """Scores in half precision and noise in float32: computed in float32, and rounded once."""
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    scores, _, noise, _ = problem(rng)
    scores, noise = torch.tensor(scores).to(kind), torch.tensor(noise).float()
    found = sampling.subset(scores, 2, noise, epsilon=0.5)
    assert found.dtype == kind
    wanted = sampling.subset(scores.double(), 2, noise.double(), epsilon=0.5)
    assert_close(found.double(), wanted, max(0.6 * torch.finfo(kind).eps, 1e-5))
    assert sampling.subset(scores.float(), 2, noise.to(kind), epsilon=0.5).dtype == torch.float32


# torch compiles its own forward-mode formulas, and its compiler its passes, with what torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is:DeprecationWarning")
def test_torch_transforms(rng: Any) -> None:
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    scores, _, noise, _ = (torch.tensor(value) for value in problem(rng))

    def draw(scores: Any, noise: Any) -> Any:
        return sampling.subset(scores, 2, noise, epsilon=0.5)

    wanted = draw(scores, noise)
    assert_close(torch.compile(draw, fullgraph=True, backend="aot_eager")(scores, noise), wanted, 1e-13)
    torch._dynamo.reset()
    assert_close(torch.vmap(draw, in_dims=(None, 0))(scores, noise), wanted, 1e-13)


# --- errors

X, U = np.zeros((2, 4)), np.full((3, 2, 4), 0.5)


@pytest.mark.parametrize(
    ("error", "name", "value", "allowed", "args", "options"),
    [
        (TypeError, "scores", "list", "must be an array", ([1.0], 1, U), {}),
        (TypeError, "noise", "got float", "must be an array", (X, 1, 0.5), {}),
        (TypeError, "scores", "float32", "the dtype of noise", (X.astype("float32"), 1, U), {}),
        (TypeError, "scores", "int64", "the dtype of noise", (X.astype(int), 1, U), {}),
        (TypeError, "noise", "int64", "real floating-point", (X, 1, U.astype(int)), {}),
        (ValueError, "noise", r"\(4,\)", r"shape of scores, \(2, 4\)", (X, 1, U[0, 0]), {}),
        (ValueError, "k", "got -1", "from 0 to 4", (X, -1, U), {}),
        (TypeError, "k", "got str", "a number or an array", (X, "2", U), {}),
        (ValueError, "k", "got 1.5", "whole number", (X, 1.5, U), {"hard": True}),
        (ValueError, "epsilon", "got 0", "positive", (X, 1, U), {"epsilon": 0}),
        (ValueError, "axis", "got 3", "for noise of 3 axes", (X, 1, U), {"axis": 3}),
        (TypeError, "hard", "got 1", "True or False", (X, 1, U), {"hard": 1}),
        (TypeError, "where", "float64", "boolean", (X, 1, U), {"where": X}),
        (TypeError, "tau", "tau", "epsilon=", (X, 1, U), {"tau": 1}),
    ],
)
def test_errors(error: Any, name: str, value: str, allowed: str, args: Any, options: Any) -> None:
    complains(error, name, value, allowed, sampling.subset, *args, **options)


def test_other_errors() -> None:
    complains(TypeError, "uniform", "got float", "must be an array", sampling.gumbel, 0.5)
    complains(TypeError, "uniform", "int64", "real floating-point", sampling.gumbel, X.astype(int))
    for f, args in ((sampling.subset, (X, 1, U)), (sampling.gumbel, (U,))):
        complains(TypeError, "f", rf"softk\.sampling\.{f.__name__}", "composition.*autodiff", softk.vjp, f, *args)
