"""Spark Transformer's FFN: a part of the input says which neurons run, and how much.

arXiv:2506.06644, eq. 6-8. With q the input, q1 its first r numbers and q2 the others,

    a = act(soft_top_k(K1 q1, k))      about k of F neurons (`layers.statistical_topk`)
    y = V (a * K2 q2)

The scores are the gate itself: no estimator, no loss of its own, no second stage of training. Any r
gives 2 D F parameters. Gemma 3n's FFN is the same with a gate and a value that both see all of q
(`predictor: full`). Published: k = 8% of F, r near D / 2, gelu (tanh), theta in the gradient, all
constant over training; a schedule of the density is ours.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.base import FFNOutput
from layers.dispatch import is_decoding
from layers.linear import Linear
from layers.quantiles import quantile
from layers.scheduled import Scheduled
from layers.spark_config import PREDICTORS, SparkFFNConfig
from layers.spark_decode import BY_OUTPUT, chosen_backend, lay_by_neuron, obstacle, run_neurons
from layers.spark_native import (
    NATIVE_UP_TO,
    PREDICTOR_UP_TO,
    Threshold,
    native_dtype,
    run_tokens,
)
from layers.statistical_topk import above, exact_topk

__all__ = [
    "ACTIVATIONS",
    "PREDICTORS",
    "SparkFFN",
    "SparkFFNConfig",
    "pack_for_decode",
    "pack_for_generation",
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # 0 at 0: what is not chosen adds nothing
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}


class SparkFFN(nn.Module, Scheduled):
    """y = down(act(soft_top_k(predictor(q1), k)) * up(q2)), no biases.

    Training computes all neurons and multiplies what is not chosen by zero. A few tokens without
    gradients (`backend`) run the chosen ones alone once `pack_for_decode` was called, where leaves
    compute in a plain dtype: with packed weights, a format that quantises, or in a compiled graph
    auto stays dense, and the other backends raise ValueError (a compiled graph is always dense).

    stats: active_neurons, over the tokens, and tokens, which are not padding.
    """

    quantile: Tensor  # [] float32, z of this step; only with a schedule

    def __init__(self, config: SparkFFNConfig):
        super().__init__()
        c = self.config = config
        self.predictor = Linear(c.r, c.hidden, role="ffn")  # K1, [F, r]
        self.up = Linear(c.d_value, c.hidden, role="ffn")  # K2, [F, D - r]
        self.down = Linear(c.hidden, c.d_model, role="ffn")  # V, [D, F]
        self._z = quantile(c.share, 1)
        if c.density_start is not None:
            self.register_buffer("quantile", torch.tensor(self._z))

    def forward(
        self, x: Tensor, carry: Tensor | None = None, mask: Tensor | None = None
    ) -> FFNOutput:
        """x: [B, S, D]; mask: [B, S] bool. carry is not read and not handed on."""
        c = self.config
        if mask is not None:  # whatever stands there, NaN included; a row of zeros keeps nothing
            x = x.masked_fill(~mask[..., None], 0)
        backend = "dense"
        if not (torch.is_grad_enabled() or self.training or torch.compiler.is_compiling()):
            backend = self._backend(x)
        if backend == "native":
            return self._run_native(x, mask)
        q1, q2 = self._parts(x)
        kept, act = self.select(self.predictor(q1)), ACTIVATIONS[c.activation]
        if backend == "dense":
            y = self.down(act(kept) * self.up(q2))
        else:
            y = run_neurons(
                kept.flatten(0, 1), q2.flatten(0, 1), self.up, self.down, act, backend
            ).view_as(x)
        stats = None if is_decoding(x.flatten(0, 1)) else _stats(kept.count_nonzero(), x, mask)
        return FFNOutput(y.type_as(x), stats=stats)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the scores and what the values see. x: [..., D]."""
        c = self.config
        return (x, x) if c.predictor == "full" else (x[..., : c.r], x[..., c.r :])

    def _run_native(self, x: Tensor, mask: Tensor | None) -> FFNOutput:
        """As `forward`, in one call (`layers.spark_native`). x: [B, S, D], zeros at padding."""
        c, tokens = self.config, x.flatten(0, 1)
        leaves = self.predictor, self.up, self.down
        computes = native_dtype(tokens, *leaves)
        assert computes is not None, "_backend() asked the same"
        z = self._z if c.density_start is None else self.quantile.item()
        how, scores = Threshold(z, c.huber), None
        if c.selection == "exact":
            how, scores = None, self.select(self.predictor(self._parts(tokens)[0]))
        elif len(tokens) > PREDICTOR_UP_TO[computes]:
            scores = self.predictor(self._parts(tokens)[0])
        y, active = run_tokens(tokens, computes, *leaves, c.activation, how, scores)
        stats = None if is_decoding(tokens) else _stats(torch.tensor(active), x, mask)
        return FFNOutput(y.view_as(x).type_as(x), stats=stats)

    def select(self, scores: Tensor) -> Tensor:
        """scores: [..., F]. What is above the threshold, less it; 0 elsewhere."""
        c = self.config
        how = {"detach_threshold": c.detach_threshold, "huber": c.huber}
        if c.selection == "none":
            return scores
        if c.selection == "exact":
            return exact_topk(scores, c.k, **how)
        return above(scores, self._z if c.density_start is None else self.quantile, **how)

    def _backend(self, x: Tensor) -> str:
        """How these tokens run, without gradients and not in training."""
        c = self.config
        if c.selection == "none" or c.backend == "dense" or not x.numel():
            return "dense"
        reason = obstacle(self.up, self.down)
        if c.backend != "auto" and reason is not None:
            raise ValueError(f"backend {c.backend!r} runs single neurons, but {reason}")
        n_tokens = x.shape[:-1].numel()
        if c.backend != "bag" and reason is None:
            computes = native_dtype(x, self.predictor, self.up, self.down)
            if computes is not None and (
                c.backend == "gather" or n_tokens * c.share <= NATIVE_UP_TO[computes]
            ):
                return "native"
        if c.backend != "auto":
            return c.backend
        if reason is not None or x.device.type != "cpu":
            return "dense"
        return chosen_backend(n_tokens, c.share)

    def pack_for_decode(self) -> bool:
        """Lay `down` by neuron, in place (`layers.spark_decode`): same numbers, names, shapes.

        Returns whether neurons can now be run alone.
        """
        lay_by_neuron(self.down)
        return obstacle(self.up, self.down) is None

    def at_step(self, step: int, max_steps: int) -> None:
        """As `Scheduled.at_step`: the density falls evenly from `density_start`."""
        c = self.config
        if c.density_start is None:
            return
        done = min(step / (c.density_until * max_steps), 1.0)
        self.quantile.fill_(quantile(c.density_start * (1 - done) + c.share * done, 1))


def pack_for_decode(model: nn.Module) -> int:
    """`SparkFFN.pack_for_decode` of every layer there is. Returns how many run neurons alone."""
    layers = [module for module in model.modules() if isinstance(module, SparkFFN)]
    return sum(layer.pack_for_decode() for layer in layers)


def pack_for_generation(model: nn.Module) -> int:
    """`pack_for_decode` of the layers that it makes faster: those on a CPU whose weights are plain
    tensors (FSDP's are not) and that would then run neurons alone. Returns how many.
    """
    layers = [
        m for m in model.modules()
        if isinstance(m, SparkFFN) and m.config.selection != "none" and m.config.backend != "dense"
        and type(m.down.weight) is nn.Parameter and m.down.weight.is_cpu
        and obstacle(m.up, m.down) in (None, BY_OUTPUT)
    ]  # fmt: skip
    return sum(layer.pack_for_decode() for layer in layers)


@torch.no_grad()
def _stats(active: Tensor, x: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """active: [], neurons that ran; x: [B, S, D]; mask: [B, S] bool."""
    tokens = active.new_tensor(x.shape[:-1].numel(), dtype=torch.int64)
    return {"active_neurons": active, "tokens": tokens if mask is None else mask.sum()}
