"""What routers share: scores in float32, and a choice that repeats itself."""

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 4096  # scores up to which one sort beats K passes


def score_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for a float64 input: the dtype of everything that decides a route."""
    return torch.promote_types(x.dtype, torch.float32)


def scores(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T, never in less than float32, under autocast too.

    x: [T, D]; weight: [E, D]. Returns [T, E].
    """
    dtype = score_dtype(x)
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(x.to(dtype), weight.to(dtype))
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype))


def top_indices(scores: Tensor, k: int) -> Tensor:
    """The k largest of each row, best first; of equals, the lower index first.

    `torch.topk` promises no order among equals, and equal logits are common (moe.md 2).
    scores: [T, E]. Returns [T, k] int64.
    """
    scores = scores.detach()
    if scores.numel() <= SMALL:
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    rest, best = scores.clone(), []
    for place in range(k):
        best.append(rest.max(dim=-1, keepdim=True).indices)  # the first of equals
        if place + 1 < k:
            rest.scatter_(-1, best[-1], -torch.inf)
    return torch.cat(best, dim=-1)
