"""DeepSeek-V3's routing: sigmoid, groups, balance by a bias (arXiv:2412.19437, sec. 2.1.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, Routing
from layers.dispatch import is_decoding
from layers.names import check_positive
from routers.balance import BalanceLoss, check_scope, square_loss
from routers.groups import check_groups, sum_of_two, within_groups
from routers.scores import (
    check_learns,
    check_sizes,
    draw_normal,
    largest,
    matrix_cost,
    scores,
    top_indices,
)
from routers.state import BiasControl, SelectionBias

PRESETS: dict[str, dict[str, object]] = {
    # the bias stood still after 14.3 of 14.8 trillion tokens
    "deepseek_v3": {"n_groups": 8, "top_groups": 4, "scale": 2.5, "bias_until": 14.3 / 14.8},
    "loss_free": {"renormalize": False},  # arXiv:2408.15664, which has neither groups nor scale
}


@dataclass(frozen=True, kw_only=True)
class DeepSeekV3RouterConfig(BiasControl):
    """Sizes and options of a DeepSeek-V3 router."""

    d_model: int
    n_experts: int = 8
    top_k: int = 2
    renormalize: bool = True  # the chosen weights sum to `scale`
    n_groups: int = 1  # equal groups, of neighbours
    top_groups: int = 1  # of these, how many a token may choose from
    scale: float = 1.0  # of the weights
    balance_scope: str = "sequence"  # what the loss counts over; micro_batch

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self.d_model, self.n_experts, self.top_k)
        check_groups(self.n_experts, self.top_k, self.n_groups, self.top_groups, least=2)
        check_positive(scale=self.scale)
        check_scope(self.balance_scope, ("sequence", "micro_batch"))
        if self.renormalize:
            check_learns(self.top_k, self.n_experts, "renormalize=True", "set renormalize=False or")

    def cost(self) -> Cost:
        """One token's cost: one float32 matrix, sigmoid, groups and K passes of choosing."""
        n = self.n_experts
        return Cost((matrix_cost("weight", self.d_model, n, (8 + self.top_k) * n),))


class DeepSeekV3Router(SelectionBias):
    """s = sigmoid(W x); the k largest of s + bias within the best groups; weights from s alone.

    The balance loss is of s / sum s, and of choices by s without bias or groups (eq. 17 to 20): it
    is a complement to the bias, weight 1e-4. z is the mean square of the logits.
    """

    def __init__(self, config: DeepSeekV3RouterConfig):
        super().__init__(config.n_experts, config)
        c = self.config = config
        self.weight = nn.Parameter(torch.empty(c.n_experts, c.d_model))
        self.balance = BalanceLoss(c.balance_scope, c.n_experts)
        self.reads_sequences = c.balance_scope == "sequence"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew; no bias."""
        draw_normal(self.weight)
        self.bias.zero_()

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
        s = logits.sigmoid()
        experts = top_indices(self._choice(s), c.top_k)  # [T, K]
        weights = s.gather(-1, experts)
        if c.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * c.scale
        if is_decoding(x):
            return Routing(experts, weights, logits, {})
        unbiased = largest(s, c.top_k)  # counted alone: no token goes there
        balance = self.balance(_normalised(s), unbiased, mask, n_sequences)
        losses = {"balance": balance, "z": square_loss(logits, mask)}
        return Routing(experts, weights, logits, losses)

    def probabilities(self, logits: Tensor) -> Tensor:
        """[T, E], s / sum s: what the balance loss is of."""
        return _normalised(logits.sigmoid())

    def preference(self, logits: Tensor) -> Tensor:
        """[T, E], of which the k largest are chosen; -inf outside a token's groups."""
        return self._choice(logits.sigmoid())

    def _choice(self, s: Tensor) -> Tensor:
        c = self.config
        return within_groups(s.detach() + self.bias, c.n_groups, c.top_groups, sum_of_two)


def _normalised(s: Tensor) -> Tensor:
    return s / (s.sum(-1, keepdim=True) + 1e-20)
