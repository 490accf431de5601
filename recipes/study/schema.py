"""What a study asks for: a comparison over sizes and matchings, its learning rates tuned apart.

name: small
recipe: debug                        # as a comparison's
variants: [swiglu, {name: moe, n_experts: 8}]  # or from another's weights: recipes.study.begin
precisions: [bf16]
baseline: {variant: swiglu}
hold: [active_flops, params]         # each a matching of its own; the first is the primary one
sizes:                               # a ladder: keys of the recipe, under a label
  - {label: s, model: {d_model: 64}, trainer: {max_steps: 200}}
  - {label: m, model: {d_model: 96}, trainer: {max_steps: 400}}
lrs: [1.0e-3, 2.0e-3, 4.0e-3]        # tried for every variant alike
tuning: {seeds: [100], sizes: [s]}   # on seeds that are not reported
seeds: [0, 1, 2]
resolution: 0.005                    # of the loss: seeds are added until it can be told
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from layers.names import check_choice, check_positive, unknown
from recipes import load
from recipes.comparison import Baseline, split_overrides
from recipes.report.records import Budget
from recipes.schema import Recipe

CONTROLS = ("dense_total", "random_router", "off")
ONE_SIZE = "base"  # its label where a study names no sizes


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How each variant's learning rate is found, with as many trials for one as for another."""

    seeds: list[int] = field(default_factory=lambda: [100])  # none of them reported
    sizes: list[str] = field(default_factory=list)  # labels; empty: all. Others take the nearest's
    precisions: list[str] = field(default_factory=list)  # labels; empty: the baseline's alone


@dataclass(frozen=True, kw_only=True)
class Study:
    """What `zoo study` reads."""

    name: str = "study"
    recipe: Any = field(default_factory=dict)
    variants: list[Any] = field(default_factory=list)
    precisions: list[Any] = field(default_factory=lambda: ["bf16"])
    baseline: Baseline = field(default_factory=Baseline)
    hold: list[str] = field(default_factory=lambda: ["active_flops"])  # budgets held equal
    sizes: list[Any] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)  # none: the recipe's own, untuned
    tuning: Tuning = field(default_factory=Tuning)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    resolution: float | None = None  # smallest difference to tell, relative to the loss
    most_seeds: int = 12  # that `resolution` may ask for
    # dense_total: a dense model with as many parameters as each sparse one; random_router: the
    # variant with choices at random; off: the variant with its special part switched off
    controls: list[str] = field(default_factory=lambda: list(CONTROLS))
    tolerance: float = 0.02  # largest relative distance from a budget
    multiple_of: int = 16  # of solved widths
    allow: list[str] = field(default_factory=list)  # recipe keys that variants may differ in
    out: str | None = None  # None: runs/<name>


@dataclass(frozen=True, kw_only=True)
class Size:
    """One rung of the ladder."""

    label: str
    recipe: dict[str, Any]  # keys that it changes


def read_study(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> tuple[Study, dict[str, Any]]:
    """A study from a file, the name of a shipped one or a mapping, and what overrides its recipe.

    Args:
        source: as in `recipes.load.find`, or what such a file holds.
        overrides: `key=value`; keys of a study, or of the recipe that its runs share.

    Raises:
        ValueError: for an unknown key, a wrong type, or a key that each run sets itself.
    """
    if isinstance(source, Mapping):
        plain = dict(source)
    else:
        plain = load.read_yaml(load.find(source, "recipes.studies"))
        plain.setdefault("name", Path(source).stem)
    own, shared = split_overrides(load.parse(overrides), Study, "study")
    study = load.merge(Study, plain, own, what="study")
    check(study)
    return study, shared


def check(study: Study) -> None:
    """Raise ValueError for what no study could mean."""
    s = study
    if "/" in s.name or s.name in ("", ".", ".."):
        raise ValueError(f"study: name must be usable as a folder's, got {s.name!r}")
    check_positive(tolerance=s.tolerance, multiple_of=s.multiple_of, most_seeds=s.most_seeds)
    check_positive(**{f"lrs[{i}]": lr for i, lr in enumerate(s.lrs)})
    for kind in s.controls:
        check_choice("control of a study", kind, CONTROLS)
    if not s.hold:
        raise ValueError("study: hold is empty, name at least one budget")
    for budget in s.hold:
        check_choice("budget in hold", budget, get_args(Budget))
    for name, listed in {"seeds": s.seeds, "lrs": s.lrs, "hold": s.hold}.items():
        if len(set(listed)) < len(listed):
            raise ValueError(f"study: {name} names one twice: {listed}")
    if len(s.seeds) < 2:
        raise ValueError(f"study: a difference needs two seeds or more, got seeds={s.seeds}")
    both = sorted(set(s.seeds) & set(s.tuning.seeds))
    if s.lrs and both:
        raise ValueError(
            f"study: seed {both[0]} is tuned on and reported: keep tuning.seeds apart from seeds"
        )
    if s.resolution is not None and not 0 < s.resolution < 1:
        raise ValueError(f"study: resolution must be in (0, 1), got {s.resolution}")
    if s.baseline.lr is not None:
        raise ValueError(
            "study: the baseline's learning rate is tuned like any other: leave it out"
        )


def sizes_of(study: Study) -> tuple[Size, ...]:
    """The ladder, checked.

    Raises:
        ValueError: for a size without a label, a label twice, a key that no recipe has.
    """
    if not study.sizes:
        return (Size(label=ONE_SIZE, recipe={}),)
    found: list[Size] = []
    for i, item in enumerate(study.sizes):
        if not isinstance(item, Mapping) or not isinstance(item.get("label"), str):
            raise ValueError(
                f"study: sizes[{i}] needs a `label` and keys of a recipe, got {item!r}"
            )
        keys = {k: v for k, v in item.items() if k != "label"}
        load.check_keys(Recipe, keys, what=f"study: sizes[{i}]")
        for key in ("seed", "precision"):
            if key in keys:
                raise ValueError(f"study: sizes[{i}]: a study sets {key} of each run: leave it out")
        found.append(Size(label=item["label"], recipe=keys))
    labels = [size.label for size in found]
    for label in labels:
        if labels.count(label) > 1 or not label or "/" in label:
            raise ValueError(
                f"study: sizes need labels of their own, usable in a folder: {label!r}"
            )
    for label in study.tuning.sizes:
        if label not in labels:
            raise unknown("size in tuning.sizes", label, labels)
    return tuple(found)
