"""How the kernels are compiled, and where the machine code is kept.

Numba's own cache looks at the file of a kernel alone. It would run old code after a change in another file, or after an
upgrade whose files carry the same date. Here the machine code lies in a folder that is named after a digest of all
sources that it is made from, and of the versions that make it; one file holds one kernel for one signature and one
processor. Nothing that is read can be out of date, and processes that write at the same time write the same.

The folder is in NUMBA_CACHE_DIR, else in __pycache__ beside this file, else in the user's folder for caches. Where none
of them can be written to, every process compiles.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature
from numba.misc.appdirs import AppDirs

from softk._reference.threshold import formulas, limits

#: Modules of this package that no kernel is compiled from.
NOT_COMPILED = {"__init__", "cache", "launch", "pool"}
#: What is not said of a compilation that is over sooner, in seconds.
SILENCE = 2.0
#: The settings of Numba that change the machine code.
SETTINGS = ("OPT", "BOUNDSCHECK", "DEBUGINFO_DEFAULT", "LOOP_VECTORIZE", "SLP_VECTORIZE")
#: float16 and bfloat16 come as bits.
_NAMES = {"uint16": "float16", "int16": "bfloat16"}

_HERE = Path(__file__).resolve().parent


# --- the decorators


def declared(function: Any) -> Any:
    """Declare a function whose code Numba's `overload` chooses by the types of the arguments. Python cannot call it."""

    @wraps(function)
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{function.__name__} is called by compiled functions only")

    return refuse


def compiled(options: dict[str, Any]) -> Callable[[Any], Any]:
    """Compile a function that kernels call.

    Python cannot call it: the code for that would be a fifth of the time of compilation.
    """

    def decorate(function: Any) -> Any:
        dispatcher = numba.njit(**options, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
        # Without this, a call from Python would jump to address 0.
        dispatcher._compile_for_args, dispatcher._insert = declared(function), lambda *args, **kwargs: None
        return dispatcher

    return decorate


def named(function: Any, name: str) -> Any:
    """The function, with a name that no other one has.

    Numba makes the symbols of the machine code from the name, the types, and a count of functions in the process. Two
    functions that another function made, as its `loop`, may get the same symbol in two processes. A third process that
    loads both from the cache would call the first one for the second.
    """
    function.__qualname__ = name
    return function


def kernel(options: dict[str, Any], name: str | None = None) -> Callable[[Any], Any]:
    """Compile a function that Python calls, and keep its machine code under a name of its own."""

    def decorate(function: Any) -> Any:
        function = function if name is None else named(function, name)
        dispatcher = numba.njit(**options, no_cfunc_wrapper=True)(function)
        if hasattr(dispatcher, "_cache"):
            dispatcher._cache = _Store(name or function.__name__)
        else:
            _give_up("this version of Numba has another cache")
        return dispatcher

    return decorate


def callback(function: Any, signature: Any, name: str, dtype: str) -> Any:
    """Compile a function that C calls, and keep its machine code under a name. `dtype` is what a user is told."""
    found = CFunc(named(function, name), normalize_signature(signature), {}, {"error_model": "numpy"})
    if hasattr(found, "_cache"):
        found._cache = _Store(name, dtype)
    found.compile()
    return found


# --- where


@cache
def digest() -> str:
    """A name for what the machine code is made from."""
    found = hashlib.sha256()
    sources = [path for path in sorted(_HERE.glob("*.py")) if path.stem not in NOT_COMPILED]
    for path in (*sources, Path(formulas.__file__), Path(limits.__file__)):
        content = path.read_bytes()
        found.update(f"{path.name} {len(content)}\n".encode())
        found.update(content)
    versions = (numba.__version__, llvmlite.__version__, np.__version__, sys.version)
    found.update(repr(versions).encode())
    return found.hexdigest()[:20]


def _bases() -> list[Path]:
    """Where the folder may be."""
    name = f"softk_numba_{hashlib.sha256(os.fsencode(_HERE)).hexdigest()[:12]}"
    chosen = str(getattr(numba.config, "CACHE_DIR", "") or "")
    own = Path(AppDirs("softk", False).user_cache_dir) / name
    return [*([Path(chosen) / name] if chosen else []), _HERE / "__pycache__", own]


def _prefix() -> str:
    return f"kernels-{sys.implementation.cache_tag}-"


@cache
def folders() -> tuple[list[Path], Path | None]:
    """The folders to read from, and the one to write to: None where there is none."""
    found = []
    for base in _bases():
        folder = base / (_prefix() + digest())
        found.append(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        return found, folder
    return found, None


def _remove_older(folder: Path) -> None:
    """Remove what this package left beside the folder when its sources were others."""
    pattern = re.compile(re.escape(_prefix()) + "[0-9a-f]{20}")
    for path in folder.parent.iterdir():
        if path != folder and pattern.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


_trouble: list[str] = []


def _give_up(reason: str) -> None:
    if not _trouble:
        _trouble.append(reason)


def note() -> str:
    """A line on the cache, for ``python -m softk``."""
    if not _trouble:
        try:
            target = folders()[1]
        except Exception as error:
            _give_up(f"{type(error).__name__}: {error}")
        else:
            if target is not None:
                return f"Compiled kernels are kept in {target}."
    reason = _trouble[0] if _trouble else "no folder can be written to; NUMBA_CACHE_DIR names one"
    return f"Compiled kernels are not kept, and every process compiles its own: {reason}."


# --- the cache of one function, as Numba's dispatchers use it


class _Store:
    """The machine code of one function. An error means that the code is compiled, and kept in this process only."""

    def __init__(self, name: str, dtype: str | None = None) -> None:
        self.name, self.dtype = name, dtype  # without a dtype, it is that of the first argument
        self.older = True  # whether there may be files of other sources
        self.waiting: threading.Timer | None = None

    @property
    def cache_path(self) -> str | None:
        target = None if _trouble else folders()[1]
        return None if target is None else str(target)

    def enable(self) -> None:
        """Nothing: it always is."""

    def disable(self) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing: what is there cannot be out of date."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function, or None."""
        found = None
        if not _trouble:
            try:
                target_context.refresh()
                found = self._load(sig, target_context)
            except Exception as error:
                _give_up(f"{type(error).__name__}: {error}")
        if found is None:
            self._begin(sig)
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function."""
        self._end()
        if not _trouble:
            try:
                self._save(sig, data)
            except Exception as error:
                _give_up(f"{type(error).__name__}: {error}")

    def _place(self, sig: Any, codegen: Any) -> tuple[str, str]:
        """All that the machine code depends on beside the digest, and the name of the file."""
        settings = [str(getattr(numba.config, name, None)) for name in SETTINGS]
        key = repr((self.name, str(sig), codegen.magic_tuple(), settings))
        return key, f"{self.name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"

    def _load(self, sig: Any, target_context: Any) -> Any:
        from numba.core.compiler import CompileResult

        key, name = self._place(sig, target_context.codegen())
        for folder in folders()[0]:
            try:
                kept, payload = pickle.loads((folder / name).read_bytes())
            except Exception:  # not there, or not written by this function
                continue
            if kept == key:
                return CompileResult._rebuild(target_context, *payload)
        return None

    def _save(self, sig: Any, data: Any) -> None:
        from numba.core.serialize import dumps

        folder = folders()[1]
        if folder is None or data.lifted or data.library.has_dynamic_globals:
            return
        key, name = self._place(sig, data.codegen)
        content = dumps((key, data._reduce()))
        folder.mkdir(parents=True, exist_ok=True)  # a process with newer sources may have removed it
        temporary = folder / f"{name}.{uuid.uuid4().hex[:16]}"
        try:
            temporary.write_bytes(content)
            temporary.replace(folder / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if self.older:
            self.older = False
            _remove_older(folder)

    # --- who waits is told

    def _begin(self, sig: Any) -> None:
        self._end()
        if os.environ.get("SOFTK_QUIET", "0") in ("", "0"):
            scores = self.dtype or str(getattr(getattr(sig, "args", sig)[0], "dtype", ""))
            self.waiting = threading.Timer(SILENCE, _say, (_NAMES.get(scores, scores),))
            self.waiting.daemon = True
            self.waiting.start()

    def _end(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None


_said: set[str] = set()


def _say(dtype: str) -> None:
    if dtype in _said or sys.stderr is None:
        return
    _said.add(dtype)
    target = None if _trouble else folders()[1]
    kept = f"once; cached in {target}" if target is not None else "in every process; NUMBA_CACHE_DIR names a cache"
    sys.stderr.write(f"softk: compiling kernels for {dtype} ({kept})\n")
    sys.stderr.flush()
