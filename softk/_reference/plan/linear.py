"""Systems of linear equations with a symmetric positive definite matrix, whose rows may be of any size."""

from __future__ import annotations

from softk.backend import Array, Backend


def solve_definite(backend: Backend, matrix: Array, right: Array) -> Array:
    """The solution of ``matrix @ solution = right``; zero for the unknowns whose row vanishes.

    Parameters
    ----------
    backend : Backend
        The framework of the arrays. Its linear algebra is used where its namespace has the extension.
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
    # In units of the diagonal: rows differ by as many orders of magnitude as the gaps between scores make them. A unit
    # of the last digit more on the diagonal keeps the matrix regular, whatever rounding does to it.
    scale = xp.sqrt(xp.where(active, size, 1.0))
    matrix = xp.where(active & xp.matrix_transpose(active), matrix / scale / xp.matrix_transpose(scale), 0.0)
    matrix = xp.where(diagonal, 1.0 + b * float(info.eps), matrix)
    right = xp.where(active, right / scale, 0.0)
    found = xp.linalg.solve(matrix, right) if hasattr(xp, "linalg") else _eliminate(backend, matrix, right)
    return xp.where(active, found / scale, 0.0)


def _eliminate(backend: Backend, matrix: Array, right: Array) -> Array:
    """Gauss-Jordan elimination, which needs no pivoting where the matrix is positive definite."""
    xp, b = backend.xp, matrix.shape[-1]
    index = xp.reshape(xp.arange(b, device=backend.device(matrix)), (b, 1))
    index = xp.broadcast_to(index, (*matrix.shape[:-1], 1))
    table = xp.concat([matrix, right], axis=-1)
    for i in range(b):
        pivot = table[..., i : i + 1, :] / table[..., i : i + 1, i : i + 1]
        table = xp.where(index == i, pivot, table - table[..., :, i : i + 1] * pivot)
    return table[..., b:]
