"""Llama 4's routing: the sigmoid of the chosen logit scales the expert's input (released code)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, Routing
from layers.dispatch import is_decoding
from routers.balance import balance_loss, square_loss
from routers.scores import check_sizes, draw_normal, matrix_cost, scores, top_indices


@dataclass(frozen=True, kw_only=True)
class Llama4RouterConfig:
    """Sizes of a Llama 4 router."""

    d_model: int
    n_experts: int = 8
    top_k: int = 1

    def __post_init__(self) -> None:
        check_sizes(self.d_model, self.n_experts, self.top_k)

    def cost(self) -> Cost:
        """One token's cost: one float32 matrix, K sigmoids and passes of choosing."""
        n = self.n_experts
        return Cost((matrix_cost("weight", self.d_model, n, (3 + self.top_k) * n),))


class Llama4Router(nn.Module):
    """The k largest of l = W x; weights sigmoid(l) at the chosen, to multiply the expert's *input*.

    `weights_input` tells a layer so: y = sum of E_e(w_e x), which is not sum of w_e E_e(x). Its
    losses are not published: balance is of softmax(l), z the mean square of the logits.
    """

    weights_input = True

    def __init__(self, config: Llama4RouterConfig):
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
        experts = top_indices(logits, self.config.top_k)  # [T, K]
        weights = logits.gather(-1, experts).sigmoid()
        if is_decoding(x):
            return Routing(experts, weights, logits, {})
        balance = balance_loss(logits.softmax(-1), experts, mask)
        losses = {"balance": balance, "z": square_loss(logits, mask)}
        return Routing(experts, weights, logits, losses)

    def probabilities(self, logits: Tensor) -> Tensor:
        """[T, E], the sigmoids as shares of their sum."""
        s = logits.sigmoid()
        return s / s.sum(-1, keepdim=True).clamp_min(1e-20)
