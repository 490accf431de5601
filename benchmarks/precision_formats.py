"""How long it takes to put 4096 x 4096 numbers into a format and back, in copies of as many floats.

    python benchmarks/precision_formats.py > benchmarks/precision_formats.md

Outputs go into warm buffers. Rows that say "call" allocate theirs, from memory that glibc is told
to keep: a fresh 64 MiB output would cost 30 ms of page faults, which dwarf the work.
"""

import ctypes
import importlib.util
import os
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timing import interleaved, machine, markdown, ratio
from torch import Tensor

from layers.precision import native
from layers.precision.formats import resolve
from layers.precision.quantize import fake_quantize, quantize
from layers.precision.spec import QSpec

SIZE = 4096
KEY = torch.tensor(1234567890123)
Rows = dict[str, Callable[[], Tensor]]


def _specs() -> dict[str, tuple[QSpec, int]]:
    """What is timed: a spec and the axis of its blocks, by name."""
    mx = {"format": "mxfp4", "scale_rule": "rceil"}
    nv, sr = {"format": "nvfp4"}, {"rounding": "stochastic"}
    six = nv | {"scale_rule": "4over6"}
    fp8 = {"format": "fp8_e4m3"}
    rows = {
        "mxfp4 1x32 floor": ({"format": "mxfp4"}, -1),
        "mxfp4 1x32 rceil": (mx, -1),
        "mxfp4 32x1 rceil": (mx, -2),
        "mxfp4 1x32 stochastic": (mx | sr, -1),
        "mxfp4 32x1 stochastic": (mx | sr, -2),
        "mxfp4 1x32 rotated by 32": (mx | {"hadamard": 32}, -1),
        "mxfp4 32x1 rotated by 32": (mx | {"hadamard": 32}, -2),
        "mxfp4 1x32 rotated by 32, stochastic": (mx | sr | {"hadamard": 32}, -1),
        "mxfp4 32x1 rotated by 32, stochastic": (mx | sr | {"hadamard": 32}, -2),
        "nvfp4 1x16": (nv, -1),
        "nvfp4 16x1": (nv, -2),
        "nvfp4 16x16": (nv | {"tile": "2d"}, -1),
        "nvfp4 1x16 by row": (nv | {"scope": "row"}, -1),
        "nvfp4 1x16 stochastic": (nv | sr, -1),
        "nvfp4 16x1 rotated by 16": (nv | {"hadamard": 16}, -2),
        "nvfp4 16x1 rotated by 16, stochastic": (nv | sr | {"hadamard": 16}, -2),
        "nvfp4 1x16 4over6": (six, -1),
        "nvfp4 16x16 4over6": (six | {"tile": "2d"}, -1),
        "hif4 1x64": ({"format": "hif4"}, -1),
        "hif4 64x1": ({"format": "hif4"}, -2),
        "mxfp8_e4m3 1x32": ({"format": "mxfp8_e4m3"}, -1),
        "fp8_e4m3 tensor": (fp8, -1),
        "fp8_e4m3 by row": (fp8 | {"scope": "row"}, -1),
        "fp8_e4m3 by column": (fp8 | {"scope": "row"}, -2),
        "fp8_e4m3 1x128": (fp8 | {"scope": "block"}, -1),
        "fp8_e4m3 128x128": (fp8 | {"scope": "block", "tile": "2d"}, -1),
    }
    return {name: (QSpec(**options), axis) for name, (options, axis) in rows.items()}


SPECS = _specs()
GOALS = {  # in copies
    "mxfp4 1x32 floor": 3,
    "mxfp4 1x32 rceil": 3,
    "mxfp4 1x32 stochastic": 16,
    "nvfp4 1x16": 5,
    "nvfp4 16x16": 5,
    "hif4 1x64": 30,
}
TORCH = ("mxfp4 1x32 rceil", "mxfp4 1x32 stochastic", "nvfp4 1x16", "nvfp4 16x16", "hif4 1x64")


def keep_large_blocks() -> None:
    """Let glibc, where it is one, serve large tensors from memory that was in use before."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@contextmanager
def kernels(mode: str) -> Iterator[None]:
    """MOE_ZOO_KERNELS=mode inside."""
    before = os.environ.get("MOE_ZOO_KERNELS")
    os.environ["MOE_ZOO_KERNELS"] = mode
    try:
        yield
    finally:
        os.environ.pop("MOE_ZOO_KERNELS")
        if before is not None:
            os.environ["MOE_ZOO_KERNELS"] = before


def native_rows(x: Tensor, out: Tensor) -> Rows:
    """The kernel alone, into a warm buffer; float32 with the scale above blocks multiplied in."""
    half, half_out = x.bfloat16(), torch.empty_like(x, dtype=torch.bfloat16)
    scale = torch.zeros(SIZE)

    def row(source: Tensor, target: Tensor, spec: QSpec, axis: int) -> Callable[[], Tensor]:
        r = resolve(spec)
        numbers = native.numbers_of(r.row, r.rule)
        assert numbers is not None
        b = r.row.block
        block = (b, b) if spec.tile == "2d" else (1, b) if axis == -1 else (b, 1)
        by_row = "row" if axis == -1 else "column"
        level = {"tensor": "segment", "row": by_row}.get(r.scope, "none")

        def run() -> Tensor:
            native.run(
                source, target, numbers, block=block, axis=axis, level=level, scale=scale, key=KEY,
                rounding=spec.rounding, hadamard=spec.hadamard, signs=spec.signs,
                fold=target is out,
            )  # fmt: skip
            return target

        return run

    rows = {}
    for name, (spec, axis) in SPECS.items():
        rows[f"{name}, native"] = row(x, out, spec, axis)
        rows[f"{name}, native, float32 to bfloat16"] = row(x, half_out, spec, axis)
        rows[f"{name}, native, bfloat16 to bfloat16"] = row(half, half_out, spec, axis)
    return rows


def torch_rows(x: Tensor, out: Tensor) -> Rows:
    """The definition in torch ops, compiled into a warm buffer, and as it stands."""
    rows = {}
    for name in TORCH:
        spec = SPECS[name][0]
        compiled = torch.compile(
            lambda x, out, key, spec=spec: out.copy_(fake_quantize(x, spec, key=key)), dynamic=False
        )
        with kernels("torch"):
            compiled(x, out, KEY)
        rows[f"{name}, torch ops, compiled"] = lambda f=compiled: f(x, out, KEY)

        def eager(spec=spec):
            with kernels("torch"):
                return fake_quantize(x, spec, key=KEY)

        rows[f"{name}, torch ops, eager, call"] = eager
    return rows


def public_rows(x: Tensor) -> Rows:
    """What a user calls, allocation included."""
    return {
        "copy, call": x.clone,
        "mxfp4, fake_quantize, call": lambda: fake_quantize(x, "mxfp4"),
        "mxfp4, quantize to bfloat16, call": lambda: quantize(
            x, "mxfp4", axis=-1, dtype=torch.bfloat16
        ),
        "nvfp4, fake_quantize, call": lambda: fake_quantize(x, "nvfp4"),
    }


def torchao_rows(x: Tensor) -> Rows:
    """The same by torchao, where it is installed. Its MX does not compile for the CPU here."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    warnings.simplefilter("ignore")
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    def mx() -> Tensor:
        return MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)

    def nv() -> Tensor:
        scale = per_tensor_amax_to_scale(x.abs().max())
        return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)

    return {
        "mxfp4 1x32 floor, torchao, eager, call": mx,
        "nvfp4 1x16, torchao, eager, call": nv,
    }


def check(rows: Rows, x: Tensor) -> None:
    """Every row to float32 gives what the torch ops give: to the bit, torchao but for ties."""
    for name, (spec, axis) in SPECS.items():
        if axis == -2 or spec.hadamard:
            continue  # tests/test_native_kernels.py holds those
        with kernels("torch"):
            expected = fake_quantize(x, spec, key=KEY)
        for row, run in rows.items():
            if row.startswith(f"{name},") and "bfloat16" not in row:
                rtol, share = (1e-6, 1e-6) if "torchao" in row else (0.0, 0.0)
                differ = ~torch.isclose(run(), expected, rtol=rtol, atol=0)
                assert differ.double().mean() <= share, f"{row}: {differ.sum()} values differ"


def main() -> None:
    keep_large_blocks()
    torch.set_num_threads(1)
    x = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(x)
    rows = {"copy": lambda: out.copy_(x), **native_rows(x, out), **torch_rows(x, out)}
    rows |= public_rows(x) | torchao_rows(x)
    check(rows, x)
    times = interleaved(rows, rounds=7)
    cells = []
    for name in rows:
        goal = GOALS.get(name.removesuffix(", native"))
        copies = f"{ratio(times, name, 'copy'):.2f}" + (f" (at most {goal})" if goal else "")
        cells.append([name, f"{statistics.median(times[name]) * 1e3:.1f}", copies])
    print("# 4096 x 4096 numbers into low formats and back\n")
    print("Copies: time over that of copying 16.8M floats into a warm buffer. What lies above the")
    print("blocks is included: the largest magnitude of the tensor is a first pass over it, and a")
    print(
        "rotation is computed once more for it. Stochastic rounding hashes 16 random bits for each"
    )
    print("number.\n")
    print(markdown(["what", "ms", "copies"], cells))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
