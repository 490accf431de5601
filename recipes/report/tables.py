"""The sortable tables: variants, all runs, load of every MoE layer."""

from collections.abc import Sequence
from math import isfinite

from recipes.report import text
from recipes.report.headline import name
from recipes.report.study import BYTES_AT, Group, Study
from recipes.report.text import Markup, chip, el, join

NUMBER = "num"


def main_table(study: Study) -> Markup:
    """One row per variant and precision; a click on a head sorts, raw values lie in data-value."""
    at = [
        n for n in BYTES_AT if any(n in g.first.cost.weight_bytes_per_token for g in study.groups)
    ]
    asks = any(g.accuracy is not None for g in study.groups)
    accuracy = "share of right answers, mean over the seeds; an answer counts as a byte"
    heads = [
        sort_head("Variant", False),
        sort_head(
            "Bits per byte", title="mean over the seeds, held-out; ± half of its 95 % interval"
        ),
        *([sort_head("Accuracy", title=accuracy)] if asks else []),
        sort_head("Verdict", False, title="against the baseline"),
        sort_head("Parameters", title="every trainable number"),
        sort_head("Active", title="parameters that one token touches"),
        sort_head("FLOPs/token", title="matmuls, forward"),
        *(
            sort_head("Bytes/token", title=f"weight bytes read per token, {n} at once", n=n)
            for n in at
        ),
        sort_head("Tokens/s", title="median while training, mean over the seeds"),
        sort_head("Time", title="training alone, mean over the seeds"),
        sort_head("Memory", title="peak while training"),
    ]
    rows = [_row(study, g, at, asks) for g in study.groups]
    table = el(
        "table",
        el("thead", el("tr", *heads)),
        el("tbody", *rows),
        class_="sortable",
        data_n=at[0] if at else None,
    )
    return join(_bytes_toggle(at), el("div", table, class_="scroll"))


def _bytes_toggle(at: list[str]) -> Markup | None:
    if len(at) < 2:
        return None
    buttons = (el("button", n, type="button", data_n=n, aria_pressed="false") for n in at)
    return el(
        "div",
        el("span", "Weight bytes per token, tokens at once:", class_="quiet"),
        el("div", *buttons, class_="tabs"),
        class_="controls",
        data_controls="bytes",
    )


def sort_head(
    label: str, number: bool = True, title: str | None = None, n: str | None = None
) -> Markup:
    """The head of a column, to sort by; n: of the column that shows for so many tokens at once."""
    classes = " ".join(filter(None, (NUMBER if number else "", "at" if n else "")))
    button = el("button", label, type="button", title=title)
    return el("th", button, class_=classes or None, data_at=n, aria_sort="none", scope="col")


def sortable(heads: Sequence[Markup], rows: Sequence[Markup]) -> Markup:
    """A table that its heads sort, as wide as it needs to be."""
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *rows), class_="sortable")
    return el("div", table, class_="scroll")


def num_cell(
    value: float | None, shown: str, title: str | None = None, at: str | None = None
) -> Markup:
    """A number that is sorted by its value; one that is not known is a dash and stays last."""
    known = value is not None and isfinite(value)
    return el(
        "td",
        shown if value is not None else text.DASH,
        class_="num at" if at else NUMBER,
        data_value=repr(value) if known else "",
        data_at=at,
        title=title,
    )


def _row(study: Study, g: Group, at: list[str], asks: bool) -> Markup:
    cost, seeds = g.first.cost, len(g.runs)
    flops = cost.flops_per_token
    half = study.half(g)
    d = None if g is study.baseline else study.verdicts[g.key]
    word, said, note = (d.word, d.marked, d.how) if d else ("baseline", None, None)
    noise = el("span", f" ± {half:.{study.digits}f}", class_="quiet") if half else None
    bytes_at = [(n, cost.weight_bytes_per_token.get(n)) for n in at]
    memory = g.peak_memory_bytes
    return el(
        "tr",
        el("td", name(study, g), _seeds(seeds), data_value=g.label),
        el("td", text.bpb(g.bpb, study.digits), noise, class_=NUMBER,
           data_value=repr(g.bpb) if isfinite(g.bpb) else ""),
        *([num_cell(g.accuracy, text.percent(g.accuracy or 0.0))] if asks else []),
        el("td", chip(word, said), data_value=word, title=note),
        num_cell(cost.params, text.si(cost.params), text.exact(cost.params)),
        num_cell(cost.active_params, text.si(cost.active_params), text.exact(cost.active_params)),
        num_cell(flops, text.si(flops), text.exact(flops)),
        *(num_cell(b, text.si(b or 0, "B"), text.exact(b or 0), n) for n, b in bytes_at),
        num_cell(g.tokens_per_s, text.si(g.tokens_per_s)),
        num_cell(g.train_s, text.seconds(g.train_s)),
        num_cell(memory, text.si(memory or 0, "B")),
        class_="base" if word == "baseline" else None,
    )  # fmt: skip


def _seeds(n: int) -> Markup | None:
    return el("span", f" {n} seeds", class_="quiet") if n > 1 else None


def runs_table(study: Study) -> Markup:
    """Every run by its id."""
    heads = ("Run", "Seed", "Bits per byte", "Steps", "Tokens", "Tokens/s", "Time")
    rows = [
        el(
            "tr",
            el("td", el("code", r.id)),
            num_cell(r.seed, str(r.seed)),
            num_cell(r.final.bpb, text.bpb(r.final.bpb, study.digits)),
            num_cell(r.steps, f"{r.steps:,}"),
            num_cell(r.tokens, text.si(r.tokens), text.exact(r.tokens)),
            num_cell(r.speed.tokens_per_s, text.si(r.speed.tokens_per_s)),
            num_cell(r.speed.train_s, text.seconds(r.speed.train_s)),
        )
        for g in study.groups
        for r in g.runs
    ]
    head = el("tr", *(sort_head(h, i > 0) for i, h in enumerate(heads)))
    table = el("table", el("thead", head), el("tbody", *rows), class_="sortable")
    summary = el("summary", f"All {len(rows)} runs, one by one")
    return el("details", summary, el("div", table, class_="scroll"))


def load_table(study: Study) -> Markup:
    """The four numbers of each MoE layer, per run."""
    heads = ("Variant", "Layer", "Entropy", "Largest share", "Dead", "Zero-computation")
    rows = [
        el(
            "tr",
            el("td", name(study, g), data_value=f"{g.label} {r.seed}", title=r.id),
            num_cell(x.layer, str(x.layer)),
            num_cell(x.entropy, f"{x.entropy:.3f}"),
            num_cell(x.largest_share, text.percent(x.largest_share)),
            num_cell(x.dead, str(x.dead)),
            num_cell(x.zero_computation_share, text.percent(x.zero_computation_share)),
        )
        for g in study.moe_groups()
        for r in g.runs[:1]
        for x in r.load
    ]
    head = el("tr", *(sort_head(h, i > 0) for i, h in enumerate(heads)))
    table = el("table", el("thead", head), el("tbody", *rows), class_="sortable")
    note = el(
        "p",
        "Entropy is H / ln E over the FFN experts, 1 when even. Largest share and dead are of the "
        "FFN experts; dead is below a tenth of the even share. Zero-computation is a share of all "
        "assignments.",
        class_="quiet",
    )
    summary = el("summary", "Entropy, largest share, dead experts, layer by layer")
    return el("details", summary, note, el("div", table, class_="scroll"))
