"""Train what a study lacks: learning rates first, then what is reported, several runs at a time."""

import json
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence

from layers.names import check_positive
from recipes import load, record
from recipes.planned import Processes, Train, check_there, finished
from recipes.report.records import Run
from recipes.report.strict import read_as
from recipes.statistics.power import MOST_SEEDS, seeds_needed
from recipes.study.begin import make
from recipes.study.plan import StudyPlan, StudyRun, Tuned, chosen_rates
from recipes.study.ray_runs import RayTasks
from recipes.study.stage import FAILURES, Make, Progress, Stages, directory_of
from recipes.study.write_plan import write_plan


def run_study(
    plan: StudyPlan,
    *,
    workers: int | None = None,
    train: Train | None = None,
    begin: Make = make,
    show: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Train the runs of a study that are not finished, each after the one that it begins from.

    A finished run is kept, a killed one goes on from its last checkpoint, one that fails is
    recorded with its reason and the others go on; the next go tries it again. A study that grows
    (another seed, rate, size, variant) keeps what fits.

    Args:
        plan: what to run.
        workers: runs at a time; None: as many as cores hold at the recipes' `trainer.threads`.
        train: how a run is trained; None: in a process of its own on this machine.
        begin: how a run is converted that another begins from.
        show: called whenever something begins or ends.

    Raises:
        ValueError: when the directory is in use, or holds a run of another recipe, finished or not;
            the plan that lies there is kept then. When Ray is to train what begins from another.
    """
    workers = default_workers(plan) if workers is None else workers
    check_positive(workers=workers)
    if isinstance(train, RayTasks) and any(cell.begins for cell in plan.cells):
        raise ValueError(
            "study: a variant begins from another's run, whose weights lie on this machine alone: "
            "leave out Ray"
        )
    train = Processes(subprocess.DEVNULL) if train is None else train
    stages = Stages(plan, workers, train, begin, show)
    progress = stages.progress
    busy = f"{plan.out} is in use by another study: wait for it, or give another out="
    with record.locked(plan.out / ".lock", busy):
        _check(plan, known_runs(plan))
        record.write_text(plan.out / "study.yaml", load.to_yaml(plan.resolved))
        write_plan(plan, plan.tuning)
        stages.go("tuning", plan.tuning)
        rates, without = rates_of(plan)
        for tuned in without:
            name = "-".join(tuned)
            progress.failures[name] = "no learning rate came through, so nothing is reported of it"
        progress.failures |= fewer_rates(plan, rates)
        reported = plan.reporting(rates)
        _check(plan, reported)
        write_plan(plan, [*plan.tuning, *reported])
        stages.go("reporting", reported)
        extra = more_seeds(plan, rates)
        if extra:
            runs = plan.reporting(rates, extra)
            _check(plan, runs)
            write_plan(plan, [*plan.tuning, *reported, *runs])
            stages.go("further seeds", runs)
        record.write_json(plan.out / FAILURES, progress.failures)
    return progress


def known_runs(plan: StudyPlan) -> list[StudyRun]:
    """Every run that can be told from what is finished so far."""
    rates, _ = rates_of(plan)
    return [
        *plan.tuning, *plan.reporting(rates), *plan.reporting(rates, more_seeds(plan, rates)),
    ]  # fmt: skip


def _check(plan: StudyPlan, runs: Sequence[StudyRun]) -> None:
    """Raise ValueError where a run of another recipe lies, before anything is written."""
    for run in runs:
        check_there(run, directory_of(plan, run))


def threads_of(plan: StudyPlan) -> int:
    """Threads of the run that takes most."""
    runs = plan.tuning or plan.reporting()
    return max(run.recipe.trainer.threads or record.cores() for run in runs)


def default_workers(plan: StudyPlan) -> int:
    """As many runs at a time as there are cores for."""
    return max(record.cores() // threads_of(plan), 1)


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


def fewer_rates(plan: StudyPlan, rates: Mapping[Tuned, float]) -> dict[str, str]:
    """What chose among fewer learning rates than others, as runs of its own failed: in words."""
    failed: dict[Tuned, set[float]] = {}
    results = results_of(plan, plan.tuning)
    for run in plan.tuning:
        if results[run.id] is None:
            tuned = Tuned(run.size, run.variant, run.precision)
            failed.setdefault(tuned, set()).add(run.recipe.optim.lr)
    all_rates = len(plan.study.lrs)
    return {
        "-".join(tuned): f"chosen from {all_rates - len(lrs)} of {all_rates} learning rates: runs "
        f"at {', '.join(f'{lr:g}' for lr in sorted(lrs))} failed"
        for tuned, lrs in failed.items()
        if tuned in rates
    }


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
    sigma = statistics.stdev(values)
    if sigma == 0:  # bit for bit the same: any difference can be told
        return 0
    try:
        return seeds_needed(resolution * statistics.fmean(values), sigma)
    except ValueError:  # however many: most_seeds is the end
        return MOST_SEEDS


def recorded_failures(plan: StudyPlan) -> dict[str, str]:
    """What failed when the study was last run, by id, unless it has a result by now."""
    path = plan.out / FAILURES
    return json.loads(path.read_text()) if path.is_file() else {}
