"""A kernel and the reference on one problem: the arrays, the calls, and what is required of any kernel."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from softk.backend import Array, Backend, Kernel, backend_of, choosing

from .memory import LAYOUTS, address, poisoned, same_bits, values_of

#: The dtype that scores of a dtype are computed in.
WORKING = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
#: The derivatives that softk promises, relative to the largest entry.
DERIVATIVES = {"float32": 2e-5, "float64": 1e-11}


class Case:
    """One problem, in one dtype and one layout."""

    n: int  # how many scores a slice has
    inputs: tuple[Any, ...]
    options: dict[str, Any]

    def __init__(
        self,
        kernel: Kernel,
        backend: Backend,
        make: Callable[[np.ndarray], Array],
        name: str,
        dtype: str,
        layout: str,
    ) -> None:
        self.kernel, self.backend, self.xp = kernel, backend, backend.xp
        self.make, self.dtype, self.layout = make, dtype, layout
        self.working = WORKING[dtype]
        self.name = f"{name}, {dtype}, {layout}"
        self.eps = float(np.finfo(self.working).eps)

    # -- arrays

    def array(self, values: np.ndarray, dtype: str | None = None) -> Array:
        """An array of the library in the layout of this case."""
        dtype = dtype or self.working

        def made(values: np.ndarray) -> Array:
            found = self.make(values)
            return found if dtype in ("bool", self.working) else self.xp.astype(found, getattr(self.xp, dtype))

        values = np.ascontiguousarray(values) if np.ndim(values) else np.asarray(values)
        values = values if dtype == "bool" else values.astype(self.working)
        return LAYOUTS[self.layout](self.xp, made, values)

    def random(self, shape: tuple[int, ...], seed: int, dtype: str | None = None) -> tuple[np.ndarray, Array]:
        """Random numbers that are exact in the dtype, for NumPy and for the library."""
        values = np.random.default_rng(seed).integers(-64, 65, size=shape) / 32.0
        return values, self.array(values, dtype)

    # -- failures

    def require(self, condition: bool, message: Callable[[], str] | str) -> None:
        """Raise an error that names the problem, unless a condition holds."""
        if not condition:
            raise AssertionError(self.text(message if isinstance(message, str) else message()))

    def text(self, message: str) -> str:
        """A message with the names of the kernel and the problem."""
        name = f"kernel {self.kernel.name} of {self.kernel.primitive.name}, {self.kernel.part}"
        return f"{name}: problem {self.name}: {message}"

    def require_small(self, error: np.ndarray, bound: Any, what: str) -> None:
        """Require that no error exceeds its bound."""
        excess = error - bound
        if np.all(excess <= 0.0):
            return
        place = np.unravel_index(int(np.argmax(np.where(np.isnan(excess), math.inf, excess))), error.shape)
        label = ", ".join(map(str, place))
        most = np.broadcast_to(bound, error.shape)[place]
        self.require(False, f"{what} is off by {error[place]:.3g} at [{label}], more than {most:.3g}")

    # -- the calls

    def refuses(self, *groups: Any, **options: Any) -> str | None:
        """Why the kernel refuses: a text that depends on no value."""
        with choosing(self.kernel.name):
            reason = self.kernel.refuses(self.backend, *groups, **options)
            self.require(
                reason is None or (isinstance(reason, str) and bool(reason.strip())),
                f"refuses must return a text or None, got {reason!r}",
            )
            others = tuple(
                tuple(self.xp.zeros_like(value) if hasattr(value, "dtype") else value for value in group)
                for group in groups
            )
            again = self.kernel.refuses(self.backend, *others, **options)
        self.require(again == reason, f"refuses must not look at values: {reason!r}, of zeros {again!r}")
        return reason

    def compute(self, *groups: Any, **options: Any) -> tuple[Any, ...]:
        """What the kernel returns: the same twice, and nothing that it was given is overwritten."""
        given = [value for group in groups for value in group if hasattr(value, "dtype")]
        copies = [self.values(value).copy() for value in given]
        with choosing(self.kernel.name), self.backend.quiet():
            # The first call may compile, and a compiler must find the library's own functions.
            self.kernel.compute(self.backend, *groups, **options)
            with poisoned(math.nan):
                found = self.kernel.compute(self.backend, *groups, **options)
                first: list[Any] = [self.values(value).copy() if hasattr(value, "dtype") else value for value in found]
            with poisoned(7e7):
                second = self.kernel.compute(self.backend, *groups, **options)
        for value, before in zip(given, copies, strict=True):
            self.require(same_bits(self.values(value), before), "it overwrites an array that it was given")
        for i, (one, other) in enumerate(zip(first, second, strict=True)):
            if hasattr(other, "dtype"):
                self.require(
                    same_bits(one, self.values(other)),
                    f"result {i} differs from call to call: it was not written, or was made of memory that was not",
                )
        for i, (one, other) in enumerate(zip(found, second, strict=True)):
            shared = hasattr(one, "dtype") and address(one) is not None and address(one) == address(other)
            self.require(not shared, f"result {i} shares memory with that of another call")
        return tuple(found)

    def by_reference(self, part: str, *groups: Any, **options: Any) -> tuple[Any, ...]:
        """What the reference computes."""
        with choosing("none"), self.backend.quiet():
            found: tuple[Any, ...] = getattr(self.kernel.primitive, part)(self.backend, *groups, **options)
        return found

    def values(self, value: Array) -> np.ndarray:
        """The values as a NumPy array."""
        return values_of(self.backend, value)

    def require_forms(self, found: tuple[Any, ...], expected: tuple[Any, ...], needed: Any = None) -> None:
        """The same tuple but for its values."""
        self.require(len(found) == len(expected), f"it returns {len(found)} results, the reference {len(expected)}")
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            if needed is not None and not needed[i]:
                continue
            self.require(
                (one is None) == (other is None), f"result {i} is {_kind(one)}, the reference's {_kind(other)}"
            )
            if one is None:
                continue
            self.require(hasattr(one, "dtype") and backend_of(one) is self.backend, f"result {i} is a {type(one)}")
            for what, mine, wanted in (
                ("shape", tuple(one.shape), tuple(other.shape)),
                ("dtype", one.dtype, other.dtype),
                ("device", self.backend.device(one), self.backend.device(other)),
            ):
                self.require(mine == wanted, f"result {i} has the {what} {mine}, the reference's {wanted}")

    # -- the checks

    def check(self) -> str | None:
        """Why the kernel refuses the problem; None where it served it and kept its contract."""
        if self.kernel.part == "forward":
            return self.check_forward()
        return self.check_vjp() if self.kernel.part == "vjp" else self.check_jvp()

    @abstractmethod
    def check_forward(self) -> str | None:
        """The forward pass."""

    @abstractmethod
    def check_vjp(self) -> str | None:
        """The rule in reverse mode."""

    def check_jvp(self) -> str | None:
        """The rule in forward mode."""
        raise NotImplementedError

    @abstractmethod
    def groups(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments and the options of a call of the kernel."""

    def states(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """The outputs of the forward pass, by the reference and by the kernels of the same name."""
        expected = self.by_reference("forward", self.inputs, **self.options)
        results = len(self.kernel.primitive.results)
        yield "the reference", (*(None for _ in range(results)), *expected[results:])
        for other in self.backend.kernels:
            if (
                other.name != self.kernel.name
                or other.part != "forward"
                or other.primitive is not self.kernel.primitive
            ):
                continue
            with choosing(other.name), self.backend.quiet():
                if other.refuses(self.backend, self.inputs, **self.options) is None:
                    found = other.compute(self.backend, self.inputs, **self.options)
                    yield "the kernel", (*(None for _ in range(results)), *found[results:])


def _kind(value: Any) -> str:
    return "None" if value is None else "an array"
