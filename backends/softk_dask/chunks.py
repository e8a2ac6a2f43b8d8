"""Operators on an axis in several chunks: the graph of the passes over the chunks.

A pass has a task per chunk, a tree of tasks that join what these find, and a task that draws the conclusion. Every pass
loads the chunks again: it has copies of the tasks that make them, which start when the pass before has ended. Otherwise
Dask would keep every chunk in memory from the first pass to the last.

What these tasks find are Python objects, which lie in arrays of objects: one per chunk, or one per block of slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array
from dask.base import tokenize

from softk._reference.threshold import replay
from softk._reference.threshold.passes import Problem, passes
from softk.backend import PRIMITIVES, Array, Inputs, Part, Primitive, backend_of

from .copies import computed_again

__all__ = ["in_passes"]

#: How many results of a pass one task joins.
JOINED = 8


def in_passes(
    primitive: Primitive, part: Part, groups: tuple[Inputs, ...], needed: tuple[bool, ...] | None, options: Any
) -> tuple[Array | None, ...]:
    """Compute a part of a mask or a threshold in passes over the chunks of the selected axis."""
    x: Array = groups[0][0]
    if part != "forward":  # the rules do not read the results
        skipped = len(primitive.results)
        groups = groups[0], (*(None,) * skipped, *groups[1][skipped:]), *groups[2:]
    items = replay.per_item(primitive, part, groups)
    work = _Work(
        primitive.name,
        part,
        tuple(tuple(None if value is None else value.dtype for value in group) for group in groups),
        items,
        needed,
        tuple(sorted(options.items())),
        x.shape[-1],
    )
    arrays, flags = [], []
    for group, of_items in zip(groups, items, strict=True):
        for value, is_item in zip(group, of_items, strict=True):
            if value is not None:
                chunks = x.chunks if is_item else (*x.chunks[:-1], -1)[x.ndim - value.ndim :]
                arrays.append(value.rechunk(chunks) if value.ndim else value)
                flags.append(is_item)
    graph = _Graph(work, arrays, flags)
    found = graph.results(graph.solved() if part == "forward" else None)
    return tuple(found if part != "jvp" else found[: primitive.moving])


@dataclass(frozen=True)
class _Work:
    """What the tasks compute: a part of a primitive, with the arguments that are not arrays of the graph.

    The primitive is passed by name: its copy in another process would not be the one that is known there.
    """

    name: str
    part: Part
    dtypes: tuple[tuple[Any, ...], ...]  # of the arguments, None for one that is None
    items: tuple[tuple[bool, ...], ...]  # which arguments have one value per item
    needed: tuple[bool, ...] | None
    options: tuple[tuple[str, Any], ...]
    n: int

    @property
    def working(self) -> Any:
        """The working dtype, which is that of k."""
        return self.dtypes[0][1]

    def passes(self) -> tuple[Any, ...]:
        return passes(np.finfo(self.working).bits)

    def groups(self, arrays: Iterable[Array], *, per_item: bool = True) -> list[list[Any]]:
        """The arguments of the part, from the arrays of the graph. `per_item` says whether those of items are there."""
        found = iter(arrays)
        return [
            [
                None if dtype is None or (is_item and not per_item) else next(found)
                for dtype, is_item in zip(dtypes, items, strict=True)
            ]
            for dtypes, items in zip(self.dtypes, self.items, strict=True)
        ]

    def problem(self, groups: list[list[Any]]) -> Problem:
        x, k, tau, _, where, *count = groups[0]
        return Problem(x, where, k, tau, count[0] if count else None, dict(self.options)["ranks"], self.n)

    def arguments(self, groups: list[list[Any]]) -> tuple[Any, ...]:
        return (*map(tuple, groups), *(() if self.needed is None else (self.needed,)))

    def evaluate(self, groups: list[list[Any]], state: Any, place: int = 0) -> replay.Evaluation:
        solved, known = (None, {}) if state is None else state
        return replay.evaluate(
            backend_of(groups[0][1]),
            PRIMITIVES[self.name],
            self.part,
            self.arguments(groups),
            dict(self.options),
            known=known,
            solved=solved,
            place=place,
        )

    def stages(self, x: Array) -> list[tuple[bool, ...]]:
        """`replay.stages`, with arrays of the library of the blocks."""
        inner = backend_of(x._meta)

        def sample(value: Any, is_item: bool) -> Any:
            return None if value is None else inner.xp.ones((1,) * (x.ndim - 1) + (2 if is_item else 1,), dtype=value)

        groups = [
            [sample(dtype, is_item) for dtype, is_item in zip(dtypes, items, strict=True)]
            for dtypes, items in zip(self.dtypes, self.items, strict=True)
        ]
        return replay.stages(inner, PRIMITIVES[self.name], self.part, self.arguments(groups), dict(self.options))


# --- the tasks. Their blocks are those of the arrays, then the state, which is an object or None.


def _part_of_pass(*blocks: Any, work: _Work, step: int) -> Any:
    *arrays, state = blocks
    backend = backend_of(arrays[0])
    with backend.quiet(arrays[0]):
        return work.passes()[step].part(backend, work.problem(work.groups(arrays)), state)


def _joined_parts(parts: Any, axis: Any, keepdims: bool, work: _Work, step: int) -> Any:
    parts = parts if isinstance(parts, list) else [parts]
    backend = backend_of(parts[0][0])
    with backend.quiet(parts[0][0]):
        return work.passes()[step].join(backend, parts)


def _conclusion(*blocks: Any, work: _Work, step: int) -> Any:
    *arrays, state, whole = blocks
    backend = backend_of(arrays[0])
    with backend.quiet(arrays[0]):
        return work.passes()[step].conclude(backend, work.problem(work.groups(arrays, per_item=False)), state, whole)


def _part_of_stage(*blocks: Any, work: _Work) -> tuple[Any, Any]:
    """The reductions over a chunk, and the result per item, None if it is not known yet."""
    *arrays, state, place = blocks
    found = work.evaluate(work.groups(arrays), state, int(place[0]))
    return found.found, found.outputs[0]


def _joined_stages(parts: Any, axis: Any, keepdims: bool) -> Any:
    parts = parts if isinstance(parts, list) else [parts]
    return replay.join(backend_of(next(iter(parts[0].values()))[1]), parts)


def _advanced(state: Any, found: Any) -> Any:
    solved, known = (None, {}) if state is None else state
    return solved, known | found


def _per_slice(*blocks: Any, work: _Work) -> Any:
    """The results of one value per slice, which are evaluated on no items."""
    *arrays, state = blocks
    groups = work.groups(arrays, per_item=False)
    like = groups[1][-1] if state[0] is None else state[0].reference
    xp = backend_of(like).xp
    for group, dtypes, items in zip(groups, work.dtypes, work.items, strict=True):
        group[:] = [
            xp.astype(like[..., :0], dtype) if is_item and dtype is not None else value
            for value, dtype, is_item in zip(group, dtypes, items, strict=True)
        ]
    return work.evaluate(groups, state).outputs


def _same(block: Any, axis: Any, keepdims: bool) -> Any:
    return block


def _picked(block: Any, place: int) -> Any:
    return block[place]


def _unreduced(solved: Any) -> Any:
    return solved, {}


# --- the graph


class _Graph:
    """The layers of one call, from its arrays and flags that say which of them have one value per item."""

    def __init__(self, work: _Work, arrays: list[Array], flags: list[bool]) -> None:
        self.work, self.arrays, self.flags, self.x = work, arrays, flags, arrays[0]
        self.slices = [value for value, is_item in zip(arrays, flags, strict=True) if not is_item]
        self.axes = tuple(range(self.x.ndim))
        self.chunks = len(self.x.chunks[-1])
        self.places = da.arange(self.chunks, chunks=1)
        self.token = tokenize(work, [value.name for value in arrays])
        self.copies = 0

    def solved(self) -> Array:
        """What the solver finds, an object per block of slices."""
        state: Any = None
        for step in range(len(self.work.passes())):
            given = {"work": self.work, "step": step}
            parts = self._objects(_part_of_pass, *self._loaded_again(state), state, **given)
            whole = self._joined(parts, partial(_joined_parts, work=self.work, step=step))
            state = self._objects(_conclusion, *self.slices, state, whole, **given)
        return self._objects(_unreduced, state)

    def results(self, state: Array | None) -> list[Array | None]:
        """The outputs of the part, in as many further passes as its reductions need."""
        work, stages = self.work, self.work.stages(self.x)
        last = len(stages) - 1  # the number of passes with reductions
        has_items = stages[-1][0] and (work.part == "vjp" or replay.PER_ITEM[work.name])
        after = self.slices[-1] if state is None else state
        outputs: Any = None
        for stage in range(last + 1):
            is_ready = has_items and stages[stage][0] and stage >= last - 1 and outputs is None
            if stage < last or is_ready:
                parts = self._objects(_part_of_stage, *self._loaded_again(after), state, self.places, work=work)
                outputs = parts if is_ready else outputs
            if stage < last:
                whole = self._joined(self._objects(_picked, parts, place=0), _joined_stages)
                state = after = self._objects(_advanced, state, whole)
        found: list[Array | None] = [None] * len(stages[-1])
        slices = self._objects(_per_slice, *self.slices, state, work=work)
        for i, is_there in enumerate(stages[-1]):
            if i == 0 and has_items:
                found[i] = self._blocks(_picked, outputs, place=1, dtype=self.x.dtype)
            elif is_there:
                found[i] = self._blocks(_picked, slices, place=i, dtype=work.working)
        return found

    def _loaded_again(self, after: Array | None) -> list[Array]:
        """The arrays, those with one value per item made anew as soon as the array `after` is computed."""
        self.copies += 1
        seed = (self.token, self.copies)
        return [
            computed_again(value, after, seed) if is_item else value
            for value, is_item in zip(self.arrays, self.flags, strict=True)
        ]

    def _objects(self, function: Callable[..., Any], *arrays: Array | None, **options: Any) -> Array:
        """The function of the blocks of the arrays, an object each."""
        sizes = (1,) * max(value.numblocks[-1] for value in arrays if value is not None and value.ndim)
        return self._layer(function, arrays, np.empty((0,), object), object, {self.axes[-1]: sizes}, options)

    def _blocks(self, function: Callable[..., Any], objects: Array, dtype: Any, **options: Any) -> Array:
        """The function of the objects, a block of an array each: of chunks of items, or of slices."""
        sizes = self.x.chunks[-1] if objects.numblocks[-1] > 1 else (1,)
        return self._layer(function, (objects,), self.x._meta, dtype, {self.axes[-1]: sizes}, options)

    def _layer(
        self, function: Callable[..., Any], arrays: Any, like: Any, dtype: Any, chunks: Any, options: dict[str, Any]
    ) -> Array:
        pairs: list[Any] = []
        for value in arrays:
            whole = None if value is None else self.axes[len(self.axes) - value.ndim :]
            pairs += [value, whole]
        meta = meta_from_array(like, ndim=len(self.axes), dtype=dtype)
        return da.blockwise(
            function, self.axes, *pairs, dtype=dtype, meta=meta, adjust_chunks=chunks, align_arrays=False, **options
        )

    def _joined(self, parts: Array, function: Callable[..., Any]) -> Array:
        """The parts of all chunks, joined in their order."""
        return da.reduction(
            parts,
            _same,
            function,
            combine=function,
            axis=-1,
            keepdims=True,
            concatenate=False,
            split_every=JOINED,
            dtype=object,
            meta=parts._meta,
        )
