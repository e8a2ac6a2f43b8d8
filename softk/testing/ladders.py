"""Whether a kernel for sorting or ranking computes what the reference does.

The measure is the reference itself, in double precision and on the numbers that the dtype has. Softk's own tests hold
it to transport plans that are solved by other means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from softk._reference.plan.ranking import soft_rank
from softk._reference.plan.sorting import soft_sort, sorted_plan
from softk.backend import Array, Backend, Kernel, backend_of, choosing

from .calls import DERIVATIVES, Case

__all__ = ["LADDERS", "LadderCase", "LadderProblem", "ladder_problems"]

LADDERS = (sorted_plan, soft_sort, soft_rank)
#: Scores, anchors, and whether the anchors share the mass of all scores.
SHAPES = ((8, 8, True), (8, 2, False), (40, 3, False), (40, 40, True), (40, 7, True), (90, 90, True))
#: How far a result may be from the reference's, in eps and per score: a row is a sum of them.
VALUES = 16.0
#: How much farther a derivative may be than one of a mask: it comes from a system of all boundaries.
SYSTEM = 4.0

#: The widest gap, in temperatures, in which both sides have a share of a boundary that is a number.
WIDEST = 1000.0


@dataclass(frozen=True)
class LadderProblem:
    """A batch of slices along the last axis of `x`, and the anchors for them.

    Attributes
    ----------
    name : str
        What it is called.
    x : numpy.ndarray
        Scores, shape (slices, n).
    rows : int
        How many anchors there are.
    is_whole : bool
        Whether the anchors share the mass of all scores. Each takes one score otherwise, and the rest is left.
    epsilon : numpy.ndarray
        The strength of the entropy: shape (slices, 1) or ().
    where : numpy.ndarray or None
        Booleans, of the shape of `x`.
    holds : {"derivatives", "values"}
        Whether the derivatives are numbers that a dtype resolves, or the values alone.
    """

    name: str
    x: np.ndarray
    rows: int
    is_whole: bool
    epsilon: np.ndarray
    where: np.ndarray | None = None
    holds: str = "derivatives"


def _slices(n: int) -> np.ndarray:
    """Scores of many kinds, one slice of each."""
    rng = np.random.default_rng(n)
    x = rng.normal(size=n)
    few, infinite, broken = x.copy(), x.copy(), x.copy()
    few[n // 4 :], infinite[:2], broken[1] = -math.inf, math.inf, math.nan
    return np.stack(
        [
            x,
            np.round(3.0 * x) / 3.0,
            np.zeros(n),
            few,
            infinite,
            broken,
            np.full(n, -math.inf),
            np.concatenate([x[: n // 2], x[n // 2 :] - 40.0]),
            rng.standard_t(1.5, size=n),
            np.linspace(-1.0, 1.0, n),
        ]
    )


def ladder_problems() -> Iterator[LadderProblem]:
    """The problems that kernels for sorting and ranking are held to.

    Yields
    ------
    LadderProblem
        Each with a name of its own.
    """
    for n, rows, is_whole in (
        (8, 8, True),
        (8, 2, False),
        (40, 3, False),
        (40, 40, True),
        (40, 7, True),
        (90, 90, True),
    ):
        x = _slices(n)
        kind = f"{rows} of {n}" if is_whole else f"the first {rows} of {n}"
        for epsilon in (30.0, 1.0, 0.1, 1e-3):
            holds = "derivatives" if epsilon in (1.0, 0.1) else "values"
            yield LadderProblem(f"{kind}, epsilon {epsilon:g}", x, rows, is_whole, np.asarray(epsilon), None, holds)
        where = np.random.default_rng(7).random(x.shape) < 0.7
        yield LadderProblem(f"{kind}, where", x, rows, is_whole, np.asarray(0.3), where)
        some = np.random.default_rng(8).uniform(0.05, 1.0, size=(len(x), 1))
        yield LadderProblem(f"{kind}, epsilon by slice", x, rows, is_whole, some)
    yield LadderProblem("one score", np.asarray([[0.5], [math.nan]]), 1, True, np.asarray(0.3))


class LadderCase(Case):
    """One problem for a kernel of sorting or ranking, in one dtype and one layout."""

    def __init__(
        self,
        kernel: Kernel,
        backend: Backend,
        make: Callable[[np.ndarray], Array],
        problem: LadderProblem,
        dtype: str,
        layout: str,
    ) -> None:
        super().__init__(kernel, backend, make, problem.name, dtype, layout)
        self.problem = problem
        self.batch, self.n = problem.x.shape[:-1], problem.x.shape[-1]
        rows = problem.rows
        unit = self.n / rows if problem.is_whole else 1.0
        x, tau = problem.x.astype(self.working), (problem.epsilon / 2.0 / unit).astype(self.working)
        where = problem.where
        self.inputs = (
            self.array(x, dtype),
            self.array(tau),
            self.array(np.asarray(unit)),
            None if where is None else self.array(where, "bool"),
            None,
        )
        self.options = {"rows": rows, "ranks": None}
        # A mass that is rounded to the dtype is none that double precision divides the scores into.
        self.exact = (x.astype(np.float64), tau.astype(np.float64), np.asarray(unit), where, None)

    # -- the measure: the reference in double precision

    def precisely(self, part: str, *groups: Any, **options: Any) -> tuple[Any, ...]:
        """What the reference computes of NumPy's arrays."""
        backend = backend_of(np.ones(1))
        with choosing("none"), backend.quiet():
            found: tuple[Any, ...] = getattr(self.kernel.primitive, part)(backend, *groups, **options)
        return found

    @cached_property
    def outputs(self) -> tuple[Any, ...]:
        """The results and the state."""
        return self.precisely("forward", self.exact, **self.options)

    # -- the checks

    def check_forward(self) -> str | None:
        """Compare the results, and the derivatives that the reference finds from the state."""
        reason = self.refuses(self.inputs, **self.options)
        if reason is not None:
            return reason
        found, primitive = self.compute(self.inputs, **self.options), self.kernel.primitive
        self.require_forms(found, self.by_reference("forward", self.inputs, **self.options))
        finite = self.exact[0][np.isfinite(self.exact[0])]
        size = float(np.max(np.abs(finite), initial=1.0))
        scales = {"assignment": 1.0, "values": size, "rank": float(self.n)}
        for name, one, exact in zip(primitive.results, found, self.outputs, strict=False):
            self.require_near(name, self.values(one), exact, VALUES * self.n * self.eps * scales[name])
        # Of a slice with a NaN, only the first boundary must say so.
        offset, reference = (self.values(value)[..., 0] for value in found[-2:])
        nan, sound = np.isnan(self.outputs[-2][..., 0]), ~np.isnan(self.exact[0]).any(axis=-1, keepdims=True)
        lost = np.isnan(offset)
        self.require(not (lost & sound).any(), "the offset is NaN where the reference's is not")
        self.require(bool(np.all(lost[..., :1] | ~nan[..., :1])), "the offset is not NaN where the reference's is")
        self.require(not (np.isnan(reference) & sound).any(), "the reference score is NaN")
        state = (*(None for _ in primitive.results), *found[-2:])
        self.check_pullback(state, partial(self.by_reference, "vjp"))
        return None

    def check_vjp(self) -> str | None:
        """Compare the cotangents, from the state of the reference and of the kernels of the same name."""
        served, reason = False, None
        for _, outputs in self.states():

            def pull(*groups: Any) -> Any:
                nonlocal served, reason
                refusal = self.refuses(*groups)
                if refusal is not None:
                    reason = refusal
                    return None
                served, found = True, self.compute(*groups)
                self.require_forms(found, self.by_reference("vjp", *groups), groups[-1])
                return found

            self.check_pullback(outputs, pull)
        return None if served else reason

    def groups(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments and the options of a call of the kernel."""
        if self.kernel.part == "forward":
            return (self.inputs,), self.options
        _, outputs = next(self.states())
        return (self.inputs, outputs, (*self.cotangents()[1][:-1], None), (True, True, False, False, False)), {}

    # -- the rules

    def cotangents(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Those of the results and of the offset, for NumPy and for the library."""
        *results, offset = self.outputs[: self.kernel.primitive.moving]
        made = [self.random(value.shape, 1 + i) for i, value in enumerate(results)]
        c = np.where(self.is_resolved(), self.random(offset.shape, 9)[0], 0.0)
        return (*(values for values, _ in made), c), (*(array for _, array in made), self.array(c))

    def is_resolved(self) -> np.ndarray:
        """Whether the shares beyond a boundary are numbers: its offset has no derivative in a wider gap."""
        x, tau, _, where, _ = self.exact
        x = np.expand_dims(x if where is None else np.where(where, x, -math.inf), axis=-2)
        reference = self.outputs[-1]
        high = np.min(np.where(x > reference, x, math.inf), axis=-1, keepdims=True)
        low = np.max(np.where(x <= reference, x, -math.inf), axis=-1, keepdims=True)
        with np.errstate(over="ignore"):
            resolved: np.ndarray = (high - low) / (np.expand_dims(tau, -1) if tau.ndim else tau) < WIDEST
        return resolved

    def check_pullback(self, outputs: Any, pull: Callable[..., Any]) -> None:
        """A rule in reverse mode, on a state that may come from elsewhere.

        The offset of a gap is rounded, and its derivative is as large as the gap is wide: its cotangent is left to
        double precision.
        """
        values, arrays = self.cotangents()
        tries = [(True,) * (len(values) - 1) + (False,)]
        if self.working == "float64":
            tries.append((True,) * len(values))
        for given in tries:
            exact, cotangents = (
                tuple(value if is_given else None for value, is_given in zip(group, given, strict=True))
                for group in (values, arrays)
            )
            needed = (True, True, False, False, False)
            found = pull(self.inputs, outputs, cotangents, needed)
            if found is None:
                continue
            wanted = self.precisely("vjp", self.exact, self.outputs, exact, needed)
            self.require_rates("the cotangent of x", self.values(found[0]), wanted[0])
            # The temperature's is a sum of the scores' times their distances, which may nearly cancel.
            with np.errstate(invalid="ignore"):
                terms = np.abs(wanted[0] * self.exact[0] / self.exact[1])
            terms = np.sum(np.where(np.isfinite(terms), terms, 0.0), axis=-1, keepdims=True)
            terms = terms if np.ndim(wanted[1]) else np.sum(terms)
            self.require_rates("the cotangent of tau", self.values(found[1]), wanted[1], terms)

    # -- how near

    def require_near(self, what: str, mine: np.ndarray, exact: np.ndarray, bound: Any) -> None:
        """Require that NaN is where it must be, and that the rest is near."""
        same = bool(np.array_equal(np.isnan(mine), np.isnan(exact)))
        self.require(same, lambda: f"NaN is not where it must be in {what}: it finds {mine}, the reference {exact}")
        with np.errstate(invalid="ignore"):
            error = np.where((mine == exact) | np.isnan(exact), 0.0, np.abs(mine - exact))
        self.require_small(error, bound, what)

    def require_rates(self, what: str, mine: np.ndarray, exact: np.ndarray, terms: Any = 0.0) -> None:
        """Relative to the largest entry of a slice, and to the terms of a sum."""
        if self.problem.holds != "derivatives":
            self.require(bool(np.array_equal(np.isnan(mine), np.isnan(exact))), f"{what} is {mine}, not {exact}")
            return
        bound = SYSTEM * DERIVATIVES[self.working] * (_largest(exact) + terms)
        self.require_near(what, mine, exact, bound)


def _largest(values: np.ndarray) -> np.ndarray:
    """The largest finite size in each slice."""
    found: np.ndarray = np.where(np.isfinite(values), np.abs(values), 0.0)
    most: np.ndarray = np.max(found, axis=tuple(range(1, found.ndim)), keepdims=True, initial=0.0)
    return most
