"""HiF4's unit (arXiv:2602.11287): 64 elements S1P2 under 32 bits of three levels of scale.

Metadata of a unit, four bytes: E6M2; E1_8, bit k doubles the k-th eight; E1_16 in two bytes, low
byte first, bit k doubles the k-th four. The paper does not say in which order the bits lie.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.packing.codes import decode_scales, encode_scales

UNIT, FOURS, EIGHTS = 64, 16, 8


def split_elements(elements: Tensor) -> tuple[Tensor, Tensor]:
    """Elements as k/4 times a power of two for each four, the powers as three levels hold them.

    Args:
        elements: [..., K] float32, value / E6M2: k/4 * 2^t, k in -7..7, t in 0..2 for each four.

    Returns:
        k/4 [..., K] float32, and metadata [..., units, 3] uint8: E1_8, E1_16 low, E1_16 high. Where
        several exponents say the same numbers, the smallest are taken.

    Raises:
        ValueError: elements that no exponents can say.
    """
    k = elements.shape[-1]
    fours = F.pad(elements, (0, -k % UNIT)).unflatten(-1, (-1, FOURS, 4))
    peak = fours.abs().amax(-1)  # [..., units, 16]; NaN compares false and gets exponent 0
    total = (peak > 1.75).to(torch.uint8) + (peak > 3.5).to(torch.uint8)
    coarse = (total.unflatten(-1, (EIGHTS, 2)).amax(-1) == 2).to(torch.uint8)  # [..., units, 8]
    fine = (total > coarse.repeat_interleave(2, -1)).to(torch.uint8)  # [..., units, 16]
    both = coarse.repeat_interleave(2, -1) + fine
    small = (fours / both.float().exp2()[..., None]).flatten(-3)[..., :k]
    return small, torch.cat((_bits(coarse), _bits(fine)), -1)


def encode_metadata(scale: Tensor, exponents: Tensor) -> Tensor:
    """scale: [..., units] float32 on E6M2; exponents: [..., units, 3]. Returns [..., 4 units]."""
    return torch.cat((encode_scales(scale, "e6m2")[..., None], exponents), -1).flatten(-2)


def decode_metadata(metadata: Tensor) -> Tensor:
    """What each four elements are multiplied by.

    metadata: [..., 4 units] uint8. Returns [..., 16 units] float32.
    """
    unit = metadata.unflatten(-1, (-1, 4))
    coarse = _unbits(unit[..., 1:2]).repeat_interleave(2, -1)  # [..., units, 16]
    power = (coarse + _unbits(unit[..., 2:])).float().exp2()
    return (decode_scales(unit[..., :1], "e6m2") * power).flatten(-2)


def _bits(flags: Tensor) -> Tensor:
    """[..., 8 n] of 0 and 1 to [..., n] bytes, bit k from flag k."""
    place = torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (flags.unflatten(-1, (-1, 8)) << place).sum(-1, dtype=torch.uint8)


def _unbits(packed: Tensor) -> Tensor:
    """What `_bits` packed."""
    place = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> place) & 1).flatten(-2)
