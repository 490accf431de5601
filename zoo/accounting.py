"""What a variant costs: counted from configs, so nothing is built."""

from dataclasses import replace

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


def module_cost(module: nn.Module) -> Cost:
    """Cost of a built module: its own `cost()`, or what its and its router's configs count.

    Empty for a module that counts nothing.
    """
    if callable(own := getattr(module, "cost", None)):
        return own()
    parts = [
        config.cost().within(prefix)
        for prefix, part in (("", module), ("router.", getattr(module, "router", None)))
        if hasattr(config := getattr(part, "config", None), "cost")
    ]
    return Cost(tuple(item for part in parts for item in part))
