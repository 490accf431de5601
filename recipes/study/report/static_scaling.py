"""Pictures for papers of a study's sizes: loss against compute, and the best size per budget."""

from typing import Any

from recipes.report import text
from recipes.report.static import new_axes
from recipes.study.report.derive import Derived
from recipes.study.report.isoflop import PARAMS, Valley, params_of, size_ticks, valleys
from recipes.study.report.ladder import Ladder
from recipes.study.report.names import held
from recipes.study.report.scaling import fitted_curve


def ladder_axes(d: Derived, one: Ladder) -> Any:
    """Means with bars, lines that join them or fitted curves; None with one size."""
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


def isoflop_axes(d: Derived) -> Any:
    """A parabola per variant and budget, a star at its minimum; None where no budget is shared."""
    found = valleys(d, d.primary)
    if not found:
        return None
    figure, axes = new_axes(5.2, 3.4)
    for valley in found:
        _valley(axes, valley, d.look.colours[valley.variant])
    for variant in dict.fromkeys(v.variant for v in found):
        colour = d.look.colours[variant]
        best = [v.best for v in found if v.variant == variant and v.best is not None]
        axes.plot([n for n, _ in best], [bpb for _, bpb in best], color=colour, linestyle="--",
                  linewidth=0.8, alpha=0.6)  # fmt: skip
        axes.plot([], [], color=colour, marker="o", markersize=4, linestyle=":", label=variant)
    first = found[0].variant  # its budgets are named; the others' are the same within 5 %
    for valley in (v for v in found if v.variant == first):
        end = valley.arms[-1]
        axes.annotate(text.si(valley.compute, "FLOP"), (params_of(end), end.bpb), (7, 0),
                      textcoords="offset points", va="center", fontsize=7)  # fmt: skip
    axes.set_xscale("log")
    ticks = size_ticks(found)
    axes.set_xticks(ticks, [text.si(n) for n in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel=f"{PARAMS}, {held(d.primary)}", ylabel="bits per byte, held-out")
    axes.legend(fontsize=7)
    return figure


def _valley(axes: Any, valley: Valley, colour: str) -> None:
    axes.errorbar(
        [params_of(a) for a in valley.arms], [a.bpb for a in valley.arms],
        yerr=[a.half or 0.0 for a in valley.arms],
        color=colour, marker="o", markersize=4, capsize=2, elinewidth=0.8, linestyle="none",
    )  # fmt: skip
    curve = valley.curve()
    if curve is not None:
        axes.plot(*curve, color=colour, linestyle=":", linewidth=1.1)
    if valley.best is not None:
        axes.plot(*valley.best, "*", color=colour, markersize=10)
