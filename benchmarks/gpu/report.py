"""The results as Markdown tables, for the terminal and for docs/benchmarks-gpu.md."""

from __future__ import annotations

from typing import Any

from benchmarks.report import NOTHING, Record, factor, of, reasons, shape, spread, table

from .cases import DTYPES
from .drivers import NAMES

COMMAND = "python -m benchmarks.gpu"
NAMED = {
    "copy": "the copy",
    "forward": "softk, forward",
    "both": "softk, forward + backward",
    "softmax": "softmax",
    "hard": "torch.topk",
    "compiled": "compiled softmax",
    "liger": "Liger's softmax",
    "arrays": "softk's memory",
}
HEADER = ["shape", "epsilon", "forward, ms", "of a copy", "copy, GB/s"]
HEADER += ["forward + backward, ms", "over softmax", "over torch.topk", "arrays"]
ANCHORS = ["shape", "softmax, ms", "compiled, ms", "Liger, ms", "softk over compiled", "softk over Liger"]


def page(result: dict[str, Any] | None) -> str:
    """All results, as sections of a page, or a notice that there are none."""
    if result is None:
        return f"No device has been measured yet: `{COMMAND}` measures one, and writes its numbers here.\n"
    records = result["records"]
    parts = ["## Machine", machine(result["environment"])]
    for name, environment in result.get("earlier", {}).items():
        parts.append(f"The table of {name} was measured in an earlier run: {machine(environment)}")
    kinds = dict.fromkeys((record["framework"], record["dtype"]) for record in of(records, status="measured"))
    order = list(NAMES.values())
    for framework, dtype in sorted(kinds, key=lambda kind: (order.index(kind[0]), DTYPES.index(kind[1]))):
        parts += [f"## {table_of(framework, dtype)}", times(records, framework, dtype)]
    if any("compiled" in record.get("times", {}) for record in records):
        parts += ["## Softmaxes, float32, forward + backward", anchors(records)]
    parts += ["## What was not measured", missing(result)]
    return "\n\n".join(parts) + "\n"


def table_of(framework: str, dtype: str) -> str:
    """The title of the table in which a record stands."""
    return f"{framework}, {dtype}"


def machine(environment: dict[str, Any]) -> str:
    """A paragraph about the environment of the measurement."""
    memory, cache = environment.get("memory"), environment.get("cache")
    parts = [environment["device"]]
    parts += [f"{memory / 2**30:.0f} GiB"] if memory else []
    parts += [f"{cache / 2**20:.0f} MiB of level 2 cache"] if cache else []
    parts += [f"driver {environment['driver']}"] if environment["driver"] else []
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        f"{environment['date']}: {', '.join(parts)}; {environment['processor']}, {environment['system']}; {versions}. "
        f"The run took {environment['minutes']:.1f} minutes."
    )


def times(records: list[Record], framework: str, dtype: str) -> str:
    """The table of one framework and dtype, with one row per case, grouped by shape."""
    found = of(records, framework=framework, dtype=dtype, status="measured")
    found.sort(key=lambda record: (record["n"], record["rows"], record["k"], record["epsilon"]))
    rows = []
    for record in found:
        arrays = record.get("arrays")
        rows.append(
            [
                shape(record),
                f"{record['epsilon']:g}",
                spread(record["times"].get("forward")),
                NOTHING if record["of_copy"] is None else f"{100.0 * record['of_copy']:.2g} %",
                NOTHING if record.get("copied") is None else f"{record['copied'] / 1e9:,.0f}",
                spread(record["times"].get("both")),
                *(
                    NOTHING if value is None else factor(value)
                    for value in (record["over_softmax"], hard(record, records))
                ),
                NOTHING if arrays is None else f"{arrays:.1f}",
            ]
        )
    return table(HEADER, rows)


def anchors(records: list[Record]) -> str:
    """The table of the softmaxes of other libraries."""
    rows = []
    for record in of(records, status="measured"):
        if "compiled" in record["times"]:
            ratios = (record["over_compiled"], record["over_liger"])
            rows.append(
                [
                    shape(record),
                    *(spread(record["times"].get(name)) for name in ("softmax", "compiled", "liger")),
                    *(NOTHING if ratio is None else factor(ratio) for ratio in ratios),
                ]
            )
    return table(ANCHORS, rows)


def hard(record: Record, records: list[Record]) -> float | None:
    """The forward time over that of PyTorch's hard top-k, per round, or from the same run for other frameworks."""
    if record["over_hard"] is not None:
        return float(record["over_hard"])
    names = ("rows", "n", "k", "dtype", "epsilon")
    for other in of(records, framework=NAMES["torch"], **{name: record[name] for name in names}):
        if "hard" in other.get("times", {}):
            return float(record["times"]["forward"]["median"] / other["times"]["hard"]["median"])
    return None


def missing(result: dict[str, Any]) -> str:
    """The table of everything that was not measured, with the reasons."""
    found = [(NAMES[name], reason, "everything") for name, reason in result["absent"].items()]
    for record in result["records"]:
        where = f"{shape(record)} epsilon={record['epsilon']:g} {record['dtype']}"
        for name, reason in record["reasons"].items():
            who = record["framework"] if name == "all" else f"{record['framework']}: {NAMED[name]}"
            found.append((who, reason, where))
    return reasons(["what", "reason", "case"], found)
