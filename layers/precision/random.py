"""Random numbers as a pure function of (key, operand, element): no generator, no state.

A leaf's key comes from (seed, step, micro-batch, module); so a recomputed forward and a resumed run
draw the same bits, and the global generator is never touched. The hash works on 32-bit numbers in
int64, where no product overflows: the same bits in eager and compiled torch and in kernels.cpp.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9
SIGNS_OF_GEMM = 64  # operand numbers from here on are streams of signs, one for each matmul


def _mix(h: Tensor) -> Tensor:
    """A bijection of 32 bits in which every bit of h moves every bit of the result."""
    h = h ^ (h >> 16)
    h = (h * 0x21F0AAAD) & MASK
    h = h ^ (h >> 15)
    h = (h * 0x735A2D97) & MASK
    return h ^ (h >> 15)


def hashed(key: Tensor, operand: int, index: Tensor) -> Tensor:
    """32 random bits for each index of a stream, as int64.

    Args:
        key: [] int64, of the leaf and the step.
        operand: which stream of that key.
        index: int64, any shape; only its low 32 bits are read.
    """
    low = _mix(((key & MASK) + operand * GOLDEN) & MASK)
    high = _mix(((key >> 32) & MASK) ^ low)
    return _mix(_mix(((index & MASK) + low) & MASK) ^ high)


def uniform(key: Tensor, operand: int, shape: torch.Size) -> Tensor:
    """Odd multiples of 2^-17 between 0 and 1: [*shape] float32, element i from index i.

    Sixteen bits, centred, so that stochastic rounding has no bias (precision.md section 8), and
    few enough that adding one to a whole number never rounds up.
    """
    index = torch.arange(shape.numel(), device=key.device).view(shape)
    return ((hashed(key, operand, index) >> 16) * 2 + 1).to(torch.float32) * 2.0**-17


def mixed(*numbers: int) -> int:
    """A signed 64-bit key from whole numbers, unlike that of their neighbours (splitmix64)."""
    state, bits = 0, 2**64 - 1
    for number in numbers:
        state = (state + (number + 1) * 0x9E3779B97F4A7C15) & bits
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & bits
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & bits
        state ^= state >> 31
    return state - 2**64 if state >> 63 else state
