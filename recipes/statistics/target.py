"""Has a method reached a target loss, and is it faster than another? (comparison.md 5.3)

The rules of the nanoGPT speedrun: a record must beat its target beyond doubt, and methods that stop
at different steps are compared through the slope of the loss there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, log, sqrt
from statistics import fmean

from scipy.special import stdtr

from layers.names import check_positive
from recipes.statistics.noise import spread_of

LEVEL = 0.01  # one-sided, of the main track
SIGMA = 0.0013  # nats: std over seeds of the optimisation track
DEVIATIONS = 3.09  # p < 0.001, one-sided
ADVANTAGE = 0.004  # nats: DEVIATIONS * SIGMA, as the rules round it


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Whether the mean of some runs lies below a target."""

    margin: float  # target - mean; above zero is below the target
    n: int
    p: float | None  # one-sided; None: too few runs, or no noise between them
    passed: bool


def below_target(losses: Sequence[float], target: float, *, level: float = LEVEL) -> Reached:
    """One-sample, one-sided t-test of mean < target. Runs that diverged count, and fail it.

    Two runs at least; runs that all gave the same number are no test (p is None).
    """
    margin = target - _mean(losses)
    spread = spread_of(dict(enumerate(losses))) if isfinite(margin) else None
    if spread is None:
        return Reached(margin=margin, n=len(losses), p=None, passed=False)
    p = float(stdtr(spread.df, -margin / (spread.std / sqrt(len(losses)))))
    return Reached(margin=margin, n=len(losses), p=p, passed=p < level)


def below_target_by(
    losses: Sequence[float], target: float, *, advantage: float = ADVANTAGE
) -> bool:
    """With a known noise: (target - mean) sqrt(n) >= advantage, one run being enough.

    Args:
        losses: of all runs, in nats.
        target: in nats.
        advantage: DEVIATIONS times the standard deviation of one run.
    """
    check_positive(advantage=advantage)
    return (target - _mean(losses)) * sqrt(len(losses)) >= advantage * (1 - 1e-12)


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """The runs of one method, all stopped at the same step."""

    losses: Sequence[float]
    step: int


def ahead_of(
    new: Stopped, old: Stopped, *, slope: float, advantage: float = ADVANTAGE
) -> tuple[float, bool]:
    """How far `new` is ahead of `old`, in nats of one run, and whether that is enough.

    (loss gap + slope * step gap) / sqrt(1/m + 1/n) >= advantage: steps saved count as the loss
    that they would have bought.

    Args:
        new, old: the two methods.
        slope: nats by which a step lowers the loss near the end, above zero (`slope_per_step`).
        advantage: DEVIATIONS times the standard deviation of one run.
    """
    check_positive(slope=slope, advantage=advantage)
    gap = _mean(old.losses) - _mean(new.losses) + slope * (old.step - new.step)
    ahead = gap / sqrt(1 / len(new.losses) + 1 / len(old.losses))
    return ahead, ahead >= advantage * (1 - 1e-12)


def slope_per_step(early: tuple[int, float], late: tuple[int, float]) -> float:
    """Nats by which a step lowers the loss, from (step, loss) of runs finished at either step."""
    if not early[0] < late[0]:
        raise ValueError(f"steps must increase, got {early[0]} and {late[0]}")
    return (early[1] - late[1]) / (late[0] - early[0])


def slope_per_log(slope: float, early: int, late: int) -> float:
    """The same slope in nats per unit of ln(step), or of ln(compute) at a fixed model."""
    check_positive(early=early, late=late)
    return slope * (late - early) / log(late / early)


def _mean(losses: Sequence[float]) -> float:
    if not losses:
        raise ValueError("losses is empty, name at least one run")
    return fmean(losses)
