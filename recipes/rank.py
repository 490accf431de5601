"""One process of a run on several devices: `python -m recipes.rank DIR LABEL RUN_ID PARENT`."""

import sys
from pathlib import Path

from recipes.environment import prepare
from recipes.launch import KNOWN_ERROR
from recipes.worker import die_with


def main() -> int:
    """Take part in training the recipe that lies in the directory; a known error in one line."""
    directory, label, run_id, parent = sys.argv[1:]
    die_with(int(parent))
    prepare()
    from recipes.load import load
    from recipes.train import work

    try:
        work(load(Path(directory) / "recipe.yaml"), Path(directory), label, run_id or None)
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return KNOWN_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
