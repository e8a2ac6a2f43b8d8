"""Whether a kernel computes what the reference does, as the contract of `softk.backend.Kernel` has it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from softk._reference.plan.sorting import sorted_plan
from softk._reference.threshold.masks import hard_mask, log_mask, mask, threshold
from softk._reference.threshold.solve import solver
from softk.backend import Array, Backend, Kernel, backend_of, choosing

from .calls import DERIVATIVES, WORKING, Case
from .cases import Problem, problems
from .ladders import LADDERS, LadderCase, LadderProblem, ladder_problems
from .memory import LAYOUTS, UnsupportedError, same_bits

__all__ = ["KernelReport", "check_kernel"]

#: The numbers that softk promises: the mass and the mask in eps.
MASS, MASK = 16.0, 32.0
#: How far a kernel may be from the reference, in eps, where neither is held to the oracle.
EDGE = 8.0

#: The problems whose arrays are tried in every layout.
IN_ALL_LAYOUTS = ("weighted", "where weighted", "deep batch", "repeated rows")
LADDERS_IN_ALL_LAYOUTS = ("7 of 40, where", "the first 2 of 8, where")

MASKS = (mask, hard_mask)
FAMILY = (solver, mask, hard_mask, log_mask, threshold, *LADDERS)


class KernelReport(NamedTuple):
    """Which problems a kernel was held to.

    Attributes
    ----------
    served : tuple of str
        The problems, dtypes and layouts that it served.
    refused : dict
        Those that it refused, and why.
    """

    served: tuple[str, ...]
    refused: dict[str, str]


def check_kernel(
    kernel: Kernel,
    make: Callable[[np.ndarray], Array],
    *,
    dtypes: Sequence[str] = ("float32", "float64"),
    layouts: Sequence[str] = tuple(LAYOUTS),
    only: Callable[[Any], bool] | None = None,
    threads: int = 4,
) -> KernelReport:
    """Hold a kernel of a mask, or of sorting and ranking, to its contract.

    Every problem of `problems` that the kernel does not refuse is computed by the kernel and by the reference. The
    kernel must return the same tuple: its length, None, shapes, dtypes and devices. Masks, thresholds and derivatives
    must be as accurate as softk promises; where no oracle has the answer, at the edges of the contract, they must be
    the reference's. The state of the kernel must serve the reference's rules and the reference's state the kernel's, as
    must the state of every other kernel of the same name. The same call must give the same bits, from memory that held
    something else before, and from several threads at once. What is given must stay as it is.

    Kernels of sorting and ranking have problems of their own, and are held to the reference in double precision.

    Parameters
    ----------
    kernel : Kernel
        A part of one of the primitives "solve_threshold", "topk_mask", "topk_hard_mask", "topk_log_mask",
        "topk_threshold", "sorted_plan", "soft_sort" and "soft_rank"; of the last three the forward pass or the vjp.
    make : callable
        ``make(values) -> array``: an array of the library, on the device, that the kernel is for, from a NumPy array of
        float32, float64 or booleans. The other dtypes are converted from float32 by the library.
    dtypes : sequence of str, optional
        The dtypes of the scores: of "float16", "bfloat16", "float32" and "float64".
    layouts : sequence of str, optional
        How arrays lie in memory: of "contiguous", "strided", "transposed", "reversed" and "broadcast". Those that the
        library does not have are left out.
    only : callable, optional
        ``only(problem) -> bool``: which problems to take; all of them without it.
    threads : int, optional
        How many threads call the kernel at once in one of the checks; 1 for no such check.

    Returns
    -------
    KernelReport
        What was checked, and what the kernel refused.

    Raises
    ------
    AssertionError
        If the kernel breaks its contract, or refuses everything. The text has the names of the kernel, the problem, the
        dtype and the layout.
    ValueError
        If the primitive is of another family, the part one that is not checked, or a dtype or layout unknown.

    Examples
    --------
    The reference itself, wrapped as a kernel:

    >>> import numpy as np
    >>> from softk.backend import PRIMITIVES, Kernel
    >>> from softk.testing import check_kernel
    >>> mask = PRIMITIVES["topk_mask"]
    >>> def refuses(backend, inputs, *groups, **options):
    ...     return None if inputs[3] is None else "it must come without weights"
    >>> kernel = Kernel("example", mask, "vjp", refuses, mask.vjp)
    >>> report = check_kernel(kernel, np.asarray, only=lambda problem: problem.name in ("where", "weighted"))
    >>> report.served
    ('where, float32, contiguous', 'where, float64, contiguous')
    >>> report.refused["weighted, float32, contiguous"]
    'it must come without weights'
    """
    if kernel.primitive not in FAMILY:
        names = ", ".join(primitive.name for primitive in FAMILY)
        raise ValueError(f"kernel must compute one of {names}, got {kernel.primitive.name!r}")
    if kernel.primitive in LADDERS and kernel.part == "jvp":
        raise ValueError(f"kernel must compute forward or vjp of {kernel.primitive.name}, got {kernel.part!r}")
    for label, given, known in (("dtypes", dtypes, WORKING), ("layouts", layouts, LAYOUTS)):
        for value in given:
            if value not in known:
                raise ValueError(f"{label} must be among {', '.join(known)}, got {value!r}")
    backend = backend_of(make(np.zeros(1, np.float32)))
    served: list[str] = []
    refused: dict[str, str] = {}
    for dtype in dtypes:
        if WORKING[dtype] != dtype and not kernel.primitive.narrow:
            continue
        for case in _cases(kernel, backend, make, dtype, layouts, only):
            try:
                reason = case.check()
            except AssertionError:
                raise
            except Exception as error:
                raise AssertionError(case.text(repr(error))) from error
            if reason is None:
                served.append(case.name)
            else:
                refused[case.name] = reason
    assert served, f"kernel {kernel.name} of {kernel.primitive.name}, {kernel.part}: it serves no problem: {refused}"
    if threads > 1:
        _check_threads(kernel, backend, make, dtypes, only, threads)
    return KernelReport(tuple(served), refused)


_solved: dict[str, list[Problem]] = {}


def _rounded_problems(dtype: str) -> list[Problem]:
    """The problems for scores of a dtype, each solved once in a process. The smallest are the largest of -x here."""
    if dtype not in _solved:
        working = WORKING[dtype]
        narrow = None if working == dtype else dtype
        found = []
        for problem in problems(working):
            if problem.mode == "smallest":
                problem = replace(problem, x=-problem.x, mode="largest")
            found.append(problem.rounded(working, narrow))
        _solved[dtype] = found
    return _solved[dtype]


def _cases(
    kernel: Kernel,
    backend: Backend,
    make: Callable[[np.ndarray], Array],
    dtype: str,
    layouts: Iterable[str],
    only: Callable[[Any], bool] | None,
) -> Iterator[Case]:
    is_ladder = kernel.primitive in LADDERS
    for problem in ladder_problems() if is_ladder else _rounded_problems(dtype):
        if only is not None and not only(problem):
            continue
        if isinstance(problem, LadderProblem):
            if kernel.primitive is not sorted_plan and not problem.is_whole:
                continue
        elif kernel.primitive is hard_mask and (
            problem.weights is not None or np.any(problem.k != np.floor(problem.k))
        ):
            continue
        for layout in layouts:
            if layout != "contiguous" and problem.name not in (*IN_ALL_LAYOUTS, *LADDERS_IN_ALL_LAYOUTS):
                continue
            try:
                kind: Any = LadderCase if is_ladder else _Case
                yield kind(kernel, backend, make, problem, dtype, layout)
            except UnsupportedError:
                continue


class _Case(Case):
    """One problem, in one dtype and one layout."""

    def __init__(
        self,
        kernel: Kernel,
        backend: Backend,
        make: Callable[[np.ndarray], Array],
        problem: Problem,
        dtype: str,
        layout: str,
    ) -> None:
        super().__init__(kernel, backend, make, problem.name, dtype, layout)
        self.problem = problem
        self.rounding = 0.0 if self.working == dtype else float(self.xp.finfo(getattr(self.xp, dtype)).eps)
        x = problem.x
        self.batch, self.n = x.shape[:-1], x.shape[-1]
        self.inputs = (
            self.array(x, dtype),
            self.per_slice(problem.k),
            self.per_slice(problem.epsilon, 0.5),
            None if problem.weights is None else self.array(problem.weights),
            None if problem.where is None else self.array(problem.where, "bool"),
        )
        ranks = None
        if problem.is_numeric and problem.weights is None:
            k = float(np.dtype(self.working).type(problem.k))
            ranks = math.ceil(k), math.floor(k) + 1
        self.options = {"ranks": ranks}
        if kernel.primitive is solver:
            self.inputs = self.sanitized(*self.inputs)

    # -- arrays

    def sanitized(self, x: Array, k: Array, tau: Array, *others: Array | None) -> tuple[Any, ...]:
        """A solver is asked with a temperature of 1 and no mass where one of them is out of range."""
        mass, temperature = self.values(k), self.values(tau)
        most = float(np.finfo(self.working).max)
        with np.errstate(invalid="ignore"):
            valid = (temperature > 0.0) & (temperature <= most) & (np.abs(mass) <= most)
        if valid.all():
            return (x, k, tau, *others)
        return (x, self.array(np.where(valid, mass, 0.0)), self.array(np.where(valid, temperature, 1.0)), *others)

    def per_slice(self, values: Any, scale: float = 1.0) -> Array:
        scaled = scale * values
        return self.array(np.asarray(scaled, self.working))

    # -- the checks

    def check_forward(self) -> str | None:
        reason = self.refuses(self.inputs, **self.options)
        if reason is not None:
            return reason
        found, primitive = self.compute(self.inputs, **self.options), self.kernel.primitive
        expected = self.by_reference("forward", self.inputs, **self.options)
        self.require_forms(found, expected)
        if primitive is solver:
            self.check_solution(found, expected)
            return None
        self.check_result(primitive, found[0], expected[0])
        self.check_state(found, expected)
        return None

    def check_solution(self, found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
        """The solver: its flags, its gap, and every operator that is made of it."""
        (_, _, *gap), (_, _, *gap_of_reference) = found[:4], expected[:4]
        settled = self.values(expected[6])
        for name, one, other in zip(solver.constants[4:], found[4:], expected[4:], strict=True):
            mine, wanted = self.values(one), self.values(other)
            wrong = (mine != wanted) & (settled | (name == "settled"))
            self.require(not wrong.any(), f"{name} is {mine.ravel()}, the reference's {wanted.ravel()}")
        sides = settled & ~self.values(expected[4]) & ~self.values(expected[5])
        for name, one, other in zip(("high", "low"), gap, gap_of_reference, strict=True):
            side, exact = self.values(one)[sides], self.values(other)[sides]
            wrong = np.abs(side - exact) > EDGE * self.eps * np.maximum(1.0, np.abs(exact))
            self.require(not np.any(wrong), f"{name} of the gap is {side}, the reference's {exact}")
        fixed = copy.copy(self.backend)
        fixed.kernels = (Kernel("kit", solver, "forward", lambda *_, **__: None, lambda *_, **__: found),)
        for primitive in (mask, log_mask, threshold):
            with choosing("kit"), self.backend.quiet():
                through = primitive.forward(fixed, self.inputs, **self.options)
            with choosing("none"), self.backend.quiet():
                by_reference = primitive.forward(self.backend, self.inputs, **self.options)
            self.check_result(primitive, through[0], by_reference[0])
            if primitive is mask:
                self.check_state(through, by_reference, mask)

    def check_result(self, primitive: Any, found: Array, expected: Array) -> None:
        mine, wanted, problem = self.values(found), self.values(expected), self.problem
        same = bool(np.array_equal(np.isnan(mine), np.isnan(wanted)))
        self.require(same, lambda: f"NaN is not where it must be: it finds {mine}, the reference {wanted}")
        if problem.holds == "contract":
            self.require_edge(primitive, mine, wanted)
        elif primitive is mask:
            self.require_mask(mine)
        elif primitive is hard_mask:
            self.require(bool(np.array_equal(mine, self.hard())), lambda: f"the hard mask is {mine}, not {self.hard()}")
        elif primitive is log_mask:
            exact = np.reshape([oracle.log_mask for oracle in problem.oracles], mine.shape)
            exact = np.where(exact < -float(self.xp.finfo(found.dtype).max), -math.inf, exact)
            self.require(bool(np.array_equal(np.isneginf(mine), np.isneginf(exact))), "-inf is not where it must be")
            with np.errstate(invalid="ignore"):
                error = np.where(np.isneginf(exact), 0.0, np.abs(mine - exact)) / np.maximum(1.0, np.abs(exact))
            self.require_small(error, MASK * self.eps + self.rounding, "the logarithm of the mask")
        else:
            exact = np.reshape([oracle.threshold for oracle in problem.oracles], mine.shape)
            scale = np.abs(exact) + 8.0 * np.broadcast_to(problem.epsilon, exact.shape)
            self.require_small(np.abs(mine - exact) / scale, 8.0 * self.eps, "the threshold")

    def require_mask(self, mine: np.ndarray) -> None:
        problem = self.problem
        self.require(bool(np.all((mine >= 0.0) & (mine <= 1.0))), "the mask is not in [0, 1]")
        self.require_small(np.abs(mine - problem.mask), MASK * self.eps + self.rounding, "the mask")
        weights = np.ones_like(mine) if problem.weights is None else problem.weights.astype(float)
        mass = np.sum(weights * mine, axis=-1, keepdims=True)
        k = np.broadcast_to(np.asarray(problem.k, float), mass.shape)
        bound = MASS * self.eps * np.maximum(1.0, k) + self.rounding * mass
        able = np.isfinite(problem.x) if problem.where is None else np.isfinite(problem.x) & problem.where
        full = (weights * able).sum(axis=-1, keepdims=True) >= k  # else all are selected
        self.require_small(np.where(full, np.abs(mass - k), 0.0), bound, "the mass")

    def require_edge(self, primitive: Any, mine: np.ndarray, wanted: np.ndarray) -> None:
        if primitive is hard_mask:
            self.require(bool(np.array_equal(mine, wanted, equal_nan=True)), f"it finds {mine}, the reference {wanted}")
            return
        with np.errstate(invalid="ignore"):
            error = np.where((mine == wanted) | np.isnan(wanted), 0.0, np.abs(mine - wanted))
        finite = np.where(np.isfinite(wanted), np.abs(wanted), 0.0)
        scale = 1.0 if primitive is mask else np.maximum(1.0, finite)
        self.require_small(error, (EDGE * self.eps + self.rounding) * scale, "against the reference, the result")

    def hard(self) -> np.ndarray:
        """The exact mask of the k largest, ties to the lowest index."""
        x, where = self.problem.x, self.problem.where
        able = x > -math.inf if where is None else where & (x > -math.inf)
        order = np.argsort(-np.where(able, x, -math.inf), axis=-1, kind="stable")
        rank = np.empty(order.shape, int)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(self.n), order.shape), axis=-1)
        return np.where(able & (rank < self.problem.k), 1.0, 0.0)

    def groups(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kernel = self.kernel
        if kernel.part == "forward":
            return (self.inputs,), self.options
        _, outputs = next(self.states())
        if kernel.part == "jvp":
            dx = self.random((*self.batch, self.n), 3, self.dtype)[1]
            return (self.inputs, outputs, (dx, None, None, None, None)), {}
        one = kernel.primitive is threshold
        _, u = self.random((*self.batch, 1 if one else self.n), 1, None if one else self.dtype)
        needed = tuple(i < 3 or (i == 3 and value is not None) for i, value in enumerate(self.inputs))
        return (self.inputs, outputs, (u, None), needed), {}

    # -- the state

    def check_state(self, found: tuple[Any, ...], expected: tuple[Any, ...], primitive: Any = None) -> None:
        """The reference's rules take the kernel's state, and the reference score separates the k largest."""
        primitive = primitive or self.kernel.primitive
        offset, reference = found[-2:]
        nan, wanted = np.isnan(self.values(offset)), np.isnan(self.values(expected[-2]))
        self.require(bool(np.array_equal(nan, wanted)), "the offset is not NaN where the reference's is")
        self.require(not np.isnan(self.values(reference)[~nan]).any(), "the reference score is NaN")
        if self.kernel.primitive in (solver, hard_mask):  # what is made of the others does not read it for that
            self.check_separation(self.values(reference), nan)
        state = (*(None for _ in primitive.results), offset, reference)
        with choosing("none"), self.backend.quiet():
            self.check_pullback(primitive, state, expected, lambda *groups: primitive.vjp(self.backend, *groups))
            self.check_pushforward(primitive, state, expected, lambda *groups: primitive.jvp(self.backend, *groups))

    def check_separation(self, reference: np.ndarray, nan: np.ndarray) -> None:
        problem = self.problem
        k = np.broadcast_to(np.asarray(problem.k, float), reference.shape)
        if problem.weights is not None or self.n == 0:
            return
        x = problem.x if problem.where is None else np.where(problem.where, problem.x, -math.inf)
        able = (x > -math.inf).sum(axis=-1, keepdims=True)
        infinite = (x == math.inf).sum(axis=-1, keepdims=True)
        with np.errstate(invalid="ignore"):
            # A solver gets another mass and temperature in the place of invalid ones.
            epsilon = np.broadcast_to(np.asarray(problem.epsilon, float), reference.shape)
            nan = nan | ~((epsilon > 0.0) & (epsilon < math.inf))
            matters = ~nan & (k == np.floor(k)) & (k > infinite) & (k <= able)
            above, level = ((x > reference).sum(-1, keepdims=True), (x >= reference).sum(-1, keepdims=True))
        wrong = matters & ((above > k) | (level < k))
        self.require(not wrong.any(), lambda: f"the reference score {reference[wrong]} does not separate the k largest")

    # -- the rules

    def check_vjp(self) -> str | None:
        served, reason = False, None
        expected = self.by_reference("forward", self.inputs, **self.options)
        for i, (_, outputs) in enumerate(self.states()):

            def pull(*groups: Any) -> Any:
                nonlocal served, reason
                refusal = self.refuses(*groups)
                if refusal is not None:
                    reason = refusal
                    return None
                served = True
                found = self.compute(*groups)
                self.require_forms(found, self.by_reference("vjp", *groups), groups[-1])
                return found

            self.check_pullback(self.kernel.primitive, outputs, expected, pull, thorough=i == 0)
        return None if served else reason

    def check_jvp(self) -> str | None:
        served, reason = False, None
        expected = self.by_reference("forward", self.inputs, **self.options)
        for i, (_, outputs) in enumerate(self.states()):

            def push(*groups: Any) -> Any:
                nonlocal served, reason
                refusal = self.refuses(*groups)
                if refusal is not None:
                    reason = refusal
                    return None
                served = True
                found = self.compute(*groups)
                self.require_forms(found, self.by_reference("jvp", *groups))
                return found

            self.check_pushforward(self.kernel.primitive, outputs, expected, push, thorough=i == 0)
        return None if served else reason

    def check_pullback(
        self, primitive: Any, outputs: Any, expected: Any, pull: Callable[..., Any], *, thorough: bool = False
    ) -> None:
        """A rule in reverse mode, on a state that may come from elsewhere."""
        one = primitive is threshold
        shape = (*self.batch, 1) if one else (*self.batch, self.n)
        u, given = self.random(shape, 1, None if one else self.dtype)
        c, also = self.random((*self.batch, 1), 2)
        have = (True, True, True, self.problem.weights is not None, False)
        tries: list[tuple[Any, Any, tuple[bool, ...]]] = [((u, None), (given, None), have)]
        if thorough:
            tries += [((u, None), (given, None), tuple(i == j for i in range(5))) for j in range(4) if have[j]]
            # Where nothing or everything is selected, the derivative of the offset is a bound and no number.
            with_offset = [((u, c), (given, also), have), ((None, c), (None, also), have)]
            tries += with_offset if self.problem.holds == "derivatives" else []
        for values, cotangents, needed in tries:
            found = pull(self.inputs, outputs, cotangents, needed)
            if found is None:
                continue
            if self.problem.holds == "derivatives":
                wanted, terms = self.pulled(primitive, outputs, *values)
                self.require_rates(found, wanted, needed, "cotangent of ", terms)
                continue
            with choosing("none"), self.backend.quiet():
                state = (*(None for _ in primitive.results), *expected[len(primitive.results) :])
                by_reference = primitive.vjp(self.backend, self.inputs, state, cotangents, needed)
            self.require_numbers(found, by_reference, needed, "cotangent of ")

    def pulled(self, primitive: Any, outputs: Any, u: Any, c: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The cotangents by the oracle, and the largest terms of those that are sums.

        The cotangent c of the offset s is one of the threshold r + tau s, and one of tau.
        """
        found, terms = self.once(("vjp", primitive.name, u is None, c is None), lambda: self.pull(primitive, u, c))
        if c is None:
            return found, terms
        tau = np.broadcast_to(np.asarray(self.problem.epsilon, float) / 2.0, c.shape)
        by_offset = c * self.values(outputs[-2]) / tau
        found = found | {"epsilon": found["epsilon"] - by_offset}
        return found, terms | {"epsilon": terms["epsilon"] + np.abs(by_offset)}

    def pull(self, primitive: Any, u: Any, c: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        oracles = self.problem.oracles
        rows = len(oracles)
        u = None if u is None else np.reshape(u, (rows, -1))
        found: dict[str, list[Any]] = {"x": [], "k": [], "epsilon": [], "weights": []}
        terms: dict[str, list[Any]] = {"k": [], "epsilon": []}
        for i, oracle in enumerate(oracles):
            by_threshold = oracle.number(0.0 if c is None else np.reshape(c, rows)[i])[()] / oracle.tau
            if primitive is threshold:
                row = oracle.vjp(b=by_threshold + (0.0 if u is None else float(u[i, 0])))
            else:
                row = oracle.vjp(None if u is None else u[i], by_threshold, log=primitive is log_mask)
            row["epsilon"] = 2.0 * row["epsilon"]  # of tau
            for name, value in row.items():
                found[name].append(value)
            for name in terms:
                largest = float(np.max(np.abs(oracle.p * oracle.z * by_threshold))) if name == "epsilon" else 0.0
                if u is not None and primitive is not threshold:
                    along: dict[str, Any] = {f"d{name}": 2.0 if name == "epsilon" else 1.0}
                    rate = oracle.log_jvp(**along) if primitive is log_mask else oracle.jvp(**along)[0]
                    largest += float(np.max(np.abs(u[i] * rate)))
                terms[name].append(largest)
        sizes = {"x": self.n, "weights": self.n, "k": 1, "epsilon": 1}
        shaped = {name: np.reshape(values, (*self.batch, sizes[name])) for name, values in found.items()}
        return shaped, {name: np.reshape(values, (*self.batch, 1)) for name, values in terms.items()}

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What the oracle finds for a problem, kept with the problem: layouts and states do not change it."""
        kept = vars(self.problem).setdefault("found", {})
        if key not in kept:
            kept[key] = compute()
        return kept[key]

    def check_pushforward(
        self, primitive: Any, outputs: Any, expected: Any, push: Callable[..., Any], *, thorough: bool = False
    ) -> None:
        """A rule in forward mode."""
        have = [True, True, True, self.problem.weights is not None]
        tries = [have]
        if thorough:
            tries += [[i == j for i in range(4)] for j in range(4) if have[j]]
        made = [
            self.random(tuple(value.shape), 3 + i) if value is not None else None for i, value in enumerate(self.inputs)
        ]
        if self.dtype != self.working:
            made[0] = self.random(tuple(self.inputs[0].shape), 3, self.dtype)
        for moved in tries:
            values, tangents = (
                [
                    pair[side] if pair is not None and on else None
                    for pair, on in zip(made, [*moved, False], strict=True)
                ]
                for side in (0, 1)
            )
            found = push(self.inputs, outputs, tuple(tangents))
            if found is None:
                continue
            if self.problem.holds == "derivatives":
                key = "jvp", primitive.name, tuple(moved)
                wanted, terms = self.once(key, partial(self.pushed_with_terms, primitive, values))
                self.require_rates(found[:1], wanted, (True,), "tangent of the ", terms)
                again = "jvp of the offset", tuple(moved)
                by_argument = self.once(again, partial(self.pushed_thresholds, values))
                wanted, terms = self.pushed_offset(outputs, by_argument, values[2])
                self.require_rates(found[1:], wanted, (True,), "tangent of the ", terms)
                continue
            with choosing("none"), self.backend.quiet():
                state = (*(None for _ in primitive.results), *expected[len(primitive.results) :])
                by_reference = primitive.jvp(self.backend, self.inputs, state, tuple(tangents))
            self.require_numbers(found[:1], by_reference[:1], (True,), "tangent of the ")

    def pushed_with_terms(self, primitive: Any, tangents: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The tangent of the result by the oracle, and the largest of those along one argument alone."""
        each = [
            self.pushed(primitive, [tangent if i == j else None for j in range(4)])
            for i, tangent in enumerate(tangents[:4])
            if tangent is not None
        ]
        return {"result": self.pushed(primitive, tangents)}, {"result": np.max(np.abs(each), axis=0)}

    def pushed_thresholds(self, tangents: list[Any]) -> list[np.ndarray]:
        """The tangents of the threshold by the oracle: along all arguments, and along each of them alone."""
        alone = [[tangent if i == j else None for j in range(4)] for i, tangent in enumerate(tangents[:4])]
        return [
            self.pushed(threshold, each)
            for each in (tangents, *(row for row in alone if any(part is not None for part in row)))
        ]

    def pushed_offset(
        self, outputs: Any, by_argument: list[np.ndarray], dtau: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The tangent of the offset s = (t - r) / tau, whose reference r is constant, and its largest term."""
        tau = np.broadcast_to(np.asarray(self.problem.epsilon, float) / 2.0, (*self.batch, 1))
        through = self.values(outputs[-2]) * (0.0 if dtau is None else dtau)
        each = [np.abs(through), *(np.abs(part) for part in by_argument)]
        largest = np.max(np.broadcast_arrays(*each), axis=0) / tau
        return {"offset": (by_argument[0] - through) / tau}, {"offset": largest}

    def pushed(self, primitive: Any, tangents: list[Any]) -> np.ndarray:
        oracles = self.problem.oracles
        rows = len(oracles)
        named = {}
        for name, value in zip(("dx", "dk", "depsilon", "dweights"), tangents, strict=False):
            if value is not None:
                size = self.n if name in ("dx", "dweights") else 1
                named[name] = np.broadcast_to(value, (*self.batch, size)).reshape(rows, size)
        found: list[Any] = []
        for i, oracle in enumerate(oracles):
            row: dict[str, Any] = {name: values[i] for name, values in named.items()}
            row |= {name: float(row[name][0]) for name in ("dk", "depsilon") if name in row}
            if "depsilon" in row:
                row["depsilon"] *= 2.0
            if primitive is log_mask:
                found.append(oracle.log_jvp(**row))
            else:
                found.append(oracle.jvp(**row)[primitive is threshold])
        return np.reshape(found, (*self.batch, 1 if primitive is threshold else self.n))

    def require_rates(
        self, found: Any, wanted: dict[str, np.ndarray], needed: Any, prefix: str, terms: dict[str, np.ndarray]
    ) -> None:
        """Relative to the largest entry of rows that belong together, where that is a number of the dtype.

        A derivative that is a sum is measured by the largest of its `terms`, too.
        """
        info = np.finfo(self.working)
        tolerance = DERIVATIVES[self.working] + self.rounding
        for value, (name, exact), need in zip(found, wanted.items(), needed, strict=False):
            if not need or value is None:
                continue
            mine, own = self.values(value), self.xp.finfo(value.dtype)
            most = min(math.sqrt(float(info.max) / 2.0), float(own.max))
            floor = tolerance * float(info.smallest_normal) / self.eps + float(own.smallest_normal) * float(own.eps)
            for label, part in self.problem.parts:
                scale = float(np.max(np.abs(exact[part]), initial=0.0))
                if name in terms:
                    scale = max(scale, float(np.max(terms[name][part], initial=0.0)))
                if scale >= most:
                    continue
                what = f"the {prefix}{name}" if label == "all" else f"the {prefix}{name} in {label}"
                error = np.abs(mine[part] - exact[part])
                self.require_small(error, tolerance * scale + floor, f"{what}, of up to {scale:.3g},")

    def require_numbers(self, found: Any, expected: Any, needed: Any, prefix: str) -> None:
        """NaN where the reference is, and near it at the edges of the contract, but for the temperature's.

        That one is a difference of large terms, each exact to a rounding.
        """
        names = ("x", "k", "epsilon", "weights", "where") if len(found) > 1 else ("result",)
        for name, value, other, need in zip(names, found, expected, needed, strict=False):
            if not need or value is None or other is None:
                continue
            mine, wanted = self.values(value), self.values(other)
            nan = np.isnan(wanted)
            self.require(bool(np.array_equal(np.isnan(mine), nan)), f"the {prefix}{name} is {mine}, not {wanted}")
            if self.problem.holds != "contract" or name in ("epsilon", "result"):
                continue
            wanted, mine = np.where(nan, 0.0, wanted), np.where(nan, 0.0, mine)
            scale = np.max(np.abs(wanted), axis=-1, keepdims=True, initial=0.0)
            tolerance = DERIVATIVES[self.working] + self.rounding
            self.require_small(np.abs(mine - wanted), tolerance * scale, f"the {prefix}{name}")


def _check_threads(
    kernel: Kernel,
    backend: Backend,
    make: Callable[[np.ndarray], Array],
    dtypes: Sequence[str],
    only: Callable[[Any], bool] | None,
    threads: int,
) -> None:
    """The same bits from several threads at once, on the longest problem that the kernel serves."""
    dtype = next((name for name in dtypes if WORKING[name] == name or kernel.primitive.narrow), None)
    if dtype is None:
        return
    cases = list(_cases(kernel, backend, make, dtype, ("contiguous",), only))
    cases.sort(key=lambda case: -case.n)
    for case in cases:
        groups, options = case.groups()
        if case.refuses(*groups, **options) is not None:
            continue

        def call(_: int, case: Case = case, groups: Any = groups, options: Any = options) -> list[Any]:
            with backend.quiet():
                found = kernel.compute(backend, *groups, **options)
            return [case.values(value) if value is not None else None for value in found]

        with choosing(kernel.name):
            first = call(0)
            with ThreadPoolExecutor(threads) as pool:
                others = list(pool.map(call, range(4 * threads)))
        for other in others:
            same = all(one is None or same_bits(one, two) for one, two in zip(first, other, strict=True))
            case.require(same, "the results of several threads at once differ")
        return
