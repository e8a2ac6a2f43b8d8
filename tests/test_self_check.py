"""``python -m softk``: a row for every library that is installed, and an exit status that tells."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

import softk
from softk import __main__ as self_check
from softk.backend import ADAPTERS, Adapter


def test_every_installed_library_passes() -> None:
    # XLA compiles as for users, whatever the suite tells it.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-W", "error", "-m", "softk"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"softk {softk.__version__}")
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    for name in ("numpy", "torch", "jax", "dask", "autograd"):
        assert rows[name].endswith("passed")
    refused = r"triton +torch +cpu +topk_mask +no: the scores must be on a CUDA device, got cpu"
    assert re.search(refused, done.stdout), "the kernels, and why they do not serve"
    assert re.search(r"numba +numpy +cpu +topk_mask +(yes|no: Numba is not installed .*)", done.stdout)
    assert done.stdout.count("Compiled kernels are") == (importlib.util.find_spec("numba") is not None)


def test_without_a_library_it_says_what_to_install() -> None:
    """A fresh interpreter in which no array library can be imported."""
    absent = f"import runpy, sys; sys.modules.update(dict.fromkeys({sorted(ADAPTERS)}))"
    code = f"{absent}; runpy.run_module('softk', run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr == ""
    assert "python -m pip install numpy" in done.stdout
    assert "torch, jax, cupy, dask, autograd" in done.stdout
    assert "self-check" not in done.stdout, "a table without a row"


def test_a_wrong_result_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(self_check, "_names", lambda: iter(["numpy"]))
    reference = self_check._reference()
    assert reference is not None
    monkeypatch.setattr(self_check, "_reference", lambda: [1.001 * value for value in reference])
    assert self_check.main() == 1
    assert "failed" in capsys.readouterr().out


def test_a_broken_installation_is_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise ImportError("libsomething.so.1 is missing")

    monkeypatch.setattr(self_check, "_names", lambda: iter(["torch", "numpy"]))
    monkeypatch.setitem(ADAPTERS, "torch", Adapter(broken))
    assert self_check.main() == 1
    printed = capsys.readouterr().out
    assert "libsomething.so.1 is missing" in printed
    assert "passed" in printed
