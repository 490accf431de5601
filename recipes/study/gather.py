"""A study's runs brought together from their directories alone, whatever exists so far."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from recipes import record
from recipes.planned import placeless
from recipes.report.figures import thinned
from recipes.report.records import SCHEMA, Run, load_json
from recipes.report.strict import read_as
from recipes.study.machine import machine_of
from recipes.study.records import (
    FAILURES,
    PLAN,
    RESULTS,
    PlannedRecord,
    PlanRecord,
    Recorded,
    StudyResults,
    read_plan,
    read_study_results,
)
from recipes.study.trace import traces_of

POINTS = 24  # of a thinned curve; evaluations stay


def study_directory(source: str, overrides: Sequence[str] = ()) -> Path:
    """Where a study lies that is given by its directory, its file or a shipped one's name."""
    if Path(source).is_dir():
        if overrides:
            raise ValueError(f"{source} is a study as it was run: {overrides[0]!r} has no place")
        return Path(source)
    from recipes.study.schema import read_study  # reads recipes, which takes a while

    study, _ = read_study(source, overrides)
    return Path(study.out or f"runs/{study.name}")


def gather(directory: Path) -> StudyResults:
    """Read every finished run, and write `results.json`; or read that of a published study.

    What is missing is measured once and kept beside it: a trace of each model at the smallest
    size (traces.json) and what this machine can do (machine.json).

    Args:
        directory: of a study that was run, finished or not, or where one was published.

    Raises:
        ValueError: one line, where no study was run there or a record is malformed.
    """
    if not (directory / PLAN).is_file() and (directory / RESULTS).is_file():
        return read_study_results(directory)
    plan = read_plan(directory)
    found = {
        path.parent.name: read_as(Run, load_json(path), str(path))
        for path in sorted((directory / "runs").glob("*/result.json"))
    }
    runs = {p.id: found[p.id] for p in plan.runs if p.id in found and _as_planned(p, found[p.id])}
    path = directory / FAILURES
    failures = read_as(dict[str, str], load_json(path), str(path)) if path.is_file() else {}
    whole = largest_complete(plan, {*runs, *failures})
    kept = {run.id for run in plan.runs if _whole(plan, run, whole)}
    results = StudyResults(
        schema=SCHEMA,
        plan=plan,
        runs=tuple(
            Recorded(
                recipe_sha256=record.fingerprint(run.recipe),
                run=run if run_id in kept else lighter(run),
            )
            for run_id, run in runs.items()
        ),
        failures={k: why for k, why in failures.items() if k not in runs},
        strays=tuple(run_id for run_id in found if run_id not in runs),
        traces=traces_of(directory, _one_of_each_model(plan, runs)),
        machine=machine_of(directory, _threads(found.values())),
        whole=whole,
    )
    record.write_text(directory / RESULTS, json.dumps(_plain(results), allow_nan=False))
    return results


def largest_complete(plan: PlanRecord, ended: set[str]) -> str | None:
    """The largest size whose primary runs all ended; else the largest of whose baseline any did.

    ended: ids of runs with a result or a recorded failure.
    """
    by_size: dict[str, list[PlannedRecord]] = {}
    for run in plan.runs:
        if run.stage == "reporting" and plan.holds[0] in run.holds:
            by_size.setdefault(run.size, []).append(run)
    sizes = [size for size in reversed(plan.sizes) if size in by_size]
    for size in sizes:
        if all(run.id in ended for run in by_size[size]):
            return size
    base = plan.baseline.variant, plan.baseline.precision
    for size in sizes:
        if any((r.variant, r.precision) == base and r.id in ended for r in by_size[size]):
            return size
    return None


def lighter(run: Run) -> Run:
    """A run without what only its own size's sections show: long curves, loads, samples, probes."""
    return replace(
        run, curve=tuple(thinned(run.curve, POINTS)), load=(), health=(), memory=(), density=(),
        loops=(), widths=(), sample=None, probes=(),
    )  # fmt: skip


def _as_planned(planned: PlannedRecord, run: Run) -> bool:
    """Whether it is a run of the recipe that the plan says, where it says one."""
    said = planned.recipe_sha256
    return said is None or record.fingerprint(placeless(run.recipe, planned.inside)) == said


def _threads(runs: Iterable[Run]) -> int | None:
    """That most runs trained with; None where no run says."""
    said = Counter(n for run in runs if isinstance(n := run.machine.get("threads"), int))
    return said.most_common(1)[0][0] if said else None


def _whole(plan: PlanRecord, run: PlannedRecord, whole: str | None) -> bool:
    return run.stage == "reporting" and run.size == whole and plan.holds[0] in run.holds


def _one_of_each_model(plan: PlanRecord, runs: dict[str, Run]) -> dict[str, Run]:
    """A run of each model of the smallest size that has any, to be traced."""
    for size in plan.sizes:
        mine = [p for p in plan.runs if p.size == size and p.id in runs]
        if mine:
            return {p.model: runs[p.id] for p in mine}
    return {}


def _plain(results: StudyResults) -> dict[str, object]:
    """For JSON, which has no NaN: a diverged run's numbers are null, as in result.json."""
    plain = asdict(results)
    for entry in plain["runs"]:
        final = entry["run"]["final"]
        for name in ("bpb", "nats_per_token"):
            if final[name] != final[name]:
                final[name] = None
    return plain
