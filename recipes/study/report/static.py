"""A study's pictures for papers; matplotlib, the extra `figures`, is loaded here only."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from recipes.report.static import new_axes, write_drawn
from recipes.study.report.derive import Derived
from recipes.study.report.headline import held
from recipes.study.report.judged import gap_matrix
from recipes.study.report.ladder import Ladder
from recipes.study.report.rates import parabola
from recipes.study.report.scaling import fitted_curve
from recipes.study.report.tuning import Sweep

FORMATS = ("pdf", "svg")


def write_study_figures(
    d: Derived, sweeps: Sequence[Sweep], ladders: Sequence[Ladder], out_dir: Path,
    formats: Sequence[str] = FORMATS,
) -> list[Path]:  # fmt: skip
    """Verdicts, learning rates by size, the ladder by matching and precision gaps by size.

    Pictures without data are left out.

    Returns:
        The files, in order.

    Raises:
        ValueError: matplotlib is missing, or a format is unknown.
    """

    def drawn() -> dict[str, Any]:
        found: dict[str, Any] = {"verdicts": _verdicts(d)}
        for size, precision in dict.fromkeys((s.size, s.precision) for s in sweeps):
            mine = [s for s in sweeps if (s.size, s.precision) == (size, precision)]
            found[f"rates_{size}_{precision}"] = _rates(d, mine)
        found |= {f"ladder_{one.hold}": _ladder(d, one) for one in ladders}
        found |= {f"precision_{size}": _gaps(d, size) for size in d.plan.sizes}
        return found

    return write_drawn(drawn, out_dir, formats)


def _verdicts(d: Derived) -> Any:
    """Differences at the primary matching of the largest complete size, hollow: not resolved."""
    rows = [
        (v, x)
        for v in d.others
        if (x := d.table.get((v, d.top or "", d.primary))) and isfinite(x.value)
    ]
    if not rows:
        return None
    figure, axes = new_axes(5.2, 0.9 + 0.3 * len(rows))
    for y, (variant, x) in enumerate(rows):
        colour = d.look.colours[variant]
        axes.errorbar(
            [x.value], [y], xerr=x.half, color=colour, marker="o", capsize=2,
            markerfacecolor=colour if x.resolved else "white",
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{v} ({x.word})" for v, x in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(0, color="#444", linewidth=0.8)
    base = d.plan.baseline.variant
    axes.set(xlabel=f"bits per byte above {base}, size {d.top}, {held(d.primary)}")
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


def _ladder(d: Derived, one: Ladder) -> Any:
    if len(d.plan.sizes) < 2 or not one.arms:
        return None
    figure, axes = new_axes(5.2, 3.4)
    for variant, arms in one.arms.items():
        colour = d.look.colours[variant]
        fitted = one.fit is not None and variant in one.fit.names
        axes.errorbar(
            [a.flops for a in arms], [a.bpb for a in arms], yerr=[a.half or 0.0 for a in arms],
            color=colour, marker="o", markersize=5, capsize=2, elinewidth=0.8, label=variant,
            linestyle="none" if fitted else "-", linewidth=1,
        )  # fmt: skip
        if fitted:
            axes.plot(*fitted_curve(one, variant), color=colour, linestyle=":", linewidth=1.2)
    axes.set_xscale("log")
    axes.set(xlabel=f"training FLOPs, {held(one.hold)}", ylabel="bits per byte, held-out")
    axes.legend(fontsize=7)
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
