"""The machine code of the Numba kernels on disk: never out of date, and never needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba", reason="Numba is not installed")

pytestmark = pytest.mark.kernels

ROOT = Path(__file__).resolve().parent.parent

#: A kernel that compiles in a second.
TINY = """
from .cache import kernel
from .operations import EXACT, FORMULAS

midpoint = FORMULAS.midpoint


@kernel(EXACT)
def tiny_rows(x):
    return midpoint(x[0], x[1])
"""

#: Prints the result, and whether it was compiled or loaded.
PROGRAM = """
import numpy as np
from softk_numba import cache, tiny
cache.SILENCE = 0.0
result = tiny.tiny_rows(np.asarray([1.0, 3.0], np.{dtype}))
print(result, "loaded" if sum(tiny.tiny_rows._cache_hits.values()) else "compiled")
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A copy of the packages, with the tiny kernel."""
    for source in (ROOT / "softk", ROOT / "backends" / "softk_numba"):
        shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "softk_numba" / "tiny.py").write_text(TINY)
    return tmp_path


def environment(place: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NUMBA_CACHE_DIR", "SOFTK_QUIET")}
    return {**kept, "PYTHONPATH": str(place), "XDG_CACHE_HOME": str(place / "home"), **variables}


def run(place: Path, program: str = PROGRAM, *, dtype: str = "float32", **variables: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", textwrap.dedent(program).replace("{dtype}", dtype)],
        env=environment(place, **variables),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("kernels-*/*"))


def test_loaded_again_and_compiled_again_for_a_changed_formula(place: Path) -> None:
    formulas = place / "softk" / "_reference" / "threshold" / "formulas.py"
    cache = place / "softk_numba" / "__pycache__"
    assert run(place)[0] == "2.0 compiled"
    first = kept(cache)
    assert [path.name.partition("-")[0] for path in first] == ["tiny_rows"]
    assert run(place)[0] == "2.0 loaded"
    assert run(place, dtype="float64")[0] == "2.0 compiled"
    assert run(place)[0] == "2.0 loaded"
    assert len(kept(cache)) == 2

    before, text = formulas.stat(), formulas.read_text()
    changed = text.replace("high - 0.5 * (high - low)", "high - 0.0 * (high - low)")
    assert changed != text
    formulas.write_text(changed)
    os.utime(formulas, ns=(before.st_atime_ns, before.st_mtime_ns))  # as wheels have the same date in every version
    assert formulas.stat().st_size == before.st_size
    shutil.rmtree(formulas.parent / "__pycache__", ignore_errors=True)  # Python's own cache goes by date and size
    assert run(place)[0] == "1.0 compiled"
    assert len(kept(cache)) == 1  # what was there before is removed
    assert kept(cache)[0].parent != first[0].parent
    assert run(place)[0] == "1.0 loaded"


def test_other_files_beside_the_cache_stay(place: Path) -> None:
    cache = place / "softk_numba" / "__pycache__"
    others = [cache / "kernels-cpython-20-0123456789abcdef0123", cache / "kernels-other", cache / "other"]
    for folder in others:
        folder.mkdir(parents=True)
    run(place)
    assert all(folder.is_dir() for folder in others)


def test_in_the_folder_that_a_variable_names(place: Path) -> None:
    chosen = place / "chosen"
    assert run(place, NUMBA_CACHE_DIR=str(chosen))[0] == "2.0 compiled"
    assert len(kept(chosen)) == 1
    assert not kept(place / "softk_numba")
    assert run(place, NUMBA_CACHE_DIR=str(chosen))[0] == "2.0 loaded"


def test_in_the_folder_of_the_user_where_the_package_cannot_be_written_to(place: Path) -> None:
    (place / "softk_numba" / "__pycache__").write_text("no folder")
    assert run(place, HOME=str(place / "home"), LOCALAPPDATA=str(place / "home"))[0] == "2.0 compiled"
    assert len(kept(place / "home")) == 1
    assert run(place, HOME=str(place / "home"), LOCALAPPDATA=str(place / "home"))[0] == "2.0 loaded"


NOWHERE = {"HOME": "/dev/null/x", "XDG_CACHE_HOME": "/dev/null/x", "LOCALAPPDATA": "/dev/null/x"}


@pytest.mark.skipif(os.name == "nt", reason="the system has no /dev/null")
def test_where_no_folder_can_be_written_to(place: Path) -> None:
    (place / "softk_numba" / "__pycache__").write_text("no folder")
    program = PROGRAM + "print(cache.note())\n"
    for _ in range(2):
        output, errors = run(place, program, **NOWHERE)
        assert output == (
            "2.0 compiled\nCompiled kernels are not kept, and every process compiles its own: "
            "no folder can be written to; NUMBA_CACHE_DIR names one."
        )
        assert errors == "softk: compiling kernels for float32 (in every process; NUMBA_CACHE_DIR names a cache)\n"


def test_a_file_that_is_damaged_is_written_again(place: Path) -> None:
    run(place)
    (file,) = kept(place / "softk_numba" / "__pycache__")
    for content in (b"no pickle", file.read_bytes()[:1000]):
        file.write_bytes(content)
        assert run(place)[0] == "2.0 compiled"
    assert run(place)[0] == "2.0 loaded"


def test_a_numba_whose_cache_is_another(place: Path) -> None:
    program = "from numba.core.compiler import CompileResult\ndel CompileResult._reduce\n" + PROGRAM
    output, _ = run(place, program + "print(cache.note())\n")
    assert output.startswith("2.0 compiled\nCompiled kernels are not kept, and every process compiles its own: Attrib")
    assert not kept(place / "softk_numba" / "__pycache__")


def test_processes_that_compile_at_once(place: Path) -> None:
    command = [sys.executable, "-P", "-c", PROGRAM.replace("{dtype}", "float32")]
    started = [
        subprocess.Popen(command, env=environment(place), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in started:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert output.startswith("2.0 ")
    assert len(kept(place / "softk_numba" / "__pycache__")) == 1
    assert run(place)[0] == "2.0 loaded"


def test_who_waits_is_told_once(place: Path) -> None:
    program = PROGRAM + "tiny.tiny_rows(np.asarray([[1.0, 3.0]], np.{dtype})[0][::1])\n"
    _, errors = run(place, program)
    folder = kept(place / "softk_numba")[0].parent
    assert errors == f"softk: compiling kernels for float32 (once; cached in {folder})\n"
    assert run(place, program) == ("2.0 loaded", "")
    assert run(place, program, dtype="float64", SOFTK_QUIET="1")[1] == ""


def test_what_xla_calls_is_kept_too(place: Path) -> None:
    program = """
    import ctypes
    from numba.core.ccallback import CFunc
    from softk_numba import cache, xla
    cache.SILENCE, compiled, compile = 0.0, [], CFunc._compile_uncached

    def counted(self):
        compiled.append(self)
        return compile(self)

    CFunc._compile_uncached = counted
    xla.target("probe", "float32", False, lambda name, capsule: None)
    frame = (ctypes.c_int64 * 15)()  # of another stage than that of computing
    code = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(xla._targets["softk_probe"].address)
    print(len(compiled), code(ctypes.addressof(frame)))
    """
    found, said = run(place, program)
    assert found == "1 0"
    assert "softk: compiling kernels for float32" in said
    assert run(place, program) == ("0 0", "")


def test_a_function_that_kernels_call_cannot_be_called_from_python() -> None:
    from softk_numba import operations

    with pytest.raises(TypeError, match="minimum is called by compiled functions only"):
        operations.minimum(1.0, 2.0)


def test_softk_imports_no_numba() -> None:
    program = "import sys, softk\nimport softk_numba\nassert not {'numba', 'llvmlite'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", program], env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)), check=True
    )
