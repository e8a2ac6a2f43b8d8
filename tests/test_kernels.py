"""The fused kernels of the PyTorch adapter: on a CUDA device, or on the CPU, where Triton interprets them.

What they must find is what the operations find, which other tests hold to references: in float64, or, at the edges of
the contract, in float32. Long rows are cut into short segments here, so that few scores make many.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

import softk  # noqa: E402
import softk_triton  # noqa: E402
from softk.testing import check_kernel  # noqa: E402
from softk.testing.cases import EDGES, EPSILONS, SCORES, masses  # noqa: E402
from softk_triton import launch  # noqa: E402
from softk_triton.tiles import deficit  # noqa: E402

from . import closed_form  # noqa: E402
from .test_accuracy import MASK, MASS  # noqa: E402

pytestmark = pytest.mark.kernels

ROOT = Path(__file__).parent.parent
EPS = float(np.finfo(np.float32).eps)
SIZES = {
    "LONGEST": 8,
    "BLOCK": 16,
    "SHORTEST": 32,
    "SEGMENTS": 8,
    "PER_WARP": 32,
    "SAMPLE": {"SAMPLE": 16, "RUN": 4, "num_warps": 1},
}


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the kernels run."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")
        yield "cuda"
        return
    if not triton.knobs.runtime.interpret:
        pytest.skip("Triton compiles in this process, for a CUDA device")
    # The interpreter computes with NumPy.
    with softk.kernels("triton"), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield "cpu"


@pytest.fixture(params=["tiles", "segments"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How rows are taken: several to a program, or several programs to one."""
    if request.param == "segments":
        for name, size in SIZES.items():
            monkeypatch.setattr(launch, name, size)
    name: str = request.param
    return name


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that have run."""
    names: list[str] = []
    run = launch.Problem.run

    def listed(problem: Any, kernel: Any, *arrays: Any, **options: Any) -> None:
        names.append(kernel.__name__)
        run(problem, kernel, *arrays, **options)

    monkeypatch.setattr(launch.Problem, "run", listed)
    return names


def differentiated(function: Callable[..., Any], x: Any, *, seed: int = 0, **arguments: Any) -> dict[str, Any]:
    """The result and the cotangent of every floating-point tensor, for a random cotangent of the result."""
    given = {"x": x, **arguments}
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    found = function(**{**given, **leaves})
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(found.shape, generator=generator).to(found)
    return {
        "": found.detach(),
        **dict(zip(leaves, torch.autograd.grad(found, [*leaves.values()], cotangent), strict=True)),
    }


def topk(x: Any, k: Any, **arguments: Any) -> Any:
    return softk.topk(x, k, **arguments)


def assert_near(found: Any, expected: Any, tolerance: float) -> None:
    """Equal to a part of the slice's largest entry, NaN where NaN is expected."""
    found, expected = found.double().cpu(), expected.double().cpu()
    assert found.shape == expected.shape
    torch.testing.assert_close(found.isnan(), expected.isnan())
    scale = expected.nan_to_num().abs().amax(-1, keepdim=True) if expected.ndim else expected.abs()
    excess = (found - expected).nan_to_num().abs() - tolerance * scale
    assert excess.max() <= 0.0, f"off by {excess.max().item()} more than {tolerance} of {scale.max().item()}"


# --- values


@pytest.mark.parametrize("weighted", [False, True])
def test_masks_of_adversarial_scores(device: str, rows: str, weighted: bool, rng: Any) -> None:
    n, few = (24, slice(None, None, 2)) if rows == "tiles" else (60, slice(1, None, 3))
    kinds = list(SCORES) if rows == "tiles" else ["normal", "tied"]
    problems = [(score, k, epsilon) for score in kinds for k in masses(n)[few] for epsilon in EPSILONS[few]]
    x = np.stack([SCORES[score](rng, n) for score, _, _ in problems])
    weights = rng.uniform(0.3, 2.0, x.shape) if weighted else None
    share = 1.0 if weights is None else weights.mean(-1)
    values = {
        "x": x,
        "k": (np.array([k for _, k, _ in problems]) * share)[:, None],
        "epsilon": np.array([[epsilon] for _, _, epsilon in problems]),
        "weights": weights,
    }
    given = {name: torch.tensor(value).float().to(device) for name, value in values.items() if value is not None}
    wide = {name: value.double().cpu() for name, value in given.items()}
    found = topk(**given).double().cpu()
    with softk.kernels("none"):
        expected = topk(**wide)
    assert ((found >= 0.0) & (found <= 1.0)).all()
    errors, limit = (found - expected).abs().amax(-1) / EPS, torch.full((len(x),), MASK)
    if weights is not None:  # what a rounding of the sum of the weights does to the least of them
        limit = MASK + 0.5 * wide["weights"].sum(-1) / wide["weights"].amin(-1)
    worst = int((errors - limit).argmax())
    assert errors[worst] <= limit[worst], f"{problems[worst]}: off by {errors[worst]} eps"
    sums = (found if weights is None else wide["weights"] * found).sum(-1, keepdim=True)
    mass = (sums - wide["k"]).abs() / wide["k"].clamp(min=1.0) / EPS
    worst = int(mass.argmax())
    assert mass[worst] <= MASS, f"{problems[worst]}: mass off by {mass[worst]} eps"


#: The others segments do by the functions of tiles.
EDGES_OF_SEGMENTS = (
    "infinite scores",
    "NaN",
    "nothing, everything, too much",
    "ends of weights within a rounding",
    "small k",
    "fewer than k",
    "weights out of range",
    "weights of any size",
    "weights of fewer than k",
    "a weight within the rounding of k",
    "no weight next to the threshold",
)


#: Those of which each is another way through the passes; the interpreter takes half a minute for some of the others.
FEW_OF_SEGMENTS = ("nothing, everything, too much", "weights of any size", "no weight next to the threshold")
EDGES_BY_ROWS = [
    *(("tiles", edge) for edge in EDGES),
    *(
        pytest.param("segments", edge, marks=() if edge in FEW_OF_SEGMENTS else pytest.mark.full)
        for edge in EDGES_OF_SEGMENTS
    ),
]


@pytest.mark.parametrize(("rows", "edge"), EDGES_BY_ROWS, indirect=["rows"])
def test_edges_of_the_contract(device: str, rows: str, edge: str) -> None:
    case = {"k": [[2.0]], "epsilon": [[0.3]], **EDGES[edge]}
    count = len(case["x"])
    types = {"where": torch.bool}
    given = {name: torch.tensor(value, dtype=types.get(name, torch.float32)) for name, value in case.items()}
    given = {name: value.expand(count, -1) for name, value in given.items()}
    if rows == "segments":  # a few times the same scores: more than a tile has
        given |= {name: given[name].repeat(1, 8) for name in ("x", "weights", "where") if name in given}
        given["k"] = 8 * given["k"]
    given = {name: value.to(device) for name, value in given.items()}
    found = differentiated(topk, **given)
    with softk.kernels("none"):
        expected = differentiated(topk, **given)
    torch.testing.assert_close(found[""].cpu(), expected[""].cpu(), rtol=0.0, atol=8 * EPS, equal_nan=True)
    for name in given:
        if name in found and name != "epsilon":
            assert_near(found[name], expected[name], 2e-5)
    if "epsilon" in found:  # the difference of large terms, of which each is exact to rounding
        torch.testing.assert_close(found["epsilon"].isnan(), expected["epsilon"].isnan())


#: What the interpreter computes in seconds; a device takes all of them.
QUICK = ("n = 2", "no batch", "NaN", "fewer than k", "no slices")


@pytest.mark.parametrize("kernel", softk_triton.KERNELS, ids=lambda kernel: f"{kernel.primitive.name}, {kernel.part}")
def test_contract(device: str, kernel: Any) -> None:
    """The kit. Triton's interpreter is not for several threads."""
    report = check_kernel(
        kernel,
        lambda values: torch.tensor(values, device=device),
        dtypes=("bfloat16", "float32") if device == "cuda" else ("float32",),
        only=None if device == "cuda" else lambda problem: problem.name in QUICK,
        threads=4 if device == "cuda" else 1,
    )
    assert all(name.startswith("no slices") for name in report.refused)


def test_other_operators_through_the_solver(device: str, rows: str, launched: list[str], rng: Any) -> None:
    x = torch.tensor(rng.integers(-9, 9, (2, 40)) / 4.0, dtype=torch.float32, device=device)
    operators: list[Callable[[], Any]] = [
        lambda: softk.log_topk(x, 3),
        lambda: softk.threshold(x, 3.5),
        lambda: softk.quantile(x, 0.3, epsilon=0.1),
        lambda: softk.topk(x, 3, hard=True),
    ]
    for operator in operators:
        launched.clear()
        found = operator()
        assert launched
        with softk.kernels("none"):
            torch.testing.assert_close(found, operator(), rtol=4 * EPS, atol=4 * EPS)


@triton.jit
def _difference(count, k, found):  # type: ignore[no-untyped-def] # Triton looks annotations up, and knows its own alone
    place = tl.arange(0, 1)
    zero = tl.zeros([1], tl.float32)
    tl.store(found + place, deficit(tl.load(count + place), tl.load(k + place), zero, zero, None))


def test_a_difference_of_counts_beyond_float32(device: str) -> None:
    """2^24 + 1 is no float32: a kernel that subtracted floats would find 0 or 2."""
    count = torch.tensor([2**24 + 1], dtype=torch.int32, device=device)
    k, found = torch.tensor([2.0**24 + 2], device=device), torch.zeros(1, device=device)
    _difference[(1,)](count, k, found)
    assert found.item() == 1.0


# --- derivatives


@pytest.mark.parametrize("case", closed_form.CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_derivatives(device: str, rows: str, case: str, weighted: bool, rng: Any) -> None:
    problem = closed_form.problem(rng, case, batch=(2,), n=60)
    problem = {name: value.astype(np.float32) for name, value in problem.items()}
    where = rng.random((2, 60)) < 0.8
    if not weighted:
        problem["k"] /= problem["weights"].sum() / 60
        del problem["weights"]
    given = {name: torch.tensor(value, device=device) for name, value in problem.items()}
    found = differentiated(lambda x, **others: topk(x, where=torch.tensor(where, device=device), **others), **given)
    cotangent = torch.randn((2, 60), generator=torch.Generator().manual_seed(0)).numpy()
    expected = closed_form.pullback("topk", cotangent, problem, where)
    for name, value in expected.items():
        closed_form.assert_close(found[name].cpu().numpy(), value, 2e-5)


@pytest.mark.parametrize("gap", [10.0, 40.0, 200.0])
def test_derivatives_beside_a_gap(device: str, rows: str, gap: float, rng: Any) -> None:
    """A whole k between two clusters that are so many temperatures apart."""
    x = 0.1 * torch.tensor(rng.normal(size=(2, 40))).float()
    x[:, ::2] += 0.5 * gap  # half an epsilon is the temperature
    one = torch.ones((2, 1), device=device)
    given = {"x": x.to(device), "k": 20.0 * one, "epsilon": one}
    wide = {name: value.double().cpu() for name, value in given.items()}
    found, expected = differentiated(topk, **given), differentiated(topk, **wide)
    names = ("k",) if gap > 80.0 else ("x", "k", "epsilon")  # float32 has no number for the others
    for name in names:
        assert_near(found[name], expected[name], 2e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rest", [0.0, 32 * EPS])
def test_derivatives_in_k_in_a_gap_of_any_width(device: str, rows: str, weighted: bool, rest: float, rng: Any) -> None:
    """Each side's scores are as far apart as its nearest one says, however far the threshold is."""
    epsilon = np.array([[1e-2], [1e-4], [1e-6], [1e-9]])
    inside = np.arange(40) < 15
    x = np.where(inside, 1.375, 0.25) + epsilon * np.round(rng.normal(size=(4, 40)), 2)
    weights = np.round(8.0 * rng.uniform(0.5, 2.5, (4, 40))) / 8.0
    k = (weights if weighted else np.ones((4, 40)))[:, inside].sum(-1, keepdims=True) + (0.0 if weighted else rest)
    values = {"x": x, "k": k, "epsilon": epsilon, **({"weights": weights} if weighted else {})}
    given = {name: torch.tensor(value).float().to(device) for name, value in values.items()}
    wide = {name: value.double().cpu() for name, value in given.items()}
    found, expected = differentiated(topk, **given), differentiated(topk, **wide)
    assert_near(found["k"], expected["k"], 2e-5)
    if weighted:
        assert_near(found["weights"], expected["weights"], 2e-5)


def test_derivatives_with_weights_beside_a_side_that_is_far(device: str, rows: str, rng: Any) -> None:
    """The offset says how far the near side is, and the other one may be at any distance."""
    epsilon = np.array([[1e-2], [1e-5], [1e-8], [0.5]])
    x = np.where(np.arange(40) < 15, 3.0, 0.0) + epsilon * np.round(rng.normal(size=(4, 40)), 2)
    x[:, 15] = 2.0
    x[3, :3] = np.inf
    weights = np.round(8.0 * rng.uniform(0.5, 2.5, (4, 40))) / 8.0
    k = weights[:, :15].sum(-1, keepdims=True) + 0.3 * weights[:, 15:16]
    values = {"x": x, "k": k, "epsilon": epsilon, "weights": weights}
    given = {name: torch.tensor(value).float().to(device) for name, value in values.items()}
    wide = {name: value.double().cpu() for name, value in given.items()}
    found, expected = differentiated(topk, **given), differentiated(topk, **wide)
    assert_near(found["k"], expected["k"], 2e-5)
    assert_near(found["weights"], expected["weights"], 2e-5)


def test_derivatives_in_a_large_temperature(device: str, rows: str, rng: Any) -> None:
    """All scores are next to each other, and all of them far from the threshold."""
    given = {
        "x": torch.tensor(rng.normal(size=(3, 40))).float().to(device),
        "k": torch.full((3, 1), 3.3, device=device),
        "epsilon": torch.tensor([[1e2], [1e4], [1e8]], device=device),
    }
    wide = {name: value.double().cpu() for name, value in given.items()}
    found, expected = differentiated(topk, **given), differentiated(topk, **wide)
    for i in range(3):
        assert_near(found["epsilon"][i], expected["epsilon"][i], 2e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_derivatives_where_one_score_dominates(device: str, rows: str, weighted: bool, rng: Any) -> None:
    """p is 1 for one score, but for 1e-8 to 1e-30: what the others have is all there is of the derivative."""
    count, n = (60, 4) if rows == "tiles" else (6, 40)
    x = np.arange(n) * rng.uniform(0.5, 1.7, (count, 1))
    weights = rng.uniform(0.5, 2.0, (count, n)) if weighted else np.ones((count, n))
    j = rng.integers(1, 4, (count, 1))
    inside = (np.arange(n) >= n - j) * weights
    k = inside.sum(-1, keepdims=True) - np.take_along_axis(weights, n - j, -1) * rng.uniform(0.1, 0.9, (count, 1))
    values = {"x": x, "k": k, "epsilon": np.full((count, 1), 0.05), **({"weights": weights} if weighted else {})}
    given = {name: torch.tensor(value).float().to(device) for name, value in values.items()}
    wide = {name: value.double().cpu() for name, value in given.items()}
    found, expected = differentiated(topk, **given), differentiated(topk, **wide)
    assert_near(found["x"], expected["x"], 2e-5)


def test_second_derivatives_by_the_operations(device: str, rows: str, rng: Any) -> None:
    """The kernel of the rule has no derivative: where one is asked for, the operations do it."""
    x = torch.tensor(rng.normal(size=(2, 40)), dtype=torch.float32, device=device)
    u, v = (torch.tensor(rng.normal(size=(2, 40)), dtype=torch.float32, device=device) for _ in range(2))

    def second(x: Any) -> Any:
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(softk.topk(x, 7.5, epsilon=0.8), x, u.to(x), create_graph=True)
        return torch.autograd.grad(first, x, v.to(x))[0]

    assert_near(second(x), second(x.double().cpu()), 2e-5)


# --- what is given


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(device: str, rows: str, dtype: Any, launched: list[str], rng: Any) -> None:
    """Computed in float32, rounded once, and never converted in memory of its own."""
    x = torch.tensor(rng.normal(size=(2, 70)), dtype=dtype, device=device)
    found = differentiated(lambda x: softk.topk(x, 9.5, epsilon=0.5), x)
    assert launched
    with softk.kernels("none"):
        expected = differentiated(lambda x: softk.topk(x, 9.5, epsilon=0.5), x)
    for name in ("", "x"):
        assert found[name].dtype == dtype
        step = float(torch.finfo(dtype).eps) * expected[name].abs().max().item()
        torch.testing.assert_close(found[name], expected[name], rtol=0.0, atol=step)


def test_layouts(device: str, rng: Any) -> None:
    """Another axis, shared and broadcast weights, a shared `where`, a cotangent without memory of its own."""
    x = torch.tensor(rng.normal(size=(40, 2, 2)), dtype=torch.float32, device=device)
    shared = torch.tensor(rng.uniform(0.5, 2.0, (40, 1, 1)), dtype=torch.float32, device=device)
    each = torch.tensor(rng.uniform(0.5, 2.0, (40, 2, 1)), dtype=torch.float32, device=device)
    where = torch.tensor(rng.random((40, 1, 1)) < 0.8, device=device)
    k = torch.tensor(rng.uniform(3.0, 8.0, (1, 1, 2)), dtype=torch.float32, device=device)
    for weights in (shared, each):
        arguments = {"k": k, "weights": weights, "where": where, "axis": 0}
        found = differentiated(topk, x, **arguments)
        with softk.kernels("none"):
            expected = differentiated(topk, x, **arguments)
        for name, value in expected.items():
            assert_near(found[name].movedim(0, -1), value.movedim(0, -1), 2e-5)
    y = x.clone().requires_grad_()
    (softk.topk(y, 5, axis=0)[:10]).sum().backward()
    with softk.kernels("none"):
        z = x.clone().requires_grad_()
        (softk.topk(z, 5, axis=0)[:10]).sum().backward()
    assert_near(y.grad.movedim(0, -1), z.grad.movedim(0, -1), 2e-5)


def test_nothing_given_is_overwritten(device: str, rng: Any) -> None:
    given = {
        "x": torch.tensor(rng.normal(size=(2, 40)), dtype=torch.float32, device=device),
        "k": torch.tensor([[3.0], [4.0]], device=device),
        "epsilon": torch.tensor([[0.3], [0.4]], device=device),
        "weights": torch.tensor(rng.uniform(0.5, 2.0, (2, 40)), dtype=torch.float32, device=device),
    }
    copies = {name: value.clone() for name, value in given.items()}
    mask = softk.topk(given.pop("x").requires_grad_(), given["k"], epsilon=given["epsilon"], weights=given["weights"])
    mask.sum().backward()
    for name, value in given.items():
        assert torch.equal(value, copies[name])


# --- when they serve


def test_hard_masks_of_close_neighbors(device: str, rows: str, rng: Any) -> None:
    """Scores that are a rounding apart, among others far away: the reference must be the gap itself, none near it."""
    x = (1.0 + EPS * torch.tensor(rng.permutation(60).reshape(1, 60))).float().to(device)
    x[0, 7], x[0, 40] = 1e30, -1e30
    for k in (1, 7, 30):
        mask = softk.topk(x, k, hard=True, epsilon=10.0)
        assert torch.equal(mask > 0.5, x > x.sort(descending=True).values[:, k : k + 1])


def test_the_gap_beyond_weights_within_the_rounding_of_k(device: str, rows: str) -> None:
    """Two scores between 4 and 1 weigh less than k is rounded by: the gap goes on to the one below them."""
    x, weights = (torch.tensor(value, device=device) for value in ([5.0, 4, 3, 2, 1] * 8, [1, 1, 1e-8, 1e-8, 1.0] * 8))
    threshold = softk.threshold(x, torch.tensor(16.0, device=device), weights=weights, epsilon=1e-3)
    assert threshold.item() == pytest.approx(2.5, abs=1e-3)


def test_which_calls_are_served(device: str, launched: list[str], rng: Any) -> None:
    x = torch.tensor(rng.normal(size=(2, 40)), dtype=torch.float32, device=device)

    def kernels(function: Callable[[], Any]) -> list[str]:
        launched.clear()
        function()
        return list(launched)

    def backward(create_graph: bool) -> None:
        y = x.clone().requires_grad_()
        torch.autograd.grad(softk.topk(y, 3).square().sum(), y, create_graph=create_graph)

    assert kernels(lambda: softk.topk(x, 3)) == ["solve_tile"]
    assert kernels(lambda: backward(False)) == ["solve_tile", "pull_tile"]
    assert kernels(lambda: backward(True)) == ["solve_tile"]
    assert kernels(lambda: softk.topk(x.double(), 3)) == []
    assert kernels(lambda: softk.topk(x[:, :0], 0)) == []
    assert kernels(lambda: softk.topk(x[:0], 3)) == []
    grad = torch.func.grad(lambda x: softk.topk(x, 3).square().sum())
    assert kernels(lambda: grad(x))[0] == "solve_tile"
    long = torch.zeros((1, launch.LONGEST + 1), device=device)
    assert isinstance(launch.problem((long, torch.ones(()), torch.ones(()), None, None)), launch.Segments)
    full = long[:, :-1]
    assert isinstance(launch.problem((full, torch.ones(()), torch.ones(()), None, None)), launch.Tiles)


def _hessian_product(x: Any) -> Any:
    """Forward over reverse, by dual numbers."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x[0].clone().requires_grad_(), x[1])
        (first,) = torch.autograd.grad((softk.topk(dual, 5.5, epsilon=0.6) * x[2]).sum(), dual)
        return forward_ad.unpack_dual(first).tangent


def _batched(x: Any) -> Any:
    """Several cotangents at once."""
    y = x[0].clone().requires_grad_()
    return torch.autograd.grad(softk.topk(y, 5.5, epsilon=0.6), y, x, is_grads_batched=True)[0]


def _loss(x: Any) -> Any:
    return (softk.topk(x, 5.5, epsilon=0.6) * torch.linspace(-1.0, 1.0, 40, device=x.device).sin()).sum()


AROUND: dict[str, Callable[[Any], Any]] = {
    "vmap of grad": torch.func.vmap(torch.func.grad(_loss)),
    "vmap": torch.func.vmap(_loss),
    "jvp": lambda x: torch.func.jvp(_loss, (x[0],), (x[1],))[1],
    "hessian": lambda x: torch.func.hessian(_loss)(x[0]).sum(0),
    "forward over reverse": _hessian_product,
    "batched cotangents": _batched,
    "jit.trace": lambda x: torch.jit.trace(lambda x: softk.topk(x, 5.5), (x,), check_trace=False)(1.0 - x),
    "make_fx": lambda x: make_fx(lambda x: softk.topk(x, 5.5))(x)(1.0 - x),
    "negative views": lambda x: softk.topk(torch._neg_view(x), 5.5),
    "inference mode": torch.inference_mode()(lambda x: softk.topk(x, 5.5)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # also in torch's own forward mode
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", AROUND)
def test_around_the_kernels(device: str, name: str, rng: Any) -> None:
    x = torch.tensor(rng.normal(size=(3, 2, 40)), dtype=torch.float32, device=device)
    found = AROUND[name](x)
    with softk.kernels("none"):
        assert_near(found, AROUND[name](x), 2e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_around_the_kernels(device: str, launched: list[str], rng: Any) -> None:
    """The compiler asks beforehand of what shapes the solver's results are: the kernel's must be those."""
    x = torch.tensor(rng.normal(size=(3, 40)), dtype=torch.float32, device=device)

    def both(x: Any) -> Any:
        return softk.topk(x, 3.5) + softk.threshold(x, 2, keepdims=True)

    found = torch.compile(both)(x)
    assert launched
    with softk.kernels("none"):
        assert_near(found, both(x), 2e-5)


def test_where_kernels_do_not_run(device: str, launched: list[str], rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said once, and the operations do it."""

    class Broken:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("Failed to find C compiler")

    x = torch.tensor(rng.normal(size=(3, 40)), dtype=torch.float32, device=device)
    expected = softk.topk(x, 5)
    assert launched
    launched.clear()
    monkeypatch.setattr("softk_triton.tiles.probe", Broken())
    softk_triton._absent.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="Failed to find C compiler"):
            assert_near(softk.topk(x, 5), expected, 2e-5)
        softk.topk(x, 5)
    finally:
        softk_triton._absent.cache_clear()
    assert not launched


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.full)])
def test_they_compile_for_a_device(capability: int) -> None:
    """To machine code, with no device there; and nearly everything stays in registers, if they are not limited."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    command = [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), str(capability)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    compiled = {line.split(":")[0] for line in lines}
    assert {"solve_tile", "pull_tile", "count", "sweep_rows", "mask_rows", "sum_rows", "pull_rows"} <= compiled
    for line in lines:
        if "maxnreg" not in line:
            assert int(line.split("stack=")[1]) <= 32, line


# --- on a device alone


@pytest.mark.gpu
@pytest.mark.parametrize("rich", [False, True])
@pytest.mark.parametrize("n", [10, 127, 1000, 16384, 32768, 40000, 1_000_000])
def test_what_the_cpu_finds(n: int, rich: bool, launched: list[str], rng: Any) -> None:
    """Found in float64 there, from the same numbers; and bit by bit the same when asked again."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    values = {
        "x": rng.normal(size=(3, n)),
        "k": rng.uniform(1.0, n / 2, (3, 1)),
        "epsilon": rng.uniform(0.1, 1.0, (3, 1)),
        **({"weights": rng.uniform(0.5, 2.0, (3, n))} if rich else {}),
    }
    given = {name: torch.tensor(value).float().cuda() for name, value in values.items()}
    where = {"where": torch.tensor(rng.random((3, n)) < 0.9)} if rich else {}
    found = differentiated(topk, **given, **{name: value.cuda() for name, value in where.items()})
    assert launched
    again = differentiated(topk, **given, **{name: value.cuda() for name, value in where.items()})
    expected = differentiated(topk, **{name: value.double().cpu() for name, value in given.items()}, **where)
    assert (found[""].cpu().double() - expected[""]).abs().max() <= MASK * EPS
    for name in values:
        assert_near(found[name], expected[name], 2e-5)
        assert torch.equal(found[name], again[name])


@pytest.mark.gpu
def test_more_scores_than_float32_counts() -> None:
    """2^24 + 8 scores of two levels, and more than 2^24 of the upper one: a count in float32 would be off."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    x = torch.ones(1, 2**24 + 8, device="cuda")
    x[:, ::3_000_000] = 0.0  # six, so that the number of the others is a float32
    above = int(x.double().sum().item())
    mask = softk.topk(x, above, epsilon=0.02)
    assert mask.double().sum().item() == pytest.approx(above, abs=MASS * EPS * above)
    assert mask[0, 1].item() == 1.0
    assert mask[0, 0].item() < 1e-6
