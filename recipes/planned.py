"""One planned run in a process of its own, so that its peak memory and its crash are its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
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
    # keys of the recipe that name a folder of the same study, which is the same wherever that lies
    inside: tuple[str, ...] = ()


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
        self._ready = False

    def wait(self) -> None:
        """Wait until it has everything imported. Raises RunFailed when it ended."""
        if not self._ready:
            self._answer()
            self._ready = True

    def train(self, directory: Path, label: str) -> int:
        """How the run's process ended: its status, a signal as a negative number.

        Raises:
            RunFailed: when the worker itself ended.
        """
        self.wait()
        with contextlib.suppress(OSError):  # it ended, as its answer says
            self._lines.write(json.dumps([str(directory.absolute()), label]) + "\n")
            self._lines.flush()
        return int(self._answer())

    def alive(self) -> bool:
        """Whether it can take an order."""
        return self._process.poll() is None

    def _answer(self) -> str:
        try:
            answer = self._lines.readline()
        except OSError:
            answer = ""
        if not answer:
            raise RunFailed("its worker ended before it, as where a system is out of memory")
        return answer

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
        errors.unlink(missing_ok=True)  # what an earlier go said explains nothing of this one
        with self._worker() as worker:
            status = worker.train(directory, run.variant)
        if status:
            raise RunFailed(_why(status, errors))

    def start(self) -> None:
        """Have a worker ready, so that the next run takes no time for its start."""
        with self._worker() as worker:
            worker.wait()

    @contextlib.contextmanager
    def _worker(self) -> Iterator[Worker]:
        """One that is idle, or a new one; idle again afterwards, unless it came to an error."""
        try:
            worker = self._idle.pop()
            while not worker.alive():  # it ended while it had nothing to do
                self._drop(worker)
                worker = self._idle.pop()
        except IndexError:
            worker = Worker(self.stdout)
            self._workers.append(worker)
        try:
            yield worker
        except BaseException:
            self._drop(worker)
            raise
        self._idle.append(worker)

    def _drop(self, worker: Worker) -> None:
        worker.stop()
        self._workers.remove(worker)


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
    if done is not None:
        _check_same(run, done["recipe"], directory)
    return done


def check_there(run: PlannedRun, directory: Path) -> None:
    """Raise ValueError where the directory holds another recipe's run, finished or not."""
    path = directory / "recipe.yaml"
    if finished(run, directory) is None and path.is_file():
        _check_same(run, load.read_yaml(path), directory)


def placeless(recipe: Mapping[str, Any], inside: Sequence[str]) -> dict[str, Any]:
    """A resolved recipe with the folders of its own study as seen from there, like `runs/ID`."""
    ends = {k: "/".join(Path(recipe[k]).parts[-2:]) for k in inside if recipe.get(k)}
    return {**recipe, **ends}


def _check_same(run: PlannedRun, there: Mapping[str, Any], directory: Path) -> None:
    planned = placeless(load.to_plain(run.recipe), run.inside)
    differing = load.differences(placeless(there, run.inside), planned)
    if differing:
        raise ValueError(
            f"{directory} holds a run of another recipe (differs in {', '.join(differing)}): "
            "delete it"
        )


def ensure(run: PlannedRun, directory: Path, train: Train) -> dict[str, Any]:
    """The run's result: kept, or the run gone on with or begun.

    Raises:
        RunFailed: when it ends without a result.
        ValueError: when another recipe's run lies there, finished or not.
    """
    check_there(run, directory)
    done = finished(run, directory)
    if done is not None:
        return done
    if not _written(run, directory / "recipe.yaml"):
        record.write_text(directory / "recipe.yaml", load.to_yaml(run.recipe))
    train(run, directory)
    done = finished(run, directory)
    if done is None:
        raise RunFailed(f"it ended without a result (see {directory / 'stderr.txt'})")
    return done


def _written(run: PlannedRun, path: Path) -> bool:
    """Whether a recipe lies there that means this study's folders: it may have been moved."""
    if not path.is_file():
        return False
    there, planned = load.read_yaml(path), load.to_plain(run.recipe)
    return all(Path(there[k]).resolve() == Path(planned[k]).resolve() for k in run.inside)


def _why(status: int, errors: Path) -> str:
    """Why a run failed: its own last line, unless a signal ended it, which no line foretells."""
    lines = errors.read_text(errors="replace").strip().splitlines() if errors.is_file() else []
    if status < 0 or not lines:
        told = _ending(status) + (f"; its last line: {lines[-1]}" if lines else "")
    else:
        told = lines[-1]
    return f"{told} (see {errors})" if lines else told


def _ending(status: int) -> str:
    """How a process ended, in words."""
    if status == -signal.SIGKILL:
        return "it was killed, as a system does that is out of memory"
    if status < 0:
        return f"it was ended by signal {-status} ({signal.strsignal(-status)})"
    return f"it ended with status {status}"
