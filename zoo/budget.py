"""Equal budgets: turn a variant's width until it costs what another costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layers.base import Cost
from layers.names import check_positive, unknown
from zoo.accounting import stored
from zoo.precision import policy_of
from zoo.registry import resolve

MEASURES: dict[str, Callable[[Cost], float]] = {
    "flops": lambda cost: cost.flops,
    "params": lambda cost: cost.params,
    "active_params": lambda cost: cost.active_params,
    "weight_bytes": lambda cost: cost.weight_bytes,
}


@dataclass(frozen=True, kw_only=True)
class Match:
    """A width, and how near it comes."""

    width: int
    value: float  # what it costs at that width
    target: float
    options: dict[str, Any] = field(default_factory=dict)  # for `zoo.create`, width included

    @property
    def residual(self) -> float:
        """(value - target) / target."""
        return (self.value - self.target) / self.target


def solve_width(
    measure: Callable[[int], float], target: float, *, multiple_of: int, tolerance: float
) -> Match:
    """The multiple of `multiple_of` at which a rising `measure(width)` comes nearest to `target`.

    Raises:
        ValueError: when the nearest is further off than `tolerance` (relative).
    """
    check_positive(target=target, multiple_of=multiple_of)
    high = 1
    while measure(high * multiple_of) < target:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if measure(middle * multiple_of) < target else (low, middle)
    widths = [n * multiple_of for n in (low, high) if n > 0]
    best = min(widths, key=lambda width: abs(measure(width) - target))
    match = Match(width=best, value=measure(best), target=target)
    if abs(match.residual) > tolerance:
        raise ValueError(
            f"no width comes within {tolerance:.1%} of {target:.6g}: the nearest multiple of "
            f"{multiple_of} is {best}, at {match.value:.6g} ({match.residual:+.1%}). Allow a "
            "smaller multiple_of, a larger tolerance, or another target"
        )
    return match


def match(
    name: str,
    *,
    multiple_of: int = 16,
    tolerance: float = 0.02,
    precision: str | Mapping[str, Any] = "bf16",
    params: float | None = None,
    active_params: float | None = None,
    flops: float | None = None,
    weight_bytes: float | None = None,
    **options: Any,
) -> Match:
    """The width at which a variant costs a given amount, router included.

    Args:
        name: a row of the catalogue; its `width` field is turned.
        multiple_of: widths tried; 16 is NVFP4's block, 32 MXFP4's (a short last block is padded).
        tolerance: largest relative residual that is not an error.
        precision: what `weight_bytes` is counted in.
        params, active_params, flops, weight_bytes: exactly one target, as in `Cost`.
        options: the variant's other options.

    Returns:
        The match; `zoo.create(name, **match.options)` builds it.

    Raises:
        ValueError: for no or two targets, a variant without a width, or no width near enough.
    """
    targets = {
        "params": params, "active_params": active_params, "flops": flops,
        "weight_bytes": weight_bytes,
    }  # fmt: skip
    given = {key: target for key, target in targets.items() if target is not None}
    if len(given) != 1:
        raise ValueError(f"match takes one of {', '.join(targets)}, got {list(given) or 'none'}")
    [(key, target)] = given.items()
    entry = resolve(name, **options).entry
    if entry.width is None:
        raise ValueError(f"{entry.name} has no width to turn")
    if entry.width in options:
        raise ValueError(f"{entry.name}: {entry.width} is what match turns, so do not give it")
    width_field, policy = entry.width, policy_of(precision)

    def measure(width: int) -> float:
        settled: dict[str, Any] = {**options, width_field: width}
        cost = resolve(name, **settled).cost()
        return MEASURES[key](stored(cost, policy))

    found = solve_width(measure, target, multiple_of=multiple_of, tolerance=tolerance)
    return Match(
        width=found.width,
        value=found.value,
        target=target,
        options={**options, width_field: found.width},
    )


def measure_of(key: str) -> Callable[[Cost], float]:
    """How a budget is read off a cost; the error names the nearest right key."""
    if key not in MEASURES:
        raise unknown("budget", key, MEASURES)
    return MEASURES[key]
