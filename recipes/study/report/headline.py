"""The top of a study's page: what was compared, the verdict table, noise and power."""

from math import isfinite

from recipes.report import text
from recipes.report.headline import fact
from recipes.report.tables import num_cell, sort_head, sortable
from recipes.report.text import Markup, chip, el, join, lead
from recipes.statistics.paired import EQUIVALENCE, MIN_SEEDS
from recipes.study.report.derive import Derived, Told
from recipes.study.report.forest import Row, forest
from recipes.study.report.ladder import LEAST
from recipes.study.report.names import held, variant_name
from recipes.study.report.rule import PARAMS_HELD


def headline(d: Derived) -> Markup:
    """Facts, a picture of the primary cell, the verdict table, what the seeds can tell."""
    facts = (fact(*given) for given in _facts(d))
    picture = forest(d, verdict_rows(d), d.plan.baseline.variant)
    return join(
        el("div", *facts, class_="facts"), _summary(d), _beyond(d), picture, _table(d), _power(d)
    )


def _facts(d: Derived) -> list[tuple[str, str, str]]:
    p, tuning = d.plan, d.planned("tuning")
    done, all_ = len(d.runs), len(p.runs)
    seeds = sorted({r.seed for r in d.planned("reporting")} or set(p.seeds))
    tuned = sorted({r.seed for r in tuning})
    rates = sorted({r.lr for r in tuning})
    fails = f", {len(d.results.failures)} failed" if d.results.failures else ""
    facts = [
        ("Runs", f"{done} of {all_}", f"known so far{fails}"),
        ("Primary matching", held(d.primary).removeprefix("equal "),
         ", ".join(f"also {held(h)}" for h in p.holds[1:]) or "no other"),
        ("Sizes", str(len(p.sizes)), " · ".join(p.sizes)),
        ("Seeds reported", str(len(seeds)), ", ".join(map(str, seeds))),
    ]  # fmt: skip
    if rates:
        note = f"{rates[0]:g} to {rates[-1]:g}, on seed{'s' * (len(tuned) > 1)} "
        facts.append(("Learning rates", str(len(rates)), note + ", ".join(map(str, tuned))))
    else:
        facts.append(("Learning rates", "untuned", "the recipe's own for every variant"))
    if d.noise:
        share = d.noise.std / _mean(d)
        facts.append(("Noise", text.percent(share, 2), f"{d.noise.std:.{d.digits}f} bpb, one run"))
    else:
        facts.append(("Noise", "unknown", "the baseline has too few seeds so far"))
    return facts


def _mean(d: Derived) -> float:
    return next(t.mean for t in reversed(d.told) if isfinite(t.mean))


def _summary(d: Derived) -> Markup:
    base = f"{d.plan.baseline.variant} {d.plan.baseline.precision}"
    if d.top is None:
        told = "Nothing is reported yet: the baseline has no finished run. "
        return el("p", el("strong", told), class_="lead")
    cell = {v: d.table[v, d.top, d.primary] for v in d.others if (v, d.top, d.primary) in d.table}
    words = [f"{v} {x.word}" for v, x in cell.items()]
    told = f"At size {d.top}, {held(d.primary)}, against {base}: {', '.join(words) or 'nothing'}. "
    more = "The rule of what may be called better stands below; a difference alone is not it. "
    left = f"{len(d.missing)} planned runs have no result yet. " if d.missing else None
    untuned = None
    if not d.planned("tuning"):
        untuned = "No learning rate was tuned, which favours whatever the recipe's own suits. "
    begun = sorted({r.variant for r in d.runs.values() if r.recipe.get("init_from")})
    more_compute = None
    if begun:
        more_compute = (
            f"Begun from another run's weights, whose compute is not counted: {', '.join(begun)}. "
        )
    return el("p", el("strong", told), more, left, untuned, more_compute, class_="lead")


def _beyond(d: Derived) -> Markup | None:
    """What the study lacks by its plan to call anything better; None where nothing."""
    p, lacks = d.plan, []
    seeds = len({r.seed for r in d.planned("reporting")})
    if 0 < seeds < MIN_SEEDS:
        lacks.append(f"(a) asks for {MIN_SEEDS} seeds, and it has {seeds}")
    if len(p.sizes) < LEAST:
        few, n = LEAST - len(p.sizes), len(p.sizes)
        lacks.append(
            f"(b) asks for a leverage, fitted to {LEAST} budgets at least, and it has {n} "
            f"size{'s' * (n > 1)}: {few} more {'is' if few == 1 else 'are'} missing"
        )
    if PARAMS_HELD not in p.holds:
        lacks.append("(c) asks for a matching at equal parameters, and it holds none")
    if not lacks or not d.others:
        return None
    told = "This study cannot call anything better by the rule, however its runs end: "
    return lead(el("strong", told), "; ".join(lacks), ".")


def verdict_rows(d: Derived) -> list[Row]:
    """Every variant against the baseline: the primary matching of the largest complete size."""
    places = {v: (v, d.top or "", d.primary) for v in d.others}
    return [Row(v, d.table[place]) for v, place in places.items() if place in d.table]


def _table(d: Derived) -> Markup | None:
    """Variants by size and matching: gap in percent, its interval, the word."""
    if not d.others:
        return None
    places = [(size, hold) for hold in d.plan.holds for size in d.plan.sizes]
    groups = [
        el("th", held(h), " · primary" if h == d.primary else None, colspan=len(d.plan.sizes),
           scope="colgroup")
        for h in d.plan.holds
    ]  # fmt: skip
    heads = [el("th", size, scope="col", class_="num") for size, _ in places]
    rows = [
        el("tr", el("th", variant_name(d, v), scope="row"), *(_verdict(d, v, *x) for x in places))
        for v in d.others
    ]
    head = el("thead", el("tr", el("th"), *groups), el("tr", el("th", "size"), *heads))
    note = lead(
        "Percent of the baseline's bits per byte, with half the 95\u00a0% interval; below zero is "
        f"better. The words are corrected over this whole table (Holm). Equivalent: closer than "
        f"{EQUIVALENCE:.2%} beyond the noise."
    )
    body = el("div", el("table", head, el("tbody", *rows), class_="verdicts"), class_="scroll")
    return el("div", el("h3", "Every size and matching"), note, body, class_="part")


def _verdict(d: Derived, variant: str, size: str, hold: str) -> Markup:
    cell = d.plan.cell(size, hold)
    if variant in cell.unreachable:
        return el("td", el("span", "out of reach", class_="quiet"), class_="num",
                  title=cell.unreachable[variant])  # fmt: skip
    found, base = d.table.get((variant, size, hold)), d.base(size, hold)
    if found is None or base is None:
        return el("td", el("span", "no result", class_="quiet"), class_="num")
    if not isfinite(found.value):
        return el("td", chip("diverged"), class_="num", title=found.how)
    gap = text.signed(100 * found.value / base.bpb, 2)
    half = f" ± {100 * found.half / base.bpb:.2f}" if found.half else ""
    told = f"{text.signed(found.value, d.digits)} bits per byte, {found.how}"
    if found.p_holm is not None:
        told += f", p after Holm {found.p_holm:.2g}"
    return el(
        "td", gap, el("span", half, class_="quiet"), el("div", chip(found.word)),
        class_="num", title=told, data_value=repr(found.value),
    )  # fmt: skip


def _power(d: Derived) -> Markup | None:
    """What the seeds of each size can tell."""
    if not d.told:
        return None
    heads = [
        sort_head("Size", False),
        sort_head("Seeds", title="of the baseline, finished"),
        sort_head("Bits per byte", title="the baseline's mean"),
        sort_head("Noise", title="standard deviation of one run, percent of the mean"),
        sort_head("Alone", title="difference found with 80 % power, not paired, at 5 %"),
        sort_head("In this table", title="the same where Holm's correction asks the most"),
    ]
    rows = [_told_row(d, t) for t in d.told]
    note = lead(
        "The smallest difference that the seeds find four times in five. Pairs by seed that "
        "correlate do better; what is smaller stays not resolved, and says nothing."
    )
    table = sortable(heads, rows)
    return el("div", el("h3", "What the seeds can tell"), note, table, class_="part")


def _told_row(d: Derived, t: Told) -> Markup:
    def share(x: float | None) -> Markup:
        return num_cell(x, text.percent((x or 0.0) / t.mean, 2), f"{x or 0:.{d.digits}f} bpb")

    return el(
        "tr",
        el("td", t.size),
        num_cell(t.seeds, str(t.seeds)),
        num_cell(t.mean, text.bpb(t.mean, d.digits)),
        *(share(x) for x in (t.sigma, t.first, t.table)),
    )
