"""Soft nearest neighbors: their weights, the class probabilities of their vote, and a loss for learning an embedding.

The neighbors of a query are the soft top-k of its negative squared Euclidean distances to the keys. They have useful
gradients in the points, in k and in epsilon. Both passes process the queries in blocks of about a million distances.
Only `weights` holds one number per query and key, because it returns them.

k and epsilon, of one value per query, are numbers or arrays that broadcast to (..., q, 1).
"""

from __future__ import annotations

import math
from typing import Any

from ._functions.arguments import Slices, static_ranks
from ._functions.call import Argument, Call, operator_from
from ._functions.checks import (
    Reduction,
    check_mass,
    check_precision,
    check_reduction,
    check_temperature,
    is_number,
    require_array,
    require_size,
)
from ._functions.shapes import fits, shrink
from ._reference.neighbors.likelihood import likelihood
from ._reference.neighbors.votes import votes as vote_primitive
from ._reference.neighbors.weights import weights as weight_primitive
from .backend import AnyArray, Array, ArrayT

__all__ = ["class_probabilities", "loss", "weights"]


class _Pairs(Slices):
    """The arguments of a call. Every query is a slice of scores (..., q, n), which are not computed here."""

    def __init__(self, queries: Any, keys: Any, k: Any, epsilon: Any, where: Any, exclude: Any, **labels: Any) -> None:
        for name, value in {"keys": keys, **labels, **({} if exclude is None else {"exclude": exclude})}.items():
            require_array(name, value)
        arrays = {"keys": keys, **labels, "k": k, "epsilon": epsilon, "where": where}
        super().__init__(queries, -1, called="queries", **arrays, **({} if exclude is None else {"exclude": exclude}))
        shape, other = tuple(queries.shape), tuple(keys.shape)
        if len(shape) < 2 or len(other) < 2:
            raise ValueError(
                f"queries and keys must have at least two axes, points and coordinates, got shapes {shape} and {other}"
            )
        check_precision(self.xp, "keys", keys, "queries", queries)
        if shape[-1] != other[-1] or shape[-1] == 0:
            raise ValueError(
                "queries and keys must have the same coordinates, at least one, "
                f"got {shape[-1]} and {other[-1]}, in shapes {shape} and {other}"
            )
        if shape[-2] == 0 or other[-2] == 0:
            raise ValueError(f"queries and keys must have at least one point each, got shapes {shape} and {other}")
        require_size("keys", keys, keys.ndim - 2)
        # The base class has described `queries` as scores. Replace the shapes by those of the scores (..., q, n).
        self.queries, self.keys, self.like = queries, keys, queries
        self.before = _broadcast(shape[:-2], other[:-2])
        self.count, self.n = shape[-2], other[-2]
        self.batch, self.shape = (*self.before, self.count), (*self.before, self.count, self.n)
        self.ndim, self.axes = len(self.shape), (len(self.shape) - 1,)
        self.k = check_mass(self.xp, k, self.n, self.working, False, "the number of keys")
        check_temperature(self.xp, epsilon, self.working)

    def points(self, values: Array, rows: int) -> Argument:
        """Rows of real numbers like `values` (..., rows, w), broadcast to the batch."""
        shape, dtype, target = tuple(values.shape), values.dtype, (*self.before, rows, values.shape[-1])

        def push(values: Array) -> Array:
            values = self._cast(values, self.working)
            return values if tuple(values.shape) == target else self.xp.broadcast_to(values, target)

        def pull(cotangent: Array) -> Array:
            return self._cast(shrink(self.xp, cotangent, shape), dtype)

        return Argument(None, None, push, pull)

    def integers(self, name: str, values: Array, rows: int) -> Argument:
        """One integer per row, as a column (..., rows, 1)."""
        shape = tuple(values.shape)
        if shape[-1:] != (rows,) or not fits(shape[:-1], self.before):
            hint = "; one-hot rows must be of a floating dtype" if shape[:-1] == (*self.before, rows) else ""
            raise ValueError(f"{name} must have one integer per point, shape {(*self.before, rows)}, got {shape}{hint}")
        column = self.xp.expand_dims(values, axis=-1)
        return Argument(self.xp.broadcast_to(column, (*self.before, rows, 1)), values)

    def common(self, epsilon: Any, where: Any, exclude: Any) -> dict[str, Argument]:
        """The last arguments, which all functions have: k, epsilon, where and exclude."""
        xp, excluded = self.xp, Argument(None)
        if exclude is not None:
            if not xp.isdtype(exclude.dtype, "integral"):
                raise TypeError(f"exclude must be an array of integers, got dtype {exclude.dtype}")
            excluded = self.integers("exclude", exclude, self.count)
        allowed = Argument(None)
        if where is not None:
            if not xp.isdtype(where.dtype, "bool"):
                raise TypeError(f"where must be a boolean array, got dtype {where.dtype}")
            shape = tuple(where.shape)
            if not fits(shape, self.shape):
                raise ValueError(
                    f"where must broadcast to one value per query and key, {self.shape}, got shape {shape}"
                )
            full = (1,) * (self.ndim - len(shape)) + shape
            # Broadcast only the batch axes: a mask shared by all queries or all keys takes no memory for each of them.
            allowed = Argument(xp.broadcast_to(xp.reshape(where, full), (*self.before, *full[-2:])), where)
        return {
            "k": self.mass(self.k),
            "epsilon": self.per_slice("epsilon", epsilon, scale=0.5),
            "where": allowed,
            "exclude": excluded,
        }

    def options(self) -> dict[str, Any]:
        return {"ranks": static_ranks(self.backend, self.k, self.xp.finfo(self.working).bits)}

    def result(self) -> Argument:
        """A result of which only the dtype is converted."""
        return Argument(
            None, None, lambda values: self._cast(values, self.dtype), lambda values: self._cast(values, self.working)
        )


@operator_from
def weights(
    queries: ArrayT,
    /,
    keys: AnyArray,
    k: float | AnyArray,
    *,
    epsilon: float | AnyArray = 0.1,
    where: AnyArray | None = None,
    exclude: AnyArray | None = None,
) -> Call[ArrayT]:
    """Soft indicator of the k nearest keys of every query.

    It is ``softk.topk(distances, k, mode="smallest")`` of the squared Euclidean distances.

    Parameters
    ----------
    queries : array
        Points whose neighbors are selected, shape (..., q, d), real floating-point. A query with a NaN or an infinity
        has NaN weights.
    keys : array
        Points to select from, shape (..., n, d), of the dtype of `queries`. Leading axes broadcast. float16, bfloat16
        and float32 may be mixed. A key with an infinity is never selected. A key with a NaN makes the weights of every
        query NaN that may select it.
    k : number or array
        How many neighbors, from 0 to n. It may be fractional. An array has one value per query: it broadcasts to
        (..., q, 1).
    epsilon : number or array, optional
        Strength of the entropy, in the units of the squared distances. Positive. The weights separate keys whose
        squared distances differ by much more; closer keys share the mass. An array has one value per query, as for `k`.
    where : array of bool, optional
        Which keys each query may select, broadcasting to (..., q, n).
    exclude : array of int, optional
        The index of one key that a query may not select, shape (..., q). An out-of-range index such as -1 excludes
        nothing. If the queries are the keys, ``exclude=arange(n)`` is leave-one-out. It needs no (q, n) mask.

    Returns
    -------
    array
        The weights (..., q, n), in [0, 1], with the dtype and device of `queries`. They sum to `k` for every query, or
        to the number of keys that the query may select if that is smaller.

    Raises
    ------
    TypeError
        If an argument is not an array (or number) of the right kind, or is of another library, device or dtype.
    ValueError
        If a number or a shape is out of its range. Values in arrays never raise: an invalid value makes its query NaN.

    Notes
    -----
    Derivatives flow to the points, `k` and `epsilon`. In up to 8 dimensions the distances are sums of squared
    differences. In more dimensions they are a matrix product of points measured from the mean of the keys, with an
    error of a few roundings of the squared distances from that mean. The gradients of the points are matrix products
    in all dimensions. On a device that computes float32 matrix products in a lower precision by default (TF32), enable
    full float32 precision in the framework.

    If a query may select at most `k` keys, all of them are selected at any distance, and the gradient of the points is
    0.

    References
    ----------
    Xie, Dai, Chen, Dai, Zhao, Zha, Wei, Pfister, "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section
    4: k-nearest neighbors through the soft top-k.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> keys = np.asarray([[0.0], [1.0], [2.0], [4.0]])
    >>> softk.neighbors.weights(np.asarray([[0.9]]), keys, 2, epsilon=0.5).round(3).tolist()
    [[0.699, 0.983, 0.319, 0.0]]
    >>> softk.neighbors.weights(keys, keys, 1, epsilon=0.1, exclude=np.arange(4)).round(2).tolist()
    [[0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    """
    pairs = _Pairs(queries, keys, k, epsilon, where, exclude)
    with pairs.backend.quiet():
        arguments = {
            "queries": pairs.points(queries, pairs.count),
            "keys": pairs.points(keys, pairs.n).of(keys),
            **pairs.common(epsilon, where, exclude),
        }
    return Call(pairs.backend, weight_primitive, pairs.options(), arguments, (pairs.result(),))


@operator_from
def class_probabilities(
    queries: ArrayT,
    /,
    keys: AnyArray,
    labels: AnyArray,
    k: float | AnyArray,
    *,
    num_classes: int | None = None,
    epsilon: float | AnyArray = 0.1,
    where: AnyArray | None = None,
    exclude: AnyArray | None = None,
) -> Call[ArrayT]:
    """Share of every class among the k soft nearest neighbors of each query.

    It is ``weights(queries, keys, k) @ one_hot / k``, with one-hot labels of the keys.

    Parameters
    ----------
    queries, keys, epsilon, where, exclude
        As for `weights`.
    labels : array
        The classes of the keys. Either integers (..., n), from 0 to ``num_classes - 1``. A key with any other integer
        can be selected, but votes for no class. Or real numbers (..., n, c), of the dtype of `queries`: one-hot labels,
        or any finite values to be averaged. They have derivatives, too.
    k : number or array
        As for `weights`, but above 0.
    num_classes : int, optional
        The number of classes. Required for integer labels, because the shape of the result cannot depend on their
        values; not allowed for other labels.

    Returns
    -------
    array
        The probabilities (..., q, c), with the dtype and device of `queries`. They sum to 1 for a query if all its
        neighbors have a class and it can select at least `k` keys. If it can select only m < k keys, each of them
        contributes 1 / k, and the probabilities sum to m / k.

    Raises
    ------
    TypeError, ValueError
        As `weights`; also if `labels` or `num_classes` do not have the form above.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section 4.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> keys = np.asarray([[0.0], [1.0], [2.0], [4.0]])
    >>> labels = np.asarray([0, 0, 1, 1])
    >>> softk.neighbors.class_probabilities(
    ...     np.asarray([[0.9], [3.0]]), keys, labels, 2, num_classes=2, epsilon=0.5
    ... ).round(3).tolist()
    [[0.841, 0.159], [0.002, 0.998]]
    """
    pairs = _Pairs(queries, keys, k, epsilon, where, exclude, labels=labels)
    _check_positive(k)
    xp = pairs.xp
    with pairs.backend.quiet():
        if xp.isdtype(labels.dtype, "integral"):
            if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
                raise ValueError(f"num_classes must be a whole number above 0 for integer labels, got {num_classes!r}")
            column = pairs.integers("labels", labels, pairs.n).value
            classes = xp.arange(num_classes, dtype=labels.dtype, device=pairs.backend.device(labels))
            classes = xp.reshape(classes, (*(1,) * (column.ndim - 1), num_classes))  # type: ignore[union-attr]
            values = Argument(xp.astype(column == classes, pairs.working))
        else:
            if num_classes is not None:
                raise ValueError(f"num_classes must be left out for labels that are not integers, got {num_classes!r}")
            values = _rows(pairs, "labels", labels, pairs.n)
        arguments = {
            "queries": pairs.points(queries, pairs.count),
            "keys": pairs.points(keys, pairs.n).of(keys),
            "labels": values,
            **pairs.common(epsilon, where, exclude),
        }
    return Call(pairs.backend, vote_primitive, pairs.options(), arguments, (pairs.result(),))


@operator_from
def loss(
    queries: ArrayT,
    /,
    keys: AnyArray,
    query_labels: AnyArray,
    key_labels: AnyArray,
    k: float | AnyArray,
    *,
    epsilon: float | AnyArray = 0.1,
    where: AnyArray | None = None,
    exclude: AnyArray | None = None,
    floor: float = 0.0,
    reduction: Reduction = "mean",
) -> Call[ArrayT]:
    """Negative log likelihood of the queries' labels under the vote of their k soft nearest neighbors.

    For a query of class y it is ``-log(p[y] + floor)``, with the probabilities of `class_probabilities`.

    Parameters
    ----------
    queries, keys, epsilon, where, exclude
        As for `weights`.
    query_labels, key_labels : array
        Either both integers, (..., q) and (..., n), of any values: two points agree if their labels are equal. A query
        whose label no key has gets the probability 0. Or both real numbers (..., q, c) and (..., n, c), at least 0 and
        of the dtype of `queries`: one-hot labels or class probabilities. Their inner product is the degree to which two
        points agree.
    k : number or array
        As for `weights`, but above 0.
    floor : number, optional
        Added to every probability. Finite and at least 0. It bounds the loss by ``-log(floor)``, so that the loss is
        not dominated by outliers, whose likelihood may be as small as ``exp(-distance / epsilon)``.
    reduction : {"mean", "sum", "none"}, optional
        The mean or the sum over all queries, or one loss per query, (..., q).

    Returns
    -------
    array
        The loss, with the dtype and device of `queries`, of shape () unless `reduction` is "none". Without a floor it
        is +inf, with a gradient of 0, for a query that agrees with none of its keys.

    Raises
    ------
    TypeError, ValueError
        As `weights`; also if the labels, `floor` or `reduction` do not have the form above.

    Notes
    -----
    The likelihood is computed from the logarithm of the weights and does not underflow. A query far from all keys of
    its class has the gradient of its negative log weights, not 0.

    The gradient of a query is 0 if it may select at most `k` keys, because all of them are selected at any distance.
    For leave-one-out with `exclude` on n points, `k` must be below n - 1.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section 4, with the likelihood instead of
    their absolute error; Goldberger, Roweis, Hinton, Salakhutdinov, "Neighbourhood Components Analysis", NIPS 2004,
    for the application.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> points = np.asarray([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> labels, every = np.asarray([0, 0, 1, 1]), np.arange(4)
    >>> value, pullback = softk.vjp(
    ...     softk.neighbors.loss, points, points, labels, labels, 1, epsilon=1.0, exclude=every
    ... )
    >>> float(value.round(3))
    0.798
    >>> found = pullback(np.asarray(1.0))
    >>> (found["queries"] + found["keys"]).round(2).tolist()
    [[0.63, -0.47], [0.63, 0.47], [-0.63, -0.47], [-0.63, 0.47]]
    """
    pairs = _Pairs(queries, keys, k, epsilon, where, exclude, query_labels=query_labels, key_labels=key_labels)
    _check_positive(k)
    if not is_number(floor) or not 0.0 <= floor < math.inf:
        raise ValueError(f"floor must be a finite number of at least 0, got {floor!r}")
    check_reduction(reduction)
    xp = pairs.xp
    whole = [xp.isdtype(values.dtype, "integral") for values in (query_labels, key_labels)]
    if whole[0] != whole[1]:
        raise TypeError(
            "query_labels and key_labels must both be integers or both real numbers, "
            f"got dtypes {query_labels.dtype} and {key_labels.dtype}"
        )
    if whole[0] and query_labels.dtype != key_labels.dtype:
        raise TypeError(f"key_labels must have the dtype of query_labels, {query_labels.dtype}, got {key_labels.dtype}")
    if not whole[0] and query_labels.shape[-1] != key_labels.shape[-1]:
        raise ValueError(
            "query_labels and key_labels must have the same number of classes along their last axis, "
            f"got shapes {tuple(query_labels.shape)} and {tuple(key_labels.shape)}"
        )
    with pairs.backend.quiet():
        own: dict[str, Argument] = {}
        for name, values, count in (
            ("query_labels", query_labels, pairs.count),
            ("key_labels", key_labels, pairs.n),
        ):
            own[name] = pairs.integers(name, values, count) if whole[0] else _rows(pairs, name, values, count)
        bottom = xp.full((), float(floor), dtype=pairs.working, device=pairs.backend.device(queries))
        arguments = {
            "queries": pairs.points(queries, pairs.count),
            "keys": pairs.points(keys, pairs.n).of(keys),
            **own,
            "floor": Argument(bottom, floor),
            **pairs.common(epsilon, where, exclude),
        }
    restore = _reduced(pairs, reduction)
    return Call(pairs.backend, likelihood, pairs.options(), arguments, (restore,))


def _reduced(pairs: _Pairs, reduction: Reduction) -> Argument:
    """The negative log likelihoods (..., q, 1), reduced over the queries."""
    xp, shape = pairs.xp, (*pairs.batch, 1)
    scale = -1.0 / math.prod(pairs.batch) if reduction == "mean" else -1.0

    def push(values: Array) -> Array:
        values = xp.squeeze(values, axis=-1) if reduction == "none" else xp.sum(values)
        return pairs._cast(scale * values, pairs.dtype)

    def pull(cotangent: Any) -> Array:
        if is_number(cotangent):
            return xp.full(shape, scale * cotangent, dtype=pairs.working, device=pairs.device)
        cotangent = scale * pairs._cast(cotangent, pairs.working)
        return xp.expand_dims(cotangent, axis=-1) if reduction == "none" else xp.broadcast_to(cotangent, shape)

    return Argument(None, None, push, pull)


def _rows(pairs: _Pairs, name: str, values: Array, count: int) -> Argument:
    """Real labels, with one row per point."""
    check_precision(pairs.xp, name, values, "queries", pairs.queries, besides="be integers or ")
    shape = tuple(values.shape)
    if len(shape) < 2 or shape[-2] != count or not shape[-1] or not fits(shape[:-2], pairs.before):
        wanted = (*pairs.before, count)
        raise ValueError(f"{name} must have one row of classes per point, shape {(*wanted, 'c')}, got {shape}")
    return pairs.points(values, count).of(values)


def _broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """The shape to which two batch shapes broadcast."""
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    extra = len(longer) - len(shorter)
    pairs = list(zip(longer[extra:], shorter, strict=True))
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        raise ValueError(f"queries and keys must broadcast over their leading axes, got {one} and {other}")
    return (*longer[:extra], *(b if a == 1 else a for a, b in pairs))


def _check_positive(k: Any) -> None:
    if is_number(k) and not k > 0:
        raise ValueError(f"k must be above 0, because the vote is divided by k, got {k!r}")
