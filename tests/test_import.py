"""What is loaded: no framework by `import softk`, and by an array the adapter of its own framework alone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

FRAMEWORKS = ("torch", "jax", "jaxlib", "cupy", "dask", "autograd", "array_api_strict", "scipy", "sklearn")
ADAPTERS = (
    "softk_autograd",
    "softk_cupy",
    "softk_dask",
    "softk_mlx",
    "softk_jax",
    "softk_numpy",
    "softk_sklearn",
    "softk_torch",
    "softk_triton",
)


def loaded(code: str) -> set[str]:
    """The top-level modules in a fresh interpreter after the code."""
    report = "import sys, json; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\n{report}"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_import_loads_no_framework() -> None:
    found = loaded("import softk")
    assert "softk" in found
    assert not found & {*FRAMEWORKS, *ADAPTERS, "numpy", "numba", "llvmlite"}


@pytest.mark.parametrize(
    ("module", "code", "adapters"),
    [
        ("numpy", "import numpy as xp; x = xp.ones(3)", {"softk_numpy"}),
        ("array_api_strict", "import array_api_strict as xp; x = xp.ones(3)", set()),
        ("torch", "import torch as xp; x = xp.ones(3)", {"softk_torch", "softk_triton"}),
        ("jax", "import jax.numpy as xp; x = xp.ones(3)", {"softk_jax"}),
        ("dask", "import dask.array as xp; x = xp.ones(3)", {"softk_dask", "softk_numpy"}),
    ],
    ids=["numpy", "array-api-strict", "torch", "jax", "dask"],
)
def test_an_array_loads_its_own_adapter(module: str, code: str, adapters: set[str]) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    before = loaded(code)
    found = loaded(f"{code}; import softk; softk.topk(x, 1); softk.threshold(x, 1); softk.vjp(softk.topk, x, 1)[1](x)")
    assert found & set(ADAPTERS) == adapters
    # Numba, which the kernels load, asks for the version of SciPy.
    assert not (found - before) & {*FRAMEWORKS} - {"scipy"}, "a framework that was not there before"


def test_a_number_loads_nothing() -> None:
    code = "import softk\ntry: softk.topk(1.0, 1)\nexcept TypeError: pass"
    assert not loaded(code) & {*FRAMEWORKS, *ADAPTERS, "numpy"}
