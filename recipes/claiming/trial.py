"""A claim's study, what it has come to, and its verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from layers.names import unknown
from recipes.claiming.judge import Judged, Verdict, judge, overall
from recipes.claiming.measures import value_of
from recipes.claiming.schema import Claim, Side, Test, read_claim, read_tests
from recipes.names import precision_label
from recipes.report.records import Run
from recipes.statistics.noise import Seeds
from recipes.study.plan import StudyPlan, StudyRun, plan
from recipes.study.run import more_seeds, rates_of, recorded_failures, results_of
from recipes.study.schema import read_study


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A claim with its study planned."""

    claim: Claim
    tests: tuple[Test, ...]
    plan: StudyPlan

    @property
    def directory(self) -> Path:
        """Where its runs lie."""
        return self.plan.out


@dataclass(frozen=True, kw_only=True)
class Group:
    """The reported runs of one variant in one precision, as far as they are there."""

    variant: str
    precision: str
    planned: int
    runs: dict[int, Run]  # by the study's seed

    @property
    def first(self) -> Run | None:
        """Any of them: what is counted is the same for all."""
        return next(iter(self.runs.values()), None)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a claim has come to."""

    trial: Trial
    groups: tuple[Group, ...]
    judged: tuple[Judged, ...]
    verdict: Verdict
    finished: int  # runs, those of the tuning too
    planned: int
    flops: float  # of all trainings, matmuls
    train_s: float  # of all trainings, one after the other
    failures: dict[str, str]  # reason by id


def prepare(
    source: str | Path | Mapping[str, Any], out: Path, overrides: Sequence[str] = ()
) -> Trial:
    """Settle a claim's study; nothing is trained.

    Args:
        source: as of `read_claim`.
        out: of all claims; this one's study goes into a folder of its name.
        overrides: `key=value`; of the study or the recipe that its runs share.

    Raises:
        ValueError: naming the claim, for what no study could mean or a side that it does not have.
    """
    claim = read_claim(source)
    said = {**claim.study, "name": claim.name, "out": str(out / claim.name)}
    try:
        settled = plan(*read_study(said, overrides))
    except ValueError as error:
        raise ValueError(f"claim {claim.name}: {error}") from None
    tests = read_tests(claim)
    for test in tests:
        for side in filter(None, (test.of, test.against)):
            _check(settled, side, claim.name)
    return Trial(claim=claim, tests=tests, plan=settled)


def _check(settled: StudyPlan, side: Side, name: str) -> None:
    labels = [variant.label for variant in settled.cells[0].variants]
    precisions = [precision_label(p) for p in settled.study.precisions]
    for what, said, known in (
        ("variant", side.variant, labels), ("precision", side.precision, precisions),
    ):  # fmt: skip
        if said is not None and said not in known:
            raise ValueError(f"claim {name}: {unknown(f'{what} of a test', said, known)}")


def outcome(trial: Trial) -> Outcome:
    """Read what is finished and judge it."""
    found = trial.plan
    rates, _ = rates_of(found)
    reported = found.reporting(rates)
    runs = [*reported, *found.reporting(rates, more_seeds(found, rates))]
    expected = found.reporting() if found.study.lrs else reported  # without rates fewer are known
    groups = _groups(trial, runs)
    by_key = {(g.variant, g.precision): g for g in groups}
    judged = judge(
        [
            (test, _figures(trial, test, test.of, by_key), None if test.against is None
             else _figures(trial, test, test.against, by_key))
            for test in trial.tests
        ]
    )  # fmt: skip
    trained = results_of(found, [*found.tuning, *runs])
    kept = [run for run in trained.values() if run is not None]
    failures = {k: v for k, v in recorded_failures(found).items() if trained.get(k) is None}
    return Outcome(
        trial=trial, groups=groups, judged=tuple(judged), verdict=overall(judged),
        finished=len(kept), planned=max(len(trained), len(found.tuning) + len(expected)),
        flops=sum(run.curve[-1].flops for run in kept if run.curve),
        train_s=sum(run.speed.train_s for run in kept), failures=failures,
    )  # fmt: skip


def _groups(trial: Trial, runs: Sequence[StudyRun]) -> tuple[Group, ...]:
    """Of the largest size at the primary matching."""
    found = trial.plan
    size, hold = found.sizes[-1], found.study.hold[0]
    mine = [run for run in runs if run.size == size and hold in run.holds]
    results = results_of(found, mine)
    cell = next(c for c in found.cells if (c.size.label, c.hold) == (size, hold))
    n_seeds = len(found.study.seeds)
    groups = []
    for variant in cell.variants:
        for precision in map(precision_label, found.study.precisions):
            of = [r for r in mine if (r.variant, r.precision) == (variant.label, precision)]
            kept = {run.seed: done for run in of if (done := results[run.id]) is not None}
            groups.append(
                Group(
                    variant=variant.label, precision=precision, planned=len(of) or n_seeds,
                    runs=kept,
                )
            )  # fmt: skip
    return tuple(groups)


def _figures(
    trial: Trial, test: Test, side: Side, groups: Mapping[tuple[str, str], Group]
) -> Seeds:
    """The figure of each seed that has it."""
    base = trial.plan.study.baseline
    group = groups[side.variant or base.variant, side.precision or base.precision]
    read = {
        seed: value_of(run, test.measure, side.width, test.tokens)
        for seed, run in group.runs.items()
    }
    return {seed: value for seed, value in read.items() if value is not None}


def mean_bpb(group: Group) -> float | None:
    """Over its seeds; None where there is none, or a run diverged."""
    values = [run.final.bpb for run in group.runs.values()]
    return sum(values) / len(values) if values and all(map(isfinite, values)) else None
