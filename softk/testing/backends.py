"""Whether an adapter does what `softk.backend.Backend` says, and hands on the derivatives of the primitives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np

from softk._functions.derivatives import jvp, vjp
from softk._functions.masks import log_topk, threshold, topk
from softk._native import native_gradient
from softk._reference.threshold.masks import mask as mask_primitive
from softk.backend import Array, Backend, backend_of

from .calls import DERIVATIVES
from .cases import Problem, problems
from .kernels import MASK, MASS
from .memory import same_bits, values_of
from .oracle import EXACT, Oracle

__all__ = ["BackendReport", "check_backend"]

#: The dtypes that may be checked, the widest first.
DTYPES = ("float64", "float32")
#: What is computed without a choice: every argument and every edge, but no problem of which there is a like.
USUAL = (
    *("plain", "weighted", "where", "where weighted", "smallest", "smallest, no weights", "n = 2", "numbers"),
    *("numbers, fractional k", "shared, weighted", "no batch", "deep batch", "n = 1", "rows of 33"),
    *("cauchy scores", "wide scores", "infinite scores", "NaN", "nothing, everything, too much"),
    *("ties", "zeros of either sign", "all removed"),
    *("removed NaN", "fewer than k", "weights out of range", "weights of what is removed", "no slices"),
)
#: On which the library's own differentiation is asked.
DIFFERENTIATED = ("weighted", "where weighted", "smallest", "deep batch", "shared, weighted")

#: The methods of a backend that are checked by themselves.
HOOKS = (
    *("constant", "memory", "holds", "cache_key", "repeat", "map_rows"),
    *("select", "top_k", "solve", "scatter", "reduce_segments", "device", "quiet"),
)

Gradient = Callable[[Callable[[Array], Array], Array, Array], Array | None]


class BackendReport(NamedTuple):
    """What an adapter was held to.

    Attributes
    ----------
    problems : tuple of str
        The problems and dtypes whose values and derivatives by `softk.vjp` and `softk.jvp` were compared.
    native : tuple of str
        The problems and the dtype on which the library's own differentiation was compared. Empty where it has none, or
        where `only` takes none of the problems for it.
    hooks : tuple of str
        The hooks that were checked.
    served_by : str
        The name of the backend that serves what `make` returns, and so computed the values. It is another one than the
        adapter where the adapter `wraps` a library and `make` returns arrays of that library.
    """

    problems: tuple[str, ...]
    native: tuple[str, ...]
    hooks: tuple[str, ...]
    served_by: str


def check_backend(
    backend: Backend | Array,
    *,
    make: Callable[[np.ndarray], Array] | None = None,
    gradient: Gradient | None = None,
    second: bool = False,
    skip: Sequence[str] = (),
    dtypes: Sequence[str] = ("float64", "float32"),
    only: Callable[[Problem], bool] | None = None,
) -> BackendReport:
    """Hold an adapter to its contract, by the operators of the mask family.

    Masks, their logarithms and thresholds are compared with an oracle of high precision, as are their derivatives: by
    `softk.vjp` and `softk.jvp` in every argument, and by the library's own differentiation where there is one. That one
    is also checked for other axes, dtypes and shapes, whose conversions the library differentiates itself. The
    hooks `constant`, `memory`, `holds`, `cache_key`, `repeat`, `map_rows`, `select`, `top_k`, `scatter`,
    `reduce_segments`, `device` and `quiet` must do what their documentation says.

    Parameters
    ----------
    backend : Backend or array
        The adapter, or an array that it serves.
    make : callable, optional
        ``make(values) -> array``: an array of the library from a NumPy array of floating-point numbers or booleans. The
        ``asarray`` of the library's namespace without it.
    gradient : callable, optional
        ``gradient(f, x, cotangent) -> cotangent of x``: the library's own reverse mode, or None where it has none.
        Without it, `native_gradient`, which knows PyTorch, JAX and HIPS autograd.
    second : bool, optional
        Whether the library differentiates the rule itself: then second derivatives are compared, too.
    skip : sequence of str, optional
        The hooks that nobody calls, because the adapter hands the work on to another one.
    dtypes : sequence of {"float32", "float64"}, optional
        The dtypes of the arrays. The library's own differentiation is checked in the widest of them.
    only : callable, optional
        ``only(problem) -> bool``: which of the problems to take; a selection of them without it.

    Returns
    -------
    BackendReport
        What was checked.

    Raises
    ------
    AssertionError
        If the adapter breaks its contract or raises an error. The text has the names of the backend, and of the problem
        and the dtype or of the hook.
    TypeError
        If `backend` is neither a backend nor an array.
    ValueError
        If `skip` names no hook, `dtypes` is empty or has another dtype, `only` takes no problem, or `second` is True
        and no second derivative can be checked.

    Examples
    --------
    >>> import numpy as np
    >>> from softk.testing import check_backend
    >>> report = check_backend(np.ones(1), only=lambda problem: problem.name in ("weighted", "infinite scores"))
    >>> report.problems[:2]
    ('weighted, float64', 'infinite scores, float64')
    >>> report.native, report.served_by
    ((), 'numpy')
    """
    for name in skip:
        if name not in HOOKS:
            raise ValueError(f"skip must be among {', '.join(HOOKS)}, got {name!r}")
    if not isinstance(backend, Backend):
        backend = backend_of(backend)
    if isinstance(dtypes, str) or not dtypes or any(dtype not in DTYPES for dtype in dtypes):
        raise ValueError(f"dtypes must be a sequence of {', '.join(DTYPES)}, got {dtypes!r}")
    chosen = only or (lambda problem: problem.name in USUAL)
    taken = [(problem, dtype) for dtype in dtypes for problem in problems(dtype) if chosen(problem)]
    if not taken:
        raise ValueError("only must take at least one problem, it takes none")
    check = _Check(backend, make or backend.xp.asarray, gradient)
    widest = next(dtype for dtype in DTYPES if dtype in dtypes)
    with check.explained():
        check.hooks(skip)
        for problem, dtype in taken:
            check.problem(problem, dtype)
        check.where = f"backend {backend.name}, gradient"
        native = []
        if check.has_gradient():
            native = [each for each, dtype in taken if dtype == widest and each.name in DIFFERENTIATED]
    if second and not native:
        raise ValueError(
            "second must be False where the library has no gradient or `only` takes none of "
            f"{', '.join(DIFFERENTIATED)}, got True"
        )
    with check.explained():
        for problem in native:
            check.native(problem, widest, second=second)
        if check.has_gradient():
            check.outputs(widest)
            check.conversions(widest)
    return BackendReport(
        tuple(f"{problem.name}, {dtype}" for problem, dtype in taken),
        tuple(f"{problem.name}, {widest}" for problem in native),
        tuple(name for name in HOOKS if name not in skip),
        backend_of(check.make(np.ones(1, widest))).name,
    )


class _Check:
    def __init__(self, backend: Backend, make: Callable[[np.ndarray], Array], gradient: Gradient | None) -> None:
        self.backend, self.make, self.xp = backend, make, backend.xp
        self.gradient: Gradient = gradient or (lambda f, x, u: native_gradient(backend, f, x, u))
        self.where = f"backend {backend.name}"

    @contextmanager
    def explained(self) -> Iterator[None]:
        """An error of the adapter names the hook or the problem, as a broken promise does."""
        try:
            yield
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{self.where}: {error!r}") from error

    def require(self, condition: Any, text: str) -> None:
        if not bool(condition):
            raise AssertionError(f"{self.where}: {text}")

    def values(self, x: Array) -> np.ndarray:
        return values_of(self.backend, x)

    def near(self, what: str, found: np.ndarray, wanted: Any, bound: Any) -> None:
        wanted = np.asarray(wanted)
        self.require(found.shape == wanted.shape, f"{what} has the shape {found.shape}, not {wanted.shape}")
        nan = np.isnan(wanted)
        self.require(np.array_equal(np.isnan(found), nan), f"{what} is {found}, not {wanted}")
        with np.errstate(invalid="ignore"):
            error = np.where(nan | (found == wanted), 0.0, np.abs(found - wanted))
        excess = error - np.broadcast_to(bound, error.shape)
        self.require(not np.any(excess > 0.0), f"{what} is off by {np.max(error, initial=0.0):.3g}")

    def close(self, what: str, found: np.ndarray, wanted: np.ndarray, dtype: str, problem: Problem) -> None:
        """Relative to the largest entry of rows that belong together."""
        self.require(found.shape == wanted.shape, f"{what} has the shape {found.shape}, not {wanted.shape}")
        parts = problem.parts if found.shape[:1] == problem.x.shape[:1] else (("all", ...),)
        for label, part in parts:
            scale = float(np.max(np.abs(wanted[part]), initial=0.0))
            floor = float(np.finfo(dtype).smallest_normal) / float(np.finfo(dtype).eps)
            bound = DERIVATIVES[dtype] * max(scale, floor)
            self.near(what if label == "all" else f"{what} in {label}", found[part], wanted[part], bound)

    # -- the hooks

    def hooks(self, skip: Sequence[str]) -> None:
        x = self.make(np.asarray([[0.5, -1.0, 3.0, 2.0], [4.0, 4.0, -2.0, 0.0], [7.0, 1.0, 5.0, 6.0]]))
        for name in (hook for hook in HOOKS if hook not in skip):
            self.where = f"backend {self.backend.name}, {name}"
            getattr(self, f"check_{name}")(x)
        self.where = f"backend {self.backend.name}"

    def check_constant(self, x: Array) -> None:
        self.require(same_bits(self.values(self.backend.constant(x)), self.values(x)), "it changes the values")
        found = self.gradient(lambda x: x * self.backend.constant(x), x, self.xp.ones_like(x))
        if found is not None:
            self.require(same_bits(self.values(found), self.values(x)), "its result is differentiated")

    def check_memory(self, x: Array) -> None:
        self.require(self.backend.memory(2.5) == 2.5, "a number must be returned as it is")
        raw = self.backend.memory(x)
        self.require(raw is None or tuple(raw.shape) == tuple(x.shape), "it returns memory of another shape")
        seen: list[Any] = []

        def watched(x: Array) -> Array:
            seen.append(self.backend.memory(x))
            return 2.0 * x

        if self.gradient(watched, x, self.xp.ones_like(x)) is not None:
            self.require(seen[0] is None, "an array that is differentiated must have none")

    def check_holds(self, x: Array) -> None:
        held = self.backend.memory(x) is not None
        self.require(self.backend.holds([None, 2.5, True]), "numbers and None must be held")
        self.require(self.backend.holds([x, None, 2.5]) == held, "it disagrees with `memory` about an array")
        seen: list[bool] = []

        def watched(x: Array) -> Array:
            seen.append(self.backend.holds([2.5, x]))
            return 2.0 * x

        if self.gradient(watched, x, self.xp.ones_like(x)) is not None:
            self.require(not seen[0], "an array that is differentiated must not be held")

    def check_cache_key(self, x: Array) -> None:
        key = self.backend.cache_key(x)
        if key is None:
            return
        hash(key)
        self.require(self.backend.cache_key(x + 1.0) == key, "it depends on the values of the array")
        for what, other in (("shape", x[:, :2]), ("dtype", self.xp.astype(x, self.xp.float32))):
            if other.shape != x.shape or other.dtype != x.dtype:
                self.require(self.backend.cache_key(other) != key, f"it does not depend on the {what} of the array")

    def check_repeat(self, x: Array) -> None:
        def step(state: Any) -> Any:
            (x,) = state
            x = self.xp.minimum(x + 1.0, self.xp.full_like(x, 9.0))
            return (x,), x >= 9.0

        for limit, wanted in ((2, self.values(x) + 2.0), (40, np.full((3, 4), 9.0))):
            (found,) = self.backend.repeat(step, (x,), limit)
            self.near(f"{limit} steps", self.values(found), wanted, 0.0)

    def check_solve(self, x: Array) -> None:
        near = np.asarray([[1.0, -0.6, 0.3], [-0.6, 1.0, 0.2], [0.3, 0.2, 1.0]])
        matrices, right = np.stack([np.eye(3), near]), np.asarray([[[1.0], [2.0], [4.0]], [[-1.0], [0.5], [3.0]]])
        found = self.values(self.backend.solve(self.make(matrices), self.make(right)))
        self.near("matrices times the solutions", matrices @ found, right, 1e-12)

    def check_map_rows(self, x: Array) -> None:
        shared = self.make(np.asarray([1.0, 2.0, 3.0, 4.0]))
        each = self.make(np.asarray([[1.0], [10.0], [100.0]]))

        def function(x: Array, shared: Array, each: Array, absent: None) -> tuple[Array, ...]:
            self.require(absent is None, "None must be passed as it is")
            return x * self.xp.broadcast_to(shared, x.shape) + each, self.xp.sum(x, axis=-1, keepdims=True)

        first = self.values(x) * self.values(shared) + self.values(each)
        for rows in (1, 2, 3):
            found = self.backend.map_rows(function, rows, x, shared, each, None)
            self.near(f"{rows} rows at a time, the first result", self.values(found[0]), first, 1e-12)
            sums = self.values(x).sum(axis=-1, keepdims=True)
            self.near(f"{rows} rows at a time, the second result", self.values(found[1]), sums, 1e-12)

    def check_select(self, x: Array) -> None:
        infinite = np.asarray([[0.5, -np.inf, np.inf, 2.0], [4.0, 4.0, -2.0, 0.0], [np.inf, np.inf, 5.0, 6.0]])
        for values in (self.values(x), infinite):
            ordered = -np.sort(-values, axis=-1)
            given = self.make(values)
            for ranks in ((1, 2), (4, 4), (2, 3, 4), (1, 2, 3, 4), (2, 2)):
                found = self.values(self.backend.select(given, ranks))
                self.near(f"the scores of rank {ranks}", found, ordered[:, [rank - 1 for rank in ranks]], 0.0)
            places = np.asarray([[1, 2], [3, 4], [4, 1]])
            found = self.values(self.backend.select(given, self.make(places)))
            self.near("the scores of an array of ranks", found, np.take_along_axis(ordered, places - 1, axis=-1), 0.0)

    def check_top_k(self, x: Array) -> None:
        given = self.values(x)
        for k in (1, 2, 4):
            values, indices = (self.values(found) for found in self.backend.top_k(x, k))
            self.near(f"the {k} largest scores", values, -np.sort(-given, axis=-1)[:, :k], 0.0)
            places = indices.astype(int)
            self.require(all(len(set(row)) == k for row in places.tolist()), f"of {k} indices some are equal")
            self.near(f"the scores at {k} indices", np.take_along_axis(given, places, axis=-1), values, 0.0)

    def check_scatter(self, x: Array) -> None:
        places = np.asarray([[1, 3], [0, 1], [3, 2]])
        wanted = np.zeros((3, 4))
        np.put_along_axis(wanted, places, self.values(x[:, :2]), axis=-1)
        self.near("the result", self.values(self.backend.scatter(x[:, :2], self.make(places), 4)), wanted, 0.0)

    def check_reduce_segments(self, x: Array) -> None:
        segments, given = self.make(np.asarray([0, 0, 2, 2])), self.values(x)
        cases: tuple[tuple[Literal["sum", "max"], Any, float], ...] = (("sum", np.sum, 0.0), ("max", np.max, -np.inf))
        for operation, reduce, of_none in cases:
            wanted = np.full((3, 3), of_none)
            wanted[:, 0], wanted[:, 2] = reduce(given[:, :2], axis=-1), reduce(given[:, 2:], axis=-1)
            found = self.values(self.backend.reduce_segments(x, operation, segments, 3))
            self.near(f"the {operation}", found, wanted, 1e-12)

    def check_device(self, x: Array) -> None:
        made = self.xp.full((), 1.0, dtype=x.dtype, device=self.backend.device(x))
        self.require(self.backend.device(made) == self.backend.device(x), "what is made there is on another device")

    def check_quiet(self, x: Array) -> None:
        with np.errstate(all="raise"), self.backend.quiet(x):
            found = self.values(self.xp.exp(1000.0 * self.xp.abs(x)) * self.xp.zeros_like(x))
        self.require(np.isnan(found).any(), "overflow must give infinity, and infinity times zero NaN")

    # -- the operators

    def given(self, problem: Problem) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments that are arrays or numbers, and the options, in the library's arrays."""
        arguments = {
            name: self.make(values) if isinstance(values, np.ndarray) else values
            for name, values in problem.arguments.items()
        }
        options = {
            name: self.make(value) if isinstance(value, np.ndarray) else value
            for name, value in problem.options.items()
        }
        return arguments, options

    def problem(self, problem: Problem, dtype: str) -> None:
        """Values, and derivatives by `softk.vjp` and `softk.jvp`."""
        self.where = f"backend {self.backend.name}: problem {problem.name}, {dtype}"
        arguments, options = self.given(problem)
        before = {name: self.values(value).copy() for name, value in arguments.items() if hasattr(value, "dtype")}
        x, k = arguments["x"], arguments["k"]
        rest = {name: value for name, value in arguments.items() if name not in ("x", "k")} | options
        found = topk(x, k, **rest)
        self.require(backend_of(found) in (self.backend, backend_of(x)), f"topk returns a {type(found)}")
        self.require(found.dtype == x.dtype, f"topk returns {found.dtype} for {x.dtype}")
        self.check_mask(problem, self.values(found), dtype)
        if problem.holds != "contract":
            self.check_others(problem, x, k, rest, dtype)
        self.check_rules(problem, arguments, options, dtype)
        for name, values in before.items():
            self.require(same_bits(self.values(arguments[name]), values), f"{name} is overwritten")

    def check_mask(self, problem: Problem, found: np.ndarray, dtype: str) -> None:
        eps = float(np.finfo(dtype).eps)
        self.near("the mask", found, problem.mask, MASK * eps)
        finite = found[~np.isnan(found)]
        self.require(np.all((finite >= 0.0) & (finite <= 1.0)), "the mask is not in [0, 1]")
        if problem.holds == "contract":
            return
        weights = 1.0 if problem.weights is None else problem.weights.astype(float)
        k = np.broadcast_to(np.asarray(problem.k, float), (*problem.x.shape[:-1], 1))
        mass = np.sum(weights * found, axis=-1, keepdims=True)
        self.near("the mass", mass, k, MASS * eps * np.maximum(1.0, k))

    def check_others(self, problem: Problem, x: Array, k: Any, rest: dict[str, Any], dtype: str) -> None:
        eps, batch = float(np.finfo(dtype).eps), problem.x.shape[:-1]
        found = self.values(log_topk(x, k, **rest))
        wanted = np.reshape([oracle.log_mask for oracle in problem.oracles], problem.x.shape)
        finite = np.where(np.isfinite(wanted), np.abs(wanted), 0.0)
        self.near("the logarithm of the mask", found, wanted, MASK * eps * np.maximum(1.0, finite))
        found = self.values(threshold(x, k, **rest))
        wanted = np.reshape([oracle.threshold for oracle in problem.oracles], batch)
        epsilon = np.broadcast_to(problem.epsilon, (*batch, 1))[..., 0]
        self.near("the threshold", found, wanted, 8.0 * eps * (np.abs(wanted) + 8.0 * epsilon))

    def operators(self) -> Iterator[tuple[str, Any]]:
        yield from (("topk", topk), ("log_topk", log_topk), ("threshold", threshold))

    def cotangent(self, problem: Problem, function: str) -> np.ndarray:
        shape = problem.x.shape[:-1] if function == "threshold" else problem.x.shape
        return np.random.default_rng(42).normal(size=shape).astype(problem.x.dtype)

    def check_rules(self, problem: Problem, arguments: dict[str, Any], options: dict[str, Any], dtype: str) -> None:
        x, k = arguments["x"], arguments["k"]
        rest = {name: value for name, value in arguments.items() if name not in ("x", "k")} | options
        names = [name for name, value in arguments.items() if hasattr(value, "dtype")]
        tangents = {
            name: np.random.default_rng(5 + i).normal(size=problem.arguments[name].shape).astype(dtype)
            for i, name in enumerate(names)
        }
        for function, f in self.operators():
            u = self.cotangent(problem, function)
            _, pullback = vjp(f, x, k, **rest)
            found = pullback(self.make(u))
            self.require(
                set(found) == set(names), f"softk.vjp of {function} returns {sorted(found)}, not {sorted(names)}"
            )
            _, rate = jvp(f, x, k, tangents={name: self.make(value) for name, value in tangents.items()}, **rest)
            if problem.holds != "derivatives":
                if function == "topk":
                    self.check_numbers(problem, {name: self.values(value) for name, value in found.items()})
                continue
            wanted = pulled(problem, u, function)
            for name in names:
                self.close(f"{function}, softk.vjp in {name}", self.values(found[name]), wanted[name], dtype, problem)
            self.close(f"{function}, softk.jvp", self.values(rate), pushed(problem, tangents, function), dtype, problem)

    def check_numbers(self, problem: Problem, found: dict[str, np.ndarray]) -> None:
        """No derivative in the scores is NaN where the mask is a number."""
        rows = ~np.isnan(problem.mask).any(axis=-1)
        self.require(not np.isnan(found["x"][rows]).any(), "softk.vjp in x is NaN where the mask is not")

    # -- the library's own differentiation

    def has_gradient(self) -> bool:
        x = self.make(np.ones(2))
        return self.gradient(lambda x: 2.0 * x, x, self.xp.ones_like(x)) is not None

    def native(self, problem: Problem, dtype: str, *, second: bool) -> None:
        self.where = f"backend {self.backend.name}: problem {problem.name}, {dtype}"
        arguments, options = self.given(problem)

        for function, f in self.operators():
            u = self.cotangent(problem, function)
            wanted = pulled(problem, u, function)
            for name, value in arguments.items():

                def along(value: Array, name: str = name, f: Any = f) -> Array:
                    given = {**arguments, name: value}
                    return f(given.pop("x"), given.pop("k"), **given, **options)

                found = self.gradient(along, value, self.make(u))
                self.require(found is not None, f"{function} has no derivative in {name}")
                what = f"{function}, the library's derivative in {name}"
                self.close(what, self.values(found), wanted[name], dtype, problem)
        if second:
            self.check_second(problem, arguments, options, dtype)

    def check_second(self, problem: Problem, arguments: dict[str, Any], options: dict[str, Any], dtype: str) -> None:
        """The library differentiates the rule: the cotangent of the scores, along a direction."""
        u = self.cotangent(problem, "topk")
        w = np.random.default_rng(6).normal(size=u.shape).astype(u.dtype)
        rest = {name: value for name, value in arguments.items() if name not in ("x", "k")} | options

        def rule(x: Array) -> Array:
            return vjp(topk, x, arguments["k"], **rest)[1](self.make(u))["x"]

        found = self.gradient(rule, arguments["x"], self.make(w))
        self.require(found is not None, "the rule has no derivative")
        rows = np.ndindex(u.shape[:-1])
        wanted = [second_derivative(problem.row(i), problem.mode, u[i], w[i]) for i in rows]
        self.near(
            "the second derivative",
            self.values(found),
            np.reshape(wanted, u.shape),
            DERIVATIVES[dtype] * np.max(np.abs(np.reshape(wanted, u.shape)), axis=-1, keepdims=True),
        )

    def outputs(self, dtype: str) -> None:
        """The state is differentiable, and the constants are not, whatever cotangent they are given."""
        self.where = f"backend {self.backend.name}, bind"
        tolerance = DERIVATIVES[dtype]
        x = np.asarray([[0.2, 1.7, -0.5, 0.9]], dtype)
        oracle = Oracle(x[0], 1.5, 0.5)
        rest = self.make(np.asarray([[1.5]], dtype)), self.make(np.asarray([[0.25]], dtype)), None, None
        bound = self.backend.bind(mask_primitive, ranks=None)
        u = np.asarray([[0.3, -1.0, 0.7, 0.2]], dtype)
        by_mask = oracle.vjp(u[0])["x"][None]
        found = self.gradient(lambda x: bound(x, *rest)[0], self.make(x), self.make(u))
        self.near("the derivative of the result", self.values(found), by_mask, tolerance)
        found = self.gradient(lambda x: bound(x, *rest)[1], self.make(x), self.make(np.asarray([[0.25]], dtype)))
        self.near("the derivative of the state", self.values(found), oracle.vjp(b=1.0)["x"][None], tolerance)

        def with_constant(x: Array) -> Array:
            share, _, reference = bound(x, *rest)
            return share + 0.5 * reference

        found = self.gradient(with_constant, self.make(x), self.make(u))
        self.near("the derivative of a result and a constant", self.values(found), by_mask, tolerance)

    def conversions(self, dtype: str) -> None:
        """The operations before and after a primitive have derivatives too: those of NumPy's arrays are the measure."""
        rng = np.random.default_rng(8)
        x = rng.normal(size=(3, 4, 2)).astype(dtype)
        along, narrow = {"axis": 1, "epsilon": 0.5}, np.float32 if dtype == "float64" else np.float16
        cases: tuple[tuple[str, Any, str, dict[str, Any], dict[str, Any]], ...] = (
            ("along axis 0", topk, "x", {"x": x, "k": 1.5}, {"axis": 0, "epsilon": 0.5}),
            ("along the axes (0, 2)", log_topk, "x", {"x": x, "k": 2.5}, {"axis": (0, 2), "epsilon": 0.5}),
            ("along axis 1", threshold, "x", {"x": x, "k": 1.5}, {**along, "mode": "smallest"}),
            ("along axis 1", threshold, "x", {"x": x, "k": 1.5}, {**along, "keepdims": True}),
            ("of scores in a narrower dtype", threshold, "x", {"x": x.astype(narrow), "k": 1.5}, along),
            ("for all slices", topk, "k", {"x": x, "k": np.asarray([1.5], dtype)}, along),
            ("in a narrower dtype", topk, "k", {"x": x, "k": np.full((3, 1, 2), 1.5, narrow)}, along),
            ("of each item", topk, "weights", {"x": x, "k": 1.5, "weights": np.ones((4, 1), dtype)}, along),
        )
        for where, function, name, given, options in cases:
            # The operands of the primitive are of its own shape and dtype; here the user's are others.
            self.where = f"backend {self.backend.name}: {function.__name__}, {name} {where}"
            arguments = {
                key: self.make(value) if isinstance(value, np.ndarray) else value for key, value in given.items()
            }

            def of(
                value: Array, f: Any = function, name: str = name, rest: Any = arguments, options: Any = options
            ) -> Any:
                rest = {**rest, name: value}
                return f(rest.pop("x"), rest.pop("k"), **rest, **options)

            rest = {**given, **options}
            out, pullback = vjp(function, rest.pop("x"), rest.pop("k"), **rest)
            u = rng.normal(size=out.shape).astype(out.dtype)
            wanted = pullback(u)[name]
            found = self.gradient(of, arguments[name], self.make(u))
            self.require(found is not None, "there is no derivative")
            eps = float(np.finfo(wanted.dtype).eps)
            bound = max(4.0 * eps, DERIVATIVES[dtype]) * float(np.max(np.abs(wanted)))
            self.near("the library's derivative", self.values(found), wanted, bound)


# --- the oracle, on a whole problem


def pulled(problem: Problem, u: np.ndarray, function: str) -> dict[str, np.ndarray]:
    """The cotangents of the arguments that are given, by the oracle, of their shapes."""
    n, batch = problem.x.shape[-1], problem.x.shape[:-1]
    sizes = {"x": n, "weights": n, "k": 1, "epsilon": 1}
    rows = [
        oracle.vjp(b=u[i]) if function == "threshold" else oracle.vjp(u[i], log=function == "log_topk")
        for i, oracle in zip(np.ndindex(batch), problem.oracles, strict=True)
    ]
    found = {}
    for name, value in problem.arguments.items():
        full = np.reshape([row[name] for row in rows], (*batch, sizes[name]))
        found[name] = full if np.ndim(value) else np.asarray(full.sum())
    return found


def pushed(problem: Problem, tangents: dict[str, np.ndarray], function: str) -> np.ndarray:
    """The tangent of the result, by the oracle."""
    n, batch = problem.x.shape[-1], problem.x.shape[:-1]
    sizes = {"x": n, "weights": n, "k": 1, "epsilon": 1}
    full = {name: np.broadcast_to(value, (*batch, sizes[name])) for name, value in tangents.items()}
    found: list[Any] = []
    for i, oracle in zip(np.ndindex(batch), problem.oracles, strict=True):
        row: dict[str, Any] = {f"d{name}": value[i] for name, value in full.items()}
        row |= {name: float(row[name][0]) for name in ("dk", "depsilon") if name in row}
        found.append(oracle.log_jvp(**row) if function == "log_topk" else oracle.jvp(**row)[function == "threshold"])
    return np.reshape(found, batch if function == "threshold" else problem.x.shape)


def second_derivative(row: dict[str, Any], mode: str, u: np.ndarray, w: np.ndarray) -> np.ndarray:
    """How the cotangent of the scores changes along w, by a difference quotient in 120 digits."""
    step = EXACT.array(1e-30)[()]
    near = []
    for sign in (1, -1):
        x = EXACT.array(row["x"]) + EXACT.array(w) * (sign * step)
        at = Oracle(**{**row, "x": x}, mode=mode, arithmetic=EXACT)
        direct = EXACT.array(u[at.kept]) * at.v / at.tau
        near.append(at.sign * (direct - at.p * direct.sum()))
    found = np.zeros(u.shape)
    found[at.kept] = np.asarray((near[0] - near[1]) / (2 * step), dtype=float)
    return found
