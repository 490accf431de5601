"""A submodel of a nested model as a plain model of its own, its weights copied (arXiv:2310.07707).

`matformer` becomes `mlp` or `swiglu`, `moe` a `moe` of narrower experts; the rest stays as it is.
A copy, because a matrix cut by columns is read more slowly than one that lies in one piece.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from layers.matformer import MatFormerConfig
from layers.precision import leaves
from layers.prefix import Prefix, Prefixes, Spans
from zoo.model import LanguageModel, ModelConfig
from zoo.packing import header_of
from zoo.plan import LayerChoice, layer_choices
from zoo.pretrained import own_tensors
from zoo.registry import Choice

Part = Prefix | Spans | None  # of a leaf; None: all
SubWidths = int | Sequence[int | None]  # of every nested layer, or one for each layer; None: all


def extract(
    model: LanguageModel, widths: SubWidths | None = None, *, heads: int | None = None
) -> LanguageModel:
    """The model that `model(tokens, widths=..., heads=...)` runs, without the rest of its weights.

    Its leaves compute in the precisions of the model's, with the scales that these keep; random
    streams are to be seeded anew, as after any load. In float32 dense layers give the same bits
    at multiples of 16, and the same but for rounding elsewhere: products of few tokens hang on how
    rows are aligned, and a mixture's on a kernel for whole experts.

    Args:
        model: for widths, some of its layers are nested (matformer, moe without shared experts).
        widths: hidden numbers of every nested layer, or one entry for each layer, None where all
            run; `zoo.least_slope` finds them for a budget. None: all run everywhere.
        heads: the first so many attention heads, of every layer alike; None: all.

    Raises:
        ValueError: where neither is given, for a model without nested layers, a width or number of
            heads that a layer does not have, or weights that are packed or corrected: extract
            before that.
    """
    _check_weights(model)
    config = extracted_config(model.config, widths, heads=heads)
    parts = _parts(model.config, widths) | _attention_parts(model.config, heads)
    with torch.random.fork_rng(devices=[]):  # every weight drawn here is replaced
        made = LanguageModel(config)
    made.activation_checkpointing = model.activation_checkpointing
    of_model = leaves(model)
    for name, leaf in leaves(made).items():
        leaf.precision = of_model[name].precision
    given = own_tensors(model)
    for name, tensor in own_tensors(made).items():
        tensor.data = _cut(given[name].detach(), name, parts).clone(
            memory_format=torch.contiguous_format
        )
    return made.train(model.training)


def extracted_config(
    config: ModelConfig, widths: SubWidths | None = None, *, heads: int | None = None
) -> ModelConfig:
    """The shape of `extract`'s model; nothing is built. Arguments and errors are its."""
    if widths is None and heads is None:
        raise ValueError("nothing to extract: give widths, heads or both")
    settled = layer_widths(config, widths)
    plan, choices = layer_choices(config.ffn, config.n_layers), config.layers()
    says = [_said(*each) for each in zip(plan, choices, settled, strict=True)]
    ffn: Any = says[0] if all(each == says[0] for each in says) else says
    if heads is None:
        return replace(config, ffn=ffn)
    n, g = config.attention.counts(heads)
    return replace(config, ffn=ffn, n_heads=n, n_kv_heads=g, d_head=config.attention.d_head)


def layer_widths(config: ModelConfig, widths: SubWidths | None) -> tuple[int | None, ...]:
    """One entry for each layer, checked; None: all of it, and where the layer is not nested."""
    if widths is None:
        return (None,) * config.n_layers
    choices = config.layers()
    nested = [bool(getattr(choice.config, "granularities", ())) for choice in choices]
    if not any(nested):
        raise ValueError("no layer of this model is nested: there is no submodel to extract")
    if isinstance(widths, int):
        widths = [widths if is_nested else None for is_nested in nested]
    if len(widths) != len(choices):
        raise ValueError(
            f"widths must have one entry for each of {len(choices)} layers, got {len(widths)}"
        )
    for i, (choice, width) in enumerate(zip(choices, widths, strict=True)):
        if width is None:
            continue
        if not nested[i]:
            raise ValueError(
                f"layer {i}: {choice.entry.name} is not nested, it has no width {width}"
            )
        try:
            _prefixes(choice, width)
        except ValueError as error:
            raise ValueError(f"layer {i}: {error}") from None
    return tuple(widths)


def _said(said: LayerChoice, choice: Choice, width: int | None) -> dict[str, Any]:
    """What a recipe says of the extracted layer. said: what it says of the nested one."""
    config = choice.config
    if isinstance(config, MatFormerConfig):
        kind, d_ff = "swiglu" if config.gated else "mlp", width or config.hidden
        return {"name": kind, "d_ff": d_ff, "activation": config.act}
    options = dict(said.options)
    if width is not None:
        assert choice.entry.width is not None
        options[choice.entry.width] = width
    router = {} if said.router is None else {"router": said.router}
    return {"name": said.ffn, **options, **router}


def _prefixes(choice: Choice, width: int) -> Prefixes:
    """What the width takes of the leaves."""
    config = choice.config
    return getattr(config, "experts", config).parts(width)


def _parts(config: ModelConfig, widths: SubWidths | None) -> dict[str, Part]:
    """What is taken of each FFN leaf that is cut, by its name; a bias goes with its rows."""
    parts: dict[str, Part] = {}
    settled = layer_widths(config, widths)
    for i, (choice, width) in enumerate(zip(config.layers(), settled, strict=True)):
        if width is None:
            continue
        inner, down = _prefixes(choice, width)
        within = "experts." if hasattr(choice.config, "experts") else ""
        names = getattr(choice.config, "experts", choice.config)
        parts[f"blocks.{i}.ffn.{within}{names.inner_name}"] = inner
        parts[f"blocks.{i}.ffn.{within}down"] = down
    return parts


def _attention_parts(config: ModelConfig, heads: int | None) -> dict[str, Part]:
    """What is taken of each attention leaf: rows of queries, keys and values, columns of `out`."""
    if heads is None:
        return {}
    c = config.attention
    n, g = c.counts(heads)
    starts = (0, c.n_heads, c.n_heads + c.n_kv_heads)
    spans = zip(starts, (n, g, g), strict=True)
    rows = Spans(tuple((start * c.d_head, (start + count) * c.d_head) for start, count in spans))
    parts: dict[str, Part] = {}
    for i in range(config.n_layers):
        parts[f"blocks.{i}.attention.qkv"] = rows
        parts[f"blocks.{i}.attention.out"] = Prefix(columns=n * c.d_head)
    return parts


def _cut(tensor: Tensor, name: str, parts: Mapping[str, Part]) -> Tensor:
    """The part of one tensor of the model that the submodel has."""
    leaf, _, kind = name.rpartition(".")
    part = parts.get(leaf)
    if part is None or kind not in ("weight", "bias"):
        return tensor
    return part.of_weight(tensor) if kind == "weight" else part.of_rows(tensor)


def _check_weights(model: LanguageModel) -> None:
    if header_of(model) is not None:
        raise ValueError("the model is packed, and codes are not cut: extract first, then pack")
    for name, leaf in leaves(model).items():
        if getattr(leaf, "correction", None) is not None:
            raise ValueError(f"{name} has a correction of its whole width: extract, then quantise")
