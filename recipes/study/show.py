"""What `zoo study` prints: the plan with its price, and a table that lives while runs train."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Group
from rich.live import Live
from rich.table import Table

from recipes.show import table
from recipes.study.calibrate import Measured, estimates, read_calibration
from recipes.study.plan import StudyPlan, StudyRun
from recipes.study.run import Progress, default_workers

HOUR = 3600


def plan(found: StudyPlan, workers: int | None = None) -> None:
    """Every run and what it costs, before anything starts."""
    s = found.study
    measured = read_calibration(found)
    print(f"{s.name}: into {found.out}; primary matching: {s.hold[0]}")
    for cell in found.cells:
        print(f"size {cell.size.label}, {cell.hold} = {cell.target:,.0f} a token:")
        for match in cell.matched:
            turned = f"{match.width_field}={match.width}" if match.width is not None else "as given"
            print(f"  {match.variant}: {turned}, {match.value:,.0f} ({match.residual:+.2%})")
        for label, reason in cell.unreachable.items():
            print(f"  {label}: left out, {reason}")
    for label, control in found.controls.items():
        print(f"control {label}: {control.kind} of {control.of}")
    for label, begin in found.cells[0].begins.items():
        how = "as they are" if begin.to is None else f"converted: {begin.to} {begin.options or ''}"
        print(f"{label} begins from the weights of {begin.source}, {how}")
    stages = {"tuning": found.tuning, "reporting": found.reporting()}
    total = 0.0
    for stage, runs in stages.items():
        total += _stage(stage, runs, measured)
    if s.resolution is not None:
        print(f"further seeds, up to {s.most_seeds}, until {s.resolution:.2%} of the loss is told")
    at_once = workers or default_workers(found)
    if total:
        print(f"about {_hours(total / at_once)} with {at_once} runs at a time, all runs counted")


def _stage(stage: str, runs: tuple[StudyRun, ...], measured: Mapping[str, Measured]) -> float:
    """The runs of one stage, those alike but for seed and rate in one row. Returns seconds."""
    counts = Counter(_kind(run) for run in runs)
    costs = estimates(runs, measured)
    rows: dict[tuple[str, ...], list[str]] = {}
    for run, cost in zip(runs, costs, strict=True):
        kind, n = _kind(run), counts[_kind(run)]
        rows[kind] = [
            *kind, str(n), f"{n * cost.flops:.3g}",
            "" if cost.seconds is None else f"{n * cost.seconds:,.0f}",
            "" if cost.peak_memory_bytes is None else f"{cost.peak_memory_bytes / 2**20:,.0f} MiB",
        ]  # fmt: skip
    flops = sum(cost.flops for cost in costs)
    seconds = [cost.seconds for cost in costs]
    known = [x for x in seconds if x is not None]
    told = f", {sum(known):,.0f} s of one worker" if known else ""
    missing = len(seconds) - len(known)
    told += f" ({missing} runs of models not measured: --calibrate)" if missing else ""
    print(f"\n{stage}: {len(runs)} runs, {flops:.3g} training FLOPs{told}")
    heads = ["size", "variant", "precision", "held", "runs", "FLOPs", "seconds", "peak memory"]
    table(heads, list(rows.values()), numbers_from=4)
    return sum(known)


def _kind(run: StudyRun) -> tuple[str, ...]:
    return run.size, run.variant, run.precision, ", ".join(run.holds)


@contextmanager
def live() -> Iterator[Callable[[Progress], None]]:
    """What `run_study` shows its progress by: a live table on a terminal, lines elsewhere."""
    if not sys.stdout.isatty():
        yield _Lines()
        return
    with Live(refresh_per_second=4) as display:
        yield lambda progress: display.update(_picture(progress))


class _Lines:
    """A line for each stage and for each run that ends."""

    def __init__(self) -> None:
        self._stage, self._last = "", ""

    def __call__(self, progress: Progress) -> None:
        if progress.stage != self._stage:
            self._stage = progress.stage
            print(f"{self._stage}: {progress.total} runs, {progress.kept} kept", flush=True)
        if progress.last and progress.last != self._last:
            self._last = progress.last
            print(f"[{progress.done}/{progress.total}] {self._last}", flush=True)


def _picture(progress: Progress) -> Group:
    running = Table(box=None, pad_edge=False, header_style="bold")
    running.add_column("running")
    running.add_column("seconds", justify="right")
    now = time.monotonic()
    for run_id, began in progress.running.items():
        running.add_row(run_id, f"{now - began:,.0f}")
    head = f"{progress.stage}: {progress.done} of {progress.total} ({progress.kept} kept)"
    failed = f"{len(progress.failures)} failed" if progress.failures else ""
    return Group(*filter(None, (head, failed, progress.last)), running)


def _hours(seconds: float) -> str:
    return f"{seconds / HOUR:.1f} h" if seconds >= HOUR else f"{seconds / 60:.0f} min"
