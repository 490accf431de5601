"""One layer converted, and what that changed of its output."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layers.mlp import MLP
from layers.moe import MoE
from layers.spark_ffn import SparkFFN
from layers.spt_ffn import SPTFFN
from layers.swiglu import SwiGLU
from layers.versatile_ffn import VersatileFFN
from zoo.conversion.methods import options_for
from zoo.conversion.stacks import DenseFFN
from zoo.registry import create

RECEIPT_TOKENS = 256
Dense = SwiGLU | MLP
Converted = MoE | SPTFFN | VersatileFFN | SparkFFN  # what a dense layer becomes


@dataclass(frozen=True, kw_only=True)
class LayerReceipt:
    """The new layer's output against the dense FFN's, before any training; no unit."""

    layer: int
    largest: float  # over tokens, of |new(x) - dense(x)| / |dense(x)|
    mean: float  # over tokens
    scale: float  # <new(x), dense(x)> / <dense(x), dense(x)>, over all tokens: 1 is kept


def dense_of(ffn: nn.Module) -> DenseFFN:
    """The weights of a `swiglu` layer, or of an `mlp`, whose gate and up are one and the same.

    Raises ValueError for another or a quantised one.
    """
    if not isinstance(ffn, Dense):
        raise ValueError(f"only swiglu layers are converted, got a {type(ffn).__name__}")
    inner = ffn.up if isinstance(ffn, MLP) else ffn.gate_up
    if inner.correction is not None or ffn.down.correction is not None:
        raise ValueError("a quantised layer is not converted: convert the run that it came from")
    if isinstance(ffn, MLP):
        up = ffn.up.weight.detach()
        return DenseFFN(up, up, ffn.down.weight.detach())
    gate, up = ffn.gate_up.weight.detach().chunk(2)
    return DenseFFN(gate, up, ffn.down.weight.detach())


def convert_ffn(ffn: nn.Module, to: str, *, seed: int = 0, **options: Any) -> Converted:
    """Another layer in place of a dense one, on the same device in the same dtype.

    Args:
        ffn: a `layers.swiglu.SwiGLU`; for spark a `layers.mlp.MLP` too.
        to: a row of `METHODS`.
        seed: of the router and whatever else is drawn.
        options: of the method (`zoo.conversion.methods`).

    Raises:
        ValueError: for another kind of layer, or options that its width does not allow.
    """
    dense, generator = dense_of(ffn), torch.Generator().manual_seed(seed)
    said = options_for(to, options)
    if not isinstance(ffn, said.sources):
        raise ValueError(f"only swiglu layers are converted, got a {type(ffn).__name__}")
    made = create(**said.layer_for(ffn), d_model=ffn.config.d_model)
    assert isinstance(made, Converted)
    made.to(dense.up.device, dense.up.dtype)
    for decides in (getattr(made, "router", None), getattr(made, "loop_predictor", None)):
        if decides is not None:  # in float32
            decides.to(torch.promote_types(dense.up.dtype, torch.float32))
    parameters = dict(made.named_parameters())
    with torch.no_grad():
        for name, weight in said.weights(dense, generator).items():
            parameters[name].copy_(weight)
    return made


@torch.no_grad()
def receipt(ffn: Dense, made: Converted, layer: int, seed: int) -> LayerReceipt:
    """Compare in float64 without formats, on unit normal inputs, as an RMS norm hands them on.

    A layer with a norm of its own reads them raw, and the dense one as that norm hands them on.

    ffn, made: the layer before and after, which stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, RECEIPT_TOKENS, ffn.config.d_model, generator=generator).double()
    dense, new = _exactly(ffn), _exactly(made)
    normed = new.norm(x) if isinstance(new, VersatileFFN) else x
    before, after = dense(normed).y[0], new(x).y[0]
    difference = _norm(after - before) / _norm(before).clamp(min=1e-300)
    return LayerReceipt(
        layer=layer,
        largest=float(difference.max()),
        mean=float(difference.mean()),
        scale=float((after * before).sum() / before.square().sum().clamp(min=1e-300)),
    )


def _exactly(module: Dense | Converted) -> nn.Module:
    """A float64 copy that computes in no format, evaluating, on the CPU."""
    router: Any = getattr(module, "router", None)
    parts = () if router is None else (type(router)(router.config),)
    copy: nn.Module = type(module)(module.config, *parts)  # pyright: ignore
    copy.double().load_state_dict(module.state_dict())
    return copy.eval()


def _norm(y: Tensor) -> Tensor:
    return y.norm(dim=-1)
