"""DTensors and local shards over two and four processes, forward and backward, by value, and what is sent."""

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
import os, sys, warnings
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
import softk
import softk_torch.distributed
from softk_torch import TopK, dtensors

rank, file, case, world = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))
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

def refused(f, x, axis):
    try:
        f(distribute_tensor(x, mesh, [Shard(axis)]))
    except NotImplementedError as error:
        assert str(error).startswith("x must not be sharded along the selected axis for this function"), error
    else:
        raise AssertionError("it was not refused")

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
elif case == "selected axis":
    sent = []
    def counted(real):
        def call(values, *args, **kwargs):
            sent.append(sum(value.numel() for value in values) if isinstance(values, list) else values.numel())
            return real(values, *args, **kwargs)
        return call
    for name in ("all_reduce", "all_gather"):
        setattr(dist, name, counted(getattr(dist, name)))
    x = torch.randn(3, 2001)
    weights = torch.rand(2001) + 0.5
    with_where = lambda x, k: softk.topk(x, k, epsilon=0.3, where=torch.arange(2001) % 3 != 0)
    found = check(topk, Shard(1), x, torch.rand(3, 1) * 300 + 1, epsilon, weights)
    assert found.placements == (Shard(1),)
    assert found.to_local().shape == (3, 1001 - rank)
    check(topk, Shard(1), x, torch.tensor(40.3), torch.tensor(1e-3), weights, others=[None, None, None])
    check(with_where, Shard(1), x, torch.tensor(40.3))
    check(lambda x, k: softk.threshold(x, k, epsilon=0.3), Shard(1), x, torch.tensor(40.3))
    check(lambda x: softk.topk(x.round(), 40, hard=True), Shard(1), x)
    check(lambda x: softk.topk(x, 7, axis=0, mode="smallest"), Shard(0), x.mT)
    for k in (1, 40, 1999.5):
        sent.clear()
        softk.topk(distribute_tensor(x.float(), mesh, [Shard(1)]), k, epsilon=1e-3)
        assert len(sent) <= 24 and max(sent) <= 16 * 3, sent
    for f, others, exchanges in (
        (lambda x: softk.topk(x, 40), (), 1),
        (lambda x: softk.topk(x, 40, hard=True, where=torch.arange(2001) % 3 != 0), (), 1),
        (topk, (torch.tensor(40.3), epsilon, weights), 2),
        (lambda x, k, e: softk.threshold(x, k, epsilon=e), (torch.tensor(40.3), epsilon), 2),
    ):
        given = [distribute_tensor(x, mesh, [Shard(1)]), *(value.clone() for value in others)]
        found = f(*(value.requires_grad_() for value in given)).to_local().sum()
        sent.clear()
        found.backward()
        assert len(sent) == exchanges and max(sent) <= 25 * 3 * world, sent
    refused(lambda x: softk.log_topk(x, 2), x, 1)
    refused(lambda x: softk.quantile(x, 0.2, epsilon=0.1), x, 1)
    refused(lambda x: softk.sorted_topk(x, 2, axis=0), x, 0)
    own = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
    try:
        torch.autograd.grad(softk.topk(own, 2).full_tensor()[:, 0].sum(), own, create_graph=True)
    except NotImplementedError as error:
        assert "second derivatives over an axis that is sharded" in str(error), error
    else:
        raise AssertionError("it was not refused")
elif case == "local shards":
    cuts = {2: [0, 300, 1001], 4: [0, 300, 300, 999, 1001]}[world]  # one process may have nothing
    mine = slice(cuts[rank], cuts[rank + 1])
    x, u = torch.randn(2, 2, 1001)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        for weights in (None, torch.rand(2, 1001) + 0.5):
            for strength in (0.3, 1e-2)[: 3 - world // 2]:
                whole = [x, torch.tensor(40.3), torch.tensor(strength), weights]
                whole = [None if value is None else value.to(dtype, copy=True).requires_grad_() for value in whole]
                local = [
                    None if value is None else value.detach()[..., mine if value.ndim else ...].clone().requires_grad_()
                    for value in whole
                ]
                mask = softk_torch.distributed.topk(*local[:2], epsilon=local[2], weights=local[3])
                expected = softk.topk(*whole[:2], epsilon=whole[2], weights=whole[3])
                close(mask, expected[:, mine], rtol=0, atol=32 * torch.finfo(dtype).eps)
                mass = (mask if weights is None else mask * local[3]).double().sum(-1)
                dist.all_reduce(mass)
                assert (mass - whole[1].item()).abs().max() <= 16 * torch.finfo(dtype).eps * 40.3
                (mask * u[:, mine].to(dtype)).sum().backward()
                (expected * u.to(dtype)).sum().backward()
                for value, other in zip(local, whole):
                    if value is not None:
                        wanted = other.grad[..., mine if value.ndim else ...]
                        close(value.grad, wanted, rtol=0, atol=tolerance * float(other.grad.abs().max()))
    hard = softk_torch.distributed.topk(x[:, mine].round(), 30, hard=True)
    assert torch.equal(hard, softk.topk(x.round(), 30, hard=True)[:, mine])
    if world == 4:  # shards of the axis, replicas of them, and shards of the batch on one mesh
        mesh = init_device_mesh("cpu", (2, 2))
        for placements in ((Shard(1), Replicate()), (Shard(0), Shard(1)), (Shard(1), Shard(1))):
            given = distribute_tensor(x, mesh, placements).requires_grad_()
            own = x.clone().requires_grad_()
            found, expected = softk.topk(given, 40.3), softk.topk(own, 40.3)
            assert found.placements == placements
            close(found.full_tensor(), expected)
            expected.backward(u)
            found.backward(distribute_tensor(u, mesh, placements))
            close(given.grad.full_tensor(), own.grad)
elif case == "budget":
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.placement_types import _StridedShard

    whole = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1)).double()
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1)).double()
    model.load_state_dict(whole.state_dict())
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    scores, sharded = dict(whole.named_parameters()), dict(model.named_parameters())
    assert [value.to_local().numel() for value in sharded.values()][2:] == ([5, 1], [0, 0])[rank]  # uneven shards
    costs = {name: torch.tensor(1.0 + i).double().requires_grad_() for i, name in enumerate(scores)}
    costs["0.weight"] = torch.rand(5, 1).double().requires_grad_()  # sharded as the scores are
    where = {name: torch.rand(value.shape) < 0.9 for name, value in scores.items()}
    bars = {name: torch.randn_like(value) for name, value in scores.items()}

    def grown(found):
        "A loss that is linear in the masks, or in the threshold."
        if not isinstance(found, dict):
            return 1.7 * found
        return sum(gathered((value * spread(bars[name], value)).sum()) for name, value in found.items())

    def spread(value, like):
        return distribute_tensor(value, mesh, like.placements) if isinstance(like, DTensor) else value

    def gathered(value):
        return value.full_tensor() if isinstance(value, DTensor) else value

    def compare(f, own, other, *arguments):
        "f of two trees with the same values, forward and backward; f makes its result of the tree and the arguments."
        results = []
        for tree in (own, other):
            given = [
                {name: one.detach().clone().requires_grad_() for name, one in value.items()} if isinstance(value, dict)
                else value.detach().clone().requires_grad_() for value in arguments
            ]
            for value in tree.values():
                value.grad = None
            found = f(tree, *given)
            loss = gathered(grown(found))
            loss.backward()
            results.append((found, tree, *(value if isinstance(value, dict) else {"": value} for value in given)))
        expected, found = results
        if isinstance(found[0], dict):
            for name, value in found[0].items():
                assert isinstance(value, DTensor) == isinstance(other[name], DTensor)
                assert not isinstance(value, DTensor) or value.placements == other[name].placements
                close(gathered(value), expected[0][name])
        else:
            close(gathered(found[0]), expected[0])
        for tree, wanted in zip(found[1:], expected[1:]):
            for name, value in tree.items():
                true = wanted[name].grad
                if true is None:
                    assert value.grad is None, name
                else:
                    close(gathered(value.grad), true, rtol=0, atol=1e-11 * float(true.abs().max()))
        return found[0]

    k, e = torch.tensor(20.3).double(), torch.tensor(0.1).double()
    masks = compare(lambda tree, k, e: softk.budget.topk(tree, k, epsilon=e), scores, sharded, k, e)
    close(sum(value.full_tensor().sum() for value in masks.values()), k)
    compare(lambda tree, k, e, a: softk.budget.topk(tree, k, epsilon=e, weights=a), scores, sharded, k, e, costs)
    compare(lambda tree: softk.budget.topk(tree, 20, epsilon=1e-3, where=where, mode="smallest"), scores, sharded)
    compare(lambda tree: softk.budget.topk(tree, 20, hard=True), scores, sharded)
    compare(lambda tree, k, e: softk.budget.threshold(tree, k, epsilon=e), scores, sharded, k, e)
    # Some leaves are replicated, and some are ordinary tensors, the same on every process.
    mixed = dict(sharded)
    mixed["0.bias"] = distribute_tensor(scores["0.bias"].detach(), mesh, [Replicate()]).requires_grad_()
    mixed["2.weight"] = scores["2.weight"].detach().clone().requires_grad_()
    compare(lambda tree, k, e: softk.budget.topk(tree, k, epsilon=e), scores, mixed, k, e)
    for name, value in scores.items():  # along the last axis
        mixed[name] = distribute_tensor(value.detach(), mesh, [Shard(value.ndim - 1)]).requires_grad_()
    compare(lambda tree, k, e, a: softk.budget.topk(tree, k, epsilon=e, weights=a), scores, mixed, k, e, costs)
    # Ties go to the leaf that comes first, and in it to the first process.
    ties = {name: value.detach().round() for name, value in scores.items()}
    tied = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in ties.items()}
    for name, value in softk.budget.topk(tied, 20, hard=True).items():
        assert torch.equal(value.full_tensor(), softk.budget.topk(ties, 20, hard=True)[name])
    # The explicit derivative takes and returns trees of DTensors.
    costs = {name: value.detach() for name, value in costs.items()}
    out, pullback = softk.vjp(softk.budget.topk, tied, k, epsilon=e, weights=costs)
    _, wanted = softk.vjp(softk.budget.topk, ties, k, epsilon=e, weights=costs)
    found, wanted = pullback({name: spread(bars[name], value) for name, value in out.items()}), wanted(bars)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        pairs = [(found[name][one], value[one]) for one in value] if isinstance(value, dict) else [(found[name], value)]
        for own, other in pairs:
            close(gathered(own), other, rtol=0, atol=1e-11)
    halves = distribute_tensor(torch.ones(2), mesh, [Shard(0)])
    grid, strided = init_device_mesh("cpu", (2, 1)), [_StridedShard(0, split_factor=2), Shard(0)]
    strided = DTensor.from_local(torch.randn(4), grid, strided, run_check=False, shape=torch.Size([8]), stride=(1,))
    for message, call in (
        ("must not have strided shards", lambda: softk.budget.topk([strided], 2)),
        ("x must not be sharded along the selected axis", lambda: softk.topk(strided, 2)),
        ("least and most must be None", lambda: softk.budget.topk(sharded, 20, least=1)),
        ("must be sharded along its first axis with hard=True", lambda: softk.budget.topk(mixed, 20, hard=True)),
        ("k must have the same value on every process", lambda: softk.budget.topk(sharded, halves)),
    ):
        try:
            call()
        except NotImplementedError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)
elif case == "a lost process":
    if rank == 1:
        os._exit(0)
    try:
        softk_torch.distributed.topk(x, 2)
    except RuntimeError as error:
        print("done")
        os._exit(0)
    raise AssertionError("nothing was raised")
else:
    raise AssertionError(case)
dist.destroy_process_group()
print("done")
"""


@pytest.mark.parametrize(
    ("case", "world"),
    [
        ("batch", 2),
        ("selected axis", 2),
        ("local shards", 2),
        ("local shards", 4),
        ("budget", 2),
        ("a lost process", 2),
        pytest.param("functions", 2, marks=pytest.mark.full),
        pytest.param("compiled", 2, marks=pytest.mark.full),
    ],
)
def test_processes(case: str, world: int, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    setup = f"import sys\nsys.path[:0] = [{str(root)!r}, {str(root / 'backends')!r}]\n"
    command = [sys.executable, "-c", setup + PROCESS]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    given = [str(tmp_path / "store"), case, str(world)]
    processes = [subprocess.Popen([*command, str(rank), *given], **pipes) for rank in range(world)]
    try:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, text) in enumerate(zip(processes, printed, strict=True)):
        assert process.returncode == 0, text
        assert text.endswith("done\n") or (case, rank) == ("a lost process", 1)
