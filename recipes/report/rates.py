"""Bits per byte against the peak learning rate, a line per variant and precision."""

from collections.abc import Sequence

from recipes.report import text
from recipes.report.figures import Figure, meta
from recipes.report.study import Group, Study
from recipes.report.trials import Trial, held, tally, told

ASIDE = 1.04  # by which the points of a group stand beside those of the one before


def rates(study: Study, trials: Sequence[Trial]) -> Figure | None:
    """Each run against its learning rate, and the mean where none diverged; None for one rate."""
    lrs = sorted({t.lr for t in trials if t.lr})
    if len(lrs) < 2:
        return None
    known = held(trials)
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    pad = 0.08 * (high - low) or 0.1
    top = high + 2 * pad  # where runs stand that diverged: their loss would squeeze the others
    data = []
    for i, g in enumerate(study.groups):
        mine = [t for t in trials if (t.variant, t.precision) == g.key and t.lr]
        beside = ASIDE ** (i - (len(study.groups) - 1) / 2)
        data += [_line(study, g, mine), _points(study, g, mine, top, beside)]
    return {
        "views": [
            {
                "data": data,
                "layout": {
                    "height": 400,
                    "showlegend": True,
                    "legend": {"orientation": "h", "y": 1.12},
                    "xaxis": {
                        "type": "log",
                        "tickvals": lrs,
                        "ticktext": [f"{lr:g}" for lr in lrs],
                        "title": {"text": "peak learning rate"},
                    },
                    "yaxis": {
                        "title": {"text": "bits per byte, held-out (✕ diverged)"},
                        "range": [low - pad, top + pad],
                    },
                },
            }
        ]
    }


def _line(study: Study, g: Group, trials: Sequence[Trial]) -> Figure:
    """The mean over seeds; broken where a seed diverged."""
    whole = [None if tally(t.runs).diverged else t.bpb for t in trials]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": text.safe(g.label),
        "legendgroup": text.safe(g.label),
        "x": [t.lr for t in trials],
        "y": whole,
        "line": {
            "color": study.look.tones[g.key],
            "dash": study.look.dashes[g.precision],
            "width": 2,
        },
        "hoverinfo": "skip",
        "meta": meta(g),
    }


def _points(study: Study, g: Group, trials: Sequence[Trial], top: float, beside: float) -> Figure:
    """Every run; those that diverged at the upper edge, those of other groups a little beside."""
    runs = [(t.lr, r) for t in trials for r in t.runs]
    colour = study.look.tones[g.key]
    symbols = ["x" if r.diverged else study.look.markers[g.precision] for _, r in runs]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": text.safe(g.label),
        "legendgroup": text.safe(g.label),
        "showlegend": False,
        "x": [(lr or 0.0) * beside for lr, _ in runs],
        "y": [top if r.diverged else r.final.bpb for _, r in runs],
        "text": [f"{text.safe(r.id)}<br>{told(r, study.digits)}" for _, r in runs],
        "marker": {
            "color": colour,
            "symbol": symbols,
            "size": [10 if r.diverged else 7 for _, r in runs],
            "line": {"width": [0 if r.diverged else 1.5 for _, r in runs], "color": colour},
        },
        "hovertemplate": "<b>%{text}</b><extra></extra>",
        "meta": meta(g),
    }
