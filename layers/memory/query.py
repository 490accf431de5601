"""From a token to the queries that keys are compared with: projection, norm, causal convolution."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.base import Cost, WeightCost
from layers.linear import Linear
from layers.memory.norms import NORMS, make_norm, norm_cost
from layers.names import check_choice, check_positive


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """Sizes and options of the query network."""

    d_model: int
    n_queries: int  # vectors a token: sides of keys times heads or ranks
    d_key: int  # width of one
    norm: str = "none"  # none | layer | rms | batch (reads the whole micro-batch in training)
    conv: int = 0  # taps of a causal depthwise convolution before the projection; 0: none

    def __post_init__(self) -> None:
        check_positive(d_model=self.d_model, n_queries=self.n_queries, d_key=self.d_key)
        check_choice("query_norm", self.norm, NORMS)
        if self.conv < 0:
            raise ValueError(f"query_conv must not be negative, got {self.conv}")

    @property
    def width(self) -> int:
        """Numbers of all queries of a token."""
        return self.n_queries * self.d_key

    @property
    def bias(self) -> bool:
        """Only without a norm: a batch norm takes a bias off again, and has one of its own."""
        return self.norm == "none"

    def cost(self) -> Cost:
        """One token's cost."""
        n = self.d_model * self.width
        items = [WeightCost(name="proj.weight", role="query_proj", params=n, flops=2 * n)]
        if self.bias:
            items.append(
                WeightCost(
                    name="proj.bias", role="query_proj", params=self.width, other_flops=self.width
                )
            )
        if self.conv:
            taps = self.conv * self.d_model
            items.append(
                WeightCost(name="conv", role="depthwise", params=taps, other_flops=2.0 * taps)
            )
        return Cost(tuple(items)) + norm_cost(self.norm, self.d_key, self.n_queries).within("norm.")


class Query(nn.Module):
    """q = norm(W_q conv(x) + b): the queries of a token, in at least float32."""

    def __init__(self, config: QueryConfig):
        super().__init__()
        c = self.config = config
        self.proj = Linear(c.d_model, c.width, role="query_proj", bias=c.bias)
        self.norm = make_norm(c.norm, c.d_key, c.n_queries)
        self.conv = nn.Parameter(torch.empty(c.d_model, c.conv)) if c.conv else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Only the convolution, which begins as the token itself; leaves and norms draw theirs."""
        if self.conv is not None:
            nn.init.zeros_(self.conv)
            with torch.no_grad():
                self.conv[:, -1] = 1

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: [B, S, D], masked tokens 0; mask: [B, S] bool. Returns [T, n_queries, d_key].

        Raises:
            ValueError: a convolution is asked for the newest tokens alone, as decoding does.
        """
        if self.conv is not None:
            if x.shape[1] < self.config.conv and not torch.is_grad_enabled():
                raise ValueError(
                    f"query_conv={self.config.conv} reads as many tokens, and no cache holds them: "
                    f"give the whole sequence, got {x.shape[1]} tokens"
                )
            x = causal_conv(x, self.conv)
        q = self.proj(x.flatten(0, 1))
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        q = q.unflatten(-1, (self.config.n_queries, self.config.d_key))
        if self.norm is None:
            return q
        return self.norm(q, None if mask is None else mask.flatten())


def causal_conv(x: Tensor, weight: Tensor) -> Tensor:
    """y_s = sum over taps i of weight[:, i] * x_{s - taps + 1 + i}; zeros before the first token.

    x: [B, S, D]; weight: [D, taps], the last tap for the token itself. Returns [B, S, D].
    """
    taps, length = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    weight = weight.to(x.dtype)
    return sum(
        (padded[:, i : i + length] * weight[:, i] for i in range(taps)), start=torch.zeros_like(x)
    )
