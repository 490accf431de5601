"""A weight as codes and scales: what takes the place of a leaf's parameter."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.packing.codes import NATIVE, encode_elements, encode_scales, pack_codes
from layers.packing.hif4 import encode_metadata, split_elements
from layers.packing.native import multiply
from layers.packing.storage import Storage, storage_of
from layers.packing.unpack import decode
from layers.precision.define import define_parts
from layers.precision.formats import resolve
from layers.precision.hadamard import rotate, signs_of
from layers.precision.layout import Blocks
from layers.precision.random import uniform
from layers.precision.spec import QSpec


@dataclass(frozen=True, eq=False)
class Packed:
    """Codes, scales and the shape that they stand for; a matrix, a stack of them, or a table."""

    codes: Tensor  # [..., N, row_bytes] uint8
    scales: Tensor  # of Storage.scale_shape
    tensor_scale: Tensor | None  # float32, as `quantize` returns it
    storage: Storage
    width: int  # numbers of a row
    spec: QSpec | None = None  # what they were quantised by; None: who knows

    @property
    def shape(self) -> torch.Size:
        """[..., N, K] of the numbers."""
        return torch.Size((*self.codes.shape[:-1], self.width))

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The numbers without the tensor scale, bit for bit those of `quantize`."""
        return decode(self.codes, self.scales, self.storage, self.width, dtype)

    def multiply(self, x: Tensor, which: Tensor | None = None) -> Tensor:
        """W x for a few rows straight from codes; see `native.multiply`. Returns [T, N] float32."""
        return multiply(x, self.codes, self.scales, self.storage, which)

    def rows(self, ids: Tensor) -> "Packed":
        """Some rows of a table, still packed; no others are read. ids: [R] int64."""
        assert self.storage.rows == 1
        scales = self.scales if self.storage.scale == "none" else self.scales[ids]
        above = self.tensor_scale
        above = above if above is None or above.dim() == 0 else above[ids]
        return Packed(self.codes[ids], scales, above, self.storage, self.width, self.spec)

    def __getitem__(self, index: int) -> "Packed":
        """One matrix of a stack."""
        scales = self.scales if self.storage.scale == "none" else self.scales[index]
        above = self.tensor_scale
        above = above if above is None or above.dim() == 0 else above[index]
        return Packed(self.codes[index], scales, above, self.storage, self.width, self.spec)


def pack(
    w: Tensor,
    spec: QSpec | str,
    *,
    key: Tensor | None = None,
    operand: int = 1,
    scale: Tensor | None = None,
) -> Packed:
    """Put a weight into a format and keep its codes.

    Args:
        w: [N, K], or [E, N, K] where each leading index has scales of its own.
        spec: the format and its options; blocks lie along the last axis.
        key, operand, scale: as in `quantize`, of whose values these are the codes.

    Returns:
        The codes, of the rotated weight where the spec rotates.

    Raises:
        ValueError: a format that cannot be packed, an unknown option.
    """
    spec = QSpec.of(spec)
    r = resolve(spec)
    storage = storage_of(r)
    if spec.hadamard and spec.signs == "step":
        raise ValueError("a weight rotated with new signs each step cannot be packed: say fixed")
    if spec.rounding == "eden":
        raise ValueError("a weight rounded by eden cannot be packed: say nearest or stochastic")
    if spec.rounding == "stochastic" and key is None:
        raise ValueError("rounding stochastic needs a key: a [] int64 tensor")
    w = w.detach().float()
    if spec.hadamard:
        signs = signs_of(spec.hadamard, spec.signs, None, operand // 2, w.device)
        w = rotate(w, spec.hadamard, signs, -1)
    noise = None
    if key is not None and spec.rounding == "stochastic":
        noise = uniform(key, operand, w.shape)
    blocks = Blocks(r.row.block, r.row.block) if spec.tile == "2d" else Blocks(1, r.row.block)
    (elements, scales), above = define_parts(w, r, blocks, -1, None, noise, scale)
    if above is not None and w.dim() == 2:
        above = above.squeeze(0)
    if storage.scale == "hif4":
        assert scales is not None
        elements, exponents = split_elements(elements)
        stored = encode_metadata(scales[..., :: storage.block], exponents)
    elif storage.scale == "none":
        stored = torch.zeros(0, dtype=torch.uint8, device=w.device)
    else:
        assert scales is not None
        stored = scales[..., :: storage.rows, :: storage.block].contiguous()
        if storage.scale != "fp32":
            stored = encode_scales(stored, storage.scale)
    codes = pack_codes(encode_elements(elements, storage.grid), storage.bits)
    return Packed(codes, stored, above, storage, elements.shape[-1], spec)


class PackedWeight(nn.Module):
    """In the place of a leaf's `weight`, whose buffers the `state_dict` names weight.codes,
    weight.scales and weight.tensor_scale. Bytes in memory; `native_view` for a file.

    Moving it to another floating type leaves all of it as it is.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None

    def __init__(self, packed: Packed):
        super().__init__()
        self.spec, self.storage, self.width = packed.spec, packed.storage, packed.width
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales if packed.scales.numel() else None)
        self.register_buffer("tensor_scale", packed.tensor_scale)

    @property
    def packed(self) -> Packed:
        """The same buffers as a value."""
        scales = self.codes.new_empty(0) if self.scales is None else self.scales
        return Packed(self.codes, scales, self.tensor_scale, self.storage, self.width, self.spec)

    @property
    def shape(self) -> torch.Size:
        """[..., N, K] of the numbers."""
        return self.packed.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes: no kernel for plain matrices takes it."""
        return self.codes.dtype

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The numbers without the tensor scale, bit for bit those of `quantize`."""
        return self.packed.decode(dtype)

    def decode_rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of a table without their scale; no others are read. ids: [R]. Returns [R, D]."""
        return self.packed.rows(ids).decode(dtype)

    def __getitem__(self, index: int) -> Packed:
        """One matrix of a stack."""
        return self.packed[index]

    def _apply(self, fn, recurse=True):
        """Follow to another device, never to another type: bytes and scales are exact as held."""
        for name, held in self.named_buffers():
            moved = fn(held)
            setattr(self, name, held.to(moved.device) if moved.dtype != held.dtype else moved)
        return self

    def extra_repr(self) -> str:
        return f"{list(self.shape)}, {None if self.spec is None else self.spec.to_plain()}"


def native_view(name: str, stored: Tensor, storage: Storage) -> Tensor:
    """A buffer of a packed weight in torch's own dtype for it, where torch has one.

    name: "codes", "scales" or "tensor_scale". Returns the same bytes: E2M1 codes as
    float4_e2m1fn_x2, FP8 as float8, E8M0 and E4M3 scales as float8; others stay uint8.
    """
    kind = {"codes": storage.grid.name, "scales": storage.scale}.get(name, "")
    return stored.view(NATIVE[kind]) if kind in NATIVE else stored
