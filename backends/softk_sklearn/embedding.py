"""A linear embedding for nearest-neighbor classification, trained through a soft selection of the neighbors."""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

import softk
from softk._functions.signatures import explained_class

INITS = ("auto", "pca", "lda", "identity", "random")


@explained_class
class SoftNeighborsEmbedding(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClassifierMixin, BaseEstimator):
    """Supervised linear embedding in which the k nearest neighbors of a sample tend to be of its class.

    It minimizes the leave-one-out loss of the soft k-nearest-neighbor classifier, `softk.neighbors.loss`. The optimizer
    is Adam on random mini-batches of queries; the keys of a query are all other samples. As a transformer it returns
    the embedding. As a classifier it uses ordinary nearest neighbors in the embedding. It can replace
    `sklearn.neighbors.NeighborhoodComponentsAnalysis`, which uses a softmax over all samples instead of the k nearest.

    Parameters
    ----------
    n_components : int, default=None
        Dimension of the embedding, at most the number of features. None uses the number of features.
    n_neighbors : int, default=10
        Number of neighbors that vote, in the loss and in `predict`. If there are at most ``n_neighbors + 1`` samples,
        half of the other samples vote, with a warning: a selection of all of them would not depend on the map, and the
        gradient would be 0.
    epsilon : float, default=1.0
        Softness of the selection, in units of the initial mean squared distance between two samples. The map may grow
        during training, which sharpens the selection.
    init : {"auto", "pca", "lda", "identity", "random"} or array of shape (n_components, n_features), default="auto"
        Initial map. "auto" is "pca" if `n_components` is less than the number of samples and of features, else
        "identity". The map is scaled to a mean squared distance of 1 between two samples.
    floor : float, default=1e-3
        Added to every probability before its logarithm is taken, which bounds the loss of outliers.
    learning_rate : float, default=0.1
        Initial learning rate, in units of the typical entry of a random map with a mean squared distance of 1 between
        samples. It decays to 0 by a cosine schedule.
    max_iter : int, default=200
        Number of optimizer steps.
    batch_size : int, default=64
        Number of queries in a mini-batch; all samples if there are fewer.
    random_state : int, RandomState instance or None, default=None
        Seed for the mini-batches and for the random initialization.
    verbose : int, default=0
        Print the mean loss after every `verbose` steps; 0 prints nothing.

    Attributes
    ----------
    components_ : ndarray of shape (n_components, n_features)
        The map, scaled such that `epsilon` is in the units of the squared distances in the embedding.
    classes_ : ndarray
        The classes.
    loss_curve_ : list of float
        The loss of the mini-batch of each step.
    n_iter_ : int
        Number of steps made.
    n_neighbors_ : int
        Number of neighbors that vote.
    n_features_in_, feature_names_in_
        As in all estimators.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section 4; Goldberger, Roweis, Hinton,
    Salakhutdinov, "Neighbourhood Components Analysis", NIPS 2004, for the task; Kingma and Ba, "Adam", ICLR 2015.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from softk_sklearn import SoftNeighborsEmbedding
    >>> X, y = load_iris(return_X_y=True)
    >>> embedding = SoftNeighborsEmbedding(n_components=2, random_state=0).fit(X[::2], y[::2])
    >>> embedding.transform(X[1::2]).shape
    (75, 2)
    >>> embedding.score(X[1::2], y[1::2]) > 0.9
    True
    """

    def __init__(
        self,
        n_components: int | None = None,
        n_neighbors: int = 10,
        *,
        epsilon: float = 1.0,
        init: Any = "auto",
        floor: float = 1e-3,
        learning_rate: float = 0.1,
        max_iter: int = 200,
        batch_size: int = 64,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.n_components = n_components
        self.n_neighbors = n_neighbors
        self.epsilon = epsilon
        self.init = init
        self.floor = floor
        self.learning_rate = learning_rate
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> SoftNeighborsEmbedding:
        """Learn the map.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples, at least three. Scale the features first if they are not comparable.
        y : array-like of shape (n_samples,)
            Their classes.

        Returns
        -------
        SoftNeighborsEmbedding
            Itself.

        Raises
        ------
        ValueError
            If a parameter or the data are out of their range.

        Warns
        -----
        UserWarning
            If there are at most ``n_neighbors + 1`` samples.
        """
        # With two samples, each one's only neighbor is the other, and nothing can be learned.
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], ensure_min_samples=3)
        check_classification_targets(y)
        components = self._check_parameters(X.shape[1])
        self.n_neighbors_ = self._neighbors(len(X))
        self.classes_, labels = np.unique(y, return_inverse=True)
        random = check_random_state(self.random_state)
        centered = X - X.mean(axis=0)
        size = math.sqrt(float(np.sum(np.var(centered, axis=0))))
        if size == 0.0:
            warnings.warn("all samples of X are equal, so there is no map to learn", UserWarning, stacklevel=2)
            size = 1.0
        centered = centered / size  # makes the training independent of the unit of the features
        start = self._start(centered, labels, components, random)
        self.components_ = self._learn(centered, labels, start, random).T.astype(X.dtype) / size
        self.n_iter_ = len(self.loss_curve_)
        self.classifier_ = KNeighborsClassifier(self.n_neighbors_).fit(X @ self.components_.T, y)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Embed samples.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples.

        Returns
        -------
        ndarray of shape (n_samples, n_components)
            The embedded samples.
        """
        return self._embed(X)

    def predict(self, X: Any) -> np.ndarray:
        """Predict the majority class among the nearest neighbors in the embedding.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples.

        Returns
        -------
        ndarray of shape (n_samples,)
            The predicted classes.
        """
        embedded = self._embed(X)
        found: np.ndarray = self.classifier_.predict(embedded)
        return found

    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict the share of every class among the nearest neighbors, in the order of `classes_`.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples.

        Returns
        -------
        ndarray of shape (n_samples, n_classes)
            The shares.
        """
        embedded = self._embed(X)
        shares: np.ndarray = self.classifier_.predict_proba(embedded)
        return shares

    @property
    def _n_features_out(self) -> int:
        """The number of output features, for scikit-learn's ``get_feature_names_out``."""
        count: int = self.components_.shape[0]
        return count

    def _embed(self, X: Any) -> np.ndarray:
        """`transform` without the output container that scikit-learn adds according to `set_output`."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        embedded: np.ndarray = X @ self.components_.T
        return embedded

    # -- training

    def _neighbors(self, samples: int) -> int:
        """The number of neighbors, less than all other samples: a selection of all does not depend on the map."""
        others = samples - 1
        if self.n_neighbors < others:
            return int(self.n_neighbors)
        used = max(1, others // 2)
        warnings.warn(
            f"n_neighbors must be below {others}, the number of other samples, got {self.n_neighbors}: "
            f"{used} {'is' if used == 1 else 'are'} used, because a selection of all of them has a gradient of 0",
            stacklevel=3,
        )
        return used

    def _learn(self, X: np.ndarray, labels: np.ndarray, start: np.ndarray, random: Any) -> np.ndarray:
        """Train the map (n_features, n_components) by Adam."""
        n, k = len(X), self.n_neighbors_
        every, size = np.arange(n), min(self.batch_size, n)
        map_, mean, square = start, np.zeros_like(start), np.zeros_like(start)
        # The learning rate is in units of the typical entry of a random map of mean squared distance 1.
        unit = self.learning_rate / math.sqrt(2.0 * start.shape[1])
        self.loss_curve_: list[float] = []
        for step in range(1, self.max_iter + 1):
            batch = every if size == n else random.choice(n, size, replace=False)
            points = X @ map_
            loss, pullback = softk.vjp(
                softk.neighbors.loss,
                points[batch],
                points,
                labels[batch],
                labels,
                k,
                epsilon=self.epsilon,
                exclude=batch,
                floor=self.floor,
            )
            # The samples are both queries and keys, so their gradient has two terms.
            moved = pullback(1.0)
            gradient = X[batch].T @ moved["queries"] + X.T @ moved["keys"]
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.99 * square + 0.01 * gradient * gradient
            direction = mean / (1.0 - 0.9**step) / (np.sqrt(square / (1.0 - 0.99**step)) + 1e-12)
            slowing = 0.5 * (1.0 + math.cos(math.pi * (step - 1) / self.max_iter))
            map_ = map_ - unit * slowing * direction
            self.loss_curve_.append(float(loss))
            if self.verbose and step % self.verbose == 0:
                recent = np.mean(self.loss_curve_[-self.verbose :])
                print(f"step {step}/{self.max_iter}: loss {recent:.4f}")  # noqa: T201
        return map_

    def _start(self, X: np.ndarray, labels: np.ndarray, components: int, random: Any) -> np.ndarray:
        """The initial map (n_features, n_components), scaled to a mean squared distance of 1 between samples."""
        samples, features = X.shape
        init = self.init
        if not isinstance(init, str):
            axes = np.array(init, dtype=X.dtype).T
            if axes.shape != (features, components):
                raise ValueError(f"init must have the shape {(components, features)}, got {axes.shape[::-1]}")
        elif init == "random":
            axes = random.normal(size=(features, components))
        elif init == "lda":
            axes = LinearDiscriminantAnalysis().fit(X, labels).scalings_[:, :components]
            if axes.shape[1] < components:
                raise ValueError(
                    f"init must not be 'lda' for n_components = {components}: "
                    f"these data have {axes.shape[1]} discriminant directions"
                )
        elif X.any() and (init == "pca" or (init == "auto" and components < min(features, samples))):
            axes = PCA(components, svd_solver="full").fit(X).components_.T
        else:
            axes = np.eye(features, components)
        spread = 2.0 * float(np.sum(np.var(X @ axes, axis=0)))
        scaled: np.ndarray = np.asarray(axes / math.sqrt(spread) if spread > 0.0 else axes, dtype=X.dtype)
        return scaled

    def _check_parameters(self, features: int) -> int:
        """Check all parameters, and return the number of components."""
        _check_number("n_neighbors", self.n_neighbors, Integral, 1)
        _check_number("max_iter", self.max_iter, Integral, 1)
        _check_number("batch_size", self.batch_size, Integral, 1)
        _check_number("verbose", self.verbose, Integral, 0)
        _check_number("epsilon", self.epsilon, Real, 0, above=True)
        _check_number("learning_rate", self.learning_rate, Real, 0, above=True)
        _check_number("floor", self.floor, Real, 0)
        if isinstance(self.init, str) and self.init not in INITS:
            raise ValueError(f"init must be an array or one of {', '.join(map(repr, INITS))}, got {self.init!r}")
        if self.n_components is None:
            return features
        _check_number("n_components", self.n_components, Integral, 1)
        if self.n_components > features:
            raise ValueError(
                f"n_components must be at most {features}, the number of features, got {self.n_components}"
            )
        return int(self.n_components)


def _check_number(name: str, value: Any, kind: Any, least: int, *, above: bool = False) -> None:
    if not isinstance(value, kind) or isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be {'an integer' if kind is Integral else 'a number'}, got {value!r}")
    if not (least < value if above else least <= value) or not value < math.inf:
        raise ValueError(f"{name} must be finite and {'above' if above else 'at least'} {least}, got {value!r}")
