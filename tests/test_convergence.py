"""The tables of Newton against Sinkhorn show what the solvers do; the times of first calls are printed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import assignment, compilation, convergence


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "EPSILONS", (1.0, 0.01, 0.0003))
    monkeypatch.setattr(convergence, "SEEDS", 2)
    monkeypatch.setattr(convergence, "LIMIT", 400)
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
        ours, newton, short, long = (float(row[i]) for i in (2, 5, 8, 11))
        assert ours <= 1e-12
        assert newton <= 1e-12
        assert float(row[3]) <= 60
        assert ours < long <= max(short, 1e-8)
        assert ("above" in row[12]) == (long > 1e-8)
        ratio = float(row[10]) / float(row[1])
        assert float(row[12].removeprefix(" above")) == pytest.approx(ratio, rel=0.06)
    assert float(rows[-1][8]) > 1e-2
    assert "above" in rows[-1][12]
    faster = sum(float(row[10]) > float(row[1]) for row in rows)
    assert f"at {'every epsilon' if faster == 3 else f'{faster} of 3 values of epsilon'}" in printed
    assert (tmp_path / "_static" / "convergence.png").stat().st_size > 1000


def test_both_forms_of_sinkhorn_s_algorithm_are_the_same(rng: np.random.Generator) -> None:
    """Products of a matrix and vectors, where nothing underflows, or the log domain."""
    x = rng.uniform(size=60)
    for epsilon in (3.0, 0.3):
        one = convergence.multiplied(x, 4, epsilon)
        other = convergence.transported(x, 4, epsilon, "sinkhorn", 3000)
        assert one is not None
        assert one.steps == other.steps
        assert one.error == pytest.approx(other.error, rel=1e-4)
        assert convergence.accurate(x, 4, epsilon) == one
    assert convergence.multiplied(x, 4, 0.01) is None
    assert convergence.accurate(x, 4, 0.01).error <= convergence.ACCURACY


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
