"""The search of LLM-FP4 (arXiv:2310.16836; precision.md 13.1) for formats and real biases.

It minimises ||Y - Y^||^2 of a layer's outputs on calibration rows: three rounds, each over the
weight bias of every output channel in every format, the input bias in every format, the weight
format, the input format. Pre-shift: input channel j is quantised with the bias rho + k_j, k_j an
integer, so at run time the input has one scale, and 2^-k_j goes into column j of the weight.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from layers.names import check_choice, check_positive
from layers.posttraining.real_bias import SmallFloat, formats

GAMMAS = (0.01, 1.2, 100)  # first, last, how many
CHUNK = 1 << 22  # numbers that a batch of candidates may take

# how a candidate's bias follows from a maximum: the paper scales the maximum, the release the bias
Scaling = Callable[[SmallFloat, Tensor, Tensor], Tensor]
SCALINGS: dict[str, Scaling] = {
    "max": lambda f, largest, gamma: f.bias_of(largest) - gamma.log2(),
    "release": lambda f, largest, gamma: f.bias_of(largest) * gamma,
}
SHIFTS = ("channel", "none")


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What LLM-FP4's search may choose among."""

    weight_formats: tuple[SmallFloat, ...] = formats(4)
    input_formats: tuple[SmallFloat, ...] = formats(4)  # empty: inputs stay as they are
    scaling: str = "max"  # max | release
    shift: str = "channel"  # channel | none
    rounds: int = 3

    def __post_init__(self) -> None:
        check_choice("scaling of candidates", self.scaling, SCALINGS)
        check_choice("shift", self.shift, SHIFTS)
        check_positive(rounds=self.rounds)
        if not self.weight_formats:
            raise ValueError("weight_formats is empty: name one format at least")


class Found(NamedTuple):
    """What the search chose for one leaf of E matrices (one for a dense layer)."""

    weight: Tensor  # [E, N, K] quantised, before any shift is folded in
    weight_format: SmallFloat
    weight_bias: Tensor  # [E, N]
    input_format: SmallFloat | None
    input_bias: Tensor  # [E], the bias rho of the whole input; of no meaning without a format
    shift: Tensor  # [E, K] integers k_j >= 0, in the weight's dtype
    error: float  # sum ||Y - Y^||^2 / sum ||Y||^2 over all E


def channel_shift(fmt: SmallFloat, peaks: Tensor, bias: Tensor) -> Tensor:
    """k_j = clamp(round(b_j) - round(rho), 0, 2^e - 1), b_j the bias of channel j's own maximum.

    Args:
        fmt: of the input.
        peaks: [..., K] largest magnitude of each channel.
        bias: [...] rho.

    Returns:
        [..., K] integers, in the dtype of peaks.
    """
    difference = fmt.bias_of(peaks).round() - bias.round()[..., None]
    # inputs that are all zero have two infinite biases
    return difference.nan_to_num(0.0, math.inf).clamp(0, 2**fmt.exponent_bits - 1)


def fold(weight: Tensor, shift: Tensor) -> Tensor:
    """Column j times 2^-k_j: exact. weight: [..., N, K]; shift: [..., K]."""
    return weight * torch.exp2(-shift)[..., None, :]


def search(weight: Tensor, rows: Sequence[Tensor], options: SearchOptions) -> Found:
    """Formats and biases for E matrices that share formats, each with rows and biases of its own.

    Args:
        weight: [E, N, K] float32 or float64.
        rows: E tensors [T_e, K] in its dtype, the inputs of each matrix; T_e >= 1.
        options: what to choose among.

    Raises:
        ValueError: a matrix without rows, sizes that do not fit.
    """
    _check(weight, rows)
    layers = [_Layer(w, x, options) for w, x in zip(weight, rows, strict=True)]
    w_formats, x_formats = options.weight_formats, options.input_formats
    for _ in range(options.rounds):
        for layer in layers:
            layer.search_weight_bias()
        for layer in layers:
            layer.search_input_bias()
        best = _least([layer.weight_format_errors() for layer in layers])
        for layer in layers:
            layer.chosen_weight = best
        if x_formats:
            best = _least([layer.input_format_errors() for layer in layers])
            for layer in layers:
                layer.chosen_input = best
    chosen_w, chosen_x = layers[0].chosen_weight, layers[0].chosen_input
    lost = sum(float(layer.error()) for layer in layers)
    return Found(
        weight=torch.stack([layer.weight_in(chosen_w) for layer in layers]),
        weight_format=w_formats[chosen_w],
        weight_bias=torch.stack([layer.weight_bias[chosen_w] for layer in layers]),
        input_format=x_formats[chosen_x] if x_formats else None,
        input_bias=torch.stack([layer.input_bias[chosen_x] for layer in layers]),
        shift=torch.stack([layer.shift() for layer in layers]),
        error=lost / max(sum(float(layer.y.square().sum()) for layer in layers), 1e-30),
    )


class _Layer:
    """One matrix, its rows, and the biases found so far in every format."""

    def __init__(self, w: Tensor, x: Tensor, options: SearchOptions):
        self.w, self.x, self.options = w, x, options
        self.y = x @ w.T  # [T, N]
        self.peaks = x.abs().amax(0)  # [K]
        gamma = torch.linspace(*GAMMAS, dtype=w.dtype, device=w.device)
        scaled = SCALINGS[options.scaling]
        w_max, x_max = w.abs().amax(1), self.peaks.amax()
        self.weight_candidates = [
            scaled(f, w_max, gamma[:, None]) for f in options.weight_formats
        ]  # [C, N] each
        self.input_candidates = [scaled(f, x_max, gamma) for f in options.input_formats]  # [C]
        self.weight_bias = [f.bias_of(w_max) for f in options.weight_formats]
        self.input_bias = [f.bias_of(x_max) for f in options.input_formats] or [w.new_zeros(())]
        self.chosen_weight = len(options.weight_formats) // 2  # of 4 bits: E2M1
        self.chosen_input = len(options.input_formats) // 2

    def weight_in(self, i: int) -> Tensor:
        """The weight in format i with the biases found so far: [N, K]."""
        return self.options.weight_formats[i].quantize(self.w, self.weight_bias[i][:, None])

    def input_in(self, i: int, bias: Tensor) -> Tensor:
        """The rows in format i. bias: [C]. Returns [C, T, K]; as they are without formats."""
        if not self.options.input_formats:
            return self.x[None]
        fmt, each = self.options.input_formats[i], bias[:, None]
        if self.options.shift == "channel":
            each = each + channel_shift(fmt, self.peaks, bias)
        return fmt.quantize(self.x, each[:, None])

    def inputs(self) -> Tensor:
        """The rows in the format and bias chosen so far: [T, K]."""
        i = self.chosen_input
        return self.input_in(i, self.input_bias[i][None])[0]

    def shift(self) -> Tensor:
        """k of the chosen input format: [K]; zeros where there is none."""
        if not self.options.input_formats or self.options.shift == "none":
            return torch.zeros_like(self.peaks)
        i = self.chosen_input
        return channel_shift(self.options.input_formats[i], self.peaks, self.input_bias[i])

    def search_weight_bias(self) -> None:
        """The best candidate of each output channel, in every format."""
        x = self.inputs()
        for i, fmt in enumerate(self.options.weight_formats):
            biases = self.weight_candidates[i]
            found = []
            for part in _parts(biases, self.w.numel() + self.y.numel()):
                w = fmt.quantize(self.w, part[..., None])  # [c, N, K]
                found.append((x @ w.mT - self.y).square().sum(1))  # [c, N]
            best = torch.cat(found).argmin(0, keepdim=True)
            self.weight_bias[i] = biases.gather(0, best)[0]

    def search_input_bias(self) -> None:
        """The best candidate of the whole input, in every format."""
        w = self.weight_in(self.chosen_weight)
        for i, biases in enumerate(self.input_candidates):
            found = []
            for part in _parts(biases, self.x.numel() + self.y.numel()):
                y = self.input_in(i, part) @ w.T  # [c, T, N]
                found.append((y - self.y).square().sum((1, 2)))
            self.input_bias[i] = biases[torch.cat(found).argmin()]

    def weight_format_errors(self) -> Tensor:
        """The error in every weight format: [formats]."""
        x = self.inputs()
        weights = [self.weight_in(i) for i in range(len(self.options.weight_formats))]
        return torch.stack([(x @ w.T - self.y).square().sum() for w in weights])

    def input_format_errors(self) -> Tensor:
        """The error in every input format: [formats]."""
        w = self.weight_in(self.chosen_weight)
        inputs = [self.input_in(i, b[None])[0] for i, b in enumerate(self.input_bias)]
        return torch.stack([(x @ w.T - self.y).square().sum() for x in inputs])

    def error(self) -> Tensor:
        """||Y - Y^||^2 as things stand."""
        return (self.inputs() @ self.weight_in(self.chosen_weight).T - self.y).square().sum()


def _parts(candidates: Tensor, size: int) -> Iterator[Tensor]:
    """Candidates in batches that stay small. size: numbers that one candidate takes."""
    yield from candidates.split(max(1, CHUNK // max(size, 1)))


def _least(errors: list[Tensor]) -> int:
    """Index of the format whose errors add up to the least over all matrices."""
    return int(torch.stack(errors).sum(0).argmin())


def _check(weight: Tensor, rows: Sequence[Tensor]) -> None:
    if weight.dim() != 3 or len(rows) != len(weight):
        raise ValueError(
            f"weight must be [E, N, K] with rows for each of E, got {list(weight.shape)} and "
            f"rows for {len(rows)}"
        )
    for e, x in enumerate(rows):
        if x.dim() != 2 or x.shape[1] != weight.shape[2] or not len(x):
            raise ValueError(
                f"rows of matrix {e} must be [T >= 1, {weight.shape[2]}], got {list(x.shape)}"
            )
        if not math.isfinite(float(x.abs().amax())):
            raise ValueError(f"rows of matrix {e} hold a number that is not finite")
