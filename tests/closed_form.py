"""Batches of slices, quantiles and second derivatives, on top of `softk.testing.Oracle`, in extended precision.

Of one slice, mask_i = sigmoid((x_i - t) / tau) with tau = epsilon / 2 and t such that sum_i a_i mask_i = k. The oracle
finds t by bisection and differentiates once; `Slice` differentiates the two equations

    tau z_i = x_i - t,    sum_i a_i sigmoid(z_i) = k

once and twice with respect to theta = (x, k, epsilon, a); `differences` is a second witness, which knows no calculus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from softk.testing import LONG, Oracle

WIDE = np.longdouble

#: Scale of the scores and epsilon: a smooth case, and one where most masks are all but 0 or 1.
CASES = {"soft": (1.0, 0.7), "near-hard": (0.15, 0.02)}

ARGUMENTS = ("x", "k", "epsilon", "weights")
_PER_ITEM = ("x", "weights")


def problem(rng: Any, case: str = "soft", *, batch: tuple[int, ...] = (), n: int = 7) -> dict[str, np.ndarray]:
    """Random arguments: x (..., n), k (..., 1) not whole, epsilon (..., 1), weights (n,) not uniform; without a batch k
    and epsilon have no axes."""
    scale, epsilon = CASES[case]
    weights = rng.uniform(0.3, 2.0, n)
    one = (*batch, 1) if batch else ()
    return {
        "x": scale * rng.standard_normal((*batch, n)),
        "k": weights.sum() * rng.uniform(0.25, 0.65, one),
        "epsilon": epsilon * rng.uniform(0.8, 1.3, one),
        "weights": weights,
    }


def host(tensor: Any) -> np.ndarray:
    """The values of a tensor, on whichever device it is."""
    values: np.ndarray = tensor.numpy(force=True)
    return values


def assert_close(found: Any, expected: Any, tolerance: float = 1e-11) -> None:
    """Equal relative to the largest entry, in shape as well. Tensors may be on any device."""
    found, expected = (host(value) if hasattr(value, "cpu") else np.asarray(value) for value in (found, expected))
    assert found.shape == expected.shape
    largest = np.max(np.abs(expected), initial=0.0)
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=float(tolerance * largest))


# --- values


def _shape(*arguments: Any) -> tuple[int, ...]:
    """The shape to which the arguments broadcast."""
    return np.broadcast_shapes(*(np.shape(value) for value in arguments if value is not None))


def _oracles(x: Any, k: Any, epsilon: Any, weights: Any = None, where: Any = None) -> Iterator[tuple[Any, Oracle]]:
    """The place in the batch and the oracle of every slice along the last axis, to which all arguments broadcast."""
    x = np.broadcast_to(np.asarray(x, WIDE), _shape(x, k, epsilon, weights, where))
    one, whole = (*x.shape[:-1], 1), x.shape
    k, epsilon = (np.broadcast_to(np.asarray(value, WIDE), one) for value in (k, epsilon))
    weights, where = (None if value is None else np.broadcast_to(value, whole) for value in (weights, where))
    for i in np.ndindex(x.shape[:-1]):
        rest = [None if value is None else value[i] for value in (weights, where)]
        yield i, Oracle(x[i], k[i][0], epsilon[i][0], *rest, arithmetic=LONG)


def threshold(x: Any, k: Any, epsilon: Any, weights: Any = None, where: Any = None) -> np.ndarray:
    """The threshold along the last axis, which is kept. Finite scores or -inf, and a mass below the total."""
    found = np.zeros((*_shape(x, k, epsilon, weights, where)[:-1], 1), WIDE)
    for i, oracle in _oracles(x, k, epsilon, weights, where):
        found[i] = oracle.t
    return found


def topk(x: Any, k: Any, epsilon: Any, weights: Any = None, where: Any = None) -> np.ndarray:
    """The mask along the last axis."""
    found = np.zeros(_shape(x, k, epsilon, weights, where), WIDE)
    for i, oracle in _oracles(x, k, epsilon, weights, where):
        found[i] = oracle.mask
        if oracle.regular:  # `oracle.mask` is rounded to float64
            found[i][oracle.kept] = oracle.m
    return found


def quantile(x: Any, q: Any, epsilon: Any, weights: Any = None) -> np.ndarray:
    """The quantile along the last axis, which is kept, of one probability a slice (or one in all)."""
    x = np.asarray(x, WIDE)
    total = WIDE(x.shape[-1]) if weights is None else np.sum(np.asarray(weights, WIDE), axis=-1, keepdims=True)
    position = (total - 1) * np.asarray(q, WIDE)
    index = np.floor(position)
    lower = threshold(x, total - index - 0.5, epsilon, weights)
    upper = threshold(x, total - index - 1.5, epsilon, weights)
    return lower + (position - index) * (upper - lower)


# --- derivatives


class Slice:
    """First and second derivatives at one slice, with respect to theta = (x, k, epsilon, weights) in a row.

    `mask`, `mask1` and `mask2` have the shapes (n,), (n, 2n + 2) and (n, 2n + 2, 2n + 2); `threshold`, `threshold1` and
    `threshold2` the same without their first axis. `place` says where in theta an argument lies.
    """

    def __init__(self, x: Any, k: Any, epsilon: Any, weights: Any = None) -> None:
        x = np.asarray(x, WIDE)
        n = x.size
        oracle = Oracle(x, np.asarray(k, WIDE).item(), np.asarray(epsilon, WIDE).item(), weights, arithmetic=LONG)
        self.place = {
            "x": slice(0, n),
            "k": slice(n, n + 1),
            "epsilon": slice(n + 1, n + 2),
            "weights": slice(n + 2, None),
        }
        tau, a, z, mask, slope, total = oracle.tau, oracle.a, oracle.z, oracle.m, oracle.v, oracle.V
        bend = slope * (oracle.rest - mask)
        unit = np.eye(2 * n + 2, dtype=WIDE)
        dx, dk, dtau, da = (unit[self.place[name]] for name in ARGUMENTS)
        dk, dtau = dk[0], dtau[0] / 2

        fixed = (dx - np.outer(z, dtau)) / tau  # of z, were t constant
        dt = tau * ((a * slope) @ fixed + mask @ da - dk) / total
        dz = fixed - dt / tau
        dmask = slope[:, None] * dz

        fixed = -(dz[:, :, None] * dtau + dz[:, None, :] * dtau[:, None]) / tau
        curved = bend[:, None, None] * dz[:, :, None] * dz[:, None, :]
        cross = da.T @ dmask
        rest = np.tensordot(a, slope[:, None, None] * fixed + curved, 1) + cross + cross.T
        ddt = tau * rest / total
        ddmask = slope[:, None, None] * (fixed - ddt / tau) + curved

        self.mask, self.mask1, self.mask2 = mask, dmask, ddmask
        self.threshold, self.threshold1, self.threshold2 = oracle.t, dt, ddt

    def get(self, function: str, order: int, *names: str) -> np.ndarray:
        """The derivative of that order of "topk" or "threshold", in the arguments named."""
        found: np.ndarray = getattr(self, ("mask" if function == "topk" else "threshold") + str(order))
        return found[(..., *(self.place[name] for name in names))]


def quantile_derivatives(x: Any, q: Any, epsilon: Any, weights: Any = None) -> tuple[Any, np.ndarray, np.ndarray]:
    """The quantile of one slice, its gradient and its Hessian with respect to (x, q, epsilon, weights) in a row."""
    n, q = np.asarray(x).size, WIDE(np.asarray(q, WIDE).item())
    a = np.ones(n, WIDE) if weights is None else np.asarray(weights, WIDE)
    total = a.sum()
    index = np.floor((total - 1) * q)
    fraction = (total - 1) * q - index
    bounds = [Slice(x, total - index - 0.5 - j, epsilon, a) for j in range(2)]
    place = bounds[0].place
    # Both bounds hold sum a - k constant, and know no q: from d theta to that of a slice, where k has the place of q.
    move = np.eye(2 * n + 2, dtype=WIDE)
    move[place["k"]] = 0
    move[place["k"], place["weights"]] = 0 if weights is None else 1
    share, bent = np.zeros(2 * n + 2, WIDE), np.zeros((2 * n + 2, 2 * n + 2), WIDE)  # of the fraction
    share[place["k"]], share[place["weights"]] = total - 1, q
    bent[place["k"], place["weights"]] = bent[place["weights"], place["k"]] = 1
    (low, low1, low2), (high, high1, high2) = (
        (bound.threshold, bound.threshold1 @ move, move.T @ bound.threshold2 @ move) for bound in bounds
    )
    cross = np.outer(share, high1 - low1)
    first = low1 + fraction * (high1 - low1) + share * (high - low)
    second = low2 + fraction * (high2 - low2) + cross + cross.T + bent * (high - low)
    return low + fraction * (high - low), first, second


def _sizes(arguments: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape to which every argument broadcasts."""
    shape = np.shape(arguments["x"])
    return {name: shape if name in _PER_ITEM else (*shape[:-1], 1) for name in arguments}


def pullback(function: str, cotangent: Any, arguments: dict[str, Any], where: Any = None) -> dict[str, np.ndarray]:
    """The cotangent of every argument given, for x of any batch and the others broadcasting to it."""
    found = {name: np.zeros(size) for name, size in _sizes(arguments).items()}
    for i, oracle in _oracles(**arguments, where=where):
        u = np.asarray(cotangent)[i]
        cotangents = oracle.vjp(u) if function == "topk" else oracle.vjp(b=u.item())
        for name, values in found.items():
            values[i] = cotangents[name]
    return {name: _shrink(value, np.shape(arguments[name])) for name, value in found.items()}


def push(function: str, tangents: dict[str, Any], arguments: dict[str, Any]) -> np.ndarray:
    """The derivative along tangents, each of the shape of its argument."""
    shape, sizes = np.shape(arguments["x"]), _sizes(arguments)
    full = {name: np.broadcast_to(value, sizes[name]) for name, value in tangents.items()}
    out = np.zeros(shape if function == "topk" else shape[:-1])
    for i, oracle in _oracles(**arguments):
        given = {f"d{name}": value[i] if name in _PER_ITEM else value[i][0] for name, value in full.items()}
        out[i] = oracle.jvp(**given)[function == "threshold"]
    return out


def differences(f: Callable[[np.ndarray], np.ndarray], value: Any, step: float = 1e-3) -> np.ndarray:
    """The Jacobian of f at an array by central differences of the fourth order: the shape of f, then of the array."""
    value = np.asarray(value, WIDE)
    columns = []
    for i in np.ndindex(value.shape):
        move = np.zeros_like(value)
        move[i] = step
        near = np.asarray(f(value + move)) - np.asarray(f(value - move))
        far = np.asarray(f(value + 2 * move)) - np.asarray(f(value - 2 * move))
        columns.append((8 * near - far) / (12 * WIDE(step)))
    stacked = np.stack(columns, axis=-1)
    return stacked.reshape((*stacked.shape[:-1], *value.shape))


def _shrink(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Summed over what broadcasting repeated."""
    lead = values.ndim - len(shape)
    axes = tuple(i for i in range(values.ndim) if i < lead or (shape[i - lead] == 1 and values.shape[i] != 1))
    return values.sum(axis=axes, keepdims=True).reshape(shape)
