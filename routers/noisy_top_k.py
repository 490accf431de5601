"""Noisy top-k gating, the first of its kind (arXiv:1701.06538, sec. 2.1 and app. A)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.base import Cost, Routing
from layers.dispatch import is_decoding
from routers.importance import importance_loss, load_loss, threshold_of_others
from routers.scores import check_learns, check_sizes, matrix_cost, scores, top_indices


@dataclass(frozen=True, kw_only=True)
class NoisyTopKRouterConfig:
    """Sizes of a noisy top-k router."""

    d_model: int
    n_experts: int = 8
    top_k: int = 2

    def __post_init__(self) -> None:
        check_sizes(self.d_model, self.n_experts, self.top_k)
        check_learns(self.top_k, self.n_experts, "a softmax over the kept", "use")

    def cost(self) -> Cost:
        """One token's cost in training; evaluation leaves the noise's matrix out."""
        n = self.n_experts
        choose = matrix_cost("weight", self.d_model, n, (5 + self.top_k) * n)
        return Cost((choose, matrix_cost("noise", self.d_model, n, 8 * n)))


class NoisyTopKRouter(nn.Module):
    """h = W x + N(0, 1) softplus(W_noise x); the k largest of h; weights softmax over those.

    Noise in training alone. Both matrices start at zero (app. A): at first noise alone decides,
    and loads are even. Losses: `importance` of the gates and, where there is noise, smooth `load`.
    """

    def __init__(self, config: NoisyTopKRouterConfig):
        super().__init__()
        c = self.config = config
        self.weight = nn.Parameter(torch.empty(c.n_experts, c.d_model))
        self.noise = nn.Parameter(torch.empty(c.n_experts, c.d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.noise)

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> Routing:
        """x: [T, D]; mask: [T] bool. carry is not read; logits are those without noise."""
        c = self.config
        noisy = logits = scores(x, self.weight)  # [T, E]
        std: Tensor | None = None
        if self.training:
            std = F.softplus(scores(x, self.noise))  # [T, E]
            noisy = logits + torch.randn_like(logits) * std
        experts = top_indices(noisy, c.top_k)  # [T, K]
        weights = noisy.gather(-1, experts).softmax(-1)
        if is_decoding(x):
            return Routing(experts, weights, logits, {})
        gates = torch.zeros_like(logits).scatter(-1, experts, weights)
        losses = {"importance": importance_loss(gates, mask)}
        if std is not None and c.top_k < c.n_experts:
            threshold = threshold_of_others(noisy, experts)
            losses["load"] = load_loss(logits, threshold, std, mask)
        return Routing(experts, weights, logits, losses)
