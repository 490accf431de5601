"""Routers of a `factor_llm` conversion taught by the dense model, before any other training."""

from collections.abc import Iterable

import torch
from torch import Tensor

from layers.moe import MoE
from layers.swiglu import SwiGLU
from zoo.conversion.prior import layer_pa_loss
from zoo.model import LanguageModel


def teach_routers(
    student: LanguageModel, teacher: LanguageModel, batches: Iterable[Tensor], *, lr: float = 1e-2
) -> list[float]:
    """Adam on the routers alone, on `layer_pa_loss` at the teacher's own FFN inputs.

    The published step leaves its router untaught, and its teacher path is not the model's; here the
    frozen dense model runs as it is (moe.md 10).

    Args:
        student: converted from `teacher` to factor_llm; its routers change in place.
        teacher: the dense model, which stays as it is.
        batches: of tokens [B, S]; a step each.
        lr: of Adam, constant.

    Returns:
        The loss of each step, mean over the converted layers, nats.

    Raises:
        ValueError: where no layer of the student is a mixture in place of a dense FFN.
    """
    pairs = [
        (new.ffn, old.ffn)
        for new, old in zip(student.blocks, teacher.blocks, strict=True)
        if isinstance(new.ffn, MoE) and isinstance(old.ffn, SwiGLU)
    ]
    if not pairs:
        raise ValueError("no layer of the student is a mixture in place of a dense FFN")
    optimizer = torch.optim.Adam((w for moe, _ in pairs for w in moe.router.parameters()), lr=lr)
    losses = []
    for tokens in batches:
        inputs = _ffn_inputs(teacher, [ffn for _, ffn in pairs], tokens)
        of_layers = [
            layer_pa_loss(moe, ffn, x) for (moe, ffn), x in zip(pairs, inputs, strict=True)
        ]
        loss = torch.stack(of_layers).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def _ffn_inputs(teacher: LanguageModel, ffns: list[SwiGLU], tokens: Tensor) -> list[Tensor]:
    """What each of these layers reads, [T, D] each, in float32."""
    found: dict[SwiGLU, Tensor] = {}

    def keep(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, SwiGLU)
        found[module] = args[0].flatten(0, 1).float()

    handles = [ffn.register_forward_pre_hook(keep) for ffn in ffns]
    training = teacher.training
    try:
        teacher.eval()(tokens)
    finally:
        teacher.train(training)
        for handle in handles:
            handle.remove()
    return [found[ffn] for ffn in ffns]
