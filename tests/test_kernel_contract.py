"""Which implementation computes a part of a primitive: the first kernel that is chosen and serves, or the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import softk
import softk.backend
from softk.backend import PRIMITIVES, Backend, Form, Kernel, Primitive

pytestmark = pytest.mark.kernels


@pytest.fixture
def doubled() -> Iterator[Primitive]:
    """y = 2 x, by the reference."""

    def forward(backend: Any, inputs: Any, *, shift: float) -> tuple[Any, ...]:
        return (2.0 * inputs[0] + shift,)

    def forms(xp: Any, inputs: Any, *, shift: float) -> tuple[Form, ...]:
        return (Form(inputs[0].shape, inputs[0].dtype),)

    def vjp(backend: Any, inputs: Any, outputs: Any, cotangents: Any, needed: Any) -> tuple[Any, ...]:
        return tuple(2.0 * cotangents[0] for _ in inputs)

    yield Primitive("doubled", forward, forms, None, vjp, results=("y",))
    del PRIMITIVES["doubled"]


def kernel(primitive: Primitive, value: float, name: str = "triton", part: Any = "forward") -> Kernel:
    """One that answers with its own number, and refuses more than three items."""

    def refuses(backend: Any, inputs: Any, *groups: Any, **options: Any) -> str | None:
        return None if inputs[0].size <= 3 else f"there must be at most 3 items, got {inputs[0].size}"

    def compute(backend: Any, inputs: Any, *groups: Any, **options: Any) -> tuple[Any, ...]:
        return tuple(np.full_like(x, value) for x in inputs)

    return Kernel(name, primitive, part, refuses, compute)


class Own(Backend):
    def __init__(self, *kernels: Kernel) -> None:
        super().__init__(np)
        self.kernels = kernels


def first(backend: Backend, primitive: Primitive, n: int) -> float:
    return float(backend.bind(primitive, shift=0.5)(np.ones(n))[0][0])


def test_the_first_that_serves_computes(doubled: Primitive) -> None:
    backend = Own(kernel(doubled, 7.0), kernel(doubled, 8.0))
    assert first(backend, doubled, 3) == 7.0
    assert first(backend, doubled, 4) == 2.5, "the reference, where they refuse"


def test_a_kernel_serves_its_own_part_of_its_own_primitive(doubled: Primitive) -> None:
    other = next(primitive for name, primitive in PRIMITIVES.items() if name != "doubled")
    backend = Own(kernel(other, 7.0), kernel(doubled, 8.0, part="vjp"))
    assert first(backend, doubled, 3) == 2.5
    x = np.ones(3)
    assert backend.run(doubled, "vjp", (x,), (x,), (x,), (True,))[0][0] == 8.0


def test_what_is_not_needed_is_none(doubled: Primitive) -> None:
    x = np.ones(4)
    found = Own().run(doubled, "vjp", (x, x), (x,), (x,), (False, True))
    assert found[0] is None
    np.testing.assert_array_equal(found[1], 2.0 * x)


def test_the_choice(doubled: Primitive) -> None:
    backend = Own(kernel(doubled, 7.0))
    with softk.kernels("none"):
        assert first(backend, doubled, 3) == 2.5
        with softk.kernels("triton"):
            assert first(backend, doubled, 3) == 7.0
        assert first(backend, doubled, 3) == 2.5
    assert first(backend, doubled, 3) == 7.0
    with pytest.raises(ZeroDivisionError), softk.kernels("none"):
        raise ZeroDivisionError
    assert first(backend, doubled, 3) == 7.0, "an error leaves the choice as it was"


def test_a_bad_choice_is_refused() -> None:
    message = r"choice must be one of auto, none, numba, triton, got 'fast'"
    with pytest.raises(ValueError, match=message), softk.kernels("fast"):
        pass


def test_kernels_of_others_are_chosen_by_name(doubled: Primitive, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = softk.backend.backend_of(np.ones(3))
    monkeypatch.setattr(backend, "kernels", (kernel(doubled, 7.0), kernel(doubled, 8.0, "own")), raising=False)
    assert first(backend, doubled, 3) == 7.0
    with softk.kernels("own"):
        assert first(backend, doubled, 3) == 8.0
    message = r"choice must be one of auto, none, numba, triton, own, got 'fast'"
    with pytest.raises(ValueError, match=message), softk.kernels("fast"):
        pass


OWN = """
import numpy as np
import softk
from softk.backend import PRIMITIVES, Kernel, backend_of, chosen_kernels

x = np.ones(3)
mask = PRIMITIVES["topk_mask"]
own = Kernel("own", mask, "forward", lambda *_, **__: None, lambda *_, **__: (7.0 * x, x[:1], x[:1]))
backend_of(x).kernels = (own,)
print(chosen_kernels(), softk.topk(x, 1)[0])
"""


@pytest.mark.parametrize(
    ("value", "code", "said"),
    [
        ("none", 0, "none 0.33"),
        ("numba", 0, "numba 0.33"),
        ("auto", 0, "auto 7.0"),
        ("own", 0, "own 7.0"),
        ("fast", 1, "ValueError: SOFTK_KERNELS must be one of auto, none, numba, triton, own, got 'fast'"),
    ],
)
def test_the_environment_chooses(value: str, code: int, said: str) -> None:
    """A name that is not softk's own is looked up when the first array arrives."""
    environment = {**os.environ, "SOFTK_KERNELS": value, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", OWN], env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert said in done.stdout + done.stderr


def test_a_second_primitive_of_one_name_is_refused(doubled: Primitive) -> None:
    with pytest.raises(ValueError, match="name must be unique among the primitives, got 'doubled'"):
        Primitive("doubled", doubled.forward, doubled.forms)


#: The inputs of each primitive, in float32 beside float64 options, and its options.
X, ONE, ITEMS = np.linspace(0.0, 1.0, 12).reshape(2, 6) ** 2, np.full((2, 1), 1.5), np.full((2, 6), 0.7)
MASKS = ((X, ONE, 0.1 * ONE, ITEMS, ITEMS > 0.0), {"ranks": None})
POINTS = np.linspace(-1.0, 1.0, 30).reshape(10, 3)
KEYED = (np.full((4, 1), 2.0), np.full((4, 1), 0.2), None, None)
ROWS = (X[:, None, :], np.full((2, 2, 1), 1.5), np.full((1, 2, 1), 0.1), None, None)
SEGMENTS = (*ROWS, np.asarray([[[0, 0, 1, 1, 1, 1]]]), np.asarray([[[2], [4]]]))
CASES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "topk_mask_of_segments": (SEGMENTS, {"ranks": None}),
    "topk_hard_mask_of_segments": ((X[:, None, :], np.full((2, 2, 1), 1.0), *SEGMENTS[2:]), {"ranks": None}),
    **dict.fromkeys(("topk_mask", "topk_log_mask", "topk_threshold", "solve_threshold"), MASKS),
    "topk_log_mask_at": ((X, 2.0 + 0.0 * ONE, 0.1 * ONE, 0.3 * ONE, 0.5 * ONE), {}),
    "topk_hard_mask": ((X, 2.0 + 0.0 * ONE, 0.1 * ONE, None, None), {"ranks": None}),
    "topk_selection": ((X, 2.0 + 0.0 * ONE, 0.1 * ONE, None, None), {"ranks": None, "count": 2}),
    "empty_mask": ((X[:, :0], ONE, ONE, None, None), {}),
    "soft_quantile": ((X, 0.2 * ONE, 0.1 * ONE, ITEMS, None), {}),
    "sorted_plan": ((X, 0.1 * ONE, np.asarray(1.0), None, None), {"rows": 3, "ranks": None}),
    "soft_sort": ((X, 0.1 * ONE, np.asarray(1.0), None, None), {"rows": 6, "ranks": None}),
    "soft_rank": ((X, 0.1 * ONE, np.asarray(1.0), None, None), {"rows": 6, "ranks": None}),
    "transport_plan": (
        (X, np.full((2, 1), 1.0) * np.arange(3.0), np.full((2, 3), 2.0), 0.1 * ONE, ITEMS, None),
        {"method": "newton", "tolerance": 1e-9, "limit": 30},
    ),
    "assignment": (
        (X[..., None] * np.arange(3.0), np.full((2, 1, 3), 2.0), 0.1 * ONE[..., None], ITEMS[..., None], None),
        {"method": "newton", "tolerance": 1e-9, "limit": 30},
    ),
    "neighbor_weights": ((POINTS[:4], POINTS, *KEYED), {"ranks": None}),
    "neighbor_votes": ((POINTS[:4], POINTS, POINTS[:, :2] ** 2, *KEYED), {"ranks": None}),
    "neighbor_likelihood": (
        (POINTS[:4], POINTS, POINTS[:4, :2] ** 2, POINTS[:, :2] ** 2, np.asarray(0.1), *KEYED),
        {"ranks": None},
    ),
}


def solved_within(name: str, monkeypatch: pytest.MonkeyPatch, backend: Backend) -> list[tuple[Any, Any, Any]]:
    """What a primitive asks of its solver: (the solver, its inputs, its options)."""
    asked, whole = [], backend.run

    def run(primitive: Primitive, part: Any, *groups: Any, **options: Any) -> Any:
        asked.append((primitive, groups[0], options))
        return whole(primitive, part, *groups, **options)

    monkeypatch.setattr(backend, "run", run)
    inputs, options = CASES[name]
    with backend.quiet():
        run(PRIMITIVES[name], "forward", inputs, **options)
    return asked


@pytest.mark.parametrize("name", sorted(PRIMITIVES))
def test_the_forms_of_the_outputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and dtypes as a primitive says them are those that it computes, by name; so with the solver within."""
    backend = softk.backend.backend_of(X)
    if name in ("solve_plan", "solve_assignment"):
        whole = {"solve_plan": "transport_plan", "solve_assignment": "assignment"}[name]
        asked = [call for call in solved_within(whole, monkeypatch, backend) if call[0].name == name]
    elif name == "solve_plan_by_sinkhorn":
        inputs, options = CASES["transport_plan"]
        monkeypatch.setitem(CASES, "transport_plan", (inputs, {**options, "method": "sinkhorn"}))
        asked = [call for call in solved_within("transport_plan", monkeypatch, backend) if call[0].name == name]
    else:
        asked = [(PRIMITIVES[name], *CASES[name])]
    assert asked
    for primitive, inputs, options in asked:
        with backend.quiet():
            found = primitive.forward(backend, inputs, **options)
        said = primitive.forms(backend.xp, inputs, **options)
        assert [(value.shape, value.dtype) for value in found] == [(form.shape, form.dtype) for form in said]
        assert len(found) == len(primitive.results) + len(primitive.state) + len(primitive.constants)
