"""SPT's routed FFN: a dense gated FFN of which each token runs some blocks of neurons.

arXiv:2312.10365 and its code (moe.md 11). The blocks are views of the dense weights, so a dense
checkpoint loads unchanged; the low-rank version tunes it with the base frozen.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.base import FFNOutput
from layers.names import check_choice, check_positive
from layers.swiglu import GATES, SwiGLU
from routers.scores import draw_normal, scores, top_indices
from zoo.conversion.stacks import DenseFFN


class LowRank(NamedTuple):
    """Trained beside the frozen matrices, with no factor alpha / r; right ones start at zero."""

    gate_left: Tensor  # [r, D]
    gate_right: Tensor  # [F, r]
    up_left: Tensor  # [r, D]
    up_right: Tensor  # [F, r]
    down_left: Tensor  # [r, F]
    down_right: Tensor  # [D, r]


WEIGHTINGS = {
    "none": lambda probs: None,  # as the published layer without low rank: its router never learns
    "twice": lambda probs: 2 * probs,  # as the published low-rank layer: 1 where the router is even
}


def choose_blocks(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k blocks of largest sigmoid(W x + b), in float32.

    x: [T, D]; weight: [n_blocks, D]; bias: [n_blocks]. Returns blocks [T, K] int64 and their
    probabilities [T, K], which are not renormalised.
    """
    probs = (scores(x, weight) + bias).sigmoid()
    blocks = top_indices(probs, top_k)
    return blocks, probs.gather(-1, blocks)


def routed_ffn(
    x: Tensor,
    dense: DenseFFN,
    blocks: Tensor,
    n_blocks: int,
    *,
    coefficients: Tensor | None = None,
    low_rank: LowRank | None = None,
    activation: str = "silu",
) -> Tensor:
    """The sum of each token's blocks; only these are computed, block by block.

    h = activation(c gate x + low rank) * (c up x + low rank); y += c down h + low rank, so that c
    enters on the frozen weights alone, before and after the activation.

    Args:
        x: [T, D].
        dense: weights; block b is the neurons [b F / n_blocks, (b + 1) F / n_blocks).
        blocks: [T, K] int64, distinct in a row.
        n_blocks: must divide F.
        coefficients: [T, K], c; None: 1.
        low_rank: factors, or None.
        activation: of the gate.

    Returns:
        [T, D]. With all blocks, c = 1 and right factors of zero: the dense FFN.
    """
    width = dense.up.shape[0]
    if width % n_blocks:
        raise ValueError(f"d_ff={width} does not split into {n_blocks} equal parts")
    y, size = torch.zeros_like(x), width // n_blocks
    for b in range(n_blocks):
        tokens, place = (blocks == b).nonzero(as_tuple=True)
        c = None if coefficients is None else coefficients[tokens, place][:, None].to(x.dtype)
        part = slice(b * size, (b + 1) * size)
        y = y.index_add(0, tokens, _block(x[tokens], dense, part, c, low_rank, activation))
    return y


def _block(
    x: Tensor, dense: DenseFFN, part: slice, c: Tensor | None, low: LowRank | None, activation: str
) -> Tensor:
    """One block on its tokens. x: [n, D]; c: [n, 1]. Returns [n, D]."""

    def base(product: Tensor) -> Tensor:
        return product if c is None else c * product

    gate, up = base(F.linear(x, dense.gate[part])), base(F.linear(x, dense.up[part]))
    if low is not None:
        gate = gate + F.linear(F.linear(x, low.gate_left), low.gate_right[part])
        up = up + F.linear(F.linear(x, low.up_left), low.up_right[part])
    h = GATES[activation](gate, up)
    y = base(F.linear(h, dense.down[:, part]))
    if low is not None:
        y = y + F.linear(F.linear(h, low.down_left[:, part]), low.down_right)
    return y


class RoutedFFN(nn.Module):
    """A `swiglu` layer of which each token runs top_k of n_blocks blocks.

    It keeps the layer's own leaves, names included; they compute in the dtype of the input here,
    whatever precision they have.
    """

    def __init__(
        self,
        ffn: SwiGLU,
        *,
        n_blocks: int = 4,
        top_k: int | None = None,
        rank: int | None = None,
        weighting: str = "twice",
    ):
        """top_k: None: half of the blocks. rank: of the low-rank factors, which freeze the base;
        None: no factors, all trained. weighting: a row of `WEIGHTINGS`."""
        super().__init__()
        check_choice("weighting", weighting, WEIGHTINGS)
        self.n_blocks, self.top_k = n_blocks, max(n_blocks // 2, 1) if top_k is None else top_k
        check_positive(n_blocks=n_blocks, top_k=self.top_k)
        if self.top_k > n_blocks:
            raise ValueError(f"top_k must be at most n_blocks={n_blocks}, got {top_k}")
        if ffn.config.hidden % n_blocks:
            raise ValueError(f"d_ff={ffn.config.hidden} does not split into {n_blocks} equal parts")
        self.config, self.weighting = ffn.config, weighting
        self.gate_up, self.down = ffn.gate_up, ffn.down
        self.router_weight = nn.Parameter(torch.empty(n_blocks, ffn.config.d_model))
        self.router_bias = nn.Parameter(torch.zeros(n_blocks))
        draw_normal(self.router_weight)
        self.low_rank = None if rank is None else self._drawn(rank)

    def _drawn(self, rank: int) -> nn.ParameterDict:
        """Left factors normal(0, 1), as an embedding's default; right ones zero; base frozen."""
        check_positive(rank=rank)
        for leaf in (self.gate_up, self.down):
            leaf.requires_grad_(False)
        d, width = self.config.d_model, self.config.hidden
        sizes = {"gate": (d, width), "up": (d, width), "down": (width, d)}
        factors = {}
        for name, (d_in, d_out) in sizes.items():
            factors[f"{name}_left"] = torch.randn(rank, d_in)
            factors[f"{name}_right"] = torch.zeros(d_out, rank)
        return nn.ParameterDict({name: factors[name] for name in LowRank._fields})

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> FFNOutput:
        """x: [B, S, D]; mask: [B, S] bool: a masked token gives 0. carry is not read."""
        tokens = x if mask is None else x.masked_fill(~mask[..., None], 0)
        tokens = tokens.flatten(0, 1)
        blocks, probs = choose_blocks(tokens, self.router_weight, self.router_bias, self.top_k)
        gate, up = self.gate_up.weight.chunk(2)
        y = routed_ffn(
            tokens,
            DenseFFN(gate, up, self.down.weight),
            blocks,
            self.n_blocks,
            coefficients=WEIGHTINGS[self.weighting](probs),
            low_rank=None if self.low_rank is None else LowRank(**self.low_rank),
            activation=self.config.activation,
        )
        return FFNOutput(y.view_as(x))
