"""Where blocks lie: rows, columns, square tiles, and segments of rows that no block crosses."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.precision.encoding import Encoded
from layers.precision.grids import SIZE

# (blocks as a view, axes inside a block, upper scale or None, noise or None) -> what they become
Encode = Callable[[Tensor, tuple[int, ...], Tensor | None, Tensor | None], Encoded]


class Blocks(NamedTuple):
    """The shape of one block: 1 x b along rows, b x 1 along columns, b x b as a tile."""

    rows: int
    cols: int


class Cut(NamedTuple):
    """A tensor cut into blocks."""

    blocks: Tensor  # [S, R', C', b], [S, R', b, C'] or [S, R', b, C', b]
    dims: tuple[int, ...]  # the axes inside a block
    shape: tuple[int, int, int]  # [S, R, C] with whole blocks


def cut(x: Tensor, shape: Blocks) -> Cut:
    """x: [S, R, C]. A short last block sees zeros; none crosses a leading index or a row end."""
    s, r, c = x.shape
    pad_r, pad_c = -r % shape.rows, -c % shape.cols
    padded = F.pad(x, (0, pad_c, 0, pad_r)) if pad_r or pad_c else x
    nr, nc = (r + pad_r) // shape.rows, (c + pad_c) // shape.cols
    whole = (s, r + pad_r, c + pad_c)
    if shape.rows == 1:
        return Cut(padded.reshape(s, nr, nc, shape.cols), (-1,), whole)
    if shape.cols == 1:
        return Cut(padded.reshape(s, nr, shape.rows, nc), (-2,), whole)
    return Cut(padded.reshape(s, nr, shape.rows, nc, shape.cols), (-3, -1), whole)


def encode_blocks(
    x: Tensor, shape: Blocks, encode: Encode, upper: Tensor | None, noise: Tensor | None
) -> Encoded:
    """Cut x into blocks, encode them, put them together again.

    Args:
        x: [S, R, C] float32.
        shape: of one block.
        encode: what to do with the blocks.
        upper: [S, r, c], r being 1 or the rows of blocks, c being 1 or (blocks of columns) C.
        noise: as x, or None.

    Returns:
        Elements and scales, both [S, R, C] (a scale is a view that repeats, or None).
    """
    _, r, c = x.shape
    blocks, dims, whole = cut(x, shape)
    if upper is not None:
        upper = upper.unsqueeze(2)
        upper = upper.unsqueeze(3) if blocks.dim() == 5 else upper
    out = encode(blocks, dims, upper, None if noise is None else cut(noise, shape).blocks)

    def joined(part: Tensor) -> Tensor:
        return part.reshape(whole)[:, :r, :c]

    scale = None if out.scale is None else joined(out.scale.expand(blocks.shape))
    return Encoded(joined(out.elements), scale)


def segments_of(ends: Tensor, n_rows: int) -> Tensor:
    """The segment of each row, [R] int64; E for rows past the last end. ends: [E] int64."""
    row = torch.arange(n_rows, device=ends.device)
    return torch.searchsorted(ends, row, right=True)


def segment_peaks(x: Tensor, segment: Tensor, n_segments: int, by_column: bool) -> Tensor:
    """Largest magnitude of each segment of rows, NaN where it holds one, 0 where it is empty.

    Args:
        x: [R, C] float32.
        segment: [R] int64, below n_segments.
        n_segments: how many.
        by_column: one peak for each column instead of one for all.

    Returns:
        [n_segments, C] or [n_segments, 1] float32.
    """
    # as integers, which order like magnitudes and put NaN on top
    bits = x.view(torch.int32) & SIZE
    bits = bits if by_column else bits.amax(-1, keepdim=True)
    peaks = bits.new_zeros(n_segments, bits.shape[1])
    index = segment[:, None].expand_as(bits)
    return peaks.scatter_reduce(0, index, bits, "amax").view(torch.float32)


def encode_segments(
    x: Tensor, shape: Blocks, encode: Encode, ends: Tensor, upper: Tensor | None,
    noise: Tensor | None,
) -> Encoded:  # fmt: skip
    """`encode_blocks` for rows sorted by segment; rows past the last end are one segment more.

    Args:
        x: [R, C] float32.
        shape: of one block.
        encode: what to do with the blocks.
        ends: [E] int64, inclusive cumulative row counts; segments may be empty.
        upper: [R, c], the scale of each row (and column), or None.
        noise: as x, or None.

    Returns:
        Elements and scales, [R, C].
    """
    batched = (None if t is None else t[None] for t in (upper, noise))
    if shape.rows == 1:
        return _first(encode_blocks(x[None], shape, encode, *batched))
    n_rows, b = x.shape[0], shape.rows
    segment = segments_of(ends, n_rows)
    begins = F.pad(ends, (1, 0))  # [E + 1]
    lengths = F.pad(ends, (0, 1), value=n_rows) - begins
    blocks_before = (lengths + (b - 1)).div(b, rounding_mode="floor").cumsum(0)
    blocks_before = F.pad(blocks_before[:-1], (1, 0))
    target = (blocks_before * b - begins)[segment] + torch.arange(n_rows, device=x.device)
    most = n_rows // b + ends.shape[0] + 1  # blocks of rows, whatever the lengths: a static bound

    def spread(rows: Tensor) -> Tensor:
        return rows.new_zeros(most * b, rows.shape[1]).index_copy(0, target, rows)[None]

    if upper is not None:  # every used block of rows begins with a real row
        ones = upper.new_ones(most * b, upper.shape[1]).index_copy(0, target, upper)
        upper = ones.unflatten(0, (most, b))[None, :, 0]
    noise = None if noise is None else spread(noise)
    out = _first(encode_blocks(spread(x), shape, encode, upper, noise))
    return Encoded(*(None if t is None else t.index_select(0, target) for t in out))  # pyright: ignore


def _first(out: Encoded) -> Encoded:
    return Encoded(out.elements[0], None if out.scale is None else out.scale[0])
