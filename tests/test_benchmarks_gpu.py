"""The benchmark of a CUDA device on the processor: that it runs the whole way, and that nothing lost is hidden."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softk
from benchmarks import processes, timing
from benchmarks.cases import Case
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import report
from benchmarks.gpu.cases import COMPILED, EPSILONS, HALVES, SHAPES, plan
from benchmarks.gpu.drivers import MOST_SETS, NAMES, Driver, Inputs, rotating
from benchmarks.gpu.worker import OVER, measure
from benchmarks.report import BEGIN, END, folded

CASES = [Case("gpu", 4, 50, 5), Case("gpu", 4, 50, 25), Case("gpu", 2, 200, 2)]
TIMES = timing.Plan(rounds=2, sample=1e-5, budget=0.001)


class LostError(RuntimeError):
    pass


class OnNumPy(Driver):
    """NumPy as a device; `broken` names calls and what they do instead, `lost` that nothing works after an error."""

    def __init__(self, broken: dict[str, Callable[[Case, Inputs], Any]] | None = None, *, lost: bool = False) -> None:
        self.broken, self.lost, self.failed, self.made = broken or {}, lost, False, 0

    def describe(self) -> dict[str, Any]:
        return {"device": "an abacus", "versions": {}}

    def normal(self, rows: int, n: int, dtype: str, seed: int) -> Any:
        self.made += 1
        return np.random.default_rng(seed).normal(size=(rows, n)).astype(dtype)

    def inputs(self, x: Any, u: Any) -> Inputs:
        return Inputs(x, u, np.empty_like(x))

    def calls(self, case: Case) -> dict[str, Callable[[Inputs], Any]]:
        def both(given: Inputs) -> Any:
            mask, pullback = softk.vjp(softk.topk, given.x, case.k, epsilon=case.epsilon)
            return mask, pullback(given.u)["x"]

        def forward(given: Inputs) -> Any:
            return softk.topk(given.x, case.k, epsilon=case.epsilon)

        found = {"copy": lambda given: np.copyto(given.target, given.x), "forward": forward, "both": both}
        found |= {"softmax": lambda given: np.exp(given.x), "hard": lambda given: np.sort(given.x)}
        return {name: self.broken_or(name, case, call) for name, call in found.items()}

    def broken_or(self, name: str, case: Case, call: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
        def instead(given: Inputs) -> Any:
            try:
                return self.broken[name](case, given)
            except Exception:
                self.failed = True
                raise

        return instead if name in self.broken else call

    def clock(self, call: timing.Call, count: int) -> float:
        return timing.host(call, count)

    def mass_error(self, mask: Any, k: int) -> float:
        return float(np.max(np.abs(mask.sum(axis=-1) - k))) / k

    def finite(self, gradient: Any) -> bool:
        return bool(np.isfinite(gradient).all())

    def peak(self, call: Callable[[Inputs], Any], inputs: Inputs) -> float | None:
        return 3.0 * inputs.x.nbytes

    def free(self) -> None:
        if self.lost and self.failed:
            raise LostError("the device answers no more")


def raises(case: Case, given: Inputs) -> Any:
    raise MemoryError("no room for 7 GiB")


def test_everything_is_timed() -> None:
    for record in measure(OnNumPy(), "torch", CASES, TIMES):
        assert record["status"] == "measured"
        assert record["reasons"] == {}
        assert set(record["times"]) == {"copy", "forward", "both", "softmax", "hard"}
        medians = {name: times["median"] for name, times in record["times"].items()}
        assert min(medians.values()) > 0.0
        assert record["of_copy"] > 0.0
        assert record["over_softmax"] > 0.0
        assert record["over_hard"] > 0.0
        assert record["arrays"] == 3.0
        assert record["copied"] == pytest.approx(2 * 4 * record["rows"] * record["n"] / medians["copy"])


@pytest.mark.parametrize("name", ["copy", "forward", "both", "softmax", "hard"])
def test_one_that_fails_is_left_out_with_its_reason(name: str) -> None:
    records = list(measure(OnNumPy({name: raises}), "torch", CASES, TIMES))
    assert len(records) == len(CASES)
    for record in records:
        assert record["reasons"] == {name: "MemoryError: no room for 7 GiB"}
        assert name not in record["times"]
        assert len(record["times"]) == 4
        assert record["status"] == ("failed" if name == "forward" else "measured")


def test_a_wrong_mask_is_no_measurement() -> None:
    broken = {"forward": lambda case, given: 1.02 * softk.topk(given.x, case.k, epsilon=case.epsilon)}
    broken["both"] = lambda case, given: (softk.topk(given.x, case.k), np.full_like(given.x, np.nan))
    for record in measure(OnNumPy(broken), "torch", CASES, TIMES):
        assert record["status"] == "failed"
        assert record["reasons"]["forward"] == "ArithmeticError: the mask's sum is off by 2.0e-02 k"
        assert record["reasons"]["both"] == "ArithmeticError: the derivative is not finite"


def test_a_device_that_is_lost_ends_the_process() -> None:
    broken = {"softmax": lambda case, given: raises(case, given) if case.k == 25 else np.exp(given.x)}
    found = measure(OnNumPy(broken, lost=True), "torch", CASES, TIMES)
    assert next(found)["status"] == "measured"
    with pytest.raises(LostError):
        next(found)


def test_after_the_deadline_nothing_begins() -> None:
    records = list(measure(OnNumPy(), "jax", CASES, TIMES, deadline=0.0))
    assert [record["status"] for record in records] == ["skipped"] * len(CASES)
    assert {record["reasons"]["all"] for record in records} == {OVER}


def test_inputs_are_many_random_and_taken_in_turn() -> None:
    driver = OnNumPy()
    sets = driver.sets(CASES[0])
    assert len(sets) == MOST_SETS
    assert driver.made == 2 * len(sets)
    arrays = [array for given in sets for array in (given.x, given.u)]
    assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(arrays) for b in arrays[:i])
    call = rotating(lambda given: given.x, sets)
    taken = [call() for _ in range(2 * len(sets))]
    assert all(x is given.x for x, given in zip(taken, sets + sets, strict=True))


@pytest.mark.parametrize("case", plan("torch"), ids=lambda case: case.label)
def test_the_sets_exceed_the_cache(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = OnNumPy()
    monkeypatch.setattr(driver, "normal", lambda *shape: np.zeros(1))
    size = 4 if case.dtype == "float32" else 2
    assert 2**28 <= len(driver.sets(case)) * case.size * size <= 2**30


def test_the_plan() -> None:
    for framework in ("torch", "cupy", "jax"):
        cases = plan(framework)
        assert len(set(cases)) == len(cases)
        for rows, n in SHAPES:
            here = [case for case in cases if (case.rows, case.n) == (rows, n)]
            least = max(1, min(n // 100, 10_000))
            assert {case.k for case in here if case.epsilon == 0.1} == {least, n // 2}
            every = framework != "jax" or (rows, n) in COMPILED
            assert {case.epsilon for case in here if case.k == least} == (set(EPSILONS) if every else {0.1})
        dtypes = {case.dtype for case in cases}
        assert dtypes == ({"float32", *HALVES} if framework == "torch" else {"float32"})
        assert plan(framework, dtypes=HALVES) == [case for case in cases if case.dtype in HALVES]


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """A page and a place for results that the command takes for its own."""
    page, results = tmp_path / "docs" / "benchmarks-gpu.md", tmp_path / "results_gpu.json"
    page.parent.mkdir()
    page.write_text(f"# before\n{BEGIN}\nold\n{END}\nafter\n")
    monkeypatch.setattr(command, "PAGE", page)
    monkeypatch.setattr(command, "RESULTS", results)
    monkeypatch.setattr(command, "PICTURE", page.with_name("benchmark_gpu.png"))
    return page, results


def test_a_quick_run_on_the_processor(kept: tuple[Path, Path], tmp_path: Path) -> None:
    frameworks = [name for name in ("torch", "jax") if importlib.util.find_spec(name)]
    if not frameworks:
        pytest.skip("neither torch nor jax is installed")
    page, results = kept
    before = page.read_text()
    arguments = ["--device", "cpu", "--quick", "--frameworks", *frameworks, "cupy", "--output", str(tmp_path / "out")]
    assert command.main(arguments) == 0
    assert page.read_text() == before
    assert not results.exists()
    result = json.loads((tmp_path / "out" / results.name).read_text())
    assert result["quick"]
    assert set(result["absent"]) == {"cupy"}
    assert result["environment"]["device"] == "cpu"
    assert result["environment"]["versions"]["softk"].startswith(softk.__version__)
    planned = [case for name in frameworks for case in plan(name, quick=True)]
    assert len(result["records"]) == len(planned)
    for record, case in zip(result["records"], planned, strict=True):
        assert (record["n"], record["k"], record["epsilon"]) == (case.n, case.k, case.epsilon)
        assert (record["status"], record["reasons"]) == ("measured", {})
        assert min(times["median"] for times in record["times"].values()) > 0.0
        assert ("hard" in record["times"]) == (record["framework"] == "PyTorch")
        assert record["sets"] == MOST_SETS
    text = (tmp_path / "out" / page.name).read_text()
    assert text.startswith("# before\n")
    assert "old" not in text
    assert folded(report.page(result), 0) in text
    for name in frameworks:
        assert f"## {report.NAMES[name]}, float32" in text
    assert "| CuPy |" in text


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ["torch", "cupy", "jax"])
def test_a_quick_run_on_a_device(framework: str, kept: tuple[Path, Path], tmp_path: Path) -> None:
    absent = command.devices([framework], "cuda")[framework].get("absent")
    if absent:
        pytest.skip(absent)
    before = kept[0].read_text()
    assert command.main(["--quick", "--frameworks", framework, "--output", str(tmp_path / "out")]) == 0
    assert kept[0].read_text() == before
    assert not kept[1].exists()
    for record in json.loads((tmp_path / "out" / kept[1].name).read_text())["records"]:
        assert (record["status"], record["reasons"]) == ("measured", {})
        assert min(times["median"] for times in record["times"].values()) > 0.0
        assert record["arrays"] >= 2.0  # the mask and the derivative at least


def test_without_a_device_it_refuses_in_one_line(
    kept: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = kept[0].read_text()
    assert command.main(["--frameworks", "torch", "cupy"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("no CUDA device to measure: PyTorch: ")
    assert captured.err.count("\n") == 1
    assert kept[0].read_text() == before
    assert not kept[1].exists()


def test_the_processor_is_for_quick_runs_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--device", "cpu"])
    assert "--device cpu is for --quick" in capsys.readouterr().err


def test_a_process_that_dies_loses_its_case_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = plan("torch", quick=True)
    begun: list[int] = []

    def run(module: str, arguments: list[str], *rest: Any) -> processes.Finished:
        first = int(arguments[arguments.index("--first") + 1])
        begun.append(first)
        good = [{"status": "measured", "case": i} for i in range(first, len(cases))]
        if first == 0:
            return processes.Finished(good[:2], -6, "its process ended with -6: CUDA error: an illegal memory access")
        return processes.Finished(good, 0, "")

    monkeypatch.setattr(command.processes, "run", run)
    options = command.parse(["--quick", "--device", "cpu"])
    records = command.run_framework("torch", 100.0, options, types.SimpleNamespace())
    assert begun == [0, 3]
    assert len(records) == len(cases)
    assert "illegal memory access" in records[2]["reasons"]["all"]
    assert (records[2]["k"], records[2]["n"]) == (cases[2].k, cases[2].n)
    assert [record["case"] for record in records[3:]] == list(range(3, len(cases)))
    late = command.run_framework("torch", 0.0, options, types.SimpleNamespace())
    assert [record["reasons"] for record in late] == [{"all": OVER}] * len(cases)


def test_what_a_dying_process_says() -> None:
    done = processes.run("benchmarks.gpu.worker", ["torch", "--device", "nowhere"], 60.0)
    assert done.records == []
    assert done.code == 1
    assert done.reason.startswith("its process ended with 1: ")
    assert "Error: " in done.reason


# The page -------------------------------------------------------------------------------------------------------------


def stored(**changes: Any) -> dict[str, Any]:
    """A result with one case on PyTorch and on JAX, one that lost its memory, and one framework that is absent."""
    what = {"rows": 16, "n": 10**6, "k": 10_000, "epsilon": 0.1, "dtype": "float32", "reasons": {}}
    phase = {"q1": 0.001, "median": 0.002, "q3": 0.003, "rounds": 20}
    times = {"copy": phase | {"median": 0.0005}, "forward": phase, "both": phase | {"median": 0.004}}
    measured = {**what, "status": "measured", "of_copy": 0.25, "over_softmax": 4.4, "copied": 2.5e12, "arrays": 6.04}
    torch = {"framework": "PyTorch", "times": {**times, "hard": phase | {"median": 0.01}}, "over_hard": 0.21}
    failed = {**what, "k": 500_000, "framework": "PyTorch", "status": "failed", "reasons": {"all": "no | room"}}
    jax = {"framework": "JAX jit", "times": times, "over_hard": None, "reasons": {"both": "no more"}, "arrays": None}
    environment = {"date": "2000-01-01", "device": "an abacus", "memory": 2**33, "cache": 2**25, "driver": "1.2"}
    environment |= {"processor": "beads", "system": "wood", "versions": {"softk": "0 (abc)"}, "minutes": 1.0}
    records = [measured | torch, failed, measured | jax]
    result = {"environment": environment, "quick": False, "absent": {"cupy": "is not installed"}, "records": records}
    return result | changes


def test_the_table_of_stored_records() -> None:
    text = report.page(stored())
    assert "2000-01-01: an abacus, 8 GiB, 32 MiB of level 2 cache, driver 1.2; beads, wood; softk 0 (abc)." in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    head = ["(16, 10^6) k=10000", "0.1", "2.00 (1.00 - 3.00)", "25 %", "2,500", "4.00 (1.00 - 3.00)", "4.4"]
    assert [*head, "0.21", "6.0"] in rows
    assert [*head, "0.2", "-"] in rows  # over torch.topk of the same run
    assert ["CuPy", "is not installed", "everything"] in rows
    assert ["PyTorch", "no / room", "(16, 10^6) k=500000 epsilon=0.1 float32"] in rows
    assert ["JAX jit: softk, forward + backward", "no more", "(16, 10^6) k=10000 epsilon=0.1 float32"] in rows
    assert (
        text.index("## PyTorch, float32") < text.index("## JAX jit, float32") < text.index("## What was not measured")
    )


def test_redrawn_from_what_is_stored(kept: tuple[Path, Path], tmp_path: Path) -> None:
    page, results = kept
    assert command.main(["--redraw"]) == 0
    assert "No device has been measured yet" in page.read_text()
    given = tmp_path / "given.json"
    given.write_text(json.dumps(stored()))
    assert command.main(["--redraw", str(given), "--output", str(tmp_path / "out")]) == 0
    text = page.read_text()
    assert text == f"# before\n{BEGIN}\n\n{folded(report.page(stored()), 0)}\n{END}\nafter\n"
    assert (tmp_path / "out" / page.name).read_text() == text
    for folder in (page.parent, tmp_path / "out"):
        assert (folder / "benchmark_gpu.png").stat().st_size > 10_000
    for path in (results, tmp_path / "out" / results.name):
        assert json.loads(path.read_text()) == stored()
    assert command.main(["--redraw"]) == 0
    assert page.read_text() == text
    given.write_text(json.dumps(stored(quick=True, absent={})))
    assert command.main(["--redraw", str(given)]) == 0
    assert page.read_text() == text
    assert json.loads(results.read_text()) == stored()


def test_the_page_shows_what_is_stored() -> None:
    text = command.PAGE.read_text()
    assert text.count(BEGIN) == 1
    assert text.count(END) == 1
    result = json.loads(command.RESULTS.read_text()) if command.RESULTS.exists() else None
    assert result is None or not result["quick"]
    measured = text.split(BEGIN)[1].split(END)[0]
    assert measured == f"\n\n{folded(report.page(result), 0)}\n"
    if result is None:
        assert "No device has been measured yet" in measured
        assert f"`{report.COMMAND}`" in measured


# CuPy, which is nowhere without a device ------------------------------------------------------------------------------


def test_the_calls_of_cupy_with_numpy_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("cupy"):
        pytest.skip("cupy itself is here")
    cupy = types.ModuleType("cupy")
    vars(cupy).update({name: getattr(np, name) for name in np.__all__})
    runtime = types.SimpleNamespace(getDeviceCount=lambda: 1)
    vars(cupy)["cuda"] = types.SimpleNamespace(runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    module = importlib.import_module("benchmarks.gpu.on_cupy")
    monkeypatch.delitem(sys.modules, "benchmarks.gpu.on_cupy")
    driver = module.driver("cuda")
    driver.free = lambda: None
    driver.clock = timing.host
    driver.peak = lambda call, given: 0.0
    records = list(measure(driver, "cupy", CASES, TIMES))
    assert [(record["status"], record["reasons"]) for record in records] == [("measured", {})] * len(CASES)
    given = driver.sets(CASES[0])[0]
    share, slope = driver.calls(CASES[0])["softmax"](given)
    assert share.sum(axis=-1) == pytest.approx(1.0)
    step = 1e-3 * given.u
    higher, lower = (driver.calls(CASES[0])["softmax"](given._replace(x=given.x + s))[0] for s in (step, -step))
    found = np.sum((higher - lower) * given.u, axis=-1)
    assert found == pytest.approx(2 * np.sum(slope * step, axis=-1), rel=1e-2, abs=1e-6)


def test_a_run_of_some_frameworks_or_dtypes_keeps_the_results_of_the_others() -> None:
    def run(date: str, *tables: str) -> dict[str, Any]:
        records = [dict(zip(("framework", "dtype"), table.split(", "), strict=True), date=date) for table in tables]
        return {"environment": {"date": date}, "records": records}

    def dates(result: dict[str, Any]) -> dict[str, str]:
        return {report.table_of(record["framework"], record["dtype"]): record["date"] for record in result["records"]}

    every, single = ["float32", "bfloat16"], ["float32"]
    torch, half, cupy, jax = "PyTorch, float32", "PyTorch, bfloat16", "CuPy, float32", "JAX jit, float32"
    first = run("May", torch, half, cupy, jax)
    second = command.with_others(run("June", torch, half, cupy), first, ["torch", "cupy"], every)
    third = command.with_others(run("July", torch), second, ["torch"], single)
    assert dates(third) == {torch: "July", half: "June", cupy: "June", jax: "May"}
    assert third["earlier"] == {half: {"date": "June"}, cupy: {"date": "June"}, jax: {"date": "May"}}
    assert command.with_others(run("June", torch), None, ["torch"], every) == run("June", torch)
    assert command.with_others(run("June"), first, list(NAMES), every) == run("June")
