"""The verdict rule of comparison.md, section 11: what must hold to call a variant better."""

from dataclasses import dataclass

from recipes.report import text
from recipes.statistics.paired import EQUIVALENCE
from recipes.study.report.derive import Derived
from recipes.study.report.ladder import Ladder

PARAMS_HELD = "params"


@dataclass(frozen=True)
class Condition:
    """One of the rule's four."""

    letter: str
    asks: str
    holds: bool | None  # None: the study cannot say
    told: str


@dataclass(frozen=True)
class Ruling:
    """What the rule comes to for a variant."""

    variant: str
    conditions: tuple[Condition, ...]

    @property
    def better(self) -> bool:
        """Whether all of it holds."""
        return all(c.holds for c in self.conditions)

    @property
    def words(self) -> str:
        """In one line."""
        if self.better:
            return "better by the rule"
        failing = [c.letter for c in self.conditions if c.holds is False]
        unknown = [c.letter for c in self.conditions if c.holds is None]
        parts = [f"({', '.join(failing)}) does not hold"] if failing else []
        parts += [f"({', '.join(unknown)}) cannot be told"] if unknown else []
        return "not better by the rule: " + ", ".join(parts)


def rulings(d: Derived, flops: Ladder, seconds: Ladder) -> list[Ruling]:
    """The rule applied to every variant, at the largest complete size.

    flops, seconds: ladders of the matching that `Derived.flops_hold` names.
    """
    if d.top is None:
        return []
    return [
        Ruling(v, (_quality(d, v), _leverage(v, flops), _params(d, v), _clock(d, v, seconds)))
        for v in d.others
    ]


def _quality(d: Derived, variant: str) -> Condition:
    asks = f"the paired 95 % interval excludes zero after Holm at equal {d.flops_hold}"
    found = d.table.get((variant, d.top or "", d.flops_hold))
    if found is None:
        return Condition("a", asks, None, "no finished runs of both")
    half = f" ± {found.half:.{d.digits}f}" if found.half else ""
    told = f"{text.signed(found.value, d.digits)}{half} bits per byte: {found.word} ({found.how})"
    holds = None if found.p_holm is None else found.word == "better"
    return Condition("a", asks, holds, told)


def _leverage(variant: str, flops: Ladder) -> Condition:
    asks = "the lower bound of the compute leverage is above 1 at the top rung"
    found = flops.leverages.get(variant)
    if found is None:
        why = flops.why or flops.refused.get(variant, "too few budgets of this variant for a fit")
        return Condition("b", asks, None, why)
    told = leverage_words(flops, variant)
    if found.unsure is not None:
        return Condition("b", asks, None, f"{told}: so not even whether it is above 1 is known")
    if found.extrapolated:
        told += "; of which only that it is above 1 is claimed" if found.interval.low > 1 else ""
    return Condition("b", asks, found.interval.low > 1, told)


def leverage_words(ladder: Ladder, variant: str) -> str:
    """A leverage with its interval, and how far it may be trusted."""
    found = ladder.leverages[variant]
    parts = [f"{found.value:.3g}× [{found.interval.low:.3g}, {found.interval.high:.3g}]"]
    if found.beyond > 1:
        word = "extrapolated" if found.extrapolated else "read"
        parts.append(f"{word} {found.beyond:.3g}× outside the baseline's budgets")
    if found.unsure is not None:
        parts.append(found.unsure)
    return ", ".join(parts)


def _params(d: Derived, variant: str) -> Condition:
    asks = f"the sign is not reversed at equal parameters by more than {EQUIVALENCE:.2%}"
    if PARAMS_HELD not in d.plan.holds:
        return Condition("c", asks, None, "the study does not hold parameters equal")
    cell = d.plan.cell(d.top or "", PARAMS_HELD)
    if variant in cell.unreachable:
        return Condition("c", asks, None, f"out of reach: {cell.unreachable[variant]}")
    found = d.table.get((variant, d.top or "", PARAMS_HELD))
    base = d.base(d.top or "", PARAMS_HELD)
    if found is None or base is None or found.value != found.value:
        return Condition("c", asks, None, "no finished runs of both")
    share = found.value / base.bpb
    half = f" ± {text.percent(found.half / base.bpb, 2)}" if found.half else ""
    told = f"{text.signed(100 * share, 2)}\u00a0%{half} at equal parameters ({found.word})"
    return Condition("c", asks, share <= EQUIVALENCE, told)


def _clock(d: Derived, variant: str, seconds: Ladder) -> Condition:
    """Only printing is asked; it holds whatever the number."""
    asks = "wall-clock leverage is printed, below 1 too"
    mine, base = (d.arm(v, d.top or "", d.flops_hold) for v in (variant, d.plan.baseline.variant))
    if mine is None or base is None:
        return Condition("d", asks, None, "no finished runs of both")
    ratio = f"{mine.tokens_per_s / base.tokens_per_s:.3g}× the baseline's tokens per second"
    if variant in seconds.leverages:
        return Condition("d", asks, True, f"{leverage_words(seconds, variant)} in time; {ratio}")
    return Condition("d", asks, None, f"{ratio}; no time leverage, for want of a fit")
