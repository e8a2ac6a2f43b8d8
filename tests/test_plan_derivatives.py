"""Derivatives of what is made of a transport plan: by value, in every argument, in every framework.

The oracle is `plan_oracles`, which differentiates another formulation in 120 digits, or in long double where there are
hundreds of scores; its cotangents are its Jacobian times a vector. Errors are relative to the largest entry of a
derivative, slice by slice: 1e-11 in float64 (measured: 4e-13 at worst), 2e-5 in float32.
"""

from __future__ import annotations

import copy
import gc
import itertools
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pytest

import softk
from softk._reference.plan import rule as plan_rule

from .libraries import BY_NAME, Library
from .plan_oracles import EXACT, LONG, Arithmetic, Ladder, Transported

TOLERANCE = {"float64": 1e-11, "float32": 2e-5}

FUNCTIONS = {"sorted_topk": softk.sorted_topk, "sort": softk.sort, "rank": softk.rank, "transport": softk.transport}

#: Arguments that come by position, after the scores.
PLACED = ("anchors", "marginals")


def assert_close(name: str, found: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    """Relative to the largest entry."""
    assert found.shape == wanted.shape, name
    error = np.max(np.abs(found.astype(float) - wanted), initial=0.0)
    scale = np.max(np.abs(wanted), initial=0.0)
    assert error <= tolerance * scale, f"{name}: off by {error / scale if scale else error:.3g} of the largest"


# --- by value, against the oracle


@dataclass(frozen=True)
class Case:
    """A batch of slices, one of each row of the arguments; epsilon (B, 1)."""

    function: str
    arguments: dict[str, np.ndarray]
    options: dict[str, Any]
    arithmetic: Arithmetic = EXACT

    def rows(self, rows: slice | list[int]) -> Case:
        """Some of the slices."""
        where = {"where": self.options["where"][rows]} if "where" in self.options else {}
        arguments = {name: values[rows] for name, values in self.arguments.items()}
        return Case(self.function, arguments, self.options | where, self.arithmetic)

    def rounded(self, dtype: str) -> Case:
        arguments = {name: values.astype(dtype) for name, values in self.arguments.items()}
        return Case(self.function, arguments, self.options, self.arithmetic)

    def reference(self, i: int) -> Any:
        row = {name: values[i, 0] if name == "epsilon" else values[i] for name, values in self.arguments.items()}
        where = self.options.get("where")
        kept = None if where is None else where[i]
        if self.function == "transport":
            return Transported(**row, where=kept, arithmetic=self.arithmetic)
        if self.function == "sorted_topk":
            largest = self.options.get("mode") != "smallest"
            return Ladder(
                row["x"], self.options["k"], row["epsilon"], largest=largest, where=kept, arithmetic=self.arithmetic
            )
        n = row["x"].size
        rows = self.options.get("num_anchors", n)
        shape = {"unit": n / rows}
        largest = self.options.get("descending", False)
        return Ladder(**row, rows=rows, **shape, largest=largest, arithmetic=self.arithmetic)

    @property
    def parts(self) -> tuple[str, ...]:
        """The results, by their names in the reference."""
        single = {"sort": ("values",), "rank": ("ranks",), "transport": ("plan",)}
        return single.get(self.function, ("values", "assignment"))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        rows, n = self.arguments["x"].shape
        if self.function == "transport":
            return {"plan": (rows, n, self.arguments["anchors"].shape[-1])}
        k = self.options.get("k", self.options.get("num_anchors", n))
        every = {"values": (rows, k), "assignment": (rows, k, n), "ranks": (rows, n)}
        return {part: every[part] for part in self.parts}


def ladder_rows(n: int) -> dict[str, np.ndarray]:
    """Soft, softer, near hard, with ties, and with a gap of 40 temperatures on either side of a boundary."""
    rng = np.random.default_rng(n)
    normal = rng.normal(size=(3, n))
    tied = rng.permutation(np.arange(n) // 2 / 2.0)
    gap = np.sort(rng.exponential(0.02, n)) * np.where(np.arange(n) < 3, 1.0, -1.0)
    gap = rng.permutation(gap + np.where(np.arange(n) < 3, 0.4, -0.4))
    x = np.stack([*normal, tied, gap])
    return {"x": x, "epsilon": np.asarray([[0.5], [5.0], [0.03], [0.2], [0.02]])}


def weighted_rows(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n)
    weights = rng.uniform(0.2, 2.5, size=(5, n))
    weights[1, 2] = 0.0
    return ladder_rows(n) | {"weights": weights}


def transport_rows(weighted: bool) -> dict[str, np.ndarray]:
    """Anchors in any order; soft, softer, near hard, ties, and marginals of which one is a thousandth of another."""
    rng = np.random.default_rng(8)
    rows, n, m = 5, 8, 4
    x, anchors = rng.normal(size=(rows, n)), np.stack([rng.permutation(np.linspace(-1.1, 1.4, m)) for _ in range(rows)])
    x[3] = rng.integers(0, 3, n) / 2.0
    marginals = rng.uniform(0.3, 2.0, size=(rows, m))
    marginals[4] = (1e-3, 2.0, 1.0, 0.1)
    epsilon = np.asarray([[0.5], [5.0], [0.02], [0.2], [0.3]])
    given = {"x": x, "anchors": anchors, "marginals": marginals, "epsilon": epsilon}
    if weighted:
        given["weights"] = rng.uniform(0.2, 2.5, size=(rows, n))
        given["weights"][1, 2] = 0.0
    return given


def where_rows() -> np.ndarray:
    kept = np.random.default_rng(1).uniform(size=(5, 8)) < 0.75
    kept[:, :4] = True
    return kept


def many(n: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(n).normal(size=(2, n)), "epsilon": np.asarray([[0.05], [1.0]])}


def many_to_anchors(n: int, m: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n)
    given = many(n) | {"weights": rng.uniform(0.2, 2.0, size=(2, n))}
    more = {"anchors": rng.normal(size=(2, m)), "marginals": rng.uniform(0.2, 2.0, size=(2, m))}
    return {"x": given.pop("x"), **more, **given}


CASES = {
    "sorted_topk": Case("sorted_topk", ladder_rows(8), {"k": 3}),
    "sorted_topk, all of them, the smallest first": Case("sorted_topk", ladder_rows(7), {"k": 7, "mode": "smallest"}),
    "sorted_topk, some removed": Case("sorted_topk", ladder_rows(8), {"k": 3, "where": where_rows()}),
    "sort": Case("sort", ladder_rows(7), {}),
    "sort, few anchors": Case("sort", ladder_rows(8), {"num_anchors": 3, "descending": True}),
    "rank": Case("rank", ladder_rows(7), {}),
    "rank, few anchors": Case("rank", ladder_rows(8), {"num_anchors": 3, "descending": True}),
    "rank, weights": Case("rank", weighted_rows(7), {}),
    "rank, weights, few anchors": Case("rank", weighted_rows(8), {"num_anchors": 5}),
    "sort, weights": Case("sort", weighted_rows(8), {"num_anchors": 5, "descending": True}),
    "transport": Case("transport", transport_rows(False), {}),
    "transport, weights": Case("transport", transport_rows(True), {}),
    "transport, weights, some removed": Case("transport", transport_rows(True), {"where": where_rows()}),
}

MANY = {
    "sorted_topk": Case("sorted_topk", many(300), {"k": 10}, LONG),
    "rank": Case("rank", many(200), {"num_anchors": 12}, LONG),
    "rank, one anchor for each": Case("rank", many(60), {}, LONG),
    "sort": Case("sort", many(40), {}, LONG),
    "transport": Case("transport", many_to_anchors(300, 8), {}, LONG),
}


@dataclass(frozen=True)
class Wanted:
    """Directions, and the derivatives along them by the oracle."""

    tangents: dict[str, np.ndarray]
    cotangents: dict[str, np.ndarray]
    rates: dict[str, np.ndarray]
    pulled: dict[str, np.ndarray]


def by_oracle(case: Case) -> Wanted:
    rng = np.random.default_rng(42)
    dtype = case.arguments["x"].dtype
    tangents = {name: rng.normal(size=values.shape).astype(dtype) for name, values in case.arguments.items()}
    cotangents = {part: rng.normal(size=shape).astype(dtype) for part, shape in case.shapes().items()}
    rates: dict[str, list[Any]] = {part: [] for part in cotangents}
    pulled: dict[str, list[Any]] = {name: [] for name in tangents}
    for i in range(len(case.arguments["x"])):
        reference = case.reference(i)
        moved = {name: values[i, 0] if name == "epsilon" else values[i] for name, values in tangents.items()}
        if case.function == "transport":
            rates["plan"].append(reference.jvp(**moved))
            found = reference.vjp(cotangents["plan"][i], tuple(pulled))
        else:
            rate = reference.jvp(**moved)
            for part, values in rates.items():
                values.append(rate[part])
            found = reference.vjp(tuple(pulled), **{part: u[i].astype(float) for part, u in cotangents.items()})
        for name, values in pulled.items():
            values.append(np.atleast_1d(found[name]))
    stacked = [{name: np.stack(rows) for name, rows in part.items()} for part in (rates, pulled)]
    return Wanted(tangents, cotangents, *stacked)


@cache
def problem(name: str, dtype: str) -> tuple[Case, Wanted]:
    """In float32 without the last slice, which is hard: that one is tested on its own."""
    case = (CASES[name] if dtype == "float64" else CASES[name].rows(slice(0, 4))).rounded(dtype)
    return case, by_oracle(case)


def wanted(name: str, dtype: str) -> Wanted:
    return problem(name, dtype)[1]


def derivatives(lib: Library, case: Case, along: Wanted, moved: tuple[str, ...]) -> tuple[dict[str, Any], list[Any]]:
    """Cotangents of every argument, and tangents of every result with the arguments `moved`, on a library."""
    options = dict(case.options)
    where, k = options.pop("where", None), options.pop("k", None)
    names = list(case.arguments)
    count, parts = len(names), len(along.cotangents)

    def both(*arrays: Any) -> tuple[Any, Any]:
        given = dict(zip(names, arrays[:count], strict=True))
        tangents = dict(zip(moved, arrays[count : count + len(moved)], strict=True))
        us, rest = arrays[count + len(moved) : count + len(moved) + parts], arrays[count + len(moved) + parts :]
        args = [given.pop("x"), *([] if k is None else [k]), *(given.pop(name) for name in PLACED if name in given)]
        kwargs = given | options | ({"where": rest[0]} if rest else {})
        f = FUNCTIONS[case.function]
        _, pullback = softk.vjp(f, *args, **kwargs)
        _, rate = softk.jvp(f, *args, tangents=tangents, **kwargs)
        return pullback(us if parts > 1 else us[0]), list(rate) if parts > 1 else [rate]

    arrays = [*case.arguments.values(), *(along.tangents[name] for name in moved), *along.cotangents.values()]
    arrays += [] if where is None else [where]
    pulled, rates = lib.call(both, *map(lib.array, arrays))
    return {name: lib.numpy(values) for name, values in pulled.items()}, [lib.numpy(values) for values in rates]


def check(lib: Library, case: Case, along: Wanted) -> None:
    dtype = str(case.arguments["x"].dtype)
    pulled, rates = derivatives(lib, case, along, tuple(case.arguments))
    assert set(pulled) == set(case.arguments)
    for name, values in pulled.items():
        assert values.dtype == dtype
        if name == "epsilon":  # one number a slice, of which one that is nearly 0 would be measured against itself
            assert_close("cotangent of epsilon", values, along.pulled[name], TOLERANCE[dtype])
            continue
        for i, (row, expected) in enumerate(zip(values, along.pulled[name], strict=True)):
            assert_close(f"slice {i}, cotangent of {name}", row, expected, TOLERANCE[dtype])
    for part, values in zip(along.rates, rates, strict=True):
        assert values.dtype == dtype
        for i, (row, expected) in enumerate(zip(values, along.rates[part], strict=True)):
            assert_close(f"slice {i}, tangent of {part}", row, expected, TOLERANCE[dtype])


#: What JAX runs, which compiles every call anew.
COMPILED = {("jax-jit", "sorted_topk", "float64")}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(lib: Library, name: str, dtype: str) -> None:
    if "jax" in lib.name and (lib.name, name, dtype) not in COMPILED:
        pytest.skip("compiling takes too long; run by the other libraries")
    check(lib, *problem(name, dtype))


@pytest.mark.parametrize("name", CASES)
def test_hard_slices_in_single_precision(name: str) -> None:
    """A gap of 40 temperatures on either side of a boundary, a small marginal: along six directions each."""
    case = CASES[name].rows([4] * 6).rounded("float32")
    along = by_oracle(case)
    pulled, rates = derivatives(BY_NAME["numpy"], case, along, tuple(case.arguments))
    for name, values in pulled.items():
        assert_close(f"cotangent of {name}", values, along.pulled[name], TOLERANCE["float32"])
    for part, values in zip(along.rates, rates, strict=True):
        assert_close(f"tangent of {part}", values, along.rates[part], TOLERANCE["float32"])


@pytest.mark.parametrize("least", [1e-3, 1e-6])
def test_a_small_marginal(least: float) -> None:
    """Nothing is lost where an anchor takes next to nothing: its scores' shares follow its marginal in proportion."""
    given = {name: values[:1] for name, values in transport_rows(True).items()}
    given["marginals"] = np.asarray([[least, 2.0, 1.0, 0.5]])
    case = Case("transport", given, {})
    check(BY_NAME["numpy"], case, by_oracle(case))


@pytest.mark.parametrize("name", MANY)
def test_many_scores_against_the_oracle(name: str) -> None:
    check(BY_NAME["numpy"], MANY[name], by_oracle(MANY[name]))


@pytest.mark.parametrize("epsilon", [0.2, 0.1, 0.04, 0.01])
def test_tied_scores_beside_a_gap(epsilon: float) -> None:
    """Anchors that share tied scores, cut off from the others by a gap in which next to nothing is."""
    x, y, masses = np.asarray([-1.0, 1.0, 1.0, 1.0]), np.asarray([3.0, 2.0, 1.0, 0.0]), np.ones(4)
    change = np.asarray([-1.0, 0.0, 0.0, 1.0])
    out, rate = softk.jvp(softk.transport, x, y, masses, epsilon=epsilon, tangents={"marginals": change})
    np.testing.assert_allclose(rate.sum(axis=0), change, rtol=0, atol=1e-13)
    assert out.iterations <= 3


def test_masses_move_across_a_gap(lib: Library) -> None:
    """In float32, 72 temperatures wide on either side, as the mask's do."""
    x, two = np.asarray([0.0, 0.3, 7.5, 7.8], np.float32), np.asarray([2.0, 2.0], np.float32)

    def rates(x: Any, anchors: Any, two: Any, change: Any, k: Any, one: Any) -> dict[str, Any]:
        moved = {"marginals": change}
        return {
            "plan": softk.jvp(softk.transport, x, anchors, two, epsilon=0.1, tangents=moved)[1][..., 1],
            "mask": softk.jvp(softk.topk, x, k, epsilon=0.1, tangents={"k": one})[1],
        }

    if "jax" in lib.name:
        pytest.skip("compiling takes too long; run by the other libraries")
    given = [x, np.asarray([0.0, 1.0]), two, np.asarray([-1.0, 1.0]), np.asarray(2.0), np.asarray(1.0)]
    found = rates(*(lib.array(values.astype(np.float32)) for values in given))
    plan, mask = lib.numpy(found["plan"]), lib.numpy(found["mask"])
    assert mask.max() > 0.4
    np.testing.assert_allclose(plan, mask, rtol=0, atol=1e-4)


def test_equal_anchors_move_apart() -> None:
    """The derivative in an anchor does not jump where it passes another."""
    x, masses, u = np.asarray([0.2, 1.7, -0.5, 0.9]), np.asarray([2.0, 1.0, 1.0]), np.sin(np.arange(12.0)).reshape(4, 3)
    at = [np.asarray([1.0, 0.0, 1.0 + apart]) for apart in (0.0, 1e-9, -1e-9)]
    same, above, below = (softk.vjp(softk.transport, x, y, masses, epsilon=0.5)[1](u)["anchors"] for y in at)
    np.testing.assert_allclose(same, above, rtol=0, atol=1e-7)
    np.testing.assert_allclose(same, below, rtol=0, atol=1e-7)


def test_torch_batched_gradients() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = torch.asarray([0.2, 1.7, -0.5, 0.9], dtype=torch.float64)
    sort, rank = partial(softk.sort, epsilon=0.1), partial(softk.rank, epsilon=0.1)
    for f in (lambda x: softk.sorted_topk(x, 2).values, sort, rank):
        one, all_at_once = (torch.autograd.functional.jacobian(f, x, vectorize=flag) for flag in (False, True))
        torch.testing.assert_close(one, all_at_once)


def test_an_anchor_that_takes_nothing_is_left_out() -> None:
    """It has no derivative in its marginal, in either direction; the others have that of the problem without it."""
    x, y = np.asarray([0.2, 1.7, -0.5, 0.9]), np.asarray([1.0, 0.0, 2.0])
    nothing, tangents = np.asarray([0.0, 1.0, 2.0]), {"marginals": np.asarray([5.0, 1.0, -1.0])}
    _, rate = softk.jvp(softk.transport, x, y, nothing, epsilon=0.5, tangents=tangents)
    tangents = {"marginals": np.asarray([1.0, -1.0])}
    _, without = softk.jvp(softk.transport, x, y[1:], nothing[1:], epsilon=0.5, tangents=tangents)
    np.testing.assert_allclose(rate, np.insert(without, 0, 0.0, axis=1), rtol=0, atol=1e-14)
    u = np.cos(np.arange(12.0)).reshape(4, 3)
    found = softk.vjp(softk.transport, x, y, nothing, epsilon=0.5)[1](u)
    wanted = softk.vjp(softk.transport, x, y[1:], nothing[1:], epsilon=0.5)[1](u[:, 1:])
    for name in ("anchors", "marginals"):
        np.testing.assert_allclose(found[name], np.insert(wanted[name], 0, 0.0), rtol=0, atol=1e-14)
    np.testing.assert_allclose(found["x"], wanted["x"], rtol=0, atol=1e-14)


@pytest.mark.parametrize("only", ["x", "anchors", "marginals", "epsilon", "weights"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_one_argument_alone(library: str, only: str) -> None:
    """The others have no tangent at all, which is not the same as a tangent of zeros."""
    BY_NAME[library].require()
    case, along = CASES["transport, weights"], wanted("transport, weights", "float64")
    _, (rate,) = derivatives(BY_NAME[library], case, along, (only,))
    for i in range(len(rate)):
        move = along.tangents[only][i, 0] if only == "epsilon" else along.tangents[only][i]
        assert_close(f"slice {i}, {only}", rate[i], case.reference(i).jvp(**{only: move}), 1e-11)


def test_one_of_the_two_results() -> None:
    """A cotangent of the values or of the assignment alone."""
    case = CASES["sorted_topk"]
    along = wanted("sorted_topk", "float64")
    u, v = along.cotangents["values"], along.cotangents["assignment"]
    _, pullback = softk.vjp(softk.sorted_topk, case.arguments["x"], 3, epsilon=case.arguments["epsilon"])
    for i in range(len(u)):
        reference = case.reference(i)
        assert_close("values", pullback((u, None))["x"][i], reference.vjp(values=u[i])["x"], 1e-11)
        assert_close("assignment", pullback((None, v))["x"][i], reference.vjp(assignment=v[i])["x"], 1e-11)


def test_what_is_shared_gets_the_sum(rng: np.random.Generator) -> None:
    """Anchors, marginals and epsilon for all slices; another axis than the last."""
    x, u = rng.normal(size=(6, 2)), rng.normal(size=(6, 2, 3))
    y, b, epsilon = np.asarray([0.0, 1.0, 0.4]), np.asarray([1.0, 2.0, 0.5]), np.asarray(0.3)
    _, pullback = softk.vjp(softk.transport, x, y, b, axis=0, epsilon=epsilon)
    found = pullback(u)
    rows = [Transported(x[:, i], y, b, 0.3).vjp(u[:, i]) for i in range(2)]
    assert_close("x", found["x"], np.stack([row["x"] for row in rows], axis=-1), 1e-11)
    for name in ("anchors", "marginals", "epsilon"):
        assert_close(name, found[name], np.asarray(rows[0][name] + rows[1][name]), 1e-11)


def test_nothing_is_nan_for_what_is_finite_infinite_or_removed() -> None:
    """Near the hard limit, with surplus rows, infinities, ties and gaps that underflow."""
    inf = np.inf
    x = np.asarray(
        [
            [0.0, -inf, -inf, -inf, -inf],
            [inf, 1.0, 0.0, -inf, 2.0],
            [inf, inf, inf, inf, 1.0],
            [1e30, 1.0, 1.0, -1e30, 0.0],
            [5.0, 4.0, 3.0, 2.0, 1.0],
            [1.0, 1.0, 1.0, 1.0, 1.0],
            [-inf, -inf, -inf, -inf, -inf],
        ]
    )
    rng = np.random.default_rng(0)
    for epsilon in (10.0, 1e-2, 1e-6):
        for dtype in ("float32", "float64"):
            given = x.astype(dtype), np.asarray(epsilon, dtype)
            u = rng.normal(size=(7, 3)).astype(dtype), rng.normal(size=(7, 3, 5)).astype(dtype)
            _, pullback = softk.vjp(softk.sorted_topk, given[0], 3, epsilon=given[1])
            found = [*pullback(u).values()]
            tangents = {"x": u[1][:, 0], "epsilon": np.asarray(1.0, dtype)}
            found += softk.jvp(softk.sorted_topk, given[0], 3, epsilon=given[1], tangents=tangents)[1]
            for f in (softk.sort, softk.rank):
                found += softk.vjp(f, given[0], epsilon=given[1])[1](u[1][:, 1]).values()
            y, b = np.asarray([0.0, 1.0, 2.0], dtype), np.asarray([1.0, 2.0, 1.0], dtype)
            found += softk.vjp(softk.transport, given[0], y, b, epsilon=given[1])[1](np.swapaxes(u[1], 1, 2)).values()
            assert not any(np.any(np.isnan(values)) for values in found)


# --- the tests tested: a broken rule does not pass


def _unweighted(rule: Any) -> Any:
    rule = copy.copy(rule)
    rule.task = rule.task._replace(weights=np.ones_like(rule.task.weights))
    return rule


def _uncorrected(rule: Any) -> Any:
    """The boundaries do not follow."""
    rule = copy.copy(rule)
    rule.system = copy.copy(rule.system)
    rule.system.matrix = 1e6 * rule.system.matrix
    return rule


def _with_a_sign_changed(rule: Any) -> Any:
    """In M w the boundaries above are subtracted."""
    rule = copy.copy(rule)
    rule.across = lambda before, behind: plan_rule.PlanLinearization.across(rule, -before, behind)
    return rule


FAULTS: dict[str, Callable[[Any], Any]] = {
    "weights dropped": _unweighted,
    "no correction": _uncorrected,
    "a sign changed": _with_a_sign_changed,
}


@pytest.mark.parametrize("fault", [*FAULTS, "epsilon dropped", "masses dropped"])
@pytest.mark.parametrize("direction", ["pull", "push"])
def test_a_broken_rule_is_caught(fault: str, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, along = CASES["transport, weights"], wanted("transport, weights", "float64")
    check(BY_NAME["numpy"], case, along)
    whole = getattr(plan_rule.PlanLinearization, direction)

    def pull(rule: Any, u: Any, c: Any) -> Any:
        xbar, taubar, abar, massbar = whole(FAULTS[fault](rule) if fault in FAULTS else rule, u, c)
        return xbar, (0.0 if "epsilon" in fault else 1.0) * taubar, abar, (0.0 if "mass" in fault else 1.0) * massbar

    def push(rule: Any, dx: Any, dtau: Any, da: Any, dmass: Any) -> Any:
        rule = FAULTS[fault](rule) if fault in FAULTS else rule
        return whole(rule, dx, None if "epsilon" in fault else dtau, da, None if "mass" in fault else dmass)

    monkeypatch.setattr(plan_rule.PlanLinearization, direction, pull if direction == "pull" else push)
    with pytest.raises(AssertionError, match="of the largest"):
        check(BY_NAME["numpy"], case, along)


# --- functions of arrays alone, for the frameworks' own transforms


def positional(function: str) -> Callable[..., Any]:
    """(x, epsilon) -> values and assignment in one array; (x, anchors, marginals, epsilon, weights) -> plan."""

    def topk(x: Any, epsilon: Any) -> Any:
        values, assignment = softk.sorted_topk(x, 2, epsilon=epsilon)
        return assignment * x[..., None, :] ** 2 + values[..., None]

    def transport(x: Any, anchors: Any, marginals: Any, epsilon: Any, weights: Any) -> Any:
        return softk.transport(x, anchors, marginals, epsilon=epsilon, weights=weights).plan

    single = {
        "sort": lambda x, epsilon: softk.sort(x, epsilon=epsilon),
        "rank": lambda x, epsilon: softk.rank(x, epsilon=epsilon, num_anchors=3),
    }
    return {"sorted_topk": topk, "transport": transport, **single}[function]


def arguments(function: str, batch: tuple[int, ...] = ()) -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    one = (*batch, 1) if batch else ()
    x, epsilon = rng.normal(size=(*batch, 4)), rng.uniform(0.4, 0.8, one)
    if function != "transport":
        return [x, epsilon]
    y, b = rng.normal(size=(*batch, 3)), rng.uniform(0.5, 1.5, (*batch, 3))
    return [x, y, b, epsilon, rng.uniform(0.5, 2.0, (*batch, 4))]


def numpy_gradient(function: str, given: list[np.ndarray], u: np.ndarray) -> list[np.ndarray]:
    """Of the sum of u * f, by softk.vjp on NumPy, which the oracle has tested."""
    if function == "transport":
        x, y, b, epsilon, weights = given
        return list(softk.vjp(softk.transport, x, y, b, epsilon=epsilon, weights=weights)[1](u).values())
    x, epsilon = given
    if function == "sorted_topk":
        (_, assignment), pullback = softk.vjp(softk.sorted_topk, x, 2, epsilon=epsilon)
        found = pullback((u.sum(axis=-1), u * x[..., None, :] ** 2))
        found["x"] = found["x"] + np.sum(u * assignment * 2.0 * x[..., None, :], axis=-2)
        return list(found.values())
    options = {"num_anchors": 3} if function == "rank" else {}
    return list(softk.vjp(FUNCTIONS[function], x, epsilon=epsilon, **options)[1](u).values())


def numpy_hessian(function: str, given: list[np.ndarray], u: np.ndarray) -> list[list[np.ndarray]]:
    """Central differences of the gradient, refined once by Richardson: 10 digits."""

    def slope(i: int, place: tuple[int, ...], h: float) -> list[np.ndarray]:
        sides = []
        for sign in (1.0, -1.0):
            moved = [values.copy() for values in given]
            moved[i][place] += sign * h
            sides.append(numpy_gradient(function, moved, u))
        return [(high - low) / (2.0 * h) for high, low in zip(*sides, strict=True)]

    blocks: list[list[np.ndarray]] = []
    for i, values in enumerate(given):
        row = [np.zeros((*values.shape, *other.shape)) for other in given]
        for place in np.ndindex(values.shape):
            coarse, fine = slope(i, place, 2e-3), slope(i, place, 1e-3)
            for j in range(len(given)):
                row[j][place] = (4.0 * fine[j] - coarse[j]) / 3.0
        blocks.append(row)
    return blocks


def shape_of(function: str, batch: tuple[int, ...] = ()) -> tuple[int, ...]:
    return (*batch, *{"sorted_topk": (2, 4), "sort": (4,), "rank": (4,), "transport": (4, 3)}[function])


ALL = pytest.mark.parametrize("function", FUNCTIONS)


def mostly(*least: str) -> pytest.MarkDecorator:
    """One function where one takes seconds, the others in the wider run: their primitives are tested by value above."""
    rest = [pytest.param(name, marks=pytest.mark.full) for name in FUNCTIONS if name not in least]
    return pytest.mark.parametrize("function", [*least, *rest])


# --- torch

TORCH = pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is:DeprecationWarning")


def tensors(values: list[np.ndarray], *, grad: bool = False) -> tuple[Any, ...]:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    return tuple(torch.tensor(value, requires_grad=grad) for value in values)


@TORCH
@mostly("transport")
def test_torch_gradcheck(function: str) -> None:
    given = tensors(arguments(function), grad=True)
    import torch

    assert torch.autograd.gradcheck(positional(function), given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(positional(function), given)


@TORCH
@ALL
def test_torch_hessians(function: str) -> None:
    """All four compositions, in every pair of arguments."""
    values = arguments(function)
    u = np.random.default_rng(1).normal(size=shape_of(function))
    given = tensors(values)
    import torch

    def loss(*given: Any) -> Any:
        return (positional(function)(*given) * torch.tensor(u)).sum()

    places = tuple(range(len(values)))
    expected = numpy_hessian(function, values, u)
    for names in itertools.product(("jacrev", "jacfwd"), repeat=2):
        outer, inner = (getattr(torch.func, name) for name in names)
        found = outer(inner(loss, places), places)(*given)
        for i, j in itertools.product(places, repeat=2):
            assert_close(f"{names}, {i}, {j}", found[i][j].numpy(), expected[i][j], 1e-7)


@TORCH
@ALL
def test_torch_vmap_and_gradients_of_each_sample(function: str) -> None:
    values = arguments(function, (3,))
    u = np.random.default_rng(1).normal(size=shape_of(function, (3,)))
    given, cotangent = tensors(values), tensors([u])[0]
    import torch

    f = positional(function)
    np.testing.assert_allclose(torch.func.vmap(f)(*given), f(*given), rtol=0, atol=1e-13)
    places = tuple(range(1, len(values) + 1))
    grad = torch.func.grad(lambda u, *given: (f(*given) * u).sum(), places)
    found = torch.func.vmap(grad)(cotangent, *given)
    for name, one, other in zip(range(9), found, numpy_gradient(function, values, u), strict=False):
        for i in range(3):
            assert_close(f"argument {name}", one[i].numpy(), other[i], 1e-11)


@pytest.fixture
def _fresh() -> Any:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@TORCH
@mostly("sorted_topk")
@pytest.mark.usefixtures("_fresh")
def test_torch_compile(function: str) -> None:
    """One graph, forward and backward; and the gradient compiled as a whole."""
    values = arguments(function, (2,))
    u = np.random.default_rng(1).normal(size=shape_of(function, (2,)))
    given, (cotangent,) = tensors(values, grad=True), tensors([u])
    import torch

    f = positional(function)
    out = torch.compile(f, fullgraph=True, backend="aot_eager")(*given)
    np.testing.assert_allclose(out.detach(), f(*given).detach(), rtol=0, atol=1e-13)
    expected = numpy_gradient(function, values, u)
    for i, (one, other) in enumerate(zip(torch.autograd.grad(out, given, cotangent), expected, strict=True)):
        assert_close(f"argument {i}", one.numpy(), other, 1e-11)
    grad = torch.func.grad(lambda *given: (f(*given) * cotangent).sum(), tuple(range(len(values))))
    found = torch.compile(grad, fullgraph=True, backend="aot_eager")(*tensors(values))
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"argument {i}", one.numpy(), other, 1e-11)


@TORCH
@ALL
@pytest.mark.usefixtures("_fresh")
def test_torch_export(function: str) -> None:
    given = tensors(arguments(function, (2,)))
    import torch

    f = positional(function)

    class Module(torch.nn.Module):  # type: ignore[misc]
        def forward(self, *given: Any) -> Any:
            return f(*given)

    found = torch.export.export(Module(), given).module()(*given)
    np.testing.assert_allclose(found, f(*given), rtol=0, atol=1e-13)


@ALL
def test_torch_meta_tensors(function: str) -> None:
    given = tuple(value.to("meta").requires_grad_() for value in tensors(arguments(function, (2,))))
    out = positional(function)(*given)
    assert out.device.type == "meta"
    assert tuple(out.shape) == shape_of(function, (2,))
    out.sum().backward()
    assert all(value.grad.shape == value.shape for value in given)


@ALL
def test_torch_native_gradient_is_the_rule_s(function: str) -> None:
    values = arguments(function, (3,))
    u = np.random.default_rng(1).normal(size=shape_of(function, (3,)))
    given, (cotangent,) = tensors(values, grad=True), tensors([u])
    positional(function)(*given).backward(cotangent)
    for i, (one, other) in enumerate(zip(given, numpy_gradient(function, values, u), strict=True)):
        assert_close(f"argument {i}", one.grad.numpy(), other, 1e-12)


# --- JAX


@mostly("transport")
def test_jax(function: str) -> None:
    """jit with a traced epsilon, vmap, the gradient of each sample, and the hessian in every pair of arguments."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    values = arguments(function, (2,))
    values = [v[..., 0] if v.shape == (2, 1) else v for v in values]
    u = np.random.default_rng(1).normal(size=shape_of(function))
    f, places = positional(function), tuple(range(len(values)))

    def loss(*given: Any) -> Any:
        return jax.numpy.sum(f(*given) * u)

    def all_of_it(*given: Any) -> Any:
        return f(*given), jax.grad(loss, places)(*given), jax.hessian(loss, places)(*given)

    out, gradients, hessian = jax.jit(jax.vmap(all_of_it))(*map(jax.numpy.asarray, values))
    for s in range(2):
        one = [np.asarray(value[s]) for value in values]
        np.testing.assert_allclose(out[s], positional(function)(*one), rtol=0, atol=1e-13)
        for i, expected in enumerate(numpy_gradient(function, one, u)):
            assert_close(f"argument {i}", np.asarray(gradients[i][s]), np.asarray(expected), 1e-11)
        blocks = numpy_hessian(function, one, u)
        for i, j in itertools.product(places, repeat=2):
            assert_close(f"arguments {i}, {j}", np.asarray(hessian[i][j][s]), blocks[i][j], 1e-7)


@mostly("rank")
def test_jax_check_grads(function: str) -> None:
    """JAX's own difference quotients, to second order in both modes."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    from jax.test_util import check_grads

    f = jax.jit(lambda *given: positional(function)(*map(jax.numpy.asarray, given)))
    check_grads(f, tuple(map(jax.numpy.asarray, arguments(function))), order=2)


# --- HIPS autograd


@ALL
def test_autograd(function: str) -> None:
    """Every argument on the tape, one at a time, and twice for the scores."""
    autograd = pytest.importorskip("autograd", reason="autograd is not installed")
    values = arguments(function)
    u = np.random.default_rng(1).normal(size=shape_of(function))

    def loss(*given: Any) -> Any:
        return autograd.numpy.sum(positional(function)(*given) * u)

    expected, blocks = numpy_gradient(function, values, u), numpy_hessian(function, values, u)
    for i in range(len(values)):
        assert_close(f"argument {i}", np.asarray(autograd.grad(loss, i)(*values)), np.asarray(expected[i]), 1e-11)
    assert_close("hessian", autograd.hessian(loss)(*values), blocks[0][0], 1e-7)


# --- Dask


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("a value was computed before it was asked for")


@ALL
def test_dask_stays_lazy(function: str) -> None:
    """Values and both derivatives; the batch keeps its blocks."""
    dask = pytest.importorskip("dask", reason="dask is not installed")
    da = pytest.importorskip("dask.array")
    values = arguments(function, (5,))
    u = np.random.default_rng(1).normal(size=shape_of(function, (5,)))
    with dask.config.set(scheduler=refuse):
        with pytest.raises(AssertionError, match="before it was asked for"):
            da.ones(3).compute()
        given = [da.from_array(value, chunks=(2, -(-value.shape[-1] // 2))) for value in values]
        out = positional(function)(*given)
        found = numpy_gradient(function, given, da.from_array(u, chunks=2))
        assert isinstance(out, da.Array)
        assert out.chunks[0] == (2, 2, 1)
        assert all(isinstance(value, da.Array) for value in found)
    np.testing.assert_allclose(out.compute(scheduler="sync"), positional(function)(*values), rtol=0, atol=1e-13)
    for i, (one, other) in enumerate(zip(found, numpy_gradient(function, values, u), strict=True)):
        assert_close(f"argument {i}", one.compute(scheduler="sync"), other, 1e-11)


# --- memory

PEAK = 16.0  # arrays of n k numbers, results and all (measured: 15.1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_memory_of_a_sorted_top_k(dtype: str, rng: np.random.Generator) -> None:
    """Forward and backward are O(n k): one array of n k k numbers would be 16 of n k, on top of the others."""
    n, k = 100_000, 16
    x, u, v = (rng.normal(size=shape).astype(dtype) for shape in (n, k, (k, n)))
    softk.vjp(softk.sorted_topk, x[:50], 2)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        out, pullback = softk.vjp(softk.sorted_topk, x, k)
        held = out, pullback((u, v))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held[1]["x"].shape == x.shape
    arrays = (peak - before) / (n * k * x.itemsize)
    assert arrays <= PEAK, f"{arrays:.2f} arrays of n k at the peak"


@pytest.mark.parametrize(("epsilon", "size"), [(1e-36, 100.0), (1e-30, 1e9)])
def test_tangents_that_are_large_beside_the_temperature(eager: Library, epsilon: float, size: float) -> None:
    """Each score is beside no boundary, so that nothing moves."""
    x, anchors, marginals = (np.asarray(v, "f4") for v in ([3.0, 1.0, 0.0, 2.0], [0.0, 0.5, 1.0], [0.3, 0.3, 0.4]))
    dx, small = np.asarray([size, 2.0 * size, -3.0 * size, 4.0 * size], "f4"), np.asarray(epsilon, "f4")
    x, anchors, marginals, dx, small = (eager.array(v) for v in (x, anchors, marginals, dx, small))
    _, rate = softk.jvp(softk.transport, x, anchors, marginals, epsilon=small, tangents={"x": dx})
    np.testing.assert_array_equal(eager.numpy(rate), np.zeros((4, 3), "f4"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_derivatives_of_sorted_values_near_the_largest_number(eager: Library, dtype: str) -> None:
    """They do not depend on a common factor of the scores and epsilon."""
    rng = np.random.default_rng(3)
    pattern, epsilon, largest = (
        np.asarray([1.5, -1.75, 0.25, 1.0, -0.5]),
        np.asarray([0.75]),
        np.finfo(dtype).maxexp - 1,
    )
    calls: dict[str, tuple[int, Any]] = {
        "sort": (5, lambda x, epsilon: softk.sort(x, epsilon=epsilon)),
        "sort by 3": (3, lambda x, epsilon: softk.sort(x, epsilon=epsilon, num_anchors=3)),
        "sorted_topk": (2, lambda x, epsilon: softk.sorted_topk(x, 2, epsilon=epsilon).values),
    }
    if eager.name == "jax":  # compiling takes long, and the other calls have the same rule
        calls = {"sort": calls["sort"]}
    with softk.kernels("none"):
        for name, (size, call) in calls.items():
            moved = [
                v.astype(dtype) for v in (3.0 * rng.normal(size=size), 2.0 * rng.normal(size=5), np.asarray([0.5]))
            ]
            results = []
            for power in (0, largest):
                given = [(2.0**power * value).astype(dtype) for value in (pattern, epsilon)]
                results.append(_both_rules(eager, call, name, given, *moved))
            for one, other in zip(*results, strict=True):
                assert np.max(np.abs(one)) > 0.1
                assert_close(name, other, one, 2e-5 if dtype == "float32" else 1e-11)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tangents_as_large_as_huge_scores(eager: Library, dtype: str) -> None:
    """Along a common factor of the scores and epsilon, the sorted values change by that factor."""
    half = np.finfo(dtype).maxexp // 2 + 3
    for power in (half, np.finfo(dtype).maxexp - 2):
        x = eager.array((2.0**power * np.asarray([1.5, -1.75, 0.25, 1.0, -0.5])).astype(dtype))
        epsilon = eager.array((2.0**power * np.asarray([0.75])).astype(dtype))
        with softk.kernels("none"):
            values, rate = softk.jvp(softk.sort, x, epsilon=epsilon, tangents={"x": x, "epsilon": epsilon})
        values, rate = (np.asarray(eager.numpy(value), float) for value in (values, rate))
        np.testing.assert_allclose(rate, values, rtol=2e-5 if dtype == "float32" else 1e-12)


def _both_rules(lib: Library, call: Any, name: str, given: list[Any], u: Any, dx: Any, de: Any) -> list[np.ndarray]:
    """Cotangents of x and epsilon, and the tangent of the values along both; in JAX by its own reverse mode."""
    if lib.name == "jax":
        import jax

        _, pull = jax.vjp(call, *map(lib.array, given))
        return [np.asarray(value, float) for value in pull(lib.array(u))]
    x, epsilon = map(lib.array, given)
    function = softk.sorted_topk if name == "sorted_topk" else softk.sort
    options = {"num_anchors": 3} if name == "sort by 3" else {}
    args = (x, 2) if name == "sorted_topk" else (x,)
    tangents = {"x": lib.array(dx), "epsilon": lib.array(de)}
    _, rate = softk.jvp(function, *args, epsilon=epsilon, tangents=tangents, **options)
    _, pullback = softk.vjp(function, *args, epsilon=epsilon, **options)
    cotangent = lib.array(u)
    if name == "sorted_topk":
        rate, cotangent = rate[0], (cotangent, lib.array(np.zeros((2, 5), u.dtype)))
    pulled = pullback(cotangent)
    return [np.asarray(lib.numpy(value), float) for value in (pulled["x"], pulled["epsilon"], rate)]
