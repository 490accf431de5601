"""MoE efficiency on one CPU thread: tokens/s relative to our dense SwiGLU of equal active FLOPs.

    python -m benchmarks.moe [--quick] [--rounds 7] [--out benchmarks/moe.md]

Both sides run on the same backend, in one process, interleaved: the ratio is taken inside each
round and its median over the rounds is printed, in process CPU time. "bf16" is bf16 tokens and
weights; "bf16 leaf" keeps fp32 master weights that the leaves cast, as recipes train; "fp32" runs
through oneDNN, which keeps full precision on a CPU without AMX (checked). In the MoE++ table the
routing is forced, so that exactly a share p of assignments goes to the zero-computation experts,
and the speed-up is over the same layer at p = 0.
"""

import argparse
import ctypes
import datetime
import gc
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.base import Routing
from layers.moe import MoE, MoEConfig
from layers.moe_plus_plus import MoEPlusPlus, MoEPlusPlusConfig
from layers.precision.apply import apply_policy
from layers.precision.policy import PrecisionPolicy
from layers.swiglu import SwiGLU, SwiGLUConfig
from routers.top_k import TopKRouter, TopKRouterConfig

D_MODEL = 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16 leaf": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One shape, and what it must reach (forward, training); None: not measured."""

    n_experts: int
    top_k: int
    d_expert: int
    kind: str
    n_tokens: int
    forward: float
    train: float | None
    copies: int = 1  # sets of weights to rotate through, so that they come from memory


ROWS = (
    Row(n_experts=8, top_k=2, d_expert=704, kind="fp32", n_tokens=4096, forward=0.88, train=0.88),
    Row(n_experts=8, top_k=2, d_expert=704, kind="bf16", n_tokens=4096, forward=0.84, train=0.82),
    Row(n_experts=64, top_k=8, d_expert=176, kind="fp32", n_tokens=4096, forward=0.70, train=0.75),
    Row(n_experts=64, top_k=8, d_expert=176, kind="bf16", n_tokens=4096, forward=0.64, train=0.67),
    Row(n_experts=64, top_k=2, d_expert=704, kind="bf16", n_tokens=4096, forward=0.70, train=0.71),
    Row(n_experts=256, top_k=8, d_expert=176, kind="bf16", n_tokens=4096, forward=0.47, train=0.50),
    Row(n_experts=8, top_k=2, d_expert=704, kind="fp32", n_tokens=64, forward=0.39, train=0.42),
    Row(n_experts=8, top_k=2, d_expert=704, kind="fp32", n_tokens=1, forward=0.90, train=None,
        copies=8),
    Row(n_experts=8, top_k=2, d_expert=704, kind="bf16", n_tokens=1, forward=0.68, train=None,
        copies=16),
    Row(n_experts=8, top_k=2, d_expert=704, kind="bf16 leaf", n_tokens=4096, forward=0.84,
        train=0.82),
    Row(n_experts=64, top_k=8, d_expert=176, kind="bf16 leaf", n_tokens=4096, forward=0.64,
        train=0.67),
    Row(n_experts=64, top_k=2, d_expert=704, kind="bf16 leaf", n_tokens=4096, forward=0.70,
        train=0.71),
)  # fmt: skip

SHARES = ((0.25, 1.20), (0.50, 1.65), (0.75, 2.70))  # p, the training speed-up to reach


class Fixed(nn.Module):
    """A router that has decided: a share p of assignments to zero-computation experts."""

    def __init__(self, n_tokens: int, config: MoEPlusPlusConfig, share: float):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        a = n_tokens * config.top_k
        free = torch.arange(config.n_experts, config.n_routes).repeat(a)[: round(share * a)]
        ffn = torch.arange(config.n_experts).repeat(a)[: a - free.numel()]
        ids = torch.cat([ffn, free])[torch.randperm(a, generator=generator)]
        self.experts = ids.view(n_tokens, config.top_k)
        self.logits = nn.Parameter(torch.randn(n_tokens, config.n_routes, generator=generator))

    def forward(self, x: Tensor, carry: Tensor | None, mask: Tensor | None) -> Routing:
        """Weights are a softmax, so that their gradient is computed too."""
        weights = self.logits.gather(-1, self.experts).softmax(-1)
        return Routing(self.experts, weights, self.logits, {})


def build(row: Row) -> tuple[nn.Module, nn.Module]:
    """(dense, MoE) of equal active FLOPs."""
    config = MoEConfig(
        d_model=D_MODEL, d_expert=row.d_expert, n_experts=row.n_experts, top_k=row.top_k
    )
    router = TopKRouterConfig(d_model=D_MODEL, n_experts=row.n_experts, top_k=row.top_k)
    dense = SwiGLU(SwiGLUConfig(d_model=D_MODEL, d_ff=row.d_expert * row.top_k))
    return dense, MoE(config, TopKRouter(router))


def prepare(layer: nn.Module, kind: str) -> nn.Module:
    """Weights in the dtype of the row; the router's stay float32."""
    if kind == "bf16 leaf":
        apply_policy(layer, PrecisionPolicy.of("bf16"), roles={"router.weight": "router"})
    elif kind == "bf16":
        for name, parameter in layer.named_parameters():
            if "router" not in name:
                parameter.data = parameter.data.bfloat16()
    return layer


def steps(layers: list[nn.Module], x: Tensor, train: bool) -> Callable[[], None]:
    """One call on the next of `layers`, forward alone or with its backward."""
    turn, probe = iter(range(10**9)), torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            layers[next(turn) % len(layers)](x)

    def both() -> None:
        layer = layers[next(turn) % len(layers)]
        layer.zero_grad()
        inputs = x.detach().requires_grad_()
        layer(inputs).y.backward(probe)

    return both if train else forward


def interleaved(candidates: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of process CPU time a call, per round and candidate."""
    calls, table = [], []
    for step in candidates:
        step()
        start = time.process_time()
        step()
        calls.append(max(1, int(0.1 / max(time.process_time() - start, 1e-6))))
    for _ in range(rounds):
        times = []
        for step, n in zip(candidates, calls, strict=True):
            start = time.process_time()
            for _ in range(n):
                step()
            times.append((time.process_time() - start) / n)
        table.append(times)
    return table


def check(row: Row) -> None:
    """The layer that is timed, in the row's dtype, is the sum that it stands for, in float64."""
    _, moe = build(row)
    assert isinstance(moe, MoE)
    prepare(moe, row.kind)
    x = torch.randn(1, min(row.n_tokens, 16), D_MODEL, dtype=DTYPES[row.kind])
    with torch.no_grad():
        routing: Routing = moe.router(x[0])
        expected = torch.zeros(x.shape[1], D_MODEL, dtype=torch.float64)
        for t, (experts, weights) in enumerate(zip(routing.experts, routing.weights, strict=True)):
            for e, w in zip(experts.tolist(), weights.double(), strict=True):
                gate, up = (moe.gate_up.weight[e].double() @ x[0, t].double()).chunk(2)
                expected[t] += w * (moe.down.weight[e].double() @ (F.silu(gate) * up))
        error = (moe(x).y[0] - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if row.kind == "fp32" else 3e-2), f"{row}: off by {error:.1e}"


def measure(row: Row, rounds: int) -> dict[str, float]:
    """MoE efficiency forward and in training."""
    torch.manual_seed(0)
    check(row)
    pairs = [build(row) for _ in range(row.copies)]
    dense, moe = ([prepare(layer, row.kind) for layer in side] for side in zip(*pairs, strict=True))
    x = torch.randn(1, row.n_tokens, D_MODEL, dtype=DTYPES[row.kind])
    got = {}
    for name, train in (("forward", False), ("train", True)):
        if getattr(row, name) is not None:
            table = interleaved([steps(dense, x, train), steps(moe, x, train)], rounds)
            got[name] = median(d / m for d, m in table)
    del pairs, dense, moe
    gc.collect()
    return got


def measure_shares(kind: str, rounds: int) -> dict[float, float]:
    """Training speed-up of MoE++ at each share p of zero-computation assignments over p = 0."""
    config = MoEPlusPlusConfig(d_model=D_MODEL, d_expert=704, capacity_factor=None)
    x = torch.randn(1, 4096, D_MODEL, dtype=DTYPES[kind])
    shares = [0.0, *(p for p, _ in SHARES)]
    layers = [prepare(MoEPlusPlus(config, Fixed(4096, config, p)), kind) for p in shares]
    table = interleaved([steps([layer], x, True) for layer in layers], rounds)
    return {p: median(t[0] / t[i] for t in table) for i, p in enumerate(shares) if p}


def set_up() -> str:
    """One thread, kept blocks, fp32 through oneDNN. Returns what ran, for the table."""
    torch.set_num_threads(1)
    try:  # keep freed blocks: a fresh output of 32 MB costs more than its copy
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        kept = "mallopt"
    except OSError:
        kept = "no mallopt"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # pyright: ignore
    a, b = torch.randn(64, 256), torch.randn(256, 64)
    error = float((a @ b - (a.double() @ b.double())).abs().max())
    if error > 1e-3:
        torch.backends.mkldnn.matmul.fp32_precision = "none"  # pyright: ignore
    fp32 = "oneDNN" if error <= 1e-3 else "default"
    date = datetime.date.today().isoformat()
    return (
        f"{date}, torch {torch.__version__}, {platform.machine()} "
        f"{torch.backends.cpu.get_cpu_capability()}, 1 thread, {kept}, fp32 matmul: {fp32}"
    )


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one row only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    lines = [f"# MoE speed: {set_up()}", ""]
    lines += ["Tokens/s relative to our dense SwiGLU of equal active FLOPs, d_model 512.", ""]
    lines += [
        "| shape | dtype | tokens | forward (to reach) | training (to reach) |",
        "|" + "---|" * 5,
    ]
    print("\n".join(lines), flush=True)
    for row in ROWS[:1] if args.quick else ROWS:
        got = measure(row, args.rounds)
        cells = [
            "-" if name not in got else f"{got[name]:.2f} ({getattr(row, name):.2f})"
            for name in ("forward", "train")
        ]
        shape = f"top-{row.top_k} of {row.n_experts}, f {row.d_expert}"
        lines.append(f"| {shape} | {row.kind} | {row.n_tokens} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if not args.quick:
        head = ["", "MoE++, top-2 of 8, f 704, 4096 tokens: training speed-up over p = 0.", ""]
        head += ["| p | ideal | fp32 | bf16 | bf16 leaf | to reach |", "|" + "---|" * 6]
        got = [measure_shares(kind, args.rounds) for kind in DTYPES]
        rows = []
        for p, goal in SHARES:
            cells = " | ".join(f"{g[p]:.2f}" for g in got)
            rows.append(f"| {p:.2f} | {1 / (1 - p):.2f} | {cells} | {goal:.2f} |")
        print("\n".join(head + rows))
        lines += head + rows
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
