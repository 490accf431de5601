"""DeepSeek-V2's routing: softmax, choice limited to a few groups (arXiv:2405.04434, sec. 2.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, Routing
from layers.dispatch import is_decoding
from layers.names import check_positive
from routers.balance import BalanceLoss, check_scope, z_loss
from routers.groups import best, check_groups, within_groups
from routers.scores import check_sizes, draw_normal, matrix_cost, scores, top_indices

PRESETS: dict[str, dict[str, object]] = {
    "deepseek_v2": {"n_groups": 8, "top_groups": 3, "scale": 16.0, "balance_scope": "sequence"},
    "deepseek_v2_lite": {"balance_scope": "sequence"},
}


@dataclass(frozen=True, kw_only=True)
class DeepSeekV2RouterConfig:
    """Sizes and options of a DeepSeek-V2 router."""

    d_model: int
    n_experts: int = 8
    top_k: int = 2
    n_groups: int = 1  # equal groups, of neighbours
    top_groups: int = 1  # of these, how many a token may choose from
    scale: float = 1.0  # of the weights
    balance_scope: str = "micro_batch"  # what the loss counts over; sequence | global_batch

    def __post_init__(self) -> None:
        check_sizes(self.d_model, self.n_experts, self.top_k)
        check_groups(self.n_experts, self.top_k, self.n_groups, self.top_groups, least=1)
        check_positive(scale=self.scale)
        check_scope(self.balance_scope)

    def cost(self) -> Cost:
        """One token's cost: one float32 matrix, the softmax, groups and K passes of choosing."""
        n = self.n_experts
        return Cost((matrix_cost("weight", self.d_model, n, (7 + self.top_k) * n),))


class DeepSeekV2Router(nn.Module):
    """p = softmax(W x); the k largest within the groups of the largest p; weights scale * p.

    The paper's losses for the balance of devices and of what they send are not here.
    """

    def __init__(self, config: DeepSeekV2RouterConfig):
        super().__init__()
        c = self.config = config
        self.weight = nn.Parameter(torch.empty(c.n_experts, c.d_model))
        self.balance = BalanceLoss(c.balance_scope, c.n_experts)
        self.reads_sequences = c.balance_scope == "sequence"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        draw_normal(self.weight)

    def forward(
        self,
        x: Tensor,
        carry: Tensor | None = None,
        mask: Tensor | None = None,
        n_sequences: int | None = None,
    ) -> Routing:
        """x: [T, D]; mask: [T] bool; n_sequences: B, of T = B * S. carry is not read."""
        c = self.config
        logits = scores(x, self.weight)  # [T, E]
        probs = logits.softmax(-1)
        experts = top_indices(self.preference(logits), c.top_k)  # [T, K]
        weights = probs.gather(-1, experts) * c.scale
        if is_decoding(x):
            return Routing(experts, weights, logits, {})
        balance = self.balance(probs, experts, mask, n_sequences)
        return Routing(experts, weights, logits, {"balance": balance, "z": z_loss(logits, mask)})

    def preference(self, logits: Tensor) -> Tensor:
        """[T, E], of which the k largest are chosen; -inf outside a token's groups."""
        return within_groups(logits.detach(), self.config.n_groups, self.config.top_groups, best)
