"""Which slots a query reaches, and with what scores: product keys (arXiv:1907.05242, sec. 3.2).

Scores have no factor 1 / sqrt(d_key) and are computed and compared in float32, under every policy:
rounded to bfloat16 a quarter of all choices has a tie at the cut (memory.md 10).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from layers.base import Cost, WeightCost
from layers.memory.norms import make_norm, norm_cost
from layers.memory.selection import pairs, product_top_k
from layers.names import check_choice, check_positive

COMBINE = ("pruned", "full")


class Hits(NamedTuple):
    """What every retriever returns: for each head the K slots that it keeps, best first."""

    slots: Tensor  # [T, H, K] int64
    scores: Tensor  # [T, C, H, K] float32, one score for each of C cores


def check_top_k(n_keys: int, top_k: int, sub_top_k: int) -> None:
    """Raise unless sub_top_k keys a side exist and have top_k pairs."""
    check_positive(n_keys=n_keys, top_k=top_k, sub_top_k=sub_top_k)
    if sub_top_k > n_keys:
        raise ValueError(
            f"top_k and sub_top_k choose among n_keys={n_keys} keys a side, got {sub_top_k}: "
            "choose fewer, or give more keys"
        )
    if sub_top_k**2 < top_k:
        raise ValueError(
            f"sub_top_k={sub_top_k} keys a side have {sub_top_k**2} pairs, fewer than top_k={top_k}"
        )


@dataclass(frozen=True, kw_only=True)
class ProductKeysConfig:
    """Sizes and options of product keys."""

    heads: int
    n_keys: int  # a side; n_keys^2 slots
    d_key: int  # of one side
    top_k: int  # slots that a head keeps
    sub_top_k: int | None = None  # keys of a side that a head looks at; None: top_k, exact
    shared: bool = False  # one set of keys for all heads
    norm: str = "none"  # of keys: none | layer | rms
    combine: str = "pruned"  # "full" looks at all pairs of sub-keys and chooses the same

    def __post_init__(self) -> None:
        check_positive(heads=self.heads, d_key=self.d_key)
        check_top_k(self.n_keys, self.top_k, self.looks_at)
        check_choice("key_norm", self.norm, ("none", "layer", "rms"))
        check_choice("combine", self.combine, COMBINE)

    @property
    def looks_at(self) -> int:
        """`sub_top_k`, with the default filled in."""
        return self.top_k if self.sub_top_k is None else self.sub_top_k

    @property
    def queries(self) -> int:
        """Query vectors a token: two for each head."""
        return 2 * self.heads

    @property
    def n_slots(self) -> int:
        """Pairs of keys."""
        return self.n_keys**2

    @property
    def cores(self) -> int:
        """Scores of a hit."""
        return 1

    @property
    def hits(self) -> int:
        """Slots that a token reads, over all heads."""
        return self.heads * self.top_k

    def cost(self) -> Cost:
        """One token's cost."""
        sets = 1 if self.shared else self.heads
        n = 2 * self.n_keys * self.d_key
        choose = 2 * self.n_keys + 2 * len(pairs(self.looks_at, self.top_k, self.combine)[0])
        keys = WeightCost(
            name="weight", role="product_keys", params=sets * n, flops=2 * n * self.heads,
            other_flops=float(self.heads * choose), bits=32,
        )  # fmt: skip
        return Cost((keys,)) + norm_cost(self.norm, self.d_key, 2 * sets * self.n_keys).within(
            "norm."
        )


class ProductKeys(nn.Module):
    """The k slots (i, j) of largest <K1_i, q1> + <K2_j, q2>, for each head: exact over all n^2.

    Weight [H, 2, n, d_key], uniform(-1, 1) / sqrt(d_key).
    """

    def __init__(self, config: ProductKeysConfig):
        super().__init__()
        c = self.config = config
        sets = 1 if c.shared else c.heads
        self.weight = nn.Parameter(torch.empty(sets, 2, c.n_keys, c.d_key))
        self.norm = make_norm(c.norm, c.d_key, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the keys anew."""
        bound = self.config.d_key**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, queries: Tensor) -> Hits:
        """queries: [T, 2 H, d_key], both sides of a head beside one another."""
        c = self.config
        keys = self.weight.to(queries.dtype)
        keys = keys if self.norm is None else self.norm(keys)
        keys = keys.expand(c.heads, -1, -1, -1).flatten(0, 1)  # [2 H, n, d_key]
        scores = torch.bmm(queries.transpose(0, 1), keys.mT)  # [2 H, T, n]
        rows, cols = scores.unflatten(0, (c.heads, 2)).unbind(1)  # [H, T, n] each
        slots = product_top_k(rows, cols, c.top_k, c.looks_at, c.combine)
        kept = rows.gather(-1, slots // c.n_keys) + cols.gather(-1, slots % c.n_keys)
        return Hits(slots.transpose(0, 1), kept.transpose(0, 1)[:, None])
