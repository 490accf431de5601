"""What a training step of a table costs when few of its rows are touched, as the table grows.

    python benchmarks/memory_step.py [--sizes 14,16,18,20] [--rounds 7] [--parts time,hits,memory]
        > benchmarks/memory_step.md

A step is the look-up of 512 tokens of 32 slots, backward, clipping, optimizer and clearing of the
gradient, in float32. The 16,384 hits fall on 8,192 rows of the table, each step other ones, as many
at every size; the search over keys is left out, for it is the same. State is written once before
the clock starts, so that no step waits for the system to give it memory.

Time: one process, interleaved rounds of every size and way, ratios formed inside each round, median
over rounds, process CPU time of one thread. Memory: a process for each size and way; what its
resident memory rises to in steps, above what it was when table and state stood. Hits: RowAdam
beside AdamW where more hits fall anywhere in smaller tables, for where compact gradients begin to
pay (`recipes.table_optim.SPARSE_FROM`).
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import interleaved, machine, markdown, ratio
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, SparseAdam

from layers.linear import ValueTable
from recipes.row_optim import RowAdagrad, RowAdam, clip_tables

TOKENS, K, ROWS = 512, 32, 8192
SMALL, HITS = (12, 13, 14, 15, 16, 17), (32, 128, 256)  # log2 of rows; slots a token
BATCHES = 4  # sets of rows, one after the other
DENSE, OURS = "AdamW, dense, fused", "RowAdam"
WAYS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    DENSE: lambda p: AdamW(p, weight_decay=0, fused=True),
    "SparseAdam, embedding_bag": SparseAdam,
    OURS: RowAdam,
    "RowAdam, weight decay": lambda p: RowAdam(p, weight_decay=0.1),
    "RowAdam, one v a row": lambda p: RowAdam(p, second_moment="row"),
    "RowAdagrad, one sum a row": lambda p: RowAdagrad(p, second_moment="row"),
}


class Step:
    """One way at one size. Calling it trains one step.

    k: slots a token; n_rows: rows of the table that they are drawn from, None: all of it.
    """

    def __init__(self, way: str, weight: nn.Parameter, k: int = K, n_rows: int | None = ROWS):
        self.way, self.k, self.n_rows = way, k, n_rows
        self.table = ValueTable(1, weight.shape[1], role="memory_values", sparse=way != DENSE)
        self.table.weight = nn.Parameter(weight.data)  # ways share numbers, not gradients
        self.optimizer = WAYS[way]([self.table.weight])
        self.batches = [self._batch(seed) for seed in range(BATCHES)]
        self.weights = torch.rand(TOKENS, k, requires_grad=True)
        self.dy = torch.randn(TOKENS, weight.shape[1])
        self.done = 0
        self()
        for state in self.optimizer.state.values():
            for t in state.values():
                if isinstance(t, Tensor):
                    t.add_(0)

    def _batch(self, seed: int) -> Tensor:
        torch.manual_seed(seed)
        if self.n_rows is None:
            return torch.randint(self.table.weight.shape[0], (TOKENS, self.k))
        rows = torch.randperm(self.table.weight.shape[0])[: self.n_rows]
        hits = rows.repeat(TOKENS * self.k // len(rows))
        return hits[torch.randperm(len(hits))].view(TOKENS, self.k)

    def __call__(self) -> None:
        ids = self.batches[self.done % BATCHES]
        self.done += 1
        table = self.table.weight
        if self.way.startswith("SparseAdam"):
            y = F.embedding_bag(
                ids, table, per_sample_weights=self.weights, mode="sum", sparse=True
            )
        else:
            y = self.table(ids, self.weights)
        y.backward(self.dy)
        clip_tables([table], 1.0)  # torch's own takes no sparse gradients
        self.optimizer.step()
        self.optimizer.zero_grad()


def times(sizes: list[int], width: int, rounds: int) -> list[list[str]]:
    """A row of the table for each way: its time beside AdamW's, and how it grows."""
    steps: dict[str, Callable[[], object]] = {}
    for size in sizes:
        weight = nn.Parameter(torch.randn(1 << size, width))
        steps |= {f"{way} {size}": Step(way, weight) for way in WAYS}
    found = interleaved(steps, rounds=rounds)
    rows = []
    for way in WAYS:
        first = min(found[f"{way} {sizes[0]}"]) * 1e3
        beside = [f"{ratio(found, f'{DENSE} {n}', f'{way} {n}'):.2f}" for n in sizes]
        grown = f"{ratio(found, f'{way} {sizes[-1]}', f'{way} {sizes[0]}'):.2f}"
        rows.append([way, f"{first:.1f}", *beside, grown])
    return rows


def by_hits(width: int, rounds: int) -> list[list[str]]:
    """A row of the table for each number of hits: RowAdam's speed beside AdamW's, by size."""
    rows = []
    for k in HITS:
        steps: dict[str, Callable[[], object]] = {}
        for size in SMALL:
            weight = nn.Parameter(torch.randn(1 << size, width))
            steps |= {f"{way} {size}": Step(way, weight, k, None) for way in (DENSE, OURS)}
        found = interleaved(steps, rounds=rounds)
        beside = [f"{ratio(found, f'{DENSE} {n}', f'{OURS} {n}'):.2f}" for n in SMALL]
        rows.append([f"{TOKENS * k:,}", *beside])
    return rows


def memory(sizes: list[int], width: int) -> list[list[str]]:
    """A row of the table for each way: MiB of state, and that a step rises above it, by size."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for way in WAYS:
        cells = []
        for size in sizes:
            with context.Pool(1) as pool:
                state, risen = pool.apply(_risen, (way, size, width))
            cells.append(f"{state:.0f} + {risen:.0f}")
        rows.append([way, *cells])
    return rows


def _risen(way: str, size: int, width: int) -> tuple[float, float]:
    torch.set_num_threads(1)
    step = Step(way, nn.Parameter(torch.randn(1 << size, width)))
    tensors: list[Any] = [t for s in step.optimizer.state.values() for t in s.values()]
    state = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    before = _resident("VmRSS")
    for _ in range(BATCHES):
        step()
    return state / 2**20, (_resident("VmHWM") - before) / 2**10


def _resident(name: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    """Print the tables as a Markdown page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="14,16,18,20", help="log2 of rows")
    parser.add_argument("--width", type=int, default=128, help="numbers a row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", default="time,hits,memory")
    args = parser.parse_args()
    sizes = [int(n) for n in args.sizes.split(",")]
    labels = [f"2^{n}" for n in sizes]
    print(f"# {__doc__}\n{machine()}; rows of {args.width} numbers.\n")
    if "time" in args.parts:
        print(f"Times as fast as {DENSE!r}, by rows of the table; growth of a step's time.\n")
        header = ["way", f"{labels[0]}, ms", *labels, f"growth to {labels[-1]}"]
        print(markdown(header, times(sizes, args.width, args.rounds)), "\n", flush=True)
    if "hits" in args.parts:
        print(f"Times {OURS!r} is as fast as {DENSE!r}, by hits a step and rows of the table.\n")
        header = ["hits", *(f"2^{n}" for n in SMALL)]
        print(markdown(header, by_hits(args.width, args.rounds)), "\n", flush=True)
    if "memory" in args.parts:
        print("MiB of optimizer state + MiB that a step rises above table and state.\n")
        print(markdown(["way", *labels], memory(sizes, args.width)))


if __name__ == "__main__":
    sys.exit(main())
