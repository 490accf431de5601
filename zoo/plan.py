"""Which FFN stands in which layer: the grammar of a recipe's `ffn`.

    ffn: swiglu                                       # every layer
    ffn: {name: moe, n_experts: 8, router: {name: top_k}}
    ffn: [swiglu, moe, moe, {name: moe, top_k: 1}]    # one choice per layer
    ffn:                                              # rules, the first that matches wins
      - {name: swiglu, layers: first}
      - {name: moe_plus_plus, layers: "1::2"}
      - {name: moe}                                   # without `layers`: the rest

A list whose items name no `layers` is one choice per layer; one `layers` makes it a list of rules.

Memory layers that say the same name of a pool share it, each with its own queries and keys:

    ffn:
      - {name: memory_plus, pool: shared, layers: [4, 12, 20]}    # one table for three layers
      - swiglu
    ffn: {name: ultramem_v2, pool: shared, share: 0.5}            # windows round a ring of tables;
                                                                  # windows: clamped | block
    ffn:                                                          # or blocks of layers
      - {name: ultramem_v2, pool: early, layers: ":12"}
      - {name: ultramem_v2, pool: late}

UltraMem's layers read one block and, with `skip`, add to the stream after a later one; as its paper
has them in 20 layers (2:5/6:9/10:13/14:17):

    ffn:
      - {name: ultramem, skip: 3, layers: [2, 6, 10, 14]}
      - swiglu
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from layers.names import check_positive
from layers.selection import select_layers

MISSING = "???"  # OmegaConf's mark of a value that a recipe must give


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """What a recipe says of one layer's FFN."""

    ffn: str  # a row of the catalogue, or an alias
    options: Mapping[str, Any] = field(default_factory=dict)
    router: str | Mapping[str, Any] | None = None  # None: the model's, else the row's default


def layer_choices(ffn: Any, n_layers: int) -> tuple[LayerChoice, ...]:
    """Read a recipe's `ffn`. Names and options are the registry's to check.

    Args:
        ffn: one choice, a list with one per layer, or a list of rules (see above).
        n_layers: layers of the model.

    Raises:
        ValueError: for anything else, a layer that no rule matches, a rule that gets no layer.
    """
    check_positive(n_layers=n_layers)
    if ffn is None or ffn == MISSING:
        raise ValueError(
            "the model needs ffn: a name such as 'swiglu', {name: ..., options}, or a list"
        )
    if isinstance(ffn, str) or (isinstance(ffn, Mapping) and "layers" not in ffn):
        return (_choice(ffn, "ffn"),) * n_layers
    items = [ffn] if isinstance(ffn, Mapping) else ffn
    if not isinstance(items, Sequence):
        raise ValueError(
            f"ffn must be a name, a mapping with 'name', or a list of these, got {ffn!r}"
        )
    choices = [_choice(item, f"ffn[{i}]") for i, item in enumerate(items)]
    if any(isinstance(item, Mapping) and "layers" in item for item in items):
        return _by_rules(items, choices, n_layers)
    if len(choices) != n_layers:
        raise ValueError(
            f"ffn lists {len(choices)} choices for n_layers={n_layers}: give one per layer, "
            "or say which with 'layers'"
        )
    return tuple(choices)


def _choice(item: Any, where: str) -> LayerChoice:
    if isinstance(item, str):
        item = {"name": item}
    if not isinstance(item, Mapping):
        raise ValueError(f"{where} must be a name or a mapping with 'name', got {item!r}")
    options = {key: value for key, value in item.items() if key not in ("name", "layers", "router")}
    name, router = item.get("name"), item.get("router")
    if not isinstance(name, str) or name == MISSING:
        raise ValueError(f"{where} needs 'name', a row of the catalogue, got {dict(item)}")
    for key in options:
        if not isinstance(key, str):
            raise ValueError(f"{where}: options have names, got {key!r}")
    check_router(router, f"{where}.router")
    return LayerChoice(ffn=name, options=options, router=router)


def check_router(router: Any, where: str) -> None:
    """Raise unless `router` is None, a name, or a mapping with `name`."""
    named = router.get("name") if isinstance(router, Mapping) else router
    if router is not None and not isinstance(named, str):
        raise ValueError(f"{where} must be a name or a mapping with 'name', got {router!r}")


def _by_rules(
    items: Sequence[Any], choices: Sequence[LayerChoice], n_layers: int
) -> tuple[LayerChoice, ...]:
    plan: list[LayerChoice | None] = [None] * n_layers
    for i, (item, choice) in enumerate(zip(items, choices, strict=True)):
        selector = item.get("layers", ":") if isinstance(item, Mapping) else ":"
        free = [n for n in select_layers(selector, n_layers) if plan[n] is None]
        if not free:
            raise ValueError(
                f"ffn[{i}] ({choice.ffn}, layers={selector!r}) gets none of the {n_layers} layers: "
                "an earlier rule has them, or there are none"
            )
        for n in free:
            plan[n] = choice
    if None in plan:
        missed = [n for n, choice in enumerate(plan) if choice is None]
        raise ValueError(f"no ffn rule matches layers {missed}: add a last one without 'layers'")
    return tuple(choice for choice in plan if choice is not None)
