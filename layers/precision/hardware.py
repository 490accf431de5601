"""Products by the device's own instructions for scaled operands, in place of `layers.products`.

Only when asked, never instead of a format: operands are those of `quantize`, number for number,
and the instruction adds them up in float32. What a device lacks is an error.

What has been run: FP8 by tensor and by row on CPUs, where torch has the same operator, slowly; of
the others the codes and the layout of scales that the instruction is given, against a plain
reading of them and torchao's. What has not: anything on a GPU, for want of one. The capabilities
and restrictions below are those that torch's source and cuBLAS's manual state. Experts are
multiplied one after another; `F.scaled_grouped_mm`, GPUs' alone, is not used, nor are FP8 blocks
of 128 (sm90's).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from layers.packing.codes import NATIVE, encode_elements, encode_scales, pack_codes
from layers.precision.coded import Coded, Lanes, lanes_of
from layers.precision.formats import resolve
from layers.precision.operands import GEMMS, LeafPrecision
from layers.precision.spec import QSpec

MULTIPLE = 32  # rows and columns are filled with zeros up to this, which adds nothing
TILE = (128, 4)  # of block scales (cuBLAS, "1D block scaling factors layout")
# Scopes that FP8's scales can say, and that leave block scales alone
WHOLE = ("", "none", "tensor", "row", "static", "delayed")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One kind of scaled product that `F.scaled_mm` offers. Both operands must be of its formats.

    The formats' float32 scales by tensor or row go to the instruction where it has no block scales,
    and multiply its float32 result otherwise.
    """

    name: str
    formats: tuple[str, ...]
    since: tuple[int, int]  # compute capability of NVIDIA's GPUs
    on_cpu: bool = False
    scales: str = ""  # kind of the block scales, of layers.packing.codes; "": none
    build: tuple[str, ...] = ()  # any of these in torch's build flags
    only_bf16: bool = False  # what it gives

    def is_on(self, device: torch.device) -> bool:
        """Whether a device has it."""
        if device.type == "cpu":
            return self.on_cpu
        if device.type != "cuda" or torch.version.hip:
            return False
        built = not self.build or any(flag in torch.__config__.show() for flag in self.build)
        return built and torch.cuda.get_device_capability(device) >= self.since


INSTRUCTIONS = (
    Instruction(name="FP8 by tensor or row", formats=("fp8_e4m3", "fp8_e5m2"), since=(8, 9),
                on_cpu=True),
    Instruction(name="MXFP8", formats=("mxfp8_e4m3", "mxfp8_e5m2"), since=(10, 0), scales="e8m0"),
    Instruction(name="MXFP4", formats=("mxfp4",), since=(10, 0), scales="e8m0", only_bf16=True,
                build=("USE_MSLK", "USE_FBGEMM_GENAI")),
    Instruction(name="NVFP4", formats=("nvfp4",), since=(10, 0), scales="ue4m3"),
)  # fmt: skip


def instructions_on(device: torch.device | str) -> tuple[str, ...]:
    """Names of the instructions that a device has."""
    return tuple(i.name for i in INSTRUCTIONS if i.is_on(torch.device(device)))


def instruction_of(spec: QSpec) -> Instruction | None:
    """The instruction that takes an operand written so, on whatever device; None: there is none."""
    r = resolve(spec)
    for i in INSTRUCTIONS:
        sayable = not i.scales or r.rule not in r.row.inexact_rules  # by a byte of its kind
        if spec.format in i.formats and r.scope in WHOLE and sayable:
            return i
    return None


def check_hardware(p: LeafPrecision, device: torch.device | str) -> None:
    """Raise unless every low product of a leaf has an instruction where the leaf is, or on the GPU.

    For models are built on the CPU and moved; a product on the wrong side is an error by itself.

    Raises:
        ValueError: naming the operand, and what each device has.
    """
    devices = [torch.device(device)]
    if devices[0].type != "cuda" and torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    if p.saved != "original":
        raise ValueError(f"backend 'hardware' needs saved 'original', got {p.saved!r}")
    has = "; ".join(f"{d} has: {', '.join(instructions_on(d)) or 'none'}" for d in devices)
    for gemm, names in GEMMS.items():
        specs = [getattr(p, name) for name in names]
        if all(spec.is_high for spec in specs):
            continue
        said = " by ".join(f"{n} {_described(s)}" for n, s in zip(names, specs, strict=True))
        for name, spec in zip(names, specs, strict=True):
            found = instruction_of(spec)
            if found is None or not any(found.is_on(d) for d in devices):
                raise ValueError(
                    f"backend 'hardware' has no instruction for {name} {_described(spec)}; {has}"
                )
        if len({instruction_of(spec) for spec in specs}) > 1:
            raise ValueError(f"backend 'hardware' has no instruction for {gemm}, {said}; {has}")
        if devices[0].type == "cuda" and all(spec.format.endswith("e5m2") for spec in specs):
            raise ValueError(f"backend 'hardware': {gemm} is {said}, of which one must be E4M3")


def _described(spec: QSpec) -> str:
    scope = resolve(spec).scope
    return f"{spec.format} (scope {scope})" if scope else spec.format


# The three products


def fprop(x: Coded, w: Coded, counts: Tensor | None) -> Tensor:
    """y = x w^T. x: [M, K]; w: [O, K] or [E, O, K]. Returns [M, O] in x.dtype."""
    return _rows_product(x, w, counts)


def dgrad(dy: Coded, w: Coded, counts: Tensor | None) -> Tensor:
    """dx = dy w. dy: [M, O']; w: [O', K] or [E, O', K]. Returns [M, K] in dy.dtype."""
    return _rows_product(dy, w, counts)


def wgrad(dy: Coded, x: Coded, counts: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dw = dy^T x. dy: [M', O]; x: [M', K]. Returns [O, K] or [E, O, K] in dtype."""
    if counts is None:
        return multiply(lanes_of(dy), lanes_of(x), dtype)
    if dy.ends is not None:
        counts = torch.diff(dy.ends, prepend=dy.ends.new_zeros(1))
    spans = list(_spans(counts))
    return torch.stack([multiply(lanes_of(dy, *span), lanes_of(x, *span), dtype) for span in spans])


def _rows_product(rows: Coded, w: Coded, counts: Tensor | None) -> Tensor:
    if counts is None:
        return multiply(lanes_of(rows), lanes_of(w), rows.dtype)
    parts = [multiply(lanes_of(rows, *s), lanes_of(w, *s), rows.dtype) for s in _spans(counts)]
    return torch.cat(parts)


def _spans(counts: Tensor) -> list[tuple[int, int, int]]:
    """Number, first row and row after the last of each expert. Waits for the device."""
    ends = [0, *counts.cumsum(0).tolist()]
    return [(e, ends[e], ends[e + 1]) for e in range(len(ends) - 1)]


def multiply(a: Lanes, b: Lanes, dtype: torch.dtype) -> Tensor:
    """a b^T by the instruction of their formats. a: [R, K]; b: [S, K]. Returns [R, S] in dtype.

    Raises:
        ValueError: where their device has none.
    """
    instruction, device = instruction_of(a.spec), a.elements.device
    if instruction is None or instruction is not instruction_of(b.spec):
        raise ValueError(f"no instruction multiplies {_described(a.spec)} by {_described(b.spec)}")
    if not instruction.is_on(device):
        raise ValueError(
            f"{device} has no instruction {instruction.name}: set the precision again once a "
            f"model has moved. It has: {', '.join(instructions_on(device)) or 'none'}"
        )
    (r, k), s = a.elements.shape, b.elements.shape[0]
    if 0 in (r, s, k):
        return a.elements.new_zeros(r, s, dtype=dtype)
    product = _by_blocks if instruction.scales else _by_tensor_or_row
    y = product(_filled(a), _filled(b), instruction, dtype)
    return y[:r, :s].to(dtype)


def _filled(a: Lanes) -> Lanes:
    """With zeros up to whole multiples, and scales of one for them."""
    pad = (0, -a.elements.shape[1] % MULTIPLE, 0, -a.elements.shape[0] % MULTIPLE)
    blocks = None if a.blocks is None else F.pad(a.blocks, pad, value=1.0)
    scale = a.scale
    if scale is not None and scale.dim() == 2:
        scale = F.pad(scale, (0, 0, 0, pad[3]), value=1.0)
    return Lanes(F.pad(a.elements, pad), blocks, scale, a.spec)


def _by_tensor_or_row(a: Lanes, b: Lanes, instruction: Instruction, dtype: torch.dtype) -> Tensor:
    codes = [_codes(x) for x in (a, b)]
    assert a.scale is not None
    assert b.scale is not None
    by_row = a.scale.dim() == 2 or b.scale.dim() == 2
    kind = F.ScalingType.RowWise if by_row else F.ScalingType.TensorWise
    scales = [a.scale.reshape(-1), b.scale.reshape(-1)]
    if by_row:
        scales = [
            s.expand(len(x.elements)).contiguous() for s, x in zip(scales, (a, b), strict=True)
        ]
        scales = [scales[0][:, None], scales[1][None]]
        dtype = dtype if a.elements.device.type == "cpu" else torch.bfloat16  # all that it gives
    return F.scaled_mm(
        codes[0], codes[1].t(), scales[0], kind, scales[1], kind, output_dtype=dtype
    )  # fmt: skip


def _by_blocks(a: Lanes, b: Lanes, instruction: Instruction, dtype: torch.dtype) -> Tensor:
    del dtype
    block = resolve(a.spec).row.block
    kind = F.ScalingType.BlockWise1x16 if block == 16 else F.ScalingType.BlockWise1x32
    codes, scales = [], []
    for x in (a, b):
        assert x.blocks is not None
        codes.append(_codes(x))
        stored = encode_scales(x.blocks[:, ::block].contiguous(), instruction.scales)
        scales.append(tiled_scales(stored).view(NATIVE[instruction.scales]))
    swizzle = F.SwizzleType.SWIZZLE_32_4_4
    y = F.scaled_mm(
        codes[0], codes[1].t(), scales[0], kind, scales[1], kind, swizzle, swizzle,
        output_dtype=torch.bfloat16 if instruction.only_bf16 else torch.float32,
    )  # fmt: skip
    if a.scale is not None:
        y = y * a.scale.reshape(-1, 1)
    return y if b.scale is None else y * b.scale.reshape(1, -1)


def _codes(a: Lanes) -> Tensor:
    """[R, K] in torch's FP8, or [R, K / 2] in its FP4."""
    grid = resolve(a.spec).row.grid
    assert grid is not None
    if grid.name in ("e4m3", "e5m2"):
        return a.elements.contiguous().to(NATIVE[grid.name])
    return pack_codes(encode_elements(a.elements, grid), 4).view(NATIVE[grid.name])


def tiled_scales(codes: Tensor) -> Tensor:
    """Block scales in the order in which the tensor cores read them.

    Tiles of 128 rows by 4 scales, row of tiles after row of tiles, the last ones filled with zeros;
    inside a tile, scale (i, j) stands at byte 16 (i mod 32) + 4 (i div 32) + j.

    codes: [R, K] of one byte each. Returns [ceil(R / 128) * 128 * ceil(K / 4) * 4].
    """
    rows, columns = codes.shape
    codes = F.pad(codes, (0, -columns % TILE[1], 0, -rows % TILE[0]))
    tiles = codes.unflatten(0, (-1, 4, 32)).unflatten(-1, (-1, 4))  # [r, 4, 32, c, 4]
    return tiles.permute(0, 3, 2, 1, 4).flatten()
