"""Draw the figures of the README, for light and for dark pages: `python docs/figures.py`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

import softk

STATIC = Path(__file__).parent / "_static"
EPSILONS = (1.0, 0.3, 0.1, 0.01)
MARKERS = "osD^"


class Look(NamedTuple):
    """A style of matplotlib, and the colors of lines and bars."""

    style: str
    colors: tuple[str, ...]  # of the values of epsilon
    marked: str
    others: str


LIGHT = Look("default", ("#74a9cf", "#41ab5d", "#6a51a3", "#252525"), "#d94801", "#bdbdbd")
DARK = Look(str(STATIC.with_name("dark.mplstyle")), ("#58a6ff", "#3fb950", "#bc8cff", "#f0f6fc"), "#f0883e", "#6e7681")


def scores() -> np.ndarray:
    """Twenty scores, sorted for readability."""
    return np.sort(np.random.default_rng(3).normal(size=20))[::-1]


def draw_mask(path: Path, look: Look) -> None:
    """The mask and the gradient of one of its items, for several values of epsilon."""
    x, k = scores(), 5
    places = np.arange(1, x.size + 1)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")

    left.bar(places[:k], x[:k], color=look.marked, label=f"the {k} largest")
    left.bar(places[k:], x[k:], color=look.others, label="the others")
    left.axhline(0, color=plt.rcParams["axes.edgecolor"], lw=0.8)
    left.set(title=f"{x.size} scores, k = {k}", xlabel="item", ylabel="score")
    left.legend(frameon=False)

    for i, (epsilon, color, marker) in enumerate(zip(EPSILONS, look.colors, MARKERS, strict=True)):
        mask, pullback = softk.vjp(softk.topk, x, k, epsilon=epsilon)
        point = {"color": color, "marker": marker, "ms": 4.5, "ls": ""}
        middle.plot(places, mask, **point, label=f"ε = {epsilon:g}")
        cotangent = np.zeros_like(x)
        cotangent[k - 1] = 1.0
        found = pullback(cotangent)["x"]
        beside = places + 0.2 * (i - 1.5)  # the stems of an item stand side by side
        right.vlines(beside, 0.0, found, color=color, lw=1.2)
        right.plot(beside, found, **point)
    middle.set(title="mask: softk.topk(x, k), which sums to k", xlabel="item", ylabel="mask")
    middle.axvline(k + 0.5, color=look.marked, lw=1.2, ls=":", label=f"ordinary top-{k}: 1 left of it, 0 right")
    right.set(
        title=f"derivative of the mask of item {k}\nwith respect to each score",
        xlabel=f"item (ε = {EPSILONS[-1]:g}: the gap is too wide, all are 0)",
        ylabel="derivative",
    )
    right.axhline(0, color=plt.rcParams["axes.edgecolor"], lw=0.8)
    figure.legend(*middle.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks([1, 5, 10, 15, 20])
    save(figure, path)


def draw_epsilon(path: Path, look: Look) -> None:
    """The effective number of items that share the gradient, and the mask on the top k, against epsilon."""
    rng = np.random.default_rng(0)
    n, k = 1000, 50
    x = rng.normal(size=n)
    epsilons = np.geomspace(1e-4, 10, 60)
    shares = [softk.vjp(softk.threshold, x, k, epsilon=e)[1](np.asarray(1.0))["x"] for e in epsilons]
    effective = [1.0 / np.sum(p * p) for p in shares]
    sharpness = [np.sum(np.sort(softk.topk(x, k, epsilon=e))[-k:]) / k for e in epsilons]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4), layout="constrained")
    left.loglog(epsilons, effective, color=look.colors[2], lw=2)
    left.set(xlabel="ε / standard deviation of the scores", ylabel="items")
    left.set_title("items that share the gradient:\n1 / Σ p², p the derivative of the threshold", fontsize=10.5)
    right.semilogx(epsilons, sharpness, color=look.colors[2], lw=2)
    right.set(xlabel="ε / standard deviation of the scores", ylabel="share of k")
    right.set_title("share of the mask that lies on the\nk largest scores", fontsize=10.5)
    right.set_ylim(0, 1.05)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    """Save a figure without metadata, so that the same figure gives the same bytes."""
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Draw all figures."""
    STATIC.mkdir(exist_ok=True)
    for suffix, look in (("", LIGHT), ("_dark", DARK)):
        with plt.style.context(look.style):
            draw_mask(STATIC / f"mask{suffix}.png", look)
            draw_epsilon(STATIC / f"epsilon{suffix}.png", look)


if __name__ == "__main__":
    main()
