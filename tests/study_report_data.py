"""A study's directory made up whole: its plan and the results of its runs, nothing trained."""

import json
from dataclasses import asdict, dataclass
from math import log2
from pathlib import Path
from random import Random
from typing import Any

import report_data

from recipes import record
from recipes.report.records import Choice, Match
from recipes.study import machine, trace
from recipes.study.records import (
    PLAN,
    CellRecord,
    ControlRecord,
    Machine,
    ModelRecord,
    PlannedRecord,
    PlanRecord,
    Trace,
)

LRS = (1e-3, 2e-3, 4e-3)
FLOPS = 1e6  # per token, training, of the smallest size; each further one has four times as many
TOKENS = 1e6  # of the smallest size; each further one has twice as many


def law(compute: float) -> float:
    """Bits per byte of the baseline."""
    return 1.0 + 40.0 * compute**-0.12


@dataclass
class MadeUpStudy:
    """What is planted."""

    variants: tuple[str, ...] = ("swiglu", "moe")
    gains: dict[str, float] | None = None  # by variant: share of the loss that it gains
    leverage: dict[str, float] | None = None  # by variant: compute that it is worth
    noise: float = 5e-4  # of one run, share of the loss
    sizes: tuple[str, ...] = ("s", "m", "l", "xl")
    holds: tuple[str, ...] = ("active_flops",)
    precisions: tuple[str, ...] = ("bf16",)
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] = LRS
    best: float = 2e-3  # learning rate
    controls: bool = True
    steps: int = 100
    fail: tuple[str, ...] = ()  # parts of ids
    diverge: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def write(self, directory: Path) -> Path:
        """Write everything that a finished study leaves; returns the directory."""
        plan = self.plan()
        record.write_json(directory / PLAN, asdict(plan))
        failures = {}
        for run in plan.runs:
            if any(part in run.id for part in self.fail):
                failures[run.id] = "out of memory"
            elif not any(part in run.id for part in self.missing):
                path = directory / "runs" / run.id / "result.json"
                path.parent.mkdir(parents=True)
                path.write_text(json.dumps(self.result(run)))
        record.write_json(directory / "failures.json", failures)
        limits = Machine(name="a made-up CPU", threads=2, flops_per_s=1e11, bytes_per_s=1e10)
        record.write_json(directory / machine.FILE, asdict(limits))
        traces = {k: asdict(Trace(flops_per_token=m.traced_as)) for k, m in plan.models.items()}
        record.write_json(directory / trace.FILE, traces)
        return directory

    def labels(self) -> dict[str, ControlRecord]:
        """Controls of every variant but the first."""
        kinds = ("dense_total", "random_router") if self.controls else ()
        return {
            f"{v}:{kind}": ControlRecord(kind=kind, of=v)
            for v in self.variants[1:]
            for kind in kinds
        }

    def plan(self) -> PlanRecord:
        """Every run of tuning (at the smallest size) and of what is reported."""
        controls = self.labels()
        everyone = (*self.variants, *controls)
        runs = [
            self._run("tuning", self.sizes[0], v, self.precisions[0], 100, lr, self.holds[:1])
            for lr in self.lrs
            for v in everyone
        ]
        runs += [
            self._run("reporting", size, v, p, seed, self.best, self.holds)
            for size in self.sizes
            for v in everyone
            for p in self.precisions
            for seed in self.seeds
        ]
        cells = tuple(
            CellRecord(
                size=size, hold=hold, target=1e5, variants=everyone,
                matched=tuple(Match(variant=v, value=1e5, residual=0.0) for v in self.variants),
            )
            for size in self.sizes
            for hold in self.holds
        )  # fmt: skip
        models = {
            f"{size}/{v}": ModelRecord(
                size=size, variant=v, active_strict=1e5, active_with_head=1.3e5,
                weight_bytes=4_000_000, gradient_bytes=4_000_000, optimizer_bytes=8_000_000,
                tokens_per_step=4096, traced_as=3.6e5,
            )
            for size in self.sizes
            for v in everyone
        }  # fmt: skip
        return PlanRecord(
            schema=1, name="small", study={}, holds=self.holds, sizes=self.sizes,
            baseline=Choice(variant=self.variants[0], precision=self.precisions[0]),
            variants=self.variants, precisions=self.precisions, seeds=self.seeds, cells=cells,
            controls=controls, models=models, runs=tuple(runs),
        )  # fmt: skip

    def _run(
        self, stage: str, size: str, variant: str, precision: str, seed: int, lr: float,
        holds: tuple[str, ...],
    ) -> PlannedRecord:  # fmt: skip
        return PlannedRecord(
            id=f"{size}-{variant}-{precision}-lr{lr:g}-s{seed}", stage=stage, size=size,
            variant=variant, precision=precision, seed=seed, lr=lr, holds=holds,
            model=f"{size}/{variant}",
        )  # fmt: skip

    def compute(self, size: str) -> tuple[float, float]:
        """Training FLOPs per token, and tokens."""
        at = self.sizes.index(size)
        return FLOPS * 4**at, TOKENS * 2**at

    def result(self, run: PlannedRecord) -> dict[str, Any]:
        """result.json of a run."""
        shape = "moe" if run.variant.startswith("moe") else "swiglu"
        plain = report_data.run(shape, run.precision, run.seed, steps=self.steps)
        flops, tokens = self.compute(run.size)
        of = run.variant.partition(":")[0]
        bpb = law(flops * tokens * (self.leverage or {}).get(run.variant, 1.0))
        bpb *= 1 - (self.gains or {}).get(run.variant, 0.0) + 0.02 * log2(run.lr / self.best) ** 2
        shared = Random(f"{run.seed} {run.size}").gauss(0, 1)  # the same batches for every variant
        own = Random(f"{of} {run.id}").gauss(0, 1)
        bpb *= 1 + self.noise * (0.5 * shared + own)
        if run.precision != self.precisions[0]:
            bpb *= 1.01
        plain |= {
            "id": run.id, "variant": run.variant, "seed": run.seed, "lr": run.lr,
            "tokens": int(tokens),
        }  # fmt: skip
        plain["recipe"]["model"]["vocab_size"] = 256
        plain["cost"]["training_flops_per_token"] = flops
        plain["speed"]["train_s"] = flops * tokens / 1e11 * (2 if shape == "moe" else 1)
        plain["final"] |= {"bpb": bpb, "nats_per_token": bpb * 0.693}
        if any(part in run.id for part in self.diverge):
            plain["final"] |= {"bpb": None, "nats_per_token": None}
            plain |= {"diverged": True, "diverged_step": 20}
        return plain
