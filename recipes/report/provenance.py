"""Where the numbers come from: resolved recipes, versions, commits, machines."""

import json
from typing import Any

import yaml

from recipes.report.study import Study
from recipes.report.text import Markup, el, join


def provenance(study: Study) -> Markup | None:
    """Resolved recipes, folded, with what tells each from the baseline; versions and machines."""
    runs = [r for g in study.groups for r in g.runs]
    base = _flat(study.baseline.first.recipe)
    recipes = [_recipe(r.id, r.recipe, base) for r in runs if r.recipe]
    cards = _provenance(study)
    if not recipes and not cards:
        return None
    c = study.results.comparison
    allowed = ", ".join(c.allowed_differences) if c else ""
    rule = ("Recipes may differ in ", el("code", allowed), "; nothing else was allowed to.")
    return join(
        el("p", *rule, class_="lead") if allowed else None,
        el("div", *recipes, class_="recipes") if recipes else None,
        *cards,
    )


def _recipe(run_id: str, recipe: dict[str, Any], base: dict[str, Any]) -> Markup:
    """Folded: the whole recipe; unfolded: where it differs from the baseline's."""
    mine = _flat(recipe)
    changed = [f"{k}={_short(mine.get(k))}" for k in {**mine, **base} if mine.get(k) != base.get(k)]
    note = ", ".join(changed) or "the baseline's recipe"
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    summary = el("summary", el("code", run_id), " ", el("span", note, class_="quiet"))
    return el("details", summary, el("pre", text))


def _flat(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        deeper = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if deeper else {f"{prefix}{key}": value}
    return flat


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _provenance(study: Study) -> list[Markup]:
    """Versions, commit and machine: each combination once, with how many runs have it."""
    made: dict[str, tuple[list[Markup], int]] = {}
    for run in study.results.runs:
        facts = {**run.versions, "commit": run.commit, **run.machine}
        facts = {k: v for k, v in facts.items() if v is not None}
        key = json.dumps(facts, sort_keys=True, default=str)
        rows = [el("tr", el("th", k, scope="row"), el("td", str(v))) for k, v in facts.items()]
        made[key] = (rows, made.get(key, (rows, 0))[1] + 1)
    shown = [(rows, n) for rows, n in made.values() if rows]
    if not shown:
        return []
    cards = [_facts_card(rows, n) for rows, n in shown]
    return [el("h3", "Versions and machines"), el("div", *cards, class_="cards")]


def _facts_card(rows: list[Markup], runs: int) -> Markup:
    table = el("table", el("tbody", *rows), class_="plain")
    return el("figure", el("figcaption", f"{runs} run{'s' * (runs > 1)}"), table)
