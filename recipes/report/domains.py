"""Bits per byte by domain, as a table that is coloured like a heat map."""

from statistics import fmean

from recipes.report import text
from recipes.report.headline import name
from recipes.report.noise import compare
from recipes.report.study import Group, Study
from recipes.report.text import Markup, el
from recipes.statistics.noise import Seeds
from recipes.statistics.verdicts import Difference


def domain_table(study: Study) -> Markup | None:
    """Group by domain; the colour is the distance to the baseline in the same domain.

    None where no run was evaluated by domain.
    """
    domains = list(dict.fromkeys(d for g in study.groups for d in g.first.final.bpb_by_domain))
    if not domains:
        return None
    gaps = {(g.key, d): _gap(study, g, d) for g in study.groups for d in domains}
    reach = max((abs(x.value) for x in gaps.values() if x and _beyond(x)), default=1.0)
    rows = []
    for g in study.groups:
        cells = (_cell(study, by_domain(g, d), gaps[g.key, d], reach) for d in domains)
        rows.append(el("tr", el("th", name(study, g), scope="row"), *cells))
    head = el("tr", el("th"), *(el("th", d, class_="num", scope="col") for d in domains))
    table = el("table", el("thead", head), el("tbody", *rows), class_="heat")
    return el("div", table, class_="scroll")


def by_domain(g: Group, domain: str) -> Seeds:
    """Bits per byte in a domain, by seed."""
    final = {r.seed: r.final.bpb_by_domain for r in g.runs}
    return {seed: values[domain] for seed, values in final.items() if domain in values}


def _gap(study: Study, g: Group, domain: str) -> Difference | None:
    mine, base = by_domain(g, domain), by_domain(study.baseline, domain)
    if g is study.baseline or not mine or not base:
        return None
    return compare(mine, base, base)


def _beyond(gap: Difference) -> bool:
    """Outside its own 95 % interval; not corrected, for this is a map and no verdict."""
    return gap.half is not None and abs(gap.value) > gap.half


def _cell(study: Study, seeds: Seeds, gap: Difference | None, reach: float) -> Markup:
    if not seeds:
        return el("td", text.DASH, class_="num")
    value = fmean(seeds.values())
    shade, note, strength = "", None, None
    if gap:
        half = f" ± {gap.half:.{study.digits}f}" if gap.half else ""
        note = f"{text.signed(gap.value, study.digits)}{half} to the baseline"
        if _beyond(gap):
            shade = " warm" if gap.value > 0 else " cool"
            strength = f"--s:{round(100 * min(1.0, abs(gap.value) / reach))}%"
    return el(
        "td",
        text.bpb(value, study.digits),
        class_=f"num{shade}",
        style=strength,
        title=note,
        data_value=repr(value),
    )
