"""A small convolutional network on the digits, trained through the soft nearest neighbors and by cross-entropy."""

from __future__ import annotations

import itertools
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from knn_linear import NEIGHBORS, Split, split
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import softk

LOSSES = ("cross-entropy", "softk")
FEATURES, CLASSES, BATCH = 16, 10, 128
EPOCHS = 40
#: Of both: twelve trials each.
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
DECAYS = (0.0, 1e-2, 1e-1)  # of the weights, for cross-entropy
EPSILONS = (0.0625, 0.5, 4.0)  # of the squared distances, for the soft neighbors
SOFT_NEIGHBORS = 8


class Setting(NamedTuple):
    """What a training is given: the learning rate, and the decay of the weights or epsilon."""

    rate: float
    other: float


class Network(nn.Module):
    """8 x 8 pixels to features, and from these to logits, which only cross-entropy uses."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 16, FEATURES),
        )
        self.head = nn.Linear(FEATURES, CLASSES)


def train(loss: str, setting: Setting, given: Split, seed: int, epochs: int) -> tuple[Network, float]:
    """The network after the epochs, and the seconds they took."""
    torch.manual_seed(seed)
    network = Network()
    images = torch.asarray(given.x, dtype=torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.asarray(given.y)
    decay = setting.other if loss == "cross-entropy" else 0.0
    optimizer = torch.optim.AdamW(network.parameters(), lr=setting.rate, weight_decay=decay)
    batches = max(1, len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    start = time.perf_counter()
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: batches * BATCH].chunk(batches):
            features = network.features(images[batch])
            if loss == "cross-entropy":
                value = nn.functional.cross_entropy(network.head(features), labels[batch])
            else:  # each digit of the batch asks all others
                own = labels[batch]
                every = torch.arange(len(batch))
                value = softk.neighbors.loss(
                    features, features, own, own, SOFT_NEIGHBORS, epsilon=setting.other, exclude=every, floor=1e-3
                )
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
    return network, time.perf_counter() - start


@torch.no_grad()
def accuracies(network: Network, given: Split) -> dict[str, float]:
    """By the largest logit, and by the hard k nearest neighbors among the features of the training digits."""
    images, others = (torch.asarray(x, dtype=torch.float32).reshape(-1, 1, 8, 8) for x in (given.x, given.other_x))
    keys, queries = network.features(images), network.features(others)
    found = {"argmax": float(np.mean(network.head(queries).argmax(dim=1).numpy() == given.other_y))}
    for k in NEIGHBORS:
        neighbors = KNeighborsClassifier(k).fit(keys.numpy(), given.y)
        found[f"k={k}"] = float(neighbors.score(queries.numpy(), given.other_y))
    return found


def judge(loss: str, outer: Split, inner: Split, seed: int, epochs: int) -> list[dict[str, Any]]:
    """Each way of reading the network has its setting chosen on the validation digits; it is then trained on all."""
    trials = {}
    for numbers in itertools.product(RATES, DECAYS if loss == "cross-entropy" else EPSILONS):
        setting = Setting(*numbers)
        trials[setting] = accuracies(train(loss, setting, inner, seed, epochs)[0], inner)
    readings = {"neighbors": [f"k={k}" for k in NEIGHBORS]}
    if loss == "cross-entropy":
        readings = {"argmax": ["argmax"], **readings}
    trained: dict[Setting, tuple[dict[str, float], float]] = {}
    records = []
    for reading, ways in readings.items():
        setting, way = max(itertools.product(trials, ways), key=lambda pair: trials[pair[0]][pair[1]])
        if setting not in trained:
            network, seconds = train(loss, setting, outer, seed, epochs)
            trained[setting] = accuracies(network, outer), seconds
        found, seconds = trained[setting]
        records.append(
            {
                "loss": loss,
                "reading": reading,
                "seed": seed,
                "accuracy": found[way],
                "seconds": seconds,
                "setting": list(setting),
                "way": way,
            }
        )
    return records


def measure(seed: int, *, quick: bool) -> list[dict[str, Any]]:
    """Both losses on one split, which the seed makes, as it does the network's first weights and the batches."""
    x, y = load_digits(return_X_y=True)
    outer = split(x, y, 0.5, seed, 16.0)
    inner = split(outer.x, outer.y, 0.25, seed, 1.0)
    return [record for loss in LOSSES for record in judge(loss, outer, inner, seed, 1 if quick else EPOCHS)]
