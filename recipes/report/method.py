"""How the report judges and what was held equal: the fine print of its headline."""

from recipes.report import text
from recipes.report.records import Match
from recipes.report.study import Study
from recipes.report.text import Markup, el, swatch
from recipes.statistics.paired import EQUIVALENCE

BUDGETS = {
    "active_flops": ("active FLOPs per token", "FLOP"),
    "flops": ("FLOPs per token", "FLOP"),
    "params": ("parameters", ""),
    "active_params": ("active parameters", ""),
    "weight_bytes": ("weight bytes per token", "B"),
}


def budget_table(study: Study) -> Markup | None:
    """How nearly each variant reaches the budget; None where nothing was held equal."""
    c = study.results.comparison
    if not c or not c.held_equal or not c.matched:
        return None
    what, unit = BUDGETS[c.held_equal]
    goal = f", target {text.si(c.target, unit)}" if c.target else ""
    heads = [
        el("th", "Variant", scope="col"),
        el("th", "By turning", scope="col"),
        el("th", "Reached", scope="col", class_="num"),
        el("th", "Off by", scope="col", class_="num"),
    ]
    body = [_match_row(study, m, unit) for m in c.matched]
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *body), class_="plain")
    return el(
        "div",
        el("h3", f"Held equal: {what}{goal}"),
        el("div", table, class_="scroll"),
        class_="part",
    )


def _match_row(study: Study, m: Match, unit: str) -> Markup:
    turned = "nothing, as given"
    if m.width_field and m.width is not None:
        turned = f"{m.width_field} = {m.width:,}"
    colour = study.look.colours.get(m.variant)
    return el(
        "tr",
        el("td", swatch(colour) if colour else None, m.variant),
        el("td", turned),
        el("td", text.si(m.value, unit), class_="num", title=text.exact(m.value)),
        el("td", f"{text.signed(100 * m.residual, 2)}\u00a0%", class_="num"),
    )


def method(study: Study) -> Markup:
    """How verdicts come about, formulas included; folded."""
    b = study.baseline
    values = ", ".join(text.bpb(x, study.digits) for x in b.seeds.values())
    items = (
        f"The noise s is the standard deviation (divisor n − 1) over the baseline's n = "
        f"{len(b.runs)} seeds: {values}. A seed changes the initial weights and the order of the "
        "data together.",
        "A variant with m seeds differs by d = mean(variant) − mean(baseline). The 95 % interval "
        "of a single run, and of several, is d ± t(0.975, n − 1) · s · √(1/m + 1/n).",
        "Where the variant has two or more seeds, s is pooled: s² = [(n − 1) s²(baseline) + "
        "(m − 1) s²(variant)] / (n + m − 2), with n + m − 2 degrees of freedom.",
        "Where both have k ≥ 3 seeds in common, d is taken seed by seed: "
        "mean(dᵢ) ± t(0.975, k − 1) · std(dᵢ) / √k; with three or more other seeds each, by "
        "Welch's test. Fewer seeds are better or worse “by noise” only, a single run from 3 s on; "
        "in a study fewer than three in common are never called either.",
        "p is two-sided, from the same t. Holm's correction over the h differences of a table "
        "sorts them, p₁ ≤ … ≤ pₕ, and raises pᵢ to the largest (h − j + 1) · pⱼ with j ≤ i, "
        "1 at most. Corrected p ≤ 0.05 is better or worse, anything else not resolved. "
        "The intervals shown are not corrected.",
        f"Equivalent is what is not resolved, has three seeds or more, and passes two one-sided "
        f"tests of |d| < {EQUIVALENCE:.2%} of the baseline's bits per byte, corrected likewise.",
        "With fewer than two baseline seeds the noise is unknown and nothing is resolved.",
        "The ± beside a mean is t(0.975) · s / √m, with the pooled s.",
        f"Precision gaps are a table of their own: d = mean(precision) − mean({study.reference}) "
        "of one variant, the same formulas, s pooled over baseline and both groups.",
    )
    summary = el("summary", "How a verdict is reached")
    return el("details", summary, el("ul", *(el("li", item) for item in items)))
