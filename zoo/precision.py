"""Precision of a built module, by name."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from layers.precision import PRESETS, CoverageReport, PrecisionPolicy, apply_policy
from layers.precision.formats import every_format, format_of
from layers.precision.random import mixed
from zoo.accounting import module_cost


def precisions() -> list[str]:
    """Names of the precision presets."""
    return list(PRESETS)


def formats() -> list[str]:
    """Names of the number formats that a policy's operands may stand in."""
    return [row.name for row in every_format()]


def describe_format(name: str) -> dict[str, Any]:
    """What a format is and which options an operand in it may take, as plain values."""
    row = format_of(name)
    grid = None if row.grid is None else row.grid.name
    return {
        "name": row.name,
        "summary": row.summary,
        "paper": row.paper,
        "bits": row.bits,
        "elements": grid,
        "block": row.block,
        "scale_rule": list(row.scale_rules),
        "tile": list(row.tiles),
        "scope": list(row.scopes),
        "rounding": list(row.roundings),
    }


def set_precision(
    module: nn.Module,
    precision: str | Mapping[str, Any] | PrecisionPolicy,
    where: str = "*",
    *,
    step: int = 0,
    max_steps: int | None = None,
) -> CoverageReport:
    """Give every leaf of a module whose name matches the glob `where` its precision.

    Same parameters, same `state_dict`, no module swapped; see `layers.precision.apply_policy`.

    Args:
        module: a variant, a language model, or anything that holds leaves of `layers.linear`.
        precision: a preset's name, a mapping as in a recipe, or a policy.
        where: which leaves, by qualified name, e.g. "blocks.*.ffn.*".
        step: the step of training, counted from 0, whose formats the policy's schedule is to give;
            a finished run's last is max_steps - 1.
        max_steps: of that training; only needed where the schedule has a share of it.

    Returns:
        Every parameter with its format, and shares of weights and of FLOPs.

    Raises:
        ValueError: when nothing matches, or a strict policy misses a weight.
    """
    policy = policy_of(precision)
    now = _active(policy, step, max_steps)
    known = {item.name: item for item in module_cost(module)}
    roles = {name: item.role for name, item in known.items()}
    flops = {name: item.flops for name, item in known.items()} or None
    if policy.schedule:  # every buffer of it, so that a state_dict fits at every step
        for active in ((), *((i,) for i in range(len(policy.schedule)))):
            apply_policy(module, policy, where=where, active=active, roles=roles)
    return apply_policy(module, policy, where=where, active=now, roles=roles, flops=flops)


def _active(policy: PrecisionPolicy, step: int, max_steps: int | None) -> tuple[int, ...]:
    """The switches that hold at a step. Raises ValueError where that depends on max_steps."""
    if step < 0 or (max_steps is not None and step >= max_steps):
        allowed = "0 or more" if max_steps is None else f"in [0, max_steps={max_steps})"
        raise ValueError(f"step must be {allowed}, got {step}")
    if max_steps is None and step and any(isinstance(s.at, float) for s in policy.schedule):
        raise ValueError(
            f"precision {policy.name!r} switches at a share of all steps: give max_steps with "
            f"step={step}"
        )
    return policy.active(step, max_steps or 1)  # at step 0 only a share of 0 holds, whatever max


def rounding_seed(seed: int, precision: str | Mapping[str, Any] | PrecisionPolicy) -> int:
    """The seed for `zoo.seed_rounding` of a run, from its own seed and the policy's."""
    return mixed(seed, policy_of(precision).seed)


def policy_of(precision: str | Mapping[str, Any] | PrecisionPolicy) -> PrecisionPolicy:
    """A policy from a preset's name, a mapping as in a recipe, or a policy."""
    return PrecisionPolicy.of(dict(precision) if isinstance(precision, Mapping) else precision)
