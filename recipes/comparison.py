"""What a comparison asks for, and the runs that it comes to: budgets matched, differences checked.

name: quick
recipe: debug                      # a recipe's name or file, or its keys; `model.ffn` is not read
variants:
  - {name: swiglu, d_ff: 704}      # a row of the catalogue with its options
  - {name: moe, n_experts: 8}      # its width is solved so that the budget is equal
  - {label: mixed, ffn: [...]}     # any layer plan; taken as it is, refused if off budget
precisions: [bf16, nvfp4]
seeds: [0]
extra_seeds: [1, 2, 3]             # of the baseline alone: the noise
baseline: {variant: swiglu, precision: bf16}
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from layers.base import Cost
from layers.names import check_positive, unknown
from recipes import load
from recipes.costing import whole_model_cost
from recipes.names import ffn_label, precision_label
from recipes.report.records import Match
from recipes.schema import Recipe
from zoo.budget import measure_of, solve_width
from zoo.registry import find

MAY_DIFFER = ("model.ffn", "model.router", "precision", "seed")


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What every run is judged against."""

    variant: str = "???"  # a label
    precision: str = "bf16"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `zoo compare` reads."""

    name: str = "comparison"
    recipe: Any = field(default_factory=dict)
    variants: list[Any] = field(default_factory=list)
    precisions: list[Any] = field(default_factory=lambda: ["bf16"])
    seeds: list[int] = field(default_factory=lambda: [0])
    extra_seeds: list[int] = field(default_factory=list)
    baseline: Baseline = field(default_factory=Baseline)
    # of the whole model, per token; active_flops: matmul FLOPs of the forward pass
    hold: Literal["active_flops", "params", "active_params", "weight_bytes"] = "active_flops"
    tolerance: float = 0.02  # largest relative distance from the budget
    multiple_of: int = 32  # of solved widths; 32 suits the blocks of every format
    allow: list[str] = field(default_factory=list)  # recipe keys that variants may differ in
    out: str | None = None  # None: runs/<name>


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a comparison."""

    id: str
    variant: str
    recipe: Recipe


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


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the things compared."""

    label: str
    ffn: Any  # as model.ffn
    recipe: dict[str, Any]  # what else it changes in the recipe


def read_comparison(source: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """A comparison from a file or the name of a shipped one, planned.

    Args:
        source: as in `recipes.load.find`.
        overrides: `key=value`; keys of a comparison, or of the recipe that its runs share.

    Raises:
        ValueError: in one line; see `plan`.
    """
    plain = load.read_yaml(load.find(source, "recipes.comparisons"))
    plain.setdefault("name", Path(source).stem)
    own, shared = _split(load.parse(overrides))
    comparison = load.merge(Comparison, plain, own, what="comparison")
    return plan(comparison, shared)


def _split(said: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides of the comparison, and of the recipe."""
    ours, recipes = ([f.name for f in fields(kind)] for kind in (Comparison, Recipe))
    for key in said:
        if key not in ours and key not in recipes:
            raise unknown("key of a comparison or its recipe", key, [*ours, *recipes])
    own = {key: value for key, value in said.items() if key in ours}
    return own, {key: value for key, value in said.items() if key in recipes}


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
    if "/" in c.name or c.name in ("", ".", ".."):
        raise ValueError(f"comparison: name must be usable as a folder's, got {c.name!r}")
    shared = _shared_recipe(c.recipe, overrides or {})
    variants = _variants(c.variants)
    base = _baseline(c, variants)
    target, solved, matched = _match(c, shared, variants, base)
    runs = [
        _run(shared, variant, precision, seed)
        for seed in c.seeds
        for variant in solved
        for precision in c.precisions
    ]
    extra = [
        _run(shared, solved[variants.index(base)], c.baseline.precision, s) for s in c.extra_seeds
    ]
    runs = _distinct([*runs, *extra])
    _check_differences(c, runs)
    resolved = {**load.to_plain(c), "recipe": _written_out(shared)}
    del resolved["out"]
    return Plan(comparison=c, resolved=resolved, target=target, matched=matched, runs=runs)


def _shared_recipe(source: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's keys as far as they are said, without its FFN."""
    plain = load.read_yaml(load.find(source, "recipes")) if isinstance(source, str) else source
    if not isinstance(plain, Mapping):
        raise ValueError(f"comparison: recipe must be a name, a file or a mapping, got {plain!r}")
    load.check_keys(Recipe, plain, what="recipe")
    load.check_keys(Recipe, overrides, what="recipe")
    merged = load.merged(plain, overrides)
    merged["model"] = {k: v for k, v in merged.get("model", {}).items() if k != "ffn"}
    return merged


def _variants(given: Sequence[Any]) -> list[Variant]:
    if not given:
        raise ValueError("comparison: variants is empty, name at least one")
    variants = [_variant(item, f"variants[{i}]") for i, item in enumerate(given)]
    labels = [variant.label for variant in variants]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"comparison: two variants are labelled {twice[0]!r}: give them a `label`")
    return variants


def _variant(item: Any, where: str) -> Variant:
    if isinstance(item, str):
        item = {"name": item}
    if not isinstance(item, Mapping) or ("name" in item) == ("ffn" in item):
        raise ValueError(f"comparison: {where} needs either `name` or `ffn`, got {item!r}")
    ours = ("label", "recipe", "ffn")
    options = {key: value for key, value in item.items() if key not in ours}
    if "ffn" in item and options:
        raise ValueError(
            f"comparison: {where} gives `ffn`, so {next(iter(options))!r} has no place"
        )
    ffn = item.get("ffn", options)
    label = str(item.get("label", ffn_label(ffn)))
    if "/" in label:
        raise ValueError(f"comparison: {where}: label must be usable in a folder's name: {label!r}")
    return Variant(label=label, ffn=ffn, recipe=dict(item.get("recipe", {})))


def _baseline(c: Comparison, variants: Sequence[Variant]) -> Variant:
    precisions = {precision_label(p) for p in c.precisions}
    if c.baseline.precision not in precisions:
        raise unknown("precision of the baseline", c.baseline.precision, precisions)
    by_label = {variant.label: variant for variant in variants}
    if c.baseline.variant not in by_label:
        raise unknown("variant of the baseline", c.baseline.variant, by_label)
    return by_label[c.baseline.variant]


def _recipe(shared: Mapping[str, Any], variant: Variant, precision: Any, seed: int) -> Recipe:
    plain = load.merged(shared, variant.recipe)
    plain["model"] = {**plain["model"], "ffn": variant.ffn}
    try:
        return load.load({**plain, "precision": precision, "seed": seed})
    except ValueError as error:
        raise ValueError(f"{variant.label}: {error}") from None


def _match(
    c: Comparison, shared: Mapping[str, Any], variants: Sequence[Variant], base: Variant
) -> tuple[float, list[Variant], tuple[Match, ...]]:
    """The budget, the variants with their widths solved, and how nearly each comes."""
    read = measure_of("flops" if c.hold == "active_flops" else c.hold)

    def measure(variant: Variant) -> float:
        return read(_cost(shared, variant, c.baseline.precision))

    target = measure(base)
    solved: list[Variant] = []
    matches: list[Match] = []
    for variant in variants:
        entry, width = _width(shared, variant)
        if variant is not base and entry is not None and width is None:
            variant, width = _solve(c, variant, entry, measure, target)
        value = measure(variant)
        residual = (value - target) / target
        if abs(residual) > c.tolerance:
            raise ValueError(
                f"{variant.label}: {c.hold} is {value:.6g}, {residual:+.1%} from the baseline's "
                f"{target:.6g}: leave {entry or 'its width'} out to have it solved, or allow a "
                f"larger tolerance than {c.tolerance}"
            )
        solved.append(variant)
        matches.append(
            Match(
                variant=variant.label,
                width_field=entry,
                width=width,
                value=value,
                residual=residual,
            )
        )
    return target, solved, tuple(matches)


def _cost(shared: Mapping[str, Any], variant: Variant, precision: Any) -> Cost:
    return whole_model_cost(_recipe(shared, variant, precision, 0))


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


def _run(shared: Mapping[str, Any], variant: Variant, precision: Any, seed: int) -> PlannedRun:
    recipe = _recipe(shared, variant, precision, seed)
    run_id = f"{variant.label}-{precision_label(precision)}-s{seed}"
    return PlannedRun(id=run_id, variant=variant.label, recipe=recipe)


def _distinct(runs: Sequence[PlannedRun]) -> tuple[PlannedRun, ...]:
    """Each run once; a seed may stand in `seeds` and in `extra_seeds`."""
    by_id: dict[str, PlannedRun] = {}
    for run in runs:
        if by_id.setdefault(run.id, run).recipe != run.recipe:
            raise ValueError(f"comparison: two different runs are called {run.id}: name them apart")
    return tuple(by_id.values())


def _check_differences(c: Comparison, runs: Sequence[PlannedRun]) -> None:
    """Raise where recipes differ outside the allow-list."""
    allowed = (*MAY_DIFFER, *c.allow)
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
