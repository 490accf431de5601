"""Precision of a built module, by name."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from layers.precision import PRESETS, CoverageReport, PrecisionPolicy, apply_policy
from zoo.accounting import module_cost


def precisions() -> list[str]:
    """Names of the precision presets."""
    return list(PRESETS)


def set_precision(
    module: nn.Module,
    precision: str | Mapping[str, Any] | PrecisionPolicy,
    where: str = "*",
) -> CoverageReport:
    """Give every leaf of a module whose name matches the glob `where` its precision.

    Same parameters, same `state_dict`, no module swapped; see `layers.precision.apply_policy`.

    Args:
        module: a variant, a language model, or anything that holds leaves of `layers.linear`.
        precision: a preset's name, a mapping as in a recipe, or a policy.
        where: which leaves, by qualified name, e.g. "blocks.*.ffn.*".

    Returns:
        Every parameter with its format, and shares of weights and of FLOPs.

    Raises:
        ValueError: when nothing matches, or a strict policy misses a weight.
    """
    known = {item.name: item for item in module_cost(module)}
    return apply_policy(
        module,
        policy_of(precision),
        where=where,
        roles={name: item.role for name, item in known.items()},
        flops={name: item.flops for name, item in known.items()} or None,
    )


def policy_of(precision: str | Mapping[str, Any] | PrecisionPolicy) -> PrecisionPolicy:
    """A policy from a preset's name, a mapping as in a recipe, or a policy."""
    return PrecisionPolicy.of(dict(precision) if isinstance(precision, Mapping) else precision)
