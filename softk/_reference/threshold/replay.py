"""Any part of an operator in passes over the items, for slices whose items are held one chunk at a time.

The operators and their derivative rules are elementwise operations and reductions over the items. A part of an operator
is evaluated on a chunk as if the chunk were the slice. A reduction whose result over all chunks is known has that
result. Of the others, each is computed over the chunk if its values are known, and its result is an `Unknown`; so is
everything that is computed from it. When the results of all chunks are joined, these reductions are known, and the next
pass gets further. So there are as many passes as there are reductions in the longest chain of them, and the rules are
those that serve every other array.

A chunk of no items is enough for a result of one value per slice: all that it depends on is known.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

from softk.backend import Array, Backend, Inputs, Part, Primitive

from .masks import hard_mask, log_mask, mask, threshold
from .passes import Solved
from .pieces import PieceBackend, Pieces
from .solve import solver

__all__ = ["PER_ITEM", "Evaluation", "Known", "evaluate", "join", "per_item", "stages"]

#: The operators that are computed in passes, and whether their result has one value per item.
PER_ITEM: dict[str, bool] = {mask.name: True, hard_mask.name: True, log_mask.name: True, threshold.name: False}

#: The results of the reductions, in the order in which they are made: how they are joined, and their arrays.
Known = dict[int, tuple[str, Array]]


class Unknown:
    """The result of a reduction that is not known yet, and what is computed from it."""

    __array_ufunc__ = None

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    def __getitem__(self, index: Any) -> Unknown:
        return self

    def __bool__(self) -> bool:
        raise TypeError("the value of a reduction over several chunks is not known yet")

    def _same(self, *others: Any) -> Unknown:
        return self

    __hash__ = None  # type: ignore[assignment]


for _name in ("add", "sub", "mul", "truediv", "and", "or"):
    setattr(Unknown, f"__{_name}__", Unknown._same)
    setattr(Unknown, f"__r{_name}__", Unknown._same)
for _name in ("neg", "invert", "gt", "ge", "lt", "le", "eq", "ne"):
    setattr(Unknown, f"__{_name}__", Unknown._same)


class _Namespace:
    """An array namespace whose functions return an `Unknown` if they get one."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._xp, name)
        if not callable(found) or isinstance(found, type):
            return found

        def apply(*args: Any, **kwargs: Any) -> Any:
            unknown = _unknown_of(args)
            return found(*args, **kwargs) if unknown is None else unknown

        setattr(self, name, apply)
        return apply


def _unknown_of(values: Any) -> Unknown | None:
    for value in values:
        if isinstance(value, Unknown):
            return value
        if isinstance(value, (list, tuple)) and (found := _unknown_of(value)) is not None:
            return found
    return None


class ChunkBackend(PieceBackend):
    """The backend of a framework, for one chunk of the items.

    Parameters
    ----------
    inner : Backend
        The backend of the chunk.
    known : dict
        The reductions over all chunks that are known.
    solved : Solved or None
        What the solver returns for the whole slices.
    place : int
        The number of chunks before this one.
    dtype : dtype
        The working dtype.
    """

    def __init__(self, inner: Backend, known: Known, solved: Solved | None, place: int, dtype: Any) -> None:
        within = copy.copy(inner)
        within.xp, within.formulas = _Namespace(inner.xp), None
        super().__init__(within, (None,))
        self.known, self.solved, self.place, self.dtype = known, solved, place, dtype
        self.found: Known = {}
        self._made = 0

    def run(self, primitive: Primitive, part: Any, *groups: Any, **options: Any) -> tuple[Any, ...]:
        if primitive is solver and self.solved is not None:
            return self.solved
        return super().run(primitive, part, *groups, **options)

    def _reduced(self, operation: str, values: Any, compute: Callable[[], Array]) -> Any:
        """The next reduction over all chunks: its result, or what is known of it from this chunk."""
        i, self._made = self._made, self._made + 1
        if i in self.known:
            return self.known[i][1]
        if _unknown_of([value.arrays[0] for value in values]) is None:
            self.found[i] = operation, compute()
        return Unknown(self.dtype)

    def _combine(self, operation: Any, reduced: Any, joined: Any, values: Any) -> Any:
        combine = super()._combine
        return self._reduced(operation, values, lambda: combine(operation, reduced, joined, values))

    def running_sum(self, x: Pieces) -> Any:
        xp = self.inner.xp
        counts = self._reduced("list", (x,), lambda: xp.sum(x.arrays[0], axis=-1, keepdims=True))
        before = xp.sum(counts[..., : self.place], axis=-1, keepdims=True)
        return x.map(lambda array: xp.cumulative_sum(array, axis=-1) + before)


class Evaluation(NamedTuple):
    """What is found on one chunk."""

    outputs: tuple[Any, ...]  # None where the part has no output, or it is not known yet
    found: Known  # the reductions over the chunk that were not known
    is_complete: bool  # whether every output is known


def evaluate(
    backend: Backend,
    primitive: Primitive,
    part: Part,
    groups: tuple[Any, ...],
    options: dict[str, Any],
    *,
    known: Known,
    solved: Solved | None,
    place: int,
) -> Evaluation:
    """Evaluate a part of an operator on a chunk of the items, as far as the known reductions allow.

    Parameters
    ----------
    backend : Backend
        The backend of the chunk.
    primitive, part, groups, options
        As for `Backend.run`. The arrays that `per_item` names are those of the chunk.
    known, solved, place
        As for `ChunkBackend`.
    """
    arrays, needed = (groups[:-1], groups[-1:]) if part == "vjp" else (groups, ())
    over = ChunkBackend(backend, known, solved, place, groups[0][1].dtype)
    split = [
        tuple(Pieces((value,)) if is_item and value is not None else value for value, is_item in pairs)
        for pairs in map(zip, arrays, per_item(primitive, part, arrays))
    ]
    with over.quiet(split[0][0]):
        results = over.run(primitive, part, *split, *needed, **options)
    plain = tuple(value.arrays[0] if isinstance(value, Pieces) else value for value in results)
    return Evaluation(
        tuple(None if isinstance(value, Unknown) else value for value in plain),
        over.found,
        _unknown_of(plain) is None,
    )


def per_item(primitive: Primitive, part: Part, groups: tuple[Inputs, ...]) -> tuple[tuple[bool, ...], ...]:
    """Which values of the groups have one value per item, where they are not None.

    Of the results of the part only the first may have.
    """

    def of_inputs(group: Inputs) -> tuple[bool, ...]:
        return tuple(i in (0, 3, 4) for i in range(len(group)))  # the scores, the weights and where

    inputs, *others = groups
    flags = [of_inputs(inputs), *((False,) * len(outputs) for outputs in others[:1])]
    if part == "jvp":
        flags.append(of_inputs(others[1]))
    elif part == "vjp":
        flags.append((PER_ITEM[primitive.name], False))
    return tuple(flags)


def join(backend: Backend, parts: list[Known]) -> Known:
    """The reductions over several chunks, from those over each of them in their order."""
    xp = backend.xp
    found: Known = {}
    for i, (operation, _) in parts[0].items():
        arrays = [part[i][1] for part in parts]
        if operation == "list":
            whole = xp.concat(arrays, axis=-1)
        else:
            whole = reduce(xp.maximum if operation == "max" else operator.add, arrays)
        found[i] = operation, whole
    return found


def stages(
    backend: Backend, primitive: Primitive, part: Part, groups: tuple[Any, ...], options: dict[str, Any]
) -> list[tuple[bool, ...]]:
    """For each evaluation, until all outputs are known: which outputs are.

    `groups` are arrays of any values, with the dtypes of the arguments and with few items.
    """
    number = groups[0][0][..., :1]
    solved = Solved(*(number if i < 4 else number != number for i in range(8)))
    known: Known = {}
    found = []
    while True:
        now = evaluate(
            backend,
            primitive,
            part,
            groups,
            options,
            known=known,
            solved=solved if part == "forward" else None,
            place=0,
        )
        found.append(tuple(value is not None for value in now.outputs))
        if now.is_complete:
            return found
        known = known | now.found
