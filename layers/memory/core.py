"""A memory layer: query, retriever, pool and readout, in any combination (memory.md 1, 14)."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, FFNOutput
from layers.dispatch import count_experts, is_decoding
from layers.memory.decode import find, read
from layers.memory.expansion import ExpansionConfig
from layers.memory.pool import OWNERS, Pool, PoolConfig
from layers.memory.query import Query, QueryConfig
from layers.memory.readout import Readout, ReadoutConfig
from layers.memory.retriever import Hits, ProductKeys, ProductKeysConfig
from layers.memory.tucker import TuckerKeys, TuckerKeysConfig
from layers.names import check_choice


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The parts of a memory layer."""

    query: QueryConfig
    keys: ProductKeysConfig | TuckerKeysConfig
    pool: PoolConfig
    readout: ReadoutConfig
    expansion: ExpansionConfig | None = None  # None: slot and row are the same
    owner: str = "own"  # of the pool; "shared": it is handed in, and counted where it stands

    def __post_init__(self) -> None:
        check_choice("pool", self.owner, OWNERS)
        slots = self.pool.n_rows if self.expansion is None else self.expansion.n_slots
        for what, of_keys, of_others in (
            ("slots", self.keys.n_slots, slots),
            ("cores", self.keys.cores, self.pool.cores),
            ("queries", self.keys.queries, self.query.n_queries),
        ):
            if of_keys != of_others:
                raise ValueError(f"the keys have {of_keys} {what}, the other parts {of_others}")

    def cost(self) -> Cost:
        """One token's cost."""
        return (
            self.query.cost().within("query.")
            + self.keys.cost().within("keys.")
            + self.pool.cost_of(self.keys.hits, owned=self.owner == "own").within("pool.")
            + self.readout.cost().within("readout.")
        )


class Memory(nn.Module):
    """y = readout(x, slots and scores of query(x), pool)."""

    def __init__(self, config: MemoryConfig, pool: Pool | None = None):
        super().__init__()
        c = self.config = config
        if (c.owner == "shared") != (pool is not None):
            given = "none" if pool is None else "one"
            raise ValueError(
                f"pool={c.owner!r}, but {given} was handed in: a shared pool is built once, with "
                "layers.memory.Pool, and handed to every layer that reads it"
            )
        if pool is not None and pool.config != c.pool:
            raise ValueError(f"the layer reads a pool of {c.pool}, got one of {pool.config}")
        self.query = Query(c.query)
        self.keys = (
            ProductKeys(c.keys) if isinstance(c.keys, ProductKeysConfig) else TuckerKeys(c.keys)
        )
        self.readout = Readout(c.readout, c.expansion)
        self.pool = Pool(c.pool) if pool is None else None
        # no submodule: its owner registers it
        self._shared: tuple[Pool, ...] = () if pool is None else (pool,)

    def values(self) -> Pool:
        """The pool that it reads, its own or a shared one."""
        return self._shared[0] if self.pool is None else self.pool

    def forward(
        self,
        x: Tensor,
        carry: Tensor | None = None,
        mask: Tensor | None = None,
        search: Callable[[Tensor, Tensor | None], Hits] | None = None,
    ) -> FFNOutput:
        """x: [B, S, D]; mask: [B, S] bool, True where a token is real. carry is not read.

        search: in place of `keys`, of queries and the mask [T], where a loss is asked of it too.

        In evaluation `stats["slots"]` [M] int64 counts how often each row of the pool was read;
        it is not counted in training, and not for a single token, where it would cost more than
        the layer.
        """
        if mask is not None:  # whatever stands there, NaN included
            x = x.masked_fill(~mask[..., None], 0)
        tokens = x.flatten(0, 1)
        decoding, pool = is_decoding(tokens), self.values()
        hits = find(tokens, self.query, self.keys) if decoding and search is None else None
        real = None if mask is None else mask.flatten()
        if hits is None:
            queries = self.query(x, mask)
            with _without_autocast(queries):
                hits = self.keys(queries) if search is None else search(queries, real)
        done = read(tokens, hits, self.readout, pool) if decoding else None
        y, rows = self.readout(tokens, hits, pool) if done is None else done
        y = y.view(x.shape)
        if mask is not None:  # norms and projections have biases
            y = y.masked_fill(~mask[..., None], 0)
        stats = None
        if not self.training and not decoding:
            stats = {"slots": count_experts(rows, self.config.pool.n_rows, real)}
        return FFNOutput(y.type_as(x), stats=stats)


def _without_autocast(x: Tensor) -> torch.autocast | nullcontext[None]:
    """Scores are compared in float32, whatever autocast would make of them."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def slot_usage(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Share of rows read at least once, and KL(z || uniform) in nats of their use (memory.md 2).

    slots: [M], how often (or with what summed weight) each row was read over a validation set.
    Even use has a KL of 0; a single row read, log M.
    """
    z = slots.double() / slots.sum().clamp(min=1)
    unevenness = math.log(slots.numel()) + torch.xlogy(z, z).sum()
    return (slots > 0).double().mean(), unevenness
