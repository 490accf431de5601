"""What a variant costs: counted from configs, so nothing is built."""

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import Any

from torch import nn

from layers.base import Cost, WeightCost
from layers.precision import PrecisionPolicy
from layers.precision.formats import storage_bits


def stored(cost: Cost, policy: PrecisionPolicy, n_layers: int = 0) -> Cost:
    """The same cost, each weight with the bits that it takes in store under a policy."""
    return Cost(tuple(_stored(item, policy, n_layers) for item in cost))


def _stored(item: WeightCost, policy: PrecisionPolicy, n_layers: int) -> WeightCost:
    leaf, _ = policy.resolve(
        name=item.name.removesuffix(".weight"), role=item.role, layer=item.layer, n_layers=n_layers
    )
    return replace(item, bits=storage_bits(leaf.fprop_w))


def layer_cost(config: Any, router_config: Any = None, **measured: float) -> Cost:
    """Cost of a variant's config with its router's.

    Args:
        config: of the variant.
        router_config: of its router; None: it routes nothing.
        measured: what a run measured in place of the designed value (`assignments`: FFN experts
            that run for a token); where nothing is given, what the router steers to, if it does.
    """
    aim = getattr(router_config, "assignments", None)
    if aim is not None and "assignments" in signature(config.cost).parameters:
        measured = {"assignments": aim, **measured}
    cost: Cost = config.cost(**measured)
    return cost if router_config is None else cost + router_config.cost().within("router.")


def module_cost(module: nn.Module) -> Cost:
    """Cost of a built module: its own `cost()`, or what its and its router's configs count.

    Empty for a module that counts nothing.
    """
    own: Callable[[], Cost] | None = getattr(module, "cost", None)
    if own is not None:
        return own()
    config, router = (_config(part) for part in (module, getattr(module, "router", None)))
    if config is None:
        return Cost(()) if router is None else router.cost().within("router.")
    return layer_cost(config, router)


def _config(part: Any) -> Any:
    """A module's config, if that counts its cost."""
    config: Any = getattr(part, "config", None)
    return config if hasattr(config, "cost") else None
