"""MoE++'s pathway-aware router, over experts with and without an FFN (arXiv:2410.07348).

The paper fixes tau, and how many FFN experts a token then uses comes out of training. Beyond it,
`zero_computation_share` says how many it should, and once a step `steer` moves what decides it:
"tau", the weight of zero-computation experts in the balance loss, or "bias", added to the
probabilities in the choice alone as in loss-free balancing (arXiv:2408.15664), with another target
for each kind of expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, Routing, WeightCost
from layers.dispatch import is_decoding
from layers.moe_plus_plus import Kinds
from layers.names import check_choice, check_positive
from routers.balance import heterogeneous_balance_loss, z_loss
from routers.scores import INIT_STD, scores, top_indices
from routers.state import BiasControl, Steered, bias_move, steered_shares

WEIGHTS = ("paper", "released", "topk_softmax")
STEERS = ("tau", "bias")
TAU_RANGE = (1e-3, 1e3)  # of a steered tau: beyond, one kind of expert is as good as gone


@dataclass(frozen=True, kw_only=True)
class PathwayRouterConfig(Kinds, BiasControl):
    """Which experts there are (as the layer has them) and how they are weighted.

    A model sets `n_carry` to the number of experts of all kinds of the nearest MoE layer before
    this one, and leaves it None in the first; dense layers between hand the carry on unchanged.
    """

    top_k: int = 2
    tau: float = 0.75  # weight of zero-computation experts in the balance loss; less: more use
    n_carry: int | None = None  # logits of the previous MoE layer; None: first layer, no residual
    weights: str = "paper"  # paper: p | released: p, no zero expert, sums to 1 | topk_softmax
    logit_norm: float | None = None  # logits divided by their std, times this; released: 1.0
    zero_computation_share: float | None = None  # wanted, of all assignments; None: tau decides
    steer: str = "tau"  # what is moved towards that share: tau | bias
    tau_step: float = 1e-2  # tau is multiplied or divided by 1 + this, once an optimizer step

    def __post_init__(self) -> None:
        Kinds.__post_init__(self)
        BiasControl.__post_init__(self)
        check_positive(top_k=self.top_k, tau=self.tau, tau_step=self.tau_step)
        check_choice("routing weights", self.weights, WEIGHTS)
        check_choice("steer", self.steer, STEERS)
        if self.zero_computation_share is not None:
            self.check_share(self.zero_computation_share, self.top_k)
        if self.top_k > self.n_routes:
            raise ValueError(
                f"top_k must be at most the {self.n_routes} experts of all kinds, got {self.top_k}"
            )
        if self.n_carry is not None:
            check_positive(n_carry=self.n_carry)
        if self.logit_norm is not None:
            check_positive(logit_norm=self.logit_norm)
            if self.n_routes < 2:
                raise ValueError("logit_norm needs at least 2 experts: one has no deviation")
        if self.weights == "topk_softmax" and self.top_k == 1 and self.n_routes > 1:
            raise ValueError(
                "top_k=1 with weights='topk_softmax' makes every weight 1, so the task would send "
                "the router no gradient: use weights='paper' or top_k >= 2"
            )

    def cost(self) -> Cost:
        """One token's cost, float32 throughout."""
        widths = {"weight": self.d_model} | ({"carry": self.n_carry} if self.n_carry else {})
        choose = (5 + self.top_k) * self.n_routes
        return Cost(
            tuple(
                WeightCost(
                    name=name, role="router", params=width * self.n_routes,
                    flops=2 * width * self.n_routes,
                    other_flops=choose if name == "weight" else self.n_routes, bits=32,
                )
                for name, width in widths.items()
            )
        )  # fmt: skip


class PathwayRouter(Steered):
    """l = W x (+ W_g l of the previous MoE layer); the k largest; weights from p = softmax(l).

    W_g exists only where a carry is expected: an unused parameter would get no gradient. l is
    handed on before any normalisation and not detached.
    """

    tau: Tensor | None  # float32, where it is steered
    bias: Tensor | None  # [N] float32, where it is steered

    def __init__(self, config: PathwayRouterConfig):
        super().__init__()
        c = self.config = config
        self.weight = nn.Parameter(torch.empty(c.n_routes, c.d_model))
        self.carry = nn.Parameter(torch.empty(c.n_routes, c.n_carry)) if c.n_carry else None
        by = c.steer if self.moves else None
        tau = torch.empty((), dtype=torch.float32) if by == "tau" else None
        bias = torch.empty(c.n_routes, dtype=torch.float32) if by == "bias" else None
        self.register_buffer("tau", tau)  # saved, never differentiated
        self.register_buffer("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew; what is steered starts as the config has it."""
        for weight in self.parameters():
            nn.init.normal_(weight, std=INIT_STD)
        if self.tau is not None:
            self.tau.fill_(self.config.tau)
        if self.bias is not None:
            self.bias.zero_()

    @property
    def moves(self) -> bool:
        """Whether a share of zero-computation experts is wanted."""
        return self.config.zero_computation_share is not None

    def update(self, counts: Tensor, *, progress: float = 0.0) -> None:
        """Move tau or the bias once towards the wanted share; see `Steered`.

        More use of zero-computation experts than wanted makes them dearer in the balance loss.
        """
        c = self.config
        free = c.zero_computation_share
        if free is None or progress >= c.bias_until:
            return
        if self.bias is not None:
            move = bias_move(counts.to(self.bias.device), c, steered_shares(c, free))
            self.bias.add_(move.to(self.bias.dtype))
        if self.tau is not None:
            above = counts[c.n_experts :].sum() - free * counts.sum()
            factor = torch.pow(1 + c.tau_step, above.sign()).to(self.tau)
            self.tau.mul_(factor).clamp_(*TAU_RANGE)

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> Routing:
        """x: [T, D]; carry: [T, n_carry], not read in a first layer; mask: [T] bool."""
        c = self.config
        logits = scores(x, self.weight)  # [T, N]
        if self.carry is not None:
            logits = logits + scores(self._checked(carry), self.carry).to(logits.dtype)
        normed = self._normed(logits)
        probs = normed.softmax(-1)
        experts = top_indices(self._choice(normed, probs), c.top_k)  # [T, K]
        weights = self._weights(normed, probs, experts)

        if is_decoding(x):
            return Routing(experts, weights, logits, {})
        eta = probs.new_ones(c.n_routes)
        eta[c.n_experts :] = c.tau if self.tau is None else self.tau
        raw = heterogeneous_balance_loss(probs, experts, eta, mask)
        canonical = raw * (c.n_routes / c.top_k)  # 1.0 when even and tau = 1
        return Routing(experts, weights, logits, {"balance": canonical, "z": z_loss(logits, mask)})

    def probabilities(self, logits: Tensor) -> Tensor:
        """[T, N], p of the normalised logits."""
        return self._normed(logits).softmax(-1)

    def preference(self, logits: Tensor) -> Tensor:
        """[T, N], of which the k largest are chosen."""
        normed = self._normed(logits)
        return self._choice(normed, normed.softmax(-1))

    def _choice(self, normed: Tensor, probs: Tensor) -> Tensor:
        return normed if self.bias is None else probs.detach() + self.bias

    def _checked(self, carry: Tensor | None) -> Tensor:
        given = "none" if carry is None else str(carry.shape[-1])
        if carry is None or carry.shape[-1] != self.config.n_carry:
            raise ValueError(
                f"this router reads {self.config.n_carry} logits of the previous MoE layer, "
                f"got {given}: hand on `carry`, or set n_carry=None in the first MoE layer"
            )
        return carry

    def _normed(self, logits: Tensor) -> Tensor:
        """l / std(l) * s, unbiased std over a token's experts; the mean stays (released code)."""
        if self.config.logit_norm is None:
            return logits
        centred = logits - logits.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / (self.config.n_routes - 1)
        # A token whose logits are all equal (one of zeros) has no deviation to divide by.
        return logits / variance.clamp_min(1e-12).sqrt() * self.config.logit_norm

    def _weights(self, logits: Tensor, probs: Tensor, experts: Tensor) -> Tensor:
        """[T, K], by one of three rules (moe.md 4.3)."""
        c = self.config
        if c.weights == "topk_softmax":
            return logits.gather(-1, experts).softmax(-1)
        chosen = probs.gather(-1, experts)
        if c.weights == "paper":
            return chosen
        chosen = chosen.masked_fill(experts >= c.n_routes - c.n_zero, 0)
        total = chosen.sum(-1, keepdim=True)
        return chosen / total.masked_fill(total == 0, 1)  # none but zero experts: weight 0
