"""GShard's top-2 routing, the second expert at random (arXiv:2006.16668, sec. 2.2, alg. 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, Routing
from layers.dispatch import is_decoding
from layers.names import check_choice
from layers.replay import decided
from routers.balance import balance_loss, z_loss
from routers.scores import check_sizes, draw_normal, matrix_cost, scores, top_indices

SECONDS = ("random", "always")


@dataclass(frozen=True, kw_only=True)
class GShardRouterConfig:
    """Sizes and options of a GShard router."""

    d_model: int
    n_experts: int = 8
    top_k: int = 2  # always 2
    second: str = "random"  # in training, kept with probability min(1, 2 g_2); "always": kept

    def __post_init__(self) -> None:
        check_sizes(self.d_model, self.n_experts, self.top_k)
        check_choice("second", self.second, SECONDS)
        if self.top_k != 2:
            raise ValueError(f"gshard routes to 2 experts, got top_k={self.top_k}: use top_k")

    def cost(self) -> Cost:
        """One token's cost: one float32 matrix, the softmax and two passes of choosing."""
        return Cost((matrix_cost("weight", self.d_model, self.n_experts, 7 * self.n_experts),))


class GShardRouter(nn.Module):
    """The 2 largest of p = softmax(W x), weights g_i = p_i / (p_1 + p_2); the second may drop out.

    In training it is kept with probability min(1, 2 g_2), drawn from the global generator; the
    first's weight stays g_1 then. Evaluation keeps it. The balance loss counts first choices alone.
    """

    def __init__(self, config: GShardRouterConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        draw_normal(self.weight)

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> Routing:
        """x: [T, D]; mask: [T] bool. carry is not read."""
        logits = scores(x, self.weight)  # [T, E]
        experts = top_indices(logits, 2)  # [T, 2]
        weights = logits.gather(-1, experts).softmax(-1)
        keep = None
        if self.training and self.config.second == "random":
            second = weights[:, 1].detach()
            keep = 2 * second > torch.rand_like(second)
            keep = decided(torch.stack([torch.ones_like(keep), keep], dim=-1))
            weights = weights.masked_fill(~keep, 0)
        if is_decoding(x):
            return Routing(experts, weights, logits, {}, keep)
        balance = balance_loss(logits.softmax(-1), experts[:, :1], mask)
        losses = {"balance": balance, "z": z_loss(logits, mask)}
        return Routing(experts, weights, logits, losses, keep)
