"""The top of the report: what was compared, how fairly, and the verdicts in plain words."""

from collections import Counter
from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any, get_args

from recipes.report import text
from recipes.report.method import BUDGETS, budget_table, method
from recipes.report.study import Group, Study
from recipes.report.text import Markup, chip, el, folded, join, swatch
from recipes.statistics.paired import MIN_SEEDS
from recipes.statistics.verdicts import Difference, Word


def headline(study: Study) -> Markup:
    """Facts, one row per judged group, the budget table and the statistics."""
    return join(
        el("div", *(fact(*given) for given in _facts(study)), class_="facts"),
        _summary(study),
        _forest(study),
        budget_table(study),
        method(study) if study.verdicts else None,
    )


def name(study: Study, group: Group) -> Markup:
    """Variant with its colour; quietly precision and, where it is one of several, learning rate."""
    dot = swatch(study.look.colours[group.variant])
    rest = group.precision + ("" if group.lr is None else f" · lr {group.lr:g}")
    return join(dot, el("b", group.variant), " ", el("span", rest, class_="quiet"))


def sentence(study: Study, group: Group) -> str:
    """The difference of a group to the baseline, in words that stand alone."""
    d, to = study.verdicts[group.key], study.baseline.words
    if not isfinite(d.value):
        return f"{d.how}, there is nothing to compare: not resolved."
    told = f"the same bits per byte as {to}"
    if d.value:
        way = "lower" if d.value < 0 else "higher"
        told = f"{abs(d.value):.{study.digits}f} bits per byte {way} than {to}"
    if d.interval is None:
        return f"{told}: not resolved, the noise is unknown."
    low, high = (text.signed(end, study.digits) for end in d.interval)
    return f"{told} (95\u00a0% interval {low}\u00a0to\u00a0{high}): {_reason(d)}."


def _reason(d: Difference) -> str:
    """The verdict, and why where the interval alone would say otherwise."""
    if d.word == "not resolved" and d.half is not None and abs(d.value) > d.half:
        return "not resolved, after Holm's correction over this table"
    if d.word == "equivalent" and d.margin is not None:
        return f"equivalent, the difference is below {d.margin:.4f} beyond the noise"
    if d.borrowed and d.resolved:
        return f"{d.word}, by the {d.how}: too few seeds of its own to be sure"
    return d.word


Fact = tuple[str, str, str]  # name, value, note


def fact(key: str, value: str, note: str) -> Markup:
    """A number with its name above and a note below."""
    return el(
        "div",
        el("div", key, class_="key"),
        el("div", value, class_="value"),
        el("div", note, class_="note"),
    )


def _facts(study: Study) -> list[Fact]:
    runs = study.results.runs
    v, p = len(study.variants), len(study.precisions)
    facts = [("Runs", str(len(runs)), f"{_count(v, 'variant')}, {_count(p, 'precision')}")]
    corpora = _distinct(_data(r.recipe, "corpus") for r in runs)
    tokenizers = _distinct(_data(r.recipe, "tokenizer") for r in runs)
    if corpora:
        note = f"tokenizer: {', '.join(tokenizers) or 'unknown'}"
        facts.append(("Data", ", ".join(corpora), note))
    if study.results.lrs:
        low, high = min(study.results.lrs), max(study.results.lrs)
        facts.append(("Learning rates", str(len(study.results.lrs)), f"{low:g} to {high:g}"))
    tokens = _span([r.tokens for r in runs], text.si)
    facts.append(("Tokens per run", tokens, f"{_span([r.steps for r in runs], text.exact)} steps"))
    facts += _budget_fact(study)
    if study.noise:
        std = f"{study.noise.std:.{study.digits}f}"
        note = f"bpb, std over {len(study.baseline.runs)} seeds of {study.baseline.words}"
        facts.append(("Noise", std, note))
    elif study.verdicts:
        seeds = _count(len(study.baseline.runs), "seed")
        facts.append(("Noise", "unknown", f"{study.baseline.words} has {seeds}"))
    return facts


def _budget_fact(study: Study) -> list[Fact]:
    c = study.results.comparison
    if not c or not c.held_equal:
        return []
    what, unit = BUDGETS[c.held_equal]
    if c.matched:
        what += f", within {text.percent(max(abs(m.residual) for m in c.matched), 2)}"
    return [("Held equal", text.si(c.target, unit) if c.target else "as stated", what)]


def _count(n: int, thing: str) -> str:
    return f"{n} {thing}{'s' * (n != 1)}"


def _data(recipe: dict[str, Any], of: str) -> str | None:
    data = recipe.get("data")
    return data.get(of) if isinstance(data, dict) else None


def _distinct(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(str(v) for v in values if v is not None))


def _span(numbers: list[int], shown: Callable[[float], str]) -> str:
    low, high = min(numbers), max(numbers)
    return shown(low) if low == high else f"{shown(low)} to {shown(high)}"


def _summary(study: Study) -> Markup | None:
    """How many are better, worse and not resolved; and what the report cannot say."""
    if not study.verdicts:
        return None
    loose = not study.results.comparison and (
        "These runs were laid side by side: nothing was held equal, and they may differ in more "
        "than their labels say. "
    )
    if study.noise is None:
        how = next(iter(study.verdicts.values())).how
        reason = "Two seeds of the baseline are needed at least, four are better."
        told = f"No difference is resolved: {how}. "
    else:
        words = Counter(d.word for d in study.verdicts.values())
        parts = [f"{words[w]} {w}" for w in get_args(Word) if words[w]]
        told = f"Against {study.baseline.words}: {', '.join(parts)}. "
        reason = "A difference inside the measured noise is not resolved, whichever way it points."
        if any(d.borrowed and d.resolved for d in study.verdicts.values()):
            reason += (
                f" What is called so \u201cby noise\u201d has fewer than {MIN_SEEDS} seeds of its "
                "own, and is taken to vary as the baseline does: a hint, to be run on more seeds."
            )
    return el("p", loose or None, el("strong", told), reason, _rates(study), class_="lead")


def _rates(study: Study) -> str | None:
    """Which of several learning rates each variant is judged at."""
    if not study.results.lrs:
        return None
    pinned = study.results.baseline.lr
    but = f"; the baseline stands at {pinned:g}, as the comparison says" if pinned else ""
    return (
        f" Of {len(study.results.lrs)} learning rates each variant and precision stands here at "
        "the one with the lowest mean bits per byte among those at which no run diverged, chosen "
        f"on the same held-out text{but}. Stability, below, shows all of them."
    )


def _forest(study: Study) -> Markup | None:
    """One row per judged group: sentence, interval as a picture, verdict."""
    groups = [g for g in study.groups if g.key in study.verdicts]
    ends = [abs(d.value) + (d.half or 0) for d in study.verdicts.values() if isfinite(d.value)]
    reach = 1.05 * (max(ends, default=0) or 1)
    shown, rest = study.split(groups, most=16)
    marks = ("← better", study.baseline.words, "worse →")
    axis = el("div", *(el("span", mark) for mark in marks), class_="forest-axis")
    head = el("div", axis, class_="forest-head")
    rows = [head, *(_forest_row(study, g, reach) for g in shown)]
    more = [head, *(_forest_row(study, g, reach) for g in rest)] if rest else []
    return folded(rows, more, "The other precisions", "forest") if groups else None


def _forest_row(study: Study, group: Group, reach: float) -> Markup:
    d = study.verdicts[group.key]
    number = text.signed(d.value, study.digits)
    picture = el(
        "svg",
        *whisker(d, study.look.colours[group.variant], reach),
        role="img",
        aria_label=f"{group.words}: {number}",
    )
    who, said = el("div", name(study, group), class_="who"), el("p", sentence(study, group))
    return el(
        "div",
        el("div", who, said, class_="say"),
        el("div", picture, class_="pic"),
        el("div", el("span", number, class_="num"), chip(d.word, d.marked), class_="mark"),
        class_="forest-row",
    )


def whisker(d: Difference, colour: str, reach: float) -> list[Markup]:
    """Zero line, interval and point; hollow where not resolved. Zero is in the middle."""

    def x(value: float) -> str:
        return f"{50 + 50 * value / reach:.2f}%"

    shapes = [el("line", x1="50%", x2="50%", y1="0", y2="100%", class_="zero")]
    if d.interval is not None:
        low, high = map(x, d.interval)
        shapes.append(
            el("line", x1=low, x2=high, y1="50%", y2="50%", stroke=colour, stroke_width=3)
        )
    if isfinite(d.value):
        fill = colour if d.resolved else "var(--surface)"
        shapes.append(
            el("circle", cx=x(d.value), cy="50%", r=5.5, fill=fill, stroke=colour, stroke_width=2)
        )
    return shapes
