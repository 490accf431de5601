"""How far routers have settled: the share of choices kept since the evaluation before.

The choices for the same held-out tokens are kept from one evaluation to the next, at most 1 MiB of
them, as tensors that a checkpoint takes; so a resumed run finds the share that an uninterrupted one
does. OLMoE's saturation (arXiv:2409.02060, sec. 4.1) is the same with the last checkpoint in place
of the one before.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torchmetrics import Metric

from layers.base import Routing
from recipes.batches import Batch

MOST_KEPT = 2**18  # choices, 4 bytes each
NONE = -1  # in place of a choice that does not hold


class Choices(NamedTuple):
    """What routers chose for N tokens."""

    tokens: Tensor  # [N] int32, the tokens' ids: whose choices these are
    experts: Tensor  # [N, sum of K over the layers] int32; NONE where a choice does not hold
    widths: tuple[int, ...]  # K of each layer

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self._asdict() | {"widths": list(self.widths)}

    @classmethod
    def of_state(cls, state: Mapping[str, Any] | None) -> Self | None:
        """The choices that were kept; None where there were none."""
        if state is None:
            return None
        return cls(state["tokens"], state["experts"], tuple(state["widths"]))


def agreement(before: Choices | None, now: Choices | None) -> tuple[float, float] | None:
    """How alike two evaluations chose for the same tokens.

    Returns:
        The share of the earlier choices that are in the later ones, over tokens and layers; and
        the Jaccard index of the two sets of a token in a layer (1 where both are empty), meaned
        over both. None where one is missing or they are of different tokens.
    """
    if before is None or now is None or before.widths != now.widths:
        return None
    if len(now.tokens) == 0 or not torch.equal(before.tokens, now.tokens):
        return None
    held = kept = 0
    jaccard = 0.0
    pairs = zip(*(c.experts.split(c.widths, dim=-1) for c in (before, now)), strict=True)
    for a, b in pairs:  # [N, K] each
        both = ((a[:, :, None] == b[:, None, :]).any(-1) & (a != NONE)).sum(-1)  # [N]
        either = (a != NONE).sum(-1) + (b != NONE).sum(-1) - both
        held += int((a != NONE).sum())
        kept += int(both.sum())
        alike = torch.where(either > 0, both.double() / either.clamp_min(1), 1.0)
        jaccard += alike.mean().item() / len(now.widths)
    return (kept / held if held else 1.0), jaccard


class ChoiceLog(Metric):
    """The choices for evenly spaced tokens of an evaluation: every 1st, 2nd, 4th, ... real one.

    As sparse as MOST_KEPT asks for, with no look ahead: where there are too many, every second is
    dropped. Each process thins its own tokens; `value` is of all.
    """

    full_state_update = False
    tokens: list[Tensor] | Tensor  # one tensor [N]; concatenated over the processes in `compute`
    experts: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("tokens", [], dist_reduce_fx="cat")
        self.add_state("experts", [], dist_reduce_fx="cat")
        self.widths: tuple[int, ...] = ()
        self.stride, self.seen = 1, 0

    def update(self, seen: Mapping[int, Routing], batch: Batch) -> None:
        """Add one batch. seen: as `recipes.health.watched` gives it."""
        n = batch.tokens.numel()
        routings = [seen[layer] for layer in sorted(seen) if len(seen[layer].experts) == n]
        if not routings:
            return
        real = torch.arange(n, device=batch.tokens.device)
        if batch.mask is not None:
            real = real[batch.mask.flatten()]
        first = -self.seen % self.stride
        self.seen += len(real)
        rows = real[first :: self.stride]
        self.widths = tuple(routing.experts.shape[-1] for routing in routings)
        parts = [_held(routing)[rows] for routing in routings]
        added = batch.tokens.flatten()[rows].int(), torch.cat(parts, dim=-1).int()
        tokens, experts = (
            torch.cat([*old, new.to(self.device)])
            for old, new in zip((self.tokens, self.experts), added, strict=True)
        )
        while experts.numel() > MOST_KEPT and len(experts) > 1:
            self.stride *= 2
            tokens, experts = tokens[::2], experts[::2]
        self.tokens, self.experts = [tokens], [experts]

    def compute(self) -> tuple[list[Tensor] | Tensor, list[Tensor] | Tensor]:
        """Ids and choices of all processes."""
        return self.tokens, self.experts

    def value(self) -> Choices | None:
        """The choices of all processes; None where no router was seen."""
        if not self.widths:
            return None
        tokens, experts = (
            torch.cat(part) if isinstance(part, list) else part for part in self.compute()
        )
        return Choices(tokens.reshape(-1), experts.reshape(-1, sum(self.widths)), self.widths)


def _held(routing: Routing) -> Tensor:
    """[T, K], the experts chosen, NONE for what does not hold."""
    if routing.keep is None:
        return routing.experts
    return routing.experts.masked_fill(~routing.keep, NONE)
