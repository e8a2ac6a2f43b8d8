"""The ways to train a network with few weights: dense, random, by magnitude, Top-KAST, and by learned scores."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from prune_network import Images, Network, Tree, judge
from torch import nn
from torch.func import functional_call

import softk

BATCH = 64
UPDATES = 50  # about how often the gradual pruning takes weights away
PENALTY = 1e-5  # the coefficient of Top-KAST's regularizer
SCORE_RATE = 0.05  # the learning rate of the scores
SOFTEST = 1.0  # the first epsilon of the learned scores
SEARCH = 0.5  # the share of the steps in which the scores are learned

#: The learning rates of the weights, for every method.
RATES = (3e-3, 1e-2, 3e-2, 1e-1)


class Method(ABC):
    """What all methods have: the weights, how many are kept, the steps, and a second setting beside the rate."""

    title: str
    setting: str  # what the second setting is
    others: ClassVar[dict[str, Any]]  # its values that are tried, by their names

    def __init__(self, weights: Tree, keep: int, steps: int, other: Any) -> None:
        self.weights, self.keep, self.other = weights, keep, other
        self.total = sum(value.numel() for value in weights.values())

    @abstractmethod
    def used(self, step: int) -> Tree:
        """The weights that the network computes with in a step; those of step `steps` are the result."""

    def scores(self) -> list[torch.Tensor]:
        """What is trained beside the network."""
        return []

    def decay(self) -> float:
        """The decay of the weights."""
        return 0.0

    def penalty(self) -> torch.Tensor | float:
        """What is added to the loss."""
        return 0.0


class Dense(Method):
    """All weights are used."""

    title = "dense"
    setting = "weight decay"
    others: ClassVar[dict[str, Any]] = {"0": 0.0, "0.01": 0.01, "0.1": 0.1, "1": 1.0}

    def used(self, step: int) -> Tree:
        return self.weights

    def decay(self) -> float:
        return float(self.other)


def masked(weights: Tree, masks: Tree) -> Tree:
    return {name: value * masks[name] for name, value in weights.items()}


def largest(scores: Tree, keep: int) -> Tree:
    """Masks of exactly as many ones as said."""
    with torch.no_grad():
        found: Tree = softk.budget.topk(scores, keep, hard=True)
    return found


class Random(Method):
    """A random choice of the weights, before the training: a control. Each layer has the same share.

    The sums in a layer of few weights are small at first, so the initial weights may be scaled up.
    """

    title = "random"
    setting = "initial weights times"
    others: ClassVar[dict[str, Any]] = {
        "share^(-1/4)": -0.25,
        "share^(-1/2)": -0.5,
        "share^(-3/4)": -0.75,
        "share^(-1)": -1.0,
    }

    def __init__(self, weights: Tree, keep: int, steps: int, other: Any) -> None:
        super().__init__(weights, keep, steps, other)
        share = keep / self.total
        self.masks = {
            name: largest({name: torch.rand_like(value)}, round(share * value.numel()))[name]
            for name, value in weights.items()
        }
        with torch.no_grad():
            for value in weights.values():
                value *= share**other

    def used(self, step: int) -> Tree:
        return masked(self.weights, self.masks)


class Magnitude(Method):
    """The weights of the smallest magnitude are taken away, by the cubic schedule of Zhu and Gupta."""

    title = "magnitude"
    setting = "pruning"
    #: The shares of the steps at which the pruning begins and ends.
    others: ClassVar[dict[str, Any]] = {
        "from 0 to 1/8": (0.0, 0.125),
        "from 0 to 1/4": (0.0, 0.25),
        "from 0 to 1/2": (0.0, 0.5),
        "from 0 to 3/4": (0.0, 0.75),
    }

    def __init__(self, weights: Tree, keep: int, steps: int, other: Any) -> None:
        super().__init__(weights, keep, steps, other)
        self.begin, self.end = (round(part * steps) for part in other)
        self.every = max(1, (self.end - self.begin) // UPDATES)
        self.left = self.total
        self.masks = {name: torch.ones_like(value) for name, value in weights.items()}

    def wanted(self, step: int) -> int:
        """How many weights are left at a step."""
        if step >= self.end:
            return self.keep
        if step < self.begin or (step - self.begin) % self.every:
            return self.left
        part = (step - self.begin) / (self.end - self.begin)
        return self.keep + round((self.total - self.keep) * (1.0 - part) ** 3)

    def used(self, step: int) -> Tree:
        wanted = self.wanted(step)
        if wanted < self.left:
            # The weights that are gone count as 0, so none of them comes back.
            magnitudes = {name: value.detach().abs() for name, value in masked(self.weights, self.masks).items()}
            self.masks, self.left = largest(magnitudes, wanted), wanted
        return masked(self.weights, self.masks)


class TopKAST(Method):
    """`softk.sparse.topkast`, with its regularizer: the weights of all layers are ranked together."""

    title = "Top-KAST"
    setting = "share with a gradient"
    others: ClassVar[dict[str, Any]] = {"1/8": 0.125, "1/4": 0.25, "1/2": 0.5, "1": 1.0}

    def __init__(self, weights: Tree, keep: int, steps: int, other: Any) -> None:
        super().__init__(weights, keep, steps, other)
        self.shares = keep / self.total, max(keep / self.total, other)

    def used(self, step: int) -> Tree:
        found: Tree = softk.sparse.topkast(self.weights, *self.shares)
        return found

    def penalty(self) -> torch.Tensor | float:
        return PENALTY * softk.sparse.regularizer(self.weights, *self.shares)


class Learned(Method):
    """A score of each weight, learned through the soft mask of `softk.budget.topk`: one budget over all layers.

    The budget falls from all weights to those that are kept, and epsilon with it. Then the mask is hard and fixed.
    """

    title = "learned"
    setting = "last epsilon"
    others: ClassVar[dict[str, Any]] = {"1": 1.0, "0.3": 0.3, "0.1": 0.1, "0.03": 0.03}

    def __init__(self, weights: Tree, keep: int, steps: int, other: Any) -> None:
        super().__init__(weights, keep, steps, other)
        # The more inputs a layer has, the smaller are its first weights. Relative to their mean magnitude they are the
        # first scores, so that all layers begin alike.
        sizes = {name: value.detach().abs() for name, value in weights.items()}
        self.tree = {name: (size / size.mean()).requires_grad_() for name, size in sizes.items()}
        self.search = round(SEARCH * steps)
        self.budget = softk.schedules.exponential(self.total, keep, steps=self.search)
        self.epsilon = softk.schedules.exponential(SOFTEST, other, steps=self.search)
        self.masks: Tree | None = None

    def scores(self) -> list[torch.Tensor]:
        return list(self.tree.values())

    def used(self, step: int) -> Tree:
        if step < self.search:
            masks: Tree = softk.budget.topk(self.tree, self.budget(step), epsilon=self.epsilon(step))
            return masked(self.weights, masks)
        if self.masks is None:
            self.masks = largest(self.tree, self.keep)
        return masked(self.weights, self.masks)


METHODS: dict[str, type[Method]] = {kind.title: kind for kind in (Dense, Random, Magnitude, TopKAST, Learned)}


class Setting(NamedTuple):
    """What is chosen for a method: the learning rate, and the name of its second setting."""

    rate: float
    other: str


class Outcome(NamedTuple):
    """How good the network is, how many weights of each layer are not 0, and the processor's seconds for a step."""

    accuracy: float
    loss: float
    left: list[int]
    seconds: float


def train(title: str, setting: Setting, keep: int, data: Any, images: Images, seed: int, steps: int) -> Outcome:
    """A network of this seed, trained for the steps. All methods see the same images in the same order."""
    torch.manual_seed(seed)
    network = Network(data)
    kind = METHODS[title]
    method = kind(dict(network.prunable()), keep, steps, kind.others[setting.other])
    groups: list[dict[str, Any]] = [{"params": list(network.parameters()), "weight_decay": method.decay()}]
    if method.scores():
        groups.append({"params": method.scores(), "lr": SCORE_RATE, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=setting.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    draws = torch.Generator().manual_seed(seed)
    began = time.process_time()  # that of others, who may use the machine too, does not count
    for step in range(steps):
        batch = torch.randint(len(images.x), (BATCH,), generator=draws)
        logits = functional_call(network, method.used(step), images.x[batch])
        loss = nn.functional.cross_entropy(logits, images.y[batch]) + method.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = (time.process_time() - began) / steps
    with torch.no_grad():
        last = method.used(steps)
    left = [int(torch.count_nonzero(value)) for value in last.values()]
    return Outcome(*judge(network, last, images.other_x, images.other_y), left, seconds)
