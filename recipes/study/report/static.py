"""A study's pictures for papers; matplotlib, the extra `figures`, is loaded here only."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from recipes.report.figures import GREY
from recipes.report.static import new_axes, write_drawn
from recipes.study.report.binds import roof, roof_words
from recipes.study.report.controls import beside_controls
from recipes.study.report.derive import Derived
from recipes.study.report.forest import Row
from recipes.study.report.headline import verdict_rows
from recipes.study.report.judged import gap_matrix
from recipes.study.report.ladder import Ladder
from recipes.study.report.names import held
from recipes.study.report.rates import parabola
from recipes.study.report.roofline import DECODING, TRAINING, workloads
from recipes.study.report.static_scaling import isoflop_axes, ladder_axes
from recipes.study.report.tuning import Sweep

FORMATS = ("pdf", "svg")


def write_study_figures(
    d: Derived, sweeps: Sequence[Sweep], ladders: Sequence[Ladder], out_dir: Path,
    formats: Sequence[str] = FORMATS,
) -> list[Path]:  # fmt: skip
    """Every picture of the page but those of its last part, which is of one comparison.

    Verdicts, controls, learning rates by size, the ladder by matching, best sizes per budget, the
    roofline, and precision gaps by size.

    Pictures without data are left out.

    Returns:
        The files, in order.

    Raises:
        ValueError: matplotlib is missing, or a format is unknown.
    """

    def drawn() -> dict[str, Any]:
        found: dict[str, Any] = {"verdicts": _verdicts(d), "controls": _controls(d)}
        for size, precision in dict.fromkeys((s.size, s.precision) for s in sweeps):
            mine = [s for s in sweeps if (s.size, s.precision) == (size, precision)]
            found[f"rates_{size}_{precision}"] = _rates(d, mine)
        found |= {f"ladder_{one.hold}": ladder_axes(d, one) for one in ladders}
        found |= {"isoflop": isoflop_axes(d), "roofline": _roofline(d)}
        found |= {f"precision_{size}": _gaps(d, size) for size in d.plan.sizes}
        return found

    return write_drawn(drawn, out_dir, formats)


def _verdicts(d: Derived) -> Any:
    base = d.plan.baseline.variant
    return _forest(d, verdict_rows(d), f"bits per byte above {base}")


def _controls(d: Derived) -> Any:
    """Ceilings below a line, as diamonds: a variant need not beat them."""
    beaten, ceilings = beside_controls(d)
    return _forest(d, beaten, "bits per byte above its control", ceilings)


def _forest(d: Derived, rows: Sequence[Row], what: str, apart: Sequence[Row] = ()) -> Any:
    """Differences at the primary matching of the largest complete size, hollow: not resolved."""
    upper = [row for row in rows if isfinite(row.found.value)]
    shown = [*upper, *(row for row in apart if isfinite(row.found.value))]
    if not shown:
        return None
    figure, axes = new_axes(5.2, 0.9 + 0.3 * len(shown))
    for y, row in enumerate(shown):
        x, colour = row.found, d.look.colours[row.variant]
        axes.errorbar(
            [x.value], [y], xerr=x.half, color=colour, marker="o" if y < len(upper) else "D",
            capsize=2, markerfacecolor=colour if x.resolved else "white",
        )  # fmt: skip
    if len(upper) < len(shown):
        axes.axhline(len(upper) - 0.5, color=GREY, linestyle=":", linewidth=1)
    axes.set_yticks(
        range(len(shown)), [f"{row.label} ({row.so or row.found.word})" for row in shown]
    )
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.axvline(0, color="#444", linewidth=0.8)
    axes.set(xlabel=f"{what}, size {d.top}, {held(d.primary)}")
    axes.grid(axis="y", visible=False)
    return figure


def _rates(d: Derived, sweeps: Sequence[Sweep]) -> Any:
    known = [y for s in sweeps for y in s.losses.values() if isfinite(y)]
    if not known:
        return None
    figure, axes = new_axes(5.2, 3.2)
    pad = 0.16 * (max(known) - min(known)) or 0.1
    for s in sweeps:
        colour = d.look.colours[s.variant]
        points = [(lr, y) for lr, y in s.losses.items() if isfinite(y)]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4,
                  linewidth=1, label=s.variant) if points else None  # fmt: skip
        lost = [lr for lr, y in s.losses.items() if not isfinite(y)]
        axes.plot(lost, [max(known) + pad] * len(lost), "x", color=colour)
        if s.best is not None and s.best.fitted:
            axes.plot(*parabola(s), color=colour, linestyle=":", linewidth=1)
            axes.plot([s.best.lr], [s.best.loss], "*", color=colour, markersize=10)
    axes.set_xscale("log", base=2)
    lrs = sorted({lr for s in sweeps for lr in s.losses})
    axes.set_xticks(lrs, [f"{lr:.3g}" for lr in lrs])
    axes.set(xlabel="peak learning rate", ylabel="bits per byte (x: diverged)")
    axes.legend(fontsize=7)
    return figure


def _roofline(d: Derived) -> Any:
    """On the roof what a variant may come to at most, a cross where its runs came to."""
    machine, found = d.results.machine, workloads(d, d.plan.variants)
    if machine is None or not found:
        return None
    figure, axes = new_axes(5.2, 3.4)
    x, y = roof(machine, found)
    axes.plot(x, y, color=GREY, linewidth=1.5)
    slope, flat = roof_words(machine)
    axes.annotate(slope, (x[0], y[0]), (10, -3), textcoords="offset points", va="top", fontsize=7)
    axes.annotate(flat, (x[1], y[1]), (0, 6), textcoords="offset points", fontsize=7)
    for w in found:
        colour, label = d.look.colours[w.variant], w.variant if w.of == DECODING else None
        at = w.bound.intensity
        axes.plot(at, w.bound.attainable, "o" if w.of == DECODING else "s", color=colour,
                  markersize=6, alpha=0.85, label=label)  # fmt: skip
        if w.reached is not None:
            axes.plot(at, w.reached, "x", color=colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(y=0.12)
    axes.set(xlabel=f"FLOPs per byte moved (○ {DECODING}, □ {TRAINING}, × reached)",
             ylabel="FLOPs per second")  # fmt: skip
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _gaps(d: Derived, size: str) -> Any:
    """Percent that each variant loses in each format."""
    variants, precisions, percent = gap_matrix(d, size)
    if not variants:
        return None
    values = [[float("nan") if x is None else x for x in row] for row in percent]
    reach = max((abs(x) for row in values for x in row if isfinite(x)), default=1.0) or 1.0
    figure, axes = new_axes(1.8 + 0.9 * len(precisions), 0.9 + 0.32 * len(variants))
    axes.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            found = d.gaps.get((variants[y], precisions[x], size))
            base = d.arm(variants[y], size, precision=d.reference)
            half = ""
            if found is not None and found.half and base is not None:
                half = f"\n±{100 * found.half / base.bpb:.2f}"
            told = f"{value:+.2f}{half}" if isfinite(value) else "diverged"
            axes.text(x, y, told, ha="center", va="center", fontsize=7)
    axes.set_xticks(range(len(precisions)), precisions)
    axes.set_yticks(range(len(variants)), variants)
    axes.set_title(f"% above {d.reference}, size {size}", fontsize=8, loc="left")
    axes.grid(visible=False)
    return figure
