"""Compiles the Triton kernels for a device that need not be there: ``python tests/compile_kernels.py 90``.

The argument is a compute capability. The operators are called as a user calls them, but where a kernel would run it is
compiled, to machine code, for the arguments that it would run with. Prints a line for each: registers, and bytes of
them that did not fit. Not under TRITON_INTERPRET, for then there is nothing to compile.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import softk
import softk_triton
from softk_triton import launch

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "maxnreg")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

seen: set[Any] = set()


def compile_for(capability: int, kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
    """Compile a kernel for such arguments, as the launch would specialise it."""
    options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    key = (kernel, *signature.items(), *constants.items(), *options.items(), str(attributes))
    if key in seen:
        return
    seen.add(key)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage.stdout)[0]
    sizes = ("n", "BLOCK", "ROWS", "CHUNKS", "WIDTH")
    given = " ".join(f"{name}={value}" for name, value in arguments.items() if name in sizes)
    print(f"{kernel.__name__}: {given} {options} registers={registers} stack={stack}", flush=True)


def main() -> None:
    capability = int(sys.argv[1])

    def run(problem: Any, kernel: Any, *arrays: Any, grid: Any = None, **options: Any) -> None:
        numbers = {"n": problem.n, "rows": problem.rows, **problem.steps, **problem.size, **options}
        names = [parameter.name for parameter in kernel.params]
        compile_for(capability, kernel, grid, {**dict(zip(names, (*problem.arrays, *arrays), strict=False)), **numbers})

    softk_triton._is_interpreted = lambda device: device.type == "cpu"
    launch.fault_on = lambda device: None
    launch.Problem.run = run  # type: ignore[method-assign]
    for n, dtype, riches in (
        (128, torch.float32, (False,)),
        (1000, torch.bfloat16, (False, True)),
        (32768, torch.float32, (False,)),
        (40000, torch.float16, (False, True)),
    ):
        rows = 2
        for rich in riches:
            x = torch.randn(rows, n, dtype=dtype).requires_grad_()
            k, epsilon, weights, where = 5, 0.1, None, None
            if rich:
                k = torch.full((rows, 1), 5.0, requires_grad=True)
                epsilon = torch.full((rows, 1), 0.1, requires_grad=True)
                weights, where = torch.rand(n).requires_grad_(), torch.rand(rows, n) > 0.1
            mask = softk.topk(x, k, epsilon=epsilon, weights=weights, where=where)
            mask.backward(torch.randn(mask.shape, dtype=dtype))
        softk.threshold(x, 5)


if __name__ == "__main__":
    with softk.kernels("triton"):
        main()
