"""Run a worker in its own process, and collect its records and the reason if it failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread, Timer
from typing import Any, NamedTuple

from .machine import ROOT

GRACE = 45.0
"""Seconds after the time limit for a process to stop by itself, before it is killed."""


class Finished(NamedTuple):
    """The results of a finished worker."""

    records: list[dict[str, Any]]
    code: int
    reason: str  # the most informative line of its error output; empty if it succeeded


def run(
    module: str,
    arguments: Sequence[str],
    seconds: float,
    watch: Callable[[str], None] = lambda case: None,
    variables: Mapping[str, str] | None = None,
) -> Finished:
    """Run a module that writes one record per line to `--output` and prints `case<tab>label` before each case."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "records.jsonl"
        with subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--seconds", str(seconds), "--output", str(output)],
            cwd=ROOT,
            env={**os.environ, **(variables or {})},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            last: deque[str] = deque(maxlen=40)
            reader = Thread(target=last.extend, args=(process.stderr,), daemon=True)
            reader.start()
            guard = Timer(seconds + GRACE, process.kill)
            guard.start()
            for line in process.stdout:
                if line.startswith("case\t"):
                    watch(line.split("\t")[1].strip())
            code = process.wait()
            guard.cancel()
            reader.join()
        lines = output.read_text().splitlines() if output.exists() else []
    reason = f"its process ended with {code}: {telling(''.join(last)) or 'no message'}" if code else ""
    return Finished([json.loads(line) for line in lines], code, reason)


def short(error: Exception) -> str:
    """Shorten an error message, which may be pages long, to one line."""
    return f"{type(error).__name__}: {telling(str(error), last=False)}"[:200]


def telling(text: str, *, last: bool = True) -> str:
    """The most informative line: the last one that names an error, else the last or the first line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return (errors or (lines if last else lines[:1]) or [""])[-1][:200]
