"""The sections of the page below the headline; one with nothing to show is None."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from recipes.report import bars, figures, heat, tables
from recipes.report.figures import Figure
from recipes.report.headline import name, swatch
from recipes.report.study import Group, Study
from recipes.report.text import Content, Markup, anchor, el, join

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
        ("Expert load", _load(study)),
        ("Domains", _domains(study)),
        ("Samples", _samples(study)),
        ("Cost by role", _roles(study)),
        ("Recipes and machines", _recipes(study)),
    )
    return [Section(title, body) for title, body in made if body is not None]


def plot(figure: Figure, key: str, label: str) -> Markup:
    """A place that the page's script draws into, and its data; safe inside HTML."""
    data = json.dumps(figure, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        data = data.replace(char, f"\\u{ord(char):04x}")
    height = (figure.get("layout") or figure["views"][0]["layout"])["height"]
    return join(
        el("div", class_="plot", id=f"plot-{key}", role="img", aria_label=label, style=f"height:{height}px"),
        Markup(f'<script type="application/json" id="data-{key}">{data}</script>'),
    )  # fmt: skip


def lead(*content: Content) -> Markup:
    """What a section shows and how to read it."""
    return el("p", *content, class_="lead")


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
        el("button", swatch(study, v), v, type="button", data_variant=v, aria_pressed="true")
        for v in study.variants
    )
    precisions = (
        el("button", _dash(study, p), p, type="button", data_precision=p, aria_pressed="true")
        for p in study.precisions
    )
    return el("div", *variants, el("span", class_="gap"), *precisions, class_="legend")


def _dash(study: Study, precision: str) -> Markup:
    dashes = DASH_ARRAYS[study.look.dashes[precision]]
    line = el("line", x1=1, x2=27, y1=5, y2=5, stroke_dasharray=dashes)
    return el("svg", line, width=28, height=10, class_="dash", aria_hidden="true")


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
    figure = figures.frontier(study)
    if figure is None:
        return None
    bar = el(
        "div", tabs("frontier", "view", (v["label"] for v in figure["views"])), class_="controls"
    )
    note = lead(
        "Lower is better. The dotted line joins the runs that no other one beats in both. "
        + ("Bars are 95 % intervals of the mean." if study.noise else "The noise is unknown, so there are no bars.")
    )  # fmt: skip
    return join(note, bar, legend(study), plot(figure, "frontier", "Bits per byte against cost"))


def _gap(study: Study) -> Markup | None:
    figure = bars.precision_gap(study)
    if figure is None:
        return None
    band = "The grey band is where the noise of two single runs puts no difference at all. "
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
    cards = [
        el("figure", el("figcaption", name(study, g), el("span", heat.caption(g), class_="quiet right")),
           plot(heat.load_by_layer(g.first), f"load-{i}", f"Expert load of {g.label}"))
        for i, g in enumerate(groups)
    ]  # fmt: skip
    note = lead(
        "Assignments per expert on held-out text, relative to an even spread over all experts of "
        "the layer. Zero-computation experts stand apart, on the right."
    )
    by_domain = heat.load_by_domain(study)
    return join(
        note,
        el("div", *cards, class_="cards"),
        _domain_explorer(by_domain) if by_domain else None,
        tables.load_table(study),
    )


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
    table = tables.domain_table(study)
    note = lead(
        "Bits per byte by domain. Blue is below the baseline in the same domain, orange above."
    )
    return join(note, table) if table else None


def _samples(study: Study) -> Markup | None:
    cards = [_sample(study, g) for g in study.groups if g.first.sample]
    return el("div", *cards, class_="cards") if cards else None


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
    return el("div", *plots, class_="cards") if plots else None


def _recipes(study: Study) -> Markup | None:
    runs = [r for g in study.groups for r in g.runs]
    base = _flat(study.baseline.first.recipe)
    recipes = [_recipe(r.id, r.recipe, base) for r in runs if r.recipe]
    c = study.results.comparison
    allowed = ", ".join(c.allowed_differences) if c else ""
    parts = [
        lead("Recipes may differ in: ", el("code", allowed), ". Anything else was refused.") if allowed else None,
        el("div", *recipes, class_="recipes") if recipes else None,
        *_provenance(study),
    ]  # fmt: skip
    return join(*parts) if recipes or parts[2:] else None


def _recipe(run_id: str, recipe: dict[str, Any], base: dict[str, Any]) -> Markup:
    """Folded: the whole recipe; unfolded: where it differs from the baseline's."""
    mine = _flat(recipe)
    changed = [f"{k}={_short(mine.get(k))}" for k in {**mine, **base} if mine.get(k) != base.get(k)]
    note = ", ".join(changed) or "the baseline's recipe"
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    summary = el("summary", el("code", run_id), " ", el("span", note, class_="quiet"))
    return el("details", summary, el("pre", text))


def _flat(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        deeper = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if deeper else {f"{prefix}{key}": value}
    return flat


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _provenance(study: Study) -> list[Markup]:
    """Versions, commit and machine: each combination once, with how many runs have it."""
    made: dict[str, tuple[list[Markup], int]] = {}
    for run in study.results.runs:
        facts = {**run.versions, "commit": run.commit, **run.machine}
        facts = {k: v for k, v in facts.items() if v is not None}
        key = json.dumps(facts, sort_keys=True, default=str)
        rows = [el("tr", el("th", k, scope="row"), el("td", str(v))) for k, v in facts.items()]
        made[key] = (rows, made.get(key, (rows, 0))[1] + 1)
    shown = [(rows, n) for rows, n in made.values() if rows]
    if not shown:
        return []
    cards = [
        el("figure", el("figcaption", f"{n} run{'s' * (n > 1)}"), el("table", el("tbody", *rows), class_="plain"))
        for rows, n in shown
    ]  # fmt: skip
    return [el("h3", "Versions and machines"), el("div", *cards, class_="cards")]
