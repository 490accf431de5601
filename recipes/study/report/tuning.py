"""The learning rates that were tried: sweeps, their optima, how much they matter."""

from dataclasses import dataclass, replace
from math import isfinite, log, nan
from statistics import fmean

from recipes.report.records import Run
from recipes.statistics.rates import (
    LEAST_POINTS,
    Optimum,
    optimum,
    sensitivity,
    shared_rates,
)
from recipes.study.report.derive import Derived


@dataclass(frozen=True)
class Sweep:
    """One variant's learning rates at one size, in one precision."""

    size: str
    variant: str
    precision: str
    losses: dict[float, float]  # rate: mean bits per byte over the tuning seeds; NaN: diverged
    failed: tuple[float, ...]  # rates at which a run has no result but a failure
    missing: tuple[float, ...]  # rates not run yet
    best: Optimum | None
    why: str | None  # no optimum
    initial: float | None  # bits per byte before training
    shared: tuple[float, ...] = ()  # rates that all sweeps of its size and precision have

    @property
    def enough(self) -> bool:
        """Whether an optimum, and a sensitivity, can be asked of it."""
        return len(self.losses) >= LEAST_POINTS

    @property
    def sensitivity(self) -> float | None:
        """Over the shared rates; None where they are too few, or all of them diverged."""
        losses = {lr: self.losses[lr] for lr in self.shared}
        if self.initial is None or not any(map(isfinite, losses.values())):
            return None
        return sensitivity(losses, self.initial)

    @property
    def edge(self) -> bool:
        """Whether the best rate is no optimum, for none beyond it was tried."""
        return self.best is not None and not self.best.interior


def sweeps(d: Derived) -> list[Sweep]:
    """Every sweep, by size, then as variants come."""
    keys = dict.fromkeys((r.size, r.variant, r.precision) for r in d.planned("tuning"))
    return _with_shared([_sweep(d, *key) for key in keys])


def _with_shared(found: list[Sweep]) -> list[Sweep]:
    """Each with the rates that its size and precision share; none where these are too few."""
    by_place: dict[tuple[str, str], list[dict[float, float]]] = {}
    for s in found:
        if s.enough:
            by_place.setdefault((s.size, s.precision), []).append(s.losses)
    shared = {place: shared_rates(losses) for place, losses in by_place.items()}
    kept = {place: rates for place, rates in shared.items() if len(rates) >= LEAST_POINTS}
    return [
        replace(s, shared=kept.get((s.size, s.precision), ())) if s.enough else s for s in found
    ]


def _sweep(d: Derived, size: str, variant: str, precision: str) -> Sweep:
    by_rate: dict[float, list[str]] = {}
    for run in d.planned("tuning"):
        if (run.size, run.variant, run.precision) == (size, variant, precision):
            by_rate.setdefault(run.lr, []).append(run.id)
    losses: dict[float, float] = {}
    failed: list[float] = []
    missing: list[float] = []
    done: list[Run] = []
    for rate, ids in sorted(by_rate.items()):
        runs = [d.runs[i] for i in ids if i in d.runs]
        if len(runs) == len(ids):
            done += runs
            bad = any(r.diverged for r in runs)
            losses[rate] = nan if bad else fmean(r.final.bpb for r in runs)
        else:
            (failed if any(i in d.results.failures for i in ids) else missing).append(rate)
    best, why = _optimum(losses)
    return Sweep(
        size=size, variant=variant, precision=precision, losses=losses, failed=tuple(failed),
        missing=tuple(missing), best=best, why=why, initial=_initial(done),
    )  # fmt: skip


def _optimum(losses: dict[float, float]) -> tuple[Optimum | None, str | None]:
    if len(losses) < LEAST_POINTS:
        return None, f"{len(losses)} rates have results, an optimum needs {LEAST_POINTS}"
    if not any(map(isfinite, losses.values())):
        return None, f"all of {len(losses)} rates diverged: try lower than {min(losses):g}"
    return optimum(losses), None


def _initial(runs: list[Run]) -> float | None:
    """Bits per byte of a uniform guess over the vocabulary, as before training."""
    for run in runs:
        final, vocab = run.final, run.recipe.get("model", {}).get("vocab_size")
        if vocab and isfinite(final.bpb) and final.nats_per_token > 0:
            return log(vocab) * final.bpb / final.nats_per_token
    return None
