"""What the formats did to the operands: signal to noise by leaf, over steps, and scales."""

from layers.precision.operands import OPERANDS
from recipes.report.figures import Figure, plot
from recipes.report.probe_figures import heat_maps, lines, look_of_operand, scales, words_of
from recipes.report.study import Study
from recipes.report.text import Markup, el, join, lead

DASH_ARRAYS = {"solid": None, "dash": "6 4", "dot": "1.5 4"}


def probes(study: Study) -> Markup | None:
    """Heat map, lines and histogram of the runs that were probed; None where none was."""
    groups = [g for g in study.groups if any(s.operands for s in g.first.probes)]
    if not groups:
        return None
    note = lead(
        "Each operand as it was multiplied, rotated where its recipe rotates it, against what it "
        "was before: 10\u00a0log10 of the sum of squares over the sum of squared errors. More is "
        "better; one bit of a mantissa is worth 6\u00a0dB. A leaf that is only cast is not "
        "quantised and does not show; an empty cell had no error."
    )
    words = {
        "lines": "The median over the leaves; thin, the worst of them.",
        "scales": "Non-zero values by the exponent of their block's scale, at the last probed "
        "step; where blocks have none, of the tensor's or the row's.",
    }
    return join(
        note,
        explorer(heat_maps(groups), "probes-heat", "Signal to noise by leaf and operand"),
        el("h3", "Over the steps"),
        lead(words["lines"]),
        _legend(),
        explorer(lines(groups), "probes-lines", "Error of the operands over the steps"),
        el("h3", "Scales"),
        lead(words["scales"]),
        explorer(scales(groups), "probes-scales", "Exponents of the block scales"),
    )


def explorer(figure: Figure, key: str, label: str) -> Markup:
    """A figure of several views, and a menu for each thing that they differ in."""
    menus = [menu for of in figure["selects"] if (menu := _menu(figure, key, of))]
    bar = el("div", *menus, class_="controls") if menus else None
    return join(bar, plot(figure, key, label))


def _menu(figure: Figure, key: str, of: str) -> Markup | None:
    values = dict.fromkeys(view[of] for view in figure["views"])
    if len(values) < 2:
        return None
    options = (el("option", v, value=v) for v in values)
    return el("label", f"{of.capitalize()} ", el("select", *options, data_plot=key, data_of=of))


def _legend() -> Markup:
    return el("div", *(el("span", _stroke(o), words_of(o)) for o in OPERANDS), class_="legend")


def _stroke(operand: str) -> Markup:
    colour, dash = look_of_operand(operand)
    style, dashes = f"stroke:{colour}", DASH_ARRAYS[dash]
    line = el("line", x1=1, x2=31, y1=7, y2=7, style=style, stroke_dasharray=dashes)
    return el("svg", line, width=32, height=14, class_="dash", aria_hidden="true")
