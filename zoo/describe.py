"""A card per variant, made from its row and its config: what `zoo describe` prints."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from layers.base import Cost
from layers.names import unknown
from zoo.entry import Entry
from zoo.registry import entries, read_router, resolve

REFERENCE: dict[str, Any] = {"d_model": 512}  # where a card states its cost


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option that a variant takes."""

    name: str
    type: str
    default: str  # "required" where it has none
    comment: str
    owner: str  # the variant, or the router, whose config holds it


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that the catalogue knows of one row."""

    name: str
    kind: str
    summary: str
    equation: str  # the module's docstring
    paper: str
    aliases: tuple[str, ...]
    presets: dict[str, dict[str, Any]]
    router: str | None
    width: str | None
    options: tuple[Option, ...]
    reference: dict[str, Any]  # the options at which `cost` is stated
    cost: Cost | None  # None for a router

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.summary}", f"  {self.equation}", f"  paper: {self.paper}"]
        if self.aliases:
            lines.append(f"  also called: {', '.join(self.aliases)}")
        if self.router:
            lines.append(f"  router: {self.router}")
        for name, options in self.presets.items():
            lines.append(f"  preset {name}: {', '.join(f'{k}={v}' for k, v in options.items())}")
        for o in self.options:
            option = f"{o.owner}.{o.name}: {o.type} = {o.default}"
            lines.append(f"  {option:<58}{o.comment}".rstrip())
        if self.cost:
            lines.append(
                f"  at {self.reference}: {self.cost.params:,} parameters, "
                f"{self.cost.active_params:,.0f} active, {self.cost.flops:,.0f} FLOPs a token, "
                f"roles {', '.join(self.cost.by_role())}"
            )
        return "\n".join(lines)


def describe(name: str, kind: str | None = None) -> Card:
    """The card of an FFN variant or a router, by name or alias.

    Args:
        name: as in the catalogue.
        kind: "ffn" or "router"; None: either, the variant where both have that name.

    Raises:
        ValueError: when no such table holds the name; names the nearest.
    """
    known = {**entries("router"), **entries("ffn")} if kind is None else entries(kind)
    if name not in known:
        raise unknown("FFN variant or router", name, known)
    entry = known[name]
    options, router = _options(entry, entry.defaults), None
    if entry.router:
        seen = {option.name for option in options}
        router, given = read_router(entry.router)
        router_options = _options(router, given)
        options += tuple(option for option in router_options if option.name not in seen)
    return Card(
        name=entry.name,
        kind=entry.kind,
        summary=entry.summary,
        equation=" ".join((entry.module.__doc__ or "").split()),
        paper=entry.paper,
        aliases=entry.aliases,
        presets={preset: dict(values) for preset, values in entry.presets.items()},
        router=router.name if router else None,
        width=entry.width,
        options=options,
        reference=dict(REFERENCE),
        cost=resolve(entry.name, **REFERENCE).cost() if entry.kind == "ffn" else None,
    )


def _options(entry: Entry, given: Mapping[str, Any]) -> tuple[Option, ...]:
    """Of its config; given: defaults that the catalogue sets in place of the config's."""
    comments = _comments(entry.config)
    return tuple(
        Option(
            name=f.name,
            type=getattr(f.type, "__name__", None) if isinstance(f.type, type) else str(f.type),  # pyright: ignore
            default=_default(f.default, f.name, given),
            comment=comments.get(f.name, ""),
            owner=entry.name,
        )
        for f in fields(entry.config)
    )


def _default(own: Any, name: str, given: Mapping[str, Any]) -> str:
    if name in given:
        return repr(given[name])
    return "required" if own is MISSING else repr(own)


def _comments(config: type[Any]) -> dict[str, str]:
    """The comment behind each field, as the source of the class that declares it has it."""
    pattern = re.compile(r"^    (\w+):[^#\n]*#\s*(.+)$", re.MULTILINE)
    found: dict[str, str] = {}
    for kind in reversed(config.__mro__[:-1]):
        found |= dict(pattern.findall(inspect.getsource(kind)))
    return found
