"""SoftNeighborsEmbedding: scikit-learn's own checks of an estimator, and that it learns what it should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from sklearn.base import clone
from sklearn.datasets import load_digits, load_wine
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from softk_sklearn import SoftNeighborsEmbedding

from .test_errors import complains

#: What it checks cannot be seen without a setting of SciPy's that holds for a whole process.
ELSEWHERE = {"check_array_api_input"}

CHECKS = [
    pytest.param(check, estimator, id=getattr(check, "func", check).__name__)
    for estimator, check in estimator_checks_generator(SoftNeighborsEmbedding(max_iter=10), legacy=True)
    if getattr(check, "func", check).__name__ not in ELSEWHERE
]


#: Some of the checks have few samples.
FEW_SAMPLES = pytest.mark.filterwarnings("default:n_neighbors must be below:UserWarning")


@FEW_SAMPLES
@pytest.mark.parametrize(("check", "estimator"), CHECKS)
def test_estimator(check: Any, estimator: Any) -> None:
    check(clone(estimator))


def test_there_are_checks() -> None:
    assert len(CHECKS) > 50


@pytest.fixture(scope="module")
def digits() -> list[np.ndarray]:
    pixels, labels = load_digits(return_X_y=True)
    return train_test_split(pixels / 16.0, labels, train_size=500, test_size=500, stratify=labels, random_state=0)


def test_it_learns(digits: list[np.ndarray]) -> None:
    x, other_x, y, other_y = digits
    found = SoftNeighborsEmbedding(2, max_iter=60, batch_size=32, random_state=0).fit(x, y)
    axes = PCA(2).fit(x).components_.T
    start = KNeighborsClassifier(10).fit(x @ axes, y).score(other_x @ axes, other_y)
    assert found.score(other_x, other_y) > start + 0.04
    assert np.mean(found.loss_curve_[-10:]) < 0.8 * np.mean(found.loss_curve_[:5])
    assert found.n_iter_ == 60
    assert found.components_.shape == (2, 64)
    np.testing.assert_allclose(found.transform(other_x), other_x @ found.components_.T)


def test_predictions_are_those_of_the_neighbors(digits: list[np.ndarray]) -> None:
    x, other_x, y, _ = digits
    names = np.asarray([f"digit {label}" for label in y])
    found = SoftNeighborsEmbedding(3, n_neighbors=5, max_iter=3, batch_size=32, random_state=0).fit(x, names)
    expected = KNeighborsClassifier(5).fit(found.transform(x), names)
    np.testing.assert_array_equal(found.predict(other_x), expected.predict(found.transform(other_x)))
    shares = found.predict_proba(other_x)
    np.testing.assert_allclose(shares, expected.predict_proba(found.transform(other_x)))
    assert list(found.classes_) == sorted(set(names))


@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_the_unit_of_the_features_does_not_matter(scale: float) -> None:
    x, y = load_wine(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    one, other = (
        SoftNeighborsEmbedding(2, max_iter=10, random_state=0).fit(values, y) for values in (x, scale * x + 3 * scale)
    )
    np.testing.assert_allclose(other.components_ * scale, one.components_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(other.loss_curve_, one.loss_curve_, rtol=1e-6)


@pytest.mark.parametrize("init", ["auto", "pca", "lda", "identity", "random", "array"])
def test_starts(init: str) -> None:
    """Where it starts, the mean squared distance of two samples is 1; almost no step is made."""
    x, y = load_wine(return_X_y=True)
    given: Any = np.random.default_rng(0).normal(size=(2, x.shape[1])) if init == "array" else init
    found = SoftNeighborsEmbedding(2, init=given, max_iter=1, learning_rate=1e-12, random_state=0).fit(x, y)
    assert 2.0 * np.sum(np.var(found.transform(x), axis=0)) == pytest.approx(1.0)
    if init in ("auto", "pca"):
        axes = PCA(2).fit(x).components_
        overlap = np.linalg.svd(axes @ found.components_.T)[1]
        assert overlap[0] == pytest.approx(np.linalg.norm(found.components_, 2))
        assert overlap[1] == pytest.approx(np.linalg.norm(found.components_, -2))
    if init == "array":
        ratio = found.components_ / given
        np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)


def test_it_is_reproducible_and_silent(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = load_wine(return_X_y=True)
    model = make_pipeline(StandardScaler(), SoftNeighborsEmbedding(2, max_iter=5, random_state=3))
    first, second = (clone(model).fit(x, y)[-1].components_ for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert capsys.readouterr().out == ""
    SoftNeighborsEmbedding(2, max_iter=4, verbose=2, random_state=3).fit(x, y)
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["step 2/4", "step 4/4"]


def test_few_samples_are_learned_from() -> None:
    """All of the other samples would be selected, whatever the map, and no gradient would be left."""
    x, y = np.asarray([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0], [2.0, 1.0]]), [1, 0, 1, 0]
    with pytest.warns(UserWarning, match="n_neighbors must be below 3, the number of other samples, got 10: 1 is used"):
        found = SoftNeighborsEmbedding(init="identity", max_iter=100).fit(x, y)
    assert found.n_neighbors_ == 1
    assert found.loss_curve_[0] > 1.0 > 0.1 > found.loss_curve_[-1]
    np.testing.assert_array_equal(found.predict(x), y)


@pytest.mark.parametrize(("samples", "used"), [(3, 1), (11, 5), (12, 10)])
def test_neighbors_are_fewer_than_the_other_samples(samples: int, used: int, rng: Any) -> None:
    x, y = rng.standard_normal((samples, 3)), np.arange(samples) % 2
    if samples <= 11:
        with pytest.warns(UserWarning, match=f"got 10: {used} (is|are) used"):
            found = SoftNeighborsEmbedding(max_iter=20, random_state=0).fit(x, y)
    else:
        found = SoftNeighborsEmbedding(max_iter=20, random_state=0).fit(x, y)
    assert found.n_neighbors_ == used
    assert np.ptp(found.loss_curve_) > 1e-3 * found.loss_curve_[0]
    assert found.classifier_.n_neighbors == used


def test_two_samples_are_refused() -> None:
    """Each is the only neighbor of the other."""
    with pytest.raises(ValueError, match=r"2 sample\(s\).*minimum of 3 is required"):
        SoftNeighborsEmbedding(1).fit(np.eye(2), [0, 1])


def test_names_of_the_features_that_come_out() -> None:
    pandas = pytest.importorskip("pandas")
    x, y = load_wine(return_X_y=True, as_frame=True)
    found = SoftNeighborsEmbedding(2, max_iter=3, random_state=0)
    with pytest.raises(NotFittedError):
        found.get_feature_names_out()
    found.fit(x, y)
    names = ["softneighborsembedding0", "softneighborsembedding1"]
    assert list(found.get_feature_names_out()) == names
    plain, classes, shares = found.transform(x), found.predict(x), found.predict_proba(x)
    framed = found.set_output(transform="pandas").transform(x)
    assert isinstance(framed, pandas.DataFrame)
    assert list(framed.columns) == names
    assert framed.index.equals(x.index)
    np.testing.assert_array_equal(framed.to_numpy(), plain)
    np.testing.assert_array_equal(found.predict(x), classes)
    np.testing.assert_array_equal(found.predict_proba(x), shares)
    model = make_pipeline(StandardScaler(), SoftNeighborsEmbedding(2, max_iter=3)).set_output(transform="pandas")
    assert list(model.fit(x, y).transform(x).columns) == names
    assert list(model.get_feature_names_out()) == names


def test_single_precision_stays() -> None:
    x, y = load_wine(return_X_y=True)
    found = SoftNeighborsEmbedding(2, max_iter=3, random_state=0).fit(x.astype("float32"), y)
    assert found.components_.dtype == np.float32
    assert found.transform(x.astype("float32")).dtype == np.float32


@pytest.mark.parametrize(
    ("error", "name", "value", "allowed", "options"),
    [
        (ValueError, "n_components", "got 14", "at most 13", {"n_components": 14}),
        (ValueError, "n_components", "got 0", "at least 1", {"n_components": 0}),
        (TypeError, "n_neighbors", "got 1.5", "an integer", {"n_neighbors": 1.5}),
        (ValueError, "epsilon", "got 0", "above 0", {"epsilon": 0.0}),
        (ValueError, "floor", "got -1", "at least 0", {"floor": -1}),
        (TypeError, "learning_rate", "got None", "a number", {"learning_rate": None}),
        (ValueError, "init", "'best'", "'pca'", {"init": "best"}),
        (ValueError, "init", r"got \(3, 3\)", r"\(2, 13\)", {"init": np.eye(3), "n_components": 2}),
        (ValueError, "init", "n_components = 3", "2 discriminant", {"init": "lda", "n_components": 3}),
    ],
)
def test_errors(error: Any, name: str, value: str, allowed: str, options: dict[str, Any]) -> None:
    complains(error, name, value, allowed, SoftNeighborsEmbedding(**options).fit, *load_wine(return_X_y=True))


def test_equal_samples_are_told() -> None:
    with pytest.warns(UserWarning, match="all samples of X are equal"):
        found = SoftNeighborsEmbedding(2, max_iter=2).fit(np.ones((20, 3)), np.arange(20) % 2)
    assert np.all(np.isfinite(found.transform(np.ones((2, 3)))))


@pytest.mark.parametrize(
    ("foreign", "meant"),
    [("k", "use n_neighbors="), ("eps", "use epsilon="), ("tol", "its arguments are n_components, n_neighbors")],
)
def test_the_argument_that_is_meant(foreign: str, meant: str) -> None:
    allowed = rf"^SoftNeighborsEmbedding\(\) has no argument '{foreign}'; {meant}"
    complains(TypeError, foreign, foreign, allowed, SoftNeighborsEmbedding, **{foreign: 1})
