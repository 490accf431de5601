"""Causal grouped-query self-attention (arXiv:2305.13245) with rotary positions (arXiv:2104.09864).

Heads: H for queries, G for keys and values; h is the width of one head.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from layers.base import Cost, WeightCost
from zoo.cache import LayerCache
from zoo.heads import Heads, HeadsConfig


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(HeadsConfig):
    """Sizes and options of one attention layer."""

    def cost(self, seq_len: int, *, causal: bool = True) -> Cost:
        """As `HeadsConfig.cost` says."""
        seen = self.keys_seen(seq_len, causal)
        softmax = 5 * self.n_heads * seen  # scale, subtract, exp, sum, divide
        scores = WeightCost(
            name="scores",
            role="attention",
            params=0,
            flops=4 * self.n_heads * self.d_head * seen,
            other_flops=softmax + self.rotation_flops,
        )
        return Cost((*self.matrices_cost(), scores))


class Attention(Heads[AttentionConfig]):
    """y = out(softmax(q k^T / sqrt(h), over earlier keys and its own) v), with q, k rotated."""

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """As `Heads.mix` says; the cache is not read."""
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, enable_gqa=True
        )
