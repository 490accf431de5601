"""How routers chose: figures of each layer, over the steps of training, and who goes with whom."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from recipes.report import text
from recipes.report.figures import Figure, switched
from recipes.report.headline import name
from recipes.report.health_figures import Layer, layers_of, lines, pairs_of, widest
from recipes.report.layer_records import LayerHealth, LayerLoad
from recipes.report.probes import explorer
from recipes.report.records import Run
from recipes.report.study import Group, Study
from recipes.report.tables import num_cell, sort_head, sortable
from recipes.report.text import Markup, el, join, lead


def _number(x: float) -> str:
    return f"{x:.3f}"


@dataclass(frozen=True)
class Column:
    """A figure of a layer."""

    head: str
    title: str
    of: Callable[[LayerLoad, LayerHealth], float | None]
    shown: Callable[[float], str] = _number


def _strongest_pair(_: LayerLoad, health: LayerHealth) -> float | None:
    return max((x for row in health.co_activation for x in row if x is not None), default=None)


COLUMNS = (
    Column("MaxVio", "largest load of an FFN expert over the mean, less 1; 0 when even",
           lambda load, _: load.max_violation),
    Column("Confidence", "mean of the largest probability", lambda _, h: h.confidence),
    Column("Entropy", "of a token's probabilities over ln E; 1 when undecided",
           lambda _, h: h.token_entropy),
    Column("Margin", "mean of the largest probability less the second", lambda _, h: h.margin),
    Column("Information", "entropy of the mean probabilities less the mean entropy, over ln E; "
           "1 when every expert is in use and every choice sure", lambda _, h: h.information),
    Column("Near ties", "tokens whose choice bfloat16 logits would change",
           lambda _, h: h.near_ties, lambda x: text.percent(x, 2)),
    Column("Domains", "what the expert tells of the domain: mutual information over its largest "
           "possible", lambda load, _: load.domain_information),
    Column("Closest pair", "of an expert's tokens, the largest share that another one has too",
           _strongest_pair, text.percent),
    Column("Logits", "root mean square of the router's logits", lambda _, h: h.logit_rms),
    Column("Experts", "choices that hold, mean over tokens",
           lambda _, h: h.experts_per_token, lambda x: f"{x:.2f}"),
)  # fmt: skip


def health(study: Study, legend: Markup) -> Markup | None:
    """Tables, curves and pairs of the runs whose routers were watched; None where none was.

    legend: of variants and precisions, for the curves.
    """
    groups = [g for g in study.groups if g.first.health]
    if not groups:
        return None
    figure, pairs = lines(study, groups), pairs_of(groups)
    note = lead(
        "How routers chose for held-out text, means over the MoE layers; where the tokens went is "
        "under ", el("a", "Expert load", href="#expert-load"), "."
    )  # fmt: skip
    return join(
        note,
        _summary(study, groups),
        _by_layer(study, groups),
        switched(
            figure, legend, "health-lines", "Over training", "Figures of routers over training"
        )
        if figure
        else None,
        _pairs(pairs) if pairs else None,
    )


# Tables


def _summary(study: Study, groups: Sequence[Group]) -> Markup:
    """One row per group: means over the layers."""
    heads = [sort_head("Variant", False)]
    heads += [sort_head(c.head, title=c.title) for c in COLUMNS]
    heads.append(sort_head("Kept", title="share of choices that the last evaluation kept"))
    heads.append(sort_head("Dropped", title="assignments over capacity, at the end of training"))
    rows = []
    for g in groups:
        layers = layers_of(g.first)
        cells = [_mean_cell(c, layers) for c in COLUMNS]
        cells += [_share_cell(_last(g.first, key)) for key in ("router/kept", "load/dropped")]
        rows.append(el("tr", el("td", name(study, g), data_value=g.label), *cells))
    return sortable(heads, rows)


def _mean_cell(column: Column, layers: Sequence[Layer]) -> Markup:
    known = [x for load, h in layers if (x := column.of(load, h)) is not None]
    if not known:
        return num_cell(None, "")
    span = f"{column.shown(min(known))} to {column.shown(max(known))} over the layers"
    return num_cell(fmean(known), column.shown(fmean(known)), span)


def _share_cell(share: float | None) -> Markup:
    return num_cell(share, text.percent(share or 0.0))


def _last(run: Run, key: str) -> float | None:
    return next((p.router[key] for p in reversed(run.curve) if key in p.router), None)


def _by_layer(study: Study, groups: Sequence[Group]) -> Markup:
    heads = [sort_head("Variant", False), sort_head("Layer")]
    heads += [sort_head(c.head, title=c.title) for c in COLUMNS]
    rows = [
        el(
            "tr",
            el("td", name(study, g), data_value=f"{g.label} {load.layer}"),
            num_cell(load.layer, str(load.layer)),
            *(num_cell(x, c.shown(x or 0.0)) for c in COLUMNS for x in [c.of(load, h)]),
        )
        for g in groups
        for load, h in layers_of(g.first)
    ]
    return el("details", el("summary", "The same, layer by layer"), sortable(heads, rows))


# Figures


def _pairs(figure: Figure) -> Markup:
    note = lead(
        "Of the tokens that chose one expert, the share that chose another one too, over what it "
        "would be if pairs were drawn at random, (k − 1) / (E − 1). Of many experts the most used "
        "are shown."
    )
    return join(
        el("h3", "Experts chosen together"),
        note,
        el(
            "div",
            explorer(figure, "health-pairs", "Experts chosen together"),
            style=f"max-width:{widest(figure) + 170}px",
        ),
    )
