"""The table of Newton against Sinkhorn: what it shows is what the solver does."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import convergence


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "EPSILONS", (1.0, 0.01, 0.0003))
    monkeypatch.setattr(convergence, "SEEDS", 2)
    (tmp_path / "_static").mkdir()
    (tmp_path / "transport.md").write_text("before\n" + "old\n".join(convergence.MARKS) + "\nafter\n")
    monkeypatch.setattr("sys.argv", ["convergence", "--n", "60", "--k", "4", "--docs", str(tmp_path)])
    convergence.main()
    printed = capsys.readouterr().out
    page = (tmp_path / "transport.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert printed.strip() in page
    assert "old" not in page
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [float(row[0]) for row in rows] == [1.0, 0.01, 0.0003]
    for row in rows:
        newton, short, long = (float(row[i]) for i in (3, 6, 9))
        assert float(row[1]) <= 60
        assert newton <= 1e-8
        assert newton <= long <= max(short, 1e-8)
    assert float(rows[-1][6]) > 1e-2
    assert (tmp_path / "_static" / "convergence.png").stat().st_size > 1000
