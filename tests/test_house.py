"""The structure of the code, read off its imports: a tower of storeys, in which nothing loads what stands above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "softk").rglob("*.py"), *(ROOT / "backends").rglob("*.py")])


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "backends" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}

#: From the ground up; a module is on the first storey that one of the names is a prefix of.
STOREYS = [
    ("the contracts", ["softk.backend"]),
    ("the reference", ["softk._reference"]),
    ("the kernels", ["softk_triton", "softk_numba"]),
    (
        "the layers and estimators",
        [
            *(f"softk_torch.{name}" for name in ("layers", "losses", "parameters", "distributed")),
            "softk_jax.sharded",
            "softk_sklearn",
        ],
    ),
    ("the adapters", ["softk_"]),
    ("the functions", ["softk._functions"]),
    ("the uses", ["softk"]),
]
#: The order of the storeys is that of the list, but for what is made of the public functions.
HEIGHTS = {
    "the contracts": 0,
    "the reference": 1,
    "the kernels": 2,
    "the adapters": 3,
    "the functions": 4,
    "the uses": 5,
    "the layers and estimators": 6,
}


def storey(module: str) -> str:
    return next(name for name, prefixes in STOREYS if any(module.startswith(prefix) for prefix in prefixes))


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """The modules of this project that a source loads, wherever in it. What only a type checker sees is left out."""
    tree = ast.parse(source)
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if inner in MODULES:
                    yield inner
                elif base in MODULES:
                    yield base


GRAPH = {
    module: sorted(set(imports(path.read_text(), module, is_package=path.name == "__init__.py")) - {module})
    for module, path in MODULES.items()
}


def circle_in(graph: dict[str, list[str]]) -> list[str]:
    """Modules that load each other in a circle, or nothing."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        for other in graph[module]:
            if found := walk(other, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := walk(module, []))), [])


def test_nothing_loads_what_stands_above_it() -> None:
    upward = [
        f"{module} loads {other}"
        for module, others in GRAPH.items()
        for other in others
        if HEIGHTS[storey(other)] > HEIGHTS[storey(module)]
    ]
    assert upward == []


def test_there_is_no_circle() -> None:
    assert circle_in(GRAPH) == []


def test_adapters_and_kernels_know_nothing_private() -> None:
    allowed = ("softk.backend", "softk._reference")
    private = [
        f"{module} loads {other}"
        for module, others in GRAPH.items()
        for other in others
        if storey(module) in ("the kernels", "the adapters")
        and other.startswith("softk.")
        and not other.startswith(allowed)
    ]
    assert private == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from softk._functions.call import Call", ["softk._functions.call"]),
        ("def f():\n    from .newton import search", ["softk._reference.threshold.newton"]),
        ("from . import ends, rule", ["softk._reference.threshold.ends", "softk._reference.threshold.rule"]),
        ("import softk", ["softk"]),
        ("import math", []),
        ("if TYPE_CHECKING:\n    from softk import topk", []),
    ],
)
def test_the_reading_sees_an_import(source: str, found: list[str]) -> None:
    assert list(imports(source, "softk._reference.threshold.solve")) == found


def test_the_reading_sees_a_circle() -> None:
    assert sorted(circle_in({"a": ["b"], "b": ["c"], "c": ["b"], "d": []})) == ["b", "c"]
