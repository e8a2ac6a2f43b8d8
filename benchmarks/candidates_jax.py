"""JAX under jit: softk, the functions of the framework, and the peers written for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import softk

from .candidates import (
    BISECTION,
    BISECTIONS,
    OPERATORS,
    REFERENCE,
    SINKHORN,
    SINKHORN_ITERATIONS,
    Candidate,
    Prepare,
    Prepared,
    bisection,
    few,
    implicit,
    installed,
    sinkhorn,
)
from .cases import Case

Operator = Callable[[Case, Any], Any]
"""Takes (case, scores). Returns an array of the shape of the scores, or with k values per slice."""


def both(operator: Operator, case: Case) -> Callable[[Any, Any], tuple[Any, Any]]:
    """A function that computes output and derivative, to be compiled as a whole."""

    def function(x: Any, u: Any) -> tuple[Any, Any]:
        out, pullback = jax.vjp(partial(operator, case), x)
        return out, pullback(u[..., : out.shape[-1]])[0]

    return function


def prepare(operator: Operator, device: str, *, gradient: bool = True) -> Prepare:
    def prepared(case: Case, x: np.ndarray, u: np.ndarray) -> Prepared:
        # Enable float64 only for float64 cases: a peer that creates its own constants would otherwise always use it.
        jax.config.update("jax_enable_x64", case.dtype == "float64")
        place = jax.devices("gpu" if device == "cuda" else device)[0]
        scores, cotangent = jax.device_put(x, place), jax.device_put(u, place)
        forward = jax.jit(partial(operator, case))
        whole = jax.jit(both(operator, case))
        return Prepared(
            lambda: jax.block_until_ready(forward(scores)),
            (lambda: jax.block_until_ready(whole(scores, cotangent))) if gradient else None,
            np.asarray,
        )

    return prepared


def _softk(case: Case, x: Any) -> Any:
    return softk.topk(x, case.k, axis=case.axis, epsilon=case.epsilon)


def _reference(case: Case, x: Any) -> Any:
    with softk.kernels("none"):
        return softk.topk(x, case.k, axis=case.axis, epsilon=case.epsilon)


def _sorted(case: Case, x: Any) -> Any:
    return softk.sorted_topk(x, case.k, epsilon=case.epsilon).values


def _softmax(case: Case, x: Any) -> Any:
    return jax.nn.softmax(x, axis=-1)


def _sigmoid(case: Case, x: Any) -> Any:
    return jax.nn.sigmoid(x)


def _hard(case: Case, x: Any) -> Any:
    index = jax.lax.top_k(x, case.k)[1]
    return jnp.zeros_like(x).at[jnp.arange(case.rows)[:, None], index].set(1.0)


def _loop(step: Any, state: Any) -> Any:
    return jax.lax.fori_loop(0, SINKHORN_ITERATIONS, lambda _, state: step(state), state)


def _with_implicit_derivative(solve: Callable[[Any, int, float], Any]) -> Any:
    """A solver of the mask with the implicit derivative at its result."""
    function = jax.custom_vjp(solve, nondiff_argnums=(1, 2))

    def forward(x: Any, k: int, epsilon: float) -> Any:
        mask = function(x, k, epsilon)
        return mask, mask

    def backward(k: int, epsilon: float, mask: Any, u: Any) -> Any:
        return (implicit(mask, u, epsilon),)

    function.defvjp(forward, backward)
    return function


@_with_implicit_derivative
def _iterated(x: Any, k: int, epsilon: float) -> Any:
    return sinkhorn(jnp, x, k, epsilon, _loop)


@_with_implicit_derivative
def _bisected(x: Any, k: int, epsilon: float) -> Any:
    def loop(step: Any, state: Any) -> Any:
        return jax.lax.fori_loop(0, BISECTIONS, lambda _, state: step(state), state)

    return bisection(jnp, x, k, epsilon, jax.nn.sigmoid, loop)


def _sinkhorn(case: Case, x: Any) -> Any:
    return _iterated(x, case.k, case.epsilon)


def _bisection(case: Case, x: Any) -> Any:
    return _bisected(x, case.k, case.epsilon)


# Without squashing it is the operator of softk.topk. Its implicit derivative raises an error with the current lineax,
# so the iterations are unrolled and differentiated.
OTT_OPTIONS = {"squashing_fun": lambda values: values, "implicit_diff": None}


def _ott_mask(case: Case, x: Any) -> Any:
    from ott.tools import soft_sort

    return soft_sort.topk_mask(x, k=case.k, epsilon=case.epsilon, **OTT_OPTIONS)


def _ott_sort(case: Case, x: Any) -> Any:
    from ott.tools import soft_sort

    return soft_sort.sort(x, topk=case.k, epsilon=case.epsilon, **OTT_OPTIONS)


def _softjax(case: Case, x: Any) -> Any:
    import softjax

    shares = softjax.top_k(x, case.k, softness=case.epsilon, method="ot", standardize=False)[1]
    return shares.sum(axis=-2)


def candidates(device: str) -> list[Candidate]:
    """softk, the functions of the framework, and the installed peers."""
    here = installed("JAX")
    found = [
        Candidate("softk.topk", "JAX jit", "soft", prepare(_softk, device), joint=True),
        Candidate(REFERENCE, "JAX jit", "soft", prepare(_reference, device), joint=True),
        Candidate("softk.sorted_topk", "JAX jit", "other", prepare(_sorted, device), obstacle=few(1.5e6)),
        Candidate("softmax", "JAX jit", "other", prepare(_softmax, device), operators=OPERATORS),
        Candidate("sigmoid", "JAX jit", "other", prepare(_sigmoid, device)),
        Candidate("hard top-k (top_k, scatter)", "JAX jit", "hard", prepare(_hard, device, gradient=False)),
        Candidate(BISECTION, "JAX jit", "soft", prepare(_bisection, device), peer=True),
        Candidate(SINKHORN, "JAX jit", "soft", prepare(_sinkhorn, device), peer=True),
    ]
    if "ott-jax" in here:
        found.append(Candidate("OTT topk_mask", "JAX jit", "soft", prepare(_ott_mask, device), peer=True))
        sort = Candidate("OTT sort(topk=k)", "JAX jit", "other", prepare(_ott_sort, device), True, obstacle=few(1.5e6))
        found.append(sort)
    if "softjax" in here:
        shares = prepare(_softjax, device)
        found.append(Candidate("softjax top_k, ot", "JAX jit", "other", shares, True, obstacle=few(1.5e6)))
    return found
