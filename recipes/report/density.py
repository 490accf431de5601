"""Which share of the neurons tokens ran: quality against it, and each layer against its target."""

from collections.abc import Callable, Sequence
from math import isfinite
from statistics import fmean

from recipes.report import text
from recipes.report.density_records import LayerDensity
from recipes.report.figures import Figure, meta, switched
from recipes.report.health_figures import lines
from recipes.report.layer_tables import Column, layer_table, mean_table
from recipes.report.probes import explorer
from recipes.report.study import Group, Study
from recipes.report.tables import num_cell
from recipes.report.text import Markup, join, lead

# label: name in the curve, axis title, format of its ticks
MEASURES = {
    "Neurons that run": ("density/active", "share of the neurons, mean over the layers", ".1~%"),
    "Over the target": ("density/over_target", "what ran over what was asked", "~g"),
}


COLUMNS: tuple[Column[LayerDensity], ...] = (
    Column("Target", "share of the neurons that a token is to run", lambda x: x.target,
           lambda x: text.percent(x, 2)),
    Column("Ran", "share of the neurons that a held-out token ran, mean", lambda x: x.active,
           lambda x: text.percent(x, 2)),
    Column("Over", "what ran over the target", lambda x: x.over_target, lambda x: f"{x:.2f}"),
    Column("Neurons", "that a held-out token ran, mean", lambda x: x.active * x.n_neurons,
           lambda x: f"{x:,.1f}"),
)  # fmt: skip


def density(study: Study, legend: Markup) -> Markup | None:
    """Pictures and tables of the runs whose tokens choose neurons; None where none does.

    legend: of variants and precisions.
    """
    groups = [g for g in study.groups if g.first.density]
    if not groups:
        return None
    note = lead(
        "What a token runs of each layer. A threshold of mean and deviation meets its target for "
        "normal scores; what it really kept of held-out tokens is counted here."
    )
    over_training = lines(study, groups, MEASURES)
    return join(
        note,
        legend,
        explorer(against_quality(study, groups), "density-quality", "Quality against density"),
        explorer(by_layer(study, groups), "density-layers", "Share of the neurons by layer"),
        mean_table(
            study,
            groups,
            _recorded,
            COLUMNS,
            {"Bits per byte": lambda g: num_cell(g.bpb, text.bpb(g.bpb, study.digits))},
        ),
        layer_table(
            study,
            groups,
            _recorded,
            COLUMNS,
            lambda x: x.active_by_domain,
            "share of the neurons",
            lambda x: text.percent(x, 2),
        ),
        switched(
            over_training, legend, "density-lines", "Density over training", "Density over training"
        )
        if over_training
        else None,
    )


def ran(group: Group) -> float:
    """Share of the neurons that a token runs, mean over the layers of all seeds."""
    return fmean(x.active for run in group.runs for x in run.density)


# Figures


def against_quality(study: Study, groups: Sequence[Group]) -> Figure:
    """Bits per byte over the share that ran, a point for each group; groups that run all neurons
    are lines across."""
    data = [_point(study, g) for g in groups if isfinite(g.bpb)]
    whole = [g for g in study.groups if not g.first.density and isfinite(g.bpb)]
    low, high = 0.8 * min(map(ran, groups)), 1.25 * max(map(ran, groups))
    data += [_level(study, g, low, high) for g in whole]
    layout = {
        "height": 360,
        "xaxis": {
            "title": {"text": "share of the neurons that ran"}, "type": "log", "tickformat": ".1~%",
        },
        "yaxis": {"title": {"text": "bits per byte"}},
        "hovermode": "closest",
    }  # fmt: skip
    return {"views": [{"data": data, "layout": layout}], "selects": []}


def _point(study: Study, g: Group) -> Figure:
    half = study.half(g)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": text.safe(g.label),
        "x": [round(ran(g), 5)],
        "y": [round(g.bpb, 6)],
        "error_y": {"type": "data", "array": [round(half or 0.0, 6)], "visible": half is not None},
        "marker": {"color": study.look.colours[g.variant], "size": 10},
        "hovertemplate": f"<b>{text.safe(g.label)}</b><br>%{{x:.2%}} of the neurons"
        "<br>%{y:.4f} bits per byte<extra></extra>",
        "meta": meta(g),
    }


def _level(study: Study, g: Group, low: float, high: float) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": text.safe(g.label),
        "x": [round(low, 5), round(min(high, 1.0), 5)],
        "y": [round(g.bpb, 6)] * 2,
        "line": {"color": study.look.colours[g.variant], "dash": "dot", "width": 1.5},
        "hovertemplate": f"<b>{text.safe(g.label)}</b>, all neurons<br>%{{y:.4f}} bits per byte"
        "<extra></extra>",
        "meta": meta(g),
    }


def by_layer(study: Study, groups: Sequence[Group]) -> Figure:
    """What ran of each layer, a line for each group, its target dotted; as shares or over it."""
    views = []
    for rows, of, ticks in (
        ("share that ran", lambda x: x.active, ".1~%"),
        ("over the target", lambda x: x.over_target, "~g"),
    ):
        data = [_layers(study, g, of, "solid") for g in groups]
        if rows == "share that ran":
            data += [_layers(study, g, lambda x: x.target, "dot") for g in groups]
        layout = {
            "height": 340,
            "xaxis": {"title": {"text": "layer"}, "dtick": 1},
            "yaxis": {"title": {"text": rows}, "tickformat": ticks, "rangemode": "tozero"},
            "hovermode": "closest",
        }
        views.append({"rows": rows, "data": data, "layout": layout})
    return {"views": views, "selects": ["rows"]}


def _layers(study: Study, g: Group, of: Callable[[LayerDensity], float], dash: str) -> Figure:
    told = "target" if dash == "dot" else "ran"
    return {
        "type": "scatter",
        "mode": "lines" if dash == "dot" else "lines+markers",
        "name": text.safe(g.label),
        "x": [x.layer for x in g.first.density],
        "y": [round(of(x), 5) for x in g.first.density],
        "line": {"color": study.look.colours[g.variant], "dash": dash, "width": 2},
        "hovertemplate": f"<b>{text.safe(g.label)}</b><br>layer %{{x}}, {told} %{{y:.4f}}"
        "<extra></extra>",
        "meta": meta(g),
    }


# Tables


def _recorded(group: Group) -> Sequence[LayerDensity]:
    return group.first.density
