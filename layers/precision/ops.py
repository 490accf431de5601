"""The native kernels as one torch operator, so that compiled graphs, modes and fakes see it.

`moe_zoo::quantize` takes CPU tensors only; every other device runs the definitions in torch ops.
"""

import torch
from torch import Tensor

from layers.precision import native
from layers.precision.grids import GRIDS

_library = torch.library.Library("moe_zoo", "DEF")
_library.define(
    "quantize(Tensor x, str grid, str rule, int block_rows, int block_cols, ScalarType dtype, "
    "Tensor? ends, bool fold) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _quantize(
    x: Tensor, grid: str, rule: str, block_rows: int, block_cols: int, dtype: torch.dtype,
    ends: Tensor | None, fold: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x: [R, C], or [E, R, C] where each leading index is a segment. Returns values, scales [E]."""
    out = torch.empty(x.shape, dtype=dtype)
    if x.dim() == 3:
        n, r = x.shape[:2]
        ends = torch.arange(1, n + 1) * r
        rows = x.reshape(n * r, x.shape[2])
    else:
        ends = torch.tensor([x.shape[0]]) if ends is None else ends.to(torch.int64).contiguous()
        rows = x
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    scale = torch.zeros(ends.shape[0])
    out_rows = out.view(rows.shape)
    native.quantize_rows(
        rows, out_rows, scale, ends, (block_rows, block_cols), GRIDS[grid], rule, fold
    )
    return out, scale


def _fake(x, grid, rule, block_rows, block_cols, dtype, ends, fold):
    segments = x.shape[0] if x.dim() == 3 else 1 if ends is None else ends.shape[0]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    return out, torch.empty(segments, device=x.device)


_library.impl("quantize", _quantize, "CPU")
torch.library.register_fake("moe_zoo::quantize", _fake, lib=_library)
quantize = torch.ops.moe_zoo.quantize.default
