"""Claims tried one after the other; the page is written anew after each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from recipes import load, record
from recipes.claiming.judge import judge, overall
from recipes.claiming.page import page, plain
from recipes.claiming.schema import names
from recipes.claiming.trial import Outcome, Trial, outcome, prepare
from recipes.costing import whole_model_cost
from recipes.planned import Train
from recipes.show import table
from recipes.study import show
from recipes.study.begin import make
from recipes.study.calibrate import trained_tokens
from recipes.study.run import run_study
from recipes.study.stage import Make

OUT = "runs/claims"


def chosen(said: Sequence[str]) -> tuple[list[Trial], Path]:
    """The claims that a command names, planned, and where they go.

    Args:
        said: names or files of claims, none: every shipped one; `out=DIR`; `key=value` for all
            their studies.

    Raises:
        ValueError: for an unknown name or key, or a claim twice.
    """
    sources = [word for word in said if "=" not in word]
    overrides = [word for word in said if "=" in word and not word.startswith("out=")]
    outs = [word.removeprefix("out=") for word in said if word.startswith("out=")]
    out = Path(outs[-1] if outs else OUT)
    load.parse(overrides)
    trials = [prepare(source, out, overrides) for source in sources or names()]
    labels = [trial.claim.name for trial in trials]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"claim {label} is named twice: they would share a folder")
    return trials, out


def try_claims(
    trials: Sequence[Trial],
    out: Path,
    *,
    workers: int | None = None,
    train: bool = True,
    trainer: Train | None = None,
    begin: Make = make,
) -> Path:
    """Train what is missing, judge, and write claims.md and claims.json.

    A claim whose study cannot be gone through (its folder is in use, or holds runs of another
    recipe) is recorded with the reason, and the others go on.

    Args:
        trials: from `prepare`.
        out: of the page.
        workers: runs at a time; None: as many as the cores hold.
        train: whether to; False: judge what is there.
        trainer: how a run is trained, as of `run_study`.
        begin: how a run is converted that another begins from.

    Returns:
        The page.
    """
    outcomes = {trial.claim.name: _outcome(trial) for trial in trials}
    written = write(list(outcomes.values()), out)
    for trial in trials if train else ():
        name, refused = trial.claim.name, dict[str, str]()
        print(f"claim {name}", flush=True)
        try:
            with show.live() as shown:
                failures = run_study(
                    trial.plan, workers=workers, train=trainer, begin=begin, show=shown
                ).failures
        except ValueError as error:
            failures = refused = {name: str(error)}
        for run_id, reason in failures.items():
            print(f"failed: {run_id}: {reason}")
        outcomes[name] = _outcome(trial, refused)
        print(f"claim {name}: {outcomes[name].verdict}", flush=True)
        written = write(list(outcomes.values()), out)
    return written


def _outcome(trial: Trial, refused: Mapping[str, str] = MappingProxyType({})) -> Outcome:
    """What a claim has come to, or why that cannot be read; refused: why it was not run."""
    try:
        found = outcome(trial)
    except ValueError as error:
        judged = judge([(t, {}, None if t.against is None else {}) for t in trial.tests])
        plan = trial.plan
        found = Outcome(
            trial=trial, groups=(), judged=tuple(judged), verdict=overall(judged), finished=0,
            planned=len(plan.tuning) + len(plan.reporting()), flops=0.0, train_s=0.0,
            failures={trial.claim.name: str(error)},
        )  # fmt: skip
    return replace(found, failures={**found.failures, **refused})


def write(outcomes: Sequence[Outcome], out: Path) -> Path:
    """claims.md and claims.json; the path of the first."""
    record.write_json(out / "claims.json", plain(outcomes))
    record.write_text(out / "claims.md", page(outcomes))
    return out / "claims.md"


def show_plan(trials: Sequence[Trial], *, details: bool) -> None:
    """What each claim would train; details: every model of it too."""
    rows = []
    for trial in trials:
        found = trial.plan
        runs = [*found.tuning, *found.reporting()]
        tokens = [trained_tokens(run.recipe) for run in runs]
        flops = [
            n * whole_model_cost(run.recipe).training_flops
            for n, run in zip(tokens, runs, strict=True)
        ]
        rows.append([
            trial.claim.name, f"arXiv:{trial.claim.paper.arxiv}", str(len(trial.tests)),
            str(len(runs)), f"{sum(tokens):,}", f"{sum(flops):.3g}",
        ])  # fmt: skip
        if details:
            show.plan(found)
            print()
    table(["claim", "paper", "tests", "runs", "tokens", "FLOPs"], rows, numbers_from=2)
