"""DTensors over two processes: shards of the batch and replicas, forward and backward, by value."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch has no gloo"
)

PROCESS = """
import sys, warnings
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
import softk
from softk_torch import TopK

rank, file, case = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
close = torch.testing.assert_close

def check(f, placement, *given, others=None, dtype=torch.float64):
    "What f and its gradients are of DTensors and of the tensors that they hold, x first."
    wanted = [torch.as_tensor(value, dtype=dtype).requires_grad_() for value in given]
    others = [Replicate()] * (len(given) - 1) if others is None else others
    pairs = zip(wanted, [placement, *others], strict=True)
    held = [
        value.detach().clone().requires_grad_() if place is None else
        distribute_tensor(value.detach(), mesh, [place]).requires_grad_()
        for value, place in pairs
    ]
    expected, found = f(*wanted), f(*held)
    u = torch.randn_like(expected)
    assert isinstance(found, DTensor), type(found)
    close(found.full_tensor(), expected)
    expected.backward(u)
    found.backward(distribute_tensor(u, mesh, [Replicate()]).redistribute(mesh, found.placements))
    for own, other in zip(wanted, held, strict=True):
        close(other.grad.full_tensor() if isinstance(other.grad, DTensor) else other.grad, own.grad)
    return found

x, k = torch.randn(5, 7), torch.rand(5, 1) * 3 + 1  # three rows for one process, two for the other
weights, epsilon = torch.rand(7) + 0.5, torch.tensor(0.7)
topk = lambda x, k, e, a: softk.topk(x, k, epsilon=e, weights=a)

if case == "batch":
    found = check(topk, Shard(0), x, k, epsilon, weights)
    assert found.placements == (Shard(0),)  # nothing was gathered
    assert found.to_local().shape == (3 - rank, 7)
    check(topk, Replicate(), x, k, epsilon, weights)
    check(topk, Shard(0), x, k, epsilon, weights, others=[Shard(0), Replicate(), Shard(0)])
    check(topk, Shard(0), x, k, epsilon, weights, others=[None, None, None])  # ordinary tensors: the same everywhere
    check(topk, Replicate(), x, k, epsilon, weights, others=[Shard(0), Replicate(), Replicate()])
    check(lambda x: softk.topk(x, 2, axis=0, mode="smallest", epsilon=0.7), Shard(1), x)
    check(lambda x: softk.topk(x, 2, hard=True, where=torch.arange(7) != 3), Shard(0), x)
    check(lambda x: softk.topk(x.reshape(5, 7, 1) * x.reshape(5, 1, 7), 2), Shard(0), x)
    partial = DTensor.from_local(x / 2, mesh, [Partial()])
    close(softk.topk(partial, 2).full_tensor(), softk.topk(x, 2))
elif case == "functions":
    check(lambda x: softk.log_topk(x, 2), Shard(0), x)
    check(lambda x, e: softk.threshold(x, 2, epsilon=e), Shard(0), x, epsilon)
    check(lambda x: softk.threshold(x, 2, axis=0, keepdims=True), Shard(1), x)
    check(lambda x, q: softk.quantile(x, q, epsilon=0.1), Shard(0), x, torch.tensor(0.3))
    check(lambda x: softk.sorted_topk(x, 2, epsilon=0.5).values, Shard(0), x)
    check(lambda x: softk.sorted_topk(x, 2, epsilon=0.5).assignment, Replicate(), x)
    check(lambda x: softk.sort(x, epsilon=0.5), Shard(0), x)
    check(lambda x: softk.rank(x, epsilon=0.5), Shard(0), x)
    anchors, marginals = torch.arange(3.0).double(), torch.ones(3).double()
    check(lambda x: softk.transport(x, anchors, marginals).plan, Shard(0), x)
    points = torch.randn(4, 6, 3)
    check(lambda q: softk.neighbors.weights(q, 1.1 * q.detach(), 2), Shard(0), points)
    check(lambda q: softk.attention.attend(q, q, q, 2), Shard(0), points)
    layer = TopK(torch.nn.Parameter(torch.tensor(2.5)))
    for placement in (Shard(0), Replicate()):
        layer.zero_grad()
        layer(distribute_tensor(x, mesh, [placement]))[:, 0].sum().full_tensor().backward()
        found = layer.k.grad.clone()
        layer.zero_grad()
        layer(x)[:, 0].sum().backward()
        close(found, layer.k.grad)
elif case == "compiled":
    given = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    f = torch.compile(lambda x: softk.topk(x, 2), fullgraph=True, backend="aot_eager")
    own, u = x.clone().requires_grad_(), torch.randn(5, 7)
    found, expected = f(given), softk.topk(own, 2)
    close(found.full_tensor(), expected)
    expected.backward(u)
    found.backward(distribute_tensor(u, mesh, [Shard(0)]))
    close(given.grad.full_tensor(), own.grad)
else:
    for f in (softk.topk, softk.log_topk, softk.threshold, softk.sorted_topk):
        for axis in (0, 1):
            given = distribute_tensor(x, mesh, [Shard(axis)])
            try:
                f(given, 2, axis=axis)
            except NotImplementedError as error:
                assert str(error).startswith("x must not be sharded along the selected axis"), error
            else:
                raise AssertionError("it was not refused")
dist.destroy_process_group()
print("done")
"""


@pytest.mark.parametrize(
    "case",
    [
        "batch",
        "selected axis",
        pytest.param("functions", marks=pytest.mark.full),
        pytest.param("compiled", marks=pytest.mark.full),
    ],
)
def test_two_processes(case: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    setup = f"import sys\nsys.path[:0] = [{str(root)!r}, {str(root / 'backends')!r}]\n"
    command = [sys.executable, "-c", setup + PROCESS]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path / "store"), case], **pipes) for rank in range(2)]
    try:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == 0, text
        assert text.endswith("done\n")
