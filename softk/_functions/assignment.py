"""The public operator for balanced assignments with any affinities, with diagnostics."""

from __future__ import annotations

from typing import Any, Literal

from softk._reference.assignment.operator import assignment
from softk._reference.assignment.solve import STEPS
from softk.backend import AnyArray, Array, ArrayT, index_dtype

from .arguments import Slices
from .call import Argument, Call, operator_from
from .checks import check_temperature, require_array
from .shapes import cast, fits, shrink
from .transport import Plan, check_iterations, check_tolerance, warn_unless_converged

#: Newton's method is used up to this number of groups. Above it, one of its steps costs ten of Sinkhorn's or more.
GROUPS = 256


@operator_from
def assign(
    scores: ArrayT,
    capacities: AnyArray | None = None,
    /,
    *,
    epsilon: float | AnyArray = 0.1,
    weights: AnyArray | None = None,
    where: AnyArray | None = None,
    method: Literal["newton", "sinkhorn"] | None = None,
    tolerance: float | None = None,
    max_iterations: int | None = None,
) -> Call[Plan[ArrayT]]:
    """Balanced soft assignment of items to groups, such as clusters or experts, with diagnostics.

    The plan maximizes ``sum(plan * scores) - epsilon * sum(plan * (log(plan) - 1))`` among all plans whose row sums are
    the weights of the items and whose column sums are the capacities of the groups. It is
    ``plan[i, j] = row[i] * exp(scores[i, j] / epsilon) * column[j]`` with positive factors. The sums determine the
    plan, and the factors up to a constant; if forbidden pairs divide items and groups into blocks, up to one per block.

    Parameters
    ----------
    scores : array
        Affinities of B items and K groups, shape (..., B, K); larger is better. A real floating dtype of at most 64
        bits. ``-inf`` forbids a pair.
    capacities : array, optional
        The mass of each group, at least 0: shape (K,), or (..., K) with one set per slice. They are normalized to the
        total weight of the items. A group of capacity 0 takes nothing, and its capacity has no derivative. Without them
        all groups have the same mass.
    epsilon : number or array, optional
        Strength of the entropy, in the units of the scores: a number, or one value per slice, shape (..., 1, 1).
    weights : array, optional
        The mass of each item, at least 0, broadcasting to (..., B). Without them every item has weight 1.
    where : array of bool, optional
        The pairs that are allowed, broadcasting to the shape of `scores`. An item without an allowed pair is left out:
        its row is 0 and its weight does not count.
    method : {"newton", "sinkhorn"}, optional
        Newton's method on the K potentials, or Sinkhorn's algorithm in the log domain. By default Newton's method up to
        256 groups, and Sinkhorn's algorithm above.
    tolerance : float, optional
        The marginal error that counts as converged, in units of the mean weight of the items whose weight is not 0. By
        default 1e-8 for float64 and 1e-4 for float32, or 4 eps times the number of items if that is larger.
        `"sinkhorn"` stops when it is reached.
    max_iterations : int, optional
        The largest number of iterations; by default 300 for `"newton"` and 1000 for `"sinkhorn"`.

    Returns
    -------
    Plan
        `plan` (..., B, K), with the dtype and device of `scores`. `potentials` (..., K), in the units of the scores:
        ``epsilon * log(column)``, with mean 0 over the groups of positive capacity, and -inf for the others. And
        `marginal_error`, `iterations` and `converged`, one value per slice. The error is that of the column sums of the
        plan, in units of weight, before the plan is rounded to 16 bits.

    Raises
    ------
    TypeError
        If an argument is not an array of the library and device of `scores`, or has a wrong dtype.
    ValueError
        If a shape does not fit, or a number is not in its range.

    Warns
    -----
    ConvergenceWarning
        If a slice has not converged, as for `softk.transport`. A slice that is NaN gives no warning, but its
        `converged` is false.

    Notes
    -----
    A slice is NaN if it has a NaN or ``+inf`` among its allowed scores, a negative or infinite weight or capacity, or
    capacities whose sum is 0. If the forbidden pairs admit no plan, the rows sum to the weights, the columns miss their
    capacities, and `converged` is false. Where the total weight is 0, the plan is 0, and its derivative in the weights
    is the limit for equal weights.

    A finite score forbids nothing, however low it is. Newton's method needs finite differences of the scores, and its
    default of 300 iterations may not suffice if they spread over more than 1e60 times `epsilon`.

    Derivatives of the plan flow to `scores`, `capacities`, `epsilon` and `weights`, by the implicit function theorem at
    the solution. They do not depend on how many iterations were made. If the plan has not converged, they are not those
    of a solution.

    References
    ----------
    Cuturi, "Sinkhorn Distances", NeurIPS 2013; Asano, Rupprecht, Vedaldi, "Self-labelling via simultaneous clustering
    and representation learning", ICLR 2020; Caron et al., "Unsupervised Learning of Visual Features by Contrasting
    Cluster Assignments" (SwAV), NeurIPS 2020; the damped Newton step: Sun and Tran-Dinh, "Generalized self-concordant
    functions", Mathematical Programming 2019.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> scores = np.asarray([[0.9, 0.1], [0.8, 0.3], [0.7, 0.2], [0.6, 0.1]])  # all items prefer the first group
    >>> found = softk.assign(scores, epsilon=0.05)
    >>> found.plan.round(3).tolist()
    [[0.995, 0.005], [0.335, 0.665], [0.335, 0.665], [0.335, 0.665]]
    >>> found.plan.sum(axis=0).round(9).tolist(), bool(found.converged)
    ([2.0, 2.0], True)
    """
    require_array("scores", scores)
    pairs = _Pairs(scores, capacities=capacities, epsilon=epsilon, weights=weights, where=where)
    check_temperature(pairs.xp, epsilon, pairs.working)
    if method is not None and (not isinstance(method, str) or method not in ("newton", "sinkhorn")):
        raise ValueError(f"method must be 'newton', 'sinkhorn' or None, got {method!r}")
    chosen = method or ("newton" if pairs.groups <= GROUPS else "sinkhorn")
    tolerance = check_tolerance(tolerance, float(pairs.xp.finfo(pairs.working).eps), pairs.items)
    limit = check_iterations(max_iterations, STEPS if chosen == "newton" else 1000)

    with pairs.backend.quiet():
        arguments = {
            "scores": pairs.matrix(),
            "capacities": pairs.vector("capacities", capacities, -2, pairs.groups),
            "epsilon": pairs.temperature(epsilon),
            "weights": pairs.vector("weights", weights, -1, pairs.items),
            "where": pairs.allowed(where),
        }
    options = {"method": chosen, "tolerance": tolerance, "limit": limit}

    def build(plan: Array, error: Array, relative: Array, iterations: Array, potentials: Array) -> Plan[ArrayT]:
        advice = "; if the forbidden pairs admit no plan, allow more pairs"
        warn_unless_converged(pairs.backend, "softk.assign", relative, tolerance, limit, advice)
        return Plan(plan, potentials, error, iterations, relative <= tolerance)

    def converted(values: Array) -> Array:
        return cast(pairs.xp, values, pairs.dtype)

    restores = (
        Argument(None, None, converted, lambda cotangent: cast(pairs.xp, cotangent, pairs.working)),
        Argument(None),  # the offsets and the references are internal
        Argument(None),
        pairs.diagnostic(pairs.dtype),
        pairs.diagnostic(pairs.working),
        pairs.diagnostic(index_dtype(pairs.xp)),
        Argument(None, None, converted),
    )
    return Call(pairs.backend, assignment, options, arguments, restores, build)


class _Pairs(Slices):
    """The scores (..., B, K), whose last two axes are one problem."""

    def __init__(self, scores: Any, **others: Any) -> None:
        present = {name: value for name, value in others.items() if value is not None}
        if getattr(scores, "ndim", 2) < 2:
            raise ValueError(f"scores must have at least two axes, items and groups, got shape {tuple(scores.shape)}")
        super().__init__(scores, (-2, -1), called="scores", joint=True, **present)
        self.items, self.groups = self.shape[-2:]
        if not self.items or not self.groups:
            raise ValueError(f"scores must have at least one item and one group, got shape {self.shape}")

    def matrix(self) -> Argument:
        return Argument(
            None,
            None,
            lambda values: cast(self.xp, values, self.working),
            lambda cotangent: cast(self.xp, cotangent, self.dtype),
        )

    def temperature(self, epsilon: Any) -> Argument:
        """epsilon, with both axes of the problem."""
        argument, xp = self.per_slice("epsilon", epsilon), self.xp
        if argument.value is None or not argument.value.ndim:
            return argument
        push, pull = argument.push, argument.pull
        return Argument(
            xp.expand_dims(argument.value, axis=-1),
            epsilon,
            None if push is None else lambda tangent: xp.expand_dims(push(tangent), axis=-1),
            None if pull is None else lambda cotangent: pull(xp.squeeze(cotangent, axis=-1)),
        )

    def vector(self, name: str, value: Any, axis: int, count: int) -> Argument:
        """capacities or weights: one value per group or item, for all slices or for each. `axis` is added to it."""
        xp = self.xp
        if value is None:
            return Argument(None)
        require_array(name, value)
        shape, target = tuple(value.shape), (*self.batch, count)
        if not xp.isdtype(value.dtype, ("real floating", "integral")):
            raise TypeError(f"{name} must be real, got dtype {value.dtype}")
        if not shape or not fits(shape, target) or (name == "capacities" and shape[-1] != count):
            per = "group" if name == "capacities" else "item"
            allowed = f"one value per {per}, {(count,)}, or that for each slice, {target}"
            raise ValueError(f"{name} must have a shape of {allowed}, got {shape}")

        def push(values: Array) -> Array:
            return xp.expand_dims(xp.broadcast_to(cast(xp, values, self.working), target), axis=axis)

        def pull(cotangent: Array) -> Array:
            return cast(xp, shrink(xp, xp.squeeze(cotangent, axis=axis), shape), value.dtype)

        return Argument(push(value), value, *self._linear(value, push, pull))

    def allowed(self, where: Any) -> Argument:
        if where is None:
            return Argument(None)
        if not self.xp.isdtype(where.dtype, "bool"):
            raise TypeError(f"where must be a boolean array, got dtype {where.dtype}")
        return Argument(self._stretch("where", where), where)
