"""From the slots that were found to the layer's output: weights, the pool, and what follows it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.base import Cost, WeightCost
from layers.linear import Linear
from layers.memory.expansion import Expansion, ExpansionConfig
from layers.memory.pool import Pool
from layers.memory.retriever import Hits
from layers.names import check_choice, check_positive

WEIGHTS = {
    "softmax": lambda scores: scores.softmax(-1),  # over the hits of one head (PKM, PEER, Memory+)
    "raw": lambda scores: scores,  # UltraMem
    "relu": torch.relu,  # arXiv:2310.10837: slots do not compete
    "sigmoid": torch.sigmoid,
}
OUTPUTS = ("none", "linear", "gated")


@dataclass(frozen=True, kw_only=True)
class ReadoutConfig:
    """Sizes and options of a readout."""

    d_model: int
    d_value: int
    weights: str = "softmax"  # of a head's hits, from their scores: softmax | raw | relu | sigmoid
    output: str = "none"  # none: d_value is d_model | linear: W_o | gated: Memory+
    groups: int = 1  # virtual copies that the output has matrices for; linear alone
    d_input: int = 0  # width that the pool's neurons read
    scalar_gate: bool = False  # times sigmoid(w_g x + b_g)

    def __post_init__(self) -> None:
        check_positive(d_model=self.d_model, d_value=self.d_value, groups=self.groups)
        check_choice("weights", self.weights, WEIGHTS)
        check_choice("output", self.output, OUTPUTS)
        if self.output == "none" and self.d_value != self.d_model:
            raise ValueError(
                f"d_value must be d_model={self.d_model} without an output matrix, got "
                f"{self.d_value}"
            )
        if self.groups > 1 and self.output != "linear":
            raise ValueError(f"groups={self.groups} need output 'linear', got {self.output!r}")

    @property
    def projects_input(self) -> bool:
        """Whether neurons read W_p x, and not x."""
        return self.d_input not in (0, self.d_model)

    def cost(self) -> Cost:
        """One token's cost, the pool aside."""
        d, v = self.d_model, self.d_value
        items: list[WeightCost] = []

        def linear(name: str, d_in: int, d_out: int, bias: bool, other: float = 0.0) -> None:
            n = d_in * d_out
            items.append(
                WeightCost(
                    name=f"{name}.weight", role="ffn", params=n, flops=2 * n, other_flops=other
                )
            )
            if bias:
                items.append(
                    WeightCost(name=f"{name}.bias", role="ffn", params=d_out, other_flops=d_out)
                )

        if self.projects_input:
            linear("input", d, self.d_input, bias=False)
        if self.output == "gated":
            linear("gate", d, v, bias=True, other=5.0 * v)
        if self.output != "none":
            linear("output", self.groups * v, d, bias=self.output == "gated")
        if self.scalar_gate:
            linear("scalar", d, 1, bias=True, other=4.0 + d)
        return Cost(tuple(items))


class Readout(nn.Module):
    """y = pool(rows, w), and then nothing, W_o y, or W_2 (y * silu(W_1 x + b_1)) + b_2."""

    def __init__(self, config: ReadoutConfig, expansion: ExpansionConfig | None = None):
        super().__init__()
        c = self.config = config
        gated = c.output == "gated"
        self.input = Linear(c.d_model, c.d_input, role="ffn") if c.projects_input else None
        self.gate = Linear(c.d_model, c.d_value, role="ffn", bias=True) if gated else None
        self.output = (
            Linear(c.groups * c.d_value, c.d_model, role="ffn", bias=gated)
            if c.output != "none"
            else None
        )
        self.scalar = Linear(c.d_model, 1, role="ffn", bias=True) if c.scalar_gate else None
        self.expansion = None if expansion is None else Expansion(expansion)

    def forward(self, x: Tensor, hits: Hits, pool: Pool) -> tuple[Tensor, Tensor]:
        """x: [T, D]. Returns the output [T, D] and the pool's rows that were read, [T, H * K]."""
        rows, groups = hits.slots.flatten(1), None
        if self.expansion is not None:
            rows, groups = self.expansion(rows)
        weights = WEIGHTS[self.config.weights](hits.scores).flatten(2)  # [T, C, H K]
        return self.finish(x, self._pooled(x, rows, weights, groups, pool)), rows

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """What follows the pool. x: [T, D]; y: [T, groups * d_value]. Returns [T, D]."""
        if self.gate is not None:
            y = y * F.silu(self.gate(x))
        if self.output is not None:
            y = self.output(y)
        if self.scalar is not None:
            y = y * torch.sigmoid(self.scalar(x))
        return y

    def _pooled(
        self, x: Tensor, rows: Tensor, weights: Tensor, groups: Tensor | None, pool: Pool
    ) -> Tensor:
        """[T, groups * d_value]: the hits of each group added up apart, or of all together.

        Pool first and project after: sum over p of W_p (pooled_p) costs tokens, not rows.
        """
        read = x if self.input is None else self.input(x)
        n = self.config.groups
        if n == 1:
            return pool(rows, weights, read)
        assert groups is not None
        of_group = torch.arange(n, device=rows.device)[:, None] == groups[:, None]  # [T, E, K]
        apart = weights[:, None] * of_group[:, :, None]  # [T, E, C, K]
        repeated = rows[:, None].expand(-1, n, -1).flatten(0, 1)
        y = pool(repeated, apart.flatten(0, 1), read.repeat_interleave(n, 0))
        return y.view(rows.shape[0], n * self.config.d_value)
