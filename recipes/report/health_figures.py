"""The figures of routers: lines over training, as of memories, and experts chosen together."""

from collections.abc import Mapping, Sequence
from math import isfinite, nan

from recipes.report import text
from recipes.report.figures import Figure, meta
from recipes.report.layer_records import LayerHealth, LayerLoad
from recipes.report.records import Run
from recipes.report.study import Group, Study

TOP = 2.0  # times the level of chance, where the colours of pairs end
Layer = tuple[LayerLoad, LayerHealth]
# label: name in the curve, axis title, format of its ticks
MEASURES = {
    "Max violation": ("load/max_violation", "largest load over the mean, less 1", "~g"),
    "Choices kept": ("router/kept", "choices kept since the evaluation before", ".0%"),
    "Confidence": ("router/confidence", "mean of the largest probability", "~g"),
    "Router entropy": ("router/token_entropy", "entropy of a token's choice, 1 undecided", "~g"),
    "Near ties": ("router/near_ties", "choices that bfloat16 logits would change", ".2~%"),
    "Domains": ("load/domain_information", "information of the expert on the domain", "~g"),
    "Logit RMS": ("router/logit_rms", "root mean square of the logits", "~g"),
    "Dropped": ("load/dropped", "assignments dropped in training", ".1~%"),
}


def layers_of(run: Run) -> list[Layer]:
    """Load and health of each layer that has both."""
    loads = {load.layer: load for load in run.load}
    return [(loads[h.layer], h) for h in run.health if h.layer in loads]


# Over training


def lines(
    study: Study, groups: Sequence[Group], measures: Mapping[str, tuple[str, str, str]] = MEASURES
) -> Figure | None:
    """A view per measure, a line per run; None where no run has a curve of any."""
    views = []
    for label, (key, title, ticks) in measures.items():
        traces = [t for g in groups for run in g.runs if (t := _line(study, g, run, key, ticks))]
        if traces:
            layout = {
                "height": 340,
                "xaxis": {"title": {"text": "training tokens"}, "tickformat": "~s"},
                "yaxis": {"title": {"text": title}, "tickformat": ticks, "rangemode": "tozero"},
                "hovermode": "closest",
            }
            views.append({"label": label, "data": traces, "layout": layout})
    return {"views": views} if views else None


def _line(study: Study, g: Group, run: Run, key: str, ticks: str) -> Figure | None:
    known = [(p.tokens, p.router.get(key, nan)) for p in run.curve]
    points = [(x, y) for x, y in known if isfinite(y)]
    if not points:
        return None
    shown = "%{y:.2%}" if "%" in ticks else "%{y:.3f}"
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": text.safe(run.id),
        "x": [x for x, _ in points],
        "y": [round(y, 6) for _, y in points],
        "opacity": 1 if run is g.first else 0.45,
        "line": {
            "color": study.look.colours[g.variant],
            "dash": study.look.dashes[g.precision],
            "width": 2,
        },
        "marker": {"size": 4},
        "hovertemplate": f"<b>{text.safe(run.id)}</b><br>%{{x:.4s}} tokens<br>{shown}"
        "<extra></extra>",
        "meta": meta(g),
    }


# Pairs


def pairs_of(groups: Sequence[Group]) -> Figure | None:
    """Expert by expert, for a run and a layer that the reader picks; None with single choices."""
    views = [
        {"run": g.label, "layer": f"layer {load.layer}", **_heat(load, h)}
        for g in groups
        for load, h in layers_of(g.first)
        if h.experts_per_token > 1 and len(h.pairs) > 1
    ]
    return {"views": views, "selects": ["run", "layer"]} if views else None


def widest(figure: Figure) -> int:
    """Pixels across the cells of its largest map."""
    return max(_cell(n) * n for v in figure["views"] if (n := len(v["data"][0]["x"])))


def _cell(n: int) -> int:
    return max(10, min(34, 560 // n))


def _heat(load: LayerLoad, h: LayerHealth) -> Figure:
    chance = (h.experts_per_token - 1) / (len(load.experts) - 1)
    labels = [text.safe(load.experts[e]) for e in h.pair_experts]
    short = [label.removeprefix("ffn ") for label in labels]
    shares = h.co_activation
    places = list(range(len(labels)))
    axis = {
        "tickvals": places[:: -(-len(places) // 24)],
        "ticktext": short[:: -(-len(places) // 24)],
        "showgrid": False,
    }
    trace = {
        "type": "heatmap",
        "z": [[None if x is None else round(x / chance, 4) for x in row] for row in shares],
        "x": places,
        "y": places,
        "customdata": [
            [[labels[i], labels[j], None if x is None else round(x, 4)] for j, x in enumerate(row)]
            for i, row in enumerate(shares)
        ],
        "zmin": 0,
        "zmid": 1,
        "zmax": TOP,
        "xgap": 1,
        "ygap": 1,
        "colorbar": {
            "thickness": 10,
            "outlinewidth": 0,
            "tickvals": [0, 1, TOP],
            "ticktext": ["never", "chance", f"≥ {TOP:g} ×"],
        },
        "hoverongaps": False,
        "hovertemplate": "of the tokens of <b>%{customdata[0]}</b><br>%{customdata[2]:.1%} go to "
        "<b>%{customdata[1]}</b> too<br>%{z:.2f} × chance<extra></extra>",
        "meta": {"scale": "diverging"},
    }
    return {
        "data": [trace],
        "layout": {
            "height": 80 + _cell(len(labels)) * len(labels),
            "xaxis": {
                **axis,
                "title": {"text": "goes to this expert too"},
                "constrain": "domain",
                "constraintoward": "left",
            },
            "yaxis": {
                **axis,
                "title": {"text": "of an expert's tokens"},
                "autorange": "reversed",
                "scaleanchor": "x",
                "constrain": "domain",
            },
        },
    }
