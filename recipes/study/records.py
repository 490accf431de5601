"""What a study's directory keeps: `plan.json` as it was last run, and `results.json` of its runs.

The report works from these alone, and from `result.json` of each run.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.report.records import SCHEMA, Choice, Match, Run, load_json
from recipes.report.strict import read_as

PLAN, RESULTS = "plan.json", "results.json"
FAILURES = "failures.json"  # reason by id of a run without a result


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """One size at one matching; see `recipes.study.cells.Cell`."""

    size: str
    hold: str
    target: float  # of the budget
    variants: tuple[str, ...]  # labels, controls last
    matched: tuple[Match, ...] = ()
    unreachable: dict[str, str] = field(default_factory=dict)  # label: why


@dataclass(frozen=True, kw_only=True)
class ControlRecord:
    """What a control is there for."""

    kind: str
    of: str  # label of the variant


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """What a model costs beside what each run's record says, counted from its config."""

    size: str
    variant: str
    active_strict: float  # parameters that a token touches, embedding and head left out
    active_with_head: float  # the same with the head, tied or not
    weight_bytes: int  # while training: float32 masters
    gradient_bytes: int  # at most, all rows of a table touched
    optimizer_bytes: int  # its state, whole
    tokens_per_step: int
    traced_as: float  # matmul FLOPs per token as a trace counts them: every key of the attention


@dataclass(frozen=True, kw_only=True)
class PlannedRecord:
    """A run's place in the study."""

    id: str
    stage: str  # "tuning" or "reporting"
    size: str
    variant: str
    precision: str
    seed: int
    lr: float
    holds: tuple[str, ...]
    model: str  # a key of `models`
    recipe_sha256: str | None = None  # of `recipes.planned.placeless`; None: not said
    inside: tuple[str, ...] = ()  # as of a `PlannedRun`


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """A study as it was last run."""

    schema: int
    name: str
    study: dict[str, Any]  # resolved
    baseline: Choice
    holds: tuple[str, ...]  # the first is the primary matching
    sizes: tuple[str, ...]  # from the smallest
    variants: tuple[str, ...]  # no controls
    precisions: tuple[str, ...]
    seeds: tuple[int, ...]  # the study's own; `resolution` may have added others
    cells: tuple[CellRecord, ...]
    controls: dict[str, ControlRecord]
    models: dict[str, ModelRecord]
    runs: tuple[PlannedRecord, ...]  # those known so far: what is reported hangs on the tuning

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA}, got {self.schema}")

    def cell(self, size: str, hold: str) -> CellRecord:
        """The cell of a size and a matching."""
        return next(c for c in self.cells if (c.size, c.hold) == (size, hold))


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a counter of matmuls saw in a forward of the model, or why it saw nothing."""

    flops_per_token: float | None = None
    why: str | None = None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a machine can do at most, in the numbers that a roofline needs."""

    name: str
    threads: int
    flops_per_s: float  # float32 matmuls, measured
    bytes_per_s: float  # of a copy, read and written


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A finished run in the study's record."""

    recipe_sha256: str
    run: Run


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """A study and its runs, as far as it is: `results.json`."""

    schema: int
    plan: PlanRecord
    runs: tuple[Recorded, ...] = ()
    failures: dict[str, str] = field(default_factory=dict)  # id, or what has no rate: reason
    strays: tuple[str, ...] = ()  # finished runs that are no part of the study as it was last run
    traces: dict[str, Trace] = field(default_factory=dict)  # by key of `plan.models`
    machine: Machine | None = None  # of the roofline
    whole: str | None = None  # the size whose runs keep everything; others' are thinned


def read_plan(directory: Path) -> PlanRecord:
    """The plan that lies in a study's directory.

    Raises:
        ValueError: where there is none: the study was never run there.
    """
    path = directory / PLAN
    if not path.is_file():
        raise ValueError(f"{directory}: no {PLAN}, so no study was run there: zoo study run first")
    return read_as(PlanRecord, load_json(path), str(path))


def read_study_results(path: Path) -> StudyResults:
    """A `results.json`, or the one in a directory, checked."""
    path = path / RESULTS if path.is_dir() else path
    return read_as(StudyResults, load_json(path), str(path))
