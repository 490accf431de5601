"""SPT's router of blocks: the k largest sigmoids, not renormalised (arXiv:2312.10365)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, Routing, WeightCost
from layers.names import check_choice
from routers.scores import check_sizes, draw_normal, matrix_cost, scores, top_indices

WEIGHTINGS = ("twice", "one")


@dataclass(frozen=True, kw_only=True)
class SPTRouterConfig:
    """Sizes of SPT's router, and what a chosen block's weight is."""

    d_model: int
    n_experts: int = 4  # blocks
    top_k: int = 2
    weighting: str = "twice"  # twice: 2 sigmoid(l), 1 where even; one: 1, and nothing is learned

    def __post_init__(self) -> None:
        check_sizes(self.d_model, self.n_experts, self.top_k)
        check_choice("weighting of spt", self.weighting, WEIGHTINGS)

    def cost(self) -> Cost:
        """One token's cost: one float32 matrix, its bias, the sigmoid and K passes of choosing."""
        n = self.n_experts
        bias = WeightCost(name="logit_bias", role="router", params=n, other_flops=n, bits=32)
        return Cost((matrix_cost("weight", self.d_model, n, (4 + self.top_k) * n), bias))


class SPTRouter(nn.Module):
    """The k largest of l = W x + b; weights 2 sigmoid(l), as its low-rank layers have them.

    Its plain layers weigh by 1, so that their router gets no gradient: there it is frozen, as it is
    drawn. No published code balances the blocks, so there is no loss.
    """

    def __init__(self, config: SPTRouterConfig):
        super().__init__()
        c = self.config = config
        self.weight = nn.Parameter(torch.empty(c.n_experts, c.d_model))
        self.logit_bias = nn.Parameter(torch.empty(c.n_experts))
        self.requires_grad_(c.weighting != "one")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew; the bias starts at zero."""
        draw_normal(self.weight)
        nn.init.zeros_(self.logit_bias)

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> Routing:
        """x: [T, D]; mask: [T] bool, True where a token is real. carry is not read."""
        logits = scores(x, self.weight) + self.logit_bias  # [T, E]
        blocks = top_indices(logits, self.config.top_k)  # sigmoids that saturate would tie
        chosen = logits.gather(-1, blocks)  # [T, K]
        twice = self.config.weighting == "twice"
        weights = 2 * chosen.sigmoid() if twice else torch.ones_like(chosen)
        return Routing(blocks, weights, logits, {})
