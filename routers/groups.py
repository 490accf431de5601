"""Choice limited to groups of experts (arXiv:2405.04434, sec. 2.2.2; arXiv:2412.19437, sec. 2.1.2).

Experts stand in equal groups (on a device each, as trained); a token's choices come from the best
few groups, so that it is sent to few devices.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from layers.names import check_positive
from routers.scores import top_indices


def check_groups(n_experts: int, top_k: int, n_groups: int, top_groups: int, least: int) -> None:
    """Raise unless the groups are equal and those kept hold enough experts.

    least: experts that a group must have for its score.
    """
    check_positive(n_groups=n_groups, top_groups=top_groups)
    if n_experts % n_groups:
        raise ValueError(f"n_experts={n_experts} do not split into n_groups={n_groups} equal ones")
    if top_groups > n_groups:
        raise ValueError(f"top_groups must be at most n_groups={n_groups}, got {top_groups}")
    size = n_experts // n_groups
    if top_groups < n_groups and size < least:
        raise ValueError(f"a group needs at least {least} experts, got {size}: use fewer n_groups")
    if top_k > top_groups * size:
        raise ValueError(
            f"top_k must be at most the {top_groups * size} experts of top_groups={top_groups} "
            f"groups, got {top_k}"
        )


def best(choice: Tensor) -> Tensor:
    """DeepSeek-V2's score of a group: its largest. choice: [T, G, E / G]. Returns [T, G]."""
    return choice.amax(-1)


def sum_of_two(choice: Tensor) -> Tensor:
    """DeepSeek-V3's score of a group: the sum of its two largest. As `best`."""
    return choice.topk(2, dim=-1).values.sum(-1)


def within_groups(
    choice: Tensor, n_groups: int, top_groups: int, score: Callable[[Tensor], Tensor]
) -> Tensor:
    """The scores to choose by, -inf outside a token's `top_groups` best groups.

    Not 0, as DeepSeek-V2's code has it: a score may be below that with a bias, or underflow to it.
    Of groups that score alike the lower index is kept. choice: [T, E], not differentiated.
    """
    if top_groups == n_groups:
        return choice
    grouped = choice.unflatten(-1, (n_groups, -1))  # [T, G, E / G]
    kept = top_indices(score(grouped), top_groups)  # [T, top_groups]
    out = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=choice.device)
    out = out.scatter(-1, kept, False)
    return grouped.masked_fill(out[..., None], -torch.inf).flatten(-2)
