"""Train a router that sends each token to 2 experts of 8, in three ways: other weights, other gradients.

Run it with `python docs/router.py`; `make demo` runs it, too. The data are made by a router and experts of the same
kind: the output for a token is the mean of the outputs of two linear experts, chosen by linear scores. All three
routers are tested in the same way, with two experts per token and no others:

- "softmax over the chosen" is the usual router. The weights are the softmax of the scores of the two chosen experts.
- "straight-through" averages the two chosen experts, and has the gradient of a softmax over all eight.
- "softk.topk" averages the experts with a soft mask, whose epsilon falls from 8 to 0.05 during the training. In the
  test the mask is hard.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import softk

EXPERTS, CHOSEN, WIDTH, OUTPUTS = 8, 2, 16, 4
STEPS, BATCH, LAST_EPSILON = 500, 128, 0.05
PICTURE = Path(__file__).parent / "_build" / "router.png"
LIGHT = ("default", ("#7f7f7f", "#e08214", "#2166ac"))
DARK = (str(Path(__file__).with_name("dark.mplstyle")), ("#9198a1", "#f0883e", "#58a6ff"))
"""For light and for dark pages, the style of matplotlib and the colors of the routers."""
SETTINGS = {
    "softmax over the chosen": ((0.03, 0.1, 0.3), (0.0, 0.1, 1.0)),  # weight of the load-balancing loss
    "straight-through": ((0.03, 0.1, 0.3), (0.5, 2.0, 8.0)),  # temperature of the softmax
    "softk.topk": ((0.03, 0.1, 0.3), (0.5, 2.0, 8.0)),  # first epsilon
}
"""For each router nine settings: the learning rates, and the values of its own hyper-parameter."""
TUNED = {
    "softmax over the chosen": (0.1, 0.1),
    "straight-through": (0.1, 2.0),
    "softk.topk": (0.1, 8.0),
}
"""The settings with the smallest mean loss on the validation tokens of the seeds 100 to 102: `--tune` finds them."""


class Tokens(NamedTuple):
    """Tokens and the outputs that are to be learned."""

    x: np.ndarray  # (tokens, WIDTH)
    wanted: np.ndarray  # (tokens, OUTPUTS)


class Model(NamedTuple):
    """A router and its experts. All are linear."""

    router: np.ndarray  # (WIDTH, EXPERTS)
    experts: np.ndarray  # (WIDTH, EXPERTS * OUTPUTS)


Gates = tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]
"""The weights of the experts, (tokens, EXPERTS), and a function from their gradient to that of the scores."""


# The three routers ---------------------------------------------------------------------------------------------------


def by_softk(scores: np.ndarray, first_epsilon: float, done: float) -> Gates:
    """The soft mask, divided by the number of chosen experts. `done` is the finished part of the training."""
    epsilon = first_epsilon * (LAST_EPSILON / first_epsilon) ** done
    mask, pullback = softk.vjp(softk.topk, scores, CHOSEN, epsilon=epsilon)
    return mask / CHOSEN, lambda by_weights: pullback(by_weights / CHOSEN)["x"]


def by_softmax(scores: np.ndarray, balance: float, done: float) -> Gates:
    """Softmax over the chosen experts, with the load-balancing loss of the Switch Transformer."""
    chosen = hard(scores)
    weights = softmax(np.where(chosen, scores, -np.inf))
    share, probabilities = chosen.mean(axis=0) / CHOSEN, softmax(scores)
    by_probabilities = balance * EXPERTS * share / len(scores)
    by_balance = through_softmax(probabilities, np.broadcast_to(by_probabilities, scores.shape))
    return weights, lambda by_weights: through_softmax(weights, by_weights) + by_balance


def straight_through(scores: np.ndarray, temperature: float, done: float) -> Gates:
    """The mean of the chosen experts, with the gradient of a softmax over all of them."""
    probabilities = softmax(scores / temperature)
    return hard(scores) / CHOSEN, lambda by_weights: through_softmax(probabilities, by_weights) / temperature


ROUTERS = {"softmax over the chosen": by_softmax, "straight-through": straight_through, "softk.topk": by_softk}


def hard(scores: np.ndarray) -> np.ndarray:
    """Which experts are chosen, as booleans."""
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, np.argpartition(-scores, CHOSEN - 1, axis=1)[:, :CHOSEN], True, axis=1)
    return chosen


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax along the last axis."""
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    quotient: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return quotient


def through_softmax(weights: np.ndarray, by_weights: np.ndarray) -> np.ndarray:
    """The gradient of the scores of a softmax, from that of its values."""
    change: np.ndarray = weights * (by_weights - np.sum(weights * by_weights, axis=1, keepdims=True))
    return change


# Data, training and test ---------------------------------------------------------------------------------------------


def apply(model: Model, x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The outputs, and those of each expert, (tokens, EXPERTS, OUTPUTS)."""
    each = (x @ model.experts).reshape(len(x), EXPERTS, OUTPUTS)
    return np.einsum("te,teo->to", weights, each), each


def draw_model(random: np.random.Generator, scale: float) -> Model:
    """A random router, and random experts."""
    router = scale * random.normal(size=(WIDTH, EXPERTS))
    return Model(router, random.normal(size=(WIDTH, EXPERTS * OUTPUTS)) / math.sqrt(WIDTH))


def problem(seed: int) -> tuple[Tokens, Tokens]:
    """Tokens for training and for the test."""
    random = np.random.default_rng(seed)
    truth = draw_model(random, 1.0)

    def tokens(count: int) -> Tokens:
        x = random.normal(size=(count, WIDTH))
        return Tokens(x, apply(truth, x, hard(x @ truth.router) / CHOSEN)[0])

    return tokens(4096), tokens(2048)


def test_loss(name: str, model: Model, tokens: Tokens) -> float:
    """The squared error with two experts per token, over the mean square of what is to be learned."""
    scores = tokens.x @ model.router
    weights = by_softmax(scores, 0.0, 1.0)[0] if name == "softmax over the chosen" else hard(scores) / CHOSEN
    error = apply(model, tokens.x, weights)[0] - tokens.wanted
    return float(np.mean(error**2) / np.mean(tokens.wanted**2))


def train(
    name: str, data: Tokens, test: Tokens, *, rate: float, setting: float, seed: int, steps: int
) -> tuple[list[int], list[float]]:
    """Train with Adam. Returns some steps and the test losses after them; the last is that of the final model."""
    random = np.random.default_rng(seed + 1000)
    model = draw_model(random, 0.1)
    means = squares = Model(np.zeros_like(model.router), np.zeros_like(model.experts))
    times, losses = [0], [test_loss(name, model, test)]
    for step in range(1, steps + 1):
        batch = random.integers(0, len(data.x), BATCH)
        x, done = data.x[batch], (step - 1) / steps
        weights, pull = ROUTERS[name](x @ model.router, setting, done)
        outputs, each = apply(model, x, weights)
        by_outputs = 2.0 * (outputs - data.wanted[batch]) / outputs.size
        by_scores = pull(np.einsum("to,teo->te", by_outputs, each))
        by_experts = (weights[:, :, None] * by_outputs[:, None, :]).reshape(BATCH, -1)
        gradient = Model(x.T @ by_scores, x.T @ by_experts)
        means = Model(*(0.9 * mean + 0.1 * part for mean, part in zip(means, gradient, strict=True)))
        squares = Model(*(0.99 * square + 0.01 * part**2 for square, part in zip(squares, gradient, strict=True)))
        size = rate * 0.5 * (1.0 + math.cos(math.pi * done)) / (1.0 - 0.9**step)
        parts = zip(model, means, squares, strict=True)
        model = Model(*(old - size * m / (np.sqrt(s / (1.0 - 0.99**step)) + 1e-12) for old, m, s in parts))
        if step % max(1, steps // 25) == 0 or step == steps:
            times.append(step)
            losses.append(test_loss(name, model, test))
    return times, losses


def compare(seeds: int, steps: int, say: Callable[[str], None]) -> dict[str, tuple[list[int], np.ndarray]]:
    """For each router some steps, and the test losses after them, (seeds, steps)."""
    curves = {}
    for name, (rate, setting) in TUNED.items():
        found = []
        for seed in range(seeds):
            say(f"router with {name}, problem {seed + 1} of {seeds}")
            data, test = problem(seed)
            times, losses = train(name, data, test, rate=rate, setting=setting, seed=seed, steps=steps)
            found.append(losses)
        curves[name] = (times, np.asarray(found))
    return curves


def tune(steps: int) -> None:
    """Print the mean loss of every setting. The seeds are others than those of the comparison."""
    for name, (rates, settings) in SETTINGS.items():
        for rate in rates:
            for setting in settings:
                losses = []
                for seed in (100, 101, 102):
                    data, validation = problem(seed)
                    losses.append(
                        train(name, data, validation, rate=rate, setting=setting, seed=seed, steps=steps)[1][-1]
                    )
                print(f"{name:24} rate {rate:<5g} setting {setting:<4g} loss {np.mean(losses):.3f}", flush=True)


def table(curves: dict[str, tuple[list[int], np.ndarray]]) -> str:
    """The final test losses: mean, smallest and largest of the seeds."""
    lines = [f"{'':24}{'mean':>9}{'smallest':>11}{'largest':>10}"]
    for name, (_, losses) in curves.items():
        last = losses[:, -1]
        lines.append(f"{name:24}{last.mean():>9.3f}{last.min():>11.3f}{last.max():>10.3f}")
    return "\n".join(lines)


def draw(path: Path, curves: dict[str, tuple[list[int], np.ndarray]], *, dark: bool = False) -> None:
    """Plot the test losses against the steps, each seed and their mean, for a light or a dark page."""
    from matplotlib import style

    look, colors = DARK if dark else LIGHT
    path.parent.mkdir(parents=True, exist_ok=True)
    with style.context(look):
        plot(curves, colors).savefig(path, dpi=130, metadata={"Software": None})


def plot(curves: dict[str, tuple[list[int], np.ndarray]], colors: tuple[str, ...]) -> Any:
    """The figure of the test losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4))
    figure.set_layout_engine("constrained")
    panel = figure.subplots()
    for (name, (times, losses)), color in zip(curves.items(), colors, strict=True):
        panel.semilogy(times, losses.T, color=color, lw=0.7, alpha=0.35)
        mean = losses.mean(axis=0)
        panel.semilogy(times, mean, color=color, lw=2.2)
        panel.annotate(
            name, (times[-1], mean[-1]), (6, 0), textcoords="offset points", color=color, va="center", fontsize=10
        )
    panel.set(xlabel="step of training", ylabel="test loss with two experts per token")
    panel.set_xlim(0, times[-1])
    panel.set_title(f"A router that sends each token to {CHOSEN} experts of {EXPERTS}", fontsize=11)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Compare the routers, print the losses and draw the curves."""
    parser = argparse.ArgumentParser(description="Train a router of 2 experts of 8 in three ways.")
    parser.add_argument("--seeds", type=int, default=5, help="number of problems (default: 5)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of Adam (default: {STEPS})")
    parser.add_argument("--tune", action="store_true", help="print the validation losses of all settings instead")
    parser.add_argument("--output", type=Path, default=PICTURE, help="the figure (default: docs/_build/router.png)")
    options = parser.parse_args(argv)
    if options.tune:
        tune(options.steps)
        return 0
    start = time.perf_counter()
    curves = compare(options.seeds, options.steps, lambda text: print(text, flush=True))
    print(table(curves))
    dark = options.output.with_stem(f"{options.output.stem}_dark")
    draw(options.output, curves)
    draw(dark, curves, dark=True)
    print(f"pictures: {options.output} and {dark}; {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
