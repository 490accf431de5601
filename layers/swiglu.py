"""The gated feed-forward family: SwiGLU, GEGLU, ReGLU, bilinear (arXiv:2002.05202, eq. 5-6).

And gpt-oss's: a clamped SwiGLU whose linear half is shifted by one (arXiv:2508.10925, 2.2).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from layers.base import Cost, FFNOutput, WeightCost
from layers.linear import Linear
from layers.names import check_choice, check_positive

ALPHA, LIMIT = 1.702, 7.0  # gpt-oss: slope of the sigmoid, bound of both halves


def _gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return (up + 1) * (gate * (ALPHA * gate).sigmoid())


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of gate and up
    "silu": lambda gate, up: F.silu(gate) * up,  # SwiGLU
    "gelu": lambda gate, up: F.gelu(gate) * up,  # GEGLU, the exact gelu
    "relu": lambda gate, up: F.relu(gate) * up,  # ReGLU
    "identity": lambda gate, up: gate * up,  # bilinear
    "gpt_oss": _gpt_oss,
}
# per hidden number, estimated; the product with up is one
GATE_FLOPS = {"silu": 5, "gelu": 9, "relu": 2, "identity": 1, "gpt_oss": 11}


def default_d_ff(d_model: int) -> int:
    """8/3 d_model rounded up to a multiple of 32: the parameters of an ungated 4 d_model FFN."""
    return -(-8 * d_model // (3 * 32)) * 32


def glu(gate_up: Tensor, activation: str, weights: Tensor | None = None) -> Tensor:
    """activation(gate) * up (* weight), or gpt-oss's: the body between the two matmuls.

    gate_up: [..., 2F], gate columns first; weights: [..., 1]. Returns [..., F] in gate_up's dtype.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    h = GATES[activation](gate, up)
    return h if weights is None else h * weights.to(h.dtype)


@dataclass(frozen=True, kw_only=True)
class SwiGLUConfig:
    """Sizes of a dense gated FFN."""

    d_model: int
    d_ff: int | None = None  # hidden width F; None: 8/3 d_model, up to a multiple of 32
    activation: str = "silu"  # silu (SwiGLU), gelu (GEGLU), relu (ReGLU), identity or gpt_oss

    def __post_init__(self) -> None:
        check_positive(d_model=self.d_model, d_ff=self.hidden)
        check_choice("activation of swiglu", self.activation, GATES)

    @property
    def hidden(self) -> int:
        """F, with the default filled in."""
        return default_d_ff(self.d_model) if self.d_ff is None else self.d_ff

    def cost(self) -> Cost:
        """One token's cost."""
        n = self.d_model * self.hidden
        element_wise = GATE_FLOPS[self.activation] * self.hidden
        return Cost(
            (
                WeightCost(
                    name="gate_up.weight",
                    role="ffn",
                    params=2 * n,
                    flops=4 * n,
                    other_flops=element_wise,
                ),
                WeightCost(name="down.weight", role="ffn", params=n, flops=2 * n),
            )
        )


class SwiGLU(nn.Module):
    """y = down(activation(gate(x)) * up(x)), gate and up in one matrix, gate rows first."""

    def __init__(self, config: SwiGLUConfig):
        super().__init__()
        c = self.config = config
        self.gate_up = Linear(c.d_model, 2 * c.hidden, role="ffn")  # [2F, D]
        self.down = Linear(c.hidden, c.d_model, role="ffn")  # [D, F]

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> FFNOutput:
        """x: [B, S, D]; mask: [B, S] bool. carry is not read and not handed on."""
        if mask is not None:  # whatever stands there, NaN included; without biases 0 gives 0
            x = x.masked_fill(~mask[..., None], 0)
        return FFNOutput(self.down(glu(self.gate_up(x), self.config.activation)).type_as(x))
