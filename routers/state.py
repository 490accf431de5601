"""Router state that is no gradient: buffers that forward only reads, moved between steps.

A controller calls `update` once per optimizer step with counts summed over micro-batches and ranks
(`recipes.controllers` does); evaluation is not counted.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from layers.names import check_choice

BIAS_RULES = ("sign", "centred")


class Float32State(nn.Module):
    """A module whose float32 buffers stay float32 whatever it is cast to (moe.md 15).

    A step of 1e-3 on a bias of 0.5 is nothing in bfloat16.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        state = {n: b for n, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in state.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class Steered(Float32State, ABC):
    """A router whose state a controller moves by what was chosen."""

    @property
    def moves(self) -> bool:
        """Whether there is anything to move, as configured."""
        return True

    @abstractmethod
    def update(self, counts: Tensor, *, progress: float = 0.0) -> None:
        """Move the state once.

        Args:
            counts: [E], assignments of the step: summed over its micro-batches and all ranks.
            progress: steps done before this one, as a share of all.
        """


@dataclass(frozen=True, kw_only=True)
class BiasControl:
    """How a selection bias moves (arXiv:2408.15664; moe.md 3.4)."""

    bias_step: float = 1e-3  # u, added or taken once an optimizer step; 0: the bias stands still
    bias_rule: str = "sign"  # u sign(mean c - c_e); "centred": less its mean, so without drift
    bias_until: float = 1.0  # share of all steps after which it stands still

    def __post_init__(self) -> None:
        check_choice("bias_rule", self.bias_rule, BIAS_RULES)
        if self.bias_step < 0:
            raise ValueError(f"bias_step must not be negative, got {self.bias_step}")
        if not 0 <= self.bias_until <= 1:
            raise ValueError(f"bias_until must be in [0, 1], got {self.bias_until}")


class SelectionBias(Steered):
    """A router that chooses by score + bias and weighs by score; the bias learns by counting.

    The bias is a float32 buffer: saved, never differentiated, decayed or cast.
    """

    bias: Tensor  # [E] float32

    def __init__(self, n_routes: int, control: BiasControl):
        super().__init__()
        self._control = control
        self.register_buffer("bias", torch.zeros(n_routes, dtype=torch.float32))

    @property
    def shares(self) -> Tensor | None:
        """[E] float64, the share of all assignments that each expert should get; None: even."""
        return None

    def update(self, counts: Tensor, *, progress: float = 0.0) -> None:
        """Move the bias once; see `Steered`."""
        control = self._control
        if progress < control.bias_until and control.bias_step:
            move = bias_move(counts.to(self.bias.device), control, self.shares)
            self.bias.add_(move.to(self.bias.dtype))


def steered_shares(config: Any, free: float) -> Tensor:
    """[N] float64, shares of all assignments: `free` for experts without an FFN, even in a kind.

    config: numbers of experts, as `layers.moe_plus_plus.Kinds` has them.
    """
    each = [(1 - free) / config.n_experts] * config.n_experts
    each += [free / config.n_zero_computation] * config.n_zero_computation
    return torch.tensor(each, dtype=torch.float64)


def bias_move(counts: Tensor, control: BiasControl, shares: Tensor | None = None) -> Tensor:
    """u sign(target_e - c_e), target_e = share_e sum c: what an expert's bias moves by.

    A constant on all biases chooses nothing else, so "centred" takes the moves' mean off them.

    Args:
        counts: [E] assignments.
        control: step and rule.
        shares: [E] float64, summing to 1; None: even, worked out in whole numbers.
    """
    if shares is None:
        above = counts.sum() - counts.shape[-1] * counts
    else:
        above = shares.to(counts.device) * counts.sum() - counts
    move = control.bias_step * above.sign().to(torch.float64)
    return move - move.mean() if control.bias_rule == "centred" else move
