"""The operator, and the attention made of it, as layers."""

from __future__ import annotations

from typing import Literal

import torch

import softk
import softk.attention

__all__ = ["TopK", "TopKAttention"]


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
        parts = f"k={_show(self.k)}, dim={self.dim}, mode={self.mode!r}, epsilon={_show(self.epsilon)}"
        return parts + (", hard=True" if self.hard else "")


class TopKAttention(torch.nn.Module):
    """`softk.attention.topk_attention` as a module, whose k and epsilon may be learned, with dropout.

    It takes the place of `torch.nn.functional.scaled_dot_product_attention` and has no projections of its own.

    Parameters
    ----------
    k : float or torch.nn.Parameter
        How many keys a query takes. A parameter (of one value, or one a row of the weights) is learned with the model's
        others, and held at 0 or above in the forward pass.
    epsilon : float or torch.nn.Parameter, optional
        Strength of the entropy, in the units of the scaled scores; a parameter must stay positive.
    dropout : float, optional
        The probability of each weight to be dropped, in training alone; the others are scaled up.
    scale : float, optional
        What the dot products are multiplied by; one over the root of the number of features by default.
    enable_gqa : bool, optional
        Several heads of the queries share one of the keys and values.

    Shape
    -----
    `query` (..., L, E), `key` (..., S, E), `value` (..., S, V); the result (..., L, V).

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, for the mask; Vaswani et al., "Attention Is
    All You Need", NeurIPS 2017, for what it masks.

    Examples
    --------
    >>> import torch
    >>> from softk_torch import TopKAttention
    >>> attend = TopKAttention(torch.nn.Parameter(torch.tensor(2.0)), epsilon=0.5)
    >>> x = torch.linspace(-1, 1, 30).sin().reshape(2, 5, 3)
    >>> out = attend(x, x, x, is_causal=True)
    >>> out.shape
    torch.Size([2, 5, 3])
    >>> out[:, -1].sum().backward()
    >>> attend.k.grad is not None
    True
    """

    def __init__(
        self,
        k: float | torch.nn.Parameter,
        *,
        epsilon: float | torch.nn.Parameter = 0.1,
        dropout: float = 0.0,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be a probability, from 0 to 1, got {dropout!r}")
        self.k = k
        self.epsilon = epsilon
        self.dropout = dropout
        self.scale = scale
        self.enable_gqa = enable_gqa

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """The values, mixed for each query; `attn_mask` and `is_causal` as for torch's own attention."""
        found: torch.Tensor = softk.attention.topk_attention(
            query,
            key,
            value,
            self.k.clamp(min=0) if isinstance(self.k, torch.Tensor) else self.k,
            epsilon=self.epsilon,
            mask=attn_mask,
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
            dropout=None if self.dropout == 0.0 else self._drop,
        )
        return found

    def _drop(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(weights, self.dropout, self.training)

    def extra_repr(self) -> str:
        parts = f"k={_show(self.k)}, epsilon={_show(self.epsilon)}, dropout={self.dropout}"
        parts += "" if self.scale is None else f", scale={self.scale}"
        return parts + (", enable_gqa=True" if self.enable_gqa else "")


def _show(value: float | torch.Tensor) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"{value.item():.4g} (learned)" if value.numel() == 1 else f"learned, shape {tuple(value.shape)}"
