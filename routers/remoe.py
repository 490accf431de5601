"""ReMoE: routing by ReLU, as many experts as are above zero (arXiv:2412.14711)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, Routing
from layers.dispatch import is_decoding
from layers.names import check_positive
from layers.replay import decided
from routers.balance import load_weighted_l1
from routers.scores import check_sizes, draw_normal, matrix_cost, scores
from routers.state import Float32State


@dataclass(frozen=True, kw_only=True)
class ReMoERouterConfig:
    """Sizes and options of a ReMoE router."""

    d_model: int
    n_experts: int = 8
    top_k: int = 2  # k, the experts that a token should use on average
    penalty: float = 1e-8  # lambda of the regulariser at the start
    penalty_factor: float = 1.2  # lambda is multiplied or divided by it after every step

    def __post_init__(self) -> None:
        check_sizes(self.d_model, self.n_experts, self.top_k)
        check_positive(penalty=self.penalty)
        if self.penalty_factor < 1:
            raise ValueError(f"penalty_factor must be at least 1, got {self.penalty_factor}")

    def cost(self) -> Cost:
        """One token's cost: one float32 matrix and a comparison."""
        return Cost((matrix_cost("weight", self.d_model, self.n_experts, 2 * self.n_experts),))


class ReMoERouter(Float32State):
    """g = relu(W x) is both choice and weight: every expert is listed, those of g = 0 are not kept.

    Loss `l1` = lambda E / (k T^2) sum_e c_e sum_t g_te, lambda in the buffer `strength`: its weight
    in a recipe is 1. A controller moves lambda until k experts a token remain; early on nearly all
    are active, so memory and time peak there.
    """

    strength: Tensor  # float32 scalar, lambda

    def __init__(self, config: ReMoERouterConfig):
        super().__init__()
        c = self.config = config
        self.weight = nn.Parameter(torch.empty(c.n_experts, c.d_model))
        self.register_buffer("strength", torch.empty((), dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew; lambda at its start."""
        draw_normal(self.weight)
        self.strength.fill_(self.config.penalty)

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> Routing:
        """x: [T, D]; mask: [T] bool. carry is not read. K of the result is E."""
        c = self.config
        logits = scores(x, self.weight)  # [T, E]
        gates = logits.relu()
        experts = torch.arange(c.n_experts, device=x.device).expand(x.shape[0], -1)
        keep = decided(gates.detach() > 0)
        gates = gates.masked_fill(~keep, 0)  # moves nothing but a replayed choice
        if is_decoding(x):
            return Routing(experts, gates, logits, {}, keep)
        l1 = self.strength * load_weighted_l1(gates, c.top_k, mask)
        return Routing(experts, gates, logits, {"l1": l1}, keep)

    def probabilities(self, logits: Tensor) -> Tensor:
        """[T, E], the gates as shares of their sum; even for a token that has none."""
        gates = logits.relu()
        total = gates.sum(-1, keepdim=True)
        return torch.where(total > 0, gates / total.clamp_min(1e-30), 1 / logits.shape[-1])

    def update(self, sparsity: float) -> None:
        """Move lambda once an optimizer step: times 1.2 where gates are too dense, else by 1.2.

        sparsity: share of gates that were 0, over layers, micro-batches and ranks.
        """
        c = self.config
        too_dense = sparsity < 1 - c.top_k / c.n_experts
        self.strength.mul_(c.penalty_factor if too_dense else 1 / c.penalty_factor)
