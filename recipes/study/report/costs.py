"""What it costs: counted and traced FLOPs, bytes, memory, speed, and what binds."""

from collections.abc import Sequence

from recipes.report import text
from recipes.report.records import Run
from recipes.report.study import BYTES_AT
from recipes.report.tables import num_cell, sort_head, sortable
from recipes.report.text import Markup, el, join, lead
from recipes.study.report.binds import what_binds
from recipes.study.report.derive import Arm, Derived
from recipes.study.report.names import held, variant_name
from recipes.study.report.roofline import had, reached
from recipes.study.report.targets import SHARED
from recipes.study.trace import AGREES


def costs(d: Derived) -> Markup | None:
    """Counted costs first, what a machine made of them second; None without any result."""
    size = d.top
    if size is None:
        return None
    variants = (*d.plan.variants, *d.controls)
    arms = [arm for v in variants if (arm := d.arm(v, size)) is not None]
    where = lead(f"Of size {size}, {held(d.primary)}; controls are those that came by themselves.")
    return join(
        where,
        el("h3", "Counted, apart from any machine"),
        _counted(d, arms),
        el("h3", "Memory of training, counted"),
        _memory(d, arms),
        el("h3", "Counted against traced"),
        _traced(d),
        el("h3", "On the machine of the runs"),
        _measured(d, arms),
        el("h3", "What binds"),
        what_binds(d),
    )


def _counted(d: Derived, arms: Sequence[Arm]) -> Markup:
    heads = [
        sort_head("Variant", False),
        sort_head("Parameters", title="every trainable number"),
        sort_head("Without embedding", title="nor the head, where it is not tied"),
        sort_head("Active", title="strict: embedding and head left out"),
        sort_head("Active, head", title="with the head"),
        sort_head("FLOPs/token", title="matmuls, forward"),
        sort_head("Other FLOPs", title="softmax, top-k, element-wise: estimated"),
        *(sort_head(f"B/token at {n}", title=f"weight bytes read per token, {n} at once")
          for n in BYTES_AT),
    ]  # fmt: skip
    return sortable(heads, [_counted_row(d, arm) for arm in arms])


def _counted_row(d: Derived, arm: Arm) -> Markup:
    cost, model = arm.runs[0].cost, d.model(arm)
    numbers = [
        cost.params, cost.nonembedding_params,
        model.active_strict if model else None, model.active_with_head if model else None,
        cost.flops_per_token, cost.other_flops_per_token,
    ]  # fmt: skip
    cells = [num_cell(x, text.si(x or 0), text.exact(x or 0)) for x in numbers]
    per_token = [cost.weight_bytes_per_token.get(n) for n in BYTES_AT]
    cells += [num_cell(x, text.si(x or 0, "B"), text.exact(x or 0)) for x in per_token]
    return el("tr", el("td", variant_name(d, arm.variant)), *cells)


def _memory(d: Derived, arms: Sequence[Arm]) -> Markup:
    heads = [
        sort_head("Variant", False), sort_head("Weights", title="float32 masters"),
        sort_head("Gradients", title="at most: a table's are of the rows that were read"),
        sort_head("Optimiser", title="its state"),
        sort_head("Together"), sort_head("Measured peak", title="of the process, all of it"),
    ]  # fmt: skip
    rows = []
    for arm in arms:
        model, peak = d.model(arm), arm.peak_memory_bytes
        if model is None:
            continue
        parts = [model.weight_bytes, model.gradient_bytes, model.optimizer_bytes]
        cells = [num_cell(x, text.si(x, "B"), text.exact(x)) for x in (*parts, sum(parts))]
        cells.append(num_cell(peak, text.si(peak or 0, "B")))
        rows.append(el("tr", el("td", variant_name(d, arm.variant)), *cells))
    return sortable(heads, rows)


def _traced(d: Derived) -> Markup:
    """At the smallest size that was trained: a trace of one forward beside the count."""
    heads = [
        sort_head("Variant", False), sort_head("Size", False), sort_head("Model", False),
        sort_head("Counted", title="FLOPs per token, forward, all keys of the attention"),
        sort_head("Traced", title="by torch's counter of matmuls, one forward of random tokens"),
        sort_head("Off by"), sort_head("Says", False),
    ]  # fmt: skip
    rows = []
    for key, trace in d.results.traces.items():
        model = d.plan.models[key]
        seen = trace.flops_per_token
        off = None if seen is None else seen / model.traced_as - 1
        said = trace.why or ("agrees" if abs(off or 0.0) <= AGREES else DATA_DEPENDENT)
        rows.append(el(
            "tr",
            el("td", variant_name(d, model.variant)), el("td", model.size),
            el("td", el("code", key)),
            num_cell(model.traced_as, text.exact(model.traced_as)),
            num_cell(seen, text.exact(seen or 0)),
            num_cell(off, f"{text.signed(100 * (off or 0.0), 2)}\u00a0%"),
            el("td", said),
        ))  # fmt: skip
    return sortable(heads, rows) if rows else el("p", "No model was traced.")


DATA_DEPENDENT = (
    "differs: the count is of what the variant is designed to run on average, the trace of what "
    "random tokens made an untrained model run"
)


def _measured(d: Derived, arms: Sequence[Arm]) -> Markup:
    base = d.base(d.top or "")
    machines = dict.fromkeys(_machine_words(run) for arm in arms for run in arm.runs)
    limits = d.results.machine
    elsewhere = [arm.variant for arm in arms if limits is not None and not had(arm, limits)]
    note = lead(
        f"{'; '.join(machines)}. Speed and memory say how mature a kernel is as much as what an "
        f"idea costs: they are no part of the verdict on quality. {SHARED}",
        " The limits below were measured on another machine, or with other threads, than some runs "
        f"had, which so have no MFU: {', '.join(elsewhere)}." if elsewhere else None,
    )  # fmt: skip
    heads = [
        sort_head("Variant", False), sort_head("Tokens/s", title="median, training"),
        sort_head("To the baseline"), sort_head("Training"),
        sort_head("MFU", title="training FLOPs per second over the matmul rate of the machine that "
                  "the roofline below is of"),
        sort_head("Peak memory", title="the largest of the runs"),
    ]  # fmt: skip
    rows = [_measured_row(d, arm, base) for arm in arms]
    return join(note, sortable(heads, rows))


def _machine_words(run: Run) -> str:
    m = run.machine
    threads = m.get("threads")
    return f"{m.get('cpu', 'an unnamed machine')}, {threads} thread{'s' * (threads != 1)}"


def _measured_row(d: Derived, arm: Arm, base: Arm | None) -> Markup:
    ratio = arm.tokens_per_s / base.tokens_per_s if base else None
    machine, peak = d.results.machine, arm.peak_memory_bytes
    per_s = None if machine is None else reached(arm, machine)
    mfu = None if machine is None or per_s is None else per_s / machine.flops_per_s
    return el(
        "tr",
        el("td", variant_name(d, arm.variant)),
        num_cell(arm.tokens_per_s, text.si(arm.tokens_per_s)),
        num_cell(ratio, f"{ratio or 0:.2f}×"),
        num_cell(arm.train_s, text.seconds(arm.train_s)),
        num_cell(mfu, text.percent(mfu or 0.0)),
        num_cell(peak, text.si(peak or 0, "B")),
    )
