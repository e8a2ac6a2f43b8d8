"""Every example in the README, the documentation and the docstrings is executed, and its printed output compared."""

from __future__ import annotations

import doctest
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import BLOCK, PAGES, ROOT

MODULES = [
    "softk._functions.masks",
    "softk._functions.assignment",
    "softk._functions.budget",
    "softk._functions.ordering",
    "softk._functions.segments",
    "softk._functions.selection",
    "softk._functions.sparse",
    "softk._functions.transport",
    "softk._functions.derivatives",
    "softk.backend",
    "softk._native",
    "softk.testing.oracle",
    "softk.testing.cases",
    "softk.testing.backends",
    "softk.testing.kernels",
    "softk.neighbors",
    "softk_sklearn.embedding",
    "softk.attention",
    "softk.beam",
    "softk.losses",
    "softk.sampling",
    "softk.schedules",
    "softk_jax.sharded",
    "softk_torch.distributed",
    "softk_torch.layers",
    "softk_torch.losses",
]

EXAMPLES = [
    pytest.param(match["code"], match["output"], id=f"{page.name}-{i}")
    for page in PAGES
    for i, match in enumerate(BLOCK.finditer(page.read_text()))
]


@pytest.mark.parametrize(("code", "output"), EXAMPLES)
def test_example_prints_what_is_shown(code: str, output: str | None) -> None:
    if "import keras" in code and importlib.util.find_spec("keras") is None:
        pytest.skip("keras is not installed")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert output is not None, "the block shows no output"
    assert done.stdout == output


def test_pages_have_examples() -> None:
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"(?:\]\(|src=\"|srcset=\")(?!https?:)([^)#\"]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} points to {target}, which is not there"
