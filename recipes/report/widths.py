"""Submodels of nested FFNs: quality against size, beside models that were trained alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from recipes.report import text
from recipes.report.figures import Figure, meta, switched
from recipes.report.headline import name
from recipes.report.study import Group, Study
from recipes.report.tables import num_cell, sort_head, sortable
from recipes.report.text import Markup, el, join, lead
from recipes.report.width_records import Submodel

SAME = 0.01  # relative distance of FLOPs below which a model trained alone is as large


@dataclass(frozen=True)
class Place:
    """A submodel of a group, or the whole model of one that has none: means over the seeds."""

    bpb: float | None  # None: no number in some run
    flops: float
    nonembedding_params: float
    active_params: float
    submodel: Submodel | None = None  # of the first run

    @property
    def label(self) -> str:
        """For a reader."""
        if self.submodel is None:
            return "trained alone"
        return f"{'' if self.submodel.trained else 'mixture '}{self.submodel.label}"


MEASURES: dict[str, tuple[str, Callable[[Place], float]]] = {
    "FLOPs per token": ("matmul FLOPs per token, forward", lambda p: p.flops),
    "Parameters": ("parameters of the submodel, embedding left out",
                   lambda p: p.nonembedding_params),
    "Active parameters": ("parameters that one token touches", lambda p: p.active_params),
}  # fmt: skip


def widths(study: Study, legend: Markup) -> Markup | None:
    """The curve of each nested run and a table; None where no run trained granularities.

    legend: of variants and precisions, for the curves.
    """
    nested = [g for g in study.groups if g.first.widths]
    if not nested:
        return None
    note = lead(
        "What the submodels of one training are worth. Filled points are the widths that were "
        "trained, open ones mixtures of two, the wider in the last layers; single points are "
        "models of the comparison that were trained alone. Runs may differ in tokens: the table "
        "of all runs says in how many."
    )
    figure = quality(study)
    return join(
        note,
        switched(figure, legend, "widths", "Quality by width", "Bits per byte by width"),
        _table(study, nested),
    )


def places(g: Group) -> list[Place]:
    """What a group has to show: each submodel from the smallest, or itself."""
    cost = g.first.cost
    if not g.first.widths:
        active = cost.active_params
        return [Place(g.bpb, cost.flops_per_token, cost.nonembedding_params, active)]
    by_run = [{s.widths: s for s in run.widths} for run in g.runs]
    return [
        Place(
            _mean([found[s.widths].bpb if s.widths in found else None for found in by_run]),
            s.flops_per_token,
            s.nonembedding_params,
            s.active_params,
            s,
        )
        for s in sorted(g.first.widths, key=lambda s: s.flops_per_token)
    ]


def _mean(found: Sequence[float | None]) -> float | None:
    known = [x for x in found if x is not None]
    return fmean(known) if len(known) == len(found) else None


# Figure


def quality(study: Study) -> Figure:
    """A view per measure of size, a trace per group."""
    views = []
    for label, (title, of) in MEASURES.items():
        layout = {
            "height": 420,
            "xaxis": {"title": {"text": title}, "tickformat": "~s"},
            "yaxis": {"title": {"text": "bits per byte, held-out"}},
            "hovermode": "closest",
        }
        data = [_trace(study, g, title, of) for g in study.groups]
        views.append({"label": label, "data": data, "layout": layout})
    return {"views": views, "tools": True}


def _trace(study: Study, g: Group, title: str, of: Callable[[Place], float]) -> Figure:
    found = places(g)
    colour, symbol = study.look.colours[g.variant], study.look.markers[g.precision]
    filled = symbol.removesuffix("-open")
    trained = [p.submodel is None or p.submodel.trained for p in found]
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(found) > 1 else "markers",
        "name": text.safe(g.label),
        "x": [of(p) for p in found],
        "y": [p.bpb for p in found],
        "text": [text.safe(p.label) for p in found],
        "line": {"color": colour, "dash": study.look.dashes[g.precision], "width": 2},
        "marker": {
            "color": colour,
            "size": [11 if whole else 8 for whole in trained],
            "symbol": [filled if whole else f"{filled}-open" for whole in trained],
            "line": {"width": 2, "color": colour},
        },
        "hovertemplate": f"<b>{text.safe(g.label)}</b>, %{{text}}<br>%{{y:.{study.digits}f}} bpb"
        f"<br>%{{x:.4s}} {title}<extra></extra>",
        "meta": meta(g),
    }


# Table


def _table(study: Study, nested: Sequence[Group]) -> Markup:
    """One row per submodel."""
    asks = any(s.accuracy is not None for g in nested for s in g.first.widths)
    heads = [
        sort_head("Variant", False),
        sort_head("Widths", title="hidden numbers of every layer; of a mixture, how many have "
                  "which, the first layers first"),
        sort_head("Bits per byte", title="held-out, mean over the seeds"),
        *([sort_head("Accuracy", title="of the first seed")] if asks else []),
        sort_head("To one trained alone", title="bits per byte over those of the model of the "
                  "same FLOPs and precision that was trained alone, where there is one"),
        sort_head("Parameters", title="of the submodel"),
        sort_head("Active", title="parameters that one token touches"),
        sort_head("FLOPs/token", title="matmuls, forward"),
        sort_head("Agreement", title="positions whose likeliest token is the widest model's"),
        sort_head("KL", title="of the widest model's next token to this one's, nats"),
    ]  # fmt: skip
    rows = [_row(study, g, p, asks) for g in nested for p in places(g)]
    return sortable(heads, rows)


def _row(study: Study, g: Group, p: Place, asks: bool) -> Markup:
    s = p.submodel
    assert s is not None, "the caller shows nested groups alone"
    alone = _alone(study, g, p)
    gap = None if alone is None or p.bpb is None else p.bpb - alone.bpb
    other = None if alone is None else f"against {alone.label}"
    return el(
        "tr",
        el("td", name(study, g), data_value=f"{g.label} {p.flops:015.1f}"),
        num_cell(p.flops, p.label),
        num_cell(p.bpb, text.bpb(p.bpb or 0.0, study.digits)),
        *([num_cell(s.accuracy, text.percent(s.accuracy or 0.0))] if asks else []),
        num_cell(gap, text.signed(gap or 0.0, study.digits), other),
        num_cell(s.params, text.si(s.params), text.exact(s.params)),
        num_cell(s.active_params, text.si(s.active_params), text.exact(s.active_params)),
        num_cell(p.flops, text.si(p.flops), text.exact(p.flops)),
        num_cell(s.agreement, text.percent(s.agreement)),
        num_cell(s.kl, f"{s.kl or 0.0:.4f}"),
        class_="base" if s.trained else None,
    )


def _alone(study: Study, g: Group, p: Place) -> Group | None:
    """The group trained alone that is as large, in the same precision; None where there is none."""
    others = [
        o
        for o in study.groups
        if not o.first.widths
        and o.precision == g.precision
        and abs(o.first.cost.flops_per_token - p.flops) <= SAME * p.flops
    ]
    return min(others, key=lambda o: abs(o.first.cost.flops_per_token - p.flops), default=None)
