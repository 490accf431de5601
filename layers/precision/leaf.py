"""What a precision policy acts on: the modules that own the weights of matmuls and look-ups."""

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from layers.precision.operands import OPERANDS, LeafPrecision
from layers.precision.random import MASK, mixed


class Leaf(nn.Module):
    """A module that owns one `weight` and multiplies, or looks up, nothing else.

    `precision` is a frozen value; None computes in the dtype of the input. Setting it changes no
    parameter and no name, and makes `torch.compile` recompile by itself. It adds buffers where the
    precision needs them, and forward only reads these but for `operand_peaks`, which it raises:
    doing so again changes nothing.

        rounding_key    [2] int64, not saved: of weights, and of activations and gradients
        operand_scales  [6] or [6, E] float32: decoding scales of scopes static and delayed
        operand_peaks   as operand_scales, not saved: largest magnitudes of this step
        peak_history    [H, 6] or [H, 6, E]: those of earlier steps
    """

    role: str
    multiplies = True  # a table is only read
    rounding_key: Tensor | None
    operand_scales: Tensor | None
    operand_peaks: Tensor | None
    peak_history: Tensor | None
    # sees every operand before it is quantised; set by layers.precision.probe alone
    observer: Callable[..., None] | None = None

    def __init__(self):
        super().__init__()
        self._precision: LeafPrecision | None = None
        for name in ("rounding_key", "operand_peaks"):
            self.register_buffer(name, None, persistent=False)
        for name in ("operand_scales", "peak_history"):
            self.register_buffer(name, None)

    @property
    def precision(self) -> LeafPrecision | None:
        """How operands are written."""
        return self._precision

    @precision.setter
    def precision(self, value: LeafPrecision | None) -> None:
        self._precision = value
        if value is None:
            return
        device = self.device()
        if value.is_random and self.rounding_key is None:
            self.rounding_key = torch.zeros(2, dtype=torch.int64, device=device)
        if value.given_scales and self.operand_scales is None:
            sets = self.weight_sets()
            shape = (len(OPERANDS),) if sets is None else (len(OPERANDS), sets)
            self.operand_scales = torch.ones(shape, device=device)
            self.operand_peaks = torch.zeros(shape, device=device)
        delayed = [s for o in OPERANDS if (s := getattr(value, o)).scope == "delayed"]
        if delayed:
            self._make_history(max(spec.history for spec in delayed))

    def _make_history(self, steps: int) -> None:
        """Room for so many steps at least; what is there is kept, the newest first."""
        scales, before = self.operand_scales, self.peak_history
        assert scales is not None
        if before is None:
            self.peak_history = scales.new_zeros(steps, *scales.shape)
        elif len(before) < steps:
            more = before.new_zeros(steps - len(before), *before.shape[1:])
            self.peak_history = torch.cat((before, more))

    def weight_sets(self) -> int | None:
        """How many weights, each with scales of its own, the leaf stacks; None: one, unstacked."""
        return None

    def seed(self, name: str, seed: int, step: int, micro_batch: int = 0, rank: int = 0) -> None:
        """Set the random streams of one micro-batch, if the precision draws from any.

        The weights' stream is the same on every rank and micro-batch: they hold the same weights.
        """
        if self.rounding_key is None:
            return
        step_key = mixed(seed, step, zlib.crc32(name.encode()))
        here = mixed(step_key & MASK, micro_batch, rank)
        shared = step_key & MASK  # both operands of a product draw their signs from this half
        keys = [(high >> 32 << 32) | shared for high in (step_key, here)]
        self.rounding_key.copy_(torch.tensor(keys, dtype=torch.int64))

    def device(self) -> Any:
        """Where its parameters are; None for a leaf without any."""
        return next((p.device for p in self.parameters()), None)
