"""What the fitted curves say of the largest budgets without having seen them."""

from collections.abc import Mapping

import numpy as np

from recipes.report import text
from recipes.report.tables import num_cell, sort_head, sortable
from recipes.report.text import Markup, el, join, lead
from recipes.statistics.checks import HoldOut, hold_out
from recipes.study.report.derive import Derived
from recipes.study.report.ladder import LEAST, Ladder
from recipes.study.report.names import held, variant_name

NEEDED = LEAST + 1  # budgets: a fit's, and one to hold out


def hold_outs(d: Derived, one: Ladder) -> dict[str, HoldOut]:
    """By variant, of those with budgets enough.

    Intervals are of the baseline's noise where it is known: nearer their level than runs drawn
    again, of which a budget has few.
    """
    if one.fit is None:
        return {}
    sigma = d.noise.std if d.noise else None
    return {
        name: hold_out(runs, sigma=sigma)
        for name, runs in zip(one.fit.names, one.fit.runs, strict=True)
        if len(np.unique(np.round(np.log(runs.x), 9))) >= NEEDED
    }


def held_out(d: Derived, ladders: list[Ladder]) -> Markup | None:
    """A table of the errors, and what they say; None where nothing was fitted."""
    fitted = [one for one in ladders if one.fit is not None]
    if not fitted:
        return None
    head = el("h3", "The largest budget held out")
    found = {one.hold: hold_outs(d, one) for one in fitted}
    if not any(found.values()):
        told = (
            f"No budget could be held out: that takes {NEEDED} of them, {LEAST} to fit and one to "
            "predict. So nothing tests how far these curves may be read beyond their runs."
        )
        return join(head, lead(told))
    heads = [
        sort_head("Variant", False),
        sort_head("Held", False),
        sort_head("Left out", title="training FLOPs of the largest budget"),
        sort_head("Further out", title="over the largest budget that was fitted"),
        sort_head("Predicted", title="bits per byte, by the curve fitted without it"),
        sort_head("Measured", title="mean over the seeds"),
        sort_head("Error", title="measured less predicted, percent of what was measured"),
        sort_head("95 % interval", False, title="of the error, over resamples of all runs"),
        sort_head("In sigma", title="the error over the noise of one run"),
        sort_head("Verdict", False),
    ]  # fmt: skip
    rows = [_row(d, hold, v, h) for hold, of in found.items() for v, h in of.items()]
    told = " ".join(_words(hold, of) for hold, of in found.items() if of)
    return join(head, lead(told), sortable(heads, rows))


def _words(hold: str, found: Mapping[str, HoldOut]) -> str:
    """What the errors of one matching say of reading the curves beyond their runs."""
    far = min(h.at / h.below for h in found.values())
    worst = max(found, key=lambda v: abs(found[v].relative))
    start = (
        f"At {held(hold)}, each curve fitted by itself without its largest budget and read there, "
        f"{far:.2g}× beyond what it saw, errs by {_percent(found[worst])} at most ({worst})."
    )
    missed = [f"{v} ({_percent(h)})" for v, h in found.items() if h.missed]
    if missed:
        return (
            f"{start} Beyond the noise: {', '.join(missed)}. Curves of these are no guide past "
            "their runs, nor is a leverage that is read there."
        )
    return (
        f"{start} All within the noise: nothing speaks against reading them as far beyond the "
        "largest budget. Further out they are untested."
    )


def _percent(h: HoldOut) -> str:
    return f"{text.signed(100 * h.relative, 2)}\u00a0%"


def _row(d: Derived, hold: str, variant: str, h: HoldOut) -> Markup:
    low, high = (
        text.signed(100 * end / h.measured, 2) for end in (h.interval.low, h.interval.high)
    )
    sigmas = h.error / d.noise.std if d.noise else None
    word, class_ = ("missed", "worse") if h.missed else ("within the noise", "not-resolved")
    return el(
        "tr",
        el("td", variant_name(d, variant)),
        el("td", held(hold)),
        num_cell(h.at, text.si(h.at)),
        num_cell(h.at / h.below, f"{h.at / h.below:.2g}×"),
        num_cell(h.predicted, text.bpb(h.predicted, d.digits)),
        num_cell(h.measured, text.bpb(h.measured, d.digits)),
        num_cell(h.relative, _percent(h)),
        el("td", f"{low} to {high}\u00a0%"),
        num_cell(sigmas, text.signed(sigmas or 0.0, 1)),
        el("td", el("span", word, class_=f"chip {class_}")),
    )
