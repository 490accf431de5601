"""What a slot holds: a value, or a neuron. A pool may be one layer's own or shared by several."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.base import Cost, WeightCost
from layers.linear import ValueTable
from layers.memory.rows import InputTable
from layers.mlp import ACTIVATION_FLOPS, ACTIVATIONS
from layers.names import check_choice, check_positive

OWNERS = ("own", "shared")
NEURON_ACTIVATIONS = ("identity", "relu", "gelu", "silu")


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Sizes of a pool."""

    n_rows: int  # physical slots
    d_value: int  # numbers of one value, over all cores
    cores: int = 1  # blocks of a value that are weighted apart
    d_input: int = 0  # width of what a neuron reads (PEER); 0: a slot is a plain value
    activation: str = "identity"  # of a neuron: identity | relu | gelu | silu

    def __post_init__(self) -> None:
        check_positive(n_rows=self.n_rows, d_value=self.d_value, cores=self.cores)
        check_choice("activation of a neuron", self.activation, NEURON_ACTIVATIONS)
        if self.d_value % self.cores:
            raise ValueError(
                f"d_value must be a multiple of the {self.cores} cores, got {self.d_value}"
            )
        if self.d_input < 0:
            raise ValueError(f"d_input must not be negative, got {self.d_input}")

    def cost_of(self, hits: int, *, owned: bool = True) -> Cost:
        """One token's cost.

        Args:
            hits: slots that it reads.
            owned: False: the numbers are counted where the pool stands, the work here.
        """
        rows = float(min(hits, self.n_rows))
        act = ACTIVATION_FLOPS.get(self.activation, 0) * hits

        def table(name: str, width: int, flops: float, other_flops: float) -> WeightCost:
            return WeightCost(
                name=f"{name}.weight", role="memory_values",
                params=self.n_rows * width if owned else 0, flops=flops, other_flops=other_flops,
                units=self.n_rows, active_units=rows,
            )  # fmt: skip

        values = table("values", self.d_value, 0.0, 2.0 * hits * self.d_value)
        if not self.d_input:
            return Cost((values,))
        inputs = table("inputs", self.d_input, 2.0 * hits * self.d_input, float(act + hits))
        return Cost((inputs, values))


class Pool(nn.Module):
    """y = sum over hits of w_c V_c[row], or of w_c act(<U[row], x>) V_c[row], for each core c.

    V [M * C, d_value / C]: a slot's C blocks lie one after the other, and block c is weighted by
    the score of core c. Build it once and hand it to several layers, and they share it: it is
    called as a module, belongs to whoever registers it, and counts once.
    """

    def __init__(self, config: PoolConfig):
        super().__init__()
        c = self.config = config
        self.inputs = InputTable(c.n_rows, c.d_input, role="memory_values") if c.d_input else None
        self.values = ValueTable(c.n_rows * c.cores, c.d_value // c.cores, role="memory_values")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables anew: std 1 / sqrt(width of a whole value) and 1 / sqrt(d_input)."""
        self.draw(self.config.d_value**-0.5)
        if self.inputs is not None:
            self.inputs.reset_parameters()

    def draw(self, std: float) -> None:
        """Draw the values anew with another std."""
        nn.init.normal_(self.values.weight, std=std)

    def forward(self, rows: Tensor, weights: Tensor, x: Tensor | None = None) -> Tensor:
        """rows: [T, K] int64; weights: [T, C, K]; x: [T, d_input], read by neurons alone.

        Returns [T, d_value].
        """
        if self.inputs is not None:
            if x is None:
                raise ValueError(
                    f"a pool of neurons reads an input [T, {self.config.d_input}], got None"
                )
            g = self.activated(self.inputs(rows, x))  # [T, K]
            weights = weights * g.to(weights.dtype)[:, None]
        return self.bag(rows, weights)

    def activated(self, g: Tensor) -> Tensor:
        """What neurons hand on, from their products with the input. g: [T, K]."""
        name = self.config.activation
        return g if name == "identity" else ACTIVATIONS[name](g)

    def bag(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Values weighted and added up, block by block. rows: [T, K]; weights: [T, C, K]."""
        n = self.config.cores
        if n == 1:
            return self.values(rows, weights[:, 0])
        blocks = rows[:, None] * n + torch.arange(n, device=rows.device)[:, None]
        y = self.values(blocks.flatten(0, 1), weights.flatten(0, 1))  # [T C, d_value / C]
        return y.unflatten(0, (rows.shape[0], n)).flatten(1)
