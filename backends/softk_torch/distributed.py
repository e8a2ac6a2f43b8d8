"""The soft top-k of scores that are spread over processes, as ordinary tensors.

DTensors go through `softk.topk` itself.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist

from softk._functions.arguments import Slices
from softk._functions.call import Call, operator_from
from softk._functions.checks import check_flag, check_mass, check_mode, check_temperature, require_whole
from softk._reference.threshold.split import in_pieces

__all__ = ["topk"]


@operator_from
def topk(
    x: torch.Tensor,
    /,
    k: float | torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    axis: int | tuple[int, ...] = -1,
    mode: Literal["largest", "smallest"] = "largest",
    epsilon: float | torch.Tensor = 0.1,
    weights: torch.Tensor | None = None,
    where: torch.Tensor | None = None,
    hard: bool = False,
) -> Call[torch.Tensor]:
    """Soft top-k along an axis whose scores are spread over the processes of a group.

    Every process passes its own part and gets its own part of the mask, which sums to `k` over all processes. The
    scores are not sent: the processes exchange a few numbers per slice. For the mask they do so at most 24 times, or 27
    times with `weights` or `hard`, and at most twice for the gradients. Every process must call it.

    Parameters
    ----------
    x : tensor
        The scores of this process. The sizes along `axis` may differ between processes, and be 0; the other sizes are
        the same.
    k : number or tensor
        How many scores to select in all, as for `softk.topk`: the same on every process. If it exceeds the number of
        scores, the mask is NaN.
    group : torch.distributed.ProcessGroup, optional
        The processes. By default all of them.
    axis, mode, epsilon, weights, where, hard
        As for `softk.topk`. An epsilon is the same on every process; weights and where are those of the scores `x`.
        Ties go to the process with the lowest rank.

    Returns
    -------
    tensor
        The mask of the scores `x`.

    Raises
    ------
    TypeError, ValueError
        As `softk.topk`.
    NotImplementedError
        For a second derivative.

    Notes
    -----
    The derivatives are those of the sum of the losses of all processes: every process passes the cotangent of its own
    part. The gradients of `k` and `epsilon` are the whole ones, and the same on every process.

    References
    ----------
    Xie et al., "Differentiable Top-k with Optimal Transport", NeurIPS 2020, sections 3.1 and 3.2.

    Examples
    --------
    >>> import torch
    >>> import torch.distributed as dist
    >>> import softk_torch.distributed
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> softk_torch.distributed.topk(torch.tensor([0.2, 1.7, -0.5, 0.9]), 2, epsilon=0.5)
    tensor([0.1956, 0.9899, 0.0146, 0.7999])
    >>> dist.destroy_process_group()
    """
    check_flag("hard", hard)
    slices = Slices(x, axis, smallest=check_mode(mode), joint=True, k=k, epsilon=epsilon, weights=weights, where=where)
    k = check_mass(slices.xp, k, slices.n, slices.working, True)  # only the solver knows how many scores there are
    check_temperature(slices.xp, epsilon, slices.working)
    if hard:
        require_whole(k, weights, k)
    arguments = {
        "x": slices.scores(narrow=True),
        "k": slices.per_slice("k", k),
        "epsilon": slices.per_slice("epsilon", epsilon, scale=0.5),
        "weights": slices.per_item("weights", weights),
        "where": slices.kept(where),
    }
    members: Any = dist.group.WORLD if group is None else group
    primitive = in_pieces("hard_mask" if hard else "mask", (members.group_name,))
    return Call(slices.backend, primitive, {"ranks": None}, arguments, (slices.like_scores(narrow=True),))
