"""Explicit derivatives of softk's functions, on arrays of any library: the rules of the primitives, applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ._arguments import Call
from ._checks import is_number, kind_of, require_array
from ._registry import backend_of
from .backend import Array, Backend

__all__ = ["jvp", "vjp"]


def vjp(
    f: Callable[..., Array], x: Array, k: Any, /, **kwargs: Any
) -> tuple[Array, Callable[[Array], dict[str, Array]]]:
    """A function of softk and the pullback of its derivative (reverse mode), on arrays of any library.

    Parameters
    ----------
    f : callable
        `softk.topk`, `softk.threshold` or `softk.quantile`.
    x, k, **kwargs
        Its arguments (`k` stands for `q` in `softk.quantile`).

    Returns
    -------
    out : array
        ``f(x, k, **kwargs)``.
    pullback : callable
        ``pullback(cotangent) -> {argument name: cotangent}``, for a cotangent of the shape of `out` and for every
        argument that is a real floating-point array. Each cotangent has its argument's shape and dtype.

    Raises
    ------
    TypeError
        If `f` is not a function of softk.
    ValueError
        If the cotangent has another shape than `out`.

    See Also
    --------
    jvp : the same in forward mode.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> mask, pullback = softk.vjp(softk.topk, np.asarray([0.2, 1.7, -0.5, 0.9]), 2, epsilon=0.5)
    >>> pullback(np.asarray([1.0, 0.0, 0.0, 0.0]))["x"].round(3).tolist()
    [0.34, -0.018, -0.026, -0.295]
    """
    call = _describe(f)(x, k, **kwargs)
    backend, primitive = call.backend, call.primitive
    assert call.restore.push is not None
    with backend.quiet():
        outputs = backend.bind(primitive, **call.options)(*call.inputs)
        out = call.restore.push(outputs[0])
    unused = (None,) * (len(outputs) - primitive.constants - 1)

    def pullback(cotangent: Array) -> dict[str, Array]:
        _require_like("cotangent", cotangent, out, backend)
        assert call.restore.pull is not None
        with backend.quiet():
            canonical = backend.pull(primitive, call.inputs, outputs, (call.restore.pull(cotangent), *unused))
            return {
                name: argument.pull(found)
                for (name, argument), found in zip(call.arguments.items(), canonical, strict=True)
                if argument.pull is not None and found is not None
            }

    return out, pullback


def jvp(
    f: Callable[..., Array], x: Array, k: Any, /, *, tangents: Mapping[str, Array], **kwargs: Any
) -> tuple[Array, Array]:
    """A function of softk and its derivative along tangents (forward mode), on arrays of any library.

    Parameters
    ----------
    f : callable
        `softk.topk`, `softk.threshold` or `softk.quantile`.
    x, k, **kwargs
        Its arguments (`k` stands for `q` in `softk.quantile`).
    tangents : mapping
        ``{argument name: tangent}``, each of its argument's shape, for arguments that are real floating-point arrays.
        The others are held constant.

    Returns
    -------
    out : array
        ``f(x, k, **kwargs)``.
    tangent : array
        The derivative, of the shape and dtype of `out`.

    Raises
    ------
    TypeError
        If `f` is not a function of softk.
    ValueError
        If a tangent names no such argument or has another shape than it.

    See Also
    --------
    vjp : the same in reverse mode.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> k = np.asarray(2.0)
    >>> mask, rate = softk.jvp(softk.topk, np.asarray([0.2, 1.7, -0.5, 0.9]), k, tangents={"k": np.asarray(1.0)})
    >>> float(rate.sum().round(9))
    1.0
    """
    call = _describe(f)(x, k, **kwargs)
    backend, primitive = call.backend, call.primitive
    known = {name: argument for name, argument in call.arguments.items() if argument.push is not None}
    for name, tangent in tangents.items():
        if name not in known:
            raise ValueError(f"tangents must name array arguments, one of {sorted(known)}, got {name!r}")
        _require_like(f"tangents[{name!r}]", tangent, known[name].given, backend)
    assert call.restore.push is not None
    with backend.quiet():
        outputs = backend.bind(primitive, **call.options)(*call.inputs)
        canonical = tuple(
            argument.push(tangents[name]) if argument.push is not None and name in tangents else None
            for name, argument in call.arguments.items()
        )
        tangent = backend.push(primitive, call.inputs, outputs, canonical)[0]
        return call.restore.push(outputs[0]), call.restore.push(tangent)


def _describe(f: Any) -> Callable[..., Call]:
    describe: Callable[..., Call] | None = getattr(f, "call", None)
    if describe is None:
        raise TypeError(f"f must be a function of softk, such as softk.topk, got {f!r}")
    return describe


def _require_like(name: str, given: Any, like: Array, backend: Backend) -> None:
    """A tangent or cotangent has the library and the shape of what it belongs to."""
    if is_number(given) and like.ndim == 0:
        return
    require_array(name, given)
    if backend_of(given) is not backend and backend.wraps != backend_of(given).name:
        raise TypeError(
            f"{name} must be an array of the same library as x: got {kind_of(given)} beside {kind_of(like)}"
        )
    if tuple(given.shape) != tuple(like.shape):
        raise ValueError(f"{name} must have the shape {tuple(like.shape)}, got {tuple(given.shape)}")
