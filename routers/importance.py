"""Noisy top-k's two balance losses, importance and load (arXiv:1701.06538, app. A; moe.md 3.3).

Both are squared coefficients of variation over the experts: 0 when even, E - 1 at collapse on one.
"""

import torch
from torch import Tensor


def squared_variation(v: Tensor) -> Tensor:
    """(std / mean)^2 with the population's std; 0 for a v of zeros. v: [E], 0 or more."""
    return v.var(correction=0) / v.mean().square().clamp_min(1e-30)


def importance_loss(gates: Tensor, mask: Tensor | None = None) -> Tensor:
    """CV^2 over experts of the summed gates (eq. 6, 7). gates: [T, E]; mask: [T] bool."""
    kept = gates if mask is None else gates.masked_fill(~mask[:, None], 0)
    return squared_variation(kept.sum(0))


def load_loss(
    logits: Tensor, threshold: Tensor, std: Tensor | float, mask: Tensor | None = None
) -> Tensor:
    """CV^2 over experts of the smooth load: how likely a new draw of noise is to choose each.

    v_e = mean over tokens of Phi((l_te - threshold_te) / std_te) (eq. 8 to 11).

    Args:
        logits: [T, E], without noise.
        threshold: [T, E] or [T, 1], what the noisy logit has to exceed.
        std: of the noise: [T, E], or one number.
        mask: [T] bool, True where a token is real.
    """
    p = torch.special.ndtr((logits - threshold) / std)
    p = p if mask is None else p.masked_fill(~mask[:, None], 0)
    real = max(p.shape[0], 1) if mask is None else mask.sum().clamp_min(1)
    return squared_variation(p.sum(0) / real)


def threshold_of_all(noisy: Tensor, top_k: int) -> Tensor:
    """V-MoE's threshold: the K-th largest noisy logit of a token. noisy: [T, E]. Returns [T, 1]."""
    return noisy.topk(top_k, dim=-1).values[:, -1:]


def threshold_of_others(noisy: Tensor, experts: Tensor) -> Tensor:
    """Noisy top-k's threshold: the K-th largest noisy logit among a token's other experts (eq. 9).

    noisy: [T, E]; experts: [T, K] int64, its K largest, and K < E. Returns [T, E].
    """
    k = experts.shape[-1]
    best = noisy.topk(k + 1, dim=-1).values  # [T, K + 1]
    chosen = torch.zeros_like(noisy, dtype=torch.bool).scatter_(-1, experts, True)
    return torch.where(chosen, best[:, k : k + 1], best[:, k - 1 : k])
