"""What routers share: scores in float32, and a choice that repeats itself."""

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 4096  # scores up to which one sort beats K passes


def scores(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T in float32 (float64 for a float64 x), under autocast too.

    x: [T, D]; weight: [E, D]. Returns [T, E].
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return scores(x, weight)
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.float64):
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, weight = x.to(dtype), weight.to(dtype)
    return F.linear(x, weight)


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
