"""Measure, every so many steps of a run, what the formats do to the operands of its leaves."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from layers.precision.probe import Probe, ProbeReport, probing
from recipes.record import write_json
from recipes.report.probe_records import ProbedOperand, ProbedStep
from recipes.schema import ProbesConfig, Recipe

FILE = "probes.json"


def probe_callbacks(recipe: Recipe, out: Path) -> list[Callback]:
    """What the recipe's probes need: nothing where it asks for none.

    Stands before whatever evaluates: an evaluation is no part of a training step.
    """
    return [Probes(recipe.probes, out / FILE)] if recipe.probes else []


class Probes(Callback):
    """Probes the first micro-batch, forward and backward, of every N-th optimizer step.

    Step N is the one after which N steps are done. What was found lives in the checkpoint and is
    written to probes.json anew as it grows, so a resumed run leaves the file of an uninterrupted
    one:

        {"steps": [{"step": N, "operands": [a `Probed` of layers.precision.probe, ...]}, ...]}

    A probed step takes longer; its numbers are the same.
    """

    def __init__(self, config: ProbesConfig, path: Path):
        self.config, self.path = config, path
        self.found: list[dict[str, Any]] = []  # plain, as the file holds them
        self._block = ExitStack()
        self._probe: Probe | None = None
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and text, which weights_only loads."""
        return {"found": list(self.found)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.found = list(state_dict["found"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse selectors that choose nothing before any step; write what the run had found."""
        with self._probing(pl_module):
            self._write()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin, where the step is due and this is its first micro-batch."""
        step = trainer.global_step + 1
        if batch_idx % trainer.accumulate_grad_batches or step % self.config.every_steps:
            return
        self._step, self._probe = step, self._block.enter_context(self._probing(pl_module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """End, and write the file."""
        if self._probe is None:
            return
        self._block.close()
        self.found.append({"step": self._step, **self._probe.report().to_plain()})
        self._probe = None
        self._write()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave nothing on the leaves."""
        self._block.close()
        self._probe = None

    def _probing(self, pl_module: pl.LightningModule) -> Any:
        c, model = self.config, pl_module.model
        assert isinstance(model, nn.Module)
        return probing(model, c.name, c.roles, c.operands, c.layers)

    def _write(self) -> None:
        write_json(self.path, {"steps": self.found})

    def steps(self) -> tuple[ProbedStep, ...]:
        """What result.json keeps of it: the scales of the last step alone."""
        return tuple(_recorded(step, last=step is self.found[-1]) for step in self.found)


def recorded(callbacks: list[Callback]) -> tuple[ProbedStep, ...]:
    """What those of `probe_callbacks` found, as result.json keeps it."""
    return tuple(step for c in callbacks if isinstance(c, Probes) for step in c.steps())


def _recorded(step: dict[str, Any], *, last: bool) -> ProbedStep:
    return ProbedStep(
        step=step["step"],
        operands=tuple(
            ProbedOperand(
                leaf=row.leaf, operand=row.operand, format=row.format, elements=row.elements,
                snr_db=row.snr_db, clipped=row.clip_fraction, underflowed=row.underflow_fraction,
                scales=row.to_plain()["scales"] if last else {},
            )
            for row in ProbeReport.of(step).operands
        ),
    )  # fmt: skip
