"""How memory layers use their rows for held-out tokens, layer by layer (memory.md 2, 5.3, 14).

Reads of each row come with the layers' `stats` in evaluation; what a retriever that looks at a part
of all pairs misses is measured by a hook, on a few tokens of every batch: training pays nothing.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from math import log
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from layers.memory import Hits, Memory, TuckerKeys, slot_usage
from layers.memory.tucker import core_gap
from recipes.hooks import seen_in
from recipes.report.layer_records import LayerMemory

SAMPLE_TOKENS = 4  # of every batch, searched exhaustively
MOST_PAIRS = 2**24  # pairs of keys that such a search scores at once
STEPS = 32  # of the curve of concentration


class Search(NamedTuple):
    """What a retriever found for a few tokens of a forward, against all pairs of its keys."""

    tokens: Tensor  # [N] int64, which
    found: Tensor  # [N] float64, of the best slots
    slots: int  # best slots of a token, over the heads
    gap: Tensor  # [], mean of `core_gap` over the heads


def memories_of(model: nn.Module) -> dict[int, Memory]:
    """{layer: its FFN's memory} for the layers that have one."""
    found = (getattr(block.ffn, "memory", None) for block in cast(Any, model).blocks)
    return {layer: each for layer, each in enumerate(found) if isinstance(each, Memory)}


def searched(model: nn.Module) -> AbstractContextManager[dict[int, Search]]:
    """{layer: how well its retriever searched}, as `recipes.hooks.seen_in`.

    Only retrievers that may miss slots.
    """
    keys = {k: m.keys for k, m in memories_of(model).items() if isinstance(m.keys, TuckerKeys)}
    return seen_in(model, keys, lambda module, args, hits: search_again(module, args[0], hits))


def search_again(keys: TuckerKeys, queries: Tensor, hits: Hits) -> Search:
    """Search all pairs for a few tokens, evenly spaced. queries, hits: of T tokens, in order."""
    c, n_tokens = keys.config, queries.shape[0]
    n = min(SAMPLE_TOKENS, n_tokens, max(MOST_PAIRS // (c.heads * c.n_keys**2), 1))
    tokens = torch.arange(n, device=queries.device) * n_tokens // max(n, 1)
    best = keys.exhaustive(queries[tokens])  # [N, H, K]
    found = (best[..., :, None] == hits.slots[tokens][..., None, :]).any(-1)
    gap = core_gap(keys.cores.detach().sum(0).float()).mean()
    return Search(tokens, found.flatten(1).sum(-1).double(), c.hits, gap)


class MemoryHealth(Metric):
    """Sums over the real tokens of an evaluation, by memory layer."""

    full_state_update = False

    def __init__(self, model: nn.Module, domains: Sequence[str]):
        super().__init__()
        self.domains = tuple(domains)
        self.rows: dict[int, Tensor] = {}  # [visible], those of its pool that a layer sees
        self.pools: dict[int, str | None] = {}
        self.gaps: dict[int, float] = {}
        names = {pool: name for name, pool in getattr(model, "pools", nn.ModuleDict()).items()}
        for layer, memory in memories_of(model).items():
            self.rows[layer] = visible_rows(memory)
            self.pools[layer] = names.get(memory.values())
            reads = torch.zeros(len(self.domains), len(self.rows[layer]), dtype=torch.float64)
            self.add_state(f"reads_{layer}", reads, dist_reduce_fx="sum")
            found = torch.zeros(2, dtype=torch.float64)  # of the best slots, and how many there are
            self.add_state(f"found_{layer}", found, dist_reduce_fx="sum")

    def update(
        self, stats: Sequence[Mapping[str, Tensor] | None], seen: Mapping[int, Search],
        domain: int | None, mask: Tensor | None,
    ) -> None:  # fmt: skip
        """Add one batch.

        Args:
            stats: one mapping a layer.
            seen: as `searched` gives it.
            domain: of the batch.
            mask: [B, S] bool, True where a token is real.
        """
        for layer, rows in self.rows.items():
            slots = (stats[layer] or {}).get("slots")
            if slots is not None:
                reads = getattr(self, f"reads_{layer}")
                reads[domain or 0] += slots[rows.to(slots.device)].to(reads)
            if layer in seen:
                self._add(layer, seen[layer], mask)

    def _add(self, layer: int, search: Search, mask: Tensor | None) -> None:
        real = torch.ones_like(search.found) if mask is None else mask.flatten()[search.tokens]
        sums = torch.stack([(search.found * real).sum(), search.slots * real.double().sum()])
        state = getattr(self, f"found_{layer}")
        state += sums.to(state.device)
        self.gaps[layer] = search.gap.item()

    def compute(self) -> dict[int, tuple[Tensor, Tensor]]:
        """{layer: reads [domains, rows], best slots found and looked for [2]}, of all processes."""
        return {k: (getattr(self, f"reads_{k}"), getattr(self, f"found_{k}")) for k in self.rows}

    def layers(self) -> tuple[LayerMemory, ...]:
        """A record per memory layer that was read."""
        return tuple(
            self._record(layer, reads.reshape(len(self.domains), -1), found.tolist())
            for layer, (reads, found) in self.compute().items()
            if reads.sum() > 0
        )

    def _record(self, layer: int, reads: Tensor, found: Sequence[float]) -> LayerMemory:
        every = reads.sum(0)
        used, kl = (x.item() for x in slot_usage(every))
        return LayerMemory(
            layer=layer,
            pool=self.pools[layer],
            n_rows=len(every),
            reads=every.sum().item(),
            used=used,
            kl=max(kl, 0.0),
            concentration=concentration(every),
            used_by_domain={
                name: (of > 0).double().mean().item()
                for name, of in zip(self.domains, reads, strict=True)
                if of.sum() > 0
            },
            domain_information=domain_information(reads),
            recall=found[0] / found[1] if found[1] else None,
            recall_slots=int(found[1]),
            core_gap=self.gaps.get(layer),
        )


def visible_rows(memory: Memory) -> Tensor:
    """[visible] int64, the rows of its pool that a layer can read."""
    if memory.config.expansion is None:
        return torch.arange(memory.config.pool.n_rows)
    window = memory.config.expansion.window
    return (window.offset + torch.arange(window.visible)) % window.n_rows


def concentration(reads: Tensor) -> tuple[float, ...]:
    """Share of the reads on the most read 0, 1/32, ..., all rows, rounded down. reads: [M]."""
    ordered = reads.sort(descending=True).values.cumsum(0) / reads.sum()
    places = [i * len(reads) // STEPS for i in range(STEPS + 1)]
    return tuple(ordered[n - 1].item() if n else 0.0 for n in places)


def domain_information(reads: Tensor) -> float:
    """I(domain; row) over the most that it can be, as `LayerLoad.domain_information`.

    reads: [domains, M]. 0 with fewer than 2 domains.
    """
    rows = reads[reads.sum(-1) > 0]
    if len(rows) < 2:
        return 0.0
    shares = rows / rows.sum(-1, keepdim=True)
    marginal = _entropy(shares.mean(0))
    most = min(log(len(rows)), marginal)
    information = marginal - sum(_entropy(share) for share in shares) / len(rows)
    return min(max(information / most, 0.0), 1.0) if most > 0 else 0.0


def _entropy(shares: Tensor) -> float:
    return -torch.xlogy(shares, shares).sum().item()
