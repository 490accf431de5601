"""Every variant in every preset: bits per byte above its own bf16 run, with its uncertainty.

    python benchmarks/precision_gap.py [--workers N] [--out DIR] > benchmarks/precision_gap.md

Trains 200 steps on classics7 for each (variant, preset, seed). A gap is paired: the same seed gives
the same first weights and batches, so that the spread over seeds is the spread of the difference.
Finished runs are kept in DIR, so a second call only prints. Ablations change the nvfp4 recipe.
"""

import argparse
import math
import multiprocessing
import statistics
import sys
from pathlib import Path
from typing import Any

import paired
from timing import machine, markdown

import zoo
from recipes import load
from recipes.train import train

SEEDS = (0, 1, 2)
ABLATION_SEEDS = (0, 1, 2, 3, 4, 5)
VARIANTS = {
    "swiglu": {"name": "swiglu", "d_ff": 192},
    "mlp": {"name": "mlp", "d_ff": 288},
    "moe": {"name": "moe", "n_experts": 8, "top_k": 2, "d_expert": 96},
    "moe_plus_plus": {"name": "moe_plus_plus", "n_experts": 8, "top_k": 2, "d_expert": 96},
}
RECIPE = {
    "model": {"d_model": 64, "n_layers": 4, "n_heads": 2, "max_seq_len": 128, "qk_norm": True},
    "loss_weights": {"balance": 0.01, "z": 0.001},
    "data": {"seq_len": 128, "batch_size": 4, "eval_bytes_per_domain": 512,
             "final_bytes_per_domain": 6144},
    "optim": {"lr": 6e-3},
    "trainer": {"max_steps": 200, "eval_every_steps": 200, "checkpoint_every_steps": 200,
                "log_every_steps": 20, "threads": 1},
}  # fmt: skip
PAIRS = (("mxfp4", "bf16"), ("nvfp4", "mxfp4"), ("hif4", "mxfp4"), ("mxfp4", "mxfp8"))
X = {"format": "nvfp4"}
DY = {"format": "nvfp4", "rounding": "stochastic"}


def ablations() -> dict[str, Any]:
    """The nvfp4 recipe with one part changed, as policies."""
    full = zoo.policy_of("nvfp4").to_plain()
    no_tail = [rule for rule in full["rules"] if "layers" not in rule]

    def changed(name: str, **operands: Any) -> dict[str, Any]:
        return full | {"name": name, "default": full["default"] | operands}

    wgrad = {"hadamard": 16}
    return {
        "nvfp4": "nvfp4",
        "no high tail": full | {"name": "no_tail", "rules": no_tail},
        "stochastic x": changed("sr_x", fprop_x=DY, wgrad_x=DY | wgrad),
        "no stochastic rounding": changed("no_sr", dgrad_dy=X, wgrad_dy=X | wgrad),
        "no rotation": changed("no_rht", wgrad_dy=DY, wgrad_x=X),
        "weights in 1-D blocks": changed("w_1d", fprop_w=X, dgrad_w=X),
        "none of the four": changed("plain", fprop_w=X, dgrad_dy=X, dgrad_w=X, wgrad_dy=X,
                                    wgrad_x=X) | {"rules": no_tail},
    }  # fmt: skip


def run(job: tuple[str, Any, int, str]) -> float:
    """Bits per byte on the whole validation part at the end; NaN where the run diverged."""
    variant, precision, seed, out = job
    plain = RECIPE | {"precision": precision, "seed": seed}
    plain["model"] = RECIPE["model"] | {"ffn": VARIANTS[variant]}
    sys.stdout = sys.stderr
    result = train(load.load(plain), out, variant=variant)
    return math.nan if result["diverged"] else result["final"]["bpb"]


def gap(values: list[float], base: list[float]) -> str:
    """Mean difference and half the width of its 95% interval, in thousandths."""
    return "diverged" if any(map(math.isnan, (*values, *base))) else paired.gap(values, base)


def verdict(name: str, values: list[float], other: str, base: list[float]) -> str:
    """One line on whether two presets can be told apart."""
    found = gap(values, base)
    if found == "diverged":
        return f"- {name} against {other}: a run diverged."
    return f"- {name} against {other}: {found}, {paired.told(values, base)}."


def shares(variant: str, precision: str) -> list[str]:
    """Share of weights and of matmul FLOPs in a low format."""
    config = load.load(RECIPE | {"model": RECIPE["model"] | {"ffn": VARIANTS[variant]}}).model
    report = zoo.set_precision(zoo.build(config), precision)
    found = []
    for share in (report.weight_share(), report.flops_share()):
        assert share is not None
        low = sum(v for k, v in share.items() if k not in ("fp32", "bf16", "untouched"))
        found.append(f"{low:.0%}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/precision_gap"))
    args = parser.parse_args()
    presets, changes = zoo.precisions(), ablations()
    jobs = [
        (variant, preset, seed, str(args.out / f"{variant}-{preset}-s{seed}"))
        for seed in SEEDS for preset in presets for variant in VARIANTS
    ]  # fmt: skip
    more = [
        ("swiglu", policy, seed, str(args.out / f"swiglu-{_label(policy)}-s{seed}"))
        for seed in ABLATION_SEEDS for policy in ("bf16", *changes.values())
    ]  # fmt: skip
    unique = {job[3]: job for job in (*jobs, *more)}
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        results = dict(zip(unique, pool.map(run, unique.values(), chunksize=1), strict=True))

    def everywhere(label: str) -> list[float]:
        return [bpb for variant in VARIANTS for bpb in finals(variant, label, SEEDS)]

    def finals(variant: str, label: str, seeds: tuple[int, ...]) -> list[float]:
        return [results[str(args.out / f"{variant}-{label}-s{seed}")] for seed in seeds]

    print(
        f"{machine()}.\n\nBits per byte above the variant's own bf16 run, in thousandths: mean of "
        f"{len(SEEDS)} seeds ± half of a 95% interval; bf16 itself: bits per byte.\n"
    )
    rows = []
    for preset in presets:
        cells = [preset]
        for variant in VARIANTS:
            base, values = (finals(variant, label, SEEDS) for label in ("bf16", preset))
            cells.append(f"{statistics.mean(base):.3f}" if preset == "bf16" else gap(values, base))
        rows.append(
            [*cells, "" if preset == "bf16" else gap(everywhere(preset), everywhere("bf16"))]
        )
    print(markdown(["preset", *VARIANTS, "all"], rows))
    print(f"\nOver all {len(SEEDS) * len(VARIANTS)} pairs of a variant and a seed:\n")
    for name, other in PAIRS:
        print(verdict(name, everywhere(name), other, everywhere(other)))
    print("\nThe nvfp4 recipe with one part changed, swiglu, "
          f"{len(ABLATION_SEEDS)} seeds.\n")  # fmt: skip
    base = finals("swiglu", "bf16", ABLATION_SEEDS)
    rows = [[name, gap(finals("swiglu", _label(p), ABLATION_SEEDS), base)]
            for name, p in changes.items()]  # fmt: skip
    print(markdown(["recipe", "gap"], rows))
    print()
    full = finals("swiglu", "nvfp4", ABLATION_SEEDS)
    for name, policy in list(changes.items())[1:]:
        values = finals("swiglu", _label(policy), ABLATION_SEEDS)
        print(verdict(name, values, "the whole recipe", full))
    print("\nShare of weights / matmul FLOPs in a low format.\n")
    rows = [[preset, *(" / ".join(shares(v, preset)) for v in VARIANTS)] for preset in presets]
    print(markdown(["preset", *VARIANTS], rows))


def _label(policy: Any) -> str:
    return policy if isinstance(policy, str) else policy["name"]


if __name__ == "__main__":
    main()
