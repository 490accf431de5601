"""Losses that keep a router's experts in use, as pure functions (moe.md 3).

One family: L = C * sum over e of eta_e f_e P_e. P_e is the mean over tokens of the router's
probability of e and carries the gradient; f_e = c_e / T, the share of tokens that chose e, carries
none. f sums to K and P to 1. Masked tokens are in neither.

Canonical here is C = E / K, per layer: 1.0 when even. What others write is in
`routers.conventions`; importance and load are in `routers.importance`.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from layers.dispatch import count_experts
from layers.names import check_choice

SCOPES = ("micro_batch", "sequence", "global_batch")


def balance_loss(
    probs: Tensor, experts: Tensor, mask: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """The canonical balance loss, E / K * sum f_e P_e: 1.0 when even, E / K at collapse on one.

    Equals Switch's (arXiv:2101.03961, eq. 4) for K = 1 and Megatron's and MegaBlocks' for any K;
    that of Hugging Face's models is K times as large.

    Args:
        probs: [T, E], softmax over all experts.
        experts: [T, K] int64, the chosen ones.
        mask: [T] bool, True where a token is real.
        counts: [E], assignments of the larger batch that f is taken over (all ranks, all
            micro-batches of a step: arXiv:2501.11873); None: of `experts`. P stays of `probs`, so
            the mean over equal parts of a batch is the loss of the whole.
    """
    n_experts = probs.shape[-1]
    if counts is not None:
        share = counts.to(probs.dtype) / counts.sum().clamp_min(1)
        kept = probs if mask is None else probs.masked_fill(~mask[:, None], 0)
        return torch.dot(share, kept.sum(0)) * n_experts / _n_tokens(probs, mask)
    raw = heterogeneous_balance_loss(probs, experts, None, mask)
    return raw * (n_experts / experts.shape[-1])


def heterogeneous_balance_loss(
    probs: Tensor, experts: Tensor, eta: Tensor | None, mask: Tensor | None = None
) -> Tensor:
    """MoE++'s loss as its paper writes it, sum eta_e f_e P_e (arXiv:2410.07348, eq. 7).

    It has no factor: with eta = 1 and even routing it is K / N for N experts of all kinds, so
    N / K times it is the canonical loss, and the paper's coefficient 0.01 here is 0.01 K / N there
    (0.001 for N = 20, K = 2).

    Args:
        probs: [T, N], softmax over all experts.
        experts: [T, K] int64, the chosen ones.
        eta: [N], 1 for FFN experts and tau for zero-computation experts; None: all 1.
        mask: [T] bool, True where a token is real.
    """
    n_tokens = _n_tokens(probs, mask)
    chosen = count_experts(experts, probs.shape[-1], mask).to(probs.dtype)  # [N]
    kept = probs if mask is None else probs.masked_fill(~mask[:, None], 0)
    chosen = chosen if eta is None else eta * chosen
    return torch.dot(chosen, kept.sum(0)) / n_tokens**2


def sequence_balance_loss(
    probs: Tensor, experts: Tensor, n_sequences: int, mask: Tensor | None = None
) -> Tensor:
    """The mean over sequences of the canonical loss of each (arXiv:2412.19437, eq. 17 to 20).

    Args:
        probs: [T, E], summing to 1 over the experts, batch-major: T = n_sequences * S.
        experts: [T, K] int64, the chosen ones.
        n_sequences: B. A sequence without a real token is left out of the mean.
        mask: [T] bool, True where a token is real.
    """
    n_experts, k = probs.shape[-1], experts.shape[-1]
    if not probs.shape[0]:
        return probs.sum()
    if n_sequences < 1 or probs.shape[0] % n_sequences:
        raise ValueError(f"{probs.shape[0]} tokens are not {n_sequences} equal sequences")
    per = probs.shape[0] // n_sequences
    sequence = torch.arange(n_sequences, device=probs.device).repeat_interleave(per)  # [T]
    counts = count_experts(experts + n_experts * sequence[:, None], n_sequences * n_experts, mask)
    kept = probs if mask is None else probs.masked_fill(~mask[:, None], 0)
    total = kept.unflatten(0, (n_sequences, per)).sum(1)  # [B, E]
    if mask is None:
        return (counts.view_as(total) * total).sum() * (n_experts / (k * per**2 * n_sequences))
    real = mask.view(n_sequences, per).sum(-1)  # [B]
    each = (counts.view_as(total) * total).sum(-1) / real.clamp_min(1).square()
    return each.sum() * (n_experts / k) / (real > 0).sum().clamp_min(1)


class BalanceLoss(nn.Module):
    """The canonical balance loss of a router, with f counted over one of three scopes (moe.md 3.1).

    micro_batch: the tokens of this forward. sequence: each sequence by itself, then the mean; the
    layer says how many there are. global_batch: this micro-batch on every rank, and the
    micro-batches of the step before it, whose counts a controller adds to the buffer `seen`
    (`recipes.controllers`). Exact for one micro-batch a step; else the running average that
    Megatron takes too. Evaluation counts only what it is given.
    """

    seen: Tensor | None  # [E] int64, assignments of the step so far, of all ranks

    def __init__(self, scope: str, n_experts: int):
        super().__init__()
        self.scope = scope
        seen = torch.zeros(n_experts, dtype=torch.int64) if scope == "global_batch" else None
        self.register_buffer("seen", seen, persistent=False)  # a checkpoint follows a whole step

    def forward(
        self, probs: Tensor, experts: Tensor, mask: Tensor | None, n_sequences: int | None = None
    ) -> Tensor:
        """As `balance_loss`; n_sequences: B, for scope "sequence"."""
        if self.scope == "sequence":
            if n_sequences is None:
                raise ValueError(
                    "balance_scope='sequence' needs to know the sequences: hand the router "
                    "n_sequences, the batch size"
                )
            return sequence_balance_loss(probs, experts, n_sequences, mask)
        if self.seen is None or not self.training:
            return balance_loss(probs, experts, mask)
        counts = over_ranks(count_experts(experts, probs.shape[-1], mask))
        return balance_loss(probs, experts, mask, counts + self.seen)


def check_scope(scope: str, allowed: tuple[str, ...] = SCOPES) -> None:
    """Raise unless it is a scope of a balance loss."""
    check_choice("balance_scope", scope, allowed)


def over_ranks(counts: Tensor) -> Tensor:
    """Counts summed over all processes, where there are several: one all-reduce, no gradient."""
    if not (dist.is_available() and dist.is_initialized()):
        return counts
    counts = counts.clone()
    dist.all_reduce(counts)
    return counts


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens of (logsumexp of the raw logits)^2 (arXiv:2202.08906, eq. 5).

    logits: [T, E]; mask: [T] bool. (ln E)^2 for logits of zero.
    """
    return _token_mean(logits.logsumexp(-1).square(), mask)


def square_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens and experts of l^2: what a z-loss is to a router without a softmax.

    Its logsumexp is no normaliser of a sigmoid (moe.md 3.2). logits: [T, E]; mask: [T] bool.
    """
    return _token_mean(logits.square().mean(-1), mask)


def load_weighted_l1(gates: Tensor, target: int, mask: Tensor | None = None) -> Tensor:
    """E / (k T^2) sum_e c_e sum_t g_te, c_e the tokens with g > 0 (arXiv:2412.14711, eq. 9 to 11).

    An L1 norm that weighs an expert by its load, so that it also balances; for even loads of k
    experts a token it is the mean over tokens of the sum of gates.

    Args:
        gates: [T, E], 0 or more.
        target: k, experts that should be active for a token.
        mask: [T] bool, True where a token is real.
    """
    kept = gates if mask is None else gates.masked_fill(~mask[:, None], 0)
    counts = (kept.detach() > 0).sum(0).to(kept.dtype)  # [E]
    scale = gates.shape[-1] / target
    return torch.dot(counts, kept.sum(0)) * scale / _n_tokens(gates, mask) ** 2


def _token_mean(of_tokens: Tensor, mask: Tensor | None) -> Tensor:
    """[T], meaned over the real ones."""
    kept = of_tokens if mask is None else of_tokens.masked_fill(~mask, 0)
    return kept.sum() / _n_tokens(of_tokens, mask)


def _n_tokens(rows: Tensor, mask: Tensor | None) -> Tensor | int:
    """Real tokens, or 1 when there are none: an empty sum over it is a loss of 0."""
    if mask is None:
        return max(rows.shape[0], 1)
    return mask.sum().clamp_min(1)
