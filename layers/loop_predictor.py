"""How many times a token goes through a recursive FFN: a choice that training samples.

arXiv:2512.14531, sec. 3.3 (adaptive_ffn.md 5.3). c = W_loop H for the raw residual H. In training a
hard straight-through Gumbel softmax, p = onehot(argmax(c + G)) whose gradient is that of
softmax((c + G) / tau); in evaluation l = argmax(c) + 1, no noise, no gradient.

The sample is distributed as softmax(c) whatever tau is: annealing sharpens the gradient alone, so
what training samples and what evaluation takes come together only as far as c becomes peaked.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.names import check_choice, check_positive
from layers.replay import decided

INIT_STD = 0.02  # truncated at three deviations, as the paper draws every weight


@dataclass(frozen=True, kw_only=True)
class Annealing:
    """tau by optimizer steps already taken: max(start decay^step, floor)."""

    start: float = 5.0
    decay: float = 0.99984  # of a step: from 5 to 0.1 in 24,450 of the paper's 25.4k steps
    floor: float = 0.1
    over: str = "steps"  # "run": from start to floor by the last step, however long the run is

    def __post_init__(self) -> None:
        check_choice("anneal", self.over, ("steps", "run"))
        check_positive(temperature=self.start, floor=self.floor)
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {self.decay}")
        if self.floor > self.start:
            raise ValueError(f"floor must be at most temperature={self.start}, got {self.floor}")

    def at(self, step: int, max_steps: int) -> float:
        """tau of the step after `step`, of a run of `max_steps`."""
        if self.over == "run":
            return self.start * (self.floor / self.start) ** (step / max(max_steps - 1, 1))
        return max(self.start * self.decay**step, self.floor)


class Loops(NamedTuple):
    """How often each of T tokens loops."""

    choice: Tensor  # [T, 1] int64, loops less one
    one_hot: Tensor  # [T, L] at least float32; in training with the gradient of a soft choice

    @property
    def expected(self) -> Tensor:
        """[T, 1], the loops as a number, sum over l of l p_l."""
        n = torch.arange(1, self.one_hot.shape[1] + 1, device=self.choice.device)
        return (self.one_hot * n).sum(-1, keepdim=True)

    def mean(self, mask: Tensor | None) -> Tensor:
        """[], loops of a real token, 0 where there is none. mask: [T] bool."""
        if mask is None:
            return self.expected.sum() / max(len(self.choice), 1)
        return self.expected.masked_fill(~mask[:, None], 0).sum() / mask.sum().clamp_min(1)


class LoopPredictor(nn.Module):
    """One of 1 .. L loops for each token, from L logits in float32. Weight [L, D].

    The temperature is a buffer that is saved with the weights and that forward only reads.
    """

    temperature: Tensor  # []

    def __init__(self, d_model: int, max_loops: int, annealing: Annealing):
        super().__init__()
        self.annealing = annealing
        self.weight = nn.Parameter(torch.empty(max_loops, d_model))
        self.register_buffer("temperature", torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight anew, and begin the annealing anew."""
        nn.init.trunc_normal_(self.weight, std=INIT_STD, a=-3 * INIT_STD, b=3 * INIT_STD)
        nn.init.constant_(self.temperature, self.annealing.start)

    def at_step(self, step: int, max_steps: int) -> None:
        """As `layers.scheduled.Scheduled.at_step`."""
        self.temperature.fill_(self.annealing.at(step, max_steps))

    def forward(self, x: Tensor) -> Loops:
        """x: [T, D], the raw residual stream."""
        logits = self._logits(x)
        if not self.training:
            choice = _choice(logits)
            return Loops(choice, torch.zeros_like(logits).scatter(1, choice, 1.0))
        noisy = logits + gumbel_noise(logits)
        soft = (noisy / self.temperature.to(noisy.dtype)).softmax(-1)
        choice = _choice(noisy)
        hard = torch.zeros_like(soft).scatter(1, choice, 1.0)
        return Loops(choice, hard + (soft - soft.detach()))  # in this order exactly one-hot

    def _logits(self, x: Tensor) -> Tensor:
        """[T, L] in float32 (float64 for a float64 x), under autocast too."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))


def gumbel_noise(like: Tensor) -> Tensor:
    """G = -ln(E), E exponential: one Gumbel(0, 1) number for each of `like`."""
    return -torch.empty_like(like).exponential_().log()


def _choice(scores: Tensor) -> Tensor:
    """[T, 1], the largest, the first of equals; recorded or replayed (`layers.replay`)."""
    return decided(scores.detach().max(-1, keepdim=True).indices, scores.shape[-1])
