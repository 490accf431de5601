"""The sections of the page below the headline; one with nothing to show is None."""

from collections.abc import Iterable
from dataclasses import dataclass

from recipes.report import bars, figures, heat, tables
from recipes.report.density import density
from recipes.report.depth import depth
from recipes.report.domains import domain_table
from recipes.report.figures import Figure, plot
from recipes.report.frontier import frontier
from recipes.report.headline import name
from recipes.report.health import health
from recipes.report.memory import memory
from recipes.report.probes import probes
from recipes.report.provenance import provenance
from recipes.report.stability import stability
from recipes.report.study import Group, Study
from recipes.report.text import Markup, anchor, el, folded, join, lead, swatch
from recipes.report.widths import widths

DASH_ARRAYS = {
    "solid": None, "dash": "6 4", "dot": "1.5 4", "dashdot": "7 4 1.5 4",
    "longdash": "11 4", "longdashdot": "11 4 1.5 4",
}  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A part of the page that one can link to."""

    title: str
    body: Markup

    @property
    def id(self) -> str:
        """For links."""
        return anchor(self.title)


def sections(study: Study) -> list[Section]:
    """All that have data, in order."""
    made = (
        ("Results", _results(study)),
        ("Loss curves", _curves(study)),
        ("Quality against cost", _frontier(study)),
        ("Precision gap", _gap(study)),
        ("Stability", stability(study)),
        ("What the formats did to the operands", probes(study)),
        ("Expert load", _load(study)),
        ("Router health", health(study, legend(study))),
        ("Memory", memory(study, legend(study))),
        ("Density", density(study, legend(study))),
        ("Depth", depth(study, legend(study))),
        ("Widths", widths(study, legend(study))),
        ("Domains", _domains(study)),
        ("Samples", _samples(study)),
        ("Cost by role", _roles(study)),
        ("Recipes and machines", provenance(study)),
    )
    return [Section(title, body) for title, body in made if body is not None]


def tabs(key: str, of: str, labels: Iterable[str]) -> Markup:
    """Buttons that switch a plot."""
    buttons = (
        el("button", label, type="button", data_i=i, aria_pressed="true" if i == 0 else "false")
        for i, label in enumerate(labels)
    )
    return el("div", *buttons, class_="tabs", data_plot=key, data_of=of)


def legend(study: Study) -> Markup:
    """Variants by colour and precisions by dash; a click hides one in every plot of the page."""
    variants = (
        el(
            "button",
            swatch(study.look.colours[v]),
            v,
            type="button",
            data_variant=v,
            aria_pressed="true",
        )
        for v in study.variants
    )
    precisions = (
        el("button", _dash(study, p), p, type="button", data_precision=p, aria_pressed="true")
        for p in study.precisions
    )
    return el("div", *variants, el("span", class_="gap"), *precisions, class_="legend")


def _dash(study: Study, precision: str) -> Markup:
    dashes = DASH_ARRAYS[study.look.dashes[precision]]
    line = el("line", x1=1, x2=39, y1=7, y2=7, stroke_dasharray=dashes)
    glyph = el("text", study.look.glyphs[precision], x=20, y=11)
    return el("svg", line, glyph, width=40, height=14, class_="dash", aria_hidden="true")


def _results(study: Study) -> Markup:
    return join(tables.main_table(study), tables.runs_table(study))


def _curves(study: Study) -> Markup | None:
    figure = figures.curves(study)
    if figure is None:
        return None
    x, y = ([a["label"] for a in figure["axes"][axis]] for axis in "xy")
    bar = el(
        "div",
        tabs("curves", "x", x),
        tabs("curves", "y", y) if len(y) > 1 else None,
        class_="controls",
    )
    note = lead(
        "The window opens on the part where runs differ; a double click shows the whole curve. "
        "Further seeds of a variant are drawn fainter."
    )  # fmt: skip
    return join(note, bar, legend(study), plot(figure, "curves", "Loss curves"))


def _frontier(study: Study) -> Markup | None:
    figure = frontier(study)
    if figure is None:
        return None
    bar = el(
        "div", tabs("frontier", "view", (v["label"] for v in figure["views"])), class_="controls"
    )
    note = lead(
        "Lower is better. The dotted line joins the runs that no other one beats in both. ",
        "The bars are 95\u00a0% intervals of the mean."
        if study.noise
        else "The noise is unknown, so there are no bars.",
    )
    return join(note, bar, legend(study), plot(figure, "frontier", "Bits per byte against cost"))


def _gap(study: Study) -> Markup | None:
    figure = bars.precision_gap(study)
    if figure is None:
        return None
    band = "A gap inside the grey band is within the noise of two single runs. "
    note = lead(
        f"What a variant loses by leaving {study.reference}. ",
        band if study.noise else None,
        "Hatched bars are not resolved.",
    )
    return join(note, plot(figure, "gap", f"Gap of each precision to {study.reference}"))


def _load(study: Study) -> Markup | None:
    groups = study.moe_groups()
    if not groups:
        return None
    shown, rest = study.split(groups, most=8)
    cards = [_load_card(study, g, f"load-{i}") for i, g in enumerate(shown)]
    more = [_load_card(study, g, f"more-load-{i}") for i, g in enumerate(rest)]
    note = lead(
        "Assignments per expert on held-out text, relative to an even spread over all experts of "
        "the layer. Zero-computation experts stand apart, on the right."
    )
    by_domain = heat.load_by_domain(study)
    return join(
        note,
        folded(cards, more, "The other precisions", "cards"),
        _domain_explorer(by_domain) if by_domain else None,
        tables.load_table(study),
    )


def _load_card(study: Study, g: Group, key: str) -> Markup:
    numbers = el("span", heat.caption(g.first), class_="quiet right")
    picture = plot(heat.load_by_layer(g.first), key, f"Expert load of {g.words}")
    return el("figure", el("figcaption", name(study, g), numbers), picture)


def _domain_explorer(figure: Figure) -> Markup:
    selects = [_select(figure, of) for of in figure["selects"]]
    return join(
        el("h3", "By domain"),
        el("div", *selects, class_="controls"),
        plot(figure, "domains", "Expert load by domain"),
    )


def _select(figure: Figure, of: str) -> Markup:
    values = dict.fromkeys(view[of] for view in figure["views"])
    options = (el("option", v, value=v) for v in values)
    return el(
        "label", f"{of.capitalize()} ", el("select", *options, data_plot="domains", data_of=of)
    )


def _domains(study: Study) -> Markup | None:
    table = domain_table(study)
    note = lead(
        "Bits per byte by domain. Blue is below the baseline in the same domain, orange above; "
        "what lies within the noise of that domain has no colour."
    )
    return join(note, table) if table else None


def _samples(study: Study) -> Markup | None:
    groups = [g for g in study.groups if g.first.sample]
    shown, rest = ([_sample(study, g) for g in part] for part in study.split(groups, most=12))
    return folded(shown, rest, "The other precisions", "cards") if groups else None


def _sample(study: Study, g: Group) -> Markup:
    sample = g.first.sample
    assert sample is not None, "the caller left groups without a sample out"
    body = el("blockquote", el("b", sample.prompt), sample.text)
    return el("figure", el("figcaption", name(study, g)), body, class_="sample")


def _roles(study: Study) -> Markup | None:
    plots = [
        el("figure", el("figcaption", title), plot(figure, f"role-{of}", title))
        for of, title in (("flops", "FLOPs per token, forward"), ("params", "Parameters"))
        if (figure := bars.by_role(study, of))
    ]
    if not plots:
        return None
    colours = bars.role_colours(study).items()
    key = (el("span", swatch(colour), role) for role, colour in colours)
    return join(el("div", *key, class_="legend"), el("div", *plots, class_="cards"))
