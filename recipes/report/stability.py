"""Seed by learning rate in each precision: how far training stays stable (arXiv:2405.18710)."""

from collections.abc import Sequence
from math import isfinite
from statistics import median

from recipes.report import text
from recipes.report.figures import plot
from recipes.report.rates import rates
from recipes.report.records import Run
from recipes.report.study import Group, Study
from recipes.report.tables import NUMBER, num_cell, sort_head
from recipes.report.text import Markup, el, folded, join, lead, swatch
from recipes.report.trials import Trial, held, tally, told, trials_of, worth_telling
from recipes.stability import DEVIATIONS, MARGIN, WINDOW

CROSS, PEAK = "✕", "▲"
SHARPNESS = "largest rise of the loss by a small change of the last token's logits, relative; mean"
Key = tuple[str, str]  # variant, precision


def stability(study: Study) -> Markup | None:
    """Loss against learning rate, a map per precision, counts; None where all went well at once.

    "At once": with one learning rate, no divergence and no failure there is nothing to tell.
    """
    if not worth_telling(study.results):
        return None
    trials = trials_of(study.results)
    figure = rates(study, trials)
    shown, rest = study.split(study.groups, most=12)
    reach = _reach(trials)
    first, more = ([_card(study, g, trials, reach) for g in part] for part in (shown, rest))
    note = lead(
        f"A run diverged ({CROSS}) when its training loss was no number any more, when the mean of "
        f"{WINDOW} logged losses rose more than {text.percent(MARGIN, 0)} above the first one, or "
        f"when it ended there. A spike ({PEAK}) is a loss above the mean of the {WINDOW} before by "
        f"{DEVIATIONS:g} standard deviations. ",
        _logging(study.results.runs),
        f"Maps: bits per byte, held-out; full colour from {reach:.3f} above the best run.",
    )
    return join(
        note,
        plot(figure, "rates", "Bits per byte against learning rate") if figure else None,
        folded(first, more, "The other precisions", "cards"),
        trials_table(study, trials),
        runs_table(study, trials),
        _failures(study),
    )


def _logging(runs: Sequence[Run]) -> str:
    """What a logged loss is: spikes hide in a mean over several steps."""
    trainers = [run.recipe["trainer"] for run in runs if "trainer" in run.recipe]
    every = {int(t["log_every_steps"]) for t in trainers if "log_every_steps" in t}
    if every == {1}:
        return "Every step was logged. "
    steps = ", ".join(str(n) for n in sorted(every)) or "several"
    return f"A logged loss is a mean over {steps} steps, in which short spikes hide. "


def _reach(trials: Sequence[Trial]) -> float:
    """Bits per byte above the best from which on a map has its full colour."""
    known = held(trials)
    above = [x - min(known) for x in known]
    return min(max(above), 2 * median(above) or max(above)) or 1.0 if above else 1.0


def _who(study: Study, key: Key) -> Markup:
    variant, precision = key
    dot = swatch(study.look.tones[key])
    return join(dot, el("b", precision), " ", el("span", variant, class_="quiet"))


def _card(study: Study, g: Group, trials: Sequence[Trial], reach: float) -> Markup:
    """Rows are seeds, columns learning rates."""
    mine = [t for t in trials if (t.variant, t.precision) == g.key]
    known = held(trials)
    best = min(known, default=0.0)
    seeds = sorted({r.seed for t in mine for r in t.runs})
    rows = []
    for seed in seeds:
        found = [next((r for r in t.runs if r.seed == seed), None) for t in mine]
        cells = (_map_cell(study, run, best, reach) for run in found)
        rows.append(el("tr", el("th", f"seed {seed}", scope="row"), *cells))
    heads = (el("th", _rate(t.lr), class_="num", scope="col") for t in mine)
    table = el("table", el("thead", el("tr", el("th"), *heads)), el("tbody", *rows), class_="heat")
    count = tally(r for t in mine for r in t.runs)
    words = f"diverged {count.diverged} of {count.runs}, spiked {count.spiked}"
    caption = el("figcaption", _who(study, g.key), el("span", words, class_="quiet right"))
    return el("figure", caption, el("div", table, class_="scroll"))


def _map_cell(study: Study, run: Run | None, best: float, reach: float) -> Markup:
    if run is None:
        return el("td", text.DASH, class_="num")
    bpb = run.final.bpb
    marks = f" {PEAK}{len(run.spike_steps)}" if run.spike_steps else ""
    if run.diverged:
        shown = f"{CROSS} {bpb:.2f}" if isfinite(bpb) else CROSS
        return el("td", el("b", shown), marks, class_="num lost", title=told(run, study.digits))
    share = min(1.0, (bpb - best) / reach)
    return el(
        "td",
        text.bpb(bpb, 3),
        marks,
        class_="num warm",
        style=f"--s:{round(100 * share)}%",
        title=told(run, study.digits),
    )


def _rate(lr: float | None) -> str:
    return text.DASH if lr is None else f"{lr:g}"


def trials_table(study: Study, trials: Sequence[Trial]) -> Markup:
    """One row per variant, precision and learning rate; shaded: what other sections show."""
    heads = ("Variant", "Learning rate", "Bits per byte", "Diverged", "Spiked", "Spikes")
    rows = [_trial_row(study, t) for t in trials]
    columns = [sort_head(h, i > 0) for i, h in enumerate(heads)]
    columns.append(sort_head("Sharpness", title=SHARPNESS))
    table = el("table", el("thead", el("tr", *columns)), el("tbody", *rows), class_="sortable")
    return el("div", table, class_="scroll part")


def _trial_row(study: Study, t: Trial) -> Markup:
    count, key = tally(t.runs), (t.variant, t.precision)
    chosen = next(g for g in study.groups if g.key == key).lr == t.lr
    values = [r.final.bpb for r in t.runs]
    spread = max(values) - min(values) if len(values) > 1 else 0.0
    around = el("span", f" ± {spread / 2:.{study.digits}f}", class_="quiet") if spread > 0 else None
    return el(
        "tr",
        el("td", _who(study, key), data_value=f"{t.variant} {t.precision}"),
        num_cell(t.lr, _rate(t.lr)),
        el(
            "td",
            text.bpb(t.bpb, study.digits),
            around,
            class_=NUMBER,
            data_value=repr(t.bpb) if isfinite(t.bpb) else "",
            title="mean over the seeds ± half of their range",
        ),
        num_cell(count.diverged, f"{count.diverged} of {count.runs}"),
        num_cell(count.spiked, f"{count.spiked} of {count.runs}"),
        num_cell(count.spikes, str(count.spikes)),
        num_cell(count.sharpness, _percent(count.sharpness)),
        class_="base" if chosen else None,
    )


def runs_table(study: Study, trials: Sequence[Trial]) -> Markup:
    """Every run by its id, folded."""
    heads = ("Run", "Bits per byte", "Diverged by step", "Spikes", "Sharpness")
    rows = [
        el(
            "tr",
            el("td", el("code", r.id), title=told(r, study.digits)),
            num_cell(r.final.bpb, text.bpb(r.final.bpb, study.digits)),
            num_cell(r.diverged_step, f"{r.diverged_step or 0:,}"),
            num_cell(len(r.spike_steps), str(len(r.spike_steps))),
            num_cell(r.sharpness, _percent(r.sharpness)),
        )
        for t in trials
        for r in t.runs
    ]
    columns = (sort_head(h, i > 0) for i, h in enumerate(heads))
    table = el("table", el("thead", el("tr", *columns)), el("tbody", *rows), class_="sortable")
    summary = el("summary", f"Divergence, spikes and sharpness of all {len(rows)} runs")
    return el("details", summary, el("div", table, class_="scroll"))


def _percent(share: float | None) -> str:
    return text.DASH if share is None else f"{share:.3f}\u00a0%"


def _failures(study: Study) -> Markup | None:
    """Runs that ended without a result; nothing above counts them."""
    items = study.results.failures.items()
    if not items:
        return None
    listed = (el("li", el("code", run_id), " ", reason) for run_id, reason in items)
    return join(el("h3", "Runs without a result"), el("ul", *listed))
