"""Runs from several directories, brought together for one report."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipes.report.records import SCHEMA, Run, load_json, read_results
from recipes.report.strict import read_as


def read_runs(dirs: Iterable[Path]) -> dict[str, Any]:
    """Results for `write_report`, from directories of runs and of comparisons.

    A single comparison directory keeps what it says of itself. Otherwise the runs are laid side
    by side with no claim that anything was held equal, and the first one is the baseline. Runs
    that carry the same labels are told apart by their learning rate, and those that still do, or
    that carry the same id, by the name of their directory.

    Args:
        dirs: each holds a `result.json` (a run) or a `results.json` (a comparison).

    Raises:
        ValueError: a directory holds neither, or a record is malformed.
    """
    paths = [Path(d) for d in dirs]
    if not paths:
        raise ValueError("no run directory given: a report needs at least one")
    if len(paths) == 1 and (paths[0] / "results.json").is_file():
        read_results(paths[0])  # checks it
        return load_json(paths[0] / "results.json")
    found = [(path.resolve().name, run) for path in paths for run in _runs_in(path)]
    return {"schema": SCHEMA, "comparison": None, "runs": _told_apart(found)}


def _runs_in(path: Path) -> list[dict[str, Any]]:
    if (path / "results.json").is_file():
        read_results(path)
        return load_json(path / "results.json")["runs"]
    if (path / "result.json").is_file():
        run = load_json(path / "result.json")
        read_as(Run, run, str(path / "result.json"))
        return [run]
    raise ValueError(f"{path}: no result.json or results.json there, is it a finished run?")


def _told_apart(found: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Runs with distinct ids and distinct (variant, precision, seed)."""
    ids = Counter(run["id"] for _, run in found)
    rates: dict[Any, set[float | None]] = {}
    for _, run in found:
        rates.setdefault(_cell(run), set()).add(run.get("lr"))
    cells = Counter((_cell(run), run.get("lr")) for _, run in found)
    runs = [dict(run) for _, run in found]
    for (name, original), run in zip(found, runs, strict=True):
        cell, lr = _cell(original), original.get("lr")
        if ids[original["id"]] > 1:
            run["id"] = f"{original['id']} ({name})"
        if len(rates[cell]) > 1 and lr is not None:
            run["variant"] += f" lr {lr:g}"
        if cells[cell, lr] > 1:
            run["variant"] += f" ({name})"
    return runs


def _cell(run: dict[str, Any]) -> tuple[str, str, int]:
    return run["variant"], run["precision"], run["seed"]
