"""The contracts: what an operator, a framework and a kernel are to softk.

`Primitive` is an operator with its derivative, stated once against the array API: the reference. `Backend` is a
framework: its namespace, how it differentiates a primitive, and the few things that only it can say. The base class is
complete: it serves every array that follows the standard and has no autodiff of its own. `Kernel` is a part of a
primitive over again, for one kind of processor. `backend_of` finds the backend of an array.
"""

from __future__ import annotations

import numbers
import os
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import array_api_compat

__all__ = [
    "PRIMITIVES",
    "Adapter",
    "AnyArray",
    "Array",
    "ArrayT",
    "Backend",
    "Form",
    "Kernel",
    "Primitive",
    "Words",
    "backend_of",
    "kernels",
]

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


class Form(NamedTuple):
    """The shape and the dtype of an array that need not be there."""

    shape: tuple[Any, ...]
    dtype: Any


@dataclass(frozen=True)
class Primitive:
    """An operator on canonical arrays, with its derivative in both directions; or without one, as a solver is.

    The functions take the `Backend` first and are written against its namespace, so that the derivative of a
    derivative is taken by the framework itself, through the outputs that the rule is built from.

    Attributes
    ----------
    name : str
        What a traced graph calls it: unique, lower case.
    forward : callable
        ``forward(backend, inputs, **options) -> outputs``. An input may be None (an argument that was not given);
        options are Python literals and have no derivative. The outputs are a tuple of arrays.
    forms : callable
        ``forms(xp, inputs, **options) -> tuple of Form``: the shapes and dtypes of the outputs. Of the inputs it reads
        the shapes and dtypes alone.
    jvp : callable, optional
        ``jvp(backend, inputs, outputs, tangents) -> tangents`` of the results and the state. A tangent that is None is
        zero.
    vjp : callable, optional
        ``vjp(backend, inputs, outputs, cotangents, needed) -> cotangents``, one an input, from those of the results and
        the state. A cotangent that is None is zero. `needed` says, for each input, whether anybody asks for its
        cotangent; the others may be None, as are those of inputs that are None.
    results : tuple of str
        The names of the first outputs, which the rules do not read: in their place the rules get None where a framework
        did not keep them.
    state : tuple of str
        The names of the outputs that follow: differentiable, and what the rules are built from.
    constants : tuple of str
        The names of the last outputs, which have no derivative.
    axes : int
        How many axes of the first input, counted from the last, belong to one problem; those before them are a batch.
    narrow : bool
        Whether the scores may be narrower than the other inputs, in float16 or bfloat16; then so is the result.

    Raises
    ------
    ValueError
        If there is a primitive of that name already.
    """

    name: str
    forward: Callable[..., tuple[Array, ...]]
    forms: Callable[..., tuple[Form, ...]]
    jvp: Callable[..., tuple[Array, ...]] | None = None
    vjp: Callable[..., tuple[Array | None, ...]] | None = None
    results: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    axes: int = 1
    narrow: bool = False

    def __post_init__(self) -> None:
        if self.name in PRIMITIVES:
            raise ValueError(f"name must be that of no other primitive, got {self.name!r}")
        PRIMITIVES[self.name] = self

    @property
    def moving(self) -> int:
        """How many of the outputs, counted from the first, have derivatives."""
        return len(self.results) + len(self.state)


#: Every primitive by its name, for a framework that can hold a name in a graph but not a Python object.
PRIMITIVES: dict[str, Primitive] = {}

#: The parts of a primitive: its value, and its derivative in both directions.
Part = Literal["forward", "jvp", "vjp"]


@dataclass(frozen=True)
class Kernel:
    """Another implementation of one part of a primitive, for one kind of processor.

    It takes the reference's arguments and returns the reference's results: the same tuple, shapes, dtypes and devices.
    It overwrites nothing that it is given, and nobody differentiates it: where somebody might, it must refuse.

    Attributes
    ----------
    name : str
        Of the processor's language, such as "triton": what ``SOFTK_KERNELS`` and `kernels` choose by.
    primitive : Primitive
        What it computes.
    part : {"forward", "jvp", "vjp"}
        Which part of it.
    refuses : callable
        ``refuses(backend, *groups, **options) -> str or None``: why it does not serve these arguments, or None where it
        does. It may look at types, shapes and devices, never at values.
    compute : callable
        ``compute(backend, *groups, **options) -> tuple``.
    """

    name: str
    primitive: Primitive
    part: Part
    refuses: Callable[..., str | None]
    compute: Callable[..., tuple[Array | None, ...]]


#: What ``SOFTK_KERNELS`` may be.
CHOICES = ("auto", "none", "triton")


def _require_choice(name: str, choice: Any) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{name} must be one of {', '.join(CHOICES)}, got {choice!r}")
    return str(choice)


_chosen = [_require_choice("SOFTK_KERNELS", os.environ.get("SOFTK_KERNELS", "auto"))]


def chosen_kernels() -> str:
    """What was chosen last, by ``SOFTK_KERNELS`` or `kernels`."""
    return _chosen[0]


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Choose the kernels within a ``with`` statement, for the whole process. `SOFTK_KERNELS` chooses those without.

    Parameters
    ----------
    choice : {"auto", "none", "triton"}
        All that serve, none (the reference computes everything), or those of one name.

    Raises
    ------
    ValueError
        If `choice` is none of these.

    Notes
    -----
    What was compiled before keeps the kernels that were chosen then.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> with softk.kernels("none"):
    ...     mask = softk.topk(np.asarray([0.2, 1.7, -0.5, 0.9]), 2, epsilon=0.5)
    """
    before = _chosen[0]
    _chosen[0] = _require_choice("choice", choice)
    try:
        yield
    finally:
        _chosen[0] = before


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
    #: What may take the place of the reference, the first that serves.
    kernels: tuple[Kernel, ...] = ()
    #: The reference's formulas for this namespace, which the reference loads at its first call.
    formulas: Any = None

    def __init__(self, xp: Any, name: str | None = None) -> None:
        self.xp = xp
        self.name = name or xp.__name__.removeprefix("array_api_compat.")

    def bind(self, primitive: Primitive, **options: Any) -> Callable[..., tuple[Array, ...]]:
        """The primitive as a function of its inputs that the framework can differentiate natively."""

        def bound(*inputs: Array | None) -> tuple[Array, ...]:
            with self.quiet(inputs[0]):
                return self.run(primitive, "forward", inputs, **options)

        return bound

    def run(self, primitive: Primitive, part: Part, *groups: Any, **options: Any) -> tuple[Any, ...]:
        """A part of a primitive: by the first kernel that serves, else by the reference.

        Parameters
        ----------
        primitive : Primitive
            What to compute.
        part : {"forward", "jvp", "vjp"}
            Which part of it.
        *groups, **options
            The arguments of that part after the backend: ``inputs``, or ``inputs, outputs, tangents``, or ``inputs,
            outputs, cotangents, needed``.

        Returns
        -------
        tuple
            The results of that part. Of a vjp, None for every cotangent that is not needed.
        """
        compute = getattr(primitive, part)
        for kernel in self.kernels:
            serves = kernel.primitive is primitive and kernel.part == part and _chosen[0] in ("auto", kernel.name)
            if serves and kernel.refuses(self, *groups, **options) is None:
                compute = kernel.compute
                break
        found: tuple[Any, ...] = compute(self, *groups, **options)
        if part == "vjp":
            return tuple(value if need else None for value, need in zip(found, groups[-1], strict=True))
        return found

    def quiet(self, x: Array | None = None) -> AbstractContextManager[Any]:
        """A context in which overflow and invalid operations, which softk means or mends, are not reported.

        Most libraries report nothing; those that are built on NumPy report as NumPy is set to. Where `x` is given, a
        product of matrices on its device is rounded as its dtype is, no coarser.
        """
        numpy = sys.modules.get("numpy")
        return nullcontext() if numpy is None else cast("AbstractContextManager[Any]", numpy.errstate(all="ignore"))

    def device(self, x: Array) -> Any:
        """The device of an array, as creation functions take it; None where the framework itself sees to devices."""
        return array_api_compat.device(x)

    def densely(self, x: Array) -> str | None:
        """How a user converts an array that is sparse or ragged, with {} in the place of its name; None for others."""
        return "{}.todense()" if hasattr(x, "todense") else None

    def memory(self, x: Any) -> Any:
        """An array as raw memory, or a number: what may be looked at now, or handed to a kernel; else None.

        None for a lazy array, under a trace or a transform, or where automatic differentiation watches what becomes of
        the array; and for a number that is the symbol of a trace, which Python must not read.
        """
        return x if isinstance(x, numbers.Real) else None

    def cache_key(self, x: Array) -> Hashable | None:
        """What, beside the values of an array, may decide what a call of it needs: its shape, dtype, device, ...

        Arrays of equal keys take each other's place: what softk makes of a number for a call of one of them (an array,
        of the same dtype and device) serves a call of the other. So the key has whatever state of the framework such an
        array depends on. None where nothing may be kept: under a trace or a transform, for a lazy array, for a subclass
        of the library's type, or where arrays belong to a stream.
        """
        return None

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

    def gather_above(self, x: Array, level: Array) -> Array | None:
        """The scores that are not below a level, in a shorter array. Asked only for an array that has `memory`.

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
            not be much shorter, or to look at values would wait for a device.
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

    def repeat(self, step: Callable[[Any], tuple[Any, Array]], state: Any, limit: int) -> Any:
        """Apply ``step(state) -> (state, done)`` at most `limit` times.

        It may end as soon as all of `done`, a boolean array, is true.
        """
        for _ in range(limit):
            state, done = step(state)
            if self.memory(done) is not None and peek(self, self.xp.all(done)):
                break
        return state

    def map_rows(
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

    def select(self, x: Array, ranks: Array | tuple[int, ...]) -> Array:
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
            return pick(xp, ordered, [x.shape[-1] - rank for rank in ranks])
        ranks = broadcast_like(xp, ranks, (*x.shape[:-1], ranks.shape[-1]), x[..., :1])
        return xp.take_along_axis(ordered, x.shape[-1] - ranks, axis=-1)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        """The k largest scores along the last axis, in descending order, and where they are: the library's own top-k.

        Equal scores are in the order of the library. A slice that has a NaN is sorted as the library sorts it.

        Parameters
        ----------
        x : array
            Scores, shape (..., n).
        k : int
            From 1 to n.

        Returns
        -------
        values, indices : array
            The scores and their places, of the dtype of indices, both of shape (..., k).
        """
        indices = self.xp.argsort(x, axis=-1, descending=True)[..., :k]
        return self.xp.take_along_axis(x, indices, axis=-1), indices

    def scatter(self, values: Array, indices: Array, size: int) -> Array:
        """The transpose of ``take_along_axis`` along the last axis, at indices that differ.

        Parameters
        ----------
        values, indices : array
            Shape (..., k), with 1 <= k <= size.
        size : int
            How many items there are along the axis.

        Returns
        -------
        array
            Shape (..., size): the values at their indices, and 0 elsewhere.
        """
        # The standard has no assignment. The indices are sorted beside those of all items, each before the item that it
        # stands for; the value of an item is that of the entry before it, which is 0 for another item.
        xp, k = self.xp, indices.shape[-1]
        zeros = xp.zeros((*values.shape[:-1], size), dtype=values.dtype, device=self.device(values))
        items = xp.broadcast_to(xp.arange(size, dtype=indices.dtype, device=self.device(values)), zeros.shape)
        order = xp.argsort(xp.concat([indices, items], axis=-1), axis=-1, stable=True)
        before = xp.take_along_axis(xp.concat([values, zeros], axis=-1), order, axis=-1)[..., :-1]
        before = xp.concat([zeros[..., :1], before], axis=-1)
        places = xp.argsort(xp.astype(order < k, indices.dtype), axis=-1, stable=True)[..., :size]
        return xp.take_along_axis(before, places, axis=-1)


def peek(backend: Backend, flag: Array) -> bool | None:
    """The value of a boolean, where looking at it neither waits for a device nor breaks a trace; else None."""
    raw = backend.memory(flag)
    return bool(raw) if raw is not None and is_in_host_memory(raw) else None


def is_in_host_memory(raw: Any) -> bool:
    """Whether the processor that runs Python can read the memory, by the standard's protocol for exchanging arrays."""
    device = getattr(raw, "__dlpack_device__", None)
    return device is None or int(device()[0]) == 1


def pick(xp: Any, x: Array, places: list[int]) -> Array:
    """Some items along the last axis."""
    return xp.concat([x[..., place : place + 1] for place in places], axis=-1)


def index_dtype(xp: Any) -> Any:
    """The dtype of counts and indices."""
    return xp.__array_namespace_info__().default_dtypes()["indexing"]


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
    found = adapted(type(x))
    return found if found is not None else _standard(array_api_compat.array_namespace(x))


def is_array(value: Any) -> bool:
    """Whether some backend can serve the value: an array of a known library or of the standard."""
    return adapted(type(value)) is not None or hasattr(type(value), "__array_namespace__")


def adapted(kind: type) -> Backend | None:
    """The backend that an adapter has for a type of arrays, None without one."""
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
