"""Linear systems with a symmetric positive definite matrix whose rows may differ by many orders of magnitude."""

from __future__ import annotations

from softk.backend import Array, Backend


def solve_definite(backend: Backend, matrix: Array, right: Array) -> Array:
    """Solve ``matrix @ solution = right``. The solution is 0 for unknowns whose diagonal element vanishes.

    Parameters
    ----------
    backend : Backend
        The framework of the arrays.
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
    return xp.where(active, backend.solve(matrix, right) / scale, 0.0)
