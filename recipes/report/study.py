"""Results with everything that is derived from them once: groups, noise, verdicts, looks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, inf, isfinite, log10
from statistics import fmean

from recipes.report.look import Look, look_of
from recipes.report.noise import compare
from recipes.report.records import Results, Run
from recipes.statistics.noise import Seeds, Spread, spread_of
from recipes.statistics.verdicts import Difference, correct

Compare = Callable[[Seeds, Seeds, Seeds], Difference]  # of a group, a reference, the baseline
BYTES_AT = ("1", "16", "256", "4096")  # tokens processed together


class OverSeeds:
    """What runs that differ in their seed alone come to."""

    runs: tuple[Run, ...]

    @cached_property
    def seeds(self) -> Seeds:
        """Bits per byte by seed."""
        return {run.seed: run.final.bpb for run in self.runs}

    @property
    def bpb(self) -> float:
        """Mean bits per byte."""
        return fmean(self.seeds.values())

    @property
    def tokens_per_s(self) -> float:
        """Mean over the seeds of each run's median."""
        return fmean(run.speed.tokens_per_s for run in self.runs)

    @property
    def train_s(self) -> float:
        """Mean seconds of training."""
        return fmean(run.speed.train_s for run in self.runs)

    @property
    def peak_memory_bytes(self) -> float | None:
        """The largest of the runs that measured it."""
        measured = [m for r in self.runs if (m := r.speed.peak_memory_bytes) is not None]
        return max(measured, default=None)


@dataclass(frozen=True)
class Group(OverSeeds):
    """The runs of one variant in one precision: they differ in their seed alone.

    Where several learning rates were tried, those of one of them.
    """

    variant: str
    precision: str
    runs: tuple[Run, ...]  # by seed
    lr: float | None = None  # the one of several; None where no other was tried

    @property
    def key(self) -> tuple[str, str]:
        """What tells groups apart."""
        return self.variant, self.precision

    @property
    def label(self) -> str:
        """For a reader."""
        return f"{self.variant} · {self.precision}"

    @property
    def words(self) -> str:
        """For a sentence."""
        return f"{self.variant} {self.precision}"

    @property
    def first(self) -> Run:
        """The run with the lowest seed; costs are the same for all."""
        return self.runs[0]

    @property
    def accuracy(self) -> float | None:
        """Mean accuracy; None where a run has none: it read a text, or ended without a number."""
        found = [x for run in self.runs if (x := run.final.accuracy) is not None]
        return fmean(found) if len(found) == len(self.runs) else None


@dataclass(frozen=True)
class Study:
    """What every section of the report reads."""

    results: Results
    variants: tuple[str, ...]
    precisions: tuple[str, ...]
    groups: tuple[Group, ...]
    baseline: Group
    noise: Spread | None  # of one run, from the baseline's seeds
    verdicts: dict[tuple[str, str], Difference]  # by group, the baseline left out
    reference: str  # the precision that gaps are taken to
    gaps: dict[tuple[str, str], Difference]  # by group, the reference precision left out
    look: Look

    def half(self, group: Group) -> float | None:
        """Half width of the 95 % interval of a group's mean; None where the noise is unknown."""
        if self.noise is None or not isfinite(group.bpb):
            return None
        spread = spread_of(self.baseline.seeds, *self._own(group)) or self.noise
        return spread.half(1 / len(group.runs))

    def _own(self, group: Group) -> list[Seeds]:
        return [] if group is self.baseline else [group.seeds]

    @property
    def digits(self) -> int:
        """Decimals of bits per byte: down to a tenth of the noise."""
        std = self.noise.std if self.noise else 1e-3
        return min(6, max(3, ceil(-log10(std)) + 1))

    def split(self, groups: Sequence[Group], most: int) -> tuple[list[Group], list[Group]]:
        """Groups to show and groups to fold: beyond `most` only the baseline's precision shows."""
        if len(groups) <= most:
            return list(groups), []
        at = self.baseline.precision
        shown = [g for g in groups if g.precision == at]
        return shown, [g for g in groups if g.precision != at]

    def moe_groups(self) -> list[Group]:
        """Groups whose first run recorded expert load."""
        return [g for g in self.groups if g.first.load]


def study(results: Results, *, compared: Compare = compare) -> Study:
    """Group, judge and colour the runs.

    Args:
        results: of a comparison.
        compared: how a group is judged against a reference by the noise of the baseline.
    """
    c, base = results.comparison, results.baseline
    variants = _ordered(c.variants if c else (), (r.variant for r in results.runs))
    precisions = _ordered((base.precision,), (r.precision for r in results.runs))
    groups = _groups(results, variants, precisions)
    by_key = {g.key: g for g in groups}
    baseline = by_key[base.variant, base.precision]
    others = [g for g in groups if g is not baseline]
    judged = correct([compared(g.seeds, baseline.seeds, baseline.seeds) for g in others])
    reference = "bf16" if "bf16" in precisions else base.precision
    lower = [g for g in groups if g.precision != reference and (g.variant, reference) in by_key]
    gaps = correct(
        [compared(g.seeds, by_key[g.variant, reference].seeds, baseline.seeds) for g in lower]
    )
    return Study(
        results=results,
        variants=variants,
        precisions=precisions,
        groups=groups,
        baseline=baseline,
        noise=spread_of(baseline.seeds),
        verdicts=dict(zip((g.key for g in others), judged, strict=True)),
        reference=reference,
        gaps=dict(zip((g.key for g in lower), gaps, strict=True)),
        look=look_of(variants, precisions, base.variant),
    )


def _ordered(declared: Iterable[str], found: Iterable[str]) -> tuple[str, ...]:
    """Names that have runs: those declared first, then the rest as they come."""
    present = dict.fromkeys(found)
    first = [name for name in declared if name in present]
    return tuple(dict.fromkeys([*first, *present]))


def _groups(
    results: Results, variants: tuple[str, ...], precisions: tuple[str, ...]
) -> tuple[Group, ...]:
    groups = []
    base = results.baseline.variant, results.baseline.precision
    for variant in variants:
        for precision in precisions:
            runs = [r for r in results.runs if (r.variant, r.precision) == (variant, precision)]
            if not runs:
                continue
            lr = None
            if results.lrs:
                pinned = results.baseline.lr if (variant, precision) == base else None
                lr = best_lr(runs) if pinned is None else pinned
                runs = [r for r in runs if r.lr == lr]
            groups.append(Group(variant, precision, tuple(sorted(runs, key=lambda r: r.seed)), lr))
    return tuple(groups)


def best_lr(runs: Sequence[Run]) -> float | None:
    """The learning rate of the lowest mean bits per byte over its seeds; ties go to the lower.

    One at which a run diverged comes after all at which none did: it is not one to train at.
    """

    def rank(lr: float | None) -> tuple[bool, float, float]:
        mine = [r for r in runs if r.lr == lr]
        mean = fmean(r.final.bpb for r in mine)
        diverged = any(r.diverged for r in mine) or not isfinite(mean)
        return diverged, mean if isfinite(mean) else inf, lr or 0.0

    return min({r.lr for r in runs}, key=rank)
