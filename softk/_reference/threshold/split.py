"""The masks and the threshold of slices in pieces, as primitives.

The inputs are those of the operators in `masks`, with m parts in the place of an array of one value per item: the
scores (..., n_1), ..., (..., n_m), then k and tau, then m times weights or None, then m times where or None. The scores
may differ in their dtype. The results are a mask per part, each in the dtype of its scores.

Small parts are joined, because their operations take longer than a copy of them. Where that leaves one piece, the
operator itself computes it, with its kernels.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from softk.backend import Array, Backend, Form, Inputs, Primitive

from . import masks
from .pieces import PieceBackend, Pieces

Groups = tuple[str | None, ...]

#: Parts of at most this many items are joined.
SMALL = 1 << 16

_OPERATORS = {"mask": masks.mask, "hard_mask": masks.hard_mask, "threshold": masks.threshold}


class _Parts:
    """The parts of one call, and how they are joined to pieces."""

    def __init__(self, backend: Backend, inputs: tuple[Any, ...], groups: Groups, *, ordered: bool) -> None:
        m = len(groups)
        self.backend, self.xp, self.scores, self.dtype = backend, backend.xp, inputs[:m], inputs[m].dtype
        self.pieces: list[list[int]] = []
        small: dict[str | None, list[int]] = {}  # the piece of small parts of each group
        for i, (x, group) in enumerate(zip(self.scores, groups, strict=True)):
            # Where ties go to the first part, a shard is followed by the other shards of its part.
            if x.shape[-1] > SMALL or (ordered and group is not None):
                self.pieces.append([i])
                if ordered:
                    small.clear()
            elif group in small:
                small[group].append(i)
            else:
                small[group] = [i]
                self.pieces.append(small[group])
        self.groups = tuple(groups[piece[0]] for piece in self.pieces)
        self.is_whole = self.groups == (None,)
        self.over = backend if self.is_whole else PieceBackend(backend, self.groups)

    def _filled(self, array: Array | None, i: int) -> Array:
        """The array in the dtype of k. A tangent or cotangent that is not given is 0."""
        xp, scores = self.xp, self.scores[i]
        if array is None:
            return xp.zeros(scores.shape, dtype=self.dtype, device=self.backend.device(scores))
        is_right = array.dtype == self.dtype or xp.isdtype(array.dtype, "bool")
        return array if is_right else xp.astype(array, self.dtype)

    def join(self, arrays: Inputs) -> Any:
        """One value per item, in the dtype of k; None if no part has any."""
        if all(array is None for array in arrays):
            return None
        filled = [self._filled(array, i) for i, array in enumerate(arrays)]
        joined = tuple(
            self.xp.concat([filled[i] for i in piece], axis=-1) if len(piece) > 1 else filled[piece[0]]
            for piece in self.pieces
        )
        return joined[0] if self.is_whole else Pieces(joined)

    def inputs(self, values: Inputs) -> Inputs:
        """The inputs, or their tangents, as the operator takes them."""
        m = len(self.scores)
        scores, weights, where = values[:m], values[m + 2 : 2 * m + 2], values[2 * m + 2 :]
        return self.join(scores), *values[m : m + 2], self.join(weights), self.join(where)

    def separate(self, values: Any, like: Inputs) -> tuple[Any, ...]:
        """The parts of one value per item, each in the dtype of the same part of `like`."""
        if values is None:
            return (None,) * len(like)
        found: list[Any] = [None] * len(like)
        arrays = values.arrays if isinstance(values, Pieces) else (values,)
        for piece, array in zip(self.pieces, arrays, strict=True):
            start = 0
            for i in piece:
                stop = start + self.scores[i].shape[-1]
                part: Any = array if len(piece) == 1 else array[..., start:stop]
                wanted: Any = like[i]
                found[i] = part if part.dtype == wanted.dtype else self.xp.astype(part, wanted.dtype)
                start = stop
        return tuple(found)


@cache
def in_pieces(kind: str, groups: Groups) -> Primitive:
    """The operator `kind`, "mask", "hard_mask" or "threshold", for slices in as many parts as there are groups.

    `groups` is as for `PieceBackend`.
    """
    whole, m = _OPERATORS[kind], len(groups)
    per_item = kind != "threshold"

    def parts_of(backend: Backend, inputs: tuple[Any, ...]) -> _Parts:
        return _Parts(backend, inputs, groups, ordered=kind == "hard_mask")

    def results(parts: _Parts, found: Any) -> tuple[Any, ...]:
        return parts.separate(found, parts.scores) if per_item else (found,)

    def forward(backend: Backend, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> tuple[Array, ...]:
        parts = parts_of(backend, inputs)
        found, *rest = parts.over.run(whole, "forward", parts.inputs(inputs), ranks=ranks)
        return *results(parts, found), *rest

    def jvp(backend: Backend, inputs: tuple[Any, ...], outputs: Inputs, tangents: Inputs) -> tuple[Array, ...]:
        parts = parts_of(backend, inputs)
        given = parts.inputs(inputs), (None, *outputs[-2:]), parts.inputs(tangents)
        found, *rest = parts.over.run(whole, "jvp", *given)
        return *results(parts, found), *rest

    def vjp(
        backend: Backend, inputs: tuple[Any, ...], outputs: Inputs, cotangents: Inputs, needed: tuple[bool, ...]
    ) -> Inputs:
        parts = parts_of(backend, inputs)
        bars = (parts.join(cotangents[:m]), cotangents[m]) if per_item else cotangents[:2]
        wanted = any(needed[:m]), *needed[m : m + 2], any(needed[m + 2 : 2 * m + 2]), False
        given = parts.inputs(inputs), (None, *outputs[-2:]), bars, wanted
        of_x, of_k, of_tau, of_weights, _ = parts.over.run(whole, "vjp", *given)
        return (
            *parts.separate(of_x, parts.scores),
            of_k,
            of_tau,
            *parts.separate(of_weights, inputs[m + 2 : 2 * m + 2]),
            *(None,) * m,
        )

    def forms(xp: Any, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> tuple[Form, ...]:
        number = Form((*inputs[0].shape[:-1], 1), inputs[m].dtype)
        masks_of = tuple(Form(x.shape, x.dtype) for x in inputs[:m]) if per_item else (number,)
        return *masks_of, number, number

    shards = "".join("." if group is None else f"[{group}]" for group in groups)
    return Primitive(
        f"{whole.name}_in_pieces_{shards}",
        forward,
        forms,
        jvp,
        vjp,
        results=tuple(f"mask_{i}" for i in range(m)) if per_item else ("threshold",),
        state=("offset",),
        constants=("reference",),
        narrow=per_item,
    )
