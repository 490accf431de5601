"""NVFP4 and its kin: small elements, a one-byte scale for each block, one float32 scale above."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layers.precision.encoding import Encoded, Upper, block_sum, per_block, upper_of
from layers.precision.grids import E4M3, FLOAT_MAX, UE5M3, Grid, to_grid, without_negative_zero

Measure = Callable[[Tensor, tuple[int, ...]], Tensor]  # errors of a block -> how bad it is


def _squares(error: Tensor, dims: tuple[int, ...]) -> Tensor:
    return block_sum(error * error, dims)


def _sizes(error: Tensor, dims: tuple[int, ...]) -> Tensor:
    return block_sum(error.abs(), dims)


def _largest(error: Tensor, dims: tuple[int, ...]) -> Tensor:
    return error.abs().amax(dims, keepdim=True)


MEASURES: dict[str, Measure] = {"mse": _squares, "mae": _sizes, "abs_max": _largest}


@dataclass(frozen=True, kw_only=True)
class ScaleRule:
    """How scales of two levels are chosen."""

    reach: float = 1.0  # a block's largest magnitude goes to this times the grid's largest
    most: float  # the scale of the tensor's largest block
    scales: Grid = E4M3
    measure: str = ""  # 4over6: how two candidates are compared


NVFP4_RULES = {
    "max": ScaleRule(most=448.0),
    # RNE leaves a scale low by up to 1/17, and then the largest magnitude just fits
    "unbiased": ScaleRule(reach=16 / 17, most=448.0),
    "4over6": ScaleRule(most=256.0, measure="mse"),
    "4over6_mae": ScaleRule(most=256.0, measure="mae"),
    "4over6_max": ScaleRule(most=256.0, measure="abs_max"),
    # arXiv:2601.22813: clipping a little costs nothing where the scale makes up for it
    "eden": ScaleRule(reach=16 / 17 / 0.93, most=255.99),
}
_RESERVED = Grid(name="ue5m3r", exponent_bits=5, mantissa_bits=3, bias=15, largest=61440.0)
UE5M3_RULES = {
    "max": ScaleRule(most=UE5M3.largest, scales=UE5M3),
    "unbiased": ScaleRule(reach=16 / 17, most=UE5M3.largest, scales=UE5M3),
    "max61440": ScaleRule(most=_RESERVED.largest, scales=_RESERVED),
}


def encode_nvfp4(
    x: Tensor, dims: tuple[int, ...], grid: Grid, rule: str, upper: Tensor | None,
    noise: Tensor | None,
) -> Encoded:  # fmt: skip
    """NVFP4 (arXiv:2509.25149, appendix B), float32 in TransformerEngine's order of operations.

    E4M3 scale per block (subnormal ones too) under one float32 scale, which stays out of the
    result. A block whose scale rounds to zero decodes to zero. -0.0 becomes +0.0. A block with a
    NaN becomes NaN; what infinities and NaN do to the float32 scale says `upper_nvfp4`.

    Args:
        x: float32, blocks as a view of any shape.
        dims: the axes that lie inside a block.
        grid: of the elements.
        rule: a key of `NVFP4_RULES`. "max": the block's largest magnitude goes to the grid's
            largest value. "unbiased": to 16/17 of it, so that stochastic rounding never clips
            while scales are normal. "4over6" (arXiv:2512.02010): to 6 or to 4, whichever has the
            smaller sum of squared errors, 6 on a tie; "_mae", "_max": absolute errors, largest
            error. "eden": what rounding "eden" scales by.
        upper: s_enc of the tensor, segment or row, broadcastable to x; None: 1.
        noise: [as x] in (0, 1), for stochastic rounding; None: nearest.
    """
    return _encode(NVFP4_RULES[rule], x, dims, grid, upper, noise)


def encode_ue5m3(
    x: Tensor, dims: tuple[int, ...], grid: Grid, rule: str, upper: Tensor | None,
    noise: Tensor | None,
) -> Encoded:  # fmt: skip
    """NVFP4 with scales in UE5M3 (arXiv:2509.17791; precision.md section 2), else `encode_nvfp4`.

    rule: a key of `UE5M3_RULES`: "max" up to 114688, only one code being NaN; "max61440" with the
    top exponent reserved; "unbiased" as there.
    """
    return _encode(UE5M3_RULES[rule], x, dims, grid, upper, noise)


def upper_nvfp4(peak: Tensor, grid: Grid, rule: str) -> Upper:
    """The largest magnitude goes to the largest element under the largest scale, 6 * 448.

    A tensor of zeros decodes by zero; an infinity or NaN makes the scale infinite or NaN, so that
    no value of the tensor looks finite once multiplied.
    """
    return _upper(NVFP4_RULES[rule], peak, grid)


def upper_ue5m3(peak: Tensor, grid: Grid, rule: str) -> Upper:
    """As `upper_nvfp4`, with the largest UE5M3 scale."""
    return _upper(UE5M3_RULES[rule], peak, grid)


def _upper(how: ScaleRule, peak: Tensor, grid: Grid) -> Upper:
    return upper_of(peak, how.most * (grid.largest * how.reach))


def raw_scale(
    how: ScaleRule, x: Tensor, dims: tuple[int, ...], grid: Grid, upper: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What a block's scale is before its rounding, and the scale above it (1 where none is)."""
    peak = x.abs().amax(dims, keepdim=True)
    upper = torch.ones_like(peak) if upper is None else upper
    return peak * (upper * (1.0 / (grid.largest * how.reach))), upper


def scaled_by(
    how: ScaleRule, x: Tensor, raw: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The scale of each block on its grid, NaN kept; and the numbers to round, below it."""
    scale = per_block(torch.where(raw.isnan(), raw, to_grid(raw, how.scales)))
    y = x * per_block((1.0 / (scale * (1.0 / upper))).clamp(max=FLOAT_MAX))
    return scale, without_negative_zero(y)


def _encode(
    how: ScaleRule, x: Tensor, dims: tuple[int, ...], grid: Grid, upper: Tensor | None,
    noise: Tensor | None,
) -> Encoded:  # fmt: skip
    raw, upper = raw_scale(how, x, dims, grid, upper)
    six, y = scaled_by(how, x, raw, upper)
    elements = to_grid(y, grid, noise)
    if not how.measure:
        return Encoded(elements, six)
    four, y = scaled_by(how, x, raw * 1.5, upper)
    others = to_grid(y, grid, noise)
    target, bad = x * upper, MEASURES[how.measure]
    worse = bad(target - elements * six, dims)
    four_is_better = per_block(bad(target - others * four, dims) < worse)
    return Encoded(
        torch.where(four_is_better, others, elements), torch.where(four_is_better, four, six)
    )
