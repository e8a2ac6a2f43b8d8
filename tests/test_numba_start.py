"""Without Numba, or with one that does not start, everything is computed by array operations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernels

PROGRAM = """
import warnings
import numpy as np
import softk
x = np.asarray([[0.2, 1.7, -0.5, 0.9]])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        print(round(float(softk.topk(x, 2, epsilon=0.5)[0, 1]), 3))
for warning in caught:
    print(warning.category.__name__, warning.message)
import softk_numba
print(softk_numba._absent())
print(softk_numba._note())
"""


def run(extra: Path | None = None, prelude: str = "", **variables: str) -> list[str]:
    path = os.pathsep.join([*([str(extra)] if extra else []), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", prelude + PROGRAM],
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:3] == ["0.99"] * 3
    return lines[3:]


def test_without_numba() -> None:
    hidden = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n: f(n) if n != 'numba' else None"
    assert run(prelude=hidden) == ["Numba is not installed (python -m pip install numba)", "None"]


def test_a_numba_that_does_not_start_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.3 or less')")
    reason = "Numba does not start: ImportError: Numba needs NumPy 2.3 or less"
    warning = f"RuntimeWarning softk computes by array operations, which are slower. {reason}"
    assert run(tmp_path) == [warning, reason, "None"]


def test_with_compilation_switched_off() -> None:
    pytest.importorskip("numba", reason="Numba is not installed")
    assert run(NUMBA_DISABLE_JIT="1") == ["NUMBA_DISABLE_JIT is set", "None"]
