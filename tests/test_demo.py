"""The demo, shortened: it learns, every backend learns the same, and it draws its picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo() -> Any:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "docs" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits(demo: Any) -> Any:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return demo.split(pixels / 16.0, labels, 0.3, 0)


def test_the_gradient_by_hand_is_right(demo: Any, digits: Any) -> None:
    import array_api_compat.numpy as xp

    rng = np.random.default_rng(0)
    data, labels = digits.data[:200], digits.labels[:200]
    problem = demo.Problem(xp, data, (labels[:, None] == np.arange(10)).astype(float), 7, 0.7)
    embedding, direction = rng.normal(size=(2, 64, 2))
    queries = rng.choice(200, 20, replace=False)
    _, gradient = demo.by_hand(problem, embedding, queries)
    ahead, behind = (demo.objective(problem, embedding + step * direction, queries) for step in (1e-6, -1e-6))
    assert np.sum(gradient * direction) == pytest.approx((ahead - behind) / 2e-6, rel=1e-7)


def test_it_learns(demo: Any, digits: Any) -> None:
    start = demo.accuracy(digits, demo.principal_axes(digits.data), 10)
    embedding, losses = demo.train("numpy", digits.data, digits.labels, steps=60)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    assert demo.accuracy(digits, embedding, 10) > start + 0.04


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_every_backend_learns_the_same(demo: Any, digits: Any, backend: str) -> None:
    data, labels = digits.data[:300], digits.labels[:300]
    expected, losses = demo.train("numpy", data, labels, steps=10)
    embedding, found = demo.train(backend, data, labels, steps=10)
    np.testing.assert_allclose(found, losses, rtol=1e-12)
    np.testing.assert_allclose(embedding, expected, rtol=0, atol=1e-10)


def test_it_prints_a_table_and_draws_a_picture(demo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "digits.png"
    assert demo.main(["--steps", "3", "--splits", "1", "--epsilon", "1", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    for method in ("PCA", "NCA (scikit-learn)", "softk.topk"):
        assert method in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["--k", "0"], ["--epsilon", "-1"], ["--steps", "0"]])
def test_bad_options_are_named(demo: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert f"{arguments[0]} must be" in capsys.readouterr().err
