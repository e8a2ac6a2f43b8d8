"""The tables of Newton against Sinkhorn show what the solvers do; the times of first calls are printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import assignment, compilation, convergence


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


def test_table_of_assignments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assignment, "CASES", [(4, 0.3), (4, 0.001)])
    monkeypatch.setattr(assignment, "LIMIT", 20)
    page = tmp_path / "assign.md"
    page.write_text("before\n" + "old\n".join(assignment.MARKS) + "\nafter\n")
    monkeypatch.setattr("sys.argv", ["assignment", "--items", "40", "--page", str(page)])
    assignment.main()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert capsys.readouterr().out.strip() in text
    assert "old" not in text
    easy, hard = ([float(cell) for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("| 4 "))
    assert easy[:2] == [4.0, 0.3]
    assert max(easy[4], easy[7], hard[4]) <= 1e-7
    assert hard[5] == 20
    assert hard[7] > 1e-3


def test_times_of_first_calls(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["compilation"])
    monkeypatch.setattr(compilation, "alone", lambda kind, name: float(len(kind)))
    compilation.main()
    printed = capsys.readouterr().out
    for name in (*compilation.PROGRAMS, *compilation.KERNELS):
        assert f" {name} " in printed
    monkeypatch.setattr("sys.argv", ["compilation", "--kernel", "topk"])
    compilation.main()
    assert float(capsys.readouterr().out) > 0.0
