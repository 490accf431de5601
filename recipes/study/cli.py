"""The commands `zoo study plan | run | report`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="A comparison over sizes, matchings and tuned learning rates.")

Source = Annotated[str, typer.Argument(help="A file, or a shipped one's name.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="What differs from the file.")
]
Workers = Annotated[
    int | None, typer.Option(help="Runs at a time; default: as many as the cores hold.")
]


@app.command()
def plan(
    study: Source, overrides: Overrides = None, workers: Workers = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure each model on a few steps first.")
    ] = False,
) -> None:  # fmt: skip
    """Every run and its price, before anything starts."""
    from recipes.study import calibrate as calibrating
    from recipes.study import plan as planning
    from recipes.study import show
    from recipes.study.schema import read_study

    found = planning.plan(*read_study(study, overrides or []))
    if calibrate:
        calibrating.calibrate(found, [*found.tuning, *found.reporting()], print)
    show.plan(found, workers)


@app.command()
def run(
    study: Source, overrides: Overrides = None, workers: Workers = None,
    ray: Annotated[bool, typer.Option("--ray", help="As tasks of a Ray cluster.")] = False,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster that runs.")] = None,
) -> None:  # fmt: skip
    """Train the runs that are missing, several at a time, and write the report."""
    from recipes.study import plan as planning
    from recipes.study import show
    from recipes.study.report.page import write_study_report
    from recipes.study.run import run_study, threads_of
    from recipes.study.schema import read_study

    found = planning.plan(*read_study(study, overrides or []))
    train = None
    if ray or address:
        from recipes.study.ray_runs import RayTasks

        train = RayTasks(address)
        workers = workers or train.workers(threads_of(found))
    with show.live() as shown:
        progress = run_study(found, workers=workers, train=train, show=shown)
    for run_id, reason in progress.failures.items():
        print(f"failed: {run_id}: {reason}")
    print(f"{found.out}: {progress.stage} done")
    print(f"report: {write_study_report(found.out)[0]}", flush=True)


@app.command()
def report(
    study: Annotated[str, typer.Argument(help="A study's directory, its file, or its name.")],
    overrides: Overrides = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also each picture as PDF and SVG, here.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="Publish it there: page, tables, records, no weights.")
    ] = None,
) -> None:
    """What a study's runs say so far: a page, tables as CSV and LaTeX, pictures."""
    from recipes.study.gather import study_directory
    from recipes.study.report.page import write_study_report

    directory = study_directory(study, overrides or [])
    for path in write_study_report(directory, figures, to=to):
        print(f"{'report' if path.suffix == '.html' else 'written'}: {path}")
