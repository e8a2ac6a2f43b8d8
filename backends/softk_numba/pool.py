"""Rows over threads."""

from __future__ import annotations

from typing import Any


def in_parallel(kernel: Any, arguments: tuple[Any, ...], rows: int, n: int, like: Any) -> None:
    """Run a kernel on all rows."""
    kernel(*arguments, 0, rows)
