"""A control: experts at random, nothing learned (as THOR's in training, arXiv:2110.04260)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, Routing, WeightCost
from routers.scores import check_sizes, top_indices

# Odd 64-bit constants of splitmix64 (doi 10.1145/2660193.2660195), as signed numbers
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


@dataclass(frozen=True, kw_only=True)
class RandomRouterConfig:
    """Sizes of a random choice."""

    d_model: int
    n_experts: int = 8
    top_k: int = 2
    n_routes: int | None = None  # experts of all kinds, where there are several; None: n_experts

    def __post_init__(self) -> None:
        check_sizes(self.d_model, self.total, self.top_k)

    @property
    def total(self) -> int:
        """What is chosen from."""
        return self.n_experts if self.n_routes is None else self.n_routes

    def cost(self) -> Cost:
        """One token's cost: integer work alone."""
        work = 3 * self.d_model + 12 * self.total
        return Cost((WeightCost(name="bits", role="router", params=0, other_flops=work),))


class RandomRouter(nn.Module):
    """k experts drawn by the bits of x, all equally likely, weight 1 / k each. Has no losses.

    Any other x, by a single bit, draws anew; the same x draws the same, in training and
    evaluation. No generator is read, so recomputing or evaluating changes no run.
    """

    def __init__(self, config: RandomRouterConfig):
        super().__init__()
        self.config = config

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> Routing:
        """x: [T, D]. carry and mask are not read; logits are 0: no expert is preferred."""
        c = self.config
        bits = (x.detach().float() + 0.0).view(torch.int32).long()  # [T, D]; -0 is 0
        odd = 2 * torch.arange(c.d_model, device=x.device) + 1
        key = mixed(bits * mixed(odd * GOLDEN)).sum(-1, keepdim=True)  # [T, 1]
        draws = mixed(key + torch.arange(1, c.total + 1, device=x.device) * GOLDEN)  # [T, E]
        experts = top_indices(draws.double(), c.top_k)
        logits = torch.zeros_like(draws, dtype=torch.promote_types(x.dtype, torch.float32))
        return Routing(experts, torch.full_like(logits[:, : c.top_k], 1 / c.top_k), logits, {})


def mixed(keys: Tensor) -> Tensor:
    """The finaliser of splitmix64: every bit of a result hangs on every bit of its key. int64."""
    for shift, factor in ((30, MIX[0]), (27, MIX[1])):
        keys = (keys ^ ((keys >> shift) & (2 ** (64 - shift) - 1))) * factor
    return keys ^ ((keys >> 31) & (2**33 - 1))
