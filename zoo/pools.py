"""Memory pools that several layers share: whose they are, what they cost, how they are built.

A pool belongs to the model (`pools.NAME.` in its weights), is counted there once and is handed to
the layers that read it. Layers say its name in the plan (`zoo.plan`); a pool of tables, one a
layer, gives each its own as the place where its window begins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from layers.base import Cost
from layers.memory import Pool, PoolConfig
from zoo.entry import Entry
from zoo.options import field_names
from zoo.plan import LayerChoice
from zoo.registry import Choice, find

OWN, SHARED = "own", "shared"  # what a variant's option `pool` says
PLACED = ("n_tables", "table")  # options that a layer's place among the readers decides


def pool_name(layer: LayerChoice) -> str | None:
    """The pool of the model that a layer reads; None: it has its own, or none.

    Raises:
        ValueError: for a name that no module can have.
    """
    name = layer.options.get("pool", OWN)
    if "pool" not in field_names(find(layer.ffn).config) or name == OWN:
        return None
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"pool must be {OWN!r} or a name to share it by, got {name!r}")
    return name


def shared_options(entry: Entry, places: Sequence[int], layer: int) -> dict[str, Any]:
    """Options of a layer that reads a shared pool. places: the layers that do, in order."""
    placed = {"n_tables": len(places), "table": places.index(layer)}
    known = field_names(entry.config)
    return {"pool": SHARED} | {name: n for name, n in placed.items() if name in known}


def readers(choices: Sequence[Choice]) -> dict[str, list[int]]:
    """{pool: the layers that read it}, in order."""
    found: dict[str, list[int]] = {}
    for layer, choice in enumerate(choices):
        if choice.pool is not None:
            found.setdefault(choice.pool, []).append(layer)
    return found


def pool_configs(choices: Sequence[Choice]) -> dict[str, PoolConfig]:
    """{pool: its sizes}.

    Raises:
        ValueError: where two layers read different ones by one name.
    """
    found: dict[str, PoolConfig] = {}
    for name, layers in readers(choices).items():
        first = found[name] = choices[layers[0]].config.parts.pool
        for layer in layers[1:]:
            other = choices[layer].config.parts.pool
            if other != first:
                raise ValueError(
                    f"layers {layers[0]} and {layer} read pool {name!r}, but one of {first} and "
                    f"one of {other}: make their sizes equal, or give the pools different names"
                )
    return found


def build_pools(choices: Sequence[Choice]) -> nn.ModuleDict:
    """The pools of a model by name; `draw_pools` draws them as their readers do."""
    return nn.ModuleDict({name: Pool(c) for name, c in pool_configs(choices).items()})


def draw_pools(choices: Sequence[Choice], ffns: Sequence[nn.Module]) -> None:
    """Draw each pool anew by the rule of the first layer that reads it; others keep the pool's own.

    ffns: of every layer, built.
    """
    for layers in readers(choices).values():
        draw = getattr(ffns[layers[0]], "draw_pool", None)
        if draw is not None:
            draw()


def pools_cost(choices: Sequence[Choice]) -> Cost:
    """The numbers of every pool, once; the layers that read it count the work.

    A token touches as many rows as all its layers read, where no two read the same: an upper bound.
    """
    cost = Cost(())
    for name, config in pool_configs(choices).items():
        hits = sum(choices[layer].config.parts.keys.hits for layer in readers(choices)[name])
        stored = config.cost_of(hits).within(f"pools.{name}.")
        cost += Cost(tuple(replace(item, flops=0.0, other_flops=0.0) for item in stored))
    return cost


def refuse_placed(options: Mapping[str, Any]) -> None:
    """Raise where a layer of a shared pool is told what its place says."""
    for name in PLACED:
        if name in options:
            raise ValueError(f"{name} of a shared pool is the model's: leave it out of ffn")
