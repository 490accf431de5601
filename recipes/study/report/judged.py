"""What holds of the verdict rule, and what low precision costs."""

from math import isfinite

from recipes.report import text
from recipes.report.text import Markup, el, join, lead
from recipes.study.report.derive import Derived
from recipes.study.report.names import held, variant_name
from recipes.study.report.rule import Condition, Ruling

MARKS = {True: "holds", False: "does not hold", None: "cannot be told"}


def rule(d: Derived, found: list[Ruling]) -> Markup | None:
    """Every variant with its four conditions."""
    if not found:
        return None
    note = lead(
        f"A variant is called better where all four hold, at size {d.top} and {held(d.flops_hold)}"
        + (": the study does not hold FLOPs equal, so its primary matching stands in. "
           if d.flops_hold != "active_flops" else ". "),
        "What cannot be told does not hold.",
    )  # fmt: skip
    rows = [row for ruling in found for row in _ruling(d, ruling)]
    table = el("table", el("tbody", *rows), class_="plain rule")
    return join(note, el("div", table, class_="scroll"))


def _ruling(d: Derived, ruling: Ruling) -> list[Markup]:
    head = el(
        "tr",
        el("th", variant_name(d, ruling.variant), scope="rowgroup"),
        el("td", el("b", ruling.words), colspan=2),
        class_="base",
    )
    return [head, *(_condition(c) for c in ruling.conditions)]


def _condition(c: Condition) -> Markup:
    class_ = {True: "better", False: "worse", None: "not-resolved"}[c.holds]
    mark = el("span", MARKS[c.holds], class_=f"chip {class_}")
    said = join(c.told, el("div", c.asks, class_="quiet"))
    return el("tr", el("th", f"({c.letter})", scope="row"), el("td", mark), el("td", said))


def gaps(d: Derived) -> Markup | None:
    """Variant by format, one table a size; None where one precision ran."""
    if not d.gaps:
        return None
    note = lead(
        f"Percent of its own bits per byte in {d.reference} that a variant loses in each other "
        "format, with half the 95\u00a0% interval. Coloured where the interval excludes zero; the "
        "words are corrected over all of these tables."
    )
    reach = max((abs(_share(d, k) or 0.0) for k in d.gaps), default=0.0) or 1.0
    tables = [t for size in d.plan.sizes if (t := _gap_table(d, size, reach)) is not None]
    return join(note, el("div", *tables, class_="cards"))


def _share(d: Derived, key: tuple[str, str, str]) -> float | None:
    """The gap as a share of the variant's own bits per byte in the reference."""
    variant, _, size = key
    whole = d.arm(variant, size, precision=d.reference)
    found = d.gaps.get(key)
    if whole is None or found is None or not isfinite(found.value):
        return None
    return found.value / whole.bpb


def gap_matrix(d: Derived, size: str) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Variants, precisions, and percent [variant][precision]; for the picture of it."""
    precisions = [p for p in d.plan.precisions if p != d.reference]
    variants = [v for v in d.plan.variants if any((v, p, size) in d.gaps for p in precisions)]
    shares = [[_share(d, (v, p, size)) for p in precisions] for v in variants]
    return variants, precisions, [[None if s is None else 100 * s for s in row] for row in shares]


def _gap_table(d: Derived, size: str, reach: float) -> Markup | None:
    variants, precisions, _ = gap_matrix(d, size)
    if not variants:
        return None
    rows = [
        el("tr", el("th", variant_name(d, v), scope="row"),
           *(_gap_cell(d, (v, p, size), reach) for p in precisions))
        for v in variants
    ]  # fmt: skip
    head = el("tr", el("th"), *(el("th", p, class_="num", scope="col") for p in precisions))
    table = el("table", el("thead", head), el("tbody", *rows), class_="heat")
    return el("figure", el("figcaption", f"Size {size}"), el("div", table, class_="scroll"))


def _gap_cell(d: Derived, key: tuple[str, str, str], reach: float) -> Markup:
    found, share = d.gaps.get(key), _share(d, key)
    if found is None:
        return el("td", text.DASH, class_="num")
    if share is None:
        return el("td", "diverged", class_="num lost", title=found.how)
    whole = found.value / share if share else 1.0
    half = f" ± {100 * found.half / whole:.2f}" if found.half else ""
    beyond = found.half is not None and abs(found.value) > found.half
    shade = (" warm" if share > 0 else " cool") if beyond else ""
    strength = f"--s:{round(100 * min(1.0, abs(share) / reach))}%" if beyond else None
    said = join(f"{text.signed(100 * share, 2)}", el("span", half, class_="quiet"))
    return el(
        "td", said, el("div", found.word, class_="quiet"), class_=f"num{shade}",
        style=strength, title=found.how,
    )  # fmt: skip
