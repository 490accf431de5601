"""Which assignments fit when every expert takes only so many (moe.md 4.5)."""

import torch
from torch import Tensor

from layers.dispatch import count_experts
from layers.replay import decided


def within_capacity(
    experts: Tensor, slots: Tensor, mask: Tensor | None = None, priority: Tensor | None = None
) -> Tensor:
    """Keep the first ceil(slots_e * real tokens) assignments of each expert.

    Args:
        experts: [T, K] int64, the chosen experts.
        slots: [E] float64, capacity per real token; inf for no limit.
        mask: [T] bool, True where a token is real; others keep nothing and take no slot.
        priority: [T, K], the largest stay; None: the first in token order, then in order of choice.

    Returns:
        [T, K] bool, True for what is kept.
    """
    n_tokens, n_experts = experts.shape[0], slots.shape[0]
    ids = experts if mask is None else experts.masked_fill(~mask[:, None], n_experts)
    real = n_tokens if mask is None else mask.sum()
    capacity = (slots * real - 1e-9).ceil()  # a product just above a whole number is that number
    capacity = torch.cat([capacity, capacity.new_zeros(1)])  # none for masked tokens

    flat = ids.flatten()  # [A]
    if priority is None:
        order = flat.argsort(stable=True)
    else:
        best_first = priority.detach().flatten().argsort(stable=True, descending=True)
        order = best_first[flat[best_first].argsort(stable=True)]
    counts = count_experts(ids, n_experts + 1)
    by_expert = flat[order]
    rank = torch.arange(flat.shape[0], device=flat.device) - (counts.cumsum(0) - counts)[by_expert]
    kept = torch.empty_like(flat, dtype=torch.bool).scatter_(0, order, rank < capacity[by_expert])
    return decided(kept.view_as(experts))
