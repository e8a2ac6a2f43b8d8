"""PyTorch, replayed from CUDA graphs and timed by events of the device."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

import softk
from benchmarks import timing
from benchmarks.cases import Case
from benchmarks.machine import installed
from benchmarks.timing import Call

from .cases import is_anchored
from .drivers import Array, Driver, Inputs


class _Torch(Driver):
    def __init__(self, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} sees no CUDA device")
        self.device = torch.device(device)
        self.cuda = device == "cuda"
        self.graphs: dict[tuple[Call, int], torch.cuda.CUDAGraph] = {}

    def describe(self) -> dict[str, Any]:
        found = {"torch": torch.__version__, **installed(["triton"])}
        if not self.cuda:
            return {"device": "cpu", "versions": found}
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "device": properties.name,
            "memory": properties.total_memory,
            "cache": getattr(properties, "L2_cache_size", None),
            "versions": found | {"CUDA of torch": torch.version.cuda} | installed(["liger-kernel"]),
        }

    def normal(self, rows: int, n: int, dtype: str, seed: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(rows, n, generator=generator, device=self.device, dtype=getattr(torch, dtype))

    def inputs(self, x: Array, u: Array) -> Inputs:
        return Inputs(x.requires_grad_(), u, torch.empty_like(u))

    def calls(self, case: Case) -> dict[str, Callable[[Inputs], Any]]:
        self.graphs.clear()  # free the graphs of the previous case and their memory

        def mask(x: torch.Tensor) -> torch.Tensor:
            return softk.topk(x, case.k, epsilon=case.epsilon)

        @torch.no_grad()
        def copy(given: Inputs) -> Any:
            return given.target.copy_(given.x)

        @torch.no_grad()
        def forward(given: Inputs) -> Any:
            return mask(given.x)

        @torch.no_grad()
        def hard(given: Inputs) -> Any:
            return torch.topk(given.x, case.k, dim=-1)

        def both(given: Inputs) -> Any:
            out = mask(given.x)
            return out, torch.autograd.grad(out, given.x, given.u)[0]

        def derived(function: Callable[[torch.Tensor], torch.Tensor], given: Inputs) -> Any:
            out = function(given.x)
            return out, torch.autograd.grad(out, given.x, given.u)[0]

        softmax = partial(torch.softmax, dim=-1)
        found = {"copy": copy, "forward": forward, "both": both, "softmax": partial(derived, softmax), "hard": hard}
        if self.cuda and is_anchored(case):
            found["compiled"] = partial(derived, torch.compile(softmax, dynamic=False))
            if find_spec("liger_kernel"):
                from liger_kernel.ops.softmax import LigerSoftmaxFunction

                found["liger"] = partial(derived, LigerSoftmaxFunction.apply)
        return found

    def clock(self, call: Call, count: int) -> float:
        if not self.cuda:
            return timing.host(call, count)
        graph = self.graphs.get((call, count))
        if graph is None:
            graph = self.graphs[call, count] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(count):
                    call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    def mass_error(self, mask: Array, k: int) -> float:
        return float((mask.detach().sum(dim=-1, dtype=torch.float64) - k).abs().max()) / k

    def finite(self, gradient: Array) -> bool:
        return bool(torch.isfinite(gradient).all())

    def peak(self, call: Callable[[Inputs], Any], inputs: Inputs) -> float | None:
        if not self.cuda:
            return None
        self.free()  # free what the backward pass of the previous call still holds
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call(inputs)
        return float(torch.cuda.max_memory_allocated(self.device) - before)

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()


driver = _Torch
