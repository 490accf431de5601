"""The numbers of a study as CSV, and its verdict table for LaTeX."""

from math import isfinite

from recipes.report.export import Cell, csv_text, difference_row, run_row
from recipes.report.text import signed
from recipes.statistics.verdicts import Difference
from recipes.study.report.derive import Derived

ESCAPED = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "\u2212": "$-$", "\n": " ",
})  # fmt: skip


def runs_csv(d: Derived) -> str:
    """Every planned run with its place and what became of it; numbers where it has a result."""
    hashes = {r.run.id: r.recipe_sha256 for r in d.results.runs}
    rows: list[dict[str, Cell]] = []
    for p in d.plan.runs:
        run = d.runs.get(p.id)
        model = d.plan.models[p.model]
        row: dict[str, Cell] = {
            "id": p.id, "stage": p.stage, "size": p.size, "held": " ".join(p.holds),
            "variant": p.variant, "control": _control(d, p.variant), "precision": p.precision,
            "seed": p.seed, "lr": p.lr, "state": _state(d, p.id),
        }  # fmt: skip
        if run is not None:
            flat = {k: v for k, v in run_row(run).items() if k not in row}
            row |= flat | {
                "training_flops": run.tokens * run.cost.training_flops_per_token,
                "train_s": run.speed.train_s,
                "active_params_strict": model.active_strict,
                "active_params_with_head": model.active_with_head,
                "optimizer_bytes": model.optimizer_bytes,
                "gradient_bytes": model.gradient_bytes,
                "recipe_sha256": hashes[p.id],
            }
        rows.append(row)
    return csv_text(rows)


def _control(d: Derived, variant: str) -> str:
    control = d.controls.get(variant)
    return "" if control is None else f"{control.kind} of {control.of}"


def _state(d: Derived, run_id: str) -> str:
    if run_id in d.runs:
        return "diverged" if d.runs[run_id].diverged else "finished"
    return "failed" if run_id in d.results.failures else "missing"


def differences_csv(d: Derived) -> str:
    """Every difference of every table, with its interval and verdict."""
    b = d.plan.baseline
    rows = [
        _row("baseline", variant, b.precision, f"{b.variant} {b.precision}", size, hold, x)
        for (variant, size, hold), x in d.table.items()
    ]
    rows += [
        _row("control", d.controls[label].of, b.precision, label, size, d.primary, x)
        for (label, size), x in d.against_controls.items()
    ]
    rows += [
        _row("precision", variant, precision, f"{variant} {d.reference}", size, d.primary, x)
        for (variant, precision, size), x in d.gaps.items()
    ]
    return csv_text(rows)


def _row(
    table: str, variant: str, precision: str, to: str, size: str, hold: str, x: Difference
) -> dict[str, Cell]:
    place: dict[str, Cell] = {"table": table, "size": size, "held": hold}
    value = difference_row((variant, precision), to, x)
    more: dict[str, Cell] = {
        "p_equivalent_holm": x.p_equal_holm, "sigma": x.sigma, "in_sigma": x.effect,
        "correlation": x.correlation,
    }  # fmt: skip
    return place | value | more


def latex(d: Derived) -> str:
    """The verdict table in booktabs style, in percent of the baseline; to be \\input."""
    places = [(size, hold) for hold in d.plan.holds for size in d.plan.sizes]
    n = len(d.plan.sizes)
    groups = " & ".join(
        rf"\multicolumn{{{n}}}{{c}}{{equal {hold.translate(ESCAPED)}}}" for hold in d.plan.holds
    )
    rules = " ".join(
        rf"\cmidrule(lr){{{2 + i * n}-{1 + (i + 1) * n}}}" for i in range(len(d.plan.holds))
    )
    heads = " & ".join(size.translate(ESCAPED) for size, _ in places)
    rows = [
        " & ".join([v.translate(ESCAPED), *(_cell(d, v, size, hold) for size, hold in places)])
        + r" \\"
        for v in d.others
    ]
    base = f"{d.plan.baseline.variant} {d.plan.baseline.precision}".translate(ESCAPED)
    lines = [
        f"% Bits per byte against {base} in percent, half the 95 % interval; Holm over the table:",
        "% $\\star$ better, $\\dagger$ worse, $\\approx$ equivalent, unmarked: not resolved",
        rf"\begin{{tabular}}{{l{'r' * len(places)}}}",
        r"\toprule",
        rf" & {groups} \\",
        rules,
        rf"variant & {heads} \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _cell(d: Derived, variant: str, size: str, hold: str) -> str:
    found, base = d.table.get((variant, size, hold)), d.base(size, hold)
    if found is None or base is None or not isfinite(found.value):
        return "--"
    marks = {"better": r"^{\star}", "worse": r"^{\dagger}", "equivalent": r"^{\approx}"}
    half = rf" \pm {100 * found.half / base.bpb:.2f}" if found.half else ""
    value = signed(100 * found.value / base.bpb, 2).replace("\u2212", "-")
    return f"${value}{half}{marks.get(found.word, '')}$"
