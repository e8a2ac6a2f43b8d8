"""Attention through a soft top-k: against torch's own where nothing is left out, and by value where something is.

The oracle is `reference`: the mask of `closed_form`, by bisection in extended precision, times a softmax; its
derivatives are difference quotients of the fourth order.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import softk
from softk import attention

from . import closed_form
from .closed_form import WIDE, assert_close, differences
from .libraries import BY_NAME, Library

L, S, E, V = 4, 5, 3, 2
INF = math.inf


def reference(
    query: Any, key: Any, value: Any, k: Any, epsilon: Any, mask: Any = None, *, scale: float | None = None
) -> np.ndarray:
    """For a mask of bool or floats; rows in which nothing takes part are 0."""
    query, key, value, k, epsilon = (np.asarray(values, WIDE) for values in (query, key, value, k, epsilon))
    scores = query @ np.swapaxes(key, -1, -2) * (1 / np.sqrt(WIDE(query.shape[-1])) if scale is None else scale)
    if mask is not None:
        scores = np.where(mask, scores, -INF) if np.asarray(mask).dtype == bool else scores + mask
    kept = scores > -INF
    some = kept.any(-1, keepdims=True)
    partial = k < kept.sum(-1, keepdims=True)  # elsewhere everything is selected, and any problem is solved instead
    given = np.where(partial, scores, np.arange(WIDE(scores.shape[-1])))
    soft = closed_form.topk(given, np.where(partial, k, 1), np.broadcast_to(epsilon, partial.shape))
    peak = np.where(some, np.max(scores, axis=-1, keepdims=True), 0)
    share = np.exp(scores - peak) * np.where(partial, soft, 1)
    return share / np.where(some, share.sum(-1, keepdims=True), 1) @ value


def problem(rng: Any, batch: tuple[int, ...] = (2,), epsilon: float = 0.3) -> dict[str, np.ndarray]:
    """Fractional k and epsilon, one a row."""
    return {
        "query": rng.standard_normal((*batch, L, E)),
        "key": rng.standard_normal((*batch, S, E)),
        "value": rng.standard_normal((*batch, S, V)),
        "k": rng.uniform(0.6, 3.8, (*batch, L, 1)),
        "epsilon": epsilon * rng.uniform(0.7, 1.4, (*batch, L, 1)),
    }


#: Row 1 may take part in nothing, row 2 in fewer than most k.
ALLOWED = np.asarray([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 0, 1], [1, 1, 1, 1, 1]], bool)
ADDED = np.where(ALLOWED, np.linspace(-0.5, 0.7, L * S).reshape(L, S), -INF)
CAUSAL = np.tri(L, S, dtype=bool)
MASKS: dict[str, tuple[dict[str, Any], Any]] = {
    "none": ({}, None),
    "bool": ({"where": ALLOWED}, ALLOWED),
    "float": ({"bias": ADDED}, ADDED),
    "causal": ({"is_causal": True}, CAUSAL),
}


def attend(query: Any, key: Any, value: Any, k: Any, epsilon: Any, **options: Any) -> Any:
    return attention.attend(query, key, value, k, epsilon=epsilon, **options)


# --- values, on every library


@pytest.mark.parametrize("name", MASKS)
def test_against_the_reference(lib: Library, name: str) -> None:
    """float64, to 1e-13; the same from every library, as the reference is one."""
    options, mask = MASKS[name]
    if "jax" in lib.name and name == "float":
        pytest.skip("compiling takes too long; run by the other libraries, and differentiated below")
    given = problem(np.random.default_rng(5))
    found = lib.evaluate(attend, *given.values(), **options)
    assert found.dtype == "float64"
    assert_close(found, reference(**given, mask=mask).astype(float), 1e-13)


@pytest.mark.parametrize("library", ["numpy", "array-api-strict", "torch", "dask"])
def test_leading_axes_broadcast(library: str, rng: Any) -> None:
    lib = BY_NAME[library]
    lib.require()
    query, key, value = rng.standard_normal((3, 1, L, E)), rng.standard_normal((2, S, E)), rng.standard_normal((S, V))
    mask = rng.uniform(size=(3, 1, 1, S)) < 0.8
    k = rng.uniform(1.0, 3.0, (2, 1, 1))
    found = lib.evaluate(attention.attend, query, key, value, k, epsilon=0.4, where=mask, scale=0.7)
    assert found.shape == (3, 2, L, V)
    assert_close(found, reference(query, key, value, k, 0.4, mask, scale=0.7).astype(float), 1e-13)


def test_where_bias_and_causality_together(rng: Any) -> None:
    """A query attends to what all three leave."""
    given = problem(rng)
    places = [given[name] for name in ("query", "key", "value", "k", "epsilon")]
    found = attention.attend(*places[:4], epsilon=places[4], where=ALLOWED, bias=ADDED, is_causal=True)
    added = np.where(ALLOWED & CAUSAL, ADDED, -INF)
    assert_close(found, reference(**given, mask=added).astype(float), 1e-13)


def test_weights_are_the_softmax_times_the_mask(rng: Any) -> None:
    query, key = rng.standard_normal((L, E)), rng.standard_normal((S, E))
    scores = query @ key.T / math.sqrt(E)
    wanted = np.exp(scores) * softk.topk(scores, 2.5, epsilon=0.2)
    assert_close(attention.weights(query, key, 2.5, epsilon=0.2), wanted / wanted.sum(-1, keepdims=True), 1e-13)


def test_grouped_queries(rng: Any) -> None:
    query, key, value = (rng.standard_normal(shape) for shape in ((2, 6, L, E), (2, 3, S, E), (2, 3, S, V)))
    found = attention.attend(query, key, value, 2, epsilon=0.3, enable_gqa=True)
    wanted = reference(query, np.repeat(key, 2, axis=1), np.repeat(value, 2, axis=1), 2.0, 0.3)
    assert_close(found, wanted.astype(float), 1e-13)


def test_small_k_is_the_limit(lib: Library) -> None:
    """For k towards 0 the weights are softmax((1 + 2 / epsilon) scores), long after the mask has become 0."""
    if lib.name == "jax-jit":
        pytest.skip("compiling takes too long; run without the outer jit")
    rng = np.random.default_rng(1)
    query, key = rng.standard_normal((L, E)).astype("float32"), rng.standard_normal((S, E)).astype("float32")
    logits = (query @ key.T / math.sqrt(E)).astype(float) * (1.0 + 2.0 / 0.5)
    wanted = np.exp(logits - logits.max(-1, keepdims=True))
    found = lib.evaluate(attention.weights, query, key, np.asarray(1e-37, "float32"), epsilon=0.5)
    assert found.dtype == "float32"
    np.testing.assert_allclose(found, wanted / wanted.sum(-1, keepdims=True), rtol=2e-5)


def test_k_at_both_ends(rng: Any) -> None:
    """0 takes nothing; more than there is, as a number or in an array, takes all; a bad k is its own row's."""
    query, key, value = rng.standard_normal((L, E)), rng.standard_normal((S, E)), rng.standard_normal((S, V))
    full = reference(query, key, value, S, 0.1).astype(float)
    assert_close(attention.attend(query, key, value, 99), full, 1e-14)
    found = attention.attend(query, key, value, np.asarray([[0.0], [INF], [-1.0], [7.5]]))
    assert np.all(found[0] == 0.0)
    assert np.all(np.isnan(found[2]))
    assert_close(found[[1, 3]], full[[1, 3]], 1e-14)
    assert np.all(attention.attend(query, key, value, 0) == 0.0)
    assert np.all(attention.attend(query, key[:0], value[:0], 2) == np.zeros((L, V)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32(dtype: str, rng: Any) -> None:
    """Values and gradients: rounded once, at the end."""
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    given = problem(rng)
    tensors = [torch.tensor(values).to(kind).requires_grad_() for values in given.values()]
    out = attend(*tensors)
    assert out.dtype == kind
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    wanted = attend(*wide)
    assert_close(wanted.detach(), reference(*(value.detach().numpy() for value in wide)).astype(float), 1e-13)
    eps = torch.finfo(kind).eps
    assert_close(out.detach().double(), wanted.detach(), 0.6 * eps)
    u = torch.tensor(rng.standard_normal(tuple(out.shape))).to(kind)
    pairs = zip(torch.autograd.grad(out, tensors, u), torch.autograd.grad(wanted, wide, u.double()), strict=True)
    for one, other in pairs:
        assert one.dtype == kind
        assert_close(one.double(), other, 0.6 * eps)


@pytest.mark.parametrize("k", [8, 1024])
def test_half_precision_of_many_features(k: int, rng: Any) -> None:
    """Scores of the size of 50, which half precision would round by more than epsilon."""
    torch = pytest.importorskip("torch")
    query, key, value = (torch.tensor(2.0 * rng.standard_normal((n, 128))).bfloat16() for n in (64, 1024, 1024))
    wanted = attention.attend(query.double(), key.double(), value.double(), k)
    found = attention.attend(query, key, value, k).double()
    # The result is between the values of the keys, and a rounding of half precision away from the right one.
    assert torch.all((found - wanted).abs() <= 0.505 * torch.finfo(torch.bfloat16).eps * wanted.abs() + 1e-4)
    weights = attention.weights(query, key, k).double()
    assert_close(weights, attention.weights(query.double(), key.double(), k), 0.505 * torch.finfo(torch.bfloat16).eps)


def test_numpy_half_precision(rng: Any) -> None:
    given = [(2.0 * rng.standard_normal((n, 64))).astype("float16") for n in (8, 32, 32)]
    found = attention.attend(*given, 5)
    assert found.dtype == np.float16
    wanted = attention.attend(*(values.astype(float) for values in given), 5)
    assert_close(found.astype(float), wanted, 0.6 * float(np.finfo("float16").eps))


@pytest.mark.parametrize(
    ("dtypes", "wanted"),
    [
        (("float32", "float32", "bfloat16"), "bfloat16"),  # queries and keys that were normalised
        (("float32", "bfloat16", "bfloat16"), "bfloat16"),
        (("bfloat16", "float32", "float32"), "float32"),
        (("float16", "bfloat16", "float16"), "float16"),
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_of_at_most_32_bits_stand_beside_each_other(
    dtypes: tuple[str, ...], wanted: str, autocast: bool, rng: Any
) -> None:
    """As under autocast, which has no say in the products: each gradient has the dtype of its argument."""
    torch = pytest.importorskip("torch")
    given = problem(rng)
    places = ("query", "key", "value")
    tensors = [
        torch.tensor(given[name]).to(getattr(torch, dtype)).requires_grad_()
        for name, dtype in zip(places, dtypes, strict=True)
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = attention.attend(*tensors, 2.3, epsilon=0.3)
        weights = attention.weights(*tensors[:2], 2.3, epsilon=0.3)
    assert out.dtype == getattr(torch, wanted)
    assert weights.dtype == tensors[0].dtype
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    right = attention.attend(*wide, 2.3, epsilon=0.3)
    eps = torch.finfo(out.dtype).eps
    assert_close(out.detach().double(), right.detach(), max(0.6 * eps, 1e-6))
    u = torch.tensor(rng.standard_normal(tuple(out.shape))).to(out.dtype)
    pairs = zip(torch.autograd.grad(out, tensors, u), torch.autograd.grad(right, wide, u.double()), strict=True)
    for tensor, (one, other) in zip(tensors, pairs, strict=True):
        assert one.dtype == tensor.dtype
        assert_close(one.double(), other, max(0.6 * torch.finfo(tensor.dtype).eps, 2e-5))


def test_compiled_under_autocast(rng: Any) -> None:
    torch = pytest.importorskip("torch")
    given = problem(rng)
    query, key, value = (torch.tensor(given[name]).float() for name in ("query", "key", "value"))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: attention.attend(*given, 2.3), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compiled(query, key, value.bfloat16())
    torch._dynamo.reset()
    assert found.dtype == torch.bfloat16
    wanted = attention.attend(query.double(), key.double(), value.bfloat16().double(), 2.3)
    assert_close(found.double(), wanted, 0.6 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("name", MASKS)
def test_nothing_is_reported(name: str, rng: Any) -> None:
    """Underflow is meant: it is not an error where NumPy is told to raise."""
    options, _ = MASKS[name]
    given = {**problem(rng), "query": 1e3 * rng.standard_normal((2, L, E))}
    wanted = attend(**given, **options)
    with np.errstate(all="raise"):
        found = attend(**given, **options)
    np.testing.assert_array_equal(found, wanted)


def test_what_the_dropout_does_is_reported(rng: Any) -> None:
    """It is the user's."""
    given = problem(rng)
    with np.errstate(all="raise"), pytest.raises(FloatingPointError):
        attend(**given, dropout=lambda weights: weights / np.zeros(()))


# --- torch's own attention


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_keys_are_full_attention(name: str, dtype: str, rng: Any) -> None:
    """At k = n, forward and backward, rows in which nothing takes part included."""
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    options, _ = MASKS[name]
    options = {key: torch.tensor(v) if isinstance(v, np.ndarray) else v for key, v in options.items()}
    if name == "float":
        options["bias"] = options["bias"].to(kind)
    given = problem(rng, (2, 3))
    ours, theirs = (
        [torch.tensor(given[key]).to(kind).requires_grad_() for key in ("query", "key", "value")] for _ in range(2)
    )
    found = attention.attend(*ours, S, epsilon=0.2, **options)
    named = {"attn_mask" if key in ("where", "bias") else key: v for key, v in options.items()}
    wanted = torch.nn.functional.scaled_dot_product_attention(*theirs, **named)
    eps = torch.finfo(kind).eps
    assert_close(found.detach(), wanted.detach(), 8 * eps)
    u = torch.tensor(rng.standard_normal(tuple(found.shape))).to(kind)
    for one, other in zip(torch.autograd.grad(found, ours, u), torch.autograd.grad(wanted, theirs, u), strict=True):
        assert_close(one, other, 16 * eps)


def test_a_causal_row_with_at_most_k_keys_is_full_attention(rng: Any) -> None:
    torch = pytest.importorskip("torch")
    query, key, value = (torch.tensor(rng.standard_normal((6, size)), requires_grad=True) for size in (E, E, V))
    k = torch.tensor(3.5, dtype=torch.float64, requires_grad=True)
    found = attention.attend(query, key, value, k, epsilon=0.2, is_causal=True)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert_close(found[:3].detach(), wanted[:3].detach(), 1e-15)
    assert (found[3:] - wanted[3:]).abs().amin() > 1e-4
    u = torch.tensor(rng.standard_normal((3, V)))
    (nothing,) = torch.autograd.grad(found[:3], k, u, retain_graph=True)
    assert nothing == 0.0
    assert torch.autograd.grad(found[3:], k, u)[0] != 0.0


# --- derivatives, in every argument


def check(name: str, found: dict[str, Any], given: dict[str, np.ndarray], u: np.ndarray) -> None:
    """Cotangents against difference quotients; nothing flows into rows without keys, nor is it NaN."""
    mask = MASKS[name][1]
    for argument, gradient in found.items():

        def loss(value: np.ndarray, argument: str = argument) -> Any:
            return np.sum(u * reference(**{**given, argument: value}, mask=mask))

        step = 1e-3 * float(np.min(given["epsilon"]))
        assert_close(gradient, differences(loss, given[argument], step).astype(float), 1e-9)
    if name in ("bool", "float"):
        assert np.all(np.asarray(found["query"])[:, 1] == 0.0)


@pytest.mark.parametrize("epsilon", [0.3, 0.05])
@pytest.mark.parametrize("name", MASKS)
def test_gradients_of_torch(name: str, epsilon: float, rng: Any) -> None:
    torch = pytest.importorskip("torch")
    given = problem(rng, epsilon=epsilon)
    options = {key: torch.tensor(v) if isinstance(v, np.ndarray) else v for key, v in MASKS[name][0].items()}
    leaves = {key: torch.tensor(value, requires_grad=True) for key, value in given.items()}
    u = rng.standard_normal((2, L, V))
    attend(**leaves, **options).backward(torch.tensor(u))
    check(name, {key: leaf.grad.numpy() for key, leaf in leaves.items()}, given, u)


@pytest.mark.parametrize("name", ["float", "causal"])
def test_gradients_of_jax(name: str, rng: Any) -> None:
    jax = pytest.importorskip("jax")
    given = problem(rng, epsilon=0.05)
    options = {key: jax.numpy.asarray(v) if isinstance(v, np.ndarray) else v for key, v in MASKS[name][0].items()}
    u = rng.standard_normal((2, L, V))

    def loss(arguments: Any) -> Any:
        return jax.numpy.sum(u * attend(**arguments, **options))

    found = jax.jit(jax.grad(loss))({key: jax.numpy.asarray(value) for key, value in given.items()})
    check(name, {key: np.asarray(value) for key, value in found.items()}, given, u)


def test_gradients_of_autograd(rng: Any) -> None:
    autograd = pytest.importorskip("autograd")
    given = problem(rng)
    u = rng.standard_normal((2, L, V))

    def loss(arguments: Any) -> Any:
        return autograd.numpy.sum(u * attend(**arguments, where=ALLOWED))

    check("bool", autograd.grad(loss)(given), given, u)


def test_gradient_in_an_added_mask(rng: Any) -> None:
    """A bias that is learned; where it is -inf it stays."""
    torch = pytest.importorskip("torch")
    given = problem(rng)
    mask = torch.tensor(ADDED, requires_grad=True)
    u = rng.standard_normal((2, L, V))
    attend(*map(torch.tensor, given.values()), bias=mask).backward(torch.tensor(u))

    def loss(values: np.ndarray) -> Any:
        return np.sum(u * reference(**given, mask=np.where(ALLOWED, values, -INF)))

    assert_close(mask.grad, differences(loss, np.where(ALLOWED, ADDED, 0.0), 1e-4).astype(float), 1e-9)


def test_gradient_where_one_weight_is_nearly_one(rng: Any) -> None:
    """A softmax's own rule loses there what its largest cotangent is rounded by; measured: 20 eps at worst."""
    torch = pytest.importorskip("torch")
    query, key = torch.tensor(30.0 * rng.standard_normal((64, 1, 1))), torch.tensor(rng.standard_normal((64, 40, 1)))
    u = torch.tensor(rng.standard_normal((64, 1, 40)))
    found = {}
    for kind in (torch.float32, torch.float64):
        leaf = key.float().to(kind).requires_grad_()
        weights = attention.weights(query.float().to(kind), leaf, 20.5, scale=1.0)
        (found[kind],) = torch.autograd.grad(weights, leaf, u.float().to(kind))
    wanted = found[torch.float64]
    error = (found[torch.float32] - wanted).abs().amax((1, 2)) / wanted.abs().amax((1, 2))
    assert error.median() <= 16 * torch.finfo(torch.float32).eps


# --- transforms


# torch compiles its own forward-mode formulas, and its compiler its passes, with what torch has deprecated.
DEPRECATED = pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is:DeprecationWarning")


@DEPRECATED
def test_torch_transforms(rng: Any) -> None:
    torch = pytest.importorskip("torch")
    given = [torch.tensor(values) for values in problem(rng, (3,)).values()]
    wanted = attend(*given, is_causal=True)

    def causal(*given: Any) -> Any:
        return attend(*given, is_causal=True)

    assert_close(torch.vmap(causal)(*given), wanted, 1e-13)
    moved = [torch.tensor(rng.standard_normal(tuple(value.shape))) for value in given]
    _, rate = torch.func.jvp(causal, tuple(given), tuple(moved))
    u = torch.tensor(rng.standard_normal(tuple(rate.shape)))
    pulled = torch.func.vjp(causal, *given)[1](u)
    total = sum((one * other).sum() for one, other in zip(pulled, moved, strict=True))
    assert_close((u * rate).sum(), total, 1e-11)


@DEPRECATED
def test_torch_compile(rng: Any) -> None:
    torch = pytest.importorskip("torch")
    softk_torch = pytest.importorskip("softk_torch")
    torch._dynamo.reset()
    given = problem(rng)
    layer = softk_torch.TopKAttention(torch.nn.Parameter(torch.tensor(2.3, dtype=torch.float64)), epsilon=0.3)
    leaves = [torch.tensor(given[key], requires_grad=True) for key in ("query", "key", "value")]
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(*leaves, is_causal=True)
    u = rng.standard_normal((2, L, V))
    found = torch.autograd.grad(out, [*leaves, layer.k], torch.tensor(u))
    torch._dynamo.reset()
    given |= {"k": np.asarray(2.3), "epsilon": np.asarray(0.3)}
    check("causal", dict(zip(("query", "key", "value", "k"), found, strict=True)), given, u)


def test_jax_vmap(rng: Any) -> None:
    jax = pytest.importorskip("jax")
    given = problem(rng, (3,))
    arrays = [jax.numpy.asarray(value) for value in given.values()]
    found = jax.jit(jax.vmap(lambda *given: attend(*given, is_causal=True)))(*arrays)
    assert_close(found, reference(**given, mask=CAUSAL).astype(float), 1e-13)


# --- the module


def test_module(rng: Any) -> None:
    torch = pytest.importorskip("torch")
    layer_of = pytest.importorskip("softk_torch").TopKAttention
    query, key, value = (torch.tensor(rng.standard_normal((2, S, size))) for size in (E, E, V))
    parameters = [torch.nn.Parameter(torch.tensor(number, dtype=torch.float64)) for number in (2.3, 0.4)]
    layer = layer_of(parameters[0], epsilon=parameters[1], scale=0.7)
    assert {name for name, _ in layer.named_parameters()} == {"k", "epsilon"}
    mask = torch.tensor(ALLOWED[[0, 1, 2, 3, 0]])
    out = layer(query, key, value, mask)
    k, epsilon = (parameter.detach() for parameter in parameters)
    assert torch.equal(out, attention.attend(query, key, value, k, epsilon=epsilon, where=mask, scale=0.7))
    u = rng.standard_normal((2, S, V))
    for parameter, gradient in zip(parameters, torch.autograd.grad(out, parameters, torch.tensor(u)), strict=True):
        place = "k" if parameter is layer.k else "epsilon"

        def loss(number: Any, place: str = place) -> Any:
            numbers = {"k": 2.3, "epsilon": 0.4} | {place: number}
            return np.sum(u * reference(query, key, value, **numbers, mask=mask.numpy(), scale=0.7))

        assert_close(gradient, differences(loss, parameter.item(), 1e-4).astype(float), 1e-9)
    heads = torch.tensor(rng.standard_normal((2, 4, S, E)))
    shared = layer_of(2, enable_gqa=True)(heads, key[:, None].expand(2, 2, S, E), value[:, None].expand(2, 2, S, V))
    assert shared.shape == (2, 4, S, V)
    assert repr(layer) == "TopKAttention(k=2.3 (learned), epsilon=0.4 (learned), dropout=0.0, scale=0.7)"
    assert repr(layer_of(2, enable_gqa=True)) == "TopKAttention(k=2, epsilon=0.1, dropout=0.0, enable_gqa=True)"


def test_learned_k_is_held_at_0(rng: Any) -> None:
    torch = pytest.importorskip("torch")
    layer = pytest.importorskip("softk_torch").TopKAttention(torch.nn.Parameter(torch.tensor(-0.5)))
    x = torch.tensor(rng.standard_normal((S, E))).float()
    out = layer(x, x, x)
    assert torch.equal(out, torch.zeros_like(x))
    out.sum().backward()
    assert layer.k.grad == 0.0


def test_dropout(rng: Any) -> None:
    """Of weights, in training alone, with the expectation kept."""
    torch = pytest.importorskip("torch")
    layer = pytest.importorskip("softk_torch").TopKAttention(2, dropout=0.25)
    query, key = (torch.tensor(rng.standard_normal((200, size, E))) for size in (50, S))
    value = torch.eye(S).double().expand(200, S, S)
    torch.manual_seed(3)
    out = layer(query, key, value)  # the weights themselves
    weights = attention.weights(query, key, 2)
    gone = out == 0.0
    assert abs(gone.double().mean() - 0.25) < 0.01
    assert_close(out[~gone], weights[~gone] / 0.75, 1e-14)
    assert torch.equal(layer.eval()(query, key, value), weights @ value)
    with pytest.raises(ValueError, match=r"dropout must be a probability, from 0 to 1, got 1\.5"):
        type(layer)(2, dropout=1.5)


# --- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [[1.0]]}, TypeError, "query must be an array of a library"),
        ({"query": np.ones((L, E), int)}, TypeError, "query must be real floating-point, got dtype int64"),
        ({"query": np.ones(E)}, ValueError, r"query must have shape \(\.\.\., L, E\), got \(3,\)"),
        ({"key": np.ones((S, E + 1))}, ValueError, r"key must have shape \(\.\.\., S, 3\), as query's E, got \(5, 4\)"),
        ({"key": np.ones((S, E), "float32")}, TypeError, "key must have the dtype of query, float64, got float32"),
        (
            {name: np.ones((S, E), "float32") for name in ("query", "value")},
            TypeError,
            "key must have the dtype of query, float32, or another of at most 32 bits, got float64",
        ),
        ({"value": np.ones((S, V), int)}, TypeError, "value must have the dtype of query, float64, got int64"),
        ({"key": np.ones((7, S, E))}, ValueError, r"key must have leading axes that broadcast against \(2,\)"),
        ({"value": np.ones((S - 1, V))}, ValueError, r"value must have shape \(\.\.\., 5, V\), one row per key"),
        ({"value": np.ones((7, S, V))}, ValueError, r"value must have leading axes that broadcast against \(2,\)"),
        ({"k": -1}, ValueError, "k must be from 0 to 5"),
        ({"k": "2"}, TypeError, "k must be a number or an array"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be a positive finite number"),
        ({"where": np.ones((L, S))}, TypeError, "where must be an array of bool, got dtype float64; see bias="),
        ({"bias": np.ones((L, S), int)}, TypeError, "bias must be an array of floats, got dtype int64; see where="),
        ({"where": np.ones((3, L, S), bool)}, ValueError, r"where must broadcast to \(2, 4, 5\), the shape of the"),
        ({"bias": np.ones((3, L, S))}, ValueError, r"bias must broadcast to \(2, 4, 5\), the shape of the"),
        ({"scale": math.nan}, ValueError, "scale must be a finite number, got nan"),
        ({"enable_gqa": True}, ValueError, "key must have an axis of heads before its last two axes"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"query": np.ones((2, L, E)), "key": np.ones((S, E)), "value": np.ones((S, V)), "k": 2.0, **change}
    places = [given.pop(name) for name in ("query", "key", "value", "k")]
    with pytest.raises(error, match=message):
        attention.attend(*places, **given)


@pytest.mark.parametrize("name", ["key", "value", "where"])
def test_two_libraries(name: str) -> None:
    torch = pytest.importorskip("torch")
    given = {"query": np.ones((L, E)), "key": np.ones((S, E)), "value": np.ones((S, V)), "where": ALLOWED}
    given[name] = torch.asarray(given[name])
    with pytest.raises(TypeError, match=f"{name} must be an array of the same library as query: got torch.Tensor"):
        attention.attend(given["query"], given["key"], given["value"], 2, where=given["where"])
