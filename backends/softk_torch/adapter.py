"""How PyTorch differentiates a primitive.

One `torch.autograd.Function` serves every primitive, with its rule in both directions and its batching. `torch.compile`
cannot trace a Function that has a jvp, so it is called through a function marked ``allow_in_graph``, which the compiler
keeps whole and differentiates by the rule. In its graph a part that a kernel computes is one operation (`graphs`).
``torch.export`` ignores the rule and differentiates the operations of the forward pass: those end in two Newton
corrections from a detached root, which is right to second order.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any, Literal

import array_api_compat.torch as compat
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import has_static_value

import softk_numba
import softk_triton
from softk._reference.threshold.formulas import formulas_of
from softk._reference.threshold.sparse import masked, penalty
from softk.backend import PRIMITIVES, Array, Backend, Part, Primitive, Ragged, Share, Words, pick

from . import graphs

__all__ = ["TorchBackend", "backend"]


class TorchBackend(Backend):
    """Tensors, eager or under a trace."""

    autodiff = "torch.autograd, torch.func"
    kernels = softk_numba.KERNELS + softk_triton.KERNELS
    words = Words("{0}.float() or {0}.to(torch.float32)", "torch.asarray({})", "{}.to({}.device)")

    def bind(self, primitive: Primitive, **options: Any) -> Callable[..., tuple[Array, ...]]:
        return partial(_bound, primitive.name, tuple(options.items()))

    def device(self, x: Array) -> Any:
        return x.device

    def densely(self, x: Array) -> str | None:
        if x.is_nested:
            padding = "False" if x.dtype == torch.bool else "-math.inf"  # neither is selected
            return f"torch.nested.to_padded_tensor({{}}, {padding}), with where= for the items that are there"
        return None if x.layout is torch.strided else "{}.to_dense()"

    def ragged(self, x: Array) -> Ragged | None:
        """Of a nested tensor whose items lie in memory without holes."""
        if not x.is_nested or x.layout is not torch.jagged or x.lengths() is not None:
            return None
        offsets, axis = x.offsets(), int(x._ragged_idx)
        return Ragged(
            lambda nested: nested.values(),
            lambda values: torch.nested.nested_tensor_from_jagged(values, offsets, jagged_dim=axis),
            offsets.diff(),
            axis,
        )

    def share(self, x: Array, of: Array) -> Share | None:
        if "torch.distributed.tensor" not in sys.modules:  # then there are no DTensors
            return None
        from . import dtensors

        return dtensors.share(x, of) if dtensors.is_distributed((x, of)) else None

    def quiet(self, x: Array | None = None) -> AbstractContextManager[Any]:
        """Autocast lowers every product of matrices, of which distances and derivatives are the small differences."""
        if x is None:
            return nullcontext()
        kind = x.device.type
        known = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
        lowered = known and torch.is_autocast_enabled(kind)
        return torch.autocast(kind, enabled=False) if lowered else nullcontext()

    def memory(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x if _is_plain(x) and not _is_watched(x) else None
        return None if torch.compiler.is_compiling() and not has_static_value(x) else x

    def holds(self, values: Iterable[Any]) -> bool:
        given = [value for value in values if value is not None]
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        if not _is_plain(*tensors) or any(map(_is_watched, tensors)):
            return False
        return len(tensors) == len(given) or all(self.memory(value) is not None for value in given)

    def cache_key(self, x: Array) -> Hashable | None:
        """None on a CUDA device, where a tensor belongs to a stream, or to the graph that is captured."""
        if not _is_plain(x) or not x.is_cpu or self.densely(x) is not None:
            return None
        # A backward pass cannot keep tensors that were made in inference mode.
        return x.shape, x.dtype, torch.is_inference_mode_enabled()

    def run(self, primitive: Primitive, part: Part, *groups: Any, **options: Any) -> tuple[Any, ...]:
        if graphs.is_one_operation(primitive, part, groups[0], options):
            return graphs.compute(primitive, part, *groups, **options)
        return super().run(primitive, part, *groups, **options)

    def constant(self, x: Array) -> Array:
        return x.detach()

    @property
    def differentiates_operations(self) -> bool:
        """Only the compiler does, for ``torch.compile(torch.func.grad(f))`` and export."""
        return bool(torch.compiler.is_compiling())

    def clip(self, values: Array, least: Array, most: Array) -> Array:
        # The tangents of `torch.maximum` and `torch.clamp` add that of the bound and subtract it again. Beside that of
        # a large bound, the tangent of the values is rounded to nothing.
        values = torch.where(values > most, most, values)
        return torch.where(values < least, least, values)

    def select(self, x: Array, ranks: Array | tuple[int, ...]) -> Array:
        if not isinstance(ranks, tuple):
            ranks = ranks.expand(*x.shape[:-1], ranks.shape[-1])
            return torch.gather(torch.sort(x, dim=-1).values, -1, x.shape[-1] - ranks)
        # topk selects in O(n), and sorts no more than is asked for; the shorter end is selected first.
        n, most, least = x.shape[-1], max(ranks), min(ranks)
        if most <= n - least + 1:
            found = torch.topk(x, most, dim=-1, sorted=False).values
            found = torch.topk(found, most - least + 1, dim=-1, largest=False).values
            return pick(xp, found, [most - rank for rank in ranks])
        found = torch.topk(x, n - least + 1, dim=-1, largest=False, sorted=False).values
        found = torch.topk(found, most - least + 1, dim=-1).values
        return pick(xp, found, [rank - least for rank in ranks])

    def solve(self, matrix: Array, right: Array) -> Array:
        # `torch.linalg.solve` looks at whether the matrix is singular, and would wait for the device.
        return torch.linalg.solve_ex(matrix, right).result

    def top_k(self, x: Array, k: int) -> tuple[Array, Array]:
        values, indices = torch.topk(x, k, dim=-1)
        return values, indices

    def scatter(self, values: Array, indices: Array, size: int) -> Array:
        return torch.zeros((*values.shape[:-1], size), dtype=values.dtype, device=values.device).scatter(
            -1, indices, values
        )

    def shards(self, group: str) -> tuple[int, int]:
        from . import dtensors

        return dtensors.shards(group)

    def reduce_shards(self, values: Array, operation: Literal["sum", "max"], group: str) -> Array:
        from . import dtensors

        return dtensors.reduce_shards(values, operation, group)

    def gather_shards(self, values: Array, group: str) -> Array:
        from . import dtensors

        return dtensors.gather_shards(values, group)

    def reduce_segments(self, values: Array, operation: Literal["sum", "max"], segments: Array, count: int) -> Array:
        shape, wide = (*values.shape[:-1], count), values.dtype
        segments = segments.expand(values.shape)
        if operation == "max":
            found = torch.full(shape, -math.inf, dtype=wide, device=values.device)
            return found.scatter_reduce(-1, segments, values, "amax")
        # In float64: a scattered sum adds one value after the other, on a GPU in any order.
        if values.is_floating_point():
            wide = torch.float64 if values.device.type != "mps" else wide
        found = torch.zeros(shape, dtype=wide, device=values.device)
        return found.scatter_add(-1, segments, values.to(wide)).to(values.dtype)


def _is_plain(*tensors: torch.Tensor) -> bool:
    """Whether memory holds their values, and no compiler, tracer or transform records the operations."""
    if torch.compiler.is_compiling():  # the compiler cannot trace the lines below
        return False
    if _dispatch_mode(_PROXY) is not None or _tracing_state() is not None or _are_transforms_active():
        return False
    for x in tensors:  # one loop for all of them: for a small problem the time of these calls matters
        if type(x) not in _TYPES or _is_wrapped(x) or _is_batched(x) or x.is_meta or x.is_neg():
            return False
    return True


_TYPES = (torch.Tensor, torch.nn.Parameter)
_PROXY = torch._C._TorchDispatchModeKey.PROXY
_dispatch_mode, _tracing_state = torch._C._get_dispatch_mode, torch._C._get_tracing_state
_are_transforms_active = torch._C._are_functorch_transforms_active
_is_wrapped, _is_batched = torch._C._functorch.is_functorch_wrapped_tensor, torch._C._functorch.is_legacy_batchedtensor


def _is_watched(x: torch.Tensor) -> bool:
    """Whether automatic differentiation records the operations on a tensor, in reverse or forward mode."""
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    forward = forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()
    return forward and forward_ad.unpack_dual(x).tangent is not None


def _bound(name: str, options: tuple[tuple[str, Any], ...], *inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Apply the primitive of that name to tensors or DTensors. The autograd function is skipped if nothing records."""
    present = [value for value in inputs if value is not None]
    if _is_plain(*present) and not any(map(_is_watched, present)):
        with torch.no_grad():
            return _forward(name, options, inputs)
    if "torch.distributed.tensor" in sys.modules:  # else there are none, and it is slow to import
        from . import dtensors

        if dtensors.is_distributed(inputs):
            return dtensors.by_process(_apply, name, options, inputs)
    outputs: tuple[torch.Tensor, ...] = _apply(name, options, *inputs)
    return outputs


def _forward(
    name: str, options: tuple[tuple[str, Any], ...], inputs: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor, ...]:
    with backend.quiet(inputs[0]):
        return backend.run(PRIMITIVES[name], "forward", inputs, **dict(options))


@torch.compiler.allow_in_graph
@torch.compiler.disable
def _apply(name: str, options: tuple[tuple[str, Any], ...], *inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The primitive of that name. The compiler keeps the call whole, so its constants are what a graph can hold."""
    given = [id(value) for value in inputs if value is not None]
    if len(set(given)) < len(given):
        # The same tensor in two argument slots would get the sum of both gradients in each.
        inputs = tuple(
            value.view_as(value) if value is not None and any(value is earlier for earlier in inputs[:i]) else value
            for i, value in enumerate(inputs)
        )
    outputs: tuple[torch.Tensor, ...] = _Function.apply(name, options, *inputs)
    return outputs


class _Function(torch.autograd.Function):
    """Any primitive as an autograd function: its name and options, then its inputs."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """PyTorch's own `apply` without its inspection of the signature of `forward`, which dominates a small call.

        Transforms of torch.func need the inspection's other half, so under them PyTorch's own is called.
        """
        wrapped = any(_is_wrapped(value) for value in args if isinstance(value, torch.Tensor))
        if wrapped or _are_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @staticmethod
    def forward(name: str, options: tuple[tuple[str, Any], ...], *inputs: torch.Tensor | None) -> Any:
        return _forward(name, options, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        name, _, *tensors = inputs
        ctx.primitive = PRIMITIVES[name]
        ctx.mark_non_differentiable(*output[ctx.primitive.moving :])
        ctx.set_materialize_grads(False)
        kept = output[len(ctx.primitive.results) :]
        ctx.save_for_backward(*tensors, *kept)
        ctx.save_for_forward(*tensors, *kept)
        ctx.count = len(tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs, outputs = _saved(ctx)
        given = (inputs, outputs, cotangents[: ctx.primitive.moving], needed)
        with backend.quiet(inputs[0]):
            return None, None, *backend.run(ctx.primitive, "vjp", *given)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # Autograd takes the jvp with forward mode switched off, and a derivative of it would be zero without a word.
        # The saved values are those of this level: its own tangents are the arguments.
        inputs, outputs = (tuple(_primal(value) for value in values) for values in _saved(ctx))
        with forward_ad._set_fwd_grad_enabled(True), backend.quiet(inputs[0]):
            found = backend.run(ctx.primitive, "jvp", inputs, outputs, tangents)
        return (*found, *(None for _ in ctx.primitive.constants))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], name: str, options: Any, *inputs: torch.Tensor | None) -> Any:
        """Every primitive batches over leading axes, so a new one in front is all there is to do."""
        pairs = list(zip(inputs, in_dims[2:], strict=True))
        axes = max(value.ndim - (dim is not None) for value, dim in pairs if value is not None)
        batched = [None if value is None else _lead(value, dim, axes, info.batch_size) for value, dim in pairs]
        outputs = _apply(name, options, *batched)
        return outputs, (0,) * len(outputs)


def _saved(ctx: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The inputs and the outputs of the forward pass; the rules do not read the results."""
    saved = ctx.saved_tensors
    return saved[: ctx.count], (*(None for _ in ctx.primitive.results), *saved[ctx.count :])


def _primal(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else forward_ad.unpack_dual(value, level=0).primal


def _lead(value: torch.Tensor, dim: int | None, axes: int, size: int) -> torch.Tensor:
    """The batched axis in front, and as many axes behind it as the others have."""
    if dim is None:
        return value.expand(size, *value.shape) if value.ndim == axes else value
    value = value.movedim(dim, 0)
    return value.reshape(size, *(1,) * (axes - value.ndim + 1), *value.shape[1:])


def _full(shape: tuple[int, ...], value: float, /, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A symbol of a trace is added: the compiler knows that as an operation of tensors, and keeps the symbol open."""
    if backend.memory(value) is None:
        return torch.zeros(shape, dtype=dtype, device=device) + value
    return torch.full(shape, value, dtype=dtype, device=device)


def _concat(arrays: list[torch.Tensor], /, *, axis: int = 0) -> torch.Tensor:
    return torch.cat(arrays, dim=axis)


def _maximum(x: torch.Tensor, y: torch.Tensor | float, /) -> torch.Tensor:
    return torch.maximum(x, y) if isinstance(y, torch.Tensor) else torch.clamp(x, min=y)


def _minimum(x: torch.Tensor, y: torch.Tensor | float, /) -> torch.Tensor:
    return torch.minimum(x, y) if isinstance(y, torch.Tensor) else torch.clamp(x, max=y)


def _argsort(x: torch.Tensor, /, *, axis: int = -1, descending: bool = False, stable: bool = True) -> torch.Tensor:
    """An exported program asks for no stable order, which ONNX cannot say; its own keeps ties in order."""
    if not stable or torch.compiler.is_exporting():
        return torch.argsort(x, dim=axis, descending=descending)
    return torch.argsort(x, dim=axis, descending=descending, stable=True)


def _take_along_axis(x: torch.Tensor, indices: torch.Tensor, /, *, axis: int = -1) -> torch.Tensor:
    """Without the broadcasting of `torch.take_along_dim`, which makes constants of an exported program's sizes."""
    return torch.gather(x, axis, indices)


#: torch as the standard has it, but for what its transforms and compilers need:
#: - `concat`, because batched gradients do not know `torch.concat`;
#: - `maximum` and `minimum` of a number, which stays a number: a graph holds no tensor for it, and the derivative at
#:   the bound is not halved;
#: - `argsort`, `take_along_axis` and `full`, because an exported program has symbols for sizes and no stable order.
xp = ModuleType(compat.__name__)
_own = {
    "argsort": _argsort,
    "concat": _concat,
    "full": _full,
    "maximum": _maximum,
    "minimum": _minimum,
    "take_along_axis": _take_along_axis,
}
vars(xp).update({**vars(compat), **_own})

backend = TorchBackend(xp, "torch")
# A compiler that traces a call makes its primitive for a number of arrays at once: the graph holds only the name.
for make in (masked, penalty):
    torch.compiler.assume_constant_result(make)
formulas_of(backend)  # now: a compiler that traces the first call cannot follow how they are loaded
