"""The interface of the timed candidates, and the paper's algorithm for all frameworks."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from .cases import Case, Operator
from .timing import Call

Array = Any
SINKHORN = "200 Sinkhorn iterations"
SINKHORN_ITERATIONS = 200
SETTLED = "Sinkhorn until it settles"
MOST_ITERATIONS = 1000
REFERENCE = "softk.topk, no kernels"
SELECT, INDICES = "softk.select", "hard top-k (values, indices)"
BISECTION = "60 bisections"
BISECTIONS = 60
OPERATORS = get_args(Operator)
MEMORY_SHARE = 0.3
"""A candidate that needs more than this share of the machine's memory is skipped."""


class Prepared(NamedTuple):
    """A candidate on one case. One call warms up each function. Both wait until their result is computed."""

    forward: Callable[[], Array]
    both: Callable[[], tuple[Array, Array]] | None  # output and derivative; None without a useful derivative
    numpy: Callable[[Array], np.ndarray]


Kind = Literal["soft", "hard", "relaxation", "other"]
"""softk's operator, the exact indicator, a different relaxation of the same hard operator, a different function."""
Prepare = Callable[[Case, np.ndarray, np.ndarray], Prepared]
"""Takes (case, scores, cotangent)."""


@dataclass(frozen=True)
class Candidate:
    """A function that is timed, such as a top-k mask of some library."""

    name: str
    framework: Literal["NumPy", "PyTorch", "torch.compile", "JAX jit"]
    kind: Kind
    prepare: Prepare
    peer: bool = False
    power: int = 1  # the time grows as this power of n
    arrays: float = 0.0  # the number of n x n arrays per slice held at once
    obstacle: Callable[[Case], str | None] = lambda case: None  # the reason if it cannot compute a case
    operators: tuple[Operator, ...] = ("topk",)  # of the cases on which it is measured
    joint: bool = False  # it takes the scores of a joint case as they are; the others get them in one slice

    def belongs(self, case: Case) -> bool:
        """Whether the candidate is measured on a case."""
        if case.operator not in self.operators:
            return False
        if not self.peer:
            return self.obstacle(case) is None
        if case.peers == "all":
            return True
        if case.peers == "solvers":
            return self.kind == "soft"
        return case.peers == "sinkhorn" and self.name == SINKHORN and self.framework == "NumPy"

    def refuses(self, case: Case) -> str | None:
        """The reason why the candidate is skipped on a case, or None."""
        if obstacle := self.obstacle(case):
            return obstacle
        needed = self.arrays * case.rows * case.n**2 * np.dtype(case.dtype).itemsize
        if needed > MEMORY_SHARE * total_memory():
            return f"needs {needed / 2**30:,.0f} GiB for n x n numbers per slice"
        return None


def few(entries: float) -> Callable[[Case], str | None]:
    """Refuse cases whose plan has so many entries that one call would take minutes."""

    def obstacle(case: Case) -> str | None:
        needed = case.size * (case.k + 1)
        return f"a plan of {needed:.1e} numbers" if needed > entries else None

    return obstacle


def finished(call: Callable[[], Array], wait: Callable[[Array], Any]) -> Call:
    """The call, followed by waiting for the device."""
    return lambda: wait(call())


def total_memory() -> float:
    """The memory of the machine in bytes."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 8.0 * 2**30


# The paper's algorithm ------------------------------------------------------------------------------------------------


def sinkhorn(xp: Any, x: Array, k: int, epsilon: float, loop: Callable[..., Any]) -> Array:
    """The mask by Sinkhorn's algorithm: n times the column of anchor 1 of the plan.

    The cost is (x - anchor)^2 and the marginals are 1/n and k/n. `loop(step, state)` runs the iterations. If epsilon is
    large enough, the multiplicative form is used, with each row of the kernel scaled by its largest entry. It needs no
    exponentials in the loop. Otherwise the iteration runs in the log domain.
    """
    n = x.shape[-1]
    cost0, cost1 = x * x, (x - 1.0) * (x - 1.0)
    if epsilon >= 0.05:
        least = xp.minimum(cost0, cost1)
        kernel0, kernel1 = xp.exp((least - cost0) / epsilon), xp.exp((least - cost1) / epsilon)

        def scale(state: tuple[Array, Array]) -> tuple[Array, Array]:
            right0, right1 = state
            left = (1.0 / n) / (kernel0 * right0 + kernel1 * right1)
            return (
                ((n - k) / n) / xp.sum(kernel0 * left, axis=-1, keepdims=True),
                (k / n) / xp.sum(kernel1 * left, axis=-1, keepdims=True),
            )

        one = xp.ones_like(x[..., :1])
        right0, right1 = loop(scale, (one / 2, one / 2))
        return kernel1 * right1 / (kernel0 * right0 + kernel1 * right1)

    log0, log1 = -cost0 / epsilon, -cost1 / epsilon

    def logsumexp(values: Array) -> Array:
        top = xp.amax(values, axis=-1, keepdims=True)
        return top + xp.log(xp.sum(xp.exp(values - top), axis=-1, keepdims=True))

    def balance(state: tuple[Array, Array]) -> tuple[Array, Array]:
        right0, right1 = state
        left = -xp.logaddexp(log0 + right0, log1 + right1)
        return float(np.log(n - k)) - logsumexp(log0 + left), float(np.log(k)) - logsumexp(log1 + left)

    zero = xp.zeros_like(x[..., :1])
    right0, right1 = loop(balance, (zero, zero))
    return 1.0 / (1.0 + xp.exp(log0 + right0 - log1 - right1))


def implicit(mask: Array, u: Array, epsilon: float) -> Array:
    """The paper's implicit derivative at the solution, for which it takes the last iterate."""
    slope = mask * (1.0 - mask)
    mean = (slope * u).sum(-1, keepdims=True) / (slope.sum(-1, keepdims=True) + 1e-30)
    return slope * (u - mean) / (epsilon / 2)


# What people write by hand --------------------------------------------------------------------------------------------


def bisection(xp: Any, x: Array, k: int, epsilon: float, sigmoid: Callable[[Array], Array], loop: Any) -> Array:
    """The mask by bisection on its threshold. `loop(step, state)` runs the iterations; `implicit` is its derivative."""
    n, tau = x.shape[-1], 0.5 * epsilon
    # If all scores were the smallest (the largest) of them, the threshold would be there.
    shift = tau * float(np.log((n - k) / k))

    def halve(state: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = state
        middle = 0.5 * (low + high)
        more = xp.sum(sigmoid((x - middle) / tau), axis=-1, keepdims=True) > k
        return xp.where(more, middle, low), xp.where(more, high, middle)

    low, high = loop(halve, (xp.amin(x, axis=-1, keepdims=True) + shift, xp.amax(x, axis=-1, keepdims=True) + shift))
    return sigmoid((x - 0.5 * (low + high)) / tau)


# The peers ------------------------------------------------------------------------------------------------------------


class Peer(NamedTuple):
    """Another project, installed or not."""

    distribution: str
    module: str
    framework: str
    computes: str
    absent: str = ""  # the reason why `pip install` does not provide it
    python: tuple[int, int] = (3, 11)


PEERS = (
    Peer(
        "ott-jax",
        "ott.tools.soft_sort",
        "JAX",
        "`topk_mask` with `squashing_fun` the identity is the same operator, by Sinkhorn's iteration to its default "
        "tolerance, 1e-3 of the whole mass n; `sort(topk=k)` transports to k + 1 anchors and returns k sorted values; "
        "`sort` and `ranks` to n anchors or `num_targets`. Among the operators that sort, epsilon is divided such that "
        "all solve softk's problem. All with `implicit_diff=None`: the default derivative raises an error with the "
        "present lineax",
    ),
    Peer(
        "POT",
        "ot",
        "PyTorch",
        '`solve_batch(method="log_sinkhorn", grad="last_step")` on the same cost, marginals and epsilon, at most 1000 '
        "iterations to its default tolerance of 1e-5: the same operator, differentiated through its last iteration",
    ),
    Peer(
        "difftopk",
        "difftopk",
        "PyTorch",
        "`SoftSort` and the bitonic `DiffTopkNet` (n a power of two), whose rows for the first k places are added up: "
        "relaxed permutation matrices, n x n numbers per slice; `SoftSort` also sorts",
    ),
    Peer(
        "torchsort",
        "torchsort",
        "PyTorch",
        "`soft_rank` and `soft_sort`: by isotonic regression in compiled C++. They are beside the masks, too, although "
        "ranks are no mask",
    ),
    Peer(
        "softtorch",
        "softtorch",
        "PyTorch",
        '`topk(method="ot", standardize=False)`: transport to k + 1 anchors; the index distributions are added up; '
        '`sort` and `rank` with `method="softsort", standardize=False`',
        python=(3, 12),
    ),
    Peer(
        "softjax",
        "softjax",
        "JAX",
        '`top_k(method="ot", standardize=False)`: as softtorch',
        python=(3, 12),
    ),
    Peer(
        "allrank",
        "allrank",
        "PyTorch",
        "`deterministic_neural_sort` and at most 50 iterations of `sinkhorn_scaling`, as in its NeuralNDCG: softk's "
        "plan for `sort` and `rank`, once they have converged; n x n numbers per slice and iteration",
    ),
    Peer("fast-soft-sort", "fast_soft_sort", "NumPy", "soft ranks by isotonic regression", "not on PyPI"),
    Peer("LapSum", "lapsum", "PyTorch", "a mask from sums of Laplace distributions, in O(n log n)", "not on PyPI"),
)


def installed(framework: str) -> set[str]:
    """The distributions of the peers of a framework that can be imported."""
    own = [peer for peer in PEERS if peer.framework == framework]
    return {peer.distribution for peer in own if not availability(peer).startswith("absent")}


def availability(peer: Peer, *, load: bool = True) -> str:
    """The installed version, or "absent" with the reason. `load` also tests whether it can be imported."""
    if sys.version_info[:2] < peer.python:
        return f"absent: needs Python {peer.python[0]}.{peer.python[1]}, this is {sys.version.split()[0]}"
    try:
        version = metadata.version(peer.distribution)
    except metadata.PackageNotFoundError:
        return f"absent: {peer.absent or _build_log(peer) or 'not installed'}"
    if not load:
        return version
    try:
        with redirect_stdout(io.StringIO()):  # some print at their import
            import_module(peer.module)
    except Exception as error:  # a broken installation may raise anything
        return f"absent: {version} is installed, its import fails: {type(error).__name__}: {error}"
    return version


def _build_log(peer: Peer) -> str | None:
    """The first error in pip's output, which the Makefile saves."""
    log = Path(sys.prefix) / f"{peer.distribution}.log"
    if not log.exists():
        return None
    failures = [line.strip() for line in log.read_text(errors="replace").splitlines() if "rror" in line]
    return f"does not build here: {failures[0][:200]}" if failures else None
