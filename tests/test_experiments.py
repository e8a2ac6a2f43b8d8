"""The experiments of the documentation, shortened: they run and write what the pages show."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_nearest_neighbours(tmp_path: Path) -> None:
    (tmp_path / "knn.md").write_text((DOCS / "knn.md").read_text())
    command = [sys.executable, str(DOCS / "experiments" / "knn.py"), "--quick", "--docs", str(tmp_path)]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "experiments" / "knn.json").read_text())
    assert {record["method"] for record in records["linear"]} == {"raw", "PCA", "NCA", "softk"}
    assert [(record["loss"], record["reading"]) for record in records["network"]] == [
        ("cross-entropy", "argmax"),
        ("cross-entropy", "neighbours"),
        ("softk", "neighbours"),
    ]
    assert all(0.3 < record["accuracy"] <= 1.0 for record in records["linear"])
    page = (tmp_path / "knn.md").read_text()
    assert "| iris | 2 |" in page
    assert "| digits |" not in page
    for name in ("knn_linear", "knn_network"):
        assert (tmp_path / "_static" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_the_numbers_that_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "experiments"))
    knn = importlib.import_module("knn")
    records = json.loads((DOCS / "experiments" / "knn.json").read_text())
    page = (DOCS / "knn.md").read_text()
    assert min(len(of[method]) for of in knn.groups(records["linear"]).values() for method in of) >= 5
    for table in (knn.linear_table(records["linear"]), knn.network_table(records["network"])):
        assert table in page
