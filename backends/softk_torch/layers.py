"""The operator, and the attention made of it, as layers."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

import softk
import softk.attention

__all__ = ["TopK", "TopKAttention"]


class TopK(torch.nn.Module):
    """`softk.topk` as a module, whose k and epsilon may be learned.

    Parameters
    ----------
    k : float or tensor
        How many to select. A `torch.nn.Parameter` (of one value, or one a slice) is learned with the model's others;
        any other tensor is a buffer, which moves and is stored with the module. A tensor is held within [0, n] in the
        forward pass, where outside of it there is no answer.
    dim : int, optional
        The axis along which to select.
    mode : {"largest", "smallest"}, optional
        Which end to select.
    epsilon : float or tensor, optional
        Strength of the entropy, in the units of the scores, a parameter or a buffer as `k` is; it must stay positive
        (learn its logarithm where it might not).
    hard : bool, optional
        The exact indicator forward, the soft derivative backward. For a whole k.

    Raises
    ------
    TypeError, ValueError
        For `mode` and for a number of `k` or `epsilon`, as `softk.topk`; one above n is found when n is known.

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

    k: float | torch.Tensor
    epsilon: float | torch.Tensor

    def __init__(
        self,
        k: float | torch.Tensor,
        *,
        dim: int = -1,
        mode: Literal["largest", "smallest"] = "largest",
        epsilon: float | torch.Tensor = 0.1,
        hard: bool = False,
    ) -> None:
        super().__init__()
        _require(k, epsilon, mode=mode)
        if hard and not isinstance(k, torch.Tensor):
            softk.topk(_scores(max(math.ceil(k), 1)), k, hard=True)
        _hold(self, k=k, epsilon=epsilon)
        self.dim = dim
        self.mode: Literal["largest", "smallest"] = mode
        self.hard = hard

    def forward(
        self, x: torch.Tensor, *, weights: torch.Tensor | None = None, where: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The mask of the scores `x`; `weights` and `where` as for `softk.topk`."""
        k = self.k
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
    """`softk.attention.attend` as a module, whose k and epsilon may be learned, with dropout.

    It takes the place of `torch.nn.functional.scaled_dot_product_attention` and has no projections of its own.

    Parameters
    ----------
    k : float or tensor
        How many keys a query takes. A `torch.nn.Parameter` (of one value, or one a row of the weights) is learned with
        the model's others; any other tensor is a buffer, which moves and is stored with the module. A tensor is held
        at 0 or above in the forward pass.
    epsilon : float or tensor, optional
        Strength of the entropy, in the units of the scaled scores, a parameter or a buffer as `k` is; it must stay
        positive.
    dropout : float, optional
        The probability of each weight to be dropped, in training alone; the others are scaled up.
    scale : float, optional
        What the dot products are multiplied by; one over the root of the number of features by default.
    enable_gqa : bool, optional
        Several heads of the queries share one of the keys and values.

    Raises
    ------
    TypeError, ValueError
        For a number that is out of its range, as `softk.attention.attend`.

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

    k: float | torch.Tensor
    epsilon: float | torch.Tensor

    def __init__(
        self,
        k: float | torch.Tensor,
        *,
        epsilon: float | torch.Tensor = 0.1,
        dropout: float = 0.0,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be a probability, from 0 to 1, got {dropout!r}")
        _require(k, epsilon)
        if scale is not None:
            one = _scores(1)[:, None]
            softk.attention.attend(one, one, one, 1, scale=scale)
        _hold(self, k=k, epsilon=epsilon)
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
        """The values, mixed for each query.

        `attn_mask` is what a query may attend to, of bool, or what is added to the scaled scores, of floats;
        `is_causal` leaves the places up to its own.
        """
        masked = {} if attn_mask is None else {"where" if attn_mask.dtype == torch.bool else "bias": attn_mask}
        found: torch.Tensor = softk.attention.attend(
            query,
            key,
            value,
            self.k.clamp(min=0) if isinstance(self.k, torch.Tensor) else self.k,
            epsilon=self.epsilon,
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=self.enable_gqa,
            dropout=None if self.dropout == 0.0 else self._drop,
            **masked,
        )
        return found

    def _drop(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(weights, self.dropout, self.training)

    def extra_repr(self) -> str:
        parts = f"k={_show(self.k)}, epsilon={_show(self.epsilon)}, dropout={self.dropout}"
        parts += "" if self.scale is None else f", scale={self.scale}"
        return parts + (", enable_gqa=True" if self.enable_gqa else "")


def _scores(n: int) -> torch.Tensor:
    """Scores without values, to ask what softk says of other arguments."""
    return torch.empty(n, dtype=torch.float64, device="meta")


def _require(k: float | torch.Tensor, epsilon: float | torch.Tensor, mode: Any = "largest") -> None:
    """Raise for numbers that no call would take; how many scores there will be is not known yet."""
    number, strength = (1.0 if isinstance(value, torch.Tensor) else value for value in (k, epsilon))
    softk.topk(_scores(1), number, mode=mode, epsilon=strength, weights=_scores(1))


def _hold(module: torch.nn.Module, **values: float | torch.Tensor) -> None:
    """A parameter is learned, any other tensor goes with the module, and a number stays one."""
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
            module.register_buffer(name, value)
        else:
            setattr(module, name, value)


def _show(value: float | torch.Tensor) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    learned = isinstance(value, torch.nn.Parameter)
    if value.numel() == 1 and not value.is_meta:
        return f"{value.item():.4g}{' (learned)' if learned else ''}"
    return f"{'learned' if learned else 'tensor'}, shape {tuple(value.shape)}"
