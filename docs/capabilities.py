"""Write the table of capabilities, from the tags by which the tests choose what to run on a library."""

from __future__ import annotations

from pathlib import Path

from tests.libraries import LIBRARIES

TARGET = Path(__file__).parent / "_build" / "capabilities.md"
COLUMNS = {
    "autodiff": "native derivatives",
    "half": "float16, bfloat16",
    "traced": "under a tracing compiler",
    "lazy": "values stay lazy",
    "gpu": "on a GPU",
}


def table() -> str:
    """One row per configuration of a library in the test suite."""
    lines = [
        "| library | `softk.vjp`, `softk.jvp` | " + " | ".join(COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for library in LIBRARIES:
        cells = ["yes" if tag in library.tags else "" for tag in COLUMNS]
        lines.append(f"| {library.name} | yes | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table to the file that the page on backends includes."""
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(table())


if __name__ == "__main__":
    main()
