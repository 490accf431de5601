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
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.base import Cost, FFNOutput, WeightCost
from layers.dispatch import is_decoding
from layers.linear import Linear
from layers.names import check_choice, check_positive
from layers.scheduled import Scheduled
from layers.spark_decode import (
    BACKENDS,
    chosen_backend,
    lay_by_neuron,
    obstacle,
    run_neurons,
)
from layers.statistical_topk import above, exact_topk, quantile
from layers.swiglu import default_d_ff

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # 0 at 0: what is not chosen adds nothing
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
}
# per hidden number, estimated; the product with the value is one
ACTIVATION_FLOPS = {"gelu_tanh": 9, "gelu": 9, "silu": 5, "relu": 2}
SELECTION_FLOPS = {"statistical": 5, "exact": 20, "none": 0}  # per hidden number, estimated
PREDICTORS = ("split", "full")
MULTIPLE = 64  # of r


@dataclass(frozen=True, kw_only=True)
class SparkFFNConfig:
    """Sizes of a Spark FFN, and what a token runs of it."""

    d_model: int
    d_ff: int | None = None  # hidden width F; None: the parameters of a default swiglu
    d_predictor: int | None = None  # r; None: d_model / 2, to a multiple of 64 from 128 on
    density: float = 0.08  # k / F, share of the neurons that a token runs
    top_k: int | None = None  # k itself, in place of the density
    activation: str = "gelu_tanh"  # gelu_tanh | gelu | silu | relu, after the threshold
    predictor: str = "split"  # split | full (Gemma 3n: gate and value see all of the input)
    selection: str = "statistical"  # statistical | exact (the k largest, same shift) | none (dense)
    detach_threshold: bool = False  # theta is a constant to the gradient
    huber: float = 0.0  # delta of a smooth threshold, in units of the scores; 0: a kink
    density_start: float | None = None  # density of the first step; None: the same throughout
    density_until: float = 0.1  # share of the run after which the density is reached
    backend: str = "auto"  # auto | dense | gather | bag: of a few tokens without gradients

    def __post_init__(self) -> None:
        check_positive(d_model=self.d_model, d_ff=self.hidden)
        check_choice("predictor of spark_ffn", self.predictor, PREDICTORS)
        check_choice("activation of spark_ffn", self.activation, ACTIVATIONS)
        check_choice("selection of spark_ffn", self.selection, SELECTION_FLOPS)
        check_choice("backend of spark_ffn", self.backend, BACKENDS)
        self._check_split()
        if self.selection == "none":
            self._check_unused()
            return
        if not 0 < self.density < 1:
            raise ValueError(
                f"density must be in (0, 1), got {self.density}; selection: none runs all neurons"
            )
        if not 1 <= self.k < self.hidden:
            raise ValueError(f"top_k must be in [1, d_ff={self.hidden}), got {self.k}")
        if self.huber < 0:
            raise ValueError(f"huber must be at least 0, got {self.huber}")
        if self.density_start is not None:
            self._check_schedule(self.density_start)

    def _check_split(self) -> None:
        if self.predictor == "split" and not 1 <= self.r < self.d_model:
            raise ValueError(f"d_predictor must be in [1, d_model={self.d_model}), got {self.r}")
        if self.predictor == "full" and self.d_predictor is not None:
            raise ValueError(
                f"predictor: full sees the whole input, so leave out d_predictor={self.d_predictor}"
            )

    def _check_unused(self) -> None:
        """No option of a selection that there is not."""
        for name in ("top_k", "detach_threshold", "huber", "density_start"):
            if given := getattr(self, name):
                raise ValueError(f"selection: none selects nothing, so leave out {name}={given}")
        if self.backend not in ("auto", "dense"):
            raise ValueError(f"selection: none runs all neurons, got backend={self.backend!r}")

    def _check_schedule(self, start: float) -> None:
        if self.selection != "statistical":
            raise ValueError("density_start is for selection: statistical")
        if not self.share <= start < 1:
            raise ValueError(
                f"density_start must be in [{self.share:.3g}, 1), from the density that it falls "
                f"to, got {start}"
            )
        if not 0 < self.density_until <= 1:
            raise ValueError(f"density_until must be in (0, 1], got {self.density_until}")

    @property
    def hidden(self) -> int:
        """F, with the default filled in."""
        if self.d_ff is not None:
            return self.d_ff
        gated = default_d_ff(self.d_model)  # three matrices
        return gated if self.predictor == "full" else gated * 3 // 2

    @property
    def r(self) -> int:
        """Numbers of the input that the scores see, with the default filled in."""
        if self.predictor == "full":
            return self.d_model
        if self.d_predictor is not None:
            return self.d_predictor
        half = self.d_model // 2
        return half if half < MULTIPLE else round(half / MULTIPLE) * MULTIPLE

    @property
    def d_value(self) -> int:
        """Numbers of the input that the value sees."""
        return self.d_model if self.predictor == "full" else self.d_model - self.r

    @property
    def k(self) -> int:
        """Neurons that a token is to run."""
        if self.selection == "none":
            return self.hidden
        return max(round(self.density * self.hidden), 1) if self.top_k is None else self.top_k

    @property
    def share(self) -> float:
        """k / F as the threshold has it: the density itself, not rounded to whole neurons."""
        if self.top_k is not None or self.selection != "statistical":
            return self.k / self.hidden
        return max(self.density, 1 / self.hidden)

    def cost(self) -> Cost:
        """One token's cost: FLOPs as training has them, dense; what decoding reads as units."""
        f, k = self.hidden, self.k
        act = (ACTIVATION_FLOPS[self.activation] + SELECTION_FLOPS[self.selection]) * f

        def matrix(name: str, width: int, other_flops: float = 0.0) -> WeightCost:
            n, chosen = width * f, name != "predictor"
            return WeightCost(
                name=f"{name}.weight", role="ffn", params=n, flops=2 * n, other_flops=other_flops,
                units=f if chosen else 1, active_units=k if chosen else 1,
            )  # fmt: skip

        return Cost(
            (matrix("predictor", self.r, act), matrix("up", self.d_value),
             matrix("down", self.d_model))
        )  # fmt: skip

    def decode_flops(self) -> int:
        """Matmul FLOPs of one token that runs k neurons alone: 2 r F + 2 (D - r) k + 2 D k."""
        return 2 * (self.r * self.hidden + (self.d_value + self.d_model) * self.k)


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
        q1, q2 = (x, x) if c.predictor == "full" else x.tensor_split([c.r], dim=-1)
        kept, act, backend = self.select(self.predictor(q1)), ACTIVATIONS[c.activation], "dense"
        if not (torch.is_grad_enabled() or self.training or torch.compiler.is_compiling()):
            backend = self._backend(x)
        if backend == "dense":
            y = self.down(act(kept) * self.up(q2))
        else:
            y = run_neurons(
                kept.flatten(0, 1), q2.flatten(0, 1), self.up, self.down, act, backend
            ).view_as(x)
        stats = None if is_decoding(x.flatten(0, 1)) else _stats(kept, mask)
        return FFNOutput(y.type_as(x), stats=stats)

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
        if c.backend != "auto":
            if reason is not None:
                raise ValueError(f"backend {c.backend!r} runs single neurons, but {reason}")
            return c.backend
        if reason is not None or x.device.type != "cpu":
            return "dense"
        return chosen_backend(x.shape[:-1].numel(), c.share)

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


@torch.no_grad()
def _stats(kept: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """kept: [B, S, F], zeros at padding; mask: [B, S] bool."""
    tokens = kept.new_tensor(kept.shape[:-1].numel(), dtype=torch.int64)
    return {
        "active_neurons": kept.count_nonzero(),
        "tokens": tokens if mask is None else mask.sum(),
    }
