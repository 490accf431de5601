"""Run what a comparison lacks, one process a run, and write its results and report."""

import math
import statistics
import time
from pathlib import Path
from typing import Any

from recipes import load, record
from recipes.names import precision_label
from recipes.planned import Processes, RunFailed, ensure, finished
from recipes.planning import LR, Plan, rate
from recipes.report.export import results_csv
from recipes.report.page import write_report
from recipes.report.records import SCHEMA, read_results
from recipes.report.study import study


def compare(plan: Plan, *, child_stdout: int | None = None) -> Path:
    """Train the runs of a comparison that are not finished, then write what it found.

    A finished run is kept, a killed one goes on from its last checkpoint: however often this is
    stopped and started, the numbers are those of one uninterrupted go (but for the seconds).
    A run that fails is recorded with its reason, and the others go on; the next go tries it again.

    Args:
        plan: what to run.
        child_stdout: where the runs' own lines go; None: to this process's stdout.

    Returns:
        The report.

    Raises:
        ValueError: when the directory is in use, or holds another comparison.
        RunFailed: when no run of the baseline has a result, so that there is no report to write.
    """
    out = plan.out
    busy = f"{out} is in use by another comparison: wait for it, or give another out="
    with record.locked(out / ".lock", busy):
        _claim(plan)
        started = time.monotonic()
        failures: dict[str, str] = {}
        train = Processes(child_stdout)
        for number, run in enumerate(plan.runs, start=1):
            count = f"[{number}/{len(plan.runs)}]"
            directory = out / "runs" / run.id
            done = finished(run, directory)
            if done is not None:
                bpb = done["final"]["bpb"]
                told = "diverged" if bpb is None else f"{bpb:.4f} bits/byte"
                print(f"{count} {run.id}: kept, {told}", flush=True)
                continue
            print(f"{count} {run.id}", flush=True)
            try:
                ensure(run, directory, train)
            except RunFailed as failure:
                failures[run.id] = str(failure)
                print(f"{count} {run.id}: failed: {failure}", flush=True)
        return _write(plan, failures, time.monotonic() - started)


def check_failures(plan: Plan) -> None:
    """Raise RunFailed, in one line, where runs of a comparison that was gone through failed."""
    results = read_results(plan.out)
    for run_id, reason in results.failures.items():
        raise RunFailed(
            f"{len(results.failures)} of {len(plan.runs)} runs failed, the report leaves them out "
            f"and the same command tries them again; the first is {run_id}: {reason}"
        )


def _claim(plan: Plan) -> None:
    """Write comparison.yaml, or refuse where another comparison lies."""
    path = plan.out / "comparison.yaml"
    if path.is_file():
        differing = load.differences(load.read_yaml(path), plan.resolved)
        if differing:
            raise ValueError(
                f"{plan.out} holds another comparison (differs in {', '.join(differing)}): give "
                "another out=, or delete it"
            )
    else:
        record.write_text(path, load.to_yaml(plan.resolved))


def _write(plan: Plan, failures: dict[str, str], seconds: float) -> Path:
    """results.json, results.csv and report.html."""
    out, base = plan.out, plan.comparison.baseline
    kept = [record.read_result(out / "runs" / r.id) for r in plan.runs if r.id not in failures]
    runs = [run for run in kept if run is not None]
    if not any((r["variant"], r["precision"]) == (base.variant, base.precision) for r in runs):
        run_id, reason = next(iter(failures.items()))
        raise RunFailed(f"no run of the baseline has a result: {run_id} failed: {reason}")
    results = {"schema": SCHEMA, "comparison": _described(plan), "runs": runs}
    results |= {"failures": failures} if failures else {}
    results["comparison"]["noise"] = _noise(results)
    record.write_json(out / "results.json", results)
    record.write_text(out / "results.csv", results_csv(results))
    report = write_report(results, out / "report.html")
    trained = sum(run["speed"]["train_s"] for run in runs)
    print(f"{len(runs)} runs, {trained:.0f} s of training, {seconds:.0f} s now", flush=True)
    return report


def _described(plan: Plan) -> dict[str, Any]:
    """The comparison as results.json keeps it."""
    c = plan.comparison
    return {
        "name": c.name,
        "baseline": vars(c.baseline),
        "held_equal": c.hold,
        "target": plan.target,
        "matched": [vars(match) for match in plan.matched],
        "variants": [match.variant for match in plan.matched],
        "precisions": [precision_label(precision) for precision in c.precisions],
        "seeds": list(c.seeds),
        "lrs": list(c.lrs),
        "allowed_differences": [*c.allow, *([LR] if c.lrs else [])],
    }


def _noise(results: dict[str, Any]) -> dict[str, Any]:
    """Between the seeds of the baseline, all at one learning rate."""
    baseline = study(read_results(results)).baseline
    values = list(baseline.seeds.values())
    known = len(values) > 1 and all(map(math.isfinite, values))
    return {
        "std_bpb": statistics.stdev(values) if known else None,
        "n": len(values),
        "of": "-".join([baseline.variant, baseline.precision, *rate(baseline.lr)]),
    }
