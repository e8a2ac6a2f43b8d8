"""Fixtures of the whole suite: the library under test, its settings, and seeded random numbers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import zlib
from collections.abc import Iterator
from typing import Any

import hypothesis
import numpy as np
import pytest

import softk

from .libraries import BY_NAME, LIBRARIES, Library

hypothesis.settings.register_profile("softk", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("softk")

# Programs that the tests start compile kernels without a word, also where their output is compared.
os.environ.setdefault("SOFTK_QUIET", "1")

if importlib.util.find_spec("torch") is not None:
    import torch

    # Triton asks once, as it is imported, whether it is to interpret its kernels on the CPU.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")

if importlib.util.find_spec("jax") is not None:
    # JAX shares a GPU with the other libraries and with other workers: it takes memory when it needs some.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    # The strictest settings: no implicit promotion of dtypes or ranks, and products of matrices as exact as their dtype
    # where a function leaves that to the user.
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_default_matmul_precision", "highest")

if importlib.util.find_spec("array_api_strict") is not None:
    import array_api_strict

    array_api_strict.set_array_api_strict_flags(
        data_dependent_shapes=False, boolean_indexing=False, enabled_extensions=()
    )


#: Nine tenths of JAX's time here are XLA compiling each small program once. So it takes a third of the time or less.
QUICK_XLA = ["--xla_backend_optimization_level=1", "--xla_cpu_parallel_codegen_split_count=1"]
OLD_XLA = ["--xla_cpu_use_fusion_emitters=false"]  # XLA ends the process where it does not know a flag


@pytest.fixture(scope="module", autouse=True)
def choice_of_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests about kernels choose them, also in a run of the reference with SOFTK_KERNELS=none."""
    chosen = os.environ.get("SOFTK_KERNELS")
    if chosen is None or request.node.get_closest_marker("kernels") is None:
        yield
        return
    del os.environ["SOFTK_KERNELS"]  # of the programs that these tests start
    try:
        with softk.kernels("auto"):
            yield
    finally:
        os.environ["SOFTK_KERNELS"] = chosen


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run leave out libraries, as `make quick` does."""
    parser.addoption("--libraries", help="run the tests of every library on these only, such as numpy,torch,jax")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of the libraries that `--libraries` leaves out."""
    if config.option.libraries is None:
        return
    chosen = set(config.option.libraries.split(","))
    if unknown := sorted(chosen - BY_NAME.keys()):
        raise pytest.UsageError(f"--libraries: {', '.join(unknown)} is not one of {', '.join(BY_NAME)}")

    def is_chosen(item: pytest.Item) -> bool:
        callspec = getattr(item, "callspec", None)
        found = None if callspec is None else callspec.params.get("lib")
        return found is None or getattr(found, "name", found) in chosen  # some tests give the name

    config.hook.pytest_deselected(items=[item for item in items if not is_chosen(item)])
    items[:] = [item for item in items if is_chosen(item)]


def pytest_configure(config: pytest.Config) -> None:
    """Without the wider grids XLA compiles in haste, unless the environment says how; with them, as for users.

    XLA reads its flags when JAX makes its first array, which is later.
    """
    if config.option.markexpr == "not full" and importlib.util.find_spec("jaxlib") is not None:
        is_old = [int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2]] < [0, 11]
        os.environ.setdefault("XLA_FLAGS", " ".join(QUICK_XLA + OLD_XLA * is_old))


@pytest.fixture(
    params=[
        pytest.param(library, id=library.name, marks=[pytest.mark.gpu] if "gpu" in library.tags else [])
        for library in LIBRARIES
    ]
)
def lib(request: pytest.FixtureRequest) -> Library:
    """Every array library in turn."""
    library: Library = request.param
    library.require()
    return library


@pytest.fixture
def eager(lib: Library) -> Library:
    """Every library but for the compiled variants, where a test is many calls and each would be a compilation."""
    if "traced" in lib.tags:
        pytest.skip(f"{lib.name} computes what its library does, and compiles every call")
    return lib


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """PyTorch's kinds of device in turn."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    kind: str = request.param
    return kind


@pytest.fixture
def on_device(device: str) -> Iterator[None]:
    """What a test makes is on each of PyTorch's devices in turn.

    So is what the library makes without naming a device: the tests on the meta device notice that.
    """
    if device == "cpu":
        yield
        return
    import torch

    with torch.device(device):
        yield


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> Any:
    """Random numbers that depend on the test's name alone."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))
