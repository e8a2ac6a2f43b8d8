"""`softk.topk`, `softk.attention.attend` and `softk.sampling.subset` as modules."""

from __future__ import annotations

import math
from typing import Literal

import torch

import softk
import softk.attention
import softk.sampling
from softk._functions.signatures import explained_class

from .parameters import hold, require_dim, require_numbers, scores_of_size, show

__all__ = ["SubsetSampler", "TopK", "TopKAttention"]


@explained_class
class TopK(torch.nn.Module):
    """`softk.topk` as a module with optionally learnable k and epsilon.

    Parameters
    ----------
    k : float or tensor
        How many scores to select. A `torch.nn.Parameter` (one value, or one per slice) is trained with the model. Any
        other tensor is a buffer, which is moved and saved with the module. Without weights, a tensor is clamped to
        [0, n] in the forward pass, since the problem is infeasible outside.
    dim : int or tuple of int, optional
        The axis along which to select, or several of them with one budget.
    mode : {"largest", "smallest"}, optional
        Whether to select the largest or the smallest scores.
    epsilon : float or tensor, optional
        Strength of the entropy, in the units of the scores. A tensor is a parameter or a buffer, as for `k`. It must
        stay positive: learn its logarithm if it could become negative.
    hard : bool or "eval", optional
        The exact indicator in the forward pass, with the derivative of the soft mask. `k` must be a whole number, and
        weights are not supported. "eval" does so when the module evaluates, and is soft while it trains; a tensor `k`
        is then rounded to a whole number.

    Raises
    ------
    TypeError, ValueError
        As `softk.topk`, for an invalid `mode` and for numbers `k` and `epsilon`. A `k` above n is detected in the
        forward pass.

    Shape
    -----
    The output has the shape of the input; see `softk.topk`.

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

    Soft while it trains, exactly 2 ones when it evaluates:

    >>> layer = TopK(2, epsilon=0.5, hard="eval").eval()
    >>> layer(torch.tensor([0.2, 1.7, -0.5, 0.9]))
    tensor([0., 1., 0., 1.])
    """

    k: float | torch.Tensor
    epsilon: float | torch.Tensor

    def __init__(
        self,
        k: float | torch.Tensor,
        *,
        dim: int | tuple[int, ...] = -1,
        mode: Literal["largest", "smallest"] = "largest",
        epsilon: float | torch.Tensor = 0.1,
        hard: bool | Literal["eval"] = False,
    ) -> None:
        super().__init__()
        require_numbers(k, epsilon, mode=mode)
        if hard != "eval" and not isinstance(hard, bool):
            raise TypeError(f"hard must be True, False or 'eval', got {hard!r}")
        if hard and not isinstance(k, torch.Tensor) and k != math.floor(k):
            raise ValueError(f"k must be a whole number with hard={hard!r}, got {k!r}")
        hold(self, k=k, epsilon=epsilon)
        self.dim = dim
        self.mode: Literal["largest", "smallest"] = mode
        self.hard = hard

    def forward(
        self, x: torch.Tensor, *, weights: torch.Tensor | None = None, where: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The mask of the scores `x`; `weights` and `where` as for `softk.topk`."""
        require_dim(self.dim, x)
        k, hard = self.k, not self.training if self.hard == "eval" else self.hard
        if isinstance(k, torch.Tensor) and weights is None:
            axes = self.dim if isinstance(self.dim, tuple) else (self.dim,)
            k = k.clamp(0, math.prod(x.shape[axis] for axis in axes))
            if self.hard == "eval" and hard:
                k = k + (k.round() - k).detach()  # whole, with the derivative of k
        mask: torch.Tensor = softk.topk(
            x,
            k,
            axis=self.dim,
            mode=self.mode,
            epsilon=self.epsilon,
            weights=weights,
            where=where,
            hard=hard,
        )
        return mask

    def extra_repr(self) -> str:
        parts = f"k={show(self.k)}, dim={self.dim}, mode={self.mode!r}, epsilon={show(self.epsilon)}"
        return parts + (f", hard={self.hard!r}" if self.hard else "")


@explained_class
class TopKAttention(torch.nn.Module):
    """`softk.attention.attend` as a module with dropout and optionally learnable k and epsilon.

    It can replace `torch.nn.functional.scaled_dot_product_attention`, and has no projections of its own.

    Parameters
    ----------
    k : float or tensor
        How many keys a query attends to. A `torch.nn.Parameter` (one value, or one per row of the weights) is trained
        with the model. Any other tensor is a buffer, which is moved and saved with the module. A negative value in a
        tensor is clamped to 0 in the forward pass.
    epsilon : float or tensor, optional
        Strength of the entropy, in the units of the scaled scores. A tensor is a parameter or a buffer, as for `k`. It
        must stay positive.
    dropout : float, optional
        The probability with which a weight is set to 0 during training; the other weights are scaled up.
    scale : float, optional
        Factor of the dot products; by default one over the square root of the number of features.
    enable_gqa : bool, optional
        Grouped-query attention: several heads of the queries share a head of the keys and values.

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
        require_numbers(k, epsilon)
        if scale is not None:
            one = scores_of_size(1)[:, None]
            softk.attention.attend(one, one, one, 1, scale=scale)
        hold(self, k=k, epsilon=epsilon)
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
        """The attention output.

        A boolean `attn_mask` is True for the keys that a query may attend to. A floating-point `attn_mask` is added to
        the scaled scores. With `is_causal`, query i may attend only to the keys 0 to i.
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
        parts = f"k={show(self.k)}, epsilon={show(self.epsilon)}, dropout={self.dropout}"
        parts += "" if self.scale is None else f", scale={self.scale}"
        return parts + (", enable_gqa=True" if self.enable_gqa else "")


@explained_class
class SubsetSampler(torch.nn.Module):
    """`softk.sampling.subset` as a module with optionally learnable k and epsilon.

    Parameters
    ----------
    k : float or tensor
        How many items are drawn. A `torch.nn.Parameter` is trained with the model. Any other tensor is a buffer, as for
        `TopK`. A negative value in a tensor is clamped to 0 in the forward pass.
    dim : int, optional
        The axis of the items.
    epsilon : float or tensor, optional
        Strength of the entropy, in the units of the scores. A tensor is a parameter or a buffer, as for `k`.
    hard : bool, optional
        The exact indicator of the subset in the forward pass, with the derivative of the soft mask.

    Raises
    ------
    TypeError, ValueError
        As `softk.sampling.subset`, for numbers `k` and `epsilon` that are invalid for any scores.

    Shape
    -----
    The output has the shape of the noise, to which the scores broadcast.

    References
    ----------
    See `softk.sampling.subset`.

    Examples
    --------
    >>> import torch
    >>> from softk_torch import SubsetSampler
    >>> draw, generator = SubsetSampler(2, hard=True), torch.Generator().manual_seed(0)
    >>> scores = torch.zeros(5, requires_grad=True)
    >>> draw(scores, torch.rand(3, 5, generator=generator)).sum(dim=1)
    tensor([2., 2., 2.], grad_fn=<SumBackward1>)
    """

    k: float | torch.Tensor
    epsilon: float | torch.Tensor

    def __init__(
        self,
        k: float | torch.Tensor,
        *,
        dim: int = -1,
        epsilon: float | torch.Tensor = 0.1,
        hard: bool = False,
    ) -> None:
        super().__init__()
        one = scores_of_size(1)
        numbers = [1 if isinstance(value, torch.Tensor) else value for value in (k, epsilon)]
        softk.sampling.subset(one, numbers[0], one, epsilon=numbers[1], hard=hard)
        hold(self, k=k, epsilon=epsilon)
        self.dim = dim
        self.hard = hard

    def forward(self, scores: torch.Tensor, noise: torch.Tensor, *, where: torch.Tensor | None = None) -> torch.Tensor:
        """The masks of random subsets. `noise` are random numbers, uniform between 0 and 1, as of `torch.rand`."""
        require_dim(self.dim, noise, called="noise")
        k = self.k.clamp(min=0) if isinstance(self.k, torch.Tensor) else self.k
        mask: torch.Tensor = softk.sampling.subset(
            scores, k, noise, axis=self.dim, epsilon=self.epsilon, where=where, hard=self.hard
        )
        return mask

    def extra_repr(self) -> str:
        parts = f"k={show(self.k)}, dim={self.dim}, epsilon={show(self.epsilon)}"
        return parts + (f", hard={self.hard!r}" if self.hard else "")
