"""What a format makes of a tensor, in torch ops: the bits that every kernel must give.

The layout cuts a tensor into blocks, the row's `encode` puts them on its grid, and the float32
scales above blocks come from the largest magnitude of a tensor, a segment or a row, or are given.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.precision.encoding import Encoded, Upper
from layers.precision.formats import Resolved
from layers.precision.layout import (
    Blocks,
    encode_blocks,
    encode_segments,
    segment_peaks,
    segments_of,
)


def blocks_of(r: Resolved, axis: int) -> Blocks:
    """The shape of the blocks of a spec, along the contracted axis (-1 or -2)."""
    block = r.row.block
    if r.spec.tile == "2d":
        return Blocks(block, block)
    return Blocks(1, block) if axis == -1 else Blocks(block, 1)


def define(
    x: Tensor, r: Resolved, blocks: Blocks, axis: int, ends: Tensor | None, noise: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The definition in torch ops: values, and the scale above the blocks or None.

    x: [R, C] or [E, R, C] float32; the rest as in `quantize`.
    """
    encoded, upper = define_parts(x, r, blocks, axis, ends, noise, scale)
    if encoded.scale is None:
        return encoded.elements, upper
    return encoded.elements * encoded.scale, upper


def define_parts(
    x: Tensor, r: Resolved, blocks: Blocks, axis: int, ends: Tensor | None, noise: Tensor | None,
    scale: Tensor | None,
) -> tuple[Encoded, Tensor | None]:  # fmt: skip
    """As `define`, elements and block scales apart: what packed storage and probes read."""
    if r.row.cast is not None:
        return Encoded(r.row.cast(x, r.rule, noise), None), None
    segments = x if x.dim() == 3 else x[None]
    if ends is not None:
        ends = ends.to(torch.int64)
    upper = _upper(segments, r, axis, ends, scale)
    per_row = None if upper is None else upper.encode
    if x.numel() == 0:
        return Encoded(x.clone(), None), None if upper is None else _returned(upper, r, axis, ends)

    def encode(
        view: Tensor, dims: tuple[int, ...], above: Tensor | None, noise: Tensor | None
    ) -> Encoded:
        assert r.row.encode is not None
        assert r.row.grid is not None
        if r.spec.rounding == "eden":
            assert r.row.eden is not None
            assert noise is not None
            return r.row.eden(view, dims, r.row.grid, above, noise, r.spec.hadamard)
        return r.row.encode(view, dims, r.row.grid, r.rule, above, noise)

    if ends is not None:
        if per_row is not None and not (r.scope == "row" and axis == -1):
            per_row = per_row[segments_of(ends, x.shape[0])]
        out = encode_segments(x, blocks, encode, ends, per_row, noise)
    else:
        if noise is not None and noise.dim() == 2:
            noise = noise[None]
        out = encode_blocks(segments, blocks, encode, per_row, noise)
        out = Encoded(*(None if t is None else t.reshape(x.shape) for t in out))  # pyright: ignore
    return out, None if upper is None else _returned(upper, r, axis, ends)


def _upper(
    x: Tensor, r: Resolved, axis: int, ends: Tensor | None, scale: Tensor | None
) -> Upper | None:
    """The float32 scales above the blocks; None where there are none.

    Without ends [S, r, c] broadcastable to x; with ends [E + 1, c], or [R, 1] by row.
    """
    if r.scope in ("", "block", "none"):
        return None
    assert r.row.upper is not None
    assert r.row.grid is not None
    if r.given_scale:
        assert scale is not None
        decode = scale.reshape(-1, 1, 1) if ends is None else F.pad(scale.reshape(-1, 1).expand(
            ends.shape[0], 1), (0, 0, 0, 1), value=1.0)  # fmt: skip
        return Upper(1.0 / decode, decode)
    if ends is None:
        axes = (axis,) if r.scope == "row" else (-2, -1)
        peaks = x.abs().amax(axes, keepdim=True) if x.numel() else x.new_zeros(len(x), 1, 1)
    elif r.scope == "row" and axis == -1:
        peaks = x[0].abs().amax(-1, keepdim=True)
    else:
        segment = segments_of(ends, x.shape[1])
        peaks = segment_peaks(x[0], segment, ends.shape[0] + 1, by_column=r.scope == "row")
    return r.row.upper(peaks, r.row.grid, r.rule)


def _returned(upper: Upper, r: Resolved, axis: int, ends: Tensor | None) -> Tensor:
    """The decoding scale in the shape that `quantize` promises."""
    decode = upper.decode
    if ends is None:
        if r.scope != "row":
            return decode.flatten()
        return decode
    if r.scope == "row":
        return decode if axis == -1 else decode[:-1, None]
    return decode[:-1].flatten()
