"""What a difference comes to, and Holm's correction over a table (comparison.md 5.2)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scipy.special import stdtr  # Student's t

from recipes.statistics.noise import LEVEL, half_width

Word = Literal["better", "worse", "equivalent", "not resolved"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A group of runs minus a reference, in the unit of the losses; below zero is better.

    Where nothing can be claimed `half` and `p` are None, and `how` says why.
    """

    value: float
    half: float | None = None  # half width of the 95 % interval; None: the noise is unknown
    p: float | None = None  # two-sided, of this difference alone
    p_holm: float | None = None  # corrected over its table
    df: float | None = None
    how: str  # the way it was judged, or why it could not be
    sigma: float | None = None  # standard deviation of one run over seeds
    correlation: float | None = None  # of the two, over the seeds in common
    margin: float | None = None  # differences below it count as none
    p_equal: float | None = None  # of two one-sided tests against the margin
    p_equal_holm: float | None = None
    too_few: bool = False  # runs, to call it better or worse whatever p is
    borrowed: bool = False  # the noise is that of other runs, too few of its own measure it

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, not corrected for the number of comparisons."""
        return None if self.half is None else (self.value - self.half, self.value + self.half)

    @property
    def effect(self) -> float | None:
        """The difference in standard deviations of one run."""
        return None if self.sigma is None else self.value / self.sigma

    @property
    def resolved(self) -> bool:
        """Better or worse beyond the noise."""
        return self.p_holm is not None and self.p_holm <= LEVEL and not self.too_few

    @property
    def equivalent(self) -> bool:
        """Closer than the margin beyond the noise; a resolved difference may be that too."""
        return self.p_equal_holm is not None and self.p_equal_holm <= LEVEL and not self.too_few

    @property
    def word(self) -> Word:
        """The verdict."""
        if self.resolved:
            return "better" if self.value < 0 else "worse"
        return "equivalent" if self.equivalent else "not resolved"

    @property
    def marked(self) -> str:
        """The verdict, and that it rests on the noise of other runs where it does."""
        return f"{self.word}, by noise" if self.borrowed and self.resolved else self.word


def judged(value: float, error: float, df: float, how: str, margin: float | None) -> Difference:
    """A difference with its standard error, tested against zero and against the margin.

    The tests are two-sided for zero, and two one-sided ones for -margin < difference < margin
    (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657).
    """
    p_equal = None
    if margin is not None:
        p_equal = float(stdtr(df, (abs(value) - margin) / error))  # the nearer end decides
    return Difference(
        value=value,
        half=half_width(error, df),
        p=float(2 * stdtr(df, -abs(value) / error)),
        df=df,
        how=how,
        margin=margin,
        p_equal=p_equal,
    )


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest of k times (k - i), never decreasing."""
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = highest
    return corrected


def correct(differences: Sequence[Difference]) -> list[Difference]:
    """The differences of one table with p_holm and p_equal_holm, each over all that have a p.

    The two families are corrected apart: at most 5 % of tables call anything better or worse that
    is not, and at most 5 % call anything equivalent that is not.
    """
    different = iter(holm([d.p for d in differences if d.p is not None]))
    equal = iter(holm([d.p_equal for d in differences if d.p_equal is not None]))
    return [
        replace(
            d,
            p_holm=None if d.p is None else next(different),
            p_equal_holm=None if d.p_equal is None else next(equal),
        )
        for d in differences
    ]
