"""The public operator for the transport problem with any anchors and marginals, with diagnostics."""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any, Generic, Literal, NamedTuple

from softk._reference.plan.newton import STEPS
from softk._reference.plan.transport import transport_plan
from softk.backend import AnyArray, Array, ArrayT, Backend, index_dtype, peek

from .arguments import Slices, require_scores
from .call import Argument, Call, operator_from
from .checks import check_temperature, is_number, require_array
from .signatures import plain_tuple


class ConvergenceWarning(UserWarning):
    """A transport problem was not solved to its tolerance."""


@plain_tuple
class Plan(NamedTuple, Generic[ArrayT]):
    """The solution of a transport problem. Only `plan` has derivatives.

    Attributes
    ----------
    plan : array
        The mass that each score sends to each anchor: the shape of `x`, then one axis for the anchors. Its sum over the
        anchors is the weight of the score. Its sum over the scores is the normalized marginal.
    potentials : array
        The dual potentials of the anchors, in the units of the squared distance: the shape of `x` without the selected
        axis, then the anchors. The potential is 0 for the lowest anchor with a positive marginal, and -inf for anchors
        whose marginal is 0. Those of `softk.assign` are of the groups, in the units of the scores, with mean 0.
    marginal_error : array
        The largest absolute difference between a column sum and its marginal, one value per slice.
    iterations : array
        The number of iterations, one integer per slice.
    converged : array of bool
        Whether the marginal error is within the tolerance, one value per slice. That of a slice of NaN is not.
    """

    plan: ArrayT
    potentials: ArrayT
    marginal_error: ArrayT
    iterations: ArrayT
    converged: ArrayT


@operator_from
def transport(
    x: ArrayT,
    /,
    anchors: AnyArray,
    marginals: AnyArray,
    *,
    axis: int = -1,
    epsilon: float | AnyArray = 0.1,
    weights: AnyArray | None = None,
    where: AnyArray | None = None,
    method: Literal["newton", "sinkhorn"] = "newton",
    tolerance: float | None = None,
    max_iterations: int | None = None,
) -> Call[Plan[ArrayT]]:
    """Entropic optimal transport between scores and anchors on a line, with diagnostics.

    The plan minimizes ``sum(plan * cost) + epsilon * sum(plan * (log(plan) - 1))`` with ``cost = (x - anchor)**2``
    among all plans whose row sums are the weights of the scores and whose column sums are the marginals of the anchors.

    Parameters
    ----------
    x : array
        Scores, as for `softk.topk`. ``-inf`` is not transported.
    anchors : array
        Positions of at least 2 anchors, in the units of `x` and in any order: shape (m,), or (..., m) with one set per
        slice.
    marginals : array
        The mass of each anchor, at least 0, with the shape of `anchors` or one that broadcasts. The marginals are
        normalized to the total weight of the scores. An anchor of marginal 0 is left out, and its marginal has no
        derivative.
    axis : int, optional
        The axis of the scores.
    epsilon : number or array, optional
        Strength of the entropy, in the units of the cost.
    weights : array, optional
        Item weights, at least 0, broadcasting to the shape of `x`. Without them every score has weight 1.
    where : array of bool, optional
        Items to transport, broadcasting to the shape of `x`.
    method : {"newton", "sinkhorn"}, optional
        Newton's method on the m - 1 thresholds between neighboring anchors, or Sinkhorn's algorithm in the log domain,
        which the paper uses, for comparison.
    tolerance : float, optional
        The marginal error that counts as converged, in units of the mean weight of the scores whose weight is not 0. By
        default 1e-8 for float64 and 1e-4 for float32, or 4 eps times the number of scores if that is larger.
        `"sinkhorn"` stops when it is reached.
    max_iterations : int, optional
        The largest number of iterations; by default 40 for `"newton"` and 1000 for `"sinkhorn"`.

    Returns
    -------
    Plan
        `plan`, `potentials`, `marginal_error`, `iterations` and `converged`.

    Raises
    ------
    TypeError, ValueError
        As `softk.topk`; also if `anchors` or `marginals` are not arrays, or their shapes do not fit.

    Warns
    -----
    ConvergenceWarning
        If a slice has not converged. The check is made only on the CPU and outside a trace, where reading a value costs
        nothing.

    Notes
    -----
    Derivatives flow to `x`, `anchors`, `marginals`, `epsilon` and `weights`, by the implicit function theorem at the
    solution. If `"sinkhorn"` has not converged, they are neither those of the solution nor those of the iteration.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, equation (4) and algorithm 1; the damped
    Newton step: Sun and Tran-Dinh, "Generalized self-concordant functions", Mathematical Programming 2019.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> x, anchors, marginals = np.asarray([0.2, 1.7, -0.5, 0.9]), np.asarray([0.0, 1.0]), np.asarray([1.0, 1.0])
    >>> found = softk.transport(x, anchors, marginals, epsilon=0.5)
    >>> found.plan.round(3).tolist()
    [[0.804, 0.196], [0.01, 0.99], [0.985, 0.015], [0.2, 0.8]]
    >>> bool(found.converged)
    True
    """
    require_array("anchors", anchors)
    require_array("marginals", marginals)
    slices = Slices(x, axis, anchors=anchors, marginals=marginals, epsilon=epsilon, weights=weights, where=where)
    require_scores(slices)
    slices.require_sizes()
    xp = slices.xp
    check_temperature(xp, epsilon, slices.working)
    if not isinstance(method, str) or method not in ("newton", "sinkhorn"):
        raise ValueError(f"method must be 'newton' or 'sinkhorn', got {method!r}")
    tolerance = check_tolerance(tolerance, float(xp.finfo(slices.working).eps), slices.n)
    limit = check_iterations(max_iterations, STEPS if method == "newton" else 1000)

    with slices.backend.quiet():
        arguments = {
            "x": slices.scores(),
            "anchors": slices.per_anchor("anchors", anchors),
            "marginals": slices.per_anchor("marginals", marginals, anchors.shape[-1]),
            "epsilon": slices.per_slice("epsilon", epsilon, scale=0.5),
            "weights": slices.per_item("weights", weights),
            "where": slices.kept(where),
        }
    options = {"method": method, "tolerance": tolerance, "limit": limit}

    def build(plan: Array, error: Array, relative: Array, iterations: Array, potentials: Array) -> Plan[ArrayT]:
        warn_unless_converged(slices.backend, "softk.transport", relative, tolerance, limit)
        return Plan(plan, potentials, error, iterations, relative <= tolerance)

    restores = (
        slices.item_by_row(),
        Argument(None),  # the offsets and the references are internal
        Argument(None),
        slices.diagnostic(slices.dtype),
        slices.diagnostic(slices.working),
        slices.diagnostic(index_dtype(slices.xp)),
        Argument(None, None, lambda values: xp.astype(values, slices.dtype)),
    )
    return Call(slices.backend, transport_plan, options, arguments, restores, build)


def check_tolerance(tolerance: Any, eps: float, n: int) -> float:
    """The marginal error that counts as converged, for n items in a dtype of this machine epsilon."""
    if tolerance is None:
        tolerance = max(1e-8 if eps < 1e-10 else 1e-4, 4.0 * eps * n)
    if not is_number(tolerance) or not 0.0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be a positive number, got {tolerance!r}")
    return float(tolerance)


def check_iterations(given: Any, default: int) -> int:
    """The largest number of iterations."""
    limit = default if given is None else given
    if isinstance(limit, bool) or not isinstance(limit, numbers.Integral) or limit < 1:
        raise ValueError(f"max_iterations must be a positive integer, got {given!r}")
    return int(limit)


def warn_unless_converged(
    backend: Backend, called: str, error: Array, tolerance: float, limit: int, advice: str = ""
) -> None:
    """Give a warning, at the line of the user's call, if the error of a slice exceeds the tolerance.

    That of a slice of NaN does not. `advice` says what else may help.
    """
    xp = backend.xp
    if peek(backend, xp.any(error > tolerance)):
        largest = float(xp.max(xp.where(error > tolerance, error, 0.0)))
        warnings.warn(
            f"{called} has not converged: the largest marginal error in units of the mean weight is {largest:.3g}, the "
            f"tolerance {tolerance:.3g}; raise max_iterations (now {limit}), tolerance or epsilon{advice}",
            ConvergenceWarning,
            stacklevel=5,
        )
