"""MoE efficiency on one CPU thread: tokens/s relative to our dense SwiGLU of equal active FLOPs.

    python benchmarks/moe.py [--quick] [--part rows] [--tokens 1] [--rounds 7] > benchmarks/moe.md

Both sides run on the same backend, in one process, interleaved: the ratio is taken inside each
round and its median over the rounds is printed, in process CPU time. "bf16" is bf16 tokens and
weights; "bf16 leaf" keeps fp32 master weights that the leaves cast, as recipes train; "fp32" runs
through oneDNN, which keeps full precision on a CPU without AMX (checked). In the MoE++ table the
routing is forced, so that exactly a share p of assignments goes to the zero-computation experts
(2 constants, 1 copy, 1 zero), and the speed-up is over `moe`, its routing forced as well.
"""

import argparse
import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timing import interleaved, machine, markdown, ratio
from torch import Tensor, nn

from layers.base import Routing
from layers.moe import MoE, MoEConfig
from layers.moe_plus_plus import MoEPlusPlus, MoEPlusPlusConfig
from layers.precision.apply import apply_policy
from layers.precision.policy import PrecisionPolicy
from layers.swiglu import SwiGLU, SwiGLUConfig
from routers.top_k import TopKRouter, TopKRouterConfig

ROUTER_ROLES = {"router.weight": "router", "router.logits": "router"}
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
    Row(n_experts=8, top_k=2, d_expert=704, kind="bf16 leaf", n_tokens=1, forward=0.68, train=None,
        copies=8),
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

    def __init__(self, n_tokens: int, n_ffn: int, n_routes: int, share: float):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        a = 2 * n_tokens
        free = torch.arange(n_ffn, n_routes).repeat(a)[: round(share * a)]
        ffn = torch.arange(n_ffn).repeat(a)[: a - free.numel()]
        ids = torch.cat([ffn, free])[torch.randperm(a, generator=generator)]
        self.experts = ids.view(n_tokens, 2)
        self.logits = nn.Parameter(torch.randn(n_tokens, n_routes, generator=generator))

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
        apply_policy(layer, PrecisionPolicy.of("bf16"), roles=ROUTER_ROLES)
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


def repeats(n_tokens: int) -> int:
    """Calls in a round: enough for the clock, few enough to interleave."""
    return max(1, min(64, 256 // n_tokens))


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
                gate, up = (moe.experts.gate_up.weight[e].double() @ x[0, t].double()).chunk(2)
                expected[t] += w * (moe.experts.down.weight[e].double() @ (F.silu(gate) * up))
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
            candidates = {"dense": steps(dense, x, train), "moe": steps(moe, x, train)}
            times = interleaved(candidates, rounds=rounds, repeats=repeats(row.n_tokens))
            got[name] = ratio(times, "dense", "moe")
    del pairs, dense, moe
    gc.collect()
    return got


def measure_shares(kind: str, rounds: int) -> dict[float, float]:
    """Training speed-up of MoE++ over MoE, by the share p of zero-computation assignments."""
    n_tokens, config = 4096, MoEPlusPlusConfig(d_model=D_MODEL, d_expert=704, capacity_factor=None)
    x = torch.randn(1, n_tokens, D_MODEL, dtype=DTYPES[kind])
    n = config.n_experts
    plain = MoE(MoEConfig(d_model=D_MODEL, d_expert=704), Fixed(n_tokens, n, n, 0.0))
    layers: dict[str, nn.Module] = {"moe": plain}
    for p, _ in SHARES:
        layers[str(p)] = MoEPlusPlus(config, Fixed(n_tokens, n, config.n_routes, p))
    candidates = {name: steps([prepare(layer, kind)], x, True) for name, layer in layers.items()}
    times = interleaved(candidates, rounds=rounds)
    return {p: ratio(times, "moe", str(p)) for p, _ in SHARES}


def set_up() -> str:
    """Kept memory blocks, fp32 through oneDNN where exact. Returns what ran, for the table."""
    try:  # keep freed blocks: the page faults of a fresh output cost more than writing it
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        kept = "memory kept"
    except OSError:
        kept = "memory not kept"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # pyright: ignore
    a, b = torch.randn(64, 256), torch.randn(256, 64)
    if (a @ b - (a.double() @ b.double())).abs().max() > 1e-3:  # AMX would multiply in bf16
        torch.backends.mkldnn.matmul.fp32_precision = "none"  # pyright: ignore
        return f"{machine()}; {kept}; fp32 by the default library"
    return f"{machine()}; {kept}; fp32 through oneDNN"


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one row only")
    parser.add_argument("--part", choices=("rows", "shares"), help="one of the two tables")
    parser.add_argument("--tokens", type=int, help="only the rows of that many tokens")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    page = [f"# MoE speed\n\n{set_up()}.\n"]
    page.append("Tokens/s relative to our dense SwiGLU of equal active FLOPs, d_model 512.\n")
    rows = []
    for row in ROWS[:1] if args.quick else ROWS:
        if args.part == "shares" or args.tokens not in (None, row.n_tokens):
            continue
        got = measure(row, args.rounds)
        cells = [
            f"{got[name]:.2f} ({getattr(row, name):.2f})" if name in got else "-"
            for name in ("forward", "train")
        ]
        shape = f"top-{row.top_k} of {row.n_experts}, f {row.d_expert}"
        rows.append([shape, row.kind, str(row.n_tokens), *cells])
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    head = ["shape", "dtype", "tokens", "forward (to reach)", "training (to reach)"]
    page.append(markdown(head, rows))
    if not args.quick and args.tokens is None and args.part != "rows":
        page.append("\nMoE++, top-2 of 8, f 704, 4096 tokens: training speed-up over `moe`.\n")
        got = [measure_shares(kind, args.rounds) for kind in DTYPES]
        rows = [
            [f"{p:.2f}", f"{1 / (1 - p):.2f}", *(f"{g[p]:.2f}" for g in got), f"{goal:.2f}"]
            for p, goal in SHARES
        ]
        page.append(markdown(["p", "ideal", *DTYPES, "to reach"], rows))
    print("\n".join(page))


if __name__ == "__main__":
    main()
