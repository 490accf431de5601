"""Memory layers on one CPU thread: speed relative to other ways and other packages.

    python benchmarks/memory.py [--rounds 7] [--sizes 256,512] [--tokens 1] > benchmarks/memory.md

One process, interleaved rounds, the ratio formed inside each round, its median over rounds, process
CPU time; float32, d_model 256, 4 heads of 32 slots, n keys a side. "Gathered" is our
layer with torch's own search and rows gathered before they are weighted, as most code does it. The
packages are timed where they are installed: product-key-memory (lucidrains), PEER-pytorch. A
training step is forward and backward with dense gradients, without the optimizer; a single token
is decoded, so not trained.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timing import interleaved, machine, markdown, ratio
from torch import Tensor, nn

import zoo
from layers.memory import Hits, Pool

D, HEADS, K = 256, 4, 32
HIT: dict[str, Any] = {"heads": HEADS, "top_k": K, "d_key": 128}


class Gathered(nn.Module):
    """A layer of ours that searches by `torch.topk` and gathers rows [T, K, D]."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, T, D]."""
        memory: Any = self.layer.memory
        hits: Hits = self._search(memory.keys, memory.query(x))
        rows, weights = hits.slots.flatten(1), hits.scores.softmax(-1).flatten(2)[:, 0]
        pool: Pool = memory.pool
        if pool.inputs is not None:
            up = F.embedding(rows, pool.inputs.weight)
            weights = weights * F.gelu(torch.einsum("tkd,td->tk", up, x[0]))
        return torch.einsum("tk,tkd->td", weights, F.embedding(rows, pool.values.weight))

    def _search(self, keys: Any, q: Tensor) -> Hits:
        n = keys.config.n_keys
        scores = torch.einsum("thsd,hsnd->thsn", q.unflatten(1, (HEADS, 2)), keys.weight)
        best, ids = scores.topk(K, dim=-1)
        sums = (best[:, :, 0, :, None] + best[:, :, 1, None, :]).flatten(2)
        slots = (ids[:, :, 0, :, None] * n + ids[:, :, 1, None, :]).flatten(2)
        kept, places = sums.topk(K, dim=-1)
        return Hits(slots.gather(-1, places), kept[:, None])


def others(n: int) -> dict[str, nn.Module]:
    """Layers of other packages that are installed, at the same sizes."""
    found: dict[str, nn.Module] = {}
    try:
        from product_key_memory import PKM  # pyright: ignore[reportMissingImports]

        found["product-key-memory"] = PKM(D, heads=HEADS, num_keys=n, topk=K, dim_head=2 * 128)
    except ImportError:
        pass
    try:
        from PEER_pytorch import PEER  # pyright: ignore[reportMissingImports]

        found["PEER-pytorch"] = PEER(
            D, heads=HEADS, num_experts=n * n, num_experts_per_head=K, dim_key=128,
            non_competing_scores=False,
        )  # fmt: skip
    except ImportError:
        pass
    return found


def steps(layer: nn.Module, x: Tensor, train: bool) -> Callable[[], None]:
    """One call, forward alone or with its backward."""
    probe = torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def both() -> None:
        layer.zero_grad()
        inputs = x.detach().requires_grad_()
        y = layer(inputs)
        (y.y if hasattr(y, "y") else y).reshape(probe.shape).backward(probe)

    return both if train else forward


def measure(n: int, n_tokens: int, rounds: int) -> list[list[str]]:
    """Rows of the table: speed of each candidate over the one it is compared with."""
    torch.manual_seed(0)
    x = torch.randn(1, n_tokens, D)
    layers: dict[str, nn.Module] = {}
    kinds = (False, True) if n_tokens > 1 else (False,)
    for name in ("pkm", "peer"):
        layer = zoo.create(name, d_model=D, n_keys=n, **HIT)
        layer.train(n_tokens > 1)  # a batch of one token has no statistics
        layers[name], layers[f"{name}, gathered"] = layer, Gathered(layer)
        with torch.no_grad():
            torch.testing.assert_close(
                layer(x).y[0], layers[f"{name}, gathered"](x), rtol=1e-3, atol=1e-4
            )
    layers |= others(n)
    base = {"pkm": ["pkm, gathered", "product-key-memory"], "peer": ["peer, gathered",
            "PEER-pytorch"]}  # fmt: skip
    times = {
        train: interleaved(
            {k: steps(v, x, train) for k, v in layers.items()},
            rounds=rounds,
            repeats=max(1, 64 // n_tokens),
        )
        for train in kinds
    }
    found = []
    for ours, against in base.items():
        for other in against:
            if other in layers:
                cells = [f"{ratio(times[train], other, ours):.2f}" for train in kinds]
                found.append(
                    [f"{n}^2", str(n_tokens), ours, other, *cells, *["-"] * (2 - len(cells))]
                )
                print(*found[-1], sep=" | ", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", default="128,256,512")
    parser.add_argument("--tokens", default="1024,1", help="tokens in a call; 1 is decoded")
    args = parser.parse_args()
    kernels = os.environ.get("MOE_ZOO_KERNELS", "auto")
    sizes = [int(n) for n in args.sizes.split(",")]
    tokens = [int(t) for t in args.tokens.split(",")]
    rows = [row for t in tokens for n in sizes for row in measure(n, t, args.rounds)]
    print(f"# Memory layers\n\n{machine()}; kernels {kernels}.\n")
    print(f"Speed of ours over another's; d_model {D}, {HEADS} heads of {K} slots.\n")
    print(markdown(["slots", "tokens", "ours", "other", "forward", "training"], rows))


if __name__ == "__main__":
    main()
