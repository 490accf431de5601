"""The curve of a run: a row per logging interval and per evaluation, kept in the checkpoint."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from recipes.data import TextData
from recipes.metrics import Evaluation, evaluate
from recipes.ranks import data_group, meaned
from recipes.report.records import Point
from recipes.router_rows import (
    RouterRows,
    Row,
    assignments,
    dropped_share,
    router_figures,
    router_keys,
)
from recipes.task import LanguageModelTask


class Diverged(Exception):
    """The loss is no number any more: training ends here, and the run is recorded as it is."""


class Curve(Callback):
    """Logs a row every `log_every` and every `eval_every` steps, the same keys in each.

    Rows live in the checkpoint and are logged again on resume, so that none is lost or doubled.
    A run that begins from given weights has a row of step 0 too, before any training. Between rows
    nothing waits for the device. `train_s` counts the steps alone: no start, evaluation or
    checkpoint.
    """

    def __init__(self, data: TextData, *, log_every: int, eval_every: int, tokens: int,
                 flops: float, n_data: int = 1):  # fmt: skip
        """tokens, flops: of one optimizer step; training FLOPs. n_data: ranks that read data."""
        self.data, self.log_every, self.eval_every = data, log_every, eval_every
        self.tokens, self.flops, self.n_data = tokens, flops, n_data
        self.begin: Row | None = None  # step 0, of a run that begins from given weights
        self.rows: list[Row] = []
        self.train_s = 0.0
        self.routers = RouterRows()
        self._since: float | None = None  # when the clock was last started
        self._sums: dict[str, Tensor | float] = {}  # of the row in the making

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors, which weights_only loads; the row in the making too."""
        sums = {name: self._of_all(name) * value for name, value in self._meaned().items()}
        rows = {"begin": self.begin, "rows": [dict(row) for row in self.rows]}
        rest = {"train_s": self.train_s, "sums": sums, "routers": self.routers.state_dict()}
        return rows | rest

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.begin = state_dict.get("begin")
        self.rows = [dict(row) for row in state_dict["rows"]]
        self.train_s = state_dict["train_s"]
        self._sums = {n: value / self._of_all(n) for n, value in state_dict["sums"].items()}
        self.routers.load_state_dict(state_dict.get("routers"))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log again what the run had logged."""
        for row in (self.begin, *self.rows):
            if row is not None:
                self._write(trainer, row)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate weights that were given, and start the clock."""
        assert isinstance(pl_module, LanguageModelTask)
        if pl_module.recipe.init_from is not None and trainer.global_step == 0:
            self.begin = self._first_row(trainer, pl_module)
            self._write(trainer, self.begin)
        self._since = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count time again after a pause."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Count no training time until the next step starts."""
        if self._since is not None:
            self.train_s += time.perf_counter() - self._since
            self._since = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Add a micro-batch; write a row where one is due."""
        assert isinstance(pl_module, LanguageModelTask)
        self._add(outputs, batch)
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        evaluates = step % self.eval_every == 0 or step == trainer.max_steps
        if not evaluates and step % self.log_every:
            return
        row = self._close(step) | {"lr": trainer.optimizers[0].param_groups[0]["lr"]}
        self.pause()
        finite = math.isfinite(row["train_bpb"] or 0.0)
        row |= (
            self._evaluated(pl_module)
            if evaluates and finite
            else dict.fromkeys(self._eval_keys(pl_module))
        )
        self.rows.append(row)
        self._write(trainer, row)
        if not finite:
            raise Diverged(
                f"the loss became {row['train_bpb']} by step {step}: lower optim.lr, or clip "
                "gradients with optim.clip_norm"
            )

    def _add(self, outputs: dict[str, Any], batch: Any) -> None:
        added = {"nats": outputs["nats"], "bytes": batch.n_bytes.sum(), "batches": 1.0}
        added |= {f"loss/{name}": value for name, value in outputs["losses"].items()}
        added |= assignments(outputs["stats"])
        for name, value in added.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def _meaned(self) -> dict[str, float]:
        """The sums so far, meaned over all processes; waits for the device."""
        return meaned({name: float(value) for name, value in self._sums.items()})

    def _of_all(self, name: str) -> int:
        """What makes a mean over processes that of everything read: a checkpoint holds that."""
        return self.n_data if name in ("nats", "bytes") else 1

    def _close(self, step: int) -> Row:
        """The interval's means; the sums start anew."""
        sums = self._meaned()
        now = self.train_s + (time.perf_counter() - self._since if self._since else 0.0)
        before = self.rows[-1] if self.rows else {"tokens": 0, "train_s": 0.0}
        row: Row = {
            "step": step,
            "tokens": step * self.tokens,
            "flops": step * self.flops,
            "train_s": now,
            "tokens_per_s": (step * self.tokens - (before["tokens"] or 0))
            / max(now - (before["train_s"] or 0.0), 1e-9),
            "train_bpb": sums["nats"] / max(sums["bytes"], 1.0) / math.log(2),
        }
        losses = {name: v / sums["batches"] for name, v in sums.items() if name.startswith("loss/")}
        self._sums = {}
        return row | losses | dropped_share(sums)

    def _first_row(self, trainer: pl.Trainer, task: LanguageModelTask) -> Row:
        """Before any step: what an evaluation finds, and nothing of training."""
        row: Row = {"step": 0, "tokens": 0, "flops": 0, "train_s": 0.0, "tokens_per_s": None}
        row |= {"train_bpb": None, "lr": trainer.optimizers[0].param_groups[0]["lr"]}
        return row | self._evaluated(task)

    def _eval_keys(self, task: LanguageModelTask) -> list[str]:
        domains = [f"eval_bpb/{domain}" for domain in self.data.domains]
        accuracy = [] if self.data.task is None else ["eval_accuracy"]
        return ["eval_bpb", *accuracy, *domains, "sharpness", *router_keys(task.model)]

    def _evaluated(self, task: LanguageModelTask) -> Row:
        """Bits per byte, sharpness and figures of routers, on the thinned validation part."""
        eps = task.recipe.trainer.sharpness_eps
        group = data_group(self.data.trainer)
        found = evaluate(task.model, self.data.val_dataloader(), self.data.domains, eps, group)
        final = found.final()
        row: Row = dict.fromkeys(self._eval_keys(task))
        row["eval_bpb"] = final.bpb
        if self.data.task is not None:
            row["eval_accuracy"] = final.accuracy
        row |= {f"eval_bpb/{domain}": bpb for domain, bpb in final.bpb_by_domain.items()}
        row["sharpness"] = found.sharpness.value()
        return row | self.routers.of(found)

    def _write(self, trainer: pl.Trainer, row: Row) -> None:
        step = int(row["step"] or 0)
        logged = {name: value for name, value in row.items() if name != "step"}
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.log_metrics(logged, step)  # pyright: ignore[reportArgumentType]
            else:
                logger.log_metrics({k: v for k, v in logged.items() if v is not None}, step)

    def points(self) -> tuple[Point, ...]:
        """The rows as result.json keeps them: a number that is none is left out."""
        rows = self.rows if self.begin is None else [self.begin, *self.rows]
        return tuple(_point(row) for row in rows)

    def losses(self) -> list[float]:
        """Training loss of each row, bits per byte; of each step where each has a row."""
        return [row["train_bpb"] or 0.0 for row in self.rows]

    def steps(self, places: Sequence[int]) -> tuple[int, ...]:
        """The steps of some rows."""
        return tuple(int(self.rows[i]["step"] or 0) for i in places)

    def tokens_per_s(self) -> float:
        """Median over the rows but the first, whose interval holds the warm-up."""
        speeds = [row["tokens_per_s"] or 0.0 for row in self.rows]
        return statistics.median(speeds[1:] or speeds)


def final_evaluation(task: LanguageModelTask, data: TextData) -> Evaluation:
    """The validation part, thinned to `final_bytes_per_domain` where the recipe says so."""
    loader = data.eval_loader("validation", data.config.final_bytes_per_domain)
    group = data_group(data.trainer)
    return evaluate(task.model, loader, data.domains, task.recipe.trainer.sharpness_eps, group)


def _point(row: Row) -> Point:
    names = Point.__dataclass_fields__.keys() - {"router"}
    plain: dict[str, Any] = {name: _known(row.get(name)) for name in names}
    return Point(**plain, router=router_figures(row))


def _known(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None
