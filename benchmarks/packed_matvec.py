"""How long one token takes through a 4096 x 4096 matrix, packed and plain.

    python benchmarks/packed_matvec.py > benchmarks/packed_matvec.md

Every matrix comes in enough copies, taken in turn, that none waits in a cache. "mv" is torch.mv,
"linear" F.linear of one row: whichever is faster on a machine is the figure to beat.
"""

import itertools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timing import interleaved, machine, markdown, ratio
from torch import Tensor

from layers import precision
from layers.packing import Packed, bits, pack

SIZE = 4096
BYTES = 96 << 20  # of all copies of one matrix: three times the last-level cache of the machine
WANTED = ("mxfp4", "nvfp4", "hif4", "mxfp8_e4m3")
FORMATS = [row.name for row in precision.FORMATS if row.name in WANTED]
Rows = dict[str, Callable[[], Tensor]]


def in_turn(make: Callable[[int], object], size: int, run: Callable) -> Callable[[], Tensor]:
    """`run` on one copy after the other."""
    copies = itertools.cycle([make(i) for i in range(max(2, -(-BYTES // size)))])
    return lambda: run(next(copies))


def plain_rows(w: Tensor, x: Tensor) -> Rows:
    """Torch's own products."""
    rows: Rows = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        given, size = x.to(dtype), w.numel() * dtype.itemsize
        for what, run in (
            ("mv", lambda m, v=given: torch.mv(m, v[0])),
            ("linear", lambda m, v=given: F.linear(v, m)),
        ):
            rows[f"{name}, {what}"] = in_turn(lambda i, t=dtype: (w + i).to(t), size, run)
    return rows


def copied(packed: Packed, _: int) -> Packed:
    """The same numbers elsewhere."""
    return Packed(packed.codes.clone(), packed.scales.clone(), None, packed.storage, packed.width)


def packed_rows(w: Tensor, x: Tensor) -> Rows:
    """Straight from codes: native, and torch ops compiled."""
    rows: Rows = {}
    for name in FORMATS:
        packed = pack(w, name)
        size = packed.codes.numel() + packed.scales.numel()

        def make(i: int, packed: Packed = packed) -> Packed:
            return copied(packed, i)

        for what, v in (
            ("one token, bf16", x.bfloat16()),
            ("one token, fp32", x),
            ("four tokens, bf16", x.bfloat16().repeat(4, 1)),
        ):
            rows[f"{name}, {what}"] = in_turn(make, size, lambda p, v=v: p.multiply(v))
        if name in ("mxfp4", "nvfp4"):
            rows[f"{name}, one token, torch ops compiled"] = in_turn(
                make, size, lambda p: bits.multiply(x, p.codes, p.scales, p.storage, None)
            )
    return rows


def check(w: Tensor, x: Tensor) -> None:
    """Packed products are those of the decoded numbers."""
    for name in FORMATS:
        packed = pack(w, name)
        exact = x.double() @ packed.decode(torch.float32).double().T
        for y in (packed.multiply(x), bits.multiply(x, packed.codes, packed.scales,
                                                    packed.storage, None)):  # fmt: skip
            assert (y - exact).abs().max() < 1e-5 * exact.abs().max(), name


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(SIZE, SIZE, generator=generator)
    x = torch.randn(1, SIZE, generator=generator)
    check(w, x)
    rows = plain_rows(w, x) | packed_rows(w, x)
    times = interleaved(rows, rounds=7, repeats=10)
    middle = {name: statistics.median(times[name]) for name in rows}
    best = min(("bf16, mv", "bf16, linear"), key=middle.__getitem__)
    cells = [
        [
            name,
            f"{middle[name] * 1e3:.2f}",
            *(f"{1 / ratio(times, name, base):.2f}" for base in (best, "fp32, mv")),
        ]
        for name in rows
    ]
    print("# One token through 4096 x 4096 weights\n")
    print("Speed: time of torch's product over that of the row. Goals for packed mxfp4 and nvfp4:")
    print("at least 1 against bf16 and at least 3 against fp32.\n")
    print(markdown(["what", "ms", f"speed against {best}", "against fp32, mv"], cells))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
