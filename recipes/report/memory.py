"""How memory layers used their rows: figures of each layer, over training, and how even the use."""

from collections.abc import Sequence

from recipes.report import text
from recipes.report.figures import Figure, meta, switched
from recipes.report.health_figures import lines
from recipes.report.layer_records import LayerMemory
from recipes.report.layer_tables import Column, layer_table, mean_table
from recipes.report.probes import explorer
from recipes.report.study import Group, Study
from recipes.report.text import Markup, el, join, lead

TOP = 1 / 32  # of the rows, whose share of the reads the table has
# label: name in the curve, axis title, format of its ticks
MEASURES = {
    "Rows used": ("memory/used", "share of the rows that were read", ".0%"),
    "Unevenness": ("memory/kl", "KL of their use to an even one, nats", "~g"),
    "Recall": ("memory/recall", "of the best slots over all pairs of keys", ".0%"),
    "Core gap": ("memory/core_gap", "1 − second over first singular value", "~g"),
    "Domains": ("memory/domain_information", "information of the row on the domain", "~g"),
}


def _number(x: float) -> str:
    return f"{x:.3f}"


COLUMNS: tuple[Column[LayerMemory], ...] = (
    Column("Rows", "that the layer sees", lambda m: m.n_rows, lambda x: f"{x:,.0f}"),
    Column("Reads a row", "of the held-out tokens, mean over the rows",
           lambda m: m.reads / m.n_rows, lambda x: f"{x:.3g}"),
    Column("Used", "share of the rows that were read at least once", lambda m: m.used,
           text.percent),
    Column("KL", "of their use to an even one, in nats; 0 when even", lambda m: m.kl),
    Column(f"Top {TOP:.0%}", "share of the reads that fall on the most read rows",
           lambda m: m.top(TOP), text.percent),
    Column("Domains", "what the row tells of the domain: mutual information over its largest "
           "possible; too high where reads are few", lambda m: m.domain_information),
    Column("Recall", "of the best slots over all pairs of keys, on a sample of tokens; none where "
           "the search is exact", lambda m: m.recall, text.percent),
    Column("Core gap", "1 less the second over the first singular value of the cores' sum: 1 where "
           "the first search ranks as the cores do", lambda m: m.core_gap),
)  # fmt: skip


def memory(study: Study, legend: Markup) -> Markup | None:
    """Tables and curves of the runs with memory layers; None where none has one.

    legend: of variants and precisions, for the curves.
    """
    groups = [g for g in study.groups if g.first.memory]
    if not groups:
        return None
    note = lead(
        "How memory layers used their rows for held-out text, means over the layers. Tokens that "
        "read few rows leave many unread: no more can be in use than there are reads."
    )
    over_training = lines(study, groups, MEASURES)
    return join(
        note,
        mean_table(study, groups, _layers, COLUMNS),
        layer_table(
            study,
            groups,
            _layers,
            COLUMNS,
            lambda m: m.used_by_domain,
            "share of the rows read",
            text.percent,
            {"Pool": lambda m: m.pool or "its own"},
        ),
        switched(
            over_training,
            legend,
            "memory-lines",
            "Memory over training",
            "Figures of memory layers over training",
        )
        if over_training
        else None,
        _even(study, groups, legend),
    )


# Tables


def _layers(group: Group) -> Sequence[LayerMemory]:
    return group.first.memory


# Figures


def _even(study: Study, groups: Sequence[Group], legend: Markup) -> Markup:
    note = lead(
        "The rows in order of how often they were read, against the share of all reads that fall "
        "on them. The dotted line is an even use."
    )
    figure = concentration(study, groups)
    return join(
        el("h3", "How even the use is"),
        note,
        legend,
        explorer(figure, "memory-even", "Share of reads on the most read rows"),
    )


def concentration(study: Study, groups: Sequence[Group]) -> Figure:
    """A view per layer, a line per group that has a memory there."""
    layers = sorted({m.layer for g in groups for m in g.first.memory})
    views = []
    for layer in layers:
        traces = [_line(study, g, m) for g in groups for m in g.first.memory if m.layer == layer]
        views.append({"layer": f"layer {layer}", "data": [_evenly(), *traces], "layout": _layout()})
    return {"views": views, "selects": ["layer"]}


def _line(study: Study, g: Group, m: LayerMemory) -> Figure:
    places = len(m.concentration) - 1
    label = text.safe(g.first.id)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": label,
        "x": [round(i / places, 5) for i in range(places + 1)],
        "y": [round(y, 5) for y in m.concentration],
        "line": {
            "color": study.look.colours[g.variant],
            "dash": study.look.dashes[g.precision],
            "width": 2,
        },
        "hovertemplate": f"<b>{label}</b><br>%{{y:.1%}} of the reads<br>on %{{x:.1%}} of the rows"
        "<extra></extra>",
        "meta": meta(g),
    }


def _evenly() -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [0, 1],
        "y": [0, 1],
        "line": {"color": "#8a8a8a", "dash": "dot", "width": 1},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _layout() -> Figure:
    return {
        "height": 340,
        "xaxis": {"title": {"text": "rows, the most read first"}, "tickformat": ".0%"},
        "yaxis": {
            "title": {"text": "share of the reads"}, "tickformat": ".0%", "range": [0, 1.02],
        },
        "hovermode": "closest",
    }  # fmt: skip
