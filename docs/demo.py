"""Embed handwritten digits in two dimensions, by a linear map trained through a soft k-nearest-neighbor classifier.

Run it with `make demo`, or `python docs/demo.py --help`. Afterwards `router.py` trains a router, which has no gradient
without a soft top-k. The embedding has three parts:

1. `objective` is the whole model. Every query selects its k nearest neighbors with `softk.topk`, the neighbors vote,
   and the loss is the negative log likelihood of the query's own class. It is written once, for any array library.
2. `differentiate` is its gradient. PyTorch and JAX use their own autodiff. NumPy has none, so `softk.vjp`
   differentiates the selection in `select`, and the few lines around it are differentiated by hand.
3. `compare` evaluates the embedding with an ordinary nearest-neighbor classifier on test digits, compared with
   principal components (PCA) and scikit-learn's neighborhood components analysis (NCA).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import router

import softk

Array = Any
"""An array of the library that is used for training."""

DIMENSIONS = 2
UNITS = (0.5, 2.0)
"""Candidates for the unit of squared distance: epsilon for softk.topk, the initial scale for NCA."""
FLOOR = 1e-3
"""Added to every probability, which bounds the loss of outliers."""
PICTURES = Path(__file__).parent / "_build"
STEPS = 150
"""Chosen on validation digits, among 30, 60, 100, 150 and 300: the fewest within the standard error of the best."""
NAMESPACES = {"numpy": "array_api_compat.numpy", "torch": "array_api_compat.torch", "jax": "jax.numpy"}
COLORS = (
    "#4269d0", "#efb118", "#ff725c", "#2a9d8f", "#3a3a3a", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#7fb800"
)  # fmt: skip


class Problem(NamedTuple):
    """The constants of a training."""

    xp: Any  # the array namespace of NumPy, PyTorch or JAX
    data: Array  # (n, pixels)
    one_hot: Array  # (n, classes)
    k: int
    epsilon: float


# The model, written once for every array library ---------------------------------------------------------------------


def similarities(problem: Problem, embedding: Array, queries: Array) -> tuple[Array, Array]:
    """The negative squared distances of the queries to all digits, (queries, n), and which digits may vote.

    A digit is its own nearest neighbor and would give away its class, so it is left out of the vote.
    """
    xp = problem.xp
    points = problem.data @ embedding
    asked = xp.take(points, queries, axis=0)
    norms = xp.sum(points * points, axis=-1)
    distances = xp.take(norms, queries)[:, None] + norms[None, :] - 2.0 * (asked @ points.T)
    others = queries[:, None] != xp.arange(points.shape[0])[None, :]
    return -distances, others


def surprise(problem: Problem, mask: Array, queries: Array) -> Array:
    """Negative log likelihood of the queries' own classes under the vote of the selected neighbors."""
    xp = problem.xp
    votes = (mask @ problem.one_hot) / problem.k
    own = xp.sum(votes * xp.take(problem.one_hot, queries, axis=0), axis=-1)
    return -xp.mean(xp.log(own + FLOOR))


def objective(problem: Problem, embedding: Array, queries: Array) -> Array:
    """The loss of the soft k-nearest-neighbor classifier on some digits, with all other digits as neighbors."""
    scores, others = similarities(problem, embedding, queries)
    mask = softk.topk(scores, problem.k, epsilon=problem.epsilon, where=others)
    return surprise(problem, mask, queries)


# Its gradient --------------------------------------------------------------------------------------------------------


def differentiate(backend: str, problem: Problem) -> Callable[[Array, Array], tuple[Array, Array]]:
    """A function of (embedding, queries) that returns the loss and its gradient with respect to the embedding."""
    if backend == "numpy":
        return lambda embedding, queries: by_hand(problem, embedding, queries)
    if backend == "jax":
        import jax

        return jax.jit(jax.value_and_grad(lambda embedding, queries: objective(problem, embedding, queries)))

    import torch

    def by_tape(embedding: Array, queries: Array) -> tuple[Array, Array]:
        embedding = embedding.detach().requires_grad_()
        loss = objective(problem, embedding, queries)
        (gradient,) = torch.autograd.grad(loss, embedding)
        return loss.detach(), gradient

    return by_tape


def select(scores: Array, k: int, epsilon: float, others: Array, same: Array) -> tuple[Array, Array]:
    """The neighbors' mask, and the gradient of the loss with respect to the scores.

    The loss is -mean log(own + FLOOR), own = sum_j mask_j same_j / k, where `same` marks the digits of the same class.
    """
    mask, pullback = softk.vjp(softk.topk, scores, k, epsilon=epsilon, where=others)
    by_mask = -same / (len(scores) * (np.sum(mask * same, axis=-1, keepdims=True) + k * FLOOR))
    return mask, pullback(by_mask)["x"]


def by_hand(problem: Problem, embedding: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gradient on NumPy: `softk.vjp` differentiates the selection, and the chain rule is applied by hand."""
    data, one_hot, k = problem.data, problem.one_hot, problem.k
    scores, others = similarities(problem, embedding, queries)
    mask, by_scores = select(scores, k, problem.epsilon, others, one_hot[queries] @ one_hot.T)
    loss = surprise(problem, mask, queries)

    # scores_ij = -|q_i - r_j|^2, q = data[queries] @ embedding, r = data @ embedding
    points = data @ embedding
    asked = points[queries]
    by_asked = 2.0 * (by_scores @ points - np.sum(by_scores, axis=1)[:, None] * asked)
    by_points = 2.0 * (by_scores.T @ asked - np.sum(by_scores, axis=0)[:, None] * points)
    return loss, data[queries].T @ by_asked + data.T @ by_points


# Training ------------------------------------------------------------------------------------------------------------


def namespace(backend: str) -> Any:
    """The array namespace of a framework. Exits with a message if it is not installed."""
    try:
        xp = importlib.import_module(NAMESPACES[backend])
    except ModuleNotFoundError:
        raise SystemExit(f"--backend {backend} needs {backend}; install it: pip install {backend}") from None
    if backend == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)  # float64, as on the other backends
    return xp


def principal_axes(data: np.ndarray) -> np.ndarray:
    """The linear embedding of PCA, (pixels, 2), from which softk and NCA start."""
    axes: np.ndarray = np.linalg.svd(data - data.mean(axis=0), full_matrices=False)[2][:DIMENSIONS].T
    return axes


def adam(
    xp: Any, embedding: Array, gradient: Array, moments: tuple[Array, Array], step: int, rate: float
) -> tuple[Array, tuple[Array, Array]]:
    """One step of Adam (Kingma and Ba, ICLR 2015); `step` counts from one."""
    keep, keep_square = 0.9, 0.99
    mean = keep * moments[0] + (1.0 - keep) * gradient
    square = keep_square * moments[1] + (1.0 - keep_square) * gradient * gradient
    direction = mean / (1.0 - keep**step) / (xp.sqrt(square / (1.0 - keep_square**step)) + 1e-12)
    return embedding - rate * direction, (mean, square)


def train(
    backend: str,
    data: np.ndarray,
    labels: np.ndarray,
    *,
    k: int = 10,
    epsilon: float = 1.0,
    steps: int = STEPS,
    batch: int = 64,
    rate: float = 0.05,
    seed: int = 0,
    watch: Callable[[float], None] | None = None,
) -> tuple[np.ndarray, list[float]]:
    """Train the embedding (pixels, 2). Returns it and the loss of every step.

    The queries of a step are `batch` random digits. They depend only on the seed, so they are the same on every
    backend. `watch` is called with the loss after each step.
    """
    xp = namespace(backend)
    one_hot = (labels[:, None] == np.unique(labels)).astype(data.dtype)
    problem = Problem(xp, xp.asarray(data), xp.asarray(one_hot), k, epsilon)
    loss_and_gradient = differentiate(backend, problem)
    embedding = xp.asarray(principal_axes(data))
    moments = (xp.zeros_like(embedding), xp.zeros_like(embedding))
    draw = np.random.default_rng(seed)
    losses = []
    for step in range(1, steps + 1):
        queries = draw.choice(len(data), min(batch, len(data)), replace=False)
        loss, gradient = loss_and_gradient(embedding, xp.asarray(queries))
        slowing = 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps))
        embedding, moments = adam(xp, embedding, gradient, moments, step, rate * slowing)
        losses.append(float(loss))
        if watch is not None:
            watch(losses[-1])
    return np.asarray(embedding), losses


# Evaluation ----------------------------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Training digits and test digits."""

    data: np.ndarray
    labels: np.ndarray
    test_data: np.ndarray
    test_labels: np.ndarray


class Result(NamedTuple):
    """The result of a method on one split."""

    embedding: np.ndarray
    accuracy: float
    seconds: float
    unit: float


Learner = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
"""(data, labels, unit of squared distance) -> embedding."""


def split(data: np.ndarray, labels: np.ndarray, share: float, seed: int) -> Digits:
    """Split off a share of the digits for testing, stratified by class."""
    from sklearn.model_selection import train_test_split

    kept, aside, kept_labels, aside_labels = train_test_split(
        data, labels, test_size=share, stratify=labels, random_state=seed
    )
    return Digits(kept, kept_labels, aside, aside_labels)


def accuracy(digits: Digits, embedding: np.ndarray, k: int) -> float:
    """The test accuracy of the ordinary (hard) k nearest neighbors in the embedding."""
    from sklearn.neighbors import KNeighborsClassifier

    neighbors = KNeighborsClassifier(k).fit(digits.data @ embedding, digits.labels)
    return float(neighbors.score(digits.test_data @ embedding, digits.test_labels))


def judge(learn: Learner, units: Sequence[float], digits: Digits, k: int, seed: int) -> Result:
    """Choose the unit on a quarter of the training digits, train on all of them, and test once."""
    unit = units[0]
    if len(units) > 1:
        inner = split(digits.data, digits.labels, 0.25, seed)
        trials = [accuracy(inner, learn(inner.data, inner.labels, candidate), k) for candidate in units]
        unit = units[int(np.argmax(trials))]
    start = time.perf_counter()
    embedding = learn(digits.data, digits.labels, unit)
    seconds = time.perf_counter() - start
    return Result(embedding, accuracy(digits, embedding, k), seconds, unit)


def neighborhood_components(
    data: np.ndarray, labels: np.ndarray, unit: float, watch: Callable[..., None]
) -> np.ndarray:
    """scikit-learn's NCA, run to convergence.

    It uses a softmax of the negative squared distances without a temperature, so the scale of the initial map sets the
    unit. `watch` is called after each iteration.
    """
    from sklearn.neighbors import NeighborhoodComponentsAnalysis

    start = principal_axes(data).T / math.sqrt(unit)
    nca = NeighborhoodComponentsAnalysis(n_components=DIMENSIONS, init=start, max_iter=300, callback=watch)
    components: np.ndarray = nca.fit(data, labels).components_.T
    return components


class Progress:
    """Says on stderr what is done: in a bar on a terminal, else in a line every few seconds."""

    def __init__(self, steps: int, unit: str = "step") -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=steps, unit=unit, disable=None, leave=False, dynamic_ncols=True)
        self.steps, self.done, self.said, self.what = steps, 0, -math.inf, ""

    def begin(self, what: str, steps: int = 0) -> None:
        """Name what is done from now on, and count its steps if they will not be counted one by one."""
        self.what = what
        self.bar.set_description(what)
        self.advance(steps)

    def advance(self, steps: int, note: str = "") -> None:
        """Count finished steps."""
        self.done += steps
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(steps)
        if self.bar.disable and time.perf_counter() - self.said > 3.0:
            self.said = time.perf_counter()
            text = f"{self.what}, {note}" if note else self.what
            print(f"  {100 * self.done // self.steps:3} %  {text}", file=sys.stderr, flush=True)


def compare(options: argparse.Namespace) -> tuple[list[Digits], dict[str, list[Result]]]:
    """Run all three methods on every split."""
    from sklearn.datasets import load_digits
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    pixels, labels = load_digits(return_X_y=True)
    splits = [split(pixels / 16.0, labels, 0.3, options.seed + i) for i in range(options.splits)]
    units, scales = (UNITS, UNITS) if options.epsilon is None else ((options.epsilon,), (1.0,))
    fits = len(units) + 1 if len(units) > 1 else 1
    results: dict[str, list[Result]] = {"PCA": [], "NCA (scikit-learn)": [], "softk.topk": []}
    progress = Progress(2 * len(splits) * fits * options.steps)
    # The arrays are so small that a second thread costs more than it gains, especially on a busy machine.
    with progress.bar, threadpool_limits(1):
        average = math.nan

        def watch(loss: float) -> None:
            nonlocal average
            average = loss if math.isnan(average) else 0.95 * average + 0.05 * loss
            progress.advance(1, f"loss {average:.3f}")

        def soft_neighbors(data: np.ndarray, labels: np.ndarray, unit: float) -> np.ndarray:
            nonlocal average
            average = math.nan
            progress.begin(f"split {number} of {len(splits)}, softk.topk with epsilon {unit:g}")
            return train(
                options.backend,
                data,
                labels,
                k=options.k,
                epsilon=unit,
                steps=options.steps,
                seed=options.seed,
                watch=watch,
            )[0]

        def nca(data: np.ndarray, labels: np.ndarray, unit: float) -> np.ndarray:
            progress.begin(f"split {number} of {len(splits)}, NCA with unit {unit:g}")
            components = neighborhood_components(
                data, labels, unit, lambda _, count: progress.advance(0, f"iteration {count}")
            )
            progress.advance(options.steps)
            return components

        for number, digits in enumerate(splits, 1):
            seed = options.seed + number - 1
            results["PCA"].append(judge(lambda data, *_: principal_axes(data), (1.0,), digits, options.k, seed))
            results["NCA (scikit-learn)"].append(judge(nca, scales, digits, options.k, seed))
            results["softk.topk"].append(judge(soft_neighbors, units, digits, options.k, seed))
    return splits, results


def mean_and_error(values: Sequence[float], sign: str = "") -> str:
    """Format a mean with its standard error, which needs at least two values."""
    mean = f"{np.mean(values):{sign}.3f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.3f}"


def table(results: dict[str, list[Result]]) -> str:
    """Format the test accuracies, with one row per method and one column per split. Seconds are for one fit."""
    count = len(next(iter(results.values())))
    rows = [["", *(f"split {i + 1}" for i in range(count)), "mean" if count < 2 else "mean ± s.e.", "seconds"]]
    for name, found in results.items():
        accuracies = [result.accuracy for result in found]
        seconds = f"{np.mean([result.seconds for result in found]):.2f}"
        rows.append([name, *(f"{a:.3f}" for a in accuracies), mean_and_error(accuracies), seconds])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("   ".join([first.strip().ljust(widths[0]), *others]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def draw(path: Path, digits: Digits, results: dict[str, list[Result]]) -> None:
    """Plot the test digits of the first split in the three embeddings.

    The embeddings are rotated to look alike, which does not change the neighbors.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    figure = Figure(figsize=(12, 4.7))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    panels = figure.subplots(1, len(results))
    reference = digits.test_data @ results["PCA"][0].embedding
    order = np.random.default_rng(0).permutation(len(reference))  # no class covers another
    for panel, (name, found) in zip(panels, results.items(), strict=True):
        points = digits.test_data @ found[0].embedding
        left, _, right = np.linalg.svd((points - points.mean(axis=0)).T @ reference)
        points = points @ left @ right
        colors = [COLORS[label] for label in digits.test_labels[order]]
        panel.scatter(*points[order].T, c=colors, s=17, alpha=0.8, linewidths=0)
        for digit in np.unique(digits.test_labels):
            middle = np.median(points[digits.test_labels == digit], axis=0)
            halo = [withStroke(linewidth=3.5, foreground="white")]
            style = {"color": COLORS[digit], "fontsize": 17, "fontweight": "bold", "path_effects": halo}
            panel.text(*middle, str(digit), ha="center", va="center", **style)
        low, high = points.min(axis=0), points.max(axis=0)
        reach = 0.53 * np.max(high - low)
        (across, up) = 0.5 * (low + high)
        panel.set(xlim=(across - reach, across + reach), ylim=(up - reach, up + reach), aspect="equal")
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_color("#cccccc")
        panel.set_title(f"{name}: {100 * found[0].accuracy:.1f} % correct", fontsize=13, pad=8)
    handles = [
        Line2D([], [], color=color, marker="o", ls="", ms=7, label=str(digit)) for digit, color in enumerate(COLORS)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=10, frameon=False, handletextpad=0, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Learn a linear embedding of handwritten digits in two dimensions through softk.topk.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
what to try:
  --epsilon 0.01     nearly hard neighbors: only the few digits at the boundary have a gradient, hardly better than PCA
  --epsilon 50       far too soft: distant digits vote, too, and only the coarse layout is learned
  --k 3, --k 50      number of neighbors that vote, in training (soft) and in the test (hard)
  --backend torch    the same model with autodiff through softk.topk; also jax, under jit

epsilon is in the units of the scores, here squared distances in the embedding. The embedding starts as the two
principal components of pixels between 0 and 1. The mask separates neighbors whose squared distances differ by much
more than epsilon. Without --epsilon it is chosen from 0.5 and 2 on a quarter of the training digits, never on
the test digits. The initial scale of NCA, which has the same role, is chosen in the same way.
""",
    )
    parser.add_argument("--backend", choices=tuple(NAMESPACES), default="numpy", help="array library (default: numpy)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of Adam, on 64 digits each (default: {STEPS})")
    parser.add_argument("--k", type=int, default=10, help="number of neighbors (default: 10)")
    parser.add_argument("--epsilon", type=float, help="softness of the selection (default: chosen by validation)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the splits and mini-batches (default: 0)")
    parser.add_argument("--splits", type=int, default=3, help="number of random train/test splits (default: 3)")
    parser.add_argument("--output", type=Path, default=PICTURES, help="folder of the pictures (default: docs/_build)")
    parser.add_argument("--seeds", type=int, default=5, help="problems for the router; 0 leaves it out (default: 5)")
    options = parser.parse_args(argv)
    for name in ("steps", "k", "splits"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.epsilon is not None and not 0.0 < options.epsilon < math.inf:
        parser.error(f"--epsilon must be positive and finite, got {options.epsilon}")
    return options


def body(function: Callable[..., Any]) -> str:
    """The code of a function without its signature and its docstring."""
    source = inspect.getsource(function)
    after = source.rindex('"""') + 3
    return textwrap.indent(textwrap.dedent(source[after:].strip("\n")), "    ")


def main(argv: list[str] | None = None) -> int:
    """Train, compare, print the tables and draw the pictures."""
    options = parse(argv)
    start = time.perf_counter()
    print(
        f"1. An embedding of handwritten digits, trained with {options.backend}. Importing the libraries.", flush=True
    )
    namespace(options.backend)  # fail early if the library is missing
    splits, results = compare(options)
    sizes = f"{len(splits[0].labels)} training digits, {len(splits[0].test_labels)} test digits"
    print(f"\nHard {options.k}-nearest-neighbor accuracy in {DIMENSIONS} linear dimensions; {sizes}.\n")
    print(table(results))
    ours, theirs = results["softk.topk"], results["NCA (scikit-learn)"]
    differences = [a.accuracy - b.accuracy for a, b in zip(ours, theirs, strict=True)]
    print(f"\nsoftk.topk minus NCA, split by split: {mean_and_error(differences, sign='+')}")
    print(f"epsilon of softk.topk: {', '.join(f'{result.unit:g}' for result in ours)}")
    print("The lines that did the learning:\n")
    print(body(select if options.backend == "numpy" else objective))
    pictures = [options.output / "digits.png"]
    draw(pictures[0], splits[0], results)
    if options.seeds:
        print(f"\n2. A router that sends each token to {router.CHOSEN} experts of {router.EXPERTS}.", flush=True)
        progress = Progress(options.seeds * len(router.TUNED), "fit")
        with progress.bar:
            curves = router.compare(options.seeds, router.STEPS, lambda what: progress.begin(what, 1))
        print(f"\nTest loss over {options.seeds} problems, relative to the variance of the outputs.\n")
        print(router.table(curves))
        print("\nThe lines that did the learning:\n")
        print(body(router.by_softk))
        pictures.append(options.output / "router.png")
        router.draw(pictures[1], curves)
    names = " and ".join(os.path.relpath(picture) for picture in pictures)
    print(f"\nPictures: {names}. Everything took {time.perf_counter() - start:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
