"""UltraMemV2 against a mixture with eight active experts: text, context, facts and decoding.

    python benchmarks/memory_claims.py [--part text,recall,copy,facts,decode] [--workers N] \\
        [--steps N] [--seeds 0,1,2] [--lrs 2.5e-3,5e-3,1e-2] [--out DIR] > memory_claims.md

The claims (arXiv:2508.18756, abstract and table 2): on par with mixtures of eight active experts at
equal compute and parameters, with much less memory access, and better at what needs the context:
long memorising 21.9 to 23.5, in-context learning 21.6 to 29.5, key-value retrieval 96.5 to 97.0 (of
models of unequal total size there; of equal ones here). Every layer is turned until it costs the
mixture's FLOPs per token, and its table until it holds as many parameters. Each gets the same
number of learning rates, tried on a seed that is not reported. Finished runs are kept in DIR, so
that a second call only reads them and times the decoding.
"""

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from paired import Job, gap, told, train_all
from timing import interleaved, machine, markdown, ratio
from torch import Tensor, nn

import zoo
from layers.base import Cost
from zoo.accounting import stored
from zoo.precision import policy_of
from zoo.registry import resolve

MOE, MEMORY = "moe", "ultramem_v2"
N_EXPERTS, ACTIVE = 32, 8
N_LAYERS = 4
SWEEP_SEED = 100  # of the learning rates; never reported
TASKS: dict[str, dict[str, Any]] = {
    "text": {"corpus": "classics7", "seq_len": 128, "batch_size": 8},
    "recall": {"task": {"name": "recall", "n_pairs": 4, "n_queries": 4, "vocab": 32},
               "seq_len": 15, "batch_size": 64},
    "copy": {"task": {"name": "copy", "length": 120, "vocab": 128}, "seq_len": 240,
             "batch_size": 4},
    "facts": {"task": {"name": "facts", "n_facts": 8192, "key_len": 3, "vocab": 128},
              "seq_len": 63, "batch_size": 16},
}  # fmt: skip
MODEL = {"d_model": 128, "n_layers": N_LAYERS, "n_heads": 2, "max_seq_len": 256, "qk_norm": True}
D_DECODED = 512  # width of the layers that decode
TOKENS_AT_ONCE = (1, 4, 16, 64)
COLD_BYTES = 256 << 20  # of all copies of a layer: more than any cache holds


def sizes(d_model: int) -> dict[str, dict[str, Any]]:
    """Options of both layers at one width, equal in FLOPs (2%) and parameters (5%).

    Raises:
        ValueError: no table comes near enough.
    """
    moe: dict[str, Any] = {
        "n_experts": N_EXPERTS,
        "top_k": ACTIVE,
        "d_expert": 3 * d_model // ACTIVE,
    }
    target = resolve(MOE, d_model=d_model, **moe).cost()

    def of(n_keys: int) -> dict[str, Any]:
        options: dict[str, Any] = {"d_model": d_model, "n_keys": n_keys, "depth": N_LAYERS}
        return zoo.match(MEMORY, flops=target.flops, multiple_of=8, **options).options

    def residual(n_keys: int) -> float:
        return abs(resolve(MEMORY, **of(n_keys)).cost().params / target.params - 1)

    best = min(range(64, 257), key=residual)
    if residual(best) > 0.05:
        raise ValueError(f"no table of 64^2 to 256^2 rows comes within 5% of {target.params}")
    return {MOE: {"d_model": d_model, **moe}, MEMORY: of(best)}


def recipes(part: str, steps: int) -> dict[str, dict[str, Any]]:
    """Label to recipe; they differ in the layer, its losses and the table's own optimizer."""
    shared = {
        "data": TASKS[part] | {"eval_bytes_per_domain": 2048},
        "trainer": {"max_steps": steps, "eval_every_steps": max(steps // 4, 1), "threads": 1,
                    "checkpoint_every_steps": steps, "log_every_steps": 20},
    }  # fmt: skip
    ffns = {
        name: {"name": name, **{k: v for k, v in options.items() if k != "d_model"}}
        for name, options in sizes(MODEL["d_model"]).items()
    }
    own = {
        MOE: {"loss_weights": {"balance": 0.01, "z": 0.001}, "optim": {}},
        MEMORY: {"optim": {"table": {}}},  # values by rows, 4 times the rate, falling to 1
    }
    return {
        name: {**shared, "model": MODEL | {"ffn": ffn}, **own[name]} for name, ffn in ffns.items()
    }


def job(part: str, label: str, recipe: dict[str, Any], lr: float, seed: int, out: Path) -> Job:
    """One training at one rate and seed."""
    keys = {**recipe, "optim": recipe["optim"] | {"lr": lr}, "seed": seed}
    steps = recipe["trainer"]["max_steps"]
    return Job(label, keys, out / f"{part}-{label}-lr{lr:g}-n{steps}-s{seed}")


def bits(result: dict[str, Any]) -> float:
    """Held-out bits per byte; infinite where training ended in no number."""
    found = result["final"]["bpb"]
    return math.inf if found is None else found


def learn(
    parts: Sequence[str], args: argparse.Namespace
) -> dict[str, dict[str, tuple[float, list[dict[str, Any]]]]]:
    """part -> label -> (its best learning rate, a result a seed)."""
    every = {part: recipes(part, args.steps) for part in parts}
    cells = [(part, label) for part in parts for label in every[part]]
    tried = {
        (*cell, lr): job(*cell, every[cell[0]][cell[1]], lr, SWEEP_SEED, args.out)
        for cell in cells
        for lr in args.lrs
    }
    swept = train_all(list(tried.values()), args.workers) if len(args.lrs) > 1 else {}
    best = {
        cell: min(args.lrs, key=lambda lr, cell=cell: bits(swept[tried[*cell, lr].out]))
        if swept
        else args.lrs[0]
        for cell in cells
    }
    jobs = {
        (*cell, seed): job(*cell, every[cell[0]][cell[1]], best[cell], seed, args.out)
        for cell in cells
        for seed in args.seeds
    }
    results = train_all(list(jobs.values()), args.workers)
    return {
        part: {
            label: (best[part, label], [results[jobs[part, label, s].out] for s in args.seeds])
            for label in every[part]
        }
        for part in parts
    }


def outcome(part: str, found: dict[str, tuple[float, list[dict[str, Any]]]]) -> list[list[str]]:
    """The rows of one part: each layer, and what the difference says."""
    measures = ["bpb"] if part == "text" else ["accuracy", "nats_per_token"]
    rows = []
    for measure in measures:
        values = {label: [r["final"][measure] for r in runs] for label, (_, runs) in found.items()}
        if any(x is None for given in values.values() for x in given):
            rows.append([part, measure, *("diverged" for _ in values), "", "", ""])
            continue
        mean = [f"{statistics.mean(values[label]):.4f}" for label in (MOE, MEMORY)]
        rates = " / ".join(f"{found[label][0]:g}" for label in (MOE, MEMORY))
        pair = values[MEMORY], values[MOE]
        rows.append([part, measure, *mean, gap(*pair), told(*pair), rates])
    return rows


def one_cost(found: dict[str, tuple[float, list[dict[str, Any]]]]) -> list[list[str]]:
    """What the whole models of a part cost."""
    rows = []
    for label in (MOE, MEMORY):
        cost = found[label][1][0]["cost"]
        read = [f"{cost['weight_bytes_per_token'][n]:,.0f}" for n in ("1", "16", "256")]
        speed = statistics.mean(r["speed"]["tokens_per_s"] for r in found[label][1])
        rows.append([
            label, f"{cost['params']:,}", f"{cost['active_params']:,.0f}",
            f"{cost['flops_per_token']:,.0f}", *read, f"{speed:,.0f}",
        ])  # fmt: skip
    return rows


class Decoder:
    """A layer in many copies, taken in turn with other tokens: its weights come from memory."""

    def __init__(self, name: str, options: dict[str, Any], n_tokens: int):
        cost = resolve(name, **options).cost()
        self.cost: Cost = stored(cost, policy_of("fp32"))
        n_copies = max(-(-COLD_BYTES // (4 * self.cost.params)), 2)
        self.layers: Iterator[nn.Module] = cycle(
            [zoo.create(name, precision="fp32", **options).eval() for _ in range(n_copies)]
        )
        tokens = torch.randn(64, 1, n_tokens, options["d_model"])
        self.tokens: Iterator[Tensor] = cycle(tokens)

    def __call__(self) -> None:
        with torch.no_grad():
            next(self.layers)(next(self.tokens))


def decode(rounds: int) -> list[list[str]]:
    """Bytes and CPU time of one layer for one token and for some that come together, in fp32."""
    rows = []
    settled = sizes(D_DECODED)
    for n in TOKENS_AT_ONCE:
        torch.manual_seed(0)
        layers = {name: Decoder(name, options, n) for name, options in settled.items()}
        times = interleaved(layers, rounds=rounds, repeats=32)
        read = {name: n * layer.cost.weight_bytes_at(n) / 2**20 for name, layer in layers.items()}
        us = {name: 1e6 * statistics.median(times[name]) for name in layers}
        rows.append([
            str(n), f"{read[MOE]:.2f}", f"{read[MEMORY]:.2f}", f"{read[MOE] / read[MEMORY]:.2f}",
            f"{us[MOE]:.0f}", f"{us[MEMORY]:.0f}", f"{ratio(times, MOE, MEMORY):.2f}",
        ])  # fmt: skip
    return rows


def main() -> None:
    known = (*TASKS, "decode")
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default=",".join(known), help=f"of {', '.join(known)}")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=lambda s: [int(x) for x in s.split(",")], default=[0, 1, 2])
    parser.add_argument(
        "--lrs", type=lambda s: [float(x) for x in s.split(",")], default=[2.5e-3, 5e-3, 1e-2]
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("runs/memory_claims"))
    args = parser.parse_args()
    parts = args.part.split(",")
    if wrong := [part for part in parts if part not in known]:
        parser.error(f"--part: no such part {wrong[0]!r}, known: {', '.join(known)}")
    if len(args.seeds) < 2:
        parser.error("--seeds: a difference needs two seeds or more")

    print(f"{machine()}.\n")
    trained = [part for part in parts if part != "decode"]
    if trained:
        results = learn(trained, args)
        print("## Quality at equal FLOPs per token and equal parameters\n")
        print(
            f"{N_EXPERTS} experts of which {ACTIVE} run, against UltraMemV2. {args.steps} steps, "
            f"{len(args.seeds)} seeds; gap: UltraMemV2 less the mixture, in thousandths, paired, ± "
            "half of a 95% interval. Rates: the best of "
            f"{', '.join(f'{lr:g}' for lr in args.lrs)} on another seed.\n"
        )
        rows = [row for part in trained for row in outcome(part, results[part])]
        print(markdown(["", "measure", MOE, MEMORY, "gap", "told", "learning rates"], rows))
        print(f"\n## Cost of the whole model, of {trained[0]}\n")
        header = ["", "parameters", "active", "FLOPs/token"]
        header += [f"bytes/token, {n} at once" for n in (1, 16, 256)]
        print(markdown([*header, "tokens/s in training"], one_cost(results[trained[0]])))
        print()
    if "decode" in parts:
        print(f"## One layer decoding, d_model {D_DECODED}, float32, weights from memory\n")
        header = ["tokens at once", "MiB read, moe", "MiB read, memory", "moe / memory"]
        header += ["µs, moe", "µs, memory", "moe / memory"]
        print(markdown(header, decode(args.rounds)))
        print(
            "\nBytes as counted, experts and rows drawn evenly. Every call takes another copy of "
            f"the layer, of {COLD_BYTES >> 20} MiB together, and other tokens."
        )


if __name__ == "__main__":
    main()
