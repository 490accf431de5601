"""What MatFormer, Spark and VersatileFFN promise, tried at a small scale, as it came out.

    python benchmarks/adaptive_claims.py [--part matformer,spark,versatile] [--workers N] \\
        [--steps N] [--seeds 0,1,2] [--out DIR] > benchmarks/adaptive_claims.md

MatFormer (arXiv:2310.07707, sec. 3 and 4): the submodels of one nested training are as good as
models trained alone at their widths, each on as many tokens as a granularity gets; mixtures of
widths lie on the line between them. Spark (arXiv:2506.06644): 8% of the neurons active at about the
loss of a dense FFN of equal parameters, and the predictor split no worse than a full gate.
VersatileFFN (arXiv:2512.14531, table 2): better than the dense FFN of equal parameters that is
trained on for as long, and than each of its paths alone. Finished runs are kept in DIR.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from paired import Job, gap, told, train_all
from timing import machine, markdown

from recipes import load
from recipes.convert import convert_run

D_MODEL, N_LAYERS = 128, 4
RECIPE: dict[str, Any] = {
    "model": {"d_model": D_MODEL, "n_layers": N_LAYERS, "n_heads": 2, "max_seq_len": 256,
              "qk_norm": True},
    "data": {"seq_len": 128, "batch_size": 8, "eval_bytes_per_domain": 1024,
             "final_bytes_per_domain": 8192},
    "optim": {"lr": 4e-3},
    "trainer": {"log_every_steps": 20, "threads": 1},
}  # fmt: skip
WIDTHS = (64, 128, 256, 512)  # of MatFormer: d_ff/8, /4, /2, all
NESTED = {"name": "matformer", "d_ff": WIDTHS[-1]}
SPARK = {
    "swiglu": {"name": "swiglu"},
    "spark 8%": {"name": "spark_ffn"},
    "spark 3%": {"name": "spark_ffn", "density": 0.03},
    "spark 16%": {"name": "spark_ffn", "density": 0.16},
    "spark 8%, full gate": {"name": "spark_ffn", "predictor": "full"},
    "spark 8%, exact top-k": {"name": "spark_ffn", "selection": "exact"},
    "spark, nothing dropped": {"name": "spark_ffn", "selection": "none"},
}
ANNEALED = {"anneal": "run"}  # the paper's 25 thousand steps, brought into the run
VERSATILE: dict[str, dict[str, Any]] = {
    "dense, trained on": {"path": "depth", "loops": "fixed", "max_loops": 1},
    "2 loops": {"path": "depth", "loops": "fixed", "max_loops": 2},
    "4 loops": {"path": "depth", "loops": "fixed", "max_loops": 4},
    "width alone": {"path": "width"},
    "depth alone": {"path": "depth", **ANNEALED},
    "average": {"fusion": "average", **ANNEALED},
    "versatile": ANNEALED,
}

Results = dict[str, list[dict[str, Any]]]  # by label, in the order of the seeds


def job(label: str, changes: Mapping[str, Any], steps: int, seed: int, out: Path) -> Job:
    """One training; changes: keys of the recipe."""
    every = {"max_steps": steps, "eval_every_steps": steps, "checkpoint_every_steps": steps}
    recipe = load.merged({**RECIPE, "seed": seed}, {**changes, "trainer": every})
    return Job(label, recipe, out / f"{label.replace(', ', '-').replace(' ', '_')}-s{seed}")


def trained(jobs: Sequence[Job], workers: int) -> Results:
    """Results by label."""
    found = train_all(jobs, workers)
    labels = dict.fromkeys(each.variant for each in jobs)
    return {x: [found[each.out] for each in jobs if each.variant == x] for x in labels}


def bpb(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Held-out bits per byte of each seed."""
    return [run["final"]["bpb"] for run in runs]


def of_ffn(ffn: Mapping[str, Any], **keys: Any) -> dict[str, Any]:
    return {"model": {"ffn": ffn}, **keys}


def matformer(args: argparse.Namespace) -> None:
    """Submodels against models of their own, mixtures against the line between."""
    alone = {f"alone, {w}": of_ffn({"name": "mlp", "d_ff": w}) for w in WIDTHS}
    nested = {
        "sample": (of_ffn(NESTED, nested={"mode": "sample"}), len(WIDTHS) * args.steps),
        "sample, a fourth": (of_ffn(NESTED, nested={"mode": "sample"}), args.steps),
        "joint": (of_ffn(NESTED, nested={"mode": "joint", "reduction": "mean"}), args.steps),
    }
    out = args.out / f"matformer-{args.steps}"
    jobs = [job(x, keys, steps, seed, out) for x, (keys, steps) in nested.items()
            for seed in args.seeds]  # fmt: skip
    jobs += [job(x, keys, args.steps, seed, out) for x, keys in alone.items()
             for seed in args.seeds]  # fmt: skip
    of = trained(jobs, args.workers)
    print("## MatFormer's submodels against models trained alone at their width\n")
    rows = []
    for w in WIDTHS:
        base = bpb(of[f"alone, {w}"])
        row = [str(w), f"{statistics.mean(base):.4f}"]
        for mode in nested:
            ends = [submodel(run, w) for run in of[mode]]
            row += [f"{statistics.mean(ends):.4f}", gap(ends, base), told(ends, base)]
        rows.append(row)
    header = ["width", f"alone, {args.steps} steps"]
    for mode, (_, steps) in nested.items():
        header += [f"{mode}, {steps} steps", "gap", "told"]
    print(markdown(header, rows))
    flops = {x: of[x][0]["curve"][-1]["flops"] for x in (*alone, *nested)}
    every_alone = sum(flops[x] for x in alone)
    print(
        "\nTraining FLOPs, as a share of the four models alone: "
        + ", ".join(f"{mode} {flops[mode] / every_alone:.2f}" for mode in nested)
        + f". `sample` gives a granularity {args.steps} steps, as a model alone has.\n"
    )
    mixtures(of["sample"])


def submodel(run: Mapping[str, Any], width: int) -> float:
    """Bits per byte of the submodel of one width in all layers."""
    return next(s["bpb"] for s in run["widths"] if set(s["widths"]) == {width})


def mixtures(runs: Sequence[Mapping[str, Any]]) -> None:
    """Mix'n'Match against what a straight line between the trained widths would give."""
    print("## Mix'n'Match: mixtures of two widths against the line between them\n")
    rows = []
    for mixed in (s for s in runs[0]["widths"] if len(set(s["widths"])) > 1):
        ends, line = [], []
        for run in runs:
            this = next(s for s in run["widths"] if s["widths"] == mixed["widths"])
            low, high = (
                next(s for s in run["widths"] if set(s["widths"]) == {w})
                for w in (min(mixed["widths"]), max(mixed["widths"]))
            )
            share = (sum(this["widths"]) - sum(low["widths"])) / (
                sum(high["widths"]) - sum(low["widths"])
            )
            ends.append(this["bpb"])
            line.append(low["bpb"] + share * (high["bpb"] - low["bpb"]))
        rows.append([
            "+".join(map(str, mixed["widths"])), f"{statistics.mean(ends):.4f}",
            f"{statistics.mean(line):.4f}", gap(ends, line), told(ends, line),
        ])  # fmt: skip
    print(markdown(["widths by layer", "bits/byte", "line", "gap", "told"], rows) + "\n")


def spark(args: argparse.Namespace) -> None:
    """Spark at some densities and without its parts, against a dense FFN of equal parameters."""
    out = args.out / f"spark-{args.steps}"
    jobs = [job(x, of_ffn(ffn), args.steps, seed, out) for x, ffn in SPARK.items()
            for seed in args.seeds]  # fmt: skip
    of = trained(jobs, args.workers)
    print("## Spark against a dense FFN of equal parameters\n")
    rows, dense = [], bpb(of["swiglu"])
    for label, runs in of.items():
        cost, ends = runs[0]["cost"], bpb(runs)
        density = [x["active"] for run in runs for x in run["density"]]
        rows.append([
            label, f"{cost['params']:,}", f"{cost['active_params']:,.0f}",
            f"{statistics.mean(density):.3f}" if density else "",
            f"{statistics.mean(ends):.4f}",
            *(["", ""] if label == "swiglu" else [gap(ends, dense), told(ends, dense)]),
            gap(ends, bpb(of["spark 8%"])) if label.startswith("spark 8%,") else "",
        ])  # fmt: skip
    header = ["", "parameters", "read by a token", "density measured", "bits/byte"]
    print(markdown([*header, "gap to swiglu", "told", "gap to spark 8%"], rows) + "\n")


def versatile(args: argparse.Namespace) -> None:
    """VersatileFFN and its controls, each trained on from one dense run a seed."""
    out = args.out / f"versatile-{args.steps}"
    base = {seed: job("base", of_ffn({"name": "swiglu"}), args.steps, seed, out)
            for seed in args.seeds}  # fmt: skip
    ended = bpb(trained(list(base.values()), args.workers)["base"])
    jobs = []
    for seed, dense in base.items():
        for label, options in VERSATILE.items():
            jobs.append(on_from(dense, label, options, args.steps, seed, out))
    of = trained(jobs, args.workers)
    print("## VersatileFFN and its controls, trained on from a dense model\n")
    more = bpb(of["dense, trained on"])
    rows = [["dense, half the tokens", f"{statistics.mean(ended):.4f}", *[""] * 5]]
    for label, runs in of.items():
        ends, cost = bpb(runs), runs[0]["cost"]
        loops = [mean_loops(x["counts"]) for run in runs for x in run["loops"]]
        other = label != "dense, trained on"
        rows.append([
            label, f"{statistics.mean(ends):.4f}", f"{cost['params']:,}",
            f"{cost['flops_per_token']:,.0f}", f"{statistics.mean(loops):.2f}" if loops else "",
            *([gap(ends, more), told(ends, more)] if other else ["", ""]),
        ])  # fmt: skip
    header = ["", "bits/byte", "parameters", "FLOPs/token in training", "loops in evaluation"]
    print(markdown([*header, "gap to dense, trained on", "told"], rows))
    whole = bpb(of["versatile"])
    print("\nVersatileFFN less each control, in thousandths:\n")
    for label in of:
        if label != "versatile":
            ends = bpb(of[label])
            print(f"- {label}: {gap(whole, ends)}, {told(whole, ends)}")


def mean_loops(counts: Sequence[float]) -> float:
    """Loops of a token. counts: tokens of 1, 2, .. loops."""
    return sum(n * count for n, count in enumerate(counts, start=1)) / sum(counts)


def on_from(
    dense: Job, label: str, options: Mapping[str, Any], steps: int, seed: int, out: Path
) -> Job:
    """Training on of the dense run's weights as a VersatileFFN with these options."""
    this = job(label, {}, steps, seed, out)
    made = this.out.with_name(f"{this.out.name}-begun")
    if not (made / "convert.json").is_file():
        with redirect_stdout(sys.stderr):
            convert_run(dense.out, to="versatile", out=made, **options)
    before = load.read_yaml(made / "recipe.yaml")
    said = {"seed": seed + 1000, "init_from": str(made)}  # batches that were not seen
    return Job(label, load.merged(before, said), this.out)


def main() -> None:
    parts = {"matformer": matformer, "spark": spark, "versatile": versatile}
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default=",".join(parts), help=f"of {', '.join(parts)}")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=lambda s: [int(x) for x in s.split(",")], default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/adaptive_claims"))
    args = parser.parse_args()
    asked = args.part.split(",")
    if wrong := [part for part in asked if part not in parts]:
        parser.error(f"--part: no such part {wrong[0]!r}, known: {', '.join(parts)}")
    if len(args.seeds) < 2:
        parser.error("--seeds: a difference needs two seeds or more")
    batch = RECIPE["data"]["batch_size"] * RECIPE["data"]["seq_len"]
    print(
        f"{machine()}.\n\n{len(args.seeds)} seeds, {args.steps} steps of {batch} tokens unless "
        f"said, one learning rate ({RECIPE['optim']['lr']:g}) for all, bf16, classics7. "
        "Differences in thousandths of bits per byte, paired by seed, ± half of a 95% interval.\n"
    )
    for part in asked:
        parts[part](args)


if __name__ == "__main__":
    main()
