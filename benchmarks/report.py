"""The results as Markdown tables, for the terminal and for docs/benchmarks.md, and as a JSON file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .candidates import INDICES, SELECT

Record = dict[str, Any]
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
#: The frameworks, in the order of the tables.
TITLES = {"numpy": "NumPy", "torch": "PyTorch", "compiled": "torch.compile", "jax": "JAX jit"}
NOTHING = "-"
SORTING = """\
float32, epsilon 0.1: median and quartiles. **Error** is the largest difference to the exact result of the entropic
problem, in units of the scores for sorted values and in ranks for ranks, and **derivative error** the largest one over
the largest entry of the derivative. They are those of the first four slices, and n/a for a candidate that solves
another problem. **From the hard result** is the largest difference to the hard sort or rank. It depends on what epsilon
means to a candidate, and is no error."""
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
UNFOLDED = 16  # rows of a table that a page shows at once


def table(header: list[str], rows: Iterable[list[str]], text: int = 1) -> str:
    """A Markdown table. The first `text` columns are aligned to the left, the others to the right."""
    cells = [header, *rows]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    sides = ["<" if i < text else ">" for i in range(len(header))]

    def line(row: list[str]) -> str:
        padded = (f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rules = ("-" * (width + 1) + ("-" if side == "<" else ":") for width, side in zip(widths, sides, strict=True))
    return "\n".join([line(header), "|" + "|".join(rules) + "|", *(line(row) for row in cells[1:])])


def milliseconds(seconds: float) -> str:
    """Format a time with three significant digits, in milliseconds."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def spread(phase: Record | None) -> str:
    """Format the median and the quartiles, in milliseconds."""
    if phase is None:
        return NOTHING
    median, first, third = (milliseconds(phase[name]) for name in ("median", "q1", "q3"))
    return (
        f"{median} ({first} - {third})"
        if phase["rounds"] > 2
        else f"{median} ({phase['rounds']} call{'s' if phase['rounds'] > 1 else ''})"
    )


def ratio(phase: Record | None) -> str:
    """Format the ratio to the time of softmax."""
    if phase is None or phase["over_softmax"] is None:
        return NOTHING
    return factor(phase["over_softmax"])


def factor(value: float) -> str:
    """Format a factor with two significant digits, or without decimals if it is large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def error(record: Record, name: str) -> str:
    """Format an error of a candidate. It applies only to candidates that compute the operator of softk.topk."""
    if record["kind"] == "hard":
        return "indicator"
    if record["kind"] == "other":
        return "n/a"
    if record["errors"] is None or (name == "gradient" and record["both"] is None):
        return NOTHING
    value = record["errors"][name]  # None, which is null in JSON, if it was NaN
    return "NaN" if value is None or not math.isfinite(value) else f"{value:.0e}"


def shape(record: Record) -> str:
    """Format the shape and k of a case, and its operator unless that is the mask."""
    size = f"10^{round(math.log10(record['n']))}" if record["n"] >= 10**6 else str(record["n"])
    scores, operator = f"({record['rows']}, {size})", record.get("operator", "topk")
    if operator in ("sort", "rank"):
        return f"{operator} of {scores}" + (f", {record['k']} anchors" if record["k"] < record["n"] else "")
    both = " over both axes" if record.get("joint") else ""
    return f"{'' if operator == 'topk' else f'{operator} of '}{scores} k={record['k']}{both}"


def of(records: list[Record], **wanted: Any) -> list[Record]:
    """The records that have all of the given values."""
    return [record for record in records if all(record.get(name) == value for name, value in wanted.items())]


def headline(records: list[Record]) -> str:
    """The table of softk over softmax, forward + backward: one row per case, dtype and number of threads."""
    ours = of(records, group="shapes", candidate="softk.topk", status="measured")
    keys: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in ours:
        key = (record["threads"], record["dtype"], record["n"] * record["rows"], record["k"], shape(record))
        keys.setdefault(key, {})[record["framework"]] = record
    order = sorted(keys, key=lambda key: (key[1], key[0], key[2], key[3]))
    rows = []
    for key in order:
        cells = []
        for framework in TITLES.values():
            found = keys[key].get(framework)
            both = found["both"] if found else None
            cells.append(NOTHING if both is None else f"{ratio(both)} ({milliseconds(both['median'])} ms)")
        rows.append([key[4], key[1], key[0], *cells])
    return table(["shape", "dtype", "threads", *TITLES.values()], rows, text=3)


def selection(records: list[Record]) -> str:
    """The table of `softk.select` over the library's own top-k, forward."""
    rows = []
    for ours in of(records, group="shapes", candidate=SELECT, status="measured"):
        case = {name: ours[name] for name in ("framework", "rows", "n", "k", "dtype", "threads")}
        for own in of(records, group="shapes", candidate=INDICES, status="measured", **case):
            own_time, time = (record["forward"]["median"] for record in (own, ours))
            cells = [milliseconds(own_time), milliseconds(time), factor(time / own_time)]
            rows.append([shape(ours), ours["dtype"], ours["threads"], *cells])
    return table(["shape", "dtype", "threads", "torch.topk, ms", "softk.select, ms", "ratio"], rows, text=3)


def details(records: list[Record]) -> str:
    """The table of all candidates on one case."""
    rows = []
    for framework in TITLES.values():
        for record in of(records, framework=framework):
            if record["status"] == "measured":
                both = spread(record["both"])
                cells = [spread(record["forward"]), both, ratio(record["both"] or None)]
                cells += [error(record, name) for name in ("mass", "mask", "gradient")]
                if "reason" in record and record["both"] is None:
                    cells[1] = "fails"
            else:
                cells = [record["status"], NOTHING, NOTHING, NOTHING, NOTHING, NOTHING]
            rows.append([record["candidate"], framework, *cells])
    header = ["candidate", "framework", "forward, ms", "forward + backward, ms", "over softmax"]
    return table([*header, "mass error", "mask error", "derivative error"], rows, text=2)


def sorting(records: list[Record]) -> str:
    """The table of all candidates on one case of the operators that sort."""
    rows = []
    for framework in TITLES.values():
        for record in of(records, framework=framework):
            if record["status"] == "measured":
                cells = [spread(record["forward"]), spread(record["both"]), ratio(record["both"])]
                cells += [distance(record, name) for name in ("values", "gradient", "hard")]
            else:
                cells = [record["status"], *[NOTHING] * 5]
            rows.append([record["candidate"], framework, *cells])
    header = ["candidate", "framework", "forward, ms", "forward + backward, ms", "over softmax"]
    return table([*header, "error", "derivative error", "from the hard result"], rows, text=2)


def distance(record: Record, name: str) -> str:
    """Format an error of a candidate that sorts."""
    if record["errors"] is None or (name != "hard" and record["kind"] != "soft"):
        return "n/a"
    if name == "gradient" and record["both"] is None:
        return NOTHING
    value = record["errors"][name]
    return "NaN" if value is None else f"{value:.2g}" if name == "hard" else f"{value:.0e}"


def epsilons(records: list[Record]) -> str:
    """The table of time and errors against epsilon, for softk and the other solvers of the same problem."""
    rows = []
    for record in of(records, group="epsilon", status="measured", kind="soft"):
        cells = [spread(record["both"]), *(error(record, name) for name in ("mass", "mask", "gradient"))]
        rows.append([record["candidate"], record["framework"], record["dtype"], f"{record['epsilon']:g}", *cells])
    rows.sort(
        key=lambda row: (row[2], list(TITLES.values()).index(row[1]), row[0] != "softk.topk", row[0], -float(row[3]))
    )
    header = ["candidate", "framework", "dtype", "epsilon", "forward + backward, ms"]
    return table([*header, "mass error", "mask error", "derivative error"], rows, text=3)


def compilation(records: list[Record]) -> str:
    """A sentence about the time of softk's first call, which compiles: the range over all cases."""
    parts = []
    for framework in ("torch.compile", "JAX jit"):
        found = of(records, candidate="softk.topk", framework=framework, status="measured")
        seconds = [record["first_call"]["both"] for record in found if "both" in record.get("first_call", {})]
        if seconds:
            parts.append(f"{min(seconds):.2g} to {max(seconds):.2g} s under {framework}")
    return f"The first call of softk, which compiles, takes {', '.join(parts)}." if parts else ""


def skipped(records: list[Record]) -> str:
    """The table of all candidates and cases that were not measured, with the reasons."""
    found = []
    for record in records:
        if "reason" in record:
            who = f"{record.get('candidate', 'all')}, {record['framework']}"
            where = f"{shape(record)} epsilon={record['epsilon']:g} {record['dtype']}, {record['threads']}"
            where = where if record["n"] else f"everything, {record['threads']}"
            found.append((who, record["reason"], where))
    return reasons(["candidate", "reason", "case, threads"], found)


def reasons(header: list[str], found: Iterable[tuple[str, str, str]]) -> str:
    """A table of (candidate, reason, case), with the cases of the same candidate and reason in one row."""
    places: dict[tuple[str, str], list[str]] = {}
    for who, reason, where in found:
        places.setdefault((who, reason), []).append(where)
    rows = [[who, reason.replace("|", "/"), "; ".join(dict.fromkeys(where))] for (who, reason), where in places.items()]
    return table(header, rows, text=3) if rows else "Nothing was skipped, and nothing failed."


def memory(records: list[Record]) -> str:
    """The table of memory use, in arrays of the size of the scores."""
    rows = [
        [record["candidate"], record["framework"], record["what"], f"{record['arrays']:.2f}"]
        for record in of(records, group="memory", status="measured")
    ]
    return table(["candidate", "framework", "what", "arrays of the scores' size"], rows, text=3)


def peers(found: dict[str, dict[str, str]]) -> str:
    """The table of peers: the version, or why it is absent, and what is timed."""
    rows = [[name, peer["status"], peer["computes"]] for name, peer in found.items()]
    return table(["peer", "version", "what is timed"], rows, text=3)


def machine(environment: dict[str, Any]) -> str:
    """A paragraph about the environment of the measurement."""
    others = ""
    if environment["others"] is not None:
        others = f", and other processes used {100 * environment['others']:.0f} % of the machine meanwhile"
        if environment["others"] > 0.1:
            others += ", so the times on all threads are unreliable"
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return (
        f"{environment['date']}: {environment['processor']}, {environment['cores']} cores, "
        f"{environment['memory_gib']:.0f} GiB, {environment['system']}; device: {environment['device']}; "
        f"load average at the start {environment['load']}; {versions}. "
        f"The run took {environment['minutes']:.1f} minutes{others}."
    )


def page(result: dict[str, Any]) -> str:
    """All results, as sections of a page."""
    records = result["records"]
    parts = ["## Machine", machine(result["environment"])]
    for title, environment in result.get("earlier", {}).items():
        parts.append(f"{title} was measured in an earlier run: {machine(environment)}")
    parts += ["## softk over softmax", "Forward + backward, epsilon 0.1.", headline(records)]
    parts += ["## softk.select over torch.topk", "Forward, epsilon 0.1.", selection(records)]
    shapes = of(records, group="shapes", dtype="float32", threads="all")
    parts += ["## Every candidate", "float32, all threads, epsilon 0.1: median and quartiles."]
    seen = dict.fromkeys((record["rows"], record["n"], record["k"]) for record in shapes)
    for rows, n, k in sorted(seen, key=lambda key: (key[2] * 2 >= key[1], key[0] * key[1])):
        chosen = [record for record in of(shapes, rows=rows, n=n, k=k) if "candidate" in record]
        if chosen:
            parts += [f"### {shape(chosen[0])}", details(chosen)]
    parts += [compilation(records)]
    ordered = of(records, group="sorted")
    parts += ["## The operators that sort", SORTING] if ordered else []
    for threads, title in (("all", "all threads"), ("one", "one thread")):
        seen = dict.fromkeys(shape(record) for record in of(ordered, threads=threads))
        for case in seen:
            chosen = [one for one in of(ordered, threads=threads) if shape(one) == case and "candidate" in one]
            parts += [f"### {case}, {title}", sorting(chosen)] if chosen else []
    parts += ["## Against epsilon", "(128, 1000) k=10." if not result["quick"] else "", epsilons(records)]
    parts += ["## Memory", memory(records)]
    parts += [f"`import softk` takes {1e3 * result['import_seconds']:.0f} ms if NumPy is already imported."]
    parts += ["## The peers", peers(result["peers"])]
    parts += ["## What was not measured", skipped(records)]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_page(path: Path, result: dict[str, Any]) -> None:
    """Write the results between the markers of a page."""
    path.write_text(between(path.read_text(), page(result)))


def between(text: str, measured: str, unfolded: int = UNFOLDED) -> str:
    """Replace the text between the markers of a page."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{folded(measured, unfolded)}\n{END}{after}"


def folded(text: str, unfolded: int = UNFOLDED) -> str:
    """Fold the tables of a page that have more rows than that, so that a reader opens those of interest."""

    def fold(match: re.Match[str]) -> str:
        rows = match[0].count("\n") - 2
        if rows <= unfolded:
            return match[0]
        count = "1 row" if rows == 1 else f"{rows} rows"
        return f"<details>\n<summary>Table, {count}</summary>\n\n{match[0]}\n</details>\n"

    return TABLE.sub(fold, text)


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write all records. NaN and infinity, which JSON does not have, become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(finite(result), indent=1) + "\n")


def finite(value: Any) -> Any:
    """Replace NaN and infinity by None, at any depth."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
