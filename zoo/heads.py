"""What mixers of tokens have in common: heads of queries, keys and values, some of them or all.

Heads: H for queries, G for keys and values (arXiv:2305.13245); h is the width of one head. The
first heads of a mixer are a smaller one (MatFormer's attention variant, arXiv:2310.07707, 2.1).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Generic, Self, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from layers.base import Cost, WeightCost
from layers.linear import Linear
from layers.names import check_positive
from layers.norm import RMSNorm
from layers.prefix import Prefix, Spans
from zoo.cache import LayerCache
from zoo.rotary import rope_tables, rotate

Rope = tuple[Tensor, Tensor]  # cosines and sines of the positions, [S, h / 2] each


@dataclass(frozen=True, kw_only=True)
class HeadsConfig(ABC):
    """Sizes and options of one layer's heads. What they compute is each mixer's own."""

    d_model: int
    n_heads: int
    n_kv_heads: int  # key and value heads; query head i reads head i // (n_heads / n_kv_heads)
    d_head: int
    qk_norm: bool = (
        False  # RMSNorm of each query and key head before the rotation (arXiv:2302.05442)
    )
    norm_eps: float = 1e-6
    out_scale: float = 1.0  # on the first weights of the matrix that writes into the residual

    def __post_init__(self) -> None:
        check_positive(
            d_model=self.d_model,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            d_head=self.d_head,
        )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads must be a multiple of n_kv_heads={self.n_kv_heads}, got {self.n_heads}"
            )
        if self.d_head % 2:
            raise ValueError(f"d_head must be even, got {self.d_head}")

    @property
    def n_qkv(self) -> int:
        """Rows of heads that the fused matrix makes: queries, keys, values."""
        return self.n_heads + 2 * self.n_kv_heads

    def counts(self, heads: int | None) -> tuple[int, int]:
        """Query heads and key and value heads where the first `heads` query heads run; None: all.

        Raises:
            ValueError: unless it is a number of heads that there are, in whole groups.
        """
        if heads is None:
            return self.n_heads, self.n_kv_heads
        if not 1 <= heads <= self.n_heads:
            raise ValueError(f"heads must be in [1, n_heads={self.n_heads}], got {heads}")
        group = self.n_heads // self.n_kv_heads
        if heads % group:
            raise ValueError(
                f"heads must be a multiple of {group}, the query heads that share a key and value "
                f"head, got {heads}"
            )
        return heads, heads // group

    def first(self, heads: int) -> Self:
        """The config of the mixer that the first `heads` query heads are; raises as `counts`."""
        n_heads, n_kv_heads = self.counts(heads)
        return replace(self, n_heads=n_heads, n_kv_heads=n_kv_heads)

    def rope(self, start: int, length: int, base: float, device: torch.device) -> Rope:
        """Tables of the positions start, start + 1, ..., as this mixer turns by them."""
        return rope_tables(start, length, self.d_head, base, device)

    @abstractmethod
    def cost(self, seq_len: int, *, causal: bool = True) -> Cost:
        """One token of a sequence of `seq_len`; `causal` as in `zoo.model.model_cost`."""

    def keys_seen(self, seq_len: int, causal: bool) -> float:
        """Keys a query, mean over a sequence; `causal` as in `zoo.model.model_cost`."""
        return (seq_len + 1) / 2 if causal else seq_len

    def matrices_cost(self) -> list[WeightCost]:
        """The two matrices and the norms of heads."""
        shapes = {"qkv.weight": self.n_qkv * self.d_head * self.d_model}
        shapes["out.weight"] = self.n_heads * self.d_head * self.d_model
        items = [
            WeightCost(name=n, role="attention", params=p, flops=2 * p) for n, p in shapes.items()
        ]
        if self.qk_norm:
            items += [
                WeightCost(
                    name=f"{n}_norm.weight",
                    role="norm",
                    params=self.d_head,
                    bits=32,
                    other_flops=4 * heads * self.d_head,
                )
                for n, heads in (("q", self.n_heads), ("k", self.n_kv_heads))
            ]
        return items

    @property
    def rotation_flops(self) -> int:
        """Element-wise FLOPs of turning a token's queries and keys."""
        return 3 * (self.n_heads + self.n_kv_heads) * self.d_head


C = TypeVar("C", bound=HeadsConfig)


class Heads(nn.Module, ABC, Generic[C]):
    """y = out(mix(q, k, v)), q and k rotated: the interface of a mixer, which says `mix`."""

    def __init__(self, config: C):
        super().__init__()
        c = self.config = config
        self.qkv = Linear(c.d_model, c.n_qkv * c.d_head, role="attention")
        self.q_norm = RMSNorm(c.d_head, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.d_head, c.norm_eps) if c.qk_norm else None
        self.out = Linear(c.n_heads * c.d_head, c.d_model, role="attention")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the two matrices anew, as leaves draw theirs, `out` times `out_scale`."""
        self.qkv.reset_parameters()
        self.out.reset_parameters()
        with torch.no_grad():
            self.out.weight.mul_(self.config.out_scale)

    @abstractmethod
    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """What each query head reads from the values.

        Args:
            q: [B, H, S, h] of the newest S of P tokens.
            k, v: [B, G, P, ...] of all, as `kept_as` lays them.
            mask: as in `forward`.
            cache: that k and v are of, if any.

        Returns:
            [B, H, S, h], in the dtype of v.
        """

    def kept_as(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [B, G, S, h] as a cache keeps them and `mix` reads them."""
        return k, v

    def turn(self, qk: Tensor, rope: Rope) -> Tensor:
        """Queries and keys [B, H + G, S, h], each turned by its position."""
        return rotate(qk, *rope)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        heads: int | None = None,
    ) -> Tensor:
        """What each token reads from the tokens up to it.

        Args:
            x: [B, S, D], the newest S of the P tokens seen so far.
            rope: of the S positions, as `config.rope` makes it.
            mask: [B, 1, S, P] bool, True where a query may read a key. None: causal if S = P,
                every key if S = 1.
            cache: keys and values of the first P - S tokens; takes these too. It holds the key
                heads that run, so all of its tokens must come with as many heads.
            heads: the first so many query heads alone, with the key and value heads that they
                read; None: all. Gradients of the others are zero.

        Returns:
            [B, S, D], in the compute dtype of the leaf `out`.

        Raises:
            ValueError: for heads that do not run alone, or other ones than the cache holds.
        """
        c = self.config
        n, g = c.counts(heads)
        q, k, v = self._heads(x, rope, n, g)
        k, v = self.kept_as(k, v)
        if cache is not None:
            if cache.keys is not None and cache.keys.shape[1] != g:
                raise ValueError(
                    f"the cache holds {cache.keys.shape[1]} key heads and {g} run: give all of its "
                    "tokens the same heads, or each choice of them a cache of its own"
                )
            k, v = cache.append(k, v)
        y = rearrange(self.mix(q, k, v, mask, cache), "b n s h -> b s (n h)")
        return self.out(y) if n == c.n_heads else self.out(y, Prefix(columns=n * c.d_head))

    def _heads(self, x: Tensor, rope: Rope, n: int, g: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the first n query heads and g others: rotated q and k, and v, [B, n or g, S, h]."""
        c = self.config
        rows = self.qkv(x) if n == c.n_heads else self.qkv(x, self._rows(n, g))
        heads = rearrange(rows, "b s (n h) -> b n s h", n=n + 2 * g)
        if self.q_norm is None or self.k_norm is None:
            qk, v = heads.split((n + g, g), dim=1)
        else:
            q, k, v = heads.split((n, g, g), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = self.turn(qk, rope).split((n, g), dim=1)
        return q, k, v

    def _rows(self, n: int, g: int) -> Spans:
        """Of the fused matrix, for the first queries, keys and values."""
        c, h = self.config, self.config.d_head
        starts = (0, c.n_heads, c.n_heads + c.n_kv_heads)
        counted = zip(starts, (n, g, g), strict=True)
        return Spans(tuple((start * h, (start + count) * h) for start, count in counted))
