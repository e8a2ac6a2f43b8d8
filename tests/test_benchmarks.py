"""The benchmarks' NumPy part on tiny shapes: that it measures, reports, and would notice a wrong answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import plots, report, sorting_numpy, timing, truth, truth_sorted
from benchmarks.__main__ import merged
from benchmarks.candidates import OPERATORS, PEERS, SETTLED, Candidate, Prepared
from benchmarks.candidates_numpy import candidates
from benchmarks.cases import SORTED, Case, plan, quick_plan
from benchmarks.worker import measure, memory_records
from softk.testing import Oracle

from .plan_oracles import Ladder

ROOT = Path(__file__).parent.parent


def _wrong(case: Case, x: np.ndarray, u: np.ndarray) -> Prepared:
    """k times a softmax: it sums to k and is not the operator."""

    def both() -> tuple[np.ndarray, np.ndarray]:
        share = np.exp(x - x.max(axis=-1, keepdims=True))
        share /= share.sum(axis=-1, keepdims=True)
        return case.k * share, case.k * share * (u - (u * share).sum(axis=-1, keepdims=True))

    return Prepared(lambda: both()[0], both, np.asarray)


def _sorts(case: Case, x: np.ndarray, u: np.ndarray) -> Prepared:
    """The first scores in descending order, which no operator returns for a soft epsilon."""

    def both() -> tuple[np.ndarray, np.ndarray]:
        return -np.sort(-x, axis=-1)[:, : x.shape[-1] if case.operator == "rank" else case.k], u

    return Prepared(lambda: both()[0], both, np.asarray)


def _raises(case: Case, x: np.ndarray, u: np.ndarray) -> Prepared:
    raise RuntimeError("no such thing")


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    everyone = [
        *candidates("cpu"),
        *sorting_numpy.candidates("cpu"),
        Candidate("sorts", "NumPy", "soft", _sorts, operators=OPERATORS[1:]),
        Candidate("relaxed", "NumPy", "relaxation", _sorts, operators=OPERATORS[1:]),
        Candidate("wrong", "NumPy", "soft", _wrong),
        Candidate("raises", "NumPy", "soft", _raises),
        Candidate("greedy", "NumPy", "other", _wrong, power=2, arrays=1e12),
    ]
    found = list(measure(quick_plan("all"), everyone, timing.Plan(rounds=2, sample=1e-5, budget=0.001)))
    return [*found, *memory_records(candidates("cpu"), Case("memory", 1, 2000, 20))]


@pytest.fixture(scope="module")
def result(records: list[dict[str, Any]]) -> dict[str, Any]:
    environment = {
        "date": "2000-01-01",
        "processor": "an abacus",
        "cores": 10,
        "memory_gib": 0.5,
        "system": "wood",
        "device": "cpu",
        "load": "0.0",
        "versions": {"numpy": np.__version__},
        "minutes": 1.0,
        "others": 0.5,
    }
    peers = {peer.distribution: {"status": "absent: a test", "computes": peer.computes} for peer in PEERS}
    return {"environment": environment, "quick": True, "records": records, "peers": peers, "import_seconds": 0.01}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.001])
def test_the_truth_is_true(epsilon: float, dtype: str) -> None:
    case = Case("shapes", 2, 50, 5, epsilon, dtype)
    x, u = case.scores(), case.cotangent()
    found = truth.solve(x, u, case.k, epsilon)
    for row in range(2):
        reference = Oracle(x[row], case.k, float(np.dtype(dtype).type(epsilon)))
        gradient = reference.vjp(u[row])["x"]
        digits = 1e-11 if dtype == "float32" else 1e-14
        assert np.max(np.abs(found.mask[row] - reference.mask)) <= digits
        assert np.max(np.abs(found.gradient[row] - gradient)) <= 100 * digits * np.max(np.abs(gradient))


def test_every_candidate_is_timed_with_its_errors(records: list[dict[str, Any]]) -> None:
    ours = [record for record in records if record.get("candidate") == "softk.topk" and record["group"] != "memory"]
    assert len(ours) == len(quick_plan("all")) - 3
    assert [record["rows"] for record in ours if record["joint"]] == [4]
    for record in ours:
        assert record["status"] == "measured"
        assert record["both"]["median"] > 0.0
        assert record["both"]["q1"] <= record["both"]["median"] <= record["both"]["q3"]
        assert record["both"]["over_softmax"] > 0.0
        eps = float(np.finfo(record["dtype"]).eps)
        assert record["errors"]["mass"] <= 16 * eps
        assert record["errors"]["mask"] <= 32 * eps
        assert record["errors"]["gradient"] <= 1e3 * eps


def test_a_wrong_candidate_is_found_out(records: list[dict[str, Any]]) -> None:
    wrong = [record for record in records if record.get("candidate") == "wrong"]
    assert len(wrong) == len(quick_plan("all")) - 3
    for record in wrong:
        assert record["errors"]["mass"] <= 1e-6
        assert record["errors"]["mask"] >= 0.1
        assert record["errors"]["gradient"] >= 0.1


@pytest.mark.parametrize("operator", OPERATORS[1:])
@pytest.mark.parametrize("k", [5, 12])
def test_the_truth_of_sorted_scores_is_true(operator: Any, k: int) -> None:
    """Against the same transport in an arithmetic of 50 digits."""
    case = Case("sorted", 2, 12, k, 0.3, operator=operator)
    x, u = case.scores(), case.cotangent()
    found = truth_sorted.solve(case, x, u)
    epsilon = float(np.float32(0.3))
    for row in range(2):
        scores, cotangent = x[row].astype(float), u[row].astype(float)
        if operator == "sorted_topk":
            oracle = Ladder(scores, k, epsilon)
            wanted, gradient = oracle.values, oracle.vjp(values=cotangent[:k])["x"]
            hard = np.sort(scores)[::-1][:k]
        elif operator == "sort":
            oracle = Ladder(scores, k, epsilon, unit=12 / k, largest=False)
            wanted, gradient = oracle.values, oracle.vjp(values=cotangent[:k])["x"]
            hard = Ladder(scores, k, 1e-4, unit=12 / k, largest=False).values
        else:
            oracle = Ladder(scores, k, epsilon, unit=12 / k, largest=False)
            wanted, gradient = oracle.ranks, oracle.vjp(ranks=cotangent)["x"]
            hard = np.argsort(np.argsort(scores))
        assert np.max(np.abs(found.values[row] - wanted)) <= 1e-12
        assert np.max(np.abs(found.gradient[row] - gradient)) <= 1e-11 * np.max(np.abs(gradient))
        assert np.max(np.abs(found.hard[row] - hard)) <= 1e-8


def test_long_slices_are_solved_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer anchors than there are in all, and the same result."""
    case = Case("sorted", 1, 300, 60, 0.1, operator="rank")
    whole = truth_sorted.solve(case, case.scores(), case.cotangent())
    monkeypatch.setattr(truth_sorted, "CHUNK", 7)
    chunks = truth_sorted.Plan(-np.sort(-case.scores()[0].astype(float)), np.full(60, 5.0), 0.01).chunks()
    assert max(chunk.share.shape[1] for chunk in chunks) < 60
    found = truth_sorted.solve(case, case.scores(), case.cotangent())
    assert np.max(np.abs(found.values - whole.values)) <= 1e-10
    assert np.max(np.abs(found.gradient - whole.gradient)) <= 1e-10 * np.max(np.abs(whole.gradient))


def test_sorting_is_timed_with_its_errors(records: list[dict[str, Any]]) -> None:
    ordered = [record for record in records if record["group"] == "sorted"]
    for operator in OPERATORS[1:]:
        own = {record["candidate"]: record for record in ordered if record["operator"] == operator}
        # Sinkhorn's algorithm settles where its factors change by rounding only, before it has the solution.
        for name, bound in ((f"softk.{operator}", 2e-6), (SETTLED, 3e-4)):
            assert own[name]["errors"]["values"] <= bound
            assert own[name]["errors"]["gradient"] <= bound
            assert own[name]["both"]["over_softmax"] > 0.0
        assert own["sorts"]["errors"]["values"] > 1e-2
        assert own["sorts"]["errors"]["gradient"] > 1e-2
        assert own["relaxed"]["errors"] == {**own["sorts"]["errors"], "values": None, "gradient": None}
        assert own["softmax (SciPy)"]["errors"] is None
    assert {record["kind"] for record in ordered} == {"soft", "relaxation", "other"}


def test_what_cannot_be_measured_has_a_reason(records: list[dict[str, Any]]) -> None:
    raised = [record for record in records if record.get("candidate") == "raises"]
    assert {(record["status"], record["reason"]) for record in raised} == {("failed", "RuntimeError: no such thing")}
    greedy = [record for record in records if record.get("candidate") == "greedy"]
    assert all(record["status"] == "skipped" and "GiB" in record["reason"] for record in greedy)


def test_after_the_deadline_nothing_begins() -> None:
    cases = quick_plan("all")
    found = list(measure(cases, candidates("cpu"), timing.QUICK, deadline=0.0))
    assert len(found) == len(cases)
    assert {record["status"] for record in found} == {"skipped"}


def test_page(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"# before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_page(path, result)
    text = path.read_text()
    assert text.startswith("# before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    for shown in (
        "softk.topk",
        "200 Sinkhorn iterations",
        "(4, 64) k=8",
        "(4, 16) k=8 over both axes",
        "sorted_topk of (5, 20) k=4, all threads",
        "### sort of (5, 20), all threads",
        "rank of (5, 20), all threads",
        "softk.rank",
        "no such thing",
        "an abacus",
        "2000-01-01",
        "are unreliable",
    ):
        assert shown in text
    for peer in PEERS:
        assert f"| {peer.distribution} " in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) > 20
    report.write_page(path, result)
    assert path.read_text() == text


def test_a_run_of_some_frameworks_keeps_the_others(result: dict[str, Any]) -> None:
    other = {"framework": "JAX jit", "candidate": "softk.topk"}
    stored = {**result, "environment": {**result["environment"], "date": "1999-12-31"}, "records": [other]}
    found = merged(result, stored, ["numpy"])
    assert [record for record in found["records"] if record["framework"] == "JAX jit"] == [other]
    assert {record["framework"] for record in found["records"]} == {"NumPy", "JAX jit"}
    assert found["earlier"]["JAX jit"]["date"] == "1999-12-31"
    assert "JAX jit was measured in an earlier run: 1999-12-31: an abacus" in report.page(
        {**result, **found, "records": []}
    )
    again = merged({**result, "records": []}, found, ["numpy", "torch"])
    assert again["earlier"]["JAX jit"]["date"] == "1999-12-31"
    assert again["records"] == [other]


def test_json(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    report.write_json(path, {**result, "nan": [float("nan")]})
    loaded = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert loaded["nan"] == [None]
    assert len(loaded["records"]) == len(result["records"])
    assert {record["group"] for record in loaded["records"]} == {
        "shapes",
        "sorted",
        "epsilon",
        "lengths",
        "memory",
    }


def test_pictures(result: dict[str, Any], tmp_path: Path) -> None:
    plots.draw_lengths(result["records"], tmp_path / "n.png")
    plots.draw_epsilons(result["records"], tmp_path / "epsilon.png")
    assert (tmp_path / "n.png").stat().st_size > 10_000
    assert (tmp_path / "epsilon.png").stat().st_size > 10_000


def test_the_full_run_measures_what_it_should() -> None:
    cases = plan("all")
    shapes = {(case.rows, case.n, case.k) for case in cases if case.group == "shapes"}
    assert {(128, 1000, 10), (8, 20_000, 100), (1, 10**6, 1000), (4096, 64, 8), (128, 1000, 500)} <= shapes
    assert {case.epsilon for case in cases if case.group == "epsilon"} >= {1.0, 0.1, 0.01, 0.001}
    assert max(case.n for case in cases if case.group == "lengths") == 10**7
    for threads in ("one", "all"):
        ordered = [case for case in plan(threads) if case.group == "sorted"]
        assert [(case.operator, case.rows, case.n, case.k) for case in ordered] == list(SORTED)
        assert [(case.rows, case.n, case.k, case.axis) for case in plan(threads) if case.joint] == [
            (4096, 16_384, 131_072, (0, 1))
        ]
        assert {case.dtype for case in plan(threads)} == {"float32", "float64"}


def test_the_page_has_its_markers() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert text.count(report.BEGIN) == 1
    assert text.count(report.END) == 1


def test_long_tables_are_folded() -> None:
    short, long = ("".join(f"| {i} |\n" for i in range(rows + 2)) for rows in (report.UNFOLDED, report.UNFOLDED + 1))
    text = report.folded(f"before\n\n{short}\nbetween\n\n{long}\nafter\n")
    assert text.startswith(
        f"before\n\n{short}\nbetween\n\n<details>\n<summary>Table, {report.UNFOLDED + 1} rows</summary>\n"
    )
    assert text.endswith(f"</summary>\n\n{long}\n</details>\n\nafter\n")


def test_large_counts_passes_and_checks_the_mass(tmp_path: Path) -> None:
    pytest.importorskip("dask.array", reason="dask is not installed")
    from benchmarks import large

    path = tmp_path / "scores"
    large.write(path, 50_000)
    x = np.fromfile(path, "float32")
    assert x.size == 50_000
    found = {name: large.measure(name, path, 8192, 500, 0.1) for name in large.CANDIDATES}
    assert {name: record["passes"] for name, record in found.items()} == dict(
        zip(large.CANDIDATES, (1, 1, 3), strict=True)
    )
    assert found["sum"]["value"] == pytest.approx(x.sum(dtype="float64"))
    assert found["dask.array.topk"]["value"] == np.sort(x)[-500]
    assert found["softk.topk"]["value"] == pytest.approx(500, rel=2e-6)
    assert all(record["gib"] > 0.0 and record["seconds"] > 0.0 for record in found.values())


def test_large_as_a_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("dask.array", reason="dask is not installed")
    from benchmarks import large

    assert (
        large.main(["--scores", "3e4", "--chunk", "1e4", "--folder", str(tmp_path), "--candidates", "softk.topk"]) == 0
    )
    assert "3 passes" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
