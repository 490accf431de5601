"""A whole model converted: chosen dense layers become others, everything else is copied."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from layers.precision import leaves
from layers.selection import select_layers
from layers.versatile_ffn import VersatileFFN
from zoo.conversion.layer import Converted, Dense, LayerReceipt, convert_ffn, receipt
from zoo.conversion.methods import VersatileOptions, method_of, options_for
from zoo.model import LanguageModel
from zoo.plan import LayerChoice, layer_choices
from zoo.pretrained import own_tensors


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `convert` made."""

    model: LanguageModel  # float32, without a precision policy: set the run's anew
    receipts: tuple[LayerReceipt, ...]  # one for each converted layer


def convert(model: LanguageModel, to: str, *, seed: int = 0, **options: Any) -> Conversion:
    """The chosen layers of a dense model converted (moe.md 12, converter contract).

    Args:
        model: its chosen layers are `swiglu`, for spark perhaps `mlp`; it stays as it is.
        to: a row of `METHODS`: upcycle | granular | drop | factor_llm | spt | versatile | spark.
        seed: of everything drawn; each layer draws its own.
        options: of the method (`zoo.conversion.methods`).

    Raises:
        ValueError: where no layer is chosen, one is no `swiglu`, a width does not split, another
            layer's shape hangs on what the converted ones hand on, or leaves hold scales of their
            training.
    """
    _check_scales(model)
    config = model.config
    if issubclass(method_of(to), VersatileOptions):
        options = {"norm_eps": config.norm_eps, **options}
    said = options_for(to, options)
    chosen = select_layers(said.layers, config.n_layers)
    if not chosen:
        raise ValueError(f"layers={said.layers!r} names none of {config.n_layers} layers")
    says = [_said(choice) for choice in layer_choices(config.ffn, config.n_layers)]
    new_layers, receipts = {}, []
    for i in chosen:
        ffn, layer_seed = _ffn(model, i, said.sources), seed * 1_000_003 + i
        new_layers[i] = convert_ffn(ffn, to, seed=layer_seed, **options)
        says[i] = said.layer_for(ffn)
        _take_norm(new_layers[i], model.blocks[i])
        receipts.append(receipt(ffn, new_layers[i], i, layer_seed))
    ffn_says: Any = says[0] if all(each == says[0] for each in says) else says
    made = LanguageModel(replace(config, ffn=ffn_says))
    new = {
        f"blocks.{i}.ffn.{name}": tensor
        for i, layer in new_layers.items()
        for name, tensor in layer.state_dict().items()
    }
    _fill(made, own_tensors(model) | new)
    return Conversion(model=made, receipts=tuple(receipts))


def _check_scales(model: LanguageModel) -> None:
    """Refuse static and delayed scales: new experts have none, and 1 would not be theirs."""
    for name, leaf in leaves(model).items():
        if leaf.operand_scales is not None:
            raise ValueError(
                f"{name} keeps static or delayed scales, which new experts lack: convert a model "
                "trained with scales of the tensor, the row or the block"
            )


def _ffn(model: LanguageModel, layer: int, sources: tuple[type[Dense], ...]) -> Dense:
    ffn = model.blocks[layer].ffn
    if not isinstance(ffn, sources):
        names = " and ".join(source.__name__.lower() for source in sources)
        raise ValueError(
            f"layer {layer} is a {type(ffn).__name__}, only {names} layers are converted: "
            "choose others with layers="
        )
    return ffn


@torch.no_grad()
def _take_norm(made: Converted, block: Any) -> None:
    """A layer with a norm of its own takes the block's."""
    if isinstance(made, VersatileFFN):
        made.norm.weight.copy_(block.ffn_norm.weight)


def _said(choice: LayerChoice) -> dict[str, Any]:
    """A layer's choice as a recipe says it."""
    said = {"name": choice.ffn, **choice.options}
    return said if choice.router is None else said | {"router": choice.router}


@torch.no_grad()
def _fill(made: LanguageModel, given: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in own_tensors(made).items():
        if name not in given or given[name].shape != tensor.shape:
            raise ValueError(
                f"{name} would change its shape: a later layer's router reads the logits that the "
                "converted layers hand on; convert layers after it, with layers="
            )
        tensor.copy_(given[name])
