"""A cache of calls by the form of their arguments.

Checking the arguments of a call and converting them takes longer than solving a small problem. The outcome depends on
numbers, flags and the form of the scores (shape, dtype, device), but not on their values. So it is computed once and
used for all later calls of the same form.
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

#: How many calls of a function are kept. The next one empties the cache.
MOST = 256
#: The types of the arguments that may be part of a key: their values never change and can be compared.
LITERALS = frozenset((int, float, bool, str, type(None)))


def remembered(describe: Callable[P, Call[R]]) -> Callable[P, Call[R]]:
    """The function with a cache, which describes calls of one form once.

    A call may be kept for these reasons. It is not changed after it is made, and it does not hold the scores. It is
    kept only if its other arrays are converted numbers. `Backend.cache_key` names what else it depends on, and is None
    under a trace or a transform. The key has the types of numbers, because 1, 1.0 and True are equal. Two threads may
    describe the same call at once: both descriptions are right.
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
            if not call.holds_scores and all(
                value is None or call.backend.cache_key(value) is not None for value in call.others
            ):
                if len(known) >= MOST:
                    known.clear()
                known[key] = call
        return call

    return described


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable | None:
    """What determines a call; None if other arguments than numbers and the form of the scores do."""
    x, *positional = args or (None,)
    backend = adapted(type(x))
    form = None if backend is None else backend.cache_key(x)
    if form is None:
        return None
    others = (*positional, *kwargs.values())
    kinds = tuple(map(type, others))
    return (backend, form, kinds, *others, *kwargs) if LITERALS.issuperset(kinds) else None
