"""Random subsets of k items without replacement, relaxed to a soft top-k so that they have gradients.

The scores are perturbed by Gumbel noise, and the top k of the sum are selected. The randomness is an argument: an array
of uniform numbers, drawn by the random generator of the array's own library.

Both functions are compositions of array operations and `softk.topk`. A framework with autodiff differentiates them
natively. `softk.vjp` and `softk.jvp` do not support them, so on a library without autodiff they have no derivative.
"""

from __future__ import annotations

from typing import Any

from ._functions.arguments import Slices
from ._functions.checks import at_most, check_precision, is_number, require_array, working_dtype
from ._functions.masks import topk
from ._functions.shapes import cast, fits, move_axis
from ._functions.signatures import explained
from .backend import AnyArray, ArrayT, backend_of

__all__ = ["gumbel", "subset"]


@explained
def subset(
    scores: ArrayT,
    k: float | AnyArray,
    noise: AnyArray,
    /,
    *,
    axis: int = -1,
    epsilon: float | AnyArray = 0.1,
    where: AnyArray | None = None,
    hard: bool = False,
) -> ArrayT:
    """A random subset of k items without replacement, as a mask with useful gradients.

    It is ``softk.topk(scores + gumbel(noise), k)``. The hard subset follows the Plackett-Luce model: items are drawn
    one after the other, each with a probability proportional to the exponential of its score, among the items that are
    left. As ``epsilon -> 0`` the soft mask becomes that of the hard subset.

    Parameters
    ----------
    scores : array
        Logarithms of the weights of the items, real floating-point, broadcasting to the shape of `noise`. An item of
        score ``-inf`` is never drawn, one of score ``+inf`` always. A NaN makes its slice NaN.
    k : number or array
        How many items are drawn, at least 0. A k above the number of items selects all. It may be fractional unless
        `hard` is set. An array has one value per slice, as for `softk.topk`.
    noise : array
        Independent random numbers, uniform between 0 and 1, one per item and sample. With axes in front of those of the
        scores there are several samples. The dtype is that of `scores`; float16, bfloat16 and float32 may be mixed, and
        float32 is best. A number outside [0, 1] makes its slice NaN.
    axis : int, optional
        The axis of the items, in the shape of `noise`. Slices along it are independent samples.
    epsilon : number or array, optional
        Strength of the entropy, in the units of `scores`, as for `softk.topk`. The noise has a standard deviation of
        1.28.
    where : array of bool, optional
        Items to draw from, broadcasting to the shape of `noise`.
    hard : bool, optional
        Return the exact indicator of the drawn subset, with the derivative of the soft mask.

    Returns
    -------
    array
        The masks, with the shape of `noise` and the dtype and device of `scores`. They sum to `k` along `axis`, or to
        the number of items that can be drawn if it is smaller.

    Raises
    ------
    TypeError
        If an argument is not an array (or number) of the right kind, or is of another library, device or dtype than
        `noise`.
    ValueError
        If a number or a shape is out of its range. Values in arrays never raise: an invalid value makes its slice NaN.

    Notes
    -----
    Derivatives flow to `scores`, `noise`, `epsilon` and an array `k`. The gradient of the mean of a function of the
    soft masks is the mean of the gradients. With ``hard=True``, or for a function of the hard subset, the gradient is
    biased, and less so for a smaller `epsilon`, at the price of a larger variance. float16 and bfloat16 are computed in
    float32.

    References
    ----------
    Kool, van Hoof, Welling, "Stochastic Beams and Where to Find Them: The Gumbel-Top-k Trick for Sampling Sequences
    Without Replacement", ICML 2019, section 2.3; Xie and Ermon, "Reparameterizable Subset Sampling via Continuous
    Relaxations", IJCAI 2019, with the mask of Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020,
    as the relaxation.

    Examples
    --------
    >>> import numpy as np
    >>> from softk import sampling
    >>> scores = np.log(np.asarray([0.1, 0.2, 0.3, 0.4]))
    >>> noise = np.random.default_rng(0).random((3, 4))
    >>> sampling.subset(scores, 2, noise, hard=True).tolist()
    [[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]
    >>> sampling.subset(scores, 2, noise, epsilon=0.5)[0].round(3).tolist()
    [0.894, 0.654, 0.213, 0.239]
    """
    require_array("scores", scores)
    require_array("noise", noise)
    if backend_of(noise) is backend_of(scores) and not fits(tuple(scores.shape), tuple(noise.shape)):
        raise ValueError(
            f"noise must have the shape of scores, {tuple(scores.shape)}, or further axes in front of it, "
            f"got {tuple(noise.shape)}"
        )
    slices = Slices(noise, axis, called="noise", scores=scores, k=k, epsilon=epsilon, where=where)
    check_precision(slices.xp, "scores", scores, "noise", noise)
    with slices.backend.quiet():
        x: Any = slices.per_item("scores", scores).value
        uniform: Any = slices.scores().of(noise).value
        mass: Any = k if is_number(k) else slices.per_slice("k", k).value
        strength: Any = epsilon if is_number(epsilon) else slices.per_slice("epsilon", epsilon).value
        kept, mass = slices.kept(where).value, at_most(slices.xp, mass, slices.n)
        mask = topk(x + gumbel(uniform), mass, epsilon=strength, where=kept, hard=hard)
        result: ArrayT = cast(slices.xp, move_axis(slices.xp, mask, -1, slices.axis), scores.dtype)
    return result


@explained
def gumbel(uniform: ArrayT, /) -> ArrayT:
    """Standard Gumbel noise from uniform noise: ``-log(-log(uniform))``.

    Parameters
    ----------
    uniform : array
        Random numbers, uniform between 0 and 1, real floating-point. 0 and 1, which a generator may return by rounding,
        count as the nearest numbers between them. A number outside [0, 1] becomes NaN.

    Returns
    -------
    array
        Noise with the shape, dtype and device of `uniform`. It is finite.

    Raises
    ------
    TypeError
        If `uniform` is not a real floating-point array.

    References
    ----------
    Gumbel, "Statistical Theory of Extreme Values and Some Practical Applications", 1954; the inverse of its
    distribution function ``exp(-exp(-g))``.

    Examples
    --------
    >>> import numpy as np
    >>> from softk import sampling
    >>> sampling.gumbel(np.asarray([0.0, 0.1, 0.5, 0.9])).round(3).tolist()
    [-6.563, -0.834, 0.367, 2.25]
    """
    require_array("uniform", uniform)
    backend = backend_of(uniform)
    xp = backend.xp
    if not xp.isdtype(uniform.dtype, "real floating"):
        raise TypeError(f"uniform must be real floating-point, got dtype {uniform.dtype}")
    wide = working_dtype(xp, uniform.dtype)
    least, most = float(xp.finfo(wide).smallest_normal), 1.0 - 0.5 * float(xp.finfo(uniform.dtype).eps)
    with backend.quiet(uniform):
        values = cast(xp, uniform, wide)
        values = xp.where(values == 0.0, least, xp.where(values == 1.0, most, values))
        result: ArrayT = cast(xp, -xp.log(-xp.log(values)), uniform.dtype)
    return result
