"""The description of a call of a public function, from which `softk.vjp` and `softk.jvp` start.

Each argument becomes an `Argument`, which has the linear part of its conversion to canonical form, and the transpose. A
framework with autodiff differentiates the conversion by itself and does not need them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from inspect import signature
from typing import Any, ClassVar, Generic, ParamSpec, TypeVar

from softk.backend import Array, Backend, Primitive

from .checks import kind_of
from .recall import remembered
from .signatures import explained

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Argument:
    """A canonical argument. `push` maps a tangent to canonical form, `pull` maps a cotangent back.

    Both are None for an argument without a derivative, such as a number. An `Argument` without a value describes a
    result: `push` converts an output of the primitive to what the user gets, and `pull` is the transpose. The scores
    have no value either: a call knows only their form.
    """

    value: Array | None
    given: Any = None
    push: Callable[[Array], Array] | None = None
    pull: Callable[[Array], Array] | None = None

    def of(self, given: Array) -> Argument:
        """The same, given its array."""
        push: Any = self.push
        return replace(self, value=push(given), given=given)

    def through(self, push: Callable[[Array], Array], pull: Callable[[Array], Array]) -> Argument:
        """A result, preceded by another linear map."""
        own_push, own_pull = self.push, self.pull
        return Argument(
            None,
            None,
            None if own_push is None else lambda values: own_push(push(values)),
            None if own_pull is None else lambda cotangent: pull(own_pull(cotangent)),
        )

    def lead(self, xp: Any, leading: tuple[int, ...]) -> Argument:
        """The argument, repeated along new leading axes."""
        value, push, pull = self.value, self.push, self.pull
        if not leading or value is None or value.ndim == 0:
            return self
        shape = tuple(value.shape)

        def repeat(values: Array) -> Array:
            return xp.broadcast_to(values, (*leading, *shape))

        def gather(cotangent: Array) -> Array:
            return xp.sum(cotangent, axis=tuple(range(len(leading))))

        return Argument(
            repeat(value),
            self.given,
            None if push is None else lambda tangent: repeat(push(tangent)),
            None if pull is None else lambda cotangent: pull(gather(cotangent)),
        )


@dataclass
class Call(Generic[R]):
    """A call of a public function: a primitive, its canonical inputs and the conversion of its outputs.

    Of the first argument, the scores, it knows only the form, so it holds for every array of that form. `restores`
    convert the first outputs of the primitive, one each. `build` makes the user's result from them. A call is not
    changed after it is made.
    """

    backend: Backend
    primitive: Primitive
    options: dict[str, Any]
    arguments: dict[str, Argument]
    restores: tuple[Argument, ...]
    build: Callable[..., R] = lambda result: result
    #: Whether the call has the scores among its arguments, so that it holds for no others.
    holds_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        scores, *others = self.arguments.values()
        self.bound = self.backend.bind(self.primitive, **self.options)
        self.push: Any = scores.push
        self.others = tuple(argument.value for argument in others)

    def inputs(self, x: Array) -> tuple[Array | None, ...]:
        """What the primitive is applied to."""
        return self.push(x), *self.others

    def restore(self, outputs: tuple[Array, ...]) -> list[Array]:
        """Convert the first outputs to the user's form. The conversion is linear, so it also converts tangents."""
        # Further outputs of the primitive are internal, and a rule may be asked for the first results only.
        pairs = zip(self.restores[: len(outputs)], outputs[: len(self.restores)], strict=True)
        return [restore.push(values) for restore, values in pairs if restore.push is not None]

    def sample(self, x: Array) -> Array:
        """An array that is on the device of the scores."""
        return x

    def spread(self, name: str, value: Any) -> dict[str, Any]:
        """The tangents of the arguments of the primitive, by their names, from that of an argument of the function."""
        return {name: value}

    def collect(self, found: dict[str, Array]) -> dict[str, Any]:
        """The cotangents of the arguments of the function, from those of the arguments of the primitive."""
        return found

    def cotangents(self, cotangent: Any, out: Any) -> dict[str, Any]:
        """The cotangent of every result that has a derivative, by what an error message calls it."""
        moving = [i for i, restore in enumerate(self.restores) if restore.pull is not None]
        names = [self.primitive.results[i] for i in moving] if isinstance(out, tuple) else []
        _require_structure(cotangent, names)
        if len(moving) == 1:
            return {"cotangent": cotangent}
        return {f"cotangent[{i}], of {names[i]},": value for i, value in enumerate(cotangent)}

    def tangent(self, rates: list[Array]) -> Any:
        """The tangent of the result, from those of the results that have a derivative."""
        return rates[0] if len(rates) == 1 else tuple(rates)

    def evaluate(self, x: Array) -> R:
        """Compute the result. The framework of the arrays can differentiate it."""
        with self.backend.quiet():
            return self.build(*self.restore(self.bound(*self.inputs(x))))


def _require_structure(cotangent: Any, names: list[str]) -> None:
    """Require one array, or, for several differentiable results, a tuple with one cotangent for each of them."""
    if len(names) > 1 and (not isinstance(cotangent, (tuple, list)) or len(cotangent) != len(names)):
        got = f"{len(cotangent)} parts" if isinstance(cotangent, (tuple, list)) else kind_of(cotangent)
        raise TypeError(f"cotangent must be a tuple ({', '.join(names)}), where each may be None, got {got}")
    if len(names) <= 1 and isinstance(cotangent, (tuple, list, dict)):
        of = f", the cotangent of {names[0]}" if names else ""
        raise TypeError(f"cotangent must be one array{of}, got {kind_of(cotangent)}")


def operator_from(describe: Callable[P, Call[R]]) -> Callable[P, R]:
    """Make a public function from `describe`, which turns its arguments into a `Call`.

    The attribute `call` of the public function is `describe`, with the check of argument names. `softk.vjp` and
    `softk.jvp` use it.
    """
    call = remembered(explained(describe))

    @wraps(describe)
    def function(*args: P.args, **kwargs: P.kwargs) -> R:
        return call(*args, **kwargs).evaluate(args[0])

    # The signature must show the type of the result instead of Call[...].
    returned = str(describe.__annotations__["return"]).removeprefix("Call[").removesuffix("]")
    function.__annotations__ = {**describe.__annotations__, "return": returned}
    function.__signature__ = signature(describe).replace(return_annotation=returned)  # type: ignore[attr-defined]
    function.call = call  # type: ignore[attr-defined]
    return function
