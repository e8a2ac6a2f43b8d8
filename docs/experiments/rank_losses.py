"""Losses of a ranking with relevant items: those in use, and softk's. All are means over the users."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

import softk

#: What softk's loss of recall, and its cross-entropy, select.
TOP = 20
SINKHORN = 50


class Loss(NamedTuple):
    """A loss, and the scores that it takes.

    Over a list: those of some relevant films, (users, positives), and of some others, (users, negatives). Over all
    films: their scores and which of them are relevant, both (users, films). Last comes the temperature, in units of the
    scores.
    """

    value: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    over_list: bool
    ours: bool


def bpr(positives: torch.Tensor, negatives: torch.Tensor, temperature: float) -> torch.Tensor:
    """Bayesian personalized ranking (Rendle et al., 2009), over all pairs of a relevant film and another."""
    return functional.softplus((negatives[:, None, :] - positives[:, :, None]) / temperature).mean()


def sampled_softmax(positives: torch.Tensor, negatives: torch.Tensor, temperature: float) -> torch.Tensor:
    """The cross-entropy of each relevant film among itself and the other films."""
    rest = torch.logsumexp(negatives / temperature, dim=1, keepdim=True)
    return functional.softplus(rest - positives / temperature).mean()


def lambda_rank(positives: torch.Tensor, negatives: torch.Tensor, temperature: float) -> torch.Tensor:
    """LambdaRank as in the LambdaLoss framework (Wang et al., 2018).

    The logistic loss of a pair has as its weight the change of NDCG if the two films exchange their ranks.
    """
    count = positives.shape[1]
    with torch.no_grad():
        order = torch.cat([positives, negatives], dim=1).argsort(dim=1, descending=True)
        discount = discounts(order.shape[1], positives).expand(order.shape)
        own = torch.zeros_like(discount).scatter(1, order, discount)
        weight = (own[:, :count, None] - own[:, None, count:]).abs() / discount[0, :count].sum()
    pairs = functional.softplus((negatives[:, None, :] - positives[:, :, None]) / temperature)
    return (weight * pairs).sum(dim=(1, 2)).mean()


def neural_ndcg(positives: torch.Tensor, negatives: torch.Tensor, temperature: float) -> torch.Tensor:
    """Minus NeuralNDCG (Pobrotyn and Bialobrzeski, 2021): NeuralSort's permutation, rescaled by Sinkhorn's iterations.

    It is that of all ranks.
    """
    scores = torch.cat([positives, negatives], dim=1)
    n, count = scores.shape[1], positives.shape[1]
    rank = torch.arange(n, dtype=scores.dtype)
    apart = (scores[:, :, None] - scores[:, None, :]).abs().sum(dim=1)
    logits = (n - 1.0 - 2.0 * rank)[:, None] * scores[:, None, :] - apart[:, None, :]
    plan = doubly_stochastic(torch.softmax(logits / temperature, dim=2))
    discount = discounts(n, scores)
    return -((plan[:, :, :count].sum(dim=2) @ discount) / discount[:count].sum()).mean()


def doubly_stochastic(plan: torch.Tensor) -> torch.Tensor:
    """Columns and rows, in turn, divided by their sums, 50 times or until the sums of both are 1."""
    # The plan itself stays as it is. Only the factors of its rows and columns change, which takes a third of the time.
    rows, columns = torch.ones_like(plan[:, :, :1]), torch.ones_like(plan[:, :1, :])
    for i in range(SINKHORN):
        sums = rows.mT @ plan
        if i and bool((sums * columns - 1.0).abs().max() < 1e-6):
            break
        columns = 1.0 / sums.clamp(min=1e-30)
        rows = 1.0 / (plan @ columns.mT).clamp(min=1e-30)
    return rows * plan * columns


def softmax(scores: torch.Tensor, relevant: torch.Tensor, temperature: float) -> torch.Tensor:
    """The cross-entropy of the relevant films among all films."""
    logs = torch.log_softmax(scores / temperature, dim=1)
    return -(torch.where(relevant, logs, 0.0).sum(dim=1) / relevant.sum(dim=1)).mean()


def soft_ndcg(positives: torch.Tensor, negatives: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Minus softk's NDCG."""
    relevance = torch.cat([torch.ones_like(positives), torch.zeros_like(negatives)], dim=1)
    scores = torch.cat([positives, negatives], dim=1)
    return -softk.losses.ndcg(scores, relevance, epsilon=epsilon, reduction="mean")


def soft_recall(scores: torch.Tensor, relevant: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Minus softk's recall at 20."""
    return -softk.losses.recall(scores, relevant, TOP, epsilon=epsilon, reduction="mean")


def soft_cross_entropy(scores: torch.Tensor, relevant: torch.Tensor, epsilon: float) -> torch.Tensor:
    """softk's top-20 cross-entropy: minus the mean logarithm of the mask at the relevant films."""
    labels = relevant / relevant.sum(dim=1, keepdim=True)
    return softk.losses.cross_entropy(scores, labels, TOP, epsilon=epsilon)


def discounts(n: int, like: torch.Tensor) -> torch.Tensor:
    """Of the ranks, the best first."""
    return 1.0 / torch.log2(torch.arange(n, dtype=like.dtype) + 2.0)


LOSSES = {
    "BPR": Loss(bpr, over_list=True, ours=False),
    "sampled softmax": Loss(sampled_softmax, over_list=True, ours=False),
    "softmax": Loss(softmax, over_list=False, ours=False),
    "LambdaRank": Loss(lambda_rank, over_list=True, ours=False),
    "NeuralNDCG": Loss(neural_ndcg, over_list=True, ours=False),
    "softk NDCG": Loss(soft_ndcg, over_list=True, ours=True),
    "softk recall@20": Loss(soft_recall, over_list=False, ours=True),
    "softk top-20 cross-entropy": Loss(soft_cross_entropy, over_list=False, ours=True),
}
