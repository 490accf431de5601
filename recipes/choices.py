"""How far routers have settled: the share of choices kept since the evaluation before.

The choices for the same held-out tokens are kept from one evaluation to the next, a sample of 1 MiB
at most, as tensors that a checkpoint takes; so a resumed run finds the share that an uninterrupted
one does. OLMoE's saturation (arXiv:2409.02060, sec. 4.1) is the same with the last checkpoint in
place of the one before.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torchmetrics import Metric

from layers.base import Routing
from recipes.batches import Batch
from routers.random import GOLDEN, mixed

MOST_KEPT = 2**18  # choices, 4 bytes each
NONE = -1  # in place of a choice that does not hold


class Choices(NamedTuple):
    """What routers chose for N tokens."""

    keys: Tensor  # [N] int64, rising: whose choices these are (`token_keys`)
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
        return cls(state["keys"], state["experts"], tuple(state["widths"]))


def agreement(before: Choices | None, now: Choices | None) -> tuple[float, float] | None:
    """How alike two evaluations chose for the same tokens.

    Returns:
        The share of the earlier choices that are in the later ones, over tokens and layers; and
        the Jaccard index of the two sets of a token in a layer (1 where both are empty), meaned
        over both. None where one is missing or they are of different tokens.
    """
    if before is None or now is None or before.widths != now.widths:
        return None
    if len(now.keys) == 0 or not torch.equal(before.keys, now.keys):
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
    """The choices for some tokens of an evaluation: those of the smallest keys, as many as fit.

    A key is a hash of a token's window and place in it, so the sample is a random one, and the same
    in whatever batches, in whatever order and on however many processes the windows come.
    """

    full_state_update = False
    keys: list[Tensor] | Tensor  # one tensor [N]; concatenated over the processes in `compute`
    experts: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("keys", [], dist_reduce_fx="cat")
        self.add_state("experts", [], dist_reduce_fx="cat")
        self.widths: tuple[int, ...] = ()

    def update(self, seen: Mapping[int, Routing], batch: Batch) -> None:
        """Add one batch. seen: as `recipes.health.watched` gives it."""
        n = batch.tokens.numel()
        routings = [seen[layer] for layer in sorted(seen) if len(seen[layer].experts) == n]
        if not routings:
            return
        self.widths = tuple(routing.experts.shape[-1] for routing in routings)
        keys = token_keys(batch).flatten()
        experts = torch.cat([_held(routing) for routing in routings], dim=-1).int()
        if batch.mask is not None:
            real = batch.mask.flatten()
            keys, experts = keys[real], experts[real]
        keys, experts = (x.to(self.device) for x in (keys, experts))
        self.keys, self.experts = (
            [x]
            for x in _smallest(torch.cat([*self.keys, keys]), torch.cat([*self.experts, experts]))
        )

    def compute(self) -> tuple[list[Tensor] | Tensor, list[Tensor] | Tensor]:
        """Keys and choices of all processes."""
        return self.keys, self.experts

    def value(self) -> Choices | None:
        """The choices of all processes; None where no router was seen."""
        if not self.widths:
            return None
        keys, experts = (
            torch.cat(part) if isinstance(part, list) else part for part in self.compute()
        )
        experts = experts.reshape(-1, sum(self.widths))  # one number comes without axes
        return Choices(*_smallest(keys.reshape(-1), experts), self.widths)


def token_keys(batch: Batch) -> Tensor:
    """[B, S] int64, alike for tokens at the same place of equal windows of one domain alone."""
    places = torch.arange(1, batch.tokens.shape[1] + 1, device=batch.tokens.device) * GOLDEN  # [S]
    window = mixed(batch.tokens + places).sum(-1, keepdim=True)  # [B, 1]
    return mixed(mixed(window + (batch.domain or 0)) + places)


def _smallest(keys: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """By key, as many as MOST_KEPT allows. keys: [N]; experts: [N, sum of K]."""
    order = keys.sort(stable=True).indices[: max(MOST_KEPT // experts.shape[-1], 1)]
    return keys[order], experts[order]


def _held(routing: Routing) -> Tensor:
    """[T, K], the experts chosen, NONE for what does not hold."""
    if routing.keep is None:
        return routing.experts
    return routing.experts.masked_fill(~routing.keep, NONE)
