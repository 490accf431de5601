"""What Spark's FFN costs on a CPU: a few tokens by backend, and its selection on many.

    python benchmarks/spark.py > benchmarks/spark.md

One thread, CPU time, all candidates in every round, medians of the ratios inside rounds. Weights
come in four sets taken in turn, so that none waits in a cache. Layers of a model at d_model 2048,
d_ff 8192, 8% of the neurons, r 1024; the dense FFNs of two and of three matrices have the same
d_ff, so Spark's has the parameters of the first and two thirds of the second's. Freed memory is
kept, for all rows alike: page faults of fresh blocks cost more than the selection.
"""

import ctypes
import itertools
import os
import statistics
from collections.abc import Callable, Mapping

import torch
from timing import interleaved, machine, markdown, ratio
from torch import Tensor, nn

from layers.mlp import MLP, MLPConfig
from layers.spark_ffn import SparkFFN, SparkFFNConfig
from layers.statistical_topk import exact_topk, statistical_topk
from layers.swiglu import SwiGLU, SwiGLUConfig

SETS, D_MODEL, D_FF = 4, 2048, 8192
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Rows = dict[str, Callable[[], object]]


def spark(**options: object) -> SparkFFN:
    """A layer that can run single neurons."""
    given = {"d_model": D_MODEL, "d_ff": D_FF, **options}
    layer = SparkFFN(SparkFFNConfig(**given))  # pyright: ignore[reportArgumentType]
    if layer.config.backend != "dense":
        layer.pack_for_decode()
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dense, two matrices": lambda: MLP(MLPConfig(d_model=D_MODEL, d_ff=D_FF, activation="gelu")),
    "dense, gated": lambda: SwiGLU(SwiGLUConfig(d_model=D_MODEL, d_ff=D_FF)),
    "Spark, all neurons": lambda: spark(backend="dense"),
    "Spark, up dense, down in bags": lambda: spark(backend="bag"),
    "Spark, neurons alone": lambda: spark(backend="gather"),
    "the same in torch ops": lambda: spark(backend="gather"),
    "neurons alone, exact top-k": lambda: spark(backend="gather", selection="exact"),
    "neurons alone, no split (Gemma 3n)": lambda: spark(backend="gather", predictor="full"),
}


def in_turn(make: Callable[[], nn.Module], dtype: torch.dtype, x: Tensor) -> Callable[[], object]:
    """A forward of one set of weights after the other."""
    sets = [make().to(dtype).eval() for _ in range(SETS)]
    copies = itertools.cycle(sets)
    return lambda: next(copies)(x)


def in_torch(run: Callable[[], object]) -> Callable[[], object]:
    """The run without native kernels."""

    def plain() -> object:
        os.environ["MOE_ZOO_KERNELS"] = "torch"
        try:
            return run()
        finally:
            del os.environ["MOE_ZOO_KERNELS"]

    return plain


def table(times: Mapping[str, list[float]], bases: Mapping[str, str], first: str) -> str:
    """Milliseconds of each row, and how many times as fast it is as each base."""
    rows = []
    for name, found in times.items():
        gains = [f"{1 / ratio(times, name, base):.2f}" for base in bases.values()]
        rows.append([name, f"{1e3 * statistics.median(found):.2f}", *gains])
    return markdown([first, "ms", *(f"x {name}" for name in bases)], rows)


def check(rows: Mapping[str, nn.Module], x: Tensor) -> None:
    """Neurons alone give what all give."""
    first, *others = rows.values()
    for other in others:
        other.load_state_dict(first.state_dict())
        torch.testing.assert_close(other(x).y, first(x).y, rtol=1e-4, atol=1e-5)


def decode(dtype: torch.dtype) -> str:
    """One token through each layer."""
    x = torch.randn(1, 1, D_MODEL, dtype=dtype)
    rows: Rows = {name: in_turn(make, dtype, x) for name, make in LAYERS.items()}
    rows["the same in torch ops"] = in_torch(rows["the same in torch ops"])
    times = interleaved(rows, rounds=11, repeats=SETS)
    return table(
        times, {"two matrices": "dense, two matrices", "gated": "dense, gated"}, "one token"
    )


def sweep(dtype: torch.dtype) -> str:
    """Tokens together, by backend."""
    ways = {
        "all neurons": "dense", "up dense, down in bags": "bag", "neurons alone": "gather",
        "auto": "auto",
    }  # fmt: skip
    layers = {
        name: itertools.cycle([spark(backend=how).to(dtype).eval() for _ in range(2)])
        for name, how in ways.items()
    }
    rows = []
    for n in BATCHES:
        x = torch.randn(n, 1, D_MODEL, dtype=dtype)
        runs: Rows = {name: (lambda c=c, x=x: next(c)(x)) for name, c in layers.items()}
        times = interleaved(runs, rounds=3, repeats=2)
        rows.append([str(n), *(f"{1e3 * statistics.median(times[name]):.2f}" for name in ways)])
    return markdown(["tokens", *ways], rows)


def sorted_topk(x: Tensor, k: int) -> Tensor:
    """What one would write first: a mask of the k largest."""
    values, at = x.topk(k, dim=-1)
    return torch.zeros_like(x).scatter_(-1, at, values)


def trained(run: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Callable[[], object]:
    """A forward and backward."""
    leaf = x.clone().requires_grad_()
    return lambda: torch.autograd.grad(run(leaf), leaf, g)


def selection() -> str:
    """512 rows of 8192 scores, forward alone and with the backward."""
    k, x = round(0.08 * D_FF), torch.randn(512, D_FF)
    g = torch.randn_like(x)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "torch.topk and scatter": lambda x: sorted_topk(x, k),
        "exact_topk": lambda x: exact_topk(x, k),
        "statistical_topk": lambda x: statistical_topk(x, k),
        "statistical_topk, compiled": torch.compile(lambda x: statistical_topk(x, k)),
    }
    forward: Rows = {name: (lambda way=way: way(x)) for name, way in ways.items()}
    both: Rows = {name: trained(way, x, g) for name, way in ways.items()}
    with torch.no_grad():
        once = interleaved(forward, rounds=7, repeats=2)
    twice = interleaved(both, rounds=7, repeats=2)
    base = {"topk": "torch.topk and scatter"}
    return "\n\n".join(
        (table(once, base, "512 x 8192 float32, forward"), table(twice, base, "with backward"))
    )


def main() -> None:
    """Print the page."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
    print("# Spark's FFN on a CPU\n")
    print("`python benchmarks/spark.py`. " + " ".join((__doc__ or "").split("\n\n")[2].split()))
    print(f"\n{machine()}, load average {os.getloadavg()[0]:.0f}\n")
    with torch.no_grad():
        checked = {how: spark(backend=how).eval() for how in ("dense", "gather", "bag")}
        check(checked, torch.randn(3, 1, D_MODEL))
        for name, dtype in DTYPES.items():
            print(f"## Decoding, {name}\n\n{decode(dtype)}\n")
        for name, dtype in DTYPES.items():
            print(f"## Tokens together, {name}, ms\n\n{sweep(dtype)}\n")
    print(f"## Selection\n\n{selection()}")


if __name__ == "__main__":
    main()
