"""When a variant may be called better (comparison.md, section 11).

(a) its paired interval excludes zero after Holm's correction at equal FLOPs, (b) the lower end of
its compute leverage at the top rung lies above one, (c) at equal parameters the sign is not
reversed by more than the margin, or the sentence says so, (d) wall-clock leverage stands beside.
"""

from dataclasses import dataclass

from recipes.statistics.leverage import Leverage
from recipes.statistics.verdicts import Difference


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a variant against the baseline; None: it was not measured."""

    equal_flops: Difference  # corrected over its table
    equal_params: Difference | None = None
    leverage: Leverage | None = None  # over compute, at the top rung
    time_leverage: float | None = None  # seconds of the baseline over its own, at equal loss


@dataclass(frozen=True, kw_only=True)
class Ruling:
    """Whether "better" may be said, and what must be said with it."""

    better: bool
    missing: tuple[str, ...]  # why not; empty where better
    trade_offs: tuple[str, ...]  # to be stated in the same sentence


def ruling(evidence: Evidence) -> Ruling:
    """The four conditions, each that fails in words."""
    missing = [why for why in (_flops(evidence), _ladder(evidence), _time(evidence)) if why]
    if evidence.equal_params is None:
        missing.append("no comparison at equal parameters")
    return Ruling(better=not missing, missing=tuple(missing), trade_offs=tuple(_trades(evidence)))


def _flops(e: Evidence) -> str | None:
    return None if e.equal_flops.word == "better" else f"{e.equal_flops.word} at equal FLOPs"


def _ladder(e: Evidence) -> str | None:
    if e.leverage is None:
        return "no leverage at the top rung"
    if e.leverage.extrapolated:
        return f"leverage read {e.leverage.beyond:.2g} times outside the baseline's budgets"
    low = e.leverage.interval.low
    return None if low > 1 else f"leverage at the top rung may be {low:.3g}"


def _time(e: Evidence) -> str | None:
    return "no wall-clock leverage" if e.time_leverage is None else None


def _trades(e: Evidence) -> list[str]:
    told = []
    params = e.equal_params
    if params is not None:
        if params.margin is None:
            raise ValueError("equal_params has no margin: judge it with three seeds or more")
        if params.value > params.margin:
            told.append(f"worse by {params.value:.4g} at equal parameters")
    if e.time_leverage is not None and e.time_leverage < 1:
        told.append(f"{e.time_leverage:.3g} times as fast in time")
    return told
