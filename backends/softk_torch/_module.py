"""The operator as a layer."""

from __future__ import annotations

from typing import Literal

import torch

import softk

__all__ = ["TopK"]


class TopK(torch.nn.Module):
    """`softk.topk` as a module, whose k and epsilon may be learned.

    Parameters
    ----------
    k : float or torch.nn.Parameter
        How many to select. A parameter (of one value, or one a slice) is learned with the model's others; it is
        held within [0, n] in the forward pass, where outside of it there is no answer.
    dim : int, optional
        The axis along which to select.
    mode : {"largest", "smallest"}, optional
        Which end to select.
    epsilon : float or torch.nn.Parameter, optional
        Strength of the entropy, in the units of the scores; a parameter must stay positive (learn its logarithm
        where it might not).
    hard : bool, optional
        The exact indicator forward, the soft derivative backward. For a whole k.

    Shape
    -----
    Input and output are of one shape; see `softk.topk`.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020.

    Examples
    --------
    >>> import torch
    >>> from softk_torch import TopK
    >>> layer = TopK(torch.nn.Parameter(torch.tensor(2.0)), epsilon=0.5)
    >>> mask = layer(torch.tensor([0.2, 1.7, -0.5, 0.9]))
    >>> mask[1].backward()
    >>> layer.k.grad is not None
    True
    """

    def __init__(
        self,
        k: float | torch.nn.Parameter,
        *,
        dim: int = -1,
        mode: Literal["largest", "smallest"] = "largest",
        epsilon: float | torch.nn.Parameter = 0.1,
        hard: bool = False,
    ) -> None:
        super().__init__()
        self.k = k
        self.dim = dim
        self.mode: Literal["largest", "smallest"] = mode
        self.epsilon = epsilon
        self.hard = hard

    def forward(
        self, x: torch.Tensor, *, weights: torch.Tensor | None = None, where: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The mask of the scores `x`; `weights` and `where` as for `softk.topk`."""
        k: float | torch.Tensor = self.k
        if isinstance(k, torch.Tensor) and weights is None:
            k = k.clamp(0, x.shape[self.dim])
        mask: torch.Tensor = softk.topk(
            x,
            k,
            axis=self.dim,
            mode=self.mode,
            epsilon=self.epsilon,
            weights=weights,
            where=where,
            hard=self.hard,
        )
        return mask

    def extra_repr(self) -> str:
        def show(value: float | torch.Tensor) -> str:
            if not isinstance(value, torch.Tensor):
                return repr(value)
            return f"{value.item():.4g} (learned)" if value.numel() == 1 else f"learned, shape {tuple(value.shape)}"

        parts = f"k={show(self.k)}, dim={self.dim}, mode={self.mode!r}, epsilon={show(self.epsilon)}"
        return parts + (", hard=True" if self.hard else "")
