"""What controls say: each variant beside what shows whether its idea does anything."""

from math import isfinite

from recipes.report import text
from recipes.report.tables import num_cell, sort_head, sortable
from recipes.report.text import Markup, chip, el, join, lead
from recipes.statistics.verdicts import Difference
from recipes.study.report.derive import Derived
from recipes.study.report.forest import Row, forest, reach_of
from recipes.study.report.names import held, variant_name

CEILING = "dense_total"  # the one kind that need not be beaten
KINDS = {
    "random_router": ("random router", "must be beaten, or routing has learned nothing"),
    "off": ("special part off", "must be beaten, or the idea adds nothing"),
    CEILING: ("dense, as large in all", "a ceiling to approach: it runs more FLOPs a token"),
}


def controls(d: Derived) -> Markup | None:
    """A picture at the largest complete size, then a table of every size."""
    if not d.controls:
        return None
    note = lead(
        "The variant minus its control, at the primary matching; below zero the variant is better. "
        "Bars are 95\u00a0% intervals of one difference alone, the words are corrected over all of "
        "the table; hollow: not resolved. A dense model with as many parameters is a ceiling and "
        "need not be beaten; the others must be."
    )
    if not d.against_controls:
        return join(note, el("p", "No control has a result beside its variant yet."))
    return join(note, _picture(d), _table(d))


def beside_controls(d: Derived) -> tuple[list[Row], list[Row]]:
    """Variants beside what they must beat, and beside their ceilings; at the largest complete size.

    By variant, as they come, then by kind.
    """
    order, kinds = d.plan.variants, tuple(KINDS)
    labels = [label for label, size in d.against_controls if size == d.top]
    labels.sort(key=lambda x: (order.index(d.controls[x].of), kinds.index(d.controls[x].kind)))
    beaten: list[Row] = []
    ceilings: list[Row] = []
    for label in labels:
        control, found = d.controls[label], d.against_controls[label, d.top or ""]
        so = _so(control.kind, found) if isfinite(found.value) else None
        row = Row(control.of, found, to=KINDS[control.kind][0], so=so)
        (ceilings if control.kind == CEILING else beaten).append(row)
    return beaten, ceilings


def _picture(d: Derived) -> Markup | None:
    """Ceilings apart, on the same scale: a variant below its ceiling has not failed."""
    beaten, ceilings = beside_controls(d)
    if not beaten and not ceilings:
        return None
    reach = reach_of([*beaten, *ceilings])
    size = f"size {d.top}, {held(d.primary)}"
    shown = [
        join(el("h3", f"{title}: {size}"), forest(d, rows, zero, reach=reach))
        for title, rows, zero in (
            ("What must be beaten", beaten, "its control"),
            ("Ceilings to approach", ceilings, "its ceiling"),
        )
        if rows
    ]
    return join(*shown)


def _table(d: Derived) -> Markup:
    heads = [
        sort_head("Variant", False),
        sort_head("Control", False),
        sort_head("Size", False),
        sort_head("Variant's", title="bits per byte"),
        sort_head("Control's", title="bits per byte"),
        sort_head("Difference", title="with half the 95 % interval"),
        sort_head("The variant is", False),
        sort_head("So", False),
    ]
    rows = [
        _control(d, label, size)
        for label in d.controls
        for size in d.plan.sizes
        if (label, size) in d.against_controls
    ]
    return join(el("h3", "Every size"), sortable(heads, rows))


def _control(d: Derived, label: str, size: str) -> Markup:
    control, found = d.controls[label], d.against_controls[label, size]
    mine, other = d.arm(control.of, size), d.arm(label, size)
    assert mine is not None, "a difference has both"
    assert other is not None, "a difference has both"
    what, why = KINDS[control.kind]
    half = f" ± {found.half:.{d.digits}f}" if found.half else ""
    return el(
        "tr",
        el("td", variant_name(d, control.of)),
        el("td", what, title=label),
        el("td", size),
        num_cell(mine.bpb, text.bpb(mine.bpb, d.digits)),
        num_cell(other.bpb, text.bpb(other.bpb, d.digits)),
        num_cell(found.value, text.signed(found.value, d.digits) + half, found.how),
        el("td", chip(found.word) if isfinite(found.value) else chip("diverged")),
        el("td", _so(control.kind, found), title=why),
    )


def _so(kind: str, found: Difference) -> str:
    """What a control's difference means."""
    if kind == CEILING:
        words = {"better": "above its ceiling", "worse": "below its ceiling"}
        return words.get(found.word, "not told from its ceiling")
    words = {"better": "beats it", "worse": "loses to it"}
    return words.get(found.word, "does not beat it")
