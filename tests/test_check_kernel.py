"""What `check_kernel` lets pass and what it does not: the reference as a kernel, and the same with one fault each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import softk
from softk.backend import PRIMITIVES, Kernel
from softk.testing import LAYOUTS, Problem, check_kernel, problems

pytestmark = pytest.mark.kernels

MASK, HARD, SOLVER = (PRIMITIVES[name] for name in ("topk_mask", "topk_hard_mask", "solve_threshold"))
LOG, THRESHOLD = PRIMITIVES["topk_log_mask"], PRIMITIVES["topk_threshold"]
PLAN, SORT, RANK = (PRIMITIVES[name] for name in ("sorted_plan", "soft_sort", "soft_rank"))


def serves(*_: Any, **__: Any) -> None:
    """It refuses nothing."""


def kernel(primitive: Any, part: Any, compute: Callable[..., Any] | None = None, refuses: Any = serves) -> Kernel:
    return Kernel("example", primitive, part, refuses, compute or getattr(primitive, part))


def few(*names: str) -> Callable[[Problem], bool]:
    return lambda problem: problem.name in names


PARTS = [(MASK, "forward"), (MASK, "vjp"), (MASK, "jvp"), (HARD, "forward"), (HARD, "vjp"), (SOLVER, "forward")]
PARTS += [(LOG, "forward"), (LOG, "vjp"), (LOG, "jvp"), (THRESHOLD, "forward"), (THRESHOLD, "vjp"), (THRESHOLD, "jvp")]
QUICK = few("plain", "where weighted", "dominated", "numbers", "NaN", "infinite scores", "cauchy scores", "no slices")


@pytest.mark.parametrize(("primitive", "part"), PARTS, ids=lambda value: getattr(value, "name", value))
def test_the_reference_passes(primitive: Any, part: str) -> None:
    report = check_kernel(kernel(primitive, part), np.asarray, dtypes=("float16", "float32", "float64"), only=QUICK)
    assert not report.refused
    assert "infinite scores, float32, contiguous" in report.served
    assert ("NaN, float16, contiguous" in report.served) == primitive.narrow


@pytest.mark.parametrize("part", ["forward", "vjp"])
@pytest.mark.parametrize("primitive", [PLAN, SORT, RANK], ids=lambda primitive: primitive.name)
def test_the_reference_passes_for_sorting_and_ranking(primitive: Any, part: str) -> None:
    only = few("one score", "7 of 40, where", "8 of 8, epsilon 0.1", "8 of 8, epsilon 0.001", "the first 2 of 8, where")
    report = check_kernel(kernel(primitive, part), np.asarray, only=only)
    assert not report.refused
    assert "7 of 40, where, float64, strided" in report.served
    assert ("the first 2 of 8, where, float32, contiguous" in report.served) == (primitive is PLAN)


@pytest.mark.full
@pytest.mark.parametrize(("primitive", "part"), PARTS, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_the_reference_passes_everywhere(library: str, primitive: Any, part: str) -> None:
    module = pytest.importorskip(library)
    make = np.asarray if library == "numpy" else module.from_numpy
    dtypes = ("float16", "float32", "float64") if library == "numpy" else ("bfloat16", "float32", "float64")
    assert not check_kernel(kernel(primitive, part), make, dtypes=dtypes).refused


def changed(primitive: Any, part: str, place: int, change: Callable[[Any], Any]) -> Callable[..., Any]:
    """The reference with one of its results changed."""

    def compute(*groups: Any, **options: Any) -> tuple[Any, ...]:
        found = list(getattr(primitive, part)(*groups, **options))
        found[place] = change(found[place])
        return tuple(found)

    return compute


def _keeping(change: Callable[..., Any]) -> Callable[..., Any]:
    """A mask kernel that does something besides."""

    def compute(backend: Any, inputs: Any, **options: Any) -> Any:
        found = MASK.forward(backend, inputs, **options)
        return change(inputs, found) or found

    return compute


def _unwritten(inputs: Any, found: Any) -> Any:
    room = np.empty_like(found[0])
    room[..., 1:] = found[0][..., 1:]
    return room, *found[1:]


def _overwritten(inputs: Any, found: Any) -> None:
    inputs[0][..., 0] = 0.0


_ROOM: dict[Any, Any] = {}


def _shared(inputs: Any, found: Any) -> Any:
    """Every call writes its mask into the same memory."""
    room = _ROOM.setdefault(found[0].shape, found[0])
    room[...] = found[0]
    return room, *found[1:]


def _count(inputs: Any, found: Any) -> Any:
    return found[:2]


def _rule(change: Callable[..., Any]) -> Callable[..., Any]:
    def compute(backend: Any, inputs: Any, outputs: Any, cotangents: Any, needed: Any) -> Any:
        return change(MASK.vjp(backend, inputs, outputs, cotangents, needed), inputs, needed)

    return compute


def _lazy(found: Any, inputs: Any, needed: Any) -> Any:
    return found if needed[0] else (found[0], None, *found[2:])


def _refuses_by_value(backend: Any, inputs: Any, *_: Any, **__: Any) -> str | None:
    return "there is a NaN" if np.isnan(inputs[0]).any() else None


def _exact_state(backend: Any, inputs: Any, **options: Any) -> Any:
    """A mask that is right, with a reference score that does not separate: the offset says the rest."""
    found, offset, reference = HARD.forward(backend, inputs, **options)
    tau = inputs[2] + 0.0 * offset
    return found, offset + 3.0, reference - 3.0 * tau


def _nudged(mask: Any) -> Any:
    return np.minimum(mask * (1.0 + 300.0 * np.finfo("float32").eps), 1.0).astype(mask.dtype)


def _more(step: float) -> Callable[[Any], Any]:
    return lambda values: values + values.dtype.type(step)


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda values: None if values is None else values * values.dtype.type(factor)


def _backward(values: Any) -> Any:
    return values[..., ::-1].copy()


def _seven(values: Any) -> Any:
    return 0.0 * values + values.dtype.type(7.0)


def _raising(inputs: Any, found: Any) -> None:
    raise ValueError("a fault")


#: The primitive, the part, and the result that is changed and how, or the kernel; and what the error says.
FAULTS: dict[str, tuple[Any, Any, Any, str]] = {
    "mask": (MASK, "forward", (0, _nudged), "the mask is off by"),
    "outside": (MASK, "forward", (0, _more(2e-7)), r"the mask is not in \[0, 1\]"),
    "offset": (MASK, "forward", (1, _more(1e-3)), "the cotangent of"),
    "NaN": (MASK, "forward", (0, np.nan_to_num), "NaN is not where it must be"),
    "separation": (HARD, "forward", _exact_state, "does not separate the k largest"),
    "shape": (MASK, "forward", (1, lambda offset: offset[..., 0]), "result 1 has the shape"),
    "dtype": (MASK, "forward", (2, lambda reference: reference.astype("float64")), "result 2 has the dtype"),
    "count": (MASK, "forward", _keeping(_count), "it returns 2 results, the reference 3"),
    "kind": (MASK, "forward", (0, lambda mask: mask.tolist()), "result 0 is a <class 'list'>"),
    "unwritten": (MASK, "forward", _keeping(_unwritten), "result 0 differs from call to call"),
    "overwritten": (MASK, "forward", _keeping(_overwritten), "it overwrites an array that it was given"),
    "shared": (MASK, "forward", _keeping(_shared), "result 0 shares memory with that of another call"),
    "gap": (SOLVER, "forward", (2, _more(1.0)), "high of the gap is"),
    "flag": (SOLVER, "forward", (5, np.zeros_like), "everything is"),
    "solution": (SOLVER, "forward", (1, _times(1.001)), "the mask is off by"),
    "logarithm": (LOG, "forward", (0, _times(1.0001)), "the logarithm of the mask is off"),
    "threshold": (THRESHOLD, "forward", (0, _more(1e-3)), "the threshold is off"),
    "ties": (HARD, "forward", (0, _backward), "the hard mask is"),
    "cotangent of x": (MASK, "vjp", (0, _times(1.0001)), "the cotangent of x"),
    "cotangent of k": (MASK, "vjp", (1, _times(1.0001)), "the cotangent of k"),
    "cotangent of epsilon": (MASK, "vjp", (2, _times(-1.0)), "the cotangent of epsilon"),
    "cotangent of weights": (MASK, "vjp", (3, _times(1.0001)), "the cotangent of weights"),
    "needed": (MASK, "vjp", _rule(_lazy), "result 1 is None, the reference's an array"),
    "tangent": (MASK, "jvp", (0, _times(1.0001)), "the tangent of the result"),
    **{
        f"tangent of the offset, {primitive.name}": (primitive, "jvp", (1, change), "the tangent of the offset")
        for primitive, change in ((MASK, _times(1.001)), (HARD, _seven), (LOG, _seven), (THRESHOLD, _seven))
    },
    "values": (SORT, "forward", (0, _times(1.001)), "values is off by"),
    "assignment": (PLAN, "forward", (1, _times(1.001)), "assignment is off by"),
    "rank": (RANK, "forward", (0, np.nan_to_num), "NaN is not where it must be in rank"),
    "offset of a plan": (PLAN, "forward", (2, _more(1e-2)), "the cotangent of x is off by"),
    "lost offset": (RANK, "forward", (1, np.nan_to_num), "the offset is not NaN where the reference's is"),
    "cotangent of x, rank": (RANK, "vjp", (0, _times(1.001)), "the cotangent of x is off by"),
    "cotangent of tau": (PLAN, "vjp", (1, _more(1.0)), "the cotangent of tau is off by"),
    "error": (MASK, "forward", _keeping(_raising), r"ValueError\('a fault'\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str) -> None:
    primitive, part, compute, text = FAULTS[fault]
    if isinstance(compute, tuple):
        compute = changed(primitive, part, *compute)
    only = few(
        "plain", "weighted", "numbers", "NaN", "fewer than k", "where", "tied scores", "8 of 8, epsilon by slice"
    )
    text = f"kernel example of {primitive.name}, {part}: problem [^:]*: .*({text})"
    with pytest.raises(AssertionError, match=f"(?s){text}"):
        check_kernel(kernel(primitive, part, compute), np.asarray, dtypes=("float32",), only=only, threads=1)


def test_the_error_has_the_problem_the_dtype_and_the_layout() -> None:
    def compute(backend: Any, inputs: Any, **options: Any) -> Any:
        found = MASK.forward(backend, inputs, **options)
        is_reversed = inputs[0].strides[-1] < 0
        return (0.5 * found[0] if is_reversed else found[0], *found[1:])

    with pytest.raises(AssertionError, match="problem where weighted, float64, reversed: the mask is off"):
        check_kernel(kernel(MASK, "forward", compute), np.asarray, dtypes=("float64",), only=few("where weighted"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_made(layout: str) -> None:
    seen = []

    def compute(backend: Any, inputs: Any, **options: Any) -> Any:
        seen.append(inputs[0].strides)
        return MASK.forward(backend, inputs, **options)

    only = few("repeated rows")
    check_kernel(
        kernel(MASK, "forward", compute), np.asarray, dtypes=("float64",), layouts=(layout,), only=only, threads=1
    )
    wanted = {
        "contiguous": (504, 168, 8),
        "strided": (1008, 336, 16),
        "transposed": (24, 8, 48),
        "reversed": (504, 168, -8),
        "broadcast": (0, 0, 8),
    }
    assert set(seen) == {wanted[layout]}


def test_refusals() -> None:
    def without_weights(backend: Any, inputs: Any, *_: Any, **__: Any) -> str | None:
        return None if inputs[3] is None else "it must come without weights"

    report = check_kernel(kernel(MASK, "vjp", None, without_weights), np.asarray, only=few("where", "weighted"))
    assert report.served == ("where, float32, contiguous", "where, float64, contiguous")
    assert set(report.refused.values()) == {"it must come without weights"}
    with pytest.raises(AssertionError, match="it serves no problem"):
        check_kernel(kernel(MASK, "vjp", None, without_weights), np.asarray, only=few("weighted"))
    with pytest.raises(AssertionError, match="refuses must return a text or None, got True"):
        check_kernel(kernel(MASK, "forward", None, lambda *_, **__: True), np.asarray, only=few("where"))
    with pytest.raises(AssertionError, match="refuses must not look at values"):
        check_kernel(kernel(MASK, "forward", None, _refuses_by_value), np.asarray, only=few("NaN"))


def test_threads_that_share_memory_are_found() -> None:
    import threading
    import time

    lock, room = threading.Lock(), {}

    def compute(backend: Any, inputs: Any, **options: Any) -> Any:
        with lock:
            room["found"] = MASK.forward(backend, inputs, **options)
            room["name"] = threading.get_ident()
        time.sleep(0.01)
        offset = room["found"][1] + (0.0 if room["name"] == threading.get_ident() else 1.0)
        return room["found"][0], offset, room["found"][2]

    with pytest.raises(AssertionError, match="the results of several threads at once differ"):
        check_kernel(kernel(MASK, "forward", compute), np.asarray, dtypes=("float64",), only=few("where"))


def test_states_of_other_kernels_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule gets the state of every forward kernel of its name, beside the reference's."""
    backend = softk.backend.backend_of(np.ones(1))
    shifted = changed(MASK, "forward", 1, lambda s: s + s.dtype.type(0.01))
    monkeypatch.setattr(backend, "kernels", (kernel(MASK, "forward", shifted),), raising=False)
    with pytest.raises(AssertionError, match="the cotangent of x"):
        check_kernel(kernel(MASK, "vjp"), np.asarray, dtypes=("float64",), only=few("where"), threads=1)
    monkeypatch.setattr(backend, "kernels", (replace(kernel(MASK, "forward", shifted), name="other"),), raising=False)
    check_kernel(kernel(MASK, "vjp"), np.asarray, dtypes=("float64",), only=few("where"), threads=1)


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"kernel must compute one of solve_threshold, .*, got 'transport_plan'"):
        check_kernel(kernel(PRIMITIVES["transport_plan"], "forward"), np.asarray)
    with pytest.raises(ValueError, match="kernel must compute forward or vjp of soft_rank, got 'jvp'"):
        check_kernel(kernel(RANK, "jvp"), np.asarray)
    with pytest.raises(ValueError, match="dtypes must be among float16, bfloat16, float32, float64, got 'int8'"):
        check_kernel(kernel(MASK, "forward"), np.asarray, dtypes=("int8",))
    with pytest.raises(ValueError, match=r"layouts must be among contiguous, .*, got 'sparse'"):
        check_kernel(kernel(MASK, "forward"), np.asarray, layouts=("sparse",))


def test_problems_have_names_of_their_own() -> None:
    names = [problem.name for problem in problems()]
    assert len(names) == len(set(names)) >= 60
