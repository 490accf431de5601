"""Token-choice top-k softmax routing (arXiv:1701.06538, sec. 2.1; K = 1: arXiv:2101.03961)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, Routing, WeightCost
from layers.dispatch import is_decoding
from layers.names import check_positive
from routers.balance import balance_loss, z_loss
from routers.scores import scores, top_indices

INIT_STD = 0.02  # never zeros: equal logits would route every token alike


@dataclass(frozen=True, kw_only=True)
class TopKRouterConfig:
    """Sizes and options of a top-k router."""

    d_model: int
    n_experts: int = 8
    top_k: int = 2
    renormalize: bool = True  # the chosen weights sum to one (Mixtral); False: p as is (OLMoE)
    jitter: float = 0.0  # in training, logits see x * U(1 - jitter, 1 + jitter); Switch: 0.01

    def __post_init__(self) -> None:
        check_positive(d_model=self.d_model, n_experts=self.n_experts, top_k=self.top_k)
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k must be at most n_experts={self.n_experts}, got {self.top_k}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must be in [0, 1), got {self.jitter}")
        if self.renormalize and self.top_k == 1 and self.n_experts > 1:
            raise ValueError(
                "top_k=1 with renormalize=True makes every weight 1, so the task would send the "
                "router no gradient: set renormalize=False or top_k >= 2"
            )

    def cost(self) -> Cost:
        """One token's cost: one float32 matrix, the softmax and K passes of choosing."""
        n = self.d_model * self.n_experts
        choose = (5 + self.top_k) * self.n_experts
        item = WeightCost(
            name="weight", role="router", params=n, flops=2 * n, other_flops=choose, bits=32
        )
        return Cost((item,))


class TopKRouter(nn.Module):
    """The k largest of l = W x; weights softmax(l) at the chosen, or softmax over the chosen."""

    def __init__(self, config: TopKRouterConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> Routing:
        """x: [T, D]; mask: [T] bool, True where a token is real. carry is not read."""
        c = self.config
        if c.jitter and self.training:  # a new tensor: the experts read x as it is
            x = x * torch.empty_like(x).uniform_(1 - c.jitter, 1 + c.jitter)
        logits = scores(x, self.weight)  # [T, E]
        experts = top_indices(logits, c.top_k)  # [T, K]
        if c.renormalize:  # equals dividing p by the sum of the chosen, in value and gradient
            weights = logits.gather(-1, experts).softmax(-1)
        else:
            weights = logits.softmax(-1).gather(-1, experts)
        if is_decoding(x):
            return Routing(experts, weights, logits, {})
        balance = balance_loss(logits.softmax(-1), experts, mask)
        losses = {"balance": balance, "z": z_loss(logits, mask)}
        return Routing(experts, weights, logits, losses)
