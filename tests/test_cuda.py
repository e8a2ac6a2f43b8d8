"""On a CUDA device: what waits for nothing, copies nothing, captures, compiles, and gives the same bits every time.

Run with ``python -m pytest tests -m gpu``, with every other test that has a device. What needs no device of its own is
checked on the CPU too, for it can fail there as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import softk  # noqa: E402

from .test_kernels import assert_near, differentiated  # noqa: E402

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    name: str = request.param
    return name


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return "cuda"


def problem(rng: Any, device: str, dtype: Any = torch.float32, n: int = 500, **rich: Any) -> dict[str, Any]:
    """Scores, k and epsilon as tensors, all to be differentiated; with weights and where if they are asked for."""
    x = torch.tensor(rng.normal(size=(4, n)), dtype=dtype, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = {
        "x": x,
        "k": torch.tensor(rng.uniform(1.0, n / 2, (4, 1)), dtype=wide, device=device),
        "epsilon": torch.tensor(rng.uniform(0.1, 1.0, (4, 1)), dtype=wide, device=device),
    }
    if rich.get("weights"):
        given["weights"] = torch.tensor(rng.uniform(0.5, 2.0, (4, n)), dtype=wide, device=device)
    if rich.get("where"):
        given["where"] = torch.tensor(rng.random((4, n)) < 0.9, device=device)
    return given


def topk(x: Any, k: Any, **arguments: Any) -> Any:
    return softk.topk(x, k, **arguments)


CALLS: dict[str, Callable[..., Any]] = {
    "topk": topk,
    "topk of a number": lambda x, **_: softk.topk(x, 5, epsilon=0.3),
    "hard": lambda x, **_: softk.topk(x, 5, hard=True),
    "smallest along an axis": lambda x, **_: softk.topk(x, 1.5, axis=0, mode="smallest"),
    "log_topk": lambda x, k, **others: softk.log_topk(x, k, **others),
    "threshold": lambda x, k, **others: softk.threshold(x, k, **others),
    "quantile": lambda x, k, epsilon, **others: softk.quantile(x, 0.3, epsilon=epsilon, **others),
    "sorted_topk": lambda x, **_: softk.sorted_topk(x, 3).values,
}


# --- nothing waits, nothing is copied


class _Devices(TorchDispatchMode):
    """Fails where an operation reads a value, or moves one between devices."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        found = function(*args, **(kwargs or {}))
        tensors = [value for value in (*args, *(kwargs or {}).values(), found) if isinstance(value, torch.Tensor)]
        placed = {value.device.type for value in tensors if value.ndim}
        assert len(placed) <= 1, f"{function} moves values between {placed}"
        return found


@pytest.mark.gpu
@pytest.mark.parametrize("rich", [{}, {"weights": True, "where": True}], ids=["plain", "rich"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(cuda: str, name: str, dtype: Any, rich: dict[str, Any], rng: Any) -> None:
    given = problem(rng, cuda, dtype, **rich)
    leaves = {key: value.requires_grad_() if value.is_floating_point() else value for key, value in given.items()}

    def both() -> None:
        found = CALLS[name](**leaves)
        torch.autograd.grad(found, leaves["x"], torch.ones_like(found))

    both()  # kernels are compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            torch.ones(1, device=cuda).item()
        both()
        with _Devices():
            both()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rich", [{}, {"weights": True, "where": True}], ids=["plain", "rich"])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_read_that_is_not_plain(
    name: str, rich: dict[str, Any], rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operations, as they are on a device whose values must not be looked at: a tensor of the CPU plays it."""
    given = problem(rng, "cpu", n=100, **rich)
    leaves = {key: value.requires_grad_() if value.is_floating_point() else value for key, value in given.items()}

    def both() -> None:
        found = CALLS[name](**leaves)
        torch.autograd.grad(found, leaves["x"], torch.ones_like(found))

    if name == "threshold":  # plain values are looked at, and that is seen
        with _Devices(), pytest.raises(AssertionError, match="a value is read"):
            both()
    monkeypatch.setattr("softk_torch._backend._is_plain", lambda x: False)
    with _Devices():
        both()


@pytest.mark.gpu
def test_what_counts_as_moving(cuda: str) -> None:
    """The check above sees a copy from the device and one to it."""
    with _Devices():
        for move in (lambda: torch.ones(3, device=cuda).cpu(), lambda: torch.ones(3).to(cuda)):
            with pytest.raises(AssertionError, match="moves values"):
                move()


# --- the same everywhere, every time


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [10, 1000, 40000])
def test_the_same_bits_every_time(device: str, dtype: Any, n: int, rng: Any) -> None:
    given = problem(rng, device, dtype, n, weights=True, where=True)
    first = differentiated(topk, **given)
    for _ in range(3):
        again = differentiated(topk, **given)
        for name, value in first.items():
            assert torch.equal(again[name], value), name


@pytest.mark.gpu
@pytest.mark.parametrize("rich", [{}, {"weights": True, "where": True}], ids=["plain", "rich"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [10, 127, 1000, 32768, 40000, 100_000])
def test_what_the_cpu_finds(cuda: str, n: int, dtype: Any, rich: dict[str, Any], rng: Any) -> None:
    """Found in float64 there, from the same numbers."""
    given = problem(rng, cuda, dtype, n, **rich)
    exact = {name: value.cpu().double() if value.is_floating_point() else value.cpu() for name, value in given.items()}
    found, expected = differentiated(topk, **given), differentiated(topk, **exact)
    eps, tolerance = float(torch.finfo(dtype).eps), 2e-5 if dtype == torch.float32 else 1e-11
    assert (found[""].cpu().double() - expected[""]).abs().max() <= 32 * eps
    for name in ("x", "k", "epsilon", *(["weights"] if "weights" in given else [])):
        assert_near(found[name], expected[name], tolerance)


@pytest.mark.gpu
def test_more_scores_than_float32_counts(cuda: str) -> None:
    """2^24 + 8 scores of two levels, the upper one of more than 2^24: a count in float32 would be off."""
    n = 2**24 + 8
    x = torch.ones(1, n, device=cuda)
    x[:, ::4_000_000] = 0.0
    above = int(x.double().sum().item())
    mask = softk.topk(x, above, epsilon=0.02)
    assert mask.double().sum().item() == pytest.approx(above, abs=16 * above * 2.0**-23)
    assert mask[0, 1].item() == 1.0
    assert mask[0, 0].item() < 1e-6


# --- streams, graphs, autocast, the compiler


@pytest.mark.gpu
@pytest.mark.parametrize("n", [500, 40000])
def test_streams(cuda: str, n: int, rng: Any) -> None:
    """On a stream behind long work, and on several at once, with nothing that waits but the end."""
    problems = [problem(rng, cuda, n=n, weights=True) for _ in range(4)]
    expected = [differentiated(topk, **given) for given in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    ballast = torch.randn(4096, 4096, device=cuda)
    torch.cuda.synchronize()
    found = []
    for stream, given in zip(streams, problems, strict=True):
        with torch.cuda.stream(stream):
            for _ in range(10):
                ballast @ ballast
            moved = {name: value + 0 for name, value in given.items()}
            found.append(differentiated(topk, **moved))
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        for name, value in other.items():
            assert torch.equal(one[name], value), name


@pytest.mark.gpu
@pytest.mark.parametrize("rich", [{}, {"weights": True, "where": True}], ids=["plain", "rich"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [500, 40000])
def test_graphs(cuda: str, n: int, dtype: Any, rich: dict[str, Any], rng: Any) -> None:
    """Forward and backward captured once, and replayed on other numbers."""
    static = problem(rng, cuda, dtype, n, **rich)
    leaves = {name: value.requires_grad_() if value.is_floating_point() else value for name, value in static.items()}
    wanted = [value for value in leaves.values() if value.requires_grad]
    cotangent = torch.randn(static["x"].shape, device=cuda).to(dtype)

    def both() -> tuple[Any, ...]:
        mask = topk(**leaves)
        return mask, *torch.autograd.grad(mask, wanted, cotangent)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(2):
        fresh = problem(rng, cuda, dtype, n, **rich)
        with torch.no_grad():
            for name, value in fresh.items():
                leaves[name].copy_(value)
        graph.replay()
        replayed = [value.clone() for value in captured]
        for one, other in zip(replayed, both(), strict=True):
            assert torch.equal(one, other)


@contextmanager
def _autocast(device: str, dtype: Any) -> Iterator[None]:
    with torch.autocast(device, dtype):
        yield


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_autocast(device: str, dtype: Any, narrow: Any, rng: Any) -> None:
    """It changes nothing: neither a dtype nor a bit."""
    given = problem(rng, device, dtype, weights=True)
    expected = differentiated(topk, **given)
    with _autocast(device, narrow):
        found = differentiated(topk, **given)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiled(cuda: str, dtype: Any, mode: str, rng: Any) -> None:
    given = problem(rng, cuda, dtype, weights=True, where=True)
    expected = differentiated(topk, **given)
    compiled = torch.compile(topk, mode=mode)
    tolerance = 2e-5 if dtype == torch.float32 else 2.0**-7
    for _ in range(3):
        found = {name: copy.copy(value) for name, value in differentiated(compiled, **given).items()}
        for name, value in expected.items():
            assert_near(found[name], value, tolerance)


# --- the other frameworks


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["topk", "log_topk", "threshold"])
def test_jax_moves_nothing(name: str, rng: Any) -> None:
    jax = pytest.importorskip("jax")
    from .libraries import BY_NAME

    library = BY_NAME["jax-gpu"]
    library.require()
    x = library.array(rng.normal(size=(3, 100)), np.float32)
    function = getattr(softk, name)
    both = jax.jit(jax.value_and_grad(lambda x: (function(x, 5.5, epsilon=0.3) * x[:, :1].sum()).sum()))
    expected = both(x)
    with jax.transfer_guard("disallow"):
        found = both(x)
    assert np.array_equal(np.asarray(found[1]), np.asarray(expected[1]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["topk", "log_topk", "threshold"])
def test_cupy_reads_nothing(name: str, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    from .libraries import BY_NAME

    library = BY_NAME["cupy"]
    library.require()
    x = library.array(rng.normal(size=(3, 100)), np.float32)
    read: list[str] = []
    monkeypatch.setattr(cupy, "asnumpy", lambda *_, **__: read.append("asnumpy"))
    monkeypatch.setattr(cupy.cuda.runtime, "deviceSynchronize", lambda *_: read.append("deviceSynchronize"))
    monkeypatch.setattr(cupy.cuda.runtime, "streamSynchronize", lambda *_: read.append("streamSynchronize"))
    out, pullback = softk.vjp(getattr(softk, name), x, 5.5, epsilon=0.3)
    pullback(cupy.ones_like(out))
    assert not read
