"""How many neurons held-out tokens run, layer by layer, where each token chooses its own.

A statistical threshold (`layers.statistical_topk`) meets its target in the mean of normal scores
alone, so what it keeps is counted. Counts come with the layers' `stats`: nothing is hooked.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from layers.spark_ffn import SparkFFN, SparkFFNConfig
from recipes.report.density_records import LayerDensity


def sparse_layers(model: nn.Module) -> dict[int, SparkFFNConfig]:
    """{layer: sizes of its FFN} for the layers whose tokens choose neurons."""
    ffns = (block.ffn for block in cast(Any, model).blocks)
    return {
        layer: ffn.config
        for layer, ffn in enumerate(ffns)
        if isinstance(ffn, SparkFFN) and ffn.config.selection != "none"
    }


class Density(Metric):
    """Sums over the real tokens of an evaluation, by layer and domain."""

    full_state_update = False

    def __init__(self, model: nn.Module, domains: Sequence[str]):
        super().__init__()
        self.domains, self.sizes = tuple(domains), sparse_layers(model)
        for layer in self.sizes:
            sums = torch.zeros(len(self.domains), 2, dtype=torch.float64)  # neurons, tokens
            self.add_state(f"sums_{layer}", sums, dist_reduce_fx="sum")

    def update(self, stats: Sequence[Mapping[str, Tensor] | None], domain: int | None) -> None:
        """Add one batch. stats: one mapping a layer."""
        for layer in self.sizes:
            found = stats[layer] or {}
            if "active_neurons" in found:
                sums = getattr(self, f"sums_{layer}")
                more = torch.stack([found["active_neurons"], found["tokens"]])
                sums[domain or 0] += more.to(sums)

    def compute(self) -> dict[int, Tensor]:
        """{layer: neurons that ran and tokens [domains, 2]}, of all processes."""
        return {layer: getattr(self, f"sums_{layer}") for layer in self.sizes}

    def layers(self) -> tuple[LayerDensity, ...]:
        """A record per layer that saw tokens."""
        found = []
        for layer, sums in self.compute().items():
            by_domain = sums.reshape(len(self.domains), 2)
            neurons, tokens = by_domain.sum(0).tolist()
            if not tokens:
                continue
            c = self.sizes[layer]
            found.append(
                LayerDensity(
                    layer=layer,
                    n_neurons=c.hidden,
                    target=c.share,
                    active=neurons / tokens / c.hidden,
                    active_by_domain={
                        name: (ran / seen / c.hidden).item()
                        for name, (ran, seen) in zip(self.domains, by_domain, strict=True)
                        if seen
                    },
                )
            )
        return tuple(found)
