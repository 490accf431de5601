"""Run what a comparison lacks, one process a run, and write its results and report."""

import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from recipes import load, record
from recipes.names import precision_label
from recipes.planning import LR, Plan, PlannedRun, rate
from recipes.report.export import results_csv
from recipes.report.page import write_report
from recipes.report.records import SCHEMA, read_results
from recipes.report.study import study

ROOT = Path(__file__).resolve().parents[1]


class RunFailed(ValueError):
    """A run ended without a result; the message is one line."""


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
        for number, run in enumerate(plan.runs, start=1):
            count = f"[{number}/{len(plan.runs)}]"
            try:
                _ensure(run, out / "runs" / run.id, count, child_stdout)
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


def _ensure(run: PlannedRun, directory: Path, count: str, stdout: int | None) -> None:
    """Have a finished run in the directory."""
    recipe = load.to_plain(run.recipe)
    done = record.read_result(directory)
    if done is not None:
        if done["recipe"] != recipe:
            differing = ", ".join(load.differences(done["recipe"], recipe))
            raise ValueError(
                f"{directory} holds a run of another recipe (differs in {differing}): delete it"
            )
        bpb = done["final"]["bpb"]
        told = "diverged" if bpb is None else f"{bpb:.4f} bits/byte"
        print(f"{count} {run.id}: kept, {told}", flush=True)
        return
    if not (directory / "recipe.yaml").is_file():
        record.write_text(directory / "recipe.yaml", load.to_yaml(run.recipe))
    print(f"{count} {run.id}", flush=True)
    _run_in_process(run, directory, stdout)
    if record.read_result(directory) is None:
        raise RunFailed(f"it ended without a result (see {directory / 'stderr.txt'})")


def _run_in_process(run: PlannedRun, directory: Path, stdout: int | None) -> None:
    """Train in a child that ends with this process; its own session keeps Ctrl-C from it."""
    command = [sys.executable, "-P", "-m", "recipes.worker"]
    command += [str(directory), run.variant, str(os.getpid())]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    errors = directory / "stderr.txt"
    with errors.open("wb") as stderr:
        child = subprocess.Popen(
            command, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            status = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
    if status:
        lines = errors.read_text(errors="replace").strip().splitlines()
        raise RunFailed(f"{lines[-1] if lines else _ending(status)} (see {errors})")


def _ending(status: int) -> str:
    """How a process ended that said nothing."""
    if status != -signal.SIGKILL:
        return f"it ended with status {status}"
    return "it was killed, as a system does that is out of memory"


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
