"""What the experiments report, and how: means with their errors, tables in Markdown, and what was measured on."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import softk

Record = dict[str, Any]


def mean_and_error(values: Iterable[float], digits: int = 1, sign: str = "") -> str:
    """In per cent; the error is that of the mean, and needs two values."""
    found = 100.0 * np.asarray(list(values))
    mean = round(found.mean(), digits)
    mean = f"{mean:{sign}.{digits}f}" if mean else f"{0:.{digits}f}"  # neither sign before a zero
    return mean if found.size < 2 else f"{mean} ± {found.std(ddof=1) / math.sqrt(found.size):.{digits}f}"


def table(header: list[str], rows: Iterable[list[str]], text: int = 1) -> str:
    """A table in Markdown, the first `text` columns of it words."""
    rules = ["---"] * text + ["--:"] * (len(header) - text)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rules, *rows))


def write(page: Path, parts: dict[str, str]) -> None:
    """Put each part between the markers of its name, and leave the rest of the page as it is."""
    text = page.read_text()
    for name, part in parts.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{part}\n\n{end}{rest.split(end)[1]}"
    page.write_text(text)


def between(page: Path, name: str) -> str:
    """What stands between the markers of a name."""
    return page.read_text().split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0].strip()


def save(path: Path, content: Any) -> None:
    """JSON, whole or not at all: an interruption leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".new")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def command(argv: list[str] | None, about: str | None, quick: str) -> tuple[bool, Path]:
    """What was asked for on the command line: whether in short, and the folder of the documentation."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1], help="where to write (default: docs)")
    options = parser.parse_args(argv)
    return options.quick, options.docs


def unfinished(docs: Path, name: str) -> Path:
    """Where the numbers of an experiment stand until all are there."""
    return docs / "experiments" / f"{name}.part.json"


def publish(docs: Path, name: str, page: str, shown: dict[str, str], draw: Callable[[Path], None]) -> None:
    """Write the parts of the page, draw the pictures into the folder that `draw` is given, and keep the numbers."""
    write(docs / page, shown)
    pictures = docs / "_static"
    pictures.mkdir(exist_ok=True)
    draw(pictures)
    part = unfinished(docs, name)
    os.replace(part, part.with_name(f"{name}.json"))
    print("\n\n".join(shown.values()))


def versions(*packages: str) -> dict[str, str]:
    """Of Python, of the packages and of softk."""
    found = {package: metadata.version(package) for package in packages}
    return {"Python": platform.python_version(), **found, "softk": softk.__version__}


def environment(*packages: str) -> Record:
    """When and on what a measurement begins."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": versions(*packages),
    }


def described(environment: Record, seconds: float, what: str) -> str:
    """The environment of a measurement as a sentence, with the seconds that `what` took in it."""
    with_versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        f"Measured on {environment['date']} with one thread: {environment['processor']}, {environment['cores']} cores, "
        f"{environment['machine']}; {with_versions}. {what} took {seconds / 60.0:.0f} minutes."
    )


def _processor() -> str:
    """The model's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
