"""What a variant costs: counted from configs, so nothing is built."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from layers.base import Cost, WeightCost, total
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
    own: Callable[[], Cost] | None = getattr(module, "cost", None)
    if own is not None:
        return own()
    counted: list[Cost] = []
    for prefix, part in (("", module), ("router.", getattr(module, "router", None))):
        config: Any = getattr(part, "config", None)
        if hasattr(config, "cost"):
            counted.append(config.cost().within(prefix))
    return total(counted)
