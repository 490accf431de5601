"""One matrix of LLM-FP4's search: its candidates, and the error of the output for each of them.

arXiv:2310.16836; precision.md 13.1. The order of the steps is `search`'s.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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


class MatrixSearch:
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
            for part in parts_of(biases, self.w.numel() + self.y.numel()):
                w = fmt.quantize(self.w, part[..., None])  # [c, N, K]
                found.append((x @ w.mT - self.y).square().sum(1))  # [c, N]
            best = torch.cat(found).argmin(0, keepdim=True)
            self.weight_bias[i] = biases.gather(0, best)[0]

    def search_input_bias(self) -> None:
        """The best candidate of the whole input, in every format."""
        w = self.weight_in(self.chosen_weight)
        for i, biases in enumerate(self.input_candidates):
            found = []
            for part in parts_of(biases, self.x.numel() + self.y.numel()):
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


def parts_of(candidates: Tensor, size: int) -> Iterator[Tensor]:
    """Candidates in batches that stay small. size: numbers that one candidate takes."""
    yield from candidates.split(max(1, CHUNK // max(size, 1)))
