"""Random Hadamard rotation of tiles along the axis that a matmul sums over (precision.md 9).

For a tile v of length d: v' = (v * s) H_d / sqrt(d). Both operands of a product rotated alike give
the same product, since R R^T = I; outliers are spread over their tile before rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.precision.random import MASK, SIGNS_OF_GEMM, hashed

# TransformerEngine's fixed vector for tiles of 16 (arXiv:2509.25149)
NVIDIA_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
FIXED_KEY = 0x5EED  # other widths draw their fixed signs from this


def signs_of(d: int, kind: str, key: Tensor | None, gemm: int, device: torch.device) -> Tensor:
    """The signs s of one tile: [d] float32.

    Args:
        d: width of a tile.
        kind: "fixed" (d = 16: NVIDIA's), "step" (drawn from key and gemm), "none" (all 1).
        key: [] int64, read by "step": its low half, which all streams of a leaf and step share.
        gemm: 0 fprop, 1 dgrad, 2 wgrad: its two operands share their signs.
        device: where.
    """
    if kind == "none":
        return torch.ones(d, device=device)
    if kind == "fixed" and d == len(NVIDIA_SIGNS):
        return torch.tensor(NVIDIA_SIGNS, dtype=torch.float32, device=device)
    if kind == "fixed":
        key, gemm = torch.tensor(FIXED_KEY, device=device), 0
    assert key is not None
    bits = hashed(key & MASK, SIGNS_OF_GEMM + gemm, torch.arange(d, device=device)) >> 31
    return (1 - 2 * bits).to(torch.float32)


def _transform(tiles: Tensor, d: int) -> Tensor:
    """tiles: [..., d, c] float32. Sylvester's H_d along the axis before the last, over sqrt(d).

    Butterflies in rising width: the order of the additions is part of the definition.
    """
    shape, width = tiles.shape, 1
    while width < d:
        pairs = tiles.reshape(*shape[:-2], d // (2 * width), 2, width, shape[-1])
        a, b = pairs.unbind(-3)
        tiles = torch.stack((a + b, a - b), -3)
        width *= 2
    return tiles.reshape(shape) * d**-0.5


def _along(x: Tensor, axis: int, d: int) -> tuple[Tensor, int]:
    """x with `axis` (-1 or -2) padded to whole tiles, and that axis's length before."""
    size = x.shape[axis]
    pad = -size % d
    if pad:
        x = F.pad(x, (0, pad) if axis == -1 else (0, 0, 0, pad))
    return x, size


def rotate(x: Tensor, d: int, signs: Tensor, axis: int) -> Tensor:
    """Tiles of d along `axis`, rotated; a short last tile sees zeros and comes back whole.

    x: [..., R, C] float32; signs: [d]; axis: -1 or -2. Returns that axis rounded up to d.
    """
    x, _ = _along(x, axis, d)
    if axis == -1:
        tiles = (x.unflatten(-1, (-1, d)) * signs).unsqueeze(-1)
        return _transform(tiles, d).squeeze(-1).flatten(-2)
    tiles = x.unflatten(-2, (-1, d)) * signs[:, None]
    return _transform(tiles, d).flatten(-3, -2)


def unrotate(x: Tensor, d: int, signs: Tensor, size: int) -> Tensor:
    """What `rotate` along the last axis made of [..., size]. x: [..., C], C a multiple of d."""
    tiles = _transform(x.unflatten(-1, (-1, d)).unsqueeze(-1), d).squeeze(-1) * signs
    return tiles.flatten(-2)[..., :size]


def spread_rows(x: Tensor, ends: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Each segment of rows padded with zero rows to a multiple of d.

    Args:
        x: [R, C].
        ends: [E] int64, inclusive cumulative row counts; rows past the last end are left out.
        d: what a segment's rows are rounded up to.

    Returns:
        [R', C], with R' the same for every split of R rows into E segments, and the new ends [E].
    """
    n, e = x.shape[0], ends.shape[0]
    begins = F.pad(ends, (1, 0))[:-1]
    lengths = (ends - begins + (d - 1)).div(d, rounding_mode="floor") * d
    new_ends = lengths.cumsum(0)
    row = torch.arange(n, device=x.device)
    segment = torch.searchsorted(ends, row, right=True).clamp(max=e - 1)
    target = row + (new_ends - lengths - begins)[segment]
    most = (n // d + e) * d
    target = torch.where(row < ends[-1], target, most)  # one row more takes what is left out
    return x.new_zeros(most + 1, x.shape[1]).index_copy(0, target, x)[:most], new_ends
