"""What a framework supplies to softk: the two types that an adapter is written against.

`Primitive` is a differentiable operator, stated once against the array API. `Backend` is a framework: its
namespace, how it differentiates a primitive, and the few things that only it can say. The base class is
complete: it serves every array that follows the standard and has no autodiff of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import array_api_compat

__all__ = ["PRIMITIVES", "Adapter", "AnyArray", "Array", "ArrayT", "Backend", "Primitive", "Words", "backend_of"]

#: Any array of any library; Python has no type for it yet.
Array = Any


class AnyArray(Protocol):
    """What a type checker knows of an array of any library."""

    @property
    def dtype(self) -> Any:
        """The type of its elements."""

    @property
    def ndim(self) -> int:
        """How many axes it has."""

    @property
    def shape(self) -> Any:
        """The sizes of its axes."""


#: The type of the scores, which is that of the result.
ArrayT = TypeVar("ArrayT", bound=AnyArray)
#: The inputs of a primitive, or what belongs to each: None where there is none.
Inputs = tuple[Array | None, ...]


@dataclass(frozen=True)
class Primitive:
    """A differentiable operator on canonical arrays, with its derivative in both directions.

    Every function takes the `Backend` first and is written against its namespace, so that the derivative of a
    derivative is taken by the framework itself, through the outputs that the rule is built from.

    Attributes
    ----------
    name : str
        What a traced graph calls it: unique, lower case.
    forward : callable
        ``forward(backend, *inputs, **options) -> outputs``. An input may be None (an argument that was not
        given); options are hashable and have no derivative. The outputs are a tuple of arrays.
    jvp : callable
        ``jvp(backend, inputs, outputs, tangents) -> tangents`` of the differentiable outputs. A tangent that is
        None is zero.
    vjp : callable
        ``vjp(backend, inputs, outputs, cotangents, needed) -> cotangents``, one an input. A cotangent that is None is
        zero. `needed` says, for each input, whether anybody asks for its cotangent; the others may be None, as are
        those of inputs that are None.
    constants : int
        How many of the outputs, counted from the last, have no derivative.
    results : int
        How many of the outputs, counted from the first, the rules do not read, so that a framework need not keep them.
    axes : int
        How many axes of the first input, counted from the last, belong to one problem; those before them are a batch.
    narrow : bool
        Whether the scores may be narrower than the other inputs, in float16 or bfloat16; then so is the result.
    """

    name: str
    forward: Callable[..., tuple[Array, ...]]
    jvp: Callable[..., tuple[Array, ...]]
    vjp: Callable[..., tuple[Array | None, ...]]
    constants: int = 0
    results: int = 1
    axes: int = 1
    narrow: bool = False

    def __post_init__(self) -> None:
        PRIMITIVES[self.name] = self


#: Every primitive by its name, for a framework that can hold a name in a graph but not a Python object.
PRIMITIVES: dict[str, Primitive] = {}


class Words(NamedTuple):
    """How the users of a library write what an error advises, with {} in the place of an argument's name.

    Attributes
    ----------
    cast : str
        Convert the array to float32.
    own : str
        Make an array of the library of one of another library.
    move : str
        Move the array to the device of another one, whose name is the second.
    measure : str
        Get the size of an axis that is not known.
    """

    cast: str = "xp.astype({}, xp.float32)"
    own: str = "xp.asarray({})"
    move: str = "{}.to_device({}.device)"
    measure: str = "give its size as a number where {} is made"


class Backend:
    """A framework as softk sees it. Subclass it and override what the framework does in its own way.

    Parameters
    ----------
    xp : module
        A namespace that follows the Python Array API standard, version 2024.12 or later.
    name : str, optional
        The library's name, for messages.
    """

    #: The name of another library whose arrays may stand beside this one's.
    wraps: str | None = None
    #: What its users write, for error messages.
    words: Words = Words()
    #: How derivatives are taken, for the table of ``python -m softk``.
    autodiff: str = "softk.vjp, softk.jvp"

    def __init__(self, xp: Any, name: str | None = None) -> None:
        self.xp = xp
        self.name = name or xp.__name__.removeprefix("array_api_compat.")

    def bind(self, primitive: Primitive, **options: Any) -> Callable[..., tuple[Array, ...]]:
        """The primitive as a function of its inputs that the framework can differentiate natively."""

        def bound(*inputs: Array | None) -> tuple[Array, ...]:
            with self.quiet():
                return primitive.forward(self, *inputs, **options)

        return bound

    def push(
        self, primitive: Primitive, inputs: Inputs, outputs: tuple[Array, ...], tangents: Inputs
    ) -> tuple[Array, ...]:
        """The primitive's rule in forward mode, for `softk.jvp`."""
        return primitive.jvp(self, inputs, outputs, tangents)

    def pull(
        self,
        primitive: Primitive,
        inputs: Inputs,
        outputs: tuple[Array, ...],
        cotangents: Inputs,
        needed: tuple[bool, ...],
    ) -> tuple[Array | None, ...]:
        """The primitive's rule in reverse mode, for `softk.vjp`."""
        return primitive.vjp(self, inputs, outputs, cotangents, needed)

    def quiet(self) -> AbstractContextManager[Any]:
        """A context in which overflow and invalid operations, which softk means or mends, are not reported.

        Most libraries report nothing; those that are built on NumPy report as NumPy is set to.
        """
        numpy = sys.modules.get("numpy")
        return nullcontext() if numpy is None else cast("AbstractContextManager[Any]", numpy.errstate(all="ignore"))

    def exact(self, x: Array) -> AbstractContextManager[Any]:
        """A context in which products of matrices on the device of `x` are rounded as their dtype is, no coarser."""
        return nullcontext()

    def device(self, x: Array) -> Any:
        """The device of an array, as creation functions take it."""
        return array_api_compat.device(x)

    def densely(self, x: Array) -> str | None:
        """How a user converts an array that is sparse or ragged, with {} in the place of its name; None for others."""
        return "{}.todense()" if hasattr(x, "todense") else None

    def devices(self) -> list[Any]:
        """The devices that arrays can be on now, for the self-check."""
        return [None]

    def gradient(self, f: Callable[[Array], Array], x: Array, cotangent: Array) -> Array | None:
        """The framework's own reverse-mode derivative of `f`, for the self-check; None where it has none."""
        return None

    @property
    def index(self) -> Any:
        """The dtype of counts and indices."""
        return self.xp.int64

    def share_device(self, x: Array, other: Array) -> bool:
        """Whether two arrays can meet in one operation."""
        return bool(self.device(x) == self.device(other))

    @property
    def differentiates_operations(self) -> bool:
        """Whether the framework may, just now, differentiate a primitive's own operations and not ask for its rule."""
        return False

    @property
    def overwriting(self) -> Any:
        """The namespace's elementwise functions, which may write the result over their first argument.

        It is softk's own, of the shape of the result, and nobody reads it again: an array less to be had from the
        system, which costs more than what is computed. Under batched gradients the first must be batched whenever
        another one is.
        """
        return self.xp

    def constant(self, x: Array) -> Array:
        """The same values, cut off from automatic differentiation."""
        return x

    def settle(
        self, function: Callable[..., tuple[Array, ...]], options: dict[str, Any], *arrays: Array
    ) -> tuple[Array, ...]:
        """``function(backend, *arrays, **options)``, which has no derivative: what an iteration settles to.

        A framework that would unroll the iteration under a trace may keep the call whole there. The options are
        literals, one of them `limit`, the number of iterations, on which the shapes of the results do not depend.
        """
        return function(self, *arrays, **options)

    def gathers(self, x: Array) -> bool:
        """Whether `gather_above` serves this array: where looking at its values neither waits nor breaks a trace."""
        return False

    def gather_above(self, x: Array, level: Array) -> Array | None:
        """The scores that are not below a level, in a shorter array.

        Parameters
        ----------
        x : array
            Scores, shape (..., n), of which some may be NaN.
        level : array
            Shape (..., 1).

        Returns
        -------
        array or None
            Shape (..., m): of each slice the scores ``~(x < level)``, in any order, and then -inf. None where it would
            not be much shorter.
        """
        return None

    def sigmoid(self, z: Array) -> Array:
        """1 / (1 + exp(-z)): 0 and 1 at the infinities, and differentiable there operation by operation."""
        upper = z > 0.0
        decay = self.xp.exp(-self.xp.abs(z))
        return self.xp.where(upper, 1.0, decay) / (1.0 + decay)

    def indicator(self, x: Array, level: Array | float) -> Array:
        """1 where a number is above the level and 0 elsewhere, as numbers of its own dtype."""
        return self.xp.astype(x > level, x.dtype)

    def dot(self, x: Array, y: Array) -> Array:
        """The sum of the products along the last axis, which is kept; rounded as the dtype rounds, and no coarser."""
        return self.xp.sum(x * y, axis=-1, keepdims=True)

    def part(self, x: Array, side: Array) -> tuple[Array, Array]:
        """The sums along the last axis, which is kept, of the numbers where `side` is 1 and of those where it is 0."""
        xp, above = self.xp, x * side
        return xp.sum(above, axis=-1, keepdims=True), xp.sum(x - above, axis=-1, keepdims=True)

    def symbolic(self, number: Any) -> bool:
        """Whether a number is a symbol of a trace: a graph may compute with it, and Python must not read its value."""
        return False

    def known(self, flag: Array) -> bool | None:
        """The value of a boolean, where looking at it neither waits for a device nor breaks a trace; else None."""
        return None

    def repeat(self, step: Callable[[Any], tuple[Any, Array]], state: Any, limit: int) -> Any:
        """Apply ``step(state) -> (state, done)`` at most `limit` times.

        A backend that can read `done` (a boolean array) without waiting for the device may stop as soon as all of
        it is true. Here nothing is read: an array may be lazy.
        """
        for _ in range(limit):
            state, _ = step(state)
        return state

    def by_rows(
        self, function: Callable[..., tuple[Array, ...]], rows: int, first: Array, *others: Array | None
    ) -> tuple[Array, ...]:
        """``function(first, *others)`` on `rows` rows at a time: what it forms on the way is never there for all.

        The rows are the second axis from the last, of the first array and of those that have as many; the others, and
        None, are passed as they are. Each row of the results depends on the same row of the arrays alone.
        """
        count = first.shape[-2]
        if rows == count:
            return function(first, *others)
        parts = [function(*rows_of(count, start, start + rows, first, *others)) for start in range(0, count, rows)]
        return tuple(self.xp.concat(list(column), axis=-2) for column in zip(*parts, strict=True))

    def order_statistics(self, x: Array, ranks: Array | tuple[int, ...]) -> Array:
        """The scores of the given ranks along the last axis: rank 1 is the largest.

        Parameters
        ----------
        x : array
            Scores, shape (..., n).
        ranks : array or tuple of int
            Integers from 1 to n: an array of shape (..., m), broadcasting against `x` but for the last axis, or m
            numbers where they are known without looking into an array.

        Returns
        -------
        array
            The scores, shape (..., m).
        """
        xp = self.xp
        ordered = xp.sort(x, axis=-1, stable=False)
        if isinstance(ranks, tuple):
            return self.pick(ordered, [x.shape[-1] - rank for rank in ranks])
        ranks = broadcast_like(xp, ranks, (*x.shape[:-1], ranks.shape[-1]), x[..., :1])
        return xp.take_along_axis(ordered, x.shape[-1] - ranks, axis=-1)

    def pick(self, x: Array, places: list[int]) -> Array:
        """Some items along the last axis."""
        return self.xp.concat([x[..., place : place + 1] for place in places], axis=-1)


# --- which backend serves an array: found from the array's type, without importing anything


class Adapter(NamedTuple):
    """Where the backend of a library's arrays comes from.

    Attributes
    ----------
    load : callable
        ``load() -> Backend``, called when the first array arrives; None where there is no backend after all.
    types : tuple of str or None
        The names of the array types among the types of the library: a mixin, a module or a random generator is no
        array. None for all types.
    """

    load: Callable[[], Backend | None]
    types: tuple[str, ...] | None = None


#: The adapter of every library that has one, by the top-level module of its array types.
ADAPTERS: dict[str, Adapter] = {}

_by_type: dict[type, Backend | None] = {}
_by_namespace: dict[str, Backend] = {}


def backend_of(x: Array) -> Backend:
    """The backend that serves an array, found from its type.

    Parameters
    ----------
    x : array
        An array of any library that follows the standard.

    Returns
    -------
    Backend
        That of the library's adapter; without one the base class, on the namespace of the array.

    Raises
    ------
    TypeError
        If `x` is no array of the standard.

    Examples
    --------
    >>> import numpy as np
    >>> from softk.backend import backend_of
    >>> backend_of(np.ones(3)).name
    'numpy'
    """
    adapted = _adapted(type(x))
    return adapted if adapted is not None else _standard(array_api_compat.array_namespace(x))


def is_array(value: Any) -> bool:
    """Whether some backend can serve the value: an array of a known library or of the standard."""
    return _adapted(type(value)) is not None or hasattr(type(value), "__array_namespace__")


def _adapted(kind: type) -> Backend | None:
    if _is_tensor(kind):
        return ADAPTERS["torch"].load()
    if kind not in _by_type:
        _by_type[kind] = _load(kind)
    return _by_type[kind]


def _is_tensor(kind: type) -> bool:
    """Whether PyTorch's adapter serves the type.

    It is not looked up: PyTorch's compiler can list neither the bases of a parameter's type nor its module, and would
    compile again whenever the dictionary of the types has grown.
    """
    torch = sys.modules.get("torch")
    if torch is None or "torch" not in ADAPTERS or not issubclass(kind, torch.Tensor):
        return False
    return kind in (torch.Tensor, torch.nn.Parameter) or all(known.types is not None for known in ADAPTERS.values())


def _load(kind: type) -> Backend | None:
    for base in kind.__mro__:  # a subclass from elsewhere may have a backend of its own
        adapter = ADAPTERS.get(base.__module__.partition(".")[0])
        name = base.__name__.rpartition(".")[2]  # JAX's own holds a module
        if adapter is not None and (adapter.types is None or name in adapter.types):
            return adapter.load()
    return None


def _standard(xp: Any) -> Backend:
    name = xp.__name__
    if name not in _by_namespace:
        _by_namespace[name] = Backend(xp)
    return _by_namespace[name]


# --- shapes


def unknown(size: Any) -> bool:
    """Whether a library does not know the size of an axis yet: None by the standard, in Dask a NaN."""
    return size is None or isinstance(size, float)


def broadcast_like(xp: Any, values: Array, shape: tuple[Any, ...], like: Array) -> Array:
    """``broadcast_to(values, shape)``; sizes in the shape that are not known yet are those of another array."""
    if not any(unknown(size) for size in shape):
        return xp.broadcast_to(values, shape)
    # By an operation, whatever it chooses: some libraries' broadcast_arrays and zeros_like forget the sizes they know.
    return xp.where(like == like, values, values)


def rows_of(count: int, start: int, stop: int, *arrays: Array | None) -> tuple[Any, ...]:
    """Some rows of the arrays that have `count` of them; the others hold for every row, and stay as they are."""
    return tuple(
        value
        if value is None or value.ndim < 2 or value.shape[-2] != count
        else value[..., start : min(stop, count), :]
        for value in arrays
    )
