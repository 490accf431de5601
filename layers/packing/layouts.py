"""Packed weights in the byte orders of others, and back; each pair is exact (precision.md 15)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.packing.storage import Storage
from layers.packing.weight import Packed
from layers.precision.grids import E1M2, E2M1

MXFP4 = Storage(grid=E2M1, scale="e8m0", block=32)
NVFP4 = Storage(grid=E2M1, scale="ue4m3", block=16)
HIF4 = Storage(grid=E1M2, scale="hif4", block=64)


def to_gpt_oss(packed: Packed) -> tuple[Tensor, Tensor]:
    """MXFP4 as gpt-oss checkpoints hold it; the low nibble is the even index there too.

    Returns:
        blocks [..., N, groups, 16] uint8 and scales [..., N, groups] uint8, groups of 32.

    Raises:
        ValueError: another format, or rows that are no whole number of groups.
    """
    _check(packed, MXFP4, 32)
    return packed.codes.unflatten(-1, (-1, 16)), packed.scales


def from_gpt_oss(blocks: Tensor, scales: Tensor) -> Packed:
    """What `to_gpt_oss` returned, or a checkpoint's tensors. Raises ValueError on other shapes."""
    if blocks.shape[-1] != 16 or blocks.shape[:-1] != scales.shape:
        raise ValueError(
            f"blocks must be [..., N, groups, 16] and scales [..., N, groups], "
            f"got {list(blocks.shape)} and {list(scales.shape)}"
        )
    codes = blocks.flatten(-2).contiguous()
    return Packed(codes, scales.contiguous(), None, MXFP4, 2 * codes.shape[-1])


def to_gguf_mxfp4(packed: Packed) -> Tensor:
    """MXFP4 as ggml's block_mxfp4, 17 bytes for 32: the scale, then value j low, j + 16 high.

    Returns [..., N, 17 groups] uint8. Raises ValueError as `to_gpt_oss`.
    """
    _check(packed, MXFP4, 32)
    blocks = _halves(packed.codes, 16)
    return torch.cat((packed.scales[..., None], blocks), -1).flatten(-2)


def from_gguf_mxfp4(data: Tensor) -> Packed:
    """What `to_gguf_mxfp4` returned. data: [..., N, 17 groups] uint8."""
    blocks = _cut(data, 17)
    codes = _pairs(blocks[..., 1:])
    return Packed(codes, blocks[..., 0].contiguous(), None, MXFP4, 2 * codes.shape[-1])


def to_gguf_nvfp4(packed: Packed) -> Tensor:
    """NVFP4 as ggml's block_nvfp4, 36 bytes for 64: four scales, then value j low, j + 8 high.

    The layout has no place for the tensor scale: keep `packed.tensor_scale` beside it.

    Returns:
        [..., N, 36 K / 64] uint8.

    Raises:
        ValueError: another format, rows that are no multiple of 64, or a scale that is NaN, which
            ggml reads as zero.
    """
    _check(packed, NVFP4, 64)
    if bool((packed.scales == 0x7F).any()):
        raise ValueError("ggml reads an NVFP4 scale of NaN as 0: the weight holds one")
    values = _halves(packed.codes, 8).unflatten(-2, (-1, 4)).flatten(-2)  # [..., K / 64, 32]
    return torch.cat((packed.scales.unflatten(-1, (-1, 4)), values), -1).flatten(-2)


def from_gguf_nvfp4(data: Tensor, tensor_scale: Tensor | None = None) -> Packed:
    """What `to_gguf_nvfp4` returned. data: [..., N, 36 K / 64] uint8; tensor_scale: None is 1."""
    blocks = _cut(data, 36)
    codes = _pairs(blocks[..., 4:].unflatten(-1, (4, 8)).flatten(-3, -2))
    scales = blocks[..., :4].flatten(-2)
    if tensor_scale is None:
        tensor_scale = torch.ones(codes.shape[:-2])
    return Packed(codes, scales.contiguous(), tensor_scale, NVFP4, 2 * codes.shape[-1])


def to_hif4_units(packed: Packed) -> Tensor:
    """HiF4 as units of 36 bytes for 64: E6M2, E1_8, E1_16 in two, 32 of elements.

    Returns [..., N, units, 36] uint8. Raises ValueError for another format or ragged rows.
    """
    _check(packed, HIF4, 64)
    units = packed.scales.unflatten(-1, (-1, 4)), packed.codes.unflatten(-1, (-1, 32))
    return torch.cat(units, -1)


def from_hif4_units(units: Tensor) -> Packed:
    """What `to_hif4_units` returned. units: [..., N, units, 36] uint8."""
    units = _cut(units.flatten(-2), 36)
    codes = units[..., 4:].flatten(-2)
    scales = units[..., :4].flatten(-2)
    return Packed(codes.contiguous(), scales.contiguous(), None, HIF4, 2 * codes.shape[-1])


def to_blackwell_scales(scales: Tensor) -> Tensor:
    """Block scales in the tiles that Blackwell's matmuls read: 128 rows by 4 columns each.

    scales: [R, C], of one byte. Returns them flat, padded with zeros to whole tiles.
    """
    rows, columns = scales.shape
    padded = F.pad(scales, (0, -columns % 4, 0, -rows % 128))
    tiles = padded.unflatten(0, (-1, 4, 32)).unflatten(-1, (-1, 4))  # [tile, 4, 32, tile, 4]
    return tiles.permute(0, 3, 2, 1, 4).flatten()


def from_blackwell_scales(flat: Tensor, rows: int, columns: int) -> Tensor:
    """What `to_blackwell_scales` returned, [rows, columns]. Raises ValueError on another size."""
    down, across = -(-rows // 128), -(-columns // 4)
    if flat.numel() != 512 * down * across:
        raise ValueError(
            f"scales of {rows} x {columns} fill {512 * down * across} bytes, got {flat.numel()}"
        )
    tiles = flat.view(down, across, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down * 128, across * 4)[:rows, :columns]


def _check(packed: Packed, storage: Storage, multiple: int) -> None:
    if packed.storage != storage:
        raise ValueError(f"this layout holds {storage}, got {packed.storage}")
    if packed.width % multiple:
        raise ValueError(f"this layout needs rows of a multiple of {multiple}, got {packed.width}")


def _cut(data: Tensor, size: int) -> Tensor:
    if data.dtype != torch.uint8 or data.shape[-1] % size:
        raise ValueError(
            f"rows must be uint8, {size} to a block, got {data.dtype} {list(data.shape)}"
        )
    return data.unflatten(-1, (-1, size))


def _halves(codes: Tensor, size: int) -> Tensor:
    """Bytes of neighbours to [..., groups, size] bytes of one half over the other."""
    low, high = codes & 15, codes >> 4
    values = torch.stack((low, high), -1).flatten(-2).unflatten(-1, (-1, 2, size))
    return values[..., 0, :] | (values[..., 1, :] << 4)


def _pairs(blocks: Tensor) -> Tensor:
    """What `_halves` was given. blocks: [..., groups, size]."""
    values = torch.cat((blocks & 15, blocks >> 4), -1).flatten(-2).unflatten(-1, (-1, 2))
    return values[..., 0] | (values[..., 1] << 4)
