"""How long it takes to put 4096 x 4096 numbers into MXFP4 and NVFP4, in copies of that many floats.

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
from layers.precision.grids import E2M1
from layers.precision.quantize import fake_quantize, quantize
from layers.precision.spec import QSpec

SIZE = 4096
Rows = dict[str, Callable[[], Tensor]]
SPECS = {
    "mxfp4 1x32 floor": QSpec(format="mxfp4"),
    "mxfp4 1x32 rceil": QSpec(format="mxfp4", scale_rule="rceil"),
    "nvfp4 1x16": QSpec(format="nvfp4"),
    "nvfp4 16x16": QSpec(format="nvfp4", tile="2d"),
}


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
    """The kernel alone, into a warm buffer; to float32 with the tensor scale multiplied in."""
    scale, ends = torch.zeros(1), torch.tensor([SIZE])
    half, half_out = x.bfloat16(), torch.empty_like(x, dtype=torch.bfloat16)

    def row(source, target, block, rule):
        def run():
            fold = target is out
            native.quantize_rows(source, target, scale, ends, block, E2M1, rule, fold)
            return target

        return run

    rows = {}
    for name, block, rule in (
        ("mxfp4 1x32 floor", (1, 32), "floor"),
        ("mxfp4 1x32 rceil", (1, 32), "rceil"),
        ("mxfp4 32x1 floor", (32, 1), "floor"),
        ("nvfp4 1x16", (1, 16), "max"),
        ("nvfp4 16x1", (16, 1), "max"),
        ("nvfp4 16x16", (16, 16), "max"),
    ):
        rows[f"{name}, native"] = row(x, out, block, rule)
        rows[f"{name}, native, float32 to bfloat16"] = row(x, half_out, block, rule)
        rows[f"{name}, native, bfloat16 to bfloat16"] = row(half, half_out, block, rule)
    return rows


def torch_rows(x: Tensor, out: Tensor) -> Rows:
    """The definition in torch ops, compiled into a warm buffer, and as it stands."""
    rows = {}
    for name, spec in SPECS.items():
        compiled = torch.compile(
            lambda x, out, spec=spec: out.copy_(fake_quantize(x, spec)), dynamic=False
        )
        with kernels("torch"):
            compiled(x, out)
        rows[f"{name}, torch ops, compiled"] = lambda f=compiled: f(x, out)

        def eager(spec=spec):
            with kernels("torch"):
                return fake_quantize(x, spec)

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
    for name, spec in SPECS.items():
        with kernels("torch"):
            expected = fake_quantize(x, spec)
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
    cells = [
        [name, f"{statistics.median(times[name]) * 1e3:.1f}", f"{ratio(times, name, 'copy'):.2f}"]
        for name in rows
    ]
    print("# 4096 x 4096 numbers into 4-bit formats and back\n")
    print("Copies: time over that of copying 16.8M floats into a warm buffer. Goals: mxfp4 at most")
    print("3, nvfp4 at most 5, tensor maximum included, with warm outputs.\n")
    print(markdown(("what", "ms", "copies"), cells))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
