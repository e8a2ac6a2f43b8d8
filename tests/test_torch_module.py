"""`softk_torch.TopK`, the operator as a layer: what it computes, what it learns and how it is stored."""

from __future__ import annotations

import copy
import io
import math
import re
from typing import Any

import numpy as np
import pytest

import softk

from . import closed_form
from .closed_form import assert_close, host

torch = pytest.importorskip("torch")
softk_torch = pytest.importorskip("softk_torch")

pytestmark = pytest.mark.usefixtures("on_device")

TopK = softk_torch.TopK


def parameter(value: Any) -> Any:
    return torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["largest", "smallest"])
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("hard", [False, True])
def test_numbers(hard: bool, dim: int, mode: str, rng: Any) -> None:
    x = torch.tensor(rng.standard_normal((4, 5)))
    layer = TopK(2, dim=dim, mode=mode, epsilon=0.6, hard=hard)
    assert list(layer.parameters()) == []
    expected = softk.topk(x, 2, axis=dim, mode=mode, epsilon=0.6, hard=hard)
    assert torch.equal(layer(x), expected)
    assert torch.equal(expected.sum(dim).round(decimals=9), torch.full(expected.sum(dim).shape, 2.0).double())


def test_default_epsilon_is_that_of_the_function(rng: Any) -> None:
    x = torch.tensor(rng.standard_normal((4, 5)))
    assert torch.equal(TopK(2)(x), softk.topk(x, 2))


@pytest.mark.parametrize("per_row", [False, True])
def test_learned_k_and_epsilon_get_their_gradients(per_row: bool, rng: Any) -> None:
    x = rng.standard_normal((3, 7))
    k, epsilon = ([[1.7], [3.2], [4.9]], [[0.4], [0.7], [1.2]]) if per_row else (2.6, 0.8)
    layer = TopK(parameter(k), epsilon=parameter(epsilon))
    assert {name for name, _ in layer.named_parameters()} == {"k", "epsilon"}
    u = rng.standard_normal((3, 7))
    leaf = torch.tensor(x, requires_grad=True)
    layer(leaf).backward(torch.tensor(u))
    expected = closed_form.pullback("topk", u, {"x": x, "k": np.asarray(k), "epsilon": np.asarray(epsilon)})
    assert_close(leaf.grad, expected["x"])
    assert_close(layer.k.grad, expected["k"])
    assert_close(layer.epsilon.grad, expected["epsilon"])


def test_weights_and_where(rng: Any) -> None:
    values = closed_form.problem(rng, batch=(3,))
    where = np.ones((3, 7), bool)
    where[0, 2] = where[2, 5] = False
    layer = TopK(parameter(2.4), epsilon=parameter(0.7))
    weights = torch.tensor(values["weights"], requires_grad=True)
    out = layer(torch.tensor(values["x"]), weights=weights, where=torch.tensor(where))
    u = rng.standard_normal((3, 7))
    out.backward(torch.tensor(u))
    given = {**values, "k": np.asarray(2.4), "epsilon": np.asarray(0.7)}
    expected = closed_form.pullback("topk", u * where, given, where)
    assert_close(layer.k.grad, expected["k"])
    assert_close(layer.epsilon.grad, expected["epsilon"])
    assert_close(weights.grad, expected["weights"])


@pytest.mark.parametrize(("k", "selected"), [(-0.5, 0.0), (9.0, 7.0)])
def test_learned_k_is_held_within_its_range(k: float, selected: float, rng: Any) -> None:
    layer = TopK(parameter(k))
    out = layer(torch.tensor(rng.standard_normal((3, 7))))
    assert torch.equal(out.sum(-1), torch.full((3,), selected).double())
    out.sum().backward()
    assert layer.k.grad == 0


def test_hard_when_it_evaluates(rng: Any) -> None:
    """Soft while it trains; exactly k when it evaluates, also of a learned k, with the soft derivative."""
    x = torch.tensor(rng.standard_normal((4, 5)))
    layer = TopK(parameter(2.7), epsilon=0.6, hard="eval")
    assert torch.equal(layer(x), softk.topk(x, 2.7, epsilon=0.6))
    layer.eval()
    found = layer(x)
    assert torch.equal(found, softk.topk(x, 3, epsilon=0.6, hard=True))
    found[:, 0].sum().backward()
    own = parameter(3.0)
    softk.topk(x, own, epsilon=0.6)[:, 0].sum().backward()
    assert_close(layer.k.grad, own.grad)
    assert float(own.grad.abs()) > 0.01
    assert layer.train()(x).unique().numel() > 2
    assert repr(layer) == "TopK(k=2.7 (learned), dim=-1, mode='largest', epsilon=0.6, hard='eval')"
    with pytest.raises(ValueError, match="hard=True does not support weights"):
        layer.eval()(x, weights=torch.ones_like(x))
    with pytest.raises(ValueError, match=r"k must be a whole number with hard='eval', got 2.5"):
        TopK(2.5, hard="eval")
    with pytest.raises(ValueError, match=r"dim must be from -2 to 1 for x of 2 axes, got 2"):
        TopK(parameter(2.0), dim=2)(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"dim must be from -2 to 1 for noise of 2 axes, got -3"):
        softk_torch.SubsetSampler(2, dim=-3)(torch.zeros(4), torch.rand(3, 4))
    with pytest.raises(
        TypeError, match=r"epsilon must be .*, got softk.schedules.Schedule; call it, as in epsilon\(step\)"
    ):
        TopK(2, epsilon=softk.schedules.linear(1.0, 0.1, steps=10))
    with pytest.raises(TypeError, match="hard must be True, False or 'eval', got 'evaluating'"):
        TopK(2, hard="evaluating")


def test_several_axes(rng: Any) -> None:
    """One budget over a batch; a learned k is clamped to the number of all scores."""
    x = torch.tensor(rng.standard_normal((2, 4, 5)))
    assert torch.equal(TopK(7.5, dim=(0, 2))(x), softk.topk(x, 7.5, axis=(0, 2)))
    assert torch.equal(TopK(parameter(77.0), dim=(-1, 0, 1))(x), torch.ones_like(x))


def test_hard_mask_learns_by_the_soft_one(rng: Any) -> None:
    x = rng.standard_normal((3, 7))
    layer = TopK(parameter(3.0), epsilon=parameter(0.7), hard=True)
    out = layer(torch.tensor(x))
    assert set(out.detach().unique().tolist()) == {0.0, 1.0}
    u = rng.standard_normal((3, 7))
    out.backward(torch.tensor(u))
    expected = closed_form.pullback("topk", u, {"x": x, "k": np.asarray(3.0), "epsilon": np.asarray(0.7)})
    assert_close(layer.k.grad, expected["k"])
    assert_close(layer.epsilon.grad, expected["epsilon"])


def test_state_is_stored_and_restored(rng: Any) -> None:
    layer = TopK(parameter(2.6), epsilon=parameter([[0.4], [0.9]]))
    state = layer.state_dict()
    assert set(state) == {"k", "epsilon"}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = TopK(parameter(1.0), epsilon=parameter([[1.0], [1.0]]))
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.tensor(rng.standard_normal((2, 7)))
    assert torch.equal(other(x), layer(x))
    assert TopK(2, epsilon=0.5).state_dict() == {}
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), layer(x))
    assert copied.k is not layer.k


@pytest.mark.parametrize("kind", [softk_torch.TopK, softk_torch.TopKAttention])
def test_tensors_that_are_not_parameters_are_buffers(kind: Any, rng: Any) -> None:
    """They are stored and moved with the module, and nobody learns them."""
    layer = kind(torch.tensor(2.5), epsilon=torch.tensor([[0.4], [0.9]]))
    assert [name for name, _ in layer.named_buffers()] == ["k", "epsilon"]
    assert list(layer.parameters()) == []
    assert set(layer.state_dict()) == {"k", "epsilon"}
    assert layer.double().k.dtype == layer.epsilon.dtype == torch.float64
    assert layer.to("meta").epsilon.is_meta
    other = kind(torch.tensor(1.0), epsilon=torch.nn.Parameter(torch.ones(2, 1)))
    assert {name for name, _ in other.named_parameters()} == {"epsilon"}
    layer = kind(torch.tensor(2.5), epsilon=torch.tensor([[0.4], [0.9]]))
    other.load_state_dict(layer.state_dict())
    x = torch.tensor(rng.standard_normal((2, 7)))
    given = (x,) if kind is TopK else (x, x, x)
    assert torch.equal(other(*given), layer(*given))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 2, "epsilon": 0}, ValueError, "epsilon must be a positive finite number"),
        ({"k": 2, "epsilon": math.inf}, ValueError, "epsilon must be a positive finite number"),
        ({"k": torch.ones(()), "epsilon": -1.0}, ValueError, "epsilon must be a positive finite number"),
        ({"k": -1}, ValueError, "k must be at least 0 and finite .*, got -1"),
        ({"k": math.nan}, ValueError, "k must be at least 0 and finite .*, got nan"),
        ({"k": "2"}, TypeError, "k must be a number or an array"),
        ({"k": 2, "epsilon": None}, TypeError, "epsilon must be a number or an array"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", [softk_torch.TopK, softk_torch.TopKAttention])
def test_numbers_are_checked_at_once(kind: Any, arguments: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        kind(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(2.5, hard=True), "k must be a whole number with hard=True, got 2.5"),
        (lambda: TopK(2, mode="top"), "mode must be 'largest' or 'smallest', got 'top'"),
        (lambda: softk_torch.TopKAttention(2, scale=math.nan), "scale must be a finite number, got nan"),
    ],
    ids=["hard", "mode", "scale"],
)
def test_other_arguments_are_checked_at_once(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_buffer_as_k(rng: Any) -> None:
    """A k that moves with the module but is not learned."""

    class Budget(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("k", torch.tensor([[1.0], [2.5]], dtype=torch.float64))
            self.select = TopK(1.0, epsilon=0.6)

        def forward(self, x: Any) -> Any:
            self.select.k = self.k
            return self.select(x)

    x = rng.standard_normal((2, 7))
    expected = closed_form.topk(x, [[1.0], [2.5]], 0.6).astype(float)
    assert_close(Budget()(torch.tensor(x)), expected, 1e-14)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (lambda: TopK(2), "TopK(k=2, dim=-1, mode='largest', epsilon=0.1)"),
        (lambda: TopK(2.5, dim=0, mode="smallest", epsilon=1.5), "TopK(k=2.5, dim=0, mode='smallest', epsilon=1.5)"),
        (lambda: TopK(2, hard=True), "TopK(k=2, dim=-1, mode='largest', epsilon=0.1, hard=True)"),
        (
            lambda: TopK(parameter(2.0), epsilon=parameter([[0.5], [0.5]])),
            "TopK(k=2 (learned), dim=-1, mode='largest', epsilon=learned, shape (2, 1))",
        ),
        (
            lambda: TopK(torch.tensor(2.0), epsilon=torch.ones(2, 1)),
            "TopK(k=2, dim=-1, mode='largest', epsilon=tensor, shape (2, 1))",
        ),
        (lambda: TopK(parameter(2.0)).to("meta"), "TopK(k=learned, shape (), dim=-1, mode='largest', epsilon=0.1)"),
    ],
    ids=["plain", "options", "hard", "learned", "buffers", "meta"],
)
def test_repr(layer: Any, text: str) -> None:
    assert repr(layer()) == text


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_moved_to_another_dtype(dtype: str, rng: Any) -> None:
    kind = getattr(torch, dtype)
    layer = TopK(parameter(2.5), epsilon=parameter(0.75)).to(kind)
    assert (layer.k.dtype, layer.epsilon.dtype) == (kind, kind)
    x = torch.tensor(rng.standard_normal((3, 7))).to(kind).requires_grad_()
    out = layer(x)
    assert out.dtype == kind
    u = torch.tensor(rng.standard_normal((3, 7))).to(kind)
    out.backward(u)
    values = {"x": host(x.double()), "k": np.asarray(2.5), "epsilon": np.asarray(0.75)}
    expected = closed_form.pullback("topk", host(u.double()), values)
    tolerance = 2e-5 if dtype == "float32" else 2.0 * torch.finfo(kind).eps
    for gradient, name in ((x.grad, "x"), (layer.k.grad, "k"), (layer.epsilon.grad, "epsilon")):
        assert gradient.dtype == kind
        assert_close(gradient.double(), expected[name], tolerance)


def test_functional_call(rng: Any) -> None:
    """The gradient in the parameters by a transform, without touching the module."""
    x, u = rng.standard_normal((3, 7)), rng.standard_normal((3, 7))
    layer = TopK(parameter(2.0), epsilon=0.7)

    def loss(parameters: dict[str, Any]) -> Any:
        return (torch.func.functional_call(layer, parameters, torch.tensor(x)) * torch.tensor(u)).sum()

    found = torch.func.grad(loss)({"k": torch.tensor(3.3, dtype=torch.float64)})
    expected = closed_form.pullback("topk", u, {"x": x, "k": np.asarray(3.3), "epsilon": np.asarray(0.7)})
    assert_close(found["k"], expected["k"])
    assert layer.k.grad is None
    assert layer.k.item() == 2.0


def test_learned_k_goes_to_the_number_of_good_items(rng: Any) -> None:
    """Five of twelve items are worth more than they cost; nothing but the loss says that they are five."""
    x = torch.tensor(rng.permutation(np.linspace(-2.0, 2.0, 12)))
    value = torch.where(x.argsort().argsort() >= 7, 1.0, -1.0).double()
    layer = TopK(parameter(2.0), epsilon=0.2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(120):
        optimizer.zero_grad()
        loss = -(layer(x) * value).sum()
        loss.backward()
        optimizer.step()
    assert abs(layer.k.item() - 5.0) < 0.1
    assert loss.item() < -4.5


def test_scores_learn_to_select_the_given_items(rng: Any) -> None:
    features = torch.tensor(rng.standard_normal((40, 6)))
    wanted = (features[:, 0] - features[:, 1]).argsort().argsort() >= 30
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 1, bias=False, dtype=torch.float64), torch.nn.Flatten(0), TopK(10, epsilon=1.0)
    )
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(0.1 * rng.standard_normal((1, 6))))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy(model(features), wanted.double())
        loss.backward()
        optimizer.step()
    chosen = model(features) > 0.5
    assert (chosen == wanted).double().mean() > 0.95


@pytest.mark.parametrize(
    ("kind", "foreign", "meant"),
    [
        *((name, "tau", "epsilon=, which is twice the temperature") for name in softk_torch.__all__[:-2]),
        *((name, "axis", "use dim=") for name in ("TopK", "SubsetSampler", "NDCG", "Recall", "TopKCrossEntropy")),
        *((name, "where", "pass it in the call of the module") for name in ("TopK", "SubsetSampler", "Spearman")),
        ("TopK", "largest", 'use mode="largest" or mode="smallest"'),
        ("TopK", "weights", "pass it in the call of the module"),
        ("TopKAttention", "dropout_p", "use dropout="),
        ("Precision", "top_k", "use k="),
        ("AveragePrecision", "size", "its arguments are dim, epsilon, reduction"),
    ],
)
def test_the_argument_that_is_meant(kind: str, foreign: str, meant: str) -> None:
    module = getattr(softk_torch, kind)
    with pytest.raises(TypeError, match=rf"^{kind}\(\) has no argument '{foreign}'; .*{re.escape(meant)}"):
        module(**{foreign: 1})


def test_too_many_places() -> None:
    with pytest.raises(TypeError, match=r"^TopK\(\) takes only k by position, got 2 .*dim=, mode=, epsilon=, hard="):
        TopK(2, -1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'k'"):
        TopK()


def test_a_subclass_has_arguments_of_its_own() -> None:
    class Half(TopK):  # type: ignore[misc, valid-type]
        def __init__(self, size: int, **options: Any) -> None:
            super().__init__(size // 2, **options)

    assert Half(8, epsilon=0.5).k == 4
    with pytest.raises(TypeError, match=r"^TopK\(\) has no argument 'tau'"):
        Half(8, tau=0.5)
