"""Losses that keep a router's experts in use, as pure functions (moe.md 3).

One family: L = C * sum over e of eta_e f_e P_e. P_e is the mean over tokens of the router's
probability of e and carries the gradient; f_e = c_e / T, the share of tokens that chose e, carries
none. f sums to K and P to 1. Masked tokens are in neither.
"""

import torch
from torch import Tensor

from layers.dispatch import count_experts


def balance_loss(probs: Tensor, experts: Tensor, mask: Tensor | None = None) -> Tensor:
    """The canonical balance loss, E / K * sum f_e P_e: 1.0 when even, E / K at collapse on one.

    Equals Switch's (arXiv:2101.03961, eq. 4) for K = 1 and Megatron's and MegaBlocks' for any K;
    that of Hugging Face's models is K times as large.

    Args:
        probs: [T, E], softmax over all experts.
        experts: [T, K] int64, the chosen ones.
        mask: [T] bool, True where a token is real.
    """
    raw = heterogeneous_balance_loss(probs, experts, None, mask)
    return raw * (probs.shape[-1] / experts.shape[-1])


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


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens of (logsumexp of the raw logits)^2 (arXiv:2202.08906, eq. 5).

    logits: [T, E]; mask: [T] bool. (ln E)^2 for logits of zero.
    """
    z = logits.logsumexp(-1).square()
    z = z if mask is None else z.masked_fill(~mask, 0)
    return z.sum() / _n_tokens(logits, mask)


def _n_tokens(rows: Tensor, mask: Tensor | None) -> Tensor | int:
    """Real tokens, or 1 when there are none: an empty sum over it is a loss of 0."""
    if mask is None:
        return max(rows.shape[0], 1)
    return mask.sum().clamp_min(1)
