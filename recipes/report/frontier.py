"""Bits per byte against cost: points, noise bars, labels that keep apart, the Pareto line."""

from collections.abc import Callable, Sequence
from math import isfinite

from recipes.report import text
from recipes.report.figures import GREY, Figure, meta
from recipes.report.study import Group, Study

MAX_LABELS = 16

Axis = tuple[str, str, Callable[[Group], float | None], bool]  # label, title, value, more is better


def frontier_axes(study: Study) -> list[Axis]:
    """What bits per byte are weighed against; only axes that some group has a number for."""
    axes: list[Axis] = [
        ("FLOPs per token", "matmul FLOPs per token, forward", _flops, False),
        ("Weight bytes per token", "weight bytes read per token, one at a time", _bytes, False),
        ("Tokens per second", "training tokens per second (more is better)", _speed, True),
    ]
    return [a for a in axes if any(a[2](g) is not None for g in study.groups)]


def _flops(group: Group) -> float:
    return group.first.cost.flops_per_token


def _bytes(group: Group) -> float | None:
    return group.first.cost.weight_bytes_per_token.get("1")


def _speed(group: Group) -> float:
    return group.tokens_per_s


def frontier(study: Study) -> Figure | None:
    """Bits per byte against each cost, with noise bars and the Pareto line."""
    views = [view for axis in frontier_axes(study) if (view := _frontier_view(study, axis))]
    return {"views": views, "tools": True} if len(study.groups) > 1 and views else None


def _frontier_view(study: Study, axis: Axis) -> Figure | None:
    label, title, value, more = axis
    points = [(g, x) for g in study.groups if (x := value(g)) is not None and isfinite(g.bpb)]
    if not points:
        return None
    xs, ys = [x for _, x in points], [g.bpb for g, _ in points]
    halves = [study.half(g) or 0.0 for g, _ in points]
    x_range = _padded(min(xs), max(xs), floor=0.04 * max(xs), share=0.14)
    low = min(y - h for y, h in zip(ys, halves, strict=True))
    high = max(y + h for y, h in zip(ys, halves, strict=True))
    y_range = _padded(low, high, floor=0.01, share=0.1)
    line = pareto(xs, ys, more)
    named = [_named(study, g, x, line, len(points)) for g, x in points]
    places = _label_places(xs, ys, named, x_range, y_range)
    staircase = {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _ in line],
        "y": [y for _, y in line],
        "line": {"color": GREY, "width": 1.2, "dash": "dot", "shape": "hv"},
        "hoverinfo": "skip",
        "name": "Pareto line",
        "meta": {"all": True},  # shown while no variant is hidden
    }
    traces = [
        _frontier_point(study, g, x, h, title)
        | {"text": [f"\u00a0{text.safe(words)}\u00a0"], "textposition": place}
        for (g, x), h, words, place in zip(points, halves, named, places, strict=True)
    ]
    return {
        "label": label,
        "data": [staircase, *traces],
        "layout": {
            "height": 460,
            "xaxis": {"title": {"text": title}, "tickformat": "~s", "range": x_range},
            "yaxis": {"title": {"text": "bits per byte, held-out"}, "range": y_range},
        },
    }


def _named(
    study: Study, group: Group, x: float, line: Sequence[tuple[float, float]], n_points: int
) -> str:
    """The label of a point; in a crowd only the Pareto line and the baseline have one."""
    chosen = (x, group.bpb) in line or group is study.baseline
    return group.label if n_points <= MAX_LABELS or chosen else ""


def _frontier_point(study: Study, group: Group, x: float, half: float, title: str) -> Figure:
    colour = study.look.colours[group.variant]
    noise = f" ± {half:.{study.digits}f}" if half else ""
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": text.safe(group.label),
        "x": [x],
        "y": [group.bpb],
        "textfont": {"size": 12},
        "cliponaxis": False,
        "marker": {
            "color": colour,
            "symbol": study.look.markers[group.precision],
            "size": 11,
            "line": {"width": 2, "color": colour},
        },
        "error_y": {"array": [half], "color": colour, "thickness": 1.2, "width": 4}
        if half
        else None,
        "hovertemplate": (
            f"<b>{text.safe(group.label)}</b><br>{text.bpb(group.bpb, study.digits)}{noise} bpb"
            f"<br>{text.si(x)} {title}<extra></extra>"
        ),
        "meta": meta(group),
    }


def pareto(
    xs: Sequence[float], ys: Sequence[float], more_is_better: bool
) -> list[tuple[float, float]]:
    """The points that no other one beats in both: y lower is better, x lower or higher."""
    best, line = float("inf"), []
    sign = -1 if more_is_better else 1
    for x, y in sorted(zip(xs, ys, strict=True), key=lambda p: (sign * p[0], p[1])):
        if y < best:
            best = y
            line.append((x, y))
    return line


def _padded(low: float, high: float, floor: float, share: float) -> list[float]:
    """A range with room around it, and never narrower than twice `floor`."""
    pad = max(share * (high - low), floor - (high - low) / 2)
    return [low - pad, high + pad]


def _label_places(
    xs: Sequence[float],
    ys: Sequence[float],
    labels: Sequence[str],
    x_range: Sequence[float],
    y_range: Sequence[float],
) -> list[str]:
    """For each label the side of its point where it covers least, on a plot of usual size."""
    px = [820 * (x - x_range[0]) / (x_range[1] - x_range[0]) for x in xs]
    py = [380 * (y_range[1] - y) / (y_range[1] - y_range[0]) for y in ys]
    taken = [(x - 8, y - 8, x + 8, y + 8) for x, y in zip(px, py, strict=True)]
    places = []
    for x, y, label in zip(px, py, labels, strict=True):
        width = 6.6 * len(label)
        boxes = {
            "middle right": (x + 9, y - 8, x + 9 + width, y + 8),
            "middle left": (x - 9 - width, y - 8, x - 9, y + 8),
            "top right": (x + 5, y - 22, x + 5 + width, y - 6),
            "bottom right": (x + 5, y + 6, x + 5 + width, y + 22),
            "top left": (x - 5 - width, y - 22, x - 5, y - 6),
            "bottom left": (x - 5 - width, y + 6, x - 5, y + 22),
        }
        place = min(boxes, key=lambda side: _covered(boxes[side], taken))
        taken.append(boxes[place])
        places.append(place)
    return places


Box = tuple[float, float, float, float]  # left, top, right, bottom; pixels


def _covered(box: Box, taken: Sequence[Box]) -> float:
    """Area of the box that others or the edge of the plot take."""
    left, top, right, bottom = box
    area = sum(
        max(0.0, min(right, r) - max(left, x)) * max(0.0, min(bottom, b) - max(top, t))
        for x, t, r, b in taken
    )
    return area + 16 * (max(0.0, right - 820) + max(0.0, -left))
