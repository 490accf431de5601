"""Packed matrices times a few rows in torch ops, for machines that kernels.cpp does not serve.

The decode is one of bits, without a table (precision.md section 17): a code's magnitude is shifted
to where a float32 holds exponent and mantissa, its sign to the top, and a power of two that the
rows carry beforehand sets the exponent right, of subnormal codes too. Large matrices go through
`torch.compile`, others in slices of rows; no matrix is ever decoded whole.
"""

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.packing.codes import code_bits, unpack_codes
from layers.packing.storage import Storage
from layers.precision.grids import E2M1, NAN, Grid

SLICE = 1 << 18  # numbers decoded at a time
FUSED = 1 << 20  # numbers from which compiling is worth its seconds
HEADROOM = 26  # of the power of two, this much is left to the sums: rows up to 2^28 do not overflow
_log = logging.getLogger(__name__)


def multiply(
    x: Tensor, codes: Tensor, scales: Tensor, storage: Storage, which: Tensor | None
) -> Tensor:
    """What `native.multiply` computes, to the rounding of float32 sums; same arguments."""
    n, k = codes.shape[-2], x.shape[1]
    wanted = [0] * x.shape[0] if which is None else which.tolist()
    matrices = codes.shape[0] if codes.dim() == 3 else 1
    if any(not 0 <= e < matrices for e in wanted):
        raise ValueError(f"matrices must be in [0, {matrices}), got {wanted}")
    y = x.new_empty(x.shape[0], n, dtype=torch.float32)
    large = n * k >= FUSED and storage.rows == 1
    product = _fused() if large else _product
    step = n if large else max(1, SLICE // k // storage.rows) * storage.rows
    for t, expert in enumerate(wanted):
        c = codes[expert] if codes.dim() == 3 else codes
        s = scales[expert] if scales.dim() == 3 else scales
        row = _laid_out(x[t].float(), storage)
        for i in range(0, n, step):
            part = s[i // storage.rows : (i + step) // storage.rows] if s.dim() == 2 else s
            y[t, i : i + step] = product(c[i : i + step], part, row, storage)
    return y


def _laid_out(row: Tensor, storage: Storage) -> Tensor:
    """[parts, blocks, numbers] of a row [K]: what is shifted alike lies together.

    Two parts for the nibbles of a byte; sixteen where eight bytes, a word, are a block.
    """
    whole = storage.block or row.shape[0] + row.shape[0] % 2
    block = 4 if storage.scale == "hif4" else whole
    row = F.pad(row, (0, -row.shape[0] % whole)).unflatten(0, (-1, block))
    parts = 1 if storage.bits > 4 else 16 if block == 16 else 2
    row = row.unflatten(1, (-1, parts)).permute(2, 0, 1)
    return (row * 2.0 ** (127 - storage.grid.bias - HEADROOM)).contiguous()


def _product(codes: Tensor, scales: Tensor, row: Tensor, storage: Storage) -> Tensor:
    """codes: [R, row_bytes]; scales: of R rows; row: of `_laid_out`. Returns [R] float32."""
    parts, blocks, numbers = row.shape
    sums = None
    shifted = _shifted(codes, storage.bits, parts, blocks * numbers)
    for part, x in zip(shifted, row.flatten(1), strict=True):
        product = _numbers(part, storage.grid) * x
        sums = product if sums is None else sums + product
    assert sums is not None
    sums = sums.unflatten(1, (blocks, numbers))
    if storage.scale != "none":
        factors = storage.factors(scales)
        if storage.rows > 1:
            factors = factors.repeat_interleave(storage.rows, 0)[: codes.shape[0]]
        sums = sums * factors[..., None]
    return sums.sum((1, 2)) * 2.0**HEADROOM


def _shifted(codes: Tensor, bits: int, parts: int, width: int) -> list[Tensor]:
    """[R, width] int32 for each part, its code lowest; zeros behind the codes of a row."""
    if bits > 4:
        codes = unpack_codes(codes, bits, codes.shape[1] * 8 // bits)[:, :width]
        return [F.pad(codes, (0, width - codes.shape[1])).to(torch.int32)]
    if short := width * parts // 2 - codes.shape[1]:
        codes = F.pad(codes, (0, short))
    if parts == 2:
        words = codes.to(torch.int32)
        return [words, words >> 4]
    long = codes.view(torch.int64)
    halves = [long.to(torch.int32), (long >> 32).to(torch.int32)]
    return [half >> 4 * j for half in halves for j in range(8)]


def _numbers(codes: Tensor, grid: Grid) -> Tensor:
    """float32, each number times 2^(bias - 127). codes: int32, what lies above the code is unread.

    FP8 codes that are no finite numbers become NaN.
    """
    low = code_bits(grid) - 1
    size = codes & ((1 << low) - 1)
    number = (size << (23 - grid.mantissa_bits)) | ((codes >> low) << 31)
    if low == 7:
        last = len(grid.magnitudes()) - 1
        number = torch.where(size > last, NAN, number)
    return number.view(torch.float32)


@functools.cache
def _fused() -> Callable[..., Tensor]:
    """`_product` compiled, or as it is where nothing compiles (said once, in one logged line)."""
    compiled = torch.compile(_product, dynamic=False)
    try:
        storage = Storage(grid=E2M1, scale="none")
        compiled(
            torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(0), torch.zeros(2, 1, 2), storage
        )
    except Exception as error:  # the compiler's own classes come and go with torch's versions
        reason = str(error).strip().splitlines() or ["?"]
        _log.warning("packed products are not compiled, torch ops do the same: %s", reason[0])
        return _product
    return compiled
