"""Runs by variant, precision and learning rate: what the stability protocol counts."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

from recipes.report import text
from recipes.report.records import Results, Run


@dataclass(frozen=True)
class Trial:
    """The runs of one variant in one precision at one learning rate; they differ in their seed."""

    variant: str
    precision: str
    lr: float | None
    runs: tuple[Run, ...]  # by seed

    @property
    def bpb(self) -> float:
        """Mean bits per byte, held-out; NaN where a run ended in a loss that is no number."""
        return fmean(run.final.bpb for run in self.runs)


@dataclass(frozen=True)
class Tally:
    """What some runs came to."""

    runs: int
    diverged: int  # runs
    spiked: int  # runs with a spike
    spikes: int  # in all of them
    sharpness: float | None  # mean of those that have one, in percent


def trials_of(results: Results) -> tuple[Trial, ...]:
    """Every trial, as variants and precisions first come, by learning rate."""
    cells: dict[tuple[str, str], dict[float | None, list[Run]]] = {}
    for run in results.runs:
        cells.setdefault((run.variant, run.precision), {}).setdefault(run.lr, []).append(run)
    return tuple(
        Trial(variant, precision, lr, tuple(sorted(rates[lr], key=lambda run: run.seed)))
        for (variant, precision), rates in cells.items()
        for lr in sorted(rates, key=lambda lr: lr or 0.0)
    )


def tally(runs: Iterable[Run]) -> Tally:
    """Count them."""
    listed = list(runs)
    known = [r.sharpness for r in listed if r.sharpness is not None and isfinite(r.sharpness)]
    return Tally(
        runs=len(listed),
        diverged=sum(r.diverged for r in listed),
        spiked=sum(bool(r.spike_steps) for r in listed),
        spikes=sum(len(r.spike_steps) for r in listed),
        sharpness=fmean(known) if known else None,
    )


def worth_telling(results: Results) -> bool:
    """Whether learning rates were tried, or something went wrong."""
    return bool(results.lrs or results.failures or any(r.diverged for r in results.runs))


def held(trials: Iterable[Trial]) -> list[float]:
    """Bits per byte of every run that did not diverge."""
    runs = [run for trial in trials for run in trial.runs]
    return [run.final.bpb for run in runs if not run.diverged and isfinite(run.final.bpb)]


def told(run: Run, digits: int) -> str:
    """What became of a run, in words."""
    parts = [f"{text.bpb(run.final.bpb, digits)} bpb"] if isfinite(run.final.bpb) else []
    parts += [f"diverged by step {run.diverged_step:,}"] if run.diverged_step is not None else []
    if run.spike_steps:
        steps = ", ".join(f"{step:,}" for step in run.spike_steps[:5])
        more = ", …" if len(run.spike_steps) > 5 else ""
        parts.append(f"spikes at step {steps}{more}")
    return "; ".join(parts)
