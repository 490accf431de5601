"""Loss curves as a plain plotly figure (a dict), and what all figures share.

A figure is what the page's script draws: `views` (each with a label, data and layout), or
`data` and `layout` with `axes` (tabs that pick a column of customdata for x and for y);
`tools` asks for zoom and download buttons.
A trace says in `meta` to which variant and precision it belongs; legends and looks follow it.
"""

import json
from collections.abc import Sequence
from math import isfinite
from typing import Any

from recipes.report import text
from recipes.report.records import Point, Run
from recipes.report.study import Group, Study
from recipes.report.text import Markup, el, join

Figure = dict[str, Any]
MAX_POINTS = 400  # of a curve that are drawn; those with an evaluation always are
COLUMNS = ("step", "tokens", "flops", "train_s", "eval_bpb", "train_bpb", "eval_accuracy")
GREY = "#8b929c"  # of lines that belong to no variant


def meta(group: Group) -> dict[str, str]:
    """What the page's legends look for."""
    return {"variant": group.variant, "precision": group.precision}


def curves(study: Study) -> Figure | None:
    """Bits per byte against tokens, training FLOPs or seconds; None where no run has a curve."""
    lines = [(g, run) for g in study.groups for run in g.runs if run.curve]
    if not lines:
        return None
    y_axis = _y_axes(lines)
    if not y_axis:
        return None
    x_axis = [
        {"label": "Tokens", "column": 1, "title": "training tokens"},
        {"label": "FLOPs", "column": 2, "title": "training FLOPs (matmuls)"},
        {"label": "Seconds", "column": 3, "title": "seconds of training"},
    ]
    return {
        "data": [_curve(study, g, run, x_axis[0], y_axis[0]) for g, run in lines],
        "layout": {
            "height": 480,
            "xaxis": {"title": {"text": x_axis[0]["title"]}, "tickformat": "~s"},
            "yaxis": {"title": {"text": y_axis[0]["title"]}, "range": _end_range(lines)},
            "hovermode": "closest",
        },
        "axes": {"x": x_axis, "y": y_axis},
        "tools": True,
    }


def _y_axes(lines: Sequence[tuple[Group, Run]]) -> list[dict[str, Any]]:
    """Held-out first, if it has points enough for a curve; what no run logged is left out."""
    counted = {
        column: max(sum(getattr(p, column) is not None for p in run.curve) for _, run in lines)
        for column in ("eval_bpb", "train_bpb", "eval_accuracy")
    }
    words = {
        "eval_bpb": ("Held-out", "bits per byte, held-out"),
        "train_bpb": ("Training", "bits per byte, training batches"),
        "eval_accuracy": ("Accuracy", "share of right answers, held-out"),
    }
    order = sorted(words, key=lambda column: counted[column] < 3)
    return [
        {"label": words[column][0], "column": COLUMNS.index(column), "title": words[column][1]}
        for column in order
        if counted[column]
    ]


def _curve(study: Study, group: Group, run: Run, x: dict[str, Any], y: dict[str, Any]) -> Figure:
    rows = [[_number(getattr(p, c)) for c in COLUMNS] for p in thinned(run.curve)]
    many = len(group.runs) > 1
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": text.safe(run.id),
        "x": [row[x["column"]] for row in rows],
        "y": [row[y["column"]] for row in rows],
        "customdata": rows,
        "connectgaps": True,
        "opacity": 0.45 if many and run is not group.first else 1,
        "line": {
            "color": study.look.colours[group.variant],
            "dash": study.look.dashes[group.precision],
            "width": 2,
        },
        "marker": {"size": 4},
        "hovertemplate": (
            f"<b>{text.safe(run.id)}</b><br>held-out %{{customdata[4]:.4f}} bpb"
            "<br>training %{customdata[5]:.4f} bpb<br>step %{customdata[0]:,}"
            "<br>%{customdata[1]:.4s} tokens<br>%{customdata[2]:.3s} FLOPs"
            "<br>%{customdata[3]:.1f} s<extra></extra>"
        ),
        "meta": meta(group),
    }


def thinned(curve: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most so many evenly taken ones, and every one with an evaluation."""
    stride = -(-len(curve) // most)
    last = len(curve) - 1
    return [
        p for i, p in enumerate(curve) if i % stride == 0 or i == last or p.eval_bpb is not None
    ]


def _end_range(lines: Sequence[tuple[Group, Run]]) -> list[float] | None:
    """The part of the y axis where curves end; the steep start would squeeze it."""
    known = [
        (p.step / max(run.steps, 1), y)
        for _, run in lines
        for p in run.curve
        for y in (p.eval_bpb, p.train_bpb)
        if y is not None and isfinite(y)
    ]
    late = [y for progress, y in known if progress >= 0.3]
    if not late:
        return None
    pad = 0.06 * (max(late) - min(late)) or 0.05
    return [min(late) - pad, max(late) + pad]


def _number(x: float | None) -> float | None:
    """JSON knows no NaN."""
    return x if x is not None and isfinite(x) else None


def plot(figure: Figure, key: str, label: str) -> Markup:
    """A place that the page's script draws into, and its data; safe inside HTML."""
    data = json.dumps(_finite(figure), separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        data = data.replace(char, f"\\u{ord(char):04x}")
    height = (figure.get("layout") or figure["views"][0]["layout"])["height"]
    return join(
        el("div", class_="plot", id=f"plot-{key}", aria_label=label, style=f"height:{height}px"),
        Markup(f'<script type="application/json" id="data-{key}">{data}</script>'),
    )


def switched(figure: Figure, legend: Markup, key: str, title: str, label: str) -> Markup:
    """A figure under a title, with a button for each of its views."""
    buttons = (
        el("button", v["label"], type="button", data_i=i, aria_pressed="false" if i else "true")
        for i, v in enumerate(figure["views"])
    )
    tabs = el("div", *buttons, class_="tabs", data_plot=key, data_of="view")
    controls = el("div", tabs, class_="controls")
    return join(el("h3", title), controls, legend, plot(figure, key, label))


def _finite(data: Any) -> Any:
    """JSON knows no NaN: what a diverged run left behind is not drawn."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not isfinite(data) else data
