"""The top of the report: what was compared, how fairly, and the verdicts in plain words."""

from collections import Counter
from math import isfinite

from recipes.report import text
from recipes.report.noise import Difference
from recipes.report.records import Match
from recipes.report.study import Group, Study
from recipes.report.text import Markup, el, join

BUDGETS = {
    "active_flops": ("active FLOPs per token", "FLOP"),
    "flops": ("FLOPs per token", "FLOP"),
    "params": ("parameters", ""),
    "active_params": ("active parameters", ""),
    "weight_bytes": ("weight bytes per token", "B"),
}
CHIP = {"better": "better", "worse": "worse", "not resolved": "unresolved", "baseline": "baseline"}


def headline(study: Study) -> Markup:
    """Facts, one row per judged group, and fold-outs for the budget and the statistics."""
    return join(
        el("div", *_facts(study), class_="facts"),
        _summary(study),
        _forest(study),
        _budget_table(study),
        _method(study),
    )


def _facts(study: Study) -> list[Markup]:
    runs, c = study.results.runs, study.results.comparison
    corpora = _distinct(r.recipe.get("data", {}).get("corpus") for r in runs)
    tokens = sorted({r.tokens for r in runs})
    facts = [("Runs", str(len(runs)), _shape(study))]
    if corpora:
        tokenizers = _distinct(r.recipe.get("data", {}).get("tokenizer") for r in runs)
        facts.append(("Data", ", ".join(corpora), f"tokens: {', '.join(tokenizers) or 'unknown'}"))
    spread = (
        text.si(tokens[0]) if len(tokens) == 1 else f"{text.si(tokens[0])} to {text.si(tokens[-1])}"
    )
    facts.append(("Tokens per run", spread, f"{_span([r.steps for r in runs])} steps"))
    if c and c.held_equal:
        worst = max((abs(m.residual) for m in c.matched), default=0.0)
        within = f"{BUDGETS[c.held_equal][0]}, within {text.percent(worst, 2)}"
        value = text.si(c.target, BUDGETS[c.held_equal][1]) if c.target else "equal"
        facts.append(("Held equal", value, within))
    n = len(study.baseline.runs)
    if study.noise:
        noise = (
            f"{study.noise.std:.{study.digits}f}",
            f"bpb, std over {n} seeds of {study.baseline.label}",
        )
    else:
        noise = ("unknown", f"{study.baseline.label} has {n} seed{'s' * (n > 1)}")
    facts.append(("Noise", *noise))
    return [
        el("div", el("div", k, class_="key"), el("div", v, class_="value"), el("div", note, class_="note"))
        for k, v, note in facts
    ]  # fmt: skip


def _shape(study: Study) -> str:
    v, p = len(study.variants), len(study.precisions)
    return f"{v} variant{'s' * (v > 1)}, {p} precision{'s' * (p > 1)}"


def _distinct(values: object) -> list[str]:
    return list(dict.fromkeys(str(v) for v in values if v is not None))  # type: ignore[attr-defined]


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _summary(study: Study) -> Markup | None:
    """How many are better, worse and not resolved; and what the report cannot say."""
    if not study.verdicts:
        return None
    if not study.results.comparison:
        lead = "These runs were laid side by side; nothing says that they differ in their labels alone. "
    else:
        lead = ""
    if study.noise is None:
        how = next(iter(study.verdicts.values())).how
        reason = f"No difference is resolved: {how}. Train at least two seeds of the baseline, better four."
        return el("p", lead, reason, class_="lead")
    words = Counter(d.word for d in study.verdicts.values())
    parts = [f"{words[w]} {w}" for w in ("better", "worse", "not resolved") if words[w]]
    told = f"Against {study.baseline.label}: {', '.join(parts)}. "
    rest = "A difference inside the measured noise is not resolved, whichever way it points."
    return el("p", lead, el("strong", told), rest, class_="lead")


def sentence(study: Study, group: Group) -> str:
    """The difference of a group to the baseline, in words that stand alone."""
    d = study.verdicts[group.key]
    if not isfinite(d.value):
        return f"{d.how}: nothing to compare."
    way = "lower" if d.value < 0 else "higher"
    text_ = f"{abs(d.value):.{study.digits}f} bits per byte {way} than {study.baseline.label}"
    if d.half is None:
        return f"{text_}: not resolved, {d.how}."
    low, high = (text.signed(d.value + s * d.half, study.digits) for s in (-1, 1))
    return f"{text_} (95 % interval {low} to {high}): {_reason(d)}."


def _reason(d: Difference) -> str:
    """The verdict, and why where the interval alone would say otherwise."""
    if d.word == "not resolved" and d.half is not None and abs(d.value) > d.half:
        return "not resolved, after Holm's correction over the table"
    return d.word


def _forest(study: Study) -> Markup | None:
    """One row per judged group: sentence, interval as a picture, verdict."""
    groups = [g for g in study.groups if g.key in study.verdicts]
    if not groups:
        return None
    judged = [study.verdicts[g.key] for g in groups]
    reach = max((abs(d.value) + (d.half or 0) for d in judged if isfinite(d.value)), default=0) or 1
    rows = [_forest_row(study, g, 1.08 * reach) for g in groups]
    axis = el(
        "div",
        el("span", "← better"),
        el("span", f"{study.baseline.label}"),
        el("span", "worse →"),
        class_="forest-axis",
    )
    return el("div", el("div", axis, class_="forest-head"), *rows, class_="forest")


def _forest_row(study: Study, group: Group, reach: float) -> Markup:
    d, colour = study.verdicts[group.key], study.look.colours[group.variant]

    def x(value: float) -> str:
        return f"{50 + 50 * value / reach:.2f}%"

    shapes = [el("line", x1="50%", x2="50%", y1="0", y2="100%", class_="zero")]
    if isfinite(d.value):
        if d.half is not None:
            ends = {"x1": x(d.value - d.half), "x2": x(d.value + d.half)}
            shapes.append(el("line", **ends, y1="50%", y2="50%", stroke=colour, stroke_width=3))
        resolved = d.word != "not resolved"
        fill = colour if resolved else "var(--surface)"
        shapes.append(
            el("circle", cx=x(d.value), cy="50%", r=5.5, fill=fill, stroke=colour, stroke_width=2)
        )
    number = text.signed(d.value, study.digits)
    return el(
        "div",
        el("div", el("div", name(study, group), class_="who"), el("p", sentence(study, group)), class_="say"),
        el("svg", *shapes, role="img", aria_label=f"{group.label}: {number}"),
        el("div", el("span", number, class_="num"), chip(d.word), class_="mark"),
        class_="forest-row",
        data_variant=group.variant,
        data_precision=group.precision,
    )  # fmt: skip


def name(study: Study, group: Group) -> Markup:
    """Variant with its colour, precision quietly behind it."""
    return join(
        swatch(study, group.variant),
        el("b", group.variant),
        " ",
        el("span", group.precision, class_="quiet"),
    )


def swatch(study: Study, variant: str) -> Markup:
    """The colour of a variant."""
    return el("i", class_="swatch", style=f"--c:{study.look.colours[variant]}")


def chip(word: str) -> Markup:
    """A verdict."""
    return el("span", word, class_=f"chip {CHIP[word]}")


def _budget_table(study: Study) -> Markup | None:
    c = study.results.comparison
    if not c or not c.held_equal or not c.matched:
        return None
    what, unit = BUDGETS[c.held_equal]
    goal = f", target {text.si(c.target, unit)}" if c.target else ""
    head = ("Variant", "Turned", f"Reached ({what})", "Off by")
    body = [_match_row(study, m, unit) for m in c.matched]
    table = el(
        "table",
        el(
            "thead",
            el("tr", *(el("th", h, class_="num" if i > 1 else None) for i, h in enumerate(head))),
        ),
        el("tbody", *body),
        class_="plain",
    )
    return el(
        "div",
        el("h3", f"Held equal: {what}{goal}"),
        el("div", table, class_="scroll"),
        class_="part",
    )


def _match_row(study: Study, m: Match, unit: str) -> Markup:
    turned = (
        f"{m.width_field} = {m.width:,}" if m.width_field and m.width is not None else "as given"
    )
    known = m.variant in study.look.colours
    return el(
        "tr",
        el("td", swatch(study, m.variant) if known else None, m.variant),
        el("td", turned),
        el("td", text.si(m.value, unit), class_="num", title=text.exact(m.value)),
        el("td", f"{text.signed(100 * m.residual, 2)} %", class_="num"),
    )


def _method(study: Study) -> Markup:
    """How verdicts come about, formulas included."""
    b, digits = study.baseline, study.digits
    values = ", ".join(f"{x:.{digits}f}" for x in b.seeds.values())
    items = [
        f"Noise: s is the standard deviation (n - 1) of the baseline's n = {len(b.runs)} seeds ({values}). "
        "Seeds change the initial weights and the order of the data together.",
        "A variant with m seeds differs by d = mean(variant) - mean(baseline). Its 95 % interval is "
        "d ± t(0.975, n - 1) · s · √(1/m + 1/n).",
        "Where the variant has several seeds of its own, s is pooled: "
        "s² = [(n - 1) s²(baseline) + (m - 1) s²(variant)] / (n + m - 2), with n + m - 2 degrees of freedom.",
        "Where both have the same k ≥ 3 seeds, d is taken seed by seed: d ± t(0.975, k - 1) · std(dᵢ) / √k.",
        "p is two-sided from the same t. Over a table of h differences Holm's correction orders them, "
        "p₍₁₎ ≤ … ≤ p₍ₕ₎, and takes max over j ≤ i of min(1, (h - j + 1) · p₍ⱼ₎). "
        "A corrected p ≤ 0.05 is better or worse; anything else is not resolved. The intervals shown are not corrected.",
        "Fewer than two baseline seeds measure no noise, and nothing is resolved.",
        "The ± beside a mean is t(0.975) · s / √m with the pooled s. The precision gaps are a table of their own: "
        "d = mean(precision) - mean(reference precision) of the same variant, same formulas, s pooled with the baseline.",
    ]  # fmt: skip
    return el(
        "details",
        el("summary", "How a verdict is reached"),
        el("ul", *(el("li", item) for item in items)),
    )
