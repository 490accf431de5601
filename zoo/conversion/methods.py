"""The ways to convert: what each may be told, what weights it makes, what layer it asks for."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from layers.names import check_choice, unknown
from layers.spt_ffn import in_blocks
from zoo.conversion.grouping import GROUPINGS
from zoo.conversion.options import ConversionOptions, MixtureOptions, SoftmaxOptions
from zoo.conversion.spark import SparkOptions
from zoo.conversion.stacks import (
    DenseFFN,
    ExpertStacks,
    drop_upcycle,
    granular_upcycle,
    sparse_upcycle,
    split_neurons,
)


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions(SoftmaxOptions):
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

    def stacks(self, dense: DenseFFN, generator: torch.Generator) -> ExpertStacks:
        """As `MixtureOptions.stacks`."""
        return sparse_upcycle(dense, self.n_experts, scale=self.scale())


@dataclass(frozen=True, kw_only=True)
class DropOptions(UpcycleOptions):
    """Drop-upcycling (arXiv:2502.19261): as upcycling, then part of each copy drawn anew."""

    fraction: float = 0.5  # of the neurons of each expert

    def stacks(self, dense: DenseFFN, generator: torch.Generator) -> ExpertStacks:
        """As `MixtureOptions.stacks`."""
        n, scale = self.n_experts, self.scale()
        return drop_upcycle(dense, n, self.fraction, generator, scale=scale)


@dataclass(frozen=True, kw_only=True)
class GranularOptions(SoftmaxOptions):
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

    def stacks(self, dense: DenseFFN, generator: torch.Generator) -> ExpertStacks:
        """As `MixtureOptions.stacks`."""
        return granular_upcycle(dense, *self.shape, scale=self.scale())


@dataclass(frozen=True, kw_only=True)
class FactorOptions(MixtureOptions):
    """FactorLLM (arXiv:2408.11855): the neurons dealt out to experts, as they are, nothing copied.

    K of N experts run, each N / K times; with K = N it is the dense FFN. Its training adds
    0.05 * the sum over layers of `pa_loss` and 0.01 * that of the published balance term.
    """

    n_experts: int = 4
    top_k: int = 2
    split: str = "contiguous"  # contiguous | random | kmeans (balanced, on rows of up)
    straight_through: bool = True  # the task's gradient reaches the router

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
    def router(self) -> dict[str, Any]:
        """As `MixtureOptions.router`."""
        return {"name": "factor_llm", "straight_through": self.straight_through}

    def stacks(self, dense: DenseFFN, generator: torch.Generator) -> ExpertStacks:
        """As `MixtureOptions.stacks`."""
        groups = GROUPINGS[self.split](dense.up, self.n_experts, generator)
        return split_neurons(dense, groups.to(dense.up.device))

    def router_rows(self, d_model: int, generator: torch.Generator) -> Tensor:
        """[N, D]: slices are chosen one by one."""
        return torch.randn(self.n_experts, d_model, generator=generator) * self.router_std

    def loss_weights(self, n_layers: int) -> dict[str, float]:
        """The published ones, which weigh sums over layers, of losses that here are means over
        layers and 1.0 when even."""
        balance = 0.01 * n_layers * self.top_k / self.n_experts**2
        return {"prior": 0.05 * n_layers, "balance": balance}


@dataclass(frozen=True, kw_only=True)
class SPTOptions(ConversionOptions):
    """SPT (arXiv:2312.10365): the dense FFN itself, of which a token runs some blocks."""

    n_experts: int = 4  # blocks
    top_k: int = 2
    rank: int | None = 16  # of the low-rank factors that are trained, base frozen; None: the base
    weighting: str = "twice"  # of the router `spt`

    def layer(self, d_ff: int, activation: str) -> dict[str, Any]:
        """As `ConversionOptions.layer`."""
        said = {"name": "spt_ffn", "d_ff": d_ff, "activation": activation, "rank": self.rank}
        router = {"name": "spt", "weighting": self.weighting}
        return said | {"n_experts": self.n_experts, "top_k": self.top_k, "router": router}

    def weights(self, dense: DenseFFN, generator: torch.Generator) -> dict[str, Tensor]:
        """As `ConversionOptions.weights`; left factors normal(0, 1), right ones zero."""
        width, d_model = dense.up.shape
        whole = {"gate_up.weight": torch.cat((dense.gate, dense.up)), "down.weight": dense.down}
        weights = in_blocks(whole, self.n_experts)
        rows = torch.randn(self.n_experts, d_model, generator=generator) * self.router_std
        weights["router.weight"] = rows
        if self.rank is not None:
            for name in ("gate_left", "up_left"):
                weights[f"{name}.weight"] = torch.randn(self.rank, d_model, generator=generator)
            left = torch.randn(self.rank, width, generator=generator)
            weights["down_left.weight"] = in_blocks({"down.weight": left}, self.n_experts)[
                "down.weight"
            ]
        return weights

    def loss_weights(self, n_layers: int) -> dict[str, float]:
        """Its router has no loss."""
        return {}


@dataclass(frozen=True, kw_only=True)
class VersatileOptions(ConversionOptions):
    """VersatileFFN (arXiv:2512.14531): the dense FFN itself with its norm, used in width and depth.

    Only the router and the loop predictor are drawn. path="depth", loops="fixed", max_loops=1 is
    the dense FFN exactly: the paper's control of training on.
    """

    n_experts: int = 8
    top_k: int = 2
    max_loops: int = 4
    path: str = "both"  # as of the layer: both | width | depth
    fusion: str = "difficulty"  # difficulty | average
    loops: str = "predicted"  # predicted | fixed
    anneal: str = "steps"  # steps | run
    norm_eps: float = 1e-6  # of its norm; a whole model's own where one is converted

    def layer(self, d_ff: int, activation: str) -> dict[str, Any]:
        """As `ConversionOptions.layer`."""
        own = {f.name: getattr(self, f.name) for f in fields(VersatileOptions)}
        said = {k: v for k, v in own.items() if k not in ("router_std", "layers")}
        return {"name": "versatile_ffn", "d_ff": d_ff, "activation": activation, **said}

    def weights(self, dense: DenseFFN, generator: torch.Generator) -> dict[str, Tensor]:
        """As `ConversionOptions.weights`."""
        d_model = dense.up.shape[1]

        def rows(n: int) -> Tensor:
            return torch.randn(n, d_model, generator=generator) * self.router_std

        weights = {"gate_up.weight": torch.cat((dense.gate, dense.up)), "down.weight": dense.down}
        if self.path != "depth":
            weights["router.weight"] = rows(self.n_experts)
        if self.path != "width" and self.loops == "predicted":
            weights["loop_predictor.weight"] = rows(self.max_loops)
        return weights

    def loss_weights(self, n_layers: int) -> dict[str, float]:
        """The paper's, which has no z loss; none where nothing routes."""
        return {} if self.path == "depth" else {"balance": 1e-5, "z": 0.0}


METHODS: dict[str, type[ConversionOptions]] = {
    "upcycle": UpcycleOptions,
    "granular": GranularOptions,
    "drop": DropOptions,
    "factor_llm": FactorOptions,
    "spt": SPTOptions,
    "versatile": VersatileOptions,
    "spark": SparkOptions,
}


def method_of(name: str) -> type[ConversionOptions]:
    """The options of that method. Raises ValueError, with the nearest name, where there is none."""
    if name not in METHODS:
        raise unknown("conversion", name, METHODS)
    return METHODS[name]


def options_for(to: str, given: Mapping[str, Any]) -> ConversionOptions:
    """A method's options from plain values. Raises ValueError for an unknown name or value."""
    row = method_of(to)
    known = [f.name for f in fields(row)]
    for name in given:
        check_choice(f"option of {to}", name, known)
    return row(**given)
