"""What only CUDA has: nothing waits for the device, nothing leaves it, streams are kept apart, graphs are replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import softk
from softk import neighbors

from .libraries import BY_NAME
from .torch_cases import CASES, MOVING, PLANS, Case, cotangent, derivatives, tensors

torch = pytest.importorskip("torch", reason="torch is not installed")

pytestmark = pytest.mark.gpu

ALL = {**CASES, **PLANS}


@pytest.fixture
def cuda() -> str:
    """PyTorch's device."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return "cuda"


def values_of(case: Case, rng: Any) -> dict[str, np.ndarray]:
    return case.values(rng, (4,), 40 if case in PLANS.values() else 2000)


def arguments_of(case: Case, device: str, rng: Any, dtype: Any = torch.float32) -> dict[str, Any]:
    return tensors(values_of(case, rng), device, dtype)


def refill(arguments: dict[str, Any], values: dict[str, np.ndarray]) -> None:
    """Other values in the same memory."""
    with torch.no_grad():
        for name, tensor in arguments.items():
            tensor.copy_(torch.asarray(values[name]))


def assert_near(found: Any, wanted: Any, tolerance: float = 2e-5) -> None:
    """What the same operations find, but for the order of sums; infinite where the other is."""
    for one, two in zip(found, wanted, strict=True):
        allowed = max(tolerance, 4.0 * torch.finfo(two.dtype).eps)
        torch.testing.assert_close(one, two, rtol=allowed, atol=allowed)


# --- nothing waits


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


NO_NOTICE = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")


@NO_NOTICE
@pytest.mark.parametrize(
    "wait",
    [lambda x: x.sum().item(), lambda x: x[x > 0.0], lambda x: x.cpu(), lambda x: torch.tensor(2.0, device=x.device)],
    ids=["item", "boolean mask", "copy", "number"],
)
def test_waiting_would_be_noticed(wait: Callable[[Any], Any], cuda: str) -> None:
    x = torch.ones(5, device=cuda)
    wait(x)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        wait(x)


@NO_NOTICE
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
def test_nothing_waits(name: str, dtype: str, cuda: str, rng: Any) -> None:
    """Forward, backward, and twice; after a first call, which loads kernels."""
    case = ALL[name]
    arguments = arguments_of(case, cuda, rng, getattr(torch, dtype))
    u = cotangent(case, arguments, rng)

    def twice() -> Any:
        moving = [value for value in arguments.values() if value.requires_grad]
        first = torch.autograd.grad(case(arguments), moving, u, create_graph=True)
        with torch.no_grad():
            case(arguments)
        return torch.autograd.grad([value for value in first if value.requires_grad], moving, first, allow_unused=True)

    twice()
    with waiting_is_an_error():
        twice()


@NO_NOTICE
@pytest.mark.parametrize("d", [3, 64], ids=["differences", "products"])
def test_neighbors_do_not_wait(d: int, cuda: str) -> None:
    points = torch.rand(50, d, device=cuda, requires_grad=True)
    labels = torch.arange(50, device=cuda) % 3
    every = torch.arange(50, device=cuda)

    def run() -> Any:
        loss = neighbors.loss(points, points, labels, labels, 3, exclude=every)
        return torch.autograd.grad(loss + neighbors.weights(points, points, 2.5).square().sum(), points)

    run()
    with waiting_is_an_error():
        run()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_copied_between_devices(name: str, cuda: str, rng: Any) -> None:
    """As the profiler sees it, below PyTorch's operations."""
    case = CASES[name]
    arguments = arguments_of(case, cuda, rng)
    u = cotangent(case, arguments, rng)
    derivatives(case, arguments, u)
    if not transfers(lambda: u.cpu()):
        pytest.skip("the profiler sees no copies here")
    assert transfers(lambda: derivatives(case, arguments, u)) == []


def transfers(f: Callable[[], Any]) -> list[str]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as seen:
        f()
        torch.cuda.synchronize()
    return [event.key for event in seen.key_averages() if "HtoD" in event.key or "DtoH" in event.key]


# --- streams


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_streams(name: str, count: int, cuda: str, rng: Any) -> None:
    """On streams of their own, behind a kernel that takes long: until it ends the scores are NaN."""
    case = ALL[name]
    values = [values_of(case, rng) for _ in range(count)]
    given = [tensors(value, cuda, torch.float32) for value in values]
    u = cotangent(case, given[0], rng)
    wanted = [derivatives(case, arguments, u) for arguments in given]
    empty = [
        {key: torch.full_like(value, True if value.dtype == torch.bool else torch.nan) for key, value in one.items()}
        for one in given
    ]
    for one in empty:
        for key in MOVING:
            if key in one:
                one[key].requires_grad_()
    streams = [torch.cuda.Stream() for _ in range(count)]
    torch.cuda.synchronize()
    found = []
    for stream, arguments, late in zip(streams, empty, given, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # a tenth of a second
            with torch.no_grad():
                for key, value in arguments.items():
                    value.copy_(late[key])
            found.append(derivatives(case, arguments, u))
    torch.cuda.synchronize()
    for one, two in zip(found, wanted, strict=True):
        assert_near(one, two)


# --- CUDA graphs


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ALL)
def test_replayed_graph(name: str, dtype: str, cuda: str, rng: Any) -> None:
    """Captured once, forward and backward, and right for other values."""
    case = ALL[name]
    arguments = arguments_of(case, cuda, rng, getattr(torch, dtype))
    u = cotangent(case, arguments, rng)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            derivatives(case, arguments, u)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = derivatives(case, arguments, u)
    previous = None
    for _ in range(3):
        refill(arguments, values_of(case, rng))
        graph.replay()
        found = tuple(value.clone() for value in captured)
        assert_near(found, derivatives(case, arguments, u))
        assert previous is None or not torch.equal(previous, found[0])
        previous = found[0]


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # torch's own advice on how it captures
@pytest.mark.parametrize("hard", [False, True])
def test_graphed_callable(hard: bool, cuda: str, rng: Any) -> None:
    def f(x: Any, epsilon: Any) -> Any:
        return softk.topk(x, 3, epsilon=epsilon, hard=hard)

    case = Case(softk.topk, ("epsilon",), k=3, options={"hard": hard})
    sample = arguments_of(case, cuda, rng)
    graphed = torch.cuda.make_graphed_callables(f, (sample["x"], sample["epsilon"]))
    for _ in range(3):
        arguments = arguments_of(case, cuda, rng)
        given = tuple(arguments.values())
        out = graphed(*given)
        u = torch.tensor(rng.standard_normal(out.shape)).to(out)
        assert_near((out, *torch.autograd.grad(out, given, u)), derivatives(case, arguments, u))


# --- torch.compile


@pytest.fixture
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["topk", "everything", "hard", "log", "threshold, everything"])
def test_compiled(name: str, mode: str, cuda: str, rng: Any) -> None:
    """Often enough for graphs to be recorded and replayed; part of a larger function, which is fused around it."""
    case = CASES[name]

    def f(arguments: dict[str, Any]) -> Any:
        return 2.0 * case({**arguments, "x": arguments["x"].sin()})

    compiled = torch.compile(f, mode=mode, fullgraph=True)
    for _ in range(4):
        arguments = arguments_of(case, cuda, rng)
        moving = [arguments[key] for key in MOVING if key in arguments]
        plain = f(arguments)
        u = torch.tensor(rng.standard_normal(plain.shape)).to(plain)
        torch.compiler.cudagraph_mark_step_begin()
        out = compiled(arguments)
        assert_near((out, *torch.autograd.grad(out, moving, u)), (plain, *torch.autograd.grad(plain, moving, u)), 2e-4)


# --- memory


@pytest.mark.parametrize("name", ["topk", "threshold", "weights"])
def test_what_is_kept_for_backward(name: str, cuda: str, rng: Any) -> None:
    """The result and a few numbers a slice: the scores are the user's own."""
    case = CASES[name]
    arguments = tensors(case.values(rng, (4,), 100_000), cuda, torch.float32)

    def requested() -> int:
        torch.cuda.synchronize()
        found: int = torch.cuda.memory_stats()["requested_bytes.all.current"]
        return found

    before = requested()
    out = case(arguments)
    assert requested() - before <= out.nbytes + arguments["x"].nbytes // 8


# --- CuPy


def test_cupy_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, rng: Any) -> None:
    """Forward and backward."""
    library = BY_NAME["cupy"]
    library.require()
    cupy = pytest.importorskip("cupy")
    seen: list[str] = []
    for name in ("get", "item", "tolist", "__bool__", "__int__", "__float__"):
        watch(monkeypatch, cupy.ndarray, name, seen)
    for name, case in CASES.items():
        given: dict[str, Any] = {**case.options}
        given |= {key: library.array(value) for key, value in case.values(rng).items()}
        out, pullback = softk.vjp(case.function, given.pop("x"), given.pop("k", case.k), **given)
        pullback(cupy.ones_like(out))
        assert seen == [], name
    assert bool(cupy.ones(()))
    assert "__bool__" in seen


def watch(monkeypatch: pytest.MonkeyPatch, kind: type, name: str, seen: list[str]) -> None:
    """Notes every call of a method."""
    plain = getattr(kind, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return plain(*args, **kwargs)

    monkeypatch.setattr(kind, name, noted)
