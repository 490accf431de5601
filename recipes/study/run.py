"""Train what a study lacks: learning rates first, then what is reported, several runs at a time."""

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layers.names import check_positive
from recipes import load, record
from recipes.planned import Processes, RunFailed, Train, ensure, finished
from recipes.report.records import Run
from recipes.report.strict import read_as
from recipes.statistics.power import seeds_needed
from recipes.study.plan import StudyPlan, StudyRun, Tuned, chosen_rates

FAILURES = "failures.json"  # in a study's directory: reason by id of a run without a result


@dataclass
class Progress:
    """How far a study is; what a display reads."""

    stage: str = ""
    total: int = 0  # runs of the stage
    done: int = 0  # finished, now or before
    kept: int = 0  # of these, before
    failures: dict[str, str] = field(default_factory=dict)
    running: dict[str, float] = field(default_factory=dict)  # id to the time it began, monotonic
    last: str = ""  # what ended last, in words


def run_study(
    plan: StudyPlan,
    *,
    workers: int | None = None,
    train: Train | None = None,
    show: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Train the runs of a study that are not finished.

    A finished run is kept, a killed one goes on from its last checkpoint, one that fails is
    recorded with its reason and the others go on; the next go tries it again. A study that grows
    (another seed, rate, size, variant) keeps what fits.

    Args:
        plan: what to run.
        workers: runs at a time; None: as many as cores hold at the recipes' `trainer.threads`.
        train: how a run is trained; None: in a process of its own on this machine.
        show: called whenever something begins or ends.

    Raises:
        ValueError: when the directory is in use, or holds a run of another recipe.
    """
    workers = default_workers(plan) if workers is None else workers
    check_positive(workers=workers)
    train = Processes(subprocess.DEVNULL) if train is None else train
    progress = Progress()
    busy = f"{plan.out} is in use by another study: wait for it, or give another out="
    with record.locked(plan.out / ".lock", busy):
        record.write_text(plan.out / "study.yaml", load.to_yaml(plan.resolved))
        _go(plan, "tuning", plan.tuning, workers, train, progress, show)
        rates, without = rates_of(plan)
        for tuned in without:
            name = "-".join(tuned)
            progress.failures[name] = "no learning rate came through, so nothing is reported of it"
        _go(plan, "reporting", plan.reporting(rates), workers, train, progress, show)
        extra = more_seeds(plan, rates)
        if extra:
            runs = plan.reporting(rates, extra)
            _go(plan, "further seeds", runs, workers, train, progress, show)
        record.write_json(plan.out / FAILURES, progress.failures)
    return progress


def threads_of(plan: StudyPlan) -> int:
    """Threads of the run that takes most."""
    runs = plan.tuning or plan.reporting()
    return max(run.recipe.trainer.threads or record.cores() for run in runs)


def default_workers(plan: StudyPlan) -> int:
    """As many runs at a time as there are cores for."""
    return max(record.cores() // threads_of(plan), 1)


def directory_of(plan: StudyPlan, run: StudyRun) -> Path:
    """Where a run lies."""
    return plan.out / "runs" / run.id


def results_of(plan: StudyPlan, runs: Sequence[StudyRun]) -> dict[str, Run | None]:
    """What is finished, by id; None where it is not."""
    found: dict[str, Run | None] = {}
    for run in runs:
        done = finished(run, directory_of(plan, run))
        found[run.id] = None if done is None else read_as(Run, done, run.id)
    return found


def rates_of(plan: StudyPlan) -> tuple[dict[Tuned, float], list[Tuned]]:
    """The learning rates that the finished tuning runs say, and what none came through for."""
    return chosen_rates(plan, results_of(plan, plan.tuning))


def more_seeds(plan: StudyPlan, rates: Mapping[Tuned, float]) -> list[int]:
    """Seeds beyond the study's own that its `resolution` needs, by the baseline's noise so far."""
    s = plan.study
    if s.resolution is None:
        return []
    base = [
        run
        for run in plan.reporting(rates)
        if (run.variant, run.precision) == (s.baseline.variant, s.baseline.precision)
        and s.hold[0] in run.holds
    ]
    results = results_of(plan, base)
    by_size: dict[str, list[float]] = {}
    for run in base:
        result = results[run.id]
        if result is not None and not result.diverged:
            by_size.setdefault(run.size, []).append(result.final.bpb)
    wanted = [_wanted(values, s.resolution) for values in by_size.values() if len(values) > 1]
    n = min(max(wanted, default=0), s.most_seeds) - len(s.seeds)
    taken = {*s.seeds, *s.tuning.seeds}
    free = (seed for seed in range(max(s.seeds) + 1, 10**9) if seed not in taken)
    return [next(free) for _ in range(max(n, 0))]


def _wanted(values: Sequence[float], resolution: float) -> int:
    """Seeds that tell a difference of `resolution` times the mean at the noise of these."""
    return seeds_needed(resolution * statistics.fmean(values), statistics.stdev(values))


def _go(
    plan: StudyPlan, stage: str, runs: Sequence[StudyRun], workers: int, train: Train,
    progress: Progress, show: Callable[[Progress], None],
) -> None:  # fmt: skip
    """One stage: whatever of its runs is missing."""
    missing = [run for run in runs if finished(run, directory_of(plan, run)) is None]
    progress.stage, progress.total, progress.last = stage, len(runs), ""
    progress.done = progress.kept = len(runs) - len(missing)
    progress.running = {}
    show(progress)
    pool = ThreadPoolExecutor(workers)
    try:
        _drain(plan, missing, pool, workers, train, progress, show)
    except BaseException:
        if isinstance(train, Processes):
            train.stop()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def _drain(
    plan: StudyPlan, missing: Sequence[StudyRun], pool: ThreadPoolExecutor, workers: int,
    train: Train, progress: Progress, show: Callable[[Progress], None],
) -> None:  # fmt: skip
    waiting, going = list(missing), dict[Future[dict[str, Any]], StudyRun]()
    while waiting or going:
        while waiting and len(going) < workers:
            run = waiting.pop(0)
            going[pool.submit(ensure, run, directory_of(plan, run), train)] = run
            progress.running[run.id] = time.monotonic()
        show(progress)
        ended, _ = wait(going, timeout=1.0, return_when=FIRST_COMPLETED)
        for future in ended:
            run = going.pop(future)
            seconds = time.monotonic() - progress.running.pop(run.id)
            try:
                bpb = future.result()["final"]["bpb"]
            except RunFailed as failure:
                progress.failures[run.id] = str(failure)
                record.write_json(plan.out / FAILURES, progress.failures)
                progress.last = f"{run.id}: failed: {failure}"
            else:
                told = "diverged" if bpb is None else f"{bpb:.4f} bits/byte"
                progress.last = f"{run.id}: {told}, {seconds:.0f} s"
            progress.done += 1
            show(progress)


def recorded_failures(plan: StudyPlan) -> dict[str, str]:
    """What failed when the study was last run, by id, unless it has a result by now."""
    path = plan.out / FAILURES
    return json.loads(path.read_text()) if path.is_file() else {}
