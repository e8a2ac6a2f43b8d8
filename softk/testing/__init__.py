"""For those who write an adapter or a kernel: problems, an oracle, and checks that hold both to the contract.

It needs NumPy; the oracle needs mpmath, too, where long double does not suffice.
"""

from __future__ import annotations

from softk._native import devices, native_gradient

from .backends import BackendReport, check_backend
from .cases import Problem, problems
from .kernels import KernelReport, check_kernel
from .memory import LAYOUTS, poisoned
from .oracle import EXACT, LONG, Arithmetic, Oracle

__all__ = [
    "EXACT",
    "LAYOUTS",
    "LONG",
    "Arithmetic",
    "BackendReport",
    "KernelReport",
    "Oracle",
    "Problem",
    "check_backend",
    "check_kernel",
    "devices",
    "native_gradient",
    "poisoned",
    "problems",
]
