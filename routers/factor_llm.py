"""FactorLLM's router: K of N groups of neurons, each counted N / K times (arXiv:2408.11855).

The published step trains no router at all: its hard mask stops the task's gradient and the loss of
its labels is commented out (moe.md 10). Here `straight_through` lets the task reach the router, and
`zoo.conversion.prior` and `recipes.prior` teach it the labels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, Routing, WeightCost
from layers.dispatch import is_decoding
from routers.scores import check_sizes, draw_normal, matrix_cost, scores, top_indices


@dataclass(frozen=True, kw_only=True)
class FactorLLMRouterConfig:
    """Sizes of FactorLLM's router, and whether the task teaches it."""

    d_model: int
    n_experts: int = 4  # N, groups of neurons
    top_k: int = 2
    straight_through: bool = True  # the task's gradient passes to the probabilities of the chosen

    def __post_init__(self) -> None:
        check_sizes(self.d_model, self.n_experts, self.top_k)

    def cost(self) -> Cost:
        """One token's cost: one float32 matrix, its bias, the softmax and K passes of choosing."""
        n = self.n_experts
        bias = WeightCost(name="logit_bias", role="router", params=n, other_flops=n, bits=32)
        return Cost((matrix_cost("weight", self.d_model, n, (5 + self.top_k) * n), bias))


class FactorLLMRouter(nn.Module):
    """The k largest of l = W x + b, each with weight N / K; p = softmax(l) only for gradients."""

    def __init__(self, config: FactorLLMRouterConfig):
        super().__init__()
        c = self.config = config
        self.weight = nn.Parameter(torch.empty(c.n_experts, c.d_model))
        self.logit_bias = nn.Parameter(torch.empty(c.n_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew; the bias starts at zero."""
        draw_normal(self.weight)
        nn.init.zeros_(self.logit_bias)

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> Routing:
        """x: [T, D]; mask: [T] bool, True where a token is real. carry is not read.

        N / K is a fraction where K does not divide N; the published code rounds it down.
        """
        c = self.config
        logits = scores(x, self.weight) + self.logit_bias  # [T, N]
        experts = top_indices(logits, c.top_k)  # [T, K]
        chosen = logits.softmax(-1).gather(-1, experts)  # [T, K]
        weights = torch.ones_like(chosen)
        if c.straight_through:
            weights = straight_through(weights, chosen)
        weights = weights * (c.n_experts / c.top_k)
        losses = {} if is_decoding(x) else {"balance": chosen_share(chosen, c.n_experts, mask)}
        return Routing(experts, weights, logits, losses)


def straight_through(mask: Tensor, probs: Tensor) -> Tensor:
    """The hard mask in value, the probabilities' gradient: mask + p - p.detach(); same shapes.

    Given the chosen alone, as the router does, the others send no gradient of their own (their
    experts are not computed; the published code computes all and masks) but move with the softmax.
    """
    return mask.detach() + (probs - probs.detach())


def chosen_share(chosen: Tensor, n_experts: int, mask: Tensor | None = None) -> Tensor:
    """The published balance term, N / K times the probability of a token's choice; 1.0 when even.

    It is the mean over tokens and experts of p * mask(p), times N^2 / K, so the published 0.01 is
    0.01 K / N^2 here. It holds each token's router near even, N / K at its most certain, and does
    not see whether all tokens choose alike.

    chosen: [T, K], probabilities; mask: [T] bool, True where a token is real.
    """
    top_k = chosen.shape[-1]
    if mask is None:
        n_tokens: Tensor | int = max(chosen.shape[0], 1)
    else:
        chosen, n_tokens = chosen.masked_fill(~mask[:, None], 0), mask.sum().clamp_min(1)
    return chosen.sum() * (n_experts / top_k) / n_tokens
