"""The learning rates that were tried: sweeps, their optima, how much they matter."""

from dataclasses import dataclass
from math import isfinite, log, nan
from statistics import fmean

from recipes.report.records import Run
from recipes.statistics.rates import LEAST_POINTS, Optimum, optimum, sensitivity
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
    sensitivity: float | None
    why: str | None  # no optimum

    @property
    def edge(self) -> bool:
        """Whether the best rate is no optimum, for none beyond it was tried."""
        return self.best is not None and not self.best.interior


def sweeps(d: Derived) -> list[Sweep]:
    """Every sweep, by size, then as variants come."""
    keys = dict.fromkeys((r.size, r.variant, r.precision) for r in d.planned("tuning"))
    return [_sweep(d, *key) for key in keys]


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
    initial = _initial(done)
    return Sweep(
        size=size, variant=variant, precision=precision, losses=losses, failed=tuple(failed),
        missing=tuple(missing), best=best,
        sensitivity=sensitivity(losses, initial) if best and initial else None,
        why=why,
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
