"""Loss against the learning rate, and where each optimum lies."""

from math import isfinite

import numpy as np

from recipes.report import text
from recipes.report.figures import Figure, switched
from recipes.report.tables import num_cell, sort_head, sortable
from recipes.report.text import Markup, el, join, lead
from recipes.statistics.bootstrap import Array
from recipes.statistics.parabola import Vertex, vertex
from recipes.statistics.rates import LEAST_POINTS
from recipes.study.report.derive import Derived
from recipes.study.report.names import legend, variant_name
from recipes.study.report.tuning import Sweep

CURVE_POINTS = 33
WHERE = {
    "lower edge": "at the lower edge of the grid",
    "upper edge": "at the upper edge of the grid",
    "beside divergence": "beside a rate that diverged",
}


def learning_rates(d: Derived, found: list[Sweep]) -> Markup | None:
    """Alarms, a picture by size, and a table; None where no rate was tried."""
    if not found:
        return None
    note = lead(
        "Mean bits per byte over the tuning seeds, at every rate that was tried; these seeds are "
        "not reported. ✕ diverged. Stars are the lowest points of the dotted parabolas."
    )
    picture = figure(d, found)
    shown = None
    if picture is not None:
        variants = tuple(dict.fromkeys(s.variant for s in found))
        keys = legend(d, variants)
        shown = switched(picture, keys, "study-rates", "By size", "Loss against learning rate")
    return join(_alarm(found), note, shown, _grids(found), _table(d, found))


def _grids(found: list[Sweep]) -> Markup | None:
    """Where sweeps tried different rates: which of them the sensitivity is taken over."""
    told: list[str] = []
    for size, precision in dict.fromkeys((s.size, s.precision) for s in found):
        mine = [s for s in found if (s.size, s.precision) == (size, precision) and s.enough]
        if len({frozenset(s.losses) for s in mine}) < 2:
            continue
        rates = ", ".join(f"{lr:.3g}" for lr in mine[0].shared)
        over = (
            f"of {rates} alone" if rates else f"of none, for fewer than {LEAST_POINTS} are shared"
        )
        told.append(f"{size} in {precision}: {over}")
    if not told:
        return None
    return lead(
        "Not every sweep has the same rates, and sensitivity is compared over the shared ones: "
        f"{'; '.join(told)}."
    )


def _alarm(found: list[Sweep]) -> Markup | None:
    """Optima that are none, first and by name."""
    edges = [s for s in found if s.edge and s.best is not None]
    if not edges:
        return None
    items = [
        el("li", el("b", f"{s.variant} at {s.size}"),
           f" ({s.precision}): {s.best.tried:g} is {WHERE[s.best.place]}; try next ",
           el("b", ", ".join(f"{lr:.3g}" for lr in s.best.next_lrs)))
        for s in edges if s.best is not None
    ]  # fmt: skip
    told = (
        f"{len(edges)} of {len(found)} optima are none: beyond them nothing was tried that "
        "trains. What is reported of these variants may not be their best, and a comparison with "
        "them is not settled."
    )
    return el("div", el("p", el("strong", told)), el("ul", *items), class_="alarm", role="alert")


def figure(d: Derived, found: list[Sweep]) -> Figure | None:
    """A view per size and precision."""
    places = dict.fromkeys((s.size, s.precision) for s in found if any(map(isfinite, _ys(s))))
    several = len({precision for _, precision in places}) > 1
    views = [
        {"label": f"{size} · {precision}" if several else size,
         **_view(d, [s for s in found if (s.size, s.precision) == (size, precision)])}
        for size, precision in places
    ]  # fmt: skip
    return {"views": views, "tools": True} if views else None


def _ys(s: Sweep) -> list[float]:
    return list(s.losses.values())


def _view(d: Derived, found: list[Sweep]) -> Figure:
    known = [y for s in found for y in _ys(s) if isfinite(y)]
    low, high = min(known), max(known)
    pad = 0.08 * (high - low) or 0.1
    top = high + 2 * pad  # where rates stand that diverged
    lrs = sorted({lr for s in found for lr in s.losses})
    data = [trace for s in found for trace in _traces(d, s, top)]
    layout = {
        "height": 420,
        "xaxis": {
            "type": "log", "tickvals": lrs, "ticktext": [f"{lr:.3g}" for lr in lrs],
            "title": {"text": "peak learning rate, steps of log2"},
        },
        "yaxis": {
            "title": {"text": "bits per byte, held-out (✕ diverged)"},
            "range": [low - 1.5 * pad, top + pad],
        },
    }  # fmt: skip
    return {"data": data, "layout": layout}


def _traces(d: Derived, s: Sweep, top: float) -> list[Figure]:
    colour, name = d.look.colours[s.variant], text.safe(s.variant)
    meta = {"variant": s.variant, "precision": s.precision}
    xs, ys = list(s.losses), _ys(s)
    bad = [not isfinite(y) for y in ys]
    points = {
        "type": "scatter", "mode": "lines+markers", "name": name,
        "x": xs, "y": [None if b else y for y, b in zip(ys, bad, strict=True)],
        "line": {"color": colour, "width": 1.5}, "marker": {"size": 7, "color": colour},
        "hovertemplate": f"<b>{name}</b><br>lr %{{x:.3g}}: %{{y:.{d.digits}f}} bpb<extra></extra>",
        "meta": meta,
    }  # fmt: skip
    traces = [points]
    lost = [x for x, b in zip(xs, bad, strict=True) if b]
    if lost:
        traces.append({
            "type": "scatter", "mode": "markers", "name": name, "x": lost, "y": [top] * len(lost),
            "marker": {"symbol": "x", "size": 10, "color": colour}, "meta": meta,
            "hovertemplate": f"<b>{name}</b><br>lr %{{x:.3g}}: diverged<extra></extra>",
        })  # fmt: skip
    if s.best is not None and s.best.fitted:
        x, y = parabola(s)
        traces.append({
            "type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "meta": meta,
            "line": {"color": colour, "dash": "dot", "width": 1.2}, "hoverinfo": "skip",
        })  # fmt: skip
        traces.append({
            "type": "scatter", "mode": "markers", "name": name, "x": [s.best.lr],
            "y": [s.best.loss], "meta": meta,
            "marker": {"symbol": "star", "size": 13, "color": colour},
            "hovertemplate": f"<b>{name}</b><br>optimum %{{x:.3g}}: %{{y:.{d.digits}f}} bpb"
            "<extra></extra>",
        })  # fmt: skip
    return traces


def parabola(s: Sweep) -> tuple[list[float], list[float]]:
    """The fitted parabola of a sweep that has one, over the rates that it goes through."""
    assert s.best is not None, "the caller asks for one that was fitted"
    rates = s.best.fitted
    v = vertex(np.log2(rates), [s.losses[lr] for lr in rates])
    x, y = bowl(v, np.log2(rates[0]), np.log2(rates[-1]))
    return (2**x).tolist(), y.tolist()


def bowl(v: Vertex, low: float, high: float) -> tuple[Array, Array]:
    """A parabola that was fitted, drawn between two of its x."""
    x = np.linspace(low, high, CURVE_POINTS)
    return x, v.low + v.curvature * (x - v.at) ** 2


def _table(d: Derived, found: list[Sweep]) -> Markup:
    heads = [
        sort_head("Size", False),
        sort_head("Variant", False),
        sort_head("Optimum", title="lowest point of the parabola in log2 of the rate"),
        sort_head("Reported at", title="the best rate that was tried"),
        sort_head("Bits per byte", title="at the optimum"),
        sort_head("Place", False, title="of the best rate among those tried"),
        sort_head("Sensitivity", title="mean of min(loss, that of a uniform guess) minus the best, "
                  "over the rates that all sweeps of a size have; arXiv:2309.14322"),
        sort_head("Misfit", title="of the parabola, root mean square"),
        sort_head("Next", False, title="rates to try next"),
        sort_head("Not there", False, title="rates that failed, or were not run yet"),
    ]  # fmt: skip
    return sortable(heads, [_row(d, s) for s in found])


def _row(d: Derived, s: Sweep) -> Markup:
    best = s.best
    gone = [f"{lr:.3g} failed" for lr in s.failed] + [f"{lr:.3g} missing" for lr in s.missing]
    place = el("td", s.why or "") if best is None else el("td", _place(best.place))
    return el(
        "tr",
        el("td", s.size),
        el("td", variant_name(d, s.variant), " ", el("span", s.precision, class_="quiet")),
        num_cell(best.lr if best else None, f"{best.lr:.3g}" if best else ""),
        num_cell(best.tried if best else None, f"{best.tried:.3g}" if best else ""),
        num_cell(best.loss if best else None, f"{best.loss:.{d.digits}f}" if best else ""),
        place,
        num_cell(s.sensitivity, f"{s.sensitivity or 0:.{d.digits}f}"),
        num_cell(best.misfit if best else None, f"{best.misfit:.2g}" if best else ""),
        el("td", ", ".join(f"{lr:.3g}" for lr in best.next_lrs) if best else ""),
        el("td", ", ".join(gone)),
    )


def _place(place: str) -> Markup:
    """An edge stands out."""
    return join(place) if place == "interior" else el("span", place, class_="chip worse")
