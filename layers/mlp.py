"""The plain two-matrix feed-forward network (arXiv:1706.03762, eq. 2; relu2: arXiv:2109.08668)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from layers.base import Cost, FFNOutput, WeightCost
from layers.linear import Linear
from layers.names import check_choice, check_positive

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,  # the exact gelu
    "relu2": lambda h: F.relu(h).square(),
    "silu": F.silu,
}
ACTIVATION_FLOPS = {"relu": 1, "gelu": 8, "relu2": 2, "silu": 4}  # per hidden number, estimated


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Sizes of a dense ungated FFN."""

    d_model: int
    d_ff: int | None = None  # hidden width F; None: 4 d_model
    activation: str = "gelu"  # relu | gelu | relu2 (squared relu) | silu

    def __post_init__(self) -> None:
        check_positive(d_model=self.d_model, d_ff=self.hidden)
        check_choice("activation of mlp", self.activation, ACTIVATIONS)

    @property
    def hidden(self) -> int:
        """F, with the default filled in."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    def cost(self) -> Cost:
        """One token's cost."""
        n = self.d_model * self.hidden
        element_wise = ACTIVATION_FLOPS[self.activation] * self.hidden
        return Cost(
            (
                WeightCost(
                    name="up.weight", role="ffn", params=n, flops=2 * n, other_flops=element_wise
                ),
                WeightCost(name="down.weight", role="ffn", params=n, flops=2 * n),
            )
        )


class MLP(nn.Module):
    """y = down(activation(up(x))), no biases."""

    def __init__(self, config: MLPConfig):
        super().__init__()
        c = self.config = config
        self.up = Linear(c.d_model, c.hidden, role="ffn")  # [F, D]
        self.down = Linear(c.hidden, c.d_model, role="ffn")  # [D, F]

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> FFNOutput:
        """x: [B, S, D]; mask: [B, S] bool. carry is not read and not handed on."""
        if mask is not None:  # whatever stands there, NaN included; without biases 0 gives 0
            x = x.masked_fill(~mask[..., None], 0)
        return FFNOutput(self.down(ACTIVATIONS[self.config.activation](self.up(x))).type_as(x))
