"""Trains runs, each in a fork of this process: `python -m recipes.worker SOCKET`.

Peak memory is that run's alone and a crash is too, while what every run imports, seconds of work,
is imported once; then a line says that it is ready. An order is one line of JSON, [directory,
label]; the answer, one line, is how the run's process ended, as `subprocess` says it. The socket's
other end closed ends it all.
"""

import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

from recipes.environment import prepare

PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL_S = 0.05


def die_with(parent: int) -> None:
    """Be killed when the parent ends, however it ends, so that no orphan trains on (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it had ended before
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """Serve orders until there are no more; in a run's own process: that run's exit status."""
    prepare()
    import recipes.load
    import recipes.train  # noqa: F401 - what a run imports, before the first fork
    from recipes import record

    record.commit()  # of what was imported: every run says this one, whatever is committed later
    gc.freeze()  # shared with the forks, as no collection writes to it
    with socket.socket(fileno=int(sys.argv[1])) as orders:
        lines = orders.makefile("rw")
        lines.write("ready\n")
        lines.flush()
        while order := lines.readline():
            child = os.fork()
            if not child:
                break
            status = _wait(child, orders)
            if status is None:
                return 0
            lines.write(f"{status}\n")
            lines.flush()
    return _train(*json.loads(order)) if order else 0


def _wait(child: int, orders: socket.socket) -> int | None:
    """How the run's process ended; None where nobody waits for it any more: then it is killed."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if select.select([orders], [], [], POLL_S)[0]:  # no order comes meanwhile: it was closed
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None


def _train(directory: str, label: str) -> int:
    """Train the recipe that lies in the directory; 2 and one line on stderr for a known error."""
    die_with(os.getppid())
    with Path(directory, "stderr.txt").open("wb") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
    from recipes.load import load
    from recipes.train import train

    try:
        name = Path(directory).name  # which says the learning rate where several are tried
        train(load(Path(directory) / "recipe.yaml"), directory, variant=label, run_id=name)
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
