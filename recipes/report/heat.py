"""Heat maps of expert load: layer by expert, and domain by expert."""

from typing import Any

from recipes.report import text
from recipes.report.figures import Figure
from recipes.report.records import LayerLoad, Run
from recipes.report.study import Study

TOP = 2.0  # times the even share, where the colours end


def load_by_layer(run: Run) -> Figure:
    """Each layer's assignments per expert, relative to an even spread over all its experts."""
    rows = list(run.load)
    widest = max(rows, key=lambda layer: len(layer.experts))
    names, split = widest.experts, widest.n_ffn_experts
    z = [_spaced(_relative(layer.counts), layer, names, split) for layer in rows]
    counts = [_spaced(list(layer.counts), layer, names, split) for layer in rows]
    labels = [f"layer {layer.layer}" for layer in rows]
    return {
        "views": [
            {
                "data": [_heat(z, counts, names, split, labels)],
                "layout": _layout(names, split, len(rows)),
            }
        ]
    }


def load_by_domain(study: Study) -> Figure | None:
    """Domain by expert, for a run and a layer that the reader picks."""
    runs = [g for g in study.moe_groups() if any(x.counts_by_domain for x in g.first.load)]
    if not runs:
        return None
    choices = [
        {"run": g.label, "layer": f"layer {layer.layer}", **_domain_view(layer)}
        for g in runs
        for layer in g.first.load
        if layer.counts_by_domain
    ]
    return {"views": choices, "selects": ["run", "layer"]}


def _domain_view(layer: LayerLoad) -> Figure:
    names, split = layer.experts, layer.n_ffn_experts
    domains = list(layer.counts_by_domain)
    rows = [list(layer.counts_by_domain[d]) for d in domains]
    z = [_spaced(_relative(row), layer, names, split) for row in rows]
    counts = [_spaced(row, layer, names, split) for row in rows]
    return {
        "data": [_heat(z, counts, names, split, [text.safe(d) for d in domains])],
        "layout": _layout(names, split, len(rows)),
    }


def _relative(counts: Any) -> list[float]:
    """1.0 where every expert of the layer takes the same; 0 everywhere if nothing was routed."""
    even = sum(counts) / len(counts) if counts else 0
    return [c / even if even else 0.0 for c in counts]


def _spaced(
    row: list[float], layer: LayerLoad, names: tuple[str, ...], split: int
) -> list[float | None]:
    """A row in the columns of `names`, with an empty column before zero-computation experts."""
    here = dict(zip(layer.experts, row, strict=True))
    cells: list[float | None] = [here.get(name) for name in names]
    return [*cells[:split], None, *cells[split:]] if split < len(names) else cells


def _columns(names: tuple[str, ...], split: int) -> list[str]:
    return [*names[:split], "", *names[split:]] if split < len(names) else list(names)


def _heat(z: Any, counts: Any, names: tuple[str, ...], split: int, labels: list[str]) -> Figure:
    columns = [text.safe(name) for name in _columns(names, split)]
    return {
        "type": "heatmap",
        "z": z,
        "x": list(range(len(columns))),
        "y": labels,
        "text": [columns] * len(z),
        "customdata": counts,
        "zmin": 0,
        "zmid": 1,
        "zmax": TOP,
        "xgap": 2,
        "ygap": 2,
        "colorbar": {
            "thickness": 10,
            "outlinewidth": 0,
            "tickvals": [0, 1, TOP],
            "ticktext": ["0", "even", f"≥ {TOP:g} ×"],
        },
        "hoverongaps": False,
        "hovertemplate": "<b>%{y}, %{text}</b><br>%{z:.2f} × the even share"
        "<br>%{customdata:,} assignments<extra></extra>",
        "meta": {"scale": "diverging"},
    }


def _layout(names: tuple[str, ...], split: int, rows: int) -> Figure:
    columns = _columns(names, split)
    step = max(1, -(-split // 16))
    ticks = [i for i, _ in enumerate(columns) if i > split or (i < split and i % step == 0)]
    short = [_short(columns[i], i < split) for i in ticks]
    several = len(columns) > split
    return {
        "height": 92 + (48 if several else 0) + max(24 * rows, 48),
        "xaxis": {
            "tickvals": ticks,
            "ticktext": short,
            "showgrid": False,
            "tickangle": -40 if several else 0,
            "title": {"text": "expert"},
        },
        "yaxis": {"autorange": "reversed", "automargin": True, "showgrid": False},
    }


def _short(name: str, ffn: bool) -> str:
    """FFN experts by their number alone, the others by name."""
    return text.safe(name.removeprefix("ffn ") if ffn else name)


def caption(run: Run) -> str:
    """The four numbers of a run, over its MoE layers."""
    layers = run.load
    parts = [
        f"entropy {sum(x.entropy for x in layers) / len(layers):.3f}",
        f"largest {text.percent(max(x.largest_share for x in layers))}",
        f"dead {sum(x.dead for x in layers)}",
    ]
    zero = sum(x.zero_computation_share for x in layers) / len(layers)
    if zero:
        parts.append(f"zero-computation {text.percent(zero)}")
    return " · ".join(parts)
