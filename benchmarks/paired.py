"""Many small trainings and what their paired differences say.

The same seed gives the same first weights and batches, so that the spread over seeds of a
difference is the spread of the difference. Finished runs are kept: a second call only reads them.
"""

import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recipes import load
from recipes.statistics.noise import mean_interval
from recipes.statistics.paired import difference
from recipes.train import train


class Job(NamedTuple):
    """One run."""

    variant: str  # its label
    recipe: Mapping[str, Any]  # keys of a recipe
    out: Path


def train_all(jobs: Sequence[Job], workers: int) -> dict[Path, dict[str, Any]]:
    """Each job's result.json by its directory; what is finished is only read."""
    unique = {job.out: job for job in jobs}
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return dict(zip(unique, pool.map(_train, unique.values(), chunksize=1), strict=True))


def _train(job: Job) -> dict[str, Any]:
    sys.stdout = sys.stderr  # a page goes to stdout
    return train(load.load(job.recipe), job.out, variant=job.variant)


def gap(values: Sequence[float], base: Sequence[float]) -> str:
    """The paired difference in thousandths: "+1.2 ± 0.4"."""
    mean, half = mean_interval([(a - b) * 1000 for a, b in zip(values, base, strict=True)])
    return f"{mean:+.1f} ± {half:.1f}"


def told(values: Sequence[float], base: Sequence[float]) -> str:
    """Whether the first are lower, higher, or not told apart from the second; not corrected."""
    d = difference(dict(enumerate(values)), dict(enumerate(base)))
    if d.half is None or abs(d.value) <= d.half:
        return "not resolved"
    return "lower" if d.value < 0 else "higher"
