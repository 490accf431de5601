"""How nearly a submodel says what the whole model says (MatFormer, arXiv:2310.07707, sec. 4)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.model import LanguageModel

Batch = tuple[Tensor, Tensor | None]  # tokens [B, S] int64; mask [B, S] bool, True where real


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """Means over positions of a submodel's next token against the whole model's."""

    positions: int
    agreement: float  # share of positions with the same likeliest token
    kl: float  # KL(whole || submodel), nats per token
    overlap: float  # sum of min(p, q): the share of its drafts that speculation keeps on this text


class _Sums(NamedTuple):
    """Of some positions, float64."""

    agreement: Tensor
    kl: Tensor
    overlap: Tensor


def consistency(
    model: LanguageModel,
    others: Sequence[LanguageModel | Sequence[int | None]],
    batches: Iterable[Batch],
) -> tuple[Consistency, ...]:
    """Every other model, or submodel, against the whole one on the same text.

    Args:
        model: run whole; in evaluation mode, and put back into its own afterwards.
        others: widths of its layers as its forward takes them, or models of the same vocabulary.
        batches: the text, every real position of which counts.

    Returns:
        One for each of the others, in their order.

    Raises:
        ValueError: for text without a real position, another vocabulary, or as the forward.
    """
    models = [model, *(other for other in others if isinstance(other, LanguageModel))]
    sizes = {each.config.vocab_size for each in models}
    if len(sizes) > 1:
        raise ValueError(f"all models must have one vocabulary, got sizes {sorted(sizes)}")
    before = [(each, each.training) for each in models]
    sums, n = [torch.zeros(len(_Sums._fields), dtype=torch.float64) for _ in others], 0
    try:
        for each in models:
            each.eval()
        with torch.no_grad():
            for tokens, mask in batches:
                n += tokens.numel() if mask is None else int(mask.sum())
                whole = model(tokens, mask).logits
                for i, other in enumerate(others):
                    logits = _logits(model, other, tokens, mask)
                    sums[i] += torch.stack(_compared(whole, logits, mask)).cpu()
    finally:
        for each, training in before:
            each.train(training)
    if n == 0:
        raise ValueError("the batches hold no real token, so there is nothing to compare")
    return tuple(_mean(each, n) for each in sums)


def next_token_kl(whole: Tensor, other: Tensor) -> Tensor:
    """KL(whole || other) of the next token in nats, float32. Logits [..., V]. Returns [...]."""
    p, q = whole.float().log_softmax(-1), other.float().log_softmax(-1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _logits(
    model: LanguageModel, other: LanguageModel | Sequence[int | None], tokens: Tensor,
    mask: Tensor | None,
) -> Tensor:  # fmt: skip
    if isinstance(other, LanguageModel):
        return other(tokens, mask).logits
    return model(tokens, mask, widths=other).logits


def _compared(whole: Tensor, other: Tensor, mask: Tensor | None) -> _Sums:
    """Sums over real positions. Logits [B, S, V]; mask: [B, S] bool."""
    if mask is not None:
        whole, other = whole[mask], other[mask]  # [N, V]
    same = whole.argmax(-1) == other.argmax(-1)
    least = torch.minimum(whole.float().softmax(-1), other.float().softmax(-1)).sum(-1)
    kl = next_token_kl(whole, other)
    return _Sums(*(x.double().sum() for x in (same, kl, least)))


def _mean(sums: Tensor, n: int) -> Consistency:
    agreement, kl, overlap = (sums / n).tolist()
    return Consistency(positions=n, agreement=agreement, kl=kl, overlap=overlap)
