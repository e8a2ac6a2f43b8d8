"""How long the first calls take, which compile: `python -m benchmarks.compilation` prints it for this machine.

The programs of JAX are forward and backward passes. A kernel of Numba is compiled in a process of its own, with an
empty cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import softk

SHAPE, K = (64, 1000), 10
PROGRAMS: dict[str, Callable[[Any], Any]] = {
    "topk": lambda x: softk.topk(x, K),
    "select": lambda x: softk.select(x, K).gates,
    "sorted_topk": lambda x: softk.sorted_topk(x, K).values,
    "sort": lambda x: softk.sort(x, epsilon=0.1),
    "rank": lambda x: softk.rank(x, epsilon=0.1),
    "losses.ndcg": lambda x: softk.losses.ndcg(x, x > 0, k=K),
}
KERNELS: dict[str, Callable[[Any], Any]] = {
    "topk": lambda x: softk.topk(x, K),
    "topk, vjp": lambda x: softk.vjp(softk.topk, x, K)[1](x),
    "log_topk": lambda x: softk.log_topk(x, K),
    "threshold": lambda x: softk.threshold(x, K),
    "sort": lambda x: softk.sort(x, epsilon=0.1),
    "sort, vjp": lambda x: softk.vjp(softk.sort, x, epsilon=0.1)[1](x),
}


def program(name: str) -> float:
    """The seconds that JAX takes to trace and compile a function with its gradient."""
    import jax

    def loss(x: Any) -> Any:
        return jax.numpy.sum(PROGRAMS[name](x) ** 2)

    x = jax.random.normal(jax.random.key(0), SHAPE)
    jax.jit(lambda x: x + 1)(x).block_until_ready()  # starts JAX
    start = time.perf_counter()
    jax.jit(jax.value_and_grad(loss)).lower(x).compile()
    return time.perf_counter() - start


def kernel(name: str) -> float:
    """The seconds of the first call on NumPy."""
    x = np.random.default_rng(0).normal(size=SHAPE)
    start = time.perf_counter()
    KERNELS[name](x)
    return time.perf_counter() - start


def alone(kind: str, name: str) -> float:
    """The seconds of one of the two, in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        variables = {**os.environ, "SOFTK_QUIET": "1"} | ({"NUMBA_CACHE_DIR": cache} if kind == "kernel" else {})
        command = [sys.executable, "-m", "benchmarks.compilation", f"--{kind}", name]
        return float(subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compilation", description=__doc__)
    parser.add_argument("--program", choices=PROGRAMS, help="print the seconds of this program of JAX only")
    parser.add_argument("--kernel", choices=KERNELS, help="print the seconds of this kernel only, and use the cache")
    options = parser.parse_args()
    if options.program:
        print(program(options.program))
    elif options.kernel:
        print(kernel(options.kernel))
    else:
        print(f"{SHAPE} scores, k = {K}, {len(os.sched_getaffinity(0))} cores; seconds")
        for kind, names in (("program", PROGRAMS), ("kernel", KERNELS)):
            for name in names:
                print(f"{kind:8} {name:12} {alone(kind, name):6.1f}", flush=True)


if __name__ == "__main__":
    main()
