"""The functions of `softk.losses` as modules, with an optionally learnable epsilon."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from softk import losses
from softk._functions.signatures import explained_class

from .parameters import hold, show

__all__ = ["NDCG", "AveragePrecision", "Precision", "Recall", "ReciprocalRank", "Spearman", "TopKCrossEntropy"]

Number = float | torch.Tensor
Reduction = Literal["mean", "sum", "none"]


class _Criterion(torch.nn.Module):
    """A function of scores and labels. Its options are attributes; their tensors are parameters or buffers."""

    function: Callable[..., torch.Tensor]

    def __init__(self, *, dim: int, epsilon: Number, reduction: Reduction, **options: Any) -> None:
        super().__init__()
        self.options = (*options, "epsilon")
        hold(self, **options, epsilon=epsilon)
        self.dim = dim
        self.reduction = reduction
        # A tensor may be out of its range later, and then its lists are NaN. Other options are checked here.
        numbers = {name: 1 if isinstance(value, torch.Tensor) else value for name, value in self.settings().items()}
        empty = torch.zeros(0, 1, dtype=torch.float64, device="cpu")  # without a list there is nothing to solve
        self.function(empty, empty, reduction=reduction, **numbers)

    def settings(self) -> dict[str, Any]:
        """The options of the function."""
        return {name: getattr(self, name) for name in self.options}

    def forward(self, scores: torch.Tensor, labels: torch.Tensor, *, where: torch.Tensor | None = None) -> torch.Tensor:
        """The value of the lists of `scores`, with their relevance, targets or labels; `where` as for the function."""
        return self.function(scores, labels, axis=self.dim, where=where, reduction=self.reduction, **self.settings())

    def extra_repr(self) -> str:
        parts = [f"{name}={show(value)}" for name, value in self.settings().items()]
        return ", ".join([*parts, f"dim={self.dim}", f"reduction={self.reduction!r}"])


class _AtK(_Criterion):
    """A metric of the k best items."""

    def __init__(
        self,
        k: Number | Sequence[float],
        *,
        dim: int = -1,
        epsilon: Number = 0.1,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(k=k, dim=dim, epsilon=epsilon, reduction=reduction)


class _ByRank(_Criterion):
    """A metric of the whole ranking."""

    def __init__(self, *, dim: int = -1, epsilon: Number = 0.1, reduction: Reduction = "mean") -> None:
        super().__init__(dim=dim, epsilon=epsilon, reduction=reduction)


@explained_class
class NDCG(_Criterion):
    """`softk.losses.ndcg` as a module. It is to be maximized.

    Parameters
    ----------
    k : int, optional
        The number of ranks that count; all by default.
    dim : int, optional
        The axis of the items.
    epsilon : float or tensor, optional
        Strength of the entropy, in the units of the scores. A `torch.nn.Parameter` (one value, or one per list) is
        trained with the model. Any other tensor is a buffer, which is moved and saved with the module.
    gains : {"exp2", "linear"}, optional
        The gain of an item, ``2**relevance - 1`` or its relevance.
    reduction : {"mean", "sum", "none"}, optional
        The mean or the sum over the lists, or one value per list.

    Raises
    ------
    TypeError, ValueError
        As `softk.losses.ndcg`, for a number or a word that is invalid for any scores.

    Shape
    -----
    The scores have any shape, and the relevance one that broadcasts to it. The output has no axes, or with
    ``reduction="none"`` the shape of the scores without `dim`.

    References
    ----------
    See `softk.losses.ndcg`.

    Examples
    --------
    >>> import torch
    >>> from softk_torch import NDCG
    >>> scores = torch.tensor([[0.2, 1.7, -0.5, 0.9]], requires_grad=True)
    >>> value = NDCG(k=2, epsilon=0.5)(scores, torch.tensor([[0, 1, 0, 2]]))
    >>> (-value).backward()
    >>> scores.grad.argmin().item()
    3
    """

    function = staticmethod(losses.ndcg)

    def __init__(
        self,
        k: int | None = None,
        *,
        dim: int = -1,
        epsilon: Number = 0.1,
        gains: Literal["exp2", "linear"] = "exp2",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(k=k, gains=gains, dim=dim, epsilon=epsilon, reduction=reduction)


@explained_class
class Recall(_AtK):
    """`softk.losses.recall` as a module. It is to be maximized.

    Parameters
    ----------
    k : number, tensor, or tuple of numbers
        How many items are selected. A tensor is a parameter or a buffer, as `epsilon` for `NDCG`. A tuple gives one
        value for each of its numbers.
    dim, epsilon, reduction
        As for `NDCG`.

    Raises
    ------
    TypeError, ValueError
        As `softk.losses.recall`, for a number or a word that is invalid for any scores.

    Shape
    -----
    As for `NDCG`. For several k, the first axis of the output is theirs.

    References
    ----------
    See `softk.losses.recall`.

    Examples
    --------
    >>> import torch
    >>> from softk_torch import Recall
    >>> Recall((1, 2), epsilon=0.01)(torch.tensor([0.2, 1.7, -0.5, 0.9]), torch.tensor([1, 1, 0, 0]))
    tensor([0.5000, 0.5000])
    """

    function = staticmethod(losses.recall)


@explained_class
class Precision(_AtK):
    """`softk.losses.precision` as a module. It is to be maximized.

    Parameters
    ----------
    k, dim, epsilon, reduction
        As for `Recall`.

    Raises
    ------
    TypeError, ValueError
        As `Recall`.

    Shape
    -----
    As for `Recall`.

    References
    ----------
    See `softk.losses.precision`.

    Examples
    --------
    >>> import torch
    >>> from softk_torch import Precision
    >>> Precision((1, 2), epsilon=0.01)(torch.tensor([0.2, 1.7, -0.5, 0.9]), torch.tensor([1, 1, 0, 0]))
    tensor([1.0000, 0.5000])
    """

    function = staticmethod(losses.precision)


@explained_class
class AveragePrecision(_ByRank):
    """`softk.losses.average_precision` as a module. It is to be maximized.

    Parameters
    ----------
    dim, epsilon, reduction
        As for `NDCG`.

    Raises
    ------
    TypeError, ValueError
        As `NDCG`.

    Shape
    -----
    As for `NDCG`.

    References
    ----------
    See `softk.losses.average_precision`.

    Examples
    --------
    >>> import torch
    >>> from softk_torch import AveragePrecision
    >>> AveragePrecision(epsilon=0.01)(torch.tensor([0.2, 1.7, -0.5, 0.9]), torch.tensor([1, 1, 0, 0]))
    tensor(0.8333)
    """

    function = staticmethod(losses.average_precision)


@explained_class
class ReciprocalRank(_ByRank):
    """`softk.losses.reciprocal_rank` as a module. It is to be maximized.

    Parameters
    ----------
    dim, epsilon, reduction
        As for `NDCG`.

    Raises
    ------
    TypeError, ValueError
        As `NDCG`.

    Shape
    -----
    As for `NDCG`.

    References
    ----------
    See `softk.losses.reciprocal_rank`.

    Examples
    --------
    >>> import torch
    >>> from softk_torch import ReciprocalRank
    >>> ReciprocalRank(epsilon=0.01)(torch.tensor([0.2, 1.7, -0.5, 0.9]), torch.tensor([1, 0, 0, 1]))
    tensor(0.5000)
    """

    function = staticmethod(losses.reciprocal_rank)


@explained_class
class Spearman(_ByRank):
    """`softk.losses.spearman` as a module. It is to be maximized.

    Parameters
    ----------
    dim, epsilon, reduction
        As for `NDCG`.

    Raises
    ------
    TypeError, ValueError
        As `NDCG`.

    Shape
    -----
    As for `NDCG`, with targets in place of the relevance.

    References
    ----------
    See `softk.losses.spearman`.

    Examples
    --------
    >>> import torch
    >>> from softk_torch import Spearman
    >>> Spearman(epsilon=0.01)(torch.tensor([0.2, 1.7, -0.5, 0.9]), torch.tensor([1, 2, 0, 3]))
    tensor(0.8000)
    """

    function = staticmethod(losses.spearman)


@explained_class
class TopKCrossEntropy(_Criterion):
    """`softk.losses.cross_entropy` as a module. It is to be minimized.

    It can replace `torch.nn.CrossEntropyLoss` where a label is to be among the k best scores.

    Parameters
    ----------
    k : number, tensor, or mapping
        How many items are selected. A tensor is a parameter or a buffer, as `epsilon` for `NDCG`. A mapping
        ``{k: probability}`` is a distribution over several k.
    dim, epsilon, reduction
        As for `NDCG`.
    complement : bool, optional
        Add the terms of the items that are not labels.

    Raises
    ------
    TypeError, ValueError
        As `softk.losses.cross_entropy`, for a number or a word that is invalid for any scores.

    Shape
    -----
    The scores have any shape. The labels have its shape, or, as integers, its shape without `dim`. The output is that
    of `NDCG`.

    References
    ----------
    See `softk.losses.cross_entropy`.

    Examples
    --------
    >>> import torch
    >>> from softk_torch import TopKCrossEntropy
    >>> loss = TopKCrossEntropy({1: 0.5, 5: 0.5}, epsilon=0.5)
    >>> scores = torch.linspace(-1, 1, 20).sin().reshape(2, 10).requires_grad_()
    >>> loss(scores, torch.tensor([2, 7])).backward()
    >>> scores.grad.argmin(dim=1).tolist()
    [2, 7]
    """

    function = staticmethod(losses.cross_entropy)

    def __init__(
        self,
        k: Number | Mapping[float, float],
        *,
        dim: int = -1,
        epsilon: Number = 0.1,
        complement: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(k=k, complement=complement, dim=dim, epsilon=epsilon, reduction=reduction)
