"""Claims on a page: the papers' numbers beside ours, and what may be said."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from recipes import record
from recipes.claiming.judge import Judged, right
from recipes.claiming.measures import MEASURES
from recipes.claiming.schema import Side, Test
from recipes.claiming.trial import Group, Outcome, mean_bpb
from recipes.report.markdown import table
from recipes.statistics.noise import mean_interval

RULE = (
    "A test is **reproduced** where its 95 % interval lies on the right side of its threshold, "
    "**contradicted** where it lies on the wrong side, in either case with p below 0.05 after "
    "Holm's correction over the claim's tests, and **not resolved** otherwise. Differences are "
    "taken seed by seed; the interval is not corrected, and below three seeds nothing is claimed. "
    "Equality is two one-sided tests against a stated margin. A claim is reproduced where all its "
    "tests are, and contradicted where any is. A loss that diverged on one side alone, in three "
    "seeds or more and most of them, counts as infinite; where seeds differ by the same number to "
    "the last digit, that number is judged. These are models of a few hundred thousand to a few "
    "million parameters, trained for minutes: a verdict is of the claim at this scale."
)
MEBI = 2**20


def page(outcomes: Sequence[Outcome]) -> str:
    """claims.md."""
    claims = plain(outcomes)["claims"]
    parts = ["# Claims of papers, tried at a small scale", RULE, summary(claims)]
    parts += [_claim(o) for o in outcomes]
    return "\n\n".join(parts) + "\n"


def plain(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """claims.json: the same figures, for programs."""
    return {
        "schema": 1,
        "versions": record.versions(),
        "commit": record.commit(),
        "claims": {o.trial.claim.name: _plain(o) for o in outcomes},
    }


def _plain(o: Outcome) -> dict[str, Any]:
    claim = o.trial.claim
    tests = []
    for judged in o.judged:
        of, against = judged.test.of, judged.test.against
        said = {**asdict(judged.test), "of": asdict(of), "against": against and asdict(against)}
        tests.append({**asdict(judged), "test": said})
    return {
        "title": claim.title,
        "paper": asdict(claim.paper),
        "verdict": o.verdict,
        "tests": tests,
        "groups": [
            {"variant": g.variant, "precision": g.precision, "seeds": sorted(g.runs),
             "bpb": mean_bpb(g)}
            for g in o.groups
        ],
        "runs": {"finished": o.finished, "planned": o.planned},
        "training_flops": o.flops,
        "train_s": o.train_s,
        "limits": claim.limits,
        "failures": o.failures,
    }  # fmt: skip


def summary(claims: Mapping[str, Any], page: str = "") -> str:
    """The verdicts in one table.

    claims: by name, of claims.json; page: where claims.md lies, seen from the table.
    """
    rows = []
    for name, claim in claims.items():
        verdicts = [test["verdict"] for test in claim["tests"]]
        told = [f"{verdicts.count(v)}" for v in ("reproduced", "not resolved", "contradicted")]
        runs = claim["runs"]
        rows.append([
            f"[{claim['title']}]({page}#{name})", claim["paper"]["arxiv"],
            f"**{claim['verdict']}**", " / ".join(told), f"{runs['finished']} of {runs['planned']}",
            f"{claim['training_flops']:.2g}", f"{claim['train_s']:,.0f}",
        ])  # fmt: skip
    heads = ["claim", "arXiv", "verdict", "tests: reproduced / not resolved / contradicted"]
    return table([*heads, "runs", "training FLOPs", "training s"], rows)


def _claim(o: Outcome) -> str:
    claim, p = o.trial.claim, o.trial.claim.paper
    parts = [
        f'<a id="{claim.name}"></a>\n\n## {claim.title}',
        f"> {p.says}\n>\n> arXiv:{p.arxiv}, {p.where}",
        "Published:\n\n" + "\n".join(f"- {x}" for x in p.numbers),
        f"Verdict here: **{o.verdict}**.",
        table(
            [
                "test",
                "threshold",
                "of",
                "against",
                "estimate (95 % interval)",
                "p, Holm",
                "verdict",
            ],
            [_test(j) for j in o.judged],
        ),
    ]
    notes = [f"- {_sides(j.test)}: {j.test.note}" for j in o.judged if j.test.note]
    if notes:
        parts.append("Why these thresholds:\n\n" + "\n".join(notes))
    parts += [_groups(o), _rates(o), _cost(o)]
    if claim.limits:
        parts.append("What this can and cannot say:\n\n" + _listed(claim.limits))
    if o.failures:
        failed = [f"{run_id}: {reason}" for run_id, reason in o.failures.items()]
        parts.append("Failed:\n\n" + _listed(failed))
    return "\n\n".join(parts)


def _test(j: Judged) -> list[str]:
    test, form = j.test, MEASURES[j.test.measure].form
    what = f"{_sides(test)}: {MEASURES[test.measure].words}"
    if test.measure == "weight_bytes_per_token":
        what += f", {test.tokens} at once"
    verdict = j.verdict if j.verdict in ("reproduced", "contradicted") else _open(j)
    if j.estimate is None and verdict == j.verdict:
        verdict += f": {j.how}"  # one side alone diverged
    return [
        what, _threshold(test), _figure(j.of, form), _figure(j.against, form), _estimate(j),
        "exact" if j.how == "counted" else _figure(j.p_holm, ".3g"), verdict,
    ]  # fmt: skip


def _open(j: Judged) -> str:
    """Why nothing was decided, where it is not the interval."""
    told = j.verdict
    if j.low is None:
        return f"{told}: {j.how}" if j.how else told
    assert j.high is not None
    if right(j.test, j.low) == right(j.test, j.high) and j.test.direction != "equal":
        return f"{told}: the interval clears the threshold, corrected it does not"
    return told


def _threshold(test: Test) -> str:
    kind = "ratio " if test.scale == "ratio" else ""
    if test.direction == "equal":
        return f"{kind}{test.bound:g} ± {test.margin:g}"
    return f"{kind}{'<' if test.direction == 'lower' else '>'} {test.bound:g}"


def _estimate(j: Judged) -> str:
    form = MEASURES[j.test.measure].form
    if j.test.scale == "ratio":
        form = ".4f"
    elif j.test.against is not None:
        form = f"+{form}"
    if j.estimate is None:
        return ""
    value = format(j.estimate, form)
    if j.low is None or j.high is None or j.how == "counted":
        return value
    return f"{value} ({format(j.low, form)} to {format(j.high, form)})"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _sides(test: Test) -> str:
    if test.against is None:
        return _side(test.of)
    return f"{_side(test.of)} against {_side(test.against)}"


def _side(side: Side) -> str:
    parts = [side.variant, side.precision, None if side.width is None else f"width {side.width}"]
    return " ".join(part for part in parts if part) or "the baseline"


def _groups(o: Outcome) -> str:
    rows = []
    for g in o.groups:
        first = g.first
        counted = [""] * 5
        if first is not None:
            c = first.cost
            counted = [
                f"{c.params:,}", f"{c.active_params:,.0f}", f"{c.flops_per_token:,.0f}",
                f"{first.lr:g}" if first.lr else "", f"{first.steps:,}",
            ]  # fmt: skip
        rows.append([g.variant, g.precision, f"{len(g.runs)} of {g.planned}", _bpb(g), *counted])
    heads = ["variant", "precision", "seeds", "bits per byte (95 % interval)", "parameters"]
    return table([*heads, "active", "FLOPs per token", "learning rate", "steps"], rows)


def _bpb(g: Group) -> str:
    mean = mean_bpb(g)
    if mean is None:
        return "diverged" if g.runs else ""
    if len(g.runs) < 2:
        return f"{mean:.4f}"
    _, half = mean_interval([run.final.bpb for run in g.runs.values()])
    return f"{mean:.4f} ± {half:.4f}"


def _rates(o: Outcome) -> str:
    """What was done about learning rates, and where the grid was too short."""
    tried = sorted(o.trial.plan.study.lrs)
    if not tried:
        return (
            "Learning rates are the recipe's and were not tuned: a variant that wants another one "
            "is at a disadvantage."
        )
    seeds = ", ".join(map(str, o.trial.plan.study.tuning.seeds))
    edge = [
        f"{g.variant} {g.precision} ({g.first.lr:g})" for g in o.groups
        if g.first is not None and g.first.lr in (tried[0], tried[-1])
    ]  # fmt: skip
    told = f"Learning rates {', '.join(f'{lr:g}' for lr in tried)} were tried on seed {seeds}, the "
    told += "best is each variant's."
    if edge:
        told += f" At an edge of these, so perhaps not at its best: {', '.join(edge)}."
    return told


def _cost(o: Outcome) -> str:
    memory = [
        run.speed.peak_memory_bytes
        for g in o.groups for run in g.runs.values() if run.speed.peak_memory_bytes is not None
    ]  # fmt: skip
    told = f", at most {max(memory) / MEBI:,.0f} MiB a run" if memory else ""
    return (
        f"Cost: {o.finished} of {o.planned} runs, {o.flops:.3g} training FLOPs, {o.train_s:,.0f} s "
        f"of training one after the other{told}."
    )


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
