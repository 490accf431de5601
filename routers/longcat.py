"""LongCat-Flash's routing: softmax over experts and identities, bias (arXiv:2509.01322)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, Routing
from layers.dispatch import is_decoding
from layers.moe_plus_plus import Kinds
from layers.names import check_positive
from routers.balance import balance_loss, z_loss
from routers.scores import draw_normal, matrix_cost, scores, top_indices
from routers.state import BiasControl, SelectionBias, steered_shares

PRESETS: dict[str, dict[str, object]] = {"longcat_flash": {"scale": 6.0}}


@dataclass(frozen=True, kw_only=True)
class LongCatRouterConfig(Kinds, BiasControl):
    """Which experts there are (as the layer has them; identities are its copies) and how chosen."""

    n_constant: int | None = 0
    n_copy: int = 0
    n_zero: int = 0
    top_k: int = 2
    scale: float = 1.0  # of the weights
    ffn_per_token: float | None = None  # FFN experts a token should use on average; None: as even

    def __post_init__(self) -> None:
        Kinds.__post_init__(self)
        BiasControl.__post_init__(self)
        check_positive(top_k=self.top_k, scale=self.scale)
        if self.top_k > self.n_routes:
            raise ValueError(
                f"top_k must be at most the {self.n_routes} experts of all kinds, got {self.top_k}"
            )
        wanted, most = self.ffn_per_token, min(self.top_k, self.n_experts)
        if wanted is not None and not (self.n_zero_computation and 0 < wanted <= most):
            raise ValueError(
                f"ffn_per_token must be in (0, {most}] and needs experts without an FFN, "
                f"got {wanted} beside {self.n_zero_computation} of them"
            )

    @property
    def assignments(self) -> float:
        """FFN experts that a token uses on average once the bias has settled."""
        if self.ffn_per_token is not None:
            return self.ffn_per_token
        return self.top_k * self.n_experts / self.n_routes

    def cost(self) -> Cost:
        """One token's cost: one float32 matrix, the softmax and K passes of choosing."""
        n = self.n_routes
        return Cost((matrix_cost("weight", self.d_model, n, (6 + self.top_k) * n),))


class LongCatRouter(SelectionBias):
    """p = softmax(W x) over experts of all kinds; the k largest of p + bias; weights scale * p.

    The bias steers how many of a token's choices are FFN experts: to even use of all, or to
    `ffn_per_token`. With a softmax `bias_step` should be small beside 1 / E.
    """

    def __init__(self, config: LongCatRouterConfig):
        super().__init__(config.n_routes, config)
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routes, config.d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew; no bias."""
        draw_normal(self.weight)
        self.bias.zero_()

    @property
    def shares(self) -> Tensor | None:
        """[N] float64: `ffn_per_token` / k for FFN experts together, the rest for the others."""
        c = self.config
        if c.ffn_per_token is None:
            return None
        return steered_shares(c, 1 - c.ffn_per_token / c.top_k)

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> Routing:
        """x: [T, D]; mask: [T] bool. carry is not read."""
        c = self.config
        logits = scores(x, self.weight)  # [T, N]
        probs = logits.softmax(-1)
        experts = top_indices(self._choice(probs), c.top_k)  # [T, K]
        weights = probs.gather(-1, experts) * c.scale
        if is_decoding(x):
            return Routing(experts, weights, logits, {})
        losses = {"balance": balance_loss(probs, experts, mask), "z": z_loss(logits, mask)}
        return Routing(experts, weights, logits, losses)

    def preference(self, logits: Tensor) -> Tensor:
        """[T, N], of which the k largest are chosen."""
        return self._choice(logits.softmax(-1))

    def _choice(self, probs: Tensor) -> Tensor:
        return probs.detach() + self.bias
