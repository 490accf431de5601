"""Spark attention: about k keys a query, found by a part of each head (arXiv:2506.06644, sec. 4).

A query q and the keys k_j that it sees are split at r. With s1_j = <k_j[:r], q[:r]>, the predictor,
and s2_j = <k_j[r:], q[r:]>:

    out = sum over j of softmax_j(topk(scale1 s1)) softplus(scale2 s2_j) v_j

topk is statistical: logits at or below mean + std Q(1 - k / n) of the n keys that a query sees
become -inf, so the softmax is over some k of them. The weights do not sum to 1. Each part of a head
turns by its position as a vector of its own.

The paper leaves open, and we settle: both scales are 1 / sqrt(their width); each query head has a
threshold of its own, of grouped heads too; the largest logit is always kept, for bounded ones may
all lie below the threshold; `qk_norm` norms whole heads, before they are split.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from layers.base import Cost, WeightCost
from layers.names import check_positive
from layers.statistical_topk import statistical_topk
from zoo.cache import LayerCache
from zoo.heads import Heads, HeadsConfig, Rope
from zoo.rotary import rope_tables, rotate


@dataclass(frozen=True, kw_only=True)
class SparkAttentionConfig(HeadsConfig):
    """Sizes and options of one layer."""

    top_k: int = 256  # keys a query keeps, about; a query that sees no more keeps all
    split: int | None = None  # r, numbers of a head that predict; None: half of it, made even
    predictor_scale: float | None = None  # of s1; None: 1 / sqrt(r)
    gate_scale: float | None = None  # of s2; None: 1 / sqrt(d_head - r)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(top_k=self.top_k)
        if not 0 < self.r < self.d_head or self.r % 2:
            raise ValueError(
                f"split must be even, for both parts of a head turn in pairs, and in "
                f"(0, d_head={self.d_head}), got {self.r}"
            )
        check_positive(predictor_scale=self.scales[0], gate_scale=self.scales[1])

    @property
    def r(self) -> int:
        """Numbers of a head that predict."""
        return self.d_head // 4 * 2 if self.split is None else self.split

    @property
    def scales(self) -> tuple[float, float]:
        """Of s1 and s2, with the defaults filled in."""
        one, two = self.predictor_scale, self.gate_scale
        rest = self.d_head - self.r
        return self.r**-0.5 if one is None else one, rest**-0.5 if two is None else two

    def rope(self, start: int, length: int, base: float, device: torch.device) -> Rope:
        """As `HeadsConfig.rope`; r / 2 columns for the predictor, then the others."""
        parts = [
            rope_tables(start, length, n, base, device) for n in (self.r, self.d_head - self.r)
        ]
        cos, sin = (torch.cat(tables, dim=-1) for tables in zip(*parts, strict=True))
        return cos, sin

    def cost(self, seq_len: int, *, causal: bool = True) -> Cost:
        """One token of a sequence of `seq_len`, dense as training runs it: `attention`'s matmuls.

        `causal` as in `zoo.model.model_cost`.
        """
        seen = self.keys_seen(seq_len, causal)
        # statistics 5, softmax 5, softplus 4, product 1, for every key
        scores = WeightCost(
            name="scores",
            role="attention",
            params=0,
            flops=4 * self.n_heads * self.d_head * seen,
            other_flops=15 * self.n_heads * seen + self.rotation_flops,
        )
        return Cost((*self.matrices_cost(), scores))

    def sparse_flops(self, n_keys: int) -> int:
        """Matmul FLOPs of one token over its keys where only kept ones are read, as decoding does.

        2 r n + 2 (h - r) k + 2 h k for each head, k the smaller of `top_k` and n.
        """
        h, r, k = self.d_head, self.r, min(self.top_k, n_keys)
        return self.n_heads * (2 * r * n_keys + 2 * (h - r) * k + 2 * h * k)


class SparkAttention(Heads[SparkAttentionConfig]):
    """y = out(sum_j softmax_j(topk(q1 k1_j)) softplus(q2 k2_j) v_j) for each head; see above.

    Computed densely and masked, [B, H, S, P], so that memory grows with the product of queries and
    keys; a single token with a cache on a CPU that sees more than 2 `top_k` keys reads the second
    part of the keys, and the values, at kept positions alone.
    """

    def turn(self, qk: Tensor, rope: Rope) -> Tensor:
        """qk: [B, H + G, S, h]. Each part turned as a vector of its own."""
        r = self.config.r
        cos, sin = ((t[:, : r // 2], t[:, r // 2 :]) for t in rope)
        parts = qk[..., :r], qk[..., r:]
        return torch.cat([rotate(*of) for of in zip(parts, cos, sin, strict=True)], dim=-1)

    def kept_as(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The predictor's part of the keys; the other part before the values, in the same row.

        All of the first is read, of the second a row here and there: both lie together.
        """
        r = self.config.r
        return k[..., :r], torch.cat((k[..., r:], v), dim=-1)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """As `Heads.mix` says. k: [B, G, P, r]; v: [B, G, P, (h - r) + h]."""
        r, scale = self.config.r, self.config.scales[1]
        if cache is not None and self._pays(q, k):
            return self._at_kept(q, k, mask, cache)
        logits = self._predicted(q, k, mask)
        k2, v = v.split((self.config.d_head - r, self.config.d_head), dim=-1)
        gates = F.softplus(_scores(q[..., r:], k2, scale))
        weights = (logits.softmax(-1) * gates).to(v.dtype)  # [B, H, S, P]
        shared = rearrange(weights, "b (g n) s p -> b g (n s) p", g=v.shape[1])
        return rearrange(shared @ v, "b g (n s) h -> b (g n) s h", s=q.shape[2])

    @torch.no_grad()
    def kept(self, x: Tensor, rope: Rope, mask: Tensor | None = None) -> Tensor:
        """How many keys each query keeps, [B, H, S] int64, of a forward without a cache."""
        q, k, v = self._heads(x, rope, self.config.n_heads, self.config.n_kv_heads)
        return self._predicted(q, self.kept_as(k, v)[0], mask).isfinite().sum(-1)

    def _predicted(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Logits of the predictor, -inf where a key is not kept, [B, H, S, P], float32 or wider.

        q: [B, H, S, h]; k: [B, G, P, r].
        """
        c, (n, p) = self.config, (q.shape[2], k.shape[2])
        if mask is None and n > 1:
            mask = torch.ones(n, p, dtype=torch.bool, device=q.device).tril()[None, None]
        logits = _scores(q[..., : c.r], k, c.scales[0])
        return statistical_topk(logits, c.top_k, form="-inf", mask=mask, keep_argmax=True)

    def _pays(self, q: Tensor, k: Tensor) -> bool:
        """Whether to read kept positions alone: one token on a CPU, of many keys.

        Where it keeps more than half, finding them costs what they save (benchmarks).
        """
        return (
            q.shape[2] == 1
            and k.shape[2] > 2 * self.config.top_k
            and q.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )

    def _at_kept(self, q: Tensor, k: Tensor, mask: Tensor | None, cache: LayerCache) -> Tensor:
        """`mix` of one token, its second scores and values at kept positions alone.

        Rows are read where they lie in the cache, whose B * G heads have room for M tokens each.
        """
        c = self.config
        assert cache.values is not None
        table = cache.values.flatten(0, 2)  # [B G M, (h - r) + h]
        rest = c.d_head - c.r
        weights = self._predicted(q, k, mask).softmax(-1).flatten(0, 2)  # [B H, P]
        head, position = weights.nonzero(as_tuple=True)  # [N] each, head by head
        group = q.shape[1] // k.shape[1]
        rows = head.div(group, rounding_mode="floor") * cache.max_tokens + position
        starts = torch.searchsorted(head, torch.arange(len(weights)))  # [B H]
        # <q2, k2> of every row, no row copied: the gradient that a bag has for its weights
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward
        s2 = dots(q[..., c.r :].flatten(0, 2), table[:, :rest], rows, starts, head, 0)  # [N]
        gates = F.softplus(s2.to(weights.dtype) * c.scales[1])
        weights = (weights[head, position] * gates).to(table.dtype)
        # a bag of a part of each row would copy the whole table first
        y = F.embedding_bag(rows, table, starts, per_sample_weights=weights, mode="sum")
        return y[:, rest:].reshape(q.shape)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * <q, k>, float32 or wider, [B, H, S, P]. q: [B, H, S, r]; k: [B, G, P, r]."""
    shared = rearrange(q, "b (g n) s r -> b g (n s) r", g=k.shape[1])
    s = rearrange(shared @ k.mT, "b g (n s) p -> b (g n) s p", s=q.shape[2])
    return s.to(torch.promote_types(s.dtype, torch.float32)) * scale
