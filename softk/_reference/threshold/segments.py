"""Slices of different lengths, one after the other along one axis: the mask of every segment, as primitives.

There is one solver and one derivative rule. `Segments` is an array of one value per item, shape (..., 1, n), and the
values of one per segment have shape (..., s, 1), as if a row of a matrix were a segment. Where both meet, the value of
a segment is taken for each of its items. Reductions run over the items of a segment. So nothing is padded.

Inputs, in this order: scores (..., 1, n), k and tau (..., s, 1), weights and where (..., 1, n) or None, the segment of
every item (1, ..., 1, n), and the lengths (1, ..., s, 1). The last two are integers without a derivative.
"""

from __future__ import annotations

from typing import Any, Literal

from softk.backend import Array, Backend, Form, Inputs, Primitive, index_dtype

from . import masks
from .pieces import PieceBackend, Pieces


class Segments(Pieces):
    """An array of one value per item, (..., 1, n), of the segments of a `SegmentBackend`."""

    def __init__(self, array: Array, backend: SegmentBackend) -> None:
        super().__init__((array,))
        self.backend = backend

    def part(self, i: int, value: Any) -> Any:
        if isinstance(value, Pieces):
            return value.arrays[i]
        return self.backend.per_item(value) if getattr(value, "ndim", 0) else value

    def like(self, arrays: tuple[Array, ...]) -> Segments:
        return Segments(arrays[0], self.backend)


class SegmentBackend(PieceBackend):
    """The backend of a framework, for segments.

    Parameters
    ----------
    inner : Backend
        The backend of the arrays.
    segments, lengths : array
        The segment of every item, (1, ..., 1, n), and the lengths, (1, ..., s, 1).
    """

    def __init__(self, inner: Backend, segments: Array, lengths: Array) -> None:
        super().__init__(inner, (None,))
        self.segments, self.count = segments, lengths.shape[-2]

    def join(self, array: Array | None) -> Any:
        return None if array is None else Segments(array, self)

    def per_item(self, values: Array) -> Array:
        """The value of its segment for every item: (..., 1, n) of (..., s, 1)."""
        xp = self.inner.xp
        rows = xp.reshape(values, (*values.shape[:-2], 1, self.count))
        pairs = zip(rows.shape[:-1], self.segments.shape[:-1], strict=True)
        batch = tuple(size if size != 1 else other for size, other in pairs)
        index = xp.broadcast_to(self.segments, (*batch, self.segments.shape[-1]))
        return xp.take_along_axis(xp.broadcast_to(rows, (*batch, self.count)), index, axis=-1)

    def _segments(self, array: Array, operation: Literal["sum", "max"]) -> Array:
        found = self.inner.reduce_segments(array, operation, self.segments, self.count)
        return self.inner.xp.reshape(found, (*array.shape[:-2], self.count, 1))

    def totals(self, *values: Pieces) -> Array:
        xp = self.inner.xp
        arrays = [value.arrays[0] for value in values]
        dtype = next((array.dtype for array in arrays if not xp.isdtype(array.dtype, "bool")), index_dtype(xp))
        arrays = [array if array.dtype == dtype else xp.astype(array, dtype) for array in arrays]
        return xp.concat([self._segments(array, "sum") for array in arrays], axis=-1)

    def counts(self, *values: Pieces) -> Array:
        xp = self.inner.xp
        index = index_dtype(xp)
        return xp.concat([self._segments(xp.astype(value.arrays[0], index), "sum") for value in values], axis=-1)

    def largest(self, *values: Pieces) -> Array:
        return self.inner.xp.concat([self._segments(value.arrays[0], "max") for value in values], axis=-1)

    def masses(self, x: Pieces, pivots: Array, weights: Pieces | None) -> Array:
        return self.masses_one_by_one(x, pivots, weights)

    def running_sum(self, x: Pieces) -> Pieces:
        xp, array = self.inner.xp, x.arrays[0]
        sums = self._segments(array, "sum")
        before = xp.cumulative_sum(sums, axis=-2) - sums
        return x.like((xp.cumulative_sum(array, axis=-1) - self.per_item(before),))


def _segmented(whole: Primitive) -> Primitive:
    def prepared(backend: Backend, inputs: tuple[Any, ...]) -> tuple[SegmentBackend, Inputs]:
        over = SegmentBackend(backend, inputs[5], inputs[6])
        return over, arguments(over, inputs, inputs[1].dtype)

    def arguments(over: SegmentBackend, values: Inputs, dtype: Any) -> Inputs:
        x, k, tau, weights, where, *_ = values
        return widened(over, x, dtype), k, tau, over.join(weights), over.join(where)

    def widened(over: SegmentBackend, values: Any, dtype: Any) -> Any:
        """Half precision is computed in the dtype of k."""
        is_narrow = values is not None and values.dtype != dtype
        return over.join(over.inner.xp.astype(values, dtype) if is_narrow else values)

    def narrowed(backend: Backend, found: Any, like: Any) -> Any:
        if found is None:
            return None
        array = found.arrays[0]
        return array if array.dtype == like.dtype else backend.xp.astype(array, like.dtype)

    def forward(backend: Backend, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> tuple[Array, ...]:
        over, given = prepared(backend, inputs)
        found, *rest = over.run(whole, "forward", given, ranks=ranks)
        return narrowed(backend, found, inputs[0]), *rest

    def jvp(backend: Backend, inputs: tuple[Any, ...], outputs: Inputs, tangents: Inputs) -> tuple[Array, ...]:
        over, given = prepared(backend, inputs)
        found, *rest = over.run(whole, "jvp", given, (None, *outputs[1:]), arguments(over, tangents, inputs[1].dtype))
        return narrowed(backend, found, inputs[0]), *rest

    def vjp(
        backend: Backend, inputs: tuple[Any, ...], outputs: Inputs, cotangents: Inputs, needed: tuple[bool, ...]
    ) -> Inputs:
        over, given = prepared(backend, inputs)
        bars = widened(over, cotangents[0], inputs[1].dtype), cotangents[1]
        of_x, of_k, of_tau, of_weights, _ = over.run(whole, "vjp", given, (None, *outputs[1:]), bars, needed[:5])
        weights = None if of_weights is None else of_weights.arrays[0]
        return narrowed(backend, of_x, inputs[0]), of_k, of_tau, weights, None, None, None

    def forms(xp: Any, inputs: tuple[Any, ...], *, ranks: tuple[int, ...] | None) -> tuple[Form, ...]:
        x, k = inputs[:2]
        number = Form((*x.shape[:-2], *k.shape[-2:]), k.dtype)
        return Form(x.shape, x.dtype), number, number

    return Primitive(
        f"{whole.name}_of_segments",
        forward,
        forms,
        jvp,
        vjp,
        results=("mask",),
        state=("offset",),
        constants=("reference",),
        axes=2,
        shared=2,
        narrow=True,
    )


mask_of_segments = _segmented(masks.mask)
hard_mask_of_segments = _segmented(masks.hard_mask)
