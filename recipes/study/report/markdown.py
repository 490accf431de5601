"""The verdicts of a study as Markdown, for a README."""

from math import isfinite

from recipes.report import text
from recipes.report.markdown import table
from recipes.statistics.verdicts import Difference
from recipes.study.report.controls import KINDS
from recipes.study.report.derive import Arm, Derived
from recipes.study.report.names import held

NONE = text.DASH


def verdicts(d: Derived) -> str:
    """Two tables: every variant at every size and matching with what it costs, and its controls."""
    base = d.plan.baseline
    parts = [
        f"Bits per byte against `{base.variant}` {base.precision}, percent ± half of the 95% "
        "interval; below zero is better. Words are corrected over the whole table (Holm). Costs "
        f"are of size {d.top}, {held(d.primary)}; speed is tokens/s in training, "
        f"`{base.variant}` 1.",
        _variants(d),
    ]
    if d.against_controls:
        parts += ["Each variant minus its control, in the same units:", _controls(d)]
    return "\n\n".join(parts) + "\n"


def _variants(d: Derived) -> str:
    places = [(size, hold) for hold in d.plan.holds for size in d.plan.sizes]
    heads = ["variant", *(f"{size}, {held(hold)}" for size, hold in places)]
    heads += ["parameters", "bytes/token at 1; 16", "speed", "learning rate"]
    base = [f"`{d.plan.baseline.variant}`", *(_mean(d, *place) for place in places)]
    rows = [[*base, *_costs(d, d.plan.baseline.variant)]]
    rows += [
        [f"`{v}`", *(_cell(d, v, *place) for place in places), *_costs(d, v)] for v in d.others
    ]
    return table(heads, rows)


def _mean(d: Derived, size: str, hold: str) -> str:
    base = d.base(size, hold)
    return NONE if base is None else f"{text.bpb(base.bpb, d.digits)} bpb"


def _cell(d: Derived, variant: str, size: str, hold: str) -> str:
    if variant in d.plan.cell(size, hold).unreachable:
        return "out of reach"
    found, base = d.table.get((variant, size, hold)), d.base(size, hold)
    return NONE if found is None or base is None else _gap(found, base)


def _gap(found: Difference, base: Arm) -> str:
    if not isfinite(found.value):
        return "diverged"
    half = f" ± {100 * found.half / base.bpb:.2f}" if found.half else ""
    return f"{text.signed(100 * found.value / base.bpb, 2)}{half} {found.word}"


def _costs(d: Derived, variant: str) -> list[str]:
    """Of the largest complete size at the primary matching."""
    arm = None if d.top is None else d.arm(variant, d.top)
    base = None if d.top is None else d.base(d.top)
    if arm is None or base is None:
        return [NONE] * 4
    cost = arm.runs[0].cost
    read = "; ".join(text.si(cost.weight_bytes_per_token[n], "B") for n in ("1", "16"))
    speed = arm.tokens_per_s / base.tokens_per_s
    rates = sorted({run.lr for run in arm.runs if run.lr is not None})
    return [
        text.si(cost.params), read, f"{speed:.2f}", ", ".join(f"{lr:g}" for lr in rates) or NONE,
    ]  # fmt: skip


def _controls(d: Derived) -> str:
    sizes = [s for s in d.plan.sizes if any(size == s for _, size in d.against_controls)]
    rows = []
    for label, control in d.controls.items():
        cells = []
        for size in sizes:
            found, base = d.against_controls.get((label, size)), d.base(size)
            cells.append(NONE if found is None or base is None else _gap(found, base))
        rows.append([f"`{control.of}`", KINDS[control.kind][0], *cells])
    return table(["variant", "control", *sizes], rows)
