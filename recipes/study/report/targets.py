"""When the variants first reach the baseline's losses, and the area between their curves.

comparison.md 6.5. The targets are set by the baseline alone, before any variant is looked at: its
mean held-out loss after parts of its tokens, the last of them all.
"""

from dataclasses import dataclass
from math import isfinite, log

import numpy as np

from recipes.report import text
from recipes.report.records import Run
from recipes.report.text import Markup, el, join, lead
from recipes.statistics.bootstrap import Array
from recipes.statistics.traces import area_between, time_to
from recipes.study.report.derive import Arm, Derived
from recipes.study.report.names import held, variant_name

PARTS = {0.25: "a quarter of its tokens", 0.5: "half of its tokens", 1.0: "its whole training"}
FEW = 8  # evaluations of a run, below which a time read between two of them says little
SHARED = (
    "Runs that went several at once shared their machine, and their seconds are of that: compare "
    "them with each other alone."
)
AXES = ("training FLOPs", "tokens", "time")


@dataclass(frozen=True)
class Trace:
    """Evaluations of some runs, mean over them at each step that all have; [n] each."""

    flops: Array
    tokens: Array
    seconds: Array
    loss: Array

    @property
    def axes(self) -> tuple[Array, Array, Array]:
        """What `AXES` names."""
        return self.flops, self.tokens, self.seconds


def trace_of(runs: tuple[Run, ...]) -> Trace | None:
    """The curve of held-out loss; None where it is one evaluation, or a run diverged."""
    by_step = [
        {p.step: p for p in run.curve if p.eval_bpb is not None and p.tokens > 0} for run in runs
    ]
    steps = sorted(set(by_step[0]).intersection(*by_step[1:]))
    if len(steps) < 2 or any(run.diverged for run in runs):
        return None
    rows = np.array([
        [(p.flops, p.tokens, p.train_s, p.eval_bpb) for p in map(points.get, steps) if p]
        for points in by_step
    ])  # fmt: skip
    return Trace(*np.moveaxis(rows.mean(0), -1, 0))


def targets_of(baseline: Trace) -> dict[float, float]:
    """Loss by part of the tokens; parts that lie before its first evaluation are left out."""
    logs, whole = np.log(baseline.tokens), float(baseline.tokens[-1])
    return {
        part: float(np.interp(log(part * whole), logs, baseline.loss))
        for part in PARTS
        if part * whole >= baseline.tokens[0]
    }


def targets(d: Derived) -> Markup | None:
    """A table a size; None where the baseline's runs have a single evaluation."""
    tables = [t for size in d.plan.sizes if (t := _of_size(d, size)) is not None]
    if not tables:
        return None
    note = lead(
        "What a variant spends until its held-out loss first is down to the baseline's, on the "
        "evaluations of its runs averaged over the seeds, beside it as a multiple of what the "
        "baseline spends. Between evaluations the loss is taken as straight in the logarithm; ≤: "
        "met at the first one already. Never: not by the end of its own training. Rates "
        "have not decayed midway, which holds for the baseline's losses there too; late curves are "
        "flat, so that noise moves a time by much, or makes it never. The gap is the mean "
        f"distance to the baseline's curve over log seconds, in bits per byte. {SHARED}"
    )
    return join(note, *tables)


def _of_size(d: Derived, size: str) -> Markup | None:
    base = d.base(size)
    trace = trace_of(base.runs) if base else None
    if trace is None:
        return None
    goals = targets_of(trace)
    arms = [arm for v in d.plan.variants if (arm := d.arm(v, size)) is not None]
    groups = [
        el("th", f"{text.bpb(goal, d.digits)} bpb, after {PARTS[part]}", colspan=len(AXES),
           scope="colgroup")
        for part, goal in goals.items()
    ]  # fmt: skip
    heads = [el("th", axis, scope="col", class_="num") for _ in goals for axis in AXES]
    head = el(
        "thead",
        el("tr", el("th"), *groups, el("th")),
        el("tr", el("th", size), *heads, el("th", "gap", scope="col", class_="num")),
    )
    rows = [_row(d, arm, trace, goals) for arm in arms]
    table = el("div", el("table", head, el("tbody", *rows), class_="verdicts"), class_="scroll")
    n = len(trace.loss)
    few = (
        f" So few cannot place a time better than between two of them: below {FEW}, read the "
        "numbers as such."
        if n < FEW
        else None
    )
    told = lead(f"Size {size}, {held(d.primary)}: {n} evaluations a run.", few)
    return el("div", told, table, class_="part")


def _row(d: Derived, arm: Arm, base: Trace, goals: dict[float, float]) -> Markup:
    head = el("th", variant_name(d, arm.variant), scope="row")
    mine = trace_of(arm.runs)
    if mine is None:
        why = "one evaluation" if isfinite(arm.bpb) else "diverged"
        return el("tr", head, el("td", why, class_="quiet", colspan=len(AXES) * len(goals) + 1))
    alone = [t for run in arm.runs if (t := trace_of((run,))) is not None]
    cells = [cell for goal in goals.values() for cell in _cells(mine, base, alone, goal)]
    gap = area_between(mine.seconds, mine.loss, base.seconds, base.loss)
    return el("tr", head, *cells, el("td", text.signed(gap, d.digits), class_="num"))


def _cells(mine: Trace, base: Trace, alone: list[Trace], goal: float) -> list[Markup]:
    got = sum(bool((t.loss <= goal).any()) for t in alone)
    title = f"by themselves {got} of {len(alone)} seeds reach it"
    cells: list[Markup] = []
    shown = (text.si, text.si, text.seconds)
    for x, base_x, show in zip(mine.axes, base.axes, shown, strict=True):
        at = time_to(goal, x, mine.loss)
        if not isfinite(at):
            cells.append(el("td", el("span", "never", class_="quiet"), class_="num", title=title))
            continue
        most = "≤ " if mine.loss[0] <= goal else ""
        ratio = f"{at / time_to(goal, base_x, base.loss):.2f}×"
        quiet = el("div", ratio, class_="quiet")
        cells.append(el("td", most, show(at), quiet, class_="num", title=title))
    return cells
