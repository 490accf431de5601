"""The ways to convert: what each may be told, what weights it makes, what layer it asks for."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from layers.names import check_choice, check_positive, unknown
from routers.scores import INIT_STD
from zoo.conversion.grouping import GROUPINGS
from zoo.conversion.stacks import (
    DenseFFN,
    ExpertStacks,
    drop_upcycle,
    granular_upcycle,
    mixing_scale,
    sparse_upcycle,
    split_neurons,
)


@dataclass(frozen=True, kw_only=True)
class ConversionOptions(ABC):
    """What every method may be told."""

    renormalize: bool = True  # the chosen weights sum to one; False: softmax over all, uniform
    router_std: float = INIT_STD  # of the new router's normal weights
    noise: float = 0.0  # on the experts, in root mean squares of their weights; tells copies apart
    layers: Any = ":"  # which dense layers, as in layers.selection: "1::2" every other

    def __post_init__(self) -> None:
        check_positive(router_std=self.router_std)
        if self.noise < 0:
            raise ValueError(f"noise must not be negative, got {self.noise}")

    def scale(self) -> float:
        """Factor on down that keeps the output's size."""
        copies, slices = self.shape
        return mixing_scale(copies, slices, self.chosen, renormalize=self.renormalize)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Copies of the dense FFN, and slices of each."""

    @property
    @abstractmethod
    def chosen(self) -> int:
        """K."""

    def layer(self, d_ff: int, activation: str) -> dict[str, Any]:
        """The converted layer as a recipe's `ffn` says it."""
        copies, slices = self.shape
        if d_ff % slices:
            raise ValueError(f"d_ff={d_ff} does not split into {slices} equal parts")
        return {
            "name": "moe",
            "n_experts": copies * slices,
            "top_k": self.chosen,
            "d_expert": d_ff // slices,
            "activation": activation,
            "router": {"name": "top_k", "renormalize": self.renormalize} | self.router_options,
        }

    @property
    def router_options(self) -> dict[str, Any]:
        """Of the router, beside its sizes and renormalize."""
        return {}

    def router_rows(self, d_model: int, generator: torch.Generator) -> Tensor:
        """[E, D]: a row for each copy, which its slices share: they are chosen together."""
        copies, slices = self.shape
        rows = torch.randn(copies, d_model, generator=generator) * self.router_std
        return rows.repeat_interleave(slices, 0)


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions(ConversionOptions):
    """Sparse upcycling (arXiv:2212.05055): exact where renormalize is on."""

    n_experts: int = 8
    top_k: int = 2

    @property
    def shape(self) -> tuple[int, int]:
        """Whole copies."""
        return self.n_experts, 1

    @property
    def chosen(self) -> int:
        """K."""
        return self.top_k


@dataclass(frozen=True, kw_only=True)
class DropOptions(UpcycleOptions):
    """Drop-upcycling (arXiv:2502.19261): as upcycling, then part of each copy drawn anew."""

    fraction: float = 0.5  # of the neurons of each expert


@dataclass(frozen=True, kw_only=True)
class GranularOptions(ConversionOptions):
    """Granular upcycling (arXiv:2410.07524): exact where renormalize is on and G divides K.

    Slices of a copy have one router row, so whole copies are chosen; they tie to rounding, not to
    the bit. Only two copies whose logits lie within that of one another could share a choice.
    """

    n_copies: int = 4
    n_slices: int = 2
    top_k: int | None = None  # None: n_slices, the compute of the dense FFN

    @property
    def shape(self) -> tuple[int, int]:
        """R copies of G slices."""
        return self.n_copies, self.n_slices

    @property
    def chosen(self) -> int:
        """K."""
        return self.n_slices if self.top_k is None else self.top_k


@dataclass(frozen=True, kw_only=True)
class FactorOptions(ConversionOptions):
    """FactorLLM (arXiv:2408.11855): the neurons dealt out to experts, nothing copied.

    K of N experts run and count N / K, as the published hard mask has it while the router is still
    even; then their weights, which sum to N, are the softmax's, so that the router learns from the
    task. Hence router_std: at 1e-3 the weights start within about 2 % of even at width 256.
    """

    n_experts: int = 4
    top_k: int = 2
    split: str = "contiguous"  # contiguous | random | kmeans (balanced, on rows of up)
    router_std: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("split of factor_llm", self.split, GROUPINGS)

    @property
    def shape(self) -> tuple[int, int]:
        """One copy."""
        return 1, self.n_experts

    @property
    def chosen(self) -> int:
        """K."""
        return self.top_k

    @property
    def router_options(self) -> dict[str, Any]:
        """The published router has a bias."""
        return {"logit_bias": True}

    def router_rows(self, d_model: int, generator: torch.Generator) -> Tensor:
        """[N, D]: slices are chosen one by one."""
        return torch.randn(self.n_experts, d_model, generator=generator) * self.router_std


def _upcycle(dense: DenseFFN, options: UpcycleOptions, _: torch.Generator) -> ExpertStacks:
    return sparse_upcycle(dense, options.n_experts, scale=options.scale())


def _granular(dense: DenseFFN, options: GranularOptions, _: torch.Generator) -> ExpertStacks:
    return granular_upcycle(dense, *options.shape, scale=options.scale())


def _drop(dense: DenseFFN, options: DropOptions, generator: torch.Generator) -> ExpertStacks:
    n, fraction = options.n_experts, options.fraction
    return drop_upcycle(dense, n, fraction, generator, scale=options.scale())


def _factor(dense: DenseFFN, options: FactorOptions, generator: torch.Generator) -> ExpertStacks:
    groups = GROUPINGS[options.split](dense.up, options.n_experts, generator)
    return split_neurons(dense, groups.to(dense.up.device), scale=options.scale())


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of `METHODS`."""

    options: type[ConversionOptions]
    stacks: Callable[[DenseFFN, Any, torch.Generator], ExpertStacks]


METHODS = {
    "upcycle": Method(options=UpcycleOptions, stacks=_upcycle),
    "granular": Method(options=GranularOptions, stacks=_granular),
    "drop": Method(options=DropOptions, stacks=_drop),
    "factor_llm": Method(options=FactorOptions, stacks=_factor),
}


def method_of(name: str) -> Method:
    """The row of that name. Raises ValueError, with the nearest name, where there is none."""
    if name not in METHODS:
        raise unknown("conversion", name, METHODS)
    return METHODS[name]


def options_for(to: str, given: Mapping[str, Any]) -> ConversionOptions:
    """A method's options from plain values. Raises ValueError for an unknown name or value."""
    row = method_of(to)
    known = [f.name for f in fields(row.options)]
    for name in given:
        check_choice(f"option of {to}", name, known)
    return row.options(**given)
