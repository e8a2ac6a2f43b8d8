"""The JAX backend: every primitive becomes a `jax.custom_jvp`, from which JAX derives all other transforms."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from softk.backend import Array, Backend, Primitive, Words, chosen_kernels, pick

from . import ladders, masks

__all__ = ["JaxBackend", "backend"]


class JaxBackend(Backend):
    """JAX arrays and tracers."""

    autodiff = "every JAX transform"
    kernels = (*masks.KERNELS, *ladders.KERNELS)
    words = Words("{}.astype(jnp.float32)", "jnp.asarray({})", "jax.device_put({}, {}.device)", kind="a JAX array")

    def bind(self, primitive: Primitive, **options: Any) -> Callable[..., tuple[Array, ...]]:
        return _bound(primitive, tuple(sorted(options.items())), chosen_kernels())

    def device(self, x: Array) -> Any:
        return None  # JAX places new arrays by itself, inside a trace and outside

    def quiet(self, x: Array | None = None) -> AbstractContextManager[Any]:
        return nullcontext() if x is None else _exact()

    def constant(self, x: Array) -> Array:
        return jax.lax.stop_gradient(x)

    def memory(self, x: Any) -> Any:
        return None if isinstance(x, jax.core.Tracer) else x

    def cache_key(self, x: Array) -> Hashable | None:
        """None unless the array is on one device: under a mesh, new arrays are on all of its devices."""
        if isinstance(x, jax.core.Tracer) or not isinstance(x.sharding, jax.sharding.SingleDeviceSharding):
            return None
        # JAX compiles a bound primitive with the kernels in force, so their choice is part of the key.
        return x.shape, x.dtype, jax.dtypes.canonicalize_dtype("float64"), chosen_kernels()

    def repeat(self, step: Callable[[Any], tuple[Any, Array]], state: Any, limit: int) -> Any:
        """A `lax.while_loop`, whose body is compiled once."""

        def unfinished(loop: tuple[Any, Array, Array]) -> Array:
            _, unfinished, count = loop
            return (count < limit) & unfinished

        def turn(state: Any) -> tuple[Any, Array]:
            state, done = step(state)
            return state, ~jnp.all(done)

        def body(loop: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
            inner, _, count = loop
            return (*turn(inner), count + 1)

        # A loop requires that its step keeps all types. If the first step changes one, such as the mesh axes over which
        # an array varies, it is taken before the loop, at the price of a second copy of the step.
        start, count = (state, jnp.asarray(True)), 0
        if jax.make_jaxpr(turn)(state).out_avals != [jax.typeof(value) for value in jax.tree.leaves(start)]:
            start, count = turn(state), 1
        return jax.lax.while_loop(unfinished, body, (*start, jnp.asarray(count)))[0]

    def map_rows(
        self, function: Callable[..., tuple[Array, ...]], rows: int, first: Array, *others: Array | None
    ) -> tuple[Array, ...]:
        """A `lax.map`, whose body is compiled once. The backward pass recomputes each iteration and stores none."""
        count = first.shape[-2]
        if rows == count:
            return function(first, *others)
        arrays = (first, *others)
        whole = count - count % rows
        is_split = [value is not None and value.ndim > 1 and value.shape[-2] == count for value in arrays]

        def turn(blocks: list[Array]) -> tuple[Array, ...]:
            given = iter(blocks)
            return function(*(next(given) if is_cut else value for value, is_cut in zip(arrays, is_split, strict=True)))

        def blocks_of(value: Array) -> Array:
            value = value[..., :whole, :]
            return jnp.moveaxis(value.reshape(*value.shape[:-2], whole // rows, rows, value.shape[-1]), -3, 0)

        rowed: list[Array] = [value for value, is_cut in zip(arrays, is_split, strict=True) if is_cut]
        found = jax.lax.map(jax.checkpoint(turn), [blocks_of(value) for value in rowed])
        joined = [jnp.moveaxis(value, 0, -3) for value in found]
        joined = [value.reshape(*value.shape[:-3], whole, value.shape[-1]) for value in joined]
        # The remaining rows form a shorter block, outside the loop.
        if whole == count:
            return tuple(joined)
        rest = turn([value[..., whole:, :] for value in rowed])
        return tuple(jnp.concatenate(pair, axis=-2) for pair in zip(joined, rest, strict=True))

    def select(self, x: Array, ranks: Array | tuple[int, ...]) -> Array:
        n = x.shape[-1]
        if not isinstance(ranks, tuple):
            return _by_bits(x, ranks) if ranks.shape[-1] <= _FEW else super().select(x, ranks)
        # XLA's top_k takes O(n log k), and is the fastest selection if k is small compared with n.
        if isinstance(n, int) and 8 * max(ranks) <= n:
            return pick(jnp, _largest(x, max(ranks)), [rank - 1 for rank in ranks])
        if len(ranks) == 2 and ranks[1] == ranks[0] + 1:
            # XLA's comparisons flush subnormal numbers to 0, so the second score may be wrong by a subnormal number.
            high = _by_bits(x, jnp.asarray(ranks[:1]))
            tied = jnp.count_nonzero(x >= high, axis=-1, keepdims=True) > ranks[0]
            low = jnp.max(jnp.where(x < high, x, -jnp.inf), axis=-1, keepdims=True)
            return jnp.concatenate([high, jnp.where(tied, high, low)], axis=-1)
        if len(ranks) <= _FEW:
            return _by_bits(x, jnp.asarray(ranks))
        return super().select(x, ranks)

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        values, indices = jax.lax.top_k(x, k)
        return values, indices.astype(jax.dtypes.canonicalize_dtype("int64"))

    def solve(self, matrix: Array, right: Array) -> Array:
        """By Cholesky factors: faster than with pivoting, and compiled in a fraction of the time."""
        if any(kind.name == "Explicit" for kind in jax.typeof(matrix).sharding.mesh.axis_types):
            # JAX's factorization does not take arrays whose types say how they are sharded.
            solved: Array = jnp.linalg.solve(matrix, right)
            return solved

        factor = jax.lax.linalg.cholesky(jax.lax.stop_gradient(matrix), symmetrize_input=False)

        def solve(_: Any, right: Array) -> Array:
            lower = jax.lax.linalg.triangular_solve(factor, right, left_side=True, lower=True)
            return jax.lax.linalg.triangular_solve(factor, lower, left_side=True, lower=True, transpose_a=True)

        def product(found: Array) -> Array:
            return jnp.matmul(matrix, found)

        # The derivative is that of the system, not that of the factors.
        found: Array = jax.lax.custom_linear_solve(product, right, solve, symmetric=True)
        return found

    def scatter(self, values: Array, indices: Array, size: int) -> Array:
        zeros = jnp.zeros((*values.shape[:-1], size), values.dtype)
        return jnp.put_along_axis(zeros, indices, values, axis=-1, inplace=False)

    def shards(self, group: str) -> tuple[Any, int]:
        return jax.lax.axis_index(group), jax.lax.axis_size(group)

    def reduce_shards(self, values: Array, operation: Literal["sum", "max"], group: str) -> Array:
        # JAX does not differentiate pmax. A maximum over the devices only scales or shifts what the rule computes.
        return jax.lax.psum(values, group) if operation == "sum" else jax.lax.pmax(self.constant(values), group)

    def reduce_segments(self, values: Array, operation: Literal["sum", "max"], segments: Array, count: int) -> Array:
        empty = 0 if operation == "sum" else -jnp.inf
        found = jnp.full((*values.shape[:-1], count), empty, values.dtype)
        index = segments.reshape(segments.shape[-1])  # JAX batches the operation, so there is one row
        place = found.at[..., index]
        combine = place.add if operation == "sum" else place.max
        return combine(values, indices_are_sorted=True, mode="drop")


def _largest(x: Array, k: int) -> Array:
    """The k largest scores in order, by two selections from about sqrt(k n) candidates each.

    The axis is cut into blocks. The k blocks with the largest maxima contain the k largest scores.
    """
    n = x.shape[-1]
    blocks = 1 << ((k * n).bit_length() // 2)  # a power of two near the root
    size = -(-n // blocks)
    if 2 * k <= blocks and size > 1:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size * blocks - n)], constant_values=-jnp.inf)
        x = x.reshape(*x.shape[:-1], size, blocks)
        _, chosen = jax.lax.top_k(jnp.max(x, axis=-2), k)
        x = jnp.take_along_axis(x, chosen[..., None, :], axis=-1)
        x = x.reshape(*x.shape[:-2], size * k)
    # Without the barrier XLA sees that only two of the k scores are used, and replaces top_k by a sort.
    return _barrier(jax.lax.top_k(x, k)[0])


#: The largest number of ranks for which `_by_bits` beats XLA's sort, which takes as long as 200 comparisons per score.
_FEW = 4


def _by_bits(x: Array, ranks: Array) -> Array:
    """The scores of some ranks, found bit by bit, with one comparison and one count over the scores per bit.

    The scores are mapped to integers of the same order. A NaN may come at either end, but makes the result of its slice
    NaN anyway.
    """
    integer = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, integer)
    lowest, most = jnp.iinfo(integer).min, jnp.iinfo(integer).max
    keys = jnp.where(bits < 0, bits ^ most, bits)[..., None, :]
    ranks = jnp.broadcast_to(ranks, (*x.shape[:-1], ranks.shape[-1]))[..., None]

    def turn(i: Array, found: Array) -> Array:
        # The search starts at the lowest integer, whose sign bit is set, so a bit is flipped and not set.
        # Without jit, i is a Python number.
        place = jnp.left_shift(jnp.ones((), integer), 8 * x.dtype.itemsize - 1 - jnp.asarray(i, integer))
        trial = found ^ place
        return jnp.where(jnp.count_nonzero(keys >= trial, axis=-1, keepdims=True) >= ranks, trial, found)

    # Under shard_map, the initial carry of a loop must vary over the same mesh axes as the keys and the ranks.
    start = jnp.where((keys[..., :1] > 0) & (ranks > 0), jnp.full((), lowest, integer), lowest)
    found = jax.lax.fori_loop(0, 8 * x.dtype.itemsize, turn, start)[..., 0]
    return jax.lax.bitcast_convert_type(jnp.where(found < 0, found ^ most, found), x.dtype)


_barrier = jax.lax.optimization_barrier


def _exact() -> AbstractContextManager[Any]:
    """A context in which products of float32 matrices have float32 precision.

    By default GPUs round the factors to 10 bits (TF32), which is too coarse for distances, small differences of
    products.
    """
    context: AbstractContextManager[Any] = jax.default_matmul_precision("highest")
    return context


#: The name of what a checkpoint saves.
_SOLUTION = "softk_solution"


@cache
def _bound(primitive: Primitive, options: tuple[tuple[str, Any], ...], choice: str) -> Callable[..., tuple[Array, ...]]:
    def forward(*inputs: Array | None) -> tuple[Array, ...]:
        _require_local(inputs[0], primitive.axes)
        with _exact():
            return backend.run(primitive, "forward", inputs, **dict(options))

    forward.__name__ = primitive.name.replace(" ", "_").replace("-", "_")
    operator = jax.custom_jvp(forward)
    # JAX drops the rule of a custom_jvp, and then differentiates the operations within, where it splits the body of a
    # loop to find what is the same in each turn: reverse mode of `lax.scan` and `lax.map`. It splits no checkpoint.
    # This one saves the solution, from which the rule starts.
    solution = jax.checkpoint_policies.save_only_these_names(_SOLUTION)
    kept: Callable[..., tuple[Array, ...]] = jax.checkpoint(operator, prevent_cse=False, policy=solution)

    def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        outputs = kept(*primals)
        results = len(primitive.results)
        outputs = (*outputs[:results], *(checkpoint_name(value, _SOLUTION) for value in outputs[results:]))
        given = tuple(None if isinstance(t, SymbolicZero) else t for t in tangents)
        found = _tangents(primitive, primals, outputs, given)
        constants = outputs[primitive.moving :]
        return outputs, (*found, *(_no_tangent(value) for value in constants))

    # Symbolic zeros show which inputs have no tangent, so that the rule can skip them.
    operator.defjvp(rule, symbolic_zeros=True)
    compiled: Callable[..., tuple[Array, ...]] = jax.jit(kept)
    return compiled


def _require_local(x: Any, axes: int) -> None:
    """Require that the selected axis, or axes, of the scores are not sharded over explicit axes of a mesh."""
    kind = jax.typeof(x)
    explicit = {name for name, of in zip(*_axes_of(kind), strict=True) if of.name == "Explicit"}
    for part in tuple(kind.sharding.spec)[x.ndim - axes :]:
        if explicit & set(part if isinstance(part, tuple) else (part,)):
            raise ValueError(
                f"x must not be sharded along axis over an explicit axis of a mesh, got {kind} (axis last); use a mesh "
                "with axes of jax.sharding.AxisType.Auto, or softk_jax.sharded.topk inside jax.shard_map"
            )


def _axes_of(kind: Any) -> tuple[Any, Any]:
    mesh = kind.sharding.mesh
    return mesh.axis_names, mesh.axis_types


def _no_tangent(value: Array) -> Any:
    """Zeros. The tangent of an array of integers has the dtype float0 in JAX."""
    return jnp.zeros_like(value) if value.dtype.kind == "f" else np.zeros(value.shape, jax.dtypes.float0)


def _tangents(
    primitive: Primitive, inputs: tuple[Any, ...], outputs: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, ...]:
    """The forward rule. The backward pass recomputes it, and stores no array of the size of the inputs but these."""

    @jax.checkpoint
    def push(inputs: Any, outputs: Any, tangents: Any) -> tuple[Array, ...]:
        with _exact():
            outputs = (*(None for _ in primitive.results), *outputs)
            found = backend.run(primitive, "jvp", inputs, outputs, tangents)
        return tuple(jnp.asarray(value) for value in found)

    found: tuple[Array, ...] = push(inputs, outputs[len(primitive.results) :], tangents)
    return found


backend = JaxBackend(jnp, "jax")
