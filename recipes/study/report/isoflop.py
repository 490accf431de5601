"""The best size for a compute budget, where several sizes were trained with the same compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite, log

import numpy as np

from recipes.report import text
from recipes.report.figures import Figure, switched
from recipes.report.tables import num_cell, sort_head, sortable
from recipes.report.text import Markup, el, join, lead
from recipes.statistics.isoflop import IsoFlop, isoflop
from recipes.statistics.leverage import SAME_BUDGET
from recipes.statistics.parabola import Vertex, vertex
from recipes.statistics.scaling import Runs, runs_of
from recipes.study.report.derive import Arm, Derived
from recipes.study.report.ladder import trained
from recipes.study.report.names import held, legend, variant_name
from recipes.study.report.rates import bowl

LEAST_SIZES = 3  # through which a parabola goes
PARAMS = "parameters"
INTERIOR = "interior"


@dataclass(frozen=True)
class Valley:
    """One variant's sizes at one budget, and the parabola through their runs in ln N."""

    variant: str
    compute: float  # training FLOPs of a run
    arms: tuple[Arm, ...]  # by parameters
    lowest: Vertex  # NaN where it has no lowest point

    @property
    def runs(self) -> Runs:
        """Loss of every run over its parameters."""
        pairs = [(params_of(arm), run.final.bpb) for arm in self.arms for run in arm.runs]
        return runs_of(*zip(*pairs, strict=True))

    @property
    def span(self) -> tuple[float, float]:
        """ln N of the smallest and of the largest size."""
        return log(params_of(self.arms[0])), log(params_of(self.arms[-1]))

    @property
    def place(self) -> str:
        """Where the lowest point lies to the sizes tried."""
        low, high = self.span
        if not isfinite(self.lowest.at):
            return "no lowest point"
        if low < self.lowest.at < high:
            return INTERIOR
        return "below the sizes tried" if self.lowest.at <= low else "above the sizes tried"

    @property
    def best(self) -> tuple[float, float] | None:
        """Parameters and loss of the minimum; None unless sizes lie on both sides of it."""
        if self.place != INTERIOR:
            return None
        return float(np.exp(self.lowest.at)), float(self.lowest.low)

    def curve(self) -> tuple[list[float], list[float]] | None:
        """The parabola over the sizes tried; None where it has no lowest point."""
        if not isfinite(self.lowest.at):
            return None
        x, y = bowl(self.lowest, *self.span)
        return np.exp(x).tolist(), y.tolist()


def params_of(arm: Arm) -> int:
    """Every trainable number."""
    return arm.runs[0].cost.params


def valleys(d: Derived, hold: str) -> list[Valley]:
    """By variant, then by budget: where three sizes or more agree within 5 % in training FLOPs."""
    found: list[Valley] = []
    for variant in d.plan.variants:
        budgets: dict[float, list[Arm]] = {}
        for arm in sorted(trained(d, variant, hold), key=lambda a: a.flops):
            near = [c for c in budgets if abs(log(arm.flops / c)) < SAME_BUDGET]
            budgets.setdefault(near[0] if near else arm.flops, []).append(arm)
        for compute, arms in budgets.items():
            if len({params_of(arm) for arm in arms}) >= LEAST_SIZES:
                found.append(_valley(variant, compute, arms))
    return found


def _valley(variant: str, compute: float, arms: Sequence[Arm]) -> Valley:
    x = [log(params_of(arm)) for arm in arms for _ in arm.runs]
    lowest = vertex(x, [run.final.bpb for arm in arms for run in arm.runs])
    return Valley(variant, compute, tuple(sorted(arms, key=params_of)), lowest)


def isoflops(d: Derived, found: Sequence[Valley]) -> tuple[dict[str, IsoFlop], dict[str, str]]:
    """How the best size grows with the budget, of each variant with two budgets or more.

    Returns:
        By variant the line, and why there is none.
    """
    by_variant: dict[str, dict[float, Runs]] = {}
    for valley in found:
        by_variant.setdefault(valley.variant, {})[valley.compute] = valley.runs
    sigma = d.noise.std if d.noise else None
    fits: dict[str, IsoFlop] = {}
    refused: dict[str, str] = {}
    for v, runs in by_variant.items():
        if len(runs) < 2:
            continue
        try:
            fits[v] = isoflop(runs, sigma=sigma)
        except ValueError as error:  # too few budgets have an optimum, or runs a noise
            refused[v] = str(error)
    return fits, refused


def best_sizes(d: Derived) -> Markup | None:
    """Parabolas, and a table; None where no three sizes share a budget."""
    found = valleys(d, d.primary)
    if not found:
        return None
    fits, refused = isoflops(d, found)
    note = lead(
        f"Sizes with the same training FLOPs, {held(d.primary)}: bits per byte over {PARAMS}, a "
        "parabola in their logarithm for each budget. Bars are 95\u00a0% intervals of the mean "
        "over the seeds; stars are minima with sizes tried on both sides, joined over the budgets."
    )
    laws = "; ".join(
        f"{v}: N* ∝ C^{fit.exponent:.3f} "
        f"[{fit.exponent_interval.low:.3f}, {fit.exponent_interval.high:.3f}]"
        for v, fit in fits.items()
    )
    without = [f"No line of {v}: {why}." for v, why in refused.items()]
    keys = legend(d, tuple(dict.fromkeys(v.variant for v in found)))
    picture = switched(
        figure(d, found), keys, "study-isoflop", "By variant",
        "Loss against parameters at equal training FLOPs",
    )  # fmt: skip
    told = [lead(x) for x in (laws, " ".join(without)) if x]
    return join(el("h3", "Best size per budget"), note, *told, picture, _table(d, found, fits))


def figure(d: Derived, found: Sequence[Valley]) -> Figure:
    """All variants together, then each by itself with its budgets named."""
    variants = tuple(dict.fromkeys(v.variant for v in found))
    views = [_view(d, [v for v in found if v.variant == one], one) for one in variants]
    if len(variants) > 1:
        views.insert(0, _view(d, found, "All variants"))
    return {"views": views, "tools": True}


def _view(d: Derived, found: Sequence[Valley], label: str) -> Figure:
    variants = tuple(dict.fromkeys(v.variant for v in found))
    traces = [_way(d, [v for v in found if v.variant == one]) for one in variants]
    traces += [t for v in found for t in _traces(d, v, named=len(variants) == 1)]
    ticks = size_ticks(found)
    layout = {
        "height": 460,
        "xaxis": {"title": {"text": PARAMS}, "type": "log", "tickvals": ticks,
                  "ticktext": [text.si(n) for n in ticks]},
        "yaxis": {"title": {"text": "bits per byte, held-out"}},
    }  # fmt: skip
    return {"label": label, "data": traces, "layout": layout}


def size_ticks(found: Sequence[Valley]) -> list[float]:
    """From the smallest size to the largest, each a power of two times the last; ten at most."""
    low, high = min(v.span[0] for v in found), max(v.span[1] for v in found)
    steps = (high - low) / log(2)
    return [float(n) for n in np.exp(low) * 2.0 ** np.arange(0, steps + 0.01, ceil(steps / 9))]


def _look(d: Derived, variant: str) -> Figure:
    meta = {"variant": variant, "precision": d.plan.baseline.precision}
    return {"type": "scatter", "name": text.safe(variant), "meta": meta}


def _way(d: Derived, mine: Sequence[Valley]) -> Figure:
    """From minimum to minimum as the budget grows."""
    best = [v.best for v in mine if v.best is not None]
    return _look(d, mine[0].variant) | {
        "mode": "lines", "x": [n for n, _ in best], "y": [bpb for _, bpb in best],
        "line": {"color": d.look.colours[mine[0].variant], "width": 1, "dash": "dash"},
        "hoverinfo": "skip", "opacity": 0.6,
    }  # fmt: skip


def _traces(d: Derived, v: Valley, named: bool) -> list[Figure]:
    """Points with bars, the parabola, its minimum; the budget's name beside the largest size."""
    colour, name, budget = (
        d.look.colours[v.variant],
        text.safe(v.variant),
        text.si(v.compute, "FLOP"),
    )
    points = {
        "mode": "markers+text" if named else "markers",
        "x": [params_of(a) for a in v.arms], "y": [a.bpb for a in v.arms],
        "error_y": {"array": [a.half or 0.0 for a in v.arms], "color": colour, "thickness": 1.2,
                    "width": 4},
        "customdata": [text.safe(a.size) for a in v.arms],
        "marker": {"size": 8, "color": colour},
        "hovertemplate": f"<b>{name}</b>, %{{customdata}}, {budget}<br>"
        f"%{{y:.{d.digits}f}} bpb<br>%{{x:.4s}} {PARAMS}<extra></extra>",
    }  # fmt: skip
    if named:
        ends = [""] * (len(v.arms) - 1)
        points |= {"text": [*ends, f"\u00a0{budget}"], "textposition": "middle right",
                   "cliponaxis": False}  # fmt: skip
    traces = [_look(d, v.variant) | points]
    curve = v.curve()
    if curve is not None:
        x, y = ([float(f"{at:.6g}") for at in axis[::2]] for axis in curve)  # a light page
        traces.append(_look(d, v.variant) | {
            "mode": "lines", "x": x, "y": y, "hoverinfo": "skip",
            "line": {"color": colour, "width": 1.2, "dash": "dot"},
        })  # fmt: skip
    if v.best is not None:
        traces.append(_look(d, v.variant) | {
            "mode": "markers", "x": [v.best[0]], "y": [v.best[1]],
            "marker": {"symbol": "star", "size": 13, "color": colour},
            "hovertemplate": f"<b>{name}</b>, best size at {budget}<br>"
            f"%{{x:.4s}} {PARAMS}: %{{y:.{d.digits}f}} bpb<extra></extra>",
        })  # fmt: skip
    return traces


def _table(d: Derived, found: Sequence[Valley], fits: dict[str, IsoFlop]) -> Markup:
    """Of each budget; the interval only where the budgets of a variant make a line."""
    heads = [sort_head("Variant", False), sort_head("Budget"), sort_head("Sizes"),
             sort_head("Best size", title=PARAMS), sort_head("95 % interval", False),
             sort_head("Bits per byte", title="there"), sort_head("Place", False)]  # fmt: skip
    return sortable(heads, [_row(d, v, fits.get(v.variant)) for v in found])


def _row(d: Derived, v: Valley, fit: IsoFlop | None) -> Markup:
    interval = None
    if fit is not None:
        interval = next(b.size_interval for b in fit.budgets if b.compute == v.compute)
    low = float(v.lowest.low)
    at = float(np.exp(v.lowest.at))
    place = v.place if v.best is not None else el("span", v.place, class_="chip worse")
    return el(
        "tr",
        el("td", variant_name(d, v.variant)),
        num_cell(v.compute, text.si(v.compute, "FLOP")),
        num_cell(len(v.arms), str(len(v.arms))),
        num_cell(at, text.si(at)),
        el("td", f"{text.si(interval.low)} to {text.si(interval.high)}" if interval else text.DASH),
        num_cell(low, text.bpb(low, d.digits) if isfinite(low) else text.DASH),
        el("td", place),
    )
