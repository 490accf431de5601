"""V-MoE's noisy routing (arXiv:2106.05974, sec. 2.2 and app. A); batch priority is a capacity's."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, Routing
from layers.dispatch import is_decoding
from layers.names import check_positive
from routers.importance import importance_loss, load_loss, threshold_of_all
from routers.scores import check_sizes, draw_scaled, matrix_cost, scores, top_indices


@dataclass(frozen=True, kw_only=True)
class VMoERouterConfig:
    """Sizes and options of a V-MoE router."""

    d_model: int
    n_experts: int = 8
    top_k: int = 2
    noise: float = 1.0  # std of the logits' noise in training, times 1 / n_experts

    def __post_init__(self) -> None:
        check_sizes(self.d_model, self.n_experts, self.top_k)
        check_positive(noise=self.noise)

    def cost(self) -> Cost:
        """One token's cost: one float32 matrix, noise, softmax and K passes of choosing."""
        n = self.n_experts
        return Cost((matrix_cost("weight", self.d_model, n, (7 + self.top_k) * n),))


class VMoERouter(nn.Module):
    """p = softmax(W x + N(0, 1) / E); the k largest, weights p as is. Noise in training alone.

    Losses: `importance` of the probabilities without noise and, where there is noise, smooth
    `load`; the paper weighs each 0.005.
    """

    def __init__(self, config: VMoERouterConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        draw_scaled(self.weight)

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> Routing:
        """x: [T, D]; mask: [T] bool. carry is not read; logits are those without noise."""
        c = self.config
        noisy = logits = scores(x, self.weight)  # [T, E]
        std = c.noise / c.n_experts
        if self.training:
            noisy = logits + torch.randn_like(logits) * std
        experts = top_indices(noisy, c.top_k)  # [T, K]
        weights = noisy.softmax(-1).gather(-1, experts)
        if is_decoding(x):
            return Routing(experts, weights, logits, {})
        losses = {"importance": importance_loss(logits.softmax(-1), mask)}
        if self.training:
            losses["load"] = load_loss(logits, threshold_of_all(noisy, c.top_k), std, mask)
        return Routing(experts, weights, logits, losses)
