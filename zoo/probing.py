"""What a model's formats do to the operands of one batch."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.precision.operands import OPERANDS
from layers.precision.probe import ProbeReport, chosen_leaves, probing
from zoo.model import LanguageModel


def probe(
    model: LanguageModel,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    where: str = "*",
    roles: Iterable[str] = (),
    layers: str | None = None,
    operands: Iterable[str] = OPERANDS,
) -> ProbeReport:
    """Probe the forward and backward of one batch's mean next-token loss.

    The model is left as it was: weights, gradients, buffers, random state.

    Args:
        model: not compiled, in the mode that it is to be probed in, its weights not packed.
        tokens: [B, S] int64, S >= 2; each is predicted from those before it.
        mask: [B, S] bool, True where a token is real; others are neither read nor predicted.
        where: which leaves; it, `roles`, `layers` and `operands` as in
            `layers.precision.probe.probing`.
        roles: see there.
        layers: see there.
        operands: see there.

    Returns:
        SNR, clipped and underflowed share and scales of every operand of the chosen leaves.

    Raises:
        ValueError: when selectors match nothing, every matched leaf only casts, no weight takes a
            gradient, or there is no token to predict.
    """
    roles = (roles,) if isinstance(roles, str) else tuple(roles)
    chosen = chosen_leaves(model, where, roles, layers)
    if all(leaf.precision is None or leaf.precision.is_cast for leaf in chosen.values()):
        raise ValueError(
            f"none of the {len(chosen)} leaves to probe quantises anything: set a low precision "
            "first, or choose others"
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no weight of the model takes a gradient: there is no backward to probe")
    peaks = [(p, p.clone()) for n, p in model.named_buffers() if n.endswith("operand_peaks")]
    devices = [tokens.device] if tokens.device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.enable_grad(),
            probing(model, where, roles, operands, layers) as found,
        ):
            torch.autograd.grad(_loss(model, tokens, mask), trained, allow_unused=True)
    finally:
        for peak, before in peaks:  # of delayed scales: those of training's own steps
            peak.copy_(before)
    return found.report()


def _loss(model: LanguageModel, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean cross-entropy of every real token but the first of a row, in nats."""
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens must be [B, S] with S >= 2, got {list(tokens.shape)}")
    counted = torch.ones_like(tokens[:, 1:], dtype=torch.bool)
    if mask is not None:
        counted = mask[:, 1:] & mask[:, :-1]
    if not counted.any():
        raise ValueError("the mask leaves no token to predict")
    given = None if mask is None else mask[:, :-1]
    logits = model(tokens[:, :-1], mask=given).logits
    return F.cross_entropy(logits[counted].float(), tokens[:, 1:][counted])
