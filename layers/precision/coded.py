"""An operand of a matmul as codes are made of it: elements and block scales apart."""

from typing import NamedTuple

import torch
from torch import Tensor

from layers.precision.define import blocks_of, define_parts
from layers.precision.formats import resolve
from layers.precision.hadamard import rotate, signs_of, spread_rows
from layers.precision.random import uniform
from layers.precision.spec import QSpec


class Coded(NamedTuple):
    """One operand, its elements and block scales apart."""

    elements: Tensor  # [R, C] or [E, R, C] float32, on the grid
    blocks: Tensor | None  # as elements: the scale of each one's block; None: there are none
    scale: Tensor | None  # float32, as `Quantized.scale`
    ends: Tensor | None  # [E], where rotation added rows to segments
    spec: QSpec
    axis: int
    dtype: torch.dtype  # of the product


def encode(
    x: Tensor, spec: QSpec | str, *, axis: int, dtype: torch.dtype, ends: Tensor | None = None,
    key: Tensor | None = None, operand: int = 0, scale: Tensor | None = None,
) -> Coded:  # fmt: skip
    """`quantize`, whose arguments these are, for formats of blocks or of one scale above them.

    Raises:
        ValueError: for a format that is a cast; without a key or scale where one is needed.
    """
    spec = QSpec.of(spec)
    r, x, moved = resolve(spec), x.detach().float(), None
    if r.row.grid is None:
        raise ValueError(f"{spec.format} has no elements apart from scales")
    if (spec.is_random and key is None) or (r.given_scale and scale is None):
        raise ValueError(f"{spec.format} so written needs its leaf's key and scale")
    if spec.hadamard:
        signs = signs_of(spec.hadamard, spec.signs, key, operand // 2, x.device)
        if axis == -2 and ends is not None:
            x, moved = spread_rows(x, ends.to(torch.int64), spec.hadamard)
            ends = moved
        x = rotate(x, spec.hadamard, signs, axis)
    noise = None
    if spec.rounding != "nearest":
        assert key is not None
        noise = uniform(key, operand, x.shape)
    (elements, blocks), above = define_parts(x, r, blocks_of(r, axis), axis, ends, noise, scale)
    if above is not None and x.dim() == 2 and ends is None:
        above = above.squeeze(0)
    return Coded(elements, blocks, above, moved, spec, axis, dtype)


class Lanes(NamedTuple):
    """One operand of one product, turned so that it is summed along its rows."""

    elements: Tensor  # [R, K] float32, on the grid
    blocks: Tensor | None  # [R, K], the scale of each element's block
    scale: Tensor | None  # [] or [R, 1] float32
    spec: QSpec


def lanes_of(c: Coded, expert: int = 0, begin: int = 0, end: int | None = None) -> Lanes:
    """All of an operand, or one expert's: its matrix of a stack, or its rows from begin to end."""

    def part(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        t = t[expert] if t.dim() == 3 else t[begin:end]
        return t if c.axis == -1 else t.mT

    scale = c.scale
    if scale is not None and scale.dim() == 1:
        scale = scale[expert]
    elif scale is not None and scale.dim() > 1:
        by_expert = scale.dim() == 3
        scale = scale[expert] if by_expert else scale[begin:end] if c.axis == -1 else scale
        scale = scale if c.axis == -1 else scale.mT
    elements = part(c.elements)
    assert elements is not None
    return Lanes(elements, part(c.blocks), scale, c.spec)
