"""A made-up grid of seeds and learning rates, for the tests of stability."""

from random import Random
from typing import Any

import report_data

LRS = (1e-3, 4e-3, 1.6e-2, 6.4e-2)
WIDTH = {"bf16": 1.0, "mxfp4": 0.6, "nvfp4": 0.8}  # how far a precision lets the rate go


def grid(precisions: tuple[str, ...] = tuple(WIDTH), seeds: int = 3) -> dict[str, Any]:
    """results.json of one variant: the largest rate diverges, one run without a number."""
    results = report_data.comparison(("swiglu",), precisions, baseline_seeds=1)
    results["runs"] = [
        run(precision, lr, seed) for precision in precisions for lr in LRS for seed in range(seeds)
    ]
    results["comparison"] |= {
        "name": "stability",
        "baseline": {"variant": "swiglu", "precision": precisions[0], "lr": None},
        "seeds": list(range(seeds)),
        "lrs": list(LRS),
    }
    results["failures"] = {"swiglu-e8m3-lr0.001-s0": "MemoryError (see runs/…/stderr.txt)"}
    return results


def run(precision: str, lr: float, seed: int) -> dict[str, Any]:
    """One cell: a valley of the loss around the second rate, narrower in fewer bits."""
    rng = Random(f"{precision}/{lr}/{seed}")
    made = report_data.run("swiglu", precision, seed)
    made |= {"id": f"swiglu-{precision}-lr{lr:g}-s{seed}", "lr": lr, "sharpness": 0.2}
    made["recipe"]["optim"]["lr"] = lr
    made["recipe"]["trainer"]["log_every_steps"] = 1
    place = LRS.index(lr)
    bpb = 2.9 + (place - 1) ** 2 * 0.15 / WIDTH[precision] + rng.gauss(0, 0.01)
    made["final"]["bpb"] = bpb
    made["sharpness"] = 0.2 + 0.1 * place + rng.random() / 50
    if place == 2 and precision != "bf16":
        made["spike_steps"] = [60 + seed, 120][: 1 + seed % 2]
    if place == 3 and precision != "bf16":
        gone = precision == "mxfp4" and seed == 1
        made |= {"diverged": True, "diverged_step": 87 + seed, "spike_steps": [80]}
        made["final"]["bpb"] = made["final"]["nats_per_token"] = None if gone else 7.9
        made["sharpness"] = None if gone else 2.0
    return made
