"""What routers share: scores in float32, and a choice that repeats itself."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.base import WeightCost
from layers.names import check_positive
from layers.replay import decided

INIT_STD = 0.02  # never zeros: equal logits would route every token alike
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
    """A router's choice: `largest` of scores [T, E], recorded or replayed (`layers.replay`)."""
    return decided(largest(scores, k), scores.shape[-1])


def largest(scores: Tensor, k: int) -> Tensor:
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


def draw_normal(weight: Tensor) -> None:
    """Normal with std 0.02: flaxformer's, OLMoE's, `initializer_range` of most (moe.md 2)."""
    nn.init.normal_(weight, std=INIT_STD)


def draw_truncated(weight: Tensor) -> None:
    """Normal with std 0.02, cut at three deviations: VersatileFFN's (arXiv:2512.14531)."""
    nn.init.trunc_normal_(weight, std=INIT_STD, a=-3 * INIT_STD, b=3 * INIT_STD)


def draw_scaled(weight: Tensor) -> None:
    """Truncated normal of variance 0.1 / fan_in, cut at two deviations (arXiv:2101.03961, 2.4)."""
    std = math.sqrt(0.1 / weight.shape[-1])
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def check_sizes(d_model: int, n_experts: int, top_k: int) -> None:
    """Raise unless 1 <= top_k <= n_experts and there is a width."""
    check_positive(d_model=d_model, n_experts=n_experts, top_k=top_k)
    if top_k > n_experts:
        raise ValueError(f"top_k must be at most n_experts={n_experts}, got {top_k}")


def check_learns(top_k: int, n_experts: int, rule: str, instead: str) -> None:
    """Refuse weights that are 1 for a single choice, whatever the logits are (moe.md 2).

    rule: what makes them so; instead: another way.
    """
    if top_k == 1 and n_experts > 1:
        raise ValueError(
            f"top_k=1 with {rule} makes every weight 1, so the task would send the router no "
            f"gradient: {instead} top_k >= 2"
        )


def matrix_cost(name: str, d_model: int, n_routes: int, other_flops: float) -> WeightCost:
    """A token's cost of one float32 matrix of a router and what is done with its product."""
    n = d_model * n_routes
    return WeightCost(
        name=name, role="router", params=n, flops=2 * n, other_flops=other_flops, bits=32
    )
