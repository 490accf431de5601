"""What did not come about: failed and diverged runs, budgets out of reach, runs not yet there."""

from recipes.report.tables import num_cell, sort_head, sortable
from recipes.report.text import Markup, el, join, lead
from recipes.study.report.derive import Derived
from recipes.study.report.names import held, variant_name

MOST = 40  # of the missing that are named


def failures(d: Derived) -> Markup:
    """All of it; said in words where there is nothing."""
    return join(
        lead("Whatever is named here is missing from the numbers above, and not at random."),
        _failed(d),
        _diverged(d),
        _unreachable(d),
        _missing(d),
        _strays(d),
    )


def _failed(d: Derived) -> Markup:
    found = d.results.failures
    if not found:
        return el("p", "No run failed.")
    items = [el("li", el("code", name), f": {why}") for name, why in found.items()]
    return join(el("h3", f"Failed: {len(found)}"), el("ul", *items))


def _diverged(d: Derived) -> Markup:
    found = [p for p in d.plan.runs if p.id in d.runs and d.runs[p.id].diverged]
    if not found:
        return el("p", "No finished run diverged.")
    heads = [sort_head("Run", False), sort_head("Variant", False), sort_head("Stage", False),
             sort_head("Learning rate"), sort_head("By step")]  # fmt: skip
    rows = [
        el(
            "tr",
            el("td", el("code", p.id)),
            el("td", variant_name(d, p.variant)),
            el("td", p.stage),
            num_cell(p.lr, f"{p.lr:.3g}"),
            num_cell(d.runs[p.id].diverged_step, str(d.runs[p.id].diverged_step)),
        )
        for p in found
    ]
    return join(el("h3", f"Diverged: {len(found)}"), sortable(heads, rows))


def _unreachable(d: Derived) -> Markup | None:
    items = [
        el("li", el("b", variant), f" at size {cell.size}, {held(cell.hold)}: {why}")
        for cell in d.plan.cells
        for variant, why in cell.unreachable.items()
    ]
    return join(el("h3", "Budgets out of reach"), el("ul", *items)) if items else None


def _missing(d: Derived) -> Markup | None:
    if not d.missing:
        return None
    tuning = sum(p.stage == "tuning" for p in d.missing)
    told = f"{tuning} of tuning, {len(d.missing) - tuning} of what is reported. "
    if not d.planned("reporting"):
        told += "What is reported is settled once the learning rates are."
    names = [el("li", el("code", p.id)) for p in d.missing[:MOST]]
    if len(d.missing) > MOST:
        names.append(el("li", f"and {len(d.missing) - MOST} more"))
    head = el("summary", f"Not run yet: {len(d.missing)}. {told}")
    return el("details", head, el("ul", *names))


def _strays(d: Derived) -> Markup | None:
    found = d.results.strays
    if not found:
        return None
    items = [el("li", el("code", name)) for name in found]
    told = "Finished runs in the directory that are no part of the study as it was last run"
    return el("details", el("summary", f"{told}: {len(found)}"), el("ul", *items))
