"""Differences as a picture: a row for each, its 95 % interval around the zero line."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from recipes.report import text
from recipes.report.headline import whisker
from recipes.report.text import Markup, chip, el, folded, join
from recipes.statistics.verdicts import Difference
from recipes.study.report.derive import Derived
from recipes.study.report.names import variant_name

MOST_ROWS = 24  # that show; the others are folded
ROOM = 1.05  # beyond the end of the longest interval


@dataclass(frozen=True)
class Row:
    """A variant minus something, in bits per byte."""

    variant: str
    found: Difference
    to: str | None = None  # what it is compared with, where rows of one picture differ in that
    so: str | None = None  # what the difference means, where the verdict alone does not say

    @property
    def label(self) -> str:
        """In plain text."""
        return self.variant if self.to is None else f"{self.variant}: {self.to}"


def reach_of(rows: Sequence[Row]) -> float:
    """How far from zero a picture must go, on both sides, to show every interval whole."""
    ends = [abs(r.found.value) + (r.found.half or 0) for r in rows if isfinite(r.found.value)]
    return ROOM * (max(ends, default=0.0) or 1.0)


def forest(
    d: Derived, rows: Sequence[Row], zero: str, *, reach: float | None = None
) -> Markup | None:
    """The rows as they come; hollow where not resolved; None where there is none.

    Args:
        d: the study.
        rows: what is drawn.
        zero: what the zero line stands for.
        reach: of the picture, to share a scale with another; None: as far as these rows need.
    """
    if not rows:
        return None
    far = reach or reach_of(rows)
    marks = ("← better", zero, "worse →")
    axis = el("div", *(el("span", mark) for mark in marks), class_="forest-axis")
    head = el("div", axis, class_="forest-head")
    drawn = [_drawn(d, row, far) for row in rows]
    shown, rest = drawn[:MOST_ROWS], drawn[MOST_ROWS:]
    more = [head, *rest] if rest else []
    return folded([head, *shown], more, f"{len(rest)} more rows", "forest")


def _drawn(d: Derived, row: Row, reach: float) -> Markup:
    x = row.found
    number = text.signed(x.value, d.digits)
    shapes = whisker(x, d.look.colours[row.variant], reach)
    picture = el("svg", *shapes, role="img", aria_label=f"{row.label}: {number}")
    half = f" ± {x.half:.{d.digits}f}" if x.half else ""
    known = isfinite(x.value)
    said = f"{number}{half} bits per byte, {x.how}" if known else x.how
    to = None if row.to is None else join(" ", el("span", row.to, class_="quiet"))
    return el(
        "div",
        el("div", el("div", variant_name(d, row.variant), to, class_="who"),
           el("p", said, None if row.so is None else f": {row.so}"), class_="say"),
        el("div", picture, class_="pic"),
        el("div", el("span", number, class_="num"), chip(x.word if known else "diverged"),
           class_="mark"),
        class_="forest-row",
    )  # fmt: skip
