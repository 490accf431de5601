"""One run of a comparison in a process of its own: `python -m recipes.worker DIR LABEL PARENT`.

So that peak memory is that run's alone, and a crash is too.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

from recipes.environment import prepare

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int) -> None:
    """Be killed when the parent ends, however it ends, so that no orphan trains on (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it had ended before
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """Train the recipe that lies in the directory; 2 and one line on stderr for a known error."""
    directory, label, parent = sys.argv[1:]
    die_with(int(parent))
    prepare()
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
