"""Start the processes of a run: one for each device, which Lightning then finds already started.

They are `python -m recipes.rank`, so a run starts the same way from the command, a notebook or a
test, and no script of the user runs twice. `torchrun` may start them as well: then this is not
used.
"""

import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from recipes.record import cores
from recipes.schema import TrainerConfig

ROOT = Path(__file__).resolve().parents[1]
KNOWN_ERROR = 2  # exit status: one line on stderr says it all
POLL_S = 0.05


def launch(out: Path, variant: str, run_id: str | None, trainer: TrainerConfig) -> None:
    """Run `recipes.rank` on the directory, on every device, to the end.

    Args:
        out: a run directory with its recipe.yaml.
        variant, run_id: as `recipes.train.train`.
        trainer: of the recipe.

    Raises:
        ValueError: what a rank says to be wrong.
        RuntimeError: when a rank ends otherwise; the others are ended with it.
    """
    command = [sys.executable, "-P", "-m", "recipes.rank", str(out), variant, run_id or ""]
    command.append(str(os.getpid()))
    shared = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": str(trainer.threads or max(cores() // trainer.devices, 1)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(trainer.devices),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(trainer.devices):
            environment = shared | {"LOCAL_RANK": str(rank)}
            with errors_of(out, rank).open("wb") as stderr:
                ranks.append(
                    subprocess.Popen(
                        command, env=environment, stdout=_stdout() if rank == 0 else stderr,
                        stderr=stderr, start_new_session=True,
                    )
                )  # fmt: skip
        _wait(ranks, out)
        for rank in range(trainer.devices):
            if not errors_of(out, rank).read_bytes():
                errors_of(out, rank).unlink()
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _wait(ranks: list[subprocess.Popen[bytes]], out: Path) -> None:
    """Until all have ended well, or one has not."""
    while True:
        statuses = [process.poll() for process in ranks]
        failed = [rank for rank, status in enumerate(statuses) if status]
        if failed:  # the one that says why, where the others fail for its absence
            rank = next((rank for rank in failed if statuses[rank] == KNOWN_ERROR), failed[0])
            _fail(out, rank, statuses[rank] or 0)
        if all(status == 0 for status in statuses):
            return
        time.sleep(POLL_S)


def _fail(out: Path, rank: int, status: int) -> None:
    errors = errors_of(out, rank)
    lines = errors.read_text(errors="replace").strip().splitlines()
    if status == KNOWN_ERROR and lines:
        raise ValueError(lines[-1])
    said = f": {lines[-1]}" if lines else ""
    raise RuntimeError(f"process {rank} ended with status {status}{said} (see {errors})")


def errors_of(out: Path, rank: int) -> Path:
    """Where a rank's stderr goes; gone once it has ended without a word."""
    return out / f"stderr-{rank}.txt"


def _stdout() -> int | None:
    """Where this process's lines go, redirected or not; None: where they went as it started."""
    try:
        return sys.stdout.fileno()
    except (AttributeError, io.UnsupportedOperation):
        return None


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
