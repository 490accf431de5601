"""How a format lies in memory: which codes, which scales, how many numbers share one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from layers.names import unknown
from layers.packing import codes as c
from layers.packing.hif4 import decode_metadata
from layers.precision.formats import Resolved
from layers.precision.grids import Grid
from layers.precision.hif4 import encode_hif4
from layers.precision.mx import encode_mx
from layers.precision.nvfp4 import encode_nvfp4, encode_ue5m3
from layers.precision.row import Encoder
from layers.precision.rows import FORMATS
from layers.precision.scaled import encode_scaled


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Codes of a grid, row by row, under one scale for each block of a row.

    scale: a kind of `codes.SCALES` (one byte a block), "hif4" (four bytes of metadata a unit),
    "fp32" (a float a block), or "none".
    """

    grid: Grid
    scale: str
    block: int = 0  # numbers of a row that share a scale; 0: none has one
    rows: int = 1  # rows that share it, where it is stored once for them

    @property
    def bits(self) -> int:
        """Of one code."""
        return c.code_bits(self.grid)

    def code_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the codes, uint8, of numbers [..., N, K]."""
        return (*shape[:-1], c.row_bytes(shape[-1], self.bits))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of numbers [..., N, K]; nothing is stored where there are none."""
        if self.scale == "none":
            return (0,)
        blocks = -(-shape[-1] // self.block) * (4 if self.scale == "hif4" else 1)
        return (*shape[:-2], -(-shape[-2] // self.rows), blocks)

    @property
    def scale_dtype(self) -> torch.dtype:
        """In which scales are held."""
        return torch.float32 if self.scale == "fp32" else torch.uint8

    def decode(self, codes: Tensor, scales: Tensor, k: int, dtype: torch.dtype) -> Tensor:
        """The numbers, without any tensor scale.

        codes: [..., N, row_bytes]; scales: of `scale_shape`; k: numbers in a row. Returns
        [..., N, k] in dtype: each is elements * scale in float32, rounded to it once.
        """
        elements = c.decode_elements(c.unpack_codes(codes, self.bits, k), self.grid)
        if self.scale == "none":
            return elements.to(dtype)
        factors = self.factors(scales)
        each = self.block if self.scale != "hif4" else 4
        factors = factors.repeat_interleave(each, -1)[..., :k]
        if self.rows > 1:
            factors = factors.repeat_interleave(self.rows, -2)[..., : codes.shape[-2], :]
        return elements.mul_(factors).to(dtype)

    def factors(self, scales: Tensor) -> Tensor:
        """Float32 scales: one a block, or for HiF4 one for each four numbers."""
        if self.scale == "hif4":
            return decode_metadata(scales)
        return scales if self.scale == "fp32" else c.decode_scales(scales, self.scale)


# The scale of each block: what an `encode` hands back beside the elements.
BLOCK_SCALES: dict[Encoder | None, str] = {
    encode_mx: "e8m0",
    encode_nvfp4: "ue4m3",
    encode_ue5m3: "ue5m3",
    encode_hif4: "hif4",
    encode_scaled: "fp32",
}


def packable() -> list[str]:
    """Names of the formats that have codes."""
    return [row.name for row in FORMATS if row.grid is not None and row.encode in BLOCK_SCALES]


def storage_of(r: Resolved) -> Storage:
    """How weights of a resolved spec are stored.

    A scale of one byte that a tile shares is stored for each of its rows, as TransformerEngine
    does, so that a row is whole by itself; a float once for the tile.

    Raises:
        ValueError: a format that is only a cast, or of which no codes are known here; a rule whose
            scales the format's own codes cannot say.
    """
    row = r.row
    if row.grid is None or row.encode not in BLOCK_SCALES:
        raise unknown("format to pack", row.name, packable())
    if r.rule in row.inexact_rules and row.encode is not encode_scaled:
        raise ValueError(f"{row.name} with rule {r.rule} has scales that no code of it can say")
    scale = BLOCK_SCALES[row.encode]
    if scale == "fp32" and r.scope != "block":
        return Storage(grid=row.grid, scale="none")
    rows = row.block if scale == "fp32" and r.spec.tile == "2d" else 1
    return Storage(grid=row.grid, scale=scale, block=row.block, rows=rows)
