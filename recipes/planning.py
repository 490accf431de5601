"""The runs that a comparison comes to: budgets matched, differences checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from layers.names import check_positive
from recipes import load
from recipes.comparison import (
    Comparison,
    Variant,
    baseline_of,
    baseline_precision,
    shared_recipe,
    variants_of,
)
from recipes.costing import whole_model_cost
from recipes.names import precision_label
from recipes.planned import PlannedRun
from recipes.report.records import Match
from recipes.schema import Recipe
from zoo.budget import measure_of, solve_width
from zoo.registry import find

MAY_DIFFER = ("model.ffn", "model.router", "model.allow_noncausal", "precision", "seed")
LR = "optim.lr"  # may differ too where learning rates are tried


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A comparison with everything settled."""

    comparison: Comparison
    resolved: dict[str, Any]  # the comparison as a plain mapping, its recipe written out
    target: float
    matched: tuple[Match, ...]
    runs: tuple[PlannedRun, ...]

    @property
    def out(self) -> Path:
        """Where it goes."""
        return Path(self.comparison.out or f"runs/{self.comparison.name}")


def plan(comparison: Comparison, overrides: Mapping[str, Any] | None = None) -> Plan:
    """Settle every run.

    Args:
        comparison: what to compare.
        overrides: keys of the shared recipe.

    Raises:
        ValueError: for a wrong name, option or value, an unknown baseline, a budget that a variant
            cannot meet, or recipes that differ where they may not.
    """
    c = comparison
    check_positive(tolerance=c.tolerance, multiple_of=c.multiple_of)
    check_positive(**{f"lrs[{i}]": lr for i, lr in enumerate(c.lrs)})
    if "/" in c.name or c.name in ("", ".", ".."):
        raise ValueError(f"comparison: name must be usable as a folder's, got {c.name!r}")
    shared = shared_recipe(c.recipe, overrides or {})
    variants = variants_of(c.variants)
    base = baseline_of(c, variants)
    _check_rates(c, variants, overrides or {})
    budget = Budget(c, shared, base)
    met = [budget.met(variant) for variant in variants]
    solved, matched = [v for v, _ in met], tuple(match for _, match in met)
    runs = [
        _run(shared, variant, precision, seed, lr)
        for seed in c.seeds
        for lr in c.lrs or [None]
        for variant in solved
        for precision in c.precisions
    ]
    baseline = (solved[variants.index(base)], baseline_precision(c))
    extra = [_run(shared, *baseline, seed, c.baseline.lr) for seed in c.extra_seeds]
    runs = _distinct([*runs, *extra])
    check_differences([*([LR] if c.lrs else []), *c.allow], runs)
    resolved = {**load.to_plain(c), "recipe": _written_out(shared)}
    del resolved["out"]
    if not c.lrs:  # a directory from before there were any stays what it is
        del resolved["lrs"], resolved["baseline"]["lr"]
    return Plan(comparison=c, resolved=resolved, target=budget.target, matched=matched, runs=runs)


def recipe_of(
    shared: Mapping[str, Any], variant: Variant, precision: Any, seed: int, lr: float | None = None
) -> Recipe:
    """The recipe of one run, checked; lr: in place of what is said of the learning rate.

    Raises:
        ValueError: naming the variant, for whatever no run could use.
    """
    plain = load.merged(shared, variant.recipe)
    plain["model"] = {**plain["model"], "ffn": variant.ffn}
    try:
        recipe = load.load({**plain, "precision": precision, "seed": seed})
    except ValueError as error:
        raise ValueError(f"{variant.label}: {error}") from None
    return recipe if lr is None else replace(recipe, optim=replace(recipe.optim, lr=lr))


@dataclass(frozen=True)
class Budget:
    """What is held equal: how it is read off a variant, and how much of it the baseline has."""

    comparison: Comparison
    shared: Mapping[str, Any]
    base: Variant

    def measure(self, variant: Variant) -> float:
        """Of the whole model, per token, in the baseline's precision."""
        c = self.comparison
        read = measure_of("flops" if c.hold == "active_flops" else c.hold)
        recipe = recipe_of(self.shared, variant, baseline_precision(c), 0)
        return read(whole_model_cost(recipe))

    @cached_property
    def target(self) -> float:
        """The baseline's."""
        return self.measure(self.base)

    def met(self, variant: Variant) -> tuple[Variant, Match]:
        """The variant with its width solved, and how nearly it comes.

        Raises:
            ValueError: when it comes no nearer than the tolerance.
        """
        c = self.comparison
        entry, width = _width(self.shared, variant)
        if variant is not self.base and entry is not None and width is None:
            variant, width = _solve(c, variant, entry, self.measure, self.target)
        value = self.measure(variant)
        residual = (value - self.target) / self.target
        if abs(residual) > c.tolerance:
            raise ValueError(
                f"{variant.label}: {c.hold} is {value:.6g}, {residual:+.1%} from the baseline's "
                f"{self.target:.6g}: leave {entry or 'its width'} out to have it solved, or allow "
                f"a larger tolerance than {c.tolerance}"
            )
        label = variant.label
        return variant, Match(
            variant=label, width_field=entry, width=width, value=value, residual=residual
        )


def _width(shared: Mapping[str, Any], variant: Variant) -> tuple[str | None, int | None]:
    """The variant's width field and what it says of it; None where it has none to turn."""
    if not isinstance(variant.ffn, Mapping) or "name" not in variant.ffn:
        return None, None
    entry = find(variant.ffn["name"])
    return entry.width, variant.ffn.get(entry.width) if entry.width else None


def _solve(
    c: Comparison, variant: Variant, field_name: str, measure: Callable[[Variant], float],
    target: float,
) -> tuple[Variant, int]:  # fmt: skip
    def at(width: int) -> Variant:
        ffn = {**variant.ffn, field_name: width}
        return Variant(label=variant.label, ffn=ffn, recipe=variant.recipe)

    try:
        found = solve_width(
            lambda width: measure(at(width)),
            target,
            multiple_of=c.multiple_of,
            tolerance=c.tolerance,
        )
    except ValueError as error:
        raise ValueError(f"{variant.label}: {c.hold}: {error}") from None
    return at(found.width), found.width


def _run(
    shared: Mapping[str, Any], variant: Variant, precision: Any, seed: int, lr: float | None
) -> PlannedRun:
    recipe = recipe_of(shared, variant, precision, seed, lr)
    run_id = "-".join([variant.label, precision_label(precision), *rate(lr), f"s{seed}"])
    return PlannedRun(id=run_id, variant=variant.label, recipe=recipe)


def rate(lr: float | None) -> list[str]:
    """How an id says a learning rate, where there are several."""
    return [] if lr is None else [f"lr{lr:g}"]


def _distinct(runs: Sequence[PlannedRun]) -> tuple[PlannedRun, ...]:
    """Each run once; a seed may stand in `seeds` and in `extra_seeds`."""
    by_id: dict[str, PlannedRun] = {}
    for run in runs:
        if by_id.setdefault(run.id, run).recipe != run.recipe:
            raise ValueError(f"comparison: two different runs are called {run.id}: name them apart")
    return tuple(by_id.values())


def _check_rates(c: Comparison, variants: Sequence[Variant], overrides: Mapping[str, Any]) -> None:
    """Raise where a learning rate is said that `lrs` would overrule."""
    said = {"the overrides": overrides, **{v.label: v.recipe for v in variants}}
    for who, recipe in said.items():
        if c.lrs and "lr" in recipe.get("optim", {}):
            raise ValueError(f"comparison: {who} must leave optim.lr to lrs={c.lrs}")


def check_differences(allow: Sequence[str], runs: Sequence[PlannedRun]) -> None:
    """Raise where recipes differ outside what any comparison allows and `allow` adds."""
    allowed = (*MAY_DIFFER, *allow)
    first = load.to_plain(runs[0].recipe)
    for run in runs[1:]:
        offending = [
            path
            for path in load.differences(first, load.to_plain(run.recipe))
            if not any(path == key or path.startswith(f"{key}.") for key in allowed)
        ]
        if offending:
            raise ValueError(
                f"the recipes of {runs[0].id} and {run.id} differ in {', '.join(offending)}: make "
                "them equal, or add the keys to `allow`"
            )


def _written_out(shared: Mapping[str, Any]) -> dict[str, Any]:
    """The shared recipe with every default, but for what each run sets itself."""
    model = {**shared.get("model", {}), "ffn": "swiglu"}
    plain = load.to_plain(load.merge(Recipe, {**shared, "model": model}, (), what="recipe"))
    del plain["seed"], plain["precision"], plain["model"]["ffn"]
    return plain
