"""Error messages for wrong argument names, with suggestions for the names that other libraries use."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")

_EPSILON = ("eps", "reg", "regularization", "regularization_strength", "softness", "sigma", "blur")

#: An argument name of other libraries -> candidates here: the argument, and how to write it. The message suggests the
#: first candidate that the function has.
NAMES: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(("axis", "dim", "dims", "axes", "reduction_dimension"), (("axis", "axis="), ("dim", "dim="))),
    "largest": (("mode", 'mode="largest" or mode="smallest"'), ("descending", "descending=")),
    "descending": (("mode", 'mode="largest" or mode="smallest"'),),
    "reverse": (("descending", "descending="), ("mode", 'mode="largest" or mode="smallest"')),
    **dict.fromkeys(_EPSILON, (("epsilon", "epsilon="),)),
    **dict.fromkeys(
        ("temperature", "temp", "tau", "T"),
        (
            ("capacities", "epsilon=, which is the temperature"),  # of softk.assign, a softmax over groups
            ("epsilon", "epsilon=, which is twice the temperature"),
        ),
    ),
    "keepdim": (("keepdims", "keepdims="),),
    **dict.fromkeys(("weight", "sample_weight"), (("weights", "weights="),)),
    **dict.fromkeys(
        ("mask", "attn_mask"),
        (("bias", "where=, of bool, or bias=, of floats"), ("where", "where=, True for what may be chosen")),
    ),
    "dropout_p": (("query", "dropout=, a function of the weights"), ("dropout", "dropout=")),
    **dict.fromkeys(
        ("k", "K", "n", "num", "top_k", "num_neighbors", "n_neighbors", "num_beams", "beam_size", "beam_width"),
        (("k", "k="), ("beams", "beams="), ("n_neighbors", "n_neighbors=")),
    ),
    **dict.fromkeys(("p", "probs", "quantiles"), (("q", "q="),)),
}
#: Arguments of other libraries that no function has here -> the explanation in the message.
ABSENT = {
    "sorted": "a mask keeps the order of the scores, and softk.sorted_topk always sorts",
    "stable": "results are always deterministic, and equal scores get equal results",
    "where": "set the scores of the others to -inf, or use softk.topk, which has where=",
    "offsets": "use lengths=, the number of items of each row",
}


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap the function so that a wrong or missing argument raises a TypeError that says what is right."""
    check = _checker(function)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        check(args, kwargs)
        return function(*args, **kwargs)

    return checked


def explained_class(kind: type[R]) -> type[R]:
    """Let the constructor of the class raise such an error. The class itself is changed."""
    check, construct = _checker(kind), kind.__init__

    @wraps(construct)
    def checked(self: R, *args: Any, **kwargs: Any) -> None:
        check(args, kwargs)
        construct(self, *args, **kwargs)

    # No subclass: pickle and isinstance must see the class itself. mypy takes no method that is replaced.
    kind.__init__ = checked  # type: ignore[method-assign, assignment]
    return kind


def _checker(function: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], None]:
    """A function of the arguments of a call that raises the errors of `explained`."""
    parameters = signature(function).parameters.values()
    needs_epsilon = any(one.name == "epsilon" and one.default is Parameter.empty for one in parameters)
    named = frozenset(one.name for one in parameters if one.kind is not Parameter.POSITIONAL_ONLY)
    places = sum(one.kind is not Parameter.KEYWORD_ONLY for one in parameters)

    def check(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > places:
            raise TypeError(_too_many(function, len(args)))
        for keyword in kwargs:
            if keyword not in named:
                raise TypeError(_unexpected(function, keyword))
        if needs_epsilon and "epsilon" not in kwargs:
            raise TypeError(
                f"{_called(function)} needs epsilon=, the softness in the units of the scores. It has no default, "
                "because the result does not show whether it fits the scores; a tenth of their standard deviation is "
                "a good start"
            )

    return check


def plain_tuple(kind: type[R]) -> type[R]:
    """The named tuple without the base class Generic, which only type checkers need.

    Some releases of PyTorch treat a generic named tuple as a leaf of a tree instead of a container.
    """
    plain: Any = NamedTuple(kind.__name__, kind.__annotations__.items())  # type: ignore[misc]
    plain.__doc__, plain.__module__ = kind.__doc__, kind.__module__
    return cast("type[R]", plain)


def _called(function: Callable[..., Any]) -> str:
    return f"{function.__name__}()"


def _unexpected(function: Callable[..., Any], keyword: str) -> str:
    parameters = signature(function).parameters
    for name, given in NAMES.get(keyword, ()):
        if name in parameters:
            return f"{_called(function)} has no argument {keyword!r}; use {given}"
    text = f"{_called(function)} has no argument {keyword!r}"
    if keyword in getattr(getattr(function, "forward", None), "__annotations__", ()):
        return f"{text}; pass it in the call of the module"
    if keyword in ABSENT:
        return f"{text}; {ABSENT[keyword]}"
    first, *rest = parameters.values()
    if first.kind is Parameter.POSITIONAL_ONLY and keyword in (first.name, "input", "operand", "a", "logits"):
        return f"{text} by name; pass {first.name} as the first positional argument"
    if any(one.name == keyword for one in rest):
        places = [one.name for one in parameters.values() if one.kind is Parameter.POSITIONAL_ONLY]
        return f"{text} by name; pass {', '.join(places)} by position"
    return f"{text}; its arguments are {', '.join(parameters)}"


def _too_many(function: Callable[..., Any], count: int) -> str:
    parameters = signature(function).parameters.values()
    places = [one.name for one in parameters if one.kind is not Parameter.KEYWORD_ONLY]
    others = [f"{one.name}=" for one in parameters if one.kind is Parameter.KEYWORD_ONLY]
    return (
        f"{_called(function)} takes only {', '.join(places)} by position, got {count} positional arguments; "
        f"pass the others by name: {', '.join(others)}"
    )
