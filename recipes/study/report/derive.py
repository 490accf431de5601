"""A study's results with everything derived from them: arms, differences, noise, looks."""

from dataclasses import dataclass
from functools import cached_property
from math import ceil, isfinite, log10
from statistics import fmean

from recipes.report.look import Look, look_of
from recipes.report.noise import compare_in_pairs
from recipes.report.records import Run
from recipes.report.study import OverSeeds
from recipes.statistics.noise import Spread, spread_of
from recipes.statistics.power import resolution
from recipes.statistics.verdicts import LEVEL, Difference, correct
from recipes.study.records import ModelRecord, PlannedRecord, PlanRecord, StudyResults

FLOPS_HELD = "active_flops"  # the matching that a verdict is about, where the study has it
POWER = 0.8

Place = tuple[str, str]  # size, matching
Key = tuple[str, str, str]  # variant, size, matching


@dataclass(frozen=True)
class Arm(OverSeeds):
    """The finished runs of one variant in one precision at one size and matching, by seed."""

    variant: str
    precision: str
    size: str
    hold: str
    runs: tuple[Run, ...]

    @property
    def flops(self) -> float:
        """Training FLOPs of one run."""
        return fmean(run.tokens * run.cost.training_flops_per_token for run in self.runs)

    @property
    def half(self) -> float | None:
        """Half width of the 95 % interval of the mean; None where its seeds do not tell."""
        spread = spread_of(self.seeds)
        return spread.half(1 / len(self.runs)) if spread else None


@dataclass(frozen=True)
class Told:
    """What the seeds of one size can tell."""

    size: str
    seeds: int  # of the baseline
    mean: float  # bits per byte
    sigma: float | None  # of one run
    first: float | None  # difference found with 80 % power by itself
    table: float | None  # and where Holm's correction asks the most of it


class Derived:
    """What every section reads."""

    def __init__(self, results: StudyResults):
        self.results = results
        self.plan: PlanRecord = results.plan
        self.runs = {r.run.id: r.run for r in results.runs}
        p = self.plan
        self.primary = p.holds[0]
        self.flops_hold = FLOPS_HELD if FLOPS_HELD in p.holds else self.primary
        self.controls = p.controls
        self.others = tuple(v for v in p.variants if v != p.baseline.variant)
        self.look: Look = look_of((*p.variants, *p.controls), p.precisions, p.baseline.variant)
        self._arms = self._grouped()

    def _grouped(self) -> dict[tuple[str, str, str, str], Arm]:
        found: dict[tuple[str, str, str, str], list[Run]] = {}
        for planned in self.plan.runs:
            if planned.stage == "reporting" and planned.id in self.runs:
                for hold in planned.holds:
                    key = (planned.variant, planned.precision, planned.size, hold)
                    found.setdefault(key, []).append(self.runs[planned.id])
        return {k: Arm(*k, tuple(sorted(r, key=lambda r: r.seed))) for k, r in found.items()}

    def arm(
        self, variant: str, size: str, hold: str | None = None, precision: str | None = None
    ) -> Arm | None:
        """An arm; by default at the primary matching and the baseline's precision."""
        precision = precision or self.plan.baseline.precision
        return self._arms.get((variant, precision, size, hold or self.primary))

    def base(self, size: str, hold: str | None = None) -> Arm | None:
        """The baseline's arm."""
        return self.arm(self.plan.baseline.variant, size, hold)

    def model(self, arm: Arm) -> ModelRecord | None:
        """The record of an arm's model."""
        ids = {run.id for run in arm.runs}
        key = next((p.model for p in self.plan.runs if p.id in ids), None)
        return None if key is None else self.plan.models.get(key)

    def planned(self, stage: str) -> list[PlannedRecord]:
        """The runs of a stage."""
        return [run for run in self.plan.runs if run.stage == stage]

    @property
    def missing(self) -> list[PlannedRecord]:
        """Runs without a result and without a recorded failure."""
        gone = {*self.runs, *self.results.failures}
        return [run for run in self.plan.runs if run.id not in gone]

    @cached_property
    def table(self) -> dict[Key, Difference]:
        """Each variant against the baseline at each size and matching, Holm over all of it.

        A width that is the same in two matchings is one comparison, and counts once.
        """
        judged: dict[tuple[str, ...], Difference] = {}
        of: dict[Key, tuple[str, ...]] = {}
        for size in self.plan.sizes:
            for hold in self.plan.holds:
                base = self.base(size, hold)
                for variant in self.others:
                    arm = self.arm(variant, size, hold)
                    if arm is None or base is None:
                        continue
                    ids = tuple(run.id for run in (*arm.runs, *base.runs))
                    of[variant, size, hold] = ids
                    judged[ids] = compare_in_pairs(arm.seeds, base.seeds, base.seeds)
        corrected = dict(zip(judged, correct(list(judged.values())), strict=True))
        return {key: corrected[ids] for key, ids in of.items()}

    @cached_property
    def against_controls(self) -> dict[tuple[str, str], Difference]:
        """Each variant minus each of its controls, by (control, size); Holm over all of them."""
        found: dict[tuple[str, str], Difference] = {}
        for size in self.plan.sizes:
            for label, control in self.controls.items():
                mine, other = self.arm(control.of, size), self.arm(label, size)
                base = self.base(size) or other
                if mine and other and base:
                    found[label, size] = compare_in_pairs(mine.seeds, other.seeds, base.seeds)
        return dict(zip(found, correct(list(found.values())), strict=True))

    @property
    def reference(self) -> str:
        """The precision that gaps are taken to."""
        p = self.plan
        return "bf16" if "bf16" in p.precisions else p.baseline.precision

    @cached_property
    def gaps(self) -> dict[Key, Difference]:
        """Each variant in each precision minus itself in the reference, by (variant, precision,
        size), at the primary matching; Holm over all of them."""
        found: dict[Key, Difference] = {}
        for size in self.plan.sizes:
            for variant in self.plan.variants:
                whole = self.arm(variant, size, precision=self.reference)
                for precision in self.plan.precisions:
                    arm = self.arm(variant, size, precision=precision)
                    if arm and whole and precision != self.reference:
                        base = self.base(size) or whole
                        found[variant, precision, size] = compare_in_pairs(
                            arm.seeds, whole.seeds, base.seeds
                        )
        return dict(zip(found, correct(list(found.values())), strict=True))

    @cached_property
    def told(self) -> list[Told]:
        """Noise and power by size."""
        found: list[Told] = []
        for size in self.plan.sizes:
            base = self.base(size)
            if base is None:
                continue
            spread, n = spread_of(base.seeds), len(base.runs)
            distinct = {id(x) for x in self.table.values()}
            ends = [LEVEL, LEVEL / max(len(distinct), 1)]
            first, table = (
                [resolution(n, spread.std, power=POWER, alpha=a) for a in ends]
                if spread
                else [None, None]
            )
            std = spread.std if spread else None
            found.append(Told(size, n, base.bpb, std, first, table))
        return found

    @cached_property
    def noise(self) -> Spread | None:
        """Of one run, pooled over the baseline's seeds at every size that did not diverge."""
        arms = [self.base(size) for size in self.plan.sizes]
        return spread_of(*(a.seeds for a in arms if a and isfinite(a.bpb)))

    @property
    def top(self) -> str | None:
        """The size that the verdicts are about: the largest that is complete."""
        return self.results.whole

    @property
    def digits(self) -> int:
        """Decimals of bits per byte: down to a tenth of the noise."""
        std = self.noise.std if self.noise else 1e-3
        return min(6, max(3, ceil(-log10(std)) + 1))
