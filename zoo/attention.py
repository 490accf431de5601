"""Causal grouped-query self-attention (arXiv:2305.13245) with rotary positions (arXiv:2104.09864).

Heads: H for queries, G for keys and values; h is the width of one head.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from layers.base import Cost, WeightCost
from layers.linear import Linear
from layers.names import check_positive
from layers.norm import RMSNorm
from zoo.cache import LayerCache


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sizes and options of one attention layer."""

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

    def cost(self, seq_len: int, *, causal: bool = True) -> Cost:
        """One token of a sequence of `seq_len`; `causal` as in `zoo.model.model_cost`."""
        d_q = self.n_heads * self.d_head
        seen = (seq_len + 1) / 2 if causal else seq_len  # keys per query, mean over the sequence
        shapes = {"qkv.weight": self.n_qkv * self.d_head * self.d_model}
        shapes["out.weight"] = d_q * self.d_model
        items = [
            WeightCost(name=n, role="attention", params=p, flops=2 * p) for n, p in shapes.items()
        ]
        rotated = (self.n_heads + self.n_kv_heads) * self.d_head
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
        softmax = 5 * self.n_heads * seen  # scale, subtract, exp, sum, divide
        scores = WeightCost(
            name="scores",
            role="attention",
            params=0,
            flops=4 * d_q * seen,
            other_flops=softmax + 3 * rotated,
        )
        return Cost((*items, scores))


class Attention(nn.Module):
    """y = out(softmax(q k^T / sqrt(h), over earlier keys and its own) v), with q, k rotated."""

    def __init__(self, config: AttentionConfig):
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

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """What each token reads from the tokens up to it.

        Args:
            x: [B, S, D], the newest S of the P tokens seen so far.
            rope: cosines and sines of the S positions, [S, h / 2] each.
            mask: [B, 1, S, P] bool, True where a query may read a key. None: causal if S = P,
                every key if S = 1.
            cache: keys and values of the first P - S tokens; takes these too.

        Returns:
            [B, S, D], in the compute dtype of the leaf `out`.
        """
        q, k, v = self._heads(x, rope)
        if cache is not None:
            k, v = cache.append(k, v)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, enable_gqa=True
        )
        return self.out(rearrange(y, "b n s h -> b s (n h)"))

    def _heads(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, S, D]. Returns rotated q [B, H, S, h] and k [B, G, S, h], and v [B, G, S, h]."""
        c = self.config
        heads = rearrange(self.qkv(x), "b s (n h) -> b n s h", n=c.n_qkv)
        if self.q_norm is None or self.k_norm is None:
            qk, v = heads.split((c.n_heads + c.n_kv_heads, c.n_kv_heads), dim=1)
        else:
            q, k, v = heads.split((c.n_heads, c.n_kv_heads, c.n_kv_heads), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        q, k = rotate(qk, *rope).split((c.n_heads, c.n_kv_heads), dim=1)
        return q, k, v


def rope_tables(
    start: int, length: int, d_head: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles p * base^(-2i / h), [length, h / 2] float32 each.

    Made anew in each forward, 0.1 ms: a buffer would be cast by `model.to(bfloat16)`.
    """
    powers = torch.arange(0, d_head, 2, device=device, dtype=torch.float32) / d_head
    positions = torch.arange(start, start + length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, base**-powers)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn coordinates i and i + h/2 of each head by the angle of its position.

    x: [B, H, S, h]; cos, sin: [S, h / 2]. Returns [B, H, S, h], in the dtype of x.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if torch.compiler.is_compiling():  # fused there, and writing into halves is refused
        x1, x2 = x.chunk(2, -1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """Four passes over half the numbers, forward and backward; plain autograd takes fifteen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x: [B, H, S, h]; sign -1 turns back."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    (x1, x2), (y1, y2) = x.chunk(2, -1), y.chunk(2, -1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
    return y
