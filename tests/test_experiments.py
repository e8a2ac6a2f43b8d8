"""The experiment with nearest neighbors, shortened: it runs, goes on, and writes what the page shows."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture
def knn(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(DOCS / "experiments"))
    return importlib.import_module("knn")


def test_nearest_neighbors(tmp_path: Path) -> None:
    (tmp_path / "knn.md").write_text((DOCS / "knn.md").read_text())
    command = [sys.executable, str(DOCS / "experiments" / "knn.py"), "--quick", "--docs", str(tmp_path)]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "experiments").iterdir()] == ["knn.json"]
    records = json.loads((tmp_path / "experiments" / "knn.json").read_text())
    assert records["seconds"] > sum(record["seconds"] for record in records["linear"])
    assert records["environment"]["versions"]["softk"]
    assert {record["method"] for record in records["linear"]} == {"raw", "PCA", "NCA", "softk"}
    assert [(record["loss"], record["reading"]) for record in records["network"]] == [
        ("cross-entropy", "argmax"),
        ("cross-entropy", "neighbors"),
        ("softk", "neighbors"),
    ]
    assert all(0.3 < record["accuracy"] <= 1.0 for record in records["linear"])
    page = (tmp_path / "knn.md").read_text()
    assert "| iris | 2 |" in page
    assert "| digits |" not in page
    for name in ("knn_linear", "knn_network"):
        assert (tmp_path / "_static" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def numbers(result: Any) -> Any:
    """All but the times."""
    kinds = ("linear", "network")
    return [{key: value for key, value in r.items() if key != "seconds"} for kind in kinds for r in result[kind]]


def test_an_interrupted_run_goes_on(knn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same numbers, nothing measured twice, and the stored numbers untouched until the end."""
    monkeypatch.setattr(knn.torch, "set_num_threads", lambda threads: None)
    (tmp_path / "knn.md").write_text((DOCS / "knn.md").read_text())
    store, part = (tmp_path / "experiments" / name for name in ("knn.json", "knn.part.json"))
    arguments = ["--quick", "--docs", str(tmp_path)]
    knn.main(arguments)
    whole = store.read_text()

    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(knn.network, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            knn.main(arguments)
    assert store.read_text() == whole
    before = json.loads(part.read_text())
    assert before["linear"]
    assert not before["network"]
    with monkeypatch.context() as patch:
        patch.setattr(knn.linear, "measure", interrupted)
        knn.main(arguments)
    assert not part.exists()
    after = json.loads(store.read_text())
    assert numbers(after) == numbers(json.loads(whole))
    assert after["linear"] == before["linear"]
    assert after["seconds"] > before["seconds"] > 0.0
    assert after["environment"] == before["environment"]

    # What was measured with other settings is not gone on from.
    before["settings"]["temperatures"] = [1.0]
    part.write_text(json.dumps(before))
    with monkeypatch.context() as patch:
        patch.setattr(knn.linear, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            knn.main(arguments)


def test_the_page_shows_the_numbers_that_are_stored(knn: Any) -> None:
    result = json.loads((DOCS / "experiments" / "knn.json").read_text())
    assert min(len(of[method]) for of in knn.groups(result["linear"]).values() for method in of) >= 5
    assert not result["settings"]["quick"]
    for name, part in knn.parts(result).items():
        assert knn.report.between(DOCS / "knn.md", name) == part
