"""The interfaces between softk's operators, the frameworks and the kernels.

`Primitive` is an operator with its derivative, written once against the Array API standard: the reference
implementation. `Backend` adapts a framework: it has the framework's namespace, binds primitives to its autodiff and
overrides what the framework does differently. The base class is complete: it supports every array that follows the
standard and has no autodiff. `Kernel` is another implementation of one part of a primitive, for one kind of processor.
`backend_of` finds the backend of an array.
"""

from __future__ import annotations

import numbers
import os
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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
    "Share",
    "Words",
    "backend_of",
    "kernels",
]

#: An array of any library. Python has no static type for it yet.
Array = Any


class AnyArray(Protocol):
    """The attributes that a type checker may assume of an array of any library."""

    @property
    def dtype(self) -> Any:
        """The data type of the elements."""

    @property
    def ndim(self) -> int:
        """The number of axes."""

    @property
    def shape(self) -> Any:
        """The size of each axis."""


#: The array type of the scores. The result has the same type.
ArrayT = TypeVar("ArrayT", bound=AnyArray)
#: One array per input of a primitive (its value, tangent or cotangent), or None where there is none.
Inputs = tuple[Array | None, ...]


class Form(NamedTuple):
    """The shape and the dtype of an array, without the array itself."""

    shape: tuple[Any, ...]
    dtype: Any


@dataclass(frozen=True)
class Primitive:
    """An operator on canonical arrays, with its derivative in both directions. A solver has no derivative.

    The functions take the `Backend` first and use only its namespace. A framework can therefore differentiate the
    derivative rules themselves, through the outputs that the rules are computed from, to get higher derivatives.

    Attributes
    ----------
    name : str
        The name of the operation in a traced graph. Unique and lower case.
    forward : callable
        ``forward(backend, inputs, **options) -> outputs``. An input is None if the argument was not given. Options are
        Python literals and have no derivative. The outputs are a tuple of arrays.
    forms : callable
        ``forms(xp, inputs, **options) -> tuple of Form``: the shapes and dtypes of the outputs. It may read only the
        shapes and dtypes of the inputs.
    jvp : callable, optional
        ``jvp(backend, inputs, outputs, tangents) -> tangents`` of the results and the state. A tangent of None is zero.
    vjp : callable, optional
        ``vjp(backend, inputs, outputs, cotangents, needed) -> cotangents``: one cotangent per input, from the
        cotangents of the results and the state. A cotangent of None is zero. `needed` says for each input whether its
        cotangent is used. The rule may return None for the others, and returns None for inputs that are None.
    results : tuple of str
        The names of the first outputs. The derivative rules do not read them, and get None in their place if the
        framework has not saved them.
    state : tuple of str
        The names of the outputs after the results. They are differentiable, and the rules are computed from them.
    constants : tuple of str
        The names of the last outputs. They have no derivative.
    axes : int
        The number of trailing axes of the first input that form one problem. The axes before them are batch axes.
    shared : int
        The number of last inputs that have no batch axes: they hold for the whole batch.
    narrow : bool
        Whether the scores may be float16 or bfloat16 while the other inputs are float32. The result then has the dtype
        of the scores.

    Raises
    ------
    ValueError
        If another primitive has this name.
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
    shared: int = 0
    narrow: bool = False

    def __post_init__(self) -> None:
        if self.name in PRIMITIVES:
            raise ValueError(f"name must be unique among the primitives, got {self.name!r}")
        PRIMITIVES[self.name] = self

    @property
    def moving(self) -> int:
        """The number of outputs that have derivatives. They come first."""
        return len(self.results) + len(self.state)


#: Every primitive by its name, for a framework whose graphs can store a name but not a Python object.
PRIMITIVES: dict[str, Primitive] = {}

#: The parts of a primitive: its value, its forward-mode derivative and its reverse-mode derivative.
Part = Literal["forward", "jvp", "vjp"]


@dataclass(frozen=True)
class Kernel:
    """Another implementation of one part of a primitive, for one kind of processor.

    It takes the arguments of the reference and returns its results: the same tuple, shapes, dtypes and devices. It must
    not modify its arguments. A kernel cannot be differentiated, so it must refuse arguments whose operations are being
    recorded.

    Attributes
    ----------
    name : str
        The name of the kernel language, such as "triton". ``SOFTK_KERNELS`` and `kernels` select kernels by this name.
    primitive : Primitive
        The primitive that it implements.
    part : {"forward", "jvp", "vjp"}
        The part of the primitive that it implements.
    refuses : callable
        ``refuses(backend, *groups, **options) -> str or None``: the reason why the kernel does not support these
        arguments, or None if it does. It may read types, shapes and devices, but no values.
    compute : callable
        ``compute(backend, *groups, **options) -> tuple``.
    note : callable, optional
        ``note() -> str or None``: a line about all kernels of this name, which ``python -m softk`` prints.
    """

    name: str
    primitive: Primitive
    part: Part
    refuses: Callable[..., str | None]
    compute: Callable[..., tuple[Array | None, ...]]
    note: Callable[[], str | None] | None = None


#: The values of ``SOFTK_KERNELS`` that are always allowed. `choices` adds the names of other kernels.
CHOICES = ("auto", "none", "numba", "triton")

#: What was chosen last.
_chosen = [os.environ.get("SOFTK_KERNELS", "auto")]
#: Whether the name in the environment must still be looked up: no backend is loaded yet when softk is imported.
_unknown = [_chosen[0] not in CHOICES]


def chosen_kernels() -> str:
    """The choice in force, made by `kernels` or else by ``SOFTK_KERNELS``."""
    return _chosen[0]


def choices() -> tuple[str, ...]:
    """What may be chosen now: `CHOICES`, and the names of the kernels of every library that is imported."""
    names: set[str] = set()
    for library, adapter in ADAPTERS.items():
        if library in sys.modules:
            with suppress(ImportError):
                backend = adapter.load()
                names |= {kernel.name for kernel in (backend.kernels if backend is not None else ())}
    return (*CHOICES, *sorted(names - set(CHOICES)))


def _require_choice(name: str, choice: Any) -> str:
    if choice not in CHOICES:
        allowed = choices()
        if choice not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {choice!r}")
    return str(choice)


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Choose the kernels inside a ``with`` statement, for the whole process. Elsewhere `SOFTK_KERNELS` chooses them.

    Parameters
    ----------
    choice : {"auto", "none", "numba", "triton"} or str
        "auto" uses every kernel that supports the arguments. "none" uses only the reference implementation. A name uses
        only the kernels of that name. It may be the name of any kernel of an imported library.

    Raises
    ------
    ValueError
        If `choice` is not one of these. The text lists what is allowed.

    Notes
    -----
    A function that was compiled earlier keeps the kernels that were chosen at its compilation. A name in
    `SOFTK_KERNELS` that is not one of softk's own is looked up at the first call, when the library of the array is
    known, and raises the same error then.

    Examples
    --------
    >>> import numpy as np
    >>> import softk
    >>> with softk.kernels("none"):
    ...     mask = softk.topk(np.asarray([0.2, 1.7, -0.5, 0.9]), 2, epsilon=0.5)
    """
    with choosing(_require_choice("choice", choice)):
        yield


@contextmanager
def choosing(choice: str) -> Iterator[None]:
    """`kernels` without a check of the choice."""
    before = _chosen[0]
    _chosen[0] = choice
    try:
        yield
    finally:
        _chosen[0] = before


class Words(NamedTuple):
    """The code that error messages suggest to users of a library. Each {} stands for the name of an argument.

    Attributes
    ----------
    cast : str
        Convert the array to float32.
    own : str
        Convert an array of another library to this library.
    move : str
        Move the array to the device of another array. The second {} is the name of that array.
    measure : str
        Determine the size of an axis that is unknown.
    kind : str, optional
        What an array is called, if the names of its types are private.
    """

    cast: str = "xp.astype({}, xp.float32)"
    own: str = "xp.asarray({})"
    move: str = "{}.to_device({}.device)"
    measure: str = "create {} with a known size along that axis"
    kind: str | None = None


class Ragged(NamedTuple):
    """An array whose rows have different lengths along one axis.

    Attributes
    ----------
    values : callable
        ``values(x)``: the items of the rows, one row after the other, along one axis of an ordinary array.
    whole : callable
        ``whole(values)``: the array of ragged rows with other values.
    lengths : array
        The lengths of the rows, shape (s,).
    axis : int
        The axis along which the lengths differ, in the array of ragged rows. It is at least 1.
    """

    values: Callable[[Array], Array]
    whole: Callable[[Array], Array]
    lengths: Array
    axis: int


class Share(NamedTuple):
    """What this process holds of an array that is spread over the members of a group.

    Attributes
    ----------
    local : callable
        ``local(values)``: the items of this process, of the array or of its tangent, as an ordinary array.
    whole : callable
        ``whole(items)``: its transpose, which makes the spread array of what every process has for its items.
    everywhere : callable
        ``everywhere(values)``: the array, of what is the same on every process.
    group : str or None
        The group whose members hold the items, as for `Backend.shards`. None if every process holds all of them.
    in_order : bool
        Whether the items of the members follow one after the other in the order of the array.
    """

    local: Callable[[Array], Array]
    whole: Callable[[Array], Array]
    everywhere: Callable[[Array], Array]
    group: str | None
    in_order: bool


class Backend:
    """The adapter of a framework. Subclass it and override what the framework does differently.

    Parameters
    ----------
    xp : module
        A namespace that follows the Python Array API standard, version 2024.12 or later.
    name : str, optional
        The library's name, for messages.
    """

    #: The name of another library whose arrays may be mixed with this library's in one call.
    wraps: str | None = None
    #: The code that error messages suggest.
    words: Words = Words()
    #: How a user takes derivatives, for the table of ``python -m softk``.
    autodiff: str = "softk.vjp, softk.jvp"
    #: The kernels, in order of preference. The first that supports the arguments replaces the reference.
    kernels: tuple[Kernel, ...] = ()
    #: Whether the items of a slice lie in several arrays, so that only elementwise operations and reductions see them.
    is_split: bool = False
    #: The reference's formulas for this namespace, which the reference loads at its first call.
    formulas: Any = None

    def __init__(self, xp: Any, name: str | None = None) -> None:
        self.xp = xp
        self.name = name or xp.__name__.removeprefix("array_api_compat.")

    def bind(self, primitive: Primitive, **options: Any) -> Callable[..., tuple[Array, ...]]:
        """The primitive, as a function of its inputs that the framework's autodiff can differentiate."""

        def bound(*inputs: Array | None) -> tuple[Array, ...]:
            with self.quiet(inputs[0]):
                return self.run(primitive, "forward", inputs, **options)

        return bound

    def run(self, primitive: Primitive, part: Part, *groups: Any, **options: Any) -> tuple[Any, ...]:
        """Compute a part of a primitive by the first kernel that supports the arguments, or else by the reference.

        Parameters
        ----------
        primitive : Primitive
            The primitive to compute.
        part : {"forward", "jvp", "vjp"}
            The part to compute.
        *groups, **options
            The arguments of that part after the backend: ``inputs``, or ``inputs, outputs, tangents``, or ``inputs,
            outputs, cotangents, needed``.

        Returns
        -------
        tuple
            The results of that part. For a vjp, every cotangent that is not needed is None.
        """
        if _unknown[0]:
            _require_choice("SOFTK_KERNELS", _chosen[0])
            _unknown[0] = False
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
        """A context manager that silences warnings of overflow and invalid operations, which softk expects and handles.

        Only libraries built on NumPy give such warnings, according to NumPy's settings. With `x`, matrix products on
        the device of `x` have the full precision of their dtype inside the context.
        """
        # NumPy is looked up and not imported: without it there are no warnings to silence.
        numpy = sys.modules.get("numpy")
        return nullcontext() if numpy is None else cast("AbstractContextManager[Any]", numpy.errstate(all="ignore"))

    def device(self, x: Array) -> Any:
        """The device of an array, as creation functions take it. None if the framework places new arrays itself."""
        return array_api_compat.device(x)

    def densely(self, x: Array) -> str | None:
        """The code that converts a sparse or ragged array, called {}, to a dense one. None for other arrays."""
        return "{}.todense()" if hasattr(x, "todense") else None

    def ragged(self, x: Array) -> Ragged | None:
        """The rows of an array of ragged rows. None for other arrays."""
        return None

    def memory(self, x: Any) -> Any:
        """The array, or number, if its value may be read now or passed to a kernel; else None.

        None for a lazy array, inside a trace or a transform, and where automatic differentiation records operations on
        the array. Also None for a symbolic number, whose value a trace does not know.
        """
        return x if isinstance(x, numbers.Real) else None

    def holds(self, values: Iterable[Any]) -> bool:
        """Whether `memory` returns each of the values that is not None. Override it if one look at all is faster."""
        return all(value is None or self.memory(value) is not None for value in values)

    def share(self, x: Array, of: Array) -> Share | None:
        """What this process holds of an array that broadcasts to a spread one; None if neither is spread.

        Parameters
        ----------
        x : array
            The array, which may be `of` itself. An ordinary array has the same values on every process.
        of : array
            The array that is spread over processes, or an ordinary one.
        """
        return None

    def cache_key(self, x: Array) -> Hashable | None:
        """A key of what a call depends on beside the values of its scores: their shape, dtype, device, ...

        softk keeps the conversion of the other arguments, and uses it for all scores with an equal key. The key must
        therefore contain every state of the framework on which the converted arrays, or a bound primitive, depend.

        Parameters
        ----------
        x : array
            The scores.

        Returns
        -------
        hashable or None
            None if nothing may be kept: under a trace or a transform, for a lazy array, for a subclass of the library's
            type, or if arrays belong to a stream.
        """
        return None

    @property
    def differentiates_operations(self) -> bool:
        """Whether the framework may currently differentiate a primitive's own operations instead of using its rule."""
        return False

    def constant(self, x: Array) -> Array:
        """The same values, detached from automatic differentiation."""
        return x

    @property
    def detaches(self) -> bool:
        """Whether `constant` detaches. It does not in a library without automatic differentiation."""
        return type(self).constant is not Backend.constant

    def repeat(self, step: Callable[[Any], tuple[Any, Array]], state: Any, limit: int) -> Any:
        """Apply ``step(state) -> (state, done)`` at most `limit` times.

        It may stop as soon as all elements of the boolean array `done` are true.
        """
        for _ in range(limit):
            state, done = step(state)
            # On a device or inside a trace `done` cannot be read, and all steps are made.
            if self.memory(done) is not None and peek(self, self.xp.all(done)):
                break
        return state

    def map_rows(
        self, function: Callable[..., tuple[Array, ...]], rows: int, first: Array, *others: Array | None
    ) -> tuple[Array, ...]:
        """``function(first, *others)``, applied to `rows` rows at a time to bound the memory of intermediate arrays.

        Rows lie along the second axis from the last. The first array and all arrays with the same number of rows are
        split; the others, and None, are passed whole. A row of the results depends only on the same row of the arrays.
        """
        count = first.shape[-2]
        if rows == count:
            return function(first, *others)
        parts = [function(*rows_of(count, start, start + rows, first, *others)) for start in range(0, count, rows)]
        return tuple(self.xp.concat(list(column), axis=-2) for column in zip(*parts, strict=True))

    def clip(self, values: Array, least: Array, most: Array) -> Array:
        """The values clipped to an interval whose ends are arrays, with exact tangents of all three.

        Parameters
        ----------
        values, least, most : array
            Arrays that broadcast to the shape of the values.

        Returns
        -------
        array
            The clipped values. NaN stays NaN.
        """
        values = self.xp.maximum(values, least)
        return self.xp.minimum(values, most)

    def select(self, x: Array, ranks: Array | tuple[int, ...]) -> Array:
        """The scores of the given ranks along the last axis. Rank 1 is the largest score.

        Parameters
        ----------
        x : array
            Scores, shape (..., n).
        ranks : array or tuple of int
            Integers from 1 to n: an array of shape (..., m), whose leading axes broadcast against those of `x`, or m
            Python numbers.

        Returns
        -------
        array
            The scores, shape (..., m).
        """
        xp = self.xp
        # The order is ascending, so the score of rank r is at index n - r.
        ordered = xp.sort(x, axis=-1, stable=False)
        if isinstance(ranks, tuple):
            return pick(xp, ordered, [x.shape[-1] - rank for rank in ranks])
        ranks = broadcast_like(xp, ranks, (*x.shape[:-1], ranks.shape[-1]), x[..., :1])
        return xp.take_along_axis(ordered, x.shape[-1] - ranks, axis=-1)

    def solve(self, matrix: Array, right: Array) -> Array:
        """The solution of ``matrix @ solution = right`` for symmetric positive definite matrices.

        Parameters
        ----------
        matrix : array
            Shape (..., b, b), with a diagonal of about 1.
        right : array
            Shape (..., b, r).

        Returns
        -------
        array
            Shape (..., b, r).
        """
        xp, b = self.xp, matrix.shape[-1]
        if hasattr(xp, "linalg"):
            return xp.linalg.solve(matrix, right)
        # Gauss-Jordan elimination without pivoting, which a positive definite matrix does not need.
        index = xp.reshape(xp.arange(b, device=self.device(matrix)), (b, 1))
        index = xp.broadcast_to(index, (*matrix.shape[:-1], 1))
        table = xp.concat([matrix, right], axis=-1)
        for i in range(b):
            pivot = table[..., i : i + 1, :] / table[..., i : i + 1, i : i + 1]
            table = xp.where(index == i, pivot, table - table[..., :, i : i + 1] * pivot)
        return table[..., b:]

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        """The k largest scores along the last axis in descending order, and their indices, by the library's own top-k.

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
            The scores, and their indices of the library's dtype of indices, both of shape (..., k).
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
            The size n of the axis of the result.

        Returns
        -------
        array
            Shape (..., size): the values at their indices, and 0 elsewhere.
        """
        # The standard has no indexed assignment. The given indices and the indices of all items are sorted together, a
        # given index before the equal index of an item. The entry before an item then has its value, or else is another
        # item, whose value is 0.
        xp, k = self.xp, indices.shape[-1]
        zeros = xp.zeros((*values.shape[:-1], size), dtype=values.dtype, device=self.device(values))
        items = xp.broadcast_to(xp.arange(size, dtype=indices.dtype, device=self.device(values)), zeros.shape)
        order = xp.argsort(xp.concat([indices, items], axis=-1), axis=-1, stable=True)
        before = xp.take_along_axis(xp.concat([values, zeros], axis=-1), order, axis=-1)[..., :-1]
        before = xp.concat([zeros[..., :1], before], axis=-1)
        places = xp.argsort(xp.astype(order < k, indices.dtype), axis=-1, stable=True)[..., :size]
        return xp.take_along_axis(before, places, axis=-1)

    def reduce_segments(self, values: Array, operation: Literal["sum", "max"], segments: Array, count: int) -> Array:
        """The sum, or the maximum, of the values of every segment along the last axis.

        Parameters
        ----------
        values : array
            Numbers, shape (..., n).
        operation : {"sum", "max"}
            How they are combined. The maximum of no values is ``-inf``.
        segments : array
            The segment of every value, from 0 to ``count - 1`` and in ascending order: integers of a shape that
            broadcasts to that of the values.
        count : int
            The number of segments.

        Returns
        -------
        array
            Shape (..., count).
        """
        # The standard has no scattered sum, so every segment looks at all values.
        xp = self.xp
        empty = 0 if operation == "sum" else -float("inf")
        places = xp.arange(count, dtype=segments.dtype, device=self.device(values))[:, None]
        chosen = xp.where(xp.expand_dims(segments, axis=-2) == places, xp.expand_dims(values, axis=-2), empty)
        if operation == "max":
            return xp.max(chosen, axis=-1)
        return xp.sum(chosen, axis=-1, dtype=values.dtype)

    def shards(self, group: str) -> tuple[Any, int]:
        """The index of this member in a group of processes or devices, and the number of its members.

        Parameters
        ----------
        group : str
            The framework's name of the group.
        """
        raise NotImplementedError(f"softk has no axis over several processes or devices for {self.name}")

    def reduce_shards(self, values: Array, operation: Literal["sum", "max"], group: str) -> Array:
        """The sum or the maximum of the values of all members of a group, which every member gets.

        Parameters
        ----------
        values : array
            Numbers of one shape and dtype on every member.
        operation : {"sum", "max"}
            How they are combined.
        group : str
            As for `shards`.
        """
        raise NotImplementedError(f"softk has no axis over several processes or devices for {self.name}")

    def gather_shards(self, values: Array, group: str) -> Array:
        """The values of all members of a group along the last axis, in the order of the members: every member gets all.

        Parameters
        ----------
        values : array
            Numbers of one shape (..., m) and dtype on every member.
        group : str
            As for `shards`.

        Returns
        -------
        array
            Shape (..., members * m).
        """
        xp = self.xp
        place, members = self.shards(group)
        places = xp.arange(members, device=self.device(values))[:, None]
        own = xp.where(places == place, xp.expand_dims(values, axis=-2), xp.zeros_like(values[..., :1, None]))
        return self.reduce_shards(xp.reshape(own, (*values.shape[:-1], members * values.shape[-1])), "sum", group)


def peek(backend: Backend, flag: Array) -> bool | None:
    """The value of a boolean array, or None if reading it would synchronize with a device or break a trace."""
    raw = backend.memory(flag)
    return bool(raw) if raw is not None and is_in_host_memory(raw) else None


def is_in_host_memory(raw: Any) -> bool:
    """Whether the CPU can read the array without a transfer, according to the DLPack protocol."""
    device = getattr(raw, "__dlpack_device__", None)
    return device is None or int(device()[0]) == 1  # 1 is DLPack's code of the CPU


def pick(xp: Any, x: Array, places: list[int]) -> Array:
    """The items at the given places along the last axis."""
    return xp.concat([x[..., place : place + 1] for place in places], axis=-1)


def index_dtype(xp: Any) -> Any:
    """The default dtype of counts and indices."""
    return xp.__array_namespace_info__().default_dtypes()["indexing"]


# --- finding the backend of an array from its type, without importing a library


class Adapter(NamedTuple):
    """Where the backend of a library's arrays comes from.

    Attributes
    ----------
    load : callable
        ``load() -> Backend``, called when the first array arrives. It returns None if the backend cannot be loaded.
    types : tuple of str or None
        The names of the library's array types. Other types of a library, such as its random generators, are not
        arrays. None accepts all types.
    """

    load: Callable[[], Backend | None]
    types: tuple[str, ...] | None = None


#: The adapters, by the top-level module of the array types of their library.
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
        The backend of the library's adapter. Without an adapter, the base class on the namespace of the array.

    Raises
    ------
    TypeError
        If `x` is not an array that follows the standard.

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
    """Whether the value is an array that a backend supports: of a known library or of the standard."""
    return adapted(type(value)) is not None or hasattr(type(value), "__array_namespace__")


def adapted(kind: type) -> Backend | None:
    """The backend that an adapter has for a type of arrays, None without one."""
    if _is_tensor(kind):
        return ADAPTERS["torch"].load()
    if issubclass(kind, (dict, list, tuple)):  # a tree, at whose bases PyTorch's compiler cannot look
        return None
    if kind not in _by_type:
        _by_type[kind] = _load(kind)
    return _by_type[kind]


def _is_tensor(kind: type) -> bool:
    """Whether PyTorch's adapter supports the type.

    The dictionary `_by_type` is not used for tensors. PyTorch's compiler cannot trace the lookup of a parameter's
    bases and module, and would recompile whenever the dictionary grows.
    """
    torch = sys.modules.get("torch")
    if torch is None or "torch" not in ADAPTERS or not issubclass(kind, torch.Tensor):
        return False
    # Third-party adapters accept all types, and may have claimed a subclass of Tensor.
    return kind in (torch.Tensor, torch.nn.Parameter) or all(known.types is not None for known in ADAPTERS.values())


def _load(kind: type) -> Backend | None:
    for base in kind.__mro__:  # a subclass that another library defines may have its own backend
        adapter = ADAPTERS.get(base.__module__.partition(".")[0])
        name = base.__name__.rpartition(".")[2]  # some type names of JAX include their module
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
    """Whether the size of an axis is unknown: None in the standard, NaN in Dask."""
    return size is None or isinstance(size, float)


def broadcast_like(xp: Any, values: Array, shape: tuple[Any, ...], like: Array) -> Array:
    """``broadcast_to(values, shape)``. Unknown sizes in the shape are those of the array `like`."""
    if not any(unknown(size) for size in shape):
        return xp.broadcast_to(values, shape)
    # Broadcast by an elementwise operation: broadcast_arrays and zeros_like of some libraries lose known sizes.
    return xp.where(like == like, values, values)


def rows_of(count: int, start: int, stop: int, *arrays: Array | None) -> tuple[Any, ...]:
    """Rows `start` to `stop` of the arrays with `count` rows. The other arrays hold for every row and stay whole."""
    return tuple(
        value
        if value is None or value.ndim < 2 or value.shape[-2] != count
        else value[..., start : min(stop, count), :]
        for value in arrays
    )
