"""Loss against compute over the sizes: fitted frontiers and leverages."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite, log

import numpy as np

from recipes.report.records import Run
from recipes.statistics.bootstrap import DRAWS
from recipes.statistics.leverage import NOWHERE, Leverage, leverage_of_curves
from recipes.statistics.paired import MIN_SEEDS
from recipes.statistics.scaling import Fit, Runs, fit_frontiers, runs_of
from recipes.study.report.derive import Arm, Derived

LEAST = 4  # budgets of a curve that is fitted (comparison.md 6.3)


@dataclass(frozen=True)
class Ladder:
    """The curves of one matching over some x."""

    hold: str
    arms: dict[str, tuple[Arm, ...]]  # by variant, from the smallest size; none diverged
    fit: Fit | None  # of all curves with budgets enough, one floor
    why: str | None  # no fit
    leverages: dict[str, Leverage]  # by variant, at its largest x
    refused: dict[str, str]  # by variant: why there is no leverage though there are budgets enough
    left_out: tuple[tuple[str, str], ...]  # variant and size where a run diverged
    sigma: float | None  # noise of a run that intervals were made from; None: runs drawn again


def ladder(
    d: Derived, hold: str, x: Callable[[Run], float], *, draws: int = DRAWS, joint: bool = True
) -> Ladder:
    """The ladder of a matching.

    Args:
        d: the study.
        hold: the matching.
        x: of a run: training FLOPs, or seconds.
        draws: of the bootstrap.
        joint: fit all curves together as well, for the picture.
    """
    arms = {v: found for v in d.plan.variants if (found := trained(d, v, hold))}
    lost = tuple(_lost(d, hold))
    base, needed = d.plan.baseline.variant, f"a fit needs {LEAST}"
    n = len(arms.get(base, ()))
    if n < LEAST:
        why = f"the baseline has {n} budget{'s' * (n != 1)} and {needed}: no curve is fitted"
        return Ladder(hold, arms, None, why, {}, {}, lost, None)
    runs = {v: _runs(a, x) for v, a in arms.items() if len(a) >= LEAST}
    enough = {v: r for v, r in runs.items() if len(np.unique(np.round(np.log(r.x), 9))) >= LEAST}
    if base not in enough:
        why = f"sizes of the baseline share budgets, and {needed} different ones"
        return Ladder(hold, arms, None, why, {}, {}, lost, None)
    sigma = _sigma(d, [a for v in enough for a in arms[v]])
    leverages: dict[str, Leverage] = {}
    refused: dict[str, str] = {}
    for v, r in enough.items():
        if v == base:
            continue
        try:
            found = leverage_of_curves(enough[base], r, draws=draws, sigma=sigma)
        except ValueError as error:  # no resample has an answer, as of a loss that does not fall
            refused[v] = str(error)
        else:
            if isfinite(found.value):
                leverages[v] = found
            else:
                refused[v] = NOWHERE
    fit = fit_frontiers(enough) if joint else None
    return Ladder(hold, arms, fit, None, leverages, refused, lost, sigma)


def training_flops(run: Run) -> float:
    """Of the whole run."""
    return run.tokens * run.cost.training_flops_per_token


def training_seconds(run: Run) -> float:
    """Of the whole run, on its machine."""
    return run.speed.train_s


def trained(d: Derived, variant: str, hold: str) -> tuple[Arm, ...]:
    """A variant's arms from the smallest size, but for those in which a run diverged."""
    arms = (d.arm(variant, size, hold) for size in d.plan.sizes)
    return tuple(a for a in arms if a is not None and isfinite(a.bpb))


def _lost(d: Derived, hold: str) -> Iterator[tuple[str, str]]:
    for variant in d.plan.variants:
        for size in d.plan.sizes:
            arm = d.arm(variant, size, hold)
            if arm is not None and not isfinite(arm.bpb):
                yield variant, size


def _runs(arms: tuple[Arm, ...], x: Callable[[Run], float]) -> Runs:
    """Every run at the mean x of its size: seconds differ a little between seeds."""
    pairs = [
        (float(np.exp(np.mean([log(x(r)) for r in arm.runs]))), run.final.bpb)
        for arm in arms
        for run in arm.runs
    ]
    return runs_of(*zip(*pairs, strict=True))


def _sigma(d: Derived, arms: list[Arm]) -> float | None:
    """Noise to make intervals from, where some size has too few seeds to draw from."""
    if min(len(a.runs) for a in arms) >= MIN_SEEDS or d.noise is None:
        return None
    return d.noise.std
