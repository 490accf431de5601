"""What runs say of a claim: each test's interval against its threshold, corrected over the claim.

A test is reproduced where its interval lies on the right side of the threshold, contradicted where
it lies on the wrong one, and not resolved where it covers it. Its p is that of the side on which
the estimate lies; Holm's correction is over the tests of one claim (comparison.md 5.2), so that an
interval, which is not corrected, may clear the threshold and the test still not be resolved.

Two cases have no p. Where three seeds or more differ by the same number to the last digit there is
no noise, and the number itself is held against the threshold. Where a loss diverged on one side
alone, in three seeds or more and in most of them, it counts as infinite there; any other divergence
leaves the test open.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, isfinite, log, nan
from statistics import fmean
from typing import Literal

from recipes.claiming.measures import MEASURES
from recipes.claiming.schema import Test
from recipes.statistics.noise import LEVEL, ROUNDING, Seeds
from recipes.statistics.paired import MIN_SEEDS, difference
from recipes.statistics.verdicts import holm

Verdict = Literal["reproduced", "not resolved", "contradicted", "not run"]
COUNTED = "counted"  # how a figure without noise was judged


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One test with what the runs said; figures are in the measure's unit, of a ratio its own."""

    test: Test
    of: float | None = None  # mean over the seeds; None: there is none, or a run diverged
    against: float | None = None
    estimate: float | None = None  # difference, ratio, or the figure itself
    low: float | None = None  # of the 95 % interval, not corrected; None: the noise is unknown
    high: float | None = None
    p: float | None = None  # that the truth lies on the other side of the threshold; None: exact
    p_holm: float | None = None
    seeds: int = 0  # of the side that has fewer
    how: str = ""  # the way it was judged, or why it could not be
    verdict: Verdict = "not run"


def judge(tests: Sequence[tuple[Test, Seeds, Seeds | None]]) -> list[Judged]:
    """The tests of one claim.

    Args:
        tests: each with its figure by seed, of the one side and of the other; None: the figure
            itself is judged.
    """
    found = [_judged(*each) for each in tests]
    corrected = iter(holm([j.p for j in found if j.p is not None]))
    return [_ruled(replace(j, p_holm=next(corrected))) if j.p is not None else j for j in found]


def overall(judged: Sequence[Judged]) -> Verdict:
    """The claim's verdict: any contradiction is one, and all must be reproduced."""
    verdicts = [j.verdict for j in judged]
    if all(v == "not run" for v in verdicts):
        return "not run"
    if "contradicted" in verdicts:
        return "contradicted"
    return "reproduced" if set(verdicts) == {"reproduced"} else "not resolved"


def right(test: Test, estimate: float) -> bool:
    """Whether an estimate lies where the claim has it."""
    if test.direction == "equal":
        return abs(_on_scale(test, estimate) - _on_scale(test, test.bound)) < _margin(test)
    return estimate < test.bound if test.direction == "lower" else estimate > test.bound


def _judged(test: Test, of: Seeds, against: Seeds | None) -> Judged:
    seeds = len(of) if against is None else min(len(of), len(against))
    if not seeds:
        return Judged(test=test, how="no finished run has that figure")
    found = Judged(
        test=test, seeds=seeds, of=_mean(of), against=None if against is None else _mean(against),
        verdict="not resolved",
    )  # fmt: skip
    reference = dict.fromkeys(of, 0.0) if against is None else dict(against)
    if not all(map(isfinite, (*of.values(), *reference.values()))):
        return _diverged(found, of, reference)
    of = dict(of)
    if test.scale == "ratio":
        if min(*of.values(), *reference.values()) <= 0:
            return replace(found, how="a ratio of figures that are not positive")
        of, reference = ({s: log(x) for s, x in side.items()} for side in (of, reference))
    if MEASURES[test.measure].exact and _same(of) and _same(reference):
        return _counted(
            found, _off_scale(test, next(iter(of.values())) - next(iter(reference.values())))
        )
    bound, margin = _on_scale(test, test.bound), _margin(test)
    shifted = {seed: x - bound for seed, x in of.items()}
    d = difference(shifted, reference, margin=margin)
    found = replace(found, estimate=_off_scale(test, bound + d.value), how=d.how)
    if d.half is None:
        paired = len(of.keys() & reference.keys()) >= MIN_SEEDS
        if paired and abs(abs(d.value) - margin) > ROUNDING:  # else it lies on the threshold
            return _counted(found, _off_scale(test, bound + d.value))
        return found
    low, high = (_off_scale(test, bound + d.value + sign * d.half) for sign in (-1, 1))
    p = d.p
    if test.direction == "equal":
        p = d.p_equal if abs(d.value) < margin else _outside(shifted, reference, margin, d.value)
    return replace(found, low=low, high=high, p=p)


def _counted(found: Judged, value: float) -> Judged:
    """Of a value without noise."""
    verdict: Verdict = "reproduced" if right(found.test, value) else "contradicted"
    return replace(found, estimate=value, low=value, high=value, how=COUNTED, verdict=verdict)


def _diverged(found: Judged, of: Seeds, reference: Seeds) -> Judged:
    """Of sides that are not all finite.

    Most seeds are asked for, not three of however many: so sides that diverge alike come out apart
    in 5.6 % of cases at most, whatever the share of their runs that diverges.
    """
    common = of.keys() & reference.keys()
    mine, theirs = ([s for s in side if not isfinite(side[s])] for side in (of, reference))
    lost = len(common.intersection(mine or theirs))
    one_side = not (mine and theirs) and lost >= max(MIN_SEEDS, len(common) // 2 + 1)
    if not (MEASURES[found.test.measure].loss and one_side):
        return replace(found, how="a run diverged")
    who, other = ("it", "the other side") if mine else ("the other side", "it")
    how = f"{who} diverged in {lost} of {len(common)} seeds"
    if found.test.against is not None:
        how += f", {other} in none"
    holds = found.test.direction == ("higher" if mine else "lower")
    return replace(found, how=how, verdict="reproduced" if holds else "contradicted")


def _outside(of: Seeds, reference: Seeds, margin: float, value: float) -> float | None:
    """Two-sided p of the end of the margin that the value lies beyond."""
    end = margin if value > 0 else -margin
    return difference({seed: x - end for seed, x in of.items()}, reference).p


def _ruled(found: Judged) -> Judged:
    assert found.p_holm is not None
    assert found.estimate is not None
    if found.p_holm > LEVEL:
        return replace(found, verdict="not resolved")
    return replace(
        found, verdict="reproduced" if right(found.test, found.estimate) else "contradicted"
    )


def _mean(side: Seeds) -> float | None:
    mean = fmean(side.values()) if side else nan
    return mean if isfinite(mean) else None


def _same(side: Mapping[int, float]) -> bool:
    return len(set(side.values())) == 1


def _margin(test: Test) -> float:
    """On the scale of the differences; 0 where the test is of no equality."""
    margin = test.margin or 0.0
    return log(1 + margin) if test.scale == "ratio" else margin


def _on_scale(test: Test, value: float) -> float:
    return log(value) if test.scale == "ratio" else value


def _off_scale(test: Test, value: float) -> float:
    return exp(value) if test.scale == "ratio" else value
