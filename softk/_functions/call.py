"""A public function applied to arguments: what `softk.vjp` and `softk.jvp` start from.

Each argument becomes an `Argument`, which knows the linear part of its own conversion in both directions; where the
framework has autodiff it differentiates the conversion by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from inspect import signature
from typing import Any, Generic, ParamSpec, TypeVar

from softk.backend import Array, Backend, Primitive

from .recall import remembered
from .signatures import explained

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Argument:
    """A canonical argument. `push` maps its tangent to canonical form, `pull` a cotangent back; None for a number.

    Results are such arguments without a value, and so is a call's first argument, of which a call knows the form alone.
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
        first, last = self.push, self.pull
        return Argument(
            None,
            None,
            None if first is None else lambda values: first(push(values)),
            None if last is None else lambda cotangent: pull(last(cotangent)),
        )

    def lead(self, xp: Any, leading: tuple[int, ...]) -> Argument:
        """The same, repeated along new axes in front."""
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
    """A public function and all its arguments but the first: a primitive, its canonical inputs and the way back.

    Of the first argument, the scores, it knows the form alone: it holds for every array of that form.
    `restores` are for the outputs of the primitive from the first one; `build` makes of them what the user gets.
    Nothing of it is changed afterwards.
    """

    backend: Backend
    primitive: Primitive
    options: dict[str, Any]
    arguments: dict[str, Argument]
    restores: tuple[Argument, ...]
    build: Callable[..., R] = lambda result: result

    def __post_init__(self) -> None:
        scores, *others = self.arguments.values()
        self.bound = self.backend.bind(self.primitive, **self.options)
        self.push: Any = scores.push
        self.others = tuple(argument.value for argument in others)

    def inputs(self, x: Array) -> tuple[Array | None, ...]:
        """What the primitive is applied to."""
        return self.push(x), *self.others

    def restore(self, outputs: tuple[Array, ...]) -> list[Array]:
        """The first outputs, as the user sees them. They are linear in the outputs, so tangents go the same way."""
        pairs = zip(self.restores, outputs, strict=False)
        return [restore.push(values) for restore, values in pairs if restore.push is not None]

    def evaluate(self, x: Array) -> R:
        """The result, differentiable by the arrays' own framework."""
        with self.backend.quiet():
            return self.build(*self.restore(self.bound(*self.inputs(x))))


def operator_from(describe: Callable[P, Call[R]]) -> Callable[P, R]:
    """The public function whose calls `describe` describes.

    Its attribute `call` is `describe`: what the function would compute, where `softk.vjp` and `softk.jvp` start.
    """
    call = remembered(explained(describe))

    @wraps(describe)
    def function(*args: P.args, **kwargs: P.kwargs) -> R:
        return call(*args, **kwargs).evaluate(args[0])

    returned = str(describe.__annotations__["return"]).removeprefix("Call[").removesuffix("]")
    function.__annotations__ = {**describe.__annotations__, "return": returned}
    function.__signature__ = signature(describe).replace(return_annotation=returned)  # type: ignore[attr-defined]
    function.call = call  # type: ignore[attr-defined]
    return function
