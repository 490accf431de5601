"""The runs that a study comes to: learning rates tried first, then what is reported."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from layers.names import unknown
from recipes import load
from recipes.names import precision_label
from recipes.planned import PlannedRun
from recipes.planning import LR, check_differences, rate, recipe_of
from recipes.report.records import Run
from recipes.report.study import best_lr
from recipes.study.begin import OTHER_BATCHES, Begin, in_order
from recipes.study.cells import Cell, Control, cells_of, size_named
from recipes.study.schema import ONE_SIZE, Study

BEGUN = ("init_from", "prior_teacher")  # keys that differ where a run begins from another


class Tuned(NamedTuple):
    """What a learning rate is tuned for."""

    size: str
    variant: str
    precision: str


@dataclass(frozen=True, kw_only=True)
class StudyRun(PlannedRun):
    """A run with its place in the study."""

    stage: str  # "tuning" or "reporting"
    size: str
    precision: str
    seed: int
    holds: tuple[str, ...]  # matchings that it stands in: a width may be the same in several
    begin: Begin | None = None  # where its weights come from; None: drawn from the seed
    source: str | None = None  # id of the run that it begins from


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """A study with everything settled but the learning rates that its tuning is to find."""

    study: Study
    resolved: dict[str, Any]  # as a plain mapping
    cells: tuple[Cell, ...]
    controls: dict[str, Control]  # by label
    tuning: tuple[StudyRun, ...]

    @property
    def out(self) -> Path:
        """Where it goes."""
        return Path(self.study.out or f"runs/{self.study.name}")

    @property
    def sizes(self) -> tuple[str, ...]:
        """Labels of the ladder's rungs."""
        return tuple(dict.fromkeys(cell.size.label for cell in self.cells))

    def tuned_as(self, size: str, variant: str, precision: str) -> Tuned:
        """Where the learning rate of a cell is taken from: itself, or the nearest that was tuned.

        A size takes that of the nearest tuned rung below it, else above; a precision that of the
        baseline's.
        """
        tuned = self.study.tuning
        sizes = [s for s in self.sizes if s in (tuned.sizes or self.sizes)]
        at = self.sizes.index(size)
        below = [s for s in sizes if self.sizes.index(s) <= at]
        precisions = tuned.precisions or [self.study.baseline.precision]
        return Tuned(
            below[-1] if below else sizes[0],
            variant,
            precision if precision in precisions else self.study.baseline.precision,
        )

    def reporting(
        self, rates: Mapping[Tuned, float] | None = None, seeds: Sequence[int] | None = None
    ) -> tuple[StudyRun, ...]:
        """The runs that are reported.

        Args:
            rates: what tuning found; None: not known yet, the runs carry the recipe's own rate.
            seeds: in place of the study's.
        """
        s = self.study
        runs: dict[str, StudyRun] = {}
        for cell in self.cells:
            primary = size_named(self.cells, cell.size.label)
            at: dict[tuple[str, str, int], StudyRun] = {}
            by_label = {variant.label: variant for variant in cell.variants}
            for variant in (by_label[x] for x in in_order(by_label, cell.begins)):
                first = primary.variant(variant.label)
                own = "" if first is not None and first.ffn == variant.ffn else cell.hold
                for precision in s.precisions:
                    label = precision_label(precision)
                    found = None
                    if s.lrs and rates is not None:
                        found = rates.get(self.tuned_as(cell.size.label, variant.label, label))
                        if found is None:  # none of its rates came through: nothing to report at
                            continue
                    for seed in s.seeds if seeds is None else seeds:
                        run = _run(cell, variant, precision, seed, found, "reporting", own)
                        begin = cell.begins.get(variant.label)
                        if begin is not None:
                            run = self._begun(run, begin, at[begin.source, label, seed])
                        at[variant.label, label, seed] = run
                        known = runs.get(run.id)
                        if known is not None:
                            run = StudyRun(**{**vars(known), "holds": (*known.holds, cell.hold)})
                        runs[run.id] = run
        return tuple(runs.values())

    def _begun(self, run: StudyRun, begin: Begin, source: StudyRun) -> StudyRun:
        """The run, its weights those of the source, as they are or converted."""
        at = self.out / "runs" / source.id
        recipe = replace(
            run.recipe,
            seed=source.recipe.seed + OTHER_BATCHES,
            init_from=str(at if begin.to is None else self.out / "begun" / run.id),
        )
        inside = BEGUN[:1]
        if recipe.loss_weights.get("prior") and recipe.prior_teacher is None:
            recipe, inside = replace(recipe, prior_teacher=str(at)), BEGUN
        return replace(run, recipe=recipe, begin=begin, source=source.id, inside=inside)


def plan(study: Study, overrides: Mapping[str, Any] | None = None) -> StudyPlan:
    """Settle every run.

    Args:
        study: what to find out, checked.
        overrides: keys of the shared recipe.

    Raises:
        ValueError: for a wrong name, option or value, a budget that a variant cannot meet, or
            recipes that differ where they may not.
    """
    s = study
    cells, controls = cells_of(s, overrides or {})
    precisions = {precision_label(p): p for p in s.precisions}
    for label in s.tuning.precisions:
        if label not in precisions:
            raise unknown("precision in tuning.precisions", label, precisions)
    sizes = tuple(dict.fromkeys(cell.size.label for cell in cells))
    tuned_precisions = s.tuning.precisions or [s.baseline.precision]
    tuning = [
        _run(cell, variant, precisions[precision], seed, lr, "tuning", "")
        for size in (s.tuning.sizes or sizes)
        for cell in [size_named(cells, size)]
        for seed in s.tuning.seeds
        for lr in s.lrs
        for variant in cell.variants
        for precision in tuned_precisions
    ]
    found = StudyPlan(
        study=s, resolved=_resolved(s, overrides or {}), cells=cells, controls=controls,
        tuning=tuple(tuning),
    )  # fmt: skip
    _check(found)
    return found


def _run(
    cell: Cell, variant: Any, precision: Any, seed: int, lr: float | None, stage: str, own: str
) -> StudyRun:
    """own: the matching, where the variant's width is another there than in the primary one."""
    label, size = precision_label(precision), cell.size.label
    parts = [*([] if size == ONE_SIZE else [size]), variant.label, *([own] if own else [])]
    return StudyRun(
        id="-".join([*parts, label, *rate(lr), f"s{seed}"]),
        variant=variant.label,
        recipe=recipe_of(cell.shared, variant, precision, seed, lr),
        stage=stage,
        size=size,
        precision=label,
        seed=seed,
        holds=(cell.hold,),
    )


def _check(found: StudyPlan) -> None:
    """Raise where recipes of one size differ outside the allow-list."""
    begun = any(cell.begins for cell in found.cells)
    allow = [*found.study.allow, *([LR] if found.study.lrs else []), *(BEGUN if begun else [])]
    runs = [*found.tuning, *found.reporting()]
    if begun and found.study.lrs:
        raise ValueError(
            "study: a variant begins from another's run, and lrs would make several of that: say "
            "optim.lr in its recipe, and leave lrs out"
        )
    if found.study.lrs:
        for variant in found.cells[0].variants:
            if "lr" in variant.recipe.get("optim", {}):
                raise ValueError(f"study: {variant.label} must leave optim.lr to lrs")
    for size in found.sizes:
        check_differences(allow, [run for run in runs if run.size == size])


def _resolved(study: Study, overrides: Mapping[str, Any]) -> dict[str, Any]:
    plain = load.to_plain(study)
    del plain["out"]
    return {**plain, "overrides": load.to_plain(dict(overrides))}


def chosen_rates(
    plan: StudyPlan, results: Mapping[str, Run | None]
) -> tuple[dict[Tuned, float], list[Tuned]]:
    """The learning rate of each cell that was tuned, and those that found none.

    The lowest mean bits per byte over the tuning seeds among rates at which no run failed or
    diverged. results: by id of a run, None where it failed.
    """
    groups: dict[Tuned, list[StudyRun]] = {}
    for run in plan.tuning:
        groups.setdefault(Tuned(run.size, run.variant, run.precision), []).append(run)
    rates: dict[Tuned, float] = {}
    without: list[Tuned] = []
    for key, runs in groups.items():
        done = _complete(runs, results)
        lr = best_lr(done) if done else None
        if lr is None:
            without.append(key)
        else:
            rates[key] = lr
    return rates, without


def _complete(runs: Iterable[StudyRun], results: Mapping[str, Run | None]) -> list[Run]:
    """Results at the rates at which every seed came through."""
    by_rate: dict[float, list[Run | None]] = {}
    for run in runs:
        by_rate.setdefault(run.recipe.optim.lr, []).append(results.get(run.id))
    return [
        r
        for found in by_rate.values()
        if not any(r is None or r.diverged for r in found)
        for r in found
        if r is not None
    ]
