"""The backends that other packages declare.

They are read when this module is imported. A framework that traces Python carries out an import statement, but cannot
follow how the installed packages are searched.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

ENTRIES: tuple[EntryPoint, ...] = tuple(entry_points(group="softk.backends"))
