"""Metrics of ranked lists and the top-k cross-entropy: values, derivatives, padding, and what may be in the arrays.

The oracles compute one list at a time from the definitions, in extended precision: the mask by bisection
(`closed_form`), the permutation by Newton's method on the potentials (`permutation`). Derivatives are compared with
difference quotients of the oracles, of the fourth order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

import softk
from softk import losses

from . import closed_form
from .closed_form import WIDE, assert_close, differences
from .libraries import Library
from .test_errors import complains

INF, NAN = math.inf, math.nan
N = 7


# --- oracles, of one list without padding


def permutation(x: Any, epsilon: Any) -> np.ndarray:
    """The doubly stochastic plan between the ranks (rows, the best first) and the scores, at falling temperatures."""
    n = len(x)
    cost = 2 * (np.asarray(x, WIDE)[:, None] - np.mean(x)) * (WIDE(n - 1) / 2 - np.arange(n))
    g, level, end = np.zeros(n, WIDE), WIDE(epsilon) * 2 ** math.ceil(math.log2(n * (np.ptp(x) + 1) / epsilon)), 1e-3

    def shares(g: np.ndarray) -> tuple[np.ndarray, Any]:
        z = (cost + g) / level
        share = np.exp(z - z.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        return share, np.abs(1 - share.sum(axis=0)).sum()

    while True:
        share, error = shares(g)
        end = 1e-17 * n if level == epsilon else 1e-3
        for _ in range(99):
            if error <= end:
                break
            sums, rough = share.sum(axis=0), share.astype(float)
            # float64 suffices for the step: the error that is left is computed in extended precision.
            hessian = (np.diag(rough.sum(axis=0)) - rough.T @ rough)[:-1, :-1]
            step = level * np.append(np.linalg.solve(hessian, np.asarray(1 - sums, float)[:-1]), 0.0)
            length = 1.0
            while (tried := shares(g + length * step))[1] > error and length > 0.01:
                length /= 2
            g, (share, error) = g + length * step, tried
        if level == epsilon:
            assert error < 1e-15 * n
            return share.T
        level = max(level / 2, WIDE(epsilon))


def ranks(x: Any, epsilon: Any) -> np.ndarray:
    return (1 + np.arange(len(x))) @ permutation(x, epsilon)


def mask(x: Any, k: Any, epsilon: Any) -> np.ndarray:
    return np.ones(len(x), WIDE) if k >= len(x) else closed_form.topk(x, np.reshape(k, 1), np.reshape(epsilon, 1))


def ndcg(x: Any, relevance: Any, epsilon: Any, k: int | None = None, gains: str = "exp2") -> Any:
    gain = np.asarray(relevance, WIDE) if gains == "linear" else 2 ** np.asarray(relevance, WIDE) - 1
    discount = (1 / np.log2(np.arange(len(x)) + WIDE(2)))[:k]
    ideal = np.sort(gain)[::-1][:k] @ discount
    return (permutation(x, epsilon) @ gain)[:k] @ discount / ideal if ideal else 0


def recall(x: Any, relevance: Any, epsilon: Any, k: Any) -> Any:
    return mask(x, k, epsilon)[relevance > 0].sum() / max(np.sum(relevance > 0), 1)


def precision(x: Any, relevance: Any, epsilon: Any, k: Any) -> Any:
    return mask(x, k, epsilon)[relevance > 0].sum() / k


def average_precision(x: Any, relevance: Any, epsilon: Any) -> Any:
    hits = relevance > 0
    return np.mean(ranks(x[hits], epsilon) / ranks(x, epsilon)[hits]) if hits.any() else 0


def reciprocal_rank(x: Any, relevance: Any, epsilon: Any) -> Any:
    hits = relevance > 0
    return mask(x[hits], 1, epsilon) @ (1 / ranks(x, epsilon)[hits]) if hits.any() else 0


def spearman(x: Any, targets: Any, epsilon: Any) -> Any:
    own, other = -ranks(x, epsilon), scipy.stats.rankdata(targets)
    own, other = own - own.mean(), other - other.mean()
    return own @ other / np.sqrt(own @ own * (other @ other)) if np.ptp(other) else 0


def cross_entropy(x: Any, targets: Any, epsilon: Any, k: Any, complement: bool = False) -> Any:
    """Of one k, or of the distribution {k: probability}; at scores where nothing underflows."""
    shares = k if isinstance(k, dict) else {k: 1}
    found = sum(share * mask(x, mass, epsilon) for mass, share in shares.items())
    value = -np.asarray(targets) @ np.log(found)
    if complement and min(shares) < len(x):
        value = value - (1 - np.asarray(targets)) @ np.log(1 - found)
    return value if np.any(targets) else 0


#: The public function, its oracle, and their options. A k of None stands for one fractional k per list.
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]] = {
    "ndcg": (losses.ndcg, ndcg, {}),
    "ndcg, linear, k": (losses.ndcg, ndcg, {"k": 3, "gains": "linear"}),
    "recall": (losses.recall, recall, {"k": None}),
    "precision": (losses.precision, precision, {"k": None}),
    "average_precision": (losses.average_precision, average_precision, {}),
    "reciprocal_rank": (losses.reciprocal_rank, reciprocal_rank, {}),
    "spearman": (losses.spearman, spearman, {}),
    "cross_entropy": (losses.cross_entropy, cross_entropy, {"k": None}),
    "cross_entropy, complement": (losses.cross_entropy, cross_entropy, {"k": None, "complement": True}),
    "cross_entropy, several k": (losses.cross_entropy, cross_entropy, {"k": {1: 0.3, 2.5: 0.6, 50: 0.1}}),
    "cross_entropy, several k, complement": (
        losses.cross_entropy,
        cross_entropy,
        {"k": {1: 0.3, 2.5: 0.7}, "complement": True},
    ),
}


def problem(rng: Any, name: str, epsilon: float = 0.4) -> dict[str, Any]:
    """Four lists: all items, some of them, one item, and no relevant item. Relevance is not uniform."""
    where = np.arange(N) < np.asarray([[N], [4], [1], [N]])
    where[1] = where[1][rng.permutation(N)]
    relevance = rng.integers(0, 4, (4, N)).astype(float)
    relevance[:, :3] = [3.0, 0.0, 1.0]
    relevance[3] = 0.0
    relevance[1, np.flatnonzero(where[1])[0]] = 2.0
    if name.startswith("cross_entropy"):
        relevance = relevance / 4
    found = {
        "scores": rng.standard_normal((4, N)),
        "relevance": relevance,
        "epsilon": epsilon * rng.uniform(0.7, 1.4, (4, 1)),
        "where": where,
    }
    if CASES[name][2].get("k", 0) is None:
        found["k"] = rng.uniform(0.6, 3.8, (4, 1))
    return found


def call(name: str, scores: Any, relevance: Any, epsilon: Any, where: Any = None, k: Any = None, **options: Any) -> Any:
    f, _, rest = CASES[name]
    options = {**rest, "reduction": "none", **options} | ({} if k is None else {"k": k})
    return f(scores, relevance, epsilon=epsilon, where=where, **options)


def expected(name: str, scores: Any, relevance: Any, epsilon: Any, where: Any = None, k: Any = None) -> np.ndarray:
    """The oracle's value of every list."""
    _, oracle, rest = CASES[name]
    where = np.ones(scores.shape, bool) if where is None else where
    found = []
    for i, kept in enumerate(where):
        options = {**rest, "k": k[i, 0]} if k is not None else rest
        found.append(oracle(scores[i][kept], relevance[i][kept], epsilon[i, 0], **options))
    return np.asarray(found, WIDE)


each_case = pytest.mark.parametrize("name", CASES)


# --- values


@each_case
def test_values(lib: Library, name: str, rng: Any) -> None:
    given = problem(rng, name)
    found = lib.evaluate(functools.partial(call, name), **given)
    assert found.dtype == "float64"
    assert_close(found, expected(name, **given).astype(float), 1e-13)


@pytest.mark.parametrize("gains", ["linear", "exp2"])
def test_ndcg_of_scikit_learn(gains: Any, rng: Any) -> None:
    scores, relevance = rng.standard_normal((9, 20)), rng.integers(0, 4, (9, 20))
    gain = 2.0**relevance - 1.0 if gains == "exp2" else relevance
    for k in (1, 5, 20, 50):
        found = losses.ndcg(scores, relevance, k=k, epsilon=1e-9, gains=gains)
        wanted = [metrics.ndcg_score(gain[i : i + 1], scores[i : i + 1], k=k) for i in range(9)]
        assert_close(found, wanted, 1e-12)


def test_average_precision_of_scikit_learn(rng: Any) -> None:
    scores, relevance = rng.standard_normal((9, 20)), rng.integers(0, 2, (9, 20))
    found = losses.average_precision(scores, relevance, epsilon=1e-9)
    assert_close(found, [metrics.average_precision_score(*both) for both in zip(relevance, scores, strict=True)], 1e-12)
    mean = losses.average_precision(scores, relevance, epsilon=1e-9, reduction="mean")
    assert_close(mean, metrics.label_ranking_average_precision_score(relevance, scores), 1e-12)


def test_spearman_of_scipy(rng: Any) -> None:
    """With ties on both sides."""
    scores, targets = rng.integers(0, 6, (9, 20)).astype(float), rng.integers(-3, 4, (9, 20))
    wanted = [scipy.stats.spearmanr(*both).statistic for both in zip(scores, targets, strict=True)]
    assert_close(losses.spearman(scores, targets, epsilon=1e-9), wanted, 1e-12)


def test_hard_limits_by_counting(rng: Any) -> None:
    scores, relevance = rng.standard_normal((9, 20)), rng.integers(0, 2, (9, 20))
    order = np.argsort(-scores, axis=1)
    hits = np.take_along_axis(relevance, order, axis=1)
    for k in (1, 3, 20):
        options = {"epsilon": 1e-9}
        count = hits[:, :k].sum(axis=1)
        assert_close(losses.recall(scores, relevance, k, **options), count / hits.sum(axis=1), 1e-13)
        assert_close(losses.precision(scores, relevance, k, **options), count / k, 1e-13)
    assert_close(losses.reciprocal_rank(scores, relevance, epsilon=1e-9), 1 / (1 + hits.argmax(axis=1)), 1e-13)


def neural_sort(x: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """NeuralSort, rescaled by Sinkhorn's algorithm, as in NeuralNDCG."""
    n = len(x)
    scaling = n - 1 - 2 * np.arange(n)
    logits = (scaling[:, None] * x - np.abs(x[:, None] - x).sum(axis=1)) / temperature
    found = np.exp(logits - logits.max(axis=1, keepdims=True))
    for _ in range(iterations):
        found = found / found.sum(axis=0)
        found = found / found.sum(axis=1, keepdims=True)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_neural_ndcg(temperature: float, rng: Any) -> None:
    """The full plan is NeuralSort's permutation once Sinkhorn's algorithm has converged. 50 iterations are too few."""
    scores, relevance = rng.standard_normal(12), rng.integers(0, 4, 12)
    gain, discount = 2.0**relevance - 1.0, 1.0 / np.log2(np.arange(12) + 2.0)
    ideal = np.sort(gain)[::-1] @ discount
    found = losses.ndcg(scores, relevance, epsilon=temperature)
    wanted = [neural_sort(scores, temperature, count) @ gain @ discount / ideal for count in (50, 20_000)]
    assert abs(found - wanted[1]) < 1e-12
    assert 1e-9 < abs(found - wanted[0]) < 1e-2


def test_two_classes_are_softmax(rng: Any) -> None:
    """For n = 2 and k = 1 the mask is a softmax of temperature epsilon."""
    torch = pytest.importorskip("torch")
    scores, labels = torch.tensor(rng.standard_normal((6, 2))), torch.tensor(rng.integers(0, 2, 6))
    wanted = torch.nn.functional.cross_entropy(scores / 0.3, labels, reduction="none")
    for reduction in ("none", "mean", "sum"):
        found = losses.cross_entropy(scores, labels, 1, epsilon=0.3, reduction=reduction)
        assert_close(found, wanted if reduction == "none" else getattr(wanted, reduction)(), 1e-13)
    assert_close(losses.cross_entropy(scores, labels, 1, epsilon=0.3), wanted.mean(), 1e-13)


def test_kinds_of_labels(rng: Any) -> None:
    scores, labels = rng.standard_normal((3, N)), np.asarray([2, 0, -1])
    hot = labels[:, None] == np.arange(N)
    for options in ({}, {"complement": True}):
        found = [
            losses.cross_entropy(scores, one, 2.5, epsilon=0.3, reduction="none", **options)
            for one in (labels, labels.astype("int32"), hot, hot.astype(float), hot.astype("float32"))
        ]
        for one in found[1:]:
            np.testing.assert_array_equal(one, found[0])
        assert found[0][2] == 0.0
        assert found[0][0] > 0.0
    same = losses.cross_entropy(scores, np.asarray(2), 2.5, reduction="none")
    np.testing.assert_array_equal(same, losses.cross_entropy(scores, np.asarray([2, 2, 2]), 2.5, reduction="none"))
    one = losses.cross_entropy(scores[0], np.asarray(2), 2.5, epsilon=0.3)
    assert_close(one, losses.cross_entropy(scores, labels, 2.5, epsilon=0.3, reduction="none")[0], 1e-14)


def test_several_k_and_k_beyond_the_list(rng: Any) -> None:
    given = problem(rng, "recall")
    given.pop("k")
    scores, relevance = given.pop("scores"), given.pop("relevance")
    for f in (losses.recall, losses.precision):
        several = f(scores, relevance, (1, 2.5, 50), **given)
        assert several.shape == (3, 4)
        for row, k in zip(several, (1, 2.5, 50), strict=True):
            np.testing.assert_array_equal(row, f(scores, relevance, k, **given))
            np.testing.assert_array_equal(row, f(scores, relevance, np.full((4, 1), k), **given))
        means = f(scores, relevance, (1, 2.5, 50), reduction="mean", **given)
        assert_close(means, several.mean(axis=1), 1e-15)
    assert_close(losses.recall(scores, relevance, 50, **given), [1.0, 1.0, 1.0, 0.0], 1e-15)
    np.testing.assert_array_equal(
        losses.ndcg(scores, relevance, k=50, **given), losses.ndcg(scores, relevance, **given)
    )
    found = losses.cross_entropy(scores, relevance, 50, complement=True, reduction="none", **given)
    np.testing.assert_array_equal(found, np.zeros(4))


# --- padding, axes, and what may be in the arrays


@each_case
@pytest.mark.parametrize("axis", [-1, 0])
def test_a_list_depends_on_itself_alone(name: str, axis: int, rng: Any) -> None:
    """The value and the gradient of each list are those that it has alone, whatever the padding is."""
    torch = pytest.importorskip("torch")
    given = problem(rng, name)
    u = torch.tensor(rng.standard_normal(4))
    padded = np.where(given["where"], given["scores"], rng.choice([NAN, INF, 9.0], (4, N)))
    garbage = np.where(given["where"], given["relevance"], NAN)
    tensors = {key: torch.tensor(value) for key, value in given.items()}
    tensors |= {"scores": torch.tensor(padded), "relevance": torch.tensor(garbage)}
    if axis == 0:
        tensors = {key: value.T.contiguous() for key, value in tensors.items()}
    leaf = tensors["scores"].requires_grad_()
    out = call(name, **tensors, axis=axis)
    assert out.shape == (4,)
    (gradient,) = torch.autograd.grad(out, leaf, u)
    gradient = gradient if axis == -1 else gradient.T
    for i, kept in enumerate(given["where"]):
        alone = {key: torch.tensor(given[key][i][kept]) for key in ("scores", "relevance")}
        alone |= {key: torch.tensor(given[key][i]) for key in ("epsilon", "k") if key in given}
        own = call(name, **alone | {"scores": alone["scores"].requires_grad_()})
        np.testing.assert_allclose(out[i].item(), own.item(), rtol=0.0, atol=1e-12)
        (wanted,) = torch.autograd.grad(own, alone["scores"], u[i])
        assert torch.all(gradient[i][~torch.tensor(kept)] == 0.0)
        np.testing.assert_allclose(gradient[i][torch.tensor(kept)], wanted, rtol=0.0, atol=1e-11)
    assert out[3].item() == 0.0
    assert torch.all(gradient[3] == 0.0)


@each_case
def test_lists_without_items(name: str, rng: Any) -> None:
    """A list from which `where` removes everything has the value 0 and no gradient. There may be no lists at all."""
    torch = pytest.importorskip("torch")
    given = {key: torch.tensor(value) for key, value in problem(rng, name).items()}
    given["where"][0] = False
    leaf = given["scores"].requires_grad_()
    out = call(name, **given)
    (gradient,) = torch.autograd.grad(out, leaf, torch.tensor(rng.standard_normal(4)))
    assert out[0].item() == 0.0
    assert torch.all(gradient[0] == 0.0)
    assert torch.all(torch.isfinite(gradient))
    assert call(name, **{key: value[:0] for key, value in given.items()}).shape == (0,)


@each_case
def test_a_bad_value_makes_its_list_nan(name: str, rng: Any) -> None:
    """No other: a score, a relevance, an epsilon and a k."""
    given = problem(rng, name)
    given["where"] = None
    clean = call(name, **given)
    bad = {"scores": [NAN], "relevance": [NAN] if name == "spearman" else [NAN, -1.0, INF], "epsilon": [0.0, NAN]}
    bad |= {"k": [-1.0, NAN]} if "k" in given else {}
    for argument, values in bad.items():
        for value in values:
            spoiled = {**given, argument: np.copy(given[argument])}
            spoiled[argument][1, 0] = value
            found = call(name, **spoiled)
            assert np.isnan(found[1]), f"{argument} {value}"
            np.testing.assert_array_equal(np.delete(found, 1), np.delete(clean, 1))


def test_labels_beyond_the_items_are_invalid() -> None:
    found = losses.cross_entropy(np.zeros((3, 4)), np.asarray([3, 4, -100]), 1, reduction="none")
    np.testing.assert_array_equal(np.isnan(found), [False, True, False])


@each_case
def test_a_score_of_minus_infinity_is_never_selected(name: str, rng: Any) -> None:
    """It gains nothing, and the gradients of the others are finite."""
    torch = pytest.importorskip("torch")
    given = problem(rng, name)
    given["where"] = None
    given["scores"][:, 2] = -INF  # a relevant item
    tensors = {key: value if value is None else torch.tensor(value) for key, value in given.items()}
    out = call(name, **tensors | {"scores": tensors["scores"].requires_grad_()})
    if name.startswith("cross_entropy"):
        assert torch.all(out[:3] == INF)
    else:
        assert torch.all(torch.isfinite(out))
    (gradient,) = torch.autograd.grad(out.sum(), tensors["scores"])
    assert torch.all(torch.isfinite(gradient))
    assert torch.all(gradient[:, 2] == 0.0)
    if name == "ndcg":
        others = np.delete(np.arange(N), 2)
        alone = permutation(given["scores"][0][others], given["epsilon"][0, 0])
        gain = 2.0 ** given["relevance"][0] - 1.0
        discount = 1.0 / np.log2(np.arange(N) + 2.0)
        wanted = alone @ gain[others] @ discount[:-1] / (np.sort(gain)[::-1] @ discount)
        assert_close(out[0].detach(), float(wanted), 1e-13)
    if name == "average_precision":
        others = np.delete(np.arange(N), 2)
        x, relevance, epsilon = given["scores"][0][others], given["relevance"][0][others], given["epsilon"][0, 0]
        share = np.sum(relevance > 0) / np.sum(given["relevance"][0] > 0)
        assert_close(out[0].detach(), float(share * average_precision(x, relevance, epsilon)), 1e-13)


def test_spearman_of_equal_numbers(rng: Any) -> None:
    """0, and no gradient: equal scores, equal targets, and one item."""
    torch = pytest.importorskip("torch")
    scores = torch.tensor(rng.standard_normal((3, N)))
    targets = torch.tensor(rng.standard_normal((3, N)))
    scores[0], targets[1] = 0.7, 2.0
    where = torch.ones(3, N, dtype=torch.bool)
    where[2, 1:] = False
    leaf = scores.requires_grad_()
    out = losses.spearman(leaf, targets, epsilon=0.3, where=where)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    assert torch.all(out == 0.0)
    assert torch.all(gradient == 0.0)
    # The ranks of fifty equal scores differ by their rounding in float32.
    leaf = torch.full((50,), 0.7, requires_grad=True)
    out = losses.spearman(leaf, torch.tensor(rng.standard_normal(50)), epsilon=1.0)
    assert out == 0.0
    assert torch.all(torch.autograd.grad(out, leaf)[0] == 0.0)


def test_a_far_label_is_led_home(rng: Any) -> None:
    """The mask underflows there. The logarithm and its gradient do not, nor does that of the complement."""
    torch = pytest.importorskip("torch")
    scores = torch.tensor([[0.0, 900.0, 901.0, 905.0]], requires_grad=True)
    for options in ({}, {"complement": True}):
        loss = losses.cross_entropy(scores, torch.tensor([0]), 1, epsilon=0.5, **options)
        (gradient,) = torch.autograd.grad(loss, scores)
        assert 3000.0 < loss.item() < 4000.0 * (1 + len(options))
        assert gradient[0, 0] < -3.9


# --- derivatives


@pytest.mark.parametrize("epsilon", [0.5, 0.05])
@each_case
def test_gradients_of_torch(name: str, epsilon: float, rng: Any) -> None:
    """In every argument that has one, by difference quotients of the oracle."""
    torch = pytest.importorskip("torch")
    given = problem(rng, name, epsilon)
    lists = 1 if epsilon < 0.1 else 2  # the second one has padding
    given = {key: value[:lists] for key, value in given.items()}
    given["scores"] = 0.3 * given["scores"] if epsilon < 0.1 else given["scores"]
    if name.startswith("ndcg"):  # equal relevances could be in two orders, and have no derivative
        given["relevance"] = rng.uniform(0.5, 2.0, (lists, N))
    leaves = {key: torch.tensor(value, requires_grad=key != "where") for key, value in given.items()}
    u = rng.standard_normal(lists)
    call(name, **leaves).backward(torch.tensor(u))
    smooth = ["scores", "epsilon", *(["k"] if "k" in given else [])]
    smooth += ["relevance"] if name.startswith(("ndcg", "cross")) else []
    for argument in smooth:

        def along(value: np.ndarray, argument: str = argument) -> Any:
            return u @ expected(name, **{**given, argument: value})

        wanted = differences(along, given[argument], 2e-3 * epsilon).astype(float)
        assert_close(leaves[argument].grad, wanted, 1e-7 if epsilon < 0.1 else 1e-9)


@pytest.mark.parametrize("name", ["ndcg", "average_precision", "spearman", "cross_entropy, complement"])
def test_gradients_of_long_lists(name: str, rng: Any) -> None:
    """150 items, along one direction in the scores and in epsilon."""
    torch = pytest.importorskip("torch")
    n, epsilon = 150, 0.3
    scores, relevance = rng.standard_normal((1, n)), rng.integers(0, 4, (1, n)) / 4
    direction, k = rng.standard_normal((1, n)), np.asarray([[20.5]])
    given = {"relevance": relevance, **({"k": k} if "cross" in name else {})}
    leaves = [torch.tensor(value, requires_grad=True) for value in (scores, np.asarray([[epsilon]]))]
    call(name, leaves[0], epsilon=leaves[1], **{key: torch.tensor(value) for key, value in given.items()}).backward()

    def along(step: np.ndarray) -> Any:
        return expected(name, scores + step[0] * direction, epsilon=np.asarray([[epsilon + step[1]]]), **given)[0]

    wanted = differences(along, np.zeros(2), 1e-4).astype(float)
    found = [(leaves[0].grad.numpy() * direction).sum(), leaves[1].grad.item()]
    assert_close(found, wanted, 1e-8)


def compiled(*names: str) -> Any:
    """Every case; without the wider grids only some, because compilation takes long."""
    cases = [pytest.param(name, marks=[] if name in names else [pytest.mark.full]) for name in CASES]
    return pytest.mark.parametrize("name", cases)


@compiled("recall", "ndcg")
def test_gradients_of_jax(name: str, rng: Any) -> None:
    """Under jit, with the values. The gradients as those of torch, which are compared with the oracle."""
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    given = problem(rng, name)
    u = rng.standard_normal(4)

    def total(scores: Any, rest: Any) -> Any:
        values = call(name, scores, **rest)
        return jax.numpy.sum(u * values), values

    arrays = {key: jax.numpy.asarray(value) for key, value in given.items()}
    found, values = jax.jit(jax.grad(total, has_aux=True))(arrays.pop("scores"), arrays)
    assert_close(np.asarray(values), expected(name, **given).astype(float), 1e-12)
    tensors = {key: torch.tensor(value) for key, value in given.items()}
    leaf = tensors.pop("scores").requires_grad_()
    (wanted,) = torch.autograd.grad(call(name, leaf, **tensors), leaf, torch.tensor(u))
    assert_close(np.asarray(found), wanted, 1e-11)


@each_case
def test_gradients_of_autograd(name: str, rng: Any) -> None:
    """As those of torch, which are compared with the oracle."""
    autograd, torch = pytest.importorskip("autograd"), pytest.importorskip("torch")
    given = problem(rng, name)
    u = rng.standard_normal(4)
    scores = given.pop("scores")
    found = autograd.grad(lambda x: autograd.numpy.sum(u * call(name, x, **given)))(scores)
    leaf = torch.tensor(scores, requires_grad=True)
    tensors = {key: torch.tensor(value) for key, value in given.items()}
    (wanted,) = torch.autograd.grad(call(name, leaf, **tensors), leaf, torch.tensor(u))
    assert_close(found, wanted, 1e-11)


# --- dtypes and transforms


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@each_case
def test_narrow_dtypes(name: str, dtype: str, rng: Any) -> None:
    """Computed in float32, and rounded once."""
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    given = {key: torch.tensor(value) for key, value in problem(rng, name).items()}
    given["epsilon"] = given["epsilon"].float()
    given["scores"] = given["scores"].to(kind)
    out = call(name, **given | {"scores": given["scores"].requires_grad_()})
    assert out.dtype == kind
    wide = given["scores"].detach().double().requires_grad_()
    wanted = call(name, **{**given, "scores": wide, "epsilon": given["epsilon"].double()})
    assert_close(out.detach().double(), wanted.detach(), max(0.6 * torch.finfo(kind).eps, 1e-5))
    (found,) = torch.autograd.grad(out.sum(), given["scores"])
    (gradient,) = torch.autograd.grad(wanted.sum(), wide)
    assert found.dtype == kind
    assert_close(found.double(), gradient, max(0.6 * torch.finfo(kind).eps, 1e-4))


def test_numpy_half_precision(rng: Any) -> None:
    given = problem(rng, "ndcg")
    scores = given["scores"].astype("float16")
    found = losses.ndcg(scores, given["relevance"], epsilon=0.3)
    assert found.dtype == np.float16
    assert_close(found.astype(float), losses.ndcg(scores.astype(float), given["relevance"], epsilon=0.3), 5e-4)


# torch compiles its own forward-mode formulas, and its compiler its passes, with what torch has deprecated.
DEPRECATED = pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is:DeprecationWarning")


@DEPRECATED
@compiled("cross_entropy, complement")
def test_torch_compile(name: str, rng: Any) -> None:
    """In one graph, with the gradient."""
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    given = {key: torch.tensor(value) for key, value in problem(rng, name).items()}
    scores = given.pop("scores").requires_grad_()

    def f(scores: Any) -> Any:
        return call(name, scores, **given)

    out, wanted = torch.compile(f, fullgraph=True, backend="aot_eager")(scores), f(scores)
    u = torch.tensor(rng.standard_normal(4))
    (found,), (gradient,) = (torch.autograd.grad(value, scores, u) for value in (out, wanted))
    torch._dynamo.reset()
    assert_close(out.detach(), wanted.detach(), 1e-13)
    assert_close(found, gradient, 1e-12)


@DEPRECATED
@each_case
def test_torch_vmap(name: str, rng: Any) -> None:
    torch = pytest.importorskip("torch")
    given = {key: torch.tensor(value) for key, value in problem(rng, name).items()}
    found = torch.vmap(lambda one: call(name, **one))(given)
    assert_close(found, call(name, **given), 1e-13)


@DEPRECATED
@pytest.mark.parametrize("name", ["ndcg", "cross_entropy, several k, complement"])
def test_second_derivatives(name: str, rng: Any) -> None:
    torch = pytest.importorskip("torch")
    given = {key: torch.tensor(value[:2]) for key, value in problem(rng, name).items()}
    scores = given.pop("scores").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: call(name, x, **given), scores, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: call(name, x, **given), scores, fast_mode=True)


# --- errors

X, Y, ONES = np.ones((2, 4)), np.ones((2, 4)), np.ones(2, int)


@pytest.mark.parametrize("name", losses.__all__)
def test_errors_of_all(name: str) -> None:
    f = getattr(losses, name)
    rest = (2,) if name in ("recall", "precision", "cross_entropy") else ()
    other = {"spearman": "targets", "cross_entropy": "labels"}.get(name, "relevance")
    complains(TypeError, "scores", "list", "must be an array", f, [1.0], Y, *rest)
    complains(TypeError, "scores", "int64", "real floating-point", f, np.ones((2, 4), int), Y, *rest)
    complains(ValueError, "scores", r"\(2, 0\)", "at least one score", f, X[:, :0], Y[:, :0], *rest)
    complains(TypeError, other, "list", "must be an array", f, X, [1.0], *rest)
    complains(TypeError, other, "complex", "must be real", f, X, Y.astype(complex), *rest)
    complains(ValueError, other, r"\(3,\)", r"the shape of scores, \(2, 4\)", f, X, np.ones(3), *rest)
    complains(ValueError, "axis", "got 2", "from -2 to 1 for scores", f, X, Y, *rest, axis=2)
    complains(ValueError, "epsilon", "got 0", "positive", f, X, Y, *rest, epsilon=0)
    complains(ValueError, "epsilon", r"\(2,\)", r"\(2, 1\)", f, X, Y, *rest, epsilon=np.ones(2))
    complains(TypeError, "where", "float64", "boolean", f, X, Y, *rest, where=Y)
    complains(ValueError, "reduction", "'max'", "'mean', 'sum' or 'none'", f, X, Y, *rest, reduction="max")
    complains(ValueError, "reduction", "array", "'mean', 'sum' or 'none'", f, X, Y, *rest, reduction=Y[0])
    complains(TypeError, "eps", "eps", "use epsilon=", f, X, Y, *rest, eps=1)
    for derivative in (lambda: softk.vjp(f, X, Y, *rest), lambda: softk.jvp(f, X, Y, *rest, tangents={})):
        complains(TypeError, "f", rf"softk\.losses\.{name}", "composition of array operations.*autodiff", derivative)


@pytest.mark.parametrize("f", [losses.recall, losses.precision, losses.cross_entropy])
def test_errors_of_k(f: Any) -> None:
    complains(ValueError, "k", "got 0", "above 0", f, X, Y, 0)
    complains(ValueError, "k", "got nan", "above 0", f, X, Y, NAN)
    complains(TypeError, "k", "got NoneType", "a number or an array", f, X, Y, None)
    complains(TypeError, "k", "got str '2'", "a number or an array", f, X, Y, "2")
    complains(TypeError, "k", "got list", r"np\.asarray\(k\)", f, X, Y, [1, 2])  # one each, or several for all?
    complains(ValueError, "k", r"\(2,\)", r"\(2, 1\)", f, X, Y, np.ones(2))


@pytest.mark.parametrize("f", [losses.recall, losses.precision])
def test_errors_of_several_k(f: Any) -> None:
    complains(ValueError, "k", r"\(\)", "at least one", f, X, Y, ())
    complains(ValueError, "k", r"\(1, -2\)", "above 0", f, X, Y, (1, -2))
    complains(TypeError, "k", r"\(1, '2'\)", "tuple of numbers", f, X, Y, (1, "2"))
    complains(TypeError, "k", "got dict", "a number or an array", f, X, Y, {1: 1.0})


@pytest.mark.parametrize(
    ("error", "name", "value", "allowed", "f", "args", "options"),
    [
        (TypeError, "k", "2.5", "Python integer", losses.ndcg, (X, Y), {"k": 2.5}),
        (ValueError, "k", "got 0", "at least 1", losses.ndcg, (X, Y), {"k": 0}),
        (ValueError, "gains", "'log'", "'exp2' or 'linear'", losses.ndcg, (X, Y), {"gains": "log"}),
        (ValueError, "gains", "array", "'exp2' or 'linear'", losses.ndcg, (X, Y), {"gains": Y[0]}),
        (TypeError, "complement", "got 1", "True or False", losses.cross_entropy, (X, ONES, 1), {"complement": 1}),
        (ValueError, "labels", r"\(3,\)", r"\(2,\)", losses.cross_entropy, (X, np.ones(3, int), 1), {}),
        (ValueError, "labels", r"\(2, 4\)", "bool or floating", losses.cross_entropy, (X, Y.astype(int), 1), {}),
        (ValueError, "k", "0.5", "sum to 1", losses.cross_entropy, (X, ONES, {1: 0.5}), {}),
        (ValueError, "k", "{}", "sum to 1", losses.cross_entropy, (X, ONES, {}), {}),
        (ValueError, "k", "-0.5", "at least 0", losses.cross_entropy, (X, ONES, {1: -0.5, 2: 1.5}), {}),
        (ValueError, "k", "0", "above 0", losses.cross_entropy, (X, ONES, {0: 1.0}), {}),
        (TypeError, "k", "str", "numbers to numbers", losses.cross_entropy, (X, ONES, {"1": 1.0}), {}),
        (TypeError, "k", "got tuple", "a number or an array", losses.cross_entropy, (X, ONES, (1, 2)), {}),
    ],
)
def test_errors(error: Any, name: str, value: str, allowed: str, f: Any, args: Any, options: Any) -> None:
    complains(error, name, value, allowed, f, *args, **options)
