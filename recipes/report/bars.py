"""Bars: what a precision costs each variant, and where FLOPs and parameters lie."""

from collections.abc import Sequence

from recipes.report import text
from recipes.report.figures import Figure, meta
from recipes.report.look import role_colour
from recipes.report.study import Group, Study


def precision_gap(study: Study) -> Figure | None:
    """Bits per byte of each precision minus those of the reference, per variant.

    A gap that the noise does not resolve is hatched and says so. None where one precision ran.
    """
    groups = [g for g in study.groups if g.key in study.gaps]
    if not groups:
        return None
    layout: Figure = {
        "height": 110 + 34 * len(groups),
        "xaxis": {
            "title": {"text": f"bits per byte above {text.safe(study.reference)} (less is better)"},
            "zeroline": True,
        },
        "yaxis": {"autorange": "reversed", "automargin": True, "showgrid": False},
        "bargap": 0.35,
        "showlegend": False,
    }
    unpaired = [d for d in study.gaps.values() if d.half and not d.how.startswith("paired")]
    if unpaired:
        half = max(d.half for d in unpaired if d.half)
        layout["shapes"] = [
            {"type": "rect", "xref": "x", "yref": "paper", "x0": -half, "x1": half,
             "y0": 0, "y1": 1, "line": {"width": 0}, "fillcolor": "rgba(139,146,156,0.14)",
             "layer": "below"}
        ]  # fmt: skip
    return {"views": [{"data": [_gap_bar(study, g) for g in groups], "layout": layout}]}


def _gap_bar(study: Study, group: Group) -> Figure:
    d, colour = study.gaps[group.key], study.look.colours[group.variant]
    value = text.signed(d.value, study.digits)
    words = value if d.resolved else f"{value}  {d.word}"
    interval = f" ± {d.half:.{study.digits}f}" if d.half else ""
    return {
        "type": "bar",
        "orientation": "h",
        "name": text.safe(group.label),
        "x": [d.value],
        "y": [text.safe(group.label)],
        "text": [words],
        "textposition": "none",
        "marker": {
            "color": colour,
            "opacity": 1 if d.resolved else 0.45,
            "line": {"color": colour, "width": 1},
            "pattern": {
                "shape": "" if d.resolved else "/",
                "size": 6,
                "solidity": 0.3,
                "fillmode": "overlay",
            },
        },
        "error_x": {"array": [d.half], "thickness": 1.2, "width": 4} if d.half else None,
        "hovertemplate": f"<b>{text.safe(group.label)}</b><br>{value}{interval} bpb, "
        f"{d.word}<br>{d.how}<extra></extra>",
        "meta": {**meta(group), "label": words, "edge": d.value + (d.half or 0)},
    }


def role_colours(study: Study) -> dict[str, str]:
    """A colour for every module role that some variant spends FLOPs or parameters on."""
    costs = [g.first.cost for g in study.groups]
    parts = [part for c in costs for part in (c.flops_by_role, c.params_by_role)]
    roles = dict.fromkeys(role for part in parts for role, x in part.items() if x)
    return {role: role_colour(role, i) for i, role in enumerate(roles)}


def by_role(study: Study, of: str) -> Figure | None:
    """Stacked bars, one per variant: `of` is "flops" (per token, forward) or "params"."""
    shown = [next(g for g in study.groups if g.variant == v) for v in study.variants]
    split = [(g, getattr(g.first.cost, f"{of}_by_role")) for g in shown]
    if not any(parts for _, parts in split):
        return None
    unit = "FLOPs per token" if of == "flops" else "parameters"
    data = []
    for role, colour in role_colours(study).items():
        having = [(g, parts[role]) for g, parts in split if parts.get(role)]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": text.safe(role),
                "x": [x for _, x in having],
                "y": [text.safe(g.variant) for g, _ in having],
                "marker": {"color": colour},
                "customdata": [text.si(x) for _, x in having],
                "hovertemplate": f"<b>%{{y}}</b><br>{text.safe(role)} %{{customdata}} {unit}"
                "<extra></extra>",
            }
        )
    return {"views": [{"data": data, "layout": _role_layout([g.variant for g in shown], unit)}]}


def _role_layout(variants: Sequence[str], unit: str) -> Figure:
    return {
        "height": 100 + 32 * len(variants),
        "barmode": "stack",
        "bargap": 0.3,
        "xaxis": {"title": {"text": unit}, "tickformat": "~s"},
        "yaxis": {
            "autorange": "reversed",
            "showgrid": False,
            "categoryorder": "array",
            "categoryarray": [text.safe(v) for v in variants],
        },
    }
