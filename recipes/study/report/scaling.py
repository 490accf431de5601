"""Loss against compute, its fits, and what leverage they say."""

from collections.abc import Callable
from math import isfinite

import numpy as np

from recipes.report import text
from recipes.report.figures import Figure, plot, switched
from recipes.report.tables import num_cell, sort_head, sortable
from recipes.report.text import Markup, el, join, lead
from recipes.statistics.checks import bend
from recipes.study.report.derive import Arm, Derived
from recipes.study.report.holdout import held_out
from recipes.study.report.isoflop import best_sizes
from recipes.study.report.ladder import LEAST, Ladder
from recipes.study.report.law import parameters_and_tokens
from recipes.study.report.names import held, legend, variant_name
from recipes.study.report.rule import leverage_words
from recipes.study.report.targets import SHARED

POINTS = 41  # of a fitted curve
PAST = 1.5  # times the largest budget, up to which it is drawn


def scaling(d: Derived, ladders: list[Ladder], seconds: Ladder) -> Markup | None:
    """Pictures, leverages, residuals; None with one size, which is no ladder.

    ladders: over training FLOPs, one per matching; seconds: the primary one over time.
    """
    if len(d.plan.sizes) < 2 or not any(one.arms for one in ladders):
        return None
    note = lead(
        "Training FLOPs count the head and the attention's scores. Bars are 95\u00a0% intervals of "
        "the mean over the seeds. "
    )
    fits = [_fit_words(one) for one in ladders]
    views = [view(d, one) for one in ladders]
    keys = legend(d, d.plan.variants)
    shown = {"views": views, "tools": True}
    return join(
        note,
        *fits,
        switched(shown, keys, "study-ladder", "By matching", "Loss against training FLOPs"),
        _leverages(d, ladders, seconds),
        held_out(d, ladders),
        _residuals(d, ladders[0]),
        best_sizes(d),
        parameters_and_tokens(d),
    )


def _fit_words(one: Ladder) -> Markup:
    """The fitted laws, or why there are none."""
    what = f"At {held(one.hold)}"
    lost = ", ".join(f"{variant} at {size}" for variant, size in one.left_out)
    gone = f" A run diverged, so left out: {lost}." if lost else None
    if one.fit is None:
        return lead(f"{what}: {one.why}; the lines only join the means.", gone)
    few = [v for v in one.arms if v not in one.fit.names]
    told = [f"{what}, bits per byte = E + A C^-a with one E for all curves. "]
    if not one.fit.settled:
        told.append("The starts of the fit disagree: do not trust it. ")
    if few:
        told.append(f"Fewer than {LEAST} budgets, so no curve: {', '.join(few)}. ")
    told += [f"No leverage of {v}: {why}. " for v, why in one.refused.items()]
    if one.sigma is not None:
        told.append(
            "Some sizes have fewer than three seeds: intervals are of the baseline's noise added "
            "to every run, not of runs drawn again."
        )
    laws = (el("li", v, ": ", el("code", one.fit.frontier(v).formula())) for v in one.fit.names)
    return join(lead(*told, gone), el("details", el("summary", "The fitted laws"), el("ul", *laws)))


def view(d: Derived, one: Ladder) -> Figure:
    """Means with bars, lines that join them or fitted curves."""
    traces = [t for variant, arms in one.arms.items() for t in _curve(d, one, variant, arms)]
    layout = {
        "height": 460,
        "xaxis": {"title": {"text": "training FLOPs (matmuls)"}, "type": "log",
                  "exponentformat": "power", "dtick": 1 if _wide(one) else "D1"},
        "yaxis": {"title": {"text": "bits per byte, held-out"}},
    }  # fmt: skip
    return {"label": held(one.hold), "data": traces, "layout": layout}


def _wide(one: Ladder) -> bool:
    flops = [a.flops for arms in one.arms.values() for a in arms]
    return max(flops) / min(flops) > 100


def _curve(d: Derived, one: Ladder, variant: str, arms: tuple[Arm, ...]) -> list[Figure]:
    colour, name = d.look.colours[variant], text.safe(variant)
    meta = {"variant": variant, "precision": d.plan.baseline.precision}
    fitted = one.fit is not None and variant in one.fit.names
    points = {
        "type": "scatter", "mode": "markers" if fitted else "lines+markers", "name": name,
        "x": [a.flops for a in arms], "y": [a.bpb for a in arms],
        "error_y": {"array": [a.half or 0.0 for a in arms], "color": colour, "thickness": 1.2,
                    "width": 4},
        "text": [f"{a.size}, {len(a.runs)} seed{'s' * (len(a.runs) > 1)}" for a in arms],
        "line": {"color": colour, "width": 1.5},
        "marker": {"size": 9, "color": colour},
        "hovertemplate": f"<b>{name}</b>, %{{text}}<br>%{{y:.{d.digits}f}} bpb"
        "<br>%{x:.3g} FLOPs<extra></extra>",
        "meta": meta,
    }  # fmt: skip
    if one.fit is None or not fitted:
        return [points]
    x, y = fitted_curve(one, variant)
    line = {
        "type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "hoverinfo": "skip",
        "line": {"color": colour, "width": 1.5, "dash": "dot"}, "meta": meta,
    }  # fmt: skip
    return [line, points]


def fitted_curve(one: Ladder, variant: str) -> tuple[list[float], list[float]]:
    """A little past the largest budget."""
    assert one.fit is not None, "the caller asks for one that was fitted"
    flops = [a.flops for a in one.arms[variant]]
    x = np.geomspace(min(flops), PAST * max(flops), POINTS)
    return x.tolist(), one.fit.frontier(variant).loss(x).tolist()


def _leverages(d: Derived, ladders: list[Ladder], seconds: Ladder) -> Markup | None:
    rows = [
        _leverage_row(d, one, v, "compute", text.si) for one in ladders for v in one.leverages
    ] + [_leverage_row(d, seconds, v, "time", text.seconds) for v in seconds.leverages]
    if not rows:
        return None
    heads = [
        sort_head("Variant", False),
        sort_head("Held", False),
        sort_head("Leverage of", False),
        sort_head("Leverage", title="what the baseline must spend for the same loss, over what the "
                  "variant spends; above 1 favours the variant"),
        sort_head("95 % interval", False, title="percentiles of the bootstrap over runs"),
        sort_head("At", title="what the variant spends at its largest size"),
        sort_head("Gap", title="of the curves at equal spending, percent of the loss"),
        sort_head("Notes", False),
    ]  # fmt: skip
    note = lead(
        "From both fitted curves with one floor, at the variant's largest budget. A value read "
        "more than twice outside the baseline's budgets is extrapolated, and not claimed. ",
        SHARED if seconds.leverages else None,
    )
    return join(el("h3", "Leverage"), note, sortable(heads, rows))


def _leverage_row(
    d: Derived, one: Ladder, variant: str, of: str, shown: Callable[[float], str]
) -> Markup:
    found = one.leverages[variant]
    flags = leverage_words(one, variant).partition("], ")[2]
    word = el("span", flags, class_="chip worse") if found.extrapolated else flags
    percent = text.signed(100 * found.gap_worth, 0)
    worth = f"worth {percent} % of the {of}, by the slope of the baseline's curve there"
    return el(
        "tr",
        el("td", variant_name(d, variant)),
        el("td", held(one.hold)),
        el("td", of),
        num_cell(found.value, f"{found.value:.3g}×" if isfinite(found.value) else "∞"),
        el("td", f"{found.interval.low:.3g} to {found.interval.high:.3g}"),
        num_cell(found.x, shown(found.x)),
        num_cell(found.gap_percent, f"{text.signed(found.gap_percent, 2)}\u00a0%", worth),
        el("td", word),
    )


def _residuals(d: Derived, one: Ladder) -> Markup | None:
    """Measured over fitted, against the compute: a bend means a wrong form."""
    if one.fit is None:
        return None
    traces, bends = [], []
    for (variant, left), runs in zip(one.fit.residuals.items(), one.fit.runs, strict=True):
        colour, name = d.look.colours[variant], text.safe(variant)
        traces.append({
            "type": "scatter", "mode": "markers", "name": name, "x": runs.x.tolist(),
            "y": (100 * left).tolist(), "marker": {"size": 7, "color": colour},
            "meta": {"variant": variant, "precision": d.plan.baseline.precision},
            "hovertemplate": f"<b>{name}</b><br>%{{y:.3f}} %<extra></extra>",
        })  # fmt: skip
        if len(np.unique(runs.x)) >= LEAST and len(runs.loss) > LEAST:
            found = bend(left, runs.x)
            if found.bent:
                bends.append(f"{variant} (p {found.p:.2g})")
    layout = {
        "height": 280,
        "xaxis": {"title": {"text": "training FLOPs (matmuls)"}, "type": "log"},
        "yaxis": {"title": {"text": "measured over fitted, %"}, "zeroline": True},
    }
    told = "The residuals do not bend beyond their noise."
    if bends:
        told = f"The residuals bend, so the form is wrong for: {', '.join(bends)}."
    picture = plot({"views": [{"data": traces, "layout": layout}]}, "study-residuals", "Residuals")
    return join(el("h3", "Residuals"), lead(told), picture)
