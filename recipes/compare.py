"""Run what a comparison lacks, one process a run, and write its results and report."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from recipes import load, record
from recipes.names import precision_label
from recipes.planning import Plan, PlannedRun
from recipes.report.export import results_csv
from recipes.report.page import write_report
from recipes.report.records import SCHEMA

ROOT = Path(__file__).resolve().parents[1]


class RunFailed(ValueError):
    """A run ended badly; the message is one line."""


def compare(plan: Plan, *, child_stdout: int | None = None) -> Path:
    """Train the runs of a comparison that are not finished, then write what it found.

    A finished run is kept, a killed one goes on from its last checkpoint: however often this is
    stopped and started, the numbers are those of one uninterrupted go (but for the seconds).

    Args:
        plan: what to run.
        child_stdout: where the runs' own lines go; None: to this process's stdout.

    Returns:
        The report.

    Raises:
        ValueError: when the directory is in use, or holds another comparison.
        RunFailed: when a run ends badly.
    """
    out = plan.out
    busy = f"{out} is in use by another comparison: wait for it, or give another out="
    with record.locked(out / ".lock", busy):
        _claim(plan)
        started = time.monotonic()
        for number, run in enumerate(plan.runs, start=1):
            count = f"[{number}/{len(plan.runs)}]"
            _ensure(run, out / "runs" / run.id, count, child_stdout)
        return _write(plan, time.monotonic() - started)


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
        print(f"{count} {run.id}: kept, {done['final']['bpb']:.4f} bits/byte", flush=True)
        return
    if not (directory / "recipe.yaml").is_file():
        record.write_text(directory / "recipe.yaml", load.to_yaml(run.recipe))
    print(f"{count} {run.id}", flush=True)
    _run_in_process(run, directory, stdout)
    if record.read_result(directory) is None:
        raise RunFailed(f"run {run.id} ended without a result, see {directory / 'stderr.txt'}")


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
        reason = lines[-1] if lines else f"it ended with status {status}"
        raise RunFailed(f"run {run.id} failed: {reason} (finished runs are kept; see {errors})")


def _write(plan: Plan, seconds: float) -> Path:
    """results.json, results.csv and report.html."""
    out = plan.out
    runs = [record.read_result(out / "runs" / run.id) for run in plan.runs]
    results = {"schema": SCHEMA, "comparison": _described(plan, runs), "runs": runs}
    record.write_json(out / "results.json", results)
    record.write_text(out / "results.csv", results_csv(results))
    report = write_report(results, out / "report.html")
    trained = sum(run["speed"]["train_s"] for run in runs if run)
    print(f"{len(runs)} runs, {trained:.0f} s of training, {seconds:.0f} s now", flush=True)
    return report


def _described(plan: Plan, runs: list[Any]) -> dict[str, Any]:
    """The comparison as results.json keeps it."""
    c = plan.comparison
    base = {"variant": c.baseline.variant, "precision": c.baseline.precision}
    own = [r["final"]["bpb"] for r in runs if {k: r[k] for k in base} == base]
    return {
        "name": c.name,
        "baseline": base,
        "held_equal": c.hold,
        "target": plan.target,
        "matched": [vars(match) for match in plan.matched],
        "variants": [match.variant for match in plan.matched],
        "precisions": [precision_label(precision) for precision in c.precisions],
        "seeds": list(c.seeds),
        "noise": {
            "std_bpb": statistics.stdev(own) if len(own) > 1 else None,
            "n": len(own),
            "of": f"{base['variant']}-{base['precision']}",
        },
        "allowed_differences": list(c.allow),
    }
