"""Rotary positions (arXiv:2104.09864): pairs of numbers of a head turned by the angle of its place.

Heads: H of them, h numbers each.
"""

from typing import Any

import torch
from torch import Tensor


def rope_tables(
    start: int, length: int, d_head: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles p * base^(-2i / h), [length, h / 2] float32 each.

    Made anew in each forward, 0.1 ms: a buffer would be cast by `model.to(bfloat16)`.
    """
    powers = torch.arange(0, d_head, 2, device=device, dtype=torch.float32) / d_head
    positions = torch.arange(start, start + length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, base**-powers)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn coordinates i and i + h/2 of each head by the angle of its position.

    x: [B, H, S, h]; cos, sin: [S, h / 2]. Returns [B, H, S, h], in the dtype of x.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if torch.compiler.is_compiling():  # fused there, and writing into halves is refused
        x1, x2 = x.chunk(2, -1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """Four passes over half the numbers, forward and backward; plain autograd takes fifteen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x: [B, H, S, h]; sign -1 turns back."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    (x1, x2), (y1, y2) = x.chunk(2, -1), y.chunk(2, -1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
    return y
