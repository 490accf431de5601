"""A control: experts by a fixed hash of a token's hidden state, nothing learned.

Hash Layers (arXiv:2106.04426) hash the id of the token, which no FFN sees: this is not that. Here
the signs of x against fixed random planes are a code (locality-sensitive hashing: doi
10.1145/509907.509965), and a fixed table gives each code its experts, every expert as often. So
tokens that are alike go the same way, as with a learned router, and no gate is trained.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, Routing, WeightCost
from layers.replay import decided
from routers.scores import check_sizes, scores

BITS = 10  # of a code


@dataclass(frozen=True, kw_only=True)
class SignHashRouterConfig:
    """Sizes and seed of a hash of signs."""

    d_model: int
    n_experts: int = 8
    top_k: int = 2
    hash_seed: int = 0  # of planes and table, which are the same in every run
    n_routes: int | None = None  # experts of all kinds, where there are several; None: n_experts

    def __post_init__(self) -> None:
        check_sizes(self.d_model, self.total, self.top_k)

    @property
    def total(self) -> int:
        """What is chosen from."""
        return self.n_experts if self.n_routes is None else self.n_routes

    def cost(self) -> Cost:
        """One token's cost: the planes, which are no parameters."""
        flops = 2 * BITS * self.d_model
        item = WeightCost(name="planes", role="router", params=0, flops=flops, other_flops=2 * BITS)
        return Cost((item,))


class SignHashRouter(nn.Module):
    """Experts table[sum over b of 2^b [planes_b . x > 0]], weight 1 / k each. Has no losses."""

    planes: Tensor  # [10, D] float32
    table: Tensor  # [1024, K] int64

    def __init__(self, config: SignHashRouterConfig):
        super().__init__()
        c = self.config = config
        self.register_buffer("planes", torch.empty(BITS, c.d_model))
        self.register_buffer("table", torch.empty(2**BITS, c.top_k, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw planes and table from `hash_seed`."""
        c = self.config
        if self.planes.is_meta:
            return
        generator = torch.Generator().manual_seed(c.hash_seed)
        self.planes.copy_(torch.randn(self.planes.shape, generator=generator))
        first = torch.arange(2**BITS).remainder(c.total)  # each expert as often as another
        first = first[torch.randperm(2**BITS, generator=generator)]
        others = torch.rand(2**BITS, c.total - 1, generator=generator).argsort(-1) + 1
        steps = torch.cat([torch.zeros(2**BITS, 1, dtype=torch.int64), others], dim=-1)
        self.table.copy_((first[:, None] + steps[:, : c.top_k]).remainder(c.total))

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> Routing:
        """x: [T, D]. carry and mask are not read; logits are 0: no expert is preferred."""
        c = self.config
        side = scores(x.detach(), self.planes) > 0  # [T, 10]
        code = (side.long() << torch.arange(BITS, device=x.device)).sum(-1)
        experts = decided(self.table[code], c.total)  # [T, K]
        logits = x.new_zeros(x.shape[0], c.total, dtype=self.planes.dtype)
        return Routing(experts, torch.full_like(logits[:, : c.top_k], 1 / c.top_k), logits, {})
