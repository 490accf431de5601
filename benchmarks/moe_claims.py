"""Two published claims on mixtures, tried at a small scale and reported as they came out.

    python benchmarks/moe_claims.py [--workers N] [--out DIR] [--steps N] > benchmarks/moe_claims.md

MoE++ (arXiv:2410.07348, table 2): at equal experts, quality at least that of the vanilla mixture
and 1.1 to 2.1 times its expert forward throughput, the more the smaller tau. The mixture that it is
set against weighs as it does, by the probabilities as they are. MoE++ stands within its capacity
(gamma 1.1, the paper) and without one: short runs drop much before the load is even. Loss-free
balancing (arXiv:2408.15664): the selection bias gives a better balance than the auxiliary loss, at
no worse quality. Finished runs are kept in DIR: a second call only measures throughput and prints.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from paired import Job, gap, told, train_all
from timing import interleaved, machine, markdown, ratio
from torch import Tensor, nn

from recipes.data import TextData
from recipes.quantize import read_model

SEEDS = (0, 1, 2)
TAUS = {"gamma 1.1": (0.25, 0.5, 0.75, 1.0), "dropless": (0.25, 0.75)}  # by capacity
BASE = "moe, p as is"
SIZES = {"n_experts": 8, "top_k": 2, "d_expert": 176}
LOSS_FREE = {"name": "deepseek_v3", "preset": "loss_free"}
TIMED_TOKENS = 4096

RECIPE = {
    "model": {"d_model": 128, "n_layers": 4, "n_heads": 2, "max_seq_len": 256, "qk_norm": True},
    "data": {"seq_len": 128, "batch_size": 8, "eval_bytes_per_domain": 2048},
    "optim": {"lr": 5e-3},
    "trainer": {"eval_every_steps": 360, "checkpoint_every_steps": 360, "log_every_steps": 20,
                "threads": 1},
}  # fmt: skip
LOSSES = {"balance": 0.01, "z": 0.001}


def variants() -> dict[str, dict[str, Any]]:
    """Label to what it changes in the recipe."""
    plus = {"name": "moe_plus_plus", **SIZES}

    def of(ffn: dict[str, Any], **losses: float) -> dict[str, Any]:
        return {"model": RECIPE["model"] | {"ffn": ffn}, "loss_weights": LOSSES | losses}

    def sigmoid(bias_step: float, balance: float) -> dict[str, Any]:
        router = LOSS_FREE | {"bias_step": bias_step, "balance_scope": "micro_batch"}
        return of({"name": "moe", **SIZES, "router": router}, balance=balance, z=0.0)

    return {
        "moe": of({"name": "moe", **SIZES}),
        BASE: of({"name": "moe", **SIZES, "renormalize": False}),
        **{plus_label("gamma 1.1", tau): of(plus | {"tau": tau}) for tau in TAUS["gamma 1.1"]},
        **{
            plus_label("dropless", tau): of(plus | {"tau": tau, "capacity_factor": None})
            for tau in TAUS["dropless"]
        },
        "aux loss": sigmoid(0.0, 0.01),
        "loss-free": sigmoid(1e-3, 0.0),
        "no balancing": sigmoid(0.0, 0.0),
    }


def plus_label(capacity: str, tau: float) -> str:
    """Of a MoE++ run."""
    return f"moe_plus_plus tau {tau}" + ("" if capacity == "gamma 1.1" else f", {capacity}")


def inputs_of(model: nn.Module, tokens: Tensor) -> list[tuple[nn.Module, tuple[Any, ...]]]:
    """Each FFN of the model with what it is called with on these tokens."""
    seen: list[tuple[nn.Module, tuple[Any, ...]]] = []
    blocks: Any = model.get_submodule("blocks")
    hooks = [
        block.ffn.register_forward_pre_hook(lambda ffn, args: seen.append((ffn, args)))
        for block in blocks
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def expert_seconds(runs: dict[str, Path]) -> dict[str, list[float]]:
    """CPU time of the FFN stages of trained models on the same held-out tokens, by label.

    Only what comes after the router: its choices are made once, beforehand.
    """
    stages = {}
    for label, run in runs.items():
        task = read_model(run)
        data = TextData(task.recipe.data, 0)
        batches = [b.tokens for b in data.val_dataloader() if b.tokens.shape[1] == 128]
        tokens = torch.cat(batches)[: TIMED_TOKENS // 128]
        model = task.model.eval()
        calls = inputs_of(model, tokens)
        for ffn, args in calls:
            _freeze_router(ffn, args)
        stages[label] = calls

    def forward(label: str) -> None:
        with torch.no_grad():
            for ffn, args in stages[label]:
                ffn(*args)

    return interleaved({label: lambda label=label: forward(label) for label in stages}, rounds=15)


def _freeze_router(ffn: Any, args: tuple[Any, ...]) -> None:
    """Let the layer's router give again what it gives now."""
    seen: list[Any] = []
    hook = ffn.router.register_forward_hook(lambda router, given, out: seen.append(out))
    with torch.no_grad():
        ffn(*args)
    hook.remove()
    ffn.router.forward = lambda *args, **kwargs: seen[0]


def largest_violation(result: dict[str, Any]) -> float:
    """max_e c_e / mean c - 1 on held-out text, mean over the layers (arXiv:2408.15664, eq. 4)."""
    loads = [layer["counts"] for layer in result["load"]]
    return statistics.mean(max(c) / statistics.mean(c) - 1 for c in loads)


def dropped(results: list[dict[str, Any]]) -> str:
    """Share of assignments that capacity dropped, at the first and last row of the curves."""
    rows = [[p["router"]["load/dropped"] for p in r["curve"] if p["router"]] for r in results]
    return (
        f"{statistics.mean(r[0] for r in rows):.2f} to {statistics.mean(r[-1] for r in rows):.2f}"
    )


Results = dict[str, list[dict[str, Any]]]  # by label, in the order of the seeds


def bpb(results: list[dict[str, Any]]) -> list[float]:
    """Final bits per byte of each seed."""
    return [result["final"]["bpb"] for result in results]


def figures(results: list[dict[str, Any]]) -> list[str]:
    """Parameters and mean bits per byte."""
    return [f"{results[0]['cost']['params']:,}", f"{statistics.mean(bpb(results)):.3f}"]


def print_moe_plus_plus(of: Results, first: dict[str, Path]) -> None:
    """MoE++ by tau. first: the run directory of the first seed, by label."""
    print("## MoE++ against the vanilla mixture of the same experts\n")
    tau_of = {plus_label(c, tau): tau for c, taus in TAUS.items() for tau in taus}
    times = expert_seconds({label: first[label] for label in (BASE, *tau_of)})
    base = bpb(of[BASE])
    rows = [[label, *figures(of[label]), *[""] * 4, "1", "1", "1"] for label in ("moe", BASE)]
    for label, tau in tau_of.items():
        free = [layer["zero_computation_share"] for r in of[label] for layer in r["load"]]
        share = 1 - statistics.mean(free)
        ends = bpb(of[label])
        rows.append([
            label, *figures(of[label]), gap(ends, base), told(ends, base), dropped(of[label]),
            f"{1 - share:.2f}", f"{(tau * 8 + 4) / (tau * 8):.2f}", f"{1 / share:.2f}",
            f"{1 / ratio(times, label, BASE):.2f}",
        ])  # fmt: skip
    header = ["", "parameters", "bpb", f"gap to {BASE}", "told", "dropped", "without FFN"]
    header += ["throughput by tau", "by measured share", "throughput measured"]
    print(markdown(header, rows))
    print(
        "\n`moe` renormalises its weights. Dropped: share of assignments over capacity, at the "
        "first and the last row of training. "
        "Without FFN: share of assignments to zero-computation experts on held-out text. "
        f"Throughput: of what follows the router, all layers of seed 0, {TIMED_TOKENS} held-out "
        "tokens, forward, against that mixture's; by tau: as the balance loss's minimum has "
        "it, (tau N_FFN + N_ZC) / (tau N_FFN).\n"
    )


def print_balancing(of: Results) -> None:
    """Loss-free balancing beside the auxiliary loss and none."""
    print("## Loss-free balancing against the auxiliary loss, sigmoid scores\n")
    rows, base = [], "aux loss"
    least = [largest_violation(result) for result in of[base]]
    for label in (base, "loss-free", "no balancing"):
        violations = [largest_violation(result) for result in of[label]]
        dead = statistics.mean(layer["dead"] for r in of[label] for layer in r["load"])
        ends = bpb(of[label]), bpb(of[base])
        other = label != base
        rows.append([
            label, figures(of[label])[1], gap(*ends) if other else "", told(*ends) if other else "",
            f"{statistics.mean(violations):.2f} ({min(violations):.2f} to {max(violations):.2f})",
            told(violations, least) if other else "", f"{dead:.2f}",
        ])  # fmt: skip
    header = ["", "bpb", "gap to aux loss", "told", "MaxVio (range)", "told", "dead experts"]
    print(markdown(header, rows))
    print(
        "\nMaxVio: largest load over the mean, less 1, on held-out text, mean over layers. Aux "
        "loss 0.01 in the canonical normalisation; bias step 0.001."
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--out", type=Path, default=Path("runs/moe_claims"))
    args = parser.parse_args()
    trainer = RECIPE["trainer"] | {"max_steps": args.steps}
    runs = {
        label: [
            args.out / f"{label.replace(', ', '-').replace(' ', '-')}-s{seed}" for seed in SEEDS
        ]
        for label in variants()
    }
    jobs = [
        Job(label, RECIPE | changed | {"trainer": trainer, "seed": seed}, out)
        for label, changed in variants().items()
        for seed, out in zip(SEEDS, runs[label], strict=True)
    ]
    results = train_all(jobs, args.workers)
    of = {label: [results[out] for out in outs] for label, outs in runs.items()}
    print(f"{machine()}. {len(SEEDS)} seeds, {args.steps * 8 * 128:,} tokens each, classics7.")
    print("Bits per byte; differences in thousandths, paired, ± half of a 95% interval.\n")
    print_moe_plus_plus(of, {label: outs[0] for label, outs in runs.items()})
    print_balancing(of)


if __name__ == "__main__":
    main()
