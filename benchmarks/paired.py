"""Many small trainings and what their paired differences say.

The same seed gives the same first weights and batches, so that the spread over seeds of a
difference is the spread of the difference. Finished runs are kept: a second call only reads them.
"""

import multiprocessing
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from recipes import load
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


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval, of paired differences that are finite."""
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return statistics.mean(differences), float(half)


def gap(values: Sequence[float], base: Sequence[float]) -> str:
    """The paired difference in thousandths: "+1.2 ± 0.4"."""
    mean, half = interval([(a - b) * 1000 for a, b in zip(values, base, strict=True)])
    return f"{mean:+.1f} ± {half:.1f}"


def told(values: Sequence[float], base: Sequence[float]) -> str:
    """Whether the first are lower, higher, or not told apart from the second."""
    mean, half = interval([a - b for a, b in zip(values, base, strict=True)])
    return "not resolved" if abs(mean) <= half else "lower" if mean < 0 else "higher"
