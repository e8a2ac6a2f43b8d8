"""Explicit derivatives of softk's functions for arrays of any library. They apply the rules of the primitives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from softk.backend import Array, Backend, backend_of

from .call import Call, R
from .checks import is_number, kind_of, require_array, require_equal_sizes

__all__ = ["jvp", "vjp"]


def vjp(f: Callable[..., R], x: Array, /, *args: Any, **kwargs: Any) -> tuple[R, Callable[[Any], dict[str, Array]]]:
    """The result of a function of softk, and its pullback (reverse mode), on arrays of any library.

    Parameters
    ----------
    f : callable
        A function of softk: `softk.topk`, `softk.sorted_topk`, `softk.transport`, ...
    x, *args, **kwargs
        Its arguments.

    Returns
    -------
    out
        ``f(x, *args, **kwargs)``.
    pullback : callable
        ``pullback(cotangent) -> {argument name: cotangent}``. It takes a cotangent of the shape of `out` and returns
        one for every argument that is a real floating-point array, with the shape and dtype of the argument. For
        `softk.sorted_topk` it takes a pair of cotangents, for the values and for the assignment; one of them may be
        None. For `softk.select` it takes a pair too, for the values and for the gates. For `softk.transport` and
        `softk.assign` it takes the cotangent of the plan, because the rest has no derivative.

    Raises
    ------
    TypeError
        If `f` is not a function of softk. `pullback` raises it if the cotangent is not real or does not have the
        structure above.
    ValueError
        `pullback` raises it if the cotangent does not have the shape of `out`.

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
    call = _describe(f)(x, *args, **kwargs)
    backend, primitive = call.backend, call.primitive
    sample = call.sample(x)
    with backend.quiet(sample):
        inputs = call.inputs(x)
        outputs = call.bound(*inputs)
        parts = call.restore(outputs)
        out = call.build(*parts)
    # The indices of the results that have derivatives.
    moving = [i for i, restore in enumerate(call.restores) if restore.pull is not None]
    needed = tuple(argument.pull is not None for argument in call.arguments.values())

    def pullback(cotangent: Any) -> dict[str, Any]:
        given = call.cotangents(cotangent, out)
        canonical: list[Array | None] = [None] * (primitive.moving)
        with backend.quiet(sample):
            for i, (label, value) in zip(moving, given.items(), strict=True):
                pull = call.restores[i].pull
                if pull is not None and (value is not None or len(moving) == 1):
                    _require_like(label, value, parts[i], backend)
                    canonical[i] = pull(value)
            found = backend.run(primitive, "vjp", inputs, outputs, tuple(canonical), needed)
            return call.collect(
                {
                    name: argument.pull(values)
                    for (name, argument), values in zip(call.arguments.items(), found, strict=True)
                    if argument.pull is not None and values is not None
                }
            )

    return out, pullback


def jvp(f: Callable[..., R], x: Array, /, *args: Any, tangents: Mapping[str, Array], **kwargs: Any) -> tuple[R, Any]:
    """The result of a function of softk, and its derivative along tangents (forward mode), on arrays of any library.

    Parameters
    ----------
    f : callable
        A function of softk: `softk.topk`, `softk.sorted_topk`, `softk.transport`, ...
    x, *args, **kwargs
        Its arguments.
    tangents : mapping
        ``{argument name: tangent}``, for arguments that are real floating-point arrays. Each tangent has the shape of
        its argument. The other arguments are constant.

    Returns
    -------
    out
        ``f(x, *args, **kwargs)``.
    tangent : array
        The derivative, with the shape and dtype of `out`. For `softk.sorted_topk` and `softk.select` it is a pair, for
        `softk.transport` the derivative of the plan.

    Raises
    ------
    TypeError
        If `f` is not a function of softk, `tangents` is not a mapping, or a tangent is not real.
    ValueError
        If a name in `tangents` is not that of a real floating-point array argument, or a tangent does not have the
        shape of its argument.

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
    call = _describe(f)(x, *args, **kwargs)
    backend, primitive = call.backend, call.primitive
    if not isinstance(tangents, Mapping):
        raise TypeError(f"tangents must be a mapping {{argument name: tangent}}, got {kind_of(tangents)}")
    known = {name: argument for name, argument in call.arguments.items() if argument.push is not None}
    moved: dict[str, Any] = {}
    for name, value in tangents.items():
        for part, tangent in call.spread(name, value).items():
            if part not in known:
                names = sorted(call.collect(dict.fromkeys(known)))
                raise ValueError(f"tangents must name array arguments, one of {names}, got {part!r}")
            given = known[part].given
            _require_like(f"tangents[{part!r}]", tangent, x if given is None else given, backend)
            moved[part] = tangent
    sample = call.sample(x)
    with backend.quiet(sample):
        inputs = call.inputs(x)
        outputs = call.bound(*inputs)
        canonical = tuple(
            argument.push(moved[name]) if argument.push is not None and name in moved else None
            for name, argument in call.arguments.items()
        )
        rates = call.restore(backend.run(primitive, "jvp", inputs, outputs, canonical))
        moving = [i for i, restore in enumerate(call.restores) if restore.pull is not None]
        return call.build(*call.restore(outputs)), call.tangent([rates[i] for i in moving])


def _describe(f: Any) -> Callable[..., Call[Any]]:
    describe: Callable[..., Call[Any]] | None = getattr(f, "call", None)
    if describe is not None:
        return describe
    if str(getattr(f, "__module__", "")).startswith("softk."):
        raise TypeError(
            f"f must be an operator with a rule of its own, such as softk.topk, got {f.__module__}.{f.__name__}, which "
            "is a composition of array operations: differentiate it with the autodiff of PyTorch, JAX, MLX or HIPS "
            "autograd"
        )
    raise TypeError(
        f"f must be a function of softk, such as softk.topk, got {f!r}; pass the function and its arguments, as in "
        "softk.vjp(softk.topk, x, k)"
    )


def _require_like(name: str, given: Any, like: Array, backend: Backend) -> None:
    """Require that a tangent or cotangent has the library and the shape of its argument or result."""
    if is_number(given) and like.ndim == 0:
        return
    require_array(name, given)
    if backend_of(given) is not backend and backend.wraps != backend_of(given).name:
        raise TypeError(
            f"{name} must be an array of the same library as x: got {kind_of(given)} beside {kind_of(like)}"
        )
    if not backend.xp.isdtype(given.dtype, ("real floating", "integral")):
        raise TypeError(f"{name} must be real, got dtype {given.dtype}")
    require_equal_sizes({"x": like, name: given})
    if tuple(given.shape) != tuple(like.shape):
        raise ValueError(f"{name} must have the shape {tuple(like.shape)}, got {tuple(given.shape)}")
