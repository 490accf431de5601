"""What a token costs an attention layer when it decodes, as its context grows.

    python benchmarks/spark_attention.py [--sizes 1024,2048,4096,8192] [--rounds 9]
        > benchmarks/spark_attention.md

One token over keys and values that a cache holds, without the layer's matrices, which are the same
for all; a batch of one. Heads are 256 wide, of which 128 predict, and about 256 keys are kept
(arXiv:2506.06644): once as many key and value heads as queries, once half as many (Gemma 2).
Queries and keys are normal, so that the predictor's logits are, and each layer of four in turn has
a cache of its own, so that none stays in the processor's.

- attention: `scaled_dot_product_attention` over all keys, as `zoo.attention` decodes
- attention, two matmuls: the same by torch.matmul and softmax, the faster one in bfloat16
- Spark, dense: all second scores, dropped by a weight of zero, as training computes
- Spark, kept: second scores and values at kept positions alone, as `zoo.spark_attention` decodes
- predictor alone: the first scores, which no way can do without

Interleaved rounds in one process, ratios formed inside each round, median over rounds, process CPU
time of one thread. FLOPs: attention's over `sparse_flops`.

Reading it: the fewer bytes pay from about 2,048 keys on, and the gain nears that of FLOPs only
slowly. Below, a dozen small operations that find and gather the kept keys cost what they save; the
dense form of Spark is slower than plain attention at any length in float32. In bfloat16 the fused
attention of this torch is slow for one query on a CPU, so Spark is to be held against the two
matmuls there, not against it.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle

import torch
from timing import interleaved, machine, markdown, ratio
from torch import Tensor

from zoo.attention import Attention, AttentionConfig
from zoo.cache import LayerCache
from zoo.spark_attention import SparkAttention, SparkAttentionConfig

LAYERS = 4
SPARK = SparkAttentionConfig(d_model=64, n_heads=4, n_kv_heads=4, d_head=256)
CASES = (
    ("4 heads", 4, torch.float32),
    ("4 heads on 2", 2, torch.float32),
    ("4 heads", 4, torch.bfloat16),
)
FULL, MATMULS = "attention", "attention, two matmuls"


def ways(
    config: SparkAttentionConfig, n: int, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """One token over n keys, by each way; every call is of the next layer."""
    c = config
    sizes = {name: getattr(c, name) for name in ("d_model", "n_heads", "n_kv_heads", "d_head")}
    full, spark = Attention(AttentionConfig(**sizes)), SparkAttention(c)
    held = []
    for _ in range(LAYERS):
        q = torch.randn(1, c.n_heads, 1, c.d_head).to(dtype)
        cache = LayerCache(n)
        k, v = torch.randn(2, 1, c.n_kv_heads, n, c.d_head).to(dtype)
        held.append((q, k, v, *cache.append(*spark.kept_as(k, v)), cache))

    def each(of: Callable[..., Tensor]) -> Callable[[], Tensor]:
        turn = cycle(held)
        return lambda: of(*next(turn))

    return {
        FULL: each(lambda q, k, v, *_: full.mix(q, k, v, None, None)),
        MATMULS: each(lambda q, k, v, *_: _matmuls(q, k, v)),
        "Spark, dense": each(lambda q, k, v, k1, rest, cache: spark.mix(q, k1, rest, None, None)),
        "Spark, kept": each(lambda q, k, v, k1, rest, cache: spark.mix(q, k1, rest, None, cache)),
        "predictor alone": each(lambda q, k, v, k1, *_: spark._predicted(q, k1, None)),
    }


def _matmuls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one token by its equation, heads of a group together."""
    shared = q.view(1, k.shape[1], -1, q.shape[-1])
    weights = (shared @ k.mT * q.shape[-1] ** -0.5).float().softmax(-1)
    return (weights.to(v.dtype) @ v).view(q.shape)


def rows(sizes: list[int], rounds: int) -> list[list[str]]:
    """A row of the table for each case and size."""
    found = []
    for label, n_kv_heads, dtype in CASES:
        config = replace(SPARK, n_kv_heads=n_kv_heads)
        for n in sizes:
            candidates = ways(config, n, dtype)
            times = interleaved(candidates, rounds=rounds, repeats=2 * LAYERS)
            scores = next(i.flops for i in config.cost(n, causal=False) if i.name == "scores")
            found.append(
                [
                    label,
                    str(dtype).removeprefix("torch."),
                    f"{n:,}",
                    f"{statistics.median(times[FULL]) * 1e3:.2f}",
                    *(f"{ratio(times, FULL, way):.2f}" for way in candidates if way != FULL),
                    f"{scores / config.sparse_flops(n):.2f}",
                ]
            )
            print(found[-1], file=sys.stderr, flush=True)
    return found


@torch.no_grad()
def main() -> None:
    """Print the table as a Markdown page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="1024,2048,4096,8192", help="keys")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"# {__doc__}\n{machine()}.\n\nTimes as fast as attention.\n")
    header = ["heads", "dtype", "keys", "attention, ms", "two matmuls", "Spark, dense"]
    header += ["Spark, kept", "predictor alone", "FLOPs"]
    print(markdown(header, rows([int(n) for n in args.sizes.split(",")], args.rounds)))


if __name__ == "__main__":
    sys.exit(main())
