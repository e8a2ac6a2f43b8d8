"""The top-k of ragged rows as a public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from softk._reference.threshold.masks import empty_mask
from softk._reference.threshold.segments import hard_mask_of_segments, mask_of_segments
from softk.backend import AnyArray, Array, ArrayT, Ragged, backend_of, index_dtype, is_array, unknown

from .arguments import Slices
from .call import Argument, Call, operator_from
from .checks import (
    Mode,
    check_axis,
    check_flag,
    check_integer,
    check_mode,
    check_temperature,
    is_number,
    kind_of,
    require_whole,
)
from .shapes import cast, fits, move_axis, shrink


class _Rows(Slices):
    """Scores whose last axis holds the items of one segment after the other."""

    def __init__(self, x: Any, lengths: Any, **others: Any) -> None:
        arrays = {"lengths": lengths} if is_array(lengths) else {}
        super().__init__(x, -1, **arrays, **others)
        self.require_sizes()
        self.ones = (1,) * len(self.batch)  # the batch axes of what holds for the whole batch
        self.lengths, self.count = self._lengths(lengths)

    def _lengths(self, lengths: Any) -> tuple[Array, int]:
        """The lengths as integers (1, ..., 1, s, 1), and their number."""
        xp, index = self.xp, index_dtype(self.xp)
        if is_array(lengths):
            if not xp.isdtype(lengths.dtype, "integral"):
                raise TypeError(f"lengths must be integers, got dtype {lengths.dtype}")
            if lengths.ndim != 1 or unknown(lengths.shape[0]):
                raise ValueError(f"lengths must have one axis of known size, got shape {tuple(lengths.shape)}")
            return xp.reshape(xp.astype(lengths, index), (*self.ones, -1, 1)), int(lengths.shape[0])
        if not isinstance(lengths, Sequence) or isinstance(lengths, str):
            raise TypeError(f"lengths must be a list of integers or an integer array, got {kind_of(lengths)}")
        numbers = [check_integer(f"lengths[{i}]", one) for i, one in enumerate(lengths)]
        negative = next((i for i, one in enumerate(numbers) if one < 0), None)
        if negative is not None:
            raise ValueError(f"lengths must be at least 0, got {numbers[negative]} as lengths[{negative}]")
        if sum(numbers) != self.n:
            raise ValueError(f"lengths must sum to {self.n}, the size of x along its last axis, got {sum(numbers)}")
        found = xp.asarray(numbers, dtype=index, device=self.device)
        return xp.reshape(found, (*self.ones, len(numbers), 1)), len(numbers)

    def ends(self) -> Array:
        """The index after the last item of every segment, (s,)."""
        return self.xp.cumulative_sum(self.xp.reshape(self.lengths, (self.count,)), axis=0)

    def per_segment(self, name: str, value: Any, scale: float = 1.0) -> Argument:
        """k or epsilon: a number, or an array that broadcasts to one value per segment, (..., s)."""
        xp, target = self.xp, (*self.batch, self.count)
        if is_number(value):
            shape = (*target, 1)
            number = scale * (value if self.backend.memory(value) is None else float(value))
            values = xp.full((), number, dtype=self.working, device=self.device)
            return Argument(xp.broadcast_to(values, shape), value)
        shape = tuple(value.shape)
        if not fits(shape, target):
            raise ValueError(
                f"{name} must be a number or an array that broadcasts to one value per segment, shape {target}, "
                f"got shape {shape}"
            )
        if not xp.isdtype(value.dtype, ("real floating", "integral")):
            raise TypeError(f"{name} must be real, got dtype {value.dtype}")

        def push(values: Array) -> Array:
            return xp.expand_dims(xp.broadcast_to(scale * cast(xp, values, self.working), target), axis=-1)

        def pull(cotangent: Array) -> Array:
            cotangent = xp.broadcast_to(cotangent, (*target, 1))
            return cast(xp, scale * shrink(xp, xp.squeeze(cotangent, axis=-1), shape), value.dtype)

        return Argument(push(value), value, *self._linear(value, push, pull))

    def row(self, argument: Argument) -> Argument:
        """An argument of one value per item, with an axis of size 1 before its last."""
        xp, push, pull = self.xp, argument.push, argument.pull
        return Argument(
            None if argument.value is None else xp.expand_dims(argument.value, axis=-2),
            argument.given,
            None if push is None else lambda values: xp.expand_dims(push(values), axis=-2),
            None if pull is None else lambda cotangent: pull(xp.squeeze(cotangent, axis=-2)),
        )

    def mask(self) -> Argument:
        result: Any = self.like_scores(narrow=True)
        xp, push, pull = self.xp, result.push, result.pull
        return Argument(
            None,
            None,
            lambda values: push(xp.squeeze(values, axis=-2)),
            lambda cotangent: xp.expand_dims(pull(cotangent), axis=-2),
        )

    def capped(self, argument: Argument) -> Argument:
        """k, at most the length of its segment; the derivative is 0 where it is capped."""
        xp, push, pull, value = self.xp, argument.push, argument.pull, argument.value
        sizes = cast(xp, self.lengths, self.working)
        is_over = value > sizes
        return Argument(
            xp.where(is_over, sizes, value),
            argument.given,
            None if push is None else lambda values: xp.where(is_over, 0.0, push(values)),
            None if pull is None else lambda cotangent: pull(xp.where(is_over, 0.0, cotangent)),
        )


@operator_from
def segment_topk(
    x: ArrayT,
    k: float | AnyArray,
    lengths: Sequence[int] | AnyArray,
    /,
    *,
    mode: Mode = "largest",
    epsilon: float | AnyArray = 0.1,
    weights: AnyArray | None = None,
    where: AnyArray | None = None,
    hard: bool = False,
) -> Call[ArrayT]:
    """Soft top-k of ragged rows: segments of different length, one after the other along the last axis.

    Every segment is a slice of its own, as for `softk.topk`. Nothing is padded: time and memory are those of the items.

    Parameters
    ----------
    x : array
        Scores, shape (..., n), as for `softk.topk`.
    k : number or array
        How many scores to select in each segment, at least 0. An array broadcasts to (..., s), one value per segment.
        A segment with fewer than k items is selected whole. With weights, their sum takes the place of that number.
    lengths : list of int, or array of int
        The lengths of the s segments, shape (s,), the same for the whole batch. They sum to n, and may be 0. An array
        may be traced: the program does not depend on its values. If it does not sum to n, the mask is NaN.
    mode : {"largest", "smallest"}, optional
        Whether to select the largest or the smallest scores.
    epsilon : number or array, optional
        Strength of the entropy, in the units of `x`, as for `softk.topk`. An array broadcasts to (..., s).
    weights, where : array, optional
        Item weights and the items to choose from, broadcasting to the shape of `x`, as for `softk.topk`.
    hard : bool, optional
        Return the exact indicator, with the derivative of the soft mask, as for `softk.topk`.

    Returns
    -------
    array
        The mask, with the shape, dtype and device of `x`. It sums to `k` over each segment.

    Raises
    ------
    TypeError, ValueError
        As `softk.topk`; also if `lengths` are not integers, a list of them has a negative one, or does not sum to n.

    See Also
    --------
    topk : of rows of one length; of a nested tensor of PyTorch with the layout ``torch.jagged``.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, sections 3.1 and 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> x = np.asarray([0.2, 1.7, -0.5, 0.9, 0.1, 0.4, 0.3])
    >>> softk.segment_topk(x, 2, [4, 1, 2], epsilon=0.5).round(3).tolist()
    [0.196, 0.99, 0.015, 0.8, 1.0, 1.0, 1.0]
    >>> softk.segment_topk(x, np.asarray([2, 1, 1]), [4, 0, 3], hard=True).tolist()
    [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    """
    check_flag("hard", hard)
    rows = _Rows(x, lengths, smallest=check_mode(mode), k=k, epsilon=epsilon, weights=weights, where=where)
    xp, backend = rows.xp, rows.backend
    if is_number(k) and not (0 <= k <= float(xp.finfo(rows.working).max)):
        raise ValueError(f"k must be at least 0 and finite, got {k!r}")
    check_temperature(xp, epsilon, rows.working)
    if hard:
        require_whole(k, weights, k)
    with backend.quiet():
        if rows.n == 0 or rows.count == 0:
            arguments = {"x": rows.scores(narrow=True), **{name: Argument(None) for name in ("k", "epsilon", "w", "m")}}
            return Call(backend, empty_mask, {}, arguments, (rows.like_scores(narrow=True),))
        ends = rows.ends()
        places = xp.arange(rows.n, dtype=ends.dtype, device=rows.device)
        # Sorted, so that the segment of an item is the number of the segments that end before it.
        segments = xp.reshape(xp.searchsorted(ends, places, side="right"), (*rows.ones, 1, rows.n))
        segments = cast(xp, segments, ends.dtype)
        fits_all = (ends[-1] == rows.n) & xp.all(rows.lengths >= 0)
        mass = rows.per_segment("k", k)
        strength = rows.per_segment("epsilon", epsilon, scale=0.5)
        value: Any = strength.value
        arguments = {
            "x": rows.row(rows.scores(narrow=True)),
            "k": rows.capped(mass) if weights is None else mass,
            "epsilon": Argument(xp.where(fits_all, value, float("nan")), strength.given, strength.push, strength.pull),
            "weights": rows.row(rows.per_item("weights", weights)),
            "where": rows.row(rows.kept(where)),
            "segments": Argument(xp.where(segments < rows.count, segments, rows.count - 1)),
            "lengths": Argument(rows.lengths),
        }
    primitive = hard_mask_of_segments if hard else mask_of_segments
    return Call(backend, primitive, {"ranks": None}, arguments, (rows.mask(),))


def topk_of_ragged(
    x: Any, rows: Ragged, k: Any, axis: Any, epsilon: Any, weights: Any, where: Any, **options: Any
) -> Any:
    """The call of `softk.topk` for an array of ragged rows: that of `segment_topk` on its values."""
    xp = backend_of(x).xp
    if check_axis(axis, x.ndim) != rows.axis:
        raise ValueError(f"axis must be {rows.axis}, along which the rows of x have different lengths, got {axis!r}")

    def last(nested: Any) -> Array:
        return move_axis(xp, rows.values(nested), rows.axis - 1, -1)

    def back(values: Array) -> Array:
        return rows.whole(move_axis(xp, values, -1, rows.axis - 1))

    def per_row(name: str, value: Any) -> Any:
        if not is_array(value) or value.ndim == 0:
            return value
        if x.ndim != 2 or value.ndim != 2 or value.shape[-1] != 1:
            raise ValueError(f"{name} must be a number, or have the shape ({x.shape[0]}, 1) for rows of two axes")
        return value[:, 0]

    def per_item(name: str, value: Any) -> Any:
        if value is None:
            return None
        own = backend_of(value).ragged(value) if is_array(value) else None
        if own is None or own.axis != rows.axis:
            raise TypeError(f"{name} must have ragged rows like those of x, got {kind_of(value)}")
        return last(value)

    found = segment_topk.call(  # type: ignore[attr-defined]
        last(x),
        per_row("k", k),
        rows.lengths,
        epsilon=per_row("epsilon", epsilon),
        weights=per_item("weights", weights),
        where=per_item("where", where),
        **options,
    )
    scores, *others = found.arguments.items()
    push, pull = scores[1].push, scores[1].pull
    own_scores = Argument(None, None, lambda nested: push(last(nested)), lambda cotangent: back(pull(cotangent)))
    (result,) = found.restores
    mask = Argument(None, None, lambda values: back(result.push(values)), lambda nested: result.pull(last(nested)))
    return Call(found.backend, found.primitive, found.options, {"x": own_scores, **dict(others)}, (mask,))
