"""Where blocks lie: rows, columns, square tiles, and segments of rows that no block crosses."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.precision.blocks import SIZE

# (blocks as a view, axes inside a block, tensor peak or None) -> decoded values
Encode = Callable[[Tensor, tuple[int, ...], Tensor | None], Tensor]


class Blocks(NamedTuple):
    """The shape of one block: 1 x b along rows, b x 1 along columns, b x b as a tile."""

    rows: int
    cols: int


def encode_blocks(x: Tensor, shape: Blocks, encode: Encode, tensor_peak: Tensor | None) -> Tensor:
    """Cut x into blocks, encode them, put them together again. A short last block sees zeros.

    Args:
        x: [S, R, C] float32. No block crosses a leading index or a row end.
        shape: of one block.
        encode: what to do with the blocks.
        tensor_peak: [S, 1], or [S, r] with one number for each row of blocks; or None.

    Returns:
        [S, R, C] float32.
    """
    s, r, c = x.shape
    pad_r, pad_c = -r % shape.rows, -c % shape.cols
    padded = F.pad(x, (0, pad_c, 0, pad_r)) if pad_r or pad_c else x
    nr, nc = (r + pad_r) // shape.rows, (c + pad_c) // shape.cols
    if shape.rows == 1:
        blocks, dims = padded.reshape(s, nr, nc, shape.cols), (-1,)
    elif shape.cols == 1:
        blocks, dims = padded.reshape(s, nr, shape.rows, nc), (-2,)
    else:
        blocks, dims = padded.reshape(s, nr, shape.rows, nc, shape.cols), (-3, -1)
    if tensor_peak is not None:
        tensor_peak = tensor_peak.reshape(s, -1, *[1] * (blocks.dim() - 2))
    out = encode(blocks, dims, tensor_peak).reshape(s, r + pad_r, c + pad_c)
    return out[:, :r, :c] if pad_r or pad_c else out


def segment_peaks(x: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitude of each segment of rows.

    Args:
        x: [R, C] float32.
        ends: [E] int64, inclusive cumulative row counts.

    Returns:
        peaks [E + 1] float32, the last one of the rows past the last end; 0 for an empty segment,
        NaN where the segment holds one. And segment [R] int64, the segment of each row.
    """
    row = torch.arange(x.shape[0], device=x.device)
    segment = torch.searchsorted(ends, row, right=True)
    # as integers, which order like magnitudes and put NaN on top
    row_peaks = (x.view(torch.int32) & SIZE).amax(-1)
    peaks = row_peaks.new_zeros(ends.shape[0] + 1).scatter_reduce(0, segment, row_peaks, "amax")
    return peaks.view(torch.float32), segment


def encode_segments(
    x: Tensor, shape: Blocks, encode: Encode, ends: Tensor, with_peaks: bool
) -> tuple[Tensor, Tensor | None]:
    """`encode_blocks` for rows sorted by segment; rows past the last end are one segment more.

    Args:
        x: [R, C] float32.
        shape: of one block.
        encode: what to do with the blocks.
        ends: [E] int64, inclusive cumulative row counts; segments may be empty.
        with_peaks: whether `encode` wants the segment's largest magnitude.

    Returns:
        [R, C] float32, and the peaks [E] or None.
    """
    peaks, segment = segment_peaks(x, ends)
    row_peak = peaks[segment][None] if with_peaks else None  # [1, R]
    kept = peaks[:-1] if with_peaks else None
    if shape.rows == 1:
        return encode_blocks(x[None], shape, encode, row_peak)[0], kept
    n_rows, b = x.shape[0], shape.rows
    begins = F.pad(ends, (1, 0))  # [E + 1]
    lengths = F.pad(ends, (0, 1), value=n_rows) - begins
    blocks_before = (lengths + (b - 1)).div(b, rounding_mode="floor").cumsum(0)
    blocks_before = F.pad(blocks_before[:-1], (1, 0))
    target = (blocks_before * b - begins)[segment] + torch.arange(n_rows, device=x.device)
    most = n_rows // b + ends.shape[0] + 1  # blocks of rows, whatever the lengths: a static bound
    spread = x.new_zeros(most * b, x.shape[1]).index_copy(0, target, x)
    if row_peak is not None:  # every used block of rows begins with a real row
        row_peak = x.new_ones(most * b).index_copy(0, target, row_peak[0]).view(1, most, b)[..., 0]
    return encode_blocks(spread[None], shape, encode, row_peak)[0].index_select(0, target), kept
