"""NDCG beside NeuralNDCG of its authors' package, allRank.

The package asks for a PyTorch of 2021, so `make` installs it without its dependencies. Its losses import modules that
read files, and do not use them. Empty modules stand in the places of those that are not installed.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from softk import losses

torch = pytest.importorskip("torch")


@pytest.fixture
def allrank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the package with the loss and with Sinkhorn's iteration."""
    pytest.importorskip("allrank", reason="allrank is not installed; make installs it")
    modules: dict[str, dict[str, Any]] = {
        "torchvision": {"transforms": ModuleType("torchvision.transforms")},
        "torchvision.transforms": {"Compose": object},
        "allrank.utils.file_utils": dict.fromkeys(("open_local_or_gs", "is_gs_path", "copy_file_to_local"), open),
    }
    for name, members in modules.items():
        empty = ModuleType(name)
        vars(empty).update(members)
        monkeypatch.setitem(sys.modules, name, empty)
    return importlib.import_module("allrank.models.losses.neuralNDCG")


@pytest.mark.parametrize(("temperature", "least"), [(1.0, 5e-6), (0.3, 1e-4), (0.1, 1e-4)])
def test_it_is_neural_ndcg_with_its_iteration_converged(
    allrank: Any, temperature: float, least: float, rng: Any
) -> None:
    """allRank computes in float32, and its 50 iterations are too few. With 20,000 it has softk's value."""
    scores, relevance = rng.standard_normal((8, 12)), rng.integers(0, 4, (8, 12))
    given = torch.tensor(scores, dtype=torch.float32), torch.tensor(relevance, dtype=torch.float32)
    own = allrank.sinkhorn_scaling
    ours = losses.ndcg(scores, relevance, epsilon=temperature)

    def theirs() -> Any:
        rows = zip(*given, strict=True)
        return np.asarray([-allrank.neuralNDCG(x[None], y[None], temperature=temperature).item() for x, y in rows])

    stopped = theirs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allrank, "sinkhorn_scaling", lambda plan, mask, **_: own(plan, mask, tol=1e-7, max_iter=20_000))
        converged = theirs()
    assert np.abs(converged - ours).max() < 2e-6
    assert least < np.abs(stopped - ours).max() < 1e-2
