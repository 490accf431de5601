"""FactorLLM's prior-approximate routing: what its router is taught (arXiv:2408.11855; moe.md 10).

The loss of training is cross-entropy + 0.05 * the sum over layers of `pa_loss` + 0.01 * that of the
published balance term (`routers.factor_llm.chosen_share`). `recipes.prior` adds it to training.
"""

import torch
from torch import Tensor

from layers.moe import MoE
from layers.swiglu import SwiGLU, glu
from routers.factor_llm import FactorLLMRouter
from zoo.conversion.stacks import ExpertStacks

CLIP = 1e-7  # the published code's bound of both distributions


def expert_outputs(x: Tensor, stacks: ExpertStacks, activation: str = "silu") -> Tensor:
    """Every expert on every token, without weights. x: [T, D]. Returns [T, E, D]."""
    h = glu(torch.einsum("td,efd->tef", x, stacks.gate_up), activation)
    return torch.einsum("tef,edf->ted", h, stacks.down)


def pa_labels(outputs: Tensor, target: Tensor, top_k: int) -> Tensor:
    """Pseudo-labels: the K experts whose outputs alone come nearest to K / N of the teacher's.

    Args:
        outputs: [T, N, D], of the experts on the teacher's inputs, unscaled (`expert_outputs`).
        target: [T, D], of the frozen dense FFN on the same inputs.
        top_k: K.

    Returns:
        [T, N] of 0 and 1, K ones in a row; no gradient. N / K is a fraction where K does not divide
        N; the published code rounds it down.
    """
    n_experts = outputs.shape[1]
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k must be in [1, {n_experts}], got {top_k}")
    outputs, target = outputs.detach(), target.detach()
    distance = (outputs - target[:, None] * (top_k / n_experts)).square().mean(-1)  # [T, N]
    nearest = distance.sort(dim=-1, stable=True).indices[:, :top_k]
    return torch.zeros_like(distance).scatter_(-1, nearest, 1.0)


def pa_loss(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(p || q), mean over tokens; p = softmax(logits), q = softmax(labels), nats.

    logits, labels: [T, N]; mask: [T] bool, True where a token is real. Both distributions are
    clipped to [1e-7, 1 - 1e-7]. Unlike the published helper it averages over all tokens.
    """
    p, q = (x.float().softmax(-1).clamp(CLIP, 1 - CLIP) for x in (logits, labels))
    divergence = (p * (p.log() - q.log())).sum(-1)  # [T]
    if mask is None:
        return divergence.mean()
    return divergence.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def layer_pa_loss(moe: MoE, teacher: SwiGLU, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """`pa_loss` of one layer of a `factor_llm` conversion against the FFN that it came from.

    moe: its experts as they are now. teacher: frozen. x: [T, D], the FFN's inputs, of the teacher's
    model or the student's. mask: [T] bool. Teaches the router alone. Computed without formats;
    raises ValueError for another router.
    """
    if not isinstance(moe.router, FactorLLMRouter):
        raise ValueError(f"factor_llm alone is taught, got a {type(moe.router).__name__}")
    with torch.no_grad():
        x = x if mask is None else x.masked_fill(~mask[:, None], 0)
        stacks = ExpertStacks(moe.experts.gate_up.weight, moe.experts.down.weight)
        outputs = expert_outputs(x, stacks, moe.config.activation)
        gate_up = x @ teacher.gate_up.weight.t()
        target = glu(gate_up, teacher.config.activation) @ teacher.down.weight.t()
        labels = pa_labels(outputs, target, moe.config.top_k)
    return pa_loss(moe.router(x.detach()).logits, labels, mask)
