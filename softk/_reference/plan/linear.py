"""Linear systems with a symmetric positive definite matrix whose rows may differ by many orders of magnitude."""

from __future__ import annotations

from softk.backend import Array, Backend


def solve_definite(backend: Backend, matrix: Array, right: Array) -> Array:
    """Solve ``matrix @ solution = right``. The solution is 0 for unknowns whose diagonal element vanishes.

    Parameters
    ----------
    backend : Backend
        The framework of the arrays. Its ``linalg`` extension is used if its namespace has one.
    matrix : array
        Shape (..., b, b), positive semidefinite.
    right : array
        Shape (..., b, r).

    Returns
    -------
    array
        Shape (..., b, r).
    """
    xp = backend.xp
    b, info = matrix.shape[-1], xp.finfo(matrix.dtype)
    index = xp.arange(b, device=backend.device(matrix))
    diagonal = xp.reshape(index, (b, 1)) == xp.reshape(index, (1, b))
    diagonal = xp.broadcast_to(diagonal, matrix.shape)
    size = xp.sum(xp.where(diagonal, matrix, 0.0), axis=-1, keepdims=True)
    active = size > 4.0 * float(info.smallest_normal)
    # Scale the diagonal to 1, since gaps between scores make rows differ by many orders of magnitude. The additional
    # b eps on the diagonal keeps the matrix positive definite under rounding.
    scale = xp.sqrt(xp.where(active, size, 1.0))
    matrix = xp.where(active & xp.matrix_transpose(active), matrix / scale / xp.matrix_transpose(scale), 0.0)
    matrix = xp.where(diagonal, 1.0 + b * float(info.eps), matrix)
    right = xp.where(active, right / scale, 0.0)
    found = xp.linalg.solve(matrix, right) if hasattr(xp, "linalg") else _eliminate(backend, matrix, right)
    return xp.where(active, found / scale, 0.0)


def _eliminate(backend: Backend, matrix: Array, right: Array) -> Array:
    """Gauss-Jordan elimination without pivoting, which a positive definite matrix does not need."""
    xp, b = backend.xp, matrix.shape[-1]
    index = xp.reshape(xp.arange(b, device=backend.device(matrix)), (b, 1))
    index = xp.broadcast_to(index, (*matrix.shape[:-1], 1))
    table = xp.concat([matrix, right], axis=-1)
    for i in range(b):
        pivot = table[..., i : i + 1, :] / table[..., i : i + 1, i : i + 1]
        table = xp.where(index == i, pivot, table - table[..., :, i : i + 1] * pivot)
    return table[..., b:]
