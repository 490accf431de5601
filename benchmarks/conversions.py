"""Dense runs converted and trained on, against the dense run trained on.

    python benchmarks/conversions.py [--steps N] [--more N] [--seeds N] [--workers N] [--out DIR] \
        > benchmarks/conversions.md

For each seed: a dense model trained `steps`, then from its weights `more` steps of it as it is, of
mixtures made from it, and of layers that run half of it. All go on over the same batches, which the
dense run has not seen, and their ends are compared in pairs of a seed. Finished runs and
conversions are kept in DIR: a second call goes on where the first was cut, or only prints.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from paired import Job, gap, told, train_all
from timing import machine, markdown

from recipes import load
from recipes.convert import convert_run

BASE = {
    "precision": "fp32",  # so that what is exact shows as that
    "model": {"d_model": 128, "n_layers": 3, "n_heads": 4, "max_seq_len": 128, "qk_norm": True,
              "ffn": {"name": "swiglu", "d_ff": 384}},
    "data": {"seq_len": 128, "batch_size": 8, "eval_bytes_per_domain": 6144,
             "final_bytes_per_domain": 6144},
    "optim": {"lr": 4e-3},
    "trainer": {"threads": 1, "log_every_steps": 20},
}  # fmt: skip
ON = {"lr": 1e-3, "warmup_fraction": 0.0}  # training on: above the dense run's last rate, 4e-4
OTHER_BATCHES = 1000  # added to the seed of what trains on
ALONE = {"prior_teacher": None}


class Way(NamedTuple):
    """A conversion and how it is trained on."""

    made: str  # the conversion's directory, after the dense run's
    to: str
    options: Mapping[str, Any] = {}
    recipe: Mapping[str, Any] = {}  # over the converted run's
    note: str = ""


WAYS = {
    "upcycle": Way("up", "upcycle", {"n_experts": 8, "top_k": 2}, note="2 of 8 copies"),
    "granular": Way("gran", "granular", {"n_copies": 4, "n_slices": 2},
                    note="2 of 8 halves, the dense FLOPs"),
    "drop": Way("drop", "drop", {"n_experts": 8, "top_k": 2}, note="2 of 8 half-redrawn copies"),
    "factor_llm, task alone": Way("fact", "factor_llm", {}, ALONE, "2 of 4 groups"),
    "factor_llm, labels in training": Way("fact", "factor_llm", {}, {}, "2 of 4 groups"),
    "factor_llm, taught first": Way("taught", "factor_llm", {"teach_steps": True}, ALONE,
                                    "2 of 4 groups"),
    "factor_llm, both": Way("taught", "factor_llm", {"teach_steps": True}, {}, "2 of 4 groups"),
    "spt, low rank": Way("low", "spt", {"rank": 16}, note="2 of 4 blocks, base frozen"),
    "spt, all trained": Way("spt", "spt", {"rank": None}, note="2 of 4 blocks"),
}  # fmt: skip
DENSE, MORE = "dense", "dense, trained on"


def every(n_steps: int) -> dict[str, int]:
    """A trainer that evaluates and saves ten times and five times."""
    return {
        "max_steps": n_steps,
        "eval_every_steps": max(n_steps // 10, 1),
        "checkpoint_every_steps": max(n_steps // 5, 1),
    }


def dense_job(out: Path, seed: int, n_steps: int) -> Job:
    recipe = BASE | {"seed": seed, "trainer": BASE["trainer"] | every(n_steps)}
    return Job(DENSE, recipe, out / f"{DENSE}-s{seed}")


def on_job(start: Path, out: Path, label: str, changes: Mapping[str, Any], n_steps: int) -> Job:
    """Training on from a run directory with its own recipe."""
    before = load.read_yaml(start / "recipe.yaml")
    said = {
        "seed": before["seed"] + OTHER_BATCHES,
        "init_from": str(start),
        "optim": ON,
        "trainer": every(n_steps) | {"eval_every_steps": n_steps},  # at step 0 and the end
        **changes,
    }
    return Job(label, load.merged(before, said), out)


def made_from(dense: Path, way: Way, teach_steps: int) -> Path:
    """The conversion's directory, made where it is not there."""
    made = dense.with_name(f"{dense.name}-{way.made}")
    options = dict(way.options)
    if options.pop("teach_steps", False):
        options["teach_steps"] = teach_steps
    if not (made / "convert.json").is_file():
        with redirect_stdout(sys.stderr):
            convert_run(dense, to=way.to, out=made, **options)
    return made


def recovered(ends: list[float], starts: list[float], dense: list[float]) -> str:
    """Of the bits per byte that an untaught conversion lost, the share that came back."""
    shares = [
        (start - end) / (start - base) for end, start, base in zip(ends, starts, dense, strict=True)
    ]
    return f"{statistics.mean(shares):.0%}"


def mean(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000, help="of the dense run")
    parser.add_argument("--more", type=int, default=500, help="steps of training on")
    parser.add_argument("--teach", type=int, default=100, help="batches that teach routers first")
    parser.add_argument("--seeds", type=int, default=3, help="how many, two or more")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/conversions"))
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error("--seeds must be 2 or more: differences are given with their spread")
    seeds = range(args.seeds)

    jobs = [dense_job(args.out, seed, args.steps) for seed in seeds]
    ended = [result["final"]["bpb"] for result in train_all(jobs, args.workers).values()]
    made: dict[tuple[str, int], Path] = {}
    on: dict[tuple[str, int], Job] = {}
    for seed, job in zip(seeds, jobs, strict=True):
        on[MORE, seed] = on_job(job.out, job.out.with_name(f"{job.out.name}-on"), MORE, {},
                                args.more)  # fmt: skip
        for label, way in WAYS.items():
            made[label, seed] = made_from(job.out, way, args.teach)
            name = f"{job.out.name}-on-{label.replace(', ', '-').replace(' ', '_')}"
            on[label, seed] = on_job(made[label, seed], job.out.with_name(name), label,
                                     way.recipe, args.more)  # fmt: skip
    results = train_all(list(on.values()), args.workers)

    def of(label: str) -> list[dict[str, Any]]:
        return [results[on[label, seed].out] for seed in seeds]

    ends = {label: [r["final"]["bpb"] for r in of(label)] for label in (MORE, *WAYS)}
    starts = {label: [r["curve"][0]["eval_bpb"] for r in of(label)] for label in (MORE, *WAYS)}
    show_table(args, ended, starts, ends, {label: of(label)[0]["cost"] for label in ends})
    show_claims(ended, starts, ends)
    show_teaching(made, seeds)


def show_table(
    args: argparse.Namespace, ended: list[float], starts: dict[str, list[float]],
    ends: dict[str, list[float]], costs: dict[str, dict[str, Any]],
) -> None:  # fmt: skip
    tokens = BASE["data"]["batch_size"] * BASE["data"]["seq_len"]
    print(
        f"{machine()}.\n\n{args.seeds} seeds; dense for {args.steps} steps of {tokens} tokens "
        f"({mean(ended)} bits/byte), then {args.more} steps from there over batches not seen "
        "before, all in fp32. Start and end in bits per byte; gap to the dense model trained on, "
        "in thousandths, paired by seed ± half of a 95% interval. FLOPs of a token's matmuls, "
        "forward, as a multiple of the dense model's.\n"
    )
    dense_flops = costs[MORE]["flops_per_token"]
    rows = [
        [label, WAYS[label].note if label in WAYS else "", f"{costs[label]['params'] / 1e6:.2f}",
         f"{costs[label]['flops_per_token'] / dense_flops:.2f}", mean(starts[label]), mean(values),
         "" if label == MORE else gap(values, ends[MORE])]
        for label, values in ends.items()
    ]  # fmt: skip
    print(markdown(["run", "runs", "M params", "FLOPs", "start", "end", "gap"], rows))


def show_claims(
    ended: list[float], starts: dict[str, list[float]], ends: dict[str, list[float]]
) -> None:
    print("\nExact at step 0 (largest relative difference from the dense run's end):\n")
    for label in (MORE, "upcycle", "granular"):
        worst = max(abs(a - b) / b for a, b in zip(starts[label], ended, strict=True))
        print(f"- {label}: {worst:.1e}")
    print("\nAgainst the dense model trained on:\n")
    for label in WAYS:
        print(f"- {label}: {told(ends[label], ends[MORE])}, {gap(ends[label], ends[MORE])}")
    untaught = starts["factor_llm, task alone"]
    print(
        f"\nFactorLLM, 1R4E2K: untaught it has {mean(untaught)} bits/byte. Of what it lost to the "
        "dense run, this share is back at the start and at the end of training on; and the dense "
        "run's bits as a share of its own:\n"
    )
    rows = [
        [label.removeprefix("factor_llm, "), recovered(starts[label], untaught, ended),
         recovered(ends[label], untaught, ended),
         f"{statistics.mean(a / b for a, b in zip(ended, ends[label], strict=True)):.1%}"]
        for label in WAYS if label.startswith("factor_llm")
    ]  # fmt: skip
    print(markdown(["routers", "start", "end", "dense / its own"], rows))


def show_teaching(made: Mapping[tuple[str, int], Path], seeds: range) -> None:
    print("\nLoss of the labels over the batches that teach routers first, nats:\n")
    for seed in seeds:
        told = json.loads((made["factor_llm, taught first", seed] / "convert.json").read_text())
        first, last = told["teach"]["loss"]
        print(f"- seed {seed}: {first:.4f} to {last:.4f} in {told['teach']['steps']} steps")


if __name__ == "__main__":
    main()
