"""What binds: the roofline of the machine and where the variants stand under it."""

from collections.abc import Sequence
from math import log10

from recipes.report import text
from recipes.report.figures import GREY, Figure, plot
from recipes.report.tables import num_cell, sort_head, sortable
from recipes.report.text import Markup, el, join, lead
from recipes.study.records import Machine
from recipes.study.report.derive import Derived
from recipes.study.report.names import legend, variant_name
from recipes.study.report.roofline import DECODING, TRAINING, Workload, workloads

SYMBOLS = {DECODING: "circle", TRAINING: "square"}
KEY = (f"● {DECODING} alone, at most", f"■ {TRAINING}, at most", "✕ what its runs reached")
BESIDE = 2.0  # times the outermost points, up to which the roof is drawn


def what_binds(d: Derived) -> Markup:
    """The picture of the variants, and a table of them and of the controls."""
    machine = d.results.machine
    if machine is None:
        return el("p", "No machine was measured.")
    note = lead(
        f"{_limits(machine)}. Lower bounds: the time that the FLOPs need at the one rate, and the "
        "weight bytes at the other; activations and caches are left out. Training reads weights "
        "twice, writes gradients, and moves the optimiser's state once a step. Under the slope "
        "bandwidth binds, under the flat roof compute."
    )
    found = workloads(d, d.plan.variants)
    drawn = None
    if found:
        keys = el("div", *(el("span", word) for word in KEY), class_="legend")
        views = {"views": [_view(d, machine, found)], "tools": True}
        names = tuple(dict.fromkeys(w.variant for w in found))
        drawn = join(keys, legend(d, names), plot(views, "study-roofline", "Roofline"))
    return join(note, drawn, _table(d, [*found, *workloads(d, d.controls)]))


def roof(
    machine: Machine, found: Sequence[Workload]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Corners of the roof, from left to right: FLOPs per byte, and FLOPs per second."""
    ridge = machine.flops_per_s / machine.bytes_per_s
    at = [ridge, *(w.bound.intensity for w in found)]
    low, high = min(at) / BESIDE, max(at) * BESIDE
    return (low, ridge, high), (low * machine.bytes_per_s, machine.flops_per_s, machine.flops_per_s)


def roof_words(machine: Machine) -> tuple[str, str]:
    """What the slope and the flat part stand for."""
    flops = f"{text.si(machine.flops_per_s, 'FLOP/s')} of float32 matmuls"
    return f"{text.si(machine.bytes_per_s, 'B/s')} of copies", flops


def _view(d: Derived, machine: Machine, found: Sequence[Workload]) -> Figure:
    x, y = roof(machine, found)
    slope, flat = roof_words(machine)
    line = {
        "type": "scatter", "mode": "lines", "x": x, "y": y, "hoverinfo": "skip",
        "line": {"color": GREY, "width": 2},
    }  # fmt: skip
    said = {
        "type": "scatter", "mode": "text", "x": x[:2], "y": y[:2], "hoverinfo": "skip",
        "text": [f"<br>\u00a0{text.safe(slope)}", f"{text.safe(flat)}<br>\u00a0"],  # off the marks
        "textposition": ["bottom right", "top right"],
    }  # fmt: skip
    names = dict.fromkeys(w.variant for w in found)
    traces = [_points(d, [w for w in found if w.variant == name]) for name in names]
    low = min([y[0], *(w.reached for w in found if w.reached is not None)])
    layout = {
        "height": 440,
        "xaxis": {"title": {"text": "FLOPs per byte moved"}, "type": "log", "dtick": 1},
        "yaxis": {"title": {"text": "FLOPs per second"}, "type": "log", "tickformat": "~s",
                  "dtick": "D2", "range": [log10(low / BESIDE), log10(y[-1] * BESIDE)]},
    }  # fmt: skip
    return {"data": [line, said, *traces], "layout": layout}


def _points(d: Derived, mine: Sequence[Workload]) -> Figure:
    """On the roof what a variant may come to, below it what it came to."""
    variant = mine[0].variant
    places = [(w.bound.intensity, w.bound.attainable, SYMBOLS[w.of], f"{w.of}, at most, "
               f"{w.bound.binds} binds") for w in mine]  # fmt: skip
    places += [
        (w.bound.intensity, w.reached, "x", f"{w.of}, reached")
        for w in mine if w.reached is not None
    ]  # fmt: skip
    x, y, symbols, words = map(list, zip(*places, strict=True))
    colour, name = d.look.colours[variant], text.safe(variant)
    return {
        "type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "text": words,
        "marker": {"size": 10, "color": colour, "symbol": symbols, "opacity": 0.85},
        "hovertemplate": f"<b>{name}</b>, %{{text}}<br>%{{x:.3g}} FLOPs per byte"
        "<br>%{y:.3s}FLOP/s<extra></extra>",
        "meta": {"variant": variant, "precision": d.plan.baseline.precision},
    }  # fmt: skip


def _limits(machine: Machine) -> str:
    threads = f"{machine.threads} thread{'s' * (machine.threads != 1)}"
    copies, matmuls = roof_words(machine)
    return f"{machine.name}, {threads}: {matmuls}, {copies}"


def _table(d: Derived, found: Sequence[Workload]) -> Markup:
    heads = [
        sort_head("Variant", False),
        sort_head("Work", False),
        sort_head("FLOPs/byte"),
        sort_head("Binds", False),
        sort_head("Times the other", title="the limit that binds over the one that does not"),
        sort_head("Tokens/s at most"),
        sort_head("FLOP/s at most"),
        sort_head("Reached", title="FLOP/s of the runs, where they had this machine"),
        sort_head("Share", title="reached, of the most"),
    ]  # fmt: skip
    return sortable(heads, [_row(d, w) for w in found])


def _row(d: Derived, w: Workload) -> Markup:
    b, got = w.bound, w.reached
    share = None if got is None else got / b.attainable
    return el(
        "tr",
        el("td", variant_name(d, w.variant)),
        el("td", w.of),
        num_cell(b.intensity, text.si(b.intensity)),
        el("td", b.binds),
        num_cell(b.ratio, f"{text.si(b.ratio)}×"),
        num_cell(1 / b.seconds, text.si(1 / b.seconds)),
        num_cell(b.attainable, text.si(b.attainable)),
        num_cell(got, text.si(got or 0.0)),
        num_cell(share, text.percent(share or 0.0)),
    )
