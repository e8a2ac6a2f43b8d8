"""A linear embedding for nearest neighbours, learned through the soft selection of them."""

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

INITS = ("auto", "pca", "lda", "identity", "random")


class SoftNeighborsEmbedding(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClassifierMixin, BaseEstimator):
    """A linear map under which the k nearest neighbours of a sample are of its own class.

    It minimises the leave-one-out loss of the soft k-nearest-neighbour classifier, `softk.neighbors.loss`, by Adam on
    random batches of samples, each of which may choose among all the others. As a transformer it gives the embedding,
    as a classifier the ordinary nearest neighbours in it. It takes the place of
    `sklearn.neighbors.NeighborhoodComponentsAnalysis`, which has a softmax over all samples where this has the k
    nearest.

    Parameters
    ----------
    n_components : int, default=None
        Dimensions of the embedding, at most the number of features; all of them if None.
    n_neighbors : int, default=10
        Neighbours that vote, in the loss and in `predict`. Where they would be all of the other samples, nothing is
        selected and nothing can be learned: for at most ``n_neighbors + 1`` samples half of the others vote, with a
        warning.
    epsilon : float, default=1.0
        Softness of the selection, in units of the mean squared distance between two samples where learning starts.
        The map may grow, and so the selection sharpens as far as it helps.
    init : {"auto", "pca", "lda", "identity", "random"} or array of shape (n_components, n_features), default="auto"
        Where learning starts. "auto" is "pca" where that leaves something out, else "identity". It is scaled to a mean
        squared distance of 1 between two samples.
    floor : float, default=1e-3
        Added to every probability before its logarithm is taken, so that hopeless samples do not outweigh the others.
    learning_rate : float, default=0.1
        Size of the first steps, in units of the entries of a random map with a mean squared distance of 1 between
        samples; it falls to 0 as a cosine.
    max_iter : int, default=200
        Steps.
    batch_size : int, default=64
        Samples whose loss is in one step; all if there are fewer.
    random_state : int, RandomState instance or None, default=None
        Of the batches and of the random start.
    verbose : int, default=0
        Print the mean loss after each `verbose`-th step; 0 prints nothing.

    Attributes
    ----------
    components_ : ndarray of shape (n_components, n_features)
        The map, scaled such that `epsilon` is the temperature of the squared distances in the embedding.
    classes_ : ndarray
        The classes.
    loss_curve_ : list of float
        The loss of each step's batch.
    n_iter_ : int
        How many steps were made.
    n_neighbors_ : int
        How many neighbours vote.
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
            Samples, at least three, of features that are comparable: scale them first where they are not.
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
        # Of two samples each is the only neighbour of the other.
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], ensure_min_samples=3)
        check_classification_targets(y)
        components = self._check_parameters(X.shape[1])
        self.n_neighbors_ = self._neighbors(len(X))
        self.classes_, labels = np.unique(y, return_inverse=True)
        random = check_random_state(self.random_state)
        centred = X - X.mean(axis=0)
        size = math.sqrt(float(np.sum(np.var(centred, axis=0)))) or 1.0
        centred = centred / size  # so that nothing depends on the unit of the features
        start = self._start(centred, labels, components, random)
        self.components_ = self._learn(centred, labels, start, random).T.astype(X.dtype) / size
        self.n_iter_ = len(self.loss_curve_)
        self.classifier_ = KNeighborsClassifier(self.n_neighbors_).fit(X @ self.components_.T, y)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The embedding of samples.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples.

        Returns
        -------
        ndarray of shape (n_samples, n_components)
            Their places.
        """
        return self._embed(X)

    def predict(self, X: Any) -> np.ndarray:
        """The class of most of the nearest neighbours in the embedding, by the hard vote.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Samples.

        Returns
        -------
        ndarray of shape (n_samples,)
            Their classes.
        """
        embedded = self._embed(X)
        found: np.ndarray = self.classifier_.predict(embedded)
        return found

    def predict_proba(self, X: Any) -> np.ndarray:
        """The share of every class among the nearest neighbours, in the order of `classes_`.

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
        """What scikit-learn names the features of the embedding by."""
        count: int = self.components_.shape[0]
        return count

    def _embed(self, X: Any) -> np.ndarray:
        """`transform`, whose result scikit-learn wraps as `set_output` says."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        embedded: np.ndarray = X @ self.components_.T
        return embedded

    # -- how it is learned

    def _neighbors(self, samples: int) -> int:
        """How many of the other samples are selected: not all of them, for their mask would be 1 whatever the map."""
        others = samples - 1
        if self.n_neighbors < others:
            return int(self.n_neighbors)
        used = max(1, others // 2)
        warnings.warn(
            f"n_neighbors must be below {others}, the number of other samples, got {self.n_neighbors}: "
            f"{used} {'is' if used == 1 else 'are'} used, for nothing is learned from a selection of all",
            stacklevel=3,
        )
        return used

    def _learn(self, X: np.ndarray, labels: np.ndarray, start: np.ndarray, random: Any) -> np.ndarray:
        """The map (n_features, n_components)."""
        n, k = len(X), self.n_neighbors_
        every, size = np.arange(n), min(self.batch_size, n)
        map_, mean, square = start, np.zeros_like(start), np.zeros_like(start)
        # The unit of a step is an entry of a map at random with a mean squared distance of 1 between samples.
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
        """The initial map (n_features, n_components) of centred samples, with a mean squared distance of 1."""
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
        elif init == "pca" or (init == "auto" and components < min(features, samples)):
            axes = PCA(components, svd_solver="full").fit(X).components_.T
        else:
            axes = np.eye(features, components)
        spread = 2.0 * float(np.sum(np.var(X @ axes, axis=0)))
        scaled: np.ndarray = np.asarray(axes / math.sqrt(spread) if spread > 0.0 else axes, dtype=X.dtype)
        return scaled

    def _check_parameters(self, features: int) -> int:
        """The number of components, after a look at all parameters."""
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
