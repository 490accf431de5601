"""A study's cells: a size and a budget held equal, with every variant's width solved there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from layers.names import unknown
from recipes import load
from recipes.comparison import (
    Comparison,
    Variant,
    baseline_of,
    baseline_precision,
    shared_recipe,
)
from recipes.planning import Budget, recipe_of
from recipes.report.records import Match
from recipes.study.begin import Begin, in_order, read_variants, settled
from recipes.study.schema import Size, Study, sizes_of
from zoo.budget import solve_width
from zoo.options import field_names
from zoo.registry import Choice, find, resolve

NEARLY = 0.05  # a variant with so little more than the baseline's parameters is as large as it


class Control(NamedTuple):
    """What a control is there for."""

    kind: str  # one of `recipes.study.schema.CONTROLS`
    of: str  # label of the variant that it controls


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One size at one matching."""

    size: Size
    hold: str
    shared: dict[str, Any]  # the recipe's keys at that size
    target: float  # of the budget
    variants: tuple[Variant, ...]  # widths solved; controls last
    matched: tuple[Match, ...]  # of the variants that are no controls
    unreachable: dict[str, str]  # label to why it cannot meet the budget; not in `variants`
    begins: dict[str, Begin]  # label to how its runs begin; the others' weights are drawn

    def variant(self, label: str) -> Variant | None:
        """That variant as it is here."""
        return next((v for v in self.variants if v.label == label), None)


def cells_of(
    study: Study, overrides: Mapping[str, Any]
) -> tuple[tuple[Cell, ...], dict[str, Control]]:
    """Every cell, the primary matching of each size first, and what its controls are.

    A variant that cannot meet the primary budget is an error; one that cannot meet a further one
    (a table larger than all of a dense model, at equal parameters) is left out there, with why.

    Raises:
        ValueError: for a wrong name, option or value, or a primary budget that cannot be met.
    """
    shared = shared_recipe(study.recipe, overrides)
    variants, begins = read_variants(study.variants)
    cells: list[Cell] = []
    controls: dict[str, Control] = {}
    for size in sizes_of(study):
        at = load.merged(shared, size.recipe)
        at["model"] = {k: v for k, v in at["model"].items() if k != "ffn"}
        for hold in study.hold:
            primary = hold == study.hold[0]
            cell = _cell(study, size, hold, at, variants, begins, strict=primary)
            if primary:
                cell, found = _with_controls(study, cell)
                controls |= found
            cells.append(cell)
    return tuple(cells), controls


def _cell(
    study: Study, size: Size, hold: str, shared: dict[str, Any], variants: Sequence[Variant],
    begins: dict[str, Begin], *, strict: bool,
) -> Cell:  # fmt: skip
    c = as_comparison(study, hold)
    given = {variant.label: variant for variant in variants}
    base, first = _baseline(baseline_of(c, variants), given, begins, shared)
    given[base.label] = base
    budget = Budget(c, shared, base)
    solved: dict[str, tuple[Variant, Match]] = {}
    unreachable: dict[str, str] = {}
    for label in in_order(given, begins):
        variant = given[label]
        if label in begins and variant is not base:
            source = begins[label].source
            if source in unreachable:
                unreachable[label] = f"it begins from {source}, which is left out"
                continue
            variant = settled(variant, begins[label], solved[source][0], shared)
        try:
            met, match = budget.met(variant)
        except ValueError as error:
            if strict:
                raise ValueError(f"size {size.label}: {error}") from None
            unreachable[label] = str(error)
            continue
        if label == first and met.ffn != variant.ffn:
            raise ValueError(
                f"study: the baseline begins from {label}, which must say its {match.width_field}"
            )
        solved[label] = (met, match)
    kept = [solved[label] for label in given if label in solved]
    return Cell(
        size=size, hold=hold, shared=shared, target=budget.target,
        variants=tuple(variant for variant, _ in kept), matched=tuple(match for _, match in kept),
        unreachable=unreachable, begins=begins,
    )  # fmt: skip


def _baseline(
    base: Variant, given: Mapping[str, Variant], begins: Mapping[str, Begin],
    shared: Mapping[str, Any],
) -> tuple[Variant, str]:  # fmt: skip
    """The baseline with its layer, and the label of the drawn variant that it goes back to.

    Its budget is read off before any width is solved, so that variant must say its own.
    """
    begin = begins.get(base.label)
    if begin is None:
        return base, base.label
    source, first = _baseline(given[begin.source], given, begins, shared)
    return settled(base, begin, source, shared), first


def as_comparison(study: Study, hold: str) -> Comparison:
    """The part of a study that a comparison knows, at one matching."""
    return Comparison(
        name=study.name,
        variants=study.variants,
        precisions=study.precisions,
        baseline=study.baseline,
        hold=hold,  # pyright: ignore[reportArgumentType] - checked by `schema.check`
        tolerance=study.tolerance,
        multiple_of=study.multiple_of,
        allow=study.allow,
    )


def _with_controls(study: Study, cell: Cell) -> tuple[Cell, dict[str, Control]]:
    """The cell with its controls behind its variants; one that begins from another has none."""
    base = next(v for v in cell.variants if v.label == study.baseline.variant)
    made: list[Variant] = []
    found: dict[str, Control] = {}
    taken = {variant.label for variant in cell.variants}
    for variant in cell.variants:
        for kind in study.controls if variant.label not in cell.begins else ():
            control = _MAKERS[kind](study, cell, variant, base)
            if control is None or any(
                control.ffn == other.ffn for other in (*cell.variants, *made)
            ):
                continue
            if control.label in taken:
                raise ValueError(f"study: a variant is labelled {control.label!r}, as a control is")
            made.append(control)
            found[control.label] = Control(kind, variant.label)
    return (
        Cell(**{**vars(cell), "variants": (*cell.variants, *made)}),
        found,
    )


def _dense_total(study: Study, cell: Cell, variant: Variant, base: Variant) -> Variant | None:
    """The baseline, as wide as makes it as large in all as a sparse variant."""
    if not isinstance(base.ffn, Mapping) or "name" not in base.ffn:
        return None
    field_name = find(base.ffn["name"]).width
    params = Budget(as_comparison(study, "params"), cell.shared, base)
    wanted = params.measure(variant)
    if field_name is None or wanted < params.target * (1 + NEARLY):
        return None
    ffn = {key: value for key, value in base.ffn.items() if key != field_name}
    label = f"{base.label}:as-large-as-{variant.label}"

    def at(width: int) -> Variant:
        return Variant(label=label, ffn={**ffn, field_name: width}, recipe=base.recipe)

    width = solve_width(
        lambda width: params.measure(at(width)),
        wanted,
        multiple_of=study.multiple_of,
        tolerance=1.0,  # a wide step of a narrow model; the report states what it came to
    ).width
    return at(width)


def _random_router(study: Study, cell: Cell, variant: Variant, base: Variant) -> Variant | None:
    """The variant, its router's decision replaced by chance."""
    choice = _choice(cell, variant)
    if choice is None or choice.router_entry is None or choice.router_entry.name == "random":
        return None
    of_the_layer = {"name", "preset", *field_names(choice.entry.config)}  # not of its router
    ffn = {k: v for k, v in variant.ffn.items() if k in of_the_layer}
    ffn["router"] = {"name": "random"}
    control = Variant(label=f"{variant.label}:random-router", ffn=ffn, recipe=variant.recipe)
    return _possible(study, cell, control)


def _off(study: Study, cell: Cell, variant: Variant, base: Variant) -> Variant | None:
    """What is left of the variant where its catalogue row says how its idea is switched off."""
    choice = _choice(cell, variant)
    if choice is None or choice.entry.off is None:
        return None
    left = dict(choice.entry.off(choice.config))
    ffn = left if "name" in left else {**variant.ffn, **left}
    control = Variant(label=f"{variant.label}:off", ffn=ffn, recipe=variant.recipe)
    return _possible(study, cell, control)


_MAKERS = {"dense_total": _dense_total, "random_router": _random_router, "off": _off}


def _choice(cell: Cell, variant: Variant) -> Choice | None:
    """The settled choice of a variant that is one row in every layer."""
    if not isinstance(variant.ffn, Mapping) or "layers" in variant.ffn or "pool" in variant.ffn:
        return None
    options = {k: v for k, v in variant.ffn.items() if k not in ("name", "router", "preset")}
    recipe = recipe_of(cell.shared, variant, "fp32", 0)
    return resolve(
        variant.ffn["name"], d_model=recipe.model.d_model, router=variant.ffn.get("router"),
        preset=variant.ffn.get("preset"), **options,
    )  # fmt: skip


def _possible(study: Study, cell: Cell, control: Variant) -> Variant | None:
    """The control, or None where its parts do not go together: then there is none of that kind."""
    try:
        recipe_of(cell.shared, control, baseline_precision(as_comparison(study, cell.hold)), 0)
    except ValueError:
        return None
    return control


def size_named(cells: Sequence[Cell], label: str) -> Cell:
    """The primary cell of a size."""
    for cell in cells:
        if cell.size.label == label:
            return cell
    raise unknown("size", label, [cell.size.label for cell in cells])
