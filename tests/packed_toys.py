"""Packed weights of random codes, for tests."""

import pytest
import torch

from layers.packing import Packed, Storage, codes
from layers.precision.grids import E1M2, E2M1, E2M3, E3M2, E4M3, E5M2

STORAGES = [
    Storage(grid=E2M1, scale="e8m0", block=32),
    Storage(grid=E2M1, scale="ue4m3", block=16),
    Storage(grid=E1M2, scale="ue4m3", block=16),
    Storage(grid=E2M1, scale="ue5m3", block=16),
    Storage(grid=E1M2, scale="hif4", block=64),
    Storage(grid=E2M1, scale="none"),
    Storage(grid=E2M3, scale="e8m0", block=32),
    Storage(grid=E3M2, scale="e8m0", block=32),
    Storage(grid=E4M3, scale="e8m0", block=32),
    Storage(grid=E5M2, scale="e8m0", block=32),
    Storage(grid=E4M3, scale="none"),
    Storage(grid=E5M2, scale="fp32", block=8, rows=4),
]
by_storage = pytest.mark.parametrize("storage", STORAGES, ids=lambda s: f"{s.grid.name}-{s.scale}")


def random_packed(storage: Storage, *shape: int) -> Packed:
    """Codes of every finite number, scales of moderate size."""
    size = (*storage.code_shape(shape)[:-1], shape[-1])
    half = len(storage.grid.magnitudes())
    code = torch.randint(0, half, size) + (torch.rand(size) < 0.5) * 2 ** (storage.bits - 1)
    scales = torch.randint(118, 134, storage.scale_shape(shape)).to(torch.uint8)
    if storage.scale == "ue4m3":
        scales = torch.randint(0, 127, storage.scale_shape(shape)).to(torch.uint8)
    elif storage.scale == "hif4":
        scales = torch.randint(0, 256, storage.scale_shape(shape)).to(torch.uint8)
        scales[..., ::4] = scales[..., ::4] % 40 + 170
    elif storage.scale == "fp32":
        scales = torch.rand(storage.scale_shape(shape)) + 0.5
    packed = codes.pack_codes(code.to(torch.uint8), storage.bits)
    return Packed(packed, scales, None, storage, shape[-1])


def as_bits(t: torch.Tensor) -> torch.Tensor:
    """Its bits; any NaN counts as the same one."""
    whole = torch.int32 if t.dtype == torch.float32 else torch.int16
    return t.nan_to_num(nan=1.5, posinf=torch.inf, neginf=-torch.inf).view(whole)
