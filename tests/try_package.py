"""Install the wheel of a folder into an empty environment, and run the self-check and the examples of NumPy from it.

`make package` runs it: `python tests/try_package.py dist`. pip needs the network for NumPy and Numba.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

from pages import BLOCK, PAGES, ROOT

MODULES = {"math", "numpy", "softk"}  # what the examples that are run here import
AT_LEAST = 10  # examples


def main(folder: Path) -> None:
    """Check the files of a wheel, install it and use it."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_files(wheel)
    print(f"{wheel.name} and {sdist.name} have what they should")
    with tempfile.TemporaryDirectory() as found:
        place = Path(found)
        venv.create(place / "venv", with_pip=True)
        python = str(place / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python")

        print("== the wheel alone")
        run(python, "-m", "pip", "install", "--quiet", str(wheel.resolve()))
        alone = subprocess.run([python, "-I", "-m", "softk"], capture_output=True, text=True, cwd=place)
        expect(alone.returncode == 1, f"python -m softk without an array library: {alone.stdout}{alone.stderr}")
        expect("python -m pip install numpy" in alone.stdout, f"no advice in {alone.stdout!r}")

        print("== with the extra numpy")
        run(python, "-m", "pip", "install", "--quiet", f"softk[numpy] @ {wheel.resolve().as_uri()}")
        where = run(python, "-I", "-c", "import softk; print(softk.__file__)", cwd=place)
        expect(where.startswith(str(place)), f"softk is imported from {where}")
        print(run(python, "-I", "-m", "softk", cwd=place))

        print("== examples")
        names = [example(python, place, page, i, match) for page in PAGES for i, match in enumerate(blocks(page))]
        count = sum(names)
        expect(count >= AT_LEAST, f"only {count} examples import nothing but {sorted(MODULES)}")
        print(f"{count} examples print what their pages show")


def check_files(wheel: Path) -> None:
    """Check that the wheel has every package and the license, and a long description without dead links."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [Path(path).name for path in settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    for package in packages:
        for file in (f"{package}/__init__.py", f"{package}/py.typed"):
            expect(file in names, f"{file} is missing in the wheel")
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    expect(tops == set(packages), f"the wheel has {sorted(tops ^ set(packages))}")
    expect(any(name.endswith("licenses/LICENSE") for name in names), "the wheel has no license")
    links = re.findall(r"\]\((?!https?:)[^)]*\)|<img", metadata)
    expect(not links, f"the long description has links and pictures that lead nowhere: {links}")
    for extra in settings["project"]["optional-dependencies"]:
        expect(f"Provides-Extra: {extra}\n" in metadata, f"the wheel has no extra {extra}")


def blocks(page: Path) -> list[re.Match[str]]:
    """The examples of a page."""
    return list(BLOCK.finditer(page.read_text()))


def example(python: str, place: Path, page: Path, i: int, match: re.Match[str]) -> bool:
    """Run an example, if NumPy is enough for it, and say whether it was run."""
    imported = set(re.findall(r"^(?:from|import) (\w+)", match["code"], re.MULTILINE))
    if not imported <= MODULES or "softk.testing" in match["code"]:
        return False
    printed = run(python, "-I", "-W", "error", "-c", match["code"], cwd=place)
    expect(printed == match["output"], f"{page.name}, example {i} prints\n{printed}")
    print(f"  {page.name}, example {i}")
    return True


def run(*command: str, cwd: Path | None = None) -> str:
    """Run a command and return what it prints."""
    environment = {**os.environ, "SOFTK_QUIET": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    expect(done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def expect(condition: bool, fault: str) -> None:
    """End the program with a message if the condition is false."""
    if not condition:
        raise SystemExit(f"make package: {fault}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
