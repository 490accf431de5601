"""Expert choice: experts take tokens, not tokens experts (arXiv:2202.09368, sec. 3.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, Routing
from layers.dispatch import is_decoding
from layers.names import check_choice
from layers.replay import decided
from routers.balance import z_loss
from routers.scores import check_sizes, draw_normal, largest, matrix_cost, scores
from routers.state import Float32State

POOLS = ("micro_batch", "sequence", "position")
DECISIONS = ("threshold", "choice")


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceRouterConfig:
    """Sizes and options of an expert-choice router."""

    d_model: int
    n_experts: int = 8
    top_k: int = 2  # c, the experts that a token gets on average; one may get 0 or all
    pool: str = "micro_batch"  # tokens that compete; sequence | position (one of each sequence)
    decision: str = "threshold"  # in evaluation; "choice": as in training, to measure the gap
    threshold_decay: float = 0.99  # of the thresholds' moving average, per optimizer step

    def __post_init__(self) -> None:
        check_sizes(self.d_model, self.n_experts, self.top_k)
        check_choice("pool", self.pool, POOLS)
        check_choice("decision", self.decision, DECISIONS)
        if not 0 <= self.threshold_decay < 1:
            raise ValueError(f"threshold_decay must be in [0, 1), got {self.threshold_decay}")

    @property
    def causal(self) -> bool:
        """Whether no token competes with later ones, in training too."""
        return self.pool == "position"

    @property
    def tokenwise(self) -> bool:
        """Whether a token's output in evaluation hangs on no other, so that a cache may serve."""
        return self.decision == "threshold"

    def cost(self) -> Cost:
        """One token's cost: one float32 matrix, the softmax and a sort of each expert's tokens."""
        return Cost((matrix_cost("weight", self.d_model, self.n_experts, 20 * self.n_experts),))


class ExpertChoiceRouter(Float32State):
    """p = softmax(W x); each expert takes the C = ceil(T c / E) tokens of largest p; weights p.

    T counts the real tokens of a pool; of equals the earlier is taken. Loads are even by
    construction, so there is no balance loss. Every expert is listed for each token, those that did
    not take it are not kept.

    In training a token competes with later ones, but for `pool="position"`. Evaluation is causal:
    expert e takes a token if p_e >= threshold_e, the moving average over training steps of the
    smallest p that it took. `stats` carry what moves it: `cuts` [E], these smallest p summed over
    `pools` pools. Loads are then even on average alone. Before the first step a token gets the c
    experts of its largest p. A single token without gradients (decoding) never competes.
    """

    threshold: Tensor  # [E] float32
    n_updates: Tensor  # int64 scalar, steps that the thresholds have seen

    def __init__(self, config: ExpertChoiceRouterConfig):
        super().__init__()
        c = self.config = config
        self.weight = nn.Parameter(torch.empty(c.n_experts, c.d_model))
        self.register_buffer("threshold", torch.empty(c.n_experts, dtype=torch.float32))
        self.register_buffer("n_updates", torch.empty((), dtype=torch.int64))
        self.reads_sequences = c.pool != "micro_batch"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew; no threshold yet."""
        draw_normal(self.weight)
        self.threshold.zero_()
        self.n_updates.zero_()

    def forward(
        self,
        x: Tensor,
        carry: Tensor | None = None,
        mask: Tensor | None = None,
        n_sequences: int | None = None,
    ) -> Routing:
        """x: [T, D]; mask: [T] bool, True where a token is real. K of the result is E.

        carry is not read; n_sequences: B, of T = B * S, read where a pool is not the micro-batch.
        """
        c = self.config
        logits = scores(x, self.weight)  # [T, E]
        probs = logits.softmax(-1)
        experts = torch.arange(c.n_experts, device=x.device).expand(x.shape[0], -1)
        if is_decoding(x):
            keep = decided(self._above(probs.detach()))
            return Routing(experts, probs.masked_fill(~keep, 0), logits, {}, keep)
        stats = None
        if self.training or c.decision == "choice":
            keep, stats = self._choice(probs.detach(), mask, n_sequences)
        else:
            keep = self._above(probs.detach())
        keep = decided(keep)
        losses = {"z": z_loss(logits, mask)}
        return Routing(experts, probs.masked_fill(~keep, 0), logits, losses, keep, stats)

    def preference(self, logits: Tensor) -> Tensor:
        """[T, E], of which evaluation chooses those from 0 on; before any step the c largest."""
        return logits.softmax(-1) - self.threshold

    def update(self, cuts: Tensor) -> None:
        """Move the thresholds once an optimizer step: at first their mean, then a moving average.

        cuts: [E], the smallest p taken, mean over the step's pools, micro-batches and ranks.
        """
        self.n_updates.add_(1)
        rate = max(1 - self.config.threshold_decay, 1 / self.n_updates.item())
        self.threshold.lerp_(cuts.to(self.threshold), rate)

    def _above(self, probs: Tensor) -> Tensor:
        """[T, E] bool, by threshold. Without a look at the data, which would wait for a device."""
        untrained = torch.zeros_like(probs, dtype=torch.bool)
        untrained = untrained.scatter(-1, largest(probs, self.config.top_k), True)
        return torch.where(self.n_updates > 0, probs >= self.threshold, untrained)

    def _choice(
        self, probs: Tensor, mask: Tensor | None, n_sequences: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """[T, E] bool, by the training rule; and the stats."""
        c = self.config
        pools = probs[None] if c.pool == "micro_batch" else self._by_sequence(probs, n_sequences)
        real = None if mask is None else mask.view(pools.shape[:2])
        if c.pool == "position":
            pools, real = pools.transpose(0, 1), None if real is None else real.T
        keep, cuts = take(pools, c.top_k, real)  # [P, n, E], [P, E]
        if c.pool == "position":
            keep = keep.transpose(0, 1)
        if real is None:
            n_pools = cuts.new_tensor(float(cuts.shape[0] if pools.shape[1] else 0))
        else:
            n_pools = real.any(-1).sum().to(cuts)
        return keep.reshape(probs.shape), {"cuts": cuts.sum(0), "pools": n_pools}

    def _by_sequence(self, probs: Tensor, n_sequences: int | None) -> Tensor:
        """[B, S, E] of [T, E]."""
        n_tokens = probs.shape[0]
        if n_sequences is None or n_tokens % max(n_sequences, 1):
            raise ValueError(
                f"pool={self.config.pool!r} needs n_sequences, of which the {n_tokens} tokens are "
                f"a multiple, got {n_sequences}"
            )
        return probs.view(n_sequences, n_tokens // max(n_sequences, 1), probs.shape[1])


def take(probs: Tensor, top_k: int, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The tokens that each expert takes: the C = ceil(n c / E) of largest p in each pool.

    Args:
        probs: [P, n, E], not differentiated; n tokens compete in each of P pools.
        top_k: c, experts that a token gets on average.
        real: [P, n] bool; others are never taken and not counted in n.

    Returns:
        [P, n, E] bool, True for what is taken; and [P, E], the smallest p taken (0 where none).
    """
    n_experts = probs.shape[-1]
    ordered, n_real = probs, probs.shape[1]
    if real is not None:
        ordered = probs.masked_fill(~real[..., None], -torch.inf)  # behind all that are real
        n_real = real.sum(-1)[:, None, None]
    slots = -(-n_real * top_k // n_experts)  # rounded up, in whole numbers
    order = ordered.sort(dim=1, descending=True, stable=True).indices  # [P, n, E]
    places = torch.arange(probs.shape[1], device=probs.device)[None, :, None]
    rank = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
    cuts = probs.masked_fill(rank != slots - 1, 0).sum(1)  # the p of the last one taken
    return rank < slots, cuts
