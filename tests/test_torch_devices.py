"""What must hold on any device of PyTorch. Without a GPU the meta device, which has no values, stands in for one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import softk
from softk import neighbors

from .torch_cases import CASES, PLANS, Case, cotangent, derivatives, tensors

torch = pytest.importorskip("torch", reason="torch is not installed")
tree_leaves = pytest.importorskip("torch.utils._pytree").tree_leaves
TorchDispatchMode = pytest.importorskip("torch.utils._python_dispatch").TorchDispatchMode

ALL = {**CASES, **PLANS}


#: Operations that read a value for the host, which would wait for the device.
LOOKS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_linalg_check_errors", "equal", "_unique2"}


class Foreign(TorchDispatchMode):
    """Notes every operation that is given or returns a tensor of another device, or looks at a value."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device).type
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        touched = [value for value in tree_leaves((args, kwargs, out)) if isinstance(value, torch.Tensor)]
        self.seen += [str(func) for value in touched if value.device.type != self.device]
        self.seen += [str(func)] * (func.overloadpacket.__name__ in LOOKS)
        return out


ELSEWHERE = ["meta", pytest.param("cuda", marks=pytest.mark.gpu)]


def require(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


# --- everything is where the scores are


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("device", ELSEWHERE)
def test_nothing_is_made_or_read_elsewhere(device: str, name: str, dtype: str, rng: Any) -> None:
    """With both derivatives. On the meta device a look at a value raises as well."""
    require(device)
    case = ALL[name]
    arguments = tensors(case.values(rng), device, getattr(torch, dtype))
    u = cotangent(case, arguments, rng)
    with Foreign(device) as foreign:
        out = case(arguments)
        moving = [value for value in arguments.values() if value.requires_grad]
        first = torch.autograd.grad(out, moving, u, create_graph=True)
        torch.autograd.grad([value for value in first if value.requires_grad], moving, first, allow_unused=True)
        with torch.no_grad():
            case(arguments)
    assert foreign.seen == []


@pytest.mark.parametrize("d", [3, 64], ids=["differences", "products"])
@pytest.mark.parametrize("device", ELSEWHERE)
def test_neighbors_are_where_the_keys_are(device: str, d: int) -> None:
    require(device)
    points = torch.ones(9, d, device=device, requires_grad=True)
    labels = torch.arange(9, device=device) % 3
    with Foreign(device) as foreign:
        found = neighbors.loss(points, points, labels, labels, 3, exclude=torch.arange(9, device=device))
        torch.autograd.grad(found + neighbors.weights(points, points, 2.5).sum(), points)
    assert foreign.seen == []


@pytest.mark.parametrize("device", ELSEWHERE)
def test_a_foreign_tensor_or_a_look_would_be_noticed(device: str) -> None:
    require(device)
    x = torch.ones(3, device=device)
    with Foreign(device) as foreign:
        x + torch.tensor(1.0)
    assert any("add" in name for name in foreign.seen)
    with Foreign(device) as foreign:
        torch.linalg.solve(torch.ones(1, 1, device=device), x[None])
    assert foreign.seen == ["aten._linalg_check_errors.default"]


@pytest.mark.parametrize("look", [bool, int, float, torch.nonzero, lambda x: x[x > 0]])
def test_a_look_at_a_value_would_be_noticed(look: Any) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        look(torch.ones((), device="meta"))


# --- the values


@pytest.mark.parametrize("n", [10, 1000, 10000, pytest.param(100000, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_agrees_with_numpy(device: str, dtype: str, name: str, n: int, rng: Any) -> None:
    """In float64, at the numbers that the tensors hold; the derivatives relative to their largest entry."""
    case, kind = CASES[name], getattr(torch, dtype)
    values = case.values(rng, (2,), n)
    arguments = tensors(values, device, kind)
    u = cotangent(case, arguments, rng)
    out, *found = derivatives(case, arguments, u)
    exact = {key: value.detach().double().cpu().numpy() for key, value in arguments.items() if value.requires_grad}
    exact |= {key: value for key, value in values.items() if value.dtype == bool}
    wanted, pulled = reference(case, exact, u.double().cpu().numpy())
    eps = torch.finfo(kind).eps
    near(out, wanted, 64.0 * eps)
    for key, value in zip(pulled, found, strict=True):
        near(value, pulled[key], 1024.0 * eps)


def reference(case: Case, exact: dict[str, np.ndarray], u: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    given = {**case.options, **exact}
    out, pullback = softk.vjp(case.function, given.pop("x"), given.pop("k", case.k), **given)
    pulled = pullback(u)
    return out, {name: pulled[name] for name in ("x", "k", "epsilon", "weights") if name in pulled}


def near(found: Any, wanted: np.ndarray, tolerance: float) -> None:
    scale = max(1.0, float(np.max(np.abs(wanted), initial=0.0, where=np.isfinite(wanted))))
    np.testing.assert_allclose(found.double().cpu().numpy(), wanted, rtol=0.0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
def test_same_input_same_output(device: str, name: str, dtype: str, rng: Any) -> None:
    """Bit by bit."""
    case = ALL[name]
    arguments = tensors(case.values(rng, (5,), 60 if name in PLANS else 3000), device, getattr(torch, dtype))
    u = cotangent(case, arguments, rng)
    first = derivatives(case, arguments, u)
    for _ in range(3):
        for one, two in zip(first, derivatives(case, arguments, u), strict=True):
            assert torch.equal(one, two)


# --- autocast


@pytest.mark.parametrize("lower", ["float16", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ALL)
def test_autocast_changes_nothing(device: str, name: str, dtype: str, lower: str, rng: Any) -> None:
    """Neither dtypes nor values, whether the backward pass is run within it or outside."""
    case = ALL[name]
    arguments = tensors(case.values(rng), device, getattr(torch, dtype))
    u = cotangent(case, arguments, rng)
    plain = derivatives(case, arguments, u)
    with torch.autocast(device, dtype=getattr(torch, lower)):
        inside = derivatives(case, arguments, u)
        out = case(arguments)
    moving = [value for value in arguments.values() if value.requires_grad]
    for found in (inside, (out.detach(), *torch.autograd.grad(out, moving, u))):
        for one, two in zip(found, plain, strict=True):
            assert one.dtype == two.dtype
            assert torch.equal(one, two)


@pytest.mark.parametrize("lower", ["float16", "bfloat16"])
def test_autocast_leaves_distances_alone(device: str, lower: str, rng: Any) -> None:
    """Of points far from the origin, the distances are the small differences of large products."""
    points = torch.asarray(rng.standard_normal((20, 64)) + 10.0).float().to(device).requires_grad_()
    labels = torch.arange(20, device=device) % 3
    every = torch.arange(20, device=device)

    def found() -> tuple[Any, Any]:
        value = neighbors.loss(points, points, labels, labels, 3, exclude=every, epsilon=20.0)
        (gradient,) = torch.autograd.grad(value, points)
        mask = neighbors.weights(points, points, 3, epsilon=20.0)
        probabilities = neighbors.class_probabilities(points, points, labels, 3, num_classes=3, epsilon=20.0)
        return value.detach(), gradient, mask.detach(), probabilities.detach()

    plain = found()
    with torch.autocast(device, dtype=getattr(torch, lower)):
        lowered = found()
    for one, two in zip(lowered, plain, strict=True):
        torch.testing.assert_close(one, two)


# --- the modules


@pytest.mark.parametrize("hard", [False, True])
def test_module_moves_to_the_device(device: str, hard: bool, rng: Any) -> None:
    softk_torch = pytest.importorskip("softk_torch")
    layer = softk_torch.TopK(torch.nn.Parameter(torch.tensor(2.0)), epsilon=torch.nn.Parameter(torch.tensor(0.4)))
    layer = softk_torch.TopK(2, epsilon=0.4, hard=True) if hard else layer.to(device)
    x = torch.asarray(rng.standard_normal((3, 7))).float().to(device).requires_grad_()
    out = layer(x)
    u = torch.asarray(rng.standard_normal((3, 7))).to(out)
    out.backward(u)
    wanted, pullback = softk.vjp(
        softk.topk, x.detach().double().cpu().numpy(), np.asarray(2.0), epsilon=np.asarray(np.float32(0.4), float)
    )
    pulled = pullback(u.double().cpu().numpy())
    assert out.device.type == device
    near(x.grad, pulled["x"], 1e-5)
    if hard:
        assert torch.equal(out.detach().sum(-1).cpu(), torch.full((3,), 2.0))
    else:
        near(out.detach(), wanted, 1e-5)
        near(layer.k.grad, pulled["k"], 1e-5)
        near(layer.epsilon.grad, pulled["epsilon"], 1e-5)
