"""How often tokens went through layers that loop: by layer and domain, over training, by token."""

from collections.abc import Sequence

from recipes.report import text
from recipes.report.depth_records import LayerLoops, TokenLoops, mean_loops
from recipes.report.figures import Figure, meta, switched
from recipes.report.health_figures import lines
from recipes.report.layer_tables import Column, layer_table, mean_table
from recipes.report.probes import explorer
from recipes.report.study import Group, Study
from recipes.report.text import Markup, el, join, lead, swatch

RAMP = ("#b9cfee", "#2a4f8f")  # of one loop, and of the most
# label: name in the curve, axis title, format of its ticks
MEASURES = {
    "Mean loops": ("loops/mean", "loops of a token, mean over the layers", "~g"),
    "Width": ("loops/width", "weight of the width path, mean over the layers", "~g"),
}
SHOWN = {" ": "space", "\n": "new line", "\t": "tab", "\r": "return"}


def _number(x: float) -> str:
    return f"{x:.2f}"


COLUMNS: tuple[Column[LayerLoops], ...] = (
    Column("Loops", "of a held-out token, mean", lambda x: x.mean),
    Column("Once", "share of the tokens that loop once", lambda x: x.counts[0] / sum(x.counts),
           text.percent),
    Column("Deepest", "share of the tokens that loop as often as they may",
           lambda x: x.counts[-1] / sum(x.counts), text.percent),
    Column("Width", "weight of the width path, mean over the tokens; none where there is no such "
           "path", lambda x: x.width),
)  # fmt: skip


def depth(study: Study, legend: Markup) -> Markup | None:
    """Pictures and tables of the runs with layers that loop by their tokens; None where none has.

    legend: of variants and precisions, for the curves.
    """
    groups = [g for g in study.groups if g.first.loops]
    if not groups:
        return None
    note = lead(
        "How often held-out tokens went through each layer that decides by the token. A token "
        "stops where its layer predicted; what it costs grows with its loops."
    )
    over_training = lines(study, groups, MEASURES)
    return join(
        note,
        _key(max(x.most_loops for g in groups for x in g.first.loops)),
        explorer(histogram(groups), "depth-bars", "Share of the tokens by their loops"),
        mean_table(study, groups, _layers, COLUMNS),
        layer_table(study, groups, _layers, COLUMNS, _mean_by_domain, "mean loops", _number),
        _tokens(groups),
        switched(over_training, legend, "depth-lines", "Depth over training", "Loops over training")
        if over_training
        else None,
    )


# Figures


def histogram(groups: Sequence[Group]) -> Figure:
    """Stacked shares of the tokens by loops, a bar per layer or per domain; a view for each run."""
    views = []
    for g in groups:
        rows = [(f"layer {x.layer}", x.counts) for x in g.first.loops]
        views.append({"run": g.label, "rows": "layers", **_bars(g, rows)})
        domains = _by_domain(g.first.loops)
        if domains:
            views.append({"run": g.label, "rows": "domains", **_bars(g, list(domains.items()))})
    return {"views": views, "selects": ["run", "rows"]}


def _by_domain(layers: Sequence[LayerLoops]) -> dict[str, list[float]]:
    """Tokens by loops over all layers, of each domain; layers of fewer loops add to the first."""
    most, found = max(x.most_loops for x in layers), dict[str, list[float]]()
    for x in layers:
        for domain, counts in x.counts_by_domain.items():
            row = found.setdefault(domain, [0.0] * most)
            for i, n in enumerate(counts):
                row[i] += n
    return found


def _bars(g: Group, rows: Sequence[tuple[str, Sequence[float]]]) -> Figure:
    most = max(len(counts) for _, counts in rows)
    labels = [text.safe(label) for label, _ in rows]
    data = []
    for i in range(most):
        tokens = [counts[i] if i < len(counts) else 0.0 for _, counts in rows]
        shares = [n / (sum(counts) or 1) for n, (_, counts) in zip(tokens, rows, strict=True)]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": times(i + 1),
                "x": [round(share, 5) for share in shares],
                "y": labels,
                "customdata": [[round(n), round(mean_loops(c), 3)]
                               for n, (_, c) in zip(tokens, rows, strict=True)],
                "marker": {"color": tint(i + 1, most)},
                "hovertemplate": f"<b>%{{y}}</b><br>%{{x:.1%}} of the tokens loop {times(i + 1)}"
                "<br>%{customdata[0]:,} tokens, mean loops %{customdata[1]:.2f}<extra></extra>",
                "meta": meta(g),
            }
        )  # fmt: skip
    layout = {
        "height": 90 + 30 * len(rows),
        "barmode": "stack",
        "bargap": 0.25,
        "xaxis": {"title": {"text": "share of the tokens"}, "tickformat": ".0%", "range": [0, 1]},
        "yaxis": {"autorange": "reversed", "automargin": True, "showgrid": False},
    }
    return {"data": data, "layout": layout}


def extremes(groups: Sequence[Group]) -> Figure | None:
    """Mean loops of the tokens at either end, a view for each run and layer."""
    views = [
        {"run": g.label, "layer": f"layer {x.layer}", **_ends(g, x)}
        for g in groups
        for x in g.first.loops
        if x.shallow or x.deep
    ]
    return {"views": views, "selects": ["run", "layer"]} if views else None


def _ends(g: Group, x: LayerLoops) -> Figure:
    tokens = [*x.shallow, *reversed(x.deep)]
    places = list(range(len(tokens)))
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [round(t.loops, 4) for t in tokens],
        "y": places,
        "customdata": [[label(t), t.count] for t in tokens],
        "marker": {"color": [tint(t.loops, x.most_loops) for t in tokens]},
        "hovertemplate": "<b>%{customdata[0]}</b><br>%{x:.2f} loops, mean over its "
        "%{customdata[1]:,} places<extra></extra>",
        "meta": meta(g),
    }
    mean = {
        "type": "line", "xref": "x", "yref": "paper", "x0": x.mean, "x1": x.mean, "y0": 0, "y1": 1,
        "line": {"color": "#8a8a8a", "dash": "dot", "width": 1},
    }  # fmt: skip
    layout = {
        "height": 90 + 19 * len(tokens),
        "bargap": 0.2,
        "shapes": [mean],
        "xaxis": {"title": {"text": "mean loops"}, "range": [0, x.most_loops]},
        "yaxis": {
            "autorange": "reversed", "automargin": True, "showgrid": False, "tickvals": places,
            "ticktext": [label(t) for t in tokens],
        },
    }  # fmt: skip
    return {"data": [trace], "layout": layout}


def label(token: TokenLoops) -> str:
    """A token as an axis can show it: white space by its name, or marked where it is a part."""
    if token.text in SHOWN:
        return SHOWN[token.text]
    return text.safe(token.text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣"))


def tint(loops: float, most: int) -> str:
    """#rrggbb between the ends of the ramp."""
    at = (loops - 1) / (most - 1) if most > 1 else 0.0
    low, high = ([int(end[i : i + 2], 16) for i in (1, 3, 5)] for end in RAMP)
    return "#" + "".join(f"{round(a + at * (b - a)):02x}" for a, b in zip(low, high, strict=True))


def times(n: int) -> str:
    """How often, in words."""
    return {1: "once", 2: "twice"}.get(n, f"{n} times")


# Around them


def _key(most: int) -> Markup:
    entries = (el("span", swatch(tint(n, most)), times(n)) for n in range(1, most + 1))
    return el("div", *entries, class_="legend")


def _tokens(groups: Sequence[Group]) -> Markup | None:
    figure = extremes(groups)
    if figure is None:
        return None
    note = lead(
        "Of the most frequent tokens those that loop least and most, mean over their places. The "
        "dotted line is the mean of all tokens."
    )
    plot = explorer(figure, "depth-tokens", "Mean loops of tokens")
    return join(el("h3", "Which tokens loop"), note, plot)


def _layers(group: Group) -> Sequence[LayerLoops]:
    return group.first.loops


def _mean_by_domain(layer: LayerLoops) -> dict[str, float]:
    return {domain: mean_loops(counts) for domain, counts in layer.counts_by_domain.items()}
