"""One planned run in a process of its own, so that its peak memory and its crash are its own."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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


class Train(Protocol):
    """Trains a run into its directory, or goes on with it there."""

    def __call__(self, run: PlannedRun, directory: Path) -> None:
        """Raise RunFailed where it ends without a result. recipe.yaml lies there already."""
        ...


class Processes:
    """Trains each run in a child that ends with this process; its own session keeps Ctrl-C off.

    May be called from several threads.
    """

    def __init__(self, stdout: int | None = None):
        """stdout: where the runs' own lines go; None: to this process's stdout."""
        self.stdout = stdout
        self._children: set[subprocess.Popen[bytes]] = set()

    def __call__(self, run: PlannedRun, directory: Path) -> None:
        command = [sys.executable, "-P", "-m", "recipes.worker"]
        command += [str(directory), run.variant, str(os.getpid())]
        errors = directory / "stderr.txt"
        with errors.open("wb") as stderr:
            child = subprocess.Popen(
                command, env=environment(), stdout=self.stdout, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
            self._children.add(child)
            try:
                status = child.wait()
            except BaseException:
                child.kill()
                child.wait()
                raise
            finally:
                self._children.discard(child)
        if status:
            lines = errors.read_text(errors="replace").strip().splitlines()
            raise RunFailed(f"{lines[-1] if lines else _ending(status)} (see {errors})")

    def stop(self) -> None:
        """Kill the children; each goes on from its last checkpoint when it is started again."""
        for child in list(self._children):
            child.kill()


def environment() -> dict[str, str]:
    """Of a child process, so that it finds these packages and no others of their names."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def finished(run: PlannedRun, directory: Path) -> dict[str, Any] | None:
    """The run's result, where the directory holds it.

    Raises:
        ValueError: when another recipe's finished run lies there.
    """
    done = record.read_result(directory)
    recipe = load.to_plain(run.recipe)
    if done is not None and done["recipe"] != recipe:
        differing = ", ".join(load.differences(done["recipe"], recipe))
        raise ValueError(
            f"{directory} holds a run of another recipe (differs in {differing}): delete it"
        )
    return done


def ensure(run: PlannedRun, directory: Path, train: Train) -> dict[str, Any]:
    """The run's result: kept, or the run gone on with or begun.

    Raises:
        RunFailed: when it ends without a result.
        ValueError: when another recipe's finished run lies there.
    """
    done = finished(run, directory)
    if done is not None:
        return done
    if not (directory / "recipe.yaml").is_file():
        record.write_text(directory / "recipe.yaml", load.to_yaml(run.recipe))
    train(run, directory)
    done = record.read_result(directory)
    if done is None:
        raise RunFailed(f"it ended without a result (see {directory / 'stderr.txt'})")
    return done


def _ending(status: int) -> str:
    """How a process ended that said nothing."""
    if status != -signal.SIGKILL:
        return f"it ended with status {status}"
    return "it was killed, as a system does that is out of memory"
