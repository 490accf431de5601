"""What any conversion may be told, and what it must say: the new layer, its weights, its losses."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from layers.mlp import MLP
from layers.names import check_positive
from layers.swiglu import SwiGLU
from routers.scores import INIT_STD
from zoo.conversion.stacks import DenseFFN, ExpertStacks, mixing_scale, with_noise


@dataclass(frozen=True, kw_only=True)
class ConversionOptions(ABC):
    """What every method may be told."""

    sources: ClassVar[tuple[type[SwiGLU | MLP], ...]] = (SwiGLU,)  # what it converts

    router_std: float = INIT_STD  # of the new router's normal weights
    layers: Any = ":"  # which dense layers, as in layers.selection: "1::2" every other

    def __post_init__(self) -> None:
        check_positive(router_std=self.router_std)

    @abstractmethod
    def layer(self, d_ff: int, activation: str) -> dict[str, Any]:
        """The converted layer as a recipe's `ffn` says it."""

    def layer_for(self, ffn: SwiGLU | MLP) -> dict[str, Any]:
        """`layer` of that dense one, of a kind in `sources`."""
        return self.layer(ffn.config.hidden, ffn.config.activation)

    @abstractmethod
    def weights(self, dense: DenseFFN, generator: torch.Generator) -> dict[str, Tensor]:
        """The converted layer's parameters by name; those left out stay as a new layer has them."""

    @abstractmethod
    def loss_weights(self, n_layers: int) -> dict[str, float]:
        """Of the auxiliary losses in training on, `n_layers` being converted."""


@dataclass(frozen=True, kw_only=True)
class MixtureOptions(ConversionOptions):
    """Of what becomes a `moe`: R copies of the dense FFN, each cut into G slices."""

    noise: float = 0.0  # on the experts, in root mean squares of their weights; tells copies apart

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise < 0:
            raise ValueError(f"noise must not be negative, got {self.noise}")

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """R and G."""

    @property
    @abstractmethod
    def chosen(self) -> int:
        """K."""

    @property
    @abstractmethod
    def router(self) -> dict[str, Any]:
        """As a recipe says it, without sizes."""

    @abstractmethod
    def stacks(self, dense: DenseFFN, generator: torch.Generator) -> ExpertStacks:
        """The experts, without noise."""

    def layer(self, d_ff: int, activation: str) -> dict[str, Any]:
        """As `ConversionOptions.layer`."""
        copies, slices = self.shape
        if d_ff % slices:
            raise ValueError(f"d_ff={d_ff} does not split into {slices} equal parts")
        return {
            "name": "moe",
            "n_experts": copies * slices,
            "top_k": self.chosen,
            "d_expert": d_ff // slices,
            "activation": activation,
            "router": self.router,
        }

    def weights(self, dense: DenseFFN, generator: torch.Generator) -> dict[str, Tensor]:
        """As `ConversionOptions.weights`."""
        stacks = with_noise(self.stacks(dense, generator), self.noise, generator)
        rows = self.router_rows(dense.up.shape[1], generator)
        return {
            "experts.gate_up.weight": stacks.gate_up,
            "experts.down.weight": stacks.down,
            "router.weight": rows,
        }

    def router_rows(self, d_model: int, generator: torch.Generator) -> Tensor:
        """[E, D]: a row for each copy, which its slices share: they are chosen together."""
        copies, slices = self.shape
        rows = torch.randn(copies, d_model, generator=generator) * self.router_std
        return rows.repeat_interleave(slices, 0)


@dataclass(frozen=True, kw_only=True)
class SoftmaxOptions(MixtureOptions):
    """Of copies that a softmax mixes."""

    renormalize: bool = True  # the chosen weights sum to one; False: softmax over all, uniform

    @property
    def router(self) -> dict[str, Any]:
        """As `MixtureOptions.router`."""
        return {"name": "top_k", "renormalize": self.renormalize}

    def scale(self) -> float:
        """Factor on down that keeps the output's size."""
        copies, slices = self.shape
        return mixing_scale(copies, slices, self.chosen, renormalize=self.renormalize)

    def loss_weights(self, n_layers: int) -> dict[str, float]:
        """As recipes/moe.yaml."""
        return {"balance": 0.01, "z": 0.001}
