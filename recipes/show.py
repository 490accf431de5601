"""What the command line prints: tables for people, JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

import zoo
from layers.names import unknown
from recipes.costing import BYTES_AT_TOKENS
from recipes.load import to_yaml

if TYPE_CHECKING:
    from recipes.planning import Plan


def catalogue(pattern: str, as_json: bool) -> None:
    """Variants and routers that match a glob, and the precisions.

    Raises:
        ValueError: when nothing matches.
    """
    found = {
        kind: [zoo.describe(n, kind) for n in zoo.names(pattern, kind)]
        for kind in ("ffn", "router")
    }
    if not any(found.values()):
        raise unknown("variant or router", pattern, [*zoo.names(), *zoo.names(kind="router")])
    if as_json:
        plain: dict[str, Any] = {
            f"{kind}s": [{"name": c.name, "summary": c.summary, "paper": c.paper} for c in cards]
            for kind, cards in found.items()
        }
        _json({**plain, "precisions": zoo.precisions(), "formats": zoo.formats()})
        return
    rows = [[c.name, kind, c.summary, c.paper] for kind, cards in found.items() for c in cards]
    table(["name", "kind", "summary", "paper"], rows)
    print(f"precisions: {', '.join(zoo.precisions())}")
    print(f"formats: {', '.join(zoo.formats())}")


def card(name: str, as_json: bool) -> None:
    """The card of one row: a variant, a router, a precision preset or a number format."""
    plain: dict[str, Any] = {}
    if name in zoo.precisions():
        plain["precision"] = zoo.policy_of(name).to_plain()
    if name in zoo.formats():
        plain["format"] = zoo.describe_format(name)
    if plain:
        _json(plain) if as_json else print(to_yaml(plain), end="")
        return
    found = zoo.describe(name)
    if as_json:
        plain = asdict(found)
        plain["cost"] = None if found.cost is None else _cost(found.cost)
        _json(plain)
    else:
        print(found)
        if found.kind == "ffn" and name in zoo.names(kind="router"):
            print(f"\nIts router, of the same name:\n{zoo.describe(name, 'router')}")


def cost(name: str, options: Mapping[str, Any], as_json: bool) -> None:
    """What one token costs in a variant."""
    found = zoo.cost(name, **{"d_model": 512, **options})
    if as_json:
        _json(_cost(found))
        return
    rows = [
        [role, f"{part.params:,}", f"{part.active_params:,.0f}", f"{part.flops:,.0f}"]
        + [f"{part.weight_bytes_at(n):,.0f}" for n in BYTES_AT_TOKENS]
        for role, part in {**found.by_role(), "all": found}.items()
    ]
    at = [f"bytes/token at {n:,}" for n in BYTES_AT_TOKENS]
    table(["role", "params", "active", "FLOPs/token", *at], rows, numbers_from=1)


def plan(found: "Plan") -> None:
    """What a comparison is about to do."""
    c = found.comparison
    steps = found.runs[0].recipe.trainer.max_steps
    print(f"{c.name}: {len(found.runs)} runs of {steps:,} steps into {found.out}")
    print(f"held equal: {c.hold} = {found.target:,.0f} per token, of the whole model")
    for match in found.matched:
        turned = f"{match.width_field}={match.width}" if match.width is not None else "as given"
        print(f"  {match.variant}: {turned}, {match.value:,.0f} ({match.residual:+.2%})")


def results(path: Path) -> None:
    """The runs of a comparison, best first; its stability, where there is something to tell."""
    results = json.loads(path.read_text())
    runs = sorted(results["runs"], key=lambda run: run["final"]["bpb"] or inf)
    rows = [
        [
            run["id"],
            _bpb(run["final"]["bpb"]),
            f"{run['cost']['params']:,}",
            f"{run['cost']['active_params']:,.0f}",
            f"{run['speed']['tokens_per_s']:,.0f}",
            f"{run['speed']['peak_memory_bytes'] / 2**20:,.0f} MiB",
        ]
        for run in runs
    ]
    heads = ["run", "bits/byte", "params", "active", "tokens/s", "peak memory"]
    table(heads, rows, numbers_from=1)
    _stability(path)


def _stability(path: Path) -> None:
    """One row per variant, precision and learning rate."""
    from recipes.report.records import read_results
    from recipes.report.trials import tally, trials_of, worth_telling

    read = read_results(path)
    if not worth_telling(read):
        return
    rows = []
    for trial in trials_of(read):
        count = tally(trial.runs)
        rows.append([
            f"{trial.variant} {trial.precision}",
            "" if trial.lr is None else f"{trial.lr:g}",
            _bpb(trial.bpb),
            f"{count.diverged} of {count.runs}",
            f"{count.spiked} of {count.runs}",
            "" if count.sharpness is None else f"{count.sharpness:.3f} %",
        ])  # fmt: skip
    heads = ["stability", "lr", "bits/byte", "diverged", "spiked", "sharpness"]
    table(heads, rows, numbers_from=1)
    for run_id, reason in read.failures.items():
        print(f"failed: {run_id}: {reason}")


def _bpb(value: float | None) -> str:
    return f"{value:.4f}" if value is not None and isfinite(value) else "diverged"


def _cost(found: Any) -> dict[str, Any]:
    return {
        "params": found.params,
        "active_params": found.active_params,
        "flops_per_token": found.flops,
        "training_flops_per_token": found.training_flops,
        "other_flops_per_token": found.other_flops,
        "weight_bytes_per_token": {str(n): found.weight_bytes_at(n) for n in BYTES_AT_TOKENS},
        "parameters": [asdict(item) for item in found],
    }


def _json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int = 99) -> None:
    """A table as wide as the terminal; as wide as it must be where there is none."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i >= numbers_from else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
