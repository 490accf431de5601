"""Each backend of the experts, transformers' experts and a dense FFN, on one CPU thread.

    PYTHONPATH=.venv/parity python benchmarks/moe_backends.py > benchmarks/moe_backends.md
    ... [--experts 64] [--tokens 4096] [--kind bf16] [--rounds 5]       (one part)

Tokens/s relative to our dense SwiGLU of equal active FLOPs, as in benchmarks/moe.py: interleaved in
one process, the ratio formed inside each round, medians. All candidates hold the same weights and
the same router; each is checked against the loop before it is timed. Every call brings new tokens,
and so new numbers of rows. transformers' are its Qwen3-MoE block with each implementation of its
experts; without the package they are left out. "capacity" runs at a capacity factor of 1.25 and
drops what is over it. A "-" would need more than 2 GiB of copied matrices. One token without
gradients takes no plan: there every backend of ours is the same call.
"""

import argparse
import gc
import importlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from moe import D_MODEL, DTYPES, prepare, repeats, set_up
from timing import interleaved, markdown, ratio
from torch import Tensor, nn

from layers.grouped import BACKENDS
from layers.moe import MoE, MoEConfig
from layers.swiglu import SwiGLU, SwiGLUConfig
from routers.top_k import TopKRouter, TopKRouterConfig

SHAPES = {8: (2, 704), 64: (8, 176), 256: (8, 176)}  # experts: (top_k, d_expert), 1408 wide in all
TOKENS = (1, 64, 4096)
KINDS = ("fp32", "bf16")
THEIRS = ("eager", "grouped_mm", "batched_mm")
FACTOR = 1.25
ROOM_BYTES = 2**31


class Backend(nn.Module):
    """A mixture run by one of its backends, its weights shared with the others."""

    def __init__(self, moe: MoE, backend: str):
        super().__init__()
        factor = FACTOR if backend == "capacity" else None
        self.moe = moe
        self.config = replace(
            moe.config, backend=backend, capacity_factor=factor, eval_capacity_factor=factor
        )

    def forward(self, x: Tensor) -> Any:
        """x: [B, S, D]."""
        self.moe.config, self.moe.experts.config = self.config, self.config.experts
        return self.moe(x)


class Theirs(nn.Module):
    """transformers' Qwen3-MoE block around the weights of ours."""

    def __init__(self, moe: MoE, implementation: str):
        super().__init__()
        name = "transformers.models.qwen3_moe.modeling_qwen3_moe"
        modeling: Any = importlib.import_module(name)
        c = moe.config
        config = modeling.Qwen3MoeConfig(
            hidden_size=c.d_model, moe_intermediate_size=c.hidden, num_experts=c.n_experts,
            num_experts_per_tok=c.top_k, norm_topk_prob=True,
        )  # fmt: skip
        config._experts_implementation = implementation
        with torch.device("meta"):
            self.block = modeling.Qwen3MoeSparseMoeBlock(config)
        self.block.gate.weight = moe.router.weight
        self.block.experts.gate_up_proj = moe.experts.gate_up.weight
        self.block.experts.down_proj = moe.experts.down.weight
        self.router_dtype = moe.router.weight.dtype

    def forward(self, x: Tensor) -> Any:
        """x: [B, S, D]. Their router multiplies in the dtype of its input."""
        gate = self.block.gate
        if x.dtype != self.router_dtype:
            with torch.no_grad():
                low = nn.Parameter(gate.weight.to(x.dtype))
            gate, self.block.gate.weight = gate.weight, low
            y = self.block(x)
            self.block.gate.weight = gate
        else:
            y = self.block(x)
        return _Output(y)


class _Output:
    def __init__(self, y: Tensor):
        self.y = y


def copied_bytes(name: str, moe: MoE, n_tokens: int, size: int) -> int:
    """Of the copies that a way of running experts makes beyond its rows."""
    c = moe.config
    if name in ("batched", "theirs batched_mm"):
        return n_tokens * c.top_k * 2 * c.hidden * c.d_model * max(size, 4)
    return 0


def candidates(moe: MoE, n_tokens: int, kind: str) -> dict[str, nn.Module]:
    """Every way of running this mixture that fits."""
    ways: dict[str, nn.Module] = {name: Backend(moe, name) for name in BACKENDS}
    try:
        for name in THEIRS:
            ways[f"theirs {name}"] = Theirs(moe, name)
    except ImportError:
        print("transformers is not installed: left out", file=sys.stderr)
    size = DTYPES[kind].itemsize
    return {n: w for n, w in ways.items() if copied_bytes(n, moe, n_tokens, size) <= ROOM_BYTES}


def check(ways: dict[str, nn.Module], x: Tensor, kind: str) -> None:
    """All give the numbers of the loop, but "capacity" where it drops some."""
    with torch.no_grad():
        expected = ways["loop"](x).y.double()
        for name, way in ways.items():
            if name == "capacity":
                continue
            error = (way(x).y.double() - expected).norm() / expected.norm()
            # their router rounds its weights to bf16, which moves some choices
            limit = 1e-5 if kind == "fp32" else 0.2 if name.startswith("theirs") else 1e-2
            assert error < limit, f"{name}: off by {error:.1e}"


def steps(layer: nn.Module, inputs: list[Tensor], train: bool) -> Callable[[], None]:
    """One call on the next of `inputs`, forward alone or with its backward."""
    turn, probe = itertools.cycle(inputs), torch.randn_like(inputs[0])

    def forward() -> None:
        with torch.no_grad():
            layer(next(turn))

    def both() -> None:
        layer.zero_grad()
        layer(next(turn).detach().requires_grad_()).y.backward(probe)

    return both if train else forward


def measure(n_experts: int, n_tokens: int, kind: str, rounds: int) -> dict[str, dict[str, float]]:
    """Pass to candidate to tokens/s relative to the dense FFN."""
    torch.manual_seed(0)
    top_k, d_expert = SHAPES[n_experts]
    config = MoEConfig(d_model=D_MODEL, d_expert=d_expert, n_experts=n_experts, top_k=top_k)
    router = TopKRouterConfig(d_model=D_MODEL, n_experts=n_experts, top_k=top_k)
    moe = MoE(config, TopKRouter(router))
    prepare(moe, kind)
    dense = prepare(SwiGLU(SwiGLUConfig(d_model=D_MODEL, d_ff=top_k * d_expert)), kind)
    calls = rounds * repeats(n_tokens) + 1
    inputs = list(torch.randn(calls, 1, n_tokens, D_MODEL, dtype=DTYPES[kind]))
    ways = candidates(moe, n_tokens, kind)
    check(ways, inputs[0], kind)
    found = {}
    for name, train in (("forward", False), ("training", True)):
        runs: dict[str, Callable[[], None]] = {
            way: steps(module, inputs, train) for way, module in {"dense": dense, **ways}.items()
        }
        times = interleaved(runs, rounds=rounds, repeats=repeats(n_tokens))
        found[name] = {way: ratio(times, "dense", way) for way in ways}
    gc.collect()
    return found


def bytes_read(n_experts: int, n_tokens: int, kind: str) -> str:
    """MiB of expert weights that one forward reads, were each expert's read once."""
    top_k, d_expert = SHAPES[n_experts]
    config = MoEConfig(d_model=D_MODEL, d_expert=d_expert, n_experts=n_experts, top_k=top_k)
    per_token = config.cost().weight_bytes_at(n_tokens) * DTYPES[kind].itemsize / 2
    return f"{per_token * n_tokens / 2**20:.0f}"


def table(rows: list[tuple[int, int, str, dict[str, dict[str, float]]]], name: str) -> str:
    """One pass of all rows as Markdown."""
    ways = list(dict.fromkeys(way for *_, found in rows for way in found[name]))
    body = []
    for n_experts, n_tokens, kind, found in rows:
        top_k, d_expert = SHAPES[n_experts]
        cells = [f"{found[name][way]:.2f}" if way in found[name] else "-" for way in ways]
        shape = f"top-{top_k} of {n_experts}, f {d_expert}"
        body.append([shape, kind, str(n_tokens), bytes_read(n_experts, n_tokens, kind), *cells])
    return markdown(["shape", "dtype", "tokens", "MiB read", *ways], body)


def main() -> None:
    """Measure what is asked for and print a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--experts", type=int, nargs="*", choices=list(SHAPES), default=SHAPES)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--kind", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"# Backends of the experts\n\n{set_up()}.\n")
    print("Tokens/s relative to our dense SwiGLU of equal active FLOPs, d_model 512.")
    rows = []
    for kind in args.kind:
        for n_experts in args.experts:
            for n_tokens in args.tokens:
                found = measure(n_experts, n_tokens, kind, args.rounds)
                rows.append((n_experts, n_tokens, kind, found))
                print(*rows[-1], file=sys.stderr, flush=True)
    for name in ("forward", "training"):
        print(f"\n{name.capitalize()}:\n\n{table(rows, name)}")
    print(
        "\nActive FLOPs are the same in every row. Where a row is slower than one of fewer experts "
        "at as many tokens, it reads more weights (MiB read: of every expert that some token is "
        "expected to choose, once) in smaller products. At one token all rows read alike; in "
        "training at few tokens every expert's gradient is written, chosen or not."
    )


if __name__ == "__main__":
    main()
