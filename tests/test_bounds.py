"""Floors and caps under one budget: values beside a bisection, derivatives beside differences, on every library."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import softk

from .libraries import BY_NAME, Library

LIBRARIES = ("numpy", "torch", "jax", "dask", "array-api-strict")


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    found = BY_NAME[request.param]
    found.require()
    return found


# --- an oracle that shares nothing with the implementation: nested bisections


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.clip(z, -700.0, 700.0)))


def _bisect(f: Any, low: float, high: float) -> float:
    """Where the decreasing function f is 0."""
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if f(middle) > 0.0 else (low, middle)
    return 0.5 * (low + high)


def oracle(
    groups: list[np.ndarray], weights: list[np.ndarray], k: float, epsilon: float, least: Any, most: Any
) -> tuple[list[np.ndarray], list[str]]:
    """The masks, and for every group whether it is free, at its floor or at its cap."""
    tau = 0.5 * epsilon
    reach = max(np.abs(x).max() for x in groups) + 800.0 * tau

    def mass(t: float, x: np.ndarray, a: np.ndarray) -> float:
        return float((a * _sigmoid((x - t) / tau)).sum())

    def clipped(t: float) -> list[float]:
        return [
            min(max(mass(t, x, a), low), high) for x, a, low, high in zip(groups, weights, least, most, strict=True)
        ]

    def of_group(x: np.ndarray, a: np.ndarray, wanted: float) -> np.ndarray:
        return _sigmoid((x - _bisect(lambda s: mass(s, x, a) - wanted, -reach, reach)) / tau)

    t = _bisect(lambda t: sum(clipped(t)) - k, -reach, reach)
    masks, kinds = [], []
    for x, a, low, high in zip(groups, weights, least, most, strict=True):
        own = mass(t, x, a)
        kinds.append("floor" if own < low else "cap" if own > high else "free")
        masks.append(of_group(x, a, min(max(own, low), high)))
    return masks, kinds


def problem(rng: Any, rows: int, n: int, *, weighted: bool) -> tuple[Any, ...]:
    """Rows of different levels, with floors and caps of which some bind, and a budget that fits."""
    x = rng.standard_normal((rows, n)) + 1.5 * rng.standard_normal((rows, 1))
    weights = rng.uniform(0.3, 2.0, (rows, n)) if weighted else None
    least = rng.uniform(0.0, 0.25 * n, (rows, 1))
    most = least + rng.uniform(0.02 * n, 0.3 * n, (rows, 1))
    k = float(least.sum() + rng.uniform(0.2, 0.8) * (most - least).sum())
    return x, weights, least, most, k


def expected(x: Any, weights: Any, least: Any, most: Any, k: float, epsilon: float) -> tuple[np.ndarray, list[str]]:
    a = np.ones_like(x) if weights is None else weights
    masks, kinds = oracle(list(x), list(a), k, epsilon, least[:, 0], most[:, 0])
    return np.stack(masks), kinds


# --- values


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("epsilon", [3.0, 0.3, 0.02])
def test_values(epsilon: float, weighted: bool, rng: Any) -> None:
    seen: set[str] = set()
    for rows, n in ((2, 5), (6, 40), (20, 30)) * 4:
        x, weights, least, most, k = problem(rng, rows, n, weighted=weighted)
        found = softk.budget.topk(x, k, epsilon=epsilon, least=least, most=most, weights=weights)
        wanted, kinds = expected(x, weights, least, most, k, epsilon)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10)
        seen |= set(kinds)
    assert seen == {"free", "floor", "cap"}


def test_values_of_libraries(library: Library, rng: Any) -> None:
    """A tree of rows and a leaf that is one group, with a mode, weights, where and a leaf without bounds."""
    x, weights, least, most, k = problem(rng, 4, 12, weighted=True)
    last, where = rng.standard_normal(9), rng.random((4, 12)) < 0.8

    def array(value: Any) -> Any:
        return library.array(value, value.dtype)

    found = softk.budget.topk(
        [array(-x), array(-last), None],
        k,
        mode="smallest",
        epsilon=0.4,
        weights=[array(weights), None, None],
        where=[array(where), None, None],
        least=[array(least), 1.5, None],
        most=[array(most), None, None],
    )
    assert found[2] is None
    groups = [*(row[kept] for row, kept in zip(x, where, strict=True)), last]
    costs = [*(row[kept] for row, kept in zip(weights, where, strict=True)), np.ones(9)]
    # A floor above what its row has means the whole row.
    floors = [min(low, own.sum()) for low, own in zip([*least[:, 0], 1.5], costs, strict=True)]
    wanted, _ = oracle(groups, costs, k, 0.4, floors, [*most[:, 0], math.inf])
    masks = library.numpy(found[0])
    for row, kept, own in zip(masks, where, wanted, strict=False):
        np.testing.assert_allclose(row[kept], own, rtol=0, atol=1e-9)
        assert not row[~kept].any()
    np.testing.assert_allclose(library.numpy(found[1]), wanted[-1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_masses(dtype: str, rng: Any) -> None:
    """The sum is k, and every group is within its bounds, to rounding."""
    eps = float(np.finfo(dtype).eps)
    for rows, n in ((3, 7), (12, 400), (64, 50)):
        for scale in (1e-5, 1.0, 1e5):
            for epsilon in (1e-4, 0.1, 10.0):
                x, _, least, most, k = problem(rng, rows, n, weighted=False)
                x, least, most = (scale * x).astype(dtype), least.astype(dtype), most.astype(dtype)
                found = softk.budget.topk(x, k, epsilon=scale * epsilon, least=least, most=most)
                mass = found.sum(axis=1, keepdims=True, dtype=np.float64)
                assert abs(mass.sum() - k) <= 16 * eps * max(1.0, k)
                assert (mass >= least - 16 * eps * np.maximum(1.0, least)).all()
                assert (mass <= most + 16 * eps * np.maximum(1.0, most)).all()


def test_ties_between_groups(rng: Any) -> None:
    """Scores that tie everywhere: the groups meet their bounds at the same threshold."""
    x = np.zeros((4, 6))
    least, most = np.asarray([[0.0], [4.0], [0.0], [2.5]]), np.asarray([[1.0], [6.0], [6.0], [2.5]])
    found = softk.budget.topk(x, 12, epsilon=0.1, least=least, most=most)
    np.testing.assert_allclose(found.sum(axis=1), [1.0, 4.25, 4.25, 2.5], rtol=0, atol=1e-12)
    for _ in range(30):
        x = rng.integers(0, 3, (5, 8)).astype(float)
        least = rng.integers(0, 4, (5, 1)).astype(float)
        most = least + rng.integers(0, 4, (5, 1))
        k = float(rng.integers(least.sum(), most.sum() + 1))
        found = softk.budget.topk(x, k, epsilon=0.05, least=least, most=most)
        wanted, _ = expected(x, None, least, most, k, 0.05)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)


def test_bounds_that_do_not_bind_change_nothing(rng: Any) -> None:
    tree = {"a": rng.standard_normal((3, 4)), "b": rng.standard_normal(5)}
    plain = softk.budget.topk(tree, 6.3, epsilon=0.3)
    found = softk.budget.topk(tree, 6.3, epsilon=0.3, least=0, most=math.inf)
    for name in tree:
        np.testing.assert_allclose(found[name], plain[name], rtol=0, atol=1e-14)


def test_numbers_hold_for_every_leaf(rng: Any) -> None:
    tree = {
        "a": rng.standard_normal((3, 4)) + 5,
        "b": rng.standard_normal(5),
        "c": np.asarray(-9.0),
        "d": np.zeros((0,)),
    }
    found = softk.budget.topk(tree, 8, epsilon=0.2, least=2, most=5.5)
    masses = [float(found[name].sum()) for name in tree]
    np.testing.assert_allclose(masses, [5.0, 2.0, 1.0, 0.0], rtol=0, atol=1e-12)  # one item is less than its floor


def test_an_array_without_axes_holds_for_every_leaf(rng: Any) -> None:
    """Its derivative is the sum of those of the leaves."""
    tree = {"a": rng.standard_normal((3, 4)) + 2, "b": rng.standard_normal(5) - 2, "c": rng.standard_normal(6) - 2}
    u, low = {name: rng.standard_normal(value.shape) for name, value in tree.items()}, np.asarray(1.5)
    one, pull = softk.vjp(softk.budget.topk, tree, 8, epsilon=0.4, least=low)
    each, pull_each = softk.vjp(softk.budget.topk, tree, 8, epsilon=0.4, least=dict.fromkeys(tree, low))
    for name in tree:
        np.testing.assert_array_equal(one[name], each[name])
    found, wanted = pull(u)["least"], pull_each(u)["least"]
    np.testing.assert_allclose(found, sum(wanted.values()), rtol=1e-14)
    assert found.shape == ()
    assert sum(value != 0.0 for value in wanted.values()) == 2
    moved = [
        softk.jvp(softk.budget.topk, tree, 8, epsilon=0.4, least=bound, tangents={"least": tangent})[1]
        for bound, tangent in ((low, low), (dict.fromkeys(tree, low), dict.fromkeys(tree, low)))
    ]
    for name in tree:
        np.testing.assert_allclose(moved[0][name], moved[1][name], rtol=1e-14)


def test_groups_along_other_axes(rng: Any) -> None:
    """The groups of an array of bounds are those of its axes, wherever they are."""
    x, _, least, most, k = problem(rng, 6, 20, weighted=False)
    wanted = softk.budget.topk(x, k, epsilon=0.3, least=least, most=most)
    moved = [np.moveaxis(value.reshape(2, 3, -1), 0, 2) for value in (x, least, most)]  # (3, 20, 2)
    found = softk.budget.topk(moved[0], k, epsilon=0.3, least=moved[1], most=moved[2])
    np.testing.assert_allclose(np.moveaxis(found, 2, 0).reshape(6, 20), wanted, rtol=0, atol=1e-13)


# --- the hard mask


def _hard_oracle(x: np.ndarray, k: int, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """The floors first, then the largest scores that the caps allow, one by one."""
    chosen = np.zeros(x.shape, dtype=bool)
    for row, low in enumerate(least):
        chosen[row, np.argsort(-x[row], kind="stable")[:low]] = True
    for _ in range(k - int(chosen.sum())):
        open_rows = chosen.sum(axis=1) < most
        scores = np.where(chosen | ~open_rows[:, None], -np.inf, x)
        chosen[np.unravel_index(np.argmax(scores), x.shape)] = True
    return chosen.astype(float)


def test_hard(library: Library, rng: Any) -> None:
    for _ in range(3 if library.name in ("jax", "dask") else 12):
        x = rng.integers(-4, 5, (4, 7)) / 2.0  # with ties
        least = rng.integers(0, 4, (4, 1))
        most = np.minimum(least + rng.integers(0, 4, (4, 1)), 7)
        k = int(rng.integers(least.sum(), most.sum() + 1))
        bounds = {"least": library.array(least, "int64"), "most": library.array(most.astype(float), "float64")}
        found = softk.budget.topk(library.array(x, "float64"), k, hard=True, epsilon=0.3, **bounds)
        np.testing.assert_array_equal(library.numpy(found), _hard_oracle(x, k, least[:, 0], most[:, 0]))


def test_the_hard_mask_has_the_derivative_of_the_soft_one(rng: Any) -> None:
    x = rng.standard_normal((4, 9))
    bounds = {"least": np.full((4, 1), 1.0), "most": np.full((4, 1), 4.0)}
    u = rng.standard_normal(x.shape)
    _, soft = softk.vjp(softk.budget.topk, x, 10, epsilon=0.7, **bounds)
    _, hard = softk.vjp(softk.budget.topk, x, 10, epsilon=0.7, hard=True, **bounds)
    for name, value in soft(u).items():
        np.testing.assert_array_equal(hard(u)[name], value)


# --- derivatives


@pytest.mark.parametrize("weighted", [False, True])
def test_derivatives(library: Library, weighted: bool, rng: Any) -> None:
    """In every argument and in both directions, beside central differences of the oracle."""
    x, weights, least, most, _ = problem(rng, 5, 14, weighted=weighted)
    x = rng.standard_normal(x.shape) + np.asarray(
        [[3.0], [-3.0], [0.0], [0.0], [0.0]]
    )  # at the cap, at the floor, free
    most[4] = least[4] = 0.9 * (np.ones_like(x) if weights is None else weights)[4].sum()  # a group with one mass
    # A row with fewer items than its floor is whole. With weights, its mass is that of the weights.
    where = np.ones(x.shape, dtype=bool)
    where[3, 2:] = False
    least[3], most[3] = 12.0, 13.0
    own = (np.ones_like(x) if weights is None else weights)[3, :2].sum()
    k = float(most[0, 0] + least[1, 0] + 0.5 * (least[2, 0] + most[2, 0]) + own + most[4, 0])
    given: dict[str, np.ndarray] = {"tree": x, "k": np.asarray(k), "epsilon": np.asarray(0.35)}
    given |= {"least": least, "most": most} | ({} if weights is None else {"weights": weights})

    def of_oracle(values: dict[str, np.ndarray]) -> np.ndarray:
        a = values.get("weights", np.ones_like(x))
        groups, costs = ([row[kept] for row, kept in zip(of, where, strict=True)] for of in (values["tree"], a))
        floors = [min(low, cost.sum()) for low, cost in zip(values["least"][:, 0], costs, strict=True)]
        masks, kinds = oracle(groups, costs, float(values["k"]), float(values["epsilon"]), floors, values["most"][:, 0])
        assert set(kinds) == {"free", "floor", "cap"} or values is not given
        whole = np.zeros_like(x)
        for row, kept, own in zip(whole, where, masks, strict=True):
            row[kept] = own
        whole[3, :2] = 1.0
        return whole

    tangents = {name: rng.standard_normal(value.shape) for name, value in given.items()}
    tangents["most"][4] = tangents["least"][4]
    u, h = rng.standard_normal(x.shape), 1e-5
    # The bounds move together: of the group with one mass, either may be the one that counts.
    moved_together = [(name,) for name in given if name not in ("least", "most")] + [("least", "most")]
    rates = {}
    for names in moved_together:
        ends = [
            of_oracle(given | {name: given[name] + sign * h * tangents[name] for name in names}) for sign in (1.0, -1.0)
        ]
        rates[names] = ((ends[0] - ends[1]) * u).sum() / (2.0 * h)

    def array(value: Any) -> Any:
        return library.array(value, np.asarray(value).dtype)

    own_arrays = {name: array(value) for name, value in given.items()}
    tree, mass = own_arrays.pop("tree"), own_arrays.pop("k")
    out, pull = softk.vjp(softk.budget.topk, tree, mass, where=array(where), **own_arrays)
    np.testing.assert_allclose(library.numpy(out), of_oracle(given), rtol=0, atol=1e-9)
    found = pull(array(u))
    assert set(found) == set(given)
    for names, wanted in rates.items():
        pulled = sum((library.numpy(found[name]) * tangents[name]).sum() for name in names)
        np.testing.assert_allclose(pulled, wanted, rtol=1e-6, atol=1e-8)
        _, moved = softk.jvp(
            softk.budget.topk,
            tree,
            mass,
            where=array(where),
            tangents={name: array(tangents[name]) for name in names},
            **own_arrays,
        )
        np.testing.assert_allclose((library.numpy(moved) * u).sum(), pulled, rtol=1e-9, atol=1e-11)


def test_torch_differentiates_twice(rng: Any) -> None:
    torch = pytest.importorskip("torch")
    x, weights, least, most, k = problem(rng, 3, 4, weighted=True)

    def f(x: Any, k: Any, epsilon: Any, least: Any, most: Any, weights: Any) -> Any:
        return softk.budget.topk(x, k, epsilon=epsilon, least=least, most=most, weights=weights)

    given = tuple(torch.tensor(value, requires_grad=True) for value in (x, np.asarray(k), np.asarray(0.6), least, most))
    given = (*given, torch.tensor(weights, requires_grad=True))
    assert torch.autograd.gradcheck(f, given)
    assert torch.autograd.gradgradcheck(f, given)
    batched = torch.func.vmap(lambda x: softk.budget.topk(x, k, epsilon=0.6, least=given[3], most=given[4]))
    pair = torch.stack([given[0], given[0] * 0.5])
    for found, one in zip(batched(pair), pair, strict=True):
        torch.testing.assert_close(found, softk.budget.topk(one, k, epsilon=0.6, least=given[3], most=given[4]))


def test_transforms_of_jax(rng: Any) -> None:
    jax = pytest.importorskip("jax")
    x, _, least, most, k = problem(rng, 4, 6, weighted=False)
    u = rng.standard_normal((2, 4, 6))

    def loss(x: Any, k: Any, least: Any, u: Any) -> Any:
        return (softk.budget.topk(x, k, epsilon=0.5, least=least, most=jax.numpy.asarray(most)) * u).sum()

    pair = np.stack([x, x[::-1]])
    traced = jax.jit(lambda x, low: softk.budget.topk({"a": x, "b": -x}, 8, least=low))  # a number is an array then
    found = traced(jax.numpy.asarray(x), 1.5)
    for name, value in softk.budget.topk({"a": x, "b": -x}, 8, least=1.5).items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-12)
    gradient = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), in_axes=(0, None, None, 0)))
    found = gradient(jax.numpy.asarray(pair), jax.numpy.asarray(k), jax.numpy.asarray(least), jax.numpy.asarray(u))
    for i in range(2):
        _, pull = softk.vjp(softk.budget.topk, pair[i], np.asarray(k), epsilon=0.5, least=least, most=most)
        wanted = pull(u[i])
        for value, name in zip(found, ("tree", "k", "least"), strict=True):
            np.testing.assert_allclose(value[i], wanted[name], rtol=1e-8, atol=1e-10)


# --- ends


def test_special_scores() -> None:
    inf, nan = np.inf, np.nan
    two = np.full((2, 1), 2.0)
    found = softk.budget.topk(np.asarray([[inf, 0.0, 1.0], [-inf, -1.0, -inf]]), 3, epsilon=0.01, least=two)
    np.testing.assert_allclose(found, [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], rtol=0, atol=1e-12)
    found = softk.budget.topk([np.asarray([1.0, nan]), np.asarray([2.0])], 2, least=1)
    assert all(np.isnan(one).all() for one in found)
    for k, epsilon, least, most in (
        (3.0, 0.1, [[2.0], [2.0]], [[3.0], [3.0]]),  # the floors exceed k
        (3.0, 0.1, [[0.0], [0.0]], [[1.0], [1.0]]),  # the caps are below k
        (3.0, 0.1, [[2.0], [0.0]], [[1.0], [3.0]]),  # a floor exceeds its cap
        (3.0, 0.1, [[-1.0], [0.0]], [[3.0], [3.0]]),
        (3.0, 0.1, [[nan], [0.0]], [[3.0], [3.0]]),
        (7.0, 0.1, [[1.0], [1.0]], [[inf], [inf]]),  # more than there are
        (nan, 0.1, [[1.0], [1.0]], [[inf], [inf]]),
        (3.0, -0.1, [[1.0], [1.0]], [[inf], [inf]]),
    ):
        bounds = {"least": np.asarray(least), "most": np.asarray(most)}
        found = softk.budget.topk(np.arange(6.0).reshape(2, 3), np.asarray(k), epsilon=np.asarray(epsilon), **bounds)
        assert np.isnan(found).all()


def test_ends_of_the_budget(rng: Any) -> None:
    """A budget of all floors, of all caps, of nothing and of everything."""
    x, _, least, most, _ = problem(rng, 5, 11, weighted=False)
    for k, masses in ((least.sum(), least), (most.sum(), most)):
        found = softk.budget.topk(x, np.asarray(k), least=least, most=most)
        np.testing.assert_allclose(found.sum(axis=1, keepdims=True), masses, rtol=1e-12)
    np.testing.assert_array_equal(softk.budget.topk(x, 0, most=1), 0.0)
    np.testing.assert_array_equal(softk.budget.topk(x, 55, least=least), 1.0)


def test_errors() -> None:
    x = {"a": np.zeros((2, 3)), "b": np.zeros(4)}
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"least": -1}, ValueError, "least['a'] must be at least 0 and finite, got -1"),
        ({"most": math.nan}, ValueError, "most['a'] must be at least 0, got nan"),
        ({"least": 3}, ValueError, "least must sum to at most k, 5, over all groups, got 6"),
        ({"most": {"a": 2, "b": 2.5}}, ValueError, "most must sum to at least k, 5, over all groups, got 4.5"),
        ({"least": {"a": 2}, "most": {"a": 1}}, ValueError, "least['a'] must be at most most, 1, got 2"),
        ({"least": {"c": 1}}, ValueError, "least must have the structure of tree, got least['c'], which tree has not"),
        ({"least": {"a": np.ones((3, 1))}}, ValueError, "least['a'] must be a number, or an array that broadcasts"),
        ({"least": {"a": np.ones((2, 1), bool)}}, TypeError, "least['a'] must be real, got dtype bool"),
        ({"least": "1"}, TypeError, "least must be an array, a number, None, or a dict"),
        ({"least": 1.5, "hard": True}, ValueError, "least['a'] must be a whole number with hard=True, got 1.5"),
    ]
    for options, kind, text in cases:
        with pytest.raises(kind) as caught:
            softk.budget.topk(x, 5, **options)
        assert text in str(caught.value)
    strict = pytest.importorskip("array_api_strict")
    with pytest.raises(TypeError, match="must be an array of the same library"):
        softk.budget.topk(x, 5, least={"a": strict.ones((2, 1))})
