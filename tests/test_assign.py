"""Balanced assignments: the plan against other solvers, its derivatives by value, and what it says about itself."""

from __future__ import annotations

import math
import os
import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest

import softk
from softk._reference.assignment import rule as assignment_rule

from .libraries import Library
from .plan_oracles import LONG, Assigned
from .test_errors import complains

INF, NAN = math.inf, math.nan
EPS = {"float64": 2.0**-52, "float32": 2.0**-23}

#: The bound on the error of a plan, in eps, absolute in units of weight: that of the mask.
PLAN = 32
#: The bound on the error of a derivative, relative to the largest entry.
RATE = {"float64": 1e-11, "float32": 2e-5}


def solve(lib: Library, *args: np.ndarray | None, **options: Any) -> softk.Plan:
    """`softk.assign` on a library, the results brought back."""
    made = [value if value is None else lib.array(value) for value in args]
    options = {key: lib.array(value) if isinstance(value, np.ndarray) else value for key, value in options.items()}
    return softk.Plan(*map(lib.numpy, lib.call(softk.assign, *made, **options)))


# --- the plan, against other solvers


@cache
def batch(dtype: str) -> dict[str, np.ndarray]:
    """One problem a slice, from soft to nearly hard: capacities of any size and 0, forbidden pairs, ties."""
    rng = np.random.default_rng(5)
    rows, items, groups = 8, 6, 4
    scores, where = rng.normal(size=(rows, items, groups)), np.ones((rows, items, groups), dtype=bool)
    capacities, weights = rng.uniform(0.2, 2.0, (rows, groups)), rng.uniform(0.3, 2.0, (rows, items))
    epsilon = np.asarray([3.0, 0.5, 0.1, 0.02, 0.5, 0.3, 0.2, 1e-4]).reshape(rows, 1, 1)
    capacities[4] = (1.0, 0.0, 2.0, 1e-3)  # the second takes nothing
    where[5] = rng.uniform(size=(items, groups)) > 0.3
    where[5, :, 0] = True
    scores[5, 1, 2], where[5, 1, 2] = NAN, False
    scores[6, :3] = np.round(scores[6, :3])
    scores[6, 3:] = scores[6, :3]  # every item twice, and scores that tie
    scores[7, :, 1] = scores[7, :, 0]  # two groups that are the same
    weights[2, 1] = 0.0
    named = {"scores": scores, "capacities": capacities, "epsilon": epsilon, "weights": weights}
    return {name: values.astype(dtype) for name, values in named.items()} | {"where": where}


@cache
def references(dtype: str) -> list[Assigned]:
    given = batch(dtype)
    return [
        Assigned(**{name: v[i, 0, 0] if name == "epsilon" else v[i] for name, v in given.items()}) for i in range(8)
    ]


@pytest.mark.parametrize("dtype", EPS)
def test_against_the_reference(lib: Library, dtype: str) -> None:
    problem = batch(dtype)
    options = {name: problem[name] for name in ("epsilon", "weights", "where")}
    found = solve(lib, problem["scores"], problem["capacities"], **options)
    assert found.plan.shape == (8, 6, 4)
    assert found.potentials.shape == (8, 4)
    assert found.marginal_error.shape == found.iterations.shape == found.converged.shape == (8,)
    assert found.plan.dtype == found.potentials.dtype == found.marginal_error.dtype == dtype
    assert found.iterations.dtype.kind == "i"
    assert np.all(found.converged)
    for i, reference in enumerate(references(dtype)):
        error = np.max(np.abs(found.plan[i] - reference.plan))
        assert error <= PLAN * EPS[dtype], f"slice {i}: off by {error / EPS[dtype]:.3g} eps"
        slack = PLAN * EPS[dtype] * (1.0 + float(reference.epsilon / min(reference.c)))
        np.testing.assert_allclose(found.potentials[i], reference.potentials, rtol=0, atol=slack)


def test_the_reference_is_the_optimum() -> None:
    """Its sums hold to 50 digits, and its density is exp(scores / epsilon) times a factor per row and per column."""
    problem = batch("float64")
    for i, reference in enumerate(references("float64")):
        assert max(abs(reference._lack(reference.share))) <= 1e-50
        if problem["where"][i].all() and problem["epsilon"][i, 0, 0] >= 0.1:
            kept = np.ix_(problem["weights"][i] > 0, problem["capacities"][i] > 0)
            logs = np.log(reference.plan[kept]) - problem["scores"][i][kept] / problem["epsilon"][i]
            factors = (logs - logs[:1]) - (logs - logs[:1])[:, :1]
            np.testing.assert_allclose(factors, 0.0, atol=1e-11)


@pytest.mark.parametrize("epsilon", [1.0, 0.1])
@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
def test_against_pot(method: Any, epsilon: float, rng: Any) -> None:
    for name in ("PYTORCH", "JAX", "CUPY", "TENSORFLOW"):  # it would import every framework that it finds
        os.environ.setdefault(f"POT_BACKEND_DISABLE_{name}", "1")
    ot = pytest.importorskip("ot", reason="POT is not installed")
    scores, capacities, weights = 0.5 * rng.normal(size=(20, 5)), rng.uniform(0.5, 2.0, 5), rng.uniform(0.2, 2.0, 20)
    masses = capacities * weights.sum() / capacities.sum()
    wanted = ot.bregman.sinkhorn_log(weights, masses, -scores, epsilon, numItermax=100_000, stopThr=1e-13)
    found = softk.assign(
        scores, capacities, epsilon=epsilon, weights=weights, method=method, tolerance=1e-12, max_iterations=3000
    )
    np.testing.assert_allclose(found.plan, wanted, rtol=0, atol=1e-11)
    factor = found.plan / np.exp((scores + found.potentials) / epsilon)
    np.testing.assert_allclose(factor, factor[:, :1] * np.ones(5), rtol=1e-9)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize(("items", "groups"), [(300, 3), (64, 64), (20, 100), (200, 30)])
def test_it_converges_at_every_epsilon(items: int, groups: int, dtype: str, rng: Any) -> None:
    """From far above the spread of the scores to 1e-6 of it, with equal capacities and with ones of any size."""
    scores = rng.normal(size=(items, groups)).astype(dtype)
    uneven = (rng.uniform(0.0, 1.0, groups) ** 3 + 1e-3).astype(dtype)
    weights = rng.uniform(0.1, 1.0, items).astype(dtype)
    for epsilon in (1e3, 1.0, 1e-2, 1e-4, 1e-6):
        for capacities, mass in ((None, None), (uneven, weights)):
            found = softk.assign(scores, capacities, epsilon=epsilon, weights=mass)
            total = items if mass is None else mass.astype(float).sum()
            share = np.full(groups, 1.0 / groups) if capacities is None else uneven / uneven.astype(float).sum()
            plan = found.plan.astype(float)
            error = np.max(np.abs(plan.sum(axis=0) - share * total))
            assert error <= (1e-8 if dtype == "float64" else 1e-4), (epsilon, error)
            assert found.converged
            assert found.iterations <= 200
            np.testing.assert_allclose(plan.sum(axis=1), 1.0 if mass is None else mass, rtol=8 * EPS[dtype])


def test_nearly_hard_is_the_optimal_assignment(rng: Any) -> None:
    """Of SciPy's linear assignment, each group as often as it has places."""
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy is not installed")
    scores = rng.normal(size=(24, 4))
    items, places = optimize.linear_sum_assignment(-np.repeat(scores, 6, axis=1))
    wanted = np.zeros((24, 4))
    wanted[items, places // 6] = 1.0
    found = softk.assign(scores, epsilon=1e-5)
    np.testing.assert_allclose(found.plan, wanted, atol=1e-12)


@pytest.mark.parametrize("seed", [6, 7])
def test_masses_that_miss_the_weights_by_a_rounding(seed: int) -> None:
    """Nearly hard, with weights of 0.1: the rounding error of the masses is far above the shares between the groups."""
    scores, weights = np.random.default_rng(seed).normal(size=(28, 4)), np.full(28, 0.1)
    reference = Assigned(scores, epsilon=0.003, weights=weights)
    found = softk.assign(scores, epsilon=0.003, weights=weights)
    np.testing.assert_allclose(found.potentials, reference.potentials, rtol=0, atol=1e-6 * 0.003)


def test_many_groups_use_sinkhorn_s_algorithm(rng: Any) -> None:
    """Above 256 groups; the plan is that of Newton's method, within the tolerance."""
    scores = rng.normal(size=(300, 300))
    found, newton = softk.assign(scores, epsilon=1.0), softk.assign(scores, epsilon=1.0, method="newton")
    explicit = softk.assign(scores, epsilon=1.0, method="sinkhorn")
    np.testing.assert_array_equal(found.plan, explicit.plan)
    assert not np.array_equal(found.plan, newton.plan)
    assert found.converged
    np.testing.assert_allclose(found.plan, newton.plan, atol=1e-8)
    few = scores[:, :256]
    np.testing.assert_array_equal(softk.assign(few).plan, softk.assign(few, method="newton").plan)


# --- the recipe of self-labelling


def three_iterations(scores: np.ndarray, epsilon: float) -> np.ndarray:
    """SwAV's recipe: exponentials, and three iterations of Sinkhorn's algorithm. Rows sum to 1."""
    q = np.exp(scores / epsilon).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(axis=1, keepdims=True) * len(q)
        q /= q.sum(axis=0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


def test_three_iterations_miss_the_capacities(rng: Any) -> None:
    """Where epsilon is small they overflow, or the columns are far off. With enough iterations they are right."""
    features, prototypes = rng.normal(size=(128, 16)), rng.normal(size=(8, 16))
    features += 2.0 * prototypes[0]  # nearly collapsed, which is what the balance is for
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    scores = (features @ prototypes.T).astype(np.float32)
    for epsilon in (0.05, 0.03, 0.005):
        with np.errstate(all="ignore"):
            recipe = three_iterations(scores, epsilon)
        found = softk.assign(scores, epsilon=epsilon)
        assert found.converged
        np.testing.assert_allclose(found.plan.sum(axis=0), 16.0, atol=1e-4)
        off = np.max(np.abs(recipe.sum(axis=0) - 16.0))
        if epsilon == 0.005:
            assert np.isnan(off)
        else:
            assert off > 1.0


# --- derivatives


def assert_close(name: str, found: np.ndarray, wanted: np.ndarray, dtype: str, floor: float) -> None:
    """Relative to the largest entry. Entries below the floor are 0 for every purpose."""
    assert np.shape(found) == np.shape(wanted), name
    scale = max(np.max(np.abs(wanted)), floor)
    error = np.max(np.abs(np.asarray(found, dtype=float) - wanted)) / scale
    assert error <= RATE[dtype], f"{name}: off by {error:.3g} of the largest"


@pytest.mark.parametrize("dtype", EPS)
def test_vjp_and_jvp(eager: Library, dtype: str) -> None:
    problem = batch(dtype)
    rng = np.random.default_rng(1)
    u = rng.normal(size=(8, 6, 4)).astype(dtype)
    tangents = {name: rng.normal(size=problem[name].shape).astype(dtype) for name in Assigned.ARGUMENTS}
    given = {name: eager.array(values) for name, values in problem.items()}
    args, options = (given["scores"], given["capacities"]), {n: given[n] for n in ("epsilon", "weights", "where")}
    _, pullback = softk.vjp(softk.assign, *args, **options)
    found = {name: eager.numpy(values) for name, values in pullback(eager.array(u)).items()}
    moved = {name: eager.array(values) for name, values in tangents.items()}
    _, rate = softk.jvp(softk.assign, *args, **options, tangents=moved)
    for i, reference in enumerate(references(dtype)):
        floor = EPS[dtype] / float(reference.epsilon)
        for name, wanted in reference.vjp(u[i]).items():
            # The cotangent of epsilon is one sum over the plan, which may cancel: it is measured by its terms.
            terms = np.sum(np.abs(u[i] * reference.jvp(epsilon=1.0))) if name == "epsilon" else 0.0
            ours = found[name][i].reshape(wanted.shape)
            assert_close(f"slice {i}, {name}", ours, wanted, dtype, max(floor, terms))
        direction = {name: v[i, 0, 0] if name == "epsilon" else v[i] for name, v in tangents.items()}
        direction["scores"] = np.where(problem["where"][i], direction["scores"], 0.0)
        wanted = reference.jvp(**direction)
        assert_close(f"slice {i}, tangent", eager.numpy(rate)[i], wanted, dtype, floor)


def test_derivatives_where_one_item_links_two_groups() -> None:
    """Nearly hard: the two shares of that item do not move, and the rounding error of the shift must not show."""
    scores = np.asarray([[0.9, 0.1], [0.8, 0.15], [0.2, 0.7]])
    capacities, u = np.asarray([1.5, 1.5]), np.asarray([[1.0, -0.3], [0.2, 0.7], [0.4, 2.0]])
    for epsilon in (1e-2, 1e-3):
        reference = Assigned(scores, capacities, epsilon).vjp(u)
        _, pullback = softk.vjp(softk.assign, scores, capacities, epsilon=epsilon)
        found = pullback(u)
        # Below the rounding error squared, times 1 / epsilon, nothing is claimed.
        for name in ("scores", "capacities"):
            assert_close(name, found[name], reference[name], "float64", 1e-20 / epsilon)


def test_the_shift_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above fails without the corrections."""
    monkeypatch.setattr(assignment_rule, "ROUNDS", 1)
    with pytest.raises(AssertionError, match="off by"):
        test_derivatives_where_one_item_links_two_groups()


#: Where groups are linked by shares of exp(-1000) and less, the mass that moves between them must still pass.
NEARLY_HARD = [1.0, 0.1, 0.03, 0.01, 1e-3, 1e-4]


@cache
def nearly_hard(dtype: str) -> dict[str, np.ndarray]:
    """Slices of one problem at a falling epsilon; in the second half two blocks of groups come apart."""
    rng, half = np.random.default_rng(3), np.kron(np.eye(2), np.ones((8, 2)))
    scores = np.stack([rng.normal(size=(16, 4))] * 6 + [half + 1e-3 * rng.normal(size=(16, 4))] * 6)
    named = {
        "scores": scores,
        "capacities": np.ones((12, 4)),
        "epsilon": np.asarray(NEARLY_HARD * 2).reshape(12, 1, 1),
        "weights": np.ones((12, 16)),
    }
    return {name: values.astype(dtype) for name, values in named.items()}


@pytest.mark.parametrize("dtype", EPS)
def test_the_mass_that_moves_is_right_near_the_hard_limit(eager: Library, dtype: str, rng: Any) -> None:
    """The columns of the tangent sum to that of the capacities, its rows to that of the weights; pullbacks agree."""
    problem = nearly_hard(dtype)
    given = {name: eager.array(values) for name, values in problem.items()}
    args, rest = (given.pop("scores"), given.pop("capacities")), given
    moved = {name: rng.normal(size=problem[name].shape).astype(dtype) for name in ("capacities", "weights")}
    u = rng.normal(size=problem["scores"].shape).astype(dtype)
    _, rate = softk.jvp(softk.assign, *args, tangents={k: eager.array(v) for k, v in moved.items()}, **rest)
    assert np.all(eager.numpy(softk.assign(*args, **rest).converged))
    rate = eager.numpy(rate).astype(float)
    sums = moved["weights"].astype(float).sum(axis=-1, keepdims=True) / 4.0
    lost = moved["capacities"].astype(float).mean(axis=-1, keepdims=True)
    wanted = 4.0 * (moved["capacities"] - lost) + sums
    np.testing.assert_allclose(rate.sum(axis=-1), moved["weights"], rtol=0, atol=200 * EPS[dtype])
    np.testing.assert_allclose(rate.sum(axis=-2), wanted, rtol=0, atol=1000 * EPS[dtype])
    _, pullback = softk.vjp(softk.assign, *args, **rest)
    pulled = pullback(eager.array(u))
    terms = [moved[name] * eager.numpy(pulled[name]).astype(float) for name in moved]
    ours = sum(term.reshape(12, -1).sum(axis=-1) for term in terms)
    np.testing.assert_allclose(ours, (u * rate).sum(axis=(-2, -1)), rtol=0, atol=4000 * EPS[dtype])


@pytest.mark.parametrize("dtype", EPS)
def test_derivatives_in_the_sums_by_symmetry(eager: Library, dtype: str) -> None:
    """The two groups of a problem that is its own mirror image share what moves, at every epsilon."""
    scores, ones, u = (np.asarray(v, dtype=dtype) for v in ([[1, 0], [0, 1]], [1, 1], [[1, 0], [0, 0]]))
    scores, ones, moved = eager.array(scores), eager.array(ones), eager.array(np.asarray([1, -1], dtype=dtype))
    for epsilon in NEARLY_HARD:
        _, rate = softk.jvp(softk.assign, scores, ones, epsilon=epsilon, tangents={"capacities": moved})
        slack = {"rtol": 0, "atol": 10 * EPS[dtype]}
        np.testing.assert_allclose(eager.numpy(rate), [[0.5, -0.5], [0.5, -0.5]], **slack)
        _, pullback = softk.vjp(softk.assign, scores, ones, epsilon=epsilon, weights=ones)
        pulled = pullback(eager.array(u))
        if epsilon <= 0.03:
            np.testing.assert_allclose(eager.numpy(pulled["weights"]), [0.75, 0.25], **slack)
        np.testing.assert_allclose(eager.numpy(pulled["capacities"]), [0.25, -0.25], **slack)


@pytest.mark.parametrize("name", ["torch", "jax", "autograd"])
def test_native_gradients(name: str) -> None:
    """The frameworks' own autodiff gives the rule's cotangents, in all arguments at once."""
    pytest.importorskip(name, reason=f"{name} is not installed")
    problem, rng = batch("float64"), np.random.default_rng(2)
    u, where = rng.normal(size=(8, 6, 4)), problem["where"]
    values = [problem[argument] for argument in Assigned.ARGUMENTS]
    _, pullback = softk.vjp(softk.assign, values[0], values[1], epsilon=values[2], weights=values[3], where=where)
    wanted = pullback(u)

    def loss(scores: Any, capacities: Any, epsilon: Any, weights: Any, where: Any = where, u: Any = u) -> Any:
        return (softk.assign(scores, capacities, epsilon=epsilon, weights=weights, where=where).plan * u).sum()

    if name == "torch":
        import torch

        leaves = [torch.tensor(value, requires_grad=True) for value in values]
        found = torch.autograd.grad(loss(*leaves, torch.tensor(where), torch.tensor(u)), leaves)
    elif name == "jax":
        import jax
        import jax.numpy as jnp

        given = [jnp.asarray(value) for value in values]
        found = jax.jit(jax.grad(lambda *args: loss(*args, jnp.asarray(where), jnp.asarray(u)), (0, 1, 2, 3)))(*given)
    else:
        import autograd
        import autograd.numpy as anp

        def total(*args: Any) -> Any:
            options = {"epsilon": args[2], "weights": args[3], "where": where}
            return anp.sum(softk.assign(args[0], args[1], **options).plan * u)

        found = autograd.grad(total, (0, 1, 2, 3))(*values)
    for argument, ours in zip(Assigned.ARGUMENTS, found, strict=True):
        np.testing.assert_allclose(np.asarray(ours), wanted[argument], rtol=1e-10, atol=1e-12, err_msg=argument)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")  # torch's own forward mode
def test_second_derivatives_and_vmap_of_torch(rng: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    shapes = {"scores": (2, 5, 3), "capacities": (2, 3), "epsilon": (2, 1, 1), "weights": (2, 5)}
    values = [torch.tensor(rng.uniform(0.2, 1.0, shape), requires_grad=True) for shape in shapes.values()]

    def plan(scores: Any, capacities: Any, epsilon: Any, weights: Any) -> Any:
        return softk.assign(scores, capacities, epsilon=epsilon, weights=weights).plan

    assert torch.autograd.gradcheck(plan, values, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(plan, values, atol=1e-4)
    detached = [value.detach() for value in values]
    np.testing.assert_allclose(torch.vmap(plan)(*detached), plan(*detached), rtol=0, atol=1e-14)


def test_second_derivatives_and_vmap_of_jax(rng: Any) -> None:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    scores, capacities = jax.numpy.asarray(rng.normal(size=(2, 5, 3))), jax.numpy.asarray(rng.uniform(0.5, 1, (2, 3)))
    u = jax.numpy.asarray(rng.normal(size=(5, 3)))

    def loss(scores: Any, capacities: Any) -> Any:
        return (softk.assign(scores, capacities, epsilon=0.5).plan * u).sum()

    ours = jax.jit(jax.vmap(jax.hessian(loss)))(scores, capacities)
    step = 1e-5
    for i in range(2):
        for place in ((0, 1), (3, 2)):
            moved = np.zeros((5, 3))
            moved[place] = step
            sides = [jax.grad(loss)(scores[i] + sign * moved, capacities[i]) for sign in (1, -1)]
            np.testing.assert_allclose(ours[i][place], (sides[0] - sides[1]) / (2 * step), atol=1e-7)


def test_the_compiler_of_torch_differentiates(rng: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    scores, u = torch.tensor(rng.normal(size=(5, 3))), torch.tensor(rng.normal(size=(5, 3)))

    def loss(scores: Any) -> Any:
        return (softk.assign(scores, epsilon=0.3).plan * u).sum()

    wanted = torch.func.grad(loss)(scores)
    found = torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(scores)
    np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-12)


# --- the ends


@pytest.mark.parametrize("shape", [(7, 1), (1, 4), (1, 1), (2, 9), (0, 3, 4)])
def test_few_items_and_groups(lib: Library, shape: tuple[int, ...], rng: Any) -> None:
    found = solve(lib, rng.normal(size=shape))
    assert found.plan.shape == shape
    np.testing.assert_allclose(found.plan.sum(axis=-1), np.ones(shape[:-1]), rtol=1e-14)
    np.testing.assert_allclose(found.plan.sum(axis=-2), np.full((*shape[:-2], shape[-1]), shape[-2] / shape[-1]))
    assert np.all(found.converged)


def test_a_slice_depends_on_itself_alone(eager: Library, rng: Any) -> None:
    scores = rng.normal(size=(3, 6, 4))
    scores[1] *= 1e20
    bad = scores.copy()
    bad[1, 2, 1] = NAN
    epsilon = np.asarray([1e-3, 0.1, 2.0]).reshape(3, 1, 1)
    whole, broken = solve(eager, scores, epsilon=epsilon), solve(eager, bad, epsilon=epsilon)
    for i in range(3):
        alone = solve(eager, scores[i], epsilon=epsilon[i])
        np.testing.assert_allclose(whole.plan[i], alone.plan, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(broken.plan[[0, 2]], whole.plan[[0, 2]])
    assert np.all(np.isnan(broken.plan[1]))
    assert broken.converged.tolist() == [True, False, True]


@pytest.mark.parametrize("name", ["scores", "infinite", "capacities", "no capacity", "weights", "epsilon"])
def test_a_bad_value_makes_its_slice_nan(lib: Library, name: str, rng: Any) -> None:
    scores, capacities, weights = rng.normal(size=(2, 5, 3)), rng.uniform(0.5, 1.0, (2, 3)), np.ones((2, 5))
    epsilon = np.full((2, 1, 1), 0.2)
    match name:
        case "scores":
            scores[0, 1, 1] = NAN
        case "infinite":
            scores[0, 1, 1] = INF
        case "capacities":
            capacities[0, 1] = -1.0
        case "no capacity":
            capacities[0] = 0.0
        case "weights":
            weights[0, 2] = -0.5
        case "epsilon":
            epsilon[0] = -0.2
    found = solve(lib, scores, capacities, weights=weights, epsilon=epsilon)
    assert np.all(np.isnan(found.plan[0]))
    assert np.all(np.isfinite(found.plan[1]))
    assert found.converged.tolist() == [False, True]


def test_what_takes_nothing(lib: Library, rng: Any) -> None:
    """A group of capacity 0, an item of weight 0, and an item that is forbidden everywhere."""
    scores, capacities = rng.normal(size=(6, 4)), np.asarray([1.0, 0.0, 2.0, 1.0])
    weights = np.asarray([1.0, 0.0, 2.0, 1.0, 1.0, 1.0])
    scores[3] = -INF
    scores[4, 2] = -INF
    found = solve(lib, scores, capacities, weights=weights)
    assert np.all(found.plan[:, 1] == 0.0)
    assert np.all(found.plan[[1, 3]] == 0.0)
    assert found.plan[4, 2] == 0.0
    assert found.potentials[1] == -INF
    np.testing.assert_allclose(found.plan.sum(axis=0), [1.25, 0.0, 2.5, 1.25])
    np.testing.assert_allclose(found.plan.sum(axis=1), [1.0, 0.0, 2.0, 0.0, 1.0, 1.0])
    same = solve(lib, np.where(np.isfinite(scores), scores, NAN), capacities, weights=weights, where=scores > -INF)
    np.testing.assert_array_equal(same.plan, found.plan)


def test_no_derivative_is_nan(eager: Library, rng: Any) -> None:
    scores, capacities = rng.normal(size=(6, 4)), np.asarray([1.0, 0.0, 2.0, 1.0])
    scores[3], scores[4, 2] = -INF, -INF
    for factor in (1.0, 1e20):
        given = {"epsilon": eager.array([[0.1]]), "weights": eager.array([1.0, 0.0, 2.0, 1.0, 1.0, 1.0])}
        _, pullback = softk.vjp(softk.assign, eager.array(factor * scores), eager.array(capacities), **given)
        for name, found in pullback(eager.array(rng.normal(size=(6, 4)))).items():
            assert np.all(np.isfinite(eager.numpy(found))), name


@pytest.mark.parametrize("method", ["newton", "sinkhorn"])
def test_forbidden_pairs_that_admit_no_plan(method: Any) -> None:
    """The first group takes at most one item, but should take two. `converged` says so, and the error is the plan's."""
    scores = np.asarray([[0.3, 0.0], [-INF, 0.2], [-INF, 0.1], [-INF, 0.5]])
    with pytest.warns(softk.ConvergenceWarning, match=r"softk\.assign has not converged.* is 1,.*forbidden"):
        found = softk.assign(scores, method=method)
    assert not found.converged
    np.testing.assert_allclose(found.plan.sum(axis=1), 1.0)
    assert found.marginal_error == np.max(np.abs(found.plan.sum(axis=0) - 2.0))


@pytest.mark.parametrize("dtype", EPS)
def test_huge_scores(lib: Library, dtype: str) -> None:
    """+-1e30 with epsilon 0.1: what is left is decided among the pairs that tie."""
    rng = np.random.default_rng(8)
    scores = np.where(rng.uniform(size=(9, 4)) > 0.5, 1e30, -1e30).astype(dtype)
    found, scaled = solve(lib, scores), solve(lib, scores / np.dtype(dtype).type(1e30), epsilon=1e-4)
    assert found.converged
    np.testing.assert_allclose(found.plan, scaled.plan, atol=1e-6)
    reference = Assigned(scores / 1e30, epsilon=1e-4)
    np.testing.assert_allclose(found.plan, reference.plan, rtol=0, atol=PLAN * EPS[dtype])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_dtypes(dtype: str, rng: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    scores = torch.tensor(rng.normal(size=(20, 4))).to(getattr(torch, dtype)).requires_grad_()
    found = softk.assign(scores, epsilon=0.2)
    assert found.plan.dtype == found.potentials.dtype == found.marginal_error.dtype == scores.dtype
    wide = softk.assign(scores.detach().float(), epsilon=0.2)
    assert torch.equal(found.plan, wide.plan.to(scores.dtype))
    (grad,) = torch.autograd.grad(found.plan[0, 0], scores)
    assert grad.dtype == scores.dtype


def test_equal_groups_get_equal_shares() -> None:
    found = softk.assign(np.zeros((3, 4)), epsilon=1e-9)
    np.testing.assert_allclose(found.plan, 0.25, rtol=1e-14)
    assert found.iterations == 1


def test_shifts_change_nothing(rng: Any) -> None:
    """A number added to a row or a column; only the potentials move."""
    scores, rows, columns = rng.normal(size=(6, 4)), rng.normal(size=(6, 1)), rng.normal(size=4)
    found, moved = softk.assign(scores, epsilon=0.3), softk.assign(scores + rows + columns, epsilon=0.3)
    np.testing.assert_allclose(moved.plan, found.plan, atol=1e-13)
    shift = found.potentials - moved.potentials
    np.testing.assert_allclose(shift - shift[0], columns - columns[0], atol=1e-12)


def test_more_items_than_the_oracle_in_long_double(rng: Any) -> None:
    scores = rng.normal(size=(100, 8))
    for epsilon in (0.3, 0.01):
        reference = Assigned(scores, epsilon=epsilon, arithmetic=LONG)
        np.testing.assert_allclose(softk.assign(scores, epsilon=epsilon).plan, reference.plan, rtol=0, atol=1e-13)


def test_too_few_iterations_are_not_converged(rng: Any) -> None:
    scores = rng.normal(size=(20, 5))
    for method in ("newton", "sinkhorn"):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = softk.assign(scores, np.arange(1.0, 6.0), epsilon=1e-3, method=method, max_iterations=2)
        assert [warning.filename for warning in seen] == [__file__]
        assert not found.converged
        assert found.iterations == 2
        masses = 20.0 * np.arange(1.0, 6.0) / 15.0
        assert found.marginal_error == pytest.approx(np.max(np.abs(found.plan.sum(axis=0) - masses)))


@pytest.mark.parametrize("weight", [1e-9, 1.0, 1e9])
def test_the_tolerance_is_relative_to_the_weights(weight: float, rng: Any) -> None:
    """The plan is in proportion to the weights, and whether it has converged does not depend on their unit."""
    scores = rng.normal(size=(60, 30))
    scores[:, 0] += 3.0
    for method in ("newton", "sinkhorn"):
        found = softk.assign(scores, epsilon=0.2, weights=np.full(60, weight), method=method)
        assert found.converged
        np.testing.assert_allclose(found.plan.sum(axis=0), 2.0 * weight, rtol=1e-7)
        with pytest.warns(softk.ConvergenceWarning, match="in units of the mean weight"):
            found = softk.assign(scores, epsilon=0.2, weights=np.full(60, weight), method=method, max_iterations=1)
        assert not found.converged
        error = np.max(np.abs(found.plan.sum(axis=0) - 2.0 * weight))
        assert found.marginal_error == pytest.approx(error)


def test_many_items_are_summed_accurately(lib: Library, rng: Any) -> None:
    scores = rng.normal(size=(20_000, 4)).astype("float32")
    found = solve(lib, scores, epsilon=0.05)
    assert found.converged
    assert found.marginal_error <= 16 * EPS["float32"] * 5000.0


def test_the_cotangent_of_epsilon_at_huge_scores(eager: Library) -> None:
    """A forbidden pair has no part in it, however far the others are from 0."""
    scores = np.asarray([[-1e38, -0.5e38], [-0.9e38, -INF], [-0.3e38, -0.8e38]], dtype="float32")
    given = (eager.array(scores), eager.array(np.asarray([2.0, 1.0], dtype="float32")))
    _, pullback = softk.vjp(softk.assign, *given, epsilon=eager.array(np.asarray([[0.1]], dtype="float32")))
    pulled = pullback(eager.array(np.asarray([[1.0, 2.0]] * 3, dtype="float32")))
    for name, found in pulled.items():
        assert np.all(np.isfinite(eager.numpy(found))), name


@pytest.mark.parametrize("unit", [2.0**-130, 2.0**-100, 2.0**127])
def test_capacities_of_any_size(eager: Library, unit: float, rng: Any) -> None:
    """Their sum overflows, or they are subnormal numbers: only their ratios matter."""
    if unit < 2.0**-126 and eager.name == "jax":
        pytest.skip("JAX takes subnormal numbers for 0")
    scores, u = (rng.normal(size=(6, 3)).astype("float32") for _ in range(2))
    capacities, moved = (np.asarray(v, dtype="float32") for v in ([1.0, 1.0, 1.5], [1.0, -1.0, 0.5]))
    wanted = solve(eager, scores, capacities, epsilon=0.3)
    found = solve(eager, scores, unit * capacities, epsilon=0.3)
    np.testing.assert_allclose(found.plan, wanted.plan, rtol=0, atol=1e-6)
    given, ones = eager.array(scores), eager.array(capacities)
    scaled = eager.array(np.float32(unit) * capacities)
    rates = [
        eager.numpy(softk.jvp(softk.assign, given, c, epsilon=0.3, tangents={"capacities": eager.array(d)})[1])
        for c, d in ((ones, moved), (scaled, np.float32(unit) * moved))
    ]
    np.testing.assert_allclose(rates[1], rates[0], rtol=0, atol=1e-5)
    if unit == 2.0**-100:  # those of the others overflow or are subnormal numbers
        pulled = [softk.vjp(softk.assign, given, c, epsilon=0.3)[1](eager.array(u)) for c in (ones, scaled)]
        ours = eager.numpy(pulled[1]["capacities"]).astype(float) * unit
        np.testing.assert_allclose(ours, eager.numpy(pulled[0]["capacities"]), rtol=0, atol=1e-5)


def test_derivatives_without_weight(eager: Library, rng: Any) -> None:
    """The plan is 0; its derivatives in the weights are those for equal weights, all others are 0."""
    scores, u, moved = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), rng.uniform(size=5)
    args = (eager.array(scores), eager.array(np.asarray([1.0, 2.0, 1.0])))
    tangents = {"weights": eager.array(moved)}
    rates, pulled = [], []
    for weight in (0.0, 1.0):
        given = {"epsilon": eager.array([[0.3]]), "weights": eager.array(np.full(5, weight))}
        value, rate = softk.jvp(softk.assign, *args, **given, tangents=tangents)
        pulled.append(softk.vjp(softk.assign, *args, **given)[1](eager.array(u)))
        rates.append(eager.numpy(rate))
        if not weight:
            assert np.all(eager.numpy(value.plan) == 0.0)
            assert value.converged
    np.testing.assert_allclose(rates[0], rates[1], rtol=0, atol=1e-13)
    np.testing.assert_allclose(rates[0].sum(axis=0), moved.sum() * np.asarray([0.25, 0.5, 0.25]), rtol=0, atol=1e-13)
    np.testing.assert_allclose(*(eager.numpy(found["weights"]) for found in pulled), rtol=0, atol=1e-13)
    for name in ("scores", "capacities", "epsilon"):
        assert np.all(eager.numpy(pulled[0][name]) == 0.0)


def test_a_warning_beside_a_slice_of_nan(rng: Any) -> None:
    """The message has the error of the slice that has not converged. A NaN alone gives no warning."""
    scores = rng.normal(size=(2, 20, 5))
    scores[0, 0, 0] = NAN
    with pytest.warns(softk.ConvergenceWarning, match=r"the mean weight is \d"):
        found = softk.assign(scores, epsilon=1e-3, max_iterations=2)
    assert found.converged.tolist() == [False, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not softk.assign(scores[0]).converged


# --- errors


def test_errors() -> None:
    scores = np.zeros((2, 4, 3))
    complains(TypeError, "scores", "list", "array", softk.assign, [[1.0]])
    complains(ValueError, "scores", r"\(3,\)", "two axes", softk.assign, np.zeros(3))
    complains(ValueError, "scores", r"\(4, 0\)", "at least one", softk.assign, np.zeros((4, 0)))
    complains(TypeError, "scores", "int64", "floating", softk.assign, np.zeros((4, 2), dtype=np.int64))
    complains(ValueError, "capacities", r"\(4,\)", r"\(3,\).*\(2, 3\)", softk.assign, scores, np.ones(4))
    complains(ValueError, "capacities", r"\(1,\)", r"one value per group.*\(3,\)", softk.assign, scores, np.ones(1))
    complains(TypeError, "capacities", "float", "array", softk.assign, scores, 2.0)
    complains(ValueError, "weights", r"\(3,\)", r"\(4,\).*\(2, 4\)", softk.assign, scores, weights=np.ones(3))
    complains(ValueError, "where", r"\(2,\)", r"\(2, 4, 3\)", softk.assign, scores, where=np.ones(2, dtype=bool))
    complains(TypeError, "where", "float64", "boolean", softk.assign, scores, where=np.ones(3))
    complains(ValueError, "epsilon", "-1", "positive", softk.assign, scores, epsilon=-1.0)
    complains(ValueError, "epsilon", r"\(2,\)", r"\(2, 1, 1\)", softk.assign, scores, epsilon=np.ones(2))
    complains(ValueError, "method", "fast", "newton.*sinkhorn", softk.assign, scores, method="fast")
    complains(ValueError, "method", "array", "newton.*sinkhorn", softk.assign, scores, method=np.ones(2))
    complains(ValueError, "tolerance", "0.0", "positive", softk.assign, scores, tolerance=0.0)
    complains(ValueError, "max_iterations", "0", "positive", softk.assign, scores, max_iterations=0)


def test_derivatives_are_those_of_newton_with_sinkhorn_too(rng: Any) -> None:
    """The rule needs the potentials alone, however they were found."""
    scores, u = rng.normal(size=(2, 12, 4))
    capacities, weights = rng.uniform(0.5, 2.0, 4), rng.uniform(0.5, 2.0, 12)
    found = []
    for method in ("newton", "sinkhorn"):
        options = {"epsilon": 0.5, "weights": weights, "method": method, "tolerance": 1e-14, "max_iterations": 5000}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", softk.ConvergenceWarning)
            _, pullback = softk.vjp(softk.assign, scores, capacities, **options)
        found.append(pullback(u))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=0, atol=1e-11)
