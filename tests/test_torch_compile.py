"""PyTorch's compiler and exporter, by value: one graph, the rule's derivatives inside of it, and of it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softk

from . import closed_form
from .closed_form import ARGUMENTS, assert_close

torch = pytest.importorskip("torch")

pytestmark = [
    # torch compiles its own forward-mode formulas, and inductor its own passes, with what torch has deprecated.
    pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is:DeprecationWarning"),
]

FUNCTIONS = {"topk": softk.topk, "threshold": softk.threshold}


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def positional(function: str, **options: Any) -> Callable[..., Any]:
    def f(x: Any, k: Any, epsilon: Any, weights: Any = None) -> Any:
        return FUNCTIONS[function](x, k, epsilon=epsilon, weights=weights, **options)

    return f


def tensors(values: dict[str, np.ndarray], *, grad: bool = True) -> tuple[Any, ...]:
    return tuple(torch.tensor(value, requires_grad=grad) for value in values.values())


def counting() -> Any:
    """A backend that knows how many graphs it was given."""
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend("aot_eager")


def random(rng: Any, *shape: int) -> Any:
    return torch.tensor(rng.standard_normal(shape))


def check_gradients(out: Any, given: tuple[Any, ...], function: str, values: dict[str, np.ndarray], rng: Any) -> None:
    u = random(rng, *out.shape)
    found = torch.autograd.grad(out, given, u)
    expected = closed_form.pullback(function, u.numpy(), values)
    for name, gradient in zip(values, found, strict=True):
        assert_close(gradient, expected[name])


# --- torch.compile


#: Functions with kernels: what is differentiated, and the primitive whose value and derivative are kernels.
WITH_KERNELS = {
    "topk": (lambda x: softk.topk(x, 3, epsilon=0.4), "topk_mask", ("forward", "vjp")),
    "hard": (lambda x: softk.topk(x, 3, epsilon=0.4, hard=True), "topk_hard_mask", ("vjp",)),
    "log_topk": (lambda x: softk.log_topk(x, 2.5, epsilon=0.4), "topk_log_mask", ("forward", "vjp")),
    "threshold": (lambda x: softk.threshold(x, 3, epsilon=0.4), "topk_threshold", ("vjp",)),
    "sorted_topk": (lambda x: softk.sorted_topk(x, 3, epsilon=0.4).values, "sorted_plan", ("forward", "vjp")),
    "rank": (lambda x: softk.rank(x, epsilon=0.4), "soft_rank", ("forward", "vjp")),
}


#: The kernels for sorting have no half precision.
KERNEL_CASES = [(name, "float32") for name in WITH_KERNELS]
KERNEL_CASES += [(name, "bfloat16") for name in WITH_KERNELS if name not in ("sorted_topk", "rank")]


@pytest.mark.parametrize(("function", "dtype"), KERNEL_CASES)
def test_kernels_are_operations_of_the_graph(function: str, dtype: str, rng: Any) -> None:
    """Parts with kernels are operations of the graphs. If both parts are, the results equal those of an eager call."""
    pytest.importorskip("numba")
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    f, primitive, parts = WITH_KERNELS[function]
    found = []

    def record(graph: Any, inputs: Any) -> Any:
        found.extend(node.args[:2] for node in graph.graph.nodes if "softk.compute" in str(node.target))
        return make_boxed_func(graph)

    def compile_by(graph: Any, inputs: Any) -> Any:
        return aot_autograd(fw_compiler=record, bw_compiler=record)(graph, inputs)

    x = random(rng, 5, 40).to(getattr(torch, dtype)).requires_grad_()
    with softk.kernels("numba"):
        out, expected = torch.compile(f, fullgraph=True, backend=compile_by)(x), f(x)
        u = random(rng, *out.shape).to(out)
        (gradient,), (wanted,) = torch.autograd.grad(out, x, u), torch.autograd.grad(expected, x, u)
    assert {(primitive, part) for part in parts} <= set(found)
    # Two solvers may round the threshold differently.
    tolerance = 0.0 if "forward" in parts else {"float32": 2e-5, "bfloat16": torch.finfo(torch.bfloat16).eps}[dtype]
    for value, other in ((out, expected), (gradient, wanted)):
        assert value.dtype == other.dtype
        assert_close(value.detach().double(), other.detach().double(), tolerance)
    found.clear()
    torch._dynamo.reset()
    with softk.kernels("none"):
        torch.compile(f, fullgraph=True, backend=compile_by)(x).sum().backward()
    assert all(name.startswith("solve") for name, _ in found)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_with_every_argument_a_tensor(backend: str, rng: Any) -> None:
    """k and epsilon one a row; float64 by value, forward and backward."""
    values = closed_form.problem(rng, batch=(3,))
    given = tensors(values)
    out = torch.compile(positional("topk"), fullgraph=True, backend=backend)(*given)
    assert_close(out.detach(), closed_form.topk(**values).astype(float), 1e-13)
    check_gradients(out, given, "topk", values, rng)


@pytest.mark.parametrize("function", ["topk", pytest.param("threshold", marks=pytest.mark.full)])
def test_numbers_within_a_larger_function(function: str, rng: Any) -> None:
    values = {"x": rng.standard_normal((3, 7)), "k": np.asarray(2.0), "epsilon": np.asarray(0.7)}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x: Any) -> Any:
        return FUNCTIONS[function](torch.sin(x), 2, epsilon=0.7) ** 2

    x = torch.tensor(values["x"], requires_grad=True)
    out = f(x)
    u = random(rng, *out.shape)
    out.backward(u)
    inner = {**values, "x": np.sin(values["x"])}
    value = getattr(closed_form, function)(**inner).astype(float)
    value = value if function == "topk" else value[:, 0]
    assert_close(out.detach(), value**2, 1e-13)
    expected = closed_form.pullback(function, 2.0 * value * u.numpy(), inner)["x"] * np.cos(values["x"])
    assert_close(x.grad, expected)


@pytest.mark.full
def test_quantile(rng: Any) -> None:
    values = {
        "x": rng.standard_normal(7),
        "k": np.asarray(0.37),
        "epsilon": np.asarray(0.6),
        "weights": rng.uniform(0.5, 2, 7),
    }

    def f(x: Any, q: Any, epsilon: Any, weights: Any) -> Any:
        return softk.quantile(x, q, epsilon=epsilon, weights=weights)

    given = tensors(values)
    out = torch.compile(f, fullgraph=True, backend="aot_eager")(*given)
    value, first, _ = closed_form.quantile_derivatives(*values.values())
    assert_close(out.detach(), np.float64(value), 1e-13)
    place = closed_form.Slice(values["x"], 1.0, 1.0).place
    for name, gradient in zip(ARGUMENTS, torch.autograd.grad(out, given), strict=True):
        assert_close(gradient, first[place[name]].reshape(gradient.shape))


def test_hard_where_smallest_along_another_axis(rng: Any) -> None:
    x, where = random(rng, 7, 3), torch.tensor(rng.uniform(size=(7, 3)) < 0.8)
    where[:2] = True

    def f(x: Any, where: Any) -> Any:
        return softk.topk(x, 2, axis=0, mode="smallest", epsilon=0.7, where=where, hard=True)

    leaf = x.clone().requires_grad_()
    out = torch.compile(f, fullgraph=True, backend="aot_eager")(leaf, where)
    assert torch.equal(out, f(x, where))
    u = random(rng, 7, 3)
    out.backward(u)
    values = {"x": -x.T.numpy(), "k": np.asarray(2.0), "epsilon": np.asarray(0.7)}
    expected = closed_form.pullback("topk", (u * where).T.numpy(), values, where.T.numpy())["x"]
    assert_close(leaf.grad, -expected.T)


@pytest.mark.parametrize("k", [pytest.param("number", marks=pytest.mark.full), "tensor"])
def test_dynamic_shapes_need_one_graph(k: str, rng: Any) -> None:
    counter = counting()

    def f(x: Any, k: Any) -> Any:
        return softk.topk(x, 2 if k is None else k, epsilon=0.7)

    f(random(rng, 3, 7), None)
    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    for shape in [(3, 7), (5, 11), (2, 6), (8, 20)]:
        values = {"x": rng.standard_normal(shape), "k": np.full((shape[0], 1), 2.0), "epsilon": np.asarray(0.7)}
        if k == "tensor":
            values["k"] = rng.uniform(1.0, 4.0, (shape[0], 1))
        x = torch.tensor(values["x"], requires_grad=True)
        mass = torch.tensor(values["k"], requires_grad=True) if k == "tensor" else None
        out = compiled(x, mass)
        u = random(rng, *shape)
        out.backward(u)
        expected = closed_form.pullback("topk", u.numpy(), values)
        assert_close(x.grad, expected["x"])
        if mass is not None:
            assert_close(mass.grad, expected["k"])
    assert counter.frame_count == 1


def test_other_values_need_no_other_graph(rng: Any) -> None:
    """k and epsilon as tensors are data."""
    counter = counting()
    compiled = torch.compile(positional("topk"), fullgraph=True, backend=counter)
    for _ in range(4):
        values = closed_form.problem(rng, batch=(2,))
        given = tensors(values)
        check_gradients(compiled(*given), given, "topk", values, rng)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [pytest.param("float64", marks=pytest.mark.full), "float32"])
@pytest.mark.parametrize(
    "numbers",
    [
        [(k, 0.7) for k in range(2, 7)],
        [(3, 0.9**i) for i in range(12)],
        pytest.param([(1.5 + 0.25 * i, 0.7) for i in range(12)], marks=pytest.mark.full),
        pytest.param([(2, 0.7), (3, 0.9), (4, 1.1), (5, 0.4)], marks=pytest.mark.full),
    ],
    ids=["k", "epsilon", "fractional", "both"],
)
def test_numbers_that_change_need_two_graphs(numbers: list[tuple[float, float]], dtype: str, rng: Any) -> None:
    """One for the first value, and one for all others, in which the number is a symbol."""
    counter, kind = counting(), getattr(torch, dtype)
    compiled = torch.compile(positional("topk"), fullgraph=True, backend=counter)
    for k, epsilon in numbers:
        values = {"x": rng.standard_normal((2, 7)), "k": np.asarray(float(k)), "epsilon": np.asarray(epsilon)}
        x = torch.tensor(values["x"], dtype=kind, requires_grad=True)
        u = random(rng, 2, 7).to(kind)
        out = compiled(x, k, epsilon)
        out.backward(u)
        values["x"] = x.detach().double().numpy()
        value, derivative = (1e-13, 1e-11) if dtype == "float64" else (1e-5, 2e-5)
        assert_close(out.detach().double(), closed_form.topk(**values).astype(float), value)
        assert_close(x.grad.double(), closed_form.pullback("topk", u.double().numpy(), values)["x"], derivative)
    assert counter.frame_count == 2


def test_symbols_are_checked_as_numbers_are(rng: Any) -> None:
    compiled = torch.compile(positional("topk"), backend="eager")
    x = random(rng, 7)
    for k in (2, 3, 4):
        compiled(x, k, 0.5)
    with pytest.raises(ValueError, match="k must be from 0 to 7, the size of x along axis, got 8"):
        compiled(x, 8, 0.5)
    for epsilon in (0.4, 0.3):
        compiled(x, 3, epsilon)
    with pytest.raises(ValueError, match=r"epsilon must be a positive finite number .*, got -1.0"):
        compiled(x, 3, -1.0)


@pytest.mark.parametrize("function", ["topk", pytest.param("sorted_topk", marks=pytest.mark.full)])
def test_k_of_the_shape(function: str, rng: Any) -> None:
    """A fifth of the items: k is a symbol wherever the shape is one."""
    counter = counting()

    def f(x: Any) -> Any:
        found = getattr(softk, function)(x, x.shape[-1] // 5, epsilon=0.5)
        return found if function == "topk" else found.assignment

    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    for n in (23, 40, 15):
        x = torch.tensor(rng.standard_normal((3, n)), dtype=torch.float32, requires_grad=True)
        out, expected = compiled(x), f(x)
        assert_close(out.detach(), expected.detach().numpy(), 1e-5)
        u = random(rng, *out.shape).to(out)
        gradient, wanted = (torch.autograd.grad(value, x, u)[0] for value in (out, expected))
        assert_close(gradient, wanted.numpy(), 1e-4)
    assert counter.frame_count == 1


@pytest.mark.full
@pytest.mark.parametrize("function", ["log_topk", "threshold", "quantile", "sorted_topk", "rank", "weights"])
def test_numbers_of_the_other_functions_that_change(function: str, rng: Any) -> None:
    x = torch.tensor(rng.standard_normal((3, 7)), dtype=torch.float32)

    def f(k: Any, epsilon: Any) -> Any:
        if function == "weights":
            return softk.neighbors.weights(x.mT, 1.1 * x.mT, k, epsilon=epsilon)  # seven points
        if function == "rank":
            return softk.rank(x, epsilon=epsilon)
        found = getattr(softk, function)(x, k / 8 if function == "quantile" else k, epsilon=epsilon)
        return found.values if function == "sorted_topk" else found

    counter = counting()
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for k, epsilon in [(3, 0.9), (4, 0.8), (5, 0.7), (3, 0.6)]:
        assert_close(compiled(k, epsilon), f(k, epsilon).numpy(), 1e-5)
    assert counter.frame_count == 2


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.full), "bfloat16"])
def test_lower_precision(dtype: str, rng: Any) -> None:
    kind = getattr(torch, dtype)
    values = closed_form.problem(rng, batch=(3,))
    given = tuple(value.detach().to(kind).requires_grad_() for value in tensors(values))
    out = torch.compile(positional("topk"), fullgraph=True, backend="aot_eager")(*given)
    assert out.dtype == kind
    u = random(rng, 3, 7).to(kind)
    rounded = {name: value.detach().double().numpy() for name, value in zip(ARGUMENTS, given, strict=True)}
    expected = closed_form.pullback("topk", u.double().numpy(), rounded)
    tolerance = 2e-5 if dtype == "float32" else 2.0 * torch.finfo(kind).eps
    for name, gradient in zip(ARGUMENTS, torch.autograd.grad(out, given, u), strict=True):
        assert gradient.dtype == kind
        assert_close(gradient.double(), expected[name], tolerance)


def test_gradient_taken_inside_the_compiled_function(rng: Any) -> None:
    values = closed_form.problem(rng)
    u = random(rng, 7)

    def loss(x: Any, k: Any, epsilon: Any, weights: Any) -> Any:
        return (positional("topk")(x, k, epsilon, weights) * u).sum()

    given = tensors(values, grad=False)
    found = torch.compile(torch.func.grad(loss, (0, 1, 2, 3)), fullgraph=True, backend="aot_eager")(*given)
    expected = closed_form.pullback("topk", u.numpy(), values)
    for name, gradient in zip(ARGUMENTS, found, strict=True):
        assert_close(gradient, expected[name])


@pytest.mark.parametrize("case", [pytest.param("soft", marks=pytest.mark.full), "near-hard"])
def test_hessian_taken_inside_the_compiled_function(case: str, rng: Any) -> None:
    values = closed_form.problem(rng, case, n=5)
    u, epsilon = random(rng, 5), values["epsilon"].item()

    def loss(x: Any, k: Any) -> Any:
        return (softk.topk(x, k, epsilon=epsilon) * u).sum()

    given = tensors({"x": values["x"], "k": np.asarray(1.7)}, grad=False)
    found = torch.compile(torch.func.hessian(loss, (0, 1)), fullgraph=True, backend="aot_eager")(*given)
    at = closed_form.Slice(values["x"], 1.7, epsilon)
    for name, row in zip(("x", "k"), found, strict=True):
        for other, block in zip(("x", "k"), row, strict=True):
            expected = np.tensordot(u.numpy(), at.get("topk", 2, name, other), 1)
            assert_close(block, expected.reshape(block.shape), 1e-9)


def test_jvp_and_vmap_inside_the_compiled_function(rng: Any) -> None:
    values = closed_form.problem(rng, batch=(3,))
    tangents = {name: rng.standard_normal(value.shape) for name, value in values.items()}
    given, moved = tensors(values, grad=False), tensors(tangents, grad=False)
    dims = (0, 0, 0, None)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(given: Any, moved: Any) -> Any:
        return torch.func.jvp(torch.func.vmap(positional("topk"), dims), given, moved)[1]

    assert_close(f(given, moved), closed_form.push("topk", tangents, values))


def test_double_backward_through_a_compiled_region_is_refused(rng: Any) -> None:
    """By torch, which says so, rather than answered wrongly."""
    x = torch.tensor(rng.standard_normal(7), requires_grad=True)
    out = torch.compile(lambda x: softk.topk(x, 2, epsilon=0.7), fullgraph=True, backend="aot_eager")(x)
    (gradient,) = torch.autograd.grad(out, x, random(rng, 7), create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()


def script(source: str) -> str:
    """What a Python process of its own prints: nothing of softk has been called in it before."""
    root = Path(__file__).parents[1]
    setup = f"import sys\nsys.path[:0] = [{str(root)!r}, {str(root / 'backends')!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", setup + textwrap.dedent(source)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_first_call_ever_is_compiled(rng: Any) -> None:
    """The adapter is imported, and found from the type, while the compiler traces."""
    x, u = rng.standard_normal(5), rng.standard_normal(5)
    printed = script(
        f"""
        import warnings
        warnings.simplefilter("error")
        import torch, softk
        assert "softk_torch" not in sys.modules
        x = torch.tensor({x.tolist()}, dtype=torch.float64, requires_grad=True)
        f = torch.compile(lambda x: softk.topk(x, 2, epsilon=0.7), fullgraph=True, backend="aot_eager")
        f(x).backward(torch.tensor({u.tolist()}, dtype=torch.float64))
        print(x.grad.tolist())
        """
    )
    gradient = eval(printed)
    expected = closed_form.pullback("topk", u, {"x": x, "k": np.asarray(2.0), "epsilon": np.asarray(0.7)})
    assert_close(np.asarray(gradient), expected["x"])


FIRST = """
import os, sys, traceback, types, warnings

warnings.simplefilter("error")
import torch, softk
from torch.nn import Parameter

class Gate(Parameter): pass
class Own(torch.Tensor): pass

def run(f, *given, fullgraph=True):
    "The compiled function's value and gradients, and then the function's own."
    leaves = [value for value in given if value.requires_grad]
    out = torch.compile(f, fullgraph=fullgraph, backend=BACKEND)(*given)
    expected = f(*given)
    assert type(out) is type(expected) and out.dtype == expected.dtype
    torch.testing.assert_close(out, expected)
    u = torch.randn(out.shape)
    found, wanted = (torch.autograd.grad(value, leaves, u) for value in (out, expected))
    torch.testing.assert_close(found, wanted)

def attention():
    from softk_torch import TopKAttention
    attend = TopKAttention(Parameter(torch.tensor(2.5)), epsilon=Parameter(torch.tensor(0.5)))
    run(lambda *given: attend(*given[:3]), *torch.randn(3, 2, 5, 3), *attend.parameters())

def module():
    from softk_torch import TopK
    select = TopK(2, epsilon=Parameter(torch.tensor(0.5)))
    run(lambda x, *_: select(x), torch.randn(7), *select.parameters())

def exported():
    class Select(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = Parameter(torch.randn(7))

        def forward(self, x):
            return softk.topk(self.gate + x, 2)

    layer, x = Select(), torch.randn(7)
    program = torch.export.export(layer, (x,), strict=True)
    torch.testing.assert_close(program.module()(x), layer(x))

def followed_in_parts():
    "What the compiler cannot follow, it leaves, and goes on below."
    import softk.backend
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
    softk.backend.ADAPTERS["other"] = softk.backend.Adapter(lambda: None)
    run(lambda x: softk.topk(x, 2), Gate(torch.randn(7)), fullgraph=False)

def again():
    "And the second time."
    from torch._dynamo.testing import CompileCounterWithBackend
    counter = CompileCounterWithBackend(BACKEND)
    f = torch.compile(lambda x: softk.topk(x, 2), fullgraph=True, backend=counter)
    for _ in range(3):
        f(Parameter(torch.randn(7)))
    import numpy
    softk.topk(numpy.ones(3), 1)
    f(Parameter(torch.randn(7)))
    assert counter.frame_count == 1, counter.frame_count

GATE, FROZEN, EPSILON = Parameter(torch.randn(7)), Parameter(torch.rand(7), requires_grad=False), torch.tensor(0.5)
CASES = {
    "parameter": lambda: run(lambda x: softk.topk(x, 2), GATE),
    "not of the whole graph": lambda: run(lambda x: softk.topk(x, 2), GATE, fullgraph=False),
    "frozen": lambda: run(lambda x, a: softk.topk(torch.sin(x), 2, weights=a), GATE, FROZEN),
    "threshold": lambda: run(lambda x, e: softk.threshold(x, 2, epsilon=e), GATE, Parameter(EPSILON)),
    "sorted_topk": lambda: run(lambda x: softk.sorted_topk(x, 2).values, GATE),
    "subclass of the parameter": lambda: run(lambda x: softk.topk(x, 2), Gate(torch.randn(7))),
    "subclass of the tensor": lambda: run(lambda x: softk.topk(x, 2), torch.randn(7).as_subclass(Own).requires_grad_()),
    "module": module,
    "attention": attention,
    "export": exported,
    "in parts": followed_in_parts,
    "again": again,
}

failed = []
for name in NAMES:
    sys.stdout.flush()
    child = os.fork()  # a process that has called softk no more than this one
    if child == 0:
        try:
            assert "softk_torch" not in sys.modules
            CASES[name]()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        failed.append(name)
print(failed)
"""

COMMON = ["parameter", "frozen", "subclass of the tensor", "module", "in parts", "again"]
OTHERS = ["not of the whole graph", "threshold", "sorted_topk", "subclass of the parameter", "attention", "export"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("names", [COMMON, pytest.param(OTHERS, marks=pytest.mark.full)], ids=["common", "others"])
def test_first_call_ever_has_a_type_of_its_own(names: list[str]) -> None:
    """Each in a process of its own: after an eager call with that type, the compiler need not find its backend."""
    assert script(f"NAMES, BACKEND = {names!r}, 'eager'\n{FIRST}") == "[]\n"


# --- torch.export


class Layer(torch.nn.Module):
    """A selection between ordinary operations."""

    def forward(self, x: Any, k: Any, epsilon: Any, weights: Any) -> Any:
        return torch.exp(softk.topk(torch.sin(x), k, epsilon=epsilon, weights=weights))


def check_operations(program: Any) -> None:
    """What runs without softk: PyTorch's own operations on tensors, and arithmetic with sizes."""
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    others = {str(target) for target in targets if getattr(target, "__module__", "") != "_operator"}
    assert all(name.startswith(("aten.", "<function sym_")) for name in others), others


class Select(torch.nn.Module):
    """A function of the scores alone, by its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Any) -> Any:
        match self.name:
            case "share":
                return softk.topk(x, x.shape[-1] // 3, epsilon=0.5)
            case "fraction":
                return softk.topk(x, 3.0 * torch.sigmoid(x[:, :1]), epsilon=0.5)
            case "weights":
                return softk.topk(x, 2.5, epsilon=0.5, weights=1.0 + torch.sigmoid(x))
            case "where":
                return softk.topk(x, 2, epsilon=0.5, where=x < 1.0)
            case "hard":
                return softk.topk(x, 2, hard=True)
            case "neighbors":
                return softk.neighbors.weights(x, 1.1 * x[:6], 2, epsilon=0.5)
            case "attention":
                return softk.attention.attend(x, x[:6], 0.5 * x[:6], 2, epsilon=0.5)
            case "quantile":
                return softk.quantile(x, 0.3, epsilon=0.1)
            case "sort" | "rank":
                return getattr(softk, self.name)(x, epsilon=0.5)
            case "sorted_topk":
                return softk.sorted_topk(x, 2, epsilon=0.5).values
            case "transport":
                anchors = torch.arange(3, dtype=x.dtype)
                return softk.transport(x, anchors, torch.ones_like(anchors)).plan
        return getattr(softk, self.name)(x, 2, epsilon=0.5)


SELECTIONS = [
    "share",
    "fraction",
    "weights",
    "where",
    "hard",
    "neighbors",
    "attention",
    "quantile",
    "log_topk",
    "threshold",
]
PLANS = ["sort", "rank", "sorted_topk", "transport"]


@pytest.mark.full
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", [*SELECTIONS, *PLANS])
def test_exported_programs_hold_plain_operations(name: str, strict: bool, rng: Any) -> None:
    sizes = {"x": {0: torch.export.Dim("batch", min=8)}}
    program = torch.export.export(Select(name), (random(rng, 9, 7),), dynamic_shapes=sizes, strict=strict)
    check_operations(program)
    x = random(rng, 14, 7)
    assert_close(program.module()(x), Select(name)(x).numpy(), 1e-12)


# PyTorch's exporter copies what PyTorch has deprecated.
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["topk", *(pytest.param(name, marks=pytest.mark.full) for name in SELECTIONS)])
def test_onnx_runtime_computes_the_same(name: str, tmp_path: Path, rng: Any) -> None:
    """A program of ONNX, for a batch of any size."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    sizes, file = {"x": {0: torch.export.Dim("batch", min=8)}}, tmp_path / "program.onnx"
    x = random(rng, 9, 7).float()
    module = Select(name).eval()
    torch.onnx.export(module, (x,), dynamo=True, dynamic_shapes=sizes, optimize=False, verbose=False).save(file)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file, options)
    for rows in (9, 8, 31):
        x = random(rng, rows, 7).float()
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_close(found, module(x).numpy(), 1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_module_is_differentiated_right(strict: bool, rng: Any) -> None:
    """Whatever the exporter makes of the rule: first derivatives by value, and second derivatives in x."""
    values = closed_form.problem(rng, batch=(3,))
    program = torch.export.export(Layer(), tensors(values, grad=False), strict=strict)
    check_operations(program)
    module = program.module()
    other = closed_form.problem(rng, batch=(3,))
    given = tensors(other)
    out = module(*given)
    inner = {**other, "x": np.sin(other["x"])}
    mask = closed_form.topk(**inner).astype(float)
    assert_close(out.detach(), np.exp(mask), 1e-13)
    u = random(rng, 3, 7)
    found = torch.autograd.grad(out, given, u, create_graph=True)
    expected = closed_form.pullback("topk", u.numpy() * np.exp(mask), inner)
    expected["x"] *= np.cos(other["x"])
    for name, gradient in zip(ARGUMENTS, found, strict=True):
        assert_close(gradient.detach(), expected[name])
    w = random(rng, 3, 7)
    (found_twice,) = torch.autograd.grad((found[0] * w).sum(), given[0])
    (eager,) = torch.autograd.grad(Layer()(*given), given[0], u, create_graph=True)
    (expected_twice,) = torch.autograd.grad((eager * w).sum(), given[0])
    assert_close(found_twice, expected_twice, 1e-9)


def test_what_a_removed_item_weighs_is_nobodys_when_compiled() -> None:
    where = torch.tensor([True, True, False, True])
    x, weights = torch.tensor([0.3, 0.1, 0.2, -0.5]), torch.tensor([1.0, 2.0, torch.nan, 0.5])

    def f(x: Any, weights: Any) -> Any:
        return softk.topk(x, 1.5, weights=weights, where=where)

    assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x, weights), f(x, weights), 1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_hard_mask_has_the_soft_derivative(strict: bool, rng: Any) -> None:
    class Hard(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            x = torch.sin(x)
            return softk.topk(x, 2, epsilon=1.0, hard=True) * x

    x, u = random(rng, 3, 7).requires_grad_(), random(rng, 3, 7)
    module = torch.export.export(Hard(), (x.detach(),), strict=strict).module()
    out, wanted = module(x), Hard()(x)
    assert torch.equal(out, wanted)
    assert_close(torch.autograd.grad(out, x, u)[0], torch.autograd.grad(wanted, x, u)[0].numpy())


def test_export_with_dynamic_shapes(rng: Any) -> None:
    class Plain(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return softk.topk(x, 2, epsilon=0.7)

    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("items", min=8)}  # k is far from n
    program = torch.export.export(Plain(), (random(rng, 3, 9),), dynamic_shapes={"x": sizes})
    module = program.module()
    for shape in [(3, 9), (4, 12), (2, 30)]:
        x = torch.tensor(rng.standard_normal(shape), requires_grad=True)
        u = random(rng, *shape)
        module(x).backward(u)
        values = {"x": x.detach().numpy(), "k": np.asarray(2.0), "epsilon": np.asarray(0.7)}
        assert_close(x.grad, closed_form.pullback("topk", u.numpy(), values)["x"])


# --- tensors without values


@pytest.mark.parametrize("mode", ["meta", "fake"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_shapes_without_values(mode: str, dtype: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    kind = getattr(torch, dtype)

    def check(device: str) -> None:
        x = torch.empty(3, 7, dtype=kind, device=device, requires_grad=True)
        k = torch.empty(3, 1, dtype=kind, device=device, requires_grad=True)
        weights = torch.empty(7, dtype=kind, device=device, requires_grad=True)
        mask = softk.topk(x, k, weights=weights)
        level = softk.threshold(x, 2, axis=0, epsilon=torch.empty((), dtype=kind, device=device))
        middle = softk.quantile(x, torch.empty(4, dtype=kind, device=device), keepdims=True, epsilon=0.1)
        hard = softk.topk(x, 2, hard=True, where=torch.empty(3, 7, dtype=torch.bool, device=device))
        found = [(out.shape, out.dtype, out.device.type) for out in (mask, level, middle, hard)]
        shapes = [(3, 7), (7,), (4, 3, 1), (3, 7)]
        assert found == [(torch.Size(shape), kind, device) for shape in shapes]
        for given, gradient in zip((x, k, weights), torch.autograd.grad(mask.sum(), (x, k, weights)), strict=True):
            assert (gradient.shape, gradient.dtype) == (given.shape, given.dtype)

    if mode == "meta":
        check("meta")
    else:
        with FakeTensorMode():
            check("cpu")


@pytest.mark.parametrize("n", [7, 200])
def test_make_fx(n: int, rng: Any) -> None:
    """A trace of the operations, without and with the derivative in it."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x, y, u = (random(rng, n) for _ in range(3))

    def f(x: Any) -> Any:
        return softk.topk(x, 2, epsilon=0.7)

    assert_close(make_fx(f)(x)(y), f(y), 1e-14)
    found = make_fx(torch.func.grad(lambda x: (f(x) * u).sum()))(x)(y)
    values = {"x": y.numpy(), "k": np.asarray(2.0), "epsilon": np.asarray(0.7)}
    assert_close(found, closed_form.pullback("topk", u.numpy(), values)["x"])
