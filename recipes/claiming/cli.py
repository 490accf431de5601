"""The command `zoo claims`."""

from typing import Annotated

import typer


def claims(
    said: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME...] [KEY=VALUE...]",
            help="Claims, shipped or files (default: every shipped one); out=DIR (default "
            "runs/claims); keys of their studies or recipes.",
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="What would be trained, and nothing more.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Judge what is there, train nothing.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time; default: as many as the cores hold.")
    ] = None,
) -> None:
    """Try what papers claim at a small scale: train what is missing, judge, write claims.md."""
    from recipes.claiming.go import chosen, show_plan, try_claims

    trials, out = chosen(said or [])
    if plan:
        show_plan(trials, details=any("=" not in word for word in said or []))
        return
    written = try_claims(trials, out, workers=workers, train=not report_only)
    print(f"report: {written}", flush=True)
