"""Linear maps for nearest neighbors: nothing, principal components, NCA and SoftNeighborsEmbedding, tuned alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier, NeighborhoodComponentsAnalysis
from sklearn.preprocessing import StandardScaler

from softk_sklearn import SoftNeighborsEmbedding

METHODS = ("raw", "PCA", "NCA", "softk")
DIMENSIONS = (2, 3, 5, 10)
#: How many neighbors vote in the test, by whichever method: the best on the validation samples.
NEIGHBORS = (1, 3, 5, 10, 15)
#: The temperature of both learned methods, in units of the mean squared distance where learning starts.
TEMPERATURES = (0.0625, 0.25, 1.0, 4.0)
STARTS = {"pca": "principal components", "lda": "linear discriminants"}


class Data(NamedTuple):
    """A data set, and how it is used."""

    load: Callable[..., Any]
    splits: int
    tested: float  # share of the samples
    scale: float | None  # what the features are divided by; None: each by its standard deviation


DATA = {
    "digits": Data(load_digits, 5, 0.5, 16.0),
    "wine": Data(load_wine, 8, 0.3, None),
    "breast cancer": Data(load_breast_cancer, 5, 0.3, None),
    "iris": Data(load_iris, 8, 0.3, None),
}


class Split(NamedTuple):
    """Samples to learn from, and others to be judged by."""

    x: np.ndarray
    y: np.ndarray
    other_x: np.ndarray
    other_y: np.ndarray


class Setting(NamedTuple):
    """What a learned method is given."""

    temperature: float
    start: str


def split(x: np.ndarray, y: np.ndarray, aside: float, seed: int, scale: float | None) -> Split:
    """A stratified split, its features scaled by what the samples to learn from say."""
    x, other_x, y, other_y = train_test_split(x, y, test_size=aside, stratify=y, random_state=seed)
    if scale is None:
        scaler = StandardScaler().fit(x)
        return Split(scaler.transform(x), y, scaler.transform(other_x), other_y)
    return Split(x / scale, y, other_x / scale, other_y)


def accuracy(given: Split, axes: np.ndarray | None, k: int) -> float:
    """Share of the other samples that the hard k nearest neighbors get right."""
    x, other = (given.x, given.other_x) if axes is None else (given.x @ axes.T, given.other_x @ axes.T)
    return float(KNeighborsClassifier(k).fit(x, given.y).score(other, given.other_y))


def starting_axes(start: str, x: np.ndarray, y: np.ndarray, dimensions: int) -> np.ndarray:
    """(dimensions, features), with a mean squared distance of 1 between two samples."""
    if start == "pca":
        axes = PCA(dimensions, svd_solver="full").fit(x).components_
    else:
        axes = LinearDiscriminantAnalysis().fit(x, y).scalings_[:, :dimensions].T
    return np.asarray(axes / math.sqrt(2.0 * np.sum(np.var(x @ axes.T, axis=0))))


def learn(method: str, setting: Setting | None, x: np.ndarray, y: np.ndarray, dimensions: int) -> np.ndarray | None:
    """The map of a method, (dimensions, features)."""
    if method == "raw":
        return None
    if setting is None:
        return np.asarray(PCA(dimensions, svd_solver="full").fit(x).components_)
    axes = starting_axes(setting.start, x, y, dimensions)
    learner: Any
    if method == "NCA":  # its softmax has no temperature, so the start carries it
        axes = axes / math.sqrt(setting.temperature)
        learner = NeighborhoodComponentsAnalysis(dimensions, init=axes, max_iter=200, random_state=0)
    else:
        learner = SoftNeighborsEmbedding(dimensions, init=axes, epsilon=setting.temperature, random_state=0)
    return np.asarray(learner.fit(x, y).components_)


def settings(method: str, dimensions: int, classes: int) -> list[Setting | None]:
    """The same number of trials for both learned methods; linear discriminants are a start where there are enough."""
    if method in ("raw", "PCA"):
        return [None]
    starts = list(STARTS)[: 2 if dimensions < classes else 1]
    return [Setting(temperature, start) for start in starts for temperature in TEMPERATURES]


def judge(method: str, outer: Split, inner: Split, dimensions: int, quick: bool) -> dict[str, Any]:
    """Choose on the validation samples, learn from all training samples, look at the test samples once."""
    best: tuple[float, Setting | None, int] = (-1.0, None, 1)
    trials = settings(method, dimensions, len(np.unique(outer.y)))
    for setting in trials[:1] if quick else trials:
        axes = learn(method, setting, inner.x, inner.y, dimensions)
        for k in NEIGHBORS:
            found = accuracy(inner, axes, k)
            if found > best[0]:
                best = (found, setting, k)
    _, setting, k = best
    start = time.perf_counter()
    axes = learn(method, setting, outer.x, outer.y, dimensions)
    seconds = time.perf_counter() - start
    return {
        "method": method,
        "accuracy": accuracy(outer, axes, k),
        "seconds": seconds,
        "k": k,
        "setting": None if setting is None else list(setting),
    }


def cells(quick: bool) -> Iterator[tuple[str, int, int]]:
    """All (data, dimensions, split)."""
    for name, data in DATA.items():
        features = data.load(return_X_y=True)[0].shape[1]
        for dimensions in DIMENSIONS:
            if dimensions < features and (not quick or (name == "iris" and dimensions == 2)):
                yield from ((name, dimensions, number) for number in range(1 if quick else data.splits))


def measure(cell: tuple[str, int, int], *, quick: bool) -> list[dict[str, Any]]:
    """All methods on one split."""
    name, dimensions, number = cell
    data = DATA[name]
    x, y = data.load(return_X_y=True)
    outer = split(x, y, data.tested, number, data.scale)
    inner = split(outer.x, outer.y, 0.25, number, 1.0)
    return [
        {"data": name, "dimensions": dimensions, "split": number, **judge(method, outer, inner, dimensions, quick)}
        for method in METHODS
    ]
