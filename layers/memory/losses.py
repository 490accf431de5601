"""Losses of Tucker-decomposed keys; UltraMemV2's final model has neither (memory.md 5.7, 6.7)."""

import torch
from torch import Tensor

from layers.dispatch import count_experts

BALANCES = ("paper", "release")


def core_penalty(core: Tensor, margin: float) -> Tensor:
    """1 / (r - 1) * sum over i >= 2 of max(0, lambda_i - margin)^2, mean over heads: 0 where the
    leading singular vectors say nearly all, so that searching by them misses little.

    UltraMem's (arXiv:2411.12364), with a margin of 0.15 and a weight of 0.001.

    core: [H, r, r], r >= 2. Returns a scalar, in at least float32.
    """
    core = core.to(torch.promote_types(core.dtype, torch.float32))  # has no SVD below
    others = torch.linalg.svdvals(core)[..., 1:]
    return torch.relu(others - margin).square().mean()


def key_balance(along: Tensor, chosen: Tensor, form: str, mask: Tensor | None = None) -> Tensor:
    """n * sum over keys i of f_i p_i for one side, mean over heads (arXiv:2508.18756).

    p_i is the mean over tokens of the softmax over all n keys, and carries the gradient; f_i, how
    many tokens chose i, carries none.

    Args:
        along: [T, H, n], what the side is searched by: u^T S.
        chosen: [T, H, m] int64, the m keys of largest `along`.
        form: "paper" divides f by the tokens, so that even use gives m; "release" by all choices,
            so that it gives 1.
        mask: [T] bool, True where a token is real; others are in neither. None: all are.

    Returns:
        A scalar; 0 without a real token.
    """
    heads, n = along.shape[1:]
    probs = along.softmax(-1)
    if mask is not None:
        probs = probs.masked_fill(~mask[:, None, None], 0)
    of_head = torch.arange(heads, device=chosen.device)[:, None] * n
    counts = count_experts((chosen + of_head).flatten(1), heads * n, mask).view(heads, n)
    n_tokens = along.shape[0] if mask is None else mask.sum()
    per_token = torch.as_tensor(n_tokens, device=along.device).clamp(min=1).to(probs.dtype)
    share = counts.to(probs.dtype) / per_token
    if form == "release":
        share = share / chosen.shape[-1]
    return n * (share * probs.sum(0) / per_token).sum(-1).mean()
