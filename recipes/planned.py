"""One planned run in a process of its own, so that its peak memory and its crash are its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import weakref
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


class Worker:
    """A process that trains one run at a time in forks of itself; see `recipes.worker`."""

    def __init__(self, stdout: int | None):
        self._here, there = socket.socketpair()
        command = [sys.executable, "-P", "-m", "recipes.worker", str(there.fileno())]
        with there:
            self._process = subprocess.Popen(
                command, env=environment(), stdin=subprocess.DEVNULL, stdout=stdout,
                pass_fds=[there.fileno()], start_new_session=True,
            )  # fmt: skip
        self._lines = self._here.makefile("rw")

    def train(self, directory: Path, label: str) -> int:
        """How the run's process ended: its status, a signal as a negative number.

        Raises:
            RunFailed: when the worker itself ended.
        """
        try:
            self._lines.write(json.dumps([str(directory.absolute()), label]) + "\n")
            self._lines.flush()
            answer = self._lines.readline()
        except OSError:
            answer = ""
        if not answer:
            raise RunFailed("its worker ended before it, as where a system is out of memory")
        return int(answer)

    def stop(self) -> None:
        """End it and the run that it trains."""
        with contextlib.suppress(OSError):  # it ended before
            self._here.shutdown(socket.SHUT_RDWR)
        self._process.wait()
        with contextlib.suppress(OSError):  # with an order that it never read
            self._lines.close()
        self._here.close()


class Processes:
    """Trains each run in a process of its own, which ends with this one and which no Ctrl-C meets.

    May be called from several threads: as many workers are kept as were ever busy at once.
    """

    def __init__(self, stdout: int | None = None):
        """stdout: where the runs' own lines go; None: to this process's stdout."""
        self.stdout = stdout
        self._workers: list[Worker] = []
        self._idle: list[Worker] = []
        self.stop = weakref.finalize(self, _stop, self._workers)

    def __call__(self, run: PlannedRun, directory: Path) -> None:
        """As `Train`."""
        errors = directory / "stderr.txt"
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = Worker(self.stdout)
            self._workers.append(worker)
        try:
            status = worker.train(directory, run.variant)
        except BaseException:
            worker.stop()
            self._workers.remove(worker)
            raise
        self._idle.append(worker)
        if status:
            lines = errors.read_text(errors="replace").strip().splitlines()
            raise RunFailed(f"{lines[-1] if lines else _ending(status)} (see {errors})")


def _stop(workers: list[Worker]) -> None:
    """Their runs go on from their last checkpoints when they are started again."""
    for worker in list(workers):
        worker.stop()


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
