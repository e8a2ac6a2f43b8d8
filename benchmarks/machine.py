"""The environment of a measurement: processor, versions, commit. It imports no framework."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import softk

ROOT = Path(__file__).parent.parent


def versions(names: Iterable[str]) -> dict[str, str]:
    """The versions of Python, of softk with its commit, and of the installed distributions among `names`."""
    here = commit()
    own = {"Python": platform.python_version(), "softk": softk.__version__ + (f" ({here})" if here else "")}
    return own | installed(names)


def installed(names: Iterable[str]) -> dict[str, str]:
    """The versions of the installed distributions among `names`."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The short hash of the checked-out commit, or None without git."""
    if not shutil.which("git"):
        return None
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def processor() -> str:
    """The model name of the processor, if the system provides it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
