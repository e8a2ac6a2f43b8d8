"""The demo, shortened: it learns, every backend learns the same, and it draws its picture."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "docs"))  # the demo imports its neighbor
    spec = importlib.util.spec_from_file_location("demo", ROOT / "docs" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "docs"))


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


def test_it_prints_tables_and_its_code_and_draws_pictures(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.router, "STEPS", 3)
    options = ["--steps", "3", "--splits", "1", "--seeds", "1", "--epsilon", "1", "--output", str(tmp_path)]
    assert demo.main(options) == 0
    printed, said = capsys.readouterr()
    for text in ("PCA", "NCA (scikit-learn)", "softk.topk", "straight-through"):
        assert text in printed
    learning = re.findall("(?<=learning:\n\n)(?:    .*\n)+", printed)
    assert [code.count("\n") for code in learning] == [3, 3]
    assert all("softk.vjp(softk.topk" in code for code in learning)
    for name in ("digits.png", "router.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "NCA with unit 1" in said  # without a terminal, too


def test_git_does_not_see_the_pictures(demo: Any) -> None:
    ignored = (ROOT / ".gitignore").read_text().split()
    assert f"{demo.parse([]).output.relative_to(ROOT)}/" in ignored


def test_the_progress_is_said_every_few_seconds(
    demo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(demo.time, "perf_counter", lambda: now)
    progress = demo.Progress(10)
    progress.begin("training")
    for second in range(1, 10):
        now = float(second)
        progress.advance(1, f"loss {second}")
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in said] == ["0", "40", "80"]
    assert said[-1] == "   80 %  training, loss 8"


def test_the_gradients_of_the_routers_are_right(demo: Any) -> None:
    rng = np.random.default_rng(0)
    scores, cotangent, direction = rng.normal(size=(3, 5, 8))
    for name, setting in (("softk.topk", 2.0), ("softmax over the chosen", 0.0)):
        function = demo.router.ROUTERS[name]
        ahead, behind = (function(scores + step * direction, setting, 0.5)[0] for step in (1e-6, -1e-6))
        gradient = function(scores, setting, 0.5)[1](cotangent)
        expected = np.sum(cotangent * (ahead - behind)) / 2e-6
        assert np.sum(gradient * direction) == pytest.approx(expected, rel=1e-6)


def test_the_soft_router_learns_what_the_others_do_not(demo: Any) -> None:
    curves = demo.router.compare(1, demo.router.STEPS, lambda what: None)
    last = {name: losses[0, -1] for name, (_, losses) in curves.items()}
    assert last["softk.topk"] < 0.05
    assert min(last["softmax over the chosen"], last["straight-through"]) > 0.1


@pytest.mark.parametrize("arguments", [["--k", "0"], ["--epsilon", "-1"], ["--steps", "0"]])
def test_bad_options_are_named(demo: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert f"{arguments[0]} must be" in capsys.readouterr().err
