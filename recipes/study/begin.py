"""Variants that begin from another variant's run of the same seed: as it is, or converted.

variants:
  - {name: swiglu, d_ff: 352}
  - {label: trained on, begin: {from: swiglu}}        # from its weights
  - {label: upcycled, begin: {from: swiglu, to: upcycle, n_experts: 8}}

What follows `to` are options of the conversion (`recipes.convert`). The layer is what comes of it,
so such a variant gives neither `name` nor `ffn`; it trains on other batches than the run that it
begins from has seen.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layers.names import unknown
from recipes import load
from recipes.comparison import Variant, variants_of
from recipes.planned import RunFailed, environment
from recipes.planning import recipe_of
from zoo.conversion import convert, options_for
from zoo.model import build

OTHER_BATCHES = 1000  # added to the seed of a run that begins from another's weights
TEACHING = "teach_steps"  # of `recipes.convert` itself, none of a conversion


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Where the weights of a variant's runs come from."""

    source: str  # label of the variant
    to: str | None  # a row of `zoo.conversion.METHODS`; None: the weights as they are
    options: dict[str, Any]


def read_variants(given: Sequence[Any]) -> tuple[list[Variant], dict[str, Begin]]:
    """The variants in their order, and by label how those begin that have a `begin`.

    The layers of these are not settled yet: `settled` does that, size by size.

    Raises:
        ValueError: for a `begin` without a label or a source, beside a layer, of an unknown source,
            or one that goes round in a circle.
    """
    plain: list[Any] = []
    begins: dict[str, Begin] = {}
    for i, item in enumerate(given):
        if isinstance(item, Mapping) and "begin" in item:
            label, begin = _read(item, f"variants[{i}]")
            begins[label] = begin
            item = {k: v for k, v in item.items() if k != "begin"} | {"ffn": begin.source}
        plain.append(item)
    variants = variants_of(plain)
    labels = [variant.label for variant in variants]
    for label, begin in begins.items():
        if begin.source not in labels:
            raise unknown(f"variant that {label} begins from", begin.source, labels)
    in_order(labels, begins)
    return variants, begins


def _read(item: Mapping[str, Any], where: str) -> tuple[str, Begin]:
    label, said = item.get("label"), item["begin"]
    layer = [key for key in item if key not in ("label", "begin", "recipe")]
    if not isinstance(label, str) or layer:
        raise ValueError(
            f"study: {where} begins from another's weights: it needs a `label`, may have a "
            f"`recipe`, and has no layer of its own, got {sorted(map(str, item))}"
        )
    if not isinstance(said, Mapping) or not isinstance(said.get("from"), str):
        raise ValueError(
            f"study: {where}: begin needs `from`, a variant's label, and perhaps `to` with options "
            f"of that conversion, got {said!r}"
        )
    options = {str(key): value for key, value in said.items() if key not in ("from", "to")}
    if said.get("to") is None and options:
        raise ValueError(
            f"study: {where}: begin has no `to`, so {next(iter(options))!r} has no place"
        )
    return label, Begin(source=said["from"], to=said.get("to"), options=options)


def in_order(labels: Iterable[str], begins: Mapping[str, Begin]) -> list[str]:
    """The labels, each behind the one that it begins from. Raises ValueError for a circle."""
    ordered: list[str] = []
    waiting = list(labels)
    while waiting:
        free = [x for x in waiting if x not in begins or begins[x].source in ordered]
        if not free:
            raise ValueError(f"study: {', '.join(waiting)} begin from one another")
        ordered += free
        waiting = [x for x in waiting if x not in free]
    return ordered


def settled(variant: Variant, begin: Begin, source: Variant, shared: Mapping[str, Any]) -> Variant:
    """The variant with the layer that its conversion makes, tried on a model that was just drawn.

    Args:
        variant: one that begins from another.
        begin: how.
        source: the variant that it begins from, with its width.
        shared: keys of the recipe.

    Raises:
        ValueError: naming the variant, for whatever the conversion refuses.
    """
    if begin.to is None:
        return replace(variant, ffn=source.ffn)
    options = {k: v for k, v in begin.options.items() if k != TEACHING}
    model = recipe_of(shared, source, "fp32", 0).model
    try:
        with torch.random.fork_rng(devices=()):
            made = convert(build(model), begin.to, **options)
        weights = options_for(begin.to, options).loss_weights(len(made.receipts))
    except ValueError as error:
        raise ValueError(f"{variant.label}: {error}") from None
    lacking = {k: w for k, w in weights.items() if k not in shared.get("loss_weights", {})}
    recipe = load.merged({"loss_weights": lacking} if lacking else {}, variant.recipe)
    return replace(variant, ffn=load.to_plain({"ffn": made.model.config.ffn})["ffn"], recipe=recipe)


def make(source: Path, out: Path, begin: Begin) -> None:
    """Convert a finished run, in a process of its own, unless that is done already.

    Raises:
        RunFailed: where the conversion ends in an error, or another one lies there.
    """
    assert begin.to is not None
    options = {"to": begin.to, **begin.options}
    if (out / "convert.json").is_file():
        made = json.loads((out / "convert.json").read_text())
        known = {**made["options"], "to": made["to"], TEACHING: made["teach"]["steps"]}
        if any(known.get(key) != value for key, value in options.items()):
            raise RunFailed(f"{out} holds another conversion than {options}: delete it")
        return
    command = [sys.executable, "-P", "-m", "recipes.cli", "convert", str(source)]
    command += [f"{k}={json.dumps(v)}" for k, v in {**options, "out": str(out)}.items()]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RunFailed(lines[-1] if lines else f"the conversion ended with {done.returncode}")
