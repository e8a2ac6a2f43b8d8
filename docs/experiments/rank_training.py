"""Two recommenders, and their training by any of the losses until it stops helping on the validation films."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from rank_data import Data, quality
from rank_losses import LOSSES
from torch import nn
from torch.nn import functional

SIZE, HIDDEN = 32, 64


class Budget(NamedTuple):
    """Of every training."""

    epochs: int  # at most
    patience: int  # epochs without a better NDCG of the validation films
    batch: int  # users
    positives: int  # in a list
    negatives: int


class Setting(NamedTuple):
    """What is chosen for every loss."""

    rate: float
    temperature: float
    decay: float


class Training(NamedTuple):
    """The scores after the best epoch, (users, films), and what was seen on the way."""

    scores: torch.Tensor
    curve: list[float]  # NDCG of the validation films after each epoch
    seconds: float  # of the processor, for the updates without the validation: other programs do not count


class Factors(nn.Module):
    """Matrix factorization: a film's score is the product of its vector and the user's, plus a number of its own."""

    def __init__(self, data: Data) -> None:
        super().__init__()
        users, films = data.train.shape
        self.users = nn.Parameter(0.1 * torch.randn(users, SIZE))
        self.films = nn.Parameter(0.1 * torch.randn(films, SIZE))
        self.bias = nn.Parameter(torch.zeros(films))

    def forward(self, users: torch.Tensor) -> torch.Tensor:
        return self.users[users] @ self.films.T + self.bias


class Towers(nn.Module):
    """Two towers of one hidden layer: a user's vector, and a film's with its genres and year. Scores are cosines."""

    def __init__(self, data: Data) -> None:
        super().__init__()
        users, films = data.train.shape
        self.users = nn.Parameter(torch.randn(users, SIZE))
        self.films = nn.Parameter(torch.randn(films, SIZE))
        self.register_buffer("features", data.features)
        self.user_tower = tower(SIZE)
        self.film_tower = tower(SIZE + data.features.shape[1])

    def forward(self, users: torch.Tensor) -> torch.Tensor:
        queries = self.user_tower(self.users[users])
        keys = self.film_tower(torch.cat([self.films, self.features], dim=1))
        return functional.normalize(queries, dim=1) @ functional.normalize(keys, dim=1).T


def tower(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, SIZE))


MODELS = {"matrix factorization": Factors, "two towers": Towers}


def drawn(among: torch.Tensor, count: int) -> torch.Tensor:
    """The places of so many true values of each row, all equally likely, without replacement."""
    return torch.rand(among.shape).masked_fill(~among, -1.0).topk(count, dim=1).indices


def loss_of(
    loss: str, temperature: float, scores: torch.Tensor, relevant: torch.Tensor, budget: Budget
) -> torch.Tensor:
    """The loss of some users. A list has some of the films that are relevant to the user, and some of the others."""
    of = LOSSES[loss]
    if not of.over_list:
        return of.value(scores, relevant, temperature)
    positives = scores.gather(1, drawn(relevant, budget.positives))
    negatives = scores.gather(1, drawn(~relevant, budget.negatives))
    return of.value(positives, negatives, temperature)


def train(model: str, loss: str, setting: Setting, data: Data, seed: int, budget: Budget) -> Training:
    """The seed makes the first weights, the batches and the lists."""
    torch.manual_seed(seed)
    network = MODELS[model](data)
    optimizer = torch.optim.AdamW(network.parameters(), lr=setting.rate, weight_decay=setting.decay)
    every = torch.arange(len(data.train))
    best, kept, curve, seconds = 0, torch.empty(0), [], 0.0
    for epoch in range(budget.epochs):
        start = time.process_time()
        for users in torch.randperm(len(every)).split(budget.batch):
            value = loss_of(loss, setting.temperature, network(users), data.train[users], budget)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        seconds += time.process_time() - start
        with torch.no_grad():
            scores = network(every)
        curve.append(float(quality(scores, data.validation, data.train)[0].mean()))
        if epoch == 0 or curve[-1] > curve[best]:
            best, kept = epoch, scores
        elif epoch - best >= budget.patience:
            break
    return Training(kept, curve, seconds)
