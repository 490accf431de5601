"""The search of LLM-FP4 (arXiv:2310.16836; precision.md 13.1) for formats and real biases.

It minimises ||Y - Y^||^2 of a layer's outputs on calibration rows: three rounds, each over the
weight bias of every output channel in every format, the input bias in every format, the weight
format, the input format. Pre-shift: input channel j is quantised with the bias rho + k_j, k_j an
integer, so at run time the input has one scale, and 2^-k_j goes into column j of the weight.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from layers.posttraining.candidates import (
    GAMMAS,
    SCALINGS,
    MatrixSearch,
    SearchOptions,
    parts_of,
)
from layers.posttraining.real_bias import SmallFloat


class Found(NamedTuple):
    """What the search chose for one leaf of E matrices (one for a dense layer)."""

    weight: Tensor  # [E, N, K] quantised, before any shift is folded in
    weight_format: SmallFloat
    weight_bias: Tensor  # [E, N]
    input_format: SmallFloat | None
    input_bias: Tensor  # [E], the bias rho of the whole input; of no meaning without a format
    shift: Tensor  # [E, K] integers k_j >= 0, in the weight's dtype
    error: float  # sum ||Y - Y^||^2 / sum ||Y||^2 over all E


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
    layers = [MatrixSearch(w, x, options) for w, x in zip(weight, rows, strict=True)]
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


def search_rows(weight: Tensor, options: SearchOptions) -> tuple[Tensor, SmallFloat, Tensor]:
    """The same for a table, which multiplies nothing: the least error of each row itself.

    Args:
        weight: [M, D].
        options: `weight_formats` and `scaling` are read.

    Returns:
        The quantised table, its format, the biases [M].
    """
    gamma = torch.linspace(*GAMMAS, dtype=weight.dtype, device=weight.device)
    found = []
    for fmt in options.weight_formats:
        biases = SCALINGS[options.scaling](fmt, weight.abs().amax(1), gamma[:, None])  # [C, M]
        errors = [
            (fmt.quantize(weight, part[..., None]) - weight).square().sum(-1)
            for part in parts_of(biases, weight.numel())
        ]
        bias = biases.gather(0, torch.cat(errors).argmin(0, keepdim=True))[0]
        found.append((fmt.quantize(weight, bias[:, None]), fmt, bias))
    return min(found, key=lambda one: float((one[0] - weight).square().sum()))


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
