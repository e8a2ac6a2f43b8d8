"""Fused kernels for arrays in the memory of the host, in Numba: the threshold, the mask, sorting and ranking.

They serve every framework whose arrays lie in memory, of float16, bfloat16, float32 and float64. This file says when.
`launch` calls them. `masks`, `log_masks` and `thresholds` are the kernels, and `loops` the loops over rows that they
share. `solve`, `rule` and `log_rule` have what is done in a row, `lanes` the same for several short rows at once, with
the type of `vectors`. `ladders` are the kernels for sorting and ranking. `sorting` puts the scores of a row in order,
`bands` has its plan, `systems` its linear systems and `ranking` the ranks by few anchors, in memory that `pointers`
reaches. `rows` reads and writes a row, `operations` has the arithmetic, `pool` the threads and `cache` the compilation.
Numba is imported when the first array arrives that a kernel will serve.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from functools import cache, partial
from itertools import chain
from typing import Any

from softk._reference.plan.ranking import soft_rank
from softk._reference.plan.sorting import soft_sort, sorted_plan
from softk._reference.threshold.masks import hard_mask, log_mask, log_mask_at, mask, threshold
from softk._reference.threshold.solve import solver
from softk.backend import Backend, Kernel, Part, Primitive, is_in_host_memory

__all__ = ["KERNELS"]

DTYPES = ("float16", "bfloat16", "float32", "float64")
#: Those of the kernels for sorting and ranking.
WIDE = ("float32", "float64")

Inputs = tuple[Any, ...]


@cache
def _absent() -> str | None:
    """The reason why no kernel runs, or None."""
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed (python -m pip install numba)"
    try:
        numba = importlib.import_module("numba")
        if numba.config.DISABLE_JIT:
            return "NUMBA_DISABLE_JIT is set"
        importlib.import_module(f"{__name__}.launch")
    except Exception as error:  # such as a Numba that does not know the version of NumPy yet
        return f"Numba does not start: {type(error).__name__}: {error}".splitlines()[0]
    return None


#: Whether the user has been told that the kernels do not start.
_warned: list[bool] = []


def _unavailable() -> str | None:
    """The same, with a warning where Numba is installed and does not start."""
    reason = _absent()
    if reason is not None and reason.startswith("Numba does not start") and not _warned:
        _warned.append(True)
        warnings.warn(f"softk computes by array operations, which are slower. {reason}", RuntimeWarning, stacklevel=2)
    return reason


def computes(primitive: Primitive, part: Part, dtype: str) -> bool:
    """Whether a kernel computes a part for scores of a dtype: for a compiler, whose arrays are not in memory yet."""
    found = next((one for one in KERNELS if one.primitive is primitive and one.part == part), None)
    if found is None or _absent() is not None:
        return False
    return dtype in (DTYPES if found.refuses in (_refuses, _refuses_rule) else WIDE)


def _note() -> str | None:
    """Where the compiled kernels are kept, for ``python -m softk``."""
    if _absent() is not None:
        return None
    from .cache import note

    return note()


@cache
def _name(dtype: Any) -> str:
    """The name of a dtype without that of its library. NumPy takes microseconds to spell one."""
    return str(dtype).rpartition(".")[2]


def _refuses(backend: Backend, inputs: Inputs, *groups: Any, **options: Any) -> str | None:
    """Why the kernels do not serve a problem, None where they do."""
    x = inputs[0]
    if backend.memory(x) is None:  # before its memory is looked at: it may have none
        return "a compiler, a transform or automatic differentiation records the operations"
    if not is_in_host_memory(x):  # the other arrays are on the device of the scores
        return f"the arrays must be in the memory of the host, got {getattr(x, 'device', None)}"
    if 0 in x.shape:
        return f"there must be scores, got the shape {tuple(x.shape)}"
    if _name(x.dtype) not in DTYPES:
        return f"the scores must be of one of {', '.join(DTYPES)}, got {x.dtype}"
    if not backend.holds(chain(inputs, *groups)):
        return "a compiler, a transform or automatic differentiation records the operations"
    return _unavailable()


def _refuses_rule(backend: Backend, inputs: Inputs, outputs: Inputs, given: Inputs, *needed: Any) -> str | None:
    return _refuses(backend, inputs, outputs[1:], given)


def _solve(backend: Backend, inputs: Inputs, *, ranks: tuple[int, ...] | None) -> tuple[Any, ...]:
    from . import launch

    return launch.settled(inputs, ranks)


def _mask(backend: Backend, inputs: Inputs, **options: Any) -> tuple[Any, ...]:
    from . import launch, masks

    return launch.solved(masks.mask_rows, inputs)


def _pull_mask(backend: Backend, *groups: Any) -> tuple[Any, ...]:
    from . import launch, masks

    return launch.pulled(masks.pull_rows, *groups, per_item=True)


def _push_mask(backend: Backend, *groups: Any) -> tuple[Any, ...]:
    from . import launch, masks

    return launch.pushed(masks.push_rows, *groups, per_item=True)


def _log_mask(backend: Backend, inputs: Inputs, **options: Any) -> tuple[Any, ...]:
    from . import launch, log_masks

    return launch.solved(log_masks.log_rows, inputs)


def _pull_log_mask(backend: Backend, *groups: Any) -> tuple[Any, ...]:
    from . import launch, log_masks

    return launch.pulled(log_masks.pull_log_rows, *groups, per_item=True)


def _push_log_mask(backend: Backend, *groups: Any) -> tuple[Any, ...]:
    from . import launch, log_masks

    return launch.pushed(log_masks.push_log_rows, *groups, per_item=True)


def _log_mask_at(backend: Backend, inputs: Inputs) -> tuple[Any, ...]:
    from . import launch, log_masks

    return launch.placed(log_masks.log_at_rows, inputs)


def _pull_threshold(backend: Backend, *groups: Any) -> tuple[Any, ...]:
    from . import launch, thresholds

    return launch.pulled(thresholds.pull_threshold_rows, *groups, per_item=False)


def _push_threshold(backend: Backend, *groups: Any) -> tuple[Any, ...]:
    from . import launch, thresholds

    return launch.pushed(thresholds.push_threshold_rows, *groups, per_item=False)


def _refuses_ladder(backend: Backend, inputs: Inputs, *, rows: int, **options: Any) -> str | None:
    reason = _refuses(backend, inputs)
    if reason is None and _name(inputs[0].dtype) not in WIDE:
        return f"the scores must be of float32 or float64, got {inputs[0].dtype}"
    return reason or _weighted(inputs)


def _weighted(inputs: Inputs) -> str | None:
    return None if inputs[4] is None else "the kernels for sorting take no weights"


def _refuses_ladder_rule(backend: Backend, inputs: Inputs, outputs: Inputs, given: Inputs, *needed: Any) -> str | None:
    return _refuses(backend, inputs, outputs[-2:], given) or _weighted(inputs)


def _climb(primitive: Any, backend: Backend, inputs: Inputs, **options: Any) -> tuple[Any, ...]:
    from . import launch

    return launch.climbed(primitive, backend, inputs, **options)


def _pull_ladder(primitive: Any, backend: Backend, *groups: Any) -> tuple[Any, ...]:
    from . import launch

    return launch.pulled_from_ladder(primitive, backend, *groups)


KERNELS = (
    Kernel("numba", solver, "forward", _refuses, _solve, _note),
    Kernel("numba", mask, "forward", _refuses, _mask, _note),
    Kernel("numba", mask, "vjp", _refuses_rule, _pull_mask, _note),
    Kernel("numba", mask, "jvp", _refuses_rule, _push_mask, _note),
    Kernel("numba", hard_mask, "vjp", _refuses_rule, _pull_mask, _note),
    Kernel("numba", hard_mask, "jvp", _refuses_rule, _push_mask, _note),
    Kernel("numba", log_mask, "forward", _refuses, _log_mask, _note),
    Kernel("numba", log_mask, "vjp", _refuses_rule, _pull_log_mask, _note),
    Kernel("numba", log_mask, "jvp", _refuses_rule, _push_log_mask, _note),
    Kernel("numba", log_mask_at, "forward", _refuses, _log_mask_at, _note),
    Kernel("numba", threshold, "vjp", _refuses_rule, _pull_threshold, _note),
    Kernel("numba", threshold, "jvp", _refuses_rule, _push_threshold, _note),
    Kernel("numba", sorted_plan, "forward", _refuses_ladder, partial(_climb, sorted_plan), _note),
    Kernel("numba", sorted_plan, "vjp", _refuses_ladder_rule, partial(_pull_ladder, sorted_plan), _note),
    Kernel("numba", soft_sort, "forward", _refuses_ladder, partial(_climb, soft_sort), _note),
    Kernel("numba", soft_sort, "vjp", _refuses_ladder_rule, partial(_pull_ladder, soft_sort), _note),
    Kernel("numba", soft_rank, "forward", _refuses_ladder, partial(_climb, soft_rank), _note),
    Kernel("numba", soft_rank, "vjp", _refuses_ladder_rule, partial(_pull_ladder, soft_rank), _note),
)
