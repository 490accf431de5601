"""A small study, and a trainer that makes results up: what a study does needs no training."""

import json
import math
from pathlib import Path
from random import Random

import report_data

from recipes import load, record
from recipes.costing import run_cost, whole_model_cost
from recipes.planned import RunFailed
from recipes.study.plan import plan
from recipes.study.schema import read_study

RECIPE = {
    "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 64},
    "loss_weights": {"balance": 0.01, "z": 0.001},
    "data": {"seq_len": 32, "batch_size": 4, "eval_bytes_per_domain": 256,
             "final_bytes_per_domain": 256},
    "trainer": {"max_steps": 4, "eval_every_steps": 4, "checkpoint_every_steps": 4, "threads": 1},
}  # fmt: skip


def small(out: Path, **keys):
    """A study of two variants, planned."""
    said = {
        "name": "small", "recipe": RECIPE, "variants": ["swiglu", {"name": "moe", "n_experts": 4}],
        "baseline": {"variant": "swiglu"}, "lrs": [1e-3, 2e-3, 4e-3], "multiple_of": 8,
        "tolerance": 0.06, "out": str(out), **keys,
    }  # fmt: skip
    return plan(*read_study(said))


class MadeUp:
    """Trains nothing: bits per byte are a parabola in log lr, what a variant gains, and noise."""

    def __init__(self, gains=None, *, noise=0.004, best=2e-3, fail=(), diverge=()):
        self.gains, self.noise, self.best = gains or {}, noise, best
        self.fail, self.diverge = fail, diverge
        self.trained = []  # ids, in order

    def __call__(self, run, directory):
        if any(part in run.id for part in self.fail):
            raise RunFailed("out of memory")
        self.trained.append(run.id)
        record.write_json(directory / "result.json", self.result(run))

    def result(self, run):
        r = run.recipe
        lr = r.optim.lr
        bpb = 3.0 + 0.05 * math.log2(lr / self.best) ** 2 - self.gains.get(run.variant, 0.0)
        bpb *= 1 - 0.05 * math.log2(r.model.d_model / 32)
        # the same seed shares some of its luck, as the same batches do
        bpb += 0.5 * self.noise * Random(r.seed).gauss(0, 1)
        bpb += self.noise * Random(f"{run.variant} {r.seed} {r.model.d_model}").gauss(0, 1)
        plain = report_data.run("swiglu", "bf16", r.seed, steps=4)
        cost = run_cost(whole_model_cost(r), tied=r.model.tie_embeddings)
        plain |= {
            "id": run.id, "variant": run.variant, "precision": run.precision, "seed": r.seed,
            "lr": lr, "recipe": load.to_plain(r), "cost": json.loads(json.dumps(vars(cost))),
        }  # fmt: skip
        plain["final"]["bpb"] = bpb
        if any(part in run.id for part in self.diverge):
            plain["final"] |= {"bpb": None, "nats_per_token": None}
            plain |= {"diverged": True, "diverged_step": 2}
        return plain
