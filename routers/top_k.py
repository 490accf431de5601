"""Token-choice top-k softmax routing (arXiv:1701.06538, sec. 2.1; K = 1: arXiv:2101.03961)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, Routing, WeightCost
from layers.dispatch import is_decoding
from layers.names import check_choice
from routers.balance import BalanceLoss, check_scope, z_loss
from routers.scores import (
    check_learns,
    check_sizes,
    draw_normal,
    draw_scaled,
    draw_truncated,
    matrix_cost,
    scores,
    top_indices,
)

INITS = {"normal": draw_normal, "truncated": draw_truncated, "scaled": draw_scaled}

# How named models route; sizes are the layer's. Renormalising p over the chosen is the softmax of
# the chosen logits, so Mixtral's rule is gpt-oss's and Granite's too.
PRESETS: dict[str, dict[str, object]] = {
    "mixtral": {"renormalize": True},  # arXiv:2401.04088
    "gpt_oss": {"renormalize": True, "logit_bias": True},  # arXiv:2508.10925
    "granite": {"renormalize": True},
    "olmoe": {"renormalize": False},  # arXiv:2409.02060
    "qwen2": {"renormalize": False},  # its gate on the shared expert is the layer's
    "qwen3": {"renormalize": True, "balance_scope": "global_batch"},  # arXiv:2505.09388
    "deepseek_moe": {"renormalize": False},  # arXiv:2401.06066
    "switch": {"top_k": 1, "renormalize": False, "jitter": 0.01, "init": "scaled"},
}


@dataclass(frozen=True, kw_only=True)
class TopKRouterConfig:
    """Sizes and options of a top-k router."""

    d_model: int
    n_experts: int = 8
    top_k: int = 2
    renormalize: bool = True  # the chosen weights sum to one (Mixtral); False: p as is (OLMoE)
    jitter: float = 0.0  # in training, logits see x * U(1 - jitter, 1 + jitter); Switch: 0.01
    logit_bias: bool = False  # trained, added to the logits (gpt-oss)
    init: str = "normal"  # std 0.02 | "truncated": the same, cut at three deviations
    # | "scaled": truncated, variance 0.1 / d_model (Switch)
    balance_scope: str = "micro_batch"  # what the loss counts over; sequence | global_batch

    def __post_init__(self) -> None:
        check_sizes(self.d_model, self.n_experts, self.top_k)
        check_choice("init", self.init, INITS)
        check_scope(self.balance_scope)
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must be in [0, 1), got {self.jitter}")
        if self.renormalize:
            check_learns(self.top_k, self.n_experts, "renormalize=True", "set renormalize=False or")

    def cost(self) -> Cost:
        """One token's cost: one float32 matrix, the softmax and K passes of choosing."""
        n = self.n_experts
        items = [matrix_cost("weight", self.d_model, n, (5 + self.top_k) * n)]
        if self.logit_bias:
            items.append(
                WeightCost(name="logit_bias", role="router", params=n, other_flops=n, bits=32)
            )
        return Cost(tuple(items))


class TopKRouter(nn.Module):
    """The k largest of l = W x; weights softmax(l) at the chosen, or softmax over the chosen."""

    def __init__(self, config: TopKRouterConfig):
        super().__init__()
        c = self.config = config
        self.weight = nn.Parameter(torch.empty(c.n_experts, c.d_model))
        self.logit_bias = nn.Parameter(torch.empty(c.n_experts)) if c.logit_bias else None
        self.balance = BalanceLoss(c.balance_scope, c.n_experts)
        self.reads_sequences = c.balance_scope == "sequence"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew."""
        INITS[self.config.init](self.weight)
        if self.logit_bias is not None:
            nn.init.zeros_(self.logit_bias)

    def forward(
        self,
        x: Tensor,
        carry: Tensor | None = None,
        mask: Tensor | None = None,
        n_sequences: int | None = None,
    ) -> Routing:
        """x: [T, D]; mask: [T] bool, True where a token is real. carry is not read.

        n_sequences: B, of T = B * S; read where the balance loss is counted by sequence.
        """
        c = self.config
        if c.jitter and self.training:  # a new tensor: the experts read x as it is
            x = x * torch.empty_like(x).uniform_(1 - c.jitter, 1 + c.jitter)
        logits = scores(x, self.weight)  # [T, E]
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        experts = top_indices(logits, c.top_k)  # [T, K]
        if c.renormalize:  # equals dividing p by the sum of the chosen, in value and gradient
            weights = logits.gather(-1, experts).softmax(-1)
        else:
            weights = logits.softmax(-1).gather(-1, experts)
        if is_decoding(x):
            return Routing(experts, weights, logits, {})
        balance = self.balance(logits.softmax(-1), experts, mask, n_sequences)
        return Routing(experts, weights, logits, {"balance": balance, "z": z_loss(logits, mask)})
