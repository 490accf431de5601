"""A made-up comparison with the shape and the scale of a real one, for the tests of the report."""

from math import exp, log
from random import Random
from typing import Any

DOMAINS = {
    "drama": 0.12, "verse": 0.25, "novel": -0.08, "scripture": -0.22,
    "civics": -0.05, "reference": 0.18, "code": -0.15,
}  # fmt: skip
# label: (gain in bpb over swiglu, total FFN params, FFN FLOPs factor, tokens/s, experts, zero)
SHAPES: dict[str, tuple[float, float, float, float, int, int]] = {
    "swiglu": (0.0, 0.79e6, 1.0, 27_400, 0, 0),
    "mlp": (-0.004, 0.79e6, 1.001, 29_100, 0, 0),
    "moe": (0.075, 3.2e6, 1.006, 17_800, 8, 0),
    "moe_plus_plus": (0.058, 3.2e6, 0.994, 20_300, 8, 4),
}
LOSS_OF = {"fp32": 0.0, "bf16": 0.0, "mxfp4": 0.071, "nvfp4": 0.031}
TOKENS_A_STEP = 4096
SAMPLE = (
    "the world is not the best of me,\nAnd I will be a man of such a one\n"
    "That hath the state of all the word of heaven.\n\nKING.\nWhat, is the prince "
)


def comparison(
    variants: tuple[str, ...] = tuple(SHAPES),
    precisions: tuple[str, ...] = ("bf16", "nvfp4"),
    baseline_seeds: int = 4,
    steps: int = 200,
) -> dict[str, Any]:
    """results.json of variants x precisions at seed 0, and more seeds of the first one."""
    cells = [(v, p, 0) for v in variants for p in precisions]
    cells += [(variants[0], precisions[0], seed) for seed in range(1, baseline_seeds)]
    runs = [run(*cell, steps=steps) for cell in cells]
    target = 2 * SHAPES["swiglu"][1]
    matched = [
        {
            "variant": v,
            "width_field": "d_expert" if shape(v)[4] else "d_ff",
            "width": 172 if shape(v)[4] else 344,
            "value": target * shape(v)[2],
            "residual": shape(v)[2] - 1,
        }
        for v in variants
    ]
    return {
        "schema": 1,
        "comparison": {
            "name": "quick",
            "baseline": {"variant": variants[0], "precision": precisions[0]},
            "held_equal": "active_flops",
            "target": target,
            "matched": matched,
            "variants": list(variants),
            "precisions": list(precisions),
            "seeds": list(range(baseline_seeds)),
            "noise": {
                "std_bpb": 0.006,
                "n": baseline_seeds,
                "of": f"{variants[0]}-{precisions[0]}",
            },
            "allowed_differences": ["model.ffn", "model.router", "precision", "seed"],
        },
        "runs": runs,
    }


def shape(variant: str) -> tuple[float, float, float, float, int, int]:
    """The shape of a variant; one with a number at its end (mlp_2) is like the one without."""
    return SHAPES[variant.rstrip("0123456789").rstrip("_")]


def run(variant: str, precision: str, seed: int, steps: int = 200) -> dict[str, Any]:
    """result.json of one run, always the same for the same arguments."""
    rng = Random(f"{variant}/{precision}/{seed}")
    gain, _, _, tokens_per_s, n_experts, _ = shape(variant)
    tokens_per_s *= {"nvfp4": 0.71, "mxfp4": 0.74}.get(precision, 1.0) * rng.uniform(0.98, 1.02)
    bpb = 2.46 - gain + LOSS_OF[precision] + rng.gauss(0, 0.006)
    name = variant.rstrip("0123456789").rstrip("_")
    costs = cost(variant, precision)
    sparse = {"n_experts": n_experts, "top_k": 2, "d_expert": 172}
    return {
        "schema": 1,
        "id": f"{variant}-{precision}-s{seed}",
        "variant": variant,
        "ffn": name,
        "precision": precision,
        "seed": seed,
        "recipe": {
            "seed": seed,
            "precision": precision,
            "model": {
                "d_model": 128,
                "n_layers": 4,
                "ffn": {"name": name, **(sparse if n_experts else {"d_ff": 344})},
            },
            "loss_weights": {"balance": 0.01} if n_experts else {},
            "data": {"corpus": "classics7", "tokenizer": "bytes", "seq_len": 256},
            "optim": {"lr": 2e-3, "schedule": "cosine"},
            "trainer": {"max_steps": steps},
        },
        "versions": {"python": "3.11.2", "torch": "2.13.0", "lightning": "2.6.6"},
        "commit": "64c87c2f0e1d",
        "machine": {"cpu": "a made-up CPU", "cores": 2, "threads": 2},
        "steps": steps,
        "tokens": steps * TOKENS_A_STEP,
        "cost": costs,
        "final": {
            "bpb": bpb,
            "nats_per_token": bpb * log(2),
            "bpb_by_domain": {d: bpb + x + rng.gauss(0, 0.02) for d, x in DOMAINS.items()},
            "eval_bytes": 57_344,
            "eval_tokens": 57_344,
        },
        "speed": {
            "tokens_per_s": tokens_per_s,
            "train_s": steps * TOKENS_A_STEP / tokens_per_s,
            "peak_memory_bytes": int((410 + costs["params"] * 16 / 1e6) * 1e6),
        },
        "curve": curve(bpb, steps, tokens_per_s, costs["training_flops_per_token"], rng),
        "load": load(variant, rng),
        "losses": {"balance": 1.04 + rng.random() / 20} if n_experts else {},
        "sample": {
            "prompt": "To be or not to be, ",
            "text": SAMPLE[: rng.randint(90, len(SAMPLE))],
        },
    }


def cost(variant: str, precision: str) -> dict[str, Any]:
    """Four layers, width 128, 256 symbols."""
    _, ffn_params, flops_factor, _, n_experts, _ = shape(variant)
    roles = {"embedding": 32_768, "attention": 262_144, "norm": 1_152, "head": 32_768}
    dense = sum(roles.values())
    router = 4 * 128 * n_experts
    ffn = "expert" if n_experts else "ffn"
    flops = {
        "attention": 2 * 262_144 + 4 * 4 * 128 * 257 / 2,
        ffn: 2 * SHAPES["swiglu"][1] * flops_factor,
        "head": 65_536.0,
        **({"router": 2.0 * router} if n_experts else {}),
    }
    active = SHAPES["swiglu"][1] * flops_factor
    bits = {"nvfp4": 4.5, "mxfp4": 4.25, "fp32": 32}.get(precision, 16)

    def weight_bytes(n: int) -> float:
        read = ffn_params * (1 - (1 - active / ffn_params) ** n) if n_experts else ffn_params
        return ((dense + router) * 2 + read * bits / 8) / n

    return {
        "params": int(dense + router + ffn_params),
        "active_params": dense + router + active,
        "nonembedding_params": int(dense + router + ffn_params) - 65_536,
        "flops_per_token": sum(flops.values()),
        "training_flops_per_token": 3 * sum(flops.values()),
        "other_flops_per_token": 21_000.0,
        "flops_by_role": flops,
        "params_by_role": {**roles, ffn: ffn_params, **({"router": router} if n_experts else {})},
        "weight_bytes_per_token": {str(n): weight_bytes(n) for n in (1, 16, 256, 4096)},
    }


def curve(
    final: float, steps: int, tokens_per_s: float, flops: float, rng: Random
) -> list[dict[str, Any]]:
    """A loss that falls from eight bits to `final`, logged every 10 steps, evaluated every 25."""
    points = []
    for step in sorted({*range(10, steps + 1, 10), *range(25, steps + 1, 25)}):
        mean = final + 4.2 * exp(-step / 22) + 0.9 * exp(-step / 75) - 0.9 * exp(-steps / 75)
        evaluated = step % 25 == 0
        points.append(
            {
                "step": step,
                "tokens": step * TOKENS_A_STEP,
                "flops": step * TOKENS_A_STEP * flops,
                "train_s": step * TOKENS_A_STEP / tokens_per_s,
                "train_bpb": mean - 0.05 + rng.gauss(0, 0.05),
                "eval_bpb": (final if step == steps else mean) if evaluated else None,
            }
        )
    return points


def load(variant: str, rng: Random) -> list[dict[str, Any]]:
    """Four MoE layers, the first of them less even, each domain with its own liking."""
    n, zero = shape(variant)[4:]
    if not n:
        return []
    names = [f"ffn {i}" for i in range(n)]
    names += [*(f"constant {i}" for i in range(zero - 2)), "copy 0", "zero 0"][:zero]
    return [_layer(layer, names, n, rng) for layer in range(4)]


def _layer(layer: int, names: list[str], n: int, rng: Random) -> dict[str, Any]:
    base = [rng.gammavariate(6 + 4 * layer, 1) for _ in names]
    by_domain = {d: [round(1200 * b * rng.gammavariate(5, 0.2)) for b in base] for d in DOMAINS}
    counts = [sum(column) for column in zip(*by_domain.values(), strict=True)]
    ffn = sum(counts[:n])
    shares = [c / ffn for c in counts[:n]]
    return {
        "layer": layer,
        "experts": names,
        "n_ffn_experts": n,
        "counts": counts,
        "counts_by_domain": by_domain,
        "entropy": -sum(s * log(s) for s in shares if s) / log(n),
        "largest_share": max(shares),
        "dead": sum(s < 0.1 / n for s in shares),
        "zero_computation_share": 1 - ffn / sum(counts),
    }


def with_health(results: dict[str, Any]) -> dict[str, Any]:
    """The same, its mixtures' routers watched: a record per layer and figures along the curve."""
    runs = [{**r, **_health(r)} if r["load"] else r for r in results["runs"]]
    return {**results, "runs": runs}


def _health(r: dict[str, Any]) -> dict[str, Any]:
    rng = Random(f"health/{r['id']}")
    layers = [_layer_health(load, rng) for load in r["load"]]
    curve = []
    for i, point in enumerate(r["curve"]):
        figures = {"load/dropped": 0.08 * exp(-i / 5) * rng.uniform(0.8, 1.2)}
        if point["eval_bpb"] is not None:
            figures["load/max_violation"] = 1.8 * exp(-i / 8) + 0.2 + rng.random() / 10
            figures["router/confidence"] = 0.2 + 0.02 * i
            figures["router/kept"] = 1 - 0.5 * exp(-i / 6)
        curve.append({**point, "router": figures})
    return {"health": layers, "curve": curve}


def _layer_health(load: dict[str, Any], rng: Random) -> dict[str, Any]:
    """Top 2: pairs that add up to the counts, and a liking of neighbours for one another."""
    n = len(load["experts"])
    pairs = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(i):
            pairs[i][j] = pairs[j][i] = round(60 * rng.random() * (4 if i - j == 1 else 1))
    for i in range(n):
        pairs[i][i] = sum(pairs[i])
    return {
        "layer": load["layer"],
        "experts_per_token": 2.0,
        "confidence": rng.uniform(0.3, 0.6),
        "token_entropy": rng.uniform(0.5, 0.9),
        "margin": rng.uniform(0.1, 0.3),
        "information": rng.uniform(0.1, 0.5),
        "near_ties": rng.uniform(0, 0.03),
        "logit_rms": rng.uniform(1, 3),
        "pair_experts": list(range(n)),
        "pairs": pairs,
    }
