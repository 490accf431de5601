"""What a comparison asks for.

name: quick
recipe: debug                      # a recipe's name or file, or its keys; `model.ffn` is not read
variants:
  - {name: swiglu, d_ff: 704}      # a row of the catalogue with its options
  - {name: moe, n_experts: 8}      # its width is solved so that the budget is equal
  - {label: mixed, ffn: [...]}     # any layer plan; taken as it is, refused if off budget
precisions: [bf16, nvfp4]
seeds: [0]
lrs: [2.0e-3, 4.0e-3]              # peak learning rates, each a run; none: the recipe's own
extra_seeds: [1, 2, 3]             # of the baseline alone: the noise
baseline: {variant: swiglu, precision: bf16}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from layers.names import unknown
from recipes import load
from recipes.names import ffn_label, precision_label
from recipes.schema import Recipe


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What every run is judged against."""

    variant: str = "???"  # a label
    precision: str = "bf16"
    lr: float | None = None  # one of `lrs`; None: where several are tried, its best


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `zoo compare` reads."""

    name: str = "comparison"
    recipe: Any = field(default_factory=dict)
    variants: list[Any] = field(default_factory=list)
    precisions: list[Any] = field(default_factory=lambda: ["bf16"])
    seeds: list[int] = field(default_factory=lambda: [0])
    lrs: list[float] = field(default_factory=list)
    extra_seeds: list[int] = field(default_factory=list)
    baseline: Baseline = field(default_factory=Baseline)
    # of the whole model, per token; active_flops: matmul FLOPs of the forward pass
    hold: Literal["active_flops", "params", "active_params", "weight_bytes"] = "active_flops"
    tolerance: float = 0.02  # largest relative distance from the budget
    multiple_of: int = 16  # of solved widths; NVFP4's block
    allow: list[str] = field(default_factory=list)  # recipe keys that variants may differ in
    out: str | None = None  # None: runs/<name>


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the things compared."""

    label: str
    ffn: Any  # as model.ffn
    recipe: dict[str, Any]  # what else it changes in the recipe


def read_comparison(
    source: str | Path, overrides: Sequence[str] = ()
) -> tuple[Comparison, dict[str, Any]]:
    """A comparison from a file or the name of a shipped one, and what overrides its recipe.

    Args:
        source: as in `recipes.load.find`.
        overrides: `key=value`; keys of a comparison, or of the recipe that its runs share.

    Raises:
        ValueError: for an unknown key, a wrong type, or a key that each run sets itself.
    """
    plain = load.read_yaml(load.find(source, "recipes.comparisons"))
    plain.setdefault("name", Path(source).stem)
    own, shared = split_overrides(load.parse(overrides))
    return load.merge(Comparison, plain, own, what="comparison"), shared


def split_overrides(
    said: Mapping[str, Any], kind: type = Comparison, what: str = "comparison"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Overrides of the comparison (or whatever has runs, as `kind` says), and of the recipe."""
    ours, recipes = ([f.name for f in fields(each)] for each in (kind, Recipe))
    for key in said:
        if key not in ours and key not in recipes:
            raise unknown(f"key of a {what} or its recipe", key, [*ours, *recipes])
    taken = {"seed": "seeds=[0,1]", "precision": "precisions=[bf16]"}
    for key, instead in taken.items():
        if key in said:
            raise ValueError(f"a {what} sets {key} of each run: say {instead} instead")
    if "ffn" in said.get("model", {}):
        raise ValueError(f"a {what} sets model.ffn of each run: say variants=[...] instead")
    own = {key: value for key, value in said.items() if key in ours}
    return own, {key: value for key, value in said.items() if key in recipes}


def shared_recipe(source: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's keys as far as they are said, without its FFN."""
    plain = load.read_yaml(load.find(source, "recipes")) if isinstance(source, str) else source
    if not isinstance(plain, Mapping):
        raise ValueError(f"comparison: recipe must be a name, a file or a mapping, got {plain!r}")
    load.check_keys(Recipe, plain, what="recipe")
    load.check_keys(Recipe, overrides, what="recipe")
    merged = load.merged(plain, overrides)
    merged["model"] = {k: v for k, v in merged.get("model", {}).items() if k != "ffn"}
    return merged


def variants_of(given: Sequence[Any]) -> list[Variant]:
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


def baseline_of(c: Comparison, variants: Sequence[Variant]) -> Variant:
    if c.baseline.lr not in (None, *c.lrs):
        allowed = f"one of lrs={c.lrs}" if c.lrs else "left out, or lrs given"
        raise ValueError(f"comparison: baseline.lr must be {allowed}, got {c.baseline.lr}")
    if c.lrs and c.extra_seeds and c.baseline.lr is None:
        raise ValueError(f"comparison: extra_seeds need baseline.lr, one of lrs={c.lrs}")
    precisions = {precision_label(p) for p in c.precisions}
    if c.baseline.precision not in precisions:
        raise unknown("precision of the baseline", c.baseline.precision, precisions)
    by_label = {variant.label: variant for variant in variants}
    if c.baseline.variant not in by_label:
        raise unknown("variant of the baseline", c.baseline.variant, by_label)
    return by_label[c.baseline.variant]


def baseline_precision(c: Comparison) -> Any:
    """As `precisions` gives it: a preset's name, or a policy whose label the baseline says."""
    return next(p for p in c.precisions if precision_label(p) == c.baseline.precision)
