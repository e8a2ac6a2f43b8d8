"""Calls that are remembered: a call of the same form as an earlier one takes that one's arguments as they are.

To check the arguments of a call and to make them canonical takes longer than a small problem takes to solve. All of it
follows from numbers, flags and the form of the scores (shape, dtype, device), and not from what the scores are, so one
call does it for all that come after.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from softk.backend import adapted

if TYPE_CHECKING:
    from .call import Call

P = ParamSpec("P")
R = TypeVar("R")

#: How many calls of a function are remembered. One more, and it starts anew.
MOST = 256
#: The types of the arguments that a call may be remembered by: their values never change and can be compared.
LITERALS = frozenset((int, float, bool, str, type(None)))


def remembered(describe: Callable[P, Call[R]]) -> Callable[P, Call[R]]:
    """The function, which describes calls of one form once.

    It is safe. A call is a constant and does not hold the scores; only one whose arrays stand for numbers is kept; the
    backend says by `Backend.cache_key` what else it may depend on, and refuses under a trace or a transform. Numbers
    count as the same only if their types are: 1, 1.0 and True are equal. Two threads may describe the same call; either
    description is right.
    """
    known: dict[Hashable, Call[R]] = {}

    @wraps(describe)
    def described(*args: P.args, **kwargs: P.kwargs) -> Call[R]:
        key = _key(args, kwargs)
        if key is None:
            return describe(*args, **kwargs)
        call = known.get(key)
        if call is None:
            call = describe(*args, **kwargs)
            if all(value is None or call.backend.cache_key(value) is not None for value in call.others):
                if len(known) >= MOST:
                    known.clear()
                known[key] = call
        return call

    return described


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
    """What determines a call; None where that is more than its numbers and the form of its scores."""
    x, *others = args or (None,)
    others += kwargs.values()
    kinds = tuple(map(type, others))
    if not LITERALS.issuperset(kinds):
        return None
    backend = adapted(type(x))
    form = None if backend is None else backend.cache_key(x)
    return None if form is None else (backend, form, kinds, *others, *kwargs)
