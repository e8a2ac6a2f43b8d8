"""The experiment with pruning, shortened: it runs, goes on, and its networks have as many weights as they say."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

DOCS = Path(__file__).parent.parent / "docs"
SPARSE = ("random", "magnitude", "Top-KAST", "learned")


@pytest.fixture(scope="module")
def experiment() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS / "experiments"))
        return importlib.import_module("prune")


@pytest.fixture
def docs(experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command writes: a folder with a copy of the page."""
    monkeypatch.setattr(experiment.torch, "set_num_threads", lambda threads: None)
    (tmp_path / "pruning.md").write_text((DOCS / "pruning.md").read_text())
    return tmp_path


def network_of(experiment: Any, name: str) -> Any:
    torch.manual_seed(0)
    return experiment.Network(experiment.DATA[name])


def test_the_command(experiment: Any, docs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It tries as many settings of each method, runs all of them with all seeds, and writes what the page shows."""
    assert experiment.main(["--quick", "--docs", str(docs)]) == 0
    assert [path.name for path in (docs / "experiments").iterdir()] == ["prune.json"]
    result = json.loads((docs / "experiments" / "prune.json").read_text())
    assert result["seconds"] > 0.0
    assert result["environment"]["versions"]["softk"]
    found: dict[str, dict[tuple[str, float], list[Any]]] = {}
    for kind in ("trials", "runs"):
        for record in result[kind]:
            cell = record["method"], record["sparsity"]
            found.setdefault(kind, {}).setdefault(cell, []).append(record)
    assert set(found["runs"]) == {("dense", 0.0), *((title, s) for title in SPARSE for s in (0.9, 0.98))}
    assert set(found["trials"]) == {("dense", 0.0), *((title, 0.98) for title in SPARSE)}
    for cell, runs in found["runs"].items():
        tried = found["trials"][cell if cell[0] == "dense" else (cell[0], 0.98)]
        assert len({(record["rate"], record["other"]) for record in tried}) == len(tried) == 2
        assert {record["seed"] for record in tried} == {100}
        best = max(tried, key=lambda record: (record["accuracy"], -record["loss"]))
        assert [(r["seed"], r["rate"], r["other"]) for r in runs] == [(s, best["rate"], best["other"]) for s in (0, 1)]
    assert min(record["accuracy"] for record in found["runs"]["dense", 0.0]) > 0.3  # it learns in these few steps
    page, shown = (docs / "pruning.md").read_text(), capsys.readouterr().out
    for part in experiment.parts(result).values():
        assert part in page
        assert part in shown
    assert "| digits | 98 % | 334 |" in page
    assert "| MNIST | 98 %" not in page
    assert (docs / "_static" / "pruning.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_goes_on(experiment: Any, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same numbers, nothing trained twice, and the stored numbers untouched until the end."""
    quick = dataclasses.replace(experiment.QUICK, steps={"digits": 4}, sparsities=(0.9,), tuned=(0.9,))
    monkeypatch.setattr(experiment, "QUICK", quick)
    store, part = (docs / "experiments" / name for name in ("prune.json", "prune.part.json"))
    arguments = ["--quick", "--docs", str(docs)]
    experiment.main(arguments)
    whole = store.read_text()
    trained, calls = experiment.trained, []

    def counted(*args: Any) -> Any:
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(args)
        return trained(*args)

    monkeypatch.setattr(experiment, "trained", counted)
    # In the middle of the trials (10), and then of the runs (10), after which there are as many for the times.
    for limit in (3, 14):
        with pytest.raises(KeyboardInterrupt):
            experiment.main(arguments)
        assert store.read_text() == whole
        before = json.loads(part.read_text())
        assert len(before["trials"] + before["runs"]) == limit
    assert len(before["runs"]) == 4
    limit = 30
    experiment.main(arguments)
    assert not part.exists()
    assert len(calls) == 30
    after = json.loads(store.read_text())
    assert all(after[kind] == json.loads(whole)[kind] for kind in ("trials", "runs"))
    assert after["trials"] == before["trials"]
    assert after["seconds"] > before["seconds"] > 0.0
    assert after["environment"] == before["environment"]

    # What was measured with other settings is not gone on from.
    after["settings"]["batch"] = 1
    part.write_text(json.dumps(after))
    with pytest.raises(KeyboardInterrupt):
        experiment.main(arguments)


def test_the_page_shows_the_numbers_that_are_stored(experiment: Any) -> None:
    result = json.loads((DOCS / "experiments" / "prune.json").read_text())
    assert result["settings"] == experiment.FULL.stored()
    for cell in experiment.cells(experiment.FULL, experiment.FULL.sparsities):
        assert [record["seed"] for record in experiment.of(result["runs"], *cell)] == [0, 1, 2, 3, 4]
        assert len(experiment.of(result["trials"], *experiment.tuned_at(cell, experiment.FULL))) == 16
    for name, part in experiment.parts(result).items():
        assert experiment.report.between(DOCS / "pruning.md", name) == part
    for record in result["trials"] + result["runs"]:
        assert sum(record["left"]) == experiment.kept(record["data"], record["sparsity"])


@pytest.mark.parametrize("title", SPARSE)
@pytest.mark.parametrize(("name", "sparsity", "left"), [("digits", 0.8, 3340), ("MNIST", 0.98, 862)])
def test_networks_have_as_many_weights_as_stated(
    experiment: Any, name: str, sparsity: float, left: int, title: str
) -> None:
    """Exactly, with every setting, and the number that is reported is that of the network."""
    assert experiment.kept(name, sparsity) == left
    side = experiment.DATA[name].pixels
    x, y = torch.rand(64, 1, side, side), torch.arange(64) % 10
    images = type(experiment.load("digits"))(x, y, x, y)
    for setting in experiment.trials(title, dataclasses.replace(experiment.FULL, rates=(1e-2,))):
        found = experiment.methods.train(title, setting, left, experiment.DATA[name], images, 0, 6)
        assert sum(found.left) == left
        assert max(found.left) < left
        if title == "random":
            sizes = [value.numel() for value in network_of(experiment, name).prunable().values()]
            assert found.left == [round(size * (1.0 - sparsity)) for size in sizes]


@pytest.mark.parametrize("title", SPARSE)
def test_the_mask_of_the_end(experiment: Any, title: str) -> None:
    """The weights of the result are those that are trained, some of them 0; a fixed mask stays as it is."""
    network = network_of(experiment, "digits")
    kind = experiment.METHODS[title]
    method = kind(dict(network.prunable()), 334, 20, next(iter(kind.others.values())))
    with torch.no_grad():
        for step in range(20):
            method.used(step)
            for value in [*network.parameters(), *method.scores()]:
                value += 0.1 * torch.rand_like(value)
        last = method.used(20)
        for name, value in network.prunable().items():
            assert torch.equal(last[name], torch.where(last[name] != 0.0, value, 0.0))
            value.copy_(torch.rand_like(value))
            for score in method.scores():
                score.copy_(torch.rand_like(score))
        moved = method.used(21)
    same = all(torch.equal(moved[name] != 0.0, last[name] != 0.0) for name in last)
    assert same == (title != "Top-KAST")  # which chooses anew in every step


def test_the_gradual_pruning_is_cubic(experiment: Any) -> None:
    network = network_of(experiment, "digits")
    method = experiment.METHODS["magnitude"](dict(network.prunable()), 334, 400, (0.25, 0.75))
    total, left = 16700, []
    for step in range(401):
        with torch.no_grad():
            used = method.used(step)
        left.append(sum(int(torch.count_nonzero(value)) for value in used.values()))
        if step % 4 == 0:
            part = min(max((step - 100) / 200, 0.0), 1.0)
            assert left[-1] == pytest.approx(334 + (total - 334) * (1.0 - part) ** 3, abs=1.0)
    assert left == sorted(left, reverse=True)
    # What is left at last are the weights of the largest magnitude.
    before, after = (
        torch.cat([value.detach().abs().ravel() for value in tree.values()]) for tree in (network.prunable(), used)
    )
    assert torch.equal(before.topk(334).values, after.topk(334).values)


def test_scores_are_learned_through_the_soft_mask(experiment: Any) -> None:
    """The budget falls to the weights that are kept, and scores have gradients until the mask is hard."""
    network = network_of(experiment, "digits")
    method = experiment.METHODS["learned"](dict(network.prunable()), 334, 40, 0.1)
    budgets = []
    for step in (0, 10, 19, 20):
        used = method.used(step)
        masks = {name: (used[name] / value).detach() for name, value in network.prunable().items()}
        budgets.append(sum(float(mask.sum()) for mask in masks.values()))
        if step != 20:
            loss = sum(value.square().sum() for value in used.values())
            gradients = torch.autograd.grad(loss, method.scores())
            # All weights have the mask 1 at first, whatever their scores.
            assert any(bool((g != 0.0).any()) for g in gradients) == (step > 0)
    assert budgets == pytest.approx([16700 * (334 / 16700) ** part for part in (0.0, 0.5, 0.95, 1.0)], rel=1e-3)
    assert sum(int((mask == 1.0).sum()) for mask in masks.values()) == 334


def test_validation_images_are_training_images(experiment: Any) -> None:
    """The test images choose nothing: none of them is among those of the trials."""
    outer, inner = experiment.load("digits"), experiment.load_to_choose("digits")

    def pixels(*several: Any) -> list[Any]:
        return [tuple(image.ravel().tolist()) for images in several for image in images]

    assert sorted(pixels(inner.x, inner.other_x)) == sorted(pixels(outer.x))
    assert not set(pixels(outer.other_x)) & set(pixels(outer.x))
    assert (len(inner.x), len(inner.other_x), len(outer.other_x)) == (600, 400, 797)
    assert torch.bincount(outer.other_y).min() >= 0.9 * 797 / 10


def test_seeds_share_weights_and_batches(experiment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a seed all methods begin with the same weights, but for their scale, and see the same images in order."""
    seen: dict[str, list[Any]] = {}
    first: dict[str, Any] = {}
    call = experiment.methods.functional_call

    def recorded(network: Any, weights: Any, x: Any) -> Any:
        seen[title].append(x)
        first.setdefault(title, [(value / value.norm()).detach() for value in network.parameters()])
        return call(network, weights, x)

    monkeypatch.setattr(experiment.methods, "functional_call", recorded)
    for title in experiment.METHODS:
        seen[title] = []
        setting = experiment.trials(title, experiment.FULL)[0]
        images = experiment.load("digits")
        experiment.methods.train(title, setting, 334, experiment.DATA["digits"], images, 3, 4)
        assert all(torch.equal(a, b) for a, b in zip(seen[title], seen["dense"], strict=True))
        assert all(torch.allclose(a, b) for a, b in zip(first[title], first["dense"], strict=True))
    assert not torch.equal(seen["dense"][0], seen["dense"][1])


def test_the_best_trial(experiment: Any) -> None:
    """The highest accuracy; the cross-entropy decides between equal ones alone."""
    trials = [{"accuracy": accuracy, "loss": loss} for accuracy, loss in ((0.9, 0.5), (0.8, 0.1), (0.9, 0.4))]
    assert experiment.best(trials) is trials[2]


def test_the_summary_counts_rows_beyond_two_errors(experiment: Any) -> None:
    """On made-up numbers: one row above, one below, one that is neither."""
    sparsities = [0.8, 0.9, 0.95]
    result: Any = {"settings": {"steps": {"digits": 1}, "sparsities": sparsities}, "runs": []}
    for title in ("random", "magnitude", "Top-KAST", "learned"):
        for sparsity, shift in zip(sparsities, (0.02, -0.02, 0.001), strict=True):
            for seed in range(5):
                accuracy = 0.9 + (title != "magnitude") * (shift + 0.005 * math.cos(3.0 * seed))
                result["runs"].append(
                    {"data": "digits", "method": title, "sparsity": sparsity, "seed": seed, "accuracy": accuracy}
                )
    text = experiment.summary(result)
    assert text.count("above 0 in 1 (digits at 80 %), and below in 1 (digits at 90 %).") == 3
