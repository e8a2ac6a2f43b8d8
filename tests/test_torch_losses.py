"""The modules of `softk.losses` and `softk.sampling`: what they compute, what they learn, and how they are stored."""

from __future__ import annotations

from typing import Any

import pytest

from softk import losses, sampling

torch = pytest.importorskip("torch")
softk_torch = pytest.importorskip("softk_torch")

pytestmark = pytest.mark.usefixtures("on_device")

#: Each module with options, the function and the same options.
CASES = {
    "NDCG": ({"k": 3, "gains": "linear"}, losses.ndcg),
    "Recall": ({"k": 2.5}, losses.recall),
    "Precision": ({"k": 2.5}, losses.precision),
    "AveragePrecision": ({}, losses.average_precision),
    "ReciprocalRank": ({}, losses.reciprocal_rank),
    "Spearman": ({}, losses.spearman),
    "TopKCrossEntropy": ({"k": {1: 0.4, 2.5: 0.6}, "complement": True}, losses.cross_entropy),
}
each_module = pytest.mark.parametrize("name", CASES)


def parameter(value: Any) -> Any:
    return torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))


def lists(rng: Any) -> tuple[Any, Any, Any]:
    where = torch.ones(3, 6, dtype=torch.bool)
    where[1, 4:] = False
    return torch.tensor(rng.standard_normal((3, 6))), torch.tensor(rng.integers(0, 2, (3, 6)).astype(float)), where


@each_module
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_is_the_function(name: str, reduction: str, rng: Any) -> None:
    options, f = CASES[name]
    scores, labels, where = lists(rng)
    layer = getattr(softk_torch, name)(**options, epsilon=0.4, reduction=reduction)
    assert list(layer.parameters()) == []
    wanted = f(scores, labels, **options, epsilon=0.4, reduction=reduction, where=where)
    assert torch.equal(layer(scores, labels, where=where), wanted)
    across = getattr(softk_torch, name)(**options, dim=0, epsilon=0.4, reduction=reduction)
    assert torch.equal(across(scores.T, labels.T, where=where.T), wanted)


@each_module
def test_defaults(name: str, rng: Any) -> None:
    """The epsilon of the function, and the mean."""
    options, f = CASES[name]
    scores, labels, _ = lists(rng)
    assert torch.equal(
        getattr(softk_torch, name)(**options)(scores, labels), f(scores, labels, **options, reduction="mean")
    )


@each_module
def test_learned_epsilon(name: str, rng: Any) -> None:
    options, f = CASES[name]
    scores, labels, _ = lists(rng)
    layer = getattr(softk_torch, name)(**options, epsilon=parameter(0.4))
    assert [key for key, _ in layer.named_parameters()] == ["epsilon"]
    layer(scores, labels).backward()
    epsilon = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    f(scores, labels, **options, epsilon=epsilon, reduction="mean").backward()
    assert torch.equal(layer.epsilon.grad, epsilon.grad)


@pytest.mark.parametrize("name", ["Recall", "Precision", "TopKCrossEntropy"])
def test_learned_k(name: str, rng: Any) -> None:
    scores, labels, _ = lists(rng)
    layer = getattr(softk_torch, name)(parameter(2.5), epsilon=0.4)
    layer(scores, labels).backward()
    k = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    CASES[name][1](scores, labels, k, epsilon=0.4, reduction="mean").backward()
    assert k.grad != 0.0
    assert torch.equal(layer.k.grad, k.grad)


def test_other_tensors_are_buffers() -> None:
    layer = softk_torch.Recall(torch.tensor(2.0), epsilon=parameter(0.5))
    assert set(layer.state_dict()) == {"k", "epsilon"}
    assert [key for key, _ in layer.named_parameters()] == ["epsilon"]
    other = softk_torch.Recall(torch.tensor(1.0), epsilon=parameter(0.1))
    other.load_state_dict(layer.state_dict())
    assert other.k == 2.0


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: softk_torch.NDCG(), "NDCG(k=None, gains='exp2', epsilon=0.1, dim=-1, reduction='mean')"),
        (lambda: softk_torch.Recall((1, 5)), "Recall(k=(1, 5), epsilon=0.1, dim=-1, reduction='mean')"),
        (
            lambda: softk_torch.TopKCrossEntropy(parameter(2.0), dim=1, epsilon=torch.tensor(0.5), reduction="sum"),
            "TopKCrossEntropy(k=2 (learned), complement=False, epsilon=0.5, dim=1, reduction='sum')",
        ),
        (lambda: softk_torch.SubsetSampler(2), "SubsetSampler(k=2, dim=-1, epsilon=0.1)"),
        (lambda: softk_torch.SubsetSampler(2, hard=True), "SubsetSampler(k=2, dim=-1, epsilon=0.1, hard=True)"),
    ],
)
def test_repr(make: Any, text: str) -> None:
    assert repr(make()) == text


@pytest.mark.parametrize("hard", [False, True])
def test_subsets(hard: bool, rng: Any) -> None:
    scores, noise = torch.tensor(rng.standard_normal((3, 6))), torch.tensor(rng.random((4, 3, 6)))
    layer = softk_torch.SubsetSampler(2, epsilon=0.4, hard=hard)
    wanted = sampling.subset(scores, 2, noise, epsilon=0.4, hard=hard)
    assert torch.equal(layer(scores, noise), wanted)
    across = softk_torch.SubsetSampler(2, dim=1, epsilon=0.4, hard=hard)
    assert torch.equal(across(scores.T, noise.transpose(1, 2)).transpose(1, 2), wanted)
    where = torch.arange(6) > 1
    assert torch.equal(
        layer(scores, noise, where=where), sampling.subset(scores, 2, noise, epsilon=0.4, hard=hard, where=where)
    )


def test_learned_number_of_draws(rng: Any) -> None:
    scores, noise = torch.tensor(rng.standard_normal(6)), torch.tensor(rng.random((4, 6)))
    layer = softk_torch.SubsetSampler(parameter(2.5), epsilon=parameter(0.5))
    layer(scores, noise)[:, 0].sum().backward()
    assert layer.k.grad != 0.0
    assert layer.epsilon.grad != 0.0
    held = softk_torch.SubsetSampler(parameter(-0.5))
    assert torch.all(held(scores, noise) == 0.0)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "epsilon must be a positive", lambda: softk_torch.NDCG(epsilon=0.0)),
        (ValueError, "epsilon must be a positive", lambda: softk_torch.Spearman(epsilon=-1.0)),
        (ValueError, "k must be at least 1, got 0", lambda: softk_torch.NDCG(0)),
        (ValueError, "gains must be 'exp2' or 'linear', got 'log'", lambda: softk_torch.NDCG(gains="log")),
        (ValueError, r"k must be above 0, got \(1, 0\)", lambda: softk_torch.Recall((1, 0))),
        (ValueError, "k must have probabilities that sum to 1", lambda: softk_torch.TopKCrossEntropy({1: 0.5})),
        (TypeError, "complement must be True or False", lambda: softk_torch.TopKCrossEntropy(1, complement=1)),
        (ValueError, "reduction must be 'mean', 'sum' or 'none'", lambda: softk_torch.Recall(1, reduction="max")),
        (ValueError, "k must be from 0", lambda: softk_torch.SubsetSampler(-1)),
        (ValueError, "epsilon must be a positive", lambda: softk_torch.SubsetSampler(1, epsilon=0)),
        (TypeError, "hard must be True or False", lambda: softk_torch.SubsetSampler(1, hard=1)),
    ],
)
def test_options_are_checked_when_the_module_is_made(error: type[Exception], message: str, make: Any) -> None:
    with pytest.raises(error, match=message):
        make()
