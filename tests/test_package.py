"""The files around the library agree: extras, groups, versions, conda recipe, hooks, workflows and make targets."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

import softk

from .pages import PAGES, ROOT

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
GROUPS: dict[str, list[str]] = PROJECT["dependency-groups"]
RECIPE = yaml.safe_load((ROOT / ".github" / "conda" / "recipe.yaml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
BOUNDED = re.compile(r"(?P<name>[\w.-]+)(?:\[\w+\])? ?(?P<bound>[=>]=[\d.]+)")
CONDA_NAMES = {"torch": "pytorch", "dask": "dask-core"}
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "RELEASING.md", *WORKFLOWS]


def bounds(requirements: list[str]) -> dict[str, str]:
    """The name of each requirement, with its bound."""
    return {found["name"]: found["bound"] for found in map(BOUNDED.match, requirements) if found is not None}


def users() -> dict[str, str]:
    """What users install: the dependency, and what the extras bring."""
    return bounds(PROJECT["project"]["dependencies"] + [item for items in EXTRAS.values() for item in items])


def test_extras_are_named_where_users_look() -> None:
    for name in EXTRAS:
        for page in (ROOT / "README.md", ROOT / "docs" / "backends.md"):
            assert re.search(rf"\[{name}\]\"", page.read_text()), f"{page.name} does not name the extra {name}"


def test_extras_in_the_pages_exist() -> None:
    named = [name for page in PAGES for name in re.findall(r"(?:softk|\.)\[([a-z]+)\]", page.read_text())]
    assert len(named) >= len(EXTRAS)
    assert set(named) <= EXTRAS.keys()


def test_one_library_has_one_lower_bound() -> None:
    items = [item for items in EXTRAS.values() for item in items]
    found = {(match["name"], match["bound"]) for match in map(BOUNDED.match, items) if match is not None}
    assert len(found) == len(users()) - len(PROJECT["project"]["dependencies"])


def test_lowest_is_what_the_extras_allow() -> None:
    lowest = bounds(GROUPS["lowest"])
    expected = {name: bound.replace(">", "=") for name, bound in users().items() if not name.startswith("cupy")}
    assert len(expected) >= 9
    assert expected == {name: bound for name, bound in lowest.items() if name in expected}


def test_versions_agree() -> None:
    assert f"\nversion: {softk.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert RECIPE["context"]["version"] == softk.__version__
    assert f"\n## {softk.__version__} - " in (ROOT / "CHANGELOG.md").read_text()


def test_the_recipe_has_the_dependencies() -> None:
    build = bounds(PROJECT["build-system"]["requires"])
    assert build == {name: bound for name, bound in bounds(RECIPE["requirements"]["host"]).items() if name in build}
    project = PROJECT["project"]
    assert bounds(project["dependencies"]) == bounds(RECIPE["requirements"]["run"])
    found = bounds(RECIPE["requirements"]["run_constraints"])
    others = {name: bound for name, bound in users().items() if name not in bounds(project["dependencies"])}
    expected = {CONDA_NAMES.get(name, name): bound for name, bound in others.items()}
    assert found == {
        name: bound for name, bound in expected.items() if name != "mpmath" and not name.startswith("cupy")
    }
    assert project["requires-python"] == f">={RECIPE['context']['python_min']}"
    assert RECIPE["about"]["license"] == project["license"]
    assert RECIPE["about"]["summary"] == project["description"]


def test_hooks_have_the_versions_of_the_tests() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pins = [pin for hook in hooks for pin in hook.get("additional_dependencies", [])]
    assert len(pins) == 2
    assert set(pins) <= set(GROUPS["test"])


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for page in TEXTS:
        named = re.findall(r"(?:`|run: |\n)make ([a-z-]+)", page.read_text())
        assert set(named) <= targets, f"{page.name} names {sorted(set(named) - targets)}"
    groups = set(re.findall(r"--group ([a-z]+)", makefile))
    assert groups == GROUPS.keys()


def test_workflows_run_every_python_of_the_classifiers() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    classifiers = "\n".join(PROJECT["project"]["classifiers"])
    minors = re.findall(r"Python :: (3\.\d+)$", classifiers, re.MULTILINE)
    assert jobs["latest"]["strategy"]["matrix"]["python"] == [*minors, "3.14t"]


def test_only_the_upload_may_ask_for_an_identity() -> None:
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    assert release["permissions"] == {"contents": "read"}
    allowed = {name: job.get("permissions") for name, job in release["jobs"].items()}
    assert allowed == {"build": None, "publish": {"id-token": "write"}}
    assert release["jobs"]["publish"]["needs"] == "build"
