"""Tables of what layers of a kind recorded: one row a group of runs, and one a layer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Generic, TypeVar

from recipes.report.headline import name
from recipes.report.study import Group, Study
from recipes.report.tables import num_cell, sort_head, sortable
from recipes.report.text import Markup, el

L = TypeVar("L")  # what a run records of one layer; it has a `layer`


@dataclass(frozen=True)
class Column(Generic[L]):
    """A figure of a layer."""

    head: str
    title: str
    of: Callable[[L], float | None]
    shown: Callable[[float], str] = "{:.3f}".format


def mean_table(
    study: Study,
    groups: Iterable[Group],
    layers: Callable[[Group], Sequence[L]],
    columns: Sequence[Column[L]],
    first: Mapping[str, Callable[[Group], Markup]] | None = None,
) -> Markup:
    """One row per group: means over the layers. first: cells of the group itself, by their head."""
    own = first or {}
    heads = [sort_head("Variant", False), *map(sort_head, own), sort_head("Layers")]
    heads += [sort_head(c.head, title=c.title) for c in columns]
    rows = [
        el(
            "tr",
            el("td", name(study, g), data_value=g.label),
            *(cell(g) for cell in own.values()),
            num_cell(len(layers(g)), str(len(layers(g)))),
            *(_mean_cell(c, layers(g)) for c in columns),
        )
        for g in groups
    ]
    return sortable(heads, rows)


def _mean_cell(column: Column[L], layers: Sequence[L]) -> Markup:
    known = [x for layer in layers if (x := column.of(layer)) is not None]
    if not known:
        return num_cell(None, "")
    span = f"{column.shown(min(known))} to {column.shown(max(known))} over the layers"
    return num_cell(fmean(known), column.shown(fmean(known)), span)


def layer_table(
    study: Study,
    groups: Sequence[Group],
    layers: Callable[[Group], Sequence[L]],
    columns: Sequence[Column[L]],
    domains: Callable[[L], Mapping[str, float]],
    said_of_domains: str,
    shown: Callable[[float], str],
    first: Mapping[str, Callable[[L], str]] | None = None,
) -> Markup:
    """One row per layer, folded, with a figure for each domain.

    Args:
        layers: what a group's first run recorded.
        columns: figures of a layer.
        domains: its figure by domain; what it is in words, and how it is written.
        first: further words of the layer, by their head.
    """
    own = first or {}
    every = dict.fromkeys(d for g in groups for x in layers(g) for d in domains(x))
    heads = [sort_head("Variant", False), sort_head("Layer")]
    heads += [sort_head(head, False) for head in own]
    heads += [sort_head(c.head, title=c.title) for c in columns]
    heads += [sort_head(f"in {d}", title=f"{said_of_domains} for {d}") for d in every]
    rows = []
    for g in groups:
        for x in layers(g):
            layer, of_domain = getattr(x, "layer"), domains(x)  # noqa: B009 - any record has it
            figures = [(c.of(x), c.shown) for c in columns]
            figures += [(of_domain.get(d), shown) for d in every]
            rows.append(
                el(
                    "tr",
                    el("td", name(study, g), data_value=f"{g.label} {layer}"),
                    num_cell(layer, str(layer)),
                    *(el("td", word(x)) for word in own.values()),
                    *(num_cell(v, as_text(v or 0.0)) for v, as_text in figures),
                )
            )
    told = el("summary", "The same, layer by layer and by domain")
    return el("details", told, sortable(heads, rows))
