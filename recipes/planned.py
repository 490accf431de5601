"""One planned run in a process of its own, so that its peak memory and its crash are its own."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from recipes import load, record
from recipes.schema import Recipe

ROOT = Path(__file__).resolve().parents[1]


class RunFailed(ValueError):
    """A run ended without a result; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a comparison or a study."""

    id: str
    variant: str  # its label
    recipe: Recipe


def ensure(run: PlannedRun, directory: Path, count: str, stdout: int | None) -> None:
    """Have a finished run in the directory: kept, gone on with or begun.

    Args:
        run: what is to lie there.
        directory: of the run.
        count: what its lines on stdout begin with.
        stdout: where the run's own lines go; None: to this process's stdout.

    Raises:
        RunFailed: when it ends without a result.
        ValueError: when another recipe's finished run lies there.
    """
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
