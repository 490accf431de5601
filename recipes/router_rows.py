"""What a curve's row says of routers and memories: few scalars, each the mean over its layers."""

from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from recipes.choices import Choices, agreement
from recipes.density import sparse_layers
from recipes.loop_health import predictors_of
from recipes.memory_health import memories_of
from recipes.metrics import Evaluation, expert_names
from recipes.report.density_records import LayerDensity
from recipes.report.depth_records import LayerLoops
from recipes.report.layer_records import LayerHealth, LayerLoad, LayerMemory

Row = dict[str, float | None]

LOAD_KEYS = (
    "entropy", "largest_share", "dead", "zero_computation_share", "max_violation",
    "domain_information",
)  # fmt: skip
HEALTH_KEYS = ("confidence", "token_entropy", "margin", "information", "near_ties", "logit_rms")
SETTLED_KEYS = ("kept", "jaccard")  # choices, since the evaluation before
DENSITY_KEYS = ("active", "over_target")
LOOP_KEYS = ("mean", "width")
MEMORY_KEYS = ("used", "kl", "domain_information", "recall", "core_gap")


class RouterRows:
    """Makes that part of a row; remembers the choices of the last evaluation."""

    def __init__(self) -> None:
        self._last: Choices | None = None

    def state_dict(self) -> dict[str, Any] | None:
        """Plain tensors and numbers."""
        return None if self._last is None else self._last.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from there; None: the next row has none to compare with."""
        self._last = Choices.of_state(state)

    def of(self, found: Evaluation) -> Row:
        """The keys of `router_keys`, from an evaluation of the thinned validation part."""
        now = found.choices.value()
        settled = agreement(self._last, now) or (None, None)
        self._last = now
        row = means("load", LOAD_KEYS, found.load.loads())
        row |= means("router", HEALTH_KEYS, found.health.layers())
        row |= means("memory", MEMORY_KEYS, found.memory.layers())
        row |= means("density", DENSITY_KEYS, found.density.layers())
        row |= means("loops", LOOP_KEYS, found.loops.layers())
        if now is not None:
            row |= {f"router/{k}": v for k, v in zip(SETTLED_KEYS, settled, strict=True)}
        return row


def router_keys(model: nn.Module) -> list[str]:
    """The keys of an evaluated row; none where nothing routes and nothing is looked up."""
    keys = [f"memory/{key}" for key in MEMORY_KEYS] if memories_of(model) else []
    keys += [f"density/{key}" for key in DENSITY_KEYS] if sparse_layers(model) else []
    keys += [f"loops/{key}" for key in LOOP_KEYS] if predictors_of(model) else []
    if expert_names(model):
        keys += [f"load/{key}" for key in LOAD_KEYS]
        keys += [f"router/{key}" for key in (*HEALTH_KEYS, *SETTLED_KEYS)]
    return keys


def means(
    part: str,
    keys: Sequence[str],
    layers: Sequence[LayerLoad | LayerHealth | LayerMemory | LayerLoops | LayerDensity],
) -> Row:
    """Each figure over the layers that have it; None where none has."""
    row: Row = {}
    for key in keys if layers else ():
        known = [x for layer in layers if (x := getattr(layer, key)) is not None]
        row[f"{part}/{key}"] = fmean(known) if known else None
    return row


def assignments(stats: Sequence[Mapping[str, Tensor] | None]) -> dict[str, Tensor]:
    """Assignments of a training batch, and those of them that a capacity dropped, over all layers.

    stats: of each layer. Empty where no layer may drop.
    """
    layers = [layer for layer in stats if layer and "dropped" in layer]
    if not layers:
        return {}
    dropped = torch.stack([layer["dropped"] for layer in layers]).sum()
    ran = torch.stack([layer["counts"].sum() for layer in layers]).sum()
    return {"dropped": dropped.double(), "assigned": (ran + dropped).double()}


def dropped_share(sums: Mapping[str, float]) -> Row:
    """The share of an interval's assignments that were dropped, from sums of `assignments`."""
    if "assigned" not in sums:
        return {}
    return {"load/dropped": sums["dropped"] / max(sums["assigned"], 1.0)}


def router_figures(row: Row) -> dict[str, float]:
    """What `result.json` keeps of a row's figures of layers: the known ones, by their names."""
    return {
        name: value
        for name, value in row.items()
        if name.startswith(("load/", "router/", "memory/", "loops/", "density/"))
        and value is not None
        and isfinite(value)
    }
