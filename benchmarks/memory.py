"""Memory at the peak of forward + backward and between the two passes, in arrays of the size of the scores."""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np

from .candidates import Candidate
from .cases import Case

SECONDS_OF_IMPORT = "import time, {first}; t = time.perf_counter(); import {second}; print(time.perf_counter() - t)"


def numpy_peak(candidate: Candidate, case: Case) -> float:
    """The peak of NumPy's allocations, including the results but not the scores and the cotangent."""
    x, u = case.scores(), case.cotangent()
    both = candidate.prepare(case, x, u).both
    assert both is not None
    both()
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        result = both()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del result
    return (peak - before) / x.nbytes


def torch_saved(candidate: Candidate, case: Case) -> float:
    """The tensors that autograd saves for the backward pass, including the scores if they are saved."""
    import torch

    saved: dict[int, Any] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage  # kept alive, so that its address is not reused
        return tensor

    x = case.scores()
    both = candidate.prepare(case, x, case.cotangent()).both
    assert both is not None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        both()
    return sum(storage.nbytes() for storage in saved.values()) / x.nbytes


def jax_temporary(candidate: Candidate, case: Case) -> float:
    """The temporary and output buffers of the compiled forward + backward, according to XLA."""
    import jax

    from . import candidates_jax

    operator = {"softk.topk": candidates_jax._softk, "softmax": candidates_jax._softmax}[candidate.name]
    x = jax.ShapeDtypeStruct((case.rows, case.n), case.dtype)
    planned = jax.jit(candidates_jax.both(operator, case)).lower(x, x).compile().memory_analysis()
    return float(planned.temp_size_in_bytes + planned.output_size_in_bytes) / (
        case.size * np.dtype(case.dtype).itemsize
    )


MEASURES = {
    "NumPy": ("peak of forward + backward", numpy_peak),
    "PyTorch": ("saved for backward", torch_saved),
    "JAX jit": ("planned by XLA for forward + backward", jax_temporary),
}


def import_seconds(repeats: int) -> float:
    """The median time of `import softk` in a new process after `import numpy`, in seconds."""
    code = SECONDS_OF_IMPORT.format(first="numpy", second="softk")
    found = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(repeats)
    ]
    return float(np.median(found))
