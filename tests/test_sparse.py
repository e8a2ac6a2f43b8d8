"""Sparse training: masked parameters and their penalty against a stable sort, and their gradients against the rule."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

import softk
from softk import sparse

from .closed_form import WIDE, assert_close, differences
from .libraries import Library

SCOPES = ("global", "tensor")


class Layer(NamedTuple):
    weight: Any
    bias: Any


def tree_of(leaves: Any) -> Any:
    weight, bias, scale, none = leaves
    return {"first": [Layer(weight, bias), None], "last": (scale, none)}


def leaves_of(tree: Any) -> list[Any]:
    layer = tree["first"][0]
    return [layer.weight, layer.bias, *tree["last"]]


def weights_of(rng: Any, kind: str = "normal") -> list[np.ndarray]:
    """Four leaves, one of them without axes and one without items."""
    shapes = ((4, 5, 2), (13,), (), (0,))
    if kind == "ties":  # many weights of equal magnitude and different signs, and zeros
        return [rng.integers(-2, 3, shape) / 2.0 for shape in shapes]
    if kind == "scales":
        return [10.0 ** rng.uniform(-30, 30, shape) * rng.choice([-1.0, 1.0], shape) for shape in shapes]
    if kind == "neighbors":  # magnitudes that differ by one unit in the last place
        return [(1.0 + 2.0**-52 * rng.permutation(int(np.prod(shape))).reshape(shape)) for shape in shapes]
    return [rng.standard_normal(shape) for shape in shapes]


def count(share: float, n: int) -> int:
    return max(1, round(share * n))


def chosen(leaves: list[np.ndarray], share: float, scope: str) -> list[np.ndarray]:
    """The set of the largest magnitudes as booleans, by a stable sort."""
    groups = [leaves] if scope == "global" else [[leaf] for leaf in leaves]
    found: list[np.ndarray] = []
    for group in groups:
        flat = np.concatenate([np.abs(np.ravel(leaf)) for leaf in group])
        mask = np.zeros(flat.size, bool)
        mask[np.argsort(-flat, kind="stable")[: count(share, flat.size)]] = True
        parts = np.split(mask, np.cumsum([leaf.size for leaf in group])[:-1])
        found += [part.reshape(leaf.shape) for part, leaf in zip(parts, group, strict=True)]
    return found


def penalty(leaves: list[np.ndarray], sets: tuple[Any, Any], scope: str) -> Any:
    total = WIDE(0)
    size = sum(leaf.size for leaf in leaves)
    kept = sum(small.sum() for small in sets[0])
    for leaf, small, large in zip(leaves, *sets, strict=True):
        if leaf.size:
            density = WIDE(kept) / size if scope == "global" else WIDE(small.sum()) / leaf.size
            squares = np.asarray(leaf, WIDE) ** 2
            total += squares[small].sum() + squares[large & ~small].sum() / density
    return total


def compiled(lib: Library, f: Any, tree: Any) -> Any:
    """``f(tree)``, compiled where the library is."""
    if "traced" not in lib.tags:
        return f(tree)
    import jax

    return jax.jit(f)(tree)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ["normal", "ties", "scales", "neighbors"])
def test_values_and_pullback(lib: Library, kind: str, scope: Any, rng: Any) -> None:
    """Exactly the largest weights, and the cotangent in the larger set, on every library."""
    leaves, bars = weights_of(rng, kind), weights_of(rng)
    forward, backward = 0.2, 0.55
    small, large = (chosen(leaves, share, scope) for share in (forward, backward))
    tree, bar = tree_of(map(lib.array, leaves)), tree_of(map(lib.array, bars))

    def both(given: Any) -> Any:
        out, pull = softk.vjp(sparse.topkast, given, forward, backward, scope=scope)
        _, moved = softk.jvp(sparse.topkast, given, forward, backward, scope=scope, tangents={"parameters": bar})
        return out, pull(bar)["parameters"], moved

    out, back, moved = compiled(lib, both, tree)
    plain = compiled(lib, lambda given: sparse.topkast(given, forward, backward, scope=scope), tree)
    for leaf, u, a, b, *found in zip(
        leaves, bars, small, large, *map(leaves_of, (out, plain, back, moved)), strict=True
    ):
        for values, expected in zip(map(lib.numpy, found), (leaf * a, leaf * a, u * b, u * b), strict=True):
            assert values.dtype == np.float64
            np.testing.assert_array_equal(values, expected)
    kept = sum(np.count_nonzero(lib.numpy(leaf)) for leaf in leaves_of(out))
    if kind != "ties" and scope == "global":  # no weight is 0
        assert kept == count(forward, 54)


@pytest.mark.parametrize("scope", SCOPES)
def test_penalty(lib: Library, scope: Any, rng: Any) -> None:
    """The value by the formula, and the gradient by differences: with the sets fixed it is a quadratic function."""
    leaves, bars = weights_of(rng), weights_of(rng)
    shares = 0.2, 0.55
    sets = tuple(chosen(leaves, share, scope) for share in shares)
    bar = tree_of(map(lib.array, bars))

    def both(given: Any) -> Any:
        out, pull = softk.vjp(sparse.regularizer, given, *shares, scope=scope)
        _, moved = softk.jvp(sparse.regularizer, given, *shares, scope=scope, tangents={"parameters": bar})
        return sparse.regularizer(given, *shares, scope=scope), out, pull(lib.array(np.asarray(0.7))), moved

    value, out, back, moved = compiled(lib, both, tree_of(map(lib.array, leaves)))
    for found in (value, out):
        assert_close(lib.numpy(found), float(penalty(leaves, sets, scope)), 1e-14)
    rate = 0.0
    for i, (leaf, found) in enumerate(zip(leaves, leaves_of(back["parameters"]), strict=True)):

        def of_leaf(values: Any, i: int = i) -> Any:
            return penalty([*leaves[:i], values, *leaves[i + 1 :]], sets, scope)

        expected = differences(of_leaf, leaf).astype(float) if leaf.size else leaf
        assert_close(lib.numpy(found), 0.7 * expected, 1e-13)
        np.testing.assert_array_equal(lib.numpy(found) != 0, sets[1][i])
        rate += np.sum(expected * bars[i])
    assert_close(lib.numpy(moved), rate, 1e-13)


def expected_gradients(leaves: list[np.ndarray], bars: list[np.ndarray], scope: str, coefficient: float) -> Any:
    """Of sum(bar * topkast) + coefficient * regularizer, with shares of 0.2 and 0.55."""
    small, large = (chosen(leaves, share, scope) for share in (0.2, 0.55))
    size = sum(leaf.size for leaf in leaves)
    for leaf, u, a, b in zip(leaves, bars, small, large, strict=True):
        if leaf.size == 0:
            yield leaf
            continue
        density = sum(one.sum() for one in small) / size if scope == "global" else a.mean()
        yield u * b + 2 * coefficient * leaf * np.where(a, 1.0, np.where(b, 1 / density, 0.0))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("library", ["torch", "jax", "autograd", "mlx"])
def test_native_gradients(library: str, scope: Any, rng: Any) -> None:
    """The gradient of the framework, through both functions at once."""
    leaves, bars = weights_of(rng), weights_of(rng)
    if library == "mlx":
        leaves, bars = ([one.astype(np.float32) for one in given[:2]] for given in (leaves, bars))

    def loss(xp: Any, *given: Any) -> Any:
        out = sparse.topkast(list(given), 0.2, 0.55, scope=scope)
        total = 0.3 * sparse.regularizer(list(given), 0.2, 0.55, scope=scope)
        for one, u in zip(out, bars, strict=True):
            total = total + xp.sum(one * xp.asarray(u))
        return total

    places = tuple(range(len(leaves)))
    if library == "torch":
        torch = pytest.importorskip("torch")
        given = [torch.tensor(leaf, requires_grad=True) for leaf in leaves]
        found = torch.autograd.grad(loss(torch, *given), given)
    elif library == "jax":
        jax = pytest.importorskip("jax")
        gradient = jax.jit(jax.grad(lambda *given: loss(jax.numpy, *given), argnums=places))
        found = gradient(*map(jax.numpy.asarray, leaves))
    elif library == "autograd":
        autograd = pytest.importorskip("autograd")
        found = autograd.grad(lambda given: loss(autograd.numpy, *given))(tuple(leaves))
    else:
        mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
        found = mx.grad(lambda *given: loss(_WithArrays(mx), *given), argnums=places)(*map(mx.array, leaves))
    tolerance = 1e-6 if library == "mlx" else 1e-14
    for one, expected in zip(found, expected_gradients(leaves, bars, scope, 0.3), strict=True):
        one = np.asarray(one)
        assert_close(one, expected.astype(one.dtype), tolerance)
        np.testing.assert_array_equal(one == 0, expected == 0)


class _WithArrays:
    """mlx.core with `asarray`."""

    def __init__(self, mx: Any) -> None:
        self.sum, self.asarray = mx.sum, mx.array


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_dtypes_of_leaves(library: str, rng: Any) -> None:
    """float32 beside bfloat16: ranked together exactly, and each leaf and its gradient keeps its dtype."""
    values = [rng.standard_normal(20).astype(np.float32), rng.integers(-200, 200, 30) / 64.0]
    bars = [rng.standard_normal(20).astype(np.float32), rng.integers(-100, 100, 30) / 32.0]
    assert len(np.unique(np.abs(values[1]))) < 30  # ties inside a leaf
    values[0][3:6] = -values[1][:3]  # and between two
    small, large = (chosen(values, share, "global") for share in (0.3, 0.6))
    if library == "torch":
        torch = pytest.importorskip("torch")
        dtypes = (torch.float32, torch.bfloat16)

        def array(value: Any, dtype: Any) -> Any:
            return torch.tensor(value).to(dtype)

        def back(value: Any) -> np.ndarray:
            return np.asarray(value.detach().float())
    else:
        jnp = pytest.importorskip("jax.numpy")
        dtypes = (jnp.dtype("float32"), jnp.dtype("bfloat16"))
        array = jnp.asarray

        def back(value: Any) -> np.ndarray:
            return np.asarray(value, np.float32)

    given, given_bars = (
        [array(one, dtype) for one, dtype in zip(all_, dtypes, strict=True)] for all_ in (values, bars)
    )
    out, pull = softk.vjp(sparse.topkast, given, 0.3, 0.6)
    found = pull(given_bars)["parameters"]
    for i, dtype in enumerate(dtypes):
        assert out[i].dtype == found[i].dtype == dtype
        np.testing.assert_array_equal(back(out[i]), values[i] * small[i])
        np.testing.assert_array_equal(back(found[i]), bars[i] * large[i])
    value, pull = softk.vjp(sparse.regularizer, given, 0.3, 0.6)
    assert value.dtype == dtypes[0]
    assert_close(back(value), np.float32(penalty(values, (small, large), "global")), 1e-6)
    assert [one.dtype for one in pull(array(1.0, dtypes[0]))["parameters"]] == list(dtypes)
    assert sparse.regularizer(given[1:], 0.3, 0.6).dtype == dtypes[0]  # a sum in bfloat16 would be coarse


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_many_weights(library: str, scope: Any, rng: Any) -> None:
    """Float32 weights with many ties: rounded to 3 digits."""
    xp = pytest.importorskip(library)
    leaves = [np.round(rng.standard_normal(shape), 3).astype(np.float32) for shape in ((300, 400), (90_000,), (7, 11))]
    small, large = (chosen(leaves, share, scope) for share in (0.1, 0.3))
    out, pull = softk.vjp(sparse.topkast, [xp.asarray(one) for one in leaves], 0.1, 0.3, scope=scope)
    back = pull(out)["parameters"]
    for leaf, a, b, value, cotangent in zip(leaves, small, large, out, back, strict=True):
        np.testing.assert_array_equal(np.asarray(value), leaf * a)
        np.testing.assert_array_equal(np.asarray(cotangent), leaf * a * b)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("n", "share", "expected"),
    [
        (10, 0.25, 2),
        (10, 0.35, 4),
        (10, 0.45, 4),
        (10, 0.01, 1),
        (3, 0.1, 1),
        (10, 0.96, 10),
        (10, 1.0, 10),
        (10, 1, 10),
    ],
)
def test_counts(n: int, share: float, expected: int, scope: Any, rng: Any) -> None:
    """A half is rounded to the even number, and at least one weight is kept."""
    x = rng.standard_normal(n)
    out, pull = softk.vjp(sparse.topkast, x, share, share, scope=scope)
    assert np.count_nonzero(out) == expected
    assert np.count_nonzero(pull(np.ones(n))["parameters"]) == expected
    _, pull = softk.vjp(sparse.topkast, x, share, 1.0, scope=scope)
    np.testing.assert_array_equal(pull(x)["parameters"], x)
    density = np.count_nonzero(out) / n  # the share that is kept, not the one that was asked for
    assert_close(sparse.regularizer(x, share, 1.0), np.sum(out**2) + np.sum(x[out == 0] ** 2) / density, 1e-14)


def test_scopes_differ() -> None:
    parameters = {"large": np.asarray([9.0, -8.0, 7.0, 6.0]), "small": np.asarray([0.4, 0.3, -0.2, 0.1])}
    together = sparse.topkast(parameters, 0.5, 0.5)
    assert together["large"].tolist() == [9.0, -8.0, 7.0, 6.0]
    assert together["small"].tolist() == [0.0] * 4
    alone = sparse.topkast(parameters, 0.5, 0.5, scope="tensor")
    assert alone["large"].tolist() == [9.0, -8.0, 0.0, 0.0]
    assert alone["small"].tolist() == [0.4, 0.3, 0.0, 0.0]


@pytest.mark.parametrize("scope", SCOPES)
def test_special_values(scope: Any) -> None:
    """Infinities are the largest weights, also where more of them exist than are kept. A NaN is seen in its slice."""
    inf, nan = np.inf, np.nan
    x = np.asarray([1.0, -inf, inf, 2.0, inf, 0.0])
    out, pull = softk.vjp(sparse.topkast, x, 0.3, 0.5, scope=scope)
    np.testing.assert_array_equal(out, [0.0, -inf, inf, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(pull(1.0 + np.arange(6.0))["parameters"], [0.0, 2.0, 3.0, 0.0, 5.0, 0.0])
    value, pull = softk.vjp(sparse.regularizer, np.asarray([inf, 3.0, -inf, 2.0]), 0.25, 0.25, scope=scope)
    assert value == inf
    np.testing.assert_array_equal(pull(np.asarray(1.0))["parameters"], [inf, 0.0, 0.0, 0.0])
    first, second = sparse.topkast([np.asarray([1.0, nan]), np.asarray([1.0, 2.0])], 0.5, 0.5, scope=scope)
    assert np.isnan(first).all()
    np.testing.assert_array_equal(second, [nan, nan] if scope == "global" else [0.0, 2.0])
    assert np.isnan(sparse.regularizer([np.asarray([1.0, nan]), np.asarray([1.0])], 0.5, 0.5, scope=scope))
    zeros = softk.vjp(sparse.topkast, np.zeros(5), 0.2, 0.6, scope=scope)[1](np.ones(5))["parameters"]
    assert zeros.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]  # the lowest indices


def test_the_parameters_are_not_modified(rng: Any) -> None:
    x = rng.standard_normal(20)
    before = x.copy()
    out, pull = softk.vjp(sparse.topkast, x, 1.0, 1.0)
    assert not np.shares_memory(out, x)
    u = rng.standard_normal(20)
    assert not np.shares_memory(pull(u)["parameters"], u)
    np.testing.assert_array_equal(x, before)


# --- transforms


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")  # torch's own forward mode
def test_transforms_of_torch(rng: Any) -> None:
    torch = pytest.importorskip("torch")
    leaves, bars = weights_of(rng)[:3], weights_of(rng)[:3]
    given = [torch.tensor(leaf, requires_grad=True) for leaf in leaves]

    def penalized(*given: Any) -> Any:
        return sparse.regularizer(list(given), 0.2, 0.55)

    assert torch.autograd.gradcheck(penalized, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(penalized, given)
    for scope in SCOPES:
        small = chosen(leaves, 0.2, scope)

        def loss(*given: Any, scope: str = scope) -> Any:
            out = sparse.topkast(list(given), 0.2, 0.55, scope=scope)
            parts = [torch.sum(one**3 * torch.tensor(u)) for one, u in zip(out, bars, strict=True)]
            return sum(parts) + 0.3 * sparse.regularizer(list(given), 0.2, 0.55, scope=scope)

        # Straight through: the derivative of the cube at the masked weight, which is 0 outside A.
        rest = expected_gradients(leaves, [np.zeros_like(leaf) for leaf in leaves], scope, 0.3)
        wanted = [3 * leaf**2 * u * a + more for leaf, u, a, more in zip(leaves, bars, small, rest, strict=True)]
        plain = [one.detach() for one in given]
        for transform in (torch.func.grad, torch.func.jacfwd):
            for one, expected in zip(transform(loss, argnums=(0, 1, 2))(*plain), wanted, strict=True):
                assert_close(one, expected, 1e-13)
        batch = [torch.stack([one, -one, one.flip(0) if one.ndim else one]) for one in plain]
        found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*batch)
        for i in range(3):
            alone = torch.func.grad(loss, argnums=(0, 1, 2))(*(one[i] for one in batch))
            for one, expected in zip(found, alone, strict=True):
                assert_close(one[i], expected, 1e-13)


# torch compiles its own forward-mode formulas, and its compiler its passes, with what torch has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("scope", SCOPES)
def test_torch_compile(scope: Any, rng: Any) -> None:
    """Without a break of the graph, also where the compiler differentiates the operations themselves."""
    torch = pytest.importorskip("torch")
    leaves, bars = weights_of(rng)[:3], weights_of(rng)[:3]
    tensors = [torch.tensor(u) for u in bars]

    def loss(*given: Any) -> Any:
        out = sparse.topkast({"a": given[0], "rest": list(given[1:])}, 0.2, 0.55, scope=scope)
        total = 0.3 * sparse.regularizer(list(given), 0.2, 0.55, scope=scope)
        for one, u in zip((out["a"], *out["rest"]), tensors, strict=True):
            total = total + torch.sum(one * u)
        return total

    wanted = list(expected_gradients(leaves, bars, scope, 0.3))
    given = [torch.tensor(leaf, requires_grad=True) for leaf in leaves]
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(*given)
    assert_close(value, loss(*given).detach().numpy(), 1e-14)
    for one, expected in zip(torch.autograd.grad(value, given), wanted, strict=True):
        assert_close(one, expected, 1e-14)
        np.testing.assert_array_equal(one.numpy() == 0, expected == 0)
    inner = torch.compile(torch.func.grad(loss, argnums=(0, 1, 2)), fullgraph=True, backend="aot_eager")
    for one, expected in zip(inner(*(one.detach() for one in given)), wanted, strict=True):
        assert_close(one, expected, 1e-14)
        np.testing.assert_array_equal(one.numpy() == 0, expected == 0)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(strict: bool, rng: Any) -> None:
    """The gradient through an exported program, which has the operations and not the rule."""
    torch = pytest.importorskip("torch")
    leaves, bars = weights_of(rng)[:3], weights_of(rng)[:3]

    class Both(torch.nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, *given: Any) -> Any:
            return sparse.topkast(list(given), 0.2, 0.55), sparse.regularizer(list(given), 0.2, 0.55)

    given = [torch.tensor(leaf, requires_grad=True) for leaf in leaves]
    program = torch.export.export(Both(), tuple(one.detach() for one in given), strict=strict).module()
    out, penalty_ = program(*given)
    loss = 0.3 * penalty_ + sum(torch.sum(one * torch.tensor(u)) for one, u in zip(out, bars, strict=True))
    for one, leaf, small in zip(out, leaves, chosen(leaves, 0.2, "global"), strict=True):
        np.testing.assert_array_equal(one.detach().numpy(), leaf * small)
    for one, expected in zip(
        torch.autograd.grad(loss, given), expected_gradients(leaves, bars, "global", 0.3), strict=True
    ):
        assert_close(one, expected, 1e-14)
        np.testing.assert_array_equal(one.numpy() == 0, expected == 0)


def test_transforms_of_jax(rng: Any) -> None:
    """vmap, forward mode and the Hessian of the penalty."""
    jax = pytest.importorskip("jax")
    x, u = rng.standard_normal((2, 3, 12))
    small, large = (np.stack([chosen([row], share, "tensor")[0] for row in x]) for share in (0.25, 0.5))

    def masked(row: Any) -> Any:
        return sparse.topkast({"a": row}, 0.25, 0.5)["a"]

    out, moved = jax.jit(jax.vmap(lambda row, rate: jax.jvp(masked, (row,), (rate,))))(x, u)
    np.testing.assert_array_equal(out, x * small)
    np.testing.assert_array_equal(moved, u * large)
    hessian = jax.jit(jax.hessian(lambda row: sparse.regularizer([row], 0.25, 0.5)))(jax.numpy.asarray(x[0]))
    assert_close(hessian, np.diag(2.0 * small[0] + 8.0 * (large[0] & ~small[0])), 1e-14)


# --- training


def test_a_weight_that_was_zero_comes_back() -> None:
    """A weight of B grows by its gradient until it replaces one of A. A weight outside B never moves."""
    x = np.asarray([1.0, 0.5, 0.4])
    target = np.asarray([0.0, 2.0, 5.0])
    history = []
    for _ in range(20):
        out, pull = softk.vjp(sparse.topkast, x, 1 / 3, 2 / 3)
        history.append(out)
        x = x - 0.1 * pull(out - target)["parameters"]
    assert history[0].tolist() == [1.0, 0.0, 0.0]
    assert history[-1][0] == 0.0
    assert history[-1][1] > 1.0
    assert x[2] == 0.4


# --- bad arguments


def test_errors() -> None:
    x = np.asarray([0.5, -1.0])
    tree = {"a": x, "b": [x]}
    whole = np.asarray([1, 2])
    cases: list[tuple[type[Exception], str, Any]] = [
        (ValueError, r"forward must be a share above 0 and at most 1, got 0$", (tree, 0, 0.5)),
        (ValueError, r"forward must be a share above 0 and at most 1, got -0\.1", (tree, -0.1, 0.5)),
        (ValueError, r"forward must be a share above 0 and at most 1, got nan", (tree, np.nan, 0.5)),
        (ValueError, r"backward must be a share above 0 and at most 1, got 1\.5", (tree, 0.5, 1.5)),
        (ValueError, r"backward must be at least forward, 0\.5, got 0\.2", (tree, 0.5, 0.2)),
        (TypeError, r"forward must be a Python number, .* got '0\.5'", (tree, "0.5", 0.5)),
        (TypeError, r"forward must be a Python number, .* got True", (tree, True, 1.0)),
        (TypeError, r"backward must be a Python number, .* got array\(0\.5\)", (tree, 0.5, np.asarray(0.5))),
        (ValueError, r"parameters must have at least one array, got \{'a': None\}", ({"a": None}, 0.5, 0.5)),
        (ValueError, r"parameters must have at least one array, got \[\]", ([], 0.5, 0.5)),
        (ValueError, r"parameters must have at least one weight, got only arrays without any, such as parameters\[0\]",
         ([x[:0]], 0.5, 0.5)),
        (TypeError, r"parameters\['b'\] must be an array, None, or a dict, .* got str", ({"a": x, "b": "x"}, 0.5, 0.5)),
        (TypeError, r"parameters\['b'\]\[0\] must have a real floating-point dtype .* got int64",
         ({"b": [whole]}, 0.5, 0.5)),
        (TypeError, r"parameters\[0\] must have a real floating-point dtype .* got complex128", ([1j * x], 0.5, 0.5)),
    ]  # fmt: skip
    for f in (sparse.topkast, sparse.regularizer):
        for kind, text, args in cases:
            with pytest.raises(kind, match=text):
                f(*args)
        for scope in ("layer", None, ["global"]):
            with pytest.raises(ValueError, match=r"scope must be 'global' or 'tensor', got"):
                f(tree, 0.5, 0.5, scope=scope)
        with pytest.raises(TypeError, match=rf"{f.__name__}\(\) has no argument 'forward' by name; pass parameters,"):
            f(tree, forward=0.5, backward=0.5)
        with pytest.raises(TypeError, match=r"takes only parameters, forward, backward by position, .* scope="):
            f(tree, 0.5, 0.5, "tensor")
    _, pull = softk.vjp(sparse.topkast, tree, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"cotangent must have the structure of parameters, got cotangent\['c'\]"):
        pull({"c": x})
    with pytest.raises(ValueError, match=r"cotangent\['a'\] must have the shape \(2,\), got \(3,\)"):
        pull({"a": np.ones(3)})
    with pytest.raises(ValueError, match=r"must name array arguments, one of \['parameters'\], got 'tree'"):
        softk.jvp(sparse.topkast, tree, 0.5, 0.5, tangents={"tree": tree})
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"parameters.* must be an array of the same library"):
        sparse.topkast([x, torch.ones(2)], 0.5, 0.5)
